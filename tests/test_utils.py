"""Files that are whole or not there."""
import os

import pytest

from utils import replacing


def test_replacing_leaves_the_old_file_where_writing_fails(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError):
        with replacing(path) as temporary:
            temporary.write_text("half of the ne")
            raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]


def test_runs_side_by_side_write_the_same_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    with replacing(path, shared=True) as one:
        one.write_text("of one")
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with replacing(path, shared=True) as other:
            other.write_text("of the other")
        assert path.read_text() == "of the other"
    assert path.read_text() == "of one" and os.listdir(tmp_path) == ["file"]
