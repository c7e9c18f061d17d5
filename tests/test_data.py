"""Every data set from small files in its real format; seeded batches, in memory or not."""
import fcntl
import gzip
import json
import math
import os
import random
import shutil
import struct

import numpy
import pytest
import torch
from PIL import EpsImagePlugin, Image
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

import tiny_data
from dataset import data as data_room
from dataset.data import DATASETS, DataSet, data_paths, get_dataset, get_transform, text_of
from dataset.files import IMAGE_FORMATS, DataError, load_image
from dataset.loader import (InMemoryLoader, SeededSamples, ShuffledBatches, WorkerLoader,
                            count_classes, fingerprint, flipped_crops, make_loader, read_arrays,
                            sha256)
from engine.arguments import merge_args, parse_flags
from engine.errors import UserError
from engine.setup import describe_images, make_val_loader
from utils import flag_text

CPU = torch.device("cpu")
PUBLISHED = {name: row.shapes for name, row in DATASETS.items()}  # before tiny_data changes them
SIZES = {  # of the files in tiny_data, per split
    "cifar10": {"train": 20, "test": 6, "train_auto_quan": 19, "val_auto_quan": 1},
    "cifar100": {"train": 12, "test": 6},
    "mnist": {"train": 12, "test": 6},
    "fashion-mnist": {"train": 12, "test": 6},
    "svhn": {"train": 12, "extra": 28, "train_extra": 40, "test": 6,
             "train_extra_auto_quan": 38, "val_auto_quan": 2},
    "imagenet": {"train": 6, "val": 6},
    "digits": {"train": 1437, "val": 360},
}


def make(name, data_dir, monkeypatch):
    if name != "digits":
        getattr(tiny_data, name.replace("-", "_"))(data_dir, monkeypatch)


@pytest.fixture(autouse=True)
def no_system_copy(tmp_path, monkeypatch):
    monkeypatch.setattr(data_room, "FASHION_MNIST_COPY", tmp_path / "none")


@pytest.mark.parametrize("name", DATASETS)
def test_every_split_of_real_files(name, tmp_path, monkeypatch):
    make(name, tmp_path, monkeypatch)
    row = DATASETS[name]
    assert set(SIZES[name]) == {*row.val_split, *row.val_split.values()}
    for split, size in SIZES[name].items():
        dataset = get_dataset(name, split, get_transform(name, split.startswith("train")), tmp_path)
        assert len(dataset) == size
        found = {dataset[index][1] for index in range(min(size, 200))}
        assert found <= set(range(row.num_classes or 3))
        image, _ = dataset[0]
        assert image.shape == (3, row.image_size, row.image_size) and image.dtype == torch.float32


def test_unknown_split_lists_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match="digits has no split test: choose from train, val"):
        get_dataset("digits", "test")


STATISTICS = {  # per data set: mean and std of each channel, on a scale of 0 to 255 for the CIFARs
    "cifar10": ([125.3 / 255, 123 / 255, 113.9 / 255], [63 / 255, 62.1 / 255, 66.7 / 255]),
    "cifar100": ([129.3 / 255, 124.1 / 255, 112.4 / 255], [68.2 / 255, 65.4 / 255, 70.4 / 255]),
    "mnist": ([0.1307] * 3, [0.3081] * 3), "svhn": ([0.5] * 3, [0.5] * 3),
    "digits": ([0.5] * 3, [0.5] * 3),
    "fashion-mnist": ([0.5] * 3, [0.5] * 3),
    "imagenet": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
}


@pytest.mark.parametrize("name", DATASETS)
def test_normalisation_of_a_flat_image(name):
    grey = name in ("mnist", "fashion-mnist")
    colour = (51, 51, 51) if grey else (51, 102, 204)  # 0.2, 0.4, 0.8
    image = Image.new("RGB", (300, 300) if name == "imagenet" else (32, 32), colour)
    if grey:
        image = image.convert("L")
    mean, std = (torch.tensor(values)[:, None, None] for values in STATISTICS[name])
    expected = (torch.tensor(colour)[:, None, None] / 255 - mean) / std
    out = get_transform(name, train=False)(image)
    torch.testing.assert_close(out, expected.expand_as(out))
    if name == "imagenet":
        assert out.shape == (3, 224, 224)


def test_evaluation_does_not_move_pixels():
    image = Image.fromarray(tiny_data.pixels(32, 32, 3))
    mean, std = (torch.tensor(values)[:, None, None] for values in STATISTICS["cifar10"])
    raw = torch.from_numpy(numpy.array(image)).permute(2, 0, 1) / 255
    torch.testing.assert_close(get_transform("cifar10", train=False)(image), (raw - mean) / std)


