"""Compare the accuracy of train.py on digits with that of the reference way, over seeds.

    python benchmarks/accuracy.py                        # 8 seeds: 40 minutes on 2 CPU cores
    python benchmarks/accuracy.py --flags="--precision bf16 --compile"    # of train.py
    python benchmarks/accuracy.py --loss hard --seeds 3

Runs are saved in --folder: the same command continues where it stopped. Prints a Markdown table of
val top-1, mean ± standard error over the seeds: of the last epoch, and of the mean of the last
five, in which the weights barely move (the learning rate is 1e-5 or less) and noise is lower.
"""
import math
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

from reference_way import PROGRAMS, ROOT  # first: it adds the project to the path

from engine.arguments import OneLineParser, number
from engine.errors import run_program
from engine.run_folder import read_metrics
from models.losses import NEXT_TARGET


def trained(program, folder, flags):
    """Train in a folder, unless that is done; return the records of its epochs."""
    if not (folder / "accuracy.png").exists():
        command = [sys.executable, ROOT / program, *flags, "--results-dir", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return read_metrics(folder / "metrics.jsonl")


def top1(histories, epochs):
    """Return {bit-width: [val top-1 of each history, mean of its last `epochs` epochs]}."""
    return {bits: [statistics.mean(record["val"][bits]["top1"] for record in history[-epochs:])
                   for history in histories] for bits in histories[0][-1]["val"]}


def cells(values, reference):
    """Return a row: mean ± standard error per bit-width, and its difference from the reference."""
    row = []
    for bits, seeds in values.items():
        mean = statistics.mean(seeds)
        error = statistics.stdev(seeds) / math.sqrt(len(seeds)) if len(seeds) > 1 else math.nan
        row.append(f"{mean:.2f} ± {error:.2f}")
        if values is not reference:
            row[-1] += f" ({mean - statistics.mean(reference[bits]):+.2f})"
    return row


def main(options):
    """Print the table; return {bit-width: [default - reference]} of the last five epochs."""
    ways = {"reference": "", "default": options.flags}
    histories = {}
    for way, flags in ways.items():
        name = "_".join([way, *(word.strip("-") for word in flags.split()), options.loss])
        histories[way] = [
            trained(PROGRAMS[way], Path(options.folder, f"{name}_seed{seed}"),
                    ["--batch-size", "64", *shlex.split(flags), "--loss", options.loss, "--seed",
                     str(seed)])
            for seed in range(options.seeds)]
    widths = list(histories["default"][0][-1]["val"])
    print(f"| {options.loss}, {options.seeds} seeds | {' | '.join(map(str, widths))} |")
    print("|---" * (len(widths) + 1) + "|")
    for epochs, which in ((1, "last epoch"), (5, "mean of the last five")):
        values = {way: top1(histories[way], epochs) for way in ways}
        for way, flags in ways.items():
            row = cells(values[way], values["reference"])
            print(f"| {' '.join([f'{which}, {way}', *flags.split()])} | {' | '.join(row)} |")
    reference, default = values.values()
    return {bits: [ours - theirs for ours, theirs in zip(default[bits], reference[bits])]
            for bits in widths}


def parse_args(argv=None):
    parser = OneLineParser(__doc__.splitlines()[0])
    parser.add_argument("--loss", choices=NEXT_TARGET, default="recursive")
    parser.add_argument("--seeds", type=number(int, 1), default=8, help="seeds 0, 1, ...")
    parser.add_argument("--flags", default="", help="of train.py's runs, as one word")
    parser.add_argument("--folder", default="results/accuracy", help="of the runs")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_program(main, parse_args)
