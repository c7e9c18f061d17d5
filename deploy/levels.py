"""Levels of weights at several bit-widths, told by one number a weight.

A weight has a level at each bit-width, k of 0 to 2^bits - 1. Few combinations of levels occur: at
1, 2, 4 and 8 bits those of the 256 levels at 8 bits, as 255 is an odd multiple of 1, 3 and 15, but
for weights within rounding of a threshold; at all of 1 to 8 bits those of the 472 intervals between
their thresholds. So there is a table of combinations, and for each weight its number there, in a
byte, or in a byte and a bit of a plane. What occurs too seldom for the table is mended, by a list.
"""
import torch
from torch import nn

SELDOM = 1e-3  # of the weights: where more are not of the 256 combinations, a bit is added


def combinations(layer, stored_bits):
    """Return each weight's levels as one number, those at more bits in front: (weights,) int64."""
    numbers = torch.zeros(layer.weight.numel(), dtype=torch.int64)
    for bits in reversed(stored_bits):
        q, _ = layer.operand(bits, integers=True)  # (2 k - n) / 2^bits
        exact = (q * 2**bits + 2**bits - 1) / 2  # but for float32's rounding
        k = exact.round().clamp(0, 2**bits - 1)
        if not (k - exact).abs().max() < 0.01:
            raise ValueError(f"the weights at {bits} bits are not finite, or not {2**bits} even "
                             "levels of [-E, E]: a packed file holds nothing else")
        numbers = numbers << bits | k.flatten().long()
    return numbers


def encode(layers, stored_bits):
    """Return the table of levels (rows, widths), and {name: {tensor's name: tensor}}."""
    found, counts = torch.cat([torch.stack(numbers.unique(return_counts=True))
                               for numbers in layers.values()], dim=1)
    found, where = found.unique(return_inverse=True)
    counts = torch.zeros_like(found).index_add_(0, where, counts)
    counts, order = counts.sort(descending=True, stable=True)
    rows = 256 if counts[256:].sum() <= SELDOM * counts.sum() else 512
    table = found[order[:rows]].sort().values
    packed = {}
    for name, numbers in layers.items():
        code = torch.searchsorted(table, numbers).clamp_(max=len(table) - 1)
        packed[name] = parts = {"weight": code.to(torch.uint8)}  # the low byte
        if rows > 256:
            plane = nn.functional.pad(code >> 8, (0, -len(code) % 8)).view(-1, 8)
            parts["ninth"] = (plane << torch.arange(8)).sum(1).to(torch.uint8)
        mended = (table[code] != numbers).nonzero().flatten()
        if len(mended):
            parts["mended"] = mended.to(torch.int32)
            parts["mended_levels"] = split(numbers[mended], stored_bits)
    return split(table, stored_bits), packed


def split(numbers, stored_bits):
    """Return the levels of combinations(): (n,) int64 -> (n, widths) uint8."""
    columns = []
    for bits in stored_bits:
        columns.append(numbers & 2**bits - 1)
        numbers = numbers >> bits
    return torch.stack(columns, dim=1).to(torch.uint8)
