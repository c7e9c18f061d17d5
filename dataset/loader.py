"""Seeded batches on the device: from memory, or from workers that read and transform images."""
from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Subset, default_collate
from torchvision import datasets, transforms

from dataset.data import DATASETS, Samples, Transformed, get_transform, mode_checks
from dataset.files import DataError, check_labels, listed_labels
from utils import brief, flag_text, progress

FIXED = (transforms.Resize, transforms.CenterCrop, transforms.Grayscale, transforms.Pad)


class ImageSizeError(DataError):
    """Images whose size after a row's transforms is not its image_size."""


class InMemoryTransforms(NamedTuple):
    """The transforms of a data set whose images are held in memory."""
    fixed: tuple[Callable, ...] = ()  # transforms applied once, when the arrays are read
    flip: float = 0.0  # probability of a horizontal flip, drawn in every epoch
    padding: int = 0  # black pixels on each side, before a random crop of the image's own size


def in_memory_transforms(name: str, train: bool) -> InMemoryTransforms | None:
    """Return what a row's `train` or `eval` transforms are in memory.

    Those are FIXED ones and then, in `train`, a flip, a crop, or a flip and a crop. Returns None
    for any others, subclasses too: what they do is known only by calling them.
    """
    row = DATASETS[name]
    rest = list(row.train if train else row.eval)
    fixed = tuple(itertools.takewhile(lambda transform: type(transform) in FIXED, rest))
    del rest[:len(fixed)]
    flip = 0.0
    if train and rest and is_flip(rest[0]):
        flip = rest.pop(0).p
    padding = 0
    if train and rest and is_crop(rest[0], row.image_size):
        padding = rest.pop(0).padding
    return None if rest else InMemoryTransforms(fixed, flip, padding)


def is_flip(transform: Callable) -> bool:
    """Return whether a transform is a plain horizontal flip."""
    return (type(transform) is transforms.RandomHorizontalFlip
            and type(transform.p) in (int, float) and 0 <= transform.p <= 1)


def is_crop(transform: Callable, size: int) -> bool:
    """Return whether a transform crops images of size x size, padded with black, to their size."""
    return (type(transform) is transforms.RandomCrop and transform.size == (size, size)
            and type(transform.padding) is int and transform.padding > 0
            and transform.padding_mode == "constant" and transform.fill == 0
            and not transform.pad_if_needed)


