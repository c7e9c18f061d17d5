"""Evaluation at trained and other bit-widths, published files, and runs that are stopped, killed or given rubbish."""
import json
import os
import pickle
import subprocess
import sys

import numpy
import pytest
import torch
from test_train import ROOT, assert_one_line, assert_same, load, run, tiny

import published
import reference
import tiny_data
import utils
from models import MODELS, calibrate, fit_bit_widths, set_bit_width
from models.quan_ops import SwitchableBatchNorm2d
from utils import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def trained(tmp_path, tiny_cifar10, capsys):
    """The results folder of a tiny network trained at 2 and 32 bits."""
    assert run(tiny(tiny_cifar10, tmp_path / "trained", "--epochs", 2)) == 0
    capsys.readouterr()
    return tmp_path / "trained"


# ---- other bit-widths

def test_a_missing_bit_width_starts_as_the_nearest():
    state = {"fc.weight": torch.ones(1), "bn.bn_dict.2.weight": torch.tensor(2.0), "bn.bn_dict.4.weight": torch.tensor(4.0),
             "bn.bn_dict.32.weight": torch.tensor(32.0)}
    fitted, added = fit_bit_widths(state, [1, 2, 3, 8, 32])
    assert added == {1: 2, 3: 4, 8: 4}
    assert {key: value.item() for key, value in fitted.items()} == {
        "fc.weight": 1, "bn.bn_dict.1.weight": 2, "bn.bn_dict.2.weight": 2, "bn.bn_dict.3.weight": 4,
        "bn.bn_dict.8.weight": 4, "bn.bn_dict.32.weight": 32}


@pytest.mark.parametrize("name", MODELS)
def test_calibration_averages_over_the_batches_and_touches_nothing_else(name):
    size = {"resnet20q": 32, "resnet50q": 64, "svhnq": 40}[name]
    model = reference.fill(MODELS[name]([2, 3, 32], width=1).double(), seed=0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batches = [reference.values(f"batch{index}", (2, 3, size, size), 0) for index in range(3)]

    seen = []  # what reaches the first BatchNorm, which no other's statistics influence
    first = next(layer for layer in model.modules() if isinstance(layer, SwitchableBatchNorm2d))
    hook = first.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    calibrate(model, 3, batches)
    hook.remove()
    mean = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
    var = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in seen]).mean(0)
    torch.testing.assert_close(first.bn_dict["3"].running_mean, mean)
    torch.testing.assert_close(first.bn_dict["3"].running_var, var)

    for key, value in model.state_dict().items():
        moved = ".bn_dict.3." in f".{key}" and key.rsplit(".", 1)[1] in ("running_mean", "running_var")
        assert moved != torch.equal(value, before[key]) or key.endswith("bn_dict.3.num_batches_tracked"), key
    assert not any(layer.training for layer in model.modules())
    assert {layer.momentum for layer in model.modules() if isinstance(layer, torch.nn.BatchNorm2d)} == {0.1}


# ---- --evaluate

def test_evaluation_gives_the_training_s_own_numbers(trained, tmp_path, capsys):
    assert run(["--evaluate", "--pretrain", trained, "--results-dir", tmp_path / "e"]) == 0
    out = capsys.readouterr().out
    epoch = load(trained, "model_best")["epoch"]
    record = json.loads((trained / "metrics.jsonl").read_text().splitlines()[epoch - 1])
    results = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert results == {bits: pytest.approx(values, rel=1e-6) for bits, values in record["val"].items()}
    for bits, values in results.items():
        assert f"{bits:>5} {values['loss']:8.4f} {values['top1']:8.2f} {values['top5']:8.2f}" in out
    assert (tmp_path / "e" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "e" / "metrics.jsonl").exists()


def test_evaluation_of_some_bit_widths(trained, tmp_path):
    assert run(["--evaluate", "--resume", trained, "--bit_width_list", "2", "--results-dir", tmp_path / "e"]) == 0
    assert list(json.loads((tmp_path / "e" / "evaluation.json").read_text())) == ["2"]


