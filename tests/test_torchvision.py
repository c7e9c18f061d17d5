"""Torchvision's networks through train.py: train, resume, evaluate, --pretrain, bad input."""
import functools

import pytest
import torch
import torchvision
from float_networks import SMALL
from torch.testing import assert_close

import runs
from runs import assert_one_line, assert_same


@pytest.mark.parametrize("argv, told", [
    (["--model", "torchvision:resnt18"], ("'resnt18' is no", "resnet18")),
    (["--model", "torchvision:fcn_resnet50"], ("is not a classification network",)),
    (["--model", "torchvision:resnet18", "--width", 2], ("--width 2 applies to",)),
    (["--model", "torchvision:resnet18", "--all-conv"], ("--all-conv applies to",)),
    (["--model", "torchvision:squeezenet1_1"], ("torchvision:squeezenet1_1: the network has no",)),
    (["--model", "torchvision:vit_b_32"], ("has no BatchNorm2d",)),
    (["--model", "torchvision:googlenet"], ("several outputs",))])
def test_bad_models(argv, told, tiny_cifar10, tmp_path, capsys):
    with torch.device("meta"):
        code = runs.run(["--dataset", "cifar10", "--data-dir", tiny_cifar10, "--device", "cpu",
                         "--results-dir", tmp_path / "r", *argv])
    assert code == 2
    assert_one_line(capsys, *told)


@pytest.fixture(scope="module")
def small():
    return functools.partial(torchvision.models.get_model, "small_shufflenet", weights=None)


def tiny(data_dir, folder, *more):
    return ["--dataset", "cifar10", "--data-dir", data_dir, "--model", SMALL, "--batch-size", 10,
            "--bit_width_list", "2,32", "--epochs", 2, "--device", "cpu", "--results-dir", folder,
            *more]


def test_train_resume_evaluate(tiny_cifar10, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert runs.run(tiny(tiny_cifar10, whole)) == 0
    table = (whole / "layers.md").read_text()
    assert table in capsys.readouterr().out and "| stage2.0.branch1.0" in table
    assert runs.run([*tiny(tiny_cifar10, parts), "--epochs", 1]) == 0
    assert runs.run(["--resume", parts, "--epochs", 2]) == 0
    assert_same(runs.load(parts)["state_dict"], runs.load(whole)["state_dict"])
    latest = whole / "ckpt" / "model_latest.pth.tar"
    assert runs.run(["--evaluate", "--pretrain", latest, "--bit_width_list", "2,4,32",
                     "--calibrate", 1, "--data-dir", tiny_cifar10, "--device", "cpu",
                     "--results-dir", tmp_path / "e"]) == 0
    assert runs.evaluation(tmp_path / "e").keys() == {"2", "4", "32"}


def test_pretrain(tiny_cifar10, tmp_path, small, capsys):
    network = small(num_classes=7)
    torch.save(network.state_dict(), tmp_path / "float.pth")
    zero = ["--pretrain", tmp_path / "float.pth", "--epochs", 1, "--lr", 1e-30]
    assert runs.run(tiny(tiny_cifar10, tmp_path / "r", *zero)) == 0
    told = capsys.readouterr().out
    assert "a float network" in told
    assert "new, for 10 classes, as its own has another number (fc.weight, fc.bias)" in told
    weights = runs.load(tmp_path / "r")["state_dict"]
    assert_close(weights["network.stage2.0.branch1.0.weight"],
                 network.stage2[0].branch1[0].weight.detach())
    assert weights["network.fc.weight"].shape == (10, 128)


def test_a_wrong_state_dict(tiny_cifar10, tmp_path, small, capsys):
    good = small(num_classes=10).state_dict()
    conv = "stage2.0.branch1.0.weight"
    for name, content, told in (
            ("missing", {key: value for key, value in good.items() if key != conv}, "1 missing"),
            ("left over", {**good, "stage9.weight": good[conv]}, "1 unexpected"),
            ("another shape", {**good, conv: good[conv][:1]}, "1 of another shape")):
        torch.save(content, tmp_path / "float.pth")
        folder = tmp_path / name
        assert runs.run(tiny(tiny_cifar10, folder, "--pretrain", tmp_path / "float.pth")) == 1
        assert_one_line(capsys, "does not fit", told, "stage")


def test_one_image_of_one_pixel(tiny_cifar10, tmp_path, capsys):
    argv = tiny(tiny_cifar10, tmp_path / "r", "--batch-size", 19)
    assert runs.run(argv) == 1
    assert_one_line(capsys, "one image of one pixel", "--batch-size")
