"""What the fields of files may be, and the error where one is not."""
from collections.abc import Callable
from numbers import Integral, Real
from pathlib import Path

import torch

from models.bit_widths import highest_first
from utils import brief

DAMAGED = ": the file may be damaged"


class FileError(ValueError):
    """A file that is missing, damaged, or does not fit; one line, with a remedy."""


def take(path: str | Path, content: dict, name: str, is_right: Callable[[object], bool], what: str,
         of: str = "") -> object:
    """Return a field of a file's dict; raises FileError where it is missing or not right.

    what: the values that are right, for the message. of: what the dict is, before the name.
    """
    if name not in content:
        raise FileError(f"{path} lacks its {of}{name}: the file may be damaged")
    value = content[name]
    if not is_right(value):
        raise FileError(f"{path}: its {of}{name} is {brief(value)}, not {what}{DAMAGED}")
    return value


def check_field(path: str | Path, name: str, value: object, is_right: Callable[[object], bool],
                what: str) -> None:
    """Raise FileError where an optional field is neither None nor right, as `take` does."""
    if value is not None:
        take(path, {name: value}, name, is_right, what)


def is_named_values(value: object) -> bool:
    """Return whether a value is a dict with texts as keys."""
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def are_bit_widths(value: object) -> bool:
    """Return whether a value is a list of bit-widths, each once."""
    try:
        return isinstance(value, (list, tuple)) and (not value or bool(highest_first(value)))
    except ValueError:
        return False


def is_text(value: object) -> bool:
    """Return whether a value is a text."""
    return isinstance(value, str)


def are_texts(value: object) -> bool:
    """Return whether a value is a list of texts."""
    return isinstance(value, (list, tuple)) and all(map(is_text, value))


def is_dense(value: object) -> bool:
    """Return whether a value is a tensor on the CPU that holds each of its numbers."""
    return (torch.is_tensor(value) and value.layout == torch.strided
            and value.device.type == "cpu" and not value.is_quantized)


def is_whole(value: object, most: int = 2**62) -> bool:
    """Return whether a value is a whole number from 0 to `most`."""
    return type(value) is int and 0 <= value <= most


def is_count(value: object) -> bool:
    """Return whether a value is a whole number from 1 to 2^31 - 1."""
    return isinstance(value, Integral) and not isinstance(value, bool) and 0 < value < 2**31


def is_finite_number(value: object) -> bool:
    """Return whether a value is a number between -1e300 and 1e300."""
    return isinstance(value, Real) and not isinstance(value, bool) and -1e300 < value < 1e300


def check_images(images: dict, path: str | Path) -> None:
    """Raise FileError naming a field of another type in a description of images."""
    def is_three_numbers(value: object) -> bool:
        return isinstance(value, (list, tuple)) and len(value) == 3 and all(
            map(is_finite_number, value))

    def is_three_positive(value: object) -> bool:
        return is_three_numbers(value) and min(value) > 0

    for field, is_right, what in (
            ("dataset", is_text, "the name of a data set"),
            ("size", is_count, "a number of pixels"),
            ("transforms", is_text, "the names of transforms"),
            ("mean", is_three_numbers, "three numbers"),
            ("std", is_three_positive, "three numbers above 0"),
            ("class_names", are_texts, "a list of names")):
        check_field(path, f"images' {field}", images.get(field), is_right, what)


def check_images_to_save(images: dict | None, path: str | Path) -> None:
    """Raise ValueError naming a field of a description of images that could not be read again."""
    try:
        check_images(images or {}, path)
    except FileError as error:
        raise ValueError(str(error).removesuffix(DAMAGED)) from None
