"""Measure an exported file against the network in torch and in ONNX Runtime's float32."""
import copy
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

from deploy.graph import Run
from engine.device import describe
from engine.figures import new_figure, save_figure
from models import set_bit_width
from models.bit_widths import FULL_PRECISION, BitWidth
from utils import one_line, write_json, write_text

REPEATS = {1: 30, 8: 15, 64: 5}  # {batch size: calls of each candidate, taking turns}
WARM_UP = 2  # calls that are not counted


def benchmark(stem: str, model: nn.Module, run: Run, images: numpy.ndarray,
              sizes: dict[BitWidth, int], checked: dict[BitWidth, dict[str, float]],
              float_run: Run | str) -> None:
    """Measure all bit-widths on one thread; write a table, JSON, and accuracy against latency.

    stem: path of the files to write, without suffix. run: of the exported files. images:
    (n, 3, H, W). sizes: {bit-width: bytes of its file}. checked: the results of check.compare.
    float_run: run of a float file, or the reason why there is none.
    """
    torch.set_num_threads(1)
    notes = [f"{describe(torch.device('cpu'))}, Python {platform.python_version()}, torch "
            f"{torch.__version__}; medians of process CPU time, in turn, one thread"]
    if isinstance(float_run, str):
        notes.append(f"without ONNX Runtime's float32: {float_run}")
        float_run = None
    rows = [measure(model, run, images, bits, size, float_run)
            for bits in sizes for size in REPEATS]
    text = f"{table(rows, sizes)}\n{'; '.join(notes)}\n"
    write_text(f"{stem}.md", text)
    write_json(f"{stem}.json", {"rows": rows, "bytes": sizes, "measured": notes})
    draw(f"{stem}.png", rows, checked)
    print(f"{text}\nwritten to {stem}.md, {stem}.json and {stem}.png")


def measure(model: nn.Module, run: Run, images: numpy.ndarray, bits: BitWidth, size: int,
            float_run: Run | None) -> dict:
    """Return a row: milliseconds per batch of `size` images, of each candidate."""
    batch = numpy.resize(images, (size, *images.shape[1:]))  # repeats them where there are fewer
    candidates = {"file": lambda: run(batch, bits)}
    for name, layout in (("contiguous", torch.contiguous_format), ("last", torch.channels_last)):
        candidates[f"torch {name}"] = torch_call(model, batch, bits, layout)
    if float_run:
        candidates["onnxruntime"] = lambda: float_run(batch, FULL_PRECISION)

    seconds = {name: [] for name in candidates}
    for repeat in range(REPEATS[size] + WARM_UP):
        for name, call in candidates.items():
            began = time.process_time()
            call()
            seconds[name].append(time.process_time() - began)
    median = {name: 1e3 * statistics.median(times[WARM_UP:])
              for name, times in seconds.items()}
    median["torch"] = min(median.pop("torch contiguous"), median.pop("torch last"))
    return {"bits": BitWidth.of(bits).plain, "batch": size, **median}


def torch_call(model: nn.Module, batch: numpy.ndarray, bits: BitWidth,
               layout: torch.memory_format) -> Callable[[], Tensor]:
    """Return a function that calls a copy of the network in a memory format, on this batch."""
    own = copy.deepcopy(model).to(memory_format=layout)
    images = torch.from_numpy(batch).contiguous(memory_format=layout)
    set_bit_width(own, bits)

    def call():
        with torch.no_grad():
            return own(images)
    return call


def float_runner(network: nn.Module | None, image_size: int) -> Run | str:
    """Return the network's run at 32 bits in ONNX Runtime, or the reason why there is none."""
    if network is None:
        return "a packed file has no float weights"
    try:
        from deploy import onnx_file

        with tempfile.TemporaryDirectory() as place:
            path = Path(place, "float.onnx")
            onnx_file.export(network, [FULL_PRECISION], path, image_size)
            return onnx_file.load(path)
    except (ImportError, ValueError) as error:
        return one_line(error)


def table(rows: list[dict], sizes: dict[BitWidth, int]) -> str:
    """Return a Markdown table of batch latency, images/s, and speed relative to the others."""
    others = [name for name in ("torch", "onnxruntime") if name in rows[0]]
    lines = [f"| bits | bytes | batch | ms | images/s | {' | '.join(map(heading, others))} |",
             "|---" * (5 + len(others)) + "|"]
    for row in rows:
        cells = [f"{row[name]:.2f} ms, {row[name] / row['file']:.2f}x" for name in others]
        lines.append(f"| {row['bits']} | {sizes[row['bits']]:,} | {row['batch']} | "
                     f"{row['file']:.2f} | {1e3 * row['batch'] / row['file']:.0f} | "
                     f"{' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def heading(name: str) -> str:
    """Return a candidate's name in tables and figures."""
    return {"torch": "torch", "onnxruntime": "ONNX Runtime float32"}[name]


def draw(path: str, rows: list[dict], checked: dict[BitWidth, dict[str, float]]) -> None:
    """Save a PNG of top-1 against the latency of one image, a point per bit-width."""
    figure, (axis,) = new_figure(1, "accuracy against latency, batch 1")
    for way, top1 in (("file", "top1"), ("torch", "network_top1")):
        points = [(row[way], checked[row["bits"]][top1], row["bits"])
                  for row in rows if row["batch"] == 1]
        axis.plot(*zip(*(point[:2] for point in points)), marker="o", linestyle="none", label=way)
        for x, y, bits in points:
            axis.annotate(f"{bits}", (x, y), textcoords="offset points", xytext=(5, 5))
    if "onnxruntime" in rows[0]:
        axis.axvline(statistics.median(row["onnxruntime"] for row in rows if row["batch"] == 1),
                     linestyle="--", label=heading("onnxruntime"))
    axis.set(xlabel="milliseconds an image", ylabel="top-1 (%)", xlim=(0, None))
    axis.legend()
    save_figure(figure, path)
