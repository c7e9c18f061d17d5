"""What bit-widths share, low precision and torch.compile, against the reference way."""
import copy

import pytest
import torch
from quantized import quantize_activation, quantize_weight
from torch._inductor import config as inductor
from torch.nn.functional import conv2d, cosine_similarity
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from engine.errors import UserError
from engine.evaluation import evaluate
from engine.forward_pass import PRECISIONS, ForwardPass, check_precision, choose_precision
from engine.metrics import Metrics
from models import BITS, MODELS, BitWidth, calibrate
from models.float_layers import BatchNorm2d
from models.losses import NEXT_TARGET, any_precision_backward
from models.quan_ops import Clamp, Conv2dQ, DoReFaWeight, round_ste
from models.resnet_quan import BasicBlock, Bottleneck
from models.sharing import no_sharing, shared_computation
from small_networks import Bottlenecks, OneBlock, ResNet8, ShortSVHN

CPU = torch.device("cpu")
WIDTHS = [1, 2, 4, 8, 32]
NETWORKS = {**MODELS, "resnet8q": ResNet8, "one_block": OneBlock, "bottlenecks": Bottlenecks,
            "short_svhn": ShortSVHN}
SIZES = {"resnet20q": 16, "svhnq": 40, "resnet8q": 16, "one_block": 16, "bottlenecks": 16,
         "short_svhn": 40}


def network(name, all_conv=False, width=1, widths=WIDTHS, num_classes=5):
    torch.manual_seed(0)
    model = NETWORKS[name](widths, num_classes=num_classes, width=width, all_conv=all_conv)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0
    return model


def batch(name, count=4, dtype=torch.float64):
    images = reference.values("images", (count, 3, SIZES[name], SIZES[name]), 0).to(dtype)
    return images, torch.arange(count) % 5


def gradients(model, images, labels, loss="recursive", widths=WIDTHS, **kwargs):
    """Return the step's results, and the gradients by name."""
    model.train().zero_grad()
    results = any_precision_backward(model, images, labels, widths, loss, **kwargs)
    return results, {key: value.grad.clone() for key, value in model.named_parameters()}


def relative(found, expected):
    """Return the largest error of a dict's tensors, relative to a tensor's largest entry."""
    return max(float((found[key] - expected[key]).abs().max()
                     / expected[key].abs().max().clamp_min(1e-4)) for key in expected)


# ---- shared computation

# reference.fill gives BatchNorms random shifts: those of a new network are 0, and where a channel's
# inputs are all alike its outputs lie on the clamp's end, on either side by the order of sums.
@pytest.mark.parametrize("name, all_conv, loss", [
    *(("resnet20q", False, loss) for loss in NEXT_TARGET),
    *(("svhnq", False, loss) for loss in NEXT_TARGET),
    ("resnet20q", True, "recursive"), ("svhnq", True, "recursive"),
    ("bottlenecks", False, "recursive"), ("bottlenecks", True, "recursive")])
def test_shared_equals_everything_anew(name, all_conv, loss):
    model = reference.fill(network(name, all_conv).double(), seed=0)
    if name == "svhnq":  # low-bit sums are equal, or 0, but for their order: no maximum or clamp
        model.layers[8], model.layers[21] = torch.nn.AvgPool2d(2), torch.nn.Identity()
    images, labels = batch(name)
    anew = copy.deepcopy(model)
    expected, expected_gradients = gradients(anew, images, labels, loss, sharing=no_sharing)
    model.to(memory_format=torch.channels_last)
    found, found_gradients = gradients(model, images, labels, loss)
    assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert relative(found_gradients, expected_gradients) < 1e-9
    assert_close(dict(model.named_buffers()), dict(anew.named_buffers()), rtol=1e-9, atol=1e-9)


def test_a_scale_with_a_gradient_has_it_shared_too(monkeypatch):
    """As where a researcher takes the detach() out of DoReFaWeight.prepare."""
    def prepare(self, w):
        t = torch.tanh(w)
        return t / t.abs().amax(), w.abs().mean()

    images, labels = batch("resnet8q")
    detached = gradients(reference.fill(network("resnet8q").double(), seed=0), images, labels)[1]
    monkeypatch.setattr(DoReFaWeight, "prepare", prepare)
    found, expected = (gradients(reference.fill(network("resnet8q").double(), seed=0),
                                 images, labels, sharing=sharing)[1]
                       for sharing in (shared_computation, no_sharing))
    assert relative(found, expected) < 1e-9 < relative(found, detached)


