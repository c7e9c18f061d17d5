"""Seeded batches on the device: from memory, or from workers that read and transform images."""
import functools
import signal

import torch
from torch.utils.data import DataLoader

from dataset.data import DATASETS, DataError, Transformed, get_transform


def ignore_stop_signals(worker=None):
    """Let the training process decide when to stop: Ctrl-C reaches its data workers too."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def make_loader(dataset, name, device, batch_size, train, seed=0, rank=0, world_size=1, workers=0,
                memory_format=torch.channels_last, in_memory=True):
    """Return the batches of a get_dataset without transform, as float32 (n, 3, H, W) on the device.

    batch_size: images over all processes where train, else of this one. Training batches are
    shuffled and augmented, as the loader's batch_sampler says, a ShuffledBatches. in_memory=False
    reads and transforms images one by one, the reference.
    """
    batches = ShuffledBatches(len(dataset), batch_size, seed, rank, world_size) if train else None
    if in_memory and DATASETS[name].in_memory:  # random transforms are drawn on the device
        still = Transformed(dataset, get_transform(name, train=False, normalized=False))
        images, labels = read_arrays(still, workers)
        return InMemoryLoader(images.to(device), labels.to(device), name, batches, batch_size, rank,
                              world_size, memory_format)
    kind, kwargs = SeededSamples, {"batch_sampler": batches}
    if not train:
        order = range(rank, len(dataset), world_size)
        kind, kwargs = Transformed, {"batch_size": batch_size, "sampler": order}
    # A generator of its own: making an iterator must not draw from the training's random numbers.
    return WorkerLoader(
        name, device, memory_format, generator=torch.Generator(), num_workers=workers,
        dataset=kind(dataset, get_transform(name, train, normalized=False)),
        pin_memory=device.type == "cuda", persistent_workers=workers > 0,
        prefetch_factor=4 if workers else None, worker_init_fn=ignore_stop_signals, **kwargs)


def count_classes(name, *parts):
    """Return the number of classes; DataError where class folders, and so labels, differ."""
    if DATASETS[name].num_classes:
        return DATASETS[name].num_classes
    first, last = parts[0], parts[-1]
    odd = sorted(set(first.classes) ^ set(last.classes))
    if odd:
        raise DataError(f"{first.root} and {last.root} must hold the same class folders: "
                        f"{len(odd)} stand in only one of them, {odd[0]} for one")
    return len(first.classes)


def normalize(images, name, memory_format):
    """Turn uint8 (N, 3, H, W) into what the data set's transform ends with, on the same device."""
    mean, std = statistics(name, images.device)
    return images.to(torch.float32, memory_format=memory_format).div_(255).sub_(mean).div_(std)


@functools.cache  # copied to the device once: a copy would wait for it
def statistics(name, device):
    return torch.tensor([DATASETS[name].mean, DATASETS[name].std], device=device)[..., None, None]


class SeededSamples(Transformed):
    """A data set whose random transforms draw from the seed that comes with each index."""

    def __getitem__(self, key):
        index, seed = key
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(seed)
            return super().__getitem__(index)


class ShuffledBatches:
    """Batches of (index, seed): a function of (seed, epoch), so any epoch can be begun anywhere.

    Of each batch process `rank` of `world_size` gets every world_size-th sample, so the batches do
    not depend on the number of processes. Set `epoch`, and the batches `start` to `stop` of it that
    are wanted, before iterating. Raises DataError where the last batch has fewer samples than
    processes.
    """

    def __init__(self, num_samples, batch_size, seed, rank=0, world_size=1):
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = self.start = 0
        self.stop = len(self)
        last = self.size(len(self) - 1)
        if last < world_size:
            raise DataError(f"the last batch of an epoch has {last} of the {num_samples} images, "
                            f"fewer than the {world_size} processes: choose another --batch-size")

    def __len__(self):
        return -(-self.num_samples // self.batch_size)

    def size(self, step):
        """Return the number of images in batch `step`, over all processes."""
        return min(self.batch_size, self.num_samples - step * self.batch_size)

    def batches(self, device="cpu"):
        """Yield indices and seeds, below 2^62, of this process's batches, (n,) int64 on device."""
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


def read_arrays(dataset, workers=0):
    """Read samples of (uint8 (3, H, W), label) into images (N, H, W, 3) and labels (N,) int64."""
    images = torch.empty(len(dataset), *dataset[0][0].shape[1:], 3, dtype=torch.uint8)
    labels = torch.empty(len(dataset), dtype=torch.int64)
    batches = DataLoader(dataset, 256, num_workers=workers, generator=torch.Generator())
    for batch, image_part, label_part in zip(batches, images.split(256), labels.split(256)):
        image_part.copy_(batch[0].permute(0, 2, 3, 1))
        label_part.copy_(batch[1])
    return images, labels


def flipped_crops(images, indices, seeds, padding):
    """Flip images[indices] and crop them from a black padding, as seeds (n,) say: (n, H, W, 3)."""
    height, width = images.shape[1:3]
    shifts, device = 2 * padding + 1, images.device
    flip, top, left = seeds % 2 == 1, seeds // 2 % shifts, seeds // (2 * shifts) % shifts
    padded = torch.nn.functional.pad(images[indices], (0, 0, *[padding] * 4))
    rows = top[:, None] + torch.arange(height, device=device)  # (n, H)
    columns = left[:, None] + torch.arange(width, device=device)  # of the flipped image
    columns = torch.where(flip[:, None], width + 2 * padding - 1 - columns, columns)
    each = torch.arange(len(indices), device=device)[:, None, None]
    return padded[each, rows[:, :, None], columns[:, None, :]]


class InMemoryLoader:
    """Batches of images (N, H, W, 3) uint8 and labels (N,) that lie in a device's memory.

    batch_sampler, a ShuffledBatches, tells order and augmentation; without one all samples come in
    order, and a process gets every world_size-th.
    """

    def __init__(self, images, labels, name, batch_sampler=None, batch_size=1, rank=0, world_size=1,
                 memory_format=torch.channels_last):
        self.images, self.labels, self.name = images, labels, name
        self.batch_sampler, self.memory_format = batch_sampler, memory_format
        own = torch.arange(len(images), device=images.device)[rank::world_size]
        self.indices = own.split(batch_size) if len(own) else ()

    def __len__(self):
        return len(self.batch_sampler or self.indices)

    def __iter__(self):
        batches, padding = ((indices, None) for indices in self.indices), None
        if self.batch_sampler:
            batches = self.batch_sampler.batches(self.images.device)
            padding = DATASETS[self.name].padding
        for indices, seeds in batches:
            images = (flipped_crops(self.images, indices, seeds, padding) if padding
                      else self.images[indices])
            images = normalize(images.permute(0, 3, 1, 2), self.name, self.memory_format)
            yield images, self.labels[indices]


class WorkerLoader(DataLoader):
    """A DataLoader of uint8 images, whose batches are normalised on `device`."""

    def __init__(self, name, device, memory_format, **kwargs):
        super().__init__(**kwargs)
        self.name, self.device, self.memory_format = name, device, memory_format

    def __iter__(self):
        for images, labels in super().__iter__():
            images, labels = (part.to(self.device, non_blocking=True) for part in (images, labels))
            yield normalize(images, self.name, self.memory_format), labels
