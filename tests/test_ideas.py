"""docs/ideas.md: each idea, applied to the project as it stands, on every path."""
import subprocess
import sys

import pytest

import ideas


def test_there_are_thirteen():
    assert list(ideas.ideas()) == ["a", "b", "c", "d", "e", "f", "f2", "g", "h", "i", "j", "k", "l"]


@pytest.mark.parametrize("name", ideas.ideas())
def test_every_path_is_right_or_refused(name, environment):
    found = subprocess.run([sys.executable, ideas.__file__, name], env=environment, text=True,
                           capture_output=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_a_wrong_path_is_found(tmp_path):
    """A quantizer whose `prepare` depends on the bit-width is the mistake that sharing invites."""
    source = "def a():\n    return 1\n\n\ndef b():\n    return 2\n"
    assert ideas.replaced(source, "def b():\n    return 3\n\n\nC = 4\n").endswith(
        "def b():\n    return 3\n\n\nC = 4\n")
