"""The data sets: a row each in DATASETS, and their folders in data_paths."""
import contextlib
import gzip
import os
import random
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision import datasets, transforms

from dataset.download import downloading, filling, reason_of
from dataset.files import (IMAGES, LABELS, DataError, ImageFolder, check_idx, check_samples,
                           load_image, writing_to)
from dataset.folder import PREFIX, is_folder, open_folder
from utils import one_line, replacing, unwinding_signals

Samples = Dataset | list  # of (PIL image, label)

HALF = (0.5,) * 3
FASHION_MNIST_COPY = Path("/usr/share/datasets/fashion-mnist")  # of Debian's dataset-fashion-mnist


def open_digits(root: str | Path, split: str) -> list[tuple[Image.Image, int]]:
    """Open scikit-learn's handwritten digits: 1,797 real scans of 8 x 8 pixels, here RGB.

    Splits: train of 1,437, val of 360, stratified by class. Returns a list of (PIL image, label).
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    scans, labels = load_digits(return_X_y=True)  # (1797, 64) in 0..16
    grey = numpy.round(scans * 255 / 16).astype(numpy.uint8).reshape(-1, 8, 8)
    parts = train_test_split(grey, labels, test_size=0.2, random_state=0, stratify=labels)
    images, labels = parts[0::2] if split == "train" else parts[1::2]
    return [(Image.fromarray(image).convert("RGB"), int(label))
            for image, label in zip(images, labels)]


def open_fashion_mnist(root: str | Path, split: str) -> Dataset:
    """Open Fashion-MNIST from root, or where it is missing from FASHION_MNIST_COPY or the web."""
    raw = Path(root, "FashionMNIST", "raw")
    copies = {raw / packed.stem: packed for packed in FASHION_MNIST_COPY.glob("*.gz")}
    if not all(path.exists() for path in copies):
        with writing_to(root), unwinding_signals(), filling(raw):  # one run at a time
            for path, packed in copies.items():
                if not path.exists():
                    unpack(packed, path)
    return open_mnist(datasets.FashionMNIST, root, split)


def unpack(packed: Path, path: Path) -> None:
    """Write what a file of FASHION_MNIST_COPY holds to a path."""
    try:
        content = gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{packed} cannot be read ({one_line(error)}): install it anew, or remove "
                        "it to download Fashion-MNIST") from None
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def open_mnist(kind: type[datasets.MNIST], root: str | Path, split: str) -> Dataset:
    """Open MNIST or a data set in its format; verify its raw files, as torchvision does not."""
    raw = Path(root, kind.__name__, "raw")
    prefix = "train" if split == "train" else "t10k"
    published = dict(kind.resources)  # {name of a .gz: MD5}
    for ending, dimensions in ((IMAGES, 3), (LABELS, 1)):
        path = raw / f"{prefix}-{ending}"
        if path.is_file():
            check_idx(path, dimensions, published[f"{path.name}.gz"])
    return open_downloadable(kind, root, train=split == "train")


def open_image_folder(root: str | Path, split: str) -> ImageFolder:
    """Open a split of ImageNet: a folder of images per class."""
    folder = Path(root, split)
    try:
        return ImageFolder(folder, loader=load_image)
    except OSError as error:
        raise DataError(f"{folder} does not hold imagenet ({one_line(error)}): put one folder of "
                        f"images per class under {Path(root, 'train')} and {Path(root, 'val')}, or "
                        "name another root with --data-dir") from None


def open_downloadable(kind: type[datasets.VisionDataset], root: str | Path,
                      **split: str | bool) -> Dataset:
    """Open and verify a torchvision data set; download it where it is missing or altered."""
    with contextlib.suppress(Exception):  # then it is missing or altered, as torchvision sees it
        return kind(root, **split)
    try:
        with writing_to(root), downloading(), filling(root):
            return kind(root, download=True, **split)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{kind.__name__} is not in {root}, or altered there, and could not be "
                        f"downloaded ({reason_of(error)}): go online, copy it there, remove what "
                        "is damaged, or name another root with --data-dir") from None


class DataSet(NamedTuple):
    """A row of DATASETS."""
    open: Callable[[str | Path, str], Samples]  # (root, split) -> images and labels
    # Each split to train on -> the split to validate on; the first is the default.
    val_split: dict[str, str]
    num_classes: int | None = 10  # None: the number of class folders
    image_size: int = 40  # pixels, after the transform
    mean: tuple[float, ...] = HALF  # per channel, of images in [0, 1]
    std: tuple[float, ...] = HALF
    train: tuple[Callable, ...] = ()  # transforms of training images, on PIL images
    eval: tuple[Callable, ...] = ()  # of the others
    in_memory: bool = True  # small enough to be held as arrays
    joined: dict[str, tuple[str, ...]] = {}  # a split -> the parts that it is, where several
    # Images, height and width of each part, as it is read; checked where they are given.
    shapes: dict[str, tuple[int, int, int]] = {}


def imagenet_row(opened: Callable[[str | Path, str], Samples], size: int = 224) -> DataSet:
    """Return a row of folders of images, with ImageNet's transforms to size x size pixels."""
    return DataSet(
        open=opened, val_split={"train": "val"}, num_classes=None, image_size=size,
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
        train=(transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()),
        eval=(transforms.Resize(round(size * 256 / 224)), transforms.CenterCrop(size)),
        in_memory=False)


