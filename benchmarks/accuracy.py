"""Compare the accuracy of train.py on digits with that of the reference way, over seeds.

    python benchmarks/accuracy.py                        # 8 seeds, one training at a time
    python benchmarks/accuracy.py --seeds 48 --jobs 2    # two at a time
    python benchmarks/accuracy.py --flags="--precision bf16 --compile"    # of train.py
    python benchmarks/accuracy.py --loss hard --seeds 3

Each training has one thread. Runs are saved in --folder: the same command continues where it
stopped. top1.jsonl in it has a line for each finished run, whose own folder is not needed then; it
goes on from that of benchmarks/runs/accuracy, copied there. Prints a Markdown table of val top-1,
mean ± standard error over the seeds: of the last epoch, and of the mean of the last five, in which
the weights barely move (the learning rate is 1e-5 or less) and noise is lower; and a paired t-test
of the latter's mean over the bit-widths, which are not independent of one another.
"""
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from scipy import stats

from reference_way import PROGRAMS, ROOT  # first: it adds the project to the path

from engine.arguments import OneLineParser, number
from engine.errors import run_program
from engine.run_folder import read_metrics
from models.losses import NEXT_TARGET
from utils import markdown_table, write_text

FALSE_ALARMS = 0.05  # of the test, where both ways are equally accurate
EPOCHS = 5  # the last, in which the weights barely move


def trained(program, folder, flags):
    """Train in a folder, unless that is done; return {bit-width: val top-1 of the last epochs}."""
    if not (folder / "accuracy.png").exists():
        command = [sys.executable, ROOT / program, *flags, "--results-dir", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})
    last = read_metrics(folder / "metrics.jsonl")[-EPOCHS:]
    return {str(bits): [record["val"][bits]["top1"] for record in last] for bits in last[0]["val"]}


class Record:
    """The runs of a folder by name: what `trained` returns of each, a line each of top1.jsonl."""

    def __init__(self, folder):
        self.folder, self.file, self.lock = folder, folder / "top1.jsonl", Lock()
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.top1 = {run["run"]: run["top1"] for run in map(json.loads, lines)}

    def run(self, program, name, flags):
        """Return {bit-width: val top-1 of the last epochs} of a run, trained where it is new."""
        if name not in self.top1:
            top1 = trained(program, self.folder / name, flags)
            with self.lock:
                self.top1[name] = top1
                write_text(self.file, "".join(json.dumps({"run": run, "top1": values}) + "\n"
                                              for run, values in sorted(self.top1.items())))
        return self.top1[name]


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


def means(runs, epochs):
    """Return {bit-width: [val top-1 of each run, mean of its last `epochs` epochs]}."""
    return {bits: [statistics.mean(run[bits][-epochs:]) for run in runs] for bits in runs[0]}


def row(name, values, sign=""):
    """Return a row of the table: mean ± standard error per bit-width over the seeds."""
    return [name, *(f"{statistics.mean(seeds):{sign}.2f} ± "
                    f"{stats.sem(seeds) if len(seeds) > 1 else math.nan:.2f}"
                    for seeds in values.values())]


def main(options):
    """Print the table; return {bit-width: [default - reference]} of the last five epochs."""
    ways = {"reference": "", "default": options.flags}
    record = Record(Path(options.folder))
    futures = {way: [] for way in ways}
    with ThreadPoolExecutor(options.jobs) as pool:
        for seed in range(options.seeds):
            for way, flags in ways.items():
                name = "_".join([way, *(word.strip("-") for word in flags.split()), options.loss])
                futures[way].append(pool.submit(
                    record.run, PROGRAMS[way], f"{name}_seed{seed}",
                    ["--batch-size", "64", *shlex.split(flags), "--loss", options.loss, "--seed",
                     str(seed)]))
        try:
            runs = {way: [run.result() for run in of_way] for way, of_way in futures.items()}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    widths = list(runs["default"][0])
    rows = []
    for epochs, which in ((1, "last epoch"), (EPOCHS, "mean of the last five")):
        values = {way: means(runs[way], epochs) for way in ways}
        for way, flags in ways.items():
            rows.append(row(" ".join([f"{which}, {way}", *flags.split()]), values[way]))
        reference, default = values.values()
        differences = {
            bits: [ours - theirs for ours, theirs in zip(default[bits], reference[bits])]
            for bits in widths}
        rows.append(row(f"{which}, default less reference", differences, "+"))
    print(markdown_table([f"{options.loss}, {options.seeds} seeds", *widths], rows))
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
