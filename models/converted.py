"""A converted network: how it runs, what became of its layers, and weights of the float one."""
import re
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, fx, nn

from models import graph as graphs
from models.quan_ops import Conv2dQ

CLASSIFIER = "gives the logits"
NOT_CONVERTED = "only Conv2d modules are converted"


class Layer(NamedTuple):
    """What became of a convolution or linear layer; `why` tells why not all of it is quantized."""
    name: str
    kind: str
    weights: str
    input: str
    why: str


class AnyPrecisionNetwork(nn.Module):
    """A converted network: its layers stand in `network`, by the names that they had.

    run: its forward pass, a function of (network, x). layers: a Layer each. note: what could not be
    seen, or "".
    """

    def __init__(self, network: nn.Module, run: Callable[[nn.Module, Tensor], Tensor],
                 layers: list[Layer], note: str):
        super().__init__()
        self.network = network
        self.run = run
        self.layers = layers
        self.note = note

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, classes)
        return self.run(self.network, x)


def describe(network: nn.Module, graph: fx.Graph | None, why: dict[str, str]) -> list[Layer]:
    """Return a Layer for each convolution and linear layer, in the order in which they run."""
    modules = dict(network.named_modules())
    makers = graphs.input_makers(graph, modules) if graph else dict.fromkeys(modules, "?")
    rows = []
    for name in makers:
        layer = modules.get(name)
        if not isinstance(layer, (nn.Conv2d, nn.Linear)) and name in modules:
            continue
        kind = "Linear" if isinstance(layer, nn.Linear) else "function"
        if isinstance(layer, nn.Conv2d):
            kind = "Conv2d {}x{}".format(*layer.kernel_size)
            kind += f", {layer.groups} groups" if layer.groups > 1 else ""
        if isinstance(layer, Conv2dQ):
            input_and_why = {"": ("quantized", ""), "?": ("unknown", "not traced")}.get(
                makers[name], ("not", f"input from {makers[name]}"))
            rows.append(Layer(name, kind, "quantized", *input_and_why))
        else:
            rows.append(Layer(name, kind, "not", "not", why.get(name, NOT_CONVERTED)))
    return rows


def layer_table(model: AnyPrecisionNetwork) -> str:
    """Return a Markdown table of a converted model's layers, a summary, what was not seen."""
    rows = [("layer", "kind", "weights", "input", "why not"), *model.layers]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    weights, inputs = (sum(layer[place] == "quantized" for layer in model.layers)
                       for place in (2, 3))
    lines += ["", f"{len(model.layers)} layers: the weights of {weights} are quantized, the inputs "
              f"of {inputs}"]
    return "\n".join([*lines, *([model.note] if model.note else [])])


def fit_float_weights(model: AnyPrecisionNetwork,
                      state_dict: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return a converted model's state dict from its float network's, and the entries left new.

    Every bit-width's BatchNorm gets the one there is; quantizers keep their own parameters. Left
    new is a classifier of another size.
    What else does not fit stays as it is, to be found by who loads it.
    """
    own = model.state_dict()
    source = {key: re.sub(r"\bbn_dict\.\w+\.", "", key.removeprefix("network.")) for key in own}
    fitted = {f"network.{key}": value for key, value in state_dict.items()
              if key not in source.values()}
    fitted.update((key, state_dict[name]) for key, name in source.items() if name in state_dict)
    fitted.update((key, own[key]) for key in own.keys() - fitted.keys()
                  if key.endswith(".num_batches_tracked")  # which torch once did not save
                  or ".quantizer." in key)
    classifier = [f"network.{layer.name}." for layer in model.layers if layer.why == CLASSIFIER]
    left = [key for key in own if key.startswith(tuple(classifier)) and key in fitted
            and getattr(fitted[key], "shape", None) != own[key].shape]
    fitted.update((key, own[key]) for key in left)
    return fitted, [source[key] for key in left]
