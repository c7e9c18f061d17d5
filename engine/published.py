"""The sources of a checkpoint: a file, a results folder, a URL, or a published name."""
import hashlib
import http.client
import json
import os
import sys
import tempfile
from pathlib import Path

import torch

from dataset.download import cannot_write, downloading, reason_of
from engine.errors import UserError
from models.checkpoint import find_file, read_checkpoint
from models.fields import FileError
from utils import one_line, without_secrets

PREFIX = "https://www.dropbox.com/s/"
# {name: "link", its part of the URL, and "sha256", of the file; null: not known}
FILES = json.loads(Path(__file__).with_suffix(".json").read_text())
DATASET = {"resnet20q": "cifar10", "svhnq": "svhn", "resnet50q": "imagenet"}  # of training


def find_checkpoint(source: str | Path, *names: str) -> Path:
    """Return the checkpoint file of a source; raises UserError where there is none.

    source: a file; a folder that has one of `names`, the first that is in it or in its ckpt/; an
    http(s) URL; or a key of FILES. The last two are downloaded once, to cache_folder().
    """
    if Path(source).exists():
        return find_file(source, *names)
    if source in FILES:
        file = FILES[source]
        return download(f"{PREFIX}{file['link']}?dl=1", f"{source}.pth.tar", file["sha256"])
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


def download(url: str, name: str, sha256: str | None = None) -> Path:
    """Return cache_folder()/name, downloaded once, and again where it is damaged.

    sha256: of the file, where it is known. Raises UserError where the download is not a whole and
    readable checkpoint, and leaves nothing of it.
    """
    path = cache_folder() / name
    error_begins = without_secrets(url)
    if path.is_file():
        damage = find_damage(path, sha256)
        if not damage:
            return path
        print(f"{path} is damaged ({damage}): downloading it anew")
        error_begins = f"{path} is damaged, and {without_secrets(url)}"
    print(f"downloading {without_secrets(url)} to {path}", flush=True)
    try:
        with downloading():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as place:
                file = Path(place, name)
                torch.hub.download_url_to_file(url, str(file), progress=sys.stderr.isatty())
                damage = find_damage(file, sha256)
                if damage:
                    raise FileError(damage)
                file.replace(path)
    except (FileError, OSError, ValueError, http.client.HTTPException) as error:
        if cannot_write(error):
            raise UserError(f"the cache folder {path.parent} cannot be written ({one_line(error)}):"
                            " make room there and make it writable, or name another place by the "
                            "environment variable XDG_CACHE_HOME") from None
        raise UserError(f"{error_begins} could not be downloaded as a whole checkpoint "
                        f"({reason_of(error)}): check the address and the network, or fetch it "
                        "with a browser and give its path") from None
    return path


def find_damage(path: Path, sha256: str | None) -> str | None:
    """Return what is wrong with a downloaded checkpoint, or None."""
    try:
        read_checkpoint(path)
    except FileError as error:
        return one_line(error)
    digest = hashlib.sha256(path.read_bytes()).hexdigest() if sha256 else None
    return None if digest == sha256 else f"its SHA-256 is {digest}, not the published {sha256}"
