"""LSQ: a learned step size per layer and bit-width (Esser et al., ICLR 2020, arXiv 1902.08153).

At 1 bit, which is not in the paper, weights are -s and s, and s is initialized to mean |w|.

The parameter is the logarithm of the range, s times the largest integer, as in TQT (Jain et al.,
MLSys 2020, arXiv 1903.08066): Adam's updates are about as large as its learning rate, whatever the
gradient, so they change small step sizes and large ones by about the same percentage; and a
bit-width that was not trained takes over the range of the nearest one. Its gradient is not the
chain rule's, which has a factor s: with SGD it changes as s does in the LSQ paper.
"""
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from models.bit_widths import FULL_PRECISION, BitWidth
from models.quan_ops import (ActivationQuantizer, QuantizedLayer, Quantizer, WeightQuantizer, clamp,
                             round_ste)

LR_FACTOR = 10.0  # with Adam and --lr 0.001, step sizes change by about 1 % at a time


def lsq(layer: nn.Module, bit_widths: Iterable[BitWidth]) -> Quantizer:
    """Return an LSQ quantizer for a layer's weight, or for activations."""
    if isinstance(layer, QuantizedLayer):
        return LSQWeight(layer, bit_widths)
    return LSQActivation(layer, bit_widths)


class LSQWeight(WeightQuantizer):
    """Quantizes w to round(clamp(w / s, -2^(bits - 1), 2^(bits - 1) - 1)) s; at 32 bits to w."""

    lr_factor = LR_FACTOR

    def __init__(self, layer: QuantizedLayer, bit_widths: Iterable[BitWidth]):
        super().__init__()
        ranges = {}
        for width in bit_widths:
            bits = layer.own_bits or width.weights
            if bits != FULL_PRECISION:
                ranges[str(width)] = initial_weight_range(layer.weight, bits).log()
        self.log_range_dict = nn.ParameterDict(ranges)

    def initialize(self, w: Tensor) -> None:
        if self.bits != FULL_PRECISION:
            self.log_range_dict[self.width].copy_(initial_weight_range(w, self.bits).log())

    def full_precision(self, w: Tensor) -> Tensor:
        return w

    def integers(self, w: Tensor) -> tuple[Tensor, Tensor]:
        largest = largest_weight(self.bits)
        s = learned_step(self, w.numel(), largest)
        if self.bits == 1:
            return 2 * round_ste((clamp(w / s, -1, 1) + 1) / 2) - 1, s
        return round_ste(clamp(w / s, -largest - 1, largest)), s


class LSQActivation(ActivationQuantizer):
    """Quantizes x to round(clamp(x / s, 0, 2^bits - 1)) s; at 32 bits to ReLU(x)."""

    lr_factor = LR_FACTOR

    def __init__(self, layer: nn.Module, bit_widths: Iterable[BitWidth]):
        super().__init__()
        self.log_range_dict = nn.ParameterDict({
            str(width): torch.tensor(0.0)  # until `initialize`
            for width in bit_widths if (layer.own_bits or width.activations) != FULL_PRECISION})

    def initialize(self, x: Tensor) -> None:
        if self.bits != FULL_PRECISION and (x > 0).any():
            self.log_range_dict[self.width].copy_(
                initial_range(torch.relu(x), 2**self.bits - 1).log())

    def full_precision(self, x: Tensor) -> Tensor:
        return torch.relu(x)

    def integers(self, x: Tensor, rounding: bool = True) -> tuple[Tensor, Tensor]:
        largest = 2**self.bits - 1
        s = learned_step(self, x[0].numel(), largest)
        a = clamp(x.to(s.dtype) / s, 0, largest)  # bf16 would round the step size
        return round_ste(a) if rounding else a, s

    def step_size(self) -> Tensor:
        return log_range(self).detach().exp() / (2**self.bits - 1)


def log_range(quantizer: Quantizer) -> Tensor:
    """Return the logarithm of the range at the bit-width; ValueError if there is none."""
    return quantizer.of_width(quantizer.log_range_dict, "lsq has no step size")


def learned_step(quantizer: Quantizer, count: int, largest: int) -> Tensor:
    """Return the step size s at the bit-width.

    The gradient of the log range is that of s, times the paper's (count * largest)^-1/2, over
    LR_FACTOR. count: elements of what is quantized. largest: integer.
    """
    parameter = log_range(quantizer)
    constant = parameter.detach()
    scale = 1 / (math.sqrt(count * largest) * LR_FACTOR)
    return constant.exp() / largest + (parameter - constant) * scale


def largest_weight(bits: int) -> int:
    """Return the largest integer of a signed weight; 1 at 1 bit, whose integers are -1 and 1."""
    return max(1, 2**(bits - 1) - 1)


def initial_weight_range(w: Tensor, bits: int) -> Tensor:
    """Return the initial range of a weight; at 1 bit mean |w|."""
    return positive_mean(w) if bits == 1 else initial_range(w, largest_weight(bits))


def initial_range(x: Tensor, largest: int) -> Tensor:
    """Return the range of the initial step size 2 mean |x| / sqrt(largest) (paper, section 2.1)."""
    return 2 * positive_mean(x) * math.sqrt(largest)


def positive_mean(x: Tensor) -> Tensor:
    """Return mean |x|, or where that is 0 a tiny number, whose logarithm is finite."""
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))  # bf16 is too coarse
    return x.abs().mean().clamp(min=1e-30)
