"""The results folder: its metrics file, and which folders are refused."""
import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from runs import assert_one_line, assert_same, load, run, snapshot, tiny
from tensorboardX.event_file_writer import EventsWriter

from engine import event_file
from engine.errors import UserError
from engine.run_folder import RunFolder, read_metrics, write_metrics


def test_metrics_file_is_cut_back_to_the_resumed_epoch(tmp_path):
    path = tmp_path / "metrics.jsonl"
    values = {"loss": 1.0, "top1": 50.0, "top5": 90.0}
    write_metrics(path, [{"epoch": epoch, "train": {4: values}, "val": {4: values}}
                         for epoch in (1, 2, 3)])
    with RunFolder(tmp_path, "run", in_place=True) as run_folder:
        run_folder.begin(2, {"best_by": "highest"})
        kept = run_folder.history
    assert [record["epoch"] for record in kept] == [1, 2] and kept[0]["val"] == {4: values}
    assert read_metrics(path) == kept


def test_results_folder_that_cannot_be_written(capsys, tmp_path, tiny_cifar10):
    (tmp_path / "file").write_text("not a folder")
    assert run(tiny(tiny_cifar10, tmp_path / "file" / "run")) == 1
    assert_one_line(capsys, f"{tmp_path}/file/run cannot be written", "--results-dir")