def test_what_is_shared_is_computed_once_a_step(monkeypatch):
    model = network("resnet20q", widths=[1, 8, 32]).double()
    images, labels = batch("resnet20q")
    calls = []
    convolve, tanh = torch.nn.Conv2d.forward, torch.tanh

    def forward(self, x):
        calls.append("stem" if self is model.conv0 else "another")
        return convolve(self, x)

    monkeypatch.setattr(torch.nn.Conv2d, "forward", forward)
    monkeypatch.setattr(torch, "tanh", lambda w: calls.append("tanh") or tanh(w))
    any_precision_backward(model, images, labels, [1, 8, 32])
    layers = [layer for layer in model.modules() if isinstance(layer, Conv2dQ)]
    assert calls.count("stem") == 1 and len(layers) == 18
    assert calls.count("tanh") == 2 * 18  # on the way there, and anew on the way back
    any_precision_backward(model, images, labels, [1, 8, 32], sharing=no_sharing)
    assert calls.count("stem") == 4 and calls.count("tanh") == 5 * 18
    assert not any(layer.shared for layer in layers)
    assert "forward" not in vars(model.conv0)


def test_an_error_within_a_step_leaves_nothing_shared():
    model = network("resnet20q")
    images, labels = batch("resnet20q", dtype=torch.float32)
    with pytest.raises(ValueError, match="the network has no 3-bit BatchNorm"):
        any_precision_backward(model, images, labels, [32, 3])  # 32 comes first
    assert not any(layer.shared for layer in model.modules() if isinstance(layer, Conv2dQ))
    assert "forward" not in vars(model.conv0)


def test_evaluation_shares_and_gives_the_same():
    model = reference.fill(network("resnet20q").double(), seed=0)
    loader = [batch("resnet20q")]
    forward_pass = ForwardPass(model, CPU)
    found = evaluate(forward_pass, loader, WIDTHS, CPU)
    forward_pass.shared = False
    expected = evaluate(forward_pass, loader, WIDTHS, CPU)
    for bits in WIDTHS:
        assert found[bits] == pytest.approx(expected[bits], rel=1e-12)


# ---- integer operands