RESIZE_40 = (transforms.Resize(40),)
THREE_CHANNELS = (transforms.Grayscale(3),)  # the one channel, three times
HELD_OUT = "_auto_quan"  # ends the name of a split's first 95 %, and of the rest
FLIP_AND_CROP = (transforms.RandomHorizontalFlip(), transforms.RandomCrop(32, padding=4))
MNIST_SHAPES = {"train": (60_000, 28, 28), "test": (10_000, 28, 28)}
CIFAR_SHAPES = {"train": (50_000, 32, 32), "test": (10_000, 32, 32)}

DATASETS = {
    "digits": DataSet(
        open=open_digits, val_split={"train": "val"}, train=RESIZE_40, eval=RESIZE_40,
        shapes={"train": (1437, 8, 8), "val": (360, 8, 8)}),
    "fashion-mnist": DataSet(
        open=open_fashion_mnist, val_split={"train": "test"}, train=RESIZE_40 + THREE_CHANNELS,
        eval=RESIZE_40 + THREE_CHANNELS, shapes=MNIST_SHAPES),
    "cifar10": DataSet(
        open=lambda root, split: open_downloadable(datasets.CIFAR10, root, train=split == "train"),
        val_split={"train": "test", "train_auto_quan": "val_auto_quan"}, image_size=32,
        mean=(125.3 / 255, 123.0 / 255, 113.9 / 255), std=(63.0 / 255, 62.1 / 255, 66.7 / 255),
        train=FLIP_AND_CROP, shapes=CIFAR_SHAPES),
    "cifar100": DataSet(
        open=lambda root, split: open_downloadable(datasets.CIFAR100, root, train=split == "train"),
        val_split={"train": "test"}, num_classes=100, image_size=32,
        mean=(129.3 / 255, 124.1 / 255, 112.4 / 255), std=(68.2 / 255, 65.4 / 255, 70.4 / 255),
        train=FLIP_AND_CROP, shapes=CIFAR_SHAPES),
    "mnist": DataSet(
        open=lambda root, split: open_mnist(datasets.MNIST, root, split),
        val_split={"train": "test"}, image_size=28, mean=(0.1307,) * 3, std=(0.3081,) * 3,
        train=THREE_CHANNELS, eval=THREE_CHANNELS, shapes=MNIST_SHAPES),
    "svhn": DataSet(
        open=lambda root, split: open_downloadable(datasets.SVHN, root, split=split),
        val_split={"train_extra": "test", "train": "test", "extra": "test",
                   "train_extra_auto_quan": "val_auto_quan"},
        joined={"train_extra": ("train", "extra")}, train=RESIZE_40, eval=RESIZE_40,
        shapes={"train": (73_257, 32, 32), "test": (26_032, 32, 32), "extra": (531_131, 32, 32)}),
    "imagenet": imagenet_row(open_image_folder),
}
data_paths = {name: f"data/{name}" for name in DATASETS}  # of any other row too, unless named here


def add_folder(name: str, image_size: int | None = None) -> None:
    """Add the row of folder:PATH to DATASETS; of any other name do nothing.

    image_size: in pixels; None: ImageNet's.
    """
    if is_folder(name):
        size = image_size or DATASETS["imagenet"].image_size
        DATASETS[name] = imagenet_row(open_folder, size)


def named_datasets() -> list[str]:
    """Return the names of DATASETS without those of folders."""
    return [name for name in DATASETS if not is_folder(name)]