def test_cifar_training_images_are_flips_and_crops_of_the_padded_image():
    pixels = tiny_data.pixels(32, 32, 3)
    mean, std = (numpy.array(values) for values in STATISTICS["cifar10"])
    padded = numpy.pad(pixels, ((4, 4), (4, 4), (0, 0)))
    views = {}  # every flip and shift there is
    for flip in (False, True):
        source = numpy.pad(pixels[:, ::-1], ((4, 4), (4, 4), (0, 0))) if flip else padded
        for top in range(9):
            for left in range(9):
                views[source[top:top + 32, left:left + 32].tobytes()] = flip, top, left
    transform = get_transform("cifar10", train=True)
    torch.manual_seed(0)
    seen = []
    for _ in range(300):
        out = transform(Image.fromarray(pixels)).permute(1, 2, 0).double().numpy()
        seen.append(views[numpy.round((out * std + mean) * 255).astype(numpy.uint8).tobytes()])
    flips, tops, lefts = zip(*seen)
    assert 100 < sum(flips) < 200 and set(tops) == set(lefts) == set(range(9))


def test_imagenet_training_images_are_random_crops(tmp_path):
    image = Image.fromarray(tiny_data.pixels(300, 400, 3))
    transform = get_transform("imagenet", train=True)
    first, second = transform(image), transform(image)
    assert first.shape == second.shape == (3, 224, 224) and not torch.equal(first, second)


def test_digits_are_the_scans():
    train, val = get_dataset("digits", "train"), get_dataset("digits", "val")
    scans = {tuple(int(round(value * 255 / 16)) for value in scan): int(target)
             for scan, target in zip(*load_digits(return_X_y=True))}
    for dataset in (train, val):
        for index in range(0, len(dataset), 17):
            image, label = dataset[index]
            array = numpy.array(image)
            assert array.shape == (8, 8, 3) and (array == array[..., :1]).all()
            assert scans[tuple(array[..., 0].flatten().tolist())] == label
    counts = numpy.bincount(load_digits().target)
    assert (abs(numpy.bincount([label for _, label in val]) - 0.2 * counts) < 1).all()  # stratified
    assert get_transform("digits", train=True)(train[0][0]).shape == (3, 40, 40)


def test_held_out_splits_share_the_training_split_out(tmp_path, monkeypatch):
    tiny_data.cifar10(tmp_path, monkeypatch)
    whole = get_dataset("cifar10", "train", data_dir=tmp_path)
    first = get_dataset("cifar10", "train_auto_quan", data_dir=tmp_path)
    rest = get_dataset("cifar10", "val_auto_quan", data_dir=tmp_path)
    order = list(range(20))
    random.seed(123)
    random.shuffle(order)
    for part, indices in ((first, order[:19]), (rest, order[19:])):
        for (image, label), index in zip(part, indices, strict=True):
            assert image.tobytes() == whole[index][0].tobytes() and label == whole[index][1]


def test_svhn_joins_train_and_extra_and_counts_ten_as_zero(tmp_path, monkeypatch):
    tiny_data.svhn(tmp_path, monkeypatch)
    train, extra, joined = (get_dataset("svhn", split, data_dir=tmp_path)
                            for split in ("train", "extra", "train_extra"))
    assert [label for _, label in joined] == [label for part in (train, extra) for _, label in part]
    assert [label for _, label in train] == tiny_data.labels(12)
    assert joined[12][0].tobytes() == extra[0][0].tobytes()


def test_held_out_splits_of_ones_own_row_share_no_image(monkeypatch):
    splits = {"other": "test", "full": "test", "full_auto_quan": "held_auto_quan"}
    opened = []

    def images(root, split):
        opened.append(split)
        return [(Image.new("L", (index + 1, 1)), 0) for index in range(40)]

    monkeypatch.setitem(DATASETS, "own", DataSet(open=images, val_split=splits))
    first, rest = (get_dataset("own", split) for split in ("full_auto_quan", "held_auto_quan"))
    assert opened == ["full", "full"] and len(first) == 38
    assert sorted(image.width for part in (first, rest) for image, _ in part) == list(range(1, 41))


def test_a_held_out_split_of_class_folders_has_their_classes_and_labels(tmp_path, monkeypatch):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        for number in range(20):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / name / f"{number}.png")
    splits = {"train": "test", "train_auto_quan": "val_auto_quan"}
    monkeypatch.setitem(DATASETS, "own", DataSet(
        open=lambda root, split: datasets.ImageFolder(tmp_path), val_split=splits,
        num_classes=None))
    first, rest = (get_dataset("own", split) for split in ("train_auto_quan", "val_auto_quan"))
    assert count_classes("own", first, rest) == 2
    assert describe_images("own", first)["class_names"] == ["ant", "bee"]
    labels = [first[index][1] for index in range(len(first))]
    assert fingerprint(first)["list of labels"] == sha256(flag_text(labels))


def test_the_name_of_a_split_is_opened_as_it_is(monkeypatch):
    """An underscore joins nothing: train_full is no train and full."""
    opened = []

    def note(root, split):
        opened.append(split)
        return [(Image.new("RGB", (40, 40)), 0)]

    monkeypatch.setitem(DATASETS, "own", DataSet(open=note, val_split={"train_full": "test_b"}))
    for split in ("train_full", "test_b"):
        assert len(get_dataset("own", split)) == 1
    assert opened == ["train_full", "test_b"]


