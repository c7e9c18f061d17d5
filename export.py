"""Export a run to files that leave the framework: small, in integers, at any precision.

    python export.py results/RUN --format packed --bits any --output net.safetensors --check 360
    python export.py results/RUN --format onnx --bits 1,4 --output net.onnx --benchmark
    python train.py --evaluate --pretrain net.safetensors             # evaluates a packed file
"""
if __name__ == "__main__":
    from engine.startup import prepare_process
    prepare_process()

import contextlib
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy
import torch
from torch.utils.data import Subset

from dataset.data import DATASETS, Samples, add_folder, images_of
from dataset.loader import make_loader
from deploy import check, files, runtimes
from engine import published
from engine.arguments import (FLAGS, MACHINE, OneLineParser, add_source, bit_width_list,
                              merge_args, number, path_text)
from engine.errors import UserError, run_program
from engine.resume import Checkpoint
from engine.setup import check_classes, open_data
from models.assignment import is_name
from models.bit_widths import FULL_PRECISION
from models.checkpoint import BEST, network_of
from utils import WriteError, flag_text, one_line, progress, unwinding_signals

IMAGES = 500  # for a benchmark's accuracy, without --check
CALIBRATION = 300  # training images for the runtimes' own quantization


@unwinding_signals()  # removes the temporary folder
def main(args: Namespace) -> None:
    """Export the file or files; check and benchmark them as the arguments say."""
    checkpoint = Checkpoint(published.find_checkpoint(args.source, BEST))
    model, _ = network_of(checkpoint.content, checkpoint.path)
    about = image_description(checkpoint, args.dataset)
    images = labels = None
    needs_data = bool(args.check or args.benchmark)
    if needs_data or (args.dataset or about["dataset"]) in DATASETS:  # whose row may differ now
        settings = data_settings(checkpoint, about, args.dataset, args.data_dir)
    if needs_data:
        train_set, val_set = open_data(settings, train=args.benchmark)
        check_classes(model, checkpoint.content, checkpoint.path, settings.dataset, val_set)
        images, labels = read_images(val_set, settings, args.check or IMAGES)

    with export_errors(args):
        exported = files.export(model, args.output, args.bits, args.format, input=args.input,
                                about_images=about, images=images, labels=labels,
                                arguments=run_arguments(checkpoint))
    for path in dict.fromkeys(exported.files.values()):
        print(f"{path}: {path.stat().st_size:,} bytes")
    left_out = [width for width in files.exportable(model) if width not in exported.files]
    if left_out and args.bits == "any":
        print(f"left out: {flag_text(left_out)}, as the input of one file of any bit-width is one "
              "number: export them by --bits NAME")

    stem = f"{args.output.with_suffix('')}_{args.format}"
    if args.check:
        report_check(args, stem, exported, model, about, images, labels)
    if args.benchmark:
        from deploy import benchmark

        float_network = None
        is_trained = False
        if "packed" not in checkpoint.content:
            float_network, _ = network_of(checkpoint.content, checkpoint.path, [FULL_PRECISION])
            is_trained = FULL_PRECISION not in float_network.calibrated
        calibration, _ = read_images(train_set, settings, CALIBRATION)
        benchmark.benchmark(f"{stem}_benchmark", exported.files, args.format, args.input,
                            float_network, is_trained, about, images, labels, calibration)


# ---- what is known of the network

def image_description(checkpoint: Checkpoint, dataset: str | None = None) -> dict:
    """Return a description of the network's images: the checkpoint's, or its data set's.

    dataset: one that they are of, where the checkpoint does not say it.
    """
    saved = checkpoint.images(dataset or "")
    images = {field: value for field, value in saved.items() if value is not None}
    name = images.get("dataset") or dataset or checkpoint.arguments.get("dataset")
    if not name:
        raise UserError(f"{checkpoint.path} does not say of what images its network is: give "
                        "--dataset")
    add_folder(name, images.get("size"))
    row = images_of(name) if name in DATASETS else {}  # of a loop of one's own, it may have none
    return {**row, "class_names": None, **images, "dataset": name}


def run_arguments(checkpoint: Checkpoint) -> dict:
    """Return those of a run's arguments that an evaluation takes over."""
    return {name: value for name, value in checkpoint.arguments.items()
            if name in FLAGS and FLAGS[name].evaluated and FLAGS[name].kind != MACHINE
            and name not in ("batch_size", "precision")}


@contextlib.contextmanager
def export_errors(args: Namespace) -> Iterator[None]:
    """Raise UserError where a format cannot represent the network, or its packages are missing."""
    try:
        yield
    except FileExistsError as error:
        raise UserError(f"--output: {error}") from None
    except ValueError as error:
        raise UserError(f"--format {args.format}: {one_line(error)}") from None
    except ModuleNotFoundError as error:
        raise UserError(f"--format {args.format} needs {error.name}, which is not installed: pip "
                        "install -r requirements-export.txt") from None
    except WriteError as error:
        raise UserError(str(error)) from None
    except OSError as error:
        raise UserError(f"--output {args.output} cannot be written ({error.strerror}): name a file "
                        "in a folder that exists and may be written") from None


