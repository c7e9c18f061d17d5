"""Compare the speed of train.py with the reference way's, on random images.

    python benchmarks/speed.py step                    # a training step, and its memory
    python benchmarks/speed.py epoch --images 6400     # an epoch, with its loader
    python benchmarks/speed.py loader                  # the loaders alone
    python benchmarks/speed.py widths                  # 1 to 9 bit-widths
    python benchmarks/speed.py job --epochs 30         # training on digits, whole processes
    python benchmarks/speed.py step --model resnet20q --precision bf16 --compile

Both ways take turns, and each number is the median of --repeats; prints Markdown tables. --compile
and --precision apply to train.py's own way, called default; reference_way.py describes the other.
"""
import argparse
import gc
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from unittest.mock import patch

import numpy
import torch
from torch.utils.flop_counter import FlopCounterMode

from reference_way import PROGRAMS, ROOT  # first: it adds the project to the path
from trainings import WAYS, Run, flags, synchronize

from engine.arguments import OneLineParser, number
from engine.device import choose_device, describe
from engine.errors import run_program
from engine.forward_pass import PRECISIONS
from models import BITS, highest_first
from utils import flag_text, markdown_table

MATMUL_SIZE = {"cuda": 8192, "cpu": 1024}
SETTINGS = {"svhnq": ("svhn", 64), "resnet20q": ("cifar10", 128), "resnet50q": ("imagenet", 64)}


def medians(functions, repeats):
    """Return the median of each function's results, as an array; the functions take turns."""
    return numpy.median([[function() for function in functions] for _ in range(repeats)], axis=0)


def seconds_a_step(runs, options):
    """Return the median time of a step of each run."""
    for run in runs:
        run.steps(5)  # lazy initialization, compiling
    return medians([lambda run=run: run.steps(options.steps) for run in runs], options.repeats)


# ---- memory and operations of a step

def memory_of_a_step(options, way):
    """Return the MiB that a step needs temporarily, measured in a process of its own."""
    # Makes the C library return freed memory at once, so that the process's size shows it.
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    spawned = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with patch.dict(os.environ, environment), spawned as pool:
        return pool.submit(own_memory_of_a_step, options, way).result()


def own_memory_of_a_step(options, way):
    """Return the MiB that a step needs temporarily in this process."""
    run = Run(options, way)
    run.steps(6)
    gc.collect()
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
        before = torch.cuda.memory_allocated(run.device)
        run.steps(2)
        return (torch.cuda.max_memory_allocated(run.device) - before) / 2**20

    def mebibytes(name):
        return int(re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024

    before = mebibytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    run.steps(2)
    return mebibytes("VmHWM") - before


def flops_of_a_step(options):
    """Count the FLOPs of a step's convolutions and matrix products."""
    eager = {**vars(options), "compile": False, "cuda_graph": False, "precision": "fp32"}
    run = Run(argparse.Namespace(**eager), "default")
    run.steps(1)  # the first one tries sharing, too
    with FlopCounterMode(display=False) as counter:
        run.steps(1)
    return counter.get_total_flops()


def peak_flops(precision, device):
    """Return the FLOP/s of a large matrix product in `precision`, the best of 5."""
    size = MATMUL_SIZE[device.type]
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.randn(size, size, device=device, dtype=dtype)
    times = []
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(5):
            a @ a
        synchronize(device)
        times.append(time.perf_counter() - start)
    return 5 * 2 * size**3 / min(times)


# ---- measurements, which print a table and return its columns

def measure_step(options):
    """Measure a step and its memory, both ways."""
    memory = [memory_of_a_step(options, way) for way in WAYS]
    flops = flops_of_a_step(options)
    runs = [Run(options, way) for way in WAYS]
    times = seconds_a_step(runs, options)
    peaks = numpy.array([peak_flops(run.args.precision, run.device) for run in runs])
    return table(options, "A step", {
        "ms": 1000 * times, "images/s": options.batch_size / times, "ratio": times[0] / times,
        "MiB": memory, "GFLOP/s": flops / times / 1e9,
        "share of matmul peak, %": 100 * flops / times / peaks})


def measure_epoch(options):
    """Measure an epoch with its loader, both ways."""
    runs = [Run(options, way) for way in WAYS]
    epochs = [lambda run=run, loader=run.loader(): run.seconds(loader) for run in runs]
    for run in runs:
        run.steps(5)
    times = medians(epochs, options.repeats)
    return table(options, f"An epoch of {options.images} images with its loader", {
        "s": times, "images/s": options.images / times, "ratio": times[0] / times})


def measure_loader(options):
    """Measure the loaders, both ways, against the images that a step trains on."""
    def seconds(loader, device):
        start = time.perf_counter()
        for images, labels in loader:
            pass
        synchronize(device)
        return time.perf_counter() - start

    runs = [Run(options, way) for way in WAYS]
    trained = options.batch_size / seconds_a_step(runs, options)
    epochs = [lambda run=run, loader=run.loader(): seconds(loader, run.device) for run in runs]
    loaded = options.images / medians(epochs, options.repeats)
    return table(options, f"The loader alone, {options.images} images", {
        "images/s loaded": loaded, "images/s trained": trained, "ratio": loaded / trained})


def measure_widths(options):
    """Measure a step with 1 to 9 bit-widths."""
    lists = [highest_first(BITS)[:count] for count in range(1, 10)]
    times = seconds_a_step([Run(options, "default", bit_widths) for bit_widths in lists], options)
    dedicated = [Run(options, "default", bit_widths[-1:]) for bit_widths in lists]
    sums = seconds_a_step(dedicated, options).cumsum()
    return table(options, f"A step by bit-widths, {names(options)[1]}", {
        "ms": 1000 * times, "of 32 bits alone": times / times[0],
        "of a dedicated step for each": times / sums}, map(flag_text, lists))


def measure_job(options):
    """Measure whole training processes, both ways."""
    def seconds(way):
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, ROOT / PROGRAMS[way], "--results-dir",
                       f"{folder}/run", *flags(options, way), "--epochs", str(options.epochs)]
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            return time.perf_counter() - start

    times = medians([lambda way=way: seconds(way) for way in WAYS], options.repeats)
    return table(options, f"{options.epochs} epochs, whole processes",
                 {"s": times, "ratio": times[0] / times})


