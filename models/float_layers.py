"""Layers that compute in float32 at any precision of the convolutions."""
import contextlib

import torch
from torch import Tensor, nn


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d in float32, also after a convolution of lower precision."""

    def forward(self, input: Tensor) -> Tensor:  # (N, C, H, W) -> (N, C, H, W)
        return super().forward(input.to(self.weight.dtype))


class Classifier(nn.Linear):
    """nn.Linear in float32, also within autocast: its logits are targets of lower bit-widths."""

    def forward(self, input: Tensor) -> Tensor:  # (N, C) -> (N, classes)
        with without_autocast(self):
            return super().forward(input.to(self.weight.dtype))


def without_autocast(layer: nn.Module) -> contextlib.AbstractContextManager:
    """Return a context without autocast on a layer's device; the meta device has none."""
    parameter = next(layer.parameters(), None)  # none in nn.DataParallel's replicas
    device = (layer.weight if parameter is None else parameter).device.type
    return contextlib.nullcontext() if device == "meta" else torch.autocast(device, enabled=False)
