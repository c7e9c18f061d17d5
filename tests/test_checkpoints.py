"""Evaluation at trained and other bit-widths, and sources of weights that are rubbish."""
import json
import os
import pickle

import pytest
import torch
from torch.testing import assert_close
from runs import assert_one_line, assert_same, evaluation, load, run, snapshot, tiny

import reference
import report
import tiny_data
from dataset.data import DATASETS
from engine import evaluation as evaluation_room
from engine import published
from engine.run_folder import read_metrics
from models import (MODELS, Assignment, add_assignment, add_missing_bit_widths, build, calibrate,
                    set_bit_width)
from models import calibration
from models.checkpoint import network_content, network_of
from models.fields import FileError
from models.quan_ops import Quantizer, SwitchableBatchNorm2d
from small_networks import Bottlenecks, ResNet8


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


# ---- other bit-widths

def test_a_missing_bit_width_starts_as_the_nearest():
    state = {"fc.weight": torch.ones(1), "bn.bn_dict.2.weight": torch.tensor(2.0),
             "bn.bn_dict.4.weight": torch.tensor(4.0), "bn.bn_dict.32.weight": torch.tensor(32.0)}
    model = torch.nn.Module()
    model.bn = SwitchableBatchNorm2d(1, [1, 2, 3, 8, 32])
    fitted, added = add_missing_bit_widths(state, model)
    assert added == {1: 2, 3: 4, 8: 4}
    assert {key: value.item() for key, value in fitted.items()} == {
        "fc.weight": 1, "bn.bn_dict.1.weight": 2, "bn.bn_dict.2.weight": 2,
        "bn.bn_dict.3.weight": 4, "bn.bn_dict.8.weight": 4, "bn.bn_dict.32.weight": 32}


def test_a_missing_bit_width_of_lsq_has_the_range_of_the_nearest():
    trained = build("svhnq", [2, 8, 32], 10, 1, quantizer="lsq")
    model = build("svhnq", [2, 6, 8, 32], 10, 1, quantizer="lsq")
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.ndim == 0:
                parameter.uniform_(-1, 1)  # logarithms of ranges
    model.load_state_dict(add_missing_bit_widths(trained.state_dict(), model)[0])
    quantizers = [layer for layer in model.modules() if isinstance(layer, Quantizer)]
    largest = {}
    for bits in (2, 6, 8):
        set_bit_width(model, bits)
        products = [integers * scale for integers, scale in
                    (quantizer.integers(torch.full((1, 1), 100.0)) for quantizer in quantizers)]
        largest[bits] = torch.cat(products).detach()
    assert_close(largest[6], largest[8])
    assert not any(largest[2] == largest[8])


def test_weights_and_activations_go_by_bits_of_their_own():
    trained = build("svhnq", [4, 8], 10, 1, quantizer="lsq")
    model = build("svhnq", [4, "w4a8", 8], 10, 1, quantizer="lsq")
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.ndim == 0:
                parameter.uniform_(-1, 1)
    state, added = add_missing_bit_widths(trained.state_dict(), model)
    add_assignment(trained, Assignment("mix", 8, {"layers.6": "w4a8"}))
    assert added == {"w4a8": 8}
    for layer, bits in (("layers.6", 4), ("layers.5", 8)):  # a convolution, its activation
        ranges = f"{layer}.quantizer.log_range_dict"
        assert state[f"{ranges}.w4a8"] == state[f"{ranges}.{bits}"]
        assert trained.state_dict()[f"{ranges}.mix"] == state[f"{ranges}.{bits}"]


def test_calibration_over_nothing_changes_nothing():
    model = reference.fill(ResNet8([2], width=1), seed=0)
    batches = iter([torch.randn(2, 3, 32, 32)])
    calibrate(model, 2, batches)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="no batch to calibrate over; an iterator"):
        calibrate(model, 2, batches)
    assert_same(model.state_dict(), before)


def test_an_error_in_calibration_leaves_the_network_in_evaluation_mode():
    model = ResNet8([2], width=1)
    with pytest.raises(RuntimeError, match="channels"):
        calibrate(model, 2, [torch.randn(2, 3, 32, 32), torch.randn(2, 1, 32, 32)])
    norm = model.bn.bn_dict["2"]
    assert not norm.training and not norm._forward_pre_hooks and norm.momentum == 0.1


