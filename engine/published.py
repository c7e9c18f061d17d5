"""The sources of a checkpoint: a file, a results folder, a URL, or a published name."""
import hashlib
import http.client
import json
import os
import socket
import sys
import tempfile
from pathlib import Path

import torch

from engine.errors import UserError
from models.checkpoint import FileError, find_file, read_checkpoint
from utils import one_line, without_secrets

PREFIX = "https://www.dropbox.com/s/"
FILES = json.loads(Path(__file__).with_suffix(".json").read_text())  # {name: its part of the URL}
DATASET = {"resnet20q": "cifar10", "svhnq": "svhn", "resnet50q": "imagenet"}  # of training


def find_checkpoint(source: str | Path, *names: str) -> Path:
    """Return the checkpoint file of a source; raises UserError where there is none.

    source: a file; a folder that has one of `names`, the first that is in it or in its ckpt/; an
    http(s) URL; or a key of FILES. The last two are downloaded once, to cache_folder().
    """
    if Path(source).exists():
        return find_file(source, *names)
    if source in FILES:
        return download(f"{PREFIX}{FILES[source]}?dl=1", f"{source}.pth.tar")
    if str(source).startswith(("http://", "https://")):
        name = str(source).split("?")[0].rstrip("/").rsplit("/", 1)[-1]
        return download(source, f"{hashlib.sha256(source.encode()).hexdigest()[:12]}_{name[-80:]}")
    raise UserError(f"checkpoint {source} does not exist: give a file, a results folder, a URL, or "
                    "a published name, MODEL_1, _2, _4, _8, _32, _any_hard, _any_soft or "
                    "_any_recursive (of resnet50q no hard and soft)")


def cache_folder() -> Path:
    """Return the folder of downloads: any_precision in XDG_CACHE_HOME, by default ~/.cache.

    Raises UserError where there is neither.
    """
    folder = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "any_precision")
    try:
        return folder.expanduser()
    except RuntimeError:  # no home directory
        raise UserError("there is no home directory to keep downloads in: set XDG_CACHE_HOME to a "
                        "folder for them, or download the file yourself and give its path"
                        ) from None


def download(url: str, name: str) -> Path:
    """Download a checkpoint to cache_folder()/name once, and only if it is whole and readable."""
    path = cache_folder() / name
    if path.is_file():
        return path
    print(f"downloading {without_secrets(url)} to {path}")
    socket.setdefaulttimeout(60)  # seconds without a byte
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as place:
            file = Path(place, name)  # torch.hub may leave partial files
            torch.hub.download_url_to_file(url, str(file), progress=sys.stderr.isatty())
            read_checkpoint(file)
            file.rename(path)
    except (FileError, OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"{url} could not be downloaded as a whole checkpoint ({one_line(error)}): "
                        "check the address and the network, or fetch it with a browser and give "
                        "its path") from None
    finally:
        socket.setdefaulttimeout(None)
    return path
