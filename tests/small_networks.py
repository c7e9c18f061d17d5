"""The project's networks with fewer layers, where a test needs each kind of layer but not twice."""
from functools import partial

from torch import nn

from engine import published
from models import MODELS, highest_first, resnet20q, resnet50q, set_bit_width, svhnq
from models.float_layers import Classifier
from models.quan_ops import ActivationQ, Conv2dQ, SwitchableBatchNorm2d
from models.resnet_quan import BasicBlock, Bottleneck


def register(monkeypatch):
    """Add some of these to the networks that train.py knows, as those of a data set by default."""
    for name, kind, dataset in (("resnet4q", ResNet4, "cifar10"),
                                ("resnet8q", ResNet8, "cifar10"),
                                ("bottlenecks", Bottlenecks, "imagenet")):
        monkeypatch.setitem(MODELS, name, kind)
        monkeypatch.setitem(published.DATASET, name, dataset)


class ResNet8(resnet20q):
    """ResNet20 with one block a stage, and a quarter of its channels."""

    BLOCKS = ((4, 1), (8, 2), (16, 2))  # channels and stride

    def __init__(self, bit_widths, num_classes=10, width=1, all_conv=False):
        nn.Module.__init__(self)
        bit_widths = highest_first(bit_widths)
        conv = Conv2dQ if all_conv else nn.Conv2d
        bn = partial(SwitchableBatchNorm2d, bit_widths=bit_widths)
        in_channels = 4 * width
        self.conv0 = conv(3, in_channels, 3, padding=1, bias=False)
        self.layers = nn.Sequential()
        for channels, stride in self.BLOCKS:
            self.layers.append(BasicBlock(in_channels, channels * width, stride, bn, conv))
            in_channels = channels * width
        self.bn = bn(in_channels)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = Classifier(in_channels, num_classes)
        set_bit_width(self, bit_widths[0])


class ResNet4(ResNet8):
    """One block of it, which halves height and width."""

    BLOCKS = ((8, 2),)


class OneBlock(resnet20q):
    """ResNet20's first block with a stride, which has all that its others have, by itself."""

    def __init__(self, bit_widths, num_classes=10, width=1, all_conv=False):
        super().__init__(bit_widths, num_classes, width, all_conv)
        self.layers = self.layers[3:4]
        self.bn = SwitchableBatchNorm2d(32 * width, highest_first(bit_widths))
        self.fc = Classifier(32 * width, num_classes)
        set_bit_width(self, highest_first(bit_widths)[0])


class Bottlenecks(resnet50q):
    """ResNet50 with two bottlenecks a stage, and an eighth of its channels."""

    def __init__(self, bit_widths, num_classes=1000, width=1, all_conv=False):
        nn.Module.__init__(self)
        bit_widths = highest_first(bit_widths)
        conv = Conv2dQ if all_conv else nn.Conv2d
        bn = partial(SwitchableBatchNorm2d, bit_widths=bit_widths)
        self.conv1 = conv(3, 8 * width, 7, 2, padding=3, bias=False)
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        in_channels = 8 * width
        for stage in range(1, 5):
            channels = 4 * width * 2**stage
            first = Bottleneck(in_channels, channels, 1 if stage == 1 else 2, bn, conv)
            in_channels = Bottleneck.expansion * channels
            second = Bottleneck(in_channels, channels, 1, bn, conv)
            self.add_module(f"layer{stage}", nn.Sequential(first, second))
        self.bn = bn(in_channels)
        self.act = ActivationQ()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = Classifier(in_channels, num_classes)
        set_bit_width(self, bit_widths[0])


class ShortSVHN(svhnq):
    """The SVHN network with one quantized convolution; its dropout is layers[6]."""

    def __init__(self, bit_widths, num_classes=10, width=2, all_conv=False):
        super().__init__(bit_widths, num_classes, width, all_conv)
        self.layers = nn.Sequential(*self.layers[:5], nn.MaxPool2d(3), nn.Dropout(0.5),
                                    ActivationQ(rounding=False))  # (N, 8 width, 6, 6)
        self.fc = Classifier(8 * width * 6 * 6, num_classes)
        set_bit_width(self, highest_first(bit_widths)[0])