@pytest.mark.parametrize("batches", [1, 5])
def test_a_batch_norm_that_is_called_twice_is_calibrated_over_all_calls(batches):
    class Twice(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = SwitchableBatchNorm2d(1, [2])

        def forward(self, x):
            self.bn(x)
            self.bn(x + 10)
            return x

    model = Twice()
    calibrate(model, 2, [torch.zeros(2, 1, 3, 3)] * batches)
    assert model.bn.bn_dict["2"].running_mean.item() == pytest.approx(5)
    assert not model.bn.bn_dict["2"]._forward_pre_hooks


def test_a_short_batch_counts_by_its_size():
    bn = SwitchableBatchNorm2d(1, [2])
    calibrate(bn, 2, [torch.zeros(3, 1, 2, 2), torch.full((1, 1, 2, 2), 4.0)])
    assert bn.bn_dict["2"].running_mean.item() == pytest.approx(1)


def test_statistics_of_another_kind_are_not_left_as_they_are():
    class Own(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(1))

    bn = SwitchableBatchNorm2d(1, [2])
    bn.bn_dict["2"] = Own()
    with pytest.raises(ValueError, match="Own may have statistics, and only those of torch's"):
        calibrate(bn, 2, [torch.zeros(1, 1, 2, 2)])


def test_statistics_of_another_kind_are_one_line(trained, tiny_cifar10, tmp_path, monkeypatch,
                                                 capsys):
    def refuse(*_):
        raise calibration.StatisticsError("Own may have statistics")

    monkeypatch.setattr(calibration, "norms_with_statistics", refuse)
    monkeypatch.setattr(evaluation_room, "norms_with_statistics", refuse)
    common = ["--data-dir", tiny_cifar10, "--results-dir", tmp_path / "e"]
    assert run(["--evaluate", "--pretrain", trained, "--bit_width_list", "2,3", "--calibrate", 1,
                *common]) == 1
    assert_one_line(capsys, "error: Own may have statistics")
    assert not (tmp_path / "e").exists()


def test_instance_norms_are_calibrated():
    bn = SwitchableBatchNorm2d(1, [2])
    bn.bn_dict["2"] = torch.nn.InstanceNorm2d(1, track_running_stats=True)
    calibrate(bn, 2, [torch.full((1, 1, 2, 2), value) for value in (1.0, 3.0)])
    assert bn.bn_dict["2"].running_mean.item() == pytest.approx(2)


def test_norms_without_statistics_are_not_calibrated():
    model = reference.fill(ResNet8([2], width=1), seed=0)
    model.bn.bn_dict["2"] = torch.nn.GroupNorm(4, 16)
    calibrate(model, 2, [torch.randn(2, 3, 32, 32)])
    assert model.layers[0].bn0.bn_dict["2"].num_batches_tracked == 1


def test_bits_of_layers_are_those_of_the_file():
    model = build("svhnq", [2, 4], 10, 1)
    model.get_submodule("layers.6").own_bits = 8
    network = network_content(model)
    content = {"state_dict": model.state_dict(), "network": network}
    found, _ = network_of(content, "x")
    assert found.get_submodule("layers.6").bits == 8 and found.get_submodule("layers.3").bits == 4
    for damaged in (["layers.6"], {5: 8}, {"layers.6": torch.ones(2)}, {"layers.6": 8.0}):
        network["own_bits"] = damaged
        with pytest.raises(FileError, match="own_bits is .*, not a dict of layers and bits"):
            network_of(content, "x")
    network["own_bits"] = {}
    network_of(content, "x")
    network["own_bits"] = {"layers.99": 8}
    with pytest.raises(FileError, match="it has bits of 'layers.99', which is not a quantized"):
        network_of(content, "x")
    del network["own_bits"]  # of a published checkpoint
    network_of(content, "x")


@pytest.mark.parametrize("kind, size", [(ResNet8, 32), (Bottlenecks, 64), (MODELS["svhnq"], 40)])
def test_calibration_averages_over_the_batches_and_touches_nothing_else(kind, size):
    model = reference.fill(kind([2, 3, 32], width=1).double(), seed=0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batches = [reference.values(f"batch{index}", (2, 3, size, size), 0) for index in range(3)]

    seen = []  # what reaches the first BatchNorm, which no other's statistics influence
    first = next(layer for layer in model.modules() if isinstance(layer, SwitchableBatchNorm2d))
    hook = first.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    calibrate(model, 3, batches)
    hook.remove()
    mean = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    var = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in seen]).mean(0)
    assert_close(first.bn_dict["3"].running_mean, mean)
    assert_close(first.bn_dict["3"].running_var, var)

    for key, value in model.state_dict().items():
        moved = ".bn_dict.3.running_" in f".{key}"
        counts = key.endswith("bn_dict.3.num_batches_tracked")
        assert moved != torch.equal(value, before[key]) or counts, key
    assert not any(layer.training for layer in model.modules())
    assert {layer.momentum for layer in model.modules()
            if isinstance(layer, torch.nn.BatchNorm2d)} == {0.1}


