"""Checkpoints: written whole, read as data."""
import errno
import os
import pickle

import pytest
import torch

from engine.state import save_checkpoint
from models.checkpoint import FileError, read_checkpoint
from utils import WriteError


def test_a_full_disk_keeps_the_old_checkpoint_and_says_so(tmp_path, monkeypatch):
    path = tmp_path / "model_latest.pth.tar"
    save_checkpoint(path, {"epoch": 1})

    def full(state, target):
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    told = "cannot be written .*No space left.* what was saved before is kept"
    with pytest.raises(WriteError, match=told):
        save_checkpoint(path, {"epoch": 2})
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    assert os.listdir(tmp_path) == [path.name]


class Malice:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("content", [
    b"", b"<!DOCTYPE html><html>404</html>", b"PK\x03\x04 cut short", pickle.dumps(Malice()),
    "malice in a checkpoint", "cut short"])
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
    told = "model_best.pth.tar is not a checkpoint that can be read safely"
    with pytest.raises(FileError, match=told) as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value) and not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [[1, 2], {"weights": {}}, {"state_dict": 5}])
def test_a_file_without_weights_is_not_a_checkpoint(content, tmp_path):
    torch.save(content, tmp_path / "x.pth.tar")
    with pytest.raises(FileError, match="must be a dict with a state_dict"):
        read_checkpoint(tmp_path / "x.pth.tar")
