"""models.load: a network from any file, with the logits of the one built by hand; and refusals."""
import random
import re
from functools import partial

import numpy
import pytest
import torch
import torchvision
from float_networks import SMALL, draw
from runs import ROOT, assert_one_line, assert_same, evaluation, load, run, tiny
from torch import nn
from torch.nn.utils import prune

import deploy
import export
import models
import reference
import train
from dataset.data import DATASETS
from engine.errors import UserError
from engine.resume import Checkpoint
from exported import network as exported_network
from models import DEFAULT_WIDTH, MODELS, packed, set_bit_width
from models.checkpoint import load_weights, save_checkpoint
from models.fields import FileError
from models.float_layers import BatchNorm2d
from models.losses import any_precision_backward
from models.quan_ops import (ActivationQ, Conv2dQ, DoReFaActivation, DoReFaWeight,
                             SwitchableBatchNorm2d)
from models.svhn_quan import SVHNNet
from quantized import PadOne

SIZES = {"resnet20q": 32, "resnet50q": 32, "svhnq": 40}


class Thirds(DoReFaWeight):
    def full_precision(self, v, e):
        return e * v / 3


def images_of(size):
    return torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def assert_logits_equal(found, by_hand, bit_widths, size=32):
    """Assert that logits agree to the last bit, that differ from one bit-width to another."""
    assert not found.training
    by_hand.eval()
    images = images_of(size)
    logits = []
    for width in bit_widths:
        for model in (found, by_hand):
            set_bit_width(model, width)
        logits.append(by_hand(images))
        assert logits[-1].isfinite().all() and torch.equal(found(images), logits[-1]), width
    assert len(logits) == 1 or not torch.equal(logits[0], logits[-1])


def assert_refused(path, *parts):
    with pytest.raises(FileError) as error:
        models.load(path)
    assert isinstance(error.value, ValueError) and "\n" not in str(error.value)
    for part in (str(path), *parts):
        assert part in str(error.value)


# ---- files of this project

@pytest.mark.parametrize("name, place", [
    ("model_best", ""), ("model_best", "ckpt/model_best.pth.tar"),
    ("model_latest", "ckpt/model_latest.pth.tar")])
def test_a_run(name, place, two_checkpoints):
    content = load(two_checkpoints, name)
    by_hand = MODELS["resnet4q"]([2, 32], 10, 1)
    by_hand.load_state_dict(content["state_dict"])
    found = models.load(two_checkpoints / place)
    with torch.no_grad():  # it comes at its highest bit-width
        set_bit_width(by_hand.eval(), 32)
        assert torch.equal(found(images_of(32)), by_hand(images_of(32)))
    assert_logits_equal(found, by_hand, [2, 32])
    row = DATASETS["cifar10"]
    assert found.images == content["images"] == {
        "dataset": "cifar10", "size": 32, "transforms": "", "mean": list(row.mean),
        "std": list(row.std),
        "class_names": [f"class {index}" for index in range(10)]}
    assert found.spec == {
        "model": "resnet4q", "width": 1, "classes": 10, "all_conv": False, "quantizer": "dorefa",
        "bit_widths": [2, 32]}
    assert content["network"] == {**found.spec, "own_bits": {}}


def test_a_bit_width_that_was_not_trained_is_known_as_such(trained):
    assert models.load(trained).calibrated == []
    assert models.load(trained, [2, 3, 32]).calibrated == [3]


def test_a_network_of_one_s_own_loop_is_saved_for_all_programs(tmp_path, tiny_cifar10, capsys):
    model = models.build("resnet4q", [2, 32], 10, 1)
    models.set_quantizers(model, "lsq", [2, 32])
    models.initialize_quantizers(model, images_of(32), model.spec["bit_widths"])
    models.calibrate(model, 2, [images_of(32)])
    models.add_assignment(model, models.Assignment("mix", 2, {"layers.0.conv0": 32}))
    path = tmp_path / "new" / "own.pth.tar"
    models.save(model, path)
    loaded = models.load(path)
    assert loaded.spec["quantizer"] == "lsq"
    assert_logits_equal(loaded, model.eval(), [2, 32, "mix"])
    assert run(["--evaluate", "--pretrain", path, "--dataset", "cifar10", "--data-dir",
                tiny_cifar10, "--results-dir", tmp_path / "r"]) == 0
    assert evaluation(tmp_path / "r").keys() == {"2", "32", "mix"}
    assert run(["--resume", path]) == 1
    assert "holds no epoch to go on with" in capsys.readouterr().err


