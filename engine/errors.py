"""Errors that the user can fix, and how programs print them: in one line."""
import contextlib
import multiprocessing
import os
import re
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import torch

from dataset.data import DataError
from engine.distributed import ProcessError, check_launch, rank
from engine.output import lasting_streams, print_message
from models.calibration import StatisticsError
from models.fields import FileError
from models.losses import ForwardLossError
from utils import NO_SPACE, WriteError, one_line, without_secrets


class UserError(Exception):
    """An error that the user can fix, printed as one line on stderr."""
    exit_code = 1


class UsageError(UserError):
    """A wrong argument on the command line."""
    exit_code = 2


class StopRequest:
    """A context that records the first SIGTERM, Ctrl-C, SIGHUP or SIGUSR1 as `received`.

    A second SIGTERM or Ctrl-C acts at once, but not in a process of torchrun, which passes on
    signals that may have reached the process already. SIGHUP stays ignored where it was, by nohup.
    """
    received = None

    def __enter__(self):
        numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self.handlers = {number: signal.signal(number, self.remember) for number in numbers}
        return self

    def remember(self, number: int, frame: FrameType | None) -> None:
        """Record a signal; let another one like it act, where people send them."""
        self.received = self.received or number
        if number in (signal.SIGTERM, signal.SIGINT) and "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(number, self.handlers[number])

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


class Stopped(UserError):
    """The run was stopped by signal `number` (None: sent to another process), and is saved."""

    def __init__(self, number: int | None, where: str = ""):
        number = number or signal.SIGTERM
        super().__init__(f"stopped by {signal.Signals(number).name} {where}")
        self.number = number
        self.exit_code = 128 + number


def run_program(main: Callable[[Namespace], object], parse: Callable[[], Namespace]) -> None:
    """Run main(parse()); errors that the user can fix end it with one line and an exit code.

    So does a standard output that cannot be written, unless main goes on without it.
    """
    with lasting_streams() as output, raising_interrupts():
        code, message = outcome(main, parse)
        output.flush()
        if code == 0 and output.failure and not output.remark:
            code = 1
            message = f"error: {output.message()}: give it a place that can be written"
        if message:
            print_message(without_secrets(message))
    if code:
        sys.exit(code)


def outcome(main: Callable[[Namespace], object],
            parse: Callable[[], Namespace]) -> tuple[int, str | None]:
    """Run main(parse()); return the exit code, and a message where the user can do something."""
    try:
        check_launch()
        main(parse())
    except SystemExit as ended:  # of the parser, which has printed its own message
        return ended.code or 0, None
    except (Stopped, UsageError) as error:  # the same in all processes
        message = str(error)
        if not isinstance(error, Stopped):
            message = f"error: {one_line(error, whole=True)}"
        return error.exit_code, message if rank() == 0 else None
    except (UserError, FileError, StatisticsError, ForwardLossError, DataError, ProcessError,
            WriteError) as error:
        return 1, f"error: {one_line(error, whole=True)}"
    except OSError as error:
        if error.errno in NO_SPACE:
            error = WriteError(error.filename or "a file", error)
        return 1, f"error: {one_line(error)}"
    except (RuntimeError, ValueError) as error:
        return 1, f"error: {explain(error)}"
    except KeyboardInterrupt:
        return 128 + signal.SIGINT, "interrupted"
    finally:
        kill_workers()
    return 0, None


def kill_workers() -> None:
    """Kill data workers, which ignore the SIGTERM of Python's exit."""
    workers = multiprocessing.active_children()
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would report a kill
    for worker in workers:
        worker.kill()


@contextlib.contextmanager
def raising_interrupts() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt within the context, where it is not ignored."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def explain(error: Exception) -> str:
    """Return what to do about an error of torch; re-raise an unknown one."""
    if "more than 1 value per channel" in str(error):
        return ("a BatchNorm got one image of one pixel, which has no variance: choose a "
                "--batch-size that leaves no single image at the end of an epoch")
    if "Output size is too small" in str(error) or "Kernel size can't be greater" in str(error):
        return f"the images are too small for this network ({one_line(error)}): choose another"
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
        return (f"out of memory ({one_line(error)}): lower --batch-size or --width, or for a large "
                "data set --train-fraction")
    if str(error).startswith("DataLoader worker"):  # else it is an error of what a worker calls
        return f"{one_line(error)}: it may have run out of memory, lower --workers"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        if type(error).__name__ == "Unsupported":
            return (f"--compile cannot follow {user_code(error)} ({one_line(error)}): write it "
                    "otherwise, or pass --no-compile")
        if "RecompileLimit" in type(error).__name__:
            return ("--compile compiles again and again, as where code reads a Python "
                    "number that changes: make it a tensor, or pass --no-compile")
        return (f"--compile needs a compiler that works here ({one_line(error)}): pass "
                "--no-compile")
    raise error


def user_code(error: Exception) -> str:
    """Return the innermost place outside torch that torch.compile names in an error."""
    places = re.findall(r'File "(.+)", line (\d+)', str(error))
    outside = [f"{file}, line {line}" for file, line in places
               if not Path(file).is_relative_to(Path(torch.__file__).parent)]
    return outside[-1] if outside else "the network's code"
