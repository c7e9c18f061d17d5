"""Data sets: one row each in DATASETS; where they live in data_paths; seeded batches, in memory or from workers."""
import functools
import os
import random
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from torchvision import datasets, transforms

from errors import UserError
from utils import one_line

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
    """Read an image file of any mode as RGB; UserError naming the file where it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} is not a readable image ({one_line(error)}): replace or remove it") from None


def open_image_folder(root, split):
    folder = Path(root, split)
    if not folder.is_dir():
        raise UserError(f"imagenet was looked for in {folder} and is not there: put one folder of images per class "
                        f"under {Path(root, 'train')} and {Path(root, 'val')}, or name another root with --data-dir")
    try:
        return datasets.ImageFolder(folder, loader=load_image)
    except FileNotFoundError as error:
        raise UserError(f"{folder} must hold one folder of images per class: {one_line(error)}") from None


def open_downloadable(kind, root, **split):
    """A torchvision data set, verified; downloaded where it is missing or altered (torchvision's sources and checksums)."""
    try:
        return kind(root, **split)
    except Exception as error:
        if "not found" not in str(error):  # torchvision's word for missing or altered files
            raise UserError(f"{kind.__name__} in {root} cannot be read ({one_line(error)}): "
                            "remove that folder and start again to download it anew") from None
    print(f"{kind.__name__} is missing from {root}, or altered there: downloading it")
    try:
        return kind(root, download=True, **split)
    except Exception as error:
        raise UserError(f"{kind.__name__} is not in {root}, or altered there, and could not be downloaded "
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


def normalize(images, name):
    """uint8 (N, 3, H, W) -> what get_transform's end makes of it, float32, channels last, on the same device."""
    row = DATASETS[name]
    mean, std = (constant(values, images.device)[:, None, None] for values in (row.mean, row.std))
    images = images.to(torch.float32, memory_format=torch.channels_last)
    return images.div_(255).sub_(mean).div_(std)


@functools.cache  # copied to the device once: a copy would wait for it
def constant(values, device):
    return torch.tensor(values, device=device)


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

    It is read from data_paths[name], or from data_dir/name. UserError where it is missing and cannot be downloaded,
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


class SeededSamples(Dataset):
    """A data set whose random transforms draw from the seed that comes with each index, whichever process runs them."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        index, seed = key
        state = torch.get_rng_state()
        torch.default_generator.manual_seed(seed)
        try:
            return self.dataset[index]
        finally:
            torch.set_rng_state(state)


class ShuffledBatches:
    """Batches of (index, seed) for SeededSamples: a function of (seed, epoch), so any epoch can be begun anywhere.

    Of each batch process `rank` of `world_size` gets every world_size-th sample, so the batches, and what an epoch has
    seen after a step, are the same for any number of processes. Set `epoch`, and the part of it that is wanted as
    batches `start` to `stop`, before iterating. UserError where the last batch has fewer samples than processes.
    """

    def __init__(self, num_samples, batch_size, seed, rank=0, world_size=1):
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.start = 0
        self.stop = len(self)
        if self.size(len(self) - 1) < world_size:
            raise UserError(f"the last batch of an epoch has {self.size(len(self) - 1)} of the {num_samples} images, fewer "
                            f"than the {world_size} processes: choose another --batch-size, or fewer processes")

    def __len__(self):
        return -(-self.num_samples // self.batch_size)

    def size(self, step):
        """The number of images in batch `step`, over all processes."""
        return min(self.batch_size, self.num_samples - step * self.batch_size)

    def draw(self):
        """(order, seeds): the epoch's sequence of samples, and a number below 2^62 for each, (num_samples,) int64."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.num_samples, generator=generator)
        return order, torch.randint(2**62, (self.num_samples,), generator=generator)

    def parts(self):
        """The slices of the epoch's sequence that are this process's batches."""
        for step in range(self.start, self.stop):
            yield slice(step * self.batch_size + self.rank, step * self.batch_size + self.size(step), self.world_size)

    def __iter__(self):
        order, seeds = self.draw()
        for part in self.parts():
            yield list(zip(order[part].tolist(), seeds[part].tolist()))


def read_arrays(dataset, workers=0):
    """A data set of (uint8 (3, H, W), label) as arrays: images (N, H, W, 3) uint8, labels (N,) int64."""
    images, labels, start = None, torch.empty(len(dataset), dtype=torch.int64), 0
    for pictures, targets in DataLoader(dataset, 256, num_workers=workers, generator=torch.Generator()):
        if images is None:
            images = torch.empty(len(dataset), *pictures.shape[2:], 3, dtype=torch.uint8)
        images[start:start + len(pictures)] = pictures.permute(0, 2, 3, 1)
        labels[start:start + len(pictures)] = targets
        start += len(pictures)
    return images, labels


def flipped_crops(images, indices, seeds, padding):
    """Of images (N, H, W, 3) those at indices (n,), each flipped at random and randomly cropped from its padding in
    black, as seeds (n,) say: (n, H, W, 3)."""
    height, width = images.shape[1:3]
    shifts = 2 * padding + 1
    flip, top, left = seeds % 2 == 1, seeds // 2 % shifts, seeds // (2 * shifts) % shifts
    rows = top[:, None] - padding + torch.arange(height, device=images.device)  # (n, H)
    columns = left[:, None] - padding + torch.arange(width, device=images.device)  # (n, W), of the flipped image
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    columns = torch.where(flip[:, None], width - 1 - columns, columns)
    crops = images[indices[:, None, None], rows.clamp(0, height - 1)[:, :, None], columns.clamp(0, width - 1)[:, None, :]]
    return crops * inside[..., None]


class InMemoryLoader:
    """Batches of a data set that lies in memory: (images float32 (n, 3, H, W) channels last, labels (n,)) on `device`.

    images (N, H, W, 3) uint8 and labels (N,) lie on `device` or, where they do not fit there, in the host's memory. The
    order and the augmentation are those of `batch_sampler`, a ShuffledBatches; without one, all samples in order, of
    which a process gets every world_size-th.
    """

    def __init__(self, images, labels, name, device, batch_sampler=None, batch_size=1, rank=0, world_size=1):
        self.images, self.labels, self.name, self.device = images, labels, name, device
        self.batch_sampler = batch_sampler
        if batch_sampler is None:
            own = torch.arange(len(images), device=images.device)[rank::world_size]
            self.indices = own.split(batch_size) if len(own) else ()

    def __len__(self):
        return len(self.indices if self.batch_sampler is None else self.batch_sampler)

    def __iter__(self):
        padding = DATASETS[self.name].padding
        if self.batch_sampler is None:
            batches = ((indices, None) for indices in self.indices)
        else:
            order, seeds = (drawn.to(self.images.device) for drawn in self.batch_sampler.draw())
            batches = ((order[part], seeds[part]) for part in self.batch_sampler.parts())
        for indices, seeds_of_batch in batches:
            augmented = padding and seeds_of_batch is not None
            images = flipped_crops(self.images, indices, seeds_of_batch, padding) if augmented else self.images[indices]
            images, labels = images.permute(0, 3, 1, 2), self.labels[indices]
            if self.images.device != self.device:
                images, labels = (batch.pin_memory().to(self.device, non_blocking=True) for batch in (images, labels))
            yield normalize(images, self.name), labels


class WorkerLoader:
    """The batches of a DataLoader on `device`: uint8 ones of data set `name` are normalised there."""

    def __init__(self, loader, name, device):
        self.loader, self.name, self.device = loader, name, device
        self.dataset, self.batch_sampler = loader.dataset, loader.batch_sampler

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for images, labels in self.loader:
            images, labels = images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
            yield normalize(images, self.name) if images.dtype == torch.uint8 else images, labels
