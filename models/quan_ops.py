"""Quantizers and the layers that use them: the only file that knows what a bit is.

Source: Yu et al., "Any-Precision Deep Neural Networks", AAAI 2021 (arXiv 1911.07346), with the
quantizers of DoReFa-Net (arXiv 1606.06160). Where the published code departs from the paper, this follows the code:
at 32 bits the activation is ReLU, not a clamp, and weights pass through tanh at every bit-width.
"""
import re

import torch
from torch import nn

from models import fused

FULL_PRECISION = 32
BIT_WIDTHS = (1, 2, 3, 4, 5, 6, 7, 8, FULL_PRECISION)


def check_bit_widths(bit_widths):
    """Return bit_widths as a tuple, highest first; ValueError where it is empty, repeats or names an unknown width."""
    bit_widths = tuple(bit_widths)
    if not bit_widths:
        raise ValueError("no bit-width given: list at least one of 1 to 8 and 32, such as 1,2,4,8,32")
    for bits in bit_widths:
        if isinstance(bits, bool) or bits not in BIT_WIDTHS:
            raise ValueError(f"bit-width {bits!r} does not exist: choose from 1 to 8 and 32, such as 1,2,4,8,32")
    if len(set(bit_widths)) < len(bit_widths):
        raise ValueError(f"bit-widths {','.join(map(str, bit_widths))} repeat: list each of them once")
    return tuple(sorted(map(int, bit_widths), reverse=True))


