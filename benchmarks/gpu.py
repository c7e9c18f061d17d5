"""Check on a GPU what only a GPU can show: correct numbers first, then speed.

    python benchmarks/gpu.py first third --folder results/gpu     # without compiling
    python benchmarks/gpu.py second --folder results/gpu --limit 300
    python benchmarks/gpu.py levels compiled_is_eager
    python benchmarks/gpu.py --help                               # the names; each takes minutes

The calls first, second and third are cut for a quarter of an hour on a GPU: each ends within
--limit seconds, prints its tables last, and writes everything to a folder. Exits with 1 where a
check fails. Downloads nothing; prints Markdown tables.
"""
import sys
import time
import traceback

import torch

from gpu_checks import CHECKS  # first: it adds the project to the path
from gpu_calls import CALLS, run_call
from engine.arguments import OneLineParser, number
from engine.device import choose_device, describe
from engine.errors import run_program

LIMIT = 225  # seconds of a call


def passes(name, device):
    """Run a check or measurement and print its outcome; return whether it passed."""
    print(f"\n## {name}: {' '.join(CHECKS[name].__doc__.split())}", flush=True)
    began = time.perf_counter()
    torch._dynamo.reset()  # it counts all graphs of a function in the process, and has a limit
    try:
        CHECKS[name](device)
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
    good = [run_call(name, options, device) if name in CALLS else passes(name, device)
            for name in options.names or CHECKS]
    sys.exit(0 if all(good) else 1)


def parse_args(argv=None):
    parser = OneLineParser(__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[*CALLS, *CHECKS, []], metavar="NAME",
                        help=f"calls, of {', '.join(CALLS)}, or checks, of {', '.join(CHECKS)}; "
                        "default: all checks")
    add = parser.add_argument
    add("--device", default="cuda", help="cuda:1, or cpu to try the checks")
    add("--folder", default="results/gpu", help="that gets all that a call finds")
    add("--limit", type=number(int, 1), default=LIMIT, help="seconds of a call")
    add("--fastest", default="--precision tf32 --cuda-graph",
        help="train.py's flags of the fastest way, in third")
    add("--data-dir", help="folder that holds fashion-mnist, for third")
    add("--tiny", action="store_true", help="try a call with little data and small batches")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_program(main, parse_args)
