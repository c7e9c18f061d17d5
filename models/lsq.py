"""LSQ: a learned step per layer and bit-width (Esser et al., ICLR 2020, arXiv 1902.08153).

At 1 bit, which is not in the paper, weights are -s and s, and s is initialized to mean |w|.

What is learned is log s, as in TQT (Jain et al., MLSys 2020, arXiv 1903.08066): Adam's updates are
about as large as its learning rate, whatever the gradient, and so change small steps and large ones
by about the same percentage. With SGD log s changes as s does in the LSQ paper.
"""
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from models.bit_widths import FULL_PRECISION, BitWidth
from models.quan_ops import (ActivationQuantizer, QuantizedLayer, Quantizer, WeightQuantizer, clamp,
                             round_ste)

LR_FACTOR = 10.0  # with Adam and --lr 0.001, steps change by about 1 % at a time


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
        steps = {}
        for width in bit_widths:
            bits = layer.own_bits or width.weights
            if bits != FULL_PRECISION:
                steps[str(width)] = initial_weight_step(layer.weight, bits).log()
        self.log_step_dict = nn.ParameterDict(steps)

    def initialize(self, w: Tensor) -> None:
        if self.bits != FULL_PRECISION:
            self.log_step_dict[self.width].copy_(initial_weight_step(w, self.bits).log())

    def full_precision(self, w: Tensor) -> Tensor:
        return w

    def integers(self, w: Tensor) -> tuple[Tensor, Tensor]:
        largest = largest_weight(self.bits)
        s = learned_step(self, w.numel() * largest)
        if self.bits == 1:
            return 2 * round_ste((clamp(w / s, -1, 1) + 1) / 2) - 1, s
        return round_ste(clamp(w / s, -largest - 1, largest)), s


class LSQActivation(ActivationQuantizer):
    """Quantizes x to round(clamp(x / s, 0, 2^bits - 1)) s; at 32 bits to ReLU(x)."""

    lr_factor = LR_FACTOR

    def __init__(self, layer: nn.Module, bit_widths: Iterable[BitWidth]):
        super().__init__()
        steps = {}
        for width in bit_widths:
            bits = layer.own_bits or width.activations
            if bits != FULL_PRECISION:
                steps[str(width)] = -torch.tensor(2**bits - 1.0).log()  # until `initialize`
        self.log_step_dict = nn.ParameterDict(steps)

    def initialize(self, x: Tensor) -> None:
        if self.bits != FULL_PRECISION and (x > 0).any():
            step = initial_step(torch.relu(x), 2**self.bits - 1)
            self.log_step_dict[self.width].copy_(step.log())

    def full_precision(self, x: Tensor) -> Tensor:
        return torch.relu(x)

    def integers(self, x: Tensor, rounding: bool = True) -> tuple[Tensor, Tensor]:
        largest = 2**self.bits - 1
        s = learned_step(self, x[0].numel() * largest)
        a = clamp(x.to(s.dtype) / s, 0, largest)  # bf16 would round the step
        return round_ste(a) if rounding else a, s

    def step(self) -> Tensor:
        return log_step(self).detach().exp()


def log_step(quantizer: Quantizer) -> Tensor:
    """Return the logarithm of the step at the bit-width; ValueError where there is none."""
    return quantizer.of_width(quantizer.log_step_dict, "lsq has no step")


def learned_step(quantizer: Quantizer, count: int) -> Tensor:
    """Return the step s at the bit-width.

    The gradient of log s is count^-1/2 times that of s, as that of s in the paper, over LR_FACTOR.
    count: elements times the largest integer.
    """
    log_s = log_step(quantizer)
    constant = log_s.detach()
    return constant.exp() + (log_s - constant) / (math.sqrt(count) * LR_FACTOR)


def largest_weight(bits: int) -> int:
    """Return the largest integer of a signed weight; 1 at 1 bit, whose integers are -1 and 1."""
    return max(1, 2**(bits - 1) - 1)


def initial_weight_step(w: Tensor, bits: int) -> Tensor:
    """Return the initial step of a weight; at 1 bit mean |w|."""
    return positive_mean(w) if bits == 1 else initial_step(w, largest_weight(bits))


def initial_step(x: Tensor, largest: int) -> Tensor:
    """Return the initial step 2 mean |x| / sqrt(largest integer) (section 2.1 of the paper)."""
    return 2 * positive_mean(x) / math.sqrt(largest)


def positive_mean(x: Tensor) -> Tensor:
    """Return mean |x|, or where that is 0 a tiny number, whose logarithm is finite."""
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))  # bf16 is too coarse
    return x.abs().mean().clamp(min=1e-30)
