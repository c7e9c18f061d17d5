"""What torch.fx shows of a network: its activations, and where the input of each layer comes from.

The nodes of a graph are the calls of a forward pass, in order: of modules, functions and methods.
"""
import contextlib
import copy
from collections.abc import Iterator

import torch
from torch import fx, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from models.attributes import keeping_attributes, named_attributes, random_texts
from models.float_layers import BatchNorm2d, Classifier
from models.quan_ops import ActivationQ, QuantizedLayer, SwitchableBatchNorm2d

RELU = {nn.ReLU: nn.ReLU, functional.relu: nn.ReLU, "relu": nn.ReLU, "relu_": nn.ReLU,
        nn.ReLU6: nn.ReLU6, functional.relu6: nn.ReLU6}  # and torch.relu and torch.relu_, by name
# Modules, functions and methods whose output holds no other values than their (first) input.
REARRANGING = {"MaxPool2d", "AdaptiveMaxPool2d", "Dropout", "Dropout2d", "Identity", "Flatten",
               "ChannelShuffle", "max_pool2d", "dropout", "cat", "concat", "chunk", "split",
               "getitem", "flatten", "view", "reshape", "transpose", "permute", "contiguous",
               "squeeze"}
ALIASING = {"Identity", "Flatten", "chunk", "split", "getitem", "flatten", "view", "reshape",
            "transpose", "permute", "contiguous", "squeeze", "unsqueeze", "iadd", "isub", "imul",
            "itruediv", "add_", "sub_", "mul_", "div_"}  # the same memory
JOINING = {"cat", "concat"}  # those of them whose inputs are all taken
ADDITIONS = {"add", "iadd", "add_"}
FUNCTIONS = {"conv2d", "linear"}  # layers that are not modules
SHAPE_QUERIES = {"size", "dim", "shape", "ndim", "dtype", "device"}  # of attributes, their names
SOURCES = {"add": "an addition", "iadd": "an addition", "AvgPool2d": "an average pool",
           "AdaptiveAvgPool2d": "an average pool", "avg_pool2d": "an average pool",
           "adaptive_avg_pool2d": "an average pool", "mean": "an average pool",
           "mul": "a product", "imul": "a product", "Conv2dQ": "a convolution",
           "SwitchableBatchNorm2d": "a BatchNorm without activation"}

LAYERS = (QuantizedLayer, ActivationQ, SwitchableBatchNorm2d, BatchNorm2d, Classifier)


class Tracer(fx.Tracer):
    """Traces a network down to torch's layers and ours."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, LAYERS) or super().is_leaf_module(module, name)


def trace_layers(model: nn.Module) -> fx.Graph:
    """Trace a network by Tracer. Its attributes stay, also where its forward sets them."""
    with keeping_attributes(model):
        return Tracer().trace(model)


def input_activations(model: nn.Module,
                      graph: fx.Graph) -> dict[QuantizedLayer, set[ActivationQ]]:
    """Return {layer: the rounding ActivationQs of whose values its input consists}.

    They are none where it holds other values too. graph: of the model, by Tracer.
    """
    modules = dict(model.named_modules())
    sources = sources_of(graph, modules)
    found = {}
    for node in graph.nodes:
        layer = module_of(node, modules)
        if isinstance(layer, QuantizedLayer):
            found.setdefault(layer, []).append(sources[node.all_input_nodes[0]])
    return {layer: set() if any(isinstance(source, str) for source in calls)
            else set().union(*calls) for layer, calls in found.items()}


def sources_of(graph: fx.Graph,
               modules: dict[str, nn.Module]) -> dict[fx.Node, set[ActivationQ] | str]:
    """Return {node: the rounding ActivationQs of whose values its output consists}.

    Where it holds other values too, a text says where these come from.
    """
    sources = {}
    for node in graph.nodes:
        name = name_of(node, modules)
        module = module_of(node, modules)
        if isinstance(module, ActivationQ):
            sources[node] = {module} if module.rounding else "an activation without rounding"
        elif name in REARRANGING and node.all_input_nodes:
            parts = node.all_input_nodes[:1]
            if name in JOINING:
                parts = []
                fx.node.map_arg(node.args[0] if node.args else node.kwargs, parts.append)
            others = [sources[part] for part in parts if isinstance(sources[part], str)]
            sources[node] = others[0] if others else set().union(*map(sources.get, parts))
        else:
            sources[node] = SOURCES.get(name, name)
    return sources


class ModeTracer(fx.Tracer):
    """Traces a network; ValueError where a part sets a mode of torch's, which no graph holds."""

    def trace(self, *args: object, **kwargs: object) -> fx.Graph:
        self.modes = modes()
        return super().trace(*args, **kwargs)

    def create_node(self, *args: object, **kwargs: object) -> fx.Node:
        if modes() != self.modes:
            raise ValueError("a part of its forward sets no_grad or autocast")
        return super().create_node(*args, **kwargs)


