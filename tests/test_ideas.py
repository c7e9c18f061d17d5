"""docs/ideas.md: each idea, applied to the project as it stands, on every path."""
import subprocess
import sys

import ideas


def test_every_path_is_right_or_refused(environment):
    found = subprocess.run([sys.executable, ideas.__file__], env=environment, text=True,
                           capture_output=True)
    assert found.returncode == 0, found.stdout + found.stderr
    names = [line.split(":")[0] for line in found.stdout.splitlines()]
    assert names == ["a", "b", "c", "d", "e", "f", "f2", "g", "h", "i", "j", "k", "l"]


def test_a_definition_takes_the_place_of_the_one_of_its_name():
    source = "def a():\n    return 1\n\n\ndef b():\n    return 2\n"
    assert ideas.replaced(source, "def a():\n    return 3\n\n\nC = 4\n") == (
        "def a():\n    return 3\n\n\ndef b():\n    return 2\n\n\nC = 4\n")
