"""Whether the fast path trains to the plain path's accuracy: both on digits, over seeds.

    python benchmarks/accuracy.py                                        # 8 seeds, about 40 minutes on 2 CPU cores
    python benchmarks/accuracy.py --fast "--precision bf16 --compile"    # of what is to be shown
    python benchmarks/accuracy.py --loss hard --seeds 3

Runs lie in --folder; those that are there are kept, interrupted ones go on. Prints a Markdown table of val
top-1, mean ± standard error over the seeds: of the last epoch, and of the mean of the last five, within which the weights
barely move (learning rate 1e-5 or less) and so chance weighs less.
"""
import argparse
import math
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402
from models.losses import LOSSES  # noqa: E402
from train import whole_number  # noqa: E402


def trained(folder, flags):
    """The epochs of the run in folder, which is made or finished first."""
    if not (folder / "accuracy.png").exists():
        begun = (folder / "ckpt" / "model_latest.pth.tar").exists()
        flags = ["--resume", str(folder)] if begun else [*flags, "--results-dir", str(folder)]
        subprocess.run([sys.executable, ROOT / "train.py", *flags], check=True, stdout=subprocess.DEVNULL)
    return utils.read_metrics(folder / "metrics.jsonl")


def cells(history_of_seeds, epochs, plain=None):
    """(a row, its means): mean ± standard error over the seeds of each bit-width's top-1 over the last `epochs`, and the
    difference from plain's means."""
    row, means = [], []
    for bits in history_of_seeds[0][-1]["val"]:
        values = [statistics.mean(record["val"][bits]["top1"] for record in history[-epochs:])
                  for history in history_of_seeds]
        means.append(statistics.mean(values))
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
        difference = f" ({means[-1] - plain[len(row)]:+.2f})" if plain else ""
        row.append(f"{means[-1]:.2f} ± {error:.2f}{difference}")
    return row, means


def main(options):
    """Print the table; returns {bit_width: fast less plain} of the mean of the last five epochs."""
    paths = {"plain": ["--plain"], "fast": shlex.split(options.fast)}
    runs = {}
    for path, flags in paths.items():
        name = "_".join([path, *(word.strip("-") for word in flags if path == "fast"), options.loss])
        runs[path] = [trained(Path(options.folder, f"{name}_seed{seed}"),
                              [*flags, "--loss", options.loss, "--seed", str(seed)]) for seed in range(options.seeds)]
    widths = list(runs["plain"][0][-1]["val"])
    print(f"| {options.loss}, {options.seeds} seeds | {' | '.join(map(str, widths))} |\n{'|---' * (len(widths) + 1)}|")
    for epochs, told in ((1, "last epoch"), (5, "mean of the last five")):
        plain, means = cells(runs["plain"], epochs)
        fast, fast_means = cells(runs["fast"], epochs, means)
        print(f"| {told}, plain | {' | '.join(plain)} |\n| {told}, fast {options.fast}| {' | '.join(fast)} |")
    return {bits: fast - plain for bits, plain, fast in zip(widths, means, fast_means)}


def parse_args(argv=None):
    parser = utils.OneLineParser(description=__doc__.splitlines()[0], formatter_class=utils.HelpFormatter)
    parser.add_argument("--loss", choices=LOSSES, default="recursive")
    parser.add_argument("--seeds", type=whole_number(1), default=8, help="seeds 0, 1, ...")
    parser.add_argument("--fast", default="", help="further flags of the fast path, in quotes")
    parser.add_argument("--folder", default="results/accuracy", help="of the runs")
    return parser.parse_args(argv)


if __name__ == "__main__":
    utils.run(main, parse_args)
