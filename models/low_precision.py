"""Where operands in bf16 or TF32 can be exact integers: found out once, before a loop.

QuantizedLayer.apply_quantized uses what is found.
"""
import copy

import torch
from torch import Tensor, nn

from models.bit_widths import BITS, FULL_PRECISION, BitWidth
from models.graph import input_activations, trace_layers
from models.quan_ops import QuantizedLayer, bit_widths_of
from utils import keeping_random_states

TOLERANCE = 1e-3  # of outputs and gradients that are equal but for rounding, relative


def prepare_low_precision(model: nn.Module) -> None:
    """Find out where operands in bf16 or TF32 can be exact integers; call it once before a loop.

    Layers of which that is not known compute with the weight itself, which is rounded then.
    """
    link_inputs(model)
    find_scalable(model)


def link_inputs(model: nn.Module) -> None:
    """Set each quantized layer's input_quantizer, where torch.fx finds a single one.

    It makes operands of low precision exact; without it they are rounded as any others.
    """
    try:
        sources = input_activations(model, trace_layers(model))
    except Exception:  # of torch.fx, or of the network's own code
        return
    for layer, activations in sources.items():
        quantizer = activations.pop().quantizer if len(activations) == 1 else None
        object.__setattr__(layer, "input_quantizer", quantizer)  # it is no submodule of the layer


@torch.no_grad()
def find_scalable(model: nn.Module) -> None:
    """Set is_scalable of a model's layers, by copies of them with random parameters.

    It is False where integers, with their scale applied to the output, give another output, or
    other gradients, than the weight does, as where quantized_weight was edited, or a convolution
    pads with ones; and where that is not known, as of what is neither a convolution nor linear.
    """
    widths = [width for width in bit_widths_of(model) or map(BitWidth, BITS)
              if width.weights != FULL_PRECISION]
    drawn = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if not isinstance(layer, QuantizedLayer):
            continue
        twin = copy_of(layer).to("cpu", torch.float32)
        twin.input_quantizer = None  # which has another bit-width
        twin.is_scalable = True  # so that it tries both forms
        for parameter in twin.parameters():
            if parameter.is_floating_point():
                parameter.normal_(generator=drawn)
        x = inputs_of(twin, drawn)
        layer.is_scalable = x is not None and all(
            is_scalable(twin.train(training), width, x.requires_grad_())
            for training in (True, False) for width in widths)


def is_scalable(layer: nn.Module, width: BitWidth, x: Tensor) -> bool:
    """Return whether a layer has the same output, and in training the same gradients, in both forms
    of `apply_quantized`.

    A layer that does not run on x is not known to have.
    """
    layer.switch_bit_width(width)
    if layer.bits == FULL_PRECISION:
        return True
    forms = []
    for is_low in (True, False):
        own = copy.deepcopy(layer)  # as a quantizer may count
        own.rounds_operands = lambda x, is_low=is_low: is_low
        try:
            with keeping_random_states(), torch.set_grad_enabled(own.training):
                y = own.forward(x)  # without hooks
                gradients = ()
                if own.training:
                    trained = [x, *(each for each in own.parameters() if each.requires_grad)]
                    gradients = torch.autograd.grad(
                        y.square().sum(), trained, allow_unused=True, materialize_grads=True)
        except Exception:  # such as of more inputs
            return False
        forms.append((y.detach(), *gradients))
    return all((found - expected).norm() <= TOLERANCE * expected.norm()
               for found, expected in zip(*forms))


def inputs_of(layer: nn.Module, drawn: torch.Generator) -> Tensor | None:
    """Return random inputs of a convolution or a linear layer; None of other layers."""
    if hasattr(layer, "in_features"):
        return torch.rand(2, layer.in_features, generator=drawn)
    if hasattr(layer, "in_channels"):
        sizes = [2 * dilation * size for size, dilation in zip(layer.kernel_size, layer.dilation)]
        return torch.rand(2, layer.in_channels, *sizes, generator=drawn)
    return None


def copy_of(layer: nn.Module) -> nn.Module:
    """Return a copy of a layer, whose weight is a parameter where a hook computes it."""
    computed = vars(layer).pop("weight", None)  # which has a graph, and so cannot be copied
    try:
        twin = copy.deepcopy(layer)
    finally:
        if computed is not None:
            layer.weight = computed
    if computed is not None:
        twin.weight = nn.Parameter(computed.detach().clone())
    return twin
