"""--dataset folder:PATH: images of one's own, from their folder to training and export."""
import contextlib
import shutil
import warnings
from argparse import Namespace
from functools import partial
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image
from torchvision import transforms

import export
import models
import search
import tiny_data
from dataset.data import DATASETS, add_folder, DataError, get_dataset, get_transform
from dataset.files import load_image
from dataset.folder import place_of
from dataset.loader import make_loader
from engine import published
from engine.arguments import merge_args, parse_flags, run_name
from engine.errors import UsageError, run_program
from runs import assert_one_line, evaluation, load, run

CLASSES = ("ant", "bee", "cow")


@pytest.fixture(autouse=True)
def rows():
    """Remove the rows of a test's folders from DATASETS."""
    before = dict(DATASETS)
    yield
    DATASETS.clear()
    DATASETS.update(before)


def picture(*shape):
    return Image.fromarray(tiny_data.pixels(*shape))


def write_images(folder):
    """Write six images: large, small, grey, CMYK, with an alpha channel, of a palette."""
    folder.mkdir(parents=True)
    picture(200, 300, 3).save(folder / "large.jpg")
    picture(7, 5, 3).save(folder / "small.JPG")
    picture(40, 50).save(folder / "grey.jpeg")
    picture(40, 50, 3).convert("CMYK").save(folder / "cmyk.jpg")
    picture(40, 50, 4).save(folder / "alpha.png")
    picture(40, 50, 3).convert("P").save(folder / "palette.png", transparency=b"\0\x7f" * 20)


@pytest.fixture
def photos(tmp_path):
    """A folder with a folder of six images for each of three classes."""
    for name in CLASSES:
        write_images(tmp_path / "photos" / name)
    return tmp_path / "photos"


def names_in(folder, split):
    """Return the class and name of each image of a split."""
    name = f"folder:{folder}"
    add_folder(name)
    return {"/".join(Path(path).parts[-2:]) for path, _ in get_dataset(name, split).samples}


# ---- the split

def test_each_class_is_split(photos):
    train, val = names_in(photos, "train"), names_in(photos, "val")
    every = {f"{path.parent.name}/{path.name}" for path in photos.glob("*/*")}
    assert train | val == every and not train & val
    assert {name.split("/")[0] for name in val} == set(CLASSES)
    assert {name.split("/")[0] for name in train} == set(CLASSES)


def test_an_image_stays_in_its_split(photos, tmp_path):
    train = names_in(photos, "train")
    for folder in photos.iterdir():
        for index in range(40):
            shutil.copy(folder / "small.JPG", folder / f"{index}.jpg")
    moved = shutil.move(photos, tmp_path / "elsewhere")
    later, val_later = names_in(moved, "train"), names_in(moved, "val")
    assert train <= later and len(later | val_later) == 3 * 46
    assert not val_later & train and 10 < len(val_later) < 50


def test_a_fifth_is_for_validation():
    places = numpy.array([place_of(f"cat/{index}.jpg") for index in range(4000)])
    counts, _ = numpy.histogram(places, 5, (0, 1))
    assert (abs(counts - 800) < 100).all()


def test_given_splits_are_taken(photos, tmp_path):
    for part in ("train", "val"):
        shutil.copytree(photos, tmp_path / "both" / part)
    shutil.copytree(photos, tmp_path / "both" / "test")
    assert len(names_in(tmp_path / "both", "train")) == 18
    assert len(names_in(tmp_path / "both", "val")) == 18
    shutil.rmtree(tmp_path / "both" / "train")
    assert len(names_in(tmp_path / "both", "val")) == 18  # which is all that an evaluation needs


# ---- folders that are none

def only(folder, *names):
    for path in folder.iterdir():
        if path.name not in names:
            shutil.rmtree(path)


def nest(folder):
    (folder / "ant" / "red").mkdir()
    (folder / "ant" / "grey.jpeg").rename(folder / "ant" / "red" / "grey.jpeg")


def one_image(folder):
    for path in (folder / "ant").iterdir():
        if path.name != "alpha.png":
            path.unlink()


