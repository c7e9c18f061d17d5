"""Export a run to a file that leaves the framework: small, in integers, at any precision.

    python export.py results/RUN --format packed --bits any --output net.safetensors --check 360
    python export.py results/RUN --format onnx --bits any --output net.onnx
    python export.py results/RUN --format openvino --bits 1,4 --output net.xml --benchmark
    python train.py --evaluate --pretrain net.safetensors             # evaluates a packed file
"""
if __name__ == "__main__":
    from engine.startup import prepare_process
    prepare_process()

import contextlib
import os
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from dataset.data import DATASETS
from deploy.graph import NESTED, Run
from engine import published
from engine.arguments import (FLAGS, MACHINE, OneLineParser, bit_width_list, merge_args, number,
                              path_text)
from engine.errors import UserError, run_program
from engine.resume import Checkpoint
from models import packed, saved_bit_widths
from models.bit_widths import FULL_PRECISION, BitWidth, check_bit_widths
from models.checkpoint import BEST, network_of
from utils import flag_text, one_line, printable
from utils import writing as writing_file

FORMATS = ("packed", "onnx", "openvino")
LAYER_IMAGES = 8  # from which --check computes the inputs of single layers
IMAGES = 500  # for a benchmark's accuracy, without --check


def main(args: Namespace) -> None:
    """Export the file or files; check and benchmark them as the arguments say."""
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(writing(args.output))
        checkpoint = Checkpoint(published.find_checkpoint(args.source, BEST))
        bit_widths = chosen_bit_widths(args, checkpoint)
        model, _ = network_of(checkpoint.content, checkpoint.path)
        images = image_metadata(args, checkpoint)
        with format_errors(args.format):
            with writing_file(args.output):
                files = write(args, checkpoint, model, images, bit_widths, place)
            from deploy import check

            run = runner(args.format, {bits: place / name for bits, name in files.items()})
            check.check_logits(model, run, list(files), images["size"])
        publish(files, place, args.output.parent)

    files = {bits: args.output.parent / name for bits, name in files.items()}
    for path in dict.fromkeys(files.values()):
        print(f"{path}: {size_of(path):,} bytes")
    if args.check or args.benchmark:
        measure(args, images, checkpoint, model, files)


def image_metadata(args: Namespace, checkpoint: Checkpoint) -> dict:
    """Return a description of the network's images: the checkpoint's, or its data set's."""
    images = dict(checkpoint.content.get("images") or {})
    name = args.dataset or images.get("dataset") or checkpoint.arguments.get("dataset")
    row = DATASETS.get(name)
    if args.dataset or not images.get("size"):
        images.update(size=row.image_size, mean=list(row.mean), std=list(row.std))
    return {**images, "dataset": name}


def chosen_bit_widths(args: Namespace, checkpoint: Checkpoint) -> list[BitWidth]:
    """Return the bit-widths to export; raises UserError for one without a BatchNorm."""
    present = saved_bit_widths(checkpoint.content["state_dict"])
    integer = [bits for bits in present if FULL_PRECISION not in (bits.weights, bits.activations)]
    if args.format == "onnx" and args.bits == "any":  # computed from 8-bit weights
        left_out = [bits for bits in integer if bits not in NESTED]
        integer = [bits for bits in integer if bits in NESTED]
        if integer and left_out:
            print(f"left out: {flag_text(left_out)} bits, which do not follow from 8-bit weights")
    if args.bits in (None, "any"):
        if not integer:
            raise UserError(f"{args.source} has BatchNorms for {flag_text(present)} bits alone: "
                            f"{how_to('1,2,4,8', args)}")
        return integer

    wanted = sorted(check_bit_widths(args.bits))
    absent = flag_text([bits for bits in wanted if bits not in present])
    if absent:
        raise UserError(f"{args.source} has no BatchNorm for {absent} bits, but for "
                        f"{flag_text(present)}: choose from these, or {how_to(absent, args)}")
    return wanted