@pytest.mark.parametrize("bits, makes_anew", [(8, True), (32, True), (32, False)])
def test_lsq_with_bits_of_a_layer_is_loaded_again(bits, makes_anew, tmp_path):
    model = models.build("resnet4q", [4, 32], 10, 1, quantizer="lsq")
    model.layers[0].conv1.own_bits = bits
    if makes_anew:
        models.set_quantizers(model, "lsq", [4, 32])
    models.save(model, tmp_path / "x")
    loaded = models.load(tmp_path / "x")
    assert_logits_equal(loaded, model.eval(), [4, 32])
    assert loaded.layers[0].conv1.bits == bits


def test_networks_that_could_not_be_loaded_again_are_not_saved(tmp_path):
    path = tmp_path / "x"
    model = models.build("resnet4q", [4], 10, 1)
    with pytest.raises(ValueError, match="missing"):
        models.save(torch.compile(model, backend="eager"), path)
    handle = model.fc.register_forward_hook(lambda layer, inputs, output: 2 * output)
    with pytest.raises(ValueError, match="^layer fc has a hook or a forward of its own"):
        models.save(model, path)
    handle.remove()
    with torch.no_grad():
        model.fc.bias[0] = float("nan")
    with pytest.raises(ValueError, match="fc.bias has 1 values that are not finite"):
        models.save(model, path)
    assert not path.exists()


@pytest.mark.parametrize("changed, value, parts", [
    ("layers.3.quantizer", Thirds(), ("Thirds", "DoReFaWeight")),
    ("layers.6", PadOne(8, 8, 3, padding=1, bias=False), ("PadOne", "Conv2dQ")),
    ("layers.12", ActivationQ(limit=0.5), ("limit=0.5", "ActivationQ(rounding=True)")),
    ("layers.18", nn.Hardswish(), ("Hardswish", "ActivationQ")),
    ("layers.8", nn.AvgPool2d(2), ("AvgPool2d", "MaxPool2d")),
    ("layers.8.part", nn.Identity(), ("Identity", "and none in the network")),
    ("layers.4.bn_dict.4", BatchNorm2d(8, eps=0.01), ("eps=0.01", "eps=1e-05"))])
def test_a_layer_that_was_replaced_is_named(changed, value, parts, tmp_path, monkeypatch, capsys):
    model = models.build("svhnq", [4], 10, 1)
    parent, _, attribute = changed.rpartition(".")
    setattr(model.get_submodule(parent), attribute, value)
    with pytest.raises(ValueError) as error:
        models.save(model, tmp_path / "x")
    assert all(part in str(error.value) for part in (f"layer {changed} is ", *parts))
    monkeypatch.setattr(train, "make_model", lambda *args: model)
    argv = ["--dataset", "digits", "--model", "svhnq", "--width", 1, "--bit_width_list", 4,
            "--epochs", 1, "--train-fraction", 0.02, "--device", "cpu"]
    assert run([*argv, "--results-dir", tmp_path / "r"]) == 1
    assert_one_line(capsys, f"layer {changed} is ")
    assert not any(tmp_path.iterdir())


class Sharper(DoReFaWeight):
    def __init__(self):
        super().__init__()
        self.alpha = [1.0]

    def prepare(self, w):
        return super().prepare(self.alpha[0] * w)