def test_evaluation_through_the_recipe(tmp_path):
    """A network at its initial weights, through train_digits.sh, as a user would."""
    model = MODELS["svhnq"]([2, 32], width=1)
    torch.save({"epoch": 0, "model": "svhnq", "state_dict": model.state_dict(), "best_prec1": 0.0, "optimizer": {}},
               tmp_path / "x.pth.tar")
    done = subprocess.run(
        [ROOT / "train_digits.sh", "--evaluate", "--pretrain", tmp_path / "x.pth.tar", "--width", "1", "--results-dir",
         tmp_path / "e"], env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert set(json.loads((tmp_path / "e" / "evaluation.json").read_text())) == {"2", "32"}


def test_calibration_makes_other_widths_and_keeps_the_trained_ones_bit_for_bit(trained, tmp_path, capsys):
    saved = tmp_path / "calibrated.pth.tar"
    argv = ["--evaluate", "--pretrain", trained, "--bit_width_list", "1,2,3,4,5,6,7,8,32", "--calibrate", 2]
    assert run([*argv, "--results-dir", tmp_path / "e", "--save-calibrated", saved]) == 0
    assert "3 bits was not trained: BatchNorm of 2 bits, statistics re-estimated over 2" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "e" / "evaluation.json").read_text())) == ["1", "2", "3", "4", "5", "6", "7", "8",
                                                                                   "32"]
    checkpoint = torch.load(saved, weights_only=True)
    assert {"epoch", "model", "state_dict", "best_prec1", "optimizer"} <= set(checkpoint)
    before, after = load(trained, "model_best")["state_dict"], checkpoint["state_dict"]
    assert_same({key: after[key] for key in before}, before)

    images = torch.rand(2, 3, 32, 32)
    logits = []
    for weights, widths in ((before, [2, 32]), (after, [1, 2, 3, 4, 5, 6, 7, 8, 32])):
        model = MODELS["resnet20q"](widths, width=1).eval()
        model.load_state_dict(weights)
        for bits in (2, 32):
            set_bit_width(model, bits)
            logits.append(model(images))
    assert_same(logits[:2], logits[2:])

    capsys.readouterr()  # an ordinary checkpoint: it evaluates without the flag, and can be trained from
    assert run(["--evaluate", "--pretrain", saved, "--results-dir", tmp_path / "e2"]) == 0
    results = [json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("e", "e2")]
    assert results[0] == results[1]
    assert capsys.readouterr().out.count("not trained") == 7  # it still knows which were only calibrated
    assert run([*argv, "--results-dir", tmp_path / "e3", "--save-calibrated", saved]) == 1
    assert_one_line(capsys, f"{saved} exists")


def test_post_training_quantization_of_a_32_bit_network(tmp_path, tiny_cifar10):
    assert run(tiny(tiny_cifar10, tmp_path / "r", "--epochs", 1, "--bit_width_list", 32)) == 0
    results = []
    for count in (0, 2):
        argv = ["--evaluate", "--pretrain", tmp_path / "r", "--bit_width_list", "1,4,32", "--calibrate", count]
        assert run([*argv, "--results-dir", tmp_path / f"e{count}"]) == 0
        results.append(json.loads((tmp_path / f"e{count}" / "evaluation.json").read_text()))
    plain, calibrated = results
    assert plain["32"] == calibrated["32"] and plain["4"] != calibrated["4"]


# ---- --pretrain

def test_pretrain_with_other_bit_widths_says_what_it_initialised(trained, tmp_path, tiny_cifar10, capsys):
    argv = tiny(tiny_cifar10, tmp_path / "next", "--epochs", 1, "--lr", "1e-30", "--pretrain", trained)
    assert run([*argv, "--bit_width_list", "4,8,32"]) == 0
    assert "BatchNorms of 4 bits (as those of 2 bits), 8 bits (as those of 2 bits)" in capsys.readouterr().out
    before, after = load(trained, "model_best")["state_dict"], load(tmp_path / "next")["state_dict"]
    assert_same(after["bn.bn_dict.4.weight"], before["bn.bn_dict.2.weight"])
    assert_same(after["layers.3.conv0.weight"], before["layers.3.conv0.weight"])


