"""A converted network: forward pass, table of its layers, and weights of its float network."""
import re
from collections.abc import Callable, Container, Iterator
from typing import NamedTuple

from torch import Tensor, fx, nn

from models import graph as graphs
from models.quan_ops import Conv2dQ
from utils import markdown_table

CLASSIFIER = "gives the logits"
NOT_CONVERTED = "only Conv2d modules are converted"


class Layer(NamedTuple):
    """What became of a convolution or linear layer; why: the reason for what is not quantized."""
    name: str
    kind: str
    weights: str
    input: str
    why: str


class AnyPrecisionNetwork(nn.Module):
    """A converted network, whose layers are in `network` under the names that they had.

    run: the forward pass, a function of (network, x). layers: a Layer for each convolution and
    linear layer. note: what could not be traced, or "". graph: what `run` was made of, which calls
    layers by their names and no container of layers; None where `run` calls the network. Of the
    graph it keeps `called`, these names, and `containers`, what check_modules compares.
    """

    def __init__(self, network: nn.Module, run: Callable[[nn.Module, Tensor], Tensor],
                 layers: list[Layer], note: str, graph: fx.Graph | None = None):
        super().__init__()
        self.called = None
        if graph:
            self.called = {node.target for node in graph.nodes if node.op == "call_module"}
            self.containers = dict(containers_of(network, self.called))
        self.network = network
        self.run = run
        self.layers = layers
        self.note = note

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, classes)
        return self.run(self.network, x)

    def check_modules(self) -> None:
        """Raise ValueError naming a container whose modules changed, which `run` would not call."""
        if self.called is None:
            return
        found = dict(containers_of(self.network, self.called))
        for name in {**self.containers, **found}:
            if found.get(name) != self.containers.get(name):
                raise ValueError(
                    f"{name or 'the network'} has other modules than when it was converted, and "
                    "the traced forward does not call them: change the float network, and convert "
                    "that again")


def containers_of(module: nn.Module, called: Container[str],
                  name: str = "") -> Iterator[tuple[str, tuple]]:
    """Yield (name, (type, names of its modules)) of each module that runs by its modules alone."""
    if name in called or isinstance(module, graphs.LAYERS):
        return
    yield name, (type(module), *module._modules)
    for child_name, child in module.named_children():
        yield from containers_of(child, called, f"{name}.{child_name}".strip("."))


def describe(network: nn.Module, graph: fx.Graph | None, why: dict[str, str]) -> list[Layer]:
    """Return a Layer for each convolution and linear layer, in the order in which they run."""
    modules = dict(network.named_modules())
    sources = graphs.input_sources(graph, modules) if graph else dict.fromkeys(modules, "?")
    rows = []
    for name in sources:
        layer = modules.get(name)
        if not isinstance(layer, (nn.Conv2d, nn.Linear)) and name in modules:
            continue
        kind = "Linear" if isinstance(layer, nn.Linear) else "function"
        if isinstance(layer, nn.Conv2d):
            kind = "Conv2d {}x{}".format(*layer.kernel_size)
            kind += f", {layer.groups} groups" if layer.groups > 1 else ""
        if isinstance(layer, Conv2dQ):
            known = {"": ("quantized", ""), "?": ("unknown", "not traced")}
            input_and_why = known.get(sources[name], ("not", f"input from {sources[name]}"))
            rows.append(Layer(name, kind, "quantized", *input_and_why))
        else:
            rows.append(Layer(name, kind, "not", "not", why.get(name, NOT_CONVERTED)))
    return rows


def layer_table(model: AnyPrecisionNetwork) -> str:
    """Return a Markdown table of a converted model's layers, with a summary and its note."""
    lines = [markdown_table(("layer", "kind", "weights", "input", "why not"), model.layers)]
    weights = sum(layer.weights == "quantized" for layer in model.layers)
    inputs = sum(layer.input == "quantized" for layer in model.layers)
    lines += ["", f"{len(model.layers)} layers: the weights of {weights} are quantized, the inputs "
              f"of {inputs}"]
    if model.note:
        lines.append(model.note)
    return "\n".join(lines)


def fit_float_weights(model: AnyPrecisionNetwork,
                      state_dict: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Fit a float network's state dict to its converted model.

    Every bit-width's BatchNorm is a copy of the float one. A classifier of another size has the
    model's own values. The parameters of quantizers are not in it. Other entries that do not fit
    are unchanged, so that loading reports them.

    Returns:
        The fitted state dict, and the names of a classifier's entries that have another size.
    """
    own = model.state_dict()
    source = {key: re.sub(r"\bbn_dict\.\w+\.", "", key.removeprefix("network.")) for key in own}
    fitted = {f"network.{key}": value for key, value in state_dict.items()
              if key not in source.values()}
    fitted.update((key, state_dict[name]) for key, name in source.items() if name in state_dict)
    fitted.update((key, own[key]) for key in own.keys() - fitted.keys()
                  if key.endswith(".num_batches_tracked"))  # which torch once did not save
    classifier = [f"network.{layer.name}." for layer in model.layers if layer.why == CLASSIFIER]
    resized = [key for key in own if key.startswith(tuple(classifier)) and key in fitted
               and fitted[key].shape != own[key].shape]
    fitted.update((key, own[key]) for key in resized)
    return fitted, [source[key] for key in resized]
