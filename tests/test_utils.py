"""Files that are whole or not there, checkpoints read as data, the choice of a GPU."""
import errno
import os
import pickle
from types import SimpleNamespace

import gpustat
import pytest
import torch

import utils
from utils import UserError


# ---- files

def test_replacing_leaves_the_old_file_where_writing_fails(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError):
        with utils.replacing(path) as temporary:
            temporary.write_text("half of the ne")
            raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    with utils.replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]


def test_a_full_disk_keeps_the_old_checkpoint_and_says_so(tmp_path, monkeypatch):
    path = tmp_path / "model_latest.pth.tar"
    utils.save_checkpoint(path, {"epoch": 1})

    def full(state, target):
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="cannot be written .*No space left.* what was saved before is kept"):
        utils.save_checkpoint(path, {"epoch": 2})
    assert torch.load(path, weights_only=True) == {"epoch": 1} and os.listdir(tmp_path) == [path.name]


def test_metrics_file_is_cut_back_to_the_resumed_epoch(tmp_path):
    path = tmp_path / "metrics.jsonl"
    values = {"loss": 1.0, "top1": 50.0, "top5": 90.0}
    for epoch in (1, 2, 3):
        utils.append_json_line(path, {"epoch": epoch, "train": {4: values}, "val": {4: values}})
    with open(path, "a") as file:
        file.write('{"epoch": 4, "tra')  # killed while writing
    kept = utils.keep_epochs(path, 2)
    assert [record["epoch"] for record in kept] == [1, 2] and kept[0]["val"] == {4: values}
    assert utils.read_metrics(path) == kept


# ---- checkpoints

class Malice:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html>404</html>", b"PK\x03\x04 cut short",
                                     pickle.dumps(Malice()), "malice in a checkpoint", "cut short"])
def test_what_is_not_a_checkpoint_is_one_line_and_runs_nothing(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model_best.pth.tar"
    if content == "malice in a checkpoint":
        torch.save({"state_dict": {}, "extra": Malice()}, path)
    elif content == "cut short":
        torch.save({"state_dict": {"weight": torch.zeros(1000)}}, path)
        path.write_bytes(path.read_bytes()[:-500])
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match="model_best.pth.tar is not a checkpoint that can be read safely") as error:
        utils.load_checkpoint(path)
    assert "\n" not in str(error.value) and not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [[1, 2], {"weights": {}}, {"state_dict": 5}])
def test_a_file_without_weights_is_not_a_checkpoint(content, tmp_path):
    torch.save(content, tmp_path / "x.pth.tar")
    with pytest.raises(UserError, match="must be a dict with a state_dict"):
        utils.load_checkpoint(tmp_path / "x.pth.tar")


# ---- device

def fake_gpus(monkeypatch, free):
    """Two GPUs, as torch and gpustat tell of them; torch sees them in the other order. `free` in MiB by UUID."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="ab"[index]))
    gpus = [SimpleNamespace(uuid=f"GPU-{uuid}", memory_total=100, memory_used=100 - free[uuid]) for uuid in "ba"]
    monkeypatch.setattr(gpustat, "new_query", lambda: gpus)


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize("free, index", [({"a": 10, "b": 60}, 1), ({"a": 70, "b": 60}, 0)])
def test_the_gpu_with_the_most_free_memory_is_chosen(name, free, index, monkeypatch):
    fake_gpus(monkeypatch, free)
    assert utils.choose_device(name) == torch.device("cuda", index)


def test_named_devices(monkeypatch):
    fake_gpus(monkeypatch, {"a": 1, "b": 2})
    assert utils.choose_device("cuda:0") == torch.device("cuda", 0)
    assert utils.choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="device cuda:2 is not here: choose from cuda:0, cuda:1, cpu, auto"):
        utils.choose_device("cuda:2")


def test_gpustat_that_cannot_tell(monkeypatch, capsys):
    fake_gpus(monkeypatch, {"a": 1, "b": 2})

    def refuse():
        raise RuntimeError("no driver library")

    monkeypatch.setattr(gpustat, "new_query", refuse)
    assert utils.choose_device("auto") == torch.device("cuda", 0)
    assert "no driver library" in capsys.readouterr().err


def test_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert utils.choose_device("auto") == torch.device("cpu")
    with pytest.raises(UserError, match="device cuda is not here: torch sees no CUDA GPU; choose cpu or auto"):
        utils.choose_device("cuda")
