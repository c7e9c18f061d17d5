"""Files of torch.save, which are zip files: read as data alone, and checked by a SHA-256 that ends
them.
"""
import hashlib
import os
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy
import torch

from models.fields import FileError

# NumPy numbers, such as best_prec1 may be, are data; by their names in NumPy 1 and NumPy 2.
SCALAR = numpy.float64(0).__reduce__()[0]
NUMPY_NUMBERS = [
    (SCALAR, "numpy.core.multiarray.scalar"), (SCALAR, "numpy._core.multiarray.scalar"),
    numpy.dtype, numpy.dtypes.Float64DType, numpy.dtypes.Float32DType, numpy.dtypes.Int64DType]
ZIP_START = b"PK\3\4"
ZIP_END = b"PK\5\6"  # of the last record, of ZIP_END_LENGTH bytes where it has no comment
ZIP_END_LENGTH = 22
HASH_NAME = b"SHA-256 "
COMMENT_LENGTH = len(HASH_NAME) + 64


def read_archive(path: str | Path) -> dict:
    """Read what torch.save wrote, a dict with a state_dict; raises FileError for anything else."""
    check_archive(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(NUMPY_NUMBERS):
            warnings.simplefilter("ignore")  # torch warns of unusual files, not of unsafe ones
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's own text would advise to run the file's code
        raise FileError(unreadable(path, type(error).__name__)) from None
    if isinstance(content, dict) and content and all(map(torch.is_tensor, content.values())):
        content = {"state_dict": content}  # as torchvision saves it
    weights = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(key, str) for key in weights):
        raise FileError(f"{path} is not a checkpoint of this kind: it must be a dict with a "
                        "state_dict")
    return content


def unreadable(path: str | Path, reason: str) -> str:
    """Return the message about a file that is no checkpoint, or not a whole one."""
    return (f"{path} is not a checkpoint that can be read safely ({reason}): it is cut short, not "
            "a checkpoint, or holds code; copy it again, or give another")


def check_archive(path: str | Path) -> None:
    """Raise FileError for a damaged zip file: by its SHA-256, or without one by each CRC-32."""
    with open(path, "rb") as file:
        if file.read(len(ZIP_START)) != ZIP_START:
            return  # of a torch before 1.6, without checksums
        length = max(0, file.seek(0, os.SEEK_END) - COMMENT_LENGTH)
        file.seek(length)
        comment = file.read()
        damaged = None
        if comment.startswith(HASH_NAME):
            if comment != HASH_NAME + sha256(file, length):
                damaged = "it does not have its SHA-256"
        elif not comment[-ZIP_END_LENGTH:].startswith(ZIP_END):
            raise FileError(unreadable(path, "no end of a zip file"))
        else:
            damaged = wrong_entry(path)
    if damaged:
        raise FileError(f"{path} is damaged: {damaged}: copy or download it again")


def wrong_entry(path: str | Path) -> str | None:
    """Return what is wrong with the entries of a zip file, or None where each has its CRC-32."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError,
            struct.error, UnicodeDecodeError) as error:
        name = f"its archive ({type(error).__name__})"
    return name and f"{name} does not have its CRC-32"


def add_hash(path: str | Path) -> None:
    """Append to a file of torch.save, a zip file, the SHA-256 of all before it, as its comment."""
    with open(path, "r+b") as file:
        file.seek(-2, os.SEEK_END)  # the last field: the length of the comment
        file.write(struct.pack("<H", COMMENT_LENGTH))
        file.write(HASH_NAME + sha256(file, file.tell()))


def sha256(file: BinaryIO, length: int) -> bytes:
    """Return the SHA-256 of the first `length` bytes of a file, as 64 digits."""
    digest = hashlib.sha256()
    file.seek(0)
    while length > 0:
        part = file.read(min(length, 2**20))
        digest.update(part)
        length -= len(part)
    return digest.hexdigest().encode()