def test_two_runs_that_take_a_name_at_the_same_moment(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mkdir = Path.mkdir

    def after_another(path, *args, **kwargs):
        monkeypatch.setattr(Path, "mkdir", mkdir)
        mkdir(path, parents=True)
        mkdir(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", after_another)
    with RunFolder(None, "run") as run_folder:
        assert run_folder.path == Path("results/run_2")


def test_a_link_to_a_results_folder_that_is_gone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("results").symlink_to(tmp_path / "gone")
    with pytest.raises(UserError, match="results folder results/run cannot be written"):
        RunFolder(None, "run")


def test_a_run_without_its_checkpoints_is_not_overwritten_either(tmp_path, tiny_cifar10, capsys):
    assert run(tiny(tiny_cifar10, tmp_path / "r", "--epochs", 1)) == 0
    for path in (tmp_path / "r" / "ckpt").iterdir():
        path.unlink()
    capsys.readouterr()
    assert run(tiny(tiny_cifar10, tmp_path / "r", "--epochs", 1)) == 1
    assert_one_line(capsys, "holds a run already")


def test_a_folder_that_a_run_is_writing_is_refused(tmp_path, tiny_cifar10, capsys):
    argv = tiny(tiny_cifar10, tmp_path / "r", "--epochs", 1)
    assert run(argv) == 0
    before = load(tmp_path / "r")
    hold = ("import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); "
            "print('held', flush=True); sys.stdin.read()")
    holder = subprocess.Popen([sys.executable, "-c", hold, tmp_path / "r" / ".lock"],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    capsys.readouterr()
    for again in (["--resume", tmp_path / "r", "--epochs", 2], argv):
        assert run(again) == 1
        assert_one_line(capsys, f"{tmp_path}/r is being written by another run")
    assert_same(load(tmp_path / "r"), before)
    holder.communicate()
    assert run(["--resume", tmp_path / "r", "--epochs", 2]) == 0


def test_unnamed_runs_take_free_names(tmp_path, tiny_cifar10, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = tiny(tiny_cifar10, "r", "--epochs", 1)
    argv = [word for flag, word in zip([None, *named], named)
            if "--results-dir" not in (flag, word)]
    for _ in range(2):
        assert run(argv) == 0
    name = "cifar10_resnet4q_2-32_recursive_seed0"
    assert {path.name for path in Path("results").iterdir()} == {name, f"{name}_2"}


FULL = Path("/dev/full")  # a device on which there is no space


def full_events(prefix):
    """Return tensorboardX's writer of events to a full disk, but for its first ones."""
    events = EventsWriter(prefix)
    events.flush()
    events._py_recordio_writer._writer = open(FULL, "wb")
    return events


def test_a_run_without_tensorboard_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX.event_file_writer", None)
    monkeypatch.delitem(sys.modules, "engine.event_file")
    with RunFolder(tmp_path / "r", "run") as folder:
        folder.begin(0, {})
        folder.log_epoch({"epoch": 1, "lr": 0.1, "images_per_second": 1,
                          "train": {4: VALUES}, "val": {4: VALUES}})
    assert "pip install tensorboardX" in capsys.readouterr().out
    assert len(read_metrics(tmp_path / "r" / "metrics.jsonl")) == 1
    assert not (tmp_path / "r" / "summary").exists()


def test_arguments_in_tensorboard_are_escaped_once():
    table = event_file.markdown({"dataset": "folder:a|b\udcff", "epochs": 3})
    assert table.splitlines()[2] == r"| dataset  | folder:a\|b\udcff |"


@pytest.mark.parametrize("name", [
    "config.json", "metrics.jsonl", "accuracy.png", "ckpt/model_latest.pth.tar", "log", "summary"])
def test_a_full_disk_names_the_file_and_the_way_on_and_loses_nothing(
        name, trained, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(trained, tmp_path / "r")
    path = folder / name
    if name == "log":
        path = folder / f"log_{socket.gethostname()}.txt"
        path.unlink()
        path.symlink_to(FULL)
    elif name == "summary":
        monkeypatch.setattr(event_file, "EventsWriter", full_events)
    else:
        path.with_name(f".{path.name}.tmp").symlink_to(FULL)

    before = load(folder)
    assert run(["--resume", folder, "--epochs", 4]) == 1
    assert_one_line(capsys, f"error: {path} cannot be written (", "free space there",
                    "; then go on:", f"--resume {folder}")
    assert load(folder)["epoch"] == (4 if name == "accuracy.png" else 3)
    if name != "accuracy.png":
        assert_same(load(folder), before)
    if name != "log":
        assert "cannot be written" in next(folder.glob("log_*.txt")).read_text()
    assert not list(folder.rglob(".*.tmp"))


VALUES = {"loss": 1.0, "top1": 50.0, "top5": 90.0}
RECORD = {"epoch": 1, "train": {"4": VALUES}, "val": {"4": VALUES}}


def lines(*changes):
    """Return a metrics.jsonl of a line per dict of changes."""
    return "".join(json.dumps({**RECORD, "epoch": number, **change}) + "\n"
                   for number, change in enumerate(changes, start=1))


@pytest.mark.parametrize("text, told", [
    ("null\n", "line 1: its record is None, not a dict"),
    ("[" * 100_000 + "\n", "line 1 is not JSON"),
    ("9" * 5000 + "\n", "line 1 is not JSON"),
    (lines({}) + '{"epoch": 2, "tra\n' + lines({}), "line 2 is not JSON"),
    (lines({}, {"epoch": 1}), "line 2: its epoch is 1, not a whole number above 1"),
    (lines({"epoch": None}), "line 1: its epoch is None"),
    (lines({"val": None}), "line 1: its val is None, not a dict by bit-widths"),
    (lines({"train": {}}), "line 1: its train is {}"),
    (lines({"val": {"\x1b[2J": VALUES}}), r"line 1: its val is '\x1b[2J', not a key (bit-width"),
    (lines({"val": {"4": [1]}}), "line 1: its val at 4 bits is [1]"),
    (lines({"val": {"4": {**VALUES, "top1": "5"}}}), "line 1: its top1 of val at 4 bits is '5'"),
    (lines({"val": {"4": {**VALUES, "top5": 101}}}), "its top5 of val at 4 bits is 101"),
    (lines({"val": {"4": {**VALUES, "loss": float("nan")}}}), "its loss of val at 4 bits is nan"),
    (lines({"val": {"4": {"top1": 1, "top5": 1}}}), "its loss of val at 4 bits is None"),
    (lines({}, {"val": {"2": VALUES}}), "line 2: its val is ['2'], not of the bit-widths of"),
    (b"\xff\n", "is damaged ('utf-8' codec")])
def test_damaged_metrics(text, told, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        read_metrics(path)
    message = str(error.value)
    assert message.startswith(str(path)) and told in message and message.isprintable()


def test_a_run_is_not_resumed_on_damaged_metrics(trained, tmp_path, capsys):
    folder = shutil.copytree(trained, tmp_path / "r")
    path = folder / "metrics.jsonl"
    path.write_text(f"null\n{path.read_text()}")
    (folder / "config.json").write_text("[1]")
    before = snapshot(folder / "ckpt"), path.read_text()
    assert run(["--resume", folder]) == 1
    assert_one_line(capsys, f"{path}, line 1: its record is None", "move the file away")
    assert (snapshot(folder / "ckpt"), path.read_text()) == before
