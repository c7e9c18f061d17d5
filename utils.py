"""File and text helpers."""
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path, renamed to `path` once written: that holds old content or new."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # a killed save's is overwritten by the next
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text)


def write_json(path: str | Path, value: object) -> None:
    write_text(path, json.dumps(with_text_keys(value), indent=2) + "\n")


def with_text_keys(value: object) -> object:
    """Return a value whose dicts have text as keys, as JSON's: bit-widths are written `w2a4`."""
    if isinstance(value, dict):
        return {str(key): with_text_keys(part) for key, part in value.items()}
    return value


def one_line(error: BaseException | str) -> str:
    """Return what an error says, in one line; its type where it says nothing."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    if "in DataLoader worker process" in lines[0]:  # it arrives with the worker's traceback
        return lines[-1].split(": ", 1)[-1]
    return " ".join(lines) if lines[0].endswith(":") else lines[0]


def flag_text(value: object) -> str:
    """Return an argument's value as it is typed: lists with commas."""
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
