"""Levels of weights at several bit-widths, stored as one number per weight.

A weight has a level k, 0 to 2^bits - 1, at each bit-width. Where all its levels come from rounding
one number, the thresholds between levels cut the range of that number into intervals: 256 of them
at 1, 2, 4 and 8 bits, as 255 is an odd multiple of 1, 3 and 15; 472 at all of 1 to 8 bits. Each
interval is a combination of levels, a row of a table. A weight is stored as the number of its row:
a byte, or a byte and one bit in a plane of high bits.

Weights within rounding of a threshold, such as 0, may have other combinations. These take free
rows, the most frequent first; weights whose combination has no row are exceptions, stored in a
list.

A joint level is several levels in one integer, the first column's in the lowest bits.
"""
from typing import NamedTuple

import torch
from torch import Tensor, nn

RARE = 1e-3  # share of all weights: where more have no interval, each weight takes a high bit
MAX_EXCEPTIONS = 0.1  # share of a layer's weights: where more are exceptions, levels do not nest
JOINT_BITS = 62  # of a joint level, an int64


class Codes(NamedTuple):
    """A layer's weights as row numbers.

    low: the low byte, (weights,) uint8. high_bits: the bits above it, eight per byte, or None.
    exceptions: indices of weights, (n,) int32, or None. exception_levels: their levels,
    (n, columns) uint8.
    """
    low: Tensor
    high_bits: Tensor | None = None
    exceptions: Tensor | None = None
    exception_levels: Tensor | None = None


def encode(layers: dict[str, Tensor], bits: tuple[int, ...]) -> tuple[Tensor, dict[str, Codes]]:
    """Encode the weights of layers as row numbers.

    layers: {name: joint levels (weights,) int64}. bits: of each column. Returns the rows that the
    table has besides the intervals, (rows, columns) uint8, and {name: Codes}. Raises ValueError
    naming a layer whose levels do not come from rounding one number.
    """
    regular = intervals(bits)
    numbers, counts = torch.cat([torch.stack(levels.unique(return_counts=True))
                                 for levels in layers.values()], dim=1)
    numbers, where = numbers.unique(return_inverse=True)
    counts = torch.zeros_like(numbers).index_add_(0, where, counts)
    is_other = ~torch.isin(numbers, regular)
    wide = len(regular) > 256 or counts[is_other].sum() > RARE * counts.sum()
    most_frequent = counts[is_other].sort(descending=True, stable=True).indices
    free = (512 if wide else 256) - len(regular)
    others = split(numbers[is_other][most_frequent[:max(0, free)]], bits)
    rows = join(table(others, bits).long().T, bits)

    codes = {}
    for name, levels in layers.items():
        code = torch.searchsorted(rows, levels).clamp_(max=len(rows) - 1)
        exceptions = (rows[code] != levels).nonzero().flatten()
        if len(exceptions) > MAX_EXCEPTIONS * len(levels):
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


def row_numbers(codes: Codes) -> Tensor:
    """Return the row number of each weight, (weights,) int64."""
    numbers = codes.low.long()
    if codes.high_bits is not None:
        eight = torch.arange(8, device=numbers.device)
        high = (codes.high_bits[:, None] >> eight & 1).flatten()[:len(numbers)]
        numbers = numbers + (high.long() << 8)
    return numbers


def decode(codes: Codes, rows: Tensor, column: int) -> Tensor:
    """Return the levels (weights,) uint8 of one column; rows: the table (rows, columns)."""
    levels = rows[:, column][row_numbers(codes)]
    if codes.exceptions is not None:
        levels[codes.exceptions.long()] = codes.exception_levels[:, column]
    return levels


def intervals(bits: tuple[int, ...]) -> Tensor:
    """Return the joint level of each interval between thresholds, in ascending order."""
    thresholds = torch.cat([(torch.arange(2**b - 1, dtype=torch.float64) + 0.5) / (2**b - 1)
                            for b in bits]).unique()
    ends = torch.cat([torch.zeros(1), thresholds, torch.ones(1)])
    middles = (ends[1:] + ends[:-1]) / 2
    return join([((2**b - 1) * middles).round().long() for b in bits], bits)


def table(others: Tensor, bits: tuple[int, ...]) -> Tensor:
    """Return the table (rows, columns) uint8 of the intervals and of other rows, in order."""
    numbers = torch.cat([intervals(bits), join(others.long().T, bits)])
    return split(numbers.sort().values, bits)


def join(levels: list[Tensor] | Tensor, bits: tuple[int, ...]) -> Tensor:
    """Join levels, (n,) int64 for each column, into joint levels (n,) int64."""
    if sum(bits) > JOINT_BITS:
        raise ValueError(f"{len(bits)} bit-widths of {sum(bits)} bits together are more than a "
                         f"packed file holds ({JOINT_BITS}): pack fewer")
    numbers = torch.zeros_like(levels[0])
    for b, k in reversed(list(zip(bits, levels, strict=True))):
        numbers = numbers << b | k
    return numbers


def split(numbers: Tensor, bits: tuple[int, ...]) -> Tensor:
    """Split joint levels into levels: (n,) int64 -> (n, columns) uint8."""
    columns = []
    for b in bits:
        columns.append(numbers & 2**b - 1)
        numbers = numbers >> b
    return torch.stack(columns, dim=1).to(torch.uint8)