# ---- published checkpoints

@pytest.fixture
def dropbox(http_folder, monkeypatch):
    """A folder served as the published files' host."""
    folder, url = http_folder
    monkeypatch.setattr(published, "PREFIX", f"{url}/")
    return folder


def publish(folder, name, legacy, prefix="", bits=(1, 2, 4, 8, 32)):
    """A file as the published ones: their keys, no arguments; torch 1.1's serialisation where legacy."""
    model = reference.fill(MODELS[name.split("_")[0]](bits, num_classes=10), seed=3)
    path = folder / published.FILES[name]
    path.parent.mkdir(parents=True)
    optimizer = torch.optim.Adam(model.parameters())
    torch.save({"epoch": 200, "model": name.split("_")[0],
                "state_dict": {prefix + key: value for key, value in model.state_dict().items()},
                "best_prec1": numpy.float64(93.5) if legacy else torch.tensor(93.5),
                "optimizer": optimizer.state_dict()}, path, _use_new_zipfile_serialization=not legacy)
    return path, model


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("name, prefix, bits", [
    ("svhnq_any_recursive", "", (1, 2, 4, 8, 32)), ("svhnq_any_hard", "module.", (1, 2, 4, 8, 32)), ("svhnq_4", "", (4,))])
def test_published_checkpoint_by_name(name, prefix, bits, legacy, dropbox, tmp_path, monkeypatch, capsys):
    tiny_data.svhn(tmp_path / "data", monkeypatch)
    path, model = publish(dropbox, name, legacy, prefix, bits)
    argv = ["--evaluate", "--pretrain", name, "--data-dir", tmp_path / "data", "--device", "cpu"]
    assert run([*argv, "--results-dir", tmp_path / "e"]) == 0, capsys.readouterr().err
    results = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert list(results) == [str(width) for width in bits]

    images = torch.stack([image for image, _ in svhn_test(tmp_path / "data")])
    model.eval()
    for width in bits:
        set_bit_width(model, width)
        right = (model(images).argmax(1) == torch.tensor([label for _, label in svhn_test(tmp_path / "data")])).sum()
        assert results[str(width)]["top1"] == pytest.approx(100 * right.item() / 6)

    path.unlink()  # from now on it comes from the cache
    assert run([*argv, "--results-dir", tmp_path / "e2"]) == 0
    assert [file.name for file in published.cache_folder().iterdir()] == [f"{name}.pth.tar"]


def svhn_test(data_dir):
    from dataset.data import get_dataset, get_transform

    return list(get_dataset("svhn", "test", get_transform("svhn", False), data_dir))


def test_published_names_are_complete():
    assert len(published.FILES) == 8 + 8 + 6
    for name, link in published.FILES.items():
        assert link.endswith(f"/{name}.pth.tar") and name.split("_")[0] in MODELS


def test_checkpoint_by_url(dropbox, http_folder):
    path, model = publish(dropbox, "svhnq_2", legacy=True, bits=(2,))
    url = f"{http_folder[1]}/{published.FILES['svhnq_2']}?dl=1"
    found = published.find_checkpoint(url)
    assert_same(utils.load_checkpoint(found)["state_dict"], dict(model.state_dict()))
    path.unlink()
    assert published.find_checkpoint(url) == found


@pytest.mark.parametrize("content", ["cut short", "page", "missing"])
def test_a_download_is_whole_or_not_at_all(content, dropbox, capsys):
    path, _ = publish(dropbox, "svhnq_2", legacy=True, bits=(2,))
    if content == "cut short":
        path.write_bytes(path.read_bytes()[:-1000])
    elif content == "page":
        path.write_text("<!DOCTYPE html><html>Too many requests</html>")
    else:
        path.unlink()
    with pytest.raises(UserError, match="could not be downloaded" if content == "missing" else "not a whole checkpoint"):
        published.find_checkpoint("svhnq_2")
    assert list(published.cache_folder().iterdir()) == []


