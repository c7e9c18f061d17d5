"""Standard output and error where they are closed, full, or a pipe that nobody reads."""
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from utils import one_line


class Output:
    """A text stream that never raises: once it cannot be written, it is silent.

    stream: None where it is closed. What its encoding lacks is written as an escape sequence, such
    as a path that is not UTF-8. failure: why it could not be written, or None.
    """

    def __init__(self, stream: TextIO | None):
        self.is_closed = stream is None
        self.stream = stream or open(os.devnull, "w")
        self.failure = None
        self.remark = None
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write text, or nothing after a failure; return its length."""
        if self.is_closed:
            self.fail("it is closed")
        with self.guard():
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Write what is buffered."""
        with self.guard():
            self.stream.flush()

    @contextlib.contextmanager
    def guard(self) -> Iterator[None]:
        """Turn an error of writing into `failure`."""
        try:
            yield
        except (OSError, ValueError) as error:  # ValueError: closed meanwhile
            self.fail(getattr(error, "strerror", None) or one_line(error))

    def fail(self, reason: str) -> None:
        """Record the first failure, and say what the program makes of it, if it goes on."""
        if self.failure:
            return
        self.failure = reason
        with contextlib.suppress(OSError, ValueError):  # it may be no file
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())  # takes what is still buffered
            os.close(null)
        if self.remark:
            print_message(f"{self.message()}: {self.remark}")

    def message(self) -> str:
        """Return what has failed, for a line on stderr."""
        return f"standard output cannot be written ({self.failure})"


def go_on_without_output(remark: str) -> None:
    """Let a failure of standard output be no error of the program: `remark` is said instead."""
    if isinstance(sys.stdout, Output):
        sys.stdout.remark = remark
        if sys.stdout.failure:
            print_message(f"{sys.stdout.message()}: {remark}")


def print_message(message: str) -> None:
    """Print a line of the program on stderr."""
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)


@contextlib.contextmanager
def lasting_streams() -> Iterator[Output]:
    """Make sys.stdout and sys.stderr Outputs within the context; yield the first."""
    stdout = sys.stdout
    stderr = sys.stderr
    sys.stdout = Output(stdout)
    sys.stderr = Output(stderr)
    try:
        yield sys.stdout
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout = stdout
        sys.stderr = stderr
