"""The commands in README, docs and examples: their programs take them as they stand."""
import re
import shlex
from pathlib import Path

import pytest

import export
import report
import search
from engine.arguments import parse_flags

ROOT = Path(__file__).parent.parent
TEXTS = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS.remove(ROOT / "docs" / "ideas.md")  # whose flags need its changes: tests/ideas.py runs it
PLACEHOLDERS = {"NAME": "dorefa", "S": "0"}
PROGRAMS = {"train.py": parse_flags, "export.py": export.parse_args,
            "report.py": report.parse_args, "search.py": search.parse_args}
STARTS = r"(?:\./\w+\.sh|python |torchrun |PYTHONPATH=)"


def commands(text):
    """Return the command lines of a Markdown text, those that go on with a backslash joined."""
    joined = re.sub(r"\\\n\s*", " ", text)
    found = re.findall(rf"^ {{4}}({STARTS}.*)$", joined, re.MULTILINE)
    return found + re.findall(rf"`({STARTS}[^`]*)`", joined)


def words_of(command):
    """Return a command's program and flags, without what a shell would set or comment."""
    words = shlex.split(command.replace("...", ""), comments=True)
    for end in ("&&", "|", ";", ">"):
        words = words[:words.index(end)] if end in words else words
    words = [PLACEHOLDERS.get(word, word) for word in words]
    programs = [place for place, word in enumerate(words) if word.endswith((".py", ".sh"))]
    return (words[programs[0]], words[programs[0] + 1:]) if programs else (None, [])


def recipe_flags(script):
    """Return the flags that a recipe passes before those of its user."""
    text = (ROOT / script).read_text()
    text = re.sub(r"(--[\w-]+ )?\"\$[^\"]*\"", "", text)  # without what the shell computes
    found = re.findall(r"^flags=\((.*?)\)", text, re.MULTILINE | re.DOTALL)
    return shlex.split(found[0]) if found else []


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_commands_are_taken(path):
    for command in commands(path.read_text()):
        program, flags = words_of(command)
        if program is None:
            continue
        assert (ROOT / program).exists(), command
        parse = PROGRAMS.get(program)
        if "train_" in program:
            parse = parse_flags
            flags = recipe_flags(program) + flags
        if parse and "-h" not in flags and "--help" not in flags:
            try:
                parse(flags)
            except SystemExit:
                pytest.fail(f"{path.name}: {command}")


def test_commands_are_found():
    found = commands((ROOT / "README.md").read_text())
    assert len(found) > 20
    assert any(command.startswith("python export.py") for command in found)
    assert words_of("python train.py --lr 0.1  # why")[1] == ["--lr", "0.1"]
    with pytest.raises(SystemExit):
        parse_flags(["--no-such-flag"])
