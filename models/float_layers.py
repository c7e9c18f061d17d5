"""Layers in float32 whatever precision convolutions have: BatchNorm and the classifier."""
import torch
from torch import nn


class BatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d in float32, whatever precision the convolution before it has.

    Trained on a CPU in channels-last format it takes statistics of its own: torch sums the pixels
    one after another in float32, and on even backgrounds its means are off by up to 1e-4, so that
    activations cross rounding thresholds, a whole background at a time.
    """

    def forward(self, x):  # (N, C, H, W)
        x = x.to(self.weight.dtype)
        torchs_own = not self.training or x.device.type != "cpu" or x.is_contiguous()
        if torchs_own or torch.compiler.is_compiling():
            return super().forward(x)
        y, mean, var = AccurateBatchNorm.apply(x, self.weight, self.bias, self.eps)
        count = x.numel() / x.shape[1]
        with torch.no_grad():
            self.num_batches_tracked += 1
            momentum = self.momentum or 1 / self.num_batches_tracked.item()  # None: cumulative
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(var * (count / (count - 1)), momentum)
        return y


class AccurateBatchNorm(torch.autograd.Function):
    """torch's BatchNorm by a batch's mean and biased variance, averaged first within each image.

    Returns y (N, C, H, W), and the mean and variance (C,).
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        mean = x.mean((2, 3)).mean(0)
        centred = x - mean[:, None, None]
        var = centred.mul_(centred).mean((2, 3)).mean(0)
        y, _, _ = torch.native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        ctx.mark_non_differentiable(mean, var)
        ctx.eps = eps
        return y, mean, var

    @staticmethod
    def backward(ctx, grad, *unused):
        x, weight, mean, inverse = ctx.saved_tensors
        return *torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, inverse, True, ctx.eps, [True] * 3), None


class Classifier(nn.Linear):
    """A linear layer in float32, whatever autocast says: its logits teach."""

    def forward(self, x):  # (N, C) -> (N, classes)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))