class Operands(TorchDispatchMode):
    """Gathers the operands of convolutions and matrix products."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "convolution", "convolution_backward"):
            self.found += [(name, arg) for arg in args if isinstance(arg, torch.Tensor)]
        return function(*args, **(kwargs or {}))

    def of(self, name):
        return [operand for kind, operand in self.found if kind == name]


@pytest.mark.parametrize("bits", range(1, 9))
def test_operands_in_16_bits_are_the_integers(bits):
    torch.manual_seed(0)
    conv = Conv2dQ(16, 8, 3, bias=False)
    conv.switch_bit_width(BitWidth(bits))
    n = 2**bits - 1
    x = quantize_activation(1.5 * torch.rand(2, 16, 8, 8), bits)
    with torch.autocast("cpu", torch.bfloat16), Operands() as operands:
        conv(x)
    a, w = operands.of("convolution")
    assert a.dtype == w.dtype == torch.bfloat16
    k, odd = a.double() * 2**bits, w.double() * 2**bits
    assert torch.equal(k, (n * x.double()).round())
    levels = quantize_weight(conv.weight.double(), bits) / conv.weight.double().abs().mean()
    assert torch.equal(odd, (n * levels).round())
    assert set(odd.abs().unique().tolist()) <= set(range(1, n + 1, 2))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bias", [True, False])
def test_integer_operands_give_the_same_values_and_gradients(bits, bias, monkeypatch):
    torch.manual_seed(0)
    conv = Conv2dQ(3, 4, 3, bias=bias).double()
    x = quantize_activation(torch.rand(2, 3, 8, 8, dtype=torch.float64), bits).requires_grad_()
    conv.switch_bit_width(BitWidth(bits))
    upstream = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    results = []
    for low in (False, True):
        monkeypatch.setattr("models.quan_ops.low_precision", lambda x: low)
        out = conv(x)
        results.append((out, *torch.autograd.grad(out, [x, *conv.parameters()], upstream)))
    assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)


def tf32(x):
    """Round float64 to TF32: 10 bits after the first, as tensor cores do to float32."""
    return ((x.float().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32).double()


@pytest.mark.parametrize("bits", [8, 3])
@pytest.mark.parametrize("rounded, error", [(lambda x: x.bfloat16().double(), 1e-5), (tf32, 1e-6)])
def test_low_precision_costs_the_quantizer_nothing(bits, rounded, error, monkeypatch):
    """A convolution of rounded operands is exact with integers, and not on the published grid."""
    torch.manual_seed(0)
    conv = Conv2dQ(64, 8, 3, bias=False).double()
    conv.switch_bit_width(BitWidth(bits))
    x = quantize_activation(torch.rand(4, 64, 10, 10, dtype=torch.float64), bits)
    exact = conv(x)
    monkeypatch.setattr(conv, "_conv_forward",
                        lambda x, w, bias: conv2d(rounded(x), rounded(w), bias))
    assert (conv(x) - exact).abs().mean() > error * exact.abs().mean()
    monkeypatch.setattr("models.quan_ops.low_precision", lambda x: True)
    assert_close(conv(x), exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name, all_conv", [
    ("svhnq", False), ("resnet20q", False), ("resnet20q", True)])
def test_bf16_losses_and_gradients_are_near(name, all_conv):
    images, labels = batch(name, 8, torch.float32)
    found = {}
    for precision in ("fp32", "bf16"):
        model = network(name, all_conv, widths=[8, 32])
        forward = ForwardPass(model, CPU, precision)
        results, grads = gradients(model, images, labels, widths=[8, 32], forward=forward)
        assert all(grad.dtype == torch.float32 for grad in grads.values())
        losses = torch.stack([loss for loss, _ in results.values()])
        found[precision] = losses, torch.cat([grad.flatten() for grad in grads.values()])
    assert_close(found["bf16"][0], found["fp32"][0], rtol=0.05, atol=0)
    assert cosine_similarity(found["bf16"][1], found["fp32"][1], dim=0) > 0.95


def test_convolutions_are_in_low_precision_and_the_classifier_is_not():
    model = network("resnet8q")  # its only matrix products are the classifier's
    forward = ForwardPass(model, CPU, "bf16")
    images, labels = batch("resnet8q", dtype=torch.float32)
    with Operands() as operands:
        gradients(model, images, labels, forward=forward)
    for name, dtype in (("mm", torch.float32), ("addmm", torch.float32),
                        ("convolution", torch.bfloat16), ("convolution_backward", torch.bfloat16)):
        assert {operand.dtype for operand in operands.of(name)} == {dtype}, name


@pytest.mark.parametrize("name", ["resnet8q", "bottlenecks"])
@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_residual_sums_have_the_precision_of_the_stem(name, precision, dtype):
    """Shared or not, at every bit-width; and the BatchNorms after them are in float32."""
    model = network(name, widths=[2, 32])
    forward = ForwardPass(model, CPU, precision)
    images, labels = batch(name, 2, torch.float32)
    sums, normalized = [], []
    for layer in model.modules():
        if type(layer) in (BasicBlock, Bottleneck):
            layer.register_forward_hook(lambda layer, args, out: sums.extend([*args, out]))
        elif isinstance(layer, BatchNorm2d):
            layer.register_forward_hook(lambda layer, args, out: normalized.append(out))
    for sharing in (shared_computation, no_sharing):
        gradients(model, images, labels, widths=[2, 32], forward=forward, sharing=sharing)
    assert {x.dtype for x in sums} == {dtype}
    assert {x.dtype for x in normalized} == {torch.float32}


def test_a_precision_that_is_not_in_the_hardware(monkeypatch):
    message = "cpu has no hardware for --precision tf32: choose fp32"
    with pytest.raises(UserError, match=message):
        check_precision("tf32", CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    for precision in ("tf32", "bf16"):
        with pytest.raises(UserError, match=f"cuda has no hardware for --precision {precision}"):
            check_precision(precision, torch.device("cuda"))
    check_precision("fp32", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for precision in PRECISIONS:
        check_precision(precision, torch.device("cuda"))


@pytest.mark.parametrize("device, capability, chosen", [
    ("cpu", None, "fp32"), ("cuda", (7, 5), "fp32"), ("cuda", (8, 0), "tf32"),
    ("cuda", (12, 0), "tf32")])
def test_the_precision_that_auto_is(device, capability, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert choose_precision("auto", torch.device(device)) == chosen
    assert choose_precision("bf16", torch.device(device)) == "bf16"


def test_memory_format_is_channels_last_where_the_hardware_takes_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    model = network("svhnq")
    for device, precision, channels_last in (
            ("cpu", "fp32", False), ("cpu", "bf16", False), ("cuda", "fp32", False),
            ("cuda", "tf32", True), ("cuda", "bf16", True)):
        found = ForwardPass(model, torch.device(device), precision).memory_format
        assert (found == torch.channels_last) == channels_last
        weight = model.layers[3].weight
        assert weight.is_contiguous(memory_format=found)


# ---- no waiting

class Waiting(TorchDispatchMode):
    """Gathers what would wait for a device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal.default")
        if any(name in str(function) for name in waits):
            self.found.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_nothing_in_a_step_waits_for_the_device(precision):
    model = network("resnet8q")
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    forward = ForwardPass(model, CPU, precision)
    images, labels = batch("resnet8q", dtype=torch.float32)
    metrics = Metrics(WIDTHS, CPU)

    def step():
        optimizer.zero_grad()
        results = any_precision_backward(model, images, labels, WIDTHS, forward=forward)
        optimizer.step()
        metrics.add(results, labels)

    step()
    with Waiting() as waiting:
        step()
        assert waiting.found == []
        metrics.averages()
    assert waiting.found  # the counter counts: a log point does wait


