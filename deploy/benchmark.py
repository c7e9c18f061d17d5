"""Measure exported files against what else an engineer would run: float32, and int8 by a tool."""
import contextlib
import copy
import functools
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from torch import Tensor, nn

from deploy import files, onnx_file, runtimes
from engine.device import describe
from engine.figures import legend_beside, new_figure, save_figure
from models import load, set_bit_width
from models.bit_widths import FULL_PRECISION, BitWidth
from utils import WriteError, markdown_table, one_line, write_json, write_text

REPEATS = {1: 30, 8: 15, 64: 5}  # {batch size: calls of each candidate, taking turns}
WARM_UP = 2  # calls that are not counted
BATCH = 64  # of the accuracy


class Candidate(NamedTuple):
    """One way to run the network. make: number of threads -> run(images (n, 3, H, W)) -> logits.

    top1_holds: whether its accuracy means anything, as that of an untrained bit-width does not.
    """
    name: str
    bits: str
    bytes: int
    make: Callable[[int], Callable[[numpy.ndarray], numpy.ndarray]]
    top1_holds: bool = True


def benchmark(stem: str, exported: dict[BitWidth, Path], format: str, input: str,
              float_network: nn.Module | None, is_trained: bool, about: dict,
              images: numpy.ndarray, labels: numpy.ndarray, calibration: numpy.ndarray) -> None:
    """Measure all candidates in turn; write a table, JSON, and accuracy against latency.

    stem: path of the files to write, without suffix. exported: {bit-width: file}, of this format
    and input. float_network: with a 32-bit BatchNorm, and whether that was trained; None where
    there are no float weights. about: of the images. images, labels: for top-1. calibration:
    training images for the tools.
    """
    all_threads = torch.get_num_threads()
    candidates = exported_candidates(exported, format, about, input)
    notes = []
    with tempfile.TemporaryDirectory() as folder:
        if float_network is None:
            notes.append("float32 and int8 by a tool are missing: a packed file has no float "
                         "weights")
        else:
            more, notes = float_candidates(float_network, is_trained, about, calibration,
                                           Path(folder))
            candidates += more
        rows = [{"name": each.name, "bits": each.bits, "bytes": each.bytes,
                 "top1": top1(each, images, labels)} for each in candidates]
        for threads in dict.fromkeys((1, all_threads)):
            for size in REPEATS:
                batch = numpy.resize(images, (size, *images.shape[1:]))
                times = measure([each.make(threads) for each in candidates], batch, threads)
                for row, milliseconds in zip(rows, times):
                    row[f"{threads} thread{'s' * (threads > 1)}, batch {size}"] = milliseconds
    torch.set_num_threads(all_threads)
    notes.insert(0, f"{describe(torch.device('cpu'))}, Python {platform.python_version()}, torch "
                 f"{torch.__version__}{versions()}; medians in turn, milliseconds a batch; one "
                 f"thread by CPU time, several by the clock; top-1 on {len(labels)} images")
    text = f"{table(rows)}\n{'; '.join(notes)}\n"
    write_text(f"{stem}.md", text)
    write_json(f"{stem}.json", {"rows": rows, "measured": notes})
    draw(f"{stem}.png", rows)
    print(f"{text}\nwritten to {stem}.md, {stem}.json and {stem}.png")


# ---- candidates

def exported_candidates(exported: dict[BitWidth, Path], format: str, about: dict,
                        input: str) -> list[Candidate]:
    """Return the candidates that run the exported files."""
    if format == "packed":
        return [Candidate("packed file, torch", str(bits), path.stat().st_size,
                          functools.partial(torch_call, load(path), bits))
                for bits, path in exported.items()]
    openers = {"file, ONNX Runtime": runtimes.onnxruntime_run}
    one_each = len(set(exported.values())) == len(exported)
    if one_each and find_spec("openvino"):
        openers["file, OpenVINO"] = runtimes.openvino_run
    return [Candidate(name, str(bits), path.stat().st_size, functools.partial(
        file_run, opener, path, bits, about if input == "uint8" else None))
        for name, opener in openers.items() for bits, path in exported.items()]


