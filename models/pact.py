"""PACT: a learned clip of activations, per layer and bit-width; weights as DoReFa-Net's.

Source: Choi et al., 2018 (arXiv 1805.06085); a clip for each bit-width: AdaBits, Jin et al., CVPR
2020 (arXiv 1912.09666). A clip starts at 1, where the published quantizer has it for good.
"""
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from models.bit_widths import FULL_PRECISION, BitWidth
from models.quan_ops import (ActivationQuantizer, DoReFaWeight, QuantizedLayer, Quantizer, clamp,
                             round_ste)


def pact(layer: nn.Module, bit_widths: Iterable[BitWidth]) -> Quantizer:
    """Return DoReFa-Net's quantizer for a layer's weight, or PACT's for activations."""
    if isinstance(layer, QuantizedLayer):
        return DoReFaWeight()
    return PACTActivation(layer, bit_widths)


class PACTActivation(ActivationQuantizer):
    """Quantizes x to 2^bits evenly spaced values in [0, c], with a learned clip c.

        bits <= 8:  c round(n min(ReLU(x), c) / c) / n;  n = 2^bits - 1
        bits = 32:  ReLU(x)

    The gradient passes where 0 <= x < c; where x >= c it goes to c.
    """

    def __init__(self, layer: nn.Module, bit_widths: Iterable[BitWidth]):
        super().__init__()
        self.clip_dict = nn.ParameterDict(
            {str(width): torch.tensor(1.0) for width in bit_widths
             if (layer.own_bits or width.activations) != FULL_PRECISION})

    def full_precision(self, x: Tensor) -> Tensor:
        return torch.relu(x)

    def integers(self, x: Tensor, rounding: bool = True) -> tuple[Tensor, Tensor]:
        clip = self.clip()
        step = self.step()
        x = x.to(clip.dtype)  # bf16 would round the clip
        a = torch.where(x >= clip, clip, clamp(x, 0, math.inf)) / step
        return round_ste(a) if rounding else a, step

    def clip(self) -> Tensor:
        """Return the clip at the current bit-width; ValueError where it has none."""
        return self.of_width(self.clip_dict, "pact has no clip").abs()

    def step(self) -> Tensor:
        return self.clip().detach() / (2**self.bits - 1)
