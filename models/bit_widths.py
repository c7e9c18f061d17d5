"""The bit-width of a network: a value that holds the bits of weights and of activations."""
import functools
import re
from collections.abc import Iterable

FULL_PRECISION = 32
BITS = (1, 2, 3, 4, 5, 6, 7, 8, FULL_PRECISION)


@functools.total_ordering
class BitWidth:
    """Bits of weights and bits of activations, each 1 to 8, or 32 for full precision.

    It is written `4` where both are equal, else `w2a4`. It equals, and hashes as, that integer or
    text, so that `results[4]` and `results["w2a4"]` find it. Bit-widths are ordered by cost: weight
    bits times activation bits, then weight bits.
    """

    def __init__(self, weights: int, activations: int | None = None):
        self.weights = weights
        self.activations = weights if activations is None else activations

    @classmethod
    def of(cls, value: "BitWidth | int | str") -> "BitWidth":
        """Return the bit-width of 4, "4" or "w2a4"; raises ValueError for anything else."""
        if isinstance(value, cls):
            return value
        found = re.fullmatch(r"w(\d{1,2})a(\d{1,2})|(\d{1,2})", str(value))
        if found and not isinstance(value, bool):
            weights = int(found[1] or found[3])
            activations = int(found[2] or found[3])
            if weights in BITS and activations in BITS:
                return cls(weights, activations)
        raise ValueError(f"bit-width {value!r} does not exist: choose from 1 to 8 and 32, or of "
                         "these one for weights and one for activations, such as w2a4")

    @property
    def plain(self) -> int | str:
        """The integer or text that it is written as, for files and arguments."""
        if self.weights == self.activations:
            return self.weights
        return f"w{self.weights}a{self.activations}"

    def __str__(self):
        return str(self.plain)

    def __repr__(self):
        return f"BitWidth({self.plain!r})"

    def __format__(self, spec):
        return format(str(self), spec)

    def __eq__(self, other):
        if isinstance(other, BitWidth):
            return self.plain == other.plain
        return self.plain == other if isinstance(other, int | str) else NotImplemented

    def __hash__(self):
        return hash(self.plain)

    def __lt__(self, other):
        if not isinstance(other, BitWidth | int | str):
            return NotImplemented
        return self.cost < BitWidth.of(other).cost

    @property
    def is_integer(self) -> bool:
        """Whether weights and activations are integers, neither at full precision."""
        return FULL_PRECISION not in (self.weights, self.activations)

    def of_layer(self, name: str) -> "BitWidth":
        """Return the bit-width of a layer: this one, where an Assignment has one for each."""
        return self

    @property
    def cost(self) -> tuple[int, int]:
        """The sort key: weight bits times activation bits, then weight bits."""
        return self.weights * self.activations, self.weights

    def distance(self, other: "BitWidth") -> tuple[int, tuple[int, int]]:
        """Return a sort key by which the nearest bit-width is the least, the higher of two ties."""
        other = BitWidth.of(other)
        difference = abs(self.weights - other.weights) + abs(self.activations - other.activations)
        return difference, (-other.cost[0], -other.cost[1])


def highest_first(bit_widths: Iterable[BitWidth | int | str]) -> tuple[BitWidth, ...]:
    """Return the bit-widths, highest first; ValueError for none, unknown or repeated ones."""
    widths = [BitWidth.of(value) for value in bit_widths]
    if not widths:
        raise ValueError("no bit-width given: list at least one of 1 to 8 and 32, such as 1,2,4")
    if len(set(widths)) < len(widths):
        raise ValueError(f"bit-widths {','.join(map(str, widths))} repeat: list each once")
    return tuple(sorted(widths, reverse=True))
