"""What memory reproduces of a row's transforms, and what is left to the transforms themselves."""
import random
import signal

import numpy
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional

import tiny_data
from dataset.data import DATASETS, DataError, DataSet, get_dataset
from dataset.loader import (InMemoryLoader, InMemoryTransforms, ShuffledBatches, WorkerLoader,
                            flipped_crops, in_memory_transforms, make_loader)
from engine.errors import kill_workers
from runs import assert_one_line, assert_same, evaluation, load, run, tiny

CPU = torch.device("cpu")
FLIP = transforms.RandomHorizontalFlip
CROP = transforms.RandomCrop
RESIZE = transforms.Resize(32)


class OtherFlip(transforms.RandomHorizontalFlip):
    """A subclass may do anything."""


class OtherResize(transforms.Resize):
    """A subclass may draw at random."""


class Noise:
    """Draw a brightness from one of three generators, and count the calls."""

    def __init__(self, draw):
        self.draw = draw
        self.calls = 0

    def __call__(self, image):
        self.calls += 1
        return functional.adjust_brightness(image, 0.5 + self.draw())


DRAWS = {"torch": lambda: torch.rand(1).item(), "python": random.random,
         "numpy": lambda: numpy.random.rand()}


@pytest.fixture
def change_row(monkeypatch):
    """Return the function that changes fields of cifar10's row, until the test ends."""
    def change(**fields):
        monkeypatch.setitem(DATASETS, "cifar10", DATASETS["cifar10"]._replace(**fields))

    return change


def cifar_loader(data_dir, train=True, workers=0):
    dataset = get_dataset("cifar10", "train" if train else "test", data_dir=data_dir)
    return make_loader(dataset, "cifar10", CPU, 8, train, workers=workers)


def epoch_of(loader, epoch=0, start=0):
    loader.batch_sampler.epoch = epoch
    loader.batch_sampler.start = start
    return list(loader)


def pixels_of(loader, epoch):
    """Return an epoch's images as they are before normalization, in the data set's order: uint8."""
    images = torch.cat([images for images, _ in epoch_of(loader, epoch)])
    indices = torch.cat([indices for indices, _ in loader.batch_sampler.batches()])
    row = DATASETS[loader.name]
    mean = torch.tensor(row.mean)[:, None, None]
    std = torch.tensor(row.std)[:, None, None]
    return ((images * std + mean) * 255).round().to(torch.uint8)[indices.argsort()]


def raw_pixels(data_dir):
    """Return the tiny CIFAR-10's training images: (20, 3, 32, 32) uint8."""
    dataset = get_dataset("cifar10", "train", transforms.PILToTensor(), data_dir)
    return torch.stack([image for image, _ in dataset])


# ---- what is reproduced

@pytest.mark.parametrize("name, fixed, flip, padding", [
    ("digits", 1, 0, 0), ("fashion-mnist", 2, 0, 0), ("cifar10", 0, 0.5, 4),
    ("cifar100", 0, 0.5, 4), ("mnist", 1, 0, 0), ("svhn", 1, 0, 0)])
def test_the_rows_in_memory(name, fixed, flip, padding):
    row = DATASETS[name]
    expected = InMemoryTransforms(row.train[:fixed], flip, padding)
    assert in_memory_transforms(name, train=True) == expected
    assert in_memory_transforms(name, train=False) == InMemoryTransforms(row.eval)


@pytest.mark.parametrize("train, flip, padding", [
    ([], 0, 0), ([FLIP()], 0.5, 0), ([FLIP(0.2)], 0.2, 0), ([CROP(32, padding=3)], 0, 3),
    ([RESIZE, transforms.CenterCrop(28), transforms.Pad(2), transforms.Grayscale(3), FLIP(1),
      CROP((32, 32), padding=4)], 1, 4)])