# ---- --evaluate

@pytest.mark.pictures
def test_evaluation_gives_the_training_s_own_numbers(trained, tiny_cifar10, tmp_path, capsys):
    assert run(["--evaluate", "--pretrain", trained, "--data-dir", tiny_cifar10, "--results-dir",
                tmp_path / "e"]) == 0
    out = capsys.readouterr().out
    record = read_metrics(trained / "metrics.jsonl")[load(trained, "model_best")["epoch"] - 1]
    results = evaluation(tmp_path / "e")
    for bits, values in record["val"].items():
        found = {name: results[str(bits)][name] for name in values}
        assert found == pytest.approx(values, rel=1e-6)
        assert results[str(bits)]["bit_operations"] == 221_184 * bits.weights**2
    assert results.keys() == set(map(str, record["val"]))
    for bits, values in results.items():
        assert (f"{bits:>5} {values['loss']:8.4f} {values['top1']:8.2f} {values['top5']:8.2f}"
                in out)
    assert (tmp_path / "e" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "e" / "metrics.jsonl").exists()


def test_evaluation_of_some_bit_widths(trained, tiny_cifar10, tmp_path):
    assert run(["--evaluate", "--resume", trained, "--bit_width_list", "2", "--data-dir",
                tiny_cifar10, "--results-dir", tmp_path / "e"]) == 0
    assert list(evaluation(tmp_path / "e")) == ["2"]


def test_an_evaluation_s_configuration_is_as_its_command_said(trained, tiny_cifar10, tmp_path,
                                                               capsys):
    folder = tmp_path / "e"
    assert run(["--evaluate", "--pretrain", trained, "--bit_width_list", "1,3,32", "--calibrate",
                1, "--data-dir", tiny_cifar10, "--results-dir", folder]) == 0
    config = json.loads((folder / "config.json").read_text())
    arguments = config["arguments"]
    names = ("bit_width_list", "calibrate", "evaluate", "pretrain", "model", "batch_size")
    assert [arguments[name] for name in names] == [
        [1, 3, 32], 1, True, str(trained), "resnet4q", 8]
    assert config["trained_bit_widths"] == [2, 32]
    assert config["epoch"] == load(trained, "model_best")["epoch"]
    found = report.load_run(folder)
    assert (found.name, found.bit_widths) == ("any, recursive", "2,32")
    assert found.evaluation == {"evaluation": "best checkpoint evaluated",
                                "calibration": "calibrated on 1 batch", "images": ""}


def test_an_evaluation_does_not_rename_a_loss(trained, tiny_cifar10, tmp_path, capsys):
    assert run(["--evaluate", "--pretrain", trained, "--loss", "hard", "--data-dir", tiny_cifar10,
                "--results-dir", tmp_path / "e"]) == 2
    assert_one_line(capsys, "holds another network: --loss is recursive, not hard")


def test_no_list_of_calibrated_bit_widths(trained, tiny_cifar10, tmp_path):
    torch.save({**load(trained), "calibrated": None}, tmp_path / "x")
    assert run(["--evaluate", "--pretrain", tmp_path / "x", "--data-dir", tiny_cifar10,
                "--bit_width_list", 3, "--calibrate", 0, "--save-calibrated", tmp_path / "y",
                "--results-dir", tmp_path / "e"]) == 0
    assert torch.load(tmp_path / "y", weights_only=True)["calibrated"] == [3]


