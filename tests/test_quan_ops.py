"""Quantizers against values by hand, the layers, and that changing one is felt everywhere."""
import contextlib
import math

import pytest
import torch
from quantized import quantize_activation, quantize_weight
from torch.testing import assert_close

import reference
from engine.evaluation import evaluate
from engine.forward_pass import ForwardPass
from models import MODELS, build, calibrate, quan_ops, set_bit_width
from models.bit_widths import BITS, BitWidth, highest_first
from models.losses import any_precision_backward
from models.lsq import lsq
from models.quan_ops import ActivationQ, Conv2dQ, SwitchableBatchNorm2d
from models.sharing import no_sharing
from small_networks import Bottlenecks, ResNet8, ShortSVHN

CPU = torch.device("cpu")
LEVELS = {  # bits: n, and by hand round(n * 0.6), round(n * 0.5) half to even, round(n * 0.75)
    1: (1, 1, 0, 1), 2: (3, 2, 2, 2), 3: (7, 4, 4, 5), 4: (15, 9, 8, 11), 5: (31, 19, 16, 23),
    6: (63, 38, 32, 47), 7: (127, 76, 64, 95), 8: (255, 153, 128, 191)}


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def with_lsq(layer, bits):
    """Give a layer an LSQ quantizer of one bit-width, and return it."""
    layer.quantizer = lsq(layer, [BitWidth(bits)])
    layer.switch_bit_width(BitWidth(bits))
    return layer


