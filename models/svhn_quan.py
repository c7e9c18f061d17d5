"""The SVHN network: eight layers, shared quantized weights, one BatchNorm per bit-width."""
from collections.abc import Iterable
from functools import partial

from torch import Tensor, nn

from models.bit_widths import BitWidth, highest_first
from models.float_layers import Classifier
from models.quan_ops import ActivationQ, Conv2dQ, SwitchableBatchNorm2d, set_bit_width


class SVHNNet(nn.Module):
    """The any-precision SVHN network: (N, 3, 40, 40) -> (N, num_classes).

    `width` is the paper's expansion e; all_conv quantizes the stem's weights too.
    """

    def __init__(self, bit_widths: Iterable[BitWidth | int | str], num_classes: int = 10,
                 width: int = 2, all_conv: bool = False):
        super().__init__()
        bit_widths = highest_first(bit_widths)
        stem_conv = Conv2dQ if all_conv else nn.Conv2d
        conv = partial(Conv2dQ, bias=False)
        bn = partial(SwitchableBatchNorm2d, bit_widths=bit_widths)
        e = width
        self.layers = nn.Sequential(
            stem_conv(3, 6 * e, 5), nn.MaxPool2d(2), ActivationQ(),  # (N, 6e, 18, 18)
            conv(6 * e, 8 * e, 3, padding=1), bn(8 * e), ActivationQ(),
            conv(8 * e, 8 * e, 3, padding=1), bn(8 * e), nn.MaxPool2d(2),  # (N, 8e, 9, 9)
            ActivationQ(),
            conv(8 * e, 16 * e, 3), bn(16 * e), ActivationQ(),  # (N, 16e, 7, 7)
            conv(16 * e, 16 * e, 3, padding=1), bn(16 * e), ActivationQ(),
            conv(16 * e, 16 * e, 3), bn(16 * e), ActivationQ(),  # (N, 16e, 5, 5)
            nn.Dropout(0.5),  # elementwise
            conv(16 * e, 64 * e, 5), ActivationQ(rounding=False),  # (N, 64e, 1, 1)
        )
        self.fc = Classifier(64 * e, num_classes)
        set_bit_width(self, bit_widths[0])

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, 40, 40) -> (N, num_classes)
        return self.fc(self.layers(x).flatten(1))
