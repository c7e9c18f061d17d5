"""Levels of weights at several bit-widths, stored as one number a weight.

A weight has a level at each bit-width, k of 0 to 2^bits - 1. Where all of them come from rounding
one number, the thresholds between levels cut its range into intervals: at 1, 2, 4 and 8 bits into
256, as 255 is an odd multiple of 1, 3 and 15; at all of 1 to 8 bits into 472. Each is a combination
of levels, a row of a table, and a weight is the number of its row: a byte, or a byte and a bit of a
plane of high bits. Weights within rounding of a threshold, such as 0, may have other combinations.
Those take rows that are free, the most frequent first; what then has none is an exception, kept in
a list.

Several levels are joined to one number (a joint level), the first column's in the lowest bits.
"""
from typing import NamedTuple

import torch
from torch import Tensor, nn

SELDOM = 1e-3  # of the weights: where more are of combinations without a row, a bit is added
MANY = 0.1  # of a layer's weights: where more are exceptions, its levels do not nest
JOINT_BITS = 62  # that an int64 holds


class Codes(NamedTuple):
    """A layer's weights as numbers of rows.

    low: (weights,) uint8; high_bits: the bits above, eight a byte, if any; exceptions: indices of
    weights (n,) int32 whose levels, (n, columns) uint8, are exception_levels, if any.
    """
    low: Tensor
    high_bits: Tensor | None = None
    exceptions: Tensor | None = None
    exception_levels: Tensor | None = None


def encode(layers: dict[str, Tensor], bits: tuple[int, ...]) -> tuple[Tensor, dict[str, Codes]]:
    """Return rows that the table of intervals lacks, (rows, columns) uint8, and each layer's Codes.

    layers: {name: joint levels (weights,) int64}. bits: of each column. Raises ValueError naming
    a layer whose levels do not come from rounding one number.
    """
    regular = intervals(bits)
    numbers, counts = torch.cat([torch.stack(levels.unique(return_counts=True))
                                 for levels in layers.values()], dim=1)
    numbers, where = numbers.unique(return_inverse=True)
    counts = torch.zeros_like(numbers).index_add_(0, where, counts)
    is_other = ~torch.isin(numbers, regular)
    wide = len(regular) > 256 or counts[is_other].sum() > SELDOM * counts.sum()
    most_frequent = counts[is_other].sort(descending=True, stable=True).indices
    free = (512 if wide else 256) - len(regular)
    others = split(numbers[is_other][most_frequent[:max(0, free)]], bits)
    rows = join(table(others, bits).long().T, bits)
    codes = {}
    for name, levels in layers.items():
        code = torch.searchsorted(rows, levels).clamp_(max=len(rows) - 1)
        exceptions = (rows[code] != levels).nonzero().flatten()
        if len(exceptions) > MANY * len(levels):
            raise ValueError(f"layer {name}: its levels at {', '.join(map(str, bits))} bits do not "
                             "come from rounding one number: pack one bit-width a file")
        high_bits = None
        if wide:
            plane = nn.functional.pad(code >> 8, (0, -len(code) % 8)).view(-1, 8)
            high_bits = (plane << torch.arange(8)).sum(1).to(torch.uint8)
        codes[name] = Codes(code.to(torch.uint8), high_bits)
        if len(exceptions):
            codes[name] = codes[name]._replace(exceptions=exceptions.to(torch.int32),
                                               exception_levels=split(levels[exceptions], bits))
    return others, codes


def decode(codes: Codes, rows: Tensor, column: int) -> Tensor:
    """Return the levels (weights,) uint8 of one column, given the table (rows, columns)."""
    numbers = codes.low.long()
    if codes.high_bits is not None:
        eight = torch.arange(8, device=numbers.device)
        high = (codes.high_bits[:, None] >> eight & 1).flatten()[:len(numbers)]
        numbers = numbers + (high.long() << 8)
    levels = rows[:, column][numbers]
    if codes.exceptions is not None:
        levels[codes.exceptions.long()] = codes.exception_levels[:, column]
    return levels


def intervals(bits: tuple[int, ...]) -> Tensor:
    """Return the joint level of each interval between all thresholds of a range, in order."""
    thresholds = torch.cat([(torch.arange(2**b - 1, dtype=torch.float64) + 0.5) / (2**b - 1)
                            for b in bits]).unique()
    ends = torch.cat([torch.zeros(1), thresholds, torch.ones(1)])
    middles = (ends[1:] + ends[:-1]) / 2
    return join([((2**b - 1) * middles).round().long() for b in bits], bits)


def table(others: Tensor, bits: tuple[int, ...]) -> Tensor:
    """Return the table of levels, (rows, columns) uint8, given its rows that are of no interval."""
    numbers = torch.cat([intervals(bits), join(others.long().T, bits)])
    return split(numbers.sort().values, bits)


def join(levels: list[Tensor] | Tensor, bits: tuple[int, ...]) -> Tensor:
    """Return levels, a row (n,) int64 a column, as joint levels (n,) int64."""
    if sum(bits) > JOINT_BITS:
        raise ValueError(f"{len(bits)} bit-widths of {sum(bits)} bits together are more than a "
                         f"packed file holds ({JOINT_BITS}): pack fewer")
    numbers = torch.zeros_like(levels[0])
    for b, k in reversed(list(zip(bits, levels, strict=True))):
        numbers = numbers << b | k
    return numbers


def split(numbers: Tensor, bits: tuple[int, ...]) -> Tensor:
    """Return the levels of joint levels: (n,) int64 -> (n, columns) uint8."""
    columns = []
    for b in bits:
        columns.append(numbers & 2**b - 1)
        numbers = numbers >> b
    return torch.stack(columns, dim=1).to(torch.uint8)
