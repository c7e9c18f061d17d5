"""Where this differs, or must not, from what users of the published code know."""
import json

import pytest
import torch
from runs import assert_one_line, load, run

import tiny_data
from dataset.data import DataError, get_dataset
from models import MODELS
from models.checkpoint import load_weights
from models.fields import FileError


def test_what_is_left_to_the_defaults_is_told(training):
    told, = [line for line in training[1].splitlines() if line.startswith("not set")]
    assert told == "not set, so by default: --optimizer adam  --lr 0.001  --weight-decay 0.0"


def test_a_published_run_resumed_by_a_recipe(trained, tmp_path, tiny_cifar10, capsys):
    """The recipe says what the file does not; config.json has it, and later runs go by that.

    Of a flag that is given twice the last one wins, as the user's come after the recipe's.
    """
    parameters = MODELS["resnet4q"]([2, 32], width=1).parameters()
    sgd = torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.5)
    names = ("epoch", "model", "state_dict", "best_prec1")
    torch.save({**{name: load(trained)[name] for name in names}, "optimizer": sgd.state_dict()},
               tmp_path / "x.pth.tar")
    argv = ["--resume", tmp_path / "x.pth.tar", "--width", 1, "--data-dir", tiny_cifar10,
            "--results-dir", tmp_path / "r", "--epochs", 4]
    recipe = ["--train_split", "train", "--loss", "hard", "--batch-size", 8, "--lr",
              0.01, "--lr_decay", "2", "--epochs", 200, "--optimizer", "sgd"]
    assert run([*recipe, "--weight-decay", 0.1, *argv]) == 1
    assert_one_line(capsys, "another optimizer's state (group 0: weight_decay was 0.5 and is now "
                            "0.1): check --optimizer, --weight-decay")
    assert run([*recipe, "--weight-decay", 0.5, *argv]) == 0
    arguments = json.loads((tmp_path / "r" / "config.json").read_text())["arguments"]
    names = ("epochs", "batch_size", "optimizer", "lr", "lr_decay", "weight_decay", "dataset")
    assert [arguments[name] for name in names] == [4, 8, "sgd", 0.01, [2], 0.5, "cifar10"]
    assert run(["--resume", tmp_path / "r", "--epochs", 5]) == 0
    assert load(tmp_path / "r")["optimizer"]["param_groups"][0]["weight_decay"] == 0.5


def test_a_cifar_folder_without_its_metadata_is_told_as_that(tmp_path, monkeypatch, capsys):
    (tiny_data.cifar10(tmp_path, monkeypatch) / "batches.meta").unlink()
    with pytest.raises(DataError, match="CIFAR10 .*altered.*metadata.* remove what is damaged"):
        get_dataset("cifar10", "train", data_dir=tmp_path)
    assert "missing" not in capsys.readouterr().out


def test_an_empty_class_folder_is_named_with_a_way_on(tmp_path):
    (tiny_data.imagenet(tmp_path) / "train" / "n99999999").mkdir()
    with pytest.raises(DataError, match="n99999999.*put one folder of images per class"):
        get_dataset("imagenet", "train", data_dir=tmp_path)


def test_a_checkpoint_of_other_classes_says_what_to_do():
    thousand, three = (MODELS["resnet20q"]([2], classes, width=1) for classes in (1000, 3))
    with pytest.raises(FileError, match="fc.bias, fc.weight.*by its classes, --dataset"):
        load_weights(three, thousand.state_dict(), "x")
