"""The fast path against the plain one: the same gradients; every precision; compiled without recompiling."""
import copy

import pytest
import torch
from torch.testing import assert_close

import distributed
import reference
import step as step_module
from errors import UserError
from models import MODELS, set_bit_width
from models.losses import LOSSES, any_precision_backward, sharing, sharing_nothing
from models.quan_ops import BIT_WIDTHS, Conv2dQ, WeightLevels, quantize_activation, quantize_weight, set_arithmetic
from step import Computation, TrainingStep, check_precision, missing_compiler
from utils import Metrics

CPU = torch.device("cpu")
WIDTHS = [1, 2, 4, 8, 32]
SIZES = {"resnet20q": 16, "resnet50q": 32, "svhnq": 40}


def network(name, all_conv=False, width=1, widths=WIDTHS, num_classes=5):
    torch.manual_seed(0)
    model = MODELS[name](widths, num_classes=num_classes, width=width, all_conv=all_conv)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0
    return model


def batch(name, count=4):
    return (reference.values("images", (count, 3, SIZES[name], SIZES[name]), 0),
            torch.arange(count) % 5)


def gradients(model, images, labels, loss, plain):
    set_arithmetic(model, plain=plain)
    model.train().zero_grad()
    results = any_precision_backward(model, images, labels, WIDTHS, loss, share=sharing_nothing if plain else sharing)
    return results, {key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None}


def relative(found, expected):
    """The largest error of a tensor of the dict, relative to the tensor's largest entry (of 1e-4 at least)."""
    return max(float((found[key] - expected[key]).abs().max() / expected[key].abs().max().clamp_min(1e-4))
               for key in expected)


# reference.fill gives BatchNorms random shifts: those of a new network are 0, and where a channel's inputs are all alike
# its outputs lie on the clamp's end, on either side of it by the order of sums.
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name, all_conv", [("resnet20q", False), ("resnet20q", True), ("resnet50q", False),
                                            ("resnet50q", True), ("svhnq", False), ("svhnq", True)])
def test_shared_equals_everything_anew(name, all_conv, loss):
    model = reference.fill(network(name, all_conv).double(), seed=0)
    if name == "svhnq":  # low-bit sums are equal, or 0, only up to the order of summation: no maximum or clamp of them
        model.layers[8], model.layers[21] = torch.nn.AvgPool2d(2), torch.nn.Identity()
    images, labels = batch(name)
    plain_model = copy.deepcopy(model)
    expected, expected_gradients = gradients(plain_model, images, labels, loss, plain=True)
    model.to(memory_format=torch.channels_last)
    found, found_gradients = gradients(model, images, labels, loss, plain=False)
    assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert relative(found_gradients, expected_gradients) < 1e-9
    assert_close(dict(model.named_buffers()), dict(plain_model.named_buffers()), rtol=1e-9, atol=1e-9)