def test_calibration_takes_all_batches_where_there_are_fewer(trained, tiny_cifar10, tmp_path,
                                                             capsys):
    for count in (3, 99):  # three batches are all
        assert run(["--evaluate", "--pretrain", trained, "--bit_width_list", "2,3,32",
                    "--calibrate", count, "--data-dir", tiny_cifar10, "--results-dir",
                    tmp_path / str(count)]) == 0
        assert "statistics re-estimated over 3 training batches" in capsys.readouterr().out
    assert evaluation(tmp_path / "3") == evaluation(tmp_path / "99")
    config = json.loads((tmp_path / "99" / "config.json").read_text())
    assert config["arguments"]["calibrate"] == 3


def test_evaluation_through_the_recipe(tmp_path, recipe_argv):
    """A network at its initial weights, by the arguments that train_digits.sh makes of a user's."""
    model = MODELS["svhnq"]([2, 32], width=1)
    torch.save({"epoch": 0, "model": "svhnq", "state_dict": model.state_dict(), "best_prec1": 0.0,
                "optimizer": {}}, tmp_path / "x.pth.tar")
    assert run(recipe_argv("train_digits.sh", "--evaluate", "--pretrain", tmp_path / "x.pth.tar",
                           "--width", "1", "--results-dir", tmp_path / "e")) == 0
    assert set(evaluation(tmp_path / "e")) == {"2", "32"}


def test_calibration_makes_other_widths_and_keeps_the_trained_ones_bit_for_bit(
        two_checkpoints, tiny_cifar10, tmp_path, capsys):
    saved = tmp_path / "calibrated.pth.tar"
    argv = ["--evaluate", "--pretrain", two_checkpoints, "--bit_width_list", "1,2,3,4,5,6,7,8,32",
            "--data-dir", tiny_cifar10, "--calibrate", 2, "--save-calibrated", saved,
            "--seed", 5]
    assert run([*argv, "--results-dir", tmp_path / "e"]) == 0
    told = "3-bit was not trained: using the 2-bit BatchNorm, statistics re-estimated over 2"
    assert told in capsys.readouterr().out
    assert list(evaluation(tmp_path / "e")) == ["1", "2", "3", "4", "5", "6", "7", "8", "32"]
    checkpoint = torch.load(saved, weights_only=True)
    assert {"epoch", "model", "state_dict", "best_prec1", "optimizer"} <= set(checkpoint)
    trained_with = load(two_checkpoints, "model_best")["arguments"]  # with its own seed
    every = [1, 2, 3, 4, 5, 6, 7, 8, 32]
    assert checkpoint["arguments"] == {**trained_with, "bit_width_list": every}
    before, after = load(two_checkpoints, "model_best")["state_dict"], checkpoint["state_dict"]
    assert_same({key: after[key] for key in before}, before)

    images = torch.rand(2, 3, 32, 32)
    logits = []
    for weights, widths in ((before, [2, 32]), (after, [1, 2, 3, 4, 5, 6, 7, 8, 32])):
        model = MODELS["resnet4q"](widths, width=1).eval()
        model.load_state_dict(weights)
        for bits in (2, 32):
            set_bit_width(model, bits)
            logits.append(model(images))
    assert_same(logits[:2], logits[2:])

    capsys.readouterr()  # an ordinary checkpoint: it evaluates without --calibrate
    assert run(["--evaluate", "--pretrain", saved, "--data-dir", tiny_cifar10, "--results-dir",
                tmp_path / "e2"]) == 0
    assert evaluation(tmp_path / "e") == evaluation(tmp_path / "e2")
    assert capsys.readouterr().out.count("not trained") == 7  # it knows which were calibrated
    assert run([*argv, "--results-dir", tmp_path / "e3"]) == 1
    assert_one_line(capsys, f"{saved} exists")


def test_post_training_quantization_of_a_32_bit_network(tmp_path, tiny_cifar10):
    argv = tiny(tiny_cifar10, tmp_path / "r", "--epochs", 1, "--bit_width_list", 32)
    assert run(argv) == 0
    for count in (0, 2):
        assert run(["--evaluate", "--pretrain", tmp_path / "r", "--bit_width_list", "1,4,32",
                    "--calibrate", count, "--data-dir", tiny_cifar10, "--results-dir",
                    tmp_path / f"e{count}"]) == 0
    as_it_is, calibrated = evaluation(tmp_path / "e0"), evaluation(tmp_path / "e2")
    assert as_it_is["32"] == calibrated["32"] and as_it_is["4"] != calibrated["4"]