def test_an_attribute_that_was_set_after_the_network_was_built_is_named(
        tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(models.QUANTIZERS, "sharper", lambda layer, bit_widths: (
        Sharper() if hasattr(layer, "weight") else DoReFaActivation()))
    model = models.build("svhnq", [1, 4], 10, 1, quantizer="sharper")
    set_bit_width(model, 4)
    models.save(model, tmp_path / "right")
    assert model.layers[3].bits == 4  # it stays at its bit-width
    model.layers[3].quantizer.alpha[0] = 3.0
    message = "layers.3.quantizer.alpha[0] of the network is 3.0, and 1.0 in the network that is"
    with pytest.raises(ValueError, match=re.escape(message)):
        models.save(model, tmp_path / "x")
    monkeypatch.setattr(train, "make_model", lambda *args: model)
    argv = ["--dataset", "digits", "--model", "svhnq", "--width", 1, "--bit_width_list", "1,4",
            "--quantizer", "sharper", "--epochs", 1, "--train-fraction", 0.02, "--device", "cpu"]
    assert run([*argv, "--results-dir", tmp_path / "r"]) == 1
    assert_one_line(capsys, message)
    assert [path.name for path in tmp_path.iterdir()] == ["right"]


class ByPlace(nn.Module):
    """Keeps a scale per bit-width by its place among them, in a list or a tensor."""

    def __init__(self, kind, bit_widths, num_classes=10, width=1, all_conv=False):
        super().__init__()
        self.places = [str(bits) for bits in models.highest_first(bit_widths)]
        self.conv = Conv2dQ(3, 4, 3)
        self.bn = SwitchableBatchNorm2d(4, bit_widths)
        self.scales = kind(torch.ones(len(self.places), 1))
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x):
        scale = self.scales[self.places.index(self.conv.quantizer.width)]
        return self.fc(scale * self.bn(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize("kind, key", [
    (lambda scales: nn.ParameterList(list(scales)), "scales.3"), (nn.Parameter, "scales")])
def test_state_by_place_is_not_given_to_other_bit_widths(
        kind, key, tmp_path, tiny_cifar10, monkeypatch, capsys):
    monkeypatch.setitem(MODELS, "byplace", partial(ByPlace, kind))
    path = tmp_path / "x.pth.tar"
    models.save(models.build("byplace", [1, 4, 32], 10), path)
    models.load(path)
    with pytest.raises(FileError, match=f"keeps {key} by its place among them: keep it by a bit"):
        models.load(path, [4, 8, 32])
    for others in ([1, 4], [1, 2, 4, 32]):
        with pytest.raises(FileError, match="scales"):
            models.load(path, others)
    assert run(["--dataset", "cifar10", "--data-dir", tiny_cifar10, "--model", "byplace",
                "--pretrain", path, "--bit_width_list", "4,8,32", "--epochs", 1, "--device", "cpu",
                "--results-dir", tmp_path / "r"]) == 1
    assert_one_line(capsys, f"keeps {key} by its place among them")


def test_attributes_that_no_logit_depends_on_may_differ(tmp_path):
    """Such as counters, and a generator that training drew from."""
    class Counting(DoReFaWeight):
        def __init__(self):
            super().__init__()
            self.steps = 0
            self.generator = torch.Generator().manual_seed(0)

        def prepare(self, w):
            self.steps += self.training
            torch.rand(1, generator=self.generator)
            return super().prepare(w)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(models.QUANTIZERS, "counting", lambda layer, bit_widths: (
            Counting() if hasattr(layer, "weight") else DoReFaActivation()))
        model = models.build("svhnq", [1, 4], 10, 1, quantizer="counting").train()
        any_precision_backward(model, torch.randn(2, 3, 40, 40), torch.arange(2), [1, 4])
        assert model.layers[3].quantizer.steps > 0
        draw(model)
        models.save(model, tmp_path / "x")
        assert_logits_equal(models.load(tmp_path / "x"), model.eval(), [1, 4], 40)


def test_a_hook_is_noted(tmp_path, tiny_cifar10, monkeypatch, capsys):
    def hooked(*args):
        model = make_model(*args)
        model.fc.register_forward_hook(lambda layer, inputs, output: None)
        return model

    make_model = train.make_model
    monkeypatch.setattr(train, "make_model", hooked)
    assert run(tiny(tiny_cifar10, tmp_path / "r", "--epochs", 1)) == 0
    assert "note: layer fc has a hook or a forward of its own: no" in capsys.readouterr().out


def test_a_hook_that_is_built_again_is_none(tmp_path, monkeypatch):
    def hooked(*args):
        model = svhnq(*args)
        prune.random_unstructured(model.layers[6], "weight", 0.5)
        return model

    svhnq = MODELS["svhnq"]
    monkeypatch.setitem(MODELS, "svhnq", hooked)
    model = models.build("svhnq", [4], 10, 1)
    models.save(model, tmp_path / "x")
    mask = models.load(tmp_path / "x").layers[6].weight_mask
    assert torch.equal(mask, model.layers[6].weight_mask) and 0 < mask.mean() < 1


def test_what_training_alone_uses_may_differ(tmp_path):
    model = models.build("svhnq", [4], 10, 1)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.5
        elif isinstance(layer, nn.Dropout):
            layer.p = 0.0
    random_state = torch.get_rng_state()
    models.save(nn.SyncBatchNorm.convert_sync_batchnorm(model), tmp_path / "x")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_logits_equal(models.load(tmp_path / "x"), model, [4], 40)


@pytest.mark.parametrize("images, problem", [
    ({"mean": torch.zeros(3)}, r"images' mean is tensor\(\[0., 0., 0.\]\), not three numbers"),
    ({"mean": numpy.zeros(3)}, r"images' mean is array\(\[0., 0., 0.\]\), not three numbers"),
    ({"size": (24, 40)}, r"images' size is \(24, 40\), not a number of pixels")])
def test_images_that_could_not_be_read_again(images, problem, tmp_path):
    model = models.build("resnet4q", [4], 10, 1).eval()
    model.images = images
    with pytest.raises(ValueError, match=f"x: its {problem}$"):
        models.save(model, tmp_path / "x")
    with pytest.raises(ValueError, match=f"x: its {problem}$"):
        deploy.export(model, tmp_path / "x", format="packed",
                      about_images={"size": 32, **images})
    assert not any(tmp_path.iterdir())


def test_bits_of_layers_are_not_lost_in_another_network(tmp_path, tiny_cifar10, capsys):
    model = models.build("resnet4q", [2, 32], 10, 1)
    model.layers[0].conv1.own_bits = 8
    models.save(model, tmp_path / "x")
    argv = tiny(tiny_cifar10, tmp_path / "r", "--pretrain", tmp_path / "x", "--epochs", 1)
    assert run(argv) == 1
    assert_one_line(capsys, "layer 'layers.0.conv1' has 8 bits of its own there, and no bits in")


def test_a_network_that_does_not_say_its_images(tmp_path, capsys):
    models.save(models.build("svhnq", [2], 10, 1), tmp_path / "x")
    assert run(["--evaluate", "--pretrain", tmp_path / "x", "--results-dir", tmp_path / "e"]) == 2
    assert_one_line(capsys, "does not say of what images its network is: give --dataset")
    checkpoint = Checkpoint(tmp_path / "x")
    with pytest.raises(UserError, match="give --dataset"):
        export.image_description(checkpoint)
    assert export.image_description(checkpoint, "digits")["dataset"] == "digits"


def test_networks_that_no_file_could_build_again(tmp_path):
    with pytest.raises(ValueError, match="has no spec"):
        models.save(MODELS["svhnq"]([2]), tmp_path / "x")
    with pytest.raises(ValueError, match="a packed network has no float weights"):
        models.save(models.load(ROOT / "examples" / "digits.safetensors"), tmp_path / "x")
    assert not any(tmp_path.iterdir())


def test_class_names_of_another_number_are_refused(trained, tmp_path):
    content = load(trained)
    content["images"]["class_names"] = ["a", "b"]
    torch.save(content, tmp_path / "x.pth.tar")
    with pytest.raises(models.FileError, match="names 2 classes, and its network has 10"):
        models.load(tmp_path / "x.pth.tar")


def test_a_network_that_asks_for_its_version_is_read():
    """torchvision's MNASNet, whose state dict says it beside the entries."""
    model = models.build("torchvision:mnasnet0_5", [4], 5)
    state_dict = {key: value + 1 for key, value in model.state_dict().items()}
    load_weights(model, state_dict, "x")
    assert_same(model.state_dict(), state_dict)


def test_a_run_of_another_variant(tmp_path, tiny_cifar10):
    """Nothing in its weights says that it is ALL CONV."""
    argv = tiny(tiny_cifar10, tmp_path / "r", "--all-conv", "--quantizer", "lsq", "--epochs", 1)
    assert run(argv) == 0
    by_hand = MODELS["resnet4q"]([2, 32], 10, 1, True)
    models.set_quantizers(by_hand, "lsq", [2, 32])
    by_hand.load_state_dict(load(tmp_path / "r", "model_best")["state_dict"])
    assert_logits_equal(models.load(tmp_path / "r"), by_hand, [2, 32])


def test_a_bit_width_that_is_asked_for(trained):
    by_hand = MODELS["resnet4q"]([3, 32], 10, 1)
    weights = load(trained, "model_best")["state_dict"]
    by_hand.load_state_dict({key.replace("bn_dict.2.", "bn_dict.3."): value
                             for key, value in weights.items()})
    assert_logits_equal(models.load(trained, [3, 32]), by_hand, [3, 32])


def test_what_only_training_gives_a_quantizer_is_said():
    model = models.build("svhnq", [4, 32], 10, 1, quantizer="lsq")
    whole = model.state_dict()
    for missing, is_said in (("log_range_dict", True), ("bn_dict", False)):
        state_dict = {key: value for key, value in whole.items() if missing not in key}
        with pytest.raises(FileError, match=f"missing .*{missing}.* check --model") as caught:
            load_weights(model, state_dict, "x")
        assert ("; a quantizer learns its parameters at" in str(caught.value)) == is_said


@pytest.mark.parametrize("name", ["step_dict", "log_step_dict"])
def test_parameters_of_an_older_lsq_are_said(name):
    model = models.build("svhnq", [4, 32], 10, 1, quantizer="lsq")
    older = {key.replace(".log_range_dict.", f".{name}."): value
             for key, value in model.state_dict().items()}
    with pytest.raises(FileError, match="it is of an older lsq"):
        load_weights(model, older, "x")


@pytest.mark.parametrize("older", [("network", "images", "best")])
def test_an_older_run_s_checkpoint(older, trained, tmp_path):
    content = load(trained, "model_best")
    for name in older:
        del content[name]
    path = tmp_path / "x.pth.tar"
    by_hand = MODELS["resnet4q"]([2, 32], 10, 1)
    by_hand.load_state_dict(content["state_dict"])
    torch.save(content, path)
    assert_logits_equal(models.load(path), by_hand, [2, 32])
    content["arguments"].update(all_conv=True)
    torch.save(content, path)
    by_hand = MODELS["resnet4q"]([2, 32], 10, 1, True)
    by_hand.load_state_dict(content["state_dict"])
    assert_logits_equal(models.load(path), by_hand, [2, 32])


def test_a_packed_file(tmp_path):
    model, _ = exported_network("svhnq", [1, 4])
    images = {"dataset": "digits", "size": 40, "transforms": "Resize(size=40)", "mean": [0.5] * 3,
              "std": [0.25] * 3, "class_names": list("abcdefghij")}
    packed.save(model, [1, 4], tmp_path / "net", {"images": images, "network": {
        "model": "svhnq", "width": 1, "all_conv": False, "classes": 10}})
    found = models.load(tmp_path / "net")
    assert_logits_equal(found, model, [1, 4], 40)
    assert found.images == images


# ---- files of others

@pytest.mark.parametrize("name, width, classes", [
    ("resnet20q", 1, 7), ("resnet20q", 5, 10), ("resnet50q", 1, 1000),
    ("svhnq", 2, 10), ("svhnq", 3, 4)])
def test_a_published_checkpoint(name, width, classes, tmp_path):
    """DataParallel's keys and no arguments: width and classes are found from the shapes."""
    with torch.device("meta"):
        model = MODELS[name]([4, 32], classes, width)
    draw(model)
    torch.save({
        "epoch": 200, "model": name, "best_prec1": torch.tensor(93.5), "optimizer": {},
        "state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}},
        tmp_path / "x.pth.tar")
    found = models.load(tmp_path / "x.pth.tar")
    assert (found.spec["width"], found.spec["classes"]) == (width, classes)
    assert_logits_equal(found, model, [4, 32], SIZES[name])
    assert found.images is None


def test_a_published_checkpoint_with_a_key_twice(tmp_path):
    state = MODELS["svhnq"]([4], 10, 1).state_dict()
    state["module.fc.bias"] = state["fc.bias"]
    torch.save({"model": "svhnq", "state_dict": state}, tmp_path / "x.pth.tar")
    assert_refused(tmp_path / "x.pth.tar", "has a key twice, with and without module.")


def test_a_network_with_a_part_that_is_called_module(tmp_path, tiny_cifar10, monkeypatch):
    class Wrapped(nn.Module):
        def __init__(self, *args):
            super().__init__()
            self.module = resnet(*args)

        def forward(self, x):
            return self.module(x)

    resnet = MODELS["resnet4q"]
    monkeypatch.setitem(MODELS, "wrapped", Wrapped)
    monkeypatch.setitem(DEFAULT_WIDTH, "wrapped", 1)
    argv = tiny(tiny_cifar10, tmp_path / "r", "--model", "wrapped", "--epochs", 1)
    assert run(argv) == 0
    assert models.load(tmp_path / "r").module.fc.bias.shape == (10,)
    assert run(["--resume", tmp_path / "r", "--epochs", 2]) == 0


def with_heads(model):
    model.head_dict = nn.ModuleDict({"0": nn.Linear(2, 3)})


def without_switches(model):
    for name, layer in list(model.named_modules()):
        if isinstance(layer, SwitchableBatchNorm2d):
            model.set_submodule(name, nn.Identity())


@pytest.mark.parametrize("change, message", [
    (with_heads, "has head_dict.0.weight: the keys of a `head_dict` are taken for bit-widths"),
    (without_switches, "has no SwitchableBatchNorm2d")])
def test_a_network_whose_checkpoints_could_not_be_read(change, message, tmp_path, tiny_cifar10,
                                                       monkeypatch, capsys):
    def changed(*args):
        model = resnet(*args)
        change(model)
        return model

    resnet = MODELS["resnet4q"]
    monkeypatch.setitem(MODELS, "changed", changed)
    monkeypatch.setitem(DEFAULT_WIDTH, "changed", 1)
    assert run(tiny(tiny_cifar10, tmp_path / "r", "--model", "changed")) == 2
    assert_one_line(capsys, f"--model changed {message}")


def test_a_converted_network_of_torchvision(tmp_path, tiny_cifar10):
    argv = ["--dataset", "cifar10", "--data-dir", tiny_cifar10, "--model", SMALL, "--batch-size",
            10, "--bit_width_list", "2,32", "--epochs", 1, "--device", "cpu", "--results-dir",
            tmp_path / "r"]
    assert run(argv) == 0
    content = load(tmp_path / "r", "model_best")
    name = SMALL.removeprefix("torchvision:")
    by_hand = models.convert(torchvision.models.get_model(name, weights=None, num_classes=10),
                             [2, 32])
    by_hand.load_state_dict(content["state_dict"])
    assert_logits_equal(models.load(tmp_path / "r"), by_hand, [2, 32])
    for field in ("network", "arguments"):  # an older one's classes are of its classifier's shape
        content.pop(field)
    torch.save(content, tmp_path / "older.pth.tar")
    assert_logits_equal(models.load(tmp_path / "older.pth.tar"), by_hand, [2, 32])


# ---- what is refused

def test_files_that_are_refused(trained, tmp_path):
    assert_refused(tmp_path / "none", "does not exist: give a file or a results folder")
    assert_refused(tmp_path, "holds no checkpoint", "model_best.pth.tar")
    good = load(trained, "model_best")
    path = tmp_path / "x.pth.tar"
    whole = (trained / "ckpt" / "model_best.pth.tar").read_bytes()
    path.write_bytes(whole[:-1000])
    assert_refused(path, "is not a checkpoint that can be read safely")
    float_weights = {key: value for key, value in good["state_dict"].items()
                     if "bn_dict" not in key}
    network = good["network"]
    for changes, message in (
            ({"state_dict": float_weights}, "it has BatchNorms for no bit-width"),
            ({"state_dict": {"fc.weight": good["state_dict"]["fc.weight"]}, "network": None},
             "it has BatchNorms for no bit-width"),
            ({"state_dict": {"bn.bn_dict.2.weight": torch.ones(4)}, "network": None},
             "has no classifier"),
            ({"state_dict": {"bn.bn_dict.2.weight": 1.0}, "network": None},
             "bn.bn_dict.2.weight of its state_dict is 1.0, not a dense tensor"),
            ({"network": [1]}, "its network is [1], not a dict with names as keys"),
            ({"network": {**network, "width": "x"}}, "its network's width is 'x'"),
            ({"network": {**network, "width": True}}, "its network's width is True"),
            ({"network": {**network, "classes": 0}}, "its network's num_classes is 0"),
            ({"network": {**network, "all_conv": 1}}, "its network's all_conv is 1"),
            ({"network": {**network, "quantizer": 3}}, "its network's quantizer is 3, not a name"),
            ({"network": {**network, "quantizer": "pact"}},
             "its network's quantizer is 'pact', which is not one of dorefa, lsq: add it to"),
            ({"network": {**network, "model": ["svhnq"]}}, "is of model ['svhnq']"),
            ({"network": {**network, "model": "torchvision:resnt18"}}, "'resnt18' is no"),
            ({"network": None, "model": None, "arguments": None}, "is of model None")):
        torch.save({**good, **changes}, path)
        assert_refused(path, message)


@pytest.mark.parametrize("argument, value, flag", [
    ("print_freq", 0, "--print-freq"), ("lr", [0.1], "--lr"), ("lr", float("nan"), "--lr"),
    ("loss", 3, "--loss"), ("dataset", ["cifar10"], "--dataset"),
    ("batch_size", 8.0, "--batch-size"), ("sync_bn", 1, "--sync-bn"), ("seed", True, "--seed"),
    ("lr_decay", [3, 2], "--lr-decay"), ("best_by", "luck", "--best-by"),
    ("bit_width_list", "2,32", "--bit-width-list")])
def test_a_saved_argument_of_another_kind_is_one_line(argument, value, flag, trained, tmp_path,
                                                      capsys):
    content = load(trained)
    content["arguments"][argument] = value
    path = tmp_path / "x.pth.tar"
    torch.save(content, path)
    for argv in (["--resume", path, "--epochs", 9], ["--evaluate", "--pretrain", path]):
        assert run([*argv, "--results-dir", tmp_path / "r"]) == 1
        assert_one_line(capsys, f"{path}: its argument {argument} is {value!r}, which {flag} does")
    assert not (tmp_path / "r").exists()


def test_a_loss_and_a_data_set_of_other_code(trained, tiny_cifar10, tmp_path, capsys):
    """An evaluation needs no loss, nor a data set where another one is given; training does."""
    content = load(trained)
    path = tmp_path / "x.pth.tar"
    resumed = ["--resume", path, "--epochs", 9, "--results-dir", tmp_path / "r"]
    evaluated = ["--evaluate", "--pretrain", path, "--data-dir", tiny_cifar10, "--device", "cpu",
                 "--results-dir", tmp_path / "e"]
    torch.save({**content, "arguments": {**content["arguments"], "loss": "mixed"}}, path)
    assert run(resumed) == 2
    assert_one_line(capsys, "--loss mixed does not exist", "or add it to models/losses.py")
    assert run(evaluated) == 0
    for name in ("arguments", "images"):
        content[name] = {**content[name], "dataset": "usps"}
    torch.save(content, path)
    capsys.readouterr()
    for argv in (resumed, evaluated):
        assert run(argv) == 2
        assert_one_line(capsys, "--dataset usps does not exist", "add its row to dataset/data.py")
    assert run([*evaluated[:-1], tmp_path / "f", "--dataset", "cifar10"]) == 0


@pytest.mark.parametrize("epoch", [-3, "3", 1.5])
def test_an_epoch_that_is_none_is_one_line(epoch, trained, tmp_path, capsys):
    path = tmp_path / "x.pth.tar"
    torch.save({**load(trained), "epoch": epoch}, path)
    for argv in (["--resume", path, "--epochs", 9], ["--evaluate", "--pretrain", path]):
        assert run([*argv, "--results-dir", tmp_path / "r"]) == 1
        assert_one_line(capsys, f"{path}: its epoch is {epoch!r}")


@pytest.mark.parametrize("changes, told", [
    ({"calibrated": 5}, "its list of calibrated bit-widths is 5"),
    ({"calibrated": [3, 99]}, "its list of calibrated bit-widths is [3, 99]"),
    ({"images": {"size": "32"}}, "its images' size is '32', not a number of pixels"),
    ({"images": {"size": -1}}, "its images' size is -1"),
    ({"images": {"mean": [0.5, 0.5]}}, "its images' mean is [0.5, 0.5], not three numbers"),
    ({"images": {"std": [0.5, 0.5, 0]}}, "its images' std is [0.5, 0.5, 0]"),
    ({"images": {"class_names": [1]}}, "its images' class_names is [1]"),
    ({"images": {"dataset": ["x"]}}, "its images' dataset is ['x']"),
    ({"images": {5: 1}}, "its images is {5: 1}, not a dict with names as keys"),
    ({"arguments": {5: 1}}, ", not a dict with names as keys"),
    ({"arguments": {"all_conv": True}}, "its argument all_conv is True, and its network's is Fal"),
    ({"arguments": {"lr": None}}, "its argument lr is None, which --lr does not take"),
    ({"arguments": {"epochs": 10**500}}, "its argument epochs is 1000000"),
    ({"network": {"classes": 10**9}}, "its network's num_classes is 1000000000"),
    ({"network": {"width": 4000}}, "its network's width is 4000, not a number up to"),
    ({"network": {"model": "\x1b[2J"}}, r"is of model '\x1b[2J'"),
    ({"network": {"model": "torchvision:googlenet"}, "arguments": None},
     "torchvision:googlenet cannot be built")])
def test_a_field_of_another_type_is_one_line(changes, told, trained, tmp_path, capsys):
    content = load(trained)
    for name, change in changes.items():
        known = content.get(name) if name in ("network", "arguments") and change else None
        content[name] = {**known, **change} if known else change
    path = tmp_path / "x.pth.tar"
    torch.save(content, path)
    assert run(["--evaluate", "--pretrain", path, "--results-dir", tmp_path / "r"]) == 1
    assert_one_line(capsys, str(path), told)


def a_tensor(kind):
    value = torch.ones(10)
    if kind == "sparse":
        return value.to_sparse()
    if kind == "on no device":
        return value.to("meta")
    if kind == "quantized":
        return torch.quantize_per_tensor(value, 0.1, 0, torch.quint8)
    return value.to(torch.float8_e5m2)


@pytest.mark.parametrize("kind", ["sparse", "on no device", "quantized", "float8"])
def test_weights_that_are_no_dense_numbers(kind, trained, tmp_path):
    content = load(trained)
    content["state_dict"]["fc.bias"] = a_tensor(kind)
    torch.save(content, tmp_path / "x.pth.tar")
    assert_refused(tmp_path / "x.pth.tar", "fc.bias of its state_dict is a tensor of torch.",
                   "not a dense tensor of numbers")


@pytest.mark.parametrize("key, value, told", [
    ("fc.bias", torch.ones(10, dtype=torch.complex64), "1 of another type (fc.bias)"),
    ("fc.bias", torch.ones(10, dtype=torch.int64), "1 of another type (fc.bias)"),
    ("fc.\x1b[31mbias\n", torch.ones(10), r"1 unexpected (fc.\x1b[31mbias\n)"),
    ("module.fc.bias", torch.ones(10), "1 unexpected (module.fc.bias)"),
    ("bn.bn_dict.99.weight", torch.ones(10), "bit-width '99' does not exist"),
    ("fc.quantizer.log_range_dict.99", torch.ones(1), "bit-width '99' does not exist"),
    ("bn.bn_dict.2.running_var", -torch.ones(8), "bn.bn_dict.2.running_var has variances below")])
def test_weights_that_do_not_fit(key, value, told, trained, tmp_path, tiny_cifar10, capsys):
    content = load(trained)
    content["state_dict"][key] = value
    path = tmp_path / "x.pth.tar"
    torch.save(content, path)
    assert_refused(path, told)
    argv = tiny(tiny_cifar10, tmp_path / "r", "--pretrain", path)
    assert run(argv) == 1
    assert_one_line(capsys, str(path), told)


# ---- a researcher's own network

MISTAKES = {"an attribute": AttributeError, "a key": KeyError, "a type": TypeError,
            "a value": ValueError, "an index": IndexError}


def mistake(kind):
    if kind == "an attribute":
        return torch.nn.no_such_layer
    if kind == "a key":
        return {}["missing"]
    if kind == "a type":
        return len(5)
    if kind == "an index":
        return [][3]
    return int("four")


class OwnNetwork(SVHNNet):
    """svhnq, with a mistake in the place and of the kind that its class says."""
    place = None
    kind = "an attribute"

    def __init__(self, *args):
        super().__init__(*args)
        if self.place == "constructor":
            mistake(self.kind)

    def forward(self, x):
        if self.place == "forward":
            mistake(self.kind)
        return super().forward(x)


@pytest.fixture(scope="module")
def own_run(tmp_path_factory):
    """A run of a network that is registered in MODELS, begun before it had a mistake.

    It and what follows is on 30 images, read once.
    """
    folder = tmp_path_factory.mktemp("own") / "r"
    row = DATASETS["digits"]
    images = {split: row.open(None, split)[:30] for split in ("train", "val")}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(MODELS, "own", OwnNetwork)
        monkeypatch.setitem(DATASETS, "digits",
                            row._replace(open=lambda root, split: images[split], shapes={}))
        assert run(["--model", "own", "--dataset", "digits", "--width", 1, "--bit_width_list",
                    "2,32", "--epochs", 1, "--device", "cpu", "--results-dir", folder]) == 0
        yield folder


@pytest.mark.parametrize("kind", MISTAKES)
@pytest.mark.parametrize("place", ["constructor", "forward"])
def test_a_mistake_in_one_s_own_network_shows_its_traceback(place, kind, own_run, tmp_path,
                                                            monkeypatch):
    """It is no fault of the file: not reported as one that is damaged."""
    assert models.load(own_run).spec["model"] == "own"
    monkeypatch.setattr(OwnNetwork, "place", place)
    monkeypatch.setattr(OwnNetwork, "kind", kind)
    common = ["--device", "cpu", "--results-dir", tmp_path / "r"]
    training = ["--model", "own", "--width", 1, "--bit_width_list", "2,32", "--epochs", 1]
    calls = [lambda: run([*training, *common]),
             lambda: run([*training, "--pretrain", own_run, *common]),
             lambda: run(["--resume", own_run, "--epochs", 2, *common]),
             lambda: run(["--evaluate", "--pretrain", own_run, *common]),
             lambda: models.load(own_run)(images_of(40))]
    for index, call in enumerate(calls):
        common[-1] = tmp_path / f"r{index}"
        with pytest.raises(MISTAKES[kind]) as error:
            call()
        assert error.traceback[-1].name == "mistake" and not isinstance(error.value, FileError)


def test_more_classes_than_the_data_set_has_are_evaluated(tmp_path, tiny_cifar10, capsys):
    for classes, code in ((12, 0), (4, 1)):
        model = reference.fill(MODELS["resnet20q"]([2], classes, 1), seed=0)
        path = tmp_path / f"{classes}.pth.tar"
        torch.save({"model": "resnet20q", "state_dict": model.state_dict()}, path)
        assert run(["--evaluate", "--pretrain", path, "--data-dir", tiny_cifar10, "--device", "cpu",
                    "--results-dir", tmp_path / f"e{classes}"]) == code
    assert_one_line(capsys, f"{path} has 4 classes and cifar10 has 10", "--dataset")
    assert evaluation(tmp_path / "e12").keys() == {"2"}


# ---- damaged files

@pytest.mark.parametrize("save, least", [
    (lambda content, path: save_checkpoint(path, content), 100),  # with a SHA-256 of the file
    (torch.save, 90)])  # a CRC-32 of each entry alone: a small file has many headers, and padding
def test_a_flipped_bit_is_found(save, least, tmp_path):
    path = tmp_path / "x.pth.tar"
    model = MODELS["svhnq"]([1, 32], width=1)
    save({"model": "svhnq", "state_dict": model.state_dict()}, path)
    content = path.read_bytes()
    chosen = random.Random(0)
    refused = 0
    for _ in range(100):
        changed = bytearray(content)
        changed[chosen.randrange(len(content))] ^= 1 << chosen.randrange(8)
        path.write_bytes(changed)
        try:
            found = models.load(path).state_dict()
        except models.FileError as error:
            assert "\n" not in str(error)
            refused += 1
        else:  # of what is left nothing has changed
            assert all(torch.equal(value, model.state_dict()[key]) for key, value in found.items())
    assert refused >= least


@pytest.mark.parametrize("key", ["fc.weight", "layers.4.bn_dict.1.running_var"])
def test_what_is_not_finite_is_named(key, tmp_path):
    state_dict = MODELS["svhnq"]([1, 32], width=1).state_dict()
    state_dict[key].view(-1)[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    torch.save({"model": "svhnq", "state_dict": state_dict}, tmp_path / "x.pth.tar")
    with pytest.raises(models.FileError, match=f"{key} has 3 values that are not finite"):
        models.load(tmp_path / "x.pth.tar")
