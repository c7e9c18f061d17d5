"""The bit-widths and assignments of saved weights: list them, add missing ones, calibrate those."""
import contextlib
import copy
import re
from collections import defaultdict
from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from models.assignment import NAME, Assignment, Width
from models.bit_widths import BitWidth
from models.graph import trace_layers
from models.quan_ops import (ActivationQ, QuantizedLayer, SwitchableBatchNorm2d, assigned_module,
                             assignments_of, bit_widths_of, set_bit_width, width_of)
from utils import brief

# The key of a tensor that exists once per bit-width: in a bn_dict, or in a quantizer's *_dict.
ENTRY = re.compile(
    r"(?P<prefix>.*\b(?P<dict>\w+_dict)\.)(?P<width>\d+|w\d+a\d+)(?P<suffix>\..*)?")
# Likewise, of an assignment.
NAMED_ENTRY = re.compile(rf".*\b\w+_dict\.(?P<name>{NAME.pattern})(\..*)?")


def saved_bit_widths(state_dict: dict[str, Tensor]) -> list[BitWidth]:
    """Return the bit-widths that a state dict has BatchNorms for, lowest first.

    Raises ValueError for a bit-width that does not exist.
    """
    found = filter(None, map(ENTRY.fullmatch, state_dict))
    return sorted({BitWidth.of(entry["width"]) for entry in found if entry["dict"] == "bn_dict"})


def add_missing_bit_widths(state_dict: dict[str, Tensor], model: nn.Module,
                           ) -> tuple[dict[str, Tensor], dict[BitWidth, BitWidth]]:
    """Fit a state dict to the bit-widths of a model.

    The BatchNorms of a missing bit-width are copies of the nearest one's, of two as near the higher
    one's, whose quantization step is closer; the state of a quantizer is that of the nearest bits
    of its weights or activations. Bit-widths that the model lacks are
    dropped; all other entries are unchanged.

    Returns:
        The fitted state dict, and {added bit-width: the one that it copies}.
    """
    wanted = bit_widths_of(model)
    own = model.state_dict().keys()
    trained = saved_bit_widths(state_dict)
    added = {width: min(trained, key=width.distance) for width in wanted
             if trained and width not in trained}

    result = {}
    per_width = defaultdict(lambda: defaultdict(dict))  # prefix: {bit-width: {suffix: value}}
    for key, value in state_dict.items():
        entry = ENTRY.fullmatch(key)
        if entry is None:
            result[key] = value
        else:
            entries = per_width[entry["prefix"]][BitWidth.of(entry["width"])]
            entries[entry["suffix"] or ""] = value

    layers = dict(model.named_modules())
    for prefix, widths in per_width.items():
        layer = layers.get(prefix.partition(".quantizer.")[0])
        for width in wanted:
            source = width if width not in added else nearest(widths, width, layer)
            for suffix, value in widths.get(source, {}).items():
                key = f"{prefix}{width}{suffix}"
                if width not in added or key in own:
                    result[key] = value
    return result, added


def nearest(known: Iterable[BitWidth], width: BitWidth, layer: nn.Module | None) -> BitWidth:
    """Return the known bit-width whose state a layer copies for another one.

    A weight's quantizer goes by bits of weights first, an activation's by bits of activations.
    """
    def distance(other: BitWidth) -> tuple:
        if isinstance(layer, QuantizedLayer):
            return abs(width.weights - other.weights), width.distance(other)
        if isinstance(layer, ActivationQ):
            return abs(width.activations - other.activations), width.distance(other)
        return width.distance(other)
    return min(known, key=distance)


