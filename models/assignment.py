"""An assignment: other bit-widths for other layers of a network, under a name."""
import functools
import json
import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from torch import nn

from models.bit_widths import BitWidth
from utils import brief, one_line

NAME = re.compile(r"(?!w\d+a\d+$)[A-Za-z][\w-]{0,31}", re.ASCII)
RESERVED = ("any",)  # of export.py's --bits


class LayerBitWidth(BitWidth):
    """The bit-width of one layer in an assignment: its name, and text, are the assignment's."""

    def __init__(self, weights: int, activations: int, name: str):
        super().__init__(weights, activations)
        self.name = name

    @property
    def plain(self) -> str:
        return self.name


@functools.total_ordering
class Assignment:
    """A bit-width for each layer of a network, under a name that stands where a bit-width would.

    layers: {name of a layer, or pattern such as `layers.0.*`: bit-width}; of several that match,
    the last one counts. default: the bit-width of all other layers. A convolution takes the weight
    bits, an ActivationQ the activation bits; a layer's own `bits` win over both. It equals, and
    hashes as, its name, and sorts after all bit-widths. Raises ValueError
    for a name or bit-width that cannot be.
    """

    def __init__(self, name: str, default: BitWidth | int | str,
                 layers: Mapping[str, BitWidth | int | str] | None = None):
        if not is_name(name):
            raise ValueError(f"an assignment cannot have the name {brief(name)}: give a letter and "
                             "up to 31 letters, digits, - and _, no bit-width and no word such as "
                             "any or keys")
        self.name = name
        try:
            self.default = BitWidth.of(default)
            self.layers = {pattern: BitWidth.of(width) for pattern, width in (layers or {}).items()}
        except ValueError as error:
            raise ValueError(f"assignment {name}: {error}") from None

    @classmethod
    def of(cls, content: object) -> "Assignment":
        """Return the assignment of a dict of name, default and layers; ValueError for others."""
        fields = {"name", "default", "layers"}
        if not isinstance(content, dict) or content.keys() != fields:
            raise ValueError(f"{brief(content)} is not an assignment: give a dict of name, default "
                             'and layers, such as {"name": "mix", "default": 8, "layers": '
                             '{"layers.0.*": 4}}')
        layers = content["layers"]
        if not isinstance(layers, dict) or not all(isinstance(key, str) for key in layers):
            raise ValueError(f"the layers of an assignment are {brief(layers)}: give a dict such "
                             'as {"layers.0.*": 4}')
        return cls(**content)

    @property
    def content(self) -> dict:
        """The dict that `of` takes, as files hold it."""
        return {"name": self.name, "default": self.default.plain,
                "layers": {pattern: width.plain for pattern, width in self.layers.items()}}

    def is_identical(self, other: "Assignment") -> bool:
        """Return whether another one has the same name, default and entries, in the same order."""
        return repr(self) == repr(other)

    def of_layer(self, name: str) -> BitWidth:
        """Return the bit-width of a layer, whose text is the assignment's name."""
        found = self.default
        for pattern, width in self.layers.items():
            if fnmatchcase(name, pattern):
                found = width
        return LayerBitWidth(found.weights, found.activations, self.name)

    def __str__(self):
        return self.name

    def __repr__(self):
        return f"Assignment({self.name!r}, {self.default.plain!r}, {self.content['layers']!r})"

    def __format__(self, spec):
        return format(self.name, spec)

    def __eq__(self, other):
        if isinstance(other, Assignment | str):
            return self.name == str(other)
        return NotImplemented

    def __hash__(self):
        return hash(self.name)

    def __lt__(self, other):
        return self.name < other.name if isinstance(other, Assignment) else False


Width = BitWidth | Assignment  # of a network


def is_name(value: object) -> bool:
    """Return whether a value may name an assignment: a key of torch's dicts, and of files."""
    return (isinstance(value, str) and bool(NAME.fullmatch(value)) and value not in RESERVED
            and not hasattr(nn.ModuleDict(), value) and not hasattr(nn.ParameterDict(), value))


def read_assignments(path: str | Path) -> list[Assignment]:
    """Return the assignments of a JSON file, of one or of a list; ValueError naming the file."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=dict_once)
        assignments = list(map(Assignment.of, content if isinstance(content, list) else [content]))
        check_assignments(assignments)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {one_line(error)}") from None
    return assignments


def dict_once(pairs: list[tuple[str, object]]) -> dict:
    """Return a dict of pairs; raises ValueError where a key repeats, as JSON allows."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"its key {brief(repeated)} is repeated: give each key once")
    return found


def check_assignments(assignments: list[Assignment]) -> None:
    """Raise ValueError where there are none, or two of a name."""
    names = [assignment.name for assignment in assignments]
    if not names:
        raise ValueError("there is no assignment: give at least one")
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two assignments have the name {name}: give each its own")
