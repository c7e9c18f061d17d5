"""The fast path against the plain one: the same gradients; every precision; compiled without recompiling."""
import copy

import pytest
import torch
from torch.testing import assert_close

import reference
import step as step_module
import train
from errors import UserError
from models import MODELS
from models.losses import LOSSES, any_precision_backward, sharing, sharing_nothing
from models.quan_ops import (BIT_WIDTHS, ActivationQ, Conv2dQ, Dropout, MaxPool2d, WeightLevels, clamp_unit,
                             quantize_activation, quantize_normalized, quantize_weight, round_ste, set_arithmetic, through)
from step import Computation, TrainingStep, check_precision, missing_compiler
from utils import Metrics

CPU = torch.device("cpu")
WIDTHS = [1, 2, 4, 8, 32]
SIZES = {"resnet20q": 16, "resnet50q": 16, "svhnq": 40}


def network(name, all_conv=False, width=1, widths=WIDTHS, num_classes=5):
    torch.manual_seed(0)
    model = MODELS[name](widths, num_classes=num_classes, width=width, all_conv=all_conv)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0
    return model


def batch(name, count=4):
    return (reference.values("images", (count, 3, SIZES[name], SIZES[name]), 0),
            torch.arange(count) % 5)


def gradients(model, images, labels, loss, plain, widths=WIDTHS):
    set_arithmetic(model, plain=plain)
    model.train().zero_grad()
    results = any_precision_backward(model, images, labels, widths, loss, share=sharing_nothing if plain else sharing)
    return results, {key: parameter.grad.clone() for key, parameter in model.named_parameters()}


def relative(found, expected):
    """The largest error of a tensor of the dict, relative to the tensor's largest entry (of 1e-4 at least)."""
    return max(float((found[key] - expected[key]).abs().max() / expected[key].abs().max().clamp_min(1e-4))
               for key in expected)


# reference.fill gives BatchNorms random shifts: those of a new network are 0, and where a channel's inputs are all alike
# its outputs lie on the clamp's end, on either side of it by the order of sums.
@pytest.mark.parametrize("name, all_conv, loss", [
    *(("resnet20q", False, loss) for loss in LOSSES), *(("svhnq", False, loss) for loss in LOSSES),
    ("resnet20q", True, "recursive"), ("svhnq", True, "recursive"), ("resnet50q", False, "recursive"),
    ("resnet50q", True, "recursive")])
def test_shared_equals_everything_anew(name, all_conv, loss):
    model = reference.fill(network(name, all_conv).double(), seed=0)
    if name == "svhnq":  # low-bit sums are equal, or 0, only up to the order of summation: no maximum or clamp of them
        model.layers[8], model.layers[21] = torch.nn.AvgPool2d(2), torch.nn.Identity()
    images, labels = batch(name)
    plain_model = copy.deepcopy(model)
    expected, expected_gradients = gradients(plain_model, images, labels, loss, plain=True)
    model.to(memory_format=torch.channels_last)
    found, found_gradients = gradients(model, images, labels, loss, plain=False)
    assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert relative(found_gradients, expected_gradients) < 1e-9
    assert_close(dict(model.named_buffers()), dict(plain_model.named_buffers()), rtol=1e-9, atol=1e-9)


def test_what_is_shared_is_computed_once_a_step(monkeypatch):
    model = network("resnet20q", widths=[1, 8, 32]).double()
    images, labels = batch("resnet20q")
    calls = []
    stem, tanh = model.conv0.forward, torch.tanh
    monkeypatch.setattr(model.conv0, "forward", lambda x: calls.append("stem") or stem(x))
    monkeypatch.setattr(torch, "tanh", lambda w: calls.append("tanh") or tanh(w))
    any_precision_backward(model, images, labels, [1, 8, 32])
    layers = sum(isinstance(layer, Conv2dQ) for layer in model.modules())
    assert calls.count("stem") == 1 and calls.count("tanh") == layers == 18
    any_precision_backward(model, images, labels, [1, 8, 32], share=sharing_nothing)
    assert calls.count("stem") == 4 and calls.count("tanh") == 4 * layers
    assert not any(layer.shared for layer in model.modules() if isinstance(layer, Conv2dQ))


