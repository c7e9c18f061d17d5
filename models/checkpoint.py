"""A network from a file: a checkpoint of this project, a published one, or a packed file.

A checkpoint is a dict. Besides `state_dict` it holds `network`, the arguments that build its
network: model, width, classes, all_conv, quantizer, bit_widths, keep; and `images`, a description
of the images that it was trained on: dataset, size, mean, std, class_names (or None). Older and
published checkpoints lack both: what is missing is inferred from the shapes of their weights.
"""
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

from models import (DEFAULT_WIDTH, MODELS, QUANTIZERS, BitWidth, add_missing_bit_widths, build,
                    packed, saved_bit_widths, set_bit_width, zoo)
from models.bit_widths import FULL_PRECISION
from models.converted import CLASSIFIER

# NumPy numbers, such as best_prec1 may be, are data; by their names in NumPy 1 and NumPy 2.
SCALAR = numpy.float64(0).__reduce__()[0]
NUMPY_NUMBERS = [
    (SCALAR, "numpy.core.multiarray.scalar"), (SCALAR, "numpy._core.multiarray.scalar"),
    numpy.dtype, numpy.dtypes.Float64DType, numpy.dtypes.Float32DType, numpy.dtypes.Int64DType]
BEST = "model_best.pth.tar"
LATEST = "model_latest.pth.tar"


class FileError(ValueError):
    """A file that is missing, damaged, or does not fit; one line, with a remedy."""


def load(path: str | Path, bit_widths: Iterable[BitWidth | int | str] | None = None) -> nn.Module:
    """Load a network from a file, in evaluation mode, at its highest bit-width.

    path: a checkpoint, a packed file, or a results folder, whose best checkpoint is loaded.
    bit_widths: of the network; None: those of the file. One that the file lacks is a copy of the
    nearest. The network's attribute `images` describes its images, and `calibrated` lists the
    bit-widths that were not trained. Raises FileError where the file is missing, damaged, or does
    not fit its network.
    """
    path = find_file(path, BEST)
    content = read_checkpoint(path)
    model, _ = network_of(content, path, bit_widths)
    return model


def find_file(path: str | Path, *names: str) -> Path:
    """Return the file, or the first of `names` in a folder or its ckpt/; raises FileError."""
    path = Path(path)
    if path.is_dir():
        for candidate in (path / place / name for name in names for place in ("ckpt", "")):
            if candidate.is_file():
                return candidate
        raise FileError(f"{path} holds no checkpoint: looked there and in its ckpt/ for "
                        f"{', '.join(names)}")
    if not path.exists():
        raise FileError(f"checkpoint {path} does not exist: give a file or a results folder")
    return path


def read_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint or a packed file onto the CPU, as data alone: code in it is refused.

    Returns its dict, with DataParallel's prefix removed from the keys. Raises FileError where it
    cannot be read.
    """
    if Path(path).exists() and not Path(path).is_file():  # reading a pipe could last for ever
        raise FileError(f"{path} is no file but a folder, a pipe or a device: give a checkpoint")
    if packed.is_packed(path):
        try:
            return packed.read_checkpoint(path)
        except ValueError as error:
            raise FileError(str(error)) from None
    check_archive(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(NUMPY_NUMBERS):
            warnings.simplefilter("ignore")  # torch warns of unusual files, not of unsafe ones
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's own text would advise to run the file's code
        raise FileError(f"{path} is not a checkpoint that can be read safely "
                        f"({type(error).__name__}): it is cut short, not a checkpoint, or holds "
                        "code") from None
    if isinstance(content, dict) and content and all(map(torch.is_tensor, content.values())):
        content = {"state_dict": content}  # as torchvision saves it
    weights = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(key, str) for key in weights):
        raise FileError(f"{path} is not a checkpoint of this kind: it must be a dict with a "
                        "state_dict")
    for field in ("arguments", "network", "images"):
        if not isinstance(content.get(field), (dict, type(None))):
            raise FileError(f"{path}: its {field} are {content[field]!r}, which is no dict: it may "
                            "be damaged")
    content["state_dict"] = {key.removeprefix("module."): value for key, value in weights.items()}
    return content


def check_archive(path: str | Path) -> None:
    """Raise FileError where an entry of a zip file, as torch writes, lacks its own CRC-32."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError,
            struct.error, UnicodeDecodeError) as error:
        damaged = f"its archive ({type(error).__name__})"
    if damaged:
        raise FileError(f"{path} is damaged: {damaged} does not have its CRC-32: copy or download "
                        "it again")


def check_finite(state_dict: dict[str, Tensor], path: str | Path) -> None:
    """Raise FileError naming the first entry with values that are not finite."""
    for key, value in state_dict.items():
        if torch.is_tensor(value) and value.is_floating_point():
            count = int((~value.isfinite()).sum())
            if count:
                raise FileError(f"{path}: {key} has {count} values that are not finite: it is "
                                "damaged, or of a run that diverged; take an earlier checkpoint")


