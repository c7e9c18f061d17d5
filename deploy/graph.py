"""A network at one bit-width as a list of operations, from which file formats are written."""
from collections.abc import Callable
from typing import NamedTuple

import numpy
import torch
from torch import Tensor, fx, nn

from models.assignment import Width
from models.bit_widths import FULL_PRECISION, BitWidth
from models.float_layers import BatchNorm2d, Classifier
from models.attributes import is_hooked
from models.graph import trace_layers
from models.quan_ops import ActivationQ, Conv2dQ, SwitchableBatchNorm2d, set_bit_width

# run(images (N, 3, H, W) float32, bits) -> logits (N, classes), of an exported file.
Run = Callable[[numpy.ndarray, BitWidth | int | str], numpy.ndarray]
ImageSize = int | tuple[int, int, int]  # of square images of three channels, or (C, H, W)

# The kinds of functions and tensor methods in a graph, by name.
FUNCTIONS = {"add": "add", "iadd": "add", "add_": "add", "flatten": "flatten", "cat": "cat",
             "adaptive_avg_pool2d": "average", "mean": "mean"}
# The kinds of modules, by exact type: what a subclass computes is not known.
MODULES = {nn.MaxPool2d: "max_pool", nn.Linear: "linear", Classifier: "linear", nn.Dropout: "same",
           nn.Identity: "same", nn.AdaptiveAvgPool2d: "average", nn.Flatten: "flatten",
           nn.ReLU: "relu", nn.Conv2d: "convolution", Conv2dQ: "convolution",
           nn.BatchNorm2d: "batch_norm", BatchNorm2d: "batch_norm",
           SwitchableBatchNorm2d: "batch_norm", ActivationQ: "activation"}
TIE = 1e-3  # of a step: nearer to a threshold than this, float32 may choose either level


class Operation(NamedTuple):
    """One operation of a network in evaluation.

    kind: a value of MODULES or FUNCTIONS, or input or output. inputs: names of operations. layer:
    the module, or None. path: its name in the model.
    """
    name: str
    kind: str
    inputs: tuple[str, ...]
    layer: nn.Module | None = None
    path: str = ""


def operations_of(model: nn.Module, bits: Width | int | str) -> list[Operation]:
    """Return the Operations of a model at a bit-width, in order; the last is its output.

    Sets the model's bit-width. Raises ValueError naming a layer that is not supported.
    """
    set_bit_width(model, bits)
    try:
        graph = trace_layers(model)
    except Exception as error:  # any that the network's own code raises
        raise ValueError(f"the network cannot be traced ({type(error).__name__}: {error}): its "
                         "forward must not depend on values of tensors") from None
    check_hooks(model, "the network")
    for node in graph.find_nodes(op="call_method", target="type_as"):  # all are float32
        node.replace_all_uses_with(node.args[0])
        graph.erase_node(node)

    operations = []
    for node in graph.nodes:
        layer = model.get_submodule(node.target) if node.op == "call_module" else None
        inputs = tuple(part.name for part in input_nodes(node))
        name = layer and node.target or node.name
        operation = Operation(node.name, kind_of(node, layer, name), inputs, layer, name)
        check_layer(operation)
        operations.append(operation)
    return operations