def test_an_error_within_a_step_leaves_nothing_shared():
    model = network("resnet20q")
    with pytest.raises(ValueError, match="3 bits was not trained"):
        any_precision_backward(model, batch("resnet20q")[0].float(), batch("resnet20q")[1], [32, 3])  # 32 comes first
    assert not any(layer.shared for layer in model.modules() if isinstance(layer, Conv2dQ))


# ---- quantizers in fewer operations

ENDS = [-1.0, -1e-300, 0.0, 1e-300, 0.5, 1.0, 1 + 2**-50, 2.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", [True, False])
@pytest.mark.parametrize("bits", BIT_WIDTHS)
def test_activations_equal_the_equation(bits, rounding, dtype):
    torch.manual_seed(0)
    x = torch.cat([torch.randn(200), torch.tensor(ENDS, dtype=torch.float64)]).to(dtype).requires_grad_()
    upstream = torch.randn_like(x)
    layer = ActivationQ(rounding)
    layer.bits = bits
    found, = torch.autograd.grad(layer(x), x, upstream)
    expected, = torch.autograd.grad(quantize_activation(x, bits, rounding), x, upstream)
    assert torch.equal(layer(x), quantize_activation(x, bits, rounding))
    limits = torch.finfo(dtype)  # n * grad / n of the equation is rounded, and float16's smallest have fewer digits
    assert_close(found, expected, rtol=2 * limits.eps, atol=limits.tiny if dtype == torch.float16 else 0)


@pytest.mark.parametrize("bits", BIT_WIDTHS)
def test_convolutions_equal_the_equation(bits):
    torch.manual_seed(0)
    conv, images = Conv2dQ(3, 4, 3).double(), torch.randn(2, 3, 8, 8, dtype=torch.float64)
    conv.bits = bits
    upstream = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    results = []
    for conv.plain in (True, False):
        out = conv(images)
        results.append((out, *torch.autograd.grad(out, list(conv.parameters()), upstream)))
    assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pooling_is_torchs(memory_format):
    torch.manual_seed(0)
    x = torch.randint(-1, 3, (3, 5, 9, 8)).float().contiguous(memory_format=memory_format).requires_grad_()  # many are equal
    expected, found = torch.nn.MaxPool2d(2)(x), through([MaxPool2d()], x)
    upstream = torch.randn_like(expected)
    assert torch.equal(found, expected)
    assert torch.equal(*(torch.autograd.grad(out, x, upstream)[0] for out in (found, expected)))


def test_dropout_keeps_half_of_the_elements_at_random():
    torch.manual_seed(0)
    layer, x = Dropout(0.5), torch.ones(40, 32, 5, 5).contiguous(memory_format=torch.channels_last)
    kept = [through([layer], x).flatten() for _ in range(2)]
    for elements in kept:
        assert set(elements.tolist()) == {0.0, 2.0}
        assert abs(elements.mean() - 1) < 4 / len(elements)**0.5  # 4 standard deviations
    neighbours = [(kept[0][:-shift] * kept[0][shift:]).mean() for shift in (1, 8, 25, 32)]  # 1 where independent
    assert max(abs(value - 1) for value in (*neighbours, (kept[0] * kept[1]).mean())) < 8 / len(kept[0])**0.5
    x.requires_grad_()
    out = through([layer], x)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], out.detach())
    assert torch.equal(through([layer.eval()], x), x)
    few = torch.ones(1, 3, 1, 2).contiguous(memory_format=torch.channels_last)  # fewer than the bits of a word
    assert set(torch.stack([through([layer.train()], few) for _ in range(99)]).flatten().tolist()) == {0.0, 2.0}


def test_a_convolution_to_one_pixel():
    torch.manual_seed(0)
    conv, images = Conv2dQ(3, 4, 5).double(), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    conv.bits = 2
    expected = torch.nn.functional.conv2d(images, quantize_weight(conv.weight, 2), conv.bias)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        assert_close(conv.to(memory_format=memory_format)(images.contiguous(memory_format=memory_format)), expected)


# ---- precision

@pytest.mark.parametrize("bits", range(1, 9))
def test_levels_are_integers_over_a_power_of_two_and_exact_in_low_precision(bits):
    torch.manual_seed(0)
    v = torch.cat([torch.tensor([-1.0, 1.0]), 2 * torch.rand(5000) - 1]).double()
    n = 2**bits - 1
    levels = WeightLevels.apply(v, n)
    integers = levels * (n + 1)
    assert integers.unique().tolist() == list(range(-n, n + 1, 2))
    assert_close(levels * (n + 1) / n, 2 * torch.round(n * (v / 2 + 0.5)) / n - 1)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(levels.to(dtype).double(), levels)
    if bits <= 4:
        assert torch.equal(levels.to(torch.float8_e4m3fn).double(), levels)


