"""Measure a network's training step on random images: time, CPU time and memory, as JSON lines.

    python benchmarks/gpu_steps.py resnet20q reference fp32 tf32 bf16
    python benchmarks/gpu_steps.py svhnq bf16-compile --wait      # compile, then wait for a line

On a GPU each way but the reference is measured once more as a CUDA graph.
"""
import gc
import json
import sys
import traceback

import torch

import speed  # first: it adds the project to the path
from engine.arguments import OneLineParser, number
from engine.cuda_graph import GraphStep
from engine.errors import run_program
from engine.forward_pass import PRECISIONS
from trainings import Run

BATCH = {"svhnq": 128, "resnet20q": 128, "resnet50q": 64}
WAYS = ("reference", *PRECISIONS, *(f"{precision}-compile" for precision in PRECISIONS))
WARM_UP = 5


def make_run(options, way):
    """Return a Run of a network in one of WAYS."""
    precision, _, compiles = way.partition("-")
    words = ["step", "--model", options.network, "--device", options.device, "--batch-size",
             str(options.batch_size or BATCH[options.network])]
    if way == "reference":
        return Run(speed.parse_args(words), "reference")
    words += ["--precision", precision, *(["--compile"] if compiles else [])]
    return Run(speed.parse_args(words), "default")


def measure(run, way, options, is_recorded=False):
    """Print the figures of a way: the better of two times, and the peak of memory.

    is_recorded: as a CUDA graph, which takes its memory when it is recorded.
    """
    on_gpu = run.device.type == "cuda"
    if on_gpu and is_recorded:
        torch.cuda.reset_peak_memory_stats()
    run.time_steps(WARM_UP)
    if on_gpu and not is_recorded:  # choosing algorithms takes memory
        torch.cuda.reset_peak_memory_stats()
    count = options.steps
    times = [run.time_steps(count) for _ in range(2)]
    seconds, cpu_seconds = map(min, zip(*times))
    gib = round(torch.cuda.max_memory_allocated() / 2**30, 2) if on_gpu else ""
    print(json.dumps({"network": options.network, "batch": run.args.batch_size, "way": way,
                      "ms": 1000 * seconds, "cpu_ms": 1000 * cpu_seconds, "gib": gib}), flush=True)


def main(options):
    failed = []
    for way in options.ways:
        try:
            torch._dynamo.reset()
            run = make_run(options, way)
            if options.wait:
                run.time_steps(1)
                print("ready", flush=True)
                sys.stdin.readline()
            measure(run, way, options)
            if way != "reference" and run.device.type == "cuda":
                run.step = GraphStep(run.step, run.state.optimizer, run.args.batch_size, run.device)
                measure(run, f"{way}, CUDA graph", options, is_recorded=True)
        except Exception:  # go on with the others
            traceback.print_exc()
            failed.append(way)
        run = None
        gc.collect()
        if torch.cuda.is_available():
            torch._C._cuda_clearCublasWorkspaces()  # of each stream, some 32 MiB
            torch.cuda.empty_cache()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def parse_args(argv=None):
    parser = OneLineParser(__doc__.splitlines()[0])
    parser.add_argument("network", choices=BATCH)
    parser.add_argument("ways", nargs="+", choices=WAYS)
    parser.add_argument("--batch-size", type=number(int, 1))
    parser.add_argument("--steps", type=number(int, 1), default=20, help="steps a timing")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--wait", action="store_true", help="for a line, once it is compiled")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_program(main, parse_args)