def test_svhn_in_memory(tmp_path, monkeypatch):
    tiny_data.svhn(tmp_path, monkeypatch)
    for split in ("train_extra", "extra", "train_extra_auto_quan"):
        dataset = get_dataset("svhn", split, data_dir=tmp_path)
        loader = make_loader(dataset, "svhn", CPU, 4, train=False)
        expected = [(get_transform("svhn", False, normalized=False)(image), label)
                    for image, label in dataset]
        assert torch.equal(loader.images.permute(0, 3, 1, 2), torch.stack([x for x, _ in expected]))
        assert loader.labels.tolist() == [label for _, label in expected]


def test_mnist_is_given_as_three_equal_channels(tmp_path, monkeypatch):
    tiny_data.mnist(tmp_path, monkeypatch)
    image, _ = get_dataset("mnist", "train", get_transform("mnist", True), tmp_path)[0]
    assert torch.equal(image[0], image[1]) and torch.equal(image[0], image[2])


def test_fashion_mnist_takes_the_copy_of_the_system(tmp_path, monkeypatch):
    made = tiny_data.fashion_mnist(tmp_path / "made", monkeypatch)
    copy = tmp_path / "copy"
    copy.mkdir()
    for packed in made.glob("*.gz"):
        packed.rename(copy / packed.name)
    monkeypatch.setattr(data_room, "FASHION_MNIST_COPY", copy)
    for data_dir in (tmp_path / "made", tmp_path / "new"):  # files that are there stay as they are
        found = get_dataset("fashion-mnist", "test", data_dir=data_dir)
        assert [label for _, label in found] == tiny_data.labels(6)
    assert (tmp_path / "new" / "fashion-mnist").exists()
    packed = copy / "t10k-images-idx3-ubyte.gz"
    packed.write_bytes(packed.read_bytes()[:-9])
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte.gz cannot be read .*install it"):
        get_dataset("fashion-mnist", "test", data_dir=tmp_path / "newer")


def test_runs_side_by_side_unpack_fashion_mnist_one_at_a_time(tmp_path, monkeypatch):
    made = tiny_data.fashion_mnist(tmp_path / "made", monkeypatch)
    monkeypatch.setattr(data_room, "FASHION_MNIST_COPY", made)
    unpack = data_room.unpack
    unpacked = []

    def unpack_locked(packed, path):
        folder = os.open(path.parent, os.O_RDONLY)
        with pytest.raises(BlockingIOError):  # what another run would wait for
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(folder)
        unpacked.append(path.name)
        unpack(packed, path)

    monkeypatch.setattr(data_room, "unpack", unpack_locked)
    get_dataset("fashion-mnist", "test", data_dir=tmp_path / "new")
    assert len(unpacked) == 4
    get_dataset("fashion-mnist", "test", data_dir=tmp_path / "new")
    assert len(unpacked) == 4


def test_a_name_without_a_row_is_refused_and_a_folder_needs_none(tmp_path):
    with pytest.raises(ValueError, match="there is no data set 'nothing': choose from digits, "):
        get_dataset("nothing", "train")
    for name in ("ant", "bee"):
        for number in range(20):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.new("RGB", (8, 8)).save(tmp_path / name / f"{number}.png")
    assert 30 < len(get_dataset(f"folder:{tmp_path}", "train")) < 40


def test_data_paths_say_where_data_lives(tmp_path, monkeypatch):
    assert data_paths["cifar10"] == "data/cifar10"
    tiny_data.cifar10(tmp_path, monkeypatch)
    monkeypatch.setitem(data_paths, "cifar10", str(tmp_path / "cifar10"))
    assert len(get_dataset("cifar10", "test")) == 6
    roots = []
    monkeypatch.setitem(DATASETS, "own", DataSet(
        open=lambda root, split: roots.append(root) or [(Image.new("RGB", (40, 40)), 0)],
        val_split={"train": "test"}))
    get_dataset("own", "train")
    assert roots == ["data/own"]


# ---- downloads and broken files

def test_missing_data_is_downloaded_and_verified(tmp_path, monkeypatch, http_folder):
    served, url = http_folder
    folder = tiny_data.cifar10(tmp_path / "made", monkeypatch)
    archive = tiny_data.archive(folder, served / "cifar.tar.gz")
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{url}/cifar.tar.gz")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", tiny_data.md5(archive))
    assert len(get_dataset("cifar10", "train", data_dir=tmp_path / "data")) == 20

    archive.write_bytes(archive.read_bytes()[:-10])  # what another newcomer would get
    told = "CIFAR10 is not in .*other/cifar10, or altered there, and could not be downloaded"
    with pytest.raises(DataError, match=told):
        get_dataset("cifar10", "train", data_dir=tmp_path / "other")