@pytest.mark.parametrize("quantized_input", [True, False])
@pytest.mark.parametrize("bits", BIT_WIDTHS)
def test_levels_give_the_same_values_and_gradients(bits, quantized_input):
    torch.manual_seed(0)
    conv = Conv2dQ(3, 4, 3, quantized_input=quantized_input).double()
    x = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    x = (quantize_activation(x, bits) if quantized_input else x).requires_grad_()
    conv.bits = bits
    upstream = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    results = []
    for conv.levels in (False, True):
        out = conv(x)
        results.append((out, *torch.autograd.grad(out, [x, *conv.parameters()], upstream)))
    assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype, bits", [(torch.bfloat16, 8), (torch.bfloat16, 3), (torch.float16, 8)])
def test_low_precision_costs_the_quantizer_nothing(dtype, bits, monkeypatch):
    """A convolution of operands rounded to bfloat16 or float16 is exact with levels, and not without."""
    torch.manual_seed(0)
    conv = Conv2dQ(64, 8, 3, bias=False).double()
    conv.bits = bits
    x = quantize_activation(torch.rand(4, 64, 10, 10, dtype=torch.float64), bits)
    exact = conv(x)
    monkeypatch.setattr(conv, "convolve", lambda x, w, bias: torch.nn.functional.conv2d(
        x.to(dtype).double(), w.to(dtype).double(), bias))
    conv.levels = True
    assert_close(conv(x), exact, rtol=1e-12, atol=1e-12)
    conv.levels = False
    assert (conv(x) - exact).abs().mean() > 1e-5 * exact.abs().mean()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name, all_conv", [("svhnq", False), ("resnet20q", False), ("resnet20q", True)])
def test_low_precision_losses_and_gradients_are_near(name, all_conv, precision):
    images, labels = batch(name, 8)
    images = images.float()
    gathered = {}
    for chosen in ("fp32", precision):
        model = network(name, all_conv, widths=[8, 32])
        computation = Computation(model, CPU, precision=chosen)
        optimizer = torch.optim.SGD(model.parameters(), 0.0, fused=True)  # so that the gradients stay
        step = TrainingStep(computation, optimizer, [8, 32], "recursive")
        row, _ = step(images, labels, 1.0, None)
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        scale = step.scaler.get_scale()
        gathered[chosen] = row[:, 0], torch.cat([parameter.grad.flatten() for parameter in model.parameters()]) / scale
    (losses, found), (expected_losses, expected) = gathered[precision], gathered["fp32"]
    assert_close(losses, expected_losses, rtol=0.05, atol=0)
    assert torch.nn.functional.cosine_similarity(found, expected, dim=0) > 0.95
    assert found.isfinite().all()


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Gathers the types of the operands of matrix products and convolutions."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "convolution", "convolution_backward"):
            tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
            self.found.setdefault(name, set()).update(tensor.dtype for tensor in tensors)
        return function(*args, **(kwargs or {}))


def test_convolutions_are_in_low_precision_and_the_classifier_is_not():
    model = network("resnet20q")  # its only matrix products are the classifier's
    computation = Computation(model, CPU, precision="bf16")
    step = TrainingStep(computation, torch.optim.SGD(model.parameters(), 0.1, fused=True), WIDTHS, "recursive")
    images, labels = batch("resnet20q")
    with Products() as products:
        step(images.float(), labels, 1.0, None)
    for name, dtype in (("mm", torch.float32), ("addmm", torch.float32), ("convolution", torch.bfloat16),
                        ("convolution_backward", torch.bfloat16)):
        assert products.found[name] == {dtype}


def test_float16_gradients_that_overflow_skip_the_step_and_lower_the_scale():
    model = network("svhnq", widths=[32])
    optimizer = torch.optim.Adam(model.parameters(), 0.1, fused=True)
    step = TrainingStep(Computation(model, CPU, precision="fp16"), optimizer, [32], "hard")
    images, labels = batch("svhnq")
    step(images.float(), labels, 1.0, None)
    before, scale = copy.deepcopy(dict(model.named_parameters())), step.scaler.get_scale()
    step(images.float(), labels, 1e30, None)
    assert_close(dict(model.named_parameters()), before, rtol=0, atol=0)
    assert step.scaler.get_scale() == scale / 2


