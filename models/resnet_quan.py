"""Pre-activation ResNets with shared quantized weights and one BatchNorm per bit-width."""
from functools import partial

from torch import nn

from models.quan_ops import (ActivationQ, BatchNorm2d, Classifier, Conv2dQ, SwitchableBatchNorm2d, check_bit_widths,
                             set_bit_width, through)


def add(out, shortcut):  # what the layers give may be of another precision than the shortcut
    return out + shortcut.to(out.dtype)


class BasicBlock(nn.Module):
    """BN, act, Q 3x3, BN, act, Q 3x3, plus a shortcut: the input, or where the shape changes a 1x1 convolution of
    the first activation and an ordinary BatchNorm, which all bit-widths share."""

    def __init__(self, in_channels, channels, stride, batch_norm, shortcut_conv):
        super().__init__()
        self.bn0 = batch_norm(in_channels)
        self.conv0 = Conv2dQ(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = batch_norm(channels)
        self.conv1 = Conv2dQ(channels, channels, 3, padding=1, bias=False)
        self.act = ActivationQ()
        self.skip_conv = None
        if stride != 1:
            self.skip_conv = shortcut_conv(in_channels, channels, 1, stride, bias=False)
            self.skip_bn = BatchNorm2d(channels)

    def forward(self, x):  # (N, C_in, H, W) -> (N, C, H / stride, W / stride)
        first, rest = [self.bn0, self.act], [self.conv0, self.bn1, self.act, self.conv1]
        if self.skip_conv is None:
            return add(through(first + rest, x), x)
        out = through(first, x)
        return add(through(rest, out), through([self.skip_conv, self.skip_bn], out))


class ResNet20(nn.Module):
    """Three stages of three basic blocks, widths 16, 32 and 64 times `width`; for images of 28 to 64 pixels."""

    def __init__(self, bit_widths, num_classes=10, width=5, all_conv=False):
        super().__init__()
        bit_widths = check_bit_widths(bit_widths)
        batch_norm = partial(SwitchableBatchNorm2d, bit_widths=bit_widths)
        shortcut_conv = Conv2dQ if all_conv else nn.Conv2d
        stem_conv = partial(Conv2dQ, quantized_input=False) if all_conv else nn.Conv2d

        in_channels = 16 * width
        self.conv0 = stem_conv(3, in_channels, 3, padding=1, bias=False)
        self.layers = nn.Sequential()
        for channels, first_stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
            for stride in (first_stride, 1, 1):
                self.layers.append(BasicBlock(in_channels, channels, stride, batch_norm, shortcut_conv))
                in_channels = channels
        self.bn = batch_norm(in_channels)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = Classifier(in_channels, num_classes)
        self.stem_is_shared = not all_conv
        set_bit_width(self, max(bit_widths))

    def forward(self, x):  # (N, 3, H, W) -> (N, num_classes)
        return self.body(self.stem(x))

    def stem(self, x):  # the same at every bit-width, unless all_conv
        return self.conv0(x)

    def body(self, x):
        x = self.layers(x)
        x = self.pool(through([self.bn], x))  # no activation in between, as published
        return self.fc(x.flatten(1))


class Bottleneck(nn.Module):
    """BN, act, Q 1x1, BN, act, Q 3x3 (with the stride), BN, act, Q 1x1, plus a shortcut: the input, or in a stage's
    first block a 1x1 convolution of the raw input and a switchable BatchNorm."""

    expansion = 4

    def __init__(self, in_channels, channels, stride, first, batch_norm, shortcut_conv):
        super().__init__()
        out_channels = self.expansion * channels
        self.bn0 = batch_norm(in_channels)
        self.conv0 = Conv2dQ(in_channels, channels, 1, bias=False)
        self.bn1 = batch_norm(channels)
        self.conv1 = Conv2dQ(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = batch_norm(channels)
        self.conv2 = Conv2dQ(channels, out_channels, 1, bias=False)
        self.act = ActivationQ()
        self.downsample = None
        if first:
            self.downsample = nn.Sequential(
                shortcut_conv(in_channels, out_channels, 1, stride, bias=False), batch_norm(out_channels))

    def forward(self, x):  # (N, C_in, H, W) -> (N, 4 C, H / stride, W / stride)
        shortcut = x if self.downsample is None else through(self.downsample, x)
        out = through([self.bn0, self.act, self.conv0, self.bn1, self.act, self.conv1, self.bn2, self.act, self.conv2], x)
        return add(out, shortcut)


class ResNet50(nn.Module):
    """Four stages of 3, 4, 6 and 3 bottlenecks, widths 64 to 512 times `width`; for ImageNet's 224-pixel images."""

    def __init__(self, bit_widths, num_classes=1000, width=1, all_conv=False):
        super().__init__()
        bit_widths = check_bit_widths(bit_widths)
        batch_norm = partial(SwitchableBatchNorm2d, bit_widths=bit_widths)
        full_precision_conv = partial(Conv2dQ, quantized_input=False) if all_conv else nn.Conv2d

        in_channels = 64 * width
        self.conv1 = full_precision_conv(3, in_channels, 7, 2, padding=3, bias=False)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        for stage, (channels, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
            layer = nn.Sequential()
            for index in range(blocks):
                stride = 2 if stage > 1 and index == 0 else 1
                layer.append(
                    Bottleneck(in_channels, channels * width, stride, index == 0, batch_norm, full_precision_conv))
                in_channels = Bottleneck.expansion * channels * width
            self.add_module(f"layer{stage}", layer)
        self.bn = batch_norm(in_channels)
        self.act = ActivationQ()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = Classifier(in_channels, num_classes)

        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        self.stem_is_shared = not all_conv
        set_bit_width(self, max(bit_widths))

    def forward(self, x):  # (N, 3, H, W) -> (N, num_classes)
        return self.body(self.stem(x))

    def stem(self, x):  # the same at every bit-width, unless all_conv
        return self.maxpool(self.conv1(x))

    def body(self, x):
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = self.pool(through([self.bn, self.act], x))
        return self.fc(x.flatten(1))


def resnet20q(bit_widths, num_classes=10, width=5, all_conv=False):
    """Any-precision ResNet-20 for CIFAR-10: (N, 3, 32, 32) -> (N, num_classes). all_conv quantizes every convolution.

    ValueError where a bit-width is not one of 1 to 8 and 32, is repeated, or none is given.
    """
    return ResNet20(bit_widths, num_classes, width, all_conv)


def resnet50q(bit_widths, num_classes=1000, width=1, all_conv=False):
    """Any-precision ResNet-50 for ImageNet: (N, 3, 224, 224) -> (N, num_classes). Otherwise as resnet20q."""
    return ResNet50(bit_widths, num_classes, width, all_conv)