def test_a_calibrated_checkpoint_keeps_what_the_flags_said(tmp_path, tiny_cifar10):
    """One without arguments, of an ALL CONV network: saved, it evaluates alike by itself."""
    torch.manual_seed(0)
    model = MODELS["resnet4q"]([2, 32], width=1, all_conv=True)
    torch.save({"model": "resnet4q", "state_dict": model.state_dict()}, tmp_path / "x.pth.tar")
    saved = tmp_path / "y.pth.tar"
    assert run(["--evaluate", "--pretrain", tmp_path / "x.pth.tar", "--width", 1, "--all-conv",
                "--calibrate", 2, "--bit_width_list", "2,3,32", "--data-dir", tiny_cifar10,
                "--batch-size", 8, "--save-calibrated", saved,
                "--results-dir", tmp_path / "e1"]) == 0
    assert run(["--evaluate", "--pretrain", saved, "--data-dir", tiny_cifar10, "--results-dir",
                tmp_path / "e2"]) == 0
    assert evaluation(tmp_path / "e1") == evaluation(tmp_path / "e2")


def test_model_is_given_where_the_checkpoint_does_not_name_it(trained, tmp_path, tiny_cifar10,
                                                              capsys):
    torch.save({"state_dict": load(trained)["state_dict"]}, tmp_path / "x.pth.tar")
    argv = ["--evaluate", "--pretrain", tmp_path / "x.pth.tar", "--width", 1, "--data-dir",
            tiny_cifar10, "--results-dir", tmp_path / "e"]
    assert run(argv) == 1
    assert_one_line(capsys, "is of model None: choose a checkpoint of resnet20q")
    assert run([*argv, "--model", "resnet4q"]) == 0


def test_other_classes_do_not_fit(trained, tmp_path, monkeypatch, capsys):
    tiny_data.cifar100(tmp_path / "data100", monkeypatch)
    ten = DATASETS["cifar10"]
    hundred = DATASETS["cifar100"]._replace(mean=ten.mean, std=ten.std)
    monkeypatch.setitem(DATASETS, "cifar100", hundred)
    assert run(["--evaluate", "--pretrain", trained, "--dataset", "cifar100",
                "--data-dir", tmp_path / "data100"]) == 1
    assert_one_line(capsys, "has 10 classes and cifar100 has 100: choose the data set", "--dataset")


# ---- bad input: a source of weights, and what is told of it

