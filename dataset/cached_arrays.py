"""Arrays of decoded images, cached in the data folder: those of SVHN take minutes to make."""
import sys
import zlib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision import datasets

from dataset.download import filling
from utils import WriteError, one_line, replacing, unwinding_signals

Arrays = tuple[Tensor, Tensor]  # images (N, H, W, 3) uint8, labels (N,) int64


def cached_arrays(dataset: Dataset, transform: Callable,
                  source: Callable[[datasets.VisionDataset], tuple[str, str]],
                  read: Callable[[Dataset], Arrays]) -> Arrays:
    """Return read(dataset), from the files where that is cached; else cache it.

    dataset: torchvision's, several joined, or a part of them; any other, and a small part, is read.
    transform: what `read` applies. source: returns a data set's raw file and that file's checksum.
    """
    if isinstance(dataset, ConcatDataset):
        parts = [cached_arrays(part, transform, source, read) for part in dataset.datasets]
        images, labels = zip(*parts)
        return torch.cat(images), torch.cat(labels)
    if isinstance(dataset, Subset):
        if 2 * len(dataset) < len(dataset.dataset):
            return read(dataset)
        images, labels = cached_arrays(dataset.dataset, transform, source, read)
        return images[dataset.indices], labels[dataset.indices]

    if not isinstance(dataset, datasets.VisionDataset):
        return read(dataset)

    name, digest = source(dataset)
    made_of = f"{digest} {transform} Pillow {version('pillow')}, torchvision "
    made_of += version("torchvision")
    path = Path(dataset.root, f"{name}.arrays")
    if path.exists():
        try:
            return load(path, made_of, len(dataset))
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            print(f"{path} is made anew: {one_line(error)}", file=sys.stderr)
    images, labels = read(dataset)
    about = {"made of": made_of, "crc32": checksum(images, labels)}
    try:
        with unwinding_signals(), filling(path.parent), replacing(path) as temporary:
            save_file({"images": images, "labels": labels}, temporary, about)
    except (safetensors.SafetensorError, WriteError) as error:
        reason = one_line(error)
        print(f"decoded images are not kept for the next start: {reason}", file=sys.stderr)
    return images, labels


def load(path: Path, made_of: str, count: int) -> Arrays:
    """Return the arrays of a file; raises ValueError where they are damaged or of other images."""
    with safetensors.safe_open(path, "pt") as file:
        about = file.metadata() or {}
        if about.get("made of") != made_of:
            raise ValueError("of other data, or of another version of Pillow or torchvision")
        found = {name: file.get_tensor(name) for name in file.keys()}
    if about.get("crc32") != checksum(*found.values()) or len(found["labels"]) != count:
        raise ValueError("it is damaged")
    return found["images"], found["labels"]


def checksum(*tensors: Tensor) -> str:
    """Return a checksum of tensors, in any order."""
    return " ".join(sorted(f"{zlib.crc32(tensor.numpy()):08x}" for tensor in tensors))
