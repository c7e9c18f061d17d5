"""The first thing that a program does, before imports that take seconds; so it imports little."""
import os
import signal
import sys
from types import FrameType

PR_SET_PDEATHSIG = 1  # of Linux's prctl: the signal that a process gets when its parent ends


def prepare_process() -> None:
    """Choose what ends the process, and open what is closed of the standard streams.

    Until run_program takes over, Ctrl-C ends it with one line. A process of torchrun gets SIGTERM
    when its launcher ends, even by SIGKILL: it would train on alone.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored
        signal.signal(signal.SIGINT, end_at_once)

    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:  # a file of ours must not become standard output
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)

    if "TORCHELASTIC_RUN_ID" in os.environ:
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    import logging

    # Without a home directory it says at length that it does without its cache.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)


def end_at_once(number: int, frame: FrameType | None) -> None:
    """End the process by a signal, with one line on stderr."""
    if os.environ.get("RANK") in (None, "", "0"):
        try:
            os.write(2, f"{os.path.basename(sys.argv[0])}: interrupted\n".encode(errors="replace"))
        except OSError:  # stderr is closed
            pass
    os._exit(128 + number)
