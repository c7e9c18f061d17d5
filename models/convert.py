"""A network of float layers, made into one that runs at any precision."""
import contextlib
import copy
import functools
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from models import graph as graphs
from models.attributes import named_attributes, zero_parameters
from models.bit_widths import FULL_PRECISION, BitWidth, highest_first
from models.converted import CLASSIFIER, AnyPrecisionNetwork, describe
from models.float_layers import BatchNorm2d, Classifier
from models.quan_ops import (ActivationQ, Conv2dQ, SwitchableBatchNorm2d, WeightQuantizer,
                             set_bit_width)
from utils import keeping_random_states

REPLACED = (nn.Conv2d, nn.BatchNorm2d, nn.Linear, nn.ReLU, nn.ReLU6)
SIZES = (32, 40, 64, 28, 96, 224)  # of images, one of which a network may take
NOT_COMPARED = ("whether it computes what the float network did is not known, which takes none of "
                f"the sizes {', '.join(map(str, SIZES))} or returns no tensors of finite "
                "numbers that depend on the image")
TOLERANCE = 1e-3  # of outputs that are equal but for rounding, relative to their norm


def convert(network: nn.Module, bit_widths: Iterable[BitWidth | int | str],
            keep: Sequence[str] = ()) -> AnyPrecisionNetwork:
    """Return a copy of a float network, with its weights, that runs at any of the bit-widths.

    Conv2d becomes Conv2dQ, BatchNorm2d one per bit-width, ReLU and ReLU6 become ActivationQ. The
    convolutions whose input is the image, the layers that give the logits, and the modules named in
    `keep`, with all within them, stay in full precision; all bit-widths share the BatchNorms in
    `keep`.
    layer_table lists what became of each layer. Raises ValueError for a network that lacks layers
    to convert, or has one that cannot be converted, and where the copy, not quantized, computes
    something else.
    """
    bit_widths = highest_first(bit_widths)
    check_layers(network, keep)
    check_forward(network)
    training = {name: module.training for name, module in network.named_modules()}
    original = copy.deepcopy(network).eval()
    network = copy.deepcopy(network)

    graph = None
    note = ""
    try:
        graph = graphs.trace_float(network)
    except Exception as error:  # of torch.fx, or of the network
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        note = (f"torch.fx cannot trace the network ({reason}): converted by its modules alone, so "
                "ReLUs that are functions stay, ReLUs in place leave their input as it is, and "
                "which inputs are quantized is not known")
        warnings.warn(note, stacklevel=2)

    if graph:
        check_functions(network, graph, keep)
    why = full_precision(network, graph, keep)
    check_weights(network, why)
    replace_modules(network, bit_widths, why, activations=graph is None)
    run = call
    if graph:
        graphs.replace_activations(graph, network, why)
        run = type(fx.GraphModule(network, graph)).forward

    model = AnyPrecisionNetwork(network, run, describe(network, graph, why), note, graph)
    if not check_equal(original, copy.deepcopy(model).eval(), bit_widths[0]):
        model.note = "; ".join(filter(None, [model.note, NOT_COMPARED]))
    set_bit_width(model, bit_widths[0])
    model.train(training[""])
    for name, module in network.named_modules():
        if name in training:
            module.train(training[name])
    return model


class FloatWeight(WeightQuantizer):
    """Leaves a weight as it is."""

    def full_precision(self, w: Tensor) -> Tensor:
        return w


@torch.no_grad()
def check_equal(network: nn.Module, model: AnyPrecisionNetwork, bit_width: BitWidth) -> bool:
    """Return whether a converted network could be compared with the float one, both in evaluation.

    Both are changed. Raises ValueError where the converted one, not quantized, has other outputs.
    Networks that take none of SIZES, or return no finite tensors that depend on the image, are not
    compared; those on the meta device need not be.
    """
    if next(model.parameters()).is_meta:
        return True
    fill_zeros(network, model)
    set_bit_width(model, bit_width)
    for layer in model.modules():
        if isinstance(layer, Conv2dQ):
            layer.quantizer = FloatWeight()
        if isinstance(layer, (Conv2dQ, ActivationQ)):
            layer.quantizer.switch(FULL_PRECISION, str(bit_width))
    for draw, size in itertools.product((torch.randn, torch.rand), SIZES):
        with contextlib.suppress(Exception):  # of a network that takes another size
            expected, steps = outputs(network, size, draw)
            if any(isinstance(part, Tensor) and part.isfinite().all()
                   and not torch.equal(part[0], part[1]) for part in tree_leaves(expected)):
                break
    else:
        return False
    found, own_steps = outputs(model, size, draw)
    parts = tree_leaves(expected)
    own_parts = tree_leaves(found)
    if len(own_parts) == len(parts) and all(
            is_close(own, part) for own, part in zip(own_parts, parts)
            if isinstance(part, Tensor)):
        return True
    own_steps = {name.removeprefix("network."): step for name, step in own_steps.items()}
    differing = [name for name, step in steps.items()
                 if name in own_steps and not is_close(own_steps[name], step)]
    where = f", from layer {differing[0]} on" if differing else ""
    raise ValueError(f"the converted network computes something else{where}: its forward does what "
                     "torch.fx does not follow, such as a change in place that is read under "
                     "another name")


