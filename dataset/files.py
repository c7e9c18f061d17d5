"""Files of data sets: images of a folder, and what a file must be to be what it says."""
import contextlib
import math
import os
import stat
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision import datasets
from torchvision.datasets.folder import has_file_allowed_extension
from torchvision.datasets.utils import check_integrity

from dataset.download import cannot_write
from utils import one_line

IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "PPM", "WEBP", "TIFF")  # PIL's names
IMAGES = "images-idx3-ubyte"  # ends of names in MNIST's format
LABELS = "labels-idx1-ubyte"
REMEDY = "remove it to get it anew, or name another root with --data-dir"


class DataError(Exception):
    """Data that is missing, damaged, or inconsistent."""


@contextlib.contextmanager
def writing_to(root: str | Path) -> Iterator[None]:
    """Raise DataError naming a data set's root where it cannot be written."""
    try:
        yield
    except OSError as error:
        if not cannot_write(error):
            raise
        raise DataError(f"{root} cannot be written ({one_line(error)}): make room there and make "
                        "it writable, or name another root with --data-dir") from None


def load_image(path: str | os.PathLike) -> Image.Image:
    """Read an image file of any mode as RGB.

    Its content, not its name, must be of IMAGE_FORMATS: PIL starts a program for some others.
    Raises DataError naming a file that cannot be read.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
            raise ValueError("no regular file")
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            if image.mode.startswith(("I", "F")):  # which would be clipped at 255
                raise ValueError(f"of mode {image.mode}: more than 8 bits a pixel")
            image.info.pop("transparency", None)  # dropped anyway; a palette's would be warned of
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is not a readable image of {', '.join(IMAGE_FORMATS)} "
                        f"({one_line(error)}): replace or remove it") from None


class ImageFolder(datasets.ImageFolder):
    """torchvision's ImageFolder, which ends where links form a circle, and refuses pipes."""

    @staticmethod
    def make_dataset(directory: str | Path, class_to_idx: dict[str, int],
                     extensions: tuple[str, ...] | None = None,
                     is_valid_file: Callable[[str], bool] | None = None,
                     allow_empty: bool = False) -> list[tuple[str, int]]:
        """Return (path, class index) of all images, in torchvision's order."""
        samples = []
        empty = []
        for name in sorted(class_to_idx):
            found = list_images(os.path.join(directory, name), extensions, (identity(directory),))
            samples += [(os.path.join(folder, file), class_to_idx[name])
                        for folder, files in sorted(found) for file in files]
            if not any(files for _, files in found):
                empty.append(name)
        if empty:
            raise FileNotFoundError(f"class folders without an image: {', '.join(empty)}")
        return samples


def identity(path: str | Path) -> tuple[int, int]:
    """Return what a folder is known by, whatever links lead to it."""
    found = os.stat(path)
    return found.st_dev, found.st_ino


def list_images(folder: str, extensions: tuple[str, ...],
                above: tuple[tuple[int, int], ...]) -> list[tuple[str, list[str]]]:
    """Return a folder and all those in it, each with the sorted names of its images.

    Hidden ones are left out. above: the identities of the folders that it stands in. Raises
    DataError for a link to one of them, which would be walked without end, and for an image that
    is no file.
    """
    own = identity(folder)
    if own in above:
        raise DataError(f"{folder} is a link to a folder that it stands in: remove it")
    files = []
    inner = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):  # such as macOS's ._photo.jpg, which is no image
                continue
            if entry.is_dir():
                inner += list_images(entry.path, extensions, (*above, own))
            elif has_file_allowed_extension(entry.name, extensions):
                if not entry.is_file():
                    raise DataError(f"{entry.path} is not a file, but a pipe, a device, or a link "
                                    "to nothing: remove it")
                files.append(entry.name)
    return [(folder, sorted(files)), *inner]


