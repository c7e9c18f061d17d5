"""Export of a network: files are written, compared with the network, and then published."""
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from torch import nn

from deploy import check, runtimes
from deploy.graph import Run, image_shape
from models import BitWidth, Width, assignments_of, bit_widths_of, packed
from models.assignment import is_name
from models.bit_widths import highest_first
from models.checkpoint import network_content
from models.fields import check_images_to_save
from models.losses import check_forward_loss
from utils import commit, one_line, writing

FORMATS = ("packed", "onnx")
INPUTS = ("float32", "uint8")
IMAGES = 16  # random ones, on which a file is compared where there are no others


class Exported(NamedTuple):
    """files: {bit-width: path}, several of one file. results: of the comparison, as check.row."""
    files: dict[Width, Path]
    results: check.Results


def export(model: nn.Module, path: str | Path,
           bit_widths: Iterable[Width | int | str] | Width | int | str | None = None,
           format: str = "onnx", *,
           input: str = "float32", about_images: dict | None = None,
           images: numpy.ndarray | None = None, labels: numpy.ndarray | None = None,
           arguments: dict | None = None) -> Exported:
    """Write a network to a file, or to one per bit-width, once each gives the network's logits.

    model: as models.load returns it: on the CPU, in evaluation mode, with `spec`. path: of the
    file; of several ONNX files net.onnx becomes net_1.onnx, net_2.onnx. bit_widths: one or several
    with BatchNorms in the network, or its assignments; None for all of its integer ones and all
    assignments; "any" for one file of all of them, in onnx without assignments and bit-widths such
    as w2a4, which are not one number. format: packed or onnx. input:
    "uint8" for an ONNX file whose input is images of 0 to 255, (N, H, W, 3), which it normalizes.
    about_images: their size, mean, std, and where known dataset, transforms and class_names; None
    for model.images. images, labels: normalized (N, 3, H, W) float32 and (N,) to compare on; None
    for random images. arguments: of the run, for a packed file.

    Raises ValueError where the format cannot represent the network or a file falls short of it, and
    OSError where a file exists or cannot be written. Then nothing is left behind.
    """
    path = Path(path)
    if format not in FORMATS or input not in INPUTS:
        raise ValueError(f"format {format!r} and input {input!r}: choose from {FORMATS} and "
                         f"{INPUTS}")
    if any(module.training for module in model.modules()):
        raise ValueError("the network is in training mode: call its eval() first")
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(f"{name} of the network is {tensor.dtype}, and files are of float32: "
                             "call its float() first")
    about = about_images or getattr(model, "images", None)
    if (format, input) == ("packed", "uint8"):
        raise ValueError("input 'uint8' has no format 'packed': choose onnx")
    needed = ("size", "mean", "std") if input == "uint8" else ("size",)
    if not about or not all(map(about.get, needed)):
        raise ValueError("nothing says of what images the network is: give about_images, a dict "
                         "of size, mean and std")
    if format == "packed":
        check_images_to_save(about, path)
    if images is not None:
        images = numpy.asarray(images, numpy.float32)
    is_any = isinstance(bit_widths, str) and bit_widths == "any"
    widths = exported_widths(model, bit_widths, format)
    files = file_names(path, widths, is_any or format == "packed")
    black = numpy.zeros((1, *image_shape(about["size"])), numpy.float32)
    try:
        logits, _ = check.forward(model, black, widths[0])
        check_forward_loss(model, torch.from_numpy(random_images(2, about["size"])))
    except RuntimeError as error:
        raise ValueError(f"the network does not run on images of size {about['size']} "
                         f"({one_line(error)}): give the size that it was trained on") from error
    with tempfile.TemporaryDirectory(prefix=".export_", dir=path.parent) as folder:
        written = {width: Path(folder) / file.name for width, file in files.items()}
        with writing(path):
            if format == "packed":
                write_packed(model, widths, written[widths[0]], is_any, about, arguments)
            else:
                names = about.get("class_names") or list(map(str, range(logits.shape[-1])))
                write_onnx(model, written, is_any, {**about, "class_names": names}, input)

        open_file = runtimes.packed_run if format == "packed" else runtimes.onnxruntime_run
        images, run = images_and_run(written, open_file, input, about, images)
        results = check.compare(model, run, images, labels, widths)
        missed = check.shortfall(results)
        if missed:
            raise ValueError(f"the file falls short of the network: {missed}; a layer may compute "
                             "something that this format does not hold" +
                             ("; take the packed format" if format != "packed" else ""))
        if format == "onnx" and labels is not None:
            with writing(path):
                add_accuracy(written, results)
        publish(written, files)
    return Exported(files, results)


def exported_widths(model: nn.Module,
                    wanted: Iterable[Width | int | str] | Width | int | str | None,
                    format: str) -> list[Width]:
    """Return the bit-widths to export, lowest first, and then the assignments.

    Raises ValueError where there are none, or for one that the model lacks.
    """
    if wanted is None or isinstance(wanted, str) and wanted == "any":
        is_switched = format == "onnx" and wanted == "any"
        wanted = [width for width in exportable(model) if not is_switched or is_uniform(width)]
    elif isinstance(wanted, (Width, int, str)):
        wanted = [wanted]
    names = list(dict.fromkeys(map(str, wanted)))
    present = bit_widths_of(model)
    known = assignments_of(model)
    assignments = sorted(known[name] for name in names if name in known)
    calibrate = ("calibrate first: train.py --evaluate --pretrain SOURCE {} --calibrate 20 "
                 "--save-calibrated FILE")
    unknown = [name for name in names if name not in known and is_name(name)]
    if unknown:
        raise ValueError(f"the network has no assignment {unknown[0]}, but "
                         f"{', '.join(known) or 'none'}: {calibrate.format('--layer_bits JSON')}")
    widths = [name for name in names if name not in known]
    widths = sorted(highest_first(widths)) if widths else []
    absent = ",".join(str(width) for width in widths if present and width not in present)
    if absent or not names:
        bits = calibrate.format(f"--bit_width_list {absent or '1,2,4,8'}")
        raise ValueError(f"the network has no BatchNorm for {absent or 'integer'} bits, but for "
                         f"{', '.join(map(str, [*present, *known]))}: {bits}")
    return [*widths, *assignments]


