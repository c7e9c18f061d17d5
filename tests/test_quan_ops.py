"""Quantizers against values worked out by hand, and the switchable BatchNorm."""
import math

import pytest
import torch
from torch.testing import assert_close

from models.quan_ops import (BIT_WIDTHS, ActivationQ, BatchNorm2d, Conv2dQ, SwitchableBatchNorm2d, check_bit_widths,
                             quantize_activation, quantize_weight, through)

LEVELS = {  # bits: n, and by hand round(n * 0.6), round(n * 0.5) with halves to even, round(n * 0.75)
    1: (1, 1, 0, 1), 2: (3, 2, 2, 2), 3: (7, 4, 4, 5), 4: (15, 9, 8, 11), 5: (31, 19, 16, 23), 6: (63, 38, 32, 47),
    7: (127, 76, 64, 95), 8: (255, 153, 128, 191)}


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize("bits", LEVELS)
def test_activation_by_hand(bits):
    n, six_tenths, half, _ = LEVELS[bits]
    x = double(-0.3, 0.0, 0.5, 0.6, 1.0, 1.7)
    assert_close(quantize_activation(x, bits), double(0, 0, half / n, six_tenths / n, 1, 1))
    assert_close(quantize_activation(x, bits, rounding=False), double(0, 0, 0.5, 0.6, 1, 1))


@pytest.mark.parametrize("rounding", [True, False])
@pytest.mark.parametrize("bits", BIT_WIDTHS)
def test_activation_gradient_passes_from_0_to_1_both_ends_included(bits, rounding):
    x = double(-0.1, -0.0, 0.0, 0.3, 1.0, 1.1).requires_grad_()
    quantize_activation(x, bits, rounding).backward(double(1, 2, 3, 4, 5, 6))
    assert_close(x.grad, double(0, 0, 0, 4, 5, 6) if bits == 32 else double(0, 2, 3, 4, 5, 0))


def test_activation_at_32_bits_is_relu():
    assert_close(quantize_activation(double(-2, 0, 0.3, 7), 32), double(0, 0, 0.3, 7))


def test_activation_keeps_what_is_not_a_number():
    assert quantize_activation(double(math.nan), 4).isnan().all()


@pytest.mark.parametrize("bits", LEVELS)
def test_weight_by_hand(bits):
    n, _, half, three_quarters = LEVELS[bits]
    w = double(math.atanh(0.8), -math.atanh(0.8), math.atanh(0.4), 0)  # u = 1, 0, 0.75, 0.5
    scale = (2 * math.atanh(0.8) + math.atanh(0.4)) / 4
    assert_close(quantize_weight(w, bits),
                 scale * double(1, -1, 2 * three_quarters / n - 1, 2 * half / n - 1))


def test_weight_at_32_bits_by_hand():
    w = double(math.atanh(0.8), -math.atanh(0.4), 0)
    assert_close(quantize_weight(w, 32), (math.atanh(0.8) + math.atanh(0.4)) / 3 * double(1, -0.5, 0))


@pytest.mark.parametrize("bits", BIT_WIDTHS)
def test_weight_gradient_by_hand(bits):
    """E (1 - t^2) / m of the upstream gradient; the largest weight also takes -E sum(g t) / m^2 of it."""
    w = double(math.atanh(0.8), math.atanh(0.4), 0).requires_grad_()
    scale = (math.atanh(0.8) + math.atanh(0.4)) / 3
    quantize_weight(w, bits).backward(double(1, 2, 3))
    largest = 0.36 * (1 / 0.8 - (1 * 0.8 + 2 * 0.4) / 0.64)
    assert_close(w.grad, scale * double(largest, 2 * 0.84 / 0.8, 3 / 0.8))


@pytest.mark.parametrize("bits", LEVELS)
def test_quantized_values_are_at_most_2_to_the_bits(bits):
    torch.manual_seed(0)
    x = torch.randn(20_000, dtype=torch.float64)
    assert len(quantize_activation(x, bits).unique()) == 2**bits
    # The two outer weight levels take half an interval: at 8 bits a draw may miss some.
    assert len(quantize_weight(x, bits).unique()) <= 2**bits


