"""Files that are whole or not there, and the commit that runs say."""
import os
import re
import subprocess

import pytest

import utils
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


def test_the_commit_tells_local_changes_apart(tmp_path, monkeypatch):
    def git(*words):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *words],
                       check=True, capture_output=True)

    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    (tmp_path / "models").mkdir()
    module = tmp_path / "models" / "losses.py"
    module.write_text("a = 1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    (tmp_path / "notes.txt").write_text("no code")
    plain = utils.commit()
    assert re.fullmatch(r"[0-9a-f]{40}", plain)
    found = [plain]
    for text in ("a = 2\n", "a = 3\n"):
        module.write_text(text)
        found.append(utils.commit())
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "library.py").write_text("c = 1\n")
    (tmp_path / "models" / "nowhere.py").symlink_to("/nowhere.py")
    assert utils.commit() == found[-1]
    (tmp_path / "models" / "other.py").write_text("b = 1\n")
    found.append(utils.commit())
    assert len(set(found)) == 4
    assert all(re.fullmatch(plain + r" with local changes [0-9a-f]{8}", each) for each in found[1:])
    module.write_text("a = 3\n")
    assert utils.commit() == found[3]
