"""Networks to export: narrow, with BatchNorms of every bit-width that have seen images."""
import copy

import torch

from models import MODELS, set_bit_width

SIZES = {"svhnq": 40, "resnet20q": 32, "resnet50q": 32}


def network(name, bit_widths, all_conv=False):
    """Return a model in evaluation mode, whose BatchNorms also turn signs, and 8 images of it."""
    torch.manual_seed(0)
    model = MODELS[name](bit_widths, 10, 1, all_conv).train()
    images = torch.randn(8, 3, SIZES[name], SIZES[name])
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
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
