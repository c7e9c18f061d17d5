"""The packed file: a network at any precision, with a byte or nine bits per quantized weight.

It is a safetensors file. It holds row numbers in a table of levels (see levels.py) for the weight
of each quantized layer, and the scale and grid of its integers at each bit-width; BatchNorms and
quantizer state of its bit-widths; all other tensors in float32; and one JSON text with a SHA-256.
"""
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import safetensors.torch
import torch
from torch import Tensor, nn

from models import (Assignment, Width, assignments_of, bit_widths_of, highest_first, quantizers,
                    set_bit_width)
from models.assignment import is_name
from models.bit_widths import BITS, FULL_PRECISION, BitWidth
from models.calibration import ENTRY, has_state_per_width, without_assignments
from models.fields import FileError
from models.levels import Codes, decode, encode, join, row_numbers, table
from models.quan_ops import QuantizedLayer, WeightQuantizer, width_of
from utils import brief, one_line

KEY = "any_precision"  # the only metadata entry: the order of several varies from file to file
FORMAT = 3
ANY = tuple(bits for bits in BITS if bits != FULL_PRECISION)
BATCH_COUNT = ".num_batches_tracked"  # not stored: evaluation does not need it
OPTIONAL = ("high_bits", "exceptions", "exception_levels")


class PackedWeight(WeightQuantizer):
    """The quantizer of a layer whose weight, uint8, is the low byte of row numbers.

    columns: {name of a bit-width, or bits: bits of its column}. rows: the table (rows, columns)
    uint8. scale, grid: of each column; the integer of level k is grid[0] + grid[1] k. The others
    are as in Codes.
    """

    def __init__(self, columns: dict[str, int], rows: Tensor, scale: Tensor, grid: Tensor,
                 high_bits: Tensor | None = None, exceptions: Tensor | None = None,
                 exception_levels: Tensor | None = None):
        super().__init__()
        self.columns = columns
        self.register_buffer("rows", rows, persistent=False)  # one table for many layers
        self.register_buffer("scale", scale)
        self.register_buffer("grid", grid)
        self.register_buffer("high_bits", high_bits)
        self.register_buffer("exceptions", exceptions)
        self.register_buffer("exception_levels", exception_levels)

    def check(self, weight: Tensor, shape: torch.Size, bits: tuple[int, ...]) -> None:
        """Raise ValueError where the weight and this quantizer's tensors do not fit each other.

        shape: of the layer's weight. bits: of each column.
        """
        if not (self.fits_shape(weight, shape) and self.fits_bits(weight, bits)):
            raise ValueError("weights and their table do not fit each other")

    def fits_shape(self, weight: Tensor, shape: torch.Size) -> bool:
        """Return whether all tensors are of the types and sizes of a weight of that shape."""
        columns = len(self.columns)
        expected = [  # (tensor, its type, its shape)
            (weight, torch.uint8, shape),
            (self.grid, torch.int16, (columns, 2)),
            (self.scale, torch.float32, (columns, *self.scale.shape[1:]))]
        if self.high_bits is not None:
            expected.append((self.high_bits, torch.uint8, (-(-shape.numel() // 8),)))
        if self.exceptions is not None:
            count = self.exceptions.numel()
            expected.append((self.exceptions, torch.int32, (count,)))
            expected.append((self.exception_levels, torch.uint8, (count, columns)))
        per_weight = list(zip(reversed(self.scale.shape[1:]), reversed(shape)))
        return (all(tensor.dtype == kind and tensor.shape == torch.Size(size)
                    for tensor, kind, size in expected)
                and self.scale.ndim <= 1 + len(shape)
                and all(size in (1, own) for size, own in per_weight))

    def fits_bits(self, weight: Tensor, bits: tuple[int, ...]) -> bool:
        """Return whether all values are of columns of these bits: rows, grids, levels."""
        numbers = row_numbers(Codes(weight.flatten(), self.high_bits))
        fits = bool((numbers < len(self.rows)).all())
        fits = fits and (self.high_bits is not None or len(self.rows) <= 256)
        for b, grid in zip(bits, self.grid.tolist()):
            fits = fits and grid in ([1 - 2**b, 2], [-2**(b - 1), 1])
        if self.exceptions is not None:
            fits = fits and bool(((0 <= self.exceptions) & (self.exceptions < len(numbers))).all())
            fits = fits and bool((self.exception_levels.long() < 2**torch.tensor(bits)).all())
        return fits

    def full_precision(self, w: Tensor) -> NoReturn:
        raise self.absent()

    def column(self) -> int:
        """Return the index of the bit-width's column; raises ValueError where the file has none."""
        if self.width in self.columns:
            return list(self.columns).index(self.width)
        same = [place for place, (key, bits) in enumerate(self.columns.items())
                if bits == self.bits and not is_name(key)]
        if len(same) != 1:  # of several, each has its own state of the quantizer
            raise self.absent()
        return same[0]

    def integers(self, w: Tensor) -> tuple[Tensor, Tensor]:
        column = self.column()
        codes = Codes(w.contiguous().flatten(), self.high_bits, self.exceptions,
                      self.exception_levels)
        low, stride = self.grid[column]
        levels = decode(codes, self.rows, column).to(self.scale.dtype)
        return (low + stride * levels).view(w.shape), self.scale[column]

    def absent(self) -> ValueError:
        """Return the error for a bit-width that the file lacks."""
        what = f"{self.bits}-bit, of {self.width}," if is_name(self.width) else f"{self.width}-bit"
        return ValueError(f"{what} is not in the packed file: choose from "
                          f"{', '.join(self.columns)}")


def check_stored(model: nn.Module) -> None:
    """Raise ValueError where the current bits of a layer of a packed file are not in that."""
    for name, layer in quantized_layers(model).items():
        if isinstance(layer.quantizer, PackedWeight):
            try:
                layer.quantizer.column()
            except ValueError as error:
                raise ValueError(f"layer {name}: {error}") from None


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers with a quantized weight, by name."""
    return {name: layer for name, layer in model.named_modules()
            if isinstance(layer, QuantizedLayer)}


# ---- write

@torch.no_grad()
def save(model: nn.Module, bit_widths: Iterable[Width | int | str],
         path: str | Path, about: dict,
         stored: Iterable[BitWidth | int | str] | None = None) -> None:
    """Write a packed file: weights at the bit-widths `stored`, BatchNorms at `bit_widths`.

    bit_widths: also assignments of the model, whose weights are stored too. about: what else a
    checkpoint holds: `network`, which builds the model, `images`, `arguments` and so on. stored:
    None for `bit_widths` alone. Raises ValueError, naming the layer, where a quantizer's weights
    are not integers times a scale.
    """
    widths = [width_of(model, width) for width in bit_widths]
    assignments = [width for width in widths if isinstance(width, Assignment)]
    bit_widths = [width for width in widths if width not in assignments]
    if not bit_widths:
        raise ValueError("a packed file needs a bit-width beside its assignments: give one, too")
    bit_widths = sorted(highest_first(bit_widths))
    stored = stored_bit_widths(model, bit_widths, stored)
    layers = quantized_layers(model)
    for name, layer in layers.items():
        if "weight" not in layer._parameters:
            raise ValueError(f"layer {name} has a weight that a parametrization or pruning "
                             "computes, which a packed file does not hold: remove that first")
    left_out = [name for name in assignments_of(model) if name not in assignments]
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, QuantizedLayer) and layers.get(name) is not layer:
            raise ValueError(f"layer {name} is a module that has another name, too, and a packed "
                             "file holds each once: give it one name, or take ONNX")
    tensors = {key: value.clone(memory_format=torch.contiguous_format)  # it may be another's, too
               for key, value in without_assignments(model.state_dict(), left_out).items()
               if is_stored_unchanged(key, bit_widths, layers)}

    groups = {}  # layers by their columns: {((key, bits), ...): {layer: {key: Column}}}
    for name, layer in layers.items():
        columns = columns_of(name, layer, [*stored, *assignments])
        signature = tuple((key, column.bits) for key, column in columns.items())
        groups.setdefault(signature, {})[name] = columns

    named_columns = []
    for number, (signature, members) in enumerate(groups.items()):
        bits = tuple(b for _, b in signature)
        joint = {name: join([column.levels for column in columns.values()], bits)
                 for name, columns in members.items()}
        others, codes = encode(joint, bits)
        rows = table(others, bits)
        if len(others):
            tensors[f"rows.{number}"] = others
        named_columns.append({"columns": list(signature), "layers": list(members)})
        for name, columns in members.items():
            quantizer = PackedWeight(
                {key: column.bits for key, column in columns.items()}, rows,
                torch.stack([column.scale for column in columns.values()]),
                torch.tensor([column.grid for column in columns.values()], dtype=torch.int16),
                *codes[name][1:])
            weight = codes[name].low.view(layers[name].weight.shape)
            check_equals_layer(name, layers[name], quantizer, weight, [*stored, *assignments])
            tensors[f"{name}.weight"] = weight
            tensors.update({f"{name}.quantizer.{key}": value
                            for key, value in quantizer.state_dict().items()})

    set_bit_width(model, bit_widths[-1])
    network = {**about.get("network", {}), "bit_widths": [width.plain for width in bit_widths],
               "own_bits": quantizers.own_bits_of(model),
               "assignments": [assignment.content for assignment in assignments]}
    about = {**about, "format": FORMAT, "network": network, "groups": named_columns,
             "stored": [width.plain for width in stored]}
    about["sha256"] = digest(tensors, about)
    content = safetensors.torch.save(tensors, {KEY: json.dumps(about)})
    Path(path).write_bytes(content)


def stored_bit_widths(model: nn.Module, bit_widths: list[BitWidth],
                      stored: Iterable[BitWidth | int | str] | None) -> list[BitWidth]:
    """Return the bit-widths at which weights are stored; raises ValueError for 32 bits.

    A quantizer with state per bit-width allows `bit_widths` alone.
    """
    stored = sorted(highest_first({*bit_widths, *map(BitWidth.of, stored or ())}))
    for width in stored:
        if not width.is_integer:
            raise ValueError(f"{width} bits is not stored in a packed file, which holds integers: "
                             "choose from 1 to 8, and keep the checkpoint for 32")
    if any(has_state_per_width(layer) for layer in quantized_layers(model).values()):
        return bit_widths
    return stored


def is_stored_unchanged(key: str, bit_widths: list[BitWidth], layers: dict[str, nn.Module]) -> bool:
    """Return whether an entry of the state dict is stored unchanged."""
    if key.endswith(BATCH_COUNT):
        return False
    owner, _, name = key.partition(".quantizer.")
    is_quantizer = owner in layers and name
    is_weight = key.endswith(".weight") and key.rpartition(".")[0] in layers
    if is_quantizer or is_weight:
        return False
    entry = ENTRY.fullmatch(key)
    return not entry or BitWidth.of(entry["width"]) in bit_widths


class Column:
    """A layer's weights at one bit-width: bits, levels (weights,) int64, scale and grid."""

    def __init__(self, name: str, layer: QuantizedLayer):
        self.bits = layer.bits
        if self.bits == FULL_PRECISION:
            where = "of its own" if layer.own_bits else f"in {layer.quantizer.width}"
            raise ValueError(f"layer {name} has 32 bits {where}, which a packed file, of "
                             "integers, does not hold")
        integers, scale = layer.integer_weight()
        self.scale = scale.to(torch.float32).clone()
        n = 2**self.bits - 1
        exact = integers.round()
        if not torch.equal(integers, exact):
            raise ValueError(f"layer {name} at {self.bits} bits: its quantizer's weights are not "
                             "finite integers times a scale, which is what a packed file holds")
        whole = exact.flatten().long()
        if (whole.abs() <= n).all() and ((whole + n) % 2 == 0).all():
            self.grid = (-n, 2)
        else:
            self.grid = (-2**(self.bits - 1), 1)
        self.levels = (whole - self.grid[0]) // self.grid[1]
        if self.levels.min() < 0 or self.levels.max() > n:
            raise ValueError(f"layer {name} at {self.bits} bits: its quantizer's integers, "
                             f"{whole.min()} to {whole.max()}, are not of {n + 1} levels")


def columns_of(name: str, layer: QuantizedLayer,
               stored: list[Width]) -> dict[str, Column]:
    """Return {key: Column} of a layer, one per stored bit-width, or one per number of bits."""
    per_width = has_state_per_width(layer)
    columns = {}
    for width in stored:
        layer.switch_bit_width(width.of_layer(name))
        key = str(width) if per_width else str(layer.bits)
        if key not in columns:
            columns[key] = Column(name, layer)
    return columns


def check_equals_layer(name: str, layer: QuantizedLayer, quantizer: PackedWeight, weight: Tensor,
                       stored: list[Width]) -> None:
    """Raise ValueError unless the packed weights equal the layer's own, bit for bit."""
    for width in stored:
        layer.switch_bit_width(width.of_layer(name))
        quantizer.switch(layer.bits, str(width))
        found = quantizer.integers(weight)
        if not all(map(torch.equal, found, layer.integer_weight())):
            raise ValueError(f"layer {name} at {width} bits cannot be packed: the file would not "
                             "hold its own weights")


def digest(tensors: dict[str, Tensor], about: dict) -> str:
    """Return the SHA-256 of a file's tensors and metadata, without the digest itself."""
    about = {name: value for name, value in about.items() if name != "sha256"}
    total = hashlib.sha256(json.dumps(about).encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        total.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


# ---- read

def is_packed(path: str | Path) -> bool:
    """Return whether a file begins as safetensors files do: with a length in 8 bytes, then JSON."""
    try:
        with open(path, "rb") as file:
            return file.read(9)[8:] == b"{"
    except OSError:
        return False


def read(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Return a packed file's {name: tensor} and its metadata.

    Raises FileError where the file is damaged, of another format, or not a packed one, or where a
    field of its metadata is missing or of another type.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise FileError(f"{path} is not a packed file, or cut short ({one_line(error)}): export "
                        "it anew") from None
    try:
        about = json.loads(metadata[KEY])
        version = about["format"]
        expected = about["sha256"]
    except (KeyError, ValueError, TypeError, RecursionError):
        raise FileError(f"{path} is a safetensors file of something else: give one that "
                        "export.py wrote") from None
    if version != FORMAT or type(version) is not int:
        raise FileError(f"{path} has packed format {brief(version)}, and this version of the "
                        f"project reads {FORMAT}: export the network anew")
    if digest(tensors, about) != expected or metadata.keys() != {KEY}:
        raise FileError(f"{path} is damaged: its content is not that of its SHA-256; copy or "
                        "export it anew")
    check_fields(path, about)
    return tensors, about


def is_bits(value: object) -> bool:
    """Return whether a value is a number of bits from 1 to 8."""
    return type(value) is int and 1 <= value <= 8


def is_width_list(value: object) -> bool:
    """Return whether a value is a list of bit-widths, lowest first."""
    if not isinstance(value, list):
        return False
    try:
        return [width.plain for width in sorted(highest_first(value))] == value
    except ValueError:
        return False


def is_group(value: object) -> bool:
    """Return whether a value is a dict of columns, [key, bits] each, and of names of layers."""
    if not isinstance(value, dict) or value.keys() != {"columns", "layers"}:
        return False
    columns = value["columns"]
    layers = value["layers"]
    return (isinstance(columns, list) and isinstance(layers, list) and len(columns) > 0
            and all(isinstance(name, str) for name in layers)
            and all(isinstance(column, list) and len(column) == 2 and isinstance(column[0], str)
                    and is_bits(column[1]) for column in columns)
            and len({key for key, _ in columns}) == len(columns))


FIELDS = {  # of the metadata: whether a value is one of it; the others are a checkpoint's
    "network": lambda value: isinstance(value, dict), "stored": is_width_list,
    "groups": lambda value: isinstance(value, list) and all(map(is_group, value))}


def check_fields(path: str | Path, about: dict) -> None:
    """Raise FileError naming a field of the metadata that is missing or of another type."""
    for name, is_right in FIELDS.items():
        if name not in about:
            raise FileError(f"{path} does not hold its {name!r}: export it anew")
        if not is_right(about[name]):
            raise FileError(f"{path}: its {name} is {brief(about[name])}, which it cannot be: "
                            "export it anew")


def read_checkpoint(path: str | Path) -> dict:
    """Return a packed file in the form of a checkpoint; raises FileError where it is not one."""
    tensors, about = read(path)
    return {**about, "epoch": None, "packed": {"groups": read_groups(tensors, about)},
            "state_dict": tensors}


def read_groups(tensors: dict[str, Tensor], about: dict) -> list[dict]:
    """Return a file's groups, each with its table rows, moved out of `tensors`, as `others`."""
    return [{**group, "others": tensors.pop(f"rows.{number}", None)}
            for number, group in enumerate(about["groups"])]


def install(model: nn.Module, tensors: dict[str, Tensor], groups: list[dict]) -> None:
    """Replace the weights and quantizers of a model's quantized layers by a packed file's.

    tensors: of the file. groups: from read_groups. Raises ValueError where they do not fit the
    model, or the file lacks one of its bit-widths.
    """
    bit_widths = [*bit_widths_of(model), *assignments_of(model).values()]
    layers = quantized_layers(model)
    stems = {key.rpartition(".")[0] for key in tensors if key.endswith(".running_mean")}
    tensors.update({key: torch.tensor(0) for key in model.state_dict()
                    if key.endswith(BATCH_COUNT) and key.removesuffix(BATCH_COUNT) in stems})
    for group in groups:
        bits = tuple(b for _, b in group["columns"])
        others = group["others"]
        if others is None:
            others = torch.zeros(0, len(bits), dtype=torch.uint8)
        if (others.dtype, others.shape[1:]) != (torch.uint8, (len(bits),)) or (
                others.long() >= 2**torch.tensor(bits)).any():
            raise ValueError("its rows are not of the levels of their columns")
        rows = table(others, bits)
        columns = dict(group["columns"])
        for name in group["layers"]:
            if name not in layers:
                raise ValueError(f"it has weights of {brief(name)}, which is not a quantized layer")
            layer = layers.pop(name)
            weight = tensor_of(tensors, f"{name}.weight")
            prefix = f"{name}.quantizer."
            optional = [tensors.get(prefix + part) for part in OPTIONAL]
            if (optional[1] is None) != (optional[2] is None):
                raise ValueError(f"it lacks the exceptions of {name} or their levels")
            quantizer = PackedWeight(columns, rows, tensor_of(tensors, prefix + "scale"),
                                     tensor_of(tensors, prefix + "grid"), *optional)
            quantizer.check(weight, layer.weight.shape, bits)
            if "weight" not in layer._parameters:
                raise ValueError(f"layer {name} is built with a weight that something computes, "
                                 "such as weight_norm: build it without")

            layer.weight = nn.Parameter(weight, requires_grad=False)
            layer.quantizer = quantizer
            for width in bit_widths:
                layer.switch_bit_width(width.of_layer(name))
                stored = bits[quantizer.column()]
                if stored != layer.bits:
                    raise ValueError(f"its {width}-bit weights of {name} have {stored} bits")
            layer.switch_bit_width(BitWidth(FULL_PRECISION))
    if layers:
        raise ValueError(f"it lacks the weights of {next(iter(layers))}")


def tensor_of(tensors: dict[str, Tensor], name: str) -> Tensor:
    """Return a tensor of a file; raises ValueError where it has none of that name."""
    if name not in tensors:
        raise ValueError(f"it lacks {name}")
    return tensors[name]
