"""Errors that the user can fix, and how programs print them: in one line."""
import multiprocessing
import signal
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch

from dataset.data import DataError
from engine.distributed import ProcessError, rank
from models.checkpoint import FileError
from utils import one_line


class UserError(Exception):
    """An error that the user can fix, printed as one line on stderr."""
    exit_code = 1


class UsageError(UserError):
    """A wrong argument on the command line."""
    exit_code = 2


class StopRequest:
    """A context that records SIGTERM or Ctrl-C in `signal`; a second one acts at once."""
    signal = None

    def __enter__(self):
        self.handlers = {number: signal.signal(number, self.remember)
                         for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def remember(self, number: int, frame: FrameType | None) -> None:
        """Record a signal, and restore its previous handler."""
        self.signal = number
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
    """Run main(parse()); errors that the user can fix end it with one line and an exit code."""
    try:
        main(parse())
        return
    except (UserError, FileError, DataError, ProcessError, OSError) as error:  # such as a full disk
        code = getattr(error, "exit_code", 1)
        message = str(error) if isinstance(error, Stopped) else f"error: {one_line(error)}"
    except (RuntimeError, ValueError) as error:
        message = f"error: {explain(error)}"
        code = 1
    except KeyboardInterrupt:
        message = "interrupted"
        code = 128 + signal.SIGINT
    finally:
        workers = multiprocessing.active_children()
        if workers:  # data workers, which ignore the SIGTERM of Python's exit
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's would report a kill
        for worker in workers:
            worker.kill()
    if code != UsageError.exit_code or rank() == 0:  # all processes have the same usage error
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(code)


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
    if "DataLoader worker" in str(error):
        return f"{one_line(error)}: it may have run out of memory, lower --workers"
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return (f"--compile needs a compiler that works here ({one_line(error)}): leave it out, or "
                "where a run goes on, pass --no-compile")
    raise error
