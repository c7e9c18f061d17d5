"""Data sets: one row each in DATASETS; where they live in data_paths; seeded batches, in memory or from workers."""
import os
import random
from pathlib import Path
from typing import NamedTuple

import numpy
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset
from torchvision import datasets, transforms

from utils import one_line


class DataError(Exception):
    """Data that is missing, damaged, or does not go together."""


data_paths = {name: f"data/{name}" for name in ("cifar10", "cifar100", "mnist", "svhn", "imagenet", "digits")}


class Digits(Dataset):
    """scikit-learn's bundled handwritten digits: 1,797 real scans of 8 x 8 pixels, here uint8 RGB.

    split "train" (1,437) or "val" (360), stratified by class.
    """

    classes = [str(digit) for digit in range(10)]

    def __init__(self, split):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        scans, targets = load_digits(return_X_y=True)  # (1797, 64) in 0..16
        grey = numpy.round(scans * 255 / 16).astype(numpy.uint8).reshape(-1, 8, 8)
        images = numpy.repeat(grey[..., None], 3, axis=-1)  # (1797, 8, 8, 3)
        parts = train_test_split(images, targets, test_size=0.2, random_state=0, stratify=targets)
        self.data, self.targets = parts[0::2] if split == "train" else parts[1::2]

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return Image.fromarray(self.data[index]), int(self.targets[index])


def load_image(path):
    """Read an image file of any mode as RGB; DataError naming the file where it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is not a readable image ({one_line(error)}): replace or remove it") from None


def open_image_folder(root, split):
    folder = Path(root, split)
    if not folder.is_dir():
        raise DataError(f"imagenet was looked for in {folder} and is not there: put one folder of images per class "
                        f"under {Path(root, 'train')} and {Path(root, 'val')}, or name another root with --data-dir")
    try:
        return datasets.ImageFolder(folder, loader=load_image)
    except FileNotFoundError as error:
        raise DataError(f"{folder} must hold one folder of images per class: {one_line(error)}") from None


def open_downloadable(kind, root, **split):
    """A torchvision data set, verified; downloaded where it is missing or altered (torchvision's sources and checksums)."""
    try:
        return kind(root, **split)
    except Exception as error:
        if "not found" not in str(error):  # torchvision's word for missing or altered files
            raise DataError(f"{kind.__name__} in {root} cannot be read ({one_line(error)}): "
                            "remove that folder and start again to download it anew") from None
    print(f"{kind.__name__} is missing from {root}, or altered there: downloading it")
    try:
        return kind(root, download=True, **split)
    except Exception as error:
        raise DataError(f"{kind.__name__} is not in {root}, or altered there, and could not be downloaded "
                        f"({one_line(error)}): go online, copy it there, or name another root with --data-dir") from None


class DataSet(NamedTuple):
    open: callable  # (root, split) -> a torch Dataset of (PIL image, label)
    val_split: dict  # each split to train on -> the split to validate on; the first is the default
    num_classes: int | None  # None: as many as there are class folders
    image_size: int  # pixels, after the transform
    mean: tuple  # per channel, of images in [0, 1]
    std: tuple
    train: tuple = ()  # transforms of training images
    eval: tuple = ()  # of the others
    in_memory: bool = True  # small enough to be kept as arrays
    padding: int | None = None  # where `train` is a random flip and a random crop of the image padded by this
    held_out_of: str | None = None  # the split that *_auto_quan splits share out


def flip_and_crop(size, padding):
    return {"train": (transforms.RandomHorizontalFlip(), transforms.RandomCrop(size, padding)), "padding": padding}


RESIZE_40 = (transforms.Resize(40),)

DATASETS = {
    "digits": DataSet(
        open=lambda root, split: Digits(split),
        val_split={"train": "val"}, num_classes=10, image_size=40, mean=(0.5,) * 3, std=(0.5,) * 3,
        train=RESIZE_40, eval=RESIZE_40),
    "cifar10": DataSet(
        open=lambda root, split: open_downloadable(datasets.CIFAR10, root, train=split == "train"),
        val_split={"train": "test", "train_auto_quan": "val_auto_quan"}, num_classes=10, image_size=32,
        mean=(125.3 / 255, 123.0 / 255, 113.9 / 255), std=(63.0 / 255, 62.1 / 255, 66.7 / 255),
        held_out_of="train", **flip_and_crop(32, padding=4)),
    "cifar100": DataSet(
        open=lambda root, split: open_downloadable(datasets.CIFAR100, root, train=split == "train"),
        val_split={"train": "test"}, num_classes=100, image_size=32,
        mean=(129.3 / 255, 124.1 / 255, 112.4 / 255), std=(68.2 / 255, 65.4 / 255, 70.4 / 255),
        **flip_and_crop(32, padding=4)),
    "mnist": DataSet(  # one channel, given to the networks as three equal ones
        open=lambda root, split: open_downloadable(datasets.MNIST, root, train=split == "train"),
        val_split={"train": "test"}, num_classes=10, image_size=28, mean=(0.1307,) * 3, std=(0.3081,) * 3,
        train=(transforms.Grayscale(3),), eval=(transforms.Grayscale(3),)),
    "svhn": DataSet(
        open=lambda root, split: open_downloadable(datasets.SVHN, root, split=split),
        val_split={"train_extra": "test", "train": "test", "extra": "test",
                   "train_extra_auto_quan": "val_auto_quan"},
        num_classes=10, image_size=40, mean=(0.5,) * 3, std=(0.5,) * 3, train=RESIZE_40, eval=RESIZE_40,
        held_out_of="train_extra"),
    "imagenet": DataSet(
        open=open_image_folder,
        val_split={"train": "val"}, num_classes=None, image_size=224,
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
        train=(transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip()),
        eval=(transforms.Resize(256), transforms.CenterCrop(224)), in_memory=False),
}


def get_transform(name, train, normalized=True):
    """The transform of data set `name`: PIL image -> (3, size, size), normalised float32, or uint8 as it is."""
    row = DATASETS[name]
    end = (transforms.ToTensor(), transforms.Normalize(row.mean, row.std)) if normalized else (transforms.PILToTensor(),)
    return transforms.Compose([*(row.train if train else row.eval), *end])


class Transformed(Dataset):
    """A data set of (image, label) with a transform of its images."""

    def __init__(self, dataset, transform):
        self.dataset, self.transform = dataset, transform

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, label = self.dataset[index]
        return self.transform(image), label


def get_dataset(name, split, transform=None, data_dir=None):
    """Data set `name` (a key of DATASETS), one of its splits, as a torch Dataset of (transform(PIL image), label); without
    a transform of the PIL images.

    It is read from data_paths[name], or from data_dir/name. DataError where it is missing and cannot be downloaded,
    or cannot be read; ValueError for a split it does not have.
    """
    row = DATASETS[name]
    splits = dict.fromkeys([*row.val_split, *row.val_split.values()])
    if split not in splits:
        raise ValueError(f"{name} has no split {split}: choose from {', '.join(splits)}")
    root = data_paths[name] if data_dir is None else os.path.join(data_dir, name)
    held_out = split.endswith("_auto_quan")
    parts = [row.open(root, part) for part in (row.held_out_of if held_out else split).split("_")]
    dataset = parts[0] if len(parts) == 1 else ConcatDataset(parts)  # "train_extra": train and extra, joined
    if held_out:
        indices = list(range(len(dataset)))
        random.Random(123).shuffle(indices)
        cut = int(0.95 * len(indices))
        dataset = Subset(dataset, indices[:cut] if split.startswith("train") else indices[cut:])
    return dataset if transform is None else Transformed(dataset, transform)
