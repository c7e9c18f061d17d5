"""Short trainings, within the test's process or forked, and what is compared of them."""
import contextlib
import json
import os
import re
import sys
from functools import partial
from pathlib import Path
from unittest.mock import MagicMock

import torch
from matplotlib.figure import Figure

import train
from engine import figures
from engine.arguments import parse_flags
from engine.errors import run_program

ROOT = Path(__file__).parent.parent


def run(argv):
    """Run train.py with argv in this process; return its exit code, 0 where it ends by itself."""
    try:
        run_program(train.main, partial(parse_flags, [str(word) for word in argv]))
    except SystemExit as ended:
        return ended.code
    return 0


def draw_nothing(monkeypatch):
    """Save pictures as files of a byte: drawing takes half of a tiny training's time."""
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: path.write_bytes(b"x"))
    monkeypatch.setattr(figures, "new_figure", lambda columns, *args, **options: (
        Figure(), [MagicMock() for _ in range(columns)]))


def fork(function, out, err):
    """Fork a process that calls function() and exits with what it returns; return its id.

    Not from a process that has run a backward pass: torch refuses another one in its forks.
    """
    process = os.fork()
    if process == 0:
        code = 70
        with open(out, "w") as out_file, open(err, "w") as err_file:
            os.dup2(out_file.fileno(), 1)
            os.dup2(err_file.fileno(), 2)
            sys.stdout = open(1, "w", closefd=False)  # not what pytest has put in their place
            sys.stderr = open(2, "w", closefd=False)
            try:
                code = function()
            except BaseException as error:
                print(repr(error), file=sys.stderr)
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
    return process


def wait(process):
    """Wait for a forked process; return its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def tiny(data_dir, results_dir, *more):
    """Return arguments of a training of a second: 20 CIFAR images, 3 steps per epoch, 3 epochs.

    Of ResNet4, which conftest.py adds to the networks that train.py knows.
    """
    return ["--dataset", "cifar10", "--data-dir", data_dir, "--model", "resnet4q", "--width", 1,
            "--bit_width_list", "2,32", "--epochs", 3, "--lr_decay", "2", "--batch-size", 8,
            "--device", "cpu", "--results-dir", results_dir, *more]


def load(folder, name="model_latest"):
    return torch.load(folder / "ckpt" / f"{name}.pth.tar", weights_only=True)


def evaluation(folder):
    return json.loads((folder / "evaluation.json").read_text())


def accuracies(folder):
    """Return an evaluation's results without what the bit-widths cost."""
    return {bits: {name: values[name] for name in ("loss", "top1", "top5")}
            for bits, values in evaluation(folder).items()}


def snapshot(folder):
    """Return {path: content} of all files under a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same(first, second):
    """Assert equality to the last bit, of tensors in whatever dicts and lists they stand."""
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for one, other in zip(first, second):
            assert_same(one, other)
    elif isinstance(first, torch.Tensor):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    else:
        assert first == second


def compact(text):
    """Return a text's Markdown tables without what aligns their columns."""
    return re.sub(r"-{4,}", "---", re.sub(r"(?<=\S) +", " ", text))


def assert_one_line(capsys, *parts):
    """Assert that stderr got one line, which holds the parts."""
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.endswith("\n"), err
    for part in parts:
        assert part in err, err
    assert "Traceback" not in err