def fill_zeros(network: nn.Module, model: AnyPrecisionNetwork) -> None:
    """Draw, for both networks alike, the parameters that are 0, which would hide a difference."""
    drawn = torch.Generator().manual_seed(0)
    for name, parameter in zero_parameters(network):
        value = 0.1 * torch.randn(parameter.shape, generator=drawn)
        owner, _, own_name = name.rpartition(".")
        layer = model.network.get_submodule(owner)
        copies = layer.bn_dict.values() if isinstance(layer, SwitchableBatchNorm2d) else [layer]
        for own in [parameter, *(getattr(each, own_name) for each in copies)]:
            own.copy_(value)


def outputs(network: nn.Module, size: int,
            draw: Callable[..., Tensor]) -> tuple[object, dict[str, Tensor]]:
    """Return a network's output, and those of its modules, on two random images of a size.

    draw: torch.randn or torch.rand.
    """
    first = next(layer for layer in network.modules() if isinstance(layer, nn.Conv2d))
    drawn = torch.Generator().manual_seed(0)
    images = draw(2, first.in_channels, size, size, generator=drawn).to(first.weight)
    steps = {}

    def note(layer, inputs, output, name):
        if isinstance(output, Tensor):
            steps[name] = output.clone()

    hooks = [layer.register_forward_hook(functools.partial(note, name=name))
             for name, layer in network.named_modules() if name]
    try:
        with keeping_random_states():
            torch.set_rng_state(drawn.get_state())  # the same for both; manual_seed is GPUs', too
            return network(images), steps
    finally:
        for hook in hooks:
            hook.remove()


def is_close(found: object, expected: Tensor) -> bool:
    """Return whether tensors are equal but for rounding, or the expected one is not finite."""
    if not expected.isfinite().all():
        return True
    return (isinstance(found, Tensor) and found.shape == expected.shape
            and bool((found - expected).norm() <= TOLERANCE * expected.norm()))


def call(network: nn.Module, x: Tensor) -> Tensor:
    """Run a network by its own forward, where there is no traced one."""
    return network(x)


def check_layers(network: nn.Module, keep: Sequence[str]) -> None:
    """Raise ValueError where the network lacks layers to convert, or has one that cannot be."""
    modules = dict(network.named_modules())
    every = dict(network.named_modules(remove_duplicate=False))
    for name in keep:
        if name not in every:
            raise ValueError(f"keep names {name!r}, which the network does not have: choose from "
                             f"{', '.join([*filter(None, modules)][:5])}, ...")
    names_of = {}  # a module may have several names
    for name, layer in every.items():
        names_of.setdefault(layer, []).append(name)
    for layer, names in names_of.items():
        kept = [name for name in names if is_within(name, keep)]
        others = [name for name in names if name not in kept]
        if kept and others:
            raise ValueError(f"keep has {kept[0]} and not {others[0]}, which is the same module: "
                             "keep both, or give each its own")
        has_hooks = (layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks
                     or layer._backward_pre_hooks)
        if type(layer) in (nn.BatchNorm2d, nn.ReLU, nn.ReLU6) and not kept and has_hooks:
            raise ValueError(f"layer {names[0]} has hooks, and is replaced: add them to the "
                             "converted network instead")
        if type(layer) in REPLACED and not kept and "forward" in vars(layer):
            raise ValueError(f"layer {names[0]} has a forward of its own, and is replaced: give it "
                             "a class of its own, or name it in keep")
    for kind in (nn.Conv2d, nn.BatchNorm2d):
        if not any(type(layer) is kind for layer in modules.values()):
            raise ValueError(f"the network has no {kind.__name__}, and a conversion needs some: "
                             "choose one with convolutions and BatchNorm")
    for name, layer in modules.items():
        holds = any(True for _ in layer.parameters(recurse=False)) and not any(layer.children())
        holds = holds or getattr(layer, "running_mean", None) is not None  # of each bit-width
        is_known = isinstance(layer, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))
        if is_within(name, keep) or not (holds or is_known):
            continue
        if type(layer) not in (nn.Conv2d, nn.BatchNorm2d, nn.Linear):
            raise ValueError(f"layer {name} is a {type(layer).__name__}, which has no form for "
                             "every bit-width: name it in keep, to leave it as it is")
        if type(layer) is nn.BatchNorm2d and not (layer.affine and layer.track_running_stats):
            raise ValueError(f"layer {name} is a BatchNorm2d without weights or statistics: build "
                             "it with affine=True and track_running_stats=True, or name it in keep")


