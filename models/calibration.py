"""Bit-widths of saved weights: which there are, adding others, calibrating those."""
import re
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from models.bit_widths import BitWidth
from models.quan_ops import SwitchableBatchNorm2d, set_bit_width, trained_bit_widths

# What there is one of per bit-width: BatchNorms, in bn_dict, and what quantizers keep in a *_dict.
ENTRY = re.compile(r"(?P<start>.*\b(?P<dict>\w+_dict)\.)(?P<width>\d+|w\d+a\d+)(?P<end>\..*)?")


def saved_bit_widths(state_dict: dict[str, Tensor]) -> list[BitWidth]:
    """Return the bit-widths that a state dict has BatchNorms for, lowest first.

    Raises ValueError where one of them does not exist.
    """
    found = filter(None, map(ENTRY.fullmatch, state_dict))
    return sorted({BitWidth.of(entry["width"]) for entry in found if entry["dict"] == "bn_dict"})


def add_missing_bit_widths(state_dict: dict[str, Tensor], model: nn.Module,
                           ) -> tuple[dict[str, Tensor], dict[BitWidth, BitWidth]]:
    """Return a state dict for the bit-widths of a model, and {added: what it copies}.

    A bit-width that is missing starts as a copy of the nearest, BatchNorms and quantizers; of two
    as near of the higher, whose quantization step is closer. Other bit-widths are left out; all
    other entries stay.
    """
    wanted = trained_bit_widths(model)
    own = model.state_dict().keys()
    trained = saved_bit_widths(state_dict)
    added = {width: min(trained, key=width.distance) for width in wanted
             if trained and width not in trained}
    result = {}
    per_width = defaultdict(lambda: defaultdict(dict))  # start: {bit-width: {end: value}}
    for key, value in state_dict.items():
        entry = ENTRY.fullmatch(key)
        if entry is None:
            result[key] = value
        else:
            per_width[entry["start"]][BitWidth.of(entry["width"])][entry["end"] or ""] = value
    for start, widths in per_width.items():
        for width in wanted:
            source = width if width not in added else min(widths, key=width.distance)
            result.update({f"{start}{width}{end}": value
                           for end, value in widths.get(source, {}).items()
                           if width not in added or f"{start}{width}{end}" in own})
    return result, added


@torch.no_grad()
def calibrate(model: nn.Module, bit_width: BitWidth | int | str,
              batches: Iterable[Tensor]) -> None:
    """Re-estimate one bit-width's BatchNorm statistics over batches of images (N, 3, H, W).

    Each becomes the average over the batches. Nothing else changes, not even resnet20q's shared
    shortcut BatchNorm. Leaves the model in evaluation mode at that bit-width.
    """
    model.eval()
    set_bit_width(model, bit_width)
    layers = [layer.bn_dict[layer.width] for layer in model.modules()
              if isinstance(layer, SwitchableBatchNorm2d)]
    momentum = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a cumulative average, in torch's convention
        layer.train()
    for images in batches:
        model(images)
    for layer, value in zip(layers, momentum, strict=True):
        layer.momentum = value
        layer.eval()
