"""Pre-activation ResNets with shared quantized weights and one BatchNorm per bit-width."""
from collections.abc import Callable, Iterable
from functools import partial

from torch import Tensor, nn

from models.bit_widths import BitWidth, highest_first
from models.float_layers import BatchNorm2d, Classifier
from models.quan_ops import ActivationQ, Conv2dQ, SwitchableBatchNorm2d, set_bit_width


class BasicBlock(nn.Module):
    """A block of BN, act, Q 3x3, BN, act, Q 3x3, and a shortcut.

    The shortcut is the input, or with a stride a 1x1 convolution of the first activation and a
    plain BatchNorm, which all bit-widths share.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, bn: Callable[[int], nn.Module],
                 shortcut_conv: type[nn.Conv2d]):
        super().__init__()
        self.bn0 = bn(in_channels)
        self.act0 = ActivationQ()
        self.conv0 = Conv2dQ(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = bn(channels)
        self.act1 = ActivationQ()
        self.conv1 = Conv2dQ(channels, channels, 3, padding=1, bias=False)
        self.skip_conv = None
        if stride != 1:
            self.skip_conv = shortcut_conv(in_channels, channels, 1, stride, bias=False)
            self.skip_bn = BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:  # (N, C_in, H, W) -> (N, C, H / stride, W / stride)
        a = self.act0(self.bn0(x))
        shortcut = x if self.skip_conv is None else self.skip_bn(self.skip_conv(a))
        out = self.conv1(self.act1(self.bn1(self.conv0(a))))
        return (out + shortcut).type_as(x)  # with bf16, stored in 16 bits


class ResNet20(nn.Module):
    """The any-precision ResNet-20 for CIFAR-10: (N, 3, 32, 32) -> (N, num_classes).

    Three stages of three basic blocks, with 16, 32 and 64 times `width` channels. all_conv
    quantizes every convolution. Raises ValueError for bit-widths that highest_first refuses.
    """

    def __init__(self, bit_widths: Iterable[BitWidth | int | str], num_classes: int = 10,
                 width: int = 5, all_conv: bool = False):
        super().__init__()
        bit_widths = highest_first(bit_widths)
        bn = partial(SwitchableBatchNorm2d, bit_widths=bit_widths)
        full_precision_conv = Conv2dQ if all_conv else nn.Conv2d
        in_channels = 16 * width
        self.conv0 = full_precision_conv(3, in_channels, 3, padding=1, bias=False)
        self.layers = nn.Sequential()
        for channels, first_stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
            for stride in (first_stride, 1, 1):
                self.layers.append(
                    BasicBlock(in_channels, channels, stride, bn, full_precision_conv))
                in_channels = channels
        self.bn = bn(in_channels)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = Classifier(in_channels, num_classes)
        set_bit_width(self, bit_widths[0])

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, num_classes)
        x = self.bn(self.layers(self.conv0(x)))
        return self.fc(self.pool(x).flatten(1))  # no activation before the pool, as published


class Bottleneck(nn.Module):
    """A block of BN, act, Q 1x1, BN, act, Q 3x3 (with the stride), BN, act, Q 1x1, and a shortcut.

    The shortcut is the input, or in a stage's first block a 1x1 convolution of the input and a
    switchable BatchNorm.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, bn: Callable[[int], nn.Module],
                 shortcut_conv: type[nn.Conv2d]):
        super().__init__()
        out_channels = self.expansion * channels
        self.bn0 = bn(in_channels)
        self.act0 = ActivationQ()
        self.conv0 = Conv2dQ(in_channels, channels, 1, bias=False)
        self.bn1 = bn(channels)
        self.act1 = ActivationQ()
        self.conv1 = Conv2dQ(channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = bn(channels)
        self.act2 = ActivationQ()
        self.conv2 = Conv2dQ(channels, out_channels, 1, bias=False)
        self.downsample = None
        if in_channels != out_channels:
            self.downsample = nn.Sequential(
                shortcut_conv(in_channels, out_channels, 1, stride, bias=False), bn(out_channels))

    def forward(self, x: Tensor) -> Tensor:  # (N, C_in, H, W) -> (N, 4 C, H / stride, W / stride)
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.conv0(self.act0(self.bn0(x)))
        out = self.conv1(self.act1(self.bn1(out)))
        out = self.conv2(self.act2(self.bn2(out)))
        return (out + shortcut).type_as(x)  # with bf16, stored in 16 bits


class ResNet50(nn.Module):
    """The any-precision ResNet-50: (N, 3, 224, 224) -> (N, num_classes).

    Four stages of 3, 4, 6 and 3 bottlenecks, which are 64, 128, 256 and 512 times `width` channels
    wide inside. all_conv and errors are as in ResNet20.
    """

    def __init__(self, bit_widths: Iterable[BitWidth | int | str], num_classes: int = 1000,
                 width: int = 1, all_conv: bool = False):
        super().__init__()
        bit_widths = highest_first(bit_widths)
        bn = partial(SwitchableBatchNorm2d, bit_widths=bit_widths)
        full_precision_conv = Conv2dQ if all_conv else nn.Conv2d
        in_channels = 64 * width
        self.conv1 = full_precision_conv(3, in_channels, 7, 2, padding=3, bias=False)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        for stage, blocks in enumerate((3, 4, 6, 3), start=1):
            channels = width * 32 * 2**stage
            layer = nn.Sequential()
            for stride in (1 if stage == 1 else 2, *[1] * (blocks - 1)):
                layer.append(Bottleneck(in_channels, channels, stride, bn, full_precision_conv))
                in_channels = Bottleneck.expansion * channels
            self.add_module(f"layer{stage}", layer)
        self.bn = bn(in_channels)
        self.act = ActivationQ()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = Classifier(in_channels, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        set_bit_width(self, bit_widths[0])

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, num_classes)
        x = self.maxpool(self.conv1(x))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.pool(self.act(self.bn(x))).flatten(1))
