"""File and text helpers."""
import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` once it is written, so never by a part of it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # the next save overwrites that of a killed one
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write text to a file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path: str | Path, value: object) -> None:
    """Write a value as JSON to a file, whole or not at all; bit-widths become text."""
    write_text(path, json.dumps(with_text_keys(value), indent=2) + "\n")


def with_text_keys(value: object) -> object:
    """Return a value with the keys of its dicts as text, as JSON needs: `w2a4`."""
    if isinstance(value, dict):
        return {str(key): with_text_keys(part) for key, part in value.items()}
    return value


def one_line(error: BaseException | str) -> str:
    """Return an error's message in one line, or its type where it has none."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    if "in DataLoader worker process" in lines[0]:  # with the worker's traceback
        return lines[-1].split(": ", 1)[-1]
    return " ".join(lines) if lines[0].endswith(":") else lines[0]


def flag_text(value: object) -> str:
    """Return an argument's value as it is typed, a list with commas."""
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def commit() -> str | None:
    """Return this project's commit, or None without git or outside a repository."""
    command = ["git", "-C", Path(__file__).parent, "describe", "--always", "--exclude=*",
               "--abbrev=40", "--dirty= with local changes"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