def test_mnist_download(tmp_path, monkeypatch, http_folder):
    served, url = http_folder
    for path in tiny_data.mnist(tmp_path, monkeypatch).glob("*.gz"):
        path.rename(served / path.name)
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"{url}/"])
    assert len(get_dataset("mnist", "test", data_dir=tmp_path / "new")) == 6


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_damaged_data_offline_is_one_clear_error(tmp_path, monkeypatch, damage):
    path = tiny_data.svhn(tmp_path, monkeypatch) / "train_32x32.mat"
    content = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(content[:100])
    elif damage == "altered":
        path.write_bytes(content[:-1] + b"x")
    told = r"SVHN is not in .*svhn, or altered there.* go online, copy it there"
    with pytest.raises(DataError, match=told) as error:
        get_dataset("svhn", "train", data_dir=tmp_path)
    assert "\n" not in str(error.value)


def idx(*shape, value=0):
    """Return an idx file's content: images (n, height, width), or labels (n,), of one value."""
    header = struct.pack(f">{1 + len(shape)}I", 0x800 + len(shape), *shape)
    return header + bytes([value]) * math.prod(shape)


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("file, content, told", [
    (IMAGES, idx(9, 28, 28), "holds 12 labels for 9 images"),
    (IMAGES, idx(12, 14, 56), "holds 12 images of 14 x 56 pixels, not 12 of 28 x 28"),
    (IMAGES, idx(12, 28, 28)[:-1], "has 9,423 bytes, not the 9,424 of its header"),
    (IMAGES, idx(12), "does not begin as a file of MNIST's format with 3 dimensions"),
    (IMAGES, b"", "does not begin as a file of MNIST's format"),
    (LABELS, idx(13), "holds 13 labels for 12 images"),
    (LABELS, idx(11), "holds 11 labels for 12 images"),
    (LABELS, idx(12, value=10), "holds a label 10, not one of its 10 classes, 0 to 9"),
    (LABELS, idx(12) + b"x", "has 21 bytes, not the 20 of its header")])
def test_raw_files_that_are_not_what_they_say(name, file, content, told, tmp_path, monkeypatch):
    make(name, tmp_path, monkeypatch)
    (path,) = tmp_path.rglob(file)
    path.write_bytes(content)
    path.with_name(f"{file}.gz").unlink()
    named = path if "labels for" not in told else path.with_name(LABELS)
    with pytest.raises(DataError, match=f"{named} {told}.*: remove it to get it anew, or") as error:
        get_dataset(name, "train", data_dir=tmp_path)
    assert "\n" not in str(error.value)
    assert len(get_dataset(name, "test", data_dir=tmp_path)) == 6


def test_all_raw_files_of_another_number(tmp_path, monkeypatch):
    """64 images with 64 labels are no Fashion-MNIST."""
    folder = tiny_data.fashion_mnist(tmp_path, monkeypatch)
    for file, content in ((IMAGES, idx(64, 28, 28)), (LABELS, idx(64))):
        (folder / file).write_bytes(content)
        (folder / f"{file}.gz").unlink()
    told = f"{IMAGES} holds 64 images of 28 x 28 pixels, not 12 of 28 x 28"
    with pytest.raises(DataError, match=told):
        get_dataset("fashion-mnist", "train", data_dir=tmp_path)


@pytest.mark.parametrize("file", [IMAGES, LABELS])
def test_raw_files_are_compared_with_their_packed_ones(file, tmp_path, monkeypatch):
    path = tiny_data.mnist(tmp_path, monkeypatch) / file
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # a valid pixel or label
    with pytest.raises(DataError, match=f"{path} is not the content of {file}.gz beside it"):
        get_dataset("mnist", "train", data_dir=tmp_path)
    path.unlink()  # as the message says
    get_dataset("mnist", "train", data_dir=tmp_path)
    assert path.read_bytes() == content

    packed = path.with_name(f"{file}.gz")
    packed.write_bytes(gzip.compress(path.read_bytes(), 1))  # the same content
    told = f"{packed} does not have the published MD5 .*: remove it to go on with {file} as it is"
    with pytest.raises(DataError, match=told):
        get_dataset("mnist", "train", data_dir=tmp_path)
    packed.unlink()
    get_dataset("mnist", "train", data_dir=tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "svhn", "mnist", "fashion-mnist"])
def test_every_set_has_the_published_number_of_images(name, tmp_path, monkeypatch):
    published = PUBLISHED[name]["test"]
    assert published[0] == (26_032 if name == "svhn" else 10_000)
    with monkeypatch.context() as making:  # torchvision's checksums alone
        make(name, tmp_path, making)
        making.setitem(DATASETS, name, DATASETS[name]._replace(shapes={"test": published}))
        told = rf"holds 6 images of \d+ x \d+ pixels, not {published[0]:,}"
        with pytest.raises(DataError, match=told):
            get_dataset(name, "test", data_dir=tmp_path)


@pytest.mark.parametrize("in_memory", [True, False])
def test_labels_of_a_row_of_ones_own(in_memory, monkeypatch):
    samples = [(Image.new("RGB", (8, 8)), label) for label in (0, 1, 2, 3)]
    row = DATASETS["digits"]._replace(open=lambda root, split: samples, num_classes=3, shapes={})
    monkeypatch.setitem(DATASETS, "own", row)
    told = "own holds a label 3, not one of its 3 classes, 0 to 2: .* or the row's num_classes"
    with pytest.raises(DataError, match=told):
        own = get_dataset("own", "val", data_dir="x")
        list(make_loader(own, "own", CPU, 2, False, in_memory=in_memory))
    samples.clear()
    with pytest.raises(DataError, match="own's val part in x/own holds no images"):
        get_dataset("own", "val", data_dir="x")


