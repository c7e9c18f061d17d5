"""The SVHN network: eight layers, shared quantized weights, one BatchNorm per bit-width."""
from functools import partial

import torch
from torch import nn

from models.quan_ops import ActivationQ, Classifier, Conv2dQ, SwitchableBatchNorm2d, check_bit_widths, set_bit_width


class Dropout(nn.Dropout):
    """nn.Dropout; on a CPU at p = 1/2 its mask is a bit of a random byte for each element, many times faster."""

    plain = False

    def forward(self, x):  # (N, C, H, W)
        if self.plain or not (self.training and self.p == 0.5 and x.device.type == "cpu"):
            return super().forward(x)
        words = torch.randint(2**62, (-(-x.numel() // 8),))
        twice = words.view(torch.uint8)[:x.numel()] & 2  # 0 or 2
        n, c, height, width = x.shape
        return x * twice.view(n, height, width, c).permute(0, 3, 1, 2)


class Maximum(torch.autograd.Function):
    """max_pool2d(x, size), which keeps for its backward pass where the maxima are and not, as torch's own does, x too."""

    @staticmethod
    def forward(ctx, x, size):
        out, indices = torch.ops.aten.max_pool2d_with_indices(x, [size, size])
        ctx.save_for_backward(indices)
        ctx.size, ctx.shape = size, x.shape
        return out

    @staticmethod
    def backward(ctx, grad):
        indices, = ctx.saved_tensors
        memory_format = torch.contiguous_format if indices.is_contiguous() else torch.channels_last
        x = torch.empty(ctx.shape, dtype=grad.dtype, device=grad.device, memory_format=memory_format)  # for its shape
        size = [ctx.size, ctx.size]
        return torch.ops.aten.max_pool2d_with_indices_backward(grad, x, size, size, [0, 0], [1, 1], False, indices), None


class MaxPool2d(nn.MaxPool2d):
    """nn.MaxPool2d(size), in less memory."""

    plain = False

    def forward(self, x):
        if self.plain or torch.compiler.is_compiling():
            return super().forward(x)
        return Maximum.apply(x, self.kernel_size)


class SVHNNet(nn.Module):
    """Seven convolutions and a classifier on 40 x 40 images; `width` is the paper's expansion e."""

    def __init__(self, bit_widths, num_classes=10, width=2, all_conv=False):
        super().__init__()
        bit_widths = check_bit_widths(bit_widths)
        batch_norm = partial(SwitchableBatchNorm2d, bit_widths=bit_widths)
        stem_conv = partial(Conv2dQ, quantized_input=False) if all_conv else nn.Conv2d
        conv = partial(Conv2dQ, bias=False)
        e = width
        self.layers = nn.Sequential(
            stem_conv(3, 6 * e, 5), MaxPool2d(2), ActivationQ(),  # (N, 6e, 18, 18)
            conv(6 * e, 8 * e, 3, padding=1), batch_norm(8 * e), ActivationQ(),
            conv(8 * e, 8 * e, 3, padding=1), batch_norm(8 * e), MaxPool2d(2), ActivationQ(),  # (N, 8e, 9, 9)
            conv(8 * e, 16 * e, 3), batch_norm(16 * e), ActivationQ(),  # (N, 16e, 7, 7)
            conv(16 * e, 16 * e, 3, padding=1), batch_norm(16 * e), ActivationQ(),
            conv(16 * e, 16 * e, 3), batch_norm(16 * e), ActivationQ(),  # (N, 16e, 5, 5)
            Dropout(0.5),  # elementwise
            conv(16 * e, 64 * e, 5), ActivationQ(rounding=False),  # (N, 64e, 1, 1)
        )
        self.fc = Classifier(64 * e, num_classes)
        self.stem_is_shared = not all_conv
        set_bit_width(self, max(bit_widths))

    def forward(self, x):  # (N, 3, 40, 40) -> (N, num_classes)
        return self.body(self.stem(x))

    def stem(self, x):  # the same at every bit-width, unless all_conv
        return self.layers[1](self.layers[0](x))

    def body(self, x):
        for layer in list(self.layers)[2:]:
            x = layer(x)
        return self.fc(x.flatten(1))


def svhnq(bit_widths, num_classes=10, width=2, all_conv=False):
    """Any-precision SVHN network: (N, 3, 40, 40) -> (N, num_classes). all_conv quantizes the stem's weights too.

    ValueError where a bit-width is not one of 1 to 8 and 32, is repeated, or none is given.
    """
    return SVHNNet(bit_widths, num_classes, width, all_conv)