# ---- images to compare on

def data_settings(checkpoint: Checkpoint, about: dict, dataset: str | None = None,
                  data_dir: str | None = None) -> Namespace:
    """Return the settings with which train.py would open a data set; None: the network's own.

    about: from image_description.
    """
    name = dataset or about["dataset"]
    settings = merge_args(Namespace(dataset=name, evaluate=True), {
        "train_split": checkpoint.train_split(name), "image_size": about["size"],
        "model": checkpoint.network["name"], "data_dir": data_dir})
    checkpoint.follow_normalization(settings.dataset)
    return settings


def read_images(dataset: Samples, settings: Namespace,
                count: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return normalized NumPy images (n, 3, H, W) float32 and labels (n,) of a data set.

    They are evenly spaced, as some splits are sorted by class: `count` of them, or all.
    """
    wanted = torch.linspace(0, len(dataset) - 1, min(count, len(dataset))).long().tolist()
    loader = make_loader(Subset(dataset, wanted), settings.dataset, torch.device("cpu"),
                         check.BATCH, train=False)
    with progress(loader, "reading images") as shown:
        images, labels = zip(*shown)
    return torch.cat(images).numpy(), torch.cat(labels).numpy()


def report_check(args: Namespace, stem: str, exported: files.Exported, model: torch.nn.Module,
                 about: dict, images: numpy.ndarray, labels: numpy.ndarray) -> None:
    """Write how the files compare with the network, also in OpenVINO where it is installed."""
    results = {"torch" if args.format == "packed" else "ONNX Runtime": exported.results}
    one_each = len(set(exported.files.values())) == len(exported.files)
    if args.format == "onnx" and one_each:
        with contextlib.suppress(ModuleNotFoundError):
            results["OpenVINO"] = in_openvino(args, exported, model, about, images, labels)
    check.write(f"{stem}_check", results, str(args.output))
    for name, found in results.items():
        missed = check.shortfall(found)
        if missed:
            print(f"on this CPU the files fall short of the network in {name}: {missed} (8 bits "
                  "need a CPU with VNNI there, see docs/deploy.md)")
        else:
            agreed = sum(round(values["agree"] * values["images"] / 100)
                         for values in found.values())
            total = sum(values["images"] for values in found.values())
            print(f"check passed in {name}: {agreed} of {total} predictions agree")


def in_openvino(args: Namespace, exported: files.Exported, model: torch.nn.Module, about: dict,
                images: numpy.ndarray, labels: numpy.ndarray) -> check.Results:
    """Return how ONNX files compare with the network in OpenVINO."""
    images, run = files.images_and_run(exported.files, runtimes.openvino_run, args.input, about,
                                       images)
    return check.compare(model, run, images, labels, list(exported.files))


def parse_args(argv: list[str] | None = None) -> Namespace:
    """Parse the command line."""
    parser = OneLineParser(__doc__.splitlines()[0])
    add = parser.add_argument
    add_source(parser, "check")
    add("--format", choices=files.FORMATS, required=True, help="packed: for this project, bit for "
        "bit; onnx: for ONNX Runtime, OpenVINO and others")
    add("--bits", type=bits_or_any, metavar="K,...", help="bit-widths of 1 to 8, and names of "
        "assignments; or any: one file that switches; default: the network's bit-widths of 1 to 8, "
        "and its assignments")
    add("--output", type=path_text, required=True, metavar="FILE", help="onnx writes a file for "
        "each bit-width: of net.onnx net_1.onnx, net_4.onnx")
    add("--input", choices=files.INPUTS, default="float32", help="float32: normalized images (N, "
        "3, H, W); uint8: images as they are (N, H, W, 3), which an ONNX file normalizes")
    add("--check", type=number(int, 1), metavar="N", help="compare with the network on N images of "
        "the validation split, not on 16 random ones; exit code 1, and no file, if it falls short, "
        "in ONNX Runtime if it is of onnx; how it does in OpenVINO is only reported")
    add("--benchmark", action="store_true", help="also measure speed and accuracy against "
        "float32 and the int8 that the runtimes' own tools make of it after training")
    args = parser.parse_args(argv)
    args.output = Path(args.output)
    if args.output.is_dir() or not args.output.name:
        parser.error(f"--output {args.output} is a folder: name a file in it")
    try:
        str(args.output).encode()
    except UnicodeEncodeError:
        parser.error(f"--output {args.output} is not UTF-8, as the formats' libraries need it: "
                     "give another name, or go into that folder first")
    if args.input == "uint8" and args.format == "packed":
        parser.error("--input uint8 has no --format packed: choose onnx")
    return args


def bits_or_any(text: str) -> list[int | str] | str:
    """Parse --bits; names of assignments come last."""
    if text == "any":
        return text
    parts = [part.strip() for part in text.split(",")]
    names = list(dict.fromkeys(filter(is_name, parts)))
    rest = [part for part in parts if part not in names]
    return [*(bit_width_list(",".join(rest)) if rest else []), *names]


if __name__ == "__main__":
    run_program(main, parse_args)