def modes() -> tuple[bool, ...]:
    """Return torch's modes that a context may set."""
    return (torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"))


class IsTraining(nn.Module):
    """Returns whether it is in training mode, which a traced graph would hold as a constant."""

    def forward(self) -> bool:
        return self.training


def trace_float(network: nn.Module) -> fx.Graph:
    """Trace a network into one graph for training and evaluation.

    Where the graph needs the mode it calls an IsTraining, which is added to the network. Raises
    whatever torch.fx raises where it cannot trace, and ValueError for several inputs, for a forward
    that draws numbers, keeps tensors or sets a mode of torch's, or where training and evaluation
    call different things.
    """
    # Copies, as tracing gives the network an attribute for each constant of its forward.
    twin_network = copy.deepcopy(network).train(False)
    other = ModeTracer().trace(twin_network)
    tried = copy.deepcopy(network).train(True)
    before = random_texts(tried)
    with other_modes():  # so that a context that sets one shows
        ModeTracer().trace(tried)
    if random_texts(tried) != before:  # such as stochastic depth, whose graph is another each time
        raise ValueError("its forward draws numbers in Python")
    for name, value in named_attributes(tried):
        if any(isinstance(part, fx.Proxy) for part in tree_leaves(value)):
            raise ValueError(f"its forward keeps a tensor in the attribute {name}")
    with keeping_attributes(network):
        graph = ModeTracer().trace(network.train(True))
        attributes = dict(vars(network))
    network.train(False)
    constants, own = ({name: value for name, value in values.items()
                       if name.startswith("_tensor_constant")}
                      for values in (attributes, vars(twin_network)))
    for name, value in constants.items():
        network.register_buffer(name, value, persistent=False)  # moves to devices
    pairs = list(zip(graph.nodes, other.nodes))
    same_length = len(graph.nodes) == len(other.nodes)

    network.training_flag = IsTraining()
    with graph.inserting_before(next(iter(graph.nodes))):
        flag = graph.call_module("training_flag")
    for node, twin in pairs:
        for place, (value, other_value) in enumerate(zip(node.args, twin.args)):
            if value is True and other_value is False:
                node.update_arg(place, flag)
                twin.update_arg(place, flag)
        for name, value in node.kwargs.items():
            if value is True and twin.kwargs.get(name) is False:
                node.update_kwarg(name, flag)
                twin.update_kwarg(name, flag)
    if not flag.users:
        graph.erase_node(flag)
        del network.training_flag

    same_constants = constants.keys() == own.keys() and all(
        torch.equal(value, own[name]) for name, value in constants.items())
    if not same_length or not same_constants or any(
            str((node.target, node.args, node.kwargs)) != str((twin.target, twin.args, twin.kwargs))
            for node, twin in pairs):
        raise ValueError("training takes another way than evaluation")
    if sum(node.op == "placeholder" for node in graph.nodes) > 1:
        raise ValueError("it takes more than images")
    return graph


@contextlib.contextmanager
def other_modes() -> Iterator[None]:
    """Invert grad mode and autocast."""
    devices = {name: torch.is_autocast_enabled(name) for name in ("cpu", "cuda")}
    try:
        for name, enabled in devices.items():
            torch.set_autocast_enabled(name, not enabled)
        with torch.set_grad_enabled(not torch.is_grad_enabled()):
            yield
    finally:
        for name, enabled in devices.items():
            torch.set_autocast_enabled(name, enabled)


def callers(node: fx.Node) -> list[str]:
    """Return the names of the modules within whose forward a node is, the innermost last."""
    return [path for path, _ in node.meta.get("nn_module_stack", {}).values()]


def module_of(node: fx.Node, modules: dict[str, nn.Module]) -> nn.Module | None:
    """Return the module that a node calls, or None where it calls none."""
    return modules[node.target] if node.op == "call_module" else None


def name_of(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    """Return the name of a node's function, method or attribute, or of its module's class."""
    module = module_of(node, modules)
    if node.target is getattr:
        return str(node.args[1])
    return type(module).__name__ if module else getattr(node.target, "__name__", str(node.target))


def relu_of(node: fx.Node, modules: dict[str, nn.Module]) -> type[nn.Module] | None:
    """Return nn.ReLU or nn.ReLU6 where a node calls it, in any form; else None."""
    if node.op == "call_module":
        return RELU.get(type(module_of(node, modules)))
    return RELU.get(node.target) or RELU.get(name_of(node, modules))


def replace_activations(graph: fx.Graph, network: nn.Module, kept: dict[str, str]) -> None:
    """Replace each call of ReLU or ReLU6, module or function, by an ActivationQ of its own.

    Modules in `kept` stay. Later readers of the input of an in-place one read its output.
    """
    modules = dict(network.named_modules())
    taken = {name for name, layer in modules.items() if name in kept or type(layer) not in RELU}
    for node in list(graph.nodes):
        kind = relu_of(node, modules)
        is_module = node.op == "call_module"
        if kind is None or is_module and node.target in kept:
            continue

        owner = callers(node)[-1:]
        if not is_module and owner and owner[0] in kept:
            continue
        base = node.target if is_module else ".".join([*owner, "relu"])
        name = base
        count = 0
        while name in taken or (not is_module and has_attribute(network, name)):
            count += 1
            name = f"{base}_{count}"
        taken.add(name)

        network.set_submodule(name, ActivationQ(limit=6.0 if kind is nn.ReLU6 else None))
        source = node.all_input_nodes[0]
        with graph.inserting_after(node):
            activation = graph.call_module(name, (source,))
        node.replace_all_uses_with(activation)

        layer = module_of(node, modules)
        in_place = node.kwargs.get("inplace") or name_of(node, modules).endswith("_")
        if in_place or (layer and layer.inplace):
            order = list(graph.nodes)
            later = set(order[order.index(activation) + 1:])
            source.replace_all_uses_with(activation, delete_user_cb=later.__contains__)
            for other in aliases(source, dict(network.named_modules())):
                if later.intersection(other.users):
                    raise ValueError(f"{base} changes {source.name} in place, which is read later "
                                     f"as {other.name}: give it inplace=False")
        graph.erase_node(node)

    modules = dict(network.named_modules())
    for node in graph.nodes:
        layer = module_of(node, modules)
        if isinstance(layer, ActivationQ):
            layer.rounding = needs_rounding(node, modules)


def aliases(node: fx.Node, modules: dict[str, nn.Module]) -> set[fx.Node]:
    """Return the other nodes that may hold the same memory as a node's output."""
    found = {node}
    waiting = [node]
    while waiting:
        one = waiting.pop()
        near = [user for user in one.users if name_of(user, modules) in ALIASING]
        if name_of(one, modules) in ALIASING:
            near.append(one.all_input_nodes[0])
        waiting += [other for other in near if other not in found]
        found.update(near)
    return found - {node}


def has_attribute(network: nn.Module, name: str) -> bool:
    """Return whether a module has an attribute of a name with dots, such as a function `relu`."""
    owner, _, last = name.rpartition(".")
    return hasattr(network.get_submodule(owner), last)


def needs_rounding(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Return whether a node's output is the input of anything but full-precision layers."""
    for user in node.users:
        layer = module_of(user, modules)
        name = name_of(user, modules)
        if name in SHAPE_QUERIES or type(layer) is nn.Conv2d or isinstance(layer, nn.Linear):
            continue
        if name not in REARRANGING or needs_rounding(user, modules):
            return True
    return False


def input_sources(graph: fx.Graph, modules: dict[str, nn.Module]) -> dict[str, str]:
    """Return {name of a layer: where its input comes from, or "" where that is quantized}.

    Layers that are functions have the names of their nodes.
    """
    source_of = sources_of(graph, modules)
    sources = {}
    for node in graph.nodes:
        module = module_of(node, modules)
        if isinstance(module, (nn.Conv2d, nn.Linear)) or (
                not module and name_of(node, modules) in FUNCTIONS):
            source = source_of[node.all_input_nodes[0]]
            key = node.target if module else node.name
            origin = source if isinstance(source, str) else ""
            sources[key] = sources.get(key) or origin  # of several calls, one not quantized
    return sources


def image_layers(graph: fx.Graph, modules: dict[str, nn.Module]) -> list[str]:
    """Return the names of the convolutions whose input is the image: no layer precedes them."""
    downstream = set()  # of a convolution or linear layer
    found = []
    for node in graph.nodes:
        layer = module_of(node, modules)
        is_downstream = any(source in downstream for source in node.all_input_nodes)
        if isinstance(layer, nn.Conv2d) and not is_downstream:
            found.append(node.target)
        if is_downstream or isinstance(layer, (nn.Conv2d, nn.Linear)):
            downstream.add(node)
    return found


def output_layers(graph: fx.Graph, modules: dict[str, nn.Module]) -> list[str]:
    """Return the names of the layers that give the logits: no layer or BatchNorm follows.

    Of an addition the operand that is computed last is followed.
    """
    waiting = [node for node in graph.nodes if node.op == "output"]
    seen = set(waiting)
    found = []
    order = {node: place for place, node in enumerate(graph.nodes)}
    while waiting:
        user = waiting.pop()
        inputs = user.all_input_nodes
        if name_of(user, modules) in ADDITIONS:  # of a residual branch, and what it is added to
            inputs = sorted(inputs, key=order.get)[-1:]
        for node in inputs:
            layer = module_of(node, modules)
            if name_of(node, modules) in SHAPE_QUERIES:
                continue
            if isinstance(layer, (nn.Conv2d, nn.Linear)):
                found.append(node.target)
            elif node not in seen and not isinstance(layer, nn.modules.batchnorm._BatchNorm):
                seen.add(node)
                waiting.append(node)
    return list(dict.fromkeys(found))
