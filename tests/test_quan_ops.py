"""Quantizers against values by hand, the layers, and that changing one is felt everywhere."""
import contextlib
import math

import pytest
import torch
from torch.testing import assert_close

import reference
from engine.evaluation import evaluate
from engine.forward_pass import ForwardPass
from models import MODELS, calibrate, quan_ops, set_bit_width
from models.float_layers import BatchNorm2d
from models.losses import any_precision_backward
from models.quan_ops import (BIT_WIDTHS, ActivationQ, Conv2dQ, SwitchableBatchNorm2d,
                             check_bit_widths, normalize_weight, quantize_activation,
                             quantize_weight)

CPU = torch.device("cpu")
LEVELS = {  # bits: n, and by hand round(n * 0.6), round(n * 0.5) half to even, round(n * 0.75)
    1: (1, 1, 0, 1), 2: (3, 2, 2, 2), 3: (7, 4, 4, 5), 4: (15, 9, 8, 11), 5: (31, 19, 16, 23),
    6: (63, 38, 32, 47), 7: (127, 76, 64, 95), 8: (255, 153, 128, 191)}


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def quantized(w, bits):
    return quantize_weight(*normalize_weight(w), bits)


@pytest.mark.parametrize("bits", LEVELS)
def test_activation_by_hand(bits):
    n, six_tenths, half, _ = LEVELS[bits]
    x = double(-0.3, 0.0, 0.5, 0.6, 1.0, 1.7)
    assert_close(quantize_activation(x, bits), double(0, 0, half / n, six_tenths / n, 1, 1))
    assert_close(quantize_activation(x, bits, rounding=False), double(0, 0, 0.5, 0.6, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", [True, False])
@pytest.mark.parametrize("bits", BIT_WIDTHS)
def test_activation_gradient_passes_from_0_to_1_both_ends_included(bits, rounding, dtype):
    x = torch.tensor([-0.1, -1e-30, -0.0, 0.0, 0.3, 1.0, 1.1], dtype=dtype).requires_grad_()
    upstream = torch.tensor([1, 2, 3, 4, 5, 6, 7], dtype=dtype)
    quantize_activation(x, bits, rounding).backward(upstream)
    expected = [0, 0, 0, 0, 5, 6, 7] if bits == 32 else [0, 0, 3, 4, 5, 6, 0]
    assert x.grad.tolist() == expected


def test_activation_at_32_bits_is_relu():
    assert_close(quantize_activation(double(-2, 0, 0.3, 7), 32), double(0, 0, 0.3, 7))


def test_activation_keeps_what_is_not_a_number():
    assert quantize_activation(double(math.nan), 4).isnan().all()


@pytest.mark.parametrize("bits", LEVELS)
def test_weight_by_hand(bits):
    n, _, half, three_quarters = LEVELS[bits]
    w = double(math.atanh(0.8), -math.atanh(0.8), math.atanh(0.4), 0)  # u = 1, 0, 0.75, 0.5
    scale = (2 * math.atanh(0.8) + math.atanh(0.4)) / 4
    levels = double(1, -1, 2 * three_quarters / n - 1, 2 * half / n - 1)
    assert_close(quantized(w, bits), scale * levels)


def test_weight_at_32_bits_by_hand():
    w = double(math.atanh(0.8), -math.atanh(0.4), 0)
    scale = (math.atanh(0.8) + math.atanh(0.4)) / 3
    assert_close(quantized(w, 32), scale * double(1, -0.5, 0))


@pytest.mark.parametrize("bits", BIT_WIDTHS)
def test_weight_gradient_by_hand(bits):
    """E (1 - t^2) / m of the upstream one; the largest weight also takes -E sum(g t) / m^2."""
    w = double(math.atanh(0.8), math.atanh(0.4), 0).requires_grad_()
    scale = (math.atanh(0.8) + math.atanh(0.4)) / 3
    quantized(w, bits).backward(double(1, 2, 3))
    largest = 0.36 * (1 / 0.8 - (1 * 0.8 + 2 * 0.4) / 0.64)
    assert_close(w.grad, scale * double(largest, 2 * 0.84 / 0.8, 3 / 0.8))


@pytest.mark.parametrize("bits", BIT_WIDTHS)
def test_weight_is_the_single_equation_of_the_paper_bit_for_bit(bits):
    torch.manual_seed(0)
    w = torch.randn(1000)
    t, n, scale = torch.tanh(w), 2**bits - 1, w.abs().mean()
    u = t / t.abs().max() / 2 + 0.5
    expected = t / t.abs().max() if bits == 32 else 2 * (torch.round(n * u) / n) - 1
    assert torch.equal(quantized(w, bits), scale * expected)


@pytest.mark.parametrize("bits", LEVELS)
def test_quantized_values_are_at_most_2_to_the_bits(bits):
    torch.manual_seed(0)
    x = torch.randn(20_000, dtype=torch.float64)
    assert len(quantize_activation(x, bits).unique()) == 2**bits
    # The two outer weight levels take half an interval: at 8 bits a draw may miss some.
    assert len(quantized(x, bits).unique()) <= 2**bits


def test_convolution_quantizes_its_weight_and_not_its_bias():
    conv = Conv2dQ(2, 3, 3, padding=1).double()
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    for bits in BIT_WIDTHS:
        conv.bits = bits
        expected = torch.nn.functional.conv2d(x, quantized(conv.weight, bits), conv.bias, padding=1)
        assert_close(conv(x), expected, rtol=0, atol=0)


def test_activation_layer():
    for rounding in (True, False):
        layer, x = ActivationQ(rounding), torch.randn(50)
        layer.bits = 2
        assert_close(layer(x), quantize_activation(x, 2, rounding))


# ---- BatchNorm

def normalized(layer, x, upstream):
    """Return a BatchNorm's output, gradients and statistics after two batches."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    layer(2 * x)
    out = layer(x)
    gradients = torch.autograd.grad(out, [x, layer.weight, layer.bias], upstream)
    return out, *gradients, *layer.buffers()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_in_channels_last_is_torchs(momentum, dtype, tolerance):
    torch.manual_seed(0)
    x, upstream = (torch.randn(4, 6, 5, 5, dtype=dtype).to(memory_format=torch.channels_last)
                   for _ in "ab")
    layers = [kind(6, momentum=momentum).to(dtype) for kind in (torch.nn.BatchNorm2d, BatchNorm2d)]
    expected, found = (normalized(layer, x, upstream) for layer in layers)
    assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert_close(layers[1].eval()(x), layers[0].eval()(x))


def test_batch_norm_of_even_backgrounds_is_accurate_in_channels_last():
    torch.manual_seed(0)
    digit = torch.rand(64, 1, 18, 18) < 0.4
    x = torch.where(digit, torch.randn(64, 16, 18, 18) + 3, torch.randn(1, 16, 1, 1))
    exact, layer = BatchNorm2d(16).double(), BatchNorm2d(16)
    upstream = torch.rand_like(x)
    found = normalized(layer, x.contiguous(memory_format=torch.channels_last), upstream)
    expected = normalized(exact, x.double(), upstream.double())
    bounds = {"output": 5e-6, "gradient": 5e-6, "weight's": 1e-3, "bias's": 5e-6,
              "running mean": 5e-6, "variance": 5e-6}
    # The weight's gradient is a small difference of large sums.
    for index, (name, bound) in enumerate(bounds.items()):
        error = (found[index] - expected[index]).abs().max() / expected[index].abs().max()
        assert error < bound, name  # torch's own: 5e-5 and more, and 1e-2 of the weight


def test_only_the_active_batch_norm_moves():
    layer = SwitchableBatchNorm2d(3, [2, 32])
    assert layer.bits == 32 and list(layer.bn_dict) == ["2", "32"]
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer.bits = 2
    layer(torch.randn(4, 3, 5, 5) + 1).sum().backward()
    after = layer.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {f"bn_dict.2.{name}" for name in ("running_mean", "running_var",
                                                      "num_batches_tracked")}
    assert layer.bn_dict["2"].weight.grad is not None and layer.bn_dict["32"].weight.grad is None


# ---- one quantizer, wherever it is used

WIDTHS = [1, 2, 4, 8, 32]


def trained(path):
    def losses(model, images, labels):
        results = any_precision_backward(model, images, labels, WIDTHS, "hard", **path(model))
        return {bits: loss.item() for bits, (loss, _) in results.items()}
    return losses


def evaluated(model, images, labels):
    averages = evaluate(model, ForwardPass(model, CPU), [(images, labels)], WIDTHS, CPU)
    return {bits: values["loss"] for bits, values in averages.items()}


def calibrated(model, images, labels):
    """Of a network whose statistics the quantizers determine, by the loss in evaluation mode."""
    for bits in WIDTHS:
        calibrate(model, bits, [images])
    return evaluated(model, images, labels)


def compiled(model):
    torch._dynamo.reset()
    forward = ForwardPass(model, CPU, batch_size=4, backend="eager")
    return {"forward": forward, "normalize": forward.normalize}


def bf16(model):
    forward = ForwardPass(model, CPU, "bf16")
    return {"forward": forward, "autocast": forward.autocast}


PATHS = {"shared": trained(lambda model: {}),
         "not shared": trained(lambda model: {"shared": False}), "bf16": trained(bf16),
         "compiled": trained(compiled), "evaluate": evaluated, "calibrate": calibrated}


@pytest.mark.parametrize("quantizer", ["quantize_weight", "quantize_activation"])
@pytest.mark.parametrize("path", PATHS)
def test_another_quantizer_changes_every_loss_below_32_bits(path, quantizer, monkeypatch):
    original = getattr(quan_ops, quantizer)

    def halved(x, *args, **kwargs):
        bits = args[-1] if quantizer == "quantize_weight" else args[0]
        out = original(x, *args, **kwargs)
        return out if bits == 32 else out * torch.where(x > 0.3, 0.5, 1.0)

    torch.manual_seed(0)
    images, labels = torch.randn(4, 3, 40, 40), torch.arange(4)
    losses = []
    for replacement in (original, halved):
        monkeypatch.setattr(quan_ops, quantizer, replacement)
        model = reference.fill(MODELS["svhnq"](WIDTHS, width=1).double(), seed=0).float()
        model.layers[19].p = 0  # no dropout
        losses.append(PATHS[path](model, images, labels))
    before, after = losses
    assert before[32] == after[32]
    assert all(before[bits] != after[bits] for bits in (1, 2, 4, 8)), (before, after)


@pytest.mark.parametrize("path", [contextlib.nullcontext, torch.no_grad])
@pytest.mark.parametrize("name", MODELS)
def test_a_forward_hook_on_every_module_fires_once_a_forward_pass(name, path):
    model = MODELS[name](WIDTHS, width=1)
    set_bit_width(model, 4)
    fired = []
    expected = []
    for key, module in model.named_modules():
        other_width = "bn_dict." in key and not key.endswith(".4")
        if not isinstance(module, torch.nn.ModuleDict) and not other_width:
            expected.append(key)
        module.register_forward_hook(lambda module, inputs, out, key=key: fired.append(key))
    with path():
        model(torch.randn(2, 3, 40, 40))
    assert sorted(fired) == sorted(expected)


# ---- lists of bit-widths

@pytest.mark.parametrize("wrong, message", [
    ([], "no bit-width given"), ([0], "bit-width 0 does not exist: choose from 1 to 8 and 32"),
    ([4, 9], "bit-width 9 does not exist"), ([16], "bit-width 16"), ([33], "bit-width 33"),
    ([-1], "bit-width -1"), (["four"], "bit-width 'four'"), ([True], "bit-width True"),
    ([2, 4, 2], "bit-widths 2,4,2 repeat")])
def test_wrong_bit_widths(wrong, message):
    with pytest.raises(ValueError, match=message):
        check_bit_widths(wrong)


def test_bit_widths_come_highest_first():
    assert check_bit_widths([4, 1, 32, 8]) == (32, 8, 4, 1)