def exportable(model: nn.Module) -> list[Width]:
    """Return a model's bit-widths without full precision, lowest first, and its assignments."""
    return [*(width for width in bit_widths_of(model) if width.is_integer),
            *assignments_of(model).values()]


def is_uniform(width: Width) -> bool:
    """Return whether weights and activations have the same bits, at every layer."""
    return isinstance(width, BitWidth) and width.weights == width.activations


def file_names(path: Path, widths: list[Width], is_one: bool) -> dict[Width, Path]:
    """Return {bit-width: path of its file}; raises FileExistsError where one exists."""
    files = dict.fromkeys(widths, path)
    if len(widths) > 1 and not is_one:
        files = {width: path.with_name(f"{path.stem}_{width}{path.suffix}") for width in widths}
    check_absent(files.values())
    return files


def check_absent(files: Iterable[Path]) -> None:
    """Raise FileExistsError where a file exists."""
    for file in files:
        if file.exists():
            raise FileExistsError(f"{file} exists: remove it, or give another name")


def publish(written: dict[Width, Path], files: dict[Width, Path]) -> None:
    """Move files to their names, each whole; raises FileExistsError, and moves none, if one exists.
    """
    pairs = dict(zip(written.values(), files.values()))
    check_absent(pairs.values())
    for source, file in pairs.items():
        with open(source, "rb") as content:
            os.fsync(content.fileno())
        os.rename(source, file)


def write_packed(model: nn.Module, widths: list[Width], path: Path, is_any: bool, about: dict,
                 arguments: dict | None) -> None:
    """Write a packed file, of all of 1 to 8 bits where is_any."""
    packed.save(model, widths, path, {
        "network": network_content(model), "images": about,
        "calibrated": getattr(model, "calibrated", []), "arguments": arguments or {}},
        packed.ANY if is_any else None)


def write_onnx(model: nn.Module, written: dict[Width, Path], is_any: bool, about: dict,
               input: str) -> None:
    """Write ONNX files, with what is known of the network in their metadata."""
    from deploy import onnx_file  # its package is optional

    pixels = None
    if input == "uint8":
        pixels = about["mean"], about["std"]
    metadata = {"model": model.spec["model"] if hasattr(model, "spec") else type(model).__name__,
                "dataset": about.get("dataset") or "", "size": about["size"],
                "transforms": about.get("transforms") or "", "input": input,
                "mean": about.get("mean"), "std": about.get("std"),
                "class_names": about.get("class_names"), "commit": commit() or ""}
    for path in dict.fromkeys(written.values()):
        widths = [width for width, file in written.items() if file == path]
        more = {"bits": ",".join(map(str, widths)), **metadata}
        onnx_file.export(model, widths, path, about["size"], is_any, {
            name: value if isinstance(value, str) else json.dumps(value)
            for name, value in more.items()}, pixels)


def add_accuracy(written: dict[Width, Path], results: check.Results) -> None:
    """Add the top-1 that was found to the metadata of ONNX files."""
    from deploy import onnx_file

    for path in dict.fromkeys(written.values()):
        accuracy = {str(width): results[width]["top1"] for width, file in written.items()
                    if file == path}
        count = next(iter(results.values()))["images"]
        onnx_file.add_metadata(path, {"top1": json.dumps(accuracy), "top1_images": str(count)})


def images_and_run(written: dict[Width, Path], open_file: Callable[[Path], Run], input: str,
                   about: dict, images: numpy.ndarray | None) -> tuple[numpy.ndarray, Run]:
    """Return the images to compare on, and the files' run, which takes them.

    With uint8 input these are what remains of the images when they are rounded to 0 to 255.
    """
    runs = {path: open_file(path) for path in dict.fromkeys(written.values())}
    if images is None:
        images = random_images(IMAGES, about["size"])
    if input == "float32":
        return images, lambda batch, width: runs[written[width]](batch, width)
    images = from_pixels(to_pixels(images, about), about)
    return images, lambda batch, width: runs[written[width]](to_pixels(batch, about), width)


def random_images(count: int, size: int) -> numpy.ndarray:
    """Return normal images (count, C, size, size) float32, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, *image_shape(size), generator=generator).numpy()


def to_pixels(images: numpy.ndarray, about: dict) -> numpy.ndarray:
    """Return normalized images (N, C, H, W) as uint8 (N, H, W, C)."""
    values = images.transpose(0, 2, 3, 1) * numpy.array(about["std"]) + numpy.array(about["mean"])
    return numpy.rint(255 * values).clip(0, 255).astype(numpy.uint8)


def from_pixels(pixels: numpy.ndarray, about: dict) -> numpy.ndarray:
    """Return uint8 images (N, H, W, C) as normalized ones, (N, C, H, W) float32."""
    values = (pixels / 255 - numpy.array(about["mean"])) / numpy.array(about["std"])
    return numpy.ascontiguousarray(values.transpose(0, 3, 1, 2), numpy.float32)
