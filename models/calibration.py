"""The bit-widths of saved weights: list them, add missing ones, calibrate those."""
import re
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from models.bit_widths import BitWidth
from models.quan_ops import SwitchableBatchNorm2d, set_bit_width, trained_bit_widths

# The key of a tensor that exists once per bit-width: in a bn_dict, or in a quantizer's *_dict.
ENTRY = re.compile(
    r"(?P<prefix>.*\b(?P<dict>\w+_dict)\.)(?P<width>\d+|w\d+a\d+)(?P<suffix>\..*)?")


def saved_bit_widths(state_dict: dict[str, Tensor]) -> list[BitWidth]:
    """Return the bit-widths that a state dict has BatchNorms for, lowest first.

    Raises ValueError for a bit-width that does not exist.
    """
    found = filter(None, map(ENTRY.fullmatch, state_dict))
    return sorted({BitWidth.of(entry["width"]) for entry in found if entry["dict"] == "bn_dict"})


def add_missing_bit_widths(state_dict: dict[str, Tensor], model: nn.Module,
                           ) -> tuple[dict[str, Tensor], dict[BitWidth, BitWidth]]:
    """Fit a state dict to the bit-widths of a model.

    The BatchNorms and quantizers of a missing bit-width are copies of the nearest one's, of two as
    near the higher one's, whose quantization step is closer. Bit-widths that the model lacks are
    dropped; all other entries are unchanged.

    Returns:
        The fitted state dict, and {added bit-width: the one that it copies}.
    """
    wanted = trained_bit_widths(model)
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

    for prefix, widths in per_width.items():
        for width in wanted:
            source = width if width not in added else min(widths, key=width.distance)
            for suffix, value in widths.get(source, {}).items():
                key = f"{prefix}{width}{suffix}"
                if width not in added or key in own:
                    result[key] = value
    return result, added


@torch.no_grad()
def calibrate(model: nn.Module, bit_width: BitWidth | int | str,
              batches: Iterable[Tensor]) -> None:
    """Re-estimate one bit-width's BatchNorm statistics over batches of images (N, 3, H, W).

    Each statistic becomes its average over the batches. Nothing else changes, not even resnet20q's
    shared shortcut BatchNorm. Leaves the model in evaluation mode at that bit-width.
    """
    model.eval()
    set_bit_width(model, bit_width)
    layers = [layer.bn_dict[layer.width] for layer in model.modules()
              if isinstance(layer, SwitchableBatchNorm2d)]
    momentum = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.train()

    for count, images in enumerate(batches, start=1):
        for layer in layers:
            layer.momentum = 1 / count  # a cumulative average; torch's own waits for the count
        model(images)

    for layer, value in zip(layers, momentum, strict=True):
        layer.momentum = value
        layer.eval()