def test_image_folder_errors(tmp_path):
    told = "imagenet/train does not hold imagenet .*put one folder of images per class under"
    with pytest.raises(DataError, match=told):
        get_dataset("imagenet", "train", data_dir=tmp_path)
    (tmp_path / "imagenet" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match=told):
        get_dataset("imagenet", "train", data_dir=tmp_path)
    (tmp_path / "imagenet" / "train" / "cat").mkdir()
    with pytest.raises(DataError, match=told):
        get_dataset("imagenet", "train", data_dir=tmp_path)
    (tmp_path / "imagenet" / "train" / "cat" / "1.JPEG").write_bytes(b"no image")
    with pytest.raises(DataError, match="cat/1.JPEG is not a readable image"):
        get_dataset("imagenet", "train", data_dir=tmp_path)[0]


def folder_of(tmp_path):
    """Return a class folder of images, and the function that opens them."""
    folder = tiny_data.imagenet(tmp_path) / "train" / "n01440764"
    return folder, lambda: get_dataset("imagenet", "train", data_dir=tmp_path)


@pytest.mark.parametrize("make_file", [
    os.mkfifo, lambda path: os.symlink("/dev/zero", path), lambda path: os.symlink("none", path)],
    ids=["pipe", "device", "link to nothing"])
def test_what_is_no_file_is_no_image(make_file, tmp_path):
    folder, opened = folder_of(tmp_path)
    make_file(folder / "x.png")
    with pytest.raises(DataError, match=f"{folder}/x.png is not a file, but a pipe, a device, or"):
        opened()
    with pytest.raises(DataError, match=f"{folder}/x.png is not a readable image"):
        load_image(folder / "x.png")  # of a row of one's own


def test_a_pipe_in_the_place_of_a_download(tmp_path, monkeypatch):
    path = tiny_data.mnist(tmp_path, monkeypatch) / LABELS
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match=f"{path} is a pipe: remove it"):
        get_dataset("mnist", "train", data_dir=tmp_path)


@pytest.mark.parametrize("link, target", [
    ("n01440764/self", "."), ("n01440764/self", "../n01440764"), ("n01440764/all", ".."),
    ("all", "."), ("n01440764/a/b/c", "../../..")])
def test_links_in_a_circle(link, target, tmp_path):
    folder, opened = folder_of(tmp_path)
    path = folder.parent / link
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)
    with pytest.raises(DataError, match=f"{path} is a link to a folder that it stands in"):
        opened()


@pytest.mark.parametrize("link", ["train/x", "train", "../imagenet"])
def test_links_to_themselves(link, tmp_path):
    folder, opened = folder_of(tmp_path)
    path = tmp_path / "imagenet" / link
    if path.exists():
        path.resolve().rename(tmp_path / "moved")
        path = tmp_path / "imagenet" if ".." in link else path
    path.symlink_to(path.name)
    with pytest.raises(DataError, match="does not hold imagenet .*Too many levels.*put one folder"):
        opened()


def test_a_data_folder_that_links_to_itself(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    for name in ("mnist", "fashion-mnist", "cifar10", "svhn"):
        with pytest.raises(DataError, match=f"loop/{name} cannot be written"):
            get_dataset(name, "train", data_dir=tmp_path / "loop")


def test_images_are_those_of_torchvision_in_its_order(tmp_path):
    folder, opened = folder_of(tmp_path)
    for index, inner in enumerate(("b", "a/c", "a-")):
        (folder / inner).mkdir(parents=True)
        shutil.copy(folder / "n01440764_0.JPEG", folder / inner / f"{9 - index}.PNG")
    (folder / "notes.txt").write_text("")
    (folder / "z.jpg").symlink_to("n01440764_1.JPEG")
    (folder.parent / "link").symlink_to("n01440764/b")
    found = opened()
    expected = datasets.ImageFolder(folder.parent)
    assert found.samples == expected.samples and len(found) == 6 + 3 + 1 + 1
    assert found.classes == expected.classes and found.targets == expected.targets
    (folder / ".thumbnails").mkdir()
    for hidden in ("._0.JPEG", ".thumbnails/0.JPEG"):  # which torchvision takes for images
        (folder / hidden).write_bytes(b"")
    assert opened().samples == found.samples


def test_names_that_are_no_utf8(tmp_path):
    for split in ("train", "val"):
        folder = os.path.join(os.fsencode(tmp_path), b"\xff", b"imagenet", split.encode(), b"n\xe9")
        os.makedirs(folder)
        Image.new("RGB", (8, 8)).save(os.path.join(folder, b"\xfe.png"), "PNG")
    data_dir = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"\xff"))
    train, val = (get_dataset("imagenet", split, data_dir=data_dir) for split in ("train", "val"))
    assert len(train) == 1 and train[0][0].size == (8, 8)
    assert count_classes("imagenet", train, val) == 1
    assert fingerprint(train) == fingerprint(val)
    assert describe_images("imagenet", train)["class_names"] == ["n\\xe9"]
    json.dumps(describe_images("imagenet", train)).encode()