class RoundSTE(torch.autograd.Function):
    """Round half to even; the gradient passes unchanged (straight-through estimator)."""

    @staticmethod
    def forward(ctx, x):
        return torch.round(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


round_ste = RoundSTE.apply


def unit_ends(dtype):
    """The numbers just beyond 0 and 1: hardtanh's gradient does not include its ends, and so with these does [0, 1]."""
    limits = torch.finfo(dtype)
    return -limits.tiny, 1 + limits.eps


def unit_gradient(grad, x):
    """The gradient of clamp(x, 0, 1): grad where 0 <= x <= 1, both ends included, else 0.

    torch.clamp's own is not used: releases differ at the ends, and low-bit sums land exactly on them.
    """
    if torch.compiler.is_compiling() and x.device.type == "cpu":  # whose compiled kernels are slow at storing booleans
        return grad * (1 - (x - x.clamp(0, 1)).abs().sign())
    return torch.ops.aten.hardtanh_backward(grad, x, *unit_ends(x.dtype))


class ClampUnit(torch.autograd.Function):
    """Clamp to [0, 1], with unit_gradient."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.clamp(0, 1)

    @staticmethod
    def backward(ctx, grad):
        return unit_gradient(grad, *ctx.saved_tensors)


clamp_unit = ClampUnit.apply


# ---- the equations, as the plain path computes them

def quantize_weight(w, bits):
    """Quantize a layer's weights, w in (-inf, inf), to 2^bits levels in [-E, E], E = mean |w| (DoReFa-Net's, times E).

        t = tanh(w);  m = max |t|;  n = 2^bits - 1;  E is a constant in the backward pass
        bits <= 8:  E * (2 * round(n * (t / 2m + 1/2)) / n - 1)
        bits = 32:  E * t / m
    """
    scale = w.abs().mean().detach()
    t = torch.tanh(w)
    m = t.abs().max()  # not detached: the largest weight takes its share of the gradient
    if bits == FULL_PRECISION:
        return scale * (t / m)
    n = 2**bits - 1
    return scale * (2 * round_ste(n * (t / (2 * m) + 0.5)) / n - 1)


def quantize_activation(x, bits, rounding=True):
    """Quantize activations, x in (-inf, inf), to 2^bits levels in [0, 1] (DoReFa-Net's).

        bits <= 8:  round(n * clamp(x, 0, 1)) / n,  n = 2^bits - 1;  without rounding clamp(x, 0, 1)
        bits = 32:  max(x, 0), in [0, inf)
    """
    if bits == FULL_PRECISION:
        return torch.relu(x)
    a = clamp_unit(x)
    n = 2**bits - 1
    return round_ste(n * a) / n if rounding else a


# ---- the same values and gradients in fewer operations
# The last one of a function's forward is not in place: torch 2.11 would compile it to a gradient of 0.

def normalize_weight(w):
    """What all bit-widths share of a weight: v = tanh(w) / max |tanh(w)| in [-1, 1], and E = mean |w|, detached."""
    t = torch.tanh(w)
    return t / t.abs().max(), w.abs().mean().detach()


def quantize_normalized(v, scales, bits, levels=False, sizes=None):
    """quantize_weight(w, bits) of v, scale = normalize_weight(w); with levels integers over a power of two.

    v of one layer with scales [E], or of several, joined, with their numbers of entries, sizes.
    levels:  (2 * round(n * (v / 2 + 1/2)) - n) / (n + 1),  which is  quantize_weight(w, bits) / E * n / (n + 1)
    """
    if levels and bits < FULL_PRECISION:
        return WeightLevels.apply(v, 2**bits - 1)
    return QuantizeNormalized.apply(v, scales, bits, sizes or [len(v)])


class QuantizeNormalized(torch.autograd.Function):
    """E * (2 * round(n * (v / 2 + 1/2)) / n - 1) of v in [-1, 1], at 32 bits E * v; straight-through, so its gradient is E.

    Of v (P, ...) E is scales[0] for the first sizes[0] entries, and so on.
    """

    @staticmethod
    def forward(ctx, v, scales, bits, sizes):
        ctx.scales, ctx.sizes = scales, sizes
        if bits == FULL_PRECISION:
            return QuantizeNormalized.scaled(v, ctx)
        n = 2**bits - 1
        return QuantizeNormalized.scaled(torch.add(n / 2, v, alpha=n / 2).round_().mul_(2 / n).sub_(1), ctx)

    @staticmethod
    def backward(ctx, grad):
        return QuantizeNormalized.scaled(grad, ctx), None, None, None

    @staticmethod
    def scaled(x, ctx):
        out = torch.empty_like(x)
        for scale, part, target in zip(ctx.scales, x.split(ctx.sizes), out.split(ctx.sizes)):
            torch.mul(part, scale, out=target)
        return out


class WeightLevels(torch.autograd.Function):
    """(2 * round(n * (v / 2 + 1/2)) - n) / (n + 1) of v in [-1, 1]: odd integers over a power of two, straight-through."""

    @staticmethod
    def forward(ctx, v, n):
        ctx.n = n
        return torch.add(n / 2, v, alpha=n / 2).round_().mul_(2).sub_(n).div(n + 1)

    @staticmethod
    def backward(ctx, grad):
        return grad * (ctx.n / (ctx.n + 1)), None


def quantize_unit(x, bits, rounding=True):
    """quantize_activation of at most 8 bits. Straight-through without a function of its own: the values of a clamp are
    rounded in place, which its gradient does not see."""
    a = nn.functional.hardtanh(x, *unit_ends(x.dtype))
    with torch.no_grad():
        if not rounding or x.dtype.itemsize < 4:  # bfloat16's eps is not lost in rounding
            a.clamp_(0, 1)
        if rounding:
            n = 2**bits - 1
            a.mul_(n).round_().div_(n)
    return a


# ---- layers

class Conv2dQ(nn.Conv2d):
    """A convolution whose weight is quantized to self.bits; its bias, if any, is not.

    quantized_input: its input comes from an ActivationQ at the same bit-width.
    """

    bits = FULL_PRECISION
    plain = False  # True: by the equations, everything anew
    levels = False  # True: both operands as integers over a power of two, exact in bfloat16, float16 and TF32
    shared = None  # (quantize_normalized weight, E), while share_weights gives them

    def __init__(self, *args, quantized_input=True, **kwargs):
        super().__init__(*args, **kwargs)
        self.quantized_input = quantized_input

    def link(self, shape):
        # An image's gradient is not asked for, and the link would compute it.
        if self.plain or self.levels or not self.shared or not self.quantized_input or not fused.available(self.shared[0]):
            return None
        channels, window, padding = max(self.in_channels, self.out_channels), self.kernel_size[0], self.padding[0]
        simple = (self.bias is None and shape[1] == self.in_channels and self.padding == (padding, padding)
                  and self.kernel_size == (window, window) and self.padding_mode == "zeros"
                  and (self.stride, self.dilation, self.groups) == ((1, 1), (1, 1), 1))
        small = channels <= 96 and channels * shape[2] * shape[3] <= 2**15  # larger ones torch's own do as well
        if not simple or not small or self.is_product(shape) or not padding < window <= min(shape[2:]) + 2 * padding:
            return None
        return fused.Layer(shape, convolution=(self.shared[0], padding))

    def forward(self, x):  # (N, C_in, H, W) -> (N, C_out, H', W')
        if self.plain:
            return self._conv_forward(x, quantize_weight(self.weight, self.bits), self.bias)
        if self.shared:
            w, scale = self.shared
        else:
            v, scale = normalize_weight(self.weight)
            w = quantize_normalized(v, [scale], self.bits, self.levels)
        if self.bits == FULL_PRECISION or not self.levels:
            return self.convolve(x, w, self.bias)
        # The power of two keeps sums of float16 in range. The step n / (n + 1) of each operand is undone in the output.
        n = 2**self.bits - 1
        x = (round_ste(n * x) if self.quantized_input else n * x) / (n + 1)
        y = self.convolve(x, w, None)
        y = (y.to(scale.dtype) * (scale * ((n + 1) / n) ** 2)).to(y.dtype)
        return y if self.bias is None else y + self.bias[:, None, None]

    def is_product(self, shape):
        """Whether it gives one pixel of images of that shape: then it is a matrix product (groups and dilation are not used
        here), and faster as one."""
        return tuple(shape[2:]) == self.kernel_size and self.padding == (0, 0)

    def convolve(self, x, w, bias):
        if self.is_product(x.shape):
            y = nn.functional.linear(x.permute(0, 2, 3, 1).flatten(1), w.permute(0, 2, 3, 1).flatten(1), bias)
            return y[:, :, None, None]
        return self._conv_forward(x, w, bias)


def steps(bits):
    """The number of steps between a bit-width's levels, 2^bits - 1, and 0 at 32 bits: what models/fused.c goes by."""
    return 0 if bits == FULL_PRECISION else 2**bits - 1


def normalize_weights(weights):
    """normalize_weight of each weight (C_out, C_in, H, W): v (P,), joined in the order of channels last, and the Es."""
    if fused.available(weights[0]):
        v, scales = fused.NormalizeWeights.apply(*weights)
        return v, list(scales)
    pairs = [normalize_weight(weight) for weight in weights]
    return torch.cat([v.permute(0, 2, 3, 1).flatten() for v, _ in pairs]), [scale for _, scale in pairs]


def share_weights(layers, v, scales):
    """Give layers (Conv2dQ at one bit-width) their quantized weights out of normalize_weights': one operation for all.

    They are in channels last, and so then are the convolutions' outputs.
    """
    bits, levels = layers[0].bits, layers[0].levels
    shapes = [layer.weight.shape for layer in layers]
    if fused.available(v) and not levels:
        parts = fused.QuantizeWeights.apply(v, scales, steps(bits), shapes)
    else:
        sizes = [shape.numel() for shape in shapes]
        joined = quantize_normalized(v, scales, bits, levels, sizes).split(sizes)
        parts = [part.view(c_out, height, width, c_in).permute(0, 3, 1, 2)
                 for part, (c_out, c_in, height, width) in zip(joined, shapes)]
    for layer, part, scale in zip(layers, parts, scales):
        layer.shared = part, scale


class ActivationQ(nn.Module):
    """The activation function: quantize_activation at self.bits, or its clamp alone where rounding is False."""

    bits = FULL_PRECISION
    plain = False  # True: by the equation

    def __init__(self, rounding=True):
        super().__init__()
        self.rounding = rounding

    def link(self, shape):
        return fused.Layer(shape, activation=steps(self.bits)) if self.rounding and not self.plain else None

    def forward(self, x):
        # A compiler fuses the equation itself.
        if self.plain or self.bits == FULL_PRECISION or torch.compiler.is_compiling():
            return quantize_activation(x, self.bits, self.rounding)
        return quantize_unit(x, self.bits, self.rounding)


def through(layers, x):
    """x (N, C, H, W) through layers, one after the other, but where models/fused.py has links for them as one operation.

    A layer's method link(shape) gives its link for inputs of that shape, or None; with a link, its forward and the hooks on
    it are not called.
    """
    links = []
    for layer in layers:
        fits = hasattr(layer, "link") and (bool(links) or fused.fits(x))
        link = layer.link(links[-1].out if links else x.shape) if fits else None
        if link is None:
            x = layer(fused.chain(links, x) if links else x)
            links = []
            continue
        joined = links[-1].joined(link) if links else None
        if joined:
            links.pop()
        links.append(joined or link)
    return fused.chain(links, x) if links else x


class Classifier(nn.Linear):
    """A linear layer in float32 also where autocast has convolutions in less: its logits teach. (TF32 is no autocast.)"""

    def forward(self, x):
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class MaxPool2d(nn.MaxPool2d):
    """nn.MaxPool2d(2), with a link (see through)."""

    plain = False

    def __init__(self):
        super().__init__(2)

    def link(self, shape):
        return fused.Layer(shape, pooled=True) if not self.plain and min(shape[2:]) >= 2 else None


class Dropout(nn.Dropout):
    """nn.Dropout, of one half with a link."""

    plain = False

    def link(self, shape):
        return fused.Dropout(shape) if self.training and self.p == 0.5 and not self.plain else None


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d, in training with a link.

    Torch's own adds up all pixels in channels last on a CPU one after the other, and where backgrounds are even its
    float32 means are wrong by 1e-4: enough for activations to cross a rounding threshold, whole backgrounds at a time,
    and to cost accuracy. It is not used there: without fused.c images go through it in torch's usual layout.
    """

    plain = False

    def link(self, shape):
        fits = (self.training and not self.plain and self.affine and self.track_running_stats and self.momentum is not None
                and shape[1] == self.num_features and shape[0] * shape[2] * shape[3] > 1 and fused.available(self.weight))
        return fused.Layer(shape, norm=self) if fits else None

    def forward(self, x):  # (N, C, H, W)
        if not self.training or x.device.type != "cpu" or x.is_contiguous() or torch.compiler.is_compiling():
            return super().forward(x)
        return super().forward(x.contiguous()).contiguous(memory_format=torch.channels_last)


class SwitchableBatchNorm2d(nn.Module):
    """One full BatchNorm2d per bit-width, chosen by self.bits: the only layers that bit-widths do not share."""

    def __init__(self, num_features, bit_widths):
        super().__init__()
        self.bn_dict = nn.ModuleDict({str(bits): BatchNorm2d(num_features) for bits in sorted(bit_widths)})
        self.bits = max(bit_widths)

    @property
    def bit_widths(self):
        """The bit-widths it has, lowest first."""
        return sorted(int(bits) for bits in self.bn_dict)

    def link(self, shape):
        return self.bn_dict[str(self.bits)].link(shape)

    def forward(self, x):
        batch_norm = self.bn_dict[str(self.bits)]
        # In float32 where convolutions give less, so that the quantizer sees no coarser grid.
        return through([batch_norm], x.to(batch_norm.weight.dtype))


def switchable_layers(model):
    """The layers of model whose attribute `bits` set_bit_width writes."""
    return [layer for layer in model.modules() if hasattr(layer, "bits")]


def trained_bit_widths(layers):
    """The bit-widths that layers, a model or a list of its layers, have BatchNorms for, lowest first; [] without any."""
    for layer in layers.modules() if isinstance(layers, nn.Module) else layers:
        if isinstance(layer, SwitchableBatchNorm2d):
            return layer.bit_widths
    return []


def set_bit_width(model, bits):
    """Switch model to `bits` bits: write the `bits` attribute of every layer that has one, and nothing else.

    model: or its switchable_layers, where they are at hand. ValueError where the model was not built for that bit-width;
    the model then stays as it was.
    """
    layers = switchable_layers(model) if isinstance(model, nn.Module) else model
    allowed = trained_bit_widths(layers) or list(BIT_WIDTHS)
    if bits not in allowed:
        raise ValueError(f"{bits} bits was not trained; choose from {', '.join(map(str, allowed))}")
    for layer in layers:
        object.__setattr__(layer, "bits", bits)  # nn.Module's own way looks for much else first, and this is often done


def set_arithmetic(model, plain=False, levels=False):
    """How model's layers compute: plain by the equations one by one, levels with integer operands (see Conv2dQ)."""
    for layer in model.modules():
        if hasattr(layer, "plain"):
            layer.plain = plain
        if hasattr(layer, "levels"):
            layer.levels = levels


# ---- bit-widths of saved weights

BATCH_NORM_ENTRY = re.compile(r"(.*\bbn_dict\.)(\d+)(\..*)")


def saved_bit_widths(state_dict):
    """The bit-widths that a state dict has BatchNorms for, lowest first; ValueError where one of them does not exist."""
    saved = {int(found[2]) for found in map(BATCH_NORM_ENTRY.fullmatch, state_dict) if found}
    return sorted(check_bit_widths(saved)) if saved else []


def fit_bit_widths(state_dict, bit_widths):
    """A state dict with BatchNorms for just `bit_widths`, and {added bit-width: the one its entries are copies of}.

    A bit-width that is not there starts as a copy of the nearest that is, of two as near the higher (its quantization
    step is closer); one that is not asked for is left out; all other entries stay. Nothing is added to an empty list.
    """
    saved = saved_bit_widths(state_dict)
    source = {bits: min(saved, key=lambda other: (abs(other - bits), -other)) for bits in bit_widths if saved}
    fitted = {}
    for key, value in state_dict.items():
        found = BATCH_NORM_ENTRY.fullmatch(key)
        if not found:
            fitted[key] = value
            continue
        for bits, origin in source.items():
            if origin == int(found[2]):
                fitted[f"{found[1]}{bits}{found[3]}"] = value
    return fitted, {bits: origin for bits, origin in source.items() if bits != origin}


@torch.no_grad()
def calibrate(model, bits, batches):
    """Re-estimate the running statistics of `bits`' BatchNorms: their cumulative average over `batches` of images.

    images (N, 3, H, W). Nothing else in the model moves, not even resnet20q's shared shortcut BatchNorm. Leaves the
    model in evaluation mode at `bits`.
    """
    model.eval()
    set_bit_width(model, bits)
    layers = [layer.bn_dict[str(bits)] for layer in model.modules() if isinstance(layer, SwitchableBatchNorm2d)]
    momentum = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # torch's word for a cumulative average
        layer.train()
    for images in batches:
        model(images)
    for layer, value in zip(layers, momentum):
        layer.momentum = value
        layer.eval()