@pytest.mark.parametrize("change, parts", [
    (shutil.rmtree, ["photos is not a folder of images (", "No such file"]),
    (only, ["photos holds no folders"]),
    (lambda folder: only(folder, "ant"), ["the folder ant alone", "give folder:", "photos/ant"]),
    (lambda folder: (folder / "dog").mkdir(),
     ["photos is not a folder of", "without an image: dog"]),
    (lambda folder: shutil.copy(folder / "ant" / "alpha.png", folder),
     ["photos/alpha.png is in no class folder"]),
    (lambda folder: (folder / "ant").rename(folder / "train"),
     ["photos has train/ but no val/", "if train is a class, rename"]),
    (nest, ["photos/ant/red holds images within the class folder", "give folder:", "photos/ant"]),
    (one_image, ["photos/ant holds one image alone"])])
def test_other_folders_are_refused(change, parts, photos):
    change(photos)
    with pytest.raises(DataError) as error:
        names_in(photos, "train")
        names_in(photos, "val")
    for part in parts:
        assert part in str(error.value)


def test_hidden_files_and_folders_are_neither_images_nor_classes(photos):
    for folder in (photos, photos / "ant"):
        (folder / ".thumbnails").mkdir()
        for place in (folder, folder / ".thumbnails"):
            (place / "._alpha.png").write_bytes(b"not an image")
    assert len(names_in(photos, "train") | names_in(photos, "val")) == 18


# ---- images

@pytest.mark.parametrize("train", [True, False])
def test_images_of_any_size_and_mode(photos, train):
    name = f"folder:{photos}"
    add_folder(name, 24)
    dataset = get_dataset(name, "train")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batches = list(make_loader(dataset, name, torch.device("cpu"), 64, train))
    images, labels = batches[0]
    assert images.shape == (len(dataset), 3, 24, 24) and images.isfinite().all()
    assert sorted(labels.tolist()) == sorted(dataset.targets)


def test_an_image_with_16_bits_is_refused(tmp_path):
    path = tmp_path / "deep.png"
    Image.fromarray(numpy.full((4, 4), 4000, numpy.uint16)).save(path)
    with pytest.raises(DataError, match="deep.png is not a readable .*more than 8 bits a pixel"):
        load_image(path)


# ---- arguments

def test_the_size_is_the_row_s():
    args = merge_args(Namespace(dataset="folder:x", model="resnet20q"))
    assert args.image_size == DATASETS["folder:x"].image_size == 224
    args = merge_args(Namespace(dataset="folder:x", image_size=40))
    assert args.image_size == DATASETS["folder:x"].image_size == 40
    train, val = DATASETS["folder:x"].train[0], DATASETS["folder:x"].eval[0]
    assert train.size == (40, 40) and val.size == round(40 * 256 / 224)
    with pytest.raises(UsageError, match="--image-size 40 applies to --dataset folder:PATH"):
        merge_args(Namespace(dataset="cifar10", model="resnet20q", image_size=40))
    assert merge_args(Namespace(), {"dataset": "digits", "image_size": 40}).image_size is None


def test_a_path_of_two_lines_is_named_whole(tmp_path, capsys):
    folder = tmp_path / "a\nb"
    folder.mkdir()
    assert run(["--dataset", f"folder:{folder}", "--image-size", 40, "--results-dir",
                tmp_path / "r"]) == 1
    assert_one_line(capsys, "a\\nb holds no folders: put one folder of images per class")


def test_wrong_names(capsys):
    for name, part in (("folder: ", "'folder: ' names no folder"), ("folders:x", "or folder:PATH")):
        with pytest.raises(SystemExit):
            parse_flags(["--dataset", name])
        assert_one_line(capsys, part)
    with pytest.raises(SystemExit):
        parse_flags(["--dataset", "folder:x"])
    assert_one_line(capsys, "folder:x has 224 x 224", "--image-size 40")