def test_transforms_that_memory_reproduces(train, flip, padding, tiny_cifar10, change_row):
    change_row(train=train)
    fixed = tuple(transform for transform in train if type(transform) not in (FLIP, CROP))
    assert in_memory_transforms("cifar10", True) == InMemoryTransforms(fixed, flip, padding)
    assert isinstance(cifar_loader(tiny_cifar10), InMemoryLoader)
    change_row(eval=train)  # where nothing is drawn for the images
    assert (in_memory_transforms("cifar10", False) is None) is bool(flip or padding)


@pytest.mark.parametrize("train", [
    [CROP(32, padding=4), FLIP()], [FLIP(), FLIP()], [FLIP(), RESIZE], [OtherFlip()],
    [OtherResize(32)], [transforms.Compose([FLIP()])], [transforms.ColorJitter(0.5)],
    [transforms.RandomResizedCrop(32)], [lambda image: image], [CROP(32)],
    [CROP(32, padding=(4, 2))], [CROP(32, padding=4, fill=9)], [CROP(32, padding=[4])],
    [CROP(32, padding=4, padding_mode="reflect")], [CROP(32, padding=4, pad_if_needed=True)],
    [CROP(28, padding=4), RESIZE]])
def test_other_transforms_are_called(train, tiny_cifar10, change_row):
    change_row(train=train)
    assert in_memory_transforms("cifar10", train=True) is None
    loader = cifar_loader(tiny_cifar10)
    assert isinstance(loader, WorkerLoader) and len(epoch_of(loader)) == 3
    assert isinstance(cifar_loader(tiny_cifar10, train=False), InMemoryLoader)


def test_a_row_without_its_crop_only_flips(tiny_cifar10, change_row):
    raw = raw_pixels(tiny_cifar10)
    change_row(train=[FLIP()])
    seen = pixels_of(cifar_loader(tiny_cifar10), epoch=1)
    flipped = (seen == raw.flip(3)).flatten(1).all(1)
    assert ((seen == raw).flatten(1).all(1) | flipped).all() and 0 < flipped.sum() < 20
    change_row(train=[FLIP(1)])
    assert torch.equal(pixels_of(cifar_loader(tiny_cifar10), epoch=1), raw.flip(3))
    change_row(train=[])
    assert torch.equal(pixels_of(cifar_loader(tiny_cifar10), epoch=1), raw)


def test_a_row_without_its_flip_only_crops(tiny_cifar10, change_row):
    raw = torch.nn.functional.pad(raw_pixels(tiny_cifar10), (3, 3, 3, 3))
    change_row(train=[CROP(32, padding=3)])
    seen = pixels_of(cifar_loader(tiny_cifar10), epoch=1)
    shifts = [(seen == raw[:, :, top:top + 32, left:left + 32]).flatten(1).all(1)
              for top in range(7) for left in range(7)]
    assert torch.stack(shifts).any(0).all() and torch.stack(shifts).any(1).sum() > 5


def test_the_training_set_is_read_with_the_rows_train_transforms(tiny_cifar10, change_row):
    grey = transforms.Grayscale(3)
    change_row(train=[grey, FLIP()])
    train = pixels_of(cifar_loader(tiny_cifar10), epoch=0)
    assert torch.equal(train[:, 0], train[:, 1])
    change_row(train=[FLIP()], eval=[grey])
    train = pixels_of(cifar_loader(tiny_cifar10), epoch=0)
    assert not torch.equal(train[:, 0], train[:, 1])


@pytest.mark.parametrize("flip", [0, 0.1, 0.5, 0.75, 1])
@pytest.mark.parametrize("padding", [0, 1])
def test_a_flip_has_its_own_probability_and_every_crop_the_same(flip, padding):
    count = 20_000
    (_, seeds), = ShuffledBatches(count, count, 0).batches()
    image = torch.from_numpy(tiny_data.pixels(1, 5, 6, 3))
    crops = flipped_crops(image, torch.zeros_like(seeds), seeds, padding, flip)
    shifts = range(2 * padding + 1)
    found = 0
    for source, probability in ((image[0].flip(1), flip), (image[0], 1 - flip)):
        padded = torch.nn.functional.pad(source, (0, 0, *[padding] * 4))
        expected = probability / len(shifts)**2
        for top in shifts:
            for left in shifts:
                view = padded[top:top + 5, left:left + 6]
                hits = (crops == view).flatten(1).all(1).sum().item()
                assert abs(hits / count - expected) <= 5 * (expected * (1 - expected) / count)**0.5
                found += hits
    assert found == count


