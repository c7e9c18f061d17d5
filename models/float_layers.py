"""Layers in float32 whatever precision convolutions have: BatchNorm and the classifier."""
import torch
from torch import Tensor, nn


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d in float32, whatever precision the convolution before it has."""

    def forward(self, x: Tensor) -> Tensor:  # (N, C, H, W)
        return super().forward(x.to(self.weight.dtype))


class Classifier(nn.Linear):
    """A linear layer in float32, whatever autocast says: its logits teach."""

    def forward(self, x: Tensor) -> Tensor:  # (N, C) -> (N, classes)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))
