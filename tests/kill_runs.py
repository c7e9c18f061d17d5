"""Kill short trainings at random moments, go on with each, and compare the end with that of an undisturbed run.

    python tests/kill_runs.py --kills 20 [--signal KILL|TERM|INT] [--seed 0]

A program of its own: it forks each training from a process that has run no backward pass, so none imports torch anew.
"""
import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # exact on a CPU; before torch looks

import pytest  # noqa: E402
import torch  # noqa: E402

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import tiny_data  # noqa: E402
import train  # noqa: E402
import utils  # noqa: E402

# Dropout on one side, random crops and data workers on the other; saving after every step, so that kills meet saves.
RUNS = {
    "adam": ["--dataset", "svhn", "--model", "svhnq", "--optimizer", "adam", "--save-every", "1e-9"],
    "sgd": ["--dataset", "cifar10", "--model", "resnet20q", "--optimizer", "sgd", "--workers", "1", "--save-every",
            "1e-9"],
    "epochs": ["--dataset", "svhn", "--model", "svhnq", "--optimizer", "adam", "--workers", "1"],
}
SHARED = ["--width", "1", "--bit_width_list", "1,4,32", "--epochs", "3", "--lr_decay", "1", "--batch-size", "8",
          "--device", "cpu", "--print-freq", "2"]


def start(argv, errors):
    """Fork a training; returns its process id. Its stderr goes to the file `errors`."""
    process = os.fork()
    if process == 0:
        code = 70
        with open(os.devnull, "w") as nowhere, open(errors, "w") as file:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(file.fileno(), 2)
            try:
                utils.run(train.main, partial(train.parse_args, [str(word) for word in argv]))
                code = 0
            except SystemExit as ended:
                code = ended.code
            except BaseException as error:
                print(repr(error), file=sys.stderr)
            finally:
                with contextlib.suppress(Exception):
                    sys.stderr.flush()
                os._exit(code)
    return process


def wait(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def outcome(folder):
    """What must not depend on interruptions: the checkpoints, without times, the metrics, and which files there are."""
    files = sorted(path.name for path in folder.rglob("*") if not path.name.startswith("events"))
    history = utils.read_metrics(folder / "metrics.jsonl")
    checkpoints = [torch.load(folder / "ckpt" / f"{name}.pth.tar", weights_only=True)
                   for name in ("model_latest", "model_best")]
    return (files, [{key: checkpoint[key] for key in ("epoch", "step", "best_prec1", "state_dict", "optimizer",
                                                      "random_states")} for checkpoint in checkpoints],
            [(record["epoch"], record["lr"], record["train"], record["val"]) for record in history])


def same(first, second):
    """Equal to the last bit, in whatever dicts and sequences."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    number = signal.Signals[f"SIG{args.signal}"]
    moments = random.Random(args.seed)
    torch.set_num_threads(1)
    good = midway = 0
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        patch = pytest.MonkeyPatch()
        tiny_data.cifar10(place / "data", patch, per_batch=8)
        tiny_data.svhn(place / "data", patch)
        shared = [*SHARED, "--data-dir", place / "data"]
        whole, seconds, training = {}, {}, {}
        for name, flags in RUNS.items():
            began = time.monotonic()
            process = start([*flags, *shared, "--results-dir", place / name], place / "errors")
            while not (place / name / "ckpt" / "model_latest.pth.tar").exists():
                time.sleep(0.001)
            saving = time.monotonic()
            assert wait(process) == 0, (place / "errors").read_text()
            seconds[name], training[name] = time.monotonic() - began, time.monotonic() - saving
            whole[name] = outcome(place / name)
        for trial in range(args.kills):
            name = list(RUNS)[trial % len(RUNS)]
            folder = place / f"trial{trial}"
            fresh = [*RUNS[name], *shared, "--results-dir", folder]
            process = start(fresh, place / "errors")
            if trial % 5 != 4:  # most kills are to meet a run that has begun to save
                while not (folder / "ckpt" / "model_latest.pth.tar").exists():
                    time.sleep(0.001)
                time.sleep(moments.uniform(0, training[name]))
            else:
                time.sleep(moments.uniform(0, seconds[name]))
            os.kill(process, number)
            code = wait(process)
            saved = (folder / "ckpt" / "model_latest.pth.tar").exists()
            if code in (128 + number, -number):
                midway += saved
                told = (place / "errors").read_text()
                if code > 0 and "interrupted" not in told:  # it ended by itself: it must say how to go on
                    assert told.count("\n") == 1 and f"stopped by SIG{args.signal}" in told, told
                    assert f"--resume {folder}" in told, told
                code = wait(start(["--resume", folder] if saved else fresh, place / "errors"))
            good += code == 0 and same(outcome(folder), whole[name])
            if code:
                print(f"trial {trial}, {name}: exit code {code}: {(place / 'errors').read_text()}")
    print(f"{good} of {args.kills} identical to the undisturbed run; {midway} of them had a checkpoint to go on from")
    return good != args.kills or midway < args.kills // 2


if __name__ == "__main__":
    sys.exit(main())