def check_forward(network: nn.Module) -> None:
    """Raise ValueError for a network of several inputs, or one that a copy would not equal."""
    inputs = [name for name, parameter in inspect.signature(network.forward).parameters.items()
              if parameter.default is parameter.empty and parameter.kind not in (
                  parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)]
    if len(inputs) > 1:
        raise ValueError(f"the network's forward takes {', '.join(inputs)}, and a converted one "
                         "takes images alone: give the others a default, or keep them elsewhere")
    for name, parameter in network.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            raise ValueError(f"{name} has a hook on its gradient, which the converted network would"
                             " not have: add it there instead")
    for name, value in named_attributes(network):
        if isinstance(value, Tensor) and value.grad_fn is not None:
            raise ValueError(f"{name} is a tensor that was computed, of which there is no copy: "
                             "make pruning or weight_norm permanent, or delete it")


def check_functions(network: nn.Module, graph: fx.Graph, keep: Sequence[str]) -> None:
    """Raise ValueError for functions of a traced network that no bit-width has a form of."""
    called = {path for node in graph.nodes for path in graphs.callers(node)}
    modules = dict(network.named_modules())
    for name in keep:
        module = network.get_submodule(name)
        is_list = isinstance(module, nn.Sequential) or type(module).forward is nn.Module.forward
        if not is_list and any(module.children()) and name not in called:
            raise ValueError(f"keep names {name!r}, and the network calls something else of it than"
                             " its forward, whose functions are not known to be of it: name the "
                             "layers in it, or call it")
    for node in graph.nodes:
        is_norm = graphs.name_of(node, modules) in ("batch_norm", "instance_norm")
        statistics = [*node.args[1:3], node.kwargs.get("running_mean")]
        is_kept = any(is_within(path, keep) for path in graphs.callers(node))
        if is_norm and any(statistics) and not is_kept:
            raise ValueError(f"the function {node.name} has running statistics, which all bit-"
                             "widths would share: make it an nn.BatchNorm2d, or name the module "
                             "that calls it in keep")


def is_within(name: str, keep: Sequence[str]) -> bool:
    """Return whether a module is one of `keep`, or within one."""
    return any(name == kept or name.startswith(f"{kept}.") for kept in keep)


def full_precision(network: nn.Module, graph: fx.Graph | None,
                   keep: Sequence[str]) -> dict[str, str]:
    """Return {name: reason} of the modules that stay in full precision.

    Raises ValueError where no convolution is left to quantize.
    """
    modules = dict(network.named_modules())
    order = [node.target for node in graph.nodes if node.op == "call_module"] if graph else modules
    convolutions = [name for name in order if isinstance(modules[name], nn.Conv2d)]
    linear = [name for name in order if isinstance(modules[name], nn.Linear)]
    first = graphs.image_layers(graph, modules) if graph else convolutions[:1]
    why = {name: "in keep" for name in modules if is_within(name, keep)}
    why.update(dict.fromkeys(first, "sees the image"))
    last = graphs.output_layers(graph, modules) if graph else []
    for name in last or (linear or convolutions)[-1:]:
        why.setdefault(name, CLASSIFIER)
    if all(name in why for name in convolutions):
        raise ValueError("no convolution is left to quantize: all see the image or are in keep")
    return why


def check_weights(network: nn.Module, why: dict[str, str]) -> None:
    """Raise ValueError naming a convolution to quantize whose weights are all 0."""
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d) and name not in why and not layer.weight.is_meta and (
                not layer.weight.any()):
            raise ValueError(f"layer {name} has no weight but 0, and quantizing divides by the "
                             "largest: give it other weights, or name it in keep")


def replace_modules(network: nn.Module, bit_widths: tuple[BitWidth, ...], why: dict[str, str],
                    activations: bool) -> None:
    """Replace the modules that `why` has no reason to keep, and with `activations` ReLUs."""
    done = {}  # by identity: a module may have several names
    for name, layer in list(network.named_modules(remove_duplicate=False)):
        if id(layer) not in done:
            done[id(layer)] = replacement(layer, bit_widths, why.get(name), activations)
        if done[id(layer)] is not layer:
            network.set_submodule(name, done[id(layer)])


def replacement(layer: nn.Module, bit_widths: tuple[BitWidth, ...], why: str | None,
                activations: bool) -> nn.Module:
    """Return what a module becomes; `why` is its reason to stay in full precision, if any."""
    kind = type(layer)
    if kind is nn.Linear and why == CLASSIFIER:
        layer.__class__ = Classifier  # the same state, another forward
    elif kind is nn.BatchNorm2d and why and layer.affine:
        layer.__class__ = BatchNorm2d
    elif kind is nn.Conv2d and not why:
        layer.__class__ = Conv2dQ
        layer.add_quantizer()
    elif kind is nn.BatchNorm2d and not why:
        switchable = SwitchableBatchNorm2d(layer.num_features, bit_widths).to(layer.weight)
        for own in switchable.bn_dict.values():
            own.eps = layer.eps
            own.momentum = layer.momentum
            own.load_state_dict(layer.state_dict())
            own.weight.requires_grad_(layer.weight.requires_grad)
            own.bias.requires_grad_(layer.bias.requires_grad)
        return switchable
    elif activations and not why and kind in (nn.ReLU, nn.ReLU6):
        return ActivationQ(limit=6.0 if kind is nn.ReLU6 else None)
    return layer