def check_idx(path: Path, dimensions: int, md5: str) -> None:
    """Check a raw file of MNIST's format: its size, and against the .gz beside it if there is one.

    dimensions: 3 of images, 1 of labels. md5: the published one of the .gz. Raises DataError.
    """
    content = path.read_bytes()
    head = 4 * (1 + dimensions)
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < head:
        raise DataError(f"{path} does not begin as a file of MNIST's format with {dimensions} "
                        f"dimensions: {REMEDY}")
    expected = head + math.prod(struct.unpack(f">{dimensions}I", content[4:head]))
    if len(content) != expected:
        raise DataError(f"{path} has {len(content):,} bytes, not the {expected:,} of its "
                        f"header: {REMEDY}")

    packed = path.with_name(f"{path.name}.gz")
    if not packed.is_file():
        return
    if not check_integrity(packed, md5):
        raise DataError(f"{packed} does not have the published MD5 {md5}: remove it to go on with "
                        f"{path.name} as it is, or both to get them anew")
    with open(packed, "rb") as file:
        file.seek(-8, os.SEEK_END)
        crc32, size = struct.unpack("<II", file.read())  # of the content
    if (zlib.crc32(content), len(content)) != (crc32, size):
        raise DataError(f"{path} is not the content of {packed.name} beside it: {REMEDY}")


def check_samples(dataset: Dataset | list, source: str, shape: tuple[int, int, int] | None,
                  num_classes: int | None) -> None:
    """Check a part of a data set: its images against its labels, and both against its row.

    source: where it was read, for the error. shape: images, height and width, where they are known.
    num_classes: None where they are folders. Raises DataError.
    """
    count = len(dataset)
    labels = listed_labels(dataset)
    if labels is not None and len(labels) != count:
        raise DataError(f"{file_of(dataset, LABELS, source)} holds {len(labels):,} labels for "
                        f"{count:,} images: {REMEDY}")
    if not count:
        raise DataError(f"{file_of(dataset, IMAGES, source)} holds no images: {REMEDY}")
    if shape:
        width, height = dataset[0][0].size
        if (count, height, width) != shape:
            raise DataError(
                f"{file_of(dataset, IMAGES, source)} holds {count:,} images of {height} x {width} "
                f"pixels, not {shape[0]:,} of {shape[1]} x {shape[2]}: {REMEDY}")
    is_final = getattr(dataset, "target_transform", None) is None  # else a batch shows them
    if labels is not None and num_classes and is_final:
        check_labels(labels, num_classes, file_of(dataset, LABELS, source))


def listed_labels(dataset: Dataset | list) -> Sequence[int] | None:
    """Return the labels that a data set of torchvision lists, before any transform; else None."""
    if isinstance(dataset, Subset):
        labels = listed_labels(dataset.dataset)
        return None if labels is None else [labels[index] for index in dataset.indices]
    labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
    if isinstance(dataset, datasets.VisionDataset):
        return labels
    is_list = isinstance(labels, (list, tuple, numpy.ndarray, Tensor))
    return labels if is_list and len(labels) == len(dataset) else None  # of names, for one


def check_labels(labels: Sequence[int], num_classes: int, source: str,
                 remedy: str = REMEDY) -> None:
    """Raise DataError, naming the source, where a label is not from 0 to num_classes - 1."""
    labels = numpy.asarray(labels)
    if labels.dtype.kind not in "iu":
        return  # whatever its row makes of them
    invalid = labels[(labels < 0) | (labels >= num_classes)]
    if len(invalid):
        raise DataError(f"{source} holds a label {invalid[0]}, not one of its {num_classes} "
                        f"classes, 0 to {num_classes - 1}: {remedy}")


def file_of(dataset: Dataset | list, ending: str, source: str) -> str:
    """Return the raw file of a data set in MNIST's format; the source of any other."""
    if isinstance(dataset, datasets.MNIST):
        prefix = "train" if dataset.train else "t10k"
        path = os.path.join(dataset.raw_folder, f"{prefix}-{ending}")
        if os.path.exists(path):
            return path
    return source