def test_calibration_does_not_wait_and_averages_over_batches():
    model = network("resnet8q")
    batches = batch("resnet8q", count=12, dtype=torch.float32)[0].split(4)
    calibrate(model, 2, batches[:1])
    with Waiting() as waiting:
        calibrate(model, 2, batches)
    assert waiting.found == []
    layer = model.bn.bn_dict["2"]
    assert layer.momentum == 0.1 and layer.num_batches_tracked == 3
    found = layer.running_mean.clone()
    alone = []
    for images in batches:
        calibrate(model, 2, [images])
        alone.append(layer.running_mean.clone())
    torch.testing.assert_close(found, torch.stack(alone).mean(0))


# ---- compiled

def compiler_works():
    try:
        torch.compile(lambda x: (x + 1).sin())(torch.zeros(64))
    except RuntimeError:
        return False
    finally:
        torch._dynamo.reset()
    return True


@pytest.fixture
def cheap_compiler():
    """Let inductor compile for any CPU, and start no processes that import torch anew."""
    with inductor.patch({"compile_threads": 1, "cpp.vec_isa_ok": False}):
        yield


@pytest.mark.parametrize("function", [
    lambda x: Clamp.apply(x, 0, 1), round_ste, lambda x: quantize_weight(x, 4),
    lambda x: quantize_activation(x, 4)])
def test_compiled_quantizers_have_their_gradients(function):
    torch._dynamo.reset()
    torch.manual_seed(0)
    x = torch.cat([2 * torch.rand(100) - 0.5, torch.tensor([0.0, 1.0])]).requires_grad_()
    expected, = torch.autograd.grad(function(x).sum(), x)
    found = torch.compile(function, backend="aot_eager")(x)
    assert_close(found, function(x))
    assert_close(torch.autograd.grad(found.sum(), x)[0], expected)
    assert expected.any()


@pytest.mark.parametrize("name, precision, backend", [
    ("short_svhn", "fp32", "aot_eager"),  # all of a compilation but its C++
    ("one_block", "bf16", "inductor")])
def test_compiled_equals_eager(name, precision, backend, cheap_compiler):
    """Logits and each parameter's gradient, at 8 bits, so that 2 bits would not pass for them."""
    if backend == "inductor" and not compiler_works():
        pytest.skip("no C++ compiler here")
    images, labels = batch(name, dtype=torch.float32)
    found = {}
    for batch_size in (None, 4):
        model = network(name, widths=[8])
        forward = ForwardPass(model, CPU, precision, batch_size, backend)
        results, grads = gradients(model, images, labels, widths=[8], forward=forward,
                                   sharing=forward.sharing)
        found[batch_size] = results[8][1], grads
    (logits, grads), (expected_logits, expected) = found[4], found[None]
    # Not to the last digits: where a fused sum crosses a rounding threshold a level changes.
    tolerance, least = (1e-3, 0.99) if precision == "fp32" else (0.02, 0.95)
    assert_close(logits, expected_logits, rtol=tolerance, atol=tolerance)
    for key in expected:
        if "skip_bn.bias" not in key:  # of gradient 0, but for rounding: a BatchNorm follows
            near = cosine_similarity(grads[key].flatten(), expected[key].flatten(), dim=0)
            assert near > least, key


def test_no_recompilation_after_the_first_step():
    """Bit-widths, in training and evaluation more than dynamo's own limit of 8, and all weights:
    one graph each; odd batches go uncompiled."""
    torch._dynamo.reset()
    widths = WIDTHS
    model = network("short_svhn", widths=widths)
    forward = ForwardPass(model, CPU, batch_size=4, backend="eager")
    images, labels = batch("short_svhn", dtype=torch.float32)

    def train_and_evaluate(count):
        model.train()
        any_precision_backward(model, images[:count], labels[:count], widths, forward=forward,
                               sharing=forward.sharing)
        validation = [(images, labels), (images[:3], labels[:3])]
        evaluate(forward, validation, widths, CPU)

    counters = torch._dynamo.utils.counters["stats"]
    before = counters["unique_graphs"]
    train_and_evaluate(4)
    graphs = counters["unique_graphs"]
    assert graphs - before == 2 * (len(widths) + 1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (4, 3, 4):
            train_and_evaluate(count)
    assert counters["unique_graphs"] == graphs