def how_to(bits: str, args: Namespace) -> str:
    """Return the command that calibrates bit-widths."""
    return (f"calibrate first: python train.py --evaluate --pretrain {args.source} "
            f"--bit_width_list {bits} --calibrate 20 --save-calibrated FILE")


# ---- files

@contextlib.contextmanager
def writing(output: Path) -> Iterator[Path]:
    """Yield a temporary folder beside the output; raises UserError where it cannot be created."""
    if output.exists():
        raise UserError(f"--output {output} exists: remove it, or give another name")
    try:
        place = tempfile.TemporaryDirectory(prefix=".export_", dir=output.parent)
    except OSError as error:
        raise UserError(f"--output {output} cannot be written ({error.strerror}): name a file in a "
                        "folder that exists and may be written") from None
    with place:
        yield Path(place.name)


def publish(files: dict[BitWidth, str], place: Path, folder: Path) -> None:
    """Move all files from `place` to `folder`; raises UserError, and moves none, if one exists."""
    names = sorted(path.name for path in place.iterdir())
    for name in names:
        if (folder / name).exists():
            raise UserError(f"{folder / name} exists: remove it, or give another --output")
    for name in names:
        with open(place / name, "rb") as file:
            os.fsync(file.fileno())
        os.rename(place / name, folder / name)


@contextlib.contextmanager
def format_errors(form: str) -> Iterator[None]:
    """Raise UserError where a format cannot represent the network, or its packages are missing."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"--format {form}: {one_line(error)}") from None
    except ModuleNotFoundError as error:
        raise UserError(f"--format {form} needs {error.name}, which is not installed: pip install "
                        "-r requirements-export.txt") from None


def write(args: Namespace, checkpoint: Checkpoint, model: nn.Module, images: dict,
          bit_widths: list[BitWidth], place: Path) -> dict[BitWidth, str]:
    """Write the files into a folder; return {bit-width: file name}."""
    whole = args.output.name
    image_size = images["size"]
    if args.format == "packed":
        stored = packed.ANY if args.bits == "any" else bit_widths
        packed.save(model, bit_widths, place / whole, export_metadata(checkpoint, model, images),
                    stored)
        return dict.fromkeys(bit_widths, whole)

    files = exporter(args.format)
    if args.bits == "any":
        files.export(model, bit_widths, place / whole, image_size, any_width=True)
        return dict.fromkeys(bit_widths, whole)

    several = len(bit_widths) > 1
    names = {bits: f"{args.output.stem}_{bits}{args.output.suffix}" if several else whole
             for bits in bit_widths}
    for bits, name in names.items():
        if (args.output.parent / name).exists():
            raise UserError(f"{args.output.parent / name} exists: give another --output")
        files.export(model, [bits], place / name, image_size)
    return names


def exporter(form: str) -> ModuleType:
    """Import and return the module of a format, whose packages are optional."""
    if form == "onnx":
        from deploy import onnx_file
        return onnx_file
    from deploy import openvino_file
    return openvino_file


def export_metadata(checkpoint: Checkpoint, model: nn.Module, images: dict) -> dict:
    """Return a packed file's metadata: what builds the network, its images, its arguments."""
    arguments = {name: value for name, value in checkpoint.arguments.items()
                 if name in FLAGS and FLAGS[name].evaluated and FLAGS[name].kind != MACHINE
                 and name not in ("batch_size", "precision")}
    spec = {name: value for name, value in model.spec.items() if name != "bit_widths"}
    return {**spec, "image_size": images["size"], "mean": images["mean"], "std": images["std"],
            "class_names": images.get("class_names"),
            "arguments": {**arguments, "dataset": images["dataset"]}}


def size_of(path: Path) -> int:
    """Return the bytes of an exported file, including OpenVINO's .bin."""
    parts = [path, path.with_suffix(".bin")]
    return sum(part.stat().st_size for part in parts if part.exists())


# ---- check and benchmark

def runner(form: str, files: dict[BitWidth, Path], **options: torch.memory_format) -> Run:
    """Return run(images, bits) of exported files, given {bit-width: path}."""
    load = partial(packed.load_runner, **options) if form == "packed" else exporter(form).load
    runs = {path: load(path) for path in dict.fromkeys(files.values())}
    return lambda images, bits: runs[files[bits]](images, bits)


