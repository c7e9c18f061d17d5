"""Networks to export: narrow, with BatchNorms of every bit-width that have seen images."""
import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from models import (MODELS, check_bit_widths, initialize_quantizers, set_bit_width,
                    set_quantizers)
from models.quan_ops import ActivationQ, Conv2dQ, DoReFaWeight, QuantizedLayer
from models.svhn_quan import SVHNNet

SIZES = {"svhnq": 40, "resnet20q": 32, "resnet50q": 32}


class LinearQ(QuantizedLayer, nn.Linear):
    def forward(self, x):
        return self.apply_quantized(x, nn.functional.linear)


class ChannelScale(DoReFaWeight):
    """DoReFa's, with the mean |w| of each output channel."""

    def prepare(self, w):
        v, _ = super().prepare(w)
        return v, w.abs().mean(tuple(range(1, w.ndim)), keepdim=True).detach()


class OwnBits(SVHNNet):
    """svhnq whose first and third convolution have weights of 8 bits, the latter 6-bit inputs."""

    def __init__(self, bit_widths, num_classes=10, width=1, all_conv=False):
        super().__init__(bit_widths, num_classes, width, all_conv)
        self.layers[0] = Conv2dQ(3, 6 * width, 5, bits=8)
        self.layers[5] = ActivationQ(bits=6)
        self.layers[6] = Conv2dQ(8 * width, 8 * width, 3, padding=1, bias=False, bits=8)
        set_bit_width(self, check_bit_widths(bit_widths)[0])


class LinearNetwork(SVHNNet):
    """svhnq with a quantized linear layer."""

    def __init__(self, bit_widths, num_classes=10, width=1, all_conv=False):
        super().__init__(bit_widths, num_classes, width, all_conv)
        self.fc = LinearQ(64 * width, num_classes)
        set_bit_width(self, check_bit_widths(bit_widths)[0])


class Change(NamedTuple):
    """What a researcher may change of a network."""
    network: Callable | None = SVHNNet
    quantizer: str = "dorefa"
    weight_quantizer: Callable | None = None


CHANGES = {"none": Change(), "own bits": Change(OwnBits), "a linear layer": Change(LinearNetwork),
           "a scale per channel": Change(weight_quantizer=ChannelScale),
           "lsq": Change(quantizer="lsq")}


def network(name, bit_widths, all_conv=False, change="none"):
    """Return a model in evaluation mode, whose BatchNorms also turn signs, and 8 images of it.

    change: of CHANGES; others than "none" are of svhnq.
    """
    torch.manual_seed(0)
    change = CHANGES[change]
    kind = MODELS[name] if change == CHANGES["none"] else change.network
    model = kind(bit_widths, 10, 1, all_conv).train()
    images = torch.randn(8, 3, SIZES[name], SIZES[name])
    if change.quantizer != "dorefa":
        set_quantizers(model, change.quantizer, bit_widths)
        initialize_quantizers(model, images, bit_widths)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, QuantizedLayer) and change.weight_quantizer:
                layer.quantizer = change.weight_quantizer()
            if isinstance(layer, nn.ParameterDict):  # the quantizers' steps
                for step in layer.values():
                    step *= torch.empty(()).uniform_(0.6, 1.4)
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.uniform_(-0.2, 1)
                layer.bias.uniform_(-0.2, 0.6)
                layer.momentum = None  # the statistics of the images below
        for bits in bit_widths:
            set_bit_width(model, bits)
            model(images)
    return model.eval(), images


@torch.no_grad()
def errors(run, model, images, bits):
    """Return the mean difference of a file's logits from the network's in float64, and torch's."""
    set_bit_width(model, bits)
    exact = copy.deepcopy(model).double()(images.double())
    found = torch.from_numpy(run(images.numpy(), bits))
    return float((found - exact).abs().mean()), float((model(images) - exact).abs().mean())