def ignore_stop_signals(worker: int | None = None) -> None:
    """Ignore SIGTERM and Ctrl-C, which reach data workers too: the training process decides."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def make_loader(dataset: Samples, name: str, device: torch.device, batch_size: int, train: bool,
                seed: int = 0, rank: int = 0, world_size: int = 1, workers: int = 0,
                memory_format: torch.memory_format = torch.contiguous_format,
                in_memory: bool = True) -> Loader:
    """Return a loader of (images (n, 3, H, W) float32, labels (n,) int64) on the device.

    Training batches are shuffled and augmented, by the loader's batch_sampler, a ShuffledBatches.

    Args:
        dataset: from get_dataset, without transform.
        name: of its row in DATASETS.
        batch_size: images per batch, over all processes where `train`, else of this process.
        workers: processes that read and transform images; 0: this one.
        in_memory: whether images may be held in memory. They are read and transformed one by one
            where it is False (the reference), where the row says so, and where memory cannot
            reproduce the row's transforms.

    Raises:
        DataError: now or in a later batch, an image cannot be read or is not of the row's
            image_size.
    """
    batches = ShuffledBatches(len(dataset), batch_size, seed, rank, world_size) if train else None
    if in_memory and DATASETS[name].in_memory:
        arrays = read_into_memory(dataset, name, train, workers)
        if arrays:
            images, labels = arrays
            return InMemoryLoader(images.to(device), labels.to(device), name, batches, batch_size,
                                  rank, world_size, memory_format)
    if train:
        order = {"batch_sampler": batches}
    else:  # a seed per image: an evaluation repeats, also where `eval` draws random numbers
        own = range(rank, len(dataset), world_size)
        order = {"batch_size": batch_size, "sampler": [(index, index) for index in own]}

    # A generator of its own: making an iterator must not draw from the training's random numbers.
    return WorkerLoader(
        name, device, memory_format, generator=torch.Generator(), num_workers=workers,
        dataset=SeededSamples(dataset, get_transform(name, train, normalized=False)),
        collate_fn=collate_of(name, train), pin_memory=device.type == "cuda",
        persistent_workers=workers > 0, prefetch_factor=4 if workers else None,
        worker_init_fn=ignore_stop_signals, **order)


def read_into_memory(dataset: Samples, name: str, train: bool,
                     workers: int) -> tuple[Tensor, Tensor] | None:
    """Return images and labels as read_arrays does, after the row's fixed transforms.

    Returns None where memory cannot reproduce the row's transforms, or those of the data set.
    """
    known = in_memory_transforms(name, train)
    if known is None or not is_fixed(dataset):
        return None
    checks = mode_checks(name, train)
    fixed = transforms.Compose([*checks, *known.fixed, transforms.PILToTensor()])
    try:
        return read_arrays(Transformed(dataset, fixed), workers, collate_of(name, train))
    except ImageSizeError:
        if known.padding:  # then the crop is not of the image's own size
            return None
        raise


def is_fixed(dataset: Samples) -> bool:
    """Return whether samples are known to be the same each time they are read.

    Those of a list are, and of torchvision's data sets without transforms of their own.
    """
    if isinstance(dataset, Subset):
        return is_fixed(dataset.dataset)
    if isinstance(dataset, ConcatDataset):
        return all(map(is_fixed, dataset.datasets))
    if isinstance(dataset, datasets.VisionDataset):
        return dataset.transforms is None and type(dataset).__module__.startswith("torchvision.")
    return isinstance(dataset, (list, tuple))


def collate_of(name: str, train: bool) -> Callable[[list[tuple[Tensor, int]]], list[Tensor]]:
    """Return the collate_fn of a row's samples."""
    part = "train" if train else "eval"
    return functools.partial(collate, name=name, part=part, size=DATASETS[name].image_size,
                             num_classes=DATASETS[name].num_classes)


def collate(samples: list[tuple[Tensor, int]], name: str, part: str, size: int,
            num_classes: int | None) -> list[Tensor]:
    """Stack samples of (uint8 (3, size, size), label) into (n, 3, size, size) and (n,) int64.

    Raises ImageSizeError where an image is of another shape after the row's `part` transforms, and
    DataError where a label is not one of num_classes, if that is known.
    """
    shapes = sorted({tuple(image.shape) for image, _ in samples})
    if shapes != [(3, size, size)]:
        found = [" x ".join(map(str, shape)) for shape in shapes]
        more = f" and {len(found) - 4} more sizes" if len(found) > 4 else ""
        raise ImageSizeError(
            f"images of {name} come out of the row's {part} transforms as {', '.join(found[:4])}"
            f"{more} (channels x height x width), not all as 3 x {size} x {size}: add "
            f"Resize({size}) and CenterCrop({size}) to these transforms, and Grayscale(3) for "
            "images of one channel, or correct the row's image_size")
    images, labels = default_collate(samples)
    if not torch.is_tensor(labels) or labels.ndim != 1 or labels.is_floating_point():
        raise DataError(f"{name} has a label {brief(samples[0][1])}, and a label is the number of "
                        "a class, a whole number: correct what the row opens")
    if num_classes:
        check_labels(labels, num_classes, name, "correct the data, or the row's num_classes")
    return [images, labels.long()]