def test_a_precision_that_is_not_in_the_hardware(monkeypatch):
    with pytest.raises(UserError, match="--precision tf32 is not in the hardware of cpu: choose fp32"):
        check_precision("tf32", CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    for precision in ("tf32", "bf16"):
        with pytest.raises(UserError, match=f"--precision {precision} is not in the hardware of cuda: choose fp32 or fp16"):
            check_precision(precision, torch.device("cuda"))
    check_precision("fp16", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for precision in step_module.PRECISIONS:
        check_precision(precision, torch.device("cuda"))


# ---- no waiting

class Waiting(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts what would wait for a device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal.default")):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_nothing_in_a_step_waits_for_the_device(precision):
    model = network("resnet20q")
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    step = TrainingStep(Computation(model, CPU, precision=precision), optimizer, WIDTHS, "recursive")
    images, labels = batch("resnet20q")
    metrics = Metrics(WIDTHS, CPU)
    step(images.float(), labels, 1.0, None)
    with Waiting() as waiting:
        row, _ = step(images.float(), labels, 1.0, None)
        metrics.add(row, len(labels))
        assert waiting.found == []
        metrics.averages()
    assert waiting.found  # the counter counts: a log point does wait


# ---- compiled

@pytest.mark.parametrize("quantize", [
    lambda x: clamp_unit(x), lambda x: round_ste(x), lambda x: quantize_normalized(x, [torch.tensor(0.3)], 4),
    lambda x: quantize_normalized(x, None, 4, levels=True)])
def test_compiled_quantizers_have_their_gradients(quantize):
    torch._dynamo.reset()
    torch.manual_seed(0)
    x = torch.cat([2 * torch.rand(100) - 0.5, torch.tensor([0.0, 1.0])]).requires_grad_()
    expected, = torch.autograd.grad(quantize(x).sum(), x)
    found = torch.compile(quantize, backend="aot_eager")(x)
    assert_close(found, quantize(x))
    assert_close(torch.autograd.grad(found.sum(), x)[0], expected)
    assert expected.any()


def test_compiled_equals_eager():
    if missing_compiler(CPU) is not None:
        pytest.skip("no C++ compiler here")
    results = {}
    for compiles in (False, True):
        model = network("svhnq", widths=[8])
        optimizer = torch.optim.SGD(model.parameters(), 0.1, fused=True)
        step = TrainingStep(Computation(model, CPU, compiles=compiles, batch_size=4), optimizer, [8], "hard")
        images, labels = batch("svhnq")
        row, _ = step(images.float(), labels, 1.0, None)
        results[compiles] = row[:, 0], torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    assert_close(results[True][0], results[False][0], rtol=1e-4, atol=0)
    # Not to the last digits: fused sums differ by some, and where one crosses a rounding threshold a level changes.
    assert torch.nn.functional.cosine_similarity(results[True][1], results[False][1], dim=0) > 0.999


def test_no_recompilation_after_the_first_step():
    """Every bit-width of 9, for training and evaluation: one graph each, over whole batches; odd ones go uncompiled."""
    torch._dynamo.reset()
    model = network("svhnq", widths=list(BIT_WIDTHS))
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    computation = Computation(model, CPU, compiles=True, batch_size=4, backend="eager")
    step = TrainingStep(computation, optimizer, list(BIT_WIDTHS), "recursive")
    images, labels = (part.float() if part.is_floating_point() else part for part in batch("svhnq"))

    validation = [(images, labels), (images[:3], labels[:3])]
    step(images, labels, 1.0, None)
    train.evaluate(computation, validation, list(BIT_WIDTHS))
    counters = torch._dynamo.utils.counters["stats"]
    graphs = counters["unique_graphs"]
    model.train()
    assert graphs >= 2 * len(BIT_WIDTHS)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (4, 3, 4):
            model.train()
            step(images[:count], labels[:count], 1.0, None)
            train.evaluate(computation, validation, list(BIT_WIDTHS))
    assert counters["unique_graphs"] == graphs
