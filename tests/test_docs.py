"""README, docs and examples: programs take their commands, recorded trainings bear their tables."""
import math
import re
import shlex
import statistics
from collections import defaultdict
from pathlib import Path

import pytest

import export
import report
import search
from engine.arguments import parse_flags
from engine.run_folder import read_metrics
from utils import mean_and_deviation

ROOT = Path(__file__).parent.parent
TEXTS = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS.remove(ROOT / "docs" / "ideas.md")  # whose flags need its changes: tests/ideas.py runs it
PLACEHOLDERS = {"NAME": "dorefa", "S": "0"}
PROGRAMS = {"train.py": parse_flags, "export.py": export.parse_args,
            "report.py": report.parse_args, "search.py": search.parse_args}
RUNS = ROOT / "benchmarks" / "runs"
NO_ROW = "linear_lsq"  # an earlier lsq: docs/your_own_network.md says what came of it
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


def recorded(table):
    """Return {configuration: {bit-width: {seed: top-1 (%) of the last epoch}}} of recorded runs."""
    found = defaultdict(lambda: defaultdict(dict))
    for folder in (RUNS / f"{table}_table").iterdir():
        name, seed = re.fullmatch(r"(\D+)(?:_[\d-]+)?_seed(\d)", folder.name).groups()
        for bits, values in read_metrics(folder / "metrics.jsonl")[-1]["val"].items():
            found[name][bits][seed] = values["top1"]
    return found


def row_of(cells):
    """Return the cells of a table's row, bit-width by bit-width, as they stand in Markdown."""
    return " | ".join(cells[bits] for bits in sorted(cells))


@pytest.mark.parametrize("table, document", [
    ("fashion30", "results"), ("fashion_methods", "results"), ("nine_widths", "results"),
    ("resnet18", "your_own_network"), ("mobilenet_v2", "your_own_network"),
    ("resnet18_fashion32", "your_own_network")])
def test_tables_are_those_of_recorded_trainings(table, document):
    text = (ROOT / "docs" / f"{document}.md").read_text()
    rows = {name: row_of({bits: mean_and_deviation(list(of_seeds.values()))
                          for bits, of_seeds in widths.items()})
            for name, widths in recorded(table).items() if name != NO_ROW}
    assert rows
    assert {name: row for name, row in rows.items() if f" | {row} |" not in text} == {}


def test_differences_are_those_of_recorded_trainings():
    text = (ROOT / "docs" / "results.md").read_text()
    pairs = [("fashion_methods", name, "recursive")
             for name in ("lsq", "half", "half_lsq", "pact", "centred")]
    pairs += [("fashion_methods", "half_lsq", "dedicated"), ("fashion_methods", "lsq", "dedicated"),
              ("fashion30", "recursive", "dedicated"), ("fashion30", "hard", "dedicated")]
    for table, name, base in pairs:
        found = recorded(table)
        cells = {}
        for bits, of_seeds in found[name].items():
            ahead = [top1 - found[base][bits][seed] for seed, top1 in of_seeds.items()]
            error = ""
            if len(ahead) > 1:
                error = f" ± {statistics.stdev(ahead) / math.sqrt(len(ahead)):.2f}"
            cells[bits] = f"{statistics.mean(ahead):+.2f}{error}"
        assert f" | {row_of(cells)} |" in text, (table, name, base)