@pytest.mark.parametrize("kind", IMAGE_FORMATS)
def test_formats_of_images(kind, tmp_path):
    image = Image.fromarray(tiny_data.pixels(4, 5, 3))
    image.save(tmp_path / "x.jpg", kind)
    found = load_image(tmp_path / "x.jpg")
    assert found.mode == "RGB" and found.size == (5, 4)
    if kind not in ("JPEG", "WEBP"):
        assert found.tobytes() == image.tobytes()


def test_an_image_of_another_format_starts_no_program(tmp_path, monkeypatch):
    """PIL has Ghostscript, `gs`, read an EPS, whatever the file is called."""
    path = tmp_path / "x.jpg"
    Image.new("RGB", (4, 4)).save(path, "EPS")
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    with pytest.raises(DataError, match="x.jpg is not a readable image of JPEG, PNG"):
        load_image(path)
    assert not (tmp_path / "started").exists()


# ---- seeded batches

def test_shuffled_batches_cover_every_sample_once_in_an_order_of_seed_and_epoch():
    def epoch(number, seed=0, start=0):
        batches = ShuffledBatches(10, 4, seed)
        batches.epoch, batches.start = number, start
        return list(batches)

    assert [len(batch) for batch in epoch(0)] == [4, 4, 2] and len(ShuffledBatches(10, 4, 0)) == 3
    indices = [index for batch in epoch(0) for index, _ in batch]
    assert sorted(indices) == list(range(10)) and indices != list(range(10))
    assert epoch(0) == epoch(0)
    assert epoch(0) != epoch(1) and epoch(0) != epoch(0, seed=1)
    assert epoch(3, start=2) == epoch(3)[2:] and epoch(3, start=3) == []


def test_training_batches_do_not_depend_on_the_workers(tiny_cifar10):
    dataset = SeededSamples(get_dataset("cifar10", "train", data_dir=tiny_cifar10),
                            get_transform("cifar10", True))
    state = torch.get_rng_state()
    here, there = (
        list(DataLoader(dataset, batch_sampler=ShuffledBatches(20, 8, 0), num_workers=workers,
                        generator=torch.Generator()))
        for workers in (0, 2))
    torch.testing.assert_close(here, there, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)  # nothing drawn from it


# ---- in memory


def loader_of(name, data_dir, in_memory=True, train=True, batch_size=5, seed=0, **more):
    row = DATASETS[name]
    split = next(iter(row.val_split)) if train else next(iter(row.val_split.values()))
    dataset = get_dataset(name, split, data_dir=data_dir)
    return make_loader(dataset, name, CPU, batch_size, train, seed, in_memory=in_memory, **more)


def epoch_of(loader, epoch=0, start=0):
    loader.batch_sampler.epoch, loader.batch_sampler.start = epoch, start
    return list(loader)


def joined(loader):
    """Return all images and all labels of a loader."""
    return [torch.cat(parts) for parts in zip(*loader)]


def test_validation_batches_are_4_times_as_large_unless_compiled(tiny_cifar10):
    for flags, size in (((), 16), (["--compile"], 4)):
        args = merge_args(parse_flags(["--dataset", "cifar10", "--model", "resnet20q",
                                       "--batch-size", "4", *flags]))
        dataset = get_dataset("cifar10", "test", data_dir=tiny_cifar10)
        loader = make_val_loader(args, dataset, torch.channels_last, CPU)
        sizes = [len(labels) for labels in loader.labels.split(size)]
        assert [len(labels) for _, labels in loader] == sizes and len(loader) == len(sizes)


@pytest.mark.parametrize("name", DATASETS)
def test_batches_from_memory_are_those_of_the_per_sample_transforms(name, tmp_path, monkeypatch):
    """To the last bit where nothing is drawn; ImageNet stays on disk."""
    make(name, tmp_path, monkeypatch)
    memory, single = (loader_of(name, tmp_path, in_memory) for in_memory in (True, False))
    assert isinstance(memory, InMemoryLoader if name != "imagenet" else WorkerLoader)
    assert isinstance(single, WorkerLoader)
    if name not in ("cifar10", "cifar100"):  # whose flips and crops are drawn in another way
        torch.testing.assert_close(epoch_of(memory, 3), epoch_of(single, 3), rtol=0, atol=0)
    for one, other in zip(epoch_of(memory, 1), epoch_of(single, 1), strict=True):
        assert torch.equal(one[1], other[1])
    memory, single = (joined(loader_of(name, tmp_path, in_memory, train=False))
                      for in_memory in (True, False))
    torch.testing.assert_close(memory, single, rtol=0, atol=0)
    split = next(iter(DATASETS[name].val_split.values()))
    samples = get_dataset(name, split, get_transform(name, train=False), tmp_path)
    expected = torch.stack([image for image, _ in samples])
    torch.testing.assert_close(memory[0], expected, rtol=0, atol=0)  # torchvision's own, one by one
    for in_memory in (True, False):
        for memory_format in (torch.contiguous_format, torch.channels_last):
            loader = loader_of(name, tmp_path, in_memory, memory_format=memory_format)
            assert next(iter(loader))[0].is_contiguous(memory_format=memory_format)


