"""LSQ: a learned step per layer and bit-width (Esser et al., ICLR 2020, arXiv 1902.08153).

At 1 bit, which is not in the paper, weights are -s and s, and s is initialized to mean |w|.
"""
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from models.bit_widths import FULL_PRECISION, BitWidth
from models.quan_ops import (ActivationQuantizer, QuantizedLayer, Quantizer, WeightQuantizer, clamp,
                             round_ste)


def lsq(layer: nn.Module, bit_widths: Iterable[BitWidth]) -> Quantizer:
    """Return an LSQ quantizer for a layer's weight, or for activations."""
    if isinstance(layer, QuantizedLayer):
        return LSQWeight(layer, bit_widths)
    return LSQActivation(layer, bit_widths)


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return x, with its gradient multiplied by `factor`."""
    return (x - x * factor).detach() + x * factor


class LSQWeight(WeightQuantizer):
    """Quantizes w to round(clamp(w / s, -2^(bits - 1), 2^(bits - 1) - 1)) s; at 32 bits to w."""

    def __init__(self, layer: QuantizedLayer, bit_widths: Iterable[BitWidth]):
        super().__init__()
        steps = {}
        for width in bit_widths:
            bits = layer.own_bits or width.weights
            if bits != FULL_PRECISION:
                steps[str(width)] = initial_weight_step(layer.weight, bits)
        self.step_dict = nn.ParameterDict(steps)

    def initialize(self, w: Tensor) -> None:
        if self.bits != FULL_PRECISION:
            self.step_dict[self.width].copy_(initial_weight_step(w, self.bits))

    def full_precision(self, w: Tensor) -> Tensor:
        return w

    def integers(self, w: Tensor) -> tuple[Tensor, Tensor]:
        largest = largest_weight(self.bits)
        s = scale_gradient(step_of(self), 1 / math.sqrt(w.numel() * largest))
        if self.bits == 1:
            return 2 * round_ste((clamp(w / s, -1, 1) + 1) / 2) - 1, s
        return round_ste(clamp(w / s, -largest - 1, largest)), s


class LSQActivation(ActivationQuantizer):
    """Quantizes x to round(clamp(x / s, 0, 2^bits - 1)) s; at 32 bits to ReLU(x)."""

    def __init__(self, layer: nn.Module, bit_widths: Iterable[BitWidth]):
        super().__init__()
        steps = {}
        for width in bit_widths:
            bits = layer.own_bits or width.activations
            if bits != FULL_PRECISION:
                steps[str(width)] = torch.tensor(1 / (2**bits - 1))  # until `initialize`
        self.step_dict = nn.ParameterDict(steps)

    def initialize(self, x: Tensor) -> None:
        if self.bits != FULL_PRECISION and (x > 0).any():
            self.step_dict[self.width].copy_(initial_step(torch.relu(x), 2**self.bits - 1))

    def full_precision(self, x: Tensor) -> Tensor:
        return torch.relu(x)

    def integers(self, x: Tensor, rounding: bool = True) -> tuple[Tensor, Tensor]:
        largest = 2**self.bits - 1
        features = x[0].numel()
        s = scale_gradient(step_of(self), 1 / math.sqrt(features * largest))
        a = clamp(x.to(s.dtype) / s, 0, largest)  # bf16 would round the step
        return round_ste(a) if rounding else a, s

    def step(self) -> Tensor:
        return step_of(self).detach()


def step_of(quantizer: Quantizer) -> Tensor:
    """Return the step of a quantizer at its bit-width; ValueError where it has none."""
    return quantizer.of_width(quantizer.step_dict, "lsq has no step").abs()


def largest_weight(bits: int) -> int:
    """Return the largest integer of a signed weight; 1 at 1 bit, whose integers are -1 and 1."""
    return max(1, 2**(bits - 1) - 1)


def initial_weight_step(w: Tensor, bits: int) -> Tensor:
    """Return the initial step of a weight."""
    w = w.detach()
    return w.abs().mean() if bits == 1 else initial_step(w, largest_weight(bits))


def initial_step(x: Tensor, largest: int) -> Tensor:
    """Return the initial step 2 mean |x| / sqrt(largest integer) (section 2.1 of the paper)."""
    return 2 * x.detach().abs().mean() / math.sqrt(largest)
