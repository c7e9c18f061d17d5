"""Networks to export: narrow, with BatchNorms of every bit-width that have seen images."""
import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from models import (MODELS, highest_first, initialize_quantizers, set_bit_width,
                    set_quantizers)
from models.quan_ops import (ActivationQ, Conv2dQ, DoReFaActivation, DoReFaWeight, QuantizedLayer,
                             SwitchableBatchNorm2d)
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
        set_bit_width(self, highest_first(bit_widths)[0])


class LinearNetwork(SVHNNet):
    """svhnq with a quantized linear layer."""

    def __init__(self, bit_widths, num_classes=10, width=1, all_conv=False):
        super().__init__(bit_widths, num_classes, width, all_conv)
        self.fc = LinearQ(64 * width, num_classes)
        set_bit_width(self, highest_first(bit_widths)[0])


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
            if isinstance(layer, nn.ParameterDict):  # logarithms of lsq's ranges
                for log_range in layer.values():
                    log_range += torch.empty(()).uniform_(0.6, 1.4).log()
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.uniform_(-0.2, 1)
                layer.bias.uniform_(-0.2, 0.6)
                layer.momentum = None  # the statistics of the images below
        for bits in bit_widths:
            set_bit_width(model, bits)
            model(images)
    return model.eval(), images


@torch.no_grad()
def assert_logits(run, model, images, bits, flipped=1e-3):
    """Assert that a file's logits are the network's in float64, as closely as torch's are.

    Where a level flips in one of them but not in the other, an image's logits move: `flipped` is
    allowed for the median image, and five times that for the mean.
    """
    set_bit_width(model, bits)
    exact = copy.deepcopy(model).double()(images.double())
    found = (torch.from_numpy(run(images.numpy(), bits)) - exact).abs().mean(1)
    torchs = (model(images) - exact).abs().mean(1)
    both = bits, found, torchs
    assert found.median() < max(2 * torchs.median(), 1e-6) or found.median() < flipped, both
    assert found.mean() < max(2 * torchs.mean(), 1e-6, 5 * flipped), both


# ---- what a file must not hold as what it is not

class GainedConv(Conv2dQ):
    def forward(self, x):
        return 1.5 * super().forward(x)


class Ceiling(DoReFaActivation):
    """Rounds up."""

    def integers(self, x, rounding=True):
        n = 2**self.bits - 1
        return (n * x.clamp(0, 1)).ceil(), 1 / n


class WideStep(DoReFaActivation):
    """Says another step than it takes."""

    def step_size(self):
        return 2 * super().step_size()


class Midpoints(DoReFaWeight):
    """Gives weights between integers."""

    def integers(self, v, e):
        integers, scale = super().integers(v, e)
        return integers + 0.5, scale


class TooLarge(DoReFaWeight):
    """Gives even integers that 8 bits do not hold."""

    def integers(self, v, e):
        return (127 * v).round() * 2, e


def gained(layer, gain):
    """Give one layer, not its class, another forward."""
    forward = layer.forward
    layer.forward = lambda x: gain * forward(x)


def of_class(layer, kind):
    layer.__class__ = kind


def edited_class(monkeypatch, kind):
    """Give a class another forward, as one who edits its source does."""
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda layer, x: 1.01 * forward(layer, x))


# {what: (edit(model, monkeypatch) of resnet20q, part of the message, which names the layer)}
EDITS = {
    "a subclass": (lambda model, _: of_class(model.layers[0].conv0, GainedConv),
                   "layer layers.0.conv0 (GainedConv) has no place"),
    "a layer's forward": (lambda model, _: gained(model.layers[1].conv1, 2),
                          "layer layers.1.conv1 (Conv2dQ) has a hook or a forward"),
    "the network's forward": (lambda model, _: gained(model, 2),
                              "the network (ResNet20) has a hook or a forward"),
    "a hook of the network": (
        lambda model, _: model.register_forward_hook(lambda network, inputs, y: 2 * y),
        "the network (ResNet20) has a hook or a forward"),
    "the class's forward": (lambda _, monkeypatch: edited_class(monkeypatch, Conv2dQ),
                            "layer layers.0.conv0 (Conv2dQ) does not compute what its type says"),
    "the stem's forward": (lambda _, monkeypatch: edited_class(monkeypatch, nn.Conv2d),
                           "layer conv0 (Conv2d) does not compute what its type says"),
    "a BatchNorm": (lambda model, _: gained(model.bn.bn_dict["2"], 1.1),
                    "layer bn (SwitchableBatchNorm2d) does not compute what its type says"),
    "BatchNorm": (lambda _, monkeypatch: edited_class(monkeypatch, SwitchableBatchNorm2d),
                  "layer layers.0.bn0 (SwitchableBatchNorm2d) does not compute what its type says"),
    "the classifier": (lambda model, monkeypatch: edited_class(monkeypatch, type(model.fc)),
                       "layer fc (Classifier) does not compute what its type says"),
    "an activation": (lambda _, monkeypatch: edited_class(monkeypatch, ActivationQ),
                      "layer layers.0.act0 at 2 bits: it is not a clip"),
    "rounding up": (lambda model, _: setattr(model.layers[1].act0, "quantizer", Ceiling()),
                    "layer layers.1.act0 at 2 bits: it is not a clip"),
    "another step": (lambda model, _: setattr(model.layers[1].act1, "quantizer", WideStep()),
                     "layer layers.1.act1 at 2 bits: it is not a clip"),
    "no integers": (lambda model, _: setattr(model.layers[2].conv0, "quantizer", Midpoints()),
                    "layer layers.2.conv0 at 2 bits: its quantizer's weights"),
    "large integers": (lambda model, _: setattr(model.layers[2].conv0, "quantizer", TooLarge()),
                       "layer layers.2.conv0 at 2 bits: its quantizer's weights"),
    "a linear layer": (lambda model, _: setattr(model, "fc", LinearQ(64, 10)),
                       "layer fc (LinearQ) has no place"),
}