class Malice:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def bad_files(trained):
    """Return {case: (content of a file, part of the message)}; a dict is saved by torch."""
    good = load(trained, "model_best")
    weights = good["state_dict"]
    whole = (trained / "ckpt" / "model_best.pth.tar").read_bytes()
    unreadable, not_fit = "not a checkpoint that can be read safely", "does not fit the model"
    no_dict = "must be a dict with a state_dict"
    return {
        "empty file": (b"", unreadable),
        "page": (b"<!DOCTYPE html><html>not found</html>", unreadable),
        "text": (b"lr = 0.1\n", unreadable),
        "noise": (bytes(range(256)) * 40, unreadable),
        "truncated by a byte": (whole[:-1], unreadable),
        "truncated by half": (whole[:len(whole) // 2], unreadable),
        "truncated to its head": (whole[:30], unreadable),
        "overwritten with zeros": (bytes(len(whole)), unreadable),
        "pickled code": (pickle.dumps(Malice()), unreadable),
        "code in a checkpoint": ({**good, "extra": Malice()}, unreadable),
        "a whole module": ({**good, "state_dict": MODELS["svhnq"]([2])}, unreadable),
        "a list": (pickle.dumps([1, 2], protocol=2), "is not a checkpoint"),
        "no weights": ({**good, "state_dict": None}, no_dict),
        "weights that are numbers": ({**good, "state_dict": dict.fromkeys(weights, 1.0)},
                                     "is 1.0, not a dense tensor of numbers"),
        "no weights in it": ({**good, "state_dict": {}}, not_fit),
        "unknown model": ({**good, "network": {**good["network"], "model": "resnet18"}},
                          "is of model 'resnet18': choose a checkpoint of resnet20q"),
        "unknown model of an older file": (
            {**good, "network": None, "model": "resnet18"}, "choose a checkpoint of resnet20q"),
        "another model's weights": (
            {**good, "state_dict": MODELS["svhnq"]([2, 32], width=1).state_dict()}, not_fit),
        "an entry is missing": (
            {**good, "state_dict": {k: v for k, v in weights.items() if k != "fc.bias"}},
            "1 missing (fc.bias)"),
        "an entry too many": (
            {**good, "state_dict": {**weights, "fc2.bias": weights["fc.bias"]}},
            "1 unexpected (fc2.bias)"),
        "a shape is wrong": ({**good, "state_dict": {**weights, "fc.bias": torch.zeros(7)}},
                             "1 of another shape (fc.bias)"),
        "a bit-width there is not": (
            {**good, "state_dict": {key.replace("bn_dict.32.", "bn_dict.16."): value
                                    for key, value in weights.items()}}, "16"),
        "entries without names": ({**good, "state_dict": {5: torch.zeros(1)}}, no_dict),
    }


def bad_sources(trained, folder, url):
    """Return {case: (source, part of the message)}."""
    (folder / "empty").mkdir()
    os.mkfifo(folder / "pipe")
    sources = {
        "a pipe": (folder / "pipe", "is not a file but a folder, a pipe or a device"),
        "no file": (folder / "none.pth.tar", "does not exist"),
        "unknown name": ("resnet20q_3", "does not exist: give a file, a results folder, a URL, or "
                                        "a published name"),
        "empty folder": (folder / "empty", "holds no checkpoint"),
        "dead URL": ("http://127.0.0.1:9/x.pth.tar", "could not be downloaded"),
        "URL of nothing": (f"{url}/none.pth.tar", "could not be downloaded"),
        "URL of a page": (f"{url}/", "could not be downloaded as a whole checkpoint"),
        "malformed URL": ("http://", "could not be downloaded"),
        "half an IPv6 address": ("http://[x", "could not be downloaded"),
        "URL with a space": ("http://127.0.0.1:9/a b", "could not be downloaded"),
        "URL with a word for a port": ("http://127.0.0.1:x/a", "could not be downloaded"),
    }
    for case, (content, told) in bad_files(trained).items():
        path = folder / f"{case}.pth.tar"
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        sources[case] = path, told
    return sources


def bad_arguments(trained, folder):
    """Return {case: (source, exit code, part of the message)} of what cannot be resumed.

    The saved arguments are rubbish.
    """
    good = load(trained)
    saved = good["arguments"]
    sources = {}
    for case, arguments, code, told in (
            ("arguments that are a list", [1], 1, "its arguments is [1]"),
            ("arguments of nothing", {"x": 1}, 2, "does not say how it was trained: give --train"),
            ("a width that is text", {**saved, "width": "x"}, 1, "its argument width is 'x'"),
            ("a wrong bit-width", {**saved, "bit_width_list": [16]}, 1,
             "its argument bit_width_list is [16], which --bit-width-list does not take")):
        path = folder / f"{case}.pth.tar"
        torch.save({**good, "arguments": arguments}, path)
        sources[case] = path, code, told
    return sources


def bad_evaluations(trained):
    """Return {case: (arguments, exit code, part of the message)}."""
    evaluate = ["--evaluate", "--pretrain", trained]
    return {
        "untrained": ([*evaluate, "--bit_width_list", "2,3,5"], 2,
                      "3,5 bits were not trained; choose from 2,32, or pass --calibrate N"),
        "another model": ([*evaluate, "--model", "svhnq"], 2,
                          "another network: --model is resnet4q, not svhnq"),
        "another width": ([*evaluate, "--width", 2], 2, "--width is 1, not 2"),
        "another variant": ([*evaluate, "--all-conv"], 2,
                            "--all-conv is False, not True"),
        "unwritable folder": ([*evaluate, "--results-dir", "/proc/x"], 1, "cannot be written"),
        "unwritable file": ([*evaluate, "--bit_width_list", "2,3", "--calibrate", 1,
                             "--save-calibrated", "/proc/x/y"], 1, "/proc/x"),
        "nothing to calibrate": ([*evaluate, "--calibrate", 1], 2, "--calibrate 1 adds bit-widths "
                                 "that "),
        "a folder with a run": ([*evaluate, "--results-dir", trained], 1, "holds a run already"),
    }


def test_bad_input_is_one_line_and_loses_nothing(trained, tmp_path, tiny_cifar10, http_folder,
                                                 capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "bad"
    folder.mkdir()
    cases = bad_evaluations(trained)
    for case, (source, told) in bad_sources(trained, folder, http_folder[1]).items():
        cases[f"{case}, evaluated"] = ["--evaluate", "--pretrain", source], 1, told
        if "unknown model" not in case:  # which --pretrain does not read
            cases[f"{case}, trained from"] = (
                tiny(tiny_cifar10, tmp_path / "new", "--pretrain", source), 1, told)
        if "weights" not in case and "entry" not in case:
            cases[f"{case}, resumed"] = ["--resume", source], 1, told
    for case, (source, code, told) in bad_arguments(trained, folder).items():
        cases[f"{case}, resumed"] = ["--resume", source, "--epochs", 9], code, told
    assert len(cases) >= 90
    before = snapshot(trained)
    failures = []
    for case, (argv, code, told) in cases.items():
        argv = argv if "--data-dir" in argv else [*argv, "--data-dir", tiny_cifar10]
        found = run(argv)
        lines = capsys.readouterr().err.splitlines()
        good = (found, len(lines)) == (code, 1) and told in lines[0]
        if not good or "Traceback" in lines[0]:
            failures.append((case, found, lines))
    assert failures == []
    assert snapshot(trained) == before
    assert not (tmp_path / "harm").exists()
    cache = published.cache_folder()
    assert not cache.exists() or list(cache.iterdir()) == []


def test_a_checkpoint_does_not_say_where_this_machine_looks_for_data(trained, tmp_path,
                                                                     tiny_cifar10, monkeypatch):
    content = load(trained)
    content["arguments"]["data_dir"] = str(tmp_path / "theirs")
    torch.save(content, tmp_path / "x.pth.tar")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(tiny_cifar10)  # the default
    for flags in ([], ["--data-dir", tiny_cifar10]):
        folder = tmp_path / f"e{len(flags)}"
        assert run(["--evaluate", "--pretrain", "x.pth.tar", *flags, "--results-dir", folder]) == 0
        config = json.loads((folder / "config.json").read_text())
        assert config["arguments"]["data_dir"] == (str(tiny_cifar10) if flags else None)
    assert run(tiny(tiny_cifar10, tmp_path / "r", "--pretrain", "x.pth.tar", "--epochs", 1)) == 0
    assert not (tmp_path / "theirs").exists()


def test_flags_of_a_command_are_not_taken_from_a_checkpoint(trained, tmp_path, capsys):
    """One that says that it is an evaluation is resumed all the same, and writes no other file."""
    content = load(trained)
    content["arguments"].update(evaluate=True, calibrate=0, save_calibrated=str(tmp_path / "y"))
    torch.save(content, tmp_path / "x.pth.tar")
    assert run(["--resume", tmp_path / "x.pth.tar", "--results-dir", tmp_path / "r"]) == 0
    assert "resuming: 3 of 3 epochs done" in capsys.readouterr().out
    assert not (tmp_path / "r" / "evaluation.json").exists() and not (tmp_path / "y").exists()


def test_a_checkpoint_without_its_seed_is_not_resumed(trained, tmp_path, capsys):
    content = load(trained)
    del content["arguments"]["seed"]
    torch.save(content, tmp_path / "x.pth.tar")
    assert run(["--resume", tmp_path / "x.pth.tar", "--results-dir", tmp_path / "r"]) == 1
    assert_one_line(capsys, "x.pth.tar lacks its argument seed")


def test_every_batch_norm_of_a_bit_width_is_calibrated():
    class Norms(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm_dict = torch.nn.ModuleDict({
                str(width): torch.nn.Sequential(torch.nn.BatchNorm1d(3)) for width in (2, 4)})
            self.bn = SwitchableBatchNorm2d(3, [2, 4])

        def switch_bit_width(self, bit_width):
            self.width = str(bit_width)

        def forward(self, x):
            return self.norm_dict[self.width](self.bn(x).mean((2, 3)) + 7)

    model = Norms()
    calibrate(model, 2, [torch.randn(4, 3, 5, 5)])
    means = {width: norm[0].running_mean.mean().item() for width, norm in model.norm_dict.items()}
    assert means == {"2": pytest.approx(7, abs=0.5), "4": 0}