def test_flips_and_crops_in_memory_are_drawn_as_those_per_sample():
    """Each of 162 views as often, to chi-squared; one image's tells nothing of the next one's."""
    pixels = tiny_data.pixels(1, 6, 7, 3)
    views = {}
    for flip in (False, True):
        padded = numpy.pad(pixels[0][:, ::-1] if flip else pixels[0], ((4, 4), (4, 4), (0, 0)))
        for top in range(9):
            for left in range(9):
                views[padded[top:top + 6, left:left + 7].tobytes()] = len(views)
    assert len(views) == 162
    count = 162 * 100
    batches = ShuffledBatches(count, count, 0)
    (_, seeds), = batches.batches()
    indices = torch.zeros(count, dtype=torch.int64)
    crops = flipped_crops(torch.from_numpy(pixels), indices, seeds, padding=4)
    seen = numpy.array([views[crop.numpy().tobytes()] for crop in crops])
    counts = numpy.bincount(seen, minlength=162)
    assert ((counts - 100) ** 2 / 100).sum() < 161 + 5 * (2 * 161) ** 0.5  # 5 standard deviations
    assert abs(numpy.corrcoef(seen[1:], seen[:-1])[0, 1]) < 5 / count**0.5
    # The per-sample transform draws from the same 162: see the test of flips and crops above.


def test_batches_from_memory_are_a_function_of_seed_and_epoch(tiny_cifar10):
    first = epoch_of(loader_of("cifar10", tiny_cifar10), 2)
    for start in (0, 2):
        again = epoch_of(loader_of("cifar10", tiny_cifar10), 2, start)
        torch.testing.assert_close(again, first[start:], rtol=0, atol=0)
    for other in (epoch_of(loader_of("cifar10", tiny_cifar10), 1),
                  epoch_of(loader_of("cifar10", tiny_cifar10, seed=1), 2)):
        assert not torch.equal(other[0][0], first[0][0])
    transform = get_transform("cifar10", False, False)
    images, labels = read_arrays(get_dataset("cifar10", "train", transform, tiny_cifar10))
    parts = []
    for rank in range(2):  # of two processes
        batches = ShuffledBatches(20, 5, 0, rank, 2)
        batches.epoch = 2
        parts.append(list(InMemoryLoader(images, labels, "cifar10", batches)))
    for one, (whole, _) in enumerate(first):
        torch.testing.assert_close(parts[0][one][0], whole[0::2], rtol=0, atol=0)
        torch.testing.assert_close(parts[1][one][0], whole[1::2], rtol=0, atol=0)


@pytest.mark.parametrize("rank", range(4))
def test_fewer_images_than_processes(rank):
    images, labels = torch.zeros(2, 28, 28, 3, dtype=torch.uint8), torch.tensor([3, 4])
    loader = InMemoryLoader(images, labels, "mnist", rank=rank, world_size=4)
    assert [labels.tolist() for _, labels in loader] == ([[3 + rank]] if rank < 2 else [])
    assert len(loader) == (rank < 2)


def test_transforms_as_text():
    def doubled(x):
        return x

    row = (transforms.Resize(40), transforms.Compose([transforms.CenterCrop(32)]), doubled)
    assert text_of(row) == (
        "Resize(size=40, interpolation=bilinear, max_size=None, antialias=True), "
        "Compose( CenterCrop(size=(32, 32)) ), doubled")


# ---- rows of one's own

def own_row(monkeypatch, samples, **more):
    monkeypatch.setitem(DATASETS, "own", DATASETS["digits"]._replace(
        open=lambda root, split: samples, **{
            "val_split": {"train": "val"}, "num_classes": None, "shapes": {}, **more}))
    return get_dataset("own", "train")


class OwnTransform:
    """A data set that crops and flips by itself."""

    crop = transforms.Compose([transforms.RandomCrop(40, padding=6),
                               transforms.RandomHorizontalFlip()])

    def __len__(self):
        return 8

    def __getitem__(self, index):
        pixels = numpy.random.default_rng(index).integers(0, 256, (40, 40, 3), numpy.uint8)
        return self.crop(Image.fromarray(pixels)), index


