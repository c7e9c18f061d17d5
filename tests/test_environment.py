"""environment.sh on first use, with a Python that only writes down what it is to install."""
import os
import pty
import shutil
import subprocess

import pytest
from runs import ROOT

PYTHON = """#!/bin/sh
case "$*" in
    "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
    "-m pip "*) echo "$@" >> "$(dirname "$0")/../../installed" ;;
    "-c "*) exit 0 ;;
    *) exit 1 ;;  # satisfies nothing
esac
"""


@pytest.mark.parametrize("on_terminal", [True, False])
def test_first_use_shows_what_pip_fetches_where_someone_looks(on_terminal, tmp_path):
    shutil.copy(ROOT / "environment.sh", tmp_path)
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("python", "python3"):
        (programs / name).write_text(PYTHON)
        (programs / name).chmod(0o755)

    outer, inner = pty.openpty() if on_terminal else os.pipe()
    environment = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-eu", tmp_path / "environment.sh"], env=environment,
                          stderr=inner, stdout=subprocess.PIPE)
    os.close(inner)
    shown = os.read(outer, 4096).decode()
    os.close(outer)
    assert done.returncode == 0 and done.stdout == b"", shown
    assert shown.startswith("First use: fetching torch and the rest of requirements.txt into ")
    assert "5.5 GB" in shown and shown.count("\n") == 1
    installed = (tmp_path / "installed").read_text().split()
    assert installed[:3] == ["-m", "pip", "install"]
    assert installed[-1] == f"-r{tmp_path}/requirements.txt"
    assert ("--quiet" in installed) is not on_terminal
