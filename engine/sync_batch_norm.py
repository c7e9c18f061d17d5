"""BatchNorm by the statistics of the batch over all processes (--sync-bn)."""
import torch
from torch import nn

from engine.distributed import sum_over_processes
from models.float_layers import update_statistics


def synchronize_batch_norm(model, device):
    """Return the model with synchronised BatchNorms: torch's on GPUs, where alone it works."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.__class__ = SyncBatchNorm2d
    return model


class Sum(torch.autograd.Function):
    """The sum of a tensor over the processes, through which their gradients flow."""

    @staticmethod
    def forward(ctx, x):
        return sum_over_processes(x)

    @staticmethod
    def backward(ctx, grad):
        return sum_over_processes(grad)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d over all processes on CPUs."""

    def forward(self, x):  # (N, C, H, W)
        if not self.training:
            return super().forward(x)
        totals = Sum.apply(torch.cat([x.sum((0, 2, 3)), x.new_tensor([x.numel() / x.shape[1]])]))
        count = totals[-1].detach()
        mean = totals[:-1] / count
        centred = x - mean[:, None, None]
        var = Sum.apply(centred.square().sum((0, 2, 3))) / count
        update_statistics(self, mean, var, count)
        scale = self.weight * (var + self.eps).rsqrt()
        return centred * scale[:, None, None] + self.bias[:, None, None]
