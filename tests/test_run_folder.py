"""The results folder: its metrics file, and which folders are refused."""
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from runs import assert_one_line, assert_same, load, run, tiny

from tensorboardX.event_file_writer import EventsWriter

from engine import run_folder
from engine.run_folder import RunFolder, read_metrics, write_metrics


def test_metrics_file_is_cut_back_to_the_resumed_epoch(tmp_path):
    path = tmp_path / "metrics.jsonl"
    values = {"loss": 1.0, "top1": 50.0, "top5": 90.0}
    write_metrics(path, [{"epoch": epoch, "train": {4: values}, "val": {4: values}}
                         for epoch in (1, 2, 3)])
    with open(path, "a") as file:
        file.write('{"epoch": 4, "tra')  # killed while writing
    with RunFolder(tmp_path, "run", in_place=True) as run_folder:
        run_folder.begin(2)
        kept = run_folder.history
    assert [record["epoch"] for record in kept] == [1, 2] and kept[0]["val"] == {4: values}
    assert read_metrics(path) == kept


def test_results_folder_that_cannot_be_written(capsys, tmp_path, tiny_cifar10):
    (tmp_path / "file").write_text("not a folder")
    assert run(tiny(tiny_cifar10, tmp_path / "file" / "run")) == 1
    assert_one_line(capsys, f"{tmp_path}/file/run cannot be written", "--results-dir")


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
    name = "cifar10_resnet20q_2-32_recursive_seed0"
    assert {path.name for path in Path("results").iterdir()} == {name, f"{name}_2"}


FULL = Path("/dev/full")  # a device on which there is no space


def full_events(prefix):
    """Return tensorboardX's writer of events to a full disk, but for its first ones."""
    events = EventsWriter(prefix)
    events.flush()
    events._py_recordio_writer._writer = open(FULL, "wb")
    return events


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
        monkeypatch.setattr(run_folder, "EventsWriter", full_events)
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