def network_of(content: dict, path: str | Path,
               bit_widths: Iterable[BitWidth | int | str] | None = None,
               ) -> tuple[nn.Module, dict[BitWidth, BitWidth]]:
    """Build the network of a dict that read_checkpoint returned, and load its weights.

    Returns the network and {added bit-width: the one that it copies}. Raises FileError, naming
    `path`, where the content does not fit.
    """
    spec = network_spec(content, path)
    bit_widths = spec.pop("bit_widths") if bit_widths is None else bit_widths
    spec.pop("bit_widths", None)
    model = build(**spec, bit_widths=bit_widths)

    state_dict = content["state_dict"]
    if "packed" in content:
        try:
            packed.install(model, state_dict, **content["packed"])
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise FileError(f"{path} does not fit the networks of this project ({reason}): export "
                            "it anew") from None
    state_dict, added = add_missing_bit_widths(state_dict, model)
    load_weights(model, state_dict, path)
    set_bit_width(model, max(map(BitWidth.of, bit_widths)))
    model.images = content.get("images")
    model.calibrated = content.get("calibrated", [])
    return model.eval(), added


def network_spec(content: dict, path: str | Path) -> dict:
    """Return the arguments of models.build for a checkpoint's network.

    Raises FileError for a value of another type, or where the network cannot be inferred.
    """
    state_dict = content["state_dict"]
    saved = content.get("network") or old_spec(content, path)
    spec = {"name": check_model(saved.get("model"), path), "num_classes": saved.get("classes"),
            "width": saved.get("width"), "all_conv": saved.get("all_conv", False),
            "quantizer": saved.get("quantizer", "dorefa"), "keep": saved.get("keep", [])}
    fits = {"num_classes": is_count, "width": is_count,
            "all_conv": lambda value: isinstance(value, bool),
            "quantizer": lambda value: isinstance(value, str) and value in QUANTIZERS,
            "keep": lambda value: isinstance(value, list) and all(
                isinstance(name, str) for name in value)}
    for field, is_right in fits.items():
        if not is_right(spec[field]):
            raise FileError(f"{path}: its network's {field} is {spec[field]!r}, which is none: it "
                            "may be damaged")
    try:
        spec["bit_widths"] = saved_bit_widths(state_dict)
    except ValueError as error:
        raise FileError(f"{path}: {error}") from None
    if not spec["bit_widths"]:
        raise FileError(f"{path} does not fit the model: it has BatchNorms for no bit-width")
    return spec


def is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def check_model(name: object, path: str | Path) -> str:
    """Return the name of a checkpoint's model; FileError where there is none of it."""
    if not isinstance(name, str) or not (name in MODELS or zoo.is_torchvision(name)):
        raise FileError(f"{path} is of model {name!r}: choose a checkpoint of {', '.join(MODELS)}")
    if name in MODELS:
        return name
    try:
        return zoo.check_name(name)
    except ValueError as error:
        raise FileError(f"{path}: {error}") from None


def old_spec(content: dict, path: str | Path, given: dict | None = None) -> dict:
    """Return the spec of a checkpoint that does not hold one: by its arguments, and by shapes.

    given: model, all_conv and quantizer, of a checkpoint that has no arguments either.
    """
    arguments = content.get("arguments") or given or {}
    name = check_model(content.get("model") or arguments.get("model"), path)
    spec = {"model": name, "all_conv": arguments.get("all_conv", False),
            "quantizer": arguments.get("quantizer", "dorefa"), "width": arguments.get("width")}
    state_dict = content["state_dict"]
    if name in MODELS:
        with torch.device("meta"):
            smallest = MODELS[name]([FULL_PRECISION], 1, 1, False)
        key = next(iter(smallest.state_dict()))
        if spec["width"] is None and key in state_dict:
            spec["width"] = first_size(state_dict[key]) // len(smallest.state_dict()[key])
        last = [key for key in smallest.state_dict() if key.endswith("weight")][-1]
    else:
        spec["width"] = 1
        layers = build(name, [FULL_PRECISION], 2).layers
        last = next(f"network.{layer.name}.weight" for layer in layers
                    if layer.why == CLASSIFIER)
    spec["width"] = spec["width"] or DEFAULT_WIDTH.get(name, 1)
    if last not in state_dict:
        raise FileError(f"{path} does not fit the model: it has no classifier ({last})")
    spec["classes"] = first_size(state_dict[last])
    return spec


def first_size(value: object) -> int:
    """Return the first dimension of a tensor; 0 of what has none."""
    return len(value) if torch.is_tensor(value) and value.ndim else 0


def load_weights(model: nn.Module, state_dict: dict[str, Tensor], path: str | Path) -> None:
    """Load a state dict; raises FileError naming missing, unexpected and mis-shaped entries."""
    own = model.state_dict()
    problems = {"missing": sorted(own.keys() - state_dict.keys()),
                "unexpected": sorted(state_dict.keys() - own.keys()),
                "of another shape": sorted(
                    key for key in own.keys() & state_dict.keys()
                    if own[key].shape != getattr(state_dict[key], "shape", None))}
    if any(problems.values()):
        found = "; ".join(f"{len(keys)} {what} ({', '.join(keys[:3] + ['...'] * (len(keys) > 3))})"
                          for what, keys in problems.items() if keys)
        raise FileError(f"{path} does not fit the model: {found}; check --model, --width, "
                        "--quantizer, --bit_width_list and, by its classes, --dataset")

    check_finite(state_dict, path)
    model.load_state_dict(state_dict)
