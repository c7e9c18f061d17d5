"""Quantizers and the layers that use them: the only file that knows what a bit is.

Source: Yu et al., AAAI 2021 (arXiv 1911.07346), whose quantizers are DoReFa-Net's (1606.06160).
Where the published code departs from the paper, this follows the code: 32-bit activations are ReLU,
and 32-bit weights pass through tanh too.
"""
import torch
from torch import nn

from models.float_layers import BatchNorm2d
from models.weight_cache import CachingConv2d

FULL_PRECISION = 32
BIT_WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, FULL_PRECISION)


# ---- quantizers: a change here is one to training, evaluation, low precision and export

def normalize_weight(w):
    """Return tensors: v = tanh(w) / max |tanh(w)| in [-1, 1]; E = mean |w|, without gradient."""
    t = torch.tanh(w)
    return t / t.abs().amax(), w.abs().mean().detach()  # the maximum is not detached


def quantize(u, bits):
    """Quantize u in [0, 1] to k / n, n = 2^bits - 1 (DoReFa-Net, eq. 5)."""
    return RoundSTE.apply(u, 2**bits - 1)


def quantize_weight(v, scale, bits):
    """Quantize a weight, given v, scale = normalize_weight(w), to 2^bits values in [-E, E].

        bits <= 8:  E (2 quantize(v / 2 + 1/2) - 1)        (DoReFa-Net, eq. 9, times E)
        bits = 32:  E v
    """
    return scale * (v if bits == FULL_PRECISION else 2 * quantize(v / 2 + 0.5, bits) - 1)


def quantize_activation(x, bits, rounding=True):
    """Quantize activations x in (-inf, inf) to 2^bits values in [0, 1] (DoReFa-Net, section 2.4).

        bits <= 8:  quantize(clamp(x, 0, 1));  without rounding clamp(x, 0, 1)
        bits = 32:  ReLU(x), in [0, inf)
    """
    if bits == FULL_PRECISION:
        return torch.relu(x)
    a = ClampUnit.apply(x)
    return quantize(a, bits) if rounding else a


class RoundSTE(torch.autograd.Function):
    """round(n u) / n, half to even; the gradient passes unchanged (straight-through estimator)."""

    @staticmethod
    def forward(ctx, u, n):
        return (n * u).round_() / n  # torch 2.11 compiles an in-place end to a zero gradient

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class ClampUnit(torch.autograd.Function):
    """clamp(x, 0, 1), whose gradient passes where 0 <= x <= 1: both ends, on which low-bit sums
    often lie, are included, as in torch.clamp of some versions only."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        limits = torch.finfo(x.dtype)  # hardtanh's gradient leaves its ends out: just outside
        return torch.ops.aten.hardtanh_backward(grad, x, -limits.tiny, 1 + limits.eps)


# ---- layers

class Conv2dQ(CachingConv2d):
    """A convolution whose weight is quantized to self.bits; its bias, if any, is not."""

    bits, shared = FULL_PRECISION, None  # (v, E), while losses.shared_computation holds them

    def forward(self, x):  # (N, C_in, H, W) -> (N, C_out, H', W')
        integers = self.bits != FULL_PRECISION and low_precision(x)
        w, scale = self.kept(self.operand, (self.bits, integers),
                             normalize_weight, quantize_weight, quantize)
        if not integers:
            return self._conv_forward(x, w, self.bias)
        # Integer operands: odd integers and k over 2^bits, which 16 bits and TF32 hold exactly.
        # What that takes from each operand, n / 2^bits, goes with E to the output, in float32.
        step = 1 - 2.0**-self.bits
        y = self._conv_forward(x * step, w, None).to(scale.dtype) * (scale / step**2)
        return y if self.bias is None else y + self.bias[:, None, None]

    def operand(self, bits, integers=False):  # the quantized weight, or its integers; and E
        v, scale = self.shared or normalize_weight(self.weight)
        w = quantize_weight(v, 1.0 if integers else scale, bits)
        return (w * (1 - 2.0**-bits) if integers else w), scale


def low_precision(x):
    """Return whether convolutions of x round their operands, by autocast or to TF32."""
    return torch.is_autocast_enabled(x.device.type) or (
        x.device.type == "cuda" and torch.backends.cudnn.allow_tf32)


class ActivationQ(nn.Module):
    """The activation function: quantize_activation to self.bits; limit: at 32, as 6 of ReLU6."""

    bits = FULL_PRECISION

    def __init__(self, rounding=True, limit=None):
        super().__init__()
        self.rounding, self.limit = rounding, limit

    def forward(self, x):
        y = quantize_activation(x, self.bits, self.rounding)
        return y.clamp(max=self.limit) if self.limit and self.bits == FULL_PRECISION else y


class SwitchableBatchNorm2d(nn.Module):
    """One BatchNorm2d per bit-width, chosen by self.bits: all that the bit-widths do not share."""

    def __init__(self, num_features, bit_widths):
        super().__init__()
        self.bn_dict = nn.ModuleDict(
            {str(bits): BatchNorm2d(num_features) for bits in sorted(bit_widths)})
        self.bits = max(bit_widths)

    def forward(self, x):
        return self.bn_dict[str(self.bits)](x)


# ---- the switch

def check_bit_widths(bit_widths):
    """Return bit_widths as a tuple, highest first; ValueError for unknown, repeated or none."""
    bit_widths = tuple(bit_widths)
    if not bit_widths:
        raise ValueError("no bit-width given: list at least one of 1 to 8 and 32, such as 1,2,4")
    for bits in bit_widths:
        if isinstance(bits, bool) or bits not in BIT_WIDTHS:
            raise ValueError(f"bit-width {bits!r} does not exist: choose from 1 to 8 and 32")
    if len(set(bit_widths)) < len(bit_widths):
        raise ValueError(f"bit-widths {','.join(map(str, bit_widths))} repeat: list each once")
    return tuple(sorted(map(int, bit_widths), reverse=True))


def trained_bit_widths(model):
    """Return the bit-widths that the model has BatchNorms for, lowest first."""
    for layer in model.modules():
        if isinstance(layer, SwitchableBatchNorm2d):
            return sorted(map(int, layer.bn_dict))
    return []


def set_bit_width(model, bits):
    """Switch the model to `bits` bits, by the attribute `bits` of every layer that has one.

    Raises ValueError where the model was not built for that bit-width, and changes nothing.
    """
    allowed = trained_bit_widths(model) or BIT_WIDTHS
    if bits not in allowed:
        raise ValueError(f"{bits} bits was not trained; choose from {', '.join(map(str, allowed))}")
    for layer in model.modules():
        if hasattr(layer, "bits"):
            layer.bits = bits