def test_a_transform_of_the_data_set_s_own_is_drawn_in_each_epoch(monkeypatch):
    dataset = own_row(monkeypatch, OwnTransform())
    before = torch.get_rng_state()
    loader = make_loader(dataset, "own", torch.device("cpu"), 8, train=True)
    assert torch.equal(torch.get_rng_state(), before)
    epochs = []
    for epoch in range(2):
        loader.batch_sampler.epoch = epoch
        (images, labels), = loader
        epochs.append(images[labels.argsort()])
    assert sum(torch.equal(*pair) for pair in zip(*epochs)) < 4


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("label", [0.25, [0, 1]])
def test_labels_that_are_no_classes_are_refused(label, in_memory, monkeypatch):
    dataset = own_row(monkeypatch, [(Image.new("RGB", (40, 40)), label)] * 4, in_memory=in_memory)
    with pytest.raises(DataError, match="a label is the number of a class"):
        list(make_loader(dataset, "own", torch.device("cpu"), 4, train=False))


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_images_of_more_than_8_bits_are_refused(mode, in_memory, monkeypatch):
    dataset = own_row(monkeypatch, [(Image.new(mode, (40, 40)), 0)] * 4, in_memory=in_memory)
    with pytest.raises(DataError, match=f"images of mode {mode}, whose values"):
        list(make_loader(dataset, "own", torch.device("cpu"), 4, train=False))


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_of_more_than_8_bits_behind_others_is_refused(workers, in_memory, monkeypatch):
    samples = [(Image.new(mode, (40, 40)), 0) for mode in ("RGB", "RGB", "I;16", "RGB")]
    dataset = own_row(monkeypatch, samples, in_memory=in_memory)
    with pytest.raises(DataError, match="images of mode I;16, whose values"):
        list(make_loader(dataset, "own", CPU, 4, train=True, workers=workers))


class Labelled(torch.utils.data.Dataset):
    """Its labels are of another type than int64, and attributes of these names are its own."""

    def __init__(self, kind):
        self.kind = kind

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return Image.new("RGB", (40, 40)), numpy.array([0, 1, 1, 0]).astype(self.kind)[index]

    labels = ["cat", "dog"]
    classes = 2


@pytest.mark.parametrize("kind", ["int16", "int32", "uint8", "bool", "int64"])
def test_labels_of_any_whole_numbers_are_int64(kind, monkeypatch):
    dataset = own_row(monkeypatch, Labelled(kind))
    (_, labels), = make_loader(dataset, "own", CPU, 4, train=False)
    assert labels.dtype == torch.int64 and labels.tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize("labels", [["cat", "dog"], {"cat": 0}, lambda self: 1])
def test_attributes_of_another_meaning_are_not_taken(labels, monkeypatch):
    monkeypatch.setattr(Labelled, "labels", labels)
    dataset = own_row(monkeypatch, Labelled("int64"), num_classes=2)
    assert "list of labels" not in fingerprint(dataset)
    assert "list of labels" not in fingerprint(torch.utils.data.Subset(dataset, [1, 3]))
    assert describe_images("own", dataset)["class_names"] is None


class Sometimes(torch.utils.data.Dataset):
    """Samples that a transform of their own rarely changes, which a few of them do not show."""

    def __len__(self):
        return 20

    def __getitem__(self, index):
        return Image.new("RGB", (40, 40)), 0


@pytest.mark.parametrize("dataset, kind", [
    ([(Image.new("RGB", (40, 40)), 0)] * 4, InMemoryLoader), (Sometimes(), WorkerLoader),
    (torch.utils.data.Subset(Sometimes(), [0, 1]), WorkerLoader),
    (datasets.FakeData(4, (3, 40, 40), 10), InMemoryLoader),
    (datasets.FakeData(4, (3, 40, 40), 10, transforms.RandomInvert(0.01)), WorkerLoader)])
def test_only_samples_that_are_known_to_be_fixed_are_held_in_memory(dataset, kind):
    assert type(make_loader(dataset, "digits", CPU, 2, True)) is kind


def test_labels_are_those_after_a_target_transform(monkeypatch):
    """As of EMNIST's letters, 1 to 26."""
    class Letters(list):
        targets = [1, 2]
        target_transform = staticmethod(lambda label: label - 1)

    row = DATASETS["digits"]._replace(num_classes=2, shapes={}, open=lambda root, split: Letters(
        (Image.new("RGB", (40, 40)), label) for label in (0, 1)))
    monkeypatch.setitem(DATASETS, "own", row)
    assert len(get_dataset("own", "train")) == 2


def test_a_fingerprint_has_all_labels():
    samples = [(Image.new("RGB", (4, 4)), label) for label in (0, 1, 2, 3, 4)]
    changed = [*samples[:1], (samples[1][0], 9), *samples[2:]]
    assert fingerprint(samples) == fingerprint(list(samples)) != fingerprint(changed)


def test_a_row_that_no_checkpoint_could_hold_is_refused(monkeypatch):
    monkeypatch.setitem(DATASETS, "own", DATASETS["digits"]._replace(mean=(0.3,)))
    with pytest.raises(UserError, match=r"the row of own .* has the mean \(0.3,\): give three"):
        describe_images("own", [])


def test_names_of_other_classes_than_the_row_s_are_left_out():
    class Three(list):
        classes = ["a", "b", "c"]

    assert describe_images("digits", Three())["class_names"] is None