def file_run(opener: Callable, path: Path, bits: BitWidth | int, pixels: dict | None,
             threads: int) -> Callable[[numpy.ndarray], numpy.ndarray]:
    """Return a file's run at one bit-width; pixels: description of images that become uint8."""
    run = opener(path, threads)
    if pixels:
        return lambda batch: run(files.to_pixels(batch, pixels), bits)
    return lambda batch: run(batch, bits)


def float_candidates(network: nn.Module, trained: bool, about: dict, calibration: numpy.ndarray,
                     folder: Path) -> tuple[list[Candidate], list[str]]:
    """Return the candidates that a network at 32 bits makes, and notes on those that are missing.

    They are it in float32, and int8 as ONNX Runtime and NNCF quantize it after training.
    """
    notes = []
    if not trained:
        notes.append("the network was not trained at 32 bits: no top-1 of what is made of them")
    set_bit_width(network, FULL_PRECISION)
    size = sum(part.numel() * part.element_size() for part in network.parameters())
    candidates = [Candidate("torch float32", "32", size, lambda threads: torch_call(
        network, BitWidth(FULL_PRECISION), threads), trained)]
    path = folder / "float.onnx"
    try:
        onnx_file.export(network, [FULL_PRECISION], path, about["size"])
    except ValueError as error:
        return candidates, [*notes, f"ONNX has no such network ({one_line(error)})"]
    makers = {"ONNX Runtime float32": ("32", None, runtimes.onnxruntime_run),
              "ONNX Runtime int8 by quantize_static": (
                  "8" if has_vnni() else "w7a8", quantize_static, runtimes.onnxruntime_run),
              "OpenVINO float32": ("32", None, runtimes.openvino_run),
              "OpenVINO int8 by NNCF": ("8", quantize_by_nncf, runtimes.openvino_run)}
    for name, (bits, quantize, opener) in makers.items():
        try:
            file = quantize(path, calibration, folder) if quantize else path
            opener(file)
        except ModuleNotFoundError as error:
            notes.append(f"without {name}: {error.name} is not installed")
            continue
        bytes_of = sum(part.stat().st_size for part in {file, file.with_suffix(".bin")}
                       if part.exists())
        candidates.append(Candidate(name, bits, bytes_of, functools.partial(
            file_run, opener, file, FULL_PRECISION, None), trained))
    return candidates, notes


