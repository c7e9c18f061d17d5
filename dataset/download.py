"""Downloads that end: without a byte for a minute, beyond a size, or at a signal; none in part."""
import contextlib
import errno
import fcntl
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

from utils import one_line, unwinding_signals

TIMEOUT = 60  # seconds without a byte
LIMIT = 4 * 10**9  # bytes of a file; SVHN's extra split, the largest one, has 1.3 * 10**9
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ELOOP,
              errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def downloading() -> Iterator[None]:
    """Raise OSError in the context where a server is silent for TIMEOUT or a file exceeds LIMIT.

    SIGTERM, SIGHUP and SIGUSR1 unwind the context, so that what is within it can clean up, and then
    act as they did before it.
    """
    timeout = socket.getdefaulttimeout()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limits = [limit for limit in (LIMIT, soft, hard) if limit != resource.RLIM_INFINITY]
    with unwinding_signals():
        socket.setdefaulttimeout(TIMEOUT)
        resource.setrlimit(resource.RLIMIT_FSIZE, (min(limits), hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            socket.setdefaulttimeout(timeout)


@contextlib.contextmanager
def filling(folder: str | Path) -> Iterator[None]:
    """Add files to a folder, made where it is missing: all that the context writes, or none.

    Another process that fills the folder waits; it goes on once the first has ended or died.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        before = set(folder.rglob("*"))
        for path in before:
            if path.is_fifo():
                raise FileExistsError(errno.EEXIST, f"{path} is a pipe: remove it")
        try:
            yield
        except BaseException:
            for path in sorted(folder.rglob("*"), reverse=True):  # files before their folders
                if path not in before:
                    path.rmdir() if path.is_dir() else path.unlink()
            raise
    finally:
        os.close(lock)


def reason_of(error: BaseException) -> str:
    """Return in one line why a download failed."""
    cause = error.reason if isinstance(error, URLError) else error
    if isinstance(cause, TimeoutError):
        return f"no byte for {TIMEOUT} s"
    if getattr(cause, "errno", None) == errno.EFBIG:
        return f"more than {LIMIT / 10**9:g} GB, the limit of a file"
    return one_line(error)


def cannot_write(error: BaseException) -> bool:
    """Return whether an error is the disk's or its owner's, not the network's."""
    return (isinstance(error, OSError) and not isinstance(error, URLError)
            and error.errno in UNWRITABLE)