def test_convolution_quantizes_its_weight_and_not_its_bias():
    conv = Conv2dQ(2, 3, 3, padding=1).double()
    x = torch.randn(1, 2, 5, 5, dtype=torch.float64)
    for bits in (1, 4, 32):
        conv.bits = bits
        assert_close(conv(x), torch.nn.functional.conv2d(x, quantize_weight(conv.weight, bits), conv.bias, padding=1))


def test_activation_layer():
    for rounding in (True, False):
        layer, x = ActivationQ(rounding), torch.randn(50)
        layer.bits = 2
        assert_close(layer(x), quantize_activation(x, 2, rounding))


def normalized(layer, x, upstream):
    """What a BatchNorm gives, its gradients and its statistics after two batches."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    through([layer], 2 * x)
    out = through([layer], x)
    gradients = torch.autograd.grad(out, [x, layer.weight, layer.bias], upstream)
    return out, *gradients, *layer.buffers()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_in_channels_last_is_torchs(momentum, dtype, tolerance):
    torch.manual_seed(0)
    x, upstream = (torch.randn(4, 6, 5, 5, dtype=dtype).contiguous(memory_format=torch.channels_last) for _ in "ab")
    layers = [kind(6, momentum=momentum).to(dtype) for kind in (torch.nn.BatchNorm2d, BatchNorm2d)]
    expected, found = (normalized(layer, x, upstream) for layer in layers)
    assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert_close(through([layers[1].eval()], x), layers[0].eval()(x))


def test_batch_norm_of_even_backgrounds_is_accurate_in_channels_last():
    torch.manual_seed(0)
    digit = torch.rand(64, 1, 18, 18) < 0.4
    x = torch.where(digit, torch.randn(64, 16, 18, 18) + 3, torch.randn(1, 16, 1, 1))
    exact, layer = BatchNorm2d(16).double(), BatchNorm2d(16)
    upstream = torch.rand_like(x)
    found = normalized(layer, x.contiguous(memory_format=torch.channels_last), upstream)
    expected = normalized(exact, x.double(), upstream.double())
    bounds = {"output": 5e-6, "gradient": 5e-6, "weight's": 1e-3, "bias's": 5e-6, "running mean": 5e-6, "variance": 5e-6}
    for index, (name, bound) in enumerate(bounds.items()):  # the weight's gradient is a small difference of large sums
        error = (found[index] - expected[index]).abs().max() / expected[index].abs().max()
        assert error < bound, name  # torch's own: 5e-5 and more, and 1e-2 of the weight


def test_only_the_active_batch_norm_moves():
    layer = SwitchableBatchNorm2d(3, [2, 32])
    assert layer.bits == 32 and layer.bit_widths == [2, 32]
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer.bits = 2
    layer(torch.randn(4, 3, 5, 5) + 1).sum().backward()
    after = layer.state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {"bn_dict.2.running_mean", "bn_dict.2.running_var", "bn_dict.2.num_batches_tracked"}
    assert layer.bn_dict["2"].weight.grad is not None and layer.bn_dict["32"].weight.grad is None


@pytest.mark.parametrize("wrong, message", [
    ([], "no bit-width given"), ([0], "bit-width 0 does not exist: choose from 1 to 8 and 32"),
    ([4, 9], "bit-width 9 does not exist"), ([16], "bit-width 16"), ([33], "bit-width 33"), ([-1], "bit-width -1"),
    (["four"], "bit-width 'four'"), ([True], "bit-width True"), ([2, 4, 2], "bit-widths 2,4,2 repeat")])
def test_wrong_bit_widths(wrong, message):
    with pytest.raises(ValueError, match=message):
        check_bit_widths(wrong)


def test_bit_widths_come_highest_first():
    assert check_bit_widths([4, 1, 32, 8]) == (32, 8, 4, 1)