def names(options):
    """Return the names of both ways in tables."""
    return "reference", " ".join([
        f"default, {options.precision}{', compiled' if options.compile else ''}",
        *(["as a CUDA graph"] if options.cuda_graph else [])])


def table(options, title, columns, firsts=None):
    """Print a Markdown table, by default with a row per way; return its columns."""
    print(f"\n{title}: {options.model}, {options.dataset}, batch {options.batch_size}; "
          f"{describe(choose_device(options.device))}; torch {torch.__version__}; "
          f"median of {options.repeats}\n")
    rows = [[first, *(f"{value:.{decimals(value)}f}" for value in values)]
            for first, *values in zip(firsts or names(options), *columns.values())]
    print(markdown_table(["", *columns], rows), flush=True)
    return columns


def decimals(value):
    """Return the decimals to print of a value: at least three digits in all."""
    if value >= 1000:
        return 0
    return 1 if value >= 10 else 2


MEASUREMENTS = {"step": measure_step, "epoch": measure_epoch, "loader": measure_loader,
                "widths": measure_widths, "job": measure_job}


def parse_args(argv=None):
    parser = OneLineParser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("what", choices=MEASUREMENTS, help="what to measure")
    add("--model", choices=SETTINGS, default="svhnq")
    add("--batch-size", type=number(int, 1), help="default: the recipe's, for resnet50q 64")
    add("--precision", choices=PRECISIONS, default="fp32")
    add("--compile", action="store_true")
    add("--cuda-graph", action="store_true")
    add("--device", default="auto")
    add("--workers", type=number(int, 0), default=0)
    add("--images", type=number(int, 1), default=1280, help="images per epoch")
    add("--epochs", type=number(int, 1), default=30, help="epochs of a job")
    add("--repeats", type=number(int, 1), default=7)
    add("--steps", type=number(int, 1), default=5, help="steps per timing")
    options = parser.parse_args(argv)
    options.dataset, batch_size = SETTINGS[options.model]
    options.batch_size = options.batch_size or batch_size
    if options.what == "job":
        options.dataset = "digits"
    return options


def main(options):
    return MEASUREMENTS[options.what](options)


if __name__ == "__main__":
    run_program(main, parse_args)
