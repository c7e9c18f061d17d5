"""Helpers for files, signals, texts, random states and progress bars."""
import contextlib
import errno
import hashlib
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType

import numpy
import torch
from tqdm import tqdm

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # error numbers of a full disk


class WriteError(OSError):
    """A file that cannot be written; one line, with a remedy."""

    def __init__(self, path: str | Path, error: BaseException | str):
        reason = getattr(error, "strerror", None) or one_line(error)
        super().__init__(f"{path} cannot be written ({reason}): free space there, or choose "
                         "another folder; what was saved before is kept")


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Raise WriteError naming `path` where the context, which writes it, raises OSError."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(path, error) from None


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path that replaces `path` once it is written whole.

    Raises WriteError where it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # the next save overwrites that of a killed one
    try:
        with writing(path):
            yield temporary
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class SignalReceived(BaseException):
    """SIGTERM, SIGHUP or SIGUSR1, which unwinds the code as KeyboardInterrupt does."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def unwinding_signals() -> Iterator[None]:
    """Have signals that end the process unwind the context first; ignored ones stay ignored."""
    handlers = {}

    def unwind(number: int, frame: FrameType | None) -> None:
        for each in handlers:
            signal.signal(each, signal.SIG_IGN)  # a second one must not disturb the cleaning up
        raise SignalReceived(number)

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                handlers[number] = signal.getsignal(number)
        for number in handlers:
            signal.signal(number, unwind)
    try:
        yield
    except SignalReceived as received:
        restore()
        signal.raise_signal(received.number)
        raise SystemExit(128 + received.number) from None  # the former handler only took note
    finally:
        restore()


def write_text(path: str | Path, text: str) -> None:
    """Write text to a file, whole or not at all; raises WriteError.

    Paths in it that are not UTF-8 keep their bytes.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_json(path: str | Path, value: object) -> None:
    """Write a value as JSON to a file, whole or not at all; bit-widths become text."""
    write_text(path, json.dumps(with_text_keys(value), indent=2) + "\n")


def with_text_keys(value: object) -> object:
    """Return a value with the keys of its dicts as text, as JSON needs: `w2a4`."""
    if isinstance(value, dict):
        return {str(key): with_text_keys(part) for key, part in value.items()}
    return value


def without_secrets(value: object) -> object:
    """Return a text, or the texts in lists and dicts, without what may be a token in their URLs.

    The user's name and password, and the query, become `***`.
    """
    if isinstance(value, dict):
        return {key: without_secrets(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_secrets(part) for part in value]
    if not isinstance(value, str):
        return value
    text = re.sub(r"(https?://)[^/?#@\s]*@", r"\1***@", value)
    return re.sub(r"""(https?://[^?#\s'"]*[?#])[^\s'"]*[^\s'",;:)]""", r"\1***", text)


def escaped(text: str) -> str:
    """Return text with control characters, and what is not Unicode, as escape sequences.

    For names in files, which could move a terminal's cursor or change its colors.
    """
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def brief(value: object) -> str:
    """Return a value of a file for a message: its repr in one line, of at most 80 characters."""
    try:
        text = escaped(" ".join(repr(value).split()))
    except RuntimeError:  # lists in lists without end
        text = f"a {type(value).__name__}"
    return text if len(text) <= 80 else f"{text[:80]}..."


def one_line(error: BaseException | str, whole: bool = False) -> str:
    """Return an error's message in one line, escaped, or its type where it has none.

    whole: keep all of it, as of our own errors, which have further lines only where a file's name
    has a line break.
    """
    text = str(error).strip() or type(error).__name__
    lines = text.splitlines()
    if "in DataLoader worker process" in lines[0]:  # with the worker's traceback
        return escaped(lines[-1].split(": ", 1)[-1])
    if whole:
        return escaped(text)
    return escaped(" ".join(lines) if lines[0].endswith(":") else lines[0])


def mean_and_deviation(values: Sequence[float]) -> str:
    """Return values as a table's cell: mean ± standard deviation, if there are several."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def markdown_table(head: Sequence[object], rows: Iterable[Sequence[object]],
                   align_right: bool = False) -> str:
    """Return a Markdown table of aligned columns, without a line break at its end.

    align_right: all columns but the first.
    """
    lines = [[str(cell).replace("|", r"\|") for cell in line] for line in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    others = [str.rjust if align_right else str.ljust] * (len(widths) - 1)
    lines = [[align(cell, width) for align, cell, width in zip((str.ljust, *others), line, widths)]
             for line in lines]
    rules = ["-" * (width + 2) for width in widths]
    if align_right:
        rules[1:] = [f"{rule[1:]}:" for rule in rules[1:]]
    first, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([first, f"|{'|'.join(rules)}|", *body])


def flag_text(value: object) -> str:
    """Return an argument's value as it is typed, a list with commas."""
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def commit() -> str | None:
    """Return this project's commit, or None without git or outside a repository.

    Where files were changed, or modules added to its packages, it ends with a digest that tells
    these changes from others.
    """
    root = Path(__file__).parent

    def git(*words: str) -> bytes:
        return subprocess.run(["git", "-C", root, *words], check=True, capture_output=True).stdout

    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        found = git("rev-parse", "HEAD").decode().strip()
        changes = [git("diff", "--no-ext-diff", "HEAD", "--", ".")]
        packages = [f"{name}/*.py" for name in ("models", "dataset", "engine", "deploy")]
        added = git("ls-files", "-z", "--others", "--exclude-standard", *packages)
        for name in filter(None, added.split(b"\0")):
            with contextlib.suppress(OSError):
                changes += [name, (root / os.fsdecode(name)).read_bytes()]
        if any(changes):
            found += f" with local changes {hashlib.sha256(b''.join(changes)).hexdigest()[:8]}"
        return found


@contextlib.contextmanager
def keeping_random_states(devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """Restore on exit the random states of Python, NumPy and torch, there on the CPU and devices.
    """
    python_state = random.getstate()
    numpy_state = numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python_state)
        numpy.random.set_state(numpy_state)


def progress(batches: Iterable, name: str) -> tqdm:
    """Return an iterator over batches, a context that shows a bar where stderr is a terminal.

    Of several processes that torchrun started, the first shows it.
    """
    is_shown = os.environ.get("RANK", "0") == "0" and sys.stderr.isatty()
    return tqdm(batches, desc=name, unit="batch", leave=False, file=sys.stderr,
                disable=not is_shown)