def test_a_home_is_known(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    argv = ["--dataset", "folder:~/photos", "--model", "resnet20q"]
    assert parse_flags(argv).dataset == "folder:/home/me/photos"


@pytest.mark.parametrize("path", ["a/b/photos", "a/photos/", "./photos", "a/../photos"])
def test_a_run_s_name_is_of_the_last_folder(path):
    args = merge_args(Namespace(dataset=f"folder:{path}", model="resnet20q"))
    assert run_name(args) == "folder-photos_resnet20q_1-2-4-8-32_recursive_seed0"


# ---- from training to export

def run_export(*argv):
    try:
        run_program(export.main, partial(export.parse_args, [str(word) for word in argv]))
    except SystemExit as ended:
        return ended.code
    return 0


def test_train_resume_evaluate_export(photos, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick = ["--bit_width_list", "2,8", "--batch-size", 8, "--device", "cpu", "--lr_decay", ""]
    assert run(["--dataset", "folder:photos", "--image-size", 16, "--model", "resnet20q", "--width",
                1, "--epochs", 1, *quick]) == 0
    results = Path("results", "folder-photos_resnet20q_2-8_recursive_seed0")
    images = load(results)["images"]
    assert images["size"] == 16 and images["class_names"] == list(CLASSES)
    assert load(results)["network"]["classes"] == 3

    moved = f"folder:{shutil.move(photos, tmp_path / 'elsewhere')}"
    capsys.readouterr()
    assert run(["--resume", results, "--epochs", 2]) == 1
    assert_one_line(capsys, "photos is not a folder of images", "give --dataset folder:PATH")
    assert run(["--resume", results, "--epochs", 2, "--dataset", moved]) == 0
    assert load(results)["epoch"] == 2 and load(results)["arguments"]["dataset"] == moved

    packed = tmp_path / "net.safetensors"
    shutil.move("elsewhere", "again")
    assert run_export(results, "--format", "packed", "--output", packed) == 0
    assert models.load(packed).images["class_names"] == list(CLASSES)
    again = ["--dataset", "folder:again"]
    assert run_export(results, "--format", "packed", "--output", tmp_path / "other", *again,
                      "--check", 4) == 0
    assert models.load(tmp_path / "other").images["size"] == 16
    assert run(["--evaluate", "--pretrain", packed, *again, "--results-dir", "e"]) == 0
    assert run(["--evaluate", "--pretrain", results / "ckpt" / "model_latest.pth.tar", *again,
                "--bit_width_list", "2,4,8", "--calibrate", 1, "--results-dir", "e4"]) == 0
    assert evaluation(Path("e4")).keys() == {"2", "4", "8"}

    shutil.move("again/bee", "again/wasp")
    capsys.readouterr()
    assert run(["--evaluate", "--pretrain", packed, *again, "--results-dir", "e5"]) == 1
    assert_one_line(capsys, "folder:again does not have the 3 class folders that", "net.safeten",
                    "it lacks bee and has besides wasp")
    refused = [partial(run, ["--resume", results, "--epochs", 3, *again]),
               partial(run_export, results, "--format", "packed", "--output", "n", *again,
                       "--check", 4),
               partial(run_program, search.main, partial(search.parse_args, [
                   str(results), *again, "--budget", "50%", "--images", "2"]))]
    for program in refused:
        with contextlib.suppress(SystemExit):
            assert program() == 1
        assert_one_line(capsys, "folder:again does not have the 3 class folders", "besides wasp")
    assert not Path("n").exists()


@pytest.mark.parametrize("change, what", [
    (lambda image: image.rename(image.with_stem("other")), "list of files"),
    (lambda image: picture(9, 9, 3).save(image), "sizes of files")])
def test_images_that_changed_are_other_data(change, what, photos, tmp_path, capsys):
    argv = ["--dataset", f"folder:{photos}", "--image-size", 16, "--model", "resnet20q", "--width",
            1, "--bit_width_list", 2, "--epochs", 1, "--batch-size", 8, "--lr_decay", "",
            "--device", "cpu", "--results-dir", tmp_path / "r"]
    assert run(argv) == 0
    change(sorted((photos / "bee").iterdir())[1])
    capsys.readouterr()
    assert run(["--resume", tmp_path / "r", "--epochs", 2]) == 1
    assert_one_line(capsys, "was trained on other data: its ", what)


def test_some_of_the_class_folders_are_refused(trained, tmp_path, capsys):
    """Without the names of all, nobody knows which of a network's classes they are."""
    for name in ("val/class 8", "val/class 9"):
        (tmp_path / name).mkdir(parents=True)
        picture(32, 32, 3).save(tmp_path / name / "x.png")
    torch.save({**load(trained), "images": None}, tmp_path / "x.pth.tar")
    argv = ["--evaluate", "--pretrain", tmp_path / "x.pth.tar", "--dataset", f"folder:{tmp_path}"]
    assert run([*argv, "--results-dir", tmp_path / "e"]) == 1
    assert_one_line(capsys, f"has 10 classes and folder:{tmp_path} has 2")


@pytest.mark.parametrize("removed", [
    (), ("images",), ("images", "arguments", "network")])  # the last as published ones
def test_images_are_normalized_as_the_network_was_trained(removed, trained, tmp_path, monkeypatch):
    monkeypatch.setitem(published.DATASET, "resnet4q", "cifar10")
    name = f"folder:{tmp_path / 'photos'}"
    for label in range(10):
        folder = tmp_path / "photos" / "val" / f"class {label}"
        folder.mkdir(parents=True)
        picture(32, 32, 3).save(folder / "x.png")
    path = tmp_path / "x.pth.tar"
    torch.save({field: value for field, value in load(trained).items() if field not in removed},
               path)
    argv = ["--evaluate", "--pretrain", path, "--dataset", name, "--results-dir", tmp_path / "e"]
    assert run(argv) == 0

    val = get_dataset(name, "val", get_transform(name, train=False, normalized=False))
    pixels = torch.stack([image for image, _ in val]) / 255
    cifar10 = DATASETS["cifar10"]
    images = transforms.Normalize(cifar10.mean, cifar10.std)(pixels)
    logits = models.load(path, [32])(images)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(val.dataset.targets))
    assert evaluation(tmp_path / "e")["32"]["loss"] == pytest.approx(loss.item(), rel=1e-5)

    shutil.copytree(tmp_path / "photos" / "val", tmp_path / "photos" / "train")
    output = tmp_path / "net.safetensors"
    assert run_export(path, "--format", "packed", "--output", output, "--dataset", name,
                      "--check", 4) == 0
    assert models.load(output).images["mean"] == list(cifar10.mean)
    assert DATASETS[name].mean == cifar10.mean  # of the images to check on


@pytest.mark.parametrize("task", [
    lambda trained: run(["--resume", trained]),
    lambda trained: run(["--evaluate", "--pretrain", trained]),
    lambda trained: run_export(trained, "--format", "packed", "--output", "x")])
def test_another_normalization_in_a_row_is_refused(task, trained, monkeypatch, capsys):
    monkeypatch.setitem(DATASETS, "cifar10", DATASETS["cifar10"]._replace(std=(0.5, 0.5, 0.5)))
    assert task(trained) == 1
    assert_one_line(capsys, "was trained on cifar10, mean 0.4914, ", " and std 0.2471, ", "the row "
                    "of cifar10 in dataset/data.py says mean 0.49", "std 0.5, 0.5, 0.5: give the")


def test_another_size_in_a_row_is_refused(trained, monkeypatch, capsys):
    monkeypatch.setitem(DATASETS, "cifar10", DATASETS["cifar10"]._replace(image_size=40))
    assert run(["--evaluate", "--pretrain", trained]) == 1
    assert_one_line(capsys, "was trained on images of 32 pixels, and the row of cifar10 in "
                    "dataset/data.py says 40")


def test_a_class_that_val_lacks(photos, tmp_path, capsys):
    for part in ("train", "val"):
        shutil.copytree(photos, tmp_path / "both" / part)
    shutil.rmtree(tmp_path / "both" / "val" / "cow")
    assert run(["--dataset", f"folder:{tmp_path / 'both'}", "--image-size", 16, "--model",
                "resnet20q", "--device", "cpu", "--results-dir", tmp_path / "r"]) == 1
    assert_one_line(capsys, "both/val must hold the same class folders", "cow for one")
