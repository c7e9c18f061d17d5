"""docs/ideas.md: each idea, applied to the project as it stands, on some paths.

python tests/ideas.py is the longer trial, of each on every path.
"""
import ideas


def test_paths_are_right_or_refused(forks):
    found = forks.run(ideas.main, ["--suite"])
    assert found.returncode == 0, found.stdout + found.stderr
    lines = [line.split(": ") for line in found.stdout.splitlines()]
    assert [name for name, _ in lines] == list(ideas.ideas()) == list(ideas.SUITE)
    assert len(lines) == 13
    refused = {name for name, results in lines if "refused" in results}
    assert refused == {"j"}  # OpenVINO has no quantized linear layer


def test_a_definition_takes_the_place_of_the_one_of_its_name():
    source = "def a():\n    return 1\n\n\ndef b():\n    return 2\n"
    assert ideas.replaced(source, "def a():\n    return 3\n\n\nC = 4\n") == (
        "def a():\n    return 3\n\n\ndef b():\n    return 2\n\n\nC = 4\n")
