"""Where a checkpoint comes from: a file, a results folder, a URL, or the name of a published one."""
import hashlib
import http.client
import os
import socket
import sys
import tempfile
from pathlib import Path

import torch

from engine.errors import UserError
from engine.state import load_checkpoint
from utils import one_line, replacing

PREFIX = "https://www.dropbox.com/s/"
FILES = {  # name -> its part of the link; the data set is that of its model, below
    "resnet20q_1": "81efiwknrxjfz9j/resnet20q_1.pth.tar",
    "resnet20q_2": "x7u2cpye4zp3u7r/resnet20q_2.pth.tar",
    "resnet20q_4": "h8o7c9dykq82m9u/resnet20q_4.pth.tar",
    "resnet20q_8": "5k3e4sztgo9tvko/resnet20q_8.pth.tar",
    "resnet20q_32": "2q0buwb36eqfup5/resnet20q_32.pth.tar",
    "resnet20q_any_hard": "08jcbc43e5kgl4w/resnet20q_any_hard.pth.tar",
    "resnet20q_any_soft": "xg2xw5tburppftf/resnet20q_any_soft.pth.tar",
    "resnet20q_any_recursive": "jx93fr74wfwtxs6/resnet20q_any_recursive.pth.tar",
    "svhnq_1": "qji6bav9wbdduav/svhnq_1.pth.tar",
    "svhnq_2": "6nficennhvi988y/svhnq_2.pth.tar",
    "svhnq_4": "3qggq03fn0z89lb/svhnq_4.pth.tar",
    "svhnq_8": "vxyxwuf29ro011u/svhnq_8.pth.tar",
    "svhnq_32": "eaex2jrhywhx61r/svhnq_32.pth.tar",
    "svhnq_any_hard": "0exa8t7y0a9c4zg/svhnq_any_hard.pth.tar",
    "svhnq_any_soft": "yfnpuc3t86iw3nr/svhnq_any_soft.pth.tar",
    "svhnq_any_recursive": "x9mxt69s2bmlzuz/svhnq_any_recursive.pth.tar",
    "resnet50q_1": "qpywwky7cx3jtsk/resnet50q_1.pth.tar",
    "resnet50q_2": "93uthplop94box2/resnet50q_2.pth.tar",
    "resnet50q_4": "j43l2zyxkj7auqa/resnet50q_4.pth.tar",
    "resnet50q_8": "q879ap3auofcgo2/resnet50q_8.pth.tar",
    "resnet50q_32": "t74fbzsxxs0bkk4/resnet50q_32.pth.tar",
    "resnet50q_any_recursive": "df87f40od0g8uq9/resnet50q_any_recursive.pth.tar",
}
DATASET = {"resnet20q": "cifar10", "svhnq": "svhn", "resnet50q": "imagenet"}  # trained on


def find_checkpoint(source, *names):
    """Return the checkpoint file that `source` means; UserError where there is none.

    A file; a folder that holds, in it or in its ckpt/, the first of `names`; an http(s) URL; a key of
    FILES. The last two are downloaded once, to cache_folder().
    """
    path = Path(source)
    if path.is_dir():
        for name in names:
            for candidate in (path / "ckpt" / name, path / name):
                if candidate.is_file():
                    return candidate
        raise UserError(f"{path} holds no checkpoint: looked there and in its ckpt/ for "
                        f"{', '.join(names)}")
    if path.exists():
        return path
    if source in FILES:
        return download(f"{PREFIX}{FILES[source]}?dl=1", f"{source}.pth.tar")
    if str(source).startswith(("http://", "https://")):
        name = str(source).split("?")[0].rstrip("/").rsplit("/", 1)[-1]
        return download(source, f"{hashlib.sha256(source.encode()).hexdigest()[:12]}_{name[-80:]}")
    raise UserError(
        f"checkpoint {source} does not exist: give a file, a results folder, a URL, or a published "
        "name, MODEL_1, _2, _4, _8, _32, _any_hard, _any_soft or _any_recursive (of resnet50q no hard "
        "and soft)")


def cache_folder():
    """Return where downloads are kept: ~/.cache/any_precision, or under XDG_CACHE_HOME."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "any_precision"


def download(url, name):
    """Fetch url to cache_folder()/name, whole and readable as a checkpoint, or not at all; once."""
    path = cache_folder() / name
    if path.is_file():
        return path
    print(f"downloading {url} to {path}")
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(60)  # seconds without a byte
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as place:
            file = Path(place, path.name)  # torch.hub may leave parts behind
            torch.hub.download_url_to_file(url, str(file), progress=sys.stderr.isatty())
            load_checkpoint(file)
            with replacing(path) as temporary:
                file.rename(temporary)
    except UserError:  # a page that says why not, or a file cut short
        raise UserError(f"what {url} sends is not a whole checkpoint: try again, or fetch it with a "
                        "browser and give its path") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UserError(f"{url} could not be downloaded ({one_line(error)}): check the address and "
                        "the network, or fetch it with a browser and give its path") from None
    finally:
        socket.setdefaulttimeout(timeout)
    return path