def quantize_static(path: Path, calibration: numpy.ndarray, folder: Path) -> Path:
    """Quantize a float ONNX file by ONNX Runtime's own tool, per channel; return the int8 file.

    On CPUs without VNNI it takes 7 bits for weights, as its documentation advises.
    """
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.batches = iter(numpy.array_split(calibration, max(1, len(calibration) // 32)))

        def get_next(self):
            batch = next(self.batches, None)
            return None if batch is None else {"images": batch}

    output = folder / "static.onnx"
    prepared = folder / "prepared.onnx"
    quantization.quant_pre_process(str(path), str(prepared), skip_symbolic_shape=True)
    quantization.quantize_static(str(prepared), str(output), Reader(), per_channel=True,
                                 reduce_range=not has_vnni())
    return output


def quantize_by_nncf(path: Path, calibration: numpy.ndarray, folder: Path,
                     in_float: Sequence[str] = ()) -> Path:
    """Quantize a float ONNX file for OpenVINO by NNCF, with its defaults; return the int8 file.

    in_float: names of nodes that stay in float32. OpenVINO reads a node that adds a bias as two,
    NODE/WithoutBiases and NODE.
    """
    import nncf
    import openvino

    nncf.set_log_level("ERROR")
    data = nncf.Dataset([image[None] for image in calibration])
    content = nncf.quantize(runtimes.openvino_core().read_model(path), data,
                            subset_size=len(calibration),
                            ignored_scope=nncf.IgnoredScope(
                                patterns=[f"{re.escape(node)}(/.*)?$" for node in in_float]))
    output = folder / "nncf.xml"
    try:
        openvino.save_model(content, output, compress_to_fp16=False)
    except RuntimeError as error:
        raise WriteError(output, error) from None
    return output


def torch_call(model: nn.Module, bits: BitWidth,
               threads: int) -> Callable[[numpy.ndarray], numpy.ndarray]:
    """Return a function that calls a copy of the network, in the faster memory format."""
    models = [copy.deepcopy(model).to(memory_format=layout)
              for layout in (torch.contiguous_format, torch.channels_last)]
    for each in models:
        set_bit_width(each, bits)
    fastest = {}  # {batch size: network}

    @torch.no_grad()
    def call(each: nn.Module, batch: numpy.ndarray) -> Tensor:
        return each(torch.from_numpy(batch))

    def run(batch):
        torch.set_num_threads(threads)
        if len(batch) not in fastest:
            fastest[len(batch)] = min(models, key=lambda each: seconds_of(
                functools.partial(call, each), batch, threads))
        return call(fastest[len(batch)], batch).numpy()
    return run


def has_vnni() -> bool:
    """Return whether this CPU says that it has VNNI, which sums products of int8 in int32."""
    return "vnni" in Path("/proc/cpuinfo").read_text()


def versions() -> str:
    """Return the versions of the runtimes and tools that are installed."""
    found = []
    for name in ("onnxruntime", "openvino", "nncf"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f", {name} {version(name)}")
    return "".join(found)


# ---- figures

def top1(candidate: Candidate, images: numpy.ndarray, labels: numpy.ndarray) -> float | None:
    """Return top-1 in %, or None where it would mean nothing."""
    if not candidate.top1_holds:
        return None
    run = candidate.make(1)
    answers = [run(images[start:start + BATCH]).argmax(1)
               for start in range(0, len(images), BATCH)]
    return 100 * float((numpy.concatenate(answers) == labels).mean())


def measure(runs: list[Callable], batch: numpy.ndarray, threads: int) -> list[float]:
    """Return the median milliseconds of each run, which take turns."""
    seconds = [[seconds_of(run, batch, threads) for run in runs]
               for _ in range(REPEATS.get(len(batch), 1) + WARM_UP)]
    return [1e3 * statistics.median(times[WARM_UP:]) for times in zip(*seconds)]


def seconds_of(run: Callable, batch: numpy.ndarray, threads: int) -> float:
    """Return a call's seconds: of the process's CPU on one thread, else by the clock."""
    clock = time.process_time if threads == 1 else time.perf_counter
    began = clock()
    run(batch)
    return clock() - began


def table(rows: list[dict]) -> str:
    """Return a Markdown table with a row for each candidate."""
    times = [name for name in rows[0] if "batch" in name]
    lines = []
    for row in rows:
        accuracy = "" if row["top1"] is None else f"{row['top1']:.2f}"
        lines.append([row["name"], row["bits"], f"{row['bytes']:,}", accuracy,
                      *(f"{row[name]:.2f}" for name in times)])
    return markdown_table(["", "bits", "bytes", "top-1 (%)", *times], lines) + "\n"


def draw(path: str, rows: list[dict]) -> None:
    """Save a PNG of top-1 against the latency of one image on one thread, a color for each way."""
    figure, (axis,) = new_figure(1, "accuracy against latency, batch 1, one thread")
    figure.set_size_inches(10, 5)
    column = next(name for name in rows[0] if "batch" in name)
    for name in dict.fromkeys(row["name"] for row in rows):
        points = [row for row in rows if row["name"] == name and row["top1"] is not None]
        axis.plot([row[column] for row in points], [row["top1"] for row in points], marker="o",
                  linestyle="none", label=name)
        for row in points if name.startswith(("file", "packed")) else ():
            axis.annotate(f"{row['bits']} bits", (row[column], row["top1"]),
                          textcoords="offset points", xytext=(5, 5))
    axis.set(xlabel="milliseconds per image", ylabel="top-1 (%)", xscale="log")
    legend_beside(axis)
    save_figure(figure, path)
