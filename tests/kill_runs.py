"""Kill short trainings at random moments, go on with each, and compare its end with the whole run.

    python tests/kill_runs.py --kills 20 --signal KILL     # or TERM, INT, HUP, USR1, or several

Trainings are forked from a process that has run no backward pass, so none imports torch anew. A
training reports a step, after which it is killed: no clock decides whether it is killed midway.
"""
import argparse
import itertools
import os
import random
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # exact on a CPU; set before torch looks

import pytest  # noqa: E402
import torch  # noqa: E402
from torch.optim.optimizer import register_optimizer_step_post_hook  # noqa: E402

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import runs  # noqa: E402
import small_networks  # noqa: E402
import tiny_data  # noqa: E402
from engine.run_folder import read_metrics  # noqa: E402

# Dropout on one side, random crops and data workers on the other; two save after every step, so
# that kills meet saves.
RUNS = {
    "adam": ["--dataset", "svhn", "--model", "svhnq", "--bit_width_list", "1,32",
             "--optimizer", "adam", "--save-every", "1e-9"],
    "sgd": ["--dataset", "cifar10", "--model", "resnet4q", "--bit_width_list", "1,32",
            "--optimizer", "sgd", "--workers", "1", "--save-every", "1e-9"],
    "epochs": ["--dataset", "svhn", "--model", "svhnq", "--bit_width_list", "1,32",
               "--optimizer", "adam", "--workers", "1"],
}
SHARED = ["--width", "1", "--epochs", "2", "--lr_decay", "1", "--batch-size", "8",
          "--device", "cpu", "--print-freq", "2"]
STEPS = 8  # of a run, at least
PARTS = ("epoch", "best_prec1", "state_dict", "optimizer", "random_states")


def start(argv, errors):
    return runs.fork(partial(runs.run, argv), os.devnull, errors)


def start_until(step, argv, errors):
    """Start a run, and return its process once it has taken a step (0: at once) or has ended."""
    reader, writer = os.pipe()

    def run():
        count = itertools.count(1)
        register_optimizer_step_post_hook(
            lambda *args: os.write(writer, b".") if next(count) == step else None)
        return runs.run(argv)

    process = runs.fork(run, os.devnull, errors)
    os.close(writer)
    if step:
        os.read(reader, 1)
    os.close(reader)
    return process


def outcome(folder):
    """Return what must not depend on interruptions: checkpoints, metrics, which files there are."""
    files = sorted(path.name for path in folder.rglob("*") if not path.name.startswith("events"))
    checkpoints = [runs.load(folder, name) for name in ("model_latest", "model_best")]
    history = read_metrics(folder / "metrics.jsonl")
    return (files, [{part: checkpoint[part] for part in PARTS} for checkpoint in checkpoints],
            [[record[part] for part in ("epoch", "lr", "train", "val")] for record in history])


def same(first, second):
    try:
        runs.assert_same(first, second)
    except AssertionError:
        return False
    return True


class Trials:
    """Killed runs in a folder, and the whole ones that they are compared with."""

    def __init__(self, place, seed):
        self.place = place
        self.errors = place / "errors"
        self.moments = random.Random(seed)
        self.shared = [*SHARED, "--data-dir", place / "data"]
        self.whole = {}
        for name, flags in RUNS.items():
            folder = place / name
            process = start([*flags, *self.shared, "--results-dir", folder], self.errors)
            assert runs.wait(process) == 0, self.told()
            self.whole[name] = outcome(folder)

    def told(self):
        return self.errors.read_text()

    def kill(self, name, number, folder, step):
        """Start run `name` and kill it after a step; return its exit code and its command."""
        command = [*RUNS[name], *self.shared, "--results-dir", folder]
        process = start_until(step, command, self.errors)
        time.sleep(self.moments.uniform(0, 0.1))  # anywhere in the next steps and saves
        os.kill(process, number)
        return runs.wait(process), command

    def check_told(self, number, folder):
        """Assert that a run which ended by itself says how to go on."""
        told = self.told()
        if "interrupted" not in told:
            assert told.count("\n") == 1 and f"stopped by {number.name}" in told, told
            assert f"--resume {folder}" in told, told

    def trial(self, index, number):
        """Return (whether the run went on to the same end, whether there was a checkpoint)."""
        name = list(RUNS)[index % len(RUNS)]
        folder = self.place / f"trial{index}"
        # Most kills are to meet a run that has begun to save.
        step = 0 if index % 5 == 4 else self.moments.randrange(1, STEPS)
        code, command = self.kill(name, number, folder, step)
        saved = (folder / "ckpt" / "model_latest.pth.tar").exists()
        killed = code in (128 + number, -number)
        if killed:
            if code > 0:
                self.check_told(number, folder)
            if saved and index % 2:  # the others by the same command again
                command = ["--resume", folder]
            code = runs.wait(start(command, self.errors))
        if code:
            print(f"trial {index}, {name}: exit code {code}: {self.told()}")
        return code == 0 and same(outcome(folder), self.whole[name]), killed and saved


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--signal", nargs="+", default=["KILL"],
                        choices=("KILL", "TERM", "INT", "HUP", "USR1"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    numbers = [signal.Signals[f"SIG{name}"] for name in args.signal]
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as monkeypatch:
        small_networks.register(monkeypatch)
        runs.draw_nothing(monkeypatch)
        data = Path(place, "data")
        tiny_data.cifar10(data, monkeypatch, per_batch=5)
        tiny_data.svhn(data, monkeypatch)
        trials = Trials(Path(place), args.seed)
        results = [trials.trial(index, numbers[index // len(RUNS) % len(numbers)])
                   for index in range(args.kills)]
    good, midway = map(sum, zip(*results))
    print(f"{good} of {args.kills} identical to the undisturbed run; {midway} of them had a "
          "checkpoint to go on from")
    return good != args.kills or midway < args.kills // 2


if __name__ == "__main__":
    sys.exit(main())