def without_assignments(state_dict: dict[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Return a state dict without the entries of assignments of these names."""
    names = set(names)
    found = {key: NAMED_ENTRY.fullmatch(key) for key in state_dict}
    return {key: value for key, value in state_dict.items()
            if not (found[key] and found[key]["name"] in names)}


@torch.no_grad()
def add_assignment(model: nn.Module, assignment: Assignment) -> list[BitWidth]:
    """Add an assignment to a model's bit-widths, or replace the one of its name.

    What exists once per bit-width is copied for it: the state of a quantizer from the bit-width
    that its layer has, a BatchNorm from that of the activation that follows, or from the nearest to
    these that the model was built for. Returns the bit-widths whose BatchNorms are copied. Raises
    ValueError, and changes nothing, where an entry matches no layer.
    """
    _, model = assigned_module(model)
    check_layers(model, assignment)
    present = bit_widths_of(model)
    model.assignments = {**assignments_of(model), assignment.name: assignment}
    following = following_activations(model)
    copied = set()
    for name, states in model.named_modules():
        owner, _, last = name.rpartition(".")
        if not last.endswith("_dict") or not isinstance(states, nn.ModuleDict | nn.ParameterDict):
            continue
        owner = owner.partition(".quantizer")[0]
        width = assignment.of_layer(following.get(owner, owner))
        known = {width: str(width) for width in present if str(width) in states}
        if not known:
            continue
        source = nearest(known, width, model.get_submodule(owner))
        states[assignment.name] = copy.deepcopy(states[known[source]])
        if last == "bn_dict":
            copied.add(source)
    return sorted(copied)


def copies_quantizers(model: nn.Module) -> bool:
    """Return whether quantizers have state per bit-width, as BatchNorm does."""
    return any(has_state_per_width(layer.quantizer) for layer in model.modules()
               if isinstance(layer, QuantizedLayer | ActivationQ))


def has_state_per_width(module: nn.Module) -> bool:
    """Return whether a layer or quantizer has state per bit-width."""
    return any(ENTRY.fullmatch(key) for key in module.state_dict(prefix="."))


def check_layers(model: nn.Module, assignment: Assignment) -> None:
    """Raise ValueError naming an entry of an assignment that matches no layer with bits."""
    layers = assignable_layers(model)
    for pattern in assignment.layers:
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            raise ValueError(f"assignment {assignment}: {brief(pattern)} matches no layer "
                             f"with bits: choose from {', '.join(layers[:4])}, ...")


def assignable_layers(model: nn.Module) -> list[str]:
    """Return the names of the layers that an assignment may give bits: all that switch, but not
    BatchNorms."""
    return [name for name, layer in model.named_modules()
            if hasattr(layer, "switch_bit_width") and not isinstance(layer, SwitchableBatchNorm2d)]


def following_activations(model: nn.Module) -> dict[str, str]:
    """Return {name of a switchable BatchNorm: name of the ActivationQ that is called next}.

    In the order of the modules where torch.fx cannot trace the network.
    """
    modules = dict(model.named_modules())
    order = list(modules)
    with contextlib.suppress(Exception):  # of torch.fx, or of the network's own code
        order = [node.target for node in trace_layers(model).nodes if node.op == "call_module"]
    found = {}
    activation = None
    for name in reversed(order):
        layer = modules[name]
        if isinstance(layer, ActivationQ):
            activation = name
        elif isinstance(layer, SwitchableBatchNorm2d) and activation:
            found[name] = activation
    return found


class StatisticsError(ValueError):
    """Statistics that cannot be re-estimated."""


def norms_with_statistics(model: nn.Module, bit_width: Width | int | str) -> set[nn.Module]:
    """Return the layers of one bit-width whose statistics `calibrate` re-estimates.

    Raises StatisticsError naming the type of a module that may have others.
    """
    key = str(width_of(model, bit_width))
    entries = [states[key] for name, states in model.named_modules()
               if name.endswith("_dict") and isinstance(states, nn.ModuleDict) and key in states]
    kinds = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)
    found = set()
    for part in {part for entry in entries for part in entry.modules()}:
        if isinstance(part, kinds):
            found.add(part)
        elif any(buffer.is_floating_point() for buffer in part.buffers(recurse=False)):
            raise StatisticsError(f"{type(part).__name__} may have statistics, and only those of "
                                  "torch's BatchNorm and InstanceNorm can be re-estimated")
    return found


@torch.no_grad()
def calibrate(model: nn.Module, bit_width: Width | int | str,
              batches: Iterable[Tensor]) -> None:
    """Re-estimate one bit-width's BatchNorm statistics over batches of images (N, 3, H, W).

    Each statistic becomes its average over the batches, weighted by their sizes. Nothing else
    changes, not even resnet20q's shared shortcut BatchNorm. Leaves the model in evaluation mode at
    that bit-width. Raises ValueError where there are no batches, StatisticsError for other kinds.
    """
    layers = norms_with_statistics(model, bit_width)
    model.eval()
    set_bit_width(model, bit_width)
    momentum = [layer.momentum for layer in layers]
    seen = dict.fromkeys(layers, 0)  # images

    def average(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        if not seen[layer]:
            layer.reset_running_stats()
        seen[layer] += len(inputs[0])
        layer.momentum = len(inputs[0]) / seen[layer]  # cumulative; torch's own waits for the count

    hooks = [layer.train().register_forward_pre_hook(average) for layer in layers]
    count = 0
    try:
        for count, images in enumerate(batches, start=1):
            model(images)
    finally:
        for layer, hook, value in zip(layers, hooks, momentum, strict=True):
            hook.remove()
            layer.momentum = value
            layer.eval()
    if not count:
        raise ValueError("there is no batch to calibrate over; an iterator gives its batches once")
