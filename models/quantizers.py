"""The quantizers by name: --quantizer NAME."""
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from models.bit_widths import BitWidth, highest_first
from models.lsq import lsq
from models.quan_ops import DoReFaActivation, DoReFaWeight  # noqa: F401  to build others on
from models.quan_ops import ActivationQ, QuantizedLayer, Quantizer, set_bit_width
from utils import brief, keeping_random_states


# Called with a layer, a QuantizedLayer or an ActivationQ, and the network's bit-widths.
QUANTIZERS: dict[str, Callable[[nn.Module, Iterable[BitWidth]], Quantizer] | None] = {
    "dorefa": None,  # what layers hold when they are built: see models/quan_ops.py
    "lsq": lsq,
}


def layers_with_quantizer(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers that hold a quantizer, of their weight or of activations, by name."""
    return {name: layer for name, layer in model.named_modules()
            if isinstance(layer, QuantizedLayer | ActivationQ)}


def own_bits_of(model: nn.Module) -> dict[str, int]:
    """Return {layer: bits} of the layers that have bits of their own at every bit-width."""
    return {name: layer.own_bits for name, layer in layers_with_quantizer(model).items()
            if layer.own_bits}


def set_own_bits(model: nn.Module, own_bits: dict[str, int]) -> None:
    """Give the layers that are named bits of their own, and take them from the others.

    Raises ValueError where one is not a layer with a quantizer.
    """
    layers = layers_with_quantizer(model)
    absent = [name for name in own_bits if name not in layers]
    if absent:
        raise ValueError(f"it has bits of {brief(absent[0])}, which is not a quantized layer")
    for name, layer in layers.items():
        layer.own_bits = own_bits.get(name)


def check_own_bits(model: nn.Module, saved: dict[str, int]) -> None:
    """Raise ValueError naming a layer that has other bits of its own than a run to resume."""
    own = own_bits_of(model)
    for name in {**saved, **own}:
        there, here = (f"{bits} bits" if bits else "no bits"
                       for bits in (saved.get(name), own.get(name)))
        if there != here:
            raise ValueError(
                f"layer {brief(name)} has {there} of its own there, and {here} in the network that "
                "is built here: give layers theirs where it is built, as idea l of docs/ideas.md")


def set_quantizers(model: nn.Module, name: str, bit_widths: Iterable[BitWidth | int | str]) -> None:
    """Replace the quantizer of every quantized layer by one of QUANTIZERS[name].

    Raises ValueError for an unknown name, for "dorefa", and where two layers get one quantizer.
    """
    if name not in QUANTIZERS:
        raise ValueError(f"quantizer {name!r} does not exist: choose from {', '.join(QUANTIZERS)}")
    if QUANTIZERS[name] is None:
        raise ValueError(f"{name} is what layers hold when they are built: build the network anew")
    bit_widths = highest_first(bit_widths)
    owners = {}
    for layer_name, layer in layers_with_quantizer(model).items():
        quantizer = QUANTIZERS[name](layer, bit_widths)
        if quantizer in owners:  # it would have the bits of the layer that was switched last
            raise ValueError(f"quantizer {name!r} gives {owners[quantizer]} and {layer_name} the "
                             "same object: return a new one for each layer")
        owners[quantizer] = layer_name
        layer.quantizer = quantizer.train(layer.training)
    if hasattr(model, "spec"):
        model.spec = {**model.spec, "quantizer": name}
    set_bit_width(model, bit_widths[0])


def layers_to_initialize(model: nn.Module) -> list[nn.Module]:
    """Return the layers whose quantizers define `initialize`."""
    return [layer for layer in layers_with_quantizer(model).values()
            if type(layer.quantizer).initialize is not Quantizer.initialize]


@torch.no_grad()
def initialize_quantizers(model: nn.Module, images: Tensor, bit_widths: Iterable[BitWidth]) -> None:
    """Initialize the quantizers from a batch of images (N, 3, H, W).

    Runs each bit-width in training mode, so that BatchNorm uses the batch's statistics. Restores
    the running statistics and torch's random state.
    """
    layers = layers_to_initialize(model)
    own = {id(buffer) for layer in layers for buffer in layer.quantizer.buffers()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers() if id(buffer) not in own]
    hooks = [layer.register_forward_pre_hook(initialize_quantizer) for layer in layers]
    training = {module: module.training for module in model.modules()}
    model.train()
    try:
        with keeping_random_states([images.device] if images.is_cuda else []):
            for width in highest_first(bit_widths):
                set_bit_width(model, width)
                model(images)
    finally:
        for hook in hooks:
            hook.remove()
        for buffer, before in buffers:
            buffer.copy_(before)
        for module, mode in training.items():
            module.training = mode


def initialize_quantizer(layer: nn.Module, inputs: tuple[Tensor]) -> None:
    if isinstance(layer, QuantizedLayer):
        layer.quantizer.initialize(layer.weight)
    else:
        layer.quantizer.initialize(*inputs)
