"""Small data sets in their real on-disk formats.

torchvision's checksums and the rows' numbers of images are set to theirs.
"""
import gzip
import hashlib
import pickle
import struct
import tarfile
from pathlib import Path

import numpy
import scipy.io
from PIL import Image
from torchvision import datasets

from dataset.data import DATASETS

RANDOM = numpy.random.RandomState(0)


def pixels(*shape):
    return RANDOM.randint(0, 256, shape).astype(numpy.uint8)


def labels(count, classes=10):
    return [index % classes for index in range(count)]


def md5(path):
    return hashlib.md5(Path(path).read_bytes()).hexdigest()


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def set_counts(monkeypatch, name, **counts):
    """Have a row expect these numbers of images, of its own height and width."""
    row = DATASETS[name]
    shapes = {part: (count, *row.shapes[part][1:]) for part, count in counts.items()}
    monkeypatch.setitem(DATASETS, name, row._replace(shapes=shapes))


def write_cifar(folder, files, label_key, classes, meta):
    """CIFAR's python version: a pickle a file, rows of 3072 bytes (red, green, blue planes)."""
    folder.mkdir(parents=True)
    for name, count in files.items():
        record = {"data": pixels(count, 3072), label_key: labels(count, classes),
                  "filenames": ["x.png"] * count}
        (folder / name).write_bytes(pickle.dumps(record, protocol=2))
    name, key = meta
    names = [f"class {index}" for index in range(classes)]
    (folder / name).write_bytes(pickle.dumps({key: names}, protocol=2))


def cifar10(data_dir, monkeypatch, per_batch=4, test=6):
    folder = Path(data_dir, "cifar10", "cifar-10-batches-py")
    names = [f"data_batch_{index}" for index in range(1, 6)]
    write_cifar(folder, {**dict.fromkeys(names, per_batch), "test_batch": test}, "labels", 10,
                ("batches.meta", "label_names"))
    train_list = [[name, md5(folder / name)] for name in names]
    monkeypatch.setattr(datasets.CIFAR10, "train_list", train_list)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", md5(folder / "test_batch")]])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {
        "filename": "batches.meta", "key": "label_names", "md5": md5(folder / "batches.meta")})
    set_counts(monkeypatch, "cifar10", train=5 * per_batch, test=test)
    return folder


def cifar100(data_dir, monkeypatch):
    folder = Path(data_dir, "cifar100", "cifar-100-python")
    write_cifar(folder, {"train": 12, "test": 6}, "fine_labels", 100, ("meta", "fine_label_names"))
    monkeypatch.setattr(datasets.CIFAR100, "train_list", [["train", md5(folder / "train")]])
    monkeypatch.setattr(datasets.CIFAR100, "test_list", [["test", md5(folder / "test")]])
    monkeypatch.setattr(datasets.CIFAR100, "meta", {
        "filename": "meta", "key": "fine_label_names", "md5": md5(folder / "meta")})
    set_counts(monkeypatch, "cifar100", train=12, test=6)
    return folder


def svhn(data_dir, monkeypatch):
    folder = Path(data_dir, "svhn")
    folder.mkdir(parents=True)
    split_list = {}
    for split, count in (("train", 12), ("extra", 28), ("test", 6)):
        path = folder / f"{split}_32x32.mat"
        # The digit 0 is class 10.
        y = numpy.array([label or 10 for label in labels(count)], numpy.uint8)[:, None]
        scipy.io.savemat(path, {"X": pixels(32, 32, 3, count), "y": y})
        split_list[split] = [f"http://127.0.0.1:9/{path.name}", path.name, md5(path)]
    monkeypatch.setattr(datasets.SVHN, "split_list", split_list)
    set_counts(monkeypatch, "svhn", train=12, extra=28, test=6)
    return folder


def mnist(data_dir, monkeypatch, kind=datasets.MNIST, name="mnist"):
    """MNIST's idx files, beside their .gz as downloaded."""
    folder = Path(data_dir, name, kind.__name__, "raw")
    folder.mkdir(parents=True)
    resources = []
    for prefix, count in (("train", 12), ("t10k", 6)):
        head = struct.pack(">IIII", 2051, count, 28, 28)
        contents = {
            "images-idx3-ubyte": head + pixels(count, 28, 28).tobytes(),
            "labels-idx1-ubyte": struct.pack(">II", 2049, count) + bytes(labels(count))}
        for ending, content in contents.items():
            path = folder / f"{prefix}-{ending}"
            path.write_bytes(content)
            compressed = folder / f"{path.name}.gz"
            compressed.write_bytes(gzip.compress(content))
            resources.append((compressed.name, md5(compressed)))
    monkeypatch.setattr(kind, "resources", resources)
    set_counts(monkeypatch, name, train=12, test=6)
    return folder


def fashion_mnist(data_dir, monkeypatch):
    return mnist(data_dir, monkeypatch, datasets.FashionMNIST, "fashion-mnist")


def imagenet(data_dir, monkeypatch=None, classes=("n01440764", "n01443537", "n01484850"),
             per_class=2):
    """Folders of JPEG files, some grey or CMYK, and a palette PNG called JPEG, as ImageNet has."""
    folder = Path(data_dir, "imagenet")
    for split in ("train", "val"):
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for index in range(per_class):
                image = Image.fromarray(pixels(60 + 10 * index, 80, 3))
                image = image.convert(("L", "RGB", "CMYK", "P")[index % 4])
                kind = "PNG" if image.mode == "P" else "JPEG"
                image.save(folder / split / name / f"{name}_{index}.JPEG", kind)
    return folder


def archive(folder, path):
    """folder as a .tar.gz, as CIFAR is served."""
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, folder.name)
    return path
