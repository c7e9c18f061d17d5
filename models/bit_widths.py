"""Bit-widths of saved weights: which there are, fitting them to others, calibrating those."""
import re

import torch

from models.quan_ops import SwitchableBatchNorm2d, check_bit_widths, set_bit_width

BATCH_NORM_ENTRY = re.compile(r"(.*\bbn_dict\.)(\d+)(\..*)")


def saved_bit_widths(state_dict):
    """Return the bit-widths that a state dict has BatchNorms for, lowest first.

    Raises ValueError where one of them does not exist.
    """
    saved = {int(found[2]) for found in map(BATCH_NORM_ENTRY.fullmatch, state_dict) if found}
    return sorted(check_bit_widths(saved)) if saved else []


def fit_bit_widths(state_dict, bit_widths):
    """Return a state dict with BatchNorms for `bit_widths` alone, and {added: what it copies}.

    A bit-width that is missing starts as a copy of the nearest; of two as near the higher, whose
    quantization step is closer. All other entries stay.
    """
    saved = saved_bit_widths(state_dict)
    source = {bits: min(saved, key=lambda other: (abs(other - bits), -other))
              for bits in bit_widths if saved}
    fitted = {}
    for key, value in state_dict.items():
        found = BATCH_NORM_ENTRY.fullmatch(key)
        if not found:
            fitted[key] = value
        for bits, origin in source.items() if found else ():
            if origin == int(found[2]):
                fitted[f"{found[1]}{bits}{found[3]}"] = value
    return fitted, {bits: origin for bits, origin in source.items() if bits != origin}


@torch.no_grad()
def calibrate(model, bits, batches):
    """Re-estimate one bit-width's BatchNorm statistics over batches of images (N, 3, H, W).

    Each becomes the average over the batches. Nothing else changes, not even resnet20q's shared
    shortcut BatchNorm. Leaves the model in evaluation mode at that bit-width.
    """
    model.eval()
    set_bit_width(model, bits)
    layers = [layer.bn_dict[str(bits)] for layer in model.modules()
              if isinstance(layer, SwitchableBatchNorm2d)]
    momentum = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a cumulative average, in torch's convention
        layer.train()
    for images in batches:
        model(images)
    for layer, value in zip(layers, momentum):
        layer.momentum = value
        layer.eval()