def input_nodes(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that a node reads, as often as it reads them."""
    found = []
    fx.node.map_arg((node.args, node.kwargs), found.append)
    return found


def kind_of(node: fx.Node, layer: nn.Module | None, name: str) -> str:
    """Return an Operation's kind; raises ValueError for what is not supported."""
    if node.op in ("placeholder", "output"):
        return {"placeholder": "input", "output": "output"}[node.op]
    if node.op == "call_module":
        kind = MODULES.get(type(layer))
        check_hooks(layer, f"layer {name}")
        whole = True
        if isinstance(layer, nn.AdaptiveAvgPool2d):
            whole = layer.output_size in (1, (1, 1))
        if isinstance(layer, nn.Conv2d):
            whole = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        if isinstance(layer, nn.Flatten):
            whole = (layer.start_dim, layer.end_dim) == (1, -1)
    else:
        target = node.target if isinstance(node.target, str) else node.target.__name__
        kind = FUNCTIONS.get(target)
        whole = kind != "average" or node.args[1:] in ((1,), ((1, 1),), ([1, 1],))
        whole = whole and (kind != "mean" or is_spatial_mean(node))
        whole = whole and (kind != "flatten" or node.args[1:] == (1,))
        whole = whole and (kind != "cat" or node.kwargs.get("dim", (*node.args, 0, 0)[1]) == 1)
        whole = whole and (kind != "add" or len(input_nodes(node)) == 2 and not node.kwargs)
        if target.endswith("_"):  # in place: what reads the input later reads the output
            order = list(node.graph.nodes)
            later = set(order[order.index(node) + 1:])
            whole = whole and not later.intersection(node.args[0].users)
    if kind is None or not whole:
        what = type(layer).__name__ if layer else getattr(node.target, "__name__", node.target)
        raise ValueError(f"layer {name} ({what}) has no place in an exported file: take the packed "
                         "format")
    return kind


def check_hooks(layer: nn.Module, name: str) -> None:
    """Raise ValueError where a call of a layer runs something else than its class says."""
    if is_hooked(layer):
        raise ValueError(f"{name} ({type(layer).__name__}) has a hook or a forward of its own, "
                         "which an exported file does not hold: remove it, or take the packed "
                         "format")


def is_spatial_mean(node: fx.Node) -> bool:
    """Return whether a call averages over height and width: (N, C, H, W) -> (N, C)."""
    _, *arguments = node.args
    dims = arguments or [node.kwargs.get("dim")]
    known = {"dim"}.issuperset(node.kwargs)
    return known and len(dims) == 1 and dims[0] in ((2, 3), [2, 3], (-2, -1), [-2, -1])


def image_shape(image_size: ImageSize) -> tuple[int, int, int]:
    """Return (C, H, W) of an ImageSize."""
    return (3, image_size, image_size) if isinstance(image_size, int) else image_size


def pool_settings(layer: nn.MaxPool2d) -> list[list[int]]:
    """Return kernel size, stride, padding and dilation of a max pool, each as two numbers."""
    return [[part] * 2 if isinstance(part, int) else list(part)
            for part in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)]


def norm_of(layer: nn.Module) -> nn.Module:
    """Return a BatchNorm, or the one of a SwitchableBatchNorm2d at its bit-width."""
    return layer.bn_dict[layer.width] if isinstance(layer, SwitchableBatchNorm2d) else layer


