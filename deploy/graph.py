"""A network at one bit-width as a short list of operations, which a file format writes down."""
from typing import NamedTuple

import torch
from torch import fx, nn

from models.float_layers import BatchNorm2d, Classifier
from models.quan_ops import (FULL_PRECISION, ActivationQ, Conv2dQ, SwitchableBatchNorm2d,
                             set_bit_width)

OURS = (ActivationQ, Conv2dQ, SwitchableBatchNorm2d, BatchNorm2d, Classifier)
# What stands in a graph as a function or a method of tensors, by name.
FUNCTIONS = {"add": "add", "iadd": "add", "add_": "add", "flatten": "flatten", "cat": "cat",
             "adaptive_avg_pool2d": "average", "mean": "average"}
MODULES = {nn.MaxPool2d: "max_pool", nn.Linear: "linear", nn.Dropout: "same", nn.Identity: "same",
           nn.AdaptiveAvgPool2d: "average", nn.Flatten: "flatten", nn.ReLU: "relu"}
NESTED = (1, 2, 4, 8)  # bit-widths: each one's n is an odd multiple of the lower ones'


class Operation(NamedTuple):
    """One operation of a network in evaluation.

    kind: of MODULES or FUNCTIONS, or input, output, convolution, batch_norm, activation.
    inputs: names of operations. layer: the module, if there is one.
    """
    name: str
    kind: str
    inputs: tuple
    layer: nn.Module | None = None


class Tracer(fx.Tracer):
    def is_leaf_module(self, module, name):
        return isinstance(module, OURS) or super().is_leaf_module(module, name)


def trace(model, bits):
    """Return the Operations of a model at `bits` bits, in order; the last is its output.

    Sets the model's bit-width. Raises ValueError, naming the layer, for one that is not covered.
    """
    set_bit_width(model, bits)
    try:
        graph = Tracer().trace(model)
    except Exception as error:  # whatever the network's own code makes of a proxy
        raise ValueError(f"the network cannot be traced ({type(error).__name__}: {error}): its "
                         "forward must not depend on values of tensors") from None
    for node in graph.find_nodes(op="call_method", target="type_as"):  # all is float32 here
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)
    operations = []
    for node in graph.nodes:
        layer = model.get_submodule(node.target) if node.op == "call_module" else None
        inputs = tuple(part.name for part in node.all_input_nodes)
        name = layer and node.target or node.name
        operations.append(Operation(node.name, kind_of(node, layer, name), inputs, layer))
    return operations


def kind_of(node, layer, name):
    """Return an Operation's kind; ValueError where there is none."""
    if node.op in ("placeholder", "output"):
        return {"placeholder": "input", "output": "output"}[node.op]
    if node.op == "call_module":
        kind = next((kind for part, kind in MODULES.items() if isinstance(layer, part)), None)
        if isinstance(layer, nn.Conv2d):
            kind = "convolution" if layer.padding_mode == "zeros" else None
        elif isinstance(layer, (nn.BatchNorm2d, SwitchableBatchNorm2d)):
            kind = "batch_norm"
        elif isinstance(layer, ActivationQ):
            kind = "activation"
            check_activation(layer, name)
        whole = not isinstance(layer, nn.AdaptiveAvgPool2d) or layer.output_size in (1, (1, 1))
    else:
        target = node.target if isinstance(node.target, str) else node.target.__name__
        kind = FUNCTIONS.get(target)
        whole = kind != "average" or node.args[1] in (1, (1, 1), (2, 3), [2, 3])
        whole = whole and (kind != "flatten" or node.args[1:] == (1,))
        whole = whole and (kind != "cat" or node.kwargs.get("dim", (*node.args, 0)[1]) == 1)
        whole = whole and (kind != "add" or len(node.all_input_nodes) == 2)
    if kind is None or not whole:
        what = type(layer).__name__ if layer else str(node.target)
        raise ValueError(f"layer {name} ({what}) has no place in an exported file: take the packed "
                         "format")
    return kind


def image_shape(image_size):
    """Return (C, H, W), given that or the size of square images of three channels."""
    return (3, image_size, image_size) if isinstance(image_size, int) else image_size


def pool_settings(layer):
    """Return a max pool's size, stride, padding and dilation, lists of two numbers."""
    return [[part] * 2 if isinstance(part, int) else list(part)
            for part in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)]


def affine_of(layer):
    """Return a BatchNorm's scale and shift in evaluation, (C,) in float64."""
    norm = layer.bn_dict[str(layer.bits)] if isinstance(layer, SwitchableBatchNorm2d) else layer
    mean, var = norm.running_mean.double(), norm.running_var.double()
    scale = norm.weight.double() / (var + norm.eps).sqrt()
    return scale.detach(), (norm.bias.double() - scale * mean).detach()


def integer_weight(operation, bits=None):
    """Return the odd integers m, int64, and the scale s of a Conv2dQ: its weight is s m.

    m = 2 k - n for the level k in [0, n], n = 2^bits - 1; bits: the layer's, or others.
    """
    bits = bits or operation.layer.bits
    n = 2**bits - 1
    with torch.no_grad():
        w, scale = operation.layer.operand(bits, integers=True)  # m / 2^bits
    exact = 2**bits * w.double()
    m = exact.round().long()
    if ((exact - m).abs() > 1e-3).any() or (m % 2 != n % 2).any() or (m.abs() > n).any():
        raise ValueError(f"layer {operation.name} at {bits} bits: its weights are not 2^bits "
                         "values of equal distance from -E to E, which integer formats hold")
    return m, float(scale) / n


def float_weight(layer):
    """Return the weight, float32, that a convolution applies to what is not integer."""
    if not isinstance(layer, Conv2dQ):
        return layer.weight.detach()
    with torch.no_grad():
        return layer.operand(layer.bits)[0]


def check_activation(layer, name):
    """Raise ValueError where an ActivationQ is not the clipping and rounding that formats hold."""
    x = torch.linspace(-1, 2, 10_001)
    expected = x.clamp(0, layer.limit if layer.bits == FULL_PRECISION else 1)
    if layer.bits != FULL_PRECISION and layer.rounding:
        n = 2**layer.bits - 1
        expected = (n * expected).round() / n
    if not torch.equal(layer(x), expected):
        raise ValueError(f"layer {name} at {layer.bits} bits: it is not a clip to [0, 1], rounded "
                         "to steps of equal size, which integer formats hold")


def takes_levels(layer):
    return isinstance(layer, Conv2dQ) and layer.bits != FULL_PRECISION
