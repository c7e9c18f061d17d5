"""Check on a GPU what only a GPU can show: correct numbers first, then speed.

    python benchmarks/gpu.py                      # all, on one NVIDIA GPU
    python benchmarks/gpu.py levels compiled_is_eager cifar
    python benchmarks/gpu.py --help               # the names; each takes minutes

Exits with 1 where a check fails or a goal is missed. Downloads nothing; prints Markdown tables.
"""
import sys
import time
import traceback

import torch

from gpu_checks import CHECKS  # first: it adds the project to the path
from gpu_speeds import MEASUREMENTS
from engine.arguments import OneLineParser
from engine.device import choose_device, describe
from engine.errors import run_program

ALL = {**CHECKS, **MEASUREMENTS}


def passes(name, device):
    """Run a check or measurement and print its outcome; return whether it passed."""
    print(f"\n## {name}: {' '.join(ALL[name].__doc__.split())}", flush=True)
    began = time.perf_counter()
    try:
        ALL[name](device)
        outcome = "ok"
    except Exception as error:  # go on with the others
        where = traceback.extract_tb(error.__traceback__)[-1]
        outcome = f"FAILED: {type(error).__name__}: {str(error)[:500]} (line {where.lineno})"
    print(f"{name}: {outcome} ({time.perf_counter() - began:.0f} s)", flush=True)
    return outcome == "ok"


def versions(device):
    """Print the versions and the device that the numbers belong to."""
    cudnn = torch.backends.cudnn.version()
    print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
          f"cuDNN {cudnn}; {describe(device)}")


def main(options):
    device = choose_device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    versions(device)
    sys.exit(0 if all([passes(name, device) for name in options.names or ALL]) else 1)


def parse_args(argv=None):
    parser = OneLineParser(__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*ALL, []], metavar="NAME",
                        help=f"checks to run, of {', '.join(ALL)}; default: all")
    parser.add_argument("--device", default="cuda", help="cuda:1, or cpu to try the checks")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_program(main, parse_args)
