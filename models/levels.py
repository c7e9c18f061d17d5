"""Levels of weights at several bit-widths, told by one number a weight.

A weight has a level at each bit-width, k of 0 to 2^bits - 1. The thresholds between levels cut
[-1, 1] into intervals: at 1, 2, 4 and 8 bits into 256, as 255 is an odd multiple of 1, 3 and 15; at
all of 1 to 8 bits into 472. Each is a combination of levels, a row of a table, and a weight is the
number of its row: a byte, or a byte and a bit of a plane. Weights within rounding of a threshold,
such as 0, may have other combinations. Those take rows that are left over, the most frequent first;
what then has none is mended, by a list.
"""
import torch
from torch import nn

SELDOM = 1e-3  # of the weights: where more are of combinations without a row, a bit is added


def combinations(layer, stored_bits):
    """Return each weight's levels as one number, those at more bits in front: (weights,) int64."""
    levels = []
    for bits in stored_bits:
        q, _ = layer.operand(bits, integers=True)  # (2 k - n) / 2^bits
        exact = (q * 2**bits + 2**bits - 1) / 2  # but for float32's rounding
        k = exact.round().clamp(0, 2**bits - 1)
        if not (k - exact).abs().max() < 0.01:
            raise ValueError(f"the weights at {bits} bits are not finite, or not {2**bits} even "
                             "levels of [-E, E]: a packed file holds nothing else")
        levels.append(k.flatten().long())
    return join(levels, stored_bits)


def intervals(stored_bits):
    """Return the combination of each interval between all thresholds, from -E to E."""
    thresholds = torch.cat([(torch.arange(2**bits - 1, dtype=torch.float64) + 0.5) / (2**bits - 1)
                            for bits in stored_bits]).unique()
    ends = torch.cat([torch.zeros(1), thresholds, torch.ones(1)])
    middles = (ends[1:] + ends[:-1]) / 2
    return join([((2**bits - 1) * middles).round().long() for bits in stored_bits], stored_bits)


def encode(layers, stored_bits):
    """Return the rows that the intervals' table lacks, (rows, widths), and {layer: its tensors}.

    layers: {name: combinations}. tensors: `weight`, the low byte; `ninth`, the plane of the bits
    above it; `mended`, indices of weights, and `mended_levels`.
    """
    regular = intervals(stored_bits)
    found, counts = torch.cat([torch.stack(numbers.unique(return_counts=True))
                               for numbers in layers.values()], dim=1)
    found, where = found.unique(return_inverse=True)
    counts = torch.zeros_like(found).index_add_(0, where, counts)
    other = ~torch.isin(found, regular)
    wide = len(regular) > 256 or counts[other].sum() > SELDOM * counts.sum()
    frequent = counts[other].sort(descending=True, stable=True).indices
    rows = split(found[other][frequent[:(512 if wide else 256) - len(regular)]], stored_bits)
    table = join(rows_of(rows, stored_bits).long().T, stored_bits)
    packed = {}
    for name, numbers in layers.items():
        code = torch.searchsorted(table, numbers).clamp_(max=len(table) - 1)
        packed[name] = parts = {"weight": code.to(torch.uint8)}
        if wide:
            plane = nn.functional.pad(code >> 8, (0, -len(code) % 8)).view(-1, 8)
            parts["ninth"] = (plane << torch.arange(8)).sum(1).to(torch.uint8)
        mended = (table[code] != numbers).nonzero().flatten()
        if len(mended):
            parts["mended"] = mended.to(torch.int32)
            parts["mended_levels"] = split(numbers[mended], stored_bits)
    return rows, packed


def rows_of(others, stored_bits):
    """Return the table of levels, (rows, widths) uint8, given those that are of no interval."""
    numbers = torch.cat([intervals(stored_bits), join(others.long().T, stored_bits)])
    return split(numbers.sort().values, stored_bits)


def join(levels, stored_bits):
    """Return levels at each of stored_bits, (n,) int64, as combinations() has them."""
    numbers = torch.zeros_like(levels[0])
    for bits, k in reversed(list(zip(stored_bits, levels))):
        numbers = numbers << bits | k
    return numbers


def split(numbers, stored_bits):
    """Return the levels of join(): (n,) int64 -> (n, widths) uint8."""
    columns = []
    for bits in stored_bits:
        columns.append(numbers & 2**bits - 1)
        numbers = numbers >> bits
    return torch.stack(columns, dim=1).to(torch.uint8)