def test_seeds_say_what_they_said_before():
    """A run that was begun by an earlier version goes on with the same images."""
    image = torch.from_numpy(tiny_data.pixels(1, 32, 32, 3))
    padded = torch.nn.functional.pad(image[0], (0, 0, 4, 4, 4, 4))
    flipped = padded.flip(1)
    high = 162 * (2**61 // 162)  # a multiple of 2 * 9 * 9, which changes nothing
    seeds = torch.tensor([2 * (3 + 9 * 5), 1 + 2 * (3 + 9 * 5), high + 1 + 2 * (8 + 9 * 1)])
    crops = flipped_crops(image, torch.zeros_like(seeds), seeds, padding=4)
    assert torch.equal(crops[0], padded[3:35, 5:37])
    assert torch.equal(crops[1], flipped[3:35, 5:37])
    assert torch.equal(crops[2], flipped[8:40, 1:33])


# ---- what is called

def test_a_callable_is_called_for_every_image_of_every_epoch(tiny_cifar10, change_row):
    noise = Noise(DRAWS["torch"])
    change_row(train=[noise, FLIP(), CROP(32, padding=4)])
    loader = cifar_loader(tiny_cifar10)
    first = pixels_of(loader, epoch=0)
    second = pixels_of(loader, epoch=1)
    assert noise.calls == 40
    assert (first != second).flatten(1).any(1).all()


@pytest.mark.parametrize("draw", DRAWS)
def test_what_is_called_is_a_function_of_seed_and_epoch(draw, tiny_cifar10, change_row):
    change_row(train=[Noise(DRAWS[draw])])
    random.seed(7)
    torch_state = torch.get_rng_state()
    python_state = random.getstate()
    whole = epoch_of(cifar_loader(tiny_cifar10), epoch=2)
    for workers, start in ((0, 0), (0, 1), (2, 2)):
        again = epoch_of(cifar_loader(tiny_cifar10, workers=workers), 2, start)
        torch.testing.assert_close(again, whole[start:], rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    loader = cifar_loader(tiny_cifar10)
    assert not torch.equal(pixels_of(loader, epoch=1), pixels_of(loader, epoch=2))


@pytest.mark.parametrize("draw", DRAWS)
def test_an_evaluation_gives_the_same_whatever_its_transforms_draw(draw, tiny_cifar10, change_row):
    noise = Noise(DRAWS[draw])
    change_row(eval=[noise])
    loader = cifar_loader(tiny_cifar10, train=False)
    assert_same(list(loader), list(loader))
    assert noise.calls == 12
    assert_same(list(loader), list(cifar_loader(tiny_cifar10, train=False, workers=1)))


def test_training_evaluation_calibration_and_resume(tmp_path, tiny_cifar10, change_row, capsys):
    """Stopped in the midst of an epoch, a run goes on to the same last bit."""
    noise = Noise(DRAWS["numpy"])
    change_row(train=[noise, FLIP()])
    assert run(tiny(tiny_cifar10, tmp_path / "whole")) == 0
    assert noise.calls == 3 * 20

    def interrupted():
        if noise.calls == 32:  # in the second of the second epoch's three batches
            signal.raise_signal(signal.SIGINT)
        return numpy.random.rand()

    noise.calls = 0
    noise.draw = interrupted
    assert run(tiny(tiny_cifar10, tmp_path / "parts")) == 128 + signal.SIGINT
    assert "after step 2 of 3" in capsys.readouterr().err
    noise.draw = DRAWS["numpy"]
    assert run(["--resume", tmp_path / "parts"]) == 0
    for part in ("state_dict", "optimizer"):
        assert_same(load(tmp_path / "parts")[part], load(tmp_path / "whole")[part])

    noise.calls = 0
    assert run(["--evaluate", "--pretrain", tmp_path / "whole", "--bit_width_list", "2,4,32",
                "--calibrate", 2, "--data-dir", tiny_cifar10, "--results-dir", tmp_path / "e"]) == 0
    assert noise.calls == 16 and set(evaluation(tmp_path / "e")) == {"2", "4", "32"}


# ---- images of other sizes

def add_row(monkeypatch, sizes, **fields):
    """Add a row "shapes", of images of these (height, width), until the test ends."""
    def open_shapes(root, split):
        return [(Image.fromarray(tiny_data.pixels(*size, 3)), index % 3)
                for index, size in enumerate(sizes)]

    monkeypatch.setitem(DATASETS, "shapes", DataSet(
        open=open_shapes, val_split={"train": "val"}, num_classes=3, image_size=40, **fields))


def shapes_loader(in_memory=True, train=True, workers=0):
    dataset = get_dataset("shapes", "train", data_dir="x")
    return make_loader(dataset, "shapes", CPU, 4, train, workers=workers, in_memory=in_memory)


VARIOUS = [(40, 40), (40, 53), (53, 40), (80, 60)]
RESIZE_40 = transforms.Resize(40)
REMEDY = r"add Resize\(40\) and CenterCrop\(40\) to these transforms"


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("part", ["train", "eval"])
def test_images_of_various_sizes(part, in_memory, workers, monkeypatch):
    add_row(monkeypatch, VARIOUS, train=[RESIZE_40], eval=[RESIZE_40])
    told = (f"images of shapes come out of the row's {part} transforms as 3 x 40 x 40, 3 x 40 x 53,"
            rf" 3 x 53 x 40 \(channels x height x width\), not all as 3 x 40 x 40: {REMEDY}")
    with pytest.raises(DataError, match=told):
        list(shapes_loader(in_memory, part == "train", workers))
    kill_workers()  # torch would wait for them, now and then 10 s
    cropped = [RESIZE_40, transforms.CenterCrop(40)]
    add_row(monkeypatch, VARIOUS, train=cropped, eval=cropped)
    for images, _ in shapes_loader(in_memory, part == "train", workers):
        assert images.shape == (4, 3, 40, 40)


@pytest.mark.parametrize("in_memory", [True, False])
def test_images_of_one_size_that_is_not_the_rows(in_memory, monkeypatch):
    add_row(monkeypatch, [(28, 28)] * 4)
    with pytest.raises(DataError, match=f"transforms as 3 x 28 x 28 .* not all as .*{REMEDY}"):
        list(shapes_loader(in_memory))


@pytest.mark.parametrize("in_memory", [True, False])
def test_images_of_one_channel(in_memory, monkeypatch):
    add_row(monkeypatch, [(40, 40)] * 4, train=[transforms.Grayscale(1)])
    with pytest.raises(DataError, match=r"as 1 x 40 x 40 .*Grayscale\(3\) for images of one"):
        list(shapes_loader(in_memory))


def test_a_crop_of_larger_images_is_left_to_the_transforms(monkeypatch):
    add_row(monkeypatch, [(40, 40), (48, 44)] * 2, train=[CROP(40, padding=4)])
    loader = shapes_loader()
    assert isinstance(loader, WorkerLoader)
    assert [images.shape for images, _ in loader] == [(4, 3, 40, 40)]


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_on_images_of_various_sizes_ends_in_one_line(
        workers, in_memory, tmp_path, monkeypatch, capsys):
    add_row(monkeypatch, VARIOUS, train=[RESIZE_40], eval=[RESIZE_40], in_memory=in_memory)
    assert run(["--dataset", "shapes", "--data-dir", tmp_path, "--width", 1, "--bit_width_list", 2,
                "--batch-size", 4, "--epochs", 1, "--device", "cpu", "--workers", workers,
                "--results-dir", tmp_path / "r"]) == 1
    assert_one_line(capsys, "images of shapes", "3 x 40 x 53", "add Resize(40) and CenterCrop(40)")
