"""Processes that import nothing anew: forked from one that has run no backward pass."""
import contextlib
import multiprocessing
import os
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import runs


class Forks:
    """A process, forked from this one, that forks others, one at a time.

    Torch refuses a backward pass in a fork of a process that has run one, so it is made before.
    """

    def __init__(self):
        self.connection, other = multiprocessing.Pipe()
        self.process = os.fork()
        if self.process == 0:
            try:
                self.connection.close()  # so that the other end's closing is seen
                serve(other)
            finally:
                os._exit(0)
        other.close()

    def run(self, function: Callable, *args: object, cwd: Path | str = ".",
            env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
        """Call function(*args) in a fork; return its exit code and what it printed.

        The function, of a module, returns the exit code. env: its whole environment.
        """
        with tempfile.TemporaryDirectory() as folder:
            outputs = [Path(folder, name) for name in ("out", "err")]
            self.connection.send((function, args, os.path.abspath(cwd), env, outputs))
            code = self.connection.recv()
            return subprocess.CompletedProcess(args, code, *(path.read_text() for path in outputs))

    def close(self) -> None:
        self.connection.close()
        os.waitpid(self.process, 0)


def serve(connection):
    """Fork as requested, until the other end is closed."""
    # Python 3.12 warns of forks of a process that has threads: shown by pytest, not to users.
    warnings.simplefilter("ignore", DeprecationWarning)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            function, args, cwd, env, outputs = connection.recv()

            def call():
                connection.close()
                os.chdir(cwd)
                if env is not None:
                    os.environ.clear()
                    os.environ.update(env)
                return function(*args)

            connection.send(runs.wait(runs.fork(call, *outputs)))
