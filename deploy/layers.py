"""Compare each integer layer of an exporter with float64, on the same inputs."""
import copy
import tempfile
from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy
import torch
from torch import Tensor, nn

from deploy.graph import Operation, is_rounding, step_of, takes_levels, trace
from models.bit_widths import BitWidth
from models.quan_ops import ActivationQ

NEAR = 1e-5  # nearer to a threshold than this, of an activation in [0, 1], either level is right
BETWEEN = ("batch_norm", "max_pool", "same")  # kinds between a convolution and its levels


def integer_layers(operations: list[Operation]) -> dict[str, list[nn.Module]]:
    """Return {name: modules} of each convolution of levels.

    The modules are the activation that makes its input, the convolution, and those that turn its
    sums into levels; they end before anything else, such as an addition.
    """
    by_name = {operation.name: operation for operation in operations}
    counts = Counter(name for operation in operations for name in operation.inputs)
    reader = {name: operation for operation in operations for name in operation.inputs}
    found = {}
    for operation in operations:
        if operation.kind != "convolution" or not takes_levels(operation.layer):
            continue
        source = by_name[operation.inputs[0]]
        while source.kind in ("max_pool", "same"):
            source = by_name[source.inputs[0]]
        if source.kind != "activation" or not is_rounding(source.layer):
            continue

        modules = [source.layer, operation.layer]
        last = operation
        while counts[last.name] == 1 and reader[last.name].kind in (*BETWEEN, "activation"):
            last = reader[last.name]
            modules.append(last.layer)
            if last.kind == "activation":
                break
        found[operation.name] = modules
    return found


@torch.no_grad()
def compare_layers(model: nn.Module, files: ModuleType, images: numpy.ndarray,
                   bits: BitWidth) -> dict[str, float]:
    """Compare the integer layers of a model at `bits`, exported one by one, with float64.

    files: the module of the format. images: (n, 3, H, W), from which the model computes the layers'
    inputs.

    Returns:
        layers and levels: their numbers. differ: levels that are not float64's. far: those
        of them that are not NEAR a threshold. relative: the largest relative difference of
        layers that end without levels.
    """
    layers = integer_layers(trace(model, bits))
    inputs = {}
    hooks = [modules[1].register_forward_pre_hook(
        lambda layer, args, name=name: inputs.__setitem__(name, args[0]))
        for name, modules in layers.items()]
    model(torch.from_numpy(images))
    for hook in hooks:
        hook.remove()

    result = {"layers": len(layers), "levels": 0, "differ": 0, "far": 0, "relative": 0.0}
    for name, modules in layers.items():
        found, exact = outputs(modules, inputs[name], files, bits)
        if not (isinstance(modules[-1], ActivationQ) and is_rounding(modules[-1])):
            difference = float((found - exact).abs().max() / exact.abs().max())
            result["relative"] = max(result["relative"], difference)
            continue

        n = 2**modules[-1].bits - 1
        step = step_of(modules[-1])
        exact = (exact / step).clamp(0, n)
        differ = (found / step).round() != exact.round()
        distance = (exact - exact.floor() - 0.5).abs() * step
        result["levels"] += differ.numel()
        result["differ"] += int(differ.sum())
        result["far"] += int((distance[differ] > NEAR).sum())
    return result


def outputs(modules: list[nn.Module], x: Tensor, files: ModuleType,
            bits: BitWidth) -> tuple[Tensor, Tensor]:
    """Return a layer's outputs, of a file of it alone, and in float64 before its activation.

    modules: as in integer_layers.
    """
    alone = nn.Sequential(*modules, nn.Flatten()).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "layer.xml")
        files.export(alone, [bits], path, tuple(x.shape[1:]))
        found = torch.from_numpy(files.load(path)(x.numpy(), bits)).double()

    _, conv, *rest = modules
    if rest and isinstance(rest[-1], ActivationQ) and is_rounding(rest[-1]):
        rest = rest[:-1]
    weight = conv.quantized_weight()
    bias = None if conv.bias is None else conv.bias.double()
    y = conv._conv_forward(x.double(), weight.double(), bias)
    return found, copy.deepcopy(nn.Sequential(*rest, nn.Flatten())).double()(y)