@pytest.mark.parametrize("bits", LEVELS)
def test_activation_by_hand(bits):
    n, six_tenths, half, _ = LEVELS[bits]
    x = double(-0.3, 0.0, 0.5, 0.6, 1.0, 1.7)
    assert_close(quantize_activation(x, bits), double(0, 0, half / n, six_tenths / n, 1, 1))
    assert_close(quantize_activation(x, bits, rounding=False), double(0, 0, 0.5, 0.6, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rounding", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_activation_gradient_passes_from_0_to_1_both_ends_included(bits, rounding, dtype):
    x = torch.tensor([-0.1, -1e-30, -0.0, 0.0, 0.3, 1.0, 1.1], dtype=dtype).requires_grad_()
    upstream = torch.tensor([1, 2, 3, 4, 5, 6, 7], dtype=dtype)
    quantize_activation(x, bits, rounding).backward(upstream)
    expected = [0, 0, 0, 0, 5, 6, 7] if bits == 32 else [0, 0, 3, 4, 5, 6, 0]
    assert_close(x.grad, torch.tensor(expected, dtype=dtype))


def test_activation_at_32_bits_is_relu():
    assert_close(quantize_activation(double(-2, 0, 0.3, 7), 32), double(0, 0, 0.3, 7))


def test_activation_keeps_what_is_not_a_number():
    assert quantize_activation(double(math.nan), 4).isnan().all()


@pytest.mark.parametrize("bits", LEVELS)
def test_a_learned_step_is_not_rounded_to_the_type_of_bf16_activations(bits):
    x = torch.linspace(-0.5, 4, 1001).bfloat16()
    layer = with_lsq(ActivationQ(), bits)
    for clip in torch.linspace(0.5, 3, 50):
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.copy_(clip.log())
        integers, scale = layer.quantizer.integers(x)
        expected = (x.double().clamp(0, clip) / scale.double()).round()
        assert integers.dtype == torch.float32 and integers.max() == 2**bits - 1
        near_a_threshold = ((x.double() / scale.double()) % 1 - 0.5).abs() < 1e-4
        assert torch.equal(integers.double()[~near_a_threshold], expected[~near_a_threshold])


@pytest.mark.parametrize("bits", LEVELS)
@pytest.mark.parametrize("step", [1e-4, 0.3])
def test_sgd_changes_the_logarithm_of_a_range_as_lsq_its_step(bits, step):
    """By -lr d(s round(w / s))/ds / sqrt(N Q)."""
    torch.manual_seed(0)
    w = step * 2**bits * torch.randn(200, dtype=torch.float64)
    layer = Conv2dQ(200, 1, 1, bias=False)
    layer.weight = torch.nn.Parameter(w.view(1, 200, 1, 1))
    with_lsq(layer, bits)
    parameter, = layer.quantizer.parameters()
    largest = max(1, 2**(bits - 1) - 1)
    parameter.data = torch.tensor(step * largest, dtype=torch.float64).log()
    upstream = torch.randn(200, dtype=torch.float64)
    (layer.quantized_weight().flatten() @ upstream).backward()

    lowest = -1 if bits == 1 else -largest - 1
    ratio = w / step
    levels = ratio.clamp(lowest, largest).round()
    if bits == 1:
        levels = ratio.sign()
    inside = (lowest <= ratio) & (ratio <= largest)
    expected = torch.where(inside, levels - ratio, levels) @ upstream / math.sqrt(200 * largest)
    torch.optim.SGD([parameter], 0.1 * layer.quantizer.lr_factor).step()
    assert_close(math.log(step * largest) - parameter.detach(), 0.1 * expected)


@pytest.mark.parametrize("step", [1e-4, 0.3])
def test_adam_changes_small_and_large_learned_steps_by_the_same_percentage(step):
    layer = with_lsq(ActivationQ(), 8)
    parameter, = layer.quantizer.parameters()
    parameter.data.fill_(math.log(255 * step))
    layer(torch.full((2, 3), 300 * step)).sum().backward()  # beyond the clip: a lower step
    torch.optim.Adam([parameter], 0.01).step()
    assert math.log(255 * step) - parameter.item() == pytest.approx(0.01, rel=1e-3)


def test_a_weight_of_zeros_has_a_learned_step():
    layer = Conv2dQ(3, 2, 1)
    layer.weight.data.zero_()
    with_lsq(layer, 4)
    assert not layer.quantized_weight().any()


def test_a_learned_step_at_a_bit_width_that_has_none():
    layer = with_lsq(ActivationQ(), 4)
    layer.switch_bit_width(BitWidth(2))
    with pytest.raises(ValueError, match="lsq has no step size for"):
        layer(torch.ones(3))


@pytest.mark.parametrize("bits", LEVELS)
def test_weight_by_hand(bits):
    n, _, half, three_quarters = LEVELS[bits]
    w = double(math.atanh(0.8), -math.atanh(0.8), math.atanh(0.4), 0)  # u = 1, 0, 0.75, 0.5
    scale = (2 * math.atanh(0.8) + math.atanh(0.4)) / 4
    levels = double(1, -1, 2 * three_quarters / n - 1, 2 * half / n - 1)
    assert_close(quantize_weight(w, bits), scale * levels)


def test_weight_at_32_bits_by_hand():
    w = double(math.atanh(0.8), -math.atanh(0.4), 0)
    scale = (math.atanh(0.8) + math.atanh(0.4)) / 3
    assert_close(quantize_weight(w, 32), scale * double(1, -0.5, 0))


@pytest.mark.parametrize("bits", BITS)
def test_weight_gradient_by_hand(bits):
    """E (1 - t^2) / m of the upstream one; the largest weight also takes -E sum(g t) / m^2."""
    w = double(math.atanh(0.8), math.atanh(0.4), 0).requires_grad_()
    scale = (math.atanh(0.8) + math.atanh(0.4)) / 3
    quantize_weight(w, bits).backward(double(1, 2, 3))
    largest = 0.36 * (1 / 0.8 - (1 * 0.8 + 2 * 0.4) / 0.64)
    assert_close(w.grad, scale * double(largest, 2 * 0.84 / 0.8, 3 / 0.8))


@pytest.mark.parametrize("bits", BITS)
def test_weight_is_the_single_equation_of_the_paper(bits):
    torch.manual_seed(0)
    w = torch.randn(1000, dtype=torch.float64)
    t, n, scale = torch.tanh(w), 2**bits - 1, w.abs().mean()
    u = t / t.abs().max() / 2 + 0.5
    expected = t / t.abs().max() if bits == 32 else 2 * (torch.round(n * u) / n) - 1
    assert_close(quantize_weight(w, bits), scale * expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("bits", LEVELS)
def test_quantized_values_are_at_most_2_to_the_bits(bits):
    torch.manual_seed(0)
    x = torch.randn(20_000, dtype=torch.float64)
    assert len(quantize_activation(x, bits).unique()) == 2**bits
    # The two outer weight levels take half an interval: at 8 bits a draw may miss some.
    assert 2**bits - 6 * (bits == 8) <= len(quantize_weight(x, bits).unique()) <= 2**bits


def test_convolution_quantizes_its_weight_and_not_its_bias():
    conv = Conv2dQ(2, 3, 3, padding=1).double()
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    for bits in BITS:
        conv.switch_bit_width(BitWidth(bits))
        weight = quantize_weight(conv.weight, bits)
        expected = torch.nn.functional.conv2d(x, weight, conv.bias, padding=1)
        assert_close(conv(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("bits", range(1, 9))
def test_operands_of_tf32_are_exact(bits, monkeypatch):
    """Whether levels over n are divided, or multiplied by 1 / n as inductor does on CUDA."""
    monkeypatch.setattr(quan_ops, "low_precision", lambda x: True)
    n = 2**bits - 1
    levels = torch.arange(n + 1, dtype=torch.float32)
    conv = Conv2dQ(1, 200, 1, bias=False)
    torch.nn.init.normal_(conv.weight)
    activation = ActivationQ()
    object.__setattr__(conv, "input_quantizer", activation.quantizer)
    for layer in (conv, activation):
        layer.switch_bit_width(BitWidth(bits))
    operands = []
    for x in (levels / n, levels * torch.tensor(1 / n, dtype=torch.float32)):
        conv.apply_quantized(x.view(-1, 1, 1, 1),
                             lambda x, w, b: operands.append((x, w)) or x * w[:1, :1])
    integers = conv.integer_weight()[0].detach()
    for x, w in operands:
        assert torch.equal(x.flatten() * 2**bits, levels)
        assert torch.equal(w * 2**bits, integers)
    x = (levels / n).view(-1, 1, 1, 1).requires_grad_()
    conv.apply_quantized(x, lambda x, w, b: x).sum().backward()
    assert (x.grad > 0).all()


def test_activation_layer():
    for rounding in (True, False):
        layer, x = ActivationQ(rounding), torch.randn(50)
        layer.switch_bit_width(BitWidth(2))
        assert_close(layer(x), quantize_activation(x, 2, rounding))


# ---- BatchNorm

def test_only_the_active_batch_norm_moves():
    layer = SwitchableBatchNorm2d(3, [2, 32])
    assert layer.width == "32" and list(layer.bn_dict) == ["2", "32"]
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer.switch_bit_width(BitWidth(2))
    layer(torch.randn(4, 3, 5, 5) + 1).sum().backward()
    after = layer.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {f"bn_dict.2.{name}" for name in ("running_mean", "running_var",
                                                      "num_batches_tracked")}
    assert layer.bn_dict["2"].weight.grad is not None and layer.bn_dict["32"].weight.grad is None


# ---- one quantizer, wherever it is used

WIDTHS = [1, 2, 4, 8, 32]


def trained(path, bit_widths=WIDTHS):
    def losses(model, images, labels):
        results = any_precision_backward(model, images, labels, bit_widths, "hard", **path(model))
        return {bits: loss.item() for bits, (loss, _) in results.items()}
    return losses


def evaluated(model, images, labels):
    averages = evaluate(ForwardPass(model, CPU), [(images, labels)], WIDTHS, CPU)
    return {bits: values["loss"] for bits, values in averages.items()}


def calibrated(model, images, labels):
    """Of a network whose statistics the quantizers determine, by the loss in evaluation mode."""
    for bits in WIDTHS:
        calibrate(model, bits, [images])
    return evaluated(model, images, labels)


def compiled(model):
    torch._dynamo.reset()
    forward = ForwardPass(model, CPU, batch_size=4, backend="eager")
    return {"forward": forward, "sharing": forward.sharing}


def bf16(model):
    return {"forward": ForwardPass(model, CPU, "bf16")}


PATHS = {"shared": trained(lambda model: {}),
         "not shared": trained(lambda model: {"sharing": no_sharing}), "bf16": trained(bf16),
         "compiled": trained(compiled, [2, 32]), "evaluate": evaluated, "calibrate": calibrated}


@pytest.mark.parametrize("quantizer", ["DoReFaWeight", "DoReFaActivation"])
@pytest.mark.parametrize("path", PATHS)
def test_another_quantizer_changes_every_loss_below_32_bits(path, quantizer, monkeypatch):
    kind = getattr(quan_ops, quantizer)
    original = kind.integers

    def halved(self, x, *args):
        integers, scale = original(self, x, *args)
        return integers * torch.where(x > 0.3, 0.5, 1.0), scale

    assert_every_loss_changes(path, lambda: monkeypatch.setattr(kind, "integers", halved))


@pytest.mark.parametrize("path", PATHS)
def test_an_edited_layer_changes_every_loss(path, monkeypatch):
    forward = Conv2dQ.forward

    def scaled(self, x):
        return forward(self, x) * torch.linspace(0.5, 1.5, self.out_channels)[:, None, None]

    assert_every_loss_changes(path, lambda: monkeypatch.setattr(Conv2dQ, "forward", scaled), (32,))


def assert_every_loss_changes(path, change, also=()):
    """Assert that a change is one to every loss below 32 bits, and at 32 as `also` says."""
    torch.manual_seed(0)
    images, labels = torch.randn(4, 3, 40, 40), torch.arange(4)
    losses = []
    for edit in (lambda: None, change):
        edit()
        model = reference.fill(ShortSVHN(WIDTHS, width=1).double(), seed=0).float()
        model.layers[6].p = 0  # no dropout
        losses.append(PATHS[path](model, images, labels))
    before, after = losses
    assert (before[32] != after[32]) == (32 in also)
    assert all(before[bits] != after[bits] for bits in before if bits != 32), (before, after)
    assert len(before) > 1


@pytest.mark.parametrize("path", [contextlib.nullcontext, torch.no_grad])
@pytest.mark.parametrize("kind", [ResNet8, Bottlenecks, MODELS["svhnq"]])
def test_a_forward_hook_on_every_module_fires_once_a_forward_pass(kind, path):
    model = kind(WIDTHS, width=1)
    set_bit_width(model, 4)
    fired = []
    expected = []
    for key, module in model.named_modules():
        other_width = "bn_dict." in key and not key.endswith(".4")
        called = not isinstance(module, torch.nn.ModuleDict | quan_ops.Quantizer)
        if called and not other_width:
            expected.append(key)
        module.register_forward_hook(lambda module, inputs, out, key=key: fired.append(key))
    with path():
        model(torch.randn(2, 3, 40, 40))
    assert sorted(fired) == sorted(expected)


def test_a_layer_that_cannot_be_switched_is_named():
    class Own(torch.nn.Linear):
        bits = 32

    model = torch.nn.Sequential(Conv2dQ(3, 4, 3), Own(4, 2))
    with pytest.raises(ValueError, match=r"layer 1 \(Own\) has bits that cannot be switched"):
        set_bit_width(model, 4)
    assert model[0].bits == 32


@pytest.mark.parametrize("bits", [0, 9, 16, 33, -1, 2.5, "4"])
def test_own_bits_that_cannot_be(bits):
    for layer in (Conv2dQ(3, 3, 1), ActivationQ()):
        layer.own_bits = bits
        with pytest.raises(ValueError, match=f"has {bits} bits of its own: choose from 1, 2"):
            set_bit_width(layer, 4)


def test_networks_of_other_bit_widths_in_one():
    both = torch.nn.Sequential(build("svhnq", [2, 4], 10, 1), build("svhnq", [2, 8], 10, 1))
    set_bit_width(both, 2)
    with pytest.raises(ValueError, match="layer 1.layers.4 has no 4-bit BatchNorm, which others"):
        set_bit_width(both, 4)
    assert both[0].layers[3].bits == 2


def test_the_meta_device_needs_no_autocast():
    model = build("svhnq", [2], 10, 1).to("meta")
    assert model(torch.rand(2, 3, 40, 40, device="meta")).shape == (2, 10)


def test_a_layer_keeps_bits_of_its_own():
    conv, x = Conv2dQ(3, 4, 3, bits=8), torch.randn(2, 3, 6, 6)
    activation = ActivationQ(bits=2)
    for width in (1, "w2a4", 8, 32):
        set_bit_width(torch.nn.Sequential(conv, activation), width)
        assert conv.bits == 8 and activation.bits == 2
        expected = torch.nn.functional.conv2d(x, quantize_weight(conv.weight, 8), conv.bias)
        assert_close(conv(x), expected)
        assert_close(activation(x), quantize_activation(x, 2))


def test_weights_and_activations_have_bits_of_their_own():
    model = torch.nn.Sequential(ActivationQ(), Conv2dQ(3, 4, 3))
    set_bit_width(model, "w2a4")
    x = torch.randn(2, 3, 6, 6)
    a = quantize_activation(x, 4)
    assert_close(model(x), torch.nn.functional.conv2d(a, quantize_weight(model[1].weight, 2),
                                                      model[1].bias))


def test_a_quantizer_that_is_put_in_place_has_no_bits_until_it_is_switched():
    conv = Conv2dQ(3, 4, 3)
    conv.quantizer = quan_ops.DoReFaWeight()
    with pytest.raises(ValueError, match="DoReFaWeight has no bit-width yet"):
        conv(torch.randn(2, 3, 6, 6))


# ---- bit-widths

@pytest.mark.parametrize("wrong, message", [
    ([], "no bit-width given"), ([0], "bit-width 0 does not exist: choose from 1 to 8 and 32"),
    ([4, 9], "bit-width 9 does not exist"), ([16], "bit-width 16"), ([33], "bit-width 33"),
    ([-1], "bit-width -1"), (["four"], "bit-width 'four'"), ([True], "bit-width True"),
    (["w2"], "bit-width 'w2'"), (["w9a4"], "bit-width 'w9a4'"), (["w2a16"], "bit-width 'w2a16'"),
    ([2, 4, 2], "bit-widths 2,4,2 repeat"), (["4", "w4a4"], "bit-widths 4,4 repeat")])
def test_wrong_bit_widths(wrong, message):
    with pytest.raises(ValueError, match=message):
        highest_first(wrong)


def test_bit_widths_come_highest_first():
    """By weight bits times activation bits, then by weight bits."""
    assert highest_first([4, 1, 32, 8]) == (32, 8, 4, 1)
    widths = highest_first(["w2a4", "w4a2", 8, 3, "w1a8", "w8a1", "w4a32", 32, "4"])
    assert list(map(str, widths)) == [
        "32", "w4a32", "8", "4", "3", "w8a1", "w4a2", "w2a4", "w1a8"]


def test_a_bit_width_is_found_by_what_it_is_written_as():
    found = {BitWidth(4): "four", BitWidth(2, 4): "mixed"}
    assert found[4] == "four" and found["w2a4"] == "mixed" and 4 in found and 2 not in found
    assert BitWidth.of("w4a4") == 4 and str(BitWidth.of("w4a4")) == "4"
    assert f"{BitWidth(2, 4):>6}" == "  w2a4" and BitWidth(8) > 4 and max(2, BitWidth(4)) == 4