def images_of(name: str) -> dict:
    """Return a description of a data set's images, as checkpoints hold it."""
    row = DATASETS[name]
    return {"dataset": name, "size": row.image_size, "transforms": text_of(row.eval),
            "mean": list(row.mean), "std": list(row.std)}


def text_of(steps: Sequence[Callable]) -> str:
    """Return what transforms are, as torchvision says it, such as `CenterCrop(size=(224, 224))`.

    Of one that says its address in memory, as functions do, the name.
    """
    texts = [(" ".join(repr(step).split()), step) for step in steps]
    return ", ".join(getattr(step, "__name__", type(step).__name__) if " at 0x" in text else text
                     for text, step in texts)


def get_transform(name: str, train: bool, normalized: bool = True) -> transforms.Compose:
    """Return a data set's transform: PIL image -> (3, size, size) float32, or uint8 in [0, 255]."""
    row = DATASETS[name]
    end = [transforms.PILToTensor()]
    if normalized:
        end = [transforms.ToTensor(), transforms.Normalize(row.mean, row.std)]
    own = row.train if train else row.eval
    return transforms.Compose([*mode_checks(name, train), *own, *end])


class ModeCheck:
    """A transform that raises DataError for images of more than 8 bits, and returns any other."""

    def __init__(self, name: str):
        self.name = name

    def __call__(self, image: Image.Image) -> Image.Image:
        mode = str(getattr(image, "mode", ""))
        if mode.startswith(("I", "F")):
            raise DataError(f"{self.name} has images of mode {mode}, whose values the row's "
                            "transforms clip at 255: give them 8 bits where the row opens them")
        return image


def mode_checks(name: str, train: bool) -> list[ModeCheck]:
    """Return what goes before a row's transforms, which clip: no check where another kind is first.
    """
    kind = type(next(iter(DATASETS[name].train if train else DATASETS[name].eval), None))
    clips = kind.__module__.startswith("torchvision") and not issubclass(kind, transforms.Lambda)
    return [ModeCheck(name)] if clips and not is_folder(name) else []


class Transformed(Dataset):
    """A data set of (image, label) with a transform of its images."""

    def __init__(self, dataset: Samples, transform: Callable):
        self.dataset = dataset
        self.transform = transform

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image, label = self.dataset[index]
        return self.transform(image), label


def root_of(name: str, data_dir: str | Path | None = None) -> str:
    """Return the folder of a data set: of folder:PATH the PATH, whatever data_dir is."""
    if is_folder(name):
        return name.removeprefix(PREFIX)
    if data_dir is None:
        return data_paths.get(name, f"data/{name}")
    return os.path.join(data_dir, name)


def get_dataset(name: str, split: str, transform: Callable | None = None,
                data_dir: str | Path | None = None) -> Samples:
    """Return a split of a row of DATASETS, or of folder:PATH: (transform(PIL image), label) each.

    transform: None returns the PIL images. data_dir: reads data_dir/name; None: data_paths[name],
    by default data/name.
    Raises DataError where the data cannot be read or downloaded, and ValueError for a name that no
    row has, and a split that the data set does not have.
    """
    if name not in DATASETS:
        add_folder(name)
    if name not in DATASETS:
        raise ValueError(f"there is no data set {name!r}: choose from "
                         f"{', '.join(named_datasets())}, or {PREFIX}PATH")
    row = DATASETS[name]
    splits = dict.fromkeys([*row.val_split, *row.val_split.values()])
    if split not in splits:
        raise ValueError(f"{name} has no split {split}: choose from {', '.join(splits)}")

    root = root_of(name, data_dir)
    is_training = split in row.val_split
    held_out = split.endswith(HELD_OUT)
    whole = split
    if held_out and not is_training:
        whole = next(train for train, val in row.val_split.items() if val == split)
    whole = whole.removesuffix(HELD_OUT)
    names = row.joined.get(whole, (whole,))
    parts = [row.open(root, part) for part in names]
    for part, samples in zip(names, parts):
        check_samples(samples, f"{name}'s {part} part in {root}", row.shapes.get(part),
                      row.num_classes)
    dataset = parts[0] if len(parts) == 1 else ConcatDataset(parts)
    if held_out:
        indices = list(range(len(dataset)))
        random.Random(123).shuffle(indices)
        cut = int(0.95 * len(indices))
        part = indices[:cut] if is_training else indices[cut:]
        dataset = Subset(dataset, part)
    return dataset if transform is None else Transformed(dataset, transform)