def measure(args: Namespace, images: dict, checkpoint: Checkpoint, model: nn.Module,
            files: dict[BitWidth, Path]) -> None:
    """Check and benchmark the files; raises UserError where the check finds a shortfall."""
    from deploy import check
    from deploy.layers import compare_layers

    with format_errors(args.format):
        run = runner(args.format, files)
    settings = merge_args(Namespace(dataset=images["dataset"], evaluate=True),
                          {"train_split": checkpoint.arguments.get("train_split"),
                           "model": model.spec["model"], "data_dir": args.data_dir})
    batch, labels = check.read_images(settings, args.check or IMAGES)
    results = check.compare(model, run, batch, labels, list(files))

    stem = f"{args.output.with_suffix('')}_{args.format}"
    if args.check:
        if args.format != "packed":  # its layers are the network's own
            for bits in set(files) - {BitWidth(FULL_PRECISION)}:
                results[bits].update(compare_layers(
                    model, exporter(args.format), batch[:LAYER_IMAGES], bits))
        check.write(f"{stem}_check", results, str(args.output), args.format)
    if args.benchmark:
        from deploy import benchmark

        float_network = None
        if "packed" not in checkpoint.content:
            float_network, _ = network_of(checkpoint.content, checkpoint.path,
                                          {*files, BitWidth(FULL_PRECISION)})
        if args.format == "packed":
            run = runner(args.format, files, memory_format=torch.channels_last)  # faster
        sizes = {bits: size_of(path) for bits, path in files.items()}
        benchmark.benchmark(f"{stem}_benchmark", model, run, batch, sizes, results,
                            benchmark.float_runner(float_network, batch.shape[-1]))

    shortfall = check.falls_short(results)
    if args.check and shortfall:
        raise UserError(f"{args.output} is written but falls short of the network: {shortfall}")


def parse_args(argv: list[str] | None = None) -> Namespace:
    """Parse the command line."""
    parser = OneLineParser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("source", type=path_text, metavar="SOURCE", help="a results folder, a checkpoint, a packed "
        "file, a URL, or a published name, as --pretrain of train.py")
    add("--format", choices=FORMATS, required=True, help="packed: for this project, bit for bit; "
        "onnx: for ONNX Runtime; openvino: for x86 CPUs")
    add("--bits", type=bits_or_any, metavar="K,...", help="bit-widths of 1 to 8, or any: one file "
        "that switches; default: all that the network has")
    add("--output", type=path_text, required=True, metavar="FILE", help="with several bit-widths, "
        "onnx and openvino write a file each: net.onnx is net_4.onnx")
    add("--check", type=number(int, 1), metavar="N", help="compare with the network on N images of "
        "the validation split; exit code 1 where it falls short")
    add("--benchmark", action="store_true", help="measure against torch and ONNX Runtime's "
        "float32, on one thread")
    add("--dataset", choices=DATASETS, metavar="NAME", help="data set to check on; "
        "default: that of the checkpoint")
    add("--data-dir", type=path_text,
        help="folder that holds the data sets' folders; default: data")
    args = parser.parse_args(argv)
    args.output = Path(args.output)
    if args.bits == "any" and args.format == "openvino":
        parser.error("--bits any has no --format openvino: choose packed or onnx, or list "
                     "bit-widths for a file each")
    if str(args.output) != printable(str(args.output)):
        parser.error(f"--output {args.output} is not UTF-8, as the formats' libraries need it: "
                     "give another name, or go into that folder first")
    if args.format == "openvino" and args.output.suffix != ".xml":
        parser.error(f"--output {args.output} must end in .xml; its weights go to .bin beside it")
    return args


def bits_or_any(text: str) -> list[int | str] | str:
    """Parse --bits."""
    return text if text == "any" else bit_width_list(text)


if __name__ == "__main__":
    run_program(main, parse_args)
