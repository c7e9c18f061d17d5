"""What a network costs at a bit-width: bit-operations for an image, and bytes of weights.

The bit-operations of a layer are its multiply-accumulates times the bits of its weight times the
bits of its input. Layers without a quantized weight, such as stem and classifier, count as 32 x 32,
an input that no ActivationQ rounds as 32, and one of several activations as the most of their bits.
The bytes of a layer are its weights at their bits, its scales and its bias in float32. BatchNorms,
additions and pools are not counted.
"""
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.assignment import Assignment
from models.attributes import keeping_attributes
from models.bit_widths import FULL_PRECISION, BitWidth
from models.graph import FUNCTIONS, input_activations, name_of, trace_layers
from models.quan_ops import QuantizedLayer, bit_widths_of, set_bit_width
from utils import markdown_table, one_line

FLOAT_BYTES = 4
# Products of activations with each other, such as attention's, and layers of other dimensions.
PRODUCTS = {"matmul", "mm", "bmm", "addmm", "baddbmm", "einsum", "scaled_dot_product_attention",
            "conv1d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
KINDS = (QuantizedLayer, nn.modules.conv._ConvNd, nn.Linear)  # of layers that are counted


class LayerCost(NamedTuple):
    """The cost of a layer at a bit-width. macs: multiply-accumulates for one image."""
    name: str
    is_quantized: bool
    macs: int
    weight_bits: int
    input_bits: int
    weight_bytes: int

    @property
    def bit_operations(self) -> int:
        """Multiply-accumulates times weight bits times input bits."""
        return self.macs * self.weight_bits * self.input_bits


class Costs:
    """The costs of a network's convolutions and linear layers, measured on one image.

    image_size: pixels. inputs: {name of a quantized layer: names of the ActivationQs that it reads,
    none where it reads other values too}. Raises ValueError where the network cannot be traced,
    calls such a layer as a function, multiplies activations with each other, calls other layers at
    some bit-width, or has weights of other layers, whose cost is not known.
    """

    def __init__(self, model: nn.Module, image_size: int):
        self.model = model
        names = {layer: name for name, layer in model.named_modules()}
        try:
            graph = trace_layers(model)
        except Exception as error:  # of torch.fx, or of the network's own code
            raise ValueError("what it costs is not known, as torch.fx cannot trace the network "
                             f"({one_line(error)})") from None
        modules = dict(model.named_modules())
        for node in graph.nodes:
            if node.op != "call_module" and name_of(node, modules) in {*FUNCTIONS, *PRODUCTS}:
                raise ValueError(f"what it costs is not known: {node.name} is a function, not a "
                                 "layer")
        self.inputs = {names[layer]: sorted(names[activation] for activation in activations)
                       for layer, activations in input_activations(model, graph).items()}
        self.macs = measure(model, image_size)
        with keeping_attributes(model):  # its bit-width
            for width in bit_widths_of(model):
                set_bit_width(model, width)
                found = measure(model, image_size)
                if found != self.macs:
                    name = next(name for name in {**self.macs, **found}
                                if self.macs.get(name) != found.get(name))
                    raise ValueError(f"what it costs is not known: {name} does not do the same "
                                     "work at each bit-width")
        counted = tuple(f"{name}." for name, layer in modules.items() if isinstance(layer, KINDS))
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and not name.startswith(counted):
                raise ValueError(f"what it costs is not known: {name} is not the weight of a "
                                 "convolution or a linear layer")
        self.scales = {}

    def of(self, bit_width: BitWidth | Assignment | int | str) -> list[LayerCost]:
        """Return the cost of each layer at a bit-width, which the network is set to."""
        set_bit_width(self.model, bit_width)
        return [self.of_layer(name, macs) for name, macs in self.macs.items()]

    def of_layer(self, name: str, macs: int) -> LayerCost:
        """Return the cost of a layer at the current bit-width."""
        layer = self.model.get_submodule(name)
        is_quantized = isinstance(layer, QuantizedLayer)
        bits = layer.bits if is_quantized else FULL_PRECISION
        input_bits = max((self.model.get_submodule(activation).bits
                          for activation in self.inputs.get(name, ())), default=FULL_PRECISION)
        floats = 0 if layer.bias is None else layer.bias.numel()
        if bits != FULL_PRECISION:
            if (name, bits) not in self.scales:
                with torch.no_grad():
                    self.scales[name, bits] = layer.integer_weight()[1].numel()
            floats += self.scales[name, bits]
        weight_bytes = -(-bits * layer.weight.numel() // 8) + FLOAT_BYTES * floats
        return LayerCost(name, is_quantized, macs, bits, input_bits, weight_bytes)


def measure(model: nn.Module, image_size: int) -> dict[str, int]:
    """Return {name: multiply-accumulates for one image} of the layers, in the order of their calls.
    """
    macs = Counter()

    def count(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        per_weight = inputs[0] if getattr(layer, "transposed", False) else output
        macs[names[layer]] += per_weight.numel() * layer.weight[0].numel()

    names = {layer: name for name, layer in model.named_modules() if isinstance(layer, KINDS)}
    hooks = [layer.register_forward_hook(count) for layer in names]
    device = next(model.parameters()).device
    try:
        with torch.no_grad(), keeping_attributes(model):  # such as which modules are training
            model.eval()(torch.zeros(1, 3, image_size, image_size, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return dict(macs)


def totals(layers: Iterable[LayerCost]) -> dict[str, int]:
    """Return the sums over the quantized layers, and over the others, as evaluation.json has them.
    """
    found = dict.fromkeys(("bit_operations", "weight_bytes", "float_bit_operations",
                           "float_weight_bytes"), 0)
    for layer in layers:
        prefix = "" if layer.is_quantized else "float_"
        found[f"{prefix}bit_operations"] += layer.bit_operations
        found[f"{prefix}weight_bytes"] += layer.weight_bytes
    return found


def cost_table(layers: Iterable[LayerCost]) -> str:
    """Return a Markdown table of a network's layers at a bit-width, with their sums."""
    layers = list(layers)
    head = ("layer", "weight bits", "input bits", "multiply-accumulates", "bit-operations",
            "weight bytes")
    rows = [(layer.name, layer.weight_bits, layer.input_bits, f"{layer.macs:,}",
             f"{layer.bit_operations:,}", f"{layer.weight_bytes:,}") for layer in layers]
    for title, is_quantized in (("quantized layers", True), ("float layers", False)):
        part = [layer for layer in layers if layer.is_quantized == is_quantized]
        rows.append((title, "", "", *(f"{sum(values):,}" for values in (
            [layer.macs for layer in part], [layer.bit_operations for layer in part],
            [layer.weight_bytes for layer in part]))))
    return markdown_table(head, rows, align_right=True)