# ---- stopped and killed runs

@pytest.mark.parametrize("signal, kills", [("KILL", 6), ("TERM", 3), ("INT", 3)])
def test_runs_that_are_killed_go_on_to_the_same_end(signal, kills):
    """python tests/kill_runs.py --kills 20 is the longer trial."""
    done = subprocess.run([sys.executable, ROOT / "tests" / "kill_runs.py", "--signal", signal, "--kills", str(kills)],
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and f"{kills} of {kills} identical" in done.stdout, done.stdout + done.stderr


# ---- bad input: a source of weights, and what is told of it

class Malice:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def bad_sources(trained, folder, url):
    """{case: (arguments, part of the message)}"""
    good = load(trained, "model_best")

    def file(name, content=None, **changes):
        path = folder / f"{name}.pth.tar"
        if content is None:
            torch.save({**good, **changes}, path)
        else:
            path.write_bytes(content)
        return path

    weights = good["state_dict"]
    whole = (trained / "ckpt" / "model_best.pth.tar").read_bytes()
    svhn = MODELS["svhnq"]([2, 32], width=1).state_dict()
    unreadable, not_fit = "not a checkpoint that can be read safely", "does not fit the model"
    sources = {
        "no file": (folder / "none.pth.tar", "does not exist"),
        "unknown name": ("resnet20q_3", "does not exist: give a file, a results folder, a URL, or a published name"),
        "empty folder": (folder / "empty", "holds no checkpoint"),
        "empty file": (file("empty_file", b""), unreadable),
        "page": (file("page", b"<!DOCTYPE html><html>not found</html>"), unreadable),
        "text": (file("text", b"lr = 0.1\n"), unreadable),
        "noise": (file("noise", bytes(range(256)) * 40), unreadable),
        "truncated by a byte": (file("byte", whole[:-1]), unreadable),
        "truncated by half": (file("half", whole[:len(whole) // 2]), unreadable),
        "truncated to its head": (file("head", whole[:30]), unreadable),
        "overwritten with zeros": (file("zeros", bytes(len(whole))), unreadable),
        "pickled code": (file("code", pickle.dumps(Malice())), unreadable),
        "code in a checkpoint": (file("hidden", extra=Malice()), unreadable),
        "a whole module": (file("module", state_dict=MODELS["svhnq"]([2])), unreadable),
        "a list": (file("list", pickle.dumps([1, 2], protocol=2)), "is not a checkpoint"),
        "no weights": (file("weightless", state_dict=None), "must be a dict with a state_dict"),
        "weights that are numbers": (file("numbers", state_dict={key: 1.0 for key in weights}), "of another shape"),
        "no weights in it": (file("nothing", state_dict={}), not_fit),
        "unknown model": (file("stranger", model="resnet18"), "choose a checkpoint of resnet20q"),
        "another model's weights": (file("wrong", state_dict=svhn), not_fit),
        "an entry is missing": (file("less", state_dict={k: v for k, v in weights.items() if k != "fc.bias"}),
                                "1 missing (fc.bias)"),
        "an entry too many": (file("more", state_dict={**weights, "fc2.bias": weights["fc.bias"]}),
                              "1 unexpected (fc2.bias)"),
        "a shape is wrong": (file("shape", state_dict={**weights, "fc.bias": torch.zeros(7)}),
                             "1 of another shape (fc.bias)"),
        "dead URL": ("http://127.0.0.1:9/x.pth.tar", "could not be downloaded"),
        "URL of nothing": (f"{url}/none.pth.tar", "could not be downloaded"),
        "URL of a page": (f"{url}/", "not a whole checkpoint"),
        "malformed URL": ("http://", "could not be downloaded"),
        "half an IPv6 address": ("http://[x", "could not be downloaded"),
        "URL with a space": ("http://127.0.0.1:9/a b", "could not be downloaded"),
        "URL with a word for a port": ("http://127.0.0.1:x/a", "could not be downloaded"),
        "a bit-width there is not": (file("sixteen", state_dict={
            key.replace("bn_dict.32.", "bn_dict.16."): value for key, value in weights.items()}), "16"),
        "entries without names": (file("nameless", state_dict={5: torch.zeros(1)}), "must be a dict with a state_dict"),
    }
    (folder / "empty").mkdir()
    return {case: (["--pretrain", source], told) for case, (source, told) in sources.items()}


def bad_flags(trained, folder):
    evaluate = ["--evaluate", "--pretrain", trained]
    return {
        "nothing to evaluate": (["--evaluate"], 2, "give --pretrain"),
        "two sources": (["--evaluate", "--pretrain", trained, "--resume", trained], 2, "give one of them"),
        "calibrate without evaluate": (["--pretrain", trained, "--calibrate", 3], 2, "goes with --evaluate"),
        "negative calibrate": ([*evaluate, "--calibrate", -1], 2, "from 0 up"),
        "text calibrate": ([*evaluate, "--calibrate", "all"], 2, "from 0 up"),
        "more than there is": ([*evaluate, "--calibrate", 99, "--bit_width_list", 3], 2, "more than the 3 batches"),
        "untrained": ([*evaluate, "--bit_width_list", "2,3,5"], 2,
                      "3,5 bits were not trained; choose from 2,32, or pass --calibrate N"),
        "no such width": ([*evaluate, "--bit_width_list", 12], 2, "choose from 1 to 8 and 32"),
        "another model": ([*evaluate, "--model", "svhnq"], 2, "--model svhnq is not what"),
        "another width": ([*evaluate, "--width", 2], 2, "(width 1)"),
        "another variant": ([*evaluate, "--all-conv"], 2, "--all-conv True is not what"),
        "save without calibrate": ([*evaluate, "--save-calibrated", folder / "x"], 2, "goes with --calibrate"),
        "unwritable folder": ([*evaluate, "--results-dir", "/proc/x"], 1, "cannot be written"),
        "unwritable file": ([*evaluate, "--calibrate", 1, "--save-calibrated", "/proc/x/y"], 1, "/proc/x"),
        "a folder with a run": ([*evaluate, "--results-dir", trained], 1, "holds a run already"),
    }


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_bad_input_is_one_line_and_loses_nothing(trained, tmp_path, tiny_cifar10, http_folder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "bad"
    folder.mkdir()
    sources = bad_sources(trained, folder, http_folder[1])
    cases = {f"{name}, evaluated": (["--evaluate", *argv], 1, told) for name, (argv, told) in sources.items()}
    cases |= {f"{name}, trained from": (tiny(tiny_cifar10, tmp_path / "new", *argv), 1, told)
              for name, (argv, told) in sources.items() if name != "unknown model"}
    cases |= {f"{name}, resumed": (["--resume", argv[1]], 1, told)
              for name, (argv, told) in sources.items() if "weights" not in name and "entry" not in name}
    for name, arguments in (("arguments that are a list", [1]), ("arguments of nothing", {"x": 1}),
                            ("a width that is text", {**load(trained)["arguments"], "width": "x"}),
                            ("a wrong bit-width", {**load(trained)["arguments"], "bit_width_list": [16]})):
        torch.save({**load(trained), "arguments": arguments}, folder / f"{name}.pth.tar")
        cases[f"{name}, resumed"] = ["--resume", folder / f"{name}.pth.tar", "--epochs", 9], 1, folder.name
    cases |= bad_flags(trained, folder)
    assert len(cases) >= 30
    before = snapshot(trained)
    failures = []
    for name, (argv, code, told) in cases.items():
        argv = argv if "--data-dir" in argv else [*argv, "--data-dir", tiny_cifar10]
        found = run(argv)
        lines = capsys.readouterr().err.splitlines()
        if (found, len(lines)) != (code, 1) or told not in lines[0] or "Traceback" in lines[0]:
            failures.append((name, found, lines))
    assert failures == []
    assert snapshot(trained) == before
    assert not (tmp_path / "harm").exists()
    assert not published.cache_folder().exists() or list(published.cache_folder().iterdir()) == []


def test_a_published_checkpoint_resumed_with_another_optimizer(trained, tmp_path, tiny_cifar10, capsys):
    sgd = torch.optim.SGD(MODELS["resnet20q"]([2, 32], width=1).parameters(), 0.1, momentum=0.9)
    checkpoint = {key: load(trained)[key] for key in ("epoch", "model", "state_dict", "best_prec1")}
    torch.save({**checkpoint, "optimizer": sgd.state_dict()}, tmp_path / "x.pth.tar")
    argv = ["--resume", tmp_path / "x.pth.tar", "--epochs", 3, "--width", 1, "--data-dir", tiny_cifar10, "--results-dir",
            tmp_path / "r"]
    assert run(argv) == 1
    assert_one_line(capsys, "holds another optimizer's state", "--optimizer")
    assert run([*argv, "--optimizer", "sgd"]) == 0


def test_a_calibrated_checkpoint_keeps_what_the_flags_said(tmp_path, tiny_cifar10):
    """One without arguments, of an ALL CONV network: what is saved evaluates to the same numbers by itself."""
    torch.manual_seed(0)
    model = MODELS["resnet20q"]([2, 32], width=1, all_conv=True)
    torch.save({"model": "resnet20q", "state_dict": model.state_dict()}, tmp_path / "x.pth.tar")
    argv = ["--evaluate", "--pretrain", tmp_path / "x.pth.tar", "--width", 1, "--all-conv", "--calibrate", 2,
            "--bit_width_list", "2,3,32", "--data-dir", tiny_cifar10, "--batch-size", 8]
    assert run([*argv, "--save-calibrated", tmp_path / "y.pth.tar", "--results-dir", tmp_path / "e1"]) == 0
    assert run(["--evaluate", "--pretrain", tmp_path / "y.pth.tar", "--results-dir", tmp_path / "e2"]) == 0
    first, second = ((tmp_path / name / "evaluation.json").read_text() for name in ("e1", "e2"))
    assert first == second


@pytest.mark.parametrize("changes, told", [
    ({"optimizer": None}, "holds no optimizer to go on with"), ({"epoch": "3"}, "holds no epoch"),
    ({"optimizer": {"state": {}, "param_groups": []}}, "holds another optimizer's state")])
def test_what_cannot_be_resumed(changes, told, trained, tmp_path, tiny_cifar10, capsys):
    torch.save({**load(trained), **changes}, tmp_path / "x.pth.tar")
    assert run(["--resume", tmp_path / "x.pth.tar", "--epochs", 9]) == 1
    assert_one_line(capsys, told)


def test_model_is_given_where_the_checkpoint_does_not_name_it(trained, tmp_path, tiny_cifar10, capsys):
    torch.save({"state_dict": load(trained)["state_dict"]}, tmp_path / "x.pth.tar")
    argv = ["--evaluate", "--pretrain", tmp_path / "x.pth.tar", "--width", 1, "--data-dir", tiny_cifar10]
    assert run([*argv, "--results-dir", tmp_path / "e"]) == 1
    assert_one_line(capsys, "is of model None: choose a checkpoint of resnet20q")
    assert run([*argv, "--model", "resnet20q", "--results-dir", tmp_path / "e"]) == 0


def test_other_classes_do_not_fit(trained, tmp_path, monkeypatch, capsys):
    tiny_data.cifar100(tmp_path / "data100", monkeypatch)
    assert run(["--evaluate", "--pretrain", trained, "--dataset", "cifar100", "--data-dir", tmp_path / "data100"]) == 1
    assert_one_line(capsys, "2 of another shape (fc.bias, fc.weight)")