def affine_of(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Return a BatchNorm's scale and shift in evaluation, (C,) in float64."""
    norm = norm_of(layer)
    mean = norm.running_mean.double()
    var = norm.running_var.double()
    scale = 1 / (var + norm.eps).sqrt()
    shift = -scale * mean
    if norm.affine:
        scale = norm.weight.double() * scale
        shift = norm.bias.double() - scale * mean
    return scale.detach(), shift.detach()


def integer_weight(operation: Operation) -> tuple[Tensor, float | numpy.ndarray]:
    """Return the integers m, int64, and the scale s of a quantized weight s m.

    s is a float, or float64 (O, 1, 1) where output channels have scales of their own. Raises
    ValueError, naming the layer, for a weight that is not of that form.
    """
    layer = operation.layer
    with torch.no_grad():
        integers, scale = layer.integer_weight()
    m = integers.round().long()
    is_int8 = m.min() >= -128 and m.max() < 128
    holds = m.abs().max() < 2**layer.bits and (is_int8 or (m % 2 == 1).all())
    if not torch.equal(integers, m.to(integers.dtype)) or not holds:
        raise ValueError(f"layer {operation.path} at {layer.bits} bits: its quantizer's weights "
                         "are not integers of that size times a scale, which integer formats hold")
    if scale.numel() == 1:
        return m, float(scale)
    if scale.shape != (len(m), 1, 1, 1):
        raise ValueError(f"layer {operation.path}: its scale of shape {tuple(scale.shape)} is not "
                         "one number, or one per output channel, which integer formats hold")
    return m, scale.double().numpy()[:, 0]


def float_weight(layer: nn.Conv2d) -> Tensor:
    """Return the float32 weight that a convolution applies to inputs that are not levels."""
    if not isinstance(layer, Conv2dQ):
        return layer.weight.detach()
    with torch.no_grad():
        return layer.quantized_weight().detach()


def takes_levels(layer: nn.Module) -> bool:
    """Return whether a layer is a convolution with an integer weight."""
    return isinstance(layer, Conv2dQ) and layer.bits != FULL_PRECISION


def is_rounding(layer: ActivationQ) -> bool:
    """Return whether an ActivationQ rounds its output to levels."""
    return layer.rounding and layer.bits != FULL_PRECISION


# ---- checks that a layer computes what will be written

@torch.no_grad()
def check_layer(operation: Operation) -> None:
    """Raise ValueError where a layer's output on random numbers is not what its type computes.

    Such as that of a layer whose forward was edited.
    """
    layer = operation.layer
    name = operation.path
    generator = torch.Generator().manual_seed(0)
    if operation.kind == "activation":
        check_activation(layer, name)
        return
    if operation.kind == "convolution":
        size = [dilation * (kernel - 1) + 1 + stride for dilation, kernel, stride
                in zip(layer.dilation, layer.kernel_size, layer.stride)]
        x = torch.rand(2, layer.in_channels, *size, generator=generator)
        expected = nn.functional.conv2d(x, float_weight(layer), layer.bias, layer.stride,
                                        layer.padding, layer.dilation, layer.groups)
    elif operation.kind == "batch_norm":
        norm = norm_of(layer)
        if not isinstance(norm, nn.BatchNorm2d) or norm.running_mean is None:
            raise ValueError(f"layer {name} ({type(norm).__name__}) has no running statistics of "
                             "channels, which an exported file holds: take the packed format")
        scale, shift = affine_of(layer)
        x = torch.randn(2, len(scale), 3, 3, generator=generator)
        expected = (x.double() * scale[:, None, None] + shift[:, None, None]).float()
    elif operation.kind == "linear":
        x = torch.randn(2, layer.in_features, generator=generator)
        expected = nn.functional.linear(x, layer.weight, layer.bias)
    else:
        return
    if not expected.isfinite().all():
        raise ValueError(f"layer {name} computes numbers that are not finite, as a weight of zeros "
                         "does: take another checkpoint")
    found = layer(x)
    if found.shape != expected.shape or not torch.allclose(
            found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())):
        raise ValueError(f"layer {name} ({type(layer).__name__}) does not compute what its type "
                         "says, so an exported file would not hold it: take the packed format")


def check_activation(layer: ActivationQ, name: str) -> None:
    """Raise ValueError where an ActivationQ is not a clip to [0, n] steps, rounded or not."""
    step = 1.0
    n = 1
    if layer.bits != FULL_PRECISION:
        step = layer.quantizer.step_size()
        n = 2**layer.bits - 1
    wrong = step is None or getattr(step, "numel", lambda: 1)() > 1 or not float(step) > 0
    if not wrong:
        step = float(step)
        far = torch.logspace(0, 6, 100)
        x = torch.cat([-far, torch.linspace(-1, 2, 10_001), far]) * max(1.0, n * step)
        if layer.bits == FULL_PRECISION:
            expected = x.clamp(0, layer.limit)
        else:
            levels = (x.double() / step).clamp(0, n)
            if layer.rounding:
                x = x[(levels - levels.floor() - 0.5).abs() > TIE]  # there float32 may choose
                levels = (x.double() / step).clamp(0, n).round()
            expected = (levels * step).float()
        found = layer(x.view(1, 1, 1, -1))
        wrong = found.numel() != x.numel() or not torch.allclose(
            found.flatten(), expected, rtol=1e-5, atol=1e-5 * step)
    if wrong:
        raise ValueError(f"layer {name} at {layer.bits} bits: it is not a clip to a range from 0, "
                         "rounded to steps of one size, which integer formats hold")
