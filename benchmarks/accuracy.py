"""Compare the accuracy of train.py on digits with that of the reference way, over seeds.

    python benchmarks/accuracy.py                        # 8 seeds, one training at a time
    python benchmarks/accuracy.py --seeds 48 --jobs 2    # two at a time
    python benchmarks/accuracy.py --flags="--precision bf16 --compile"    # of train.py
    python benchmarks/accuracy.py --loss hard --seeds 3

Each training has one thread. Runs are saved in --folder: the same command continues where it
stopped. Prints a Markdown table of val top-1, mean ± standard error over the seeds: of the last
epoch, and of the mean of the last five, in which the weights barely move (the learning rate is 1e-5
or less) and noise is lower; and a paired t-test of the latter's mean over the bit-widths, which are
not independent of one another.
"""
import math
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scipy import stats

from reference_way import PROGRAMS, ROOT  # first: it adds the project to the path

from engine.arguments import OneLineParser, number
from engine.errors import run_program
from engine.run_folder import read_metrics
from models.losses import NEXT_TARGET

FALSE_ALARMS = 0.05  # of the test, where both ways are equally accurate


def trained(program, folder, flags):
    """Train in a folder, unless that is done; return the records of its epochs."""
    if not (folder / "accuracy.png").exists():
        command = [sys.executable, ROOT / program, *flags, "--results-dir", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})
    return read_metrics(folder / "metrics.jsonl")


def paired_test(differences):
    """Return a line: a paired t-test of {bit-width: differences by seed}, averaged over these."""
    of_seeds = [statistics.mean(seed) for seed in zip(*differences.values())]
    found = stats.ttest_1samp(of_seeds, 0)
    low, high = found.confidence_interval(1 - FALSE_ALARMS)
    verdict = "differs" if found.pvalue < FALSE_ALARMS else "no difference shows"
    return (f"Default less reference, mean over the bit-widths: {statistics.mean(of_seeds):+.3f} ± "
            f"{stats.sem(of_seeds):.3f} over {len(of_seeds)} seeds, p = {found.pvalue:.2g}: "
            f"{verdict} (paired t-test, false alarms {FALSE_ALARMS:.0%}); "
            f"{1 - FALSE_ALARMS:.0%} confidence from {low:+.3f} to {high:+.3f}")


def top1(histories, epochs):
    """Return {bit-width: [val top-1 of each history, mean of its last `epochs` epochs]}."""
    return {bits: [statistics.mean(record["val"][bits]["top1"] for record in history[-epochs:])
                   for history in histories] for bits in histories[0][-1]["val"]}


def cells(values, reference):
    """Return a row: mean ± standard error per bit-width, and its difference from the reference."""
    row = []
    for bits, seeds in values.items():
        mean = statistics.mean(seeds)
        error = stats.sem(seeds) if len(seeds) > 1 else math.nan
        row.append(f"{mean:.2f} ± {error:.2f}")
        if values is not reference:
            row[-1] += f" ({mean - statistics.mean(reference[bits]):+.2f})"
    return row


def main(options):
    """Print the table; return {bit-width: [default - reference]} of the last five epochs."""
    ways = {"reference": "", "default": options.flags}
    runs = {way: [] for way in ways}
    with ThreadPoolExecutor(options.jobs) as pool:
        for seed in range(options.seeds):
            for way, flags in ways.items():
                name = "_".join([way, *(word.strip("-") for word in flags.split()), options.loss])
                runs[way].append(pool.submit(
                    trained, PROGRAMS[way], Path(options.folder, f"{name}_seed{seed}"),
                    ["--batch-size", "64", *shlex.split(flags), "--loss", options.loss, "--seed",
                     str(seed)]))
        try:
            histories = {way: [run.result() for run in of_way] for way, of_way in runs.items()}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    widths = list(histories["default"][0][-1]["val"])
    print(f"| {options.loss}, {options.seeds} seeds | {' | '.join(map(str, widths))} |")
    print("|---" * (len(widths) + 1) + "|")
    for epochs, which in ((1, "last epoch"), (5, "mean of the last five")):
        values = {way: top1(histories[way], epochs) for way in ways}
        for way, flags in ways.items():
            row = cells(values[way], values["reference"])
            print(f"| {' '.join([f'{which}, {way}', *flags.split()])} | {' | '.join(row)} |")
    reference, default = values.values()
    differences = {bits: [ours - theirs for ours, theirs in zip(default[bits], reference[bits])]
                   for bits in widths}
    if options.seeds > 1:
        print(f"\n{paired_test(differences)}")
    return differences


def parse_args(argv=None):
    parser = OneLineParser(__doc__.splitlines()[0])
    parser.add_argument("--loss", choices=NEXT_TARGET, default="recursive")
    parser.add_argument("--seeds", type=number(int, 1), default=8, help="seeds 0, 1, ...")
    parser.add_argument("--jobs", type=number(int, 1), default=1,
                        help="trainings at a time")
    parser.add_argument("--flags", default="", help="of train.py's runs, as one word")
    parser.add_argument("--folder", default="results/accuracy", help="of the runs")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_program(main, parse_args)