def fingerprint(dataset: Samples) -> dict[str, int | str]:
    """Return what tells a data set from another: its size, folders or labels, and three samples.

    Images are given by their SHA-256, before any transform; those of a folder by their files', as
    decoders differ, and by the sizes of up to 1,000 files.
    """
    count = len(dataset)
    found = {"number of images": count}
    in_folders = isinstance(dataset, datasets.DatasetFolder)
    is_list = isinstance(dataset, list)
    labels = [label for _, label in dataset] if is_list else listed_labels(dataset)
    if in_folders:
        found["list of class folders"] = sha256("\n".join(dataset.classes))
        found["list of files"] = sha256("\n".join(f"{label} {os.path.basename(path)}"
                                                  for path, label in dataset.samples))
        looked_at = dataset.samples[::-(-count // 1000)]
        found["sizes of files"] = sha256(flag_text([os.path.getsize(path)
                                                    for path, _ in looked_at]))
    elif labels is not None:
        labels = labels.tolist() if hasattr(labels, "tolist") else list(labels)
        found["list of labels"] = sha256(flag_text(labels))
    for place, index in (("first", 0), ("middle", count // 2), ("last", count - 1)):
        if in_folders:
            path, label = dataset.samples[index]
            content = Path(path).read_bytes()
        else:
            with seeded(0):  # for a row that draws random numbers where it opens an image
                image, label = dataset[index]
            pixels = numpy.asarray(image)
            content = f"{pixels.shape} {pixels.dtype} ".encode() + pixels.tobytes()
        found[f"{place} image"] = sha256(content)
        found[f"{place} label"] = int(label)
    return found


def sha256(content: bytes | str) -> str:
    """Return a SHA-256 in hexadecimal digits; of names of files, too."""
    content = os.fsencode(content)
    return hashlib.sha256(content).hexdigest()


def count_classes(name: str, *parts: Samples) -> int:
    """Return the number of classes; raises DataError where the class folders of parts differ."""
    if DATASETS[name].num_classes:
        return DATASETS[name].num_classes
    first = without_subset(parts[0])
    last = without_subset(parts[-1])
    differing = sorted(set(first.classes) ^ set(last.classes))
    if differing:
        raise DataError(f"{first.root} and {last.root} must hold the same class folders: "
                        f"{len(differing)} stand in only one of them, {differing[0]} for one")
    return len(first.classes)


def without_subset(dataset: Samples) -> Samples:
    """Return the data set that one is a part of, such as of a split that is held out, or itself."""
    return dataset.dataset if isinstance(dataset, Subset) else dataset


def normalize(images: Tensor, name: str, memory_format: torch.memory_format) -> Tensor:
    """Normalize images (N, 3, H, W): uint8 -> float32, as the data set's transform does."""
    row = DATASETS[name]
    mean, std = mean_and_std(tuple(row.mean), tuple(row.std), images.device)
    return images.to(torch.float32, memory_format=memory_format).div_(255).sub_(mean).div_(std)


@functools.cache  # each copy to the device would wait for it
def mean_and_std(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> Tensor:
    """Return a row's mean and std on the device, (2, 3, 1, 1)."""
    return torch.tensor([mean, std], device=device)[..., None, None]


class SeededSamples(Transformed):
    """A data set indexed by (index, seed), whose random transforms draw from that seed."""

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        index, seed = key
        with seeded(seed):
            return super().__getitem__(index)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch, Python and NumPy within the context; restore the state of the first two after.

    Restoring NumPy's state would take longer than flipping and cropping an image.
    """
    state = random.getstate()
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    try:
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(seed)
            yield
    finally:
        random.setstate(state)


class ShuffledBatches:
    """Batches of (index, seed), a function of (seed, epoch): an epoch can start at any batch.

    Process `rank` of `world_size` gets every world_size-th sample of each batch, so that batches do
    not depend on the number of processes. Set `epoch`, and the range `start` to `stop` of its
    batches, before iterating. Raises DataError where the last batch has fewer samples than there
    are processes.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int, rank: int = 0,
                 world_size: int = 1):
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.start = 0
        self.stop = len(self)

        last = self.size(len(self) - 1)
        if last < world_size:
            raise DataError(f"the last batch of an epoch has {last} of the {num_samples} images, "
                            f"fewer than the {world_size} processes: choose another --batch-size")

    def __len__(self):
        return -(-self.num_samples // self.batch_size)

    def size(self, step: int) -> int:
        """Return the number of images in batch `step`, counted over all processes."""
        return min(self.batch_size, self.num_samples - step * self.batch_size)

    def batches(self, device: torch.device | str = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (indices, seeds < 2^62) of this process's batches, (n,) int64 on the device."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.num_samples, generator=generator).to(device)
        seeds = torch.randint(2**62, (self.num_samples,), generator=generator).to(device)
        for step in range(self.start, self.stop):
            first = step * self.batch_size
            part = slice(first + self.rank, first + self.size(step), self.world_size)
            yield order[part], seeds[part]

    def __iter__(self):
        for indices, seeds in self.batches():
            yield list(zip(indices.tolist(), seeds.tolist()))


def read_arrays(dataset: Samples, workers: int = 0,
                collate_fn: Callable | None = None) -> tuple[Tensor, Tensor]:
    """Read samples of (uint8 (3, H, W), label) into images (N, H, W, 3) and labels (N,) int64."""
    images = torch.empty(len(dataset), *dataset[0][0].shape[1:], 3, dtype=torch.uint8)
    labels = torch.empty(len(dataset), dtype=torch.int64)
    batches = DataLoader(dataset, 256, num_workers=workers, generator=torch.Generator(),
                         collate_fn=collate_fn)
    with progress(batches, "reading images") as shown:
        for batch, image_part, label_part in zip(shown, images.split(256), labels.split(256)):
            image_part.copy_(batch[0].permute(0, 2, 3, 1))
            label_part.copy_(batch[1])
    return images, labels


def flipped_crops(images: Tensor, indices: Tensor, seeds: Tensor, padding: int,
                  flip: float = 0.5) -> Tensor:
    """Flip images[indices] with probability `flip`, pad them with black, and crop their own size.

    images: (N, H, W, 3) uint8. indices: (n,). seeds: (n,) int64 below 2^62, which determine flips
    and crops. padding: pixels on each side. Returns (n, H, W, 3).
    """
    height, width = images.shape[1:3]
    shifts = 2 * padding + 1
    draws = (1 - seeds % 2) * 2**23 + (seeds >> 39)  # 24 bits, the seed's lowest one first
    flips = draws < round(flip * 2**24)
    top = seeds // 2 % shifts
    left = seeds // (2 * shifts) % shifts

    padded = torch.nn.functional.pad(images[indices], (0, 0, *[padding] * 4))
    rows = top[:, None] + torch.arange(height, device=images.device)  # (n, H)
    columns = left[:, None] + torch.arange(width, device=images.device)  # of the flipped image
    columns = torch.where(flips[:, None], width + 2 * padding - 1 - columns, columns)
    each = torch.arange(len(indices), device=images.device)[:, None, None]
    return padded[each, rows[:, :, None], columns[:, None, :]]


class InMemoryLoader:
    """Batches of images (N, H, W, 3) uint8 and labels (N,) in a device's memory.

    images: after the row's fixed transforms. batch_sampler: determines order and augmentation;
    None: all samples in order, unaugmented, of which this process gets every world_size-th.
    """

    def __init__(self, images: Tensor, labels: Tensor, name: str,
                 batch_sampler: ShuffledBatches | None = None, batch_size: int = 1, rank: int = 0,
                 world_size: int = 1, memory_format: torch.memory_format = torch.contiguous_format):
        self.images = images
        self.labels = labels
        self.name = name
        self.batch_sampler = batch_sampler
        self.memory_format = memory_format
        own = torch.arange(len(images), device=images.device)[rank::world_size]
        self.indices = own.split(batch_size) if len(own) else ()
        self.augmentation = InMemoryTransforms()
        if batch_sampler:
            self.augmentation = in_memory_transforms(name, train=True)

    def __len__(self):
        return len(self.batch_sampler or self.indices)

    def __iter__(self):
        batches = ((indices, None) for indices in self.indices)
        if self.batch_sampler:
            batches = self.batch_sampler.batches(self.images.device)
        for indices, seeds in batches:
            if self.augmentation.flip or self.augmentation.padding:
                images = flipped_crops(
                    self.images, indices, seeds, self.augmentation.padding, self.augmentation.flip)
            else:
                images = self.images[indices]
            images = normalize(images.permute(0, 3, 1, 2), self.name, self.memory_format)
            yield images, self.labels[indices]


class WorkerLoader(DataLoader):
    """A DataLoader of uint8 images that normalizes its batches on `device`."""

    def __init__(self, name: str, device: torch.device, memory_format: torch.memory_format,
                 **kwargs):
        super().__init__(**kwargs)
        self.name = name
        self.device = device
        self.memory_format = memory_format

    def __iter__(self):
        for images, labels in super().__iter__():
            images = images.to(self.device, non_blocking=True)
            labels = labels.to(self.device, non_blocking=True)
            yield normalize(images, self.name, self.memory_format), labels


Loader = InMemoryLoader | WorkerLoader  # iterates over (images, labels) on the device
