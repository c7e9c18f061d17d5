"""BatchNorm by the statistics of the batch over all processes (--sync-bn)."""
import torch
from torch import nn
from torch.distributed.nn.functional import all_reduce  # its gradient is exchanged, too


def synchronize_batch_norm(model, device):
    """Return the model with synchronised BatchNorms: torch's on GPUs, where alone it works."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.__class__ = SyncBatchNorm2d
    return model


class SyncBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d over all processes on CPUs."""

    def forward(self, x):  # (N, C, H, W)
        if not self.training:
            return super().forward(x)
        totals = all_reduce(torch.cat([x.sum((0, 2, 3)), x.new_tensor([x.numel() / x.shape[1]])]))
        count = totals[-1].detach()
        mean = totals[:-1] / count
        centred = x - mean[:, None, None]
        var = all_reduce(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            momentum = self.momentum or 1 / self.num_batches_tracked.item()
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(var * (count / (count - 1)), momentum)
        return centred * (self.weight * (var + self.eps).rsqrt())[:, None, None] + self.bias[:, None, None]
