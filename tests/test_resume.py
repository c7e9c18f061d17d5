"""Going on: by --resume, by the same command, after a kill; and starting from other weights."""
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
from functools import partial

import numpy
import pytest
import torch
from runs import assert_one_line, assert_same, load, run, snapshot, tiny
from torchvision import transforms

import kill_runs
import tiny_data
import report
import train
from dataset.data import DATASETS, Transformed, get_dataset
from dataset.loader import fingerprint
from engine import run_folder
from engine.arguments import parse_flags
from engine.errors import UserError
from engine.resume import resolve
from engine.run_folder import read_metrics
from models import MODELS
from models.losses import NEXT_TARGET
from models.quan_ops import ActivationQ


@pytest.fixture
def copied(trained, tmp_path):
    """A finished run that a test may change."""
    return shutil.copytree(trained, tmp_path / "copied")


@pytest.fixture(scope="module")
def begun(tmp_path_factory, tiny_cifar10):
    """The results folder of a run that was stopped after 1 of 3 epochs. No test changes it."""
    folder = tmp_path_factory.mktemp("begun") / "r"
    assert run(tiny(tiny_cifar10, folder, "--epochs", 1)) == 0
    for path in (folder / "ckpt").iterdir():  # as if it had been stopped
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["arguments"]["epochs"] = 3
        torch.save(checkpoint, path)
    return folder


def assert_same_run(folder, other):
    """Assert that two runs ended alike: weights, optimizer, metrics, random states."""
    ours, theirs = load(folder), load(other)
    for part in ("epoch", "state_dict", "optimizer", "best_prec1", "random_states"):
        assert_same(ours[part], theirs[part])
    pairs = zip(read_metrics(folder / "metrics.jsonl"), read_metrics(other / "metrics.jsonl"),
                strict=True)
    for one, another in pairs:
        assert [one[part] for part in ("epoch", "lr", "train", "val")] == [
            another[part] for part in ("epoch", "lr", "train", "val")]


# ---- --resume

@pytest.mark.parametrize("optimizer", ["adam", "sgd", "adamw"])
def test_resume_continues_as_if_never_stopped(optimizer, trained, tmp_path, tiny_cifar10):
    flags, whole = ["--optimizer", optimizer], trained
    if optimizer == "adamw":
        flags += ["--weight-decay", 0.5]
    if optimizer != "adam":
        whole = tmp_path / "whole"
        assert run(tiny(tiny_cifar10, whole, *flags)) == 0
    assert run(tiny(tiny_cifar10, tmp_path / "parts", *flags, "--epochs", 1)) == 0
    assert run(["--resume", tmp_path / "parts", "--epochs", 3]) == 0
    assert_same_run(tmp_path / "parts", whole)
    log = next((tmp_path / "parts").glob("log_*.txt")).read_text()
    assert " 1/1 " in log and " 3/3 " in log  # continued, not begun anew


def stop_after(steps, monkeypatch, *numbers):
    """Let a run get SIGTERM, or these signals, in that step of it, counted from 1."""
    count, exchange_gradients = itertools.count(1), train.exchange_gradients

    def exchange(parameters):
        exchange_gradients(parameters)
        if next(count) == steps:
            for number in numbers or [signal.SIGTERM]:
                os.kill(os.getpid(), number)

    monkeypatch.setattr(train, "exchange_gradients", exchange)


def assert_resumes(argv, folder, monkeypatch):
    """Assert that a run of 9 steps ends alike where it is stopped after 5; return its folder."""
    assert run([*argv, "--results-dir", folder / "whole"]) == 0
    with monkeypatch.context() as stopping:
        stop_after(5, stopping)
        assert run([*argv, "--results-dir", folder / "parts"]) == 128 + signal.SIGTERM
    assert load(folder / "parts")["metrics"]["steps"] == 2
    assert run(["--resume", folder / "parts"]) == 0
    assert_same_run(folder / "parts", folder / "whole")
    return folder / "whole"


@pytest.mark.parametrize("numbers, launcher", [
    ([signal.SIGHUP, signal.SIGHUP], False),  # of the shell and of the kernel
    ([signal.SIGUSR1], False),
    ([signal.SIGTERM, signal.SIGTERM], True)])  # torchrun passes on what was sent to all
def test_signals_that_save_and_stop(numbers, launcher, tmp_path, tiny_cifar10, monkeypatch, capsys):
    if launcher:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    before = [signal.getsignal(number) for number in numbers]
    with monkeypatch.context() as stopping:
        stop_after(2, stopping, *numbers)
        assert run(tiny(tiny_cifar10, tmp_path / "r", "--epochs", 1)) == 128 + numbers[0]
    told = f"stopped by {numbers[0].name} in epoch 1, after step 2 of 3; to go on: "
    assert_one_line(capsys, told, f"--resume {tmp_path}/r")
    assert told in next((tmp_path / "r").glob("log_*.txt")).read_text()
    assert load(tmp_path / "r")["metrics"]["steps"] == 2
    assert [signal.getsignal(number) for number in numbers] == before


def test_a_run_under_nohup_ignores_sighup(tmp_path, tiny_cifar10, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop_after(2, monkeypatch, signal.SIGHUP)
    try:
        assert run(tiny(tiny_cifar10, tmp_path / "r", "--epochs", 1)) == 0
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_while_data_is_read(tmp_path, tiny_cifar10, monkeypatch, capsys):
    monkeypatch.setattr(train, "open_data", lambda args: os.kill(os.getpid(), signal.SIGINT))
    assert run(tiny(tiny_cifar10, tmp_path / "r")) == 130
    assert_one_line(capsys, ": interrupted\n")
    assert not (tmp_path / "r").exists()


def without_decay(argv):
    return [word for flag, word in zip([None, *argv], argv) if "--lr_decay" not in (flag, word)]


def test_a_cosine_resumes_in_step(tmp_path, tiny_cifar10, monkeypatch, capsys):
    argv = without_decay(tiny(tiny_cifar10, tmp_path))
    whole = assert_resumes([*argv, "--schedule", "cosine", "--optimizer", "adamw",
                            "--weight-decay", 0.1], tmp_path, monkeypatch)
    records = read_metrics(whole / "metrics.jsonl")
    assert [record["lr"] for record in records] == pytest.approx([0.001, 0.00075, 0.00025])
    assert load(whole)["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.00025)
    capsys.readouterr()
    assert run(["--resume", whole, "--epochs", 4]) == 2
    assert_one_line(capsys, "--epochs is 3, not 4")


def test_bit_widths_per_step_resume_in_an_epoch(tmp_path, tiny_cifar10, monkeypatch):
    argv = tiny(tiny_cifar10, tmp_path, "--bit_width_list", "1,2,4,32", "--widths-per-step", 3)
    seen = []
    choose = train.choose_bit_widths

    def watched(*args):
        seen.append(choose(*args))
        return seen[-1]

    monkeypatch.setattr(train, "choose_bit_widths", watched)
    assert_resumes(argv, tmp_path, monkeypatch)
    whole, parts = seen[:9], seen[9:]
    assert whole == parts and len({tuple(widths) for widths in whole}) > 1


def two_groups(lr=0.1, weight_decay=0.2, names=("bn",)):
    """Return a parameter_groups of BatchNorms by themselves; the others are without decay."""
    def parameter_groups(model, args):
        named = list(model.named_parameters())
        own = [value for name, value in named if any(part in name for part in names)]
        others = [value for name, value in named if not any(part in name for part in names)]
        return [{"params": others, "weight_decay": 0.0},
                {"params": own, "lr": lr, "weight_decay": weight_decay}]

    return parameter_groups


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_groups_keep_their_own_learning_rates_and_decays(optimizer, tmp_path, tiny_cifar10,
                                                         monkeypatch):
    monkeypatch.setattr(train, "parameter_groups", two_groups())
    argv = tiny(tiny_cifar10, tmp_path, "--weight-decay", 0.3, "--optimizer", optimizer)
    whole = assert_resumes(argv, tmp_path, monkeypatch)
    groups = load(whole)["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == pytest.approx([0.0001, 0.01])
    assert [group["weight_decay"] for group in groups] == [0.0, 0.2]
    lrs = [record["lr"] for record in read_metrics(whole / "metrics.jsonl")]
    assert lrs == pytest.approx([0.001, 0.001, 0.0001])


class Signs(torch.optim.Optimizer):
    """Of a researcher's own, as Lion: it has no `differentiable`, and keeps a number."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.001, "beta": 0.9})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    mean = state.setdefault("mean", torch.zeros_like(parameter))
                    state["exp_avg_sq"] = torch.ones(())
                    parameter.sub_(group["lr"] * mean.lerp(parameter.grad, 0.1).sign())
                    mean.lerp_(parameter.grad, 1 - group["beta"])


@pytest.mark.parametrize("make", [Signs, partial(torch.optim.Adam, amsgrad=True),
                                  torch.optim.Adafactor, torch.optim.RMSprop])
def test_another_optimizer_resumes(make, tmp_path, tiny_cifar10, monkeypatch):
    def make_optimizer(args, groups):
        optimizer = make(groups)
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        return optimizer

    monkeypatch.setattr(train, "make_optimizer", make_optimizer)
    assert_resumes(tiny(tiny_cifar10, tmp_path), tmp_path, monkeypatch)


class Wrapping(torch.optim.Optimizer):
    """Keeps its state in another optimizer, as implementations of SAM do."""

    def __init__(self, groups):
        super().__init__(groups, {"lr": 0.01})
        self.base = torch.optim.SGD(self.param_groups, 0.01, momentum=0.9)
        self.param_groups = self.base.param_groups

    def step(self):
        self.base.step()


def test_an_optimizer_whose_state_no_checkpoint_would_hold(tmp_path, tiny_cifar10, monkeypatch,
                                                           capsys):
    monkeypatch.setattr(train, "make_optimizer", lambda args, groups: Wrapping(groups))
    assert run(tiny(tiny_cifar10, tmp_path / "r")) == 1
    assert_one_line(capsys, "the optimizer Wrapping holds another one, base, and its state_dict")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("initial", [
    lambda: 1.0, lambda: torch.tensor([1.0, math.nan]), lambda: {"2": torch.ones(())},
    lambda: False, torch.Generator, lambda: numpy.ones(3), lambda: {"a": [1.0]},
    lambda: [torch.nn.Linear(1, 1)]],
    ids=["number", "tensor", "dict", "flag", "generator", "array", "nested", "hidden module"])
def test_attributes_that_no_checkpoint_holds_are_named(initial, tmp_path, tiny_cifar10,
                                                       monkeypatch):
    init, forward = ActivationQ.__init__, ActivationQ.forward

    def with_temperature(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.temperature = initial()

    def warming(self, x):
        if isinstance(self.temperature, numpy.ndarray):
            self.temperature += self.training  # in place
        elif isinstance(self.temperature, list):
            torch.nn.init.zeros_(self.temperature[0].weight)
        elif "a" in (self.temperature if isinstance(self.temperature, dict) else ""):
            self.temperature["a"][0] += self.training
        elif isinstance(self.temperature, dict):
            self.temperature["2"] = self.temperature["2"] + self.training
        elif isinstance(self.temperature, torch.Generator):
            torch.rand(1, generator=self.temperature)
        elif isinstance(self.temperature, bool):
            self.temperature = True
        else:
            self.temperature = self.temperature + self.training
        return forward(self, x)

    monkeypatch.setattr(ActivationQ, "__init__", with_temperature)
    notes = []
    for name in ("plain", "warming"):
        assert run(tiny(tiny_cifar10, tmp_path / name, "--epochs", 1)) == 0
        log, = (tmp_path / name).glob("log_*.txt")
        notes.append([line for line in log.read_text().splitlines() if "note: " in line])
        monkeypatch.setattr(ActivationQ, "forward", warming)
    assert not notes[0] and len(notes[1]) == 1
    line, = notes[1]
    assert re.search(r"note: training changed .*\.temperature[^ ]*, which no checkpoint", line)


class Annealed:
    """A target that depends on how often it was asked for."""

    def __init__(self):
        self.steps = 0

    def __call__(self, target, logits, labels):
        self.steps += 1
        one_hot = torch.nn.functional.one_hot(labels, logits.shape[1])
        return logits.softmax(1).lerp(one_hot.float(), 1 / self.steps)


class Slow(torch.optim.SGD):
    """Its steps get smaller, by a count that it keeps in an attribute, or in its groups."""

    in_groups = False

    def __init__(self, groups):
        super().__init__(groups, 0.1)
        self.count = 0
        for group in self.param_groups:
            group["initial_lr"] = group["lr"]
            group["k"] = torch.zeros(())  # changed in place

    def step(self, closure=None):
        self.count += not self.in_groups
        for group in self.param_groups:
            group["k"] += self.in_groups
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad /= 1 + self.count + group["k"]
        super().step(closure)


def test_state_of_an_optimizer_and_of_a_loss_that_no_checkpoint_holds_is_named(
        tmp_path, tiny_cifar10, monkeypatch, capsys):
    monkeypatch.setitem(NEXT_TARGET, "annealed", Annealed())
    monkeypatch.setattr(train, "make_optimizer", lambda args, groups: Slow(groups))
    assert run(tiny(tiny_cifar10, tmp_path / "r", "--epochs", 1, "--loss", "annealed")) == 0
    printed = capsys.readouterr().out.replace("\n   ", "")
    assert "note: training changed the loss's steps, the optimizer's count, which no" in printed


def test_an_optimizer_that_saves_all_that_it_holds_is_not_noted(
        tmp_path, tiny_cifar10, monkeypatch, capsys):
    class Saving(Slow):
        def state_dict(self):
            return {**super().state_dict(), "count": self.count}

        def load_state_dict(self, state):
            super().load_state_dict(state)
            self.count = state["count"]

    class Holding(torch.optim.SGD):
        def __init__(self, groups):
            super().__init__(groups, 0.01)
            self.every = [parameter for group in self.param_groups for parameter in group["params"]]
            for group in self.param_groups:
                group["initial_lr"] = group["lr"]

    for kind in (Holding, Saving):
        monkeypatch.setattr(train, "make_optimizer", lambda args, groups, kind=kind: kind(groups))
        assert run(tiny(tiny_cifar10, tmp_path / kind.__name__, "--epochs", 1)) == 0
    assert "note: training changed" not in capsys.readouterr().out


def test_an_optimizer_with_state_in_its_groups_resumes(tmp_path, tiny_cifar10, monkeypatch, capsys):
    monkeypatch.setattr(Slow, "in_groups", True)
    monkeypatch.setattr(train, "make_optimizer", lambda args, groups: Slow(groups))
    assert_resumes(tiny(tiny_cifar10, tmp_path), tmp_path, monkeypatch)
    assert load(tmp_path / "whole")["group_state"] == ["k"]
    monkeypatch.setattr(Slow, "in_groups", False)
    capsys.readouterr()
    changed = load(tmp_path / "whole")
    changed["group_state"] = [3]
    torch.save(changed, tmp_path / "whole" / "ckpt" / "model_latest.pth.tar")
    assert run(["--resume", tmp_path / "whole", "--epochs", 4]) == 1
    assert_one_line(capsys, "its group_state is [3], not a list of names")


def test_a_buffer_that_no_checkpoint_holds_is_named(tmp_path, tiny_cifar10, monkeypatch, capsys):
    init, forward = ActivationQ.__init__, ActivationQ.forward

    def with_mean(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.register_buffer("mean", torch.zeros(()), persistent=False)

    def averaging(self, x):
        self.mean += 1
        return forward(self, x)

    monkeypatch.setattr(ActivationQ, "__init__", with_mean)
    monkeypatch.setattr(ActivationQ, "forward", averaging)
    assert run(tiny(tiny_cifar10, tmp_path / "r", "--epochs", 1)) == 0
    assert re.search(r"note: training changed .*\bmean, .* which no", capsys.readouterr().out)


def test_groups_that_are_not_of_the_network(tmp_path, tiny_cifar10, monkeypatch, capsys):
    groups = train.parameter_groups
    monkeypatch.setattr(train, "parameter_groups", lambda model, args: [
        {"params": [value for name, value in model.named_parameters() if "conv0" not in name]}])
    argv = tiny(tiny_cifar10, tmp_path / "r")
    assert run(argv) == 1
    assert_one_line(capsys, "parameter_groups in engine/setup.py leaves out conv0.weight")
    monkeypatch.setattr(train, "parameter_groups", lambda model, args: [
        *groups(model, args), {"params": [torch.nn.Parameter(torch.ones(1))]}])
    assert run(argv) == 1
    assert_one_line(capsys, "parameter_groups in engine/setup.py has a parameter that is not of")


def test_parameters_of_quantizers_have_a_group_of_their_own(tmp_path, tiny_cifar10):
    argv = tiny(tiny_cifar10, tmp_path, "--quantizer", "lsq", "--weight-decay", 0.3, "--epochs", 1)
    assert run(argv) == 0
    content = load(tmp_path)
    groups = content["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [0.3, 0]
    assert [group["lr"] for group in groups] == pytest.approx([0.001, 0.01])  # lsq's lr_factor
    ranges = {name for name in content["state_dict"] if ".log_range_dict." in name}
    assert ranges and set(groups[1]["param_names"]) == ranges


def two_groups_in_another_order(model, args):
    groups = two_groups()(model, args)
    groups[0]["params"].reverse()
    return groups


@pytest.mark.parametrize("groups, told", [
    (two_groups(weight_decay=0.5), "group 1: weight_decay was 0.2 and is now 0.5"),
    (two_groups(lr=0.5), "group 1: initial_lr was 0.1 and is now 0.5"),
    (two_groups(names=("fc",)), "group 0: parameters were "),
    (two_groups_in_another_order, "group 0: parameter 0 was conv0.weight and is now fc.bias"),
    (lambda model, args: [{"params": list(model.parameters())}],
     "parameter groups were 2 and are now 1")])
def test_other_groups_than_were_saved_are_refused(groups, told, tmp_path, tiny_cifar10,
                                                  monkeypatch, capsys):
    with monkeypatch.context() as saving:
        saving.setattr(train, "parameter_groups", two_groups())
        assert run(tiny(tiny_cifar10, tmp_path / "r", "--epochs", 1)) == 0
    monkeypatch.setattr(train, "parameter_groups", groups)
    capsys.readouterr()
    assert run(["--resume", tmp_path / "r", "--epochs", 2]) == 1
    assert_one_line(capsys, "holds another optimizer's state", told, "parameter_groups")


@pytest.mark.parametrize("flags, told", [
    (["--loss", "hard"], "--loss is recursive, not hard"),
    (["--seed", "4"], "--seed is 0, not 4"),
    (["--bit_width_list", "2"], "--bit-width-list is 2,32, not 2"),
    (["--model", "resnet50q"], "--model is resnet4q, not resnet50q"),
    (["--optimizer", "sgd"], "--optimizer is adam, not sgd"),
    (["--batch-size", "4"], "--batch-size is 8"),
    (["--dataset", "cifar100"], "--dataset is cifar10, not cifar100"),
    (["--lr", "0.1"], "--lr is 0.001"),
    (["--precision", "bf16"], "--precision is fp32, not bf16"),
    (["--lr_decay", "1"], "--lr-decay is 2, not 1"),
    (["--schedule", "cosine"], "--schedule is step, not cosine"),
    (["--widths-per-step", "2"], "--widths-per-step is None, not 2"),
    (["--weight-decay", "0.5"], "--weight-decay is 0.0")])
def test_resume_with_other_flags_is_refused(flags, told, trained, capsys):
    assert run(["--resume", trained, *flags]) == 2
    assert_one_line(capsys, "cannot change on resume: ", told, "leave that out")


def test_a_run_keeps_its_own_precision_whatever_the_default_would_be(copied, tiny_cifar10):
    path = copied / "ckpt" / "model_latest.pth.tar"
    content = load(copied)
    assert content["arguments"]["precision"] == "fp32"  # not auto
    torch.save({**content, "arguments": {**content["arguments"], "precision": "tf32"}}, path)
    command = [str(word) for word in tiny(tiny_cifar10, copied)]
    for argv in (["--resume", str(copied)], ["--resume", str(copied), "--precision", "auto"],
                 command, [*command, "--precision", "auto"]):
        args, _ = resolve(parse_flags(argv))
        assert args.precision == "tf32", argv
    with pytest.raises(UserError, match="--precision is tf32, not fp32"):
        resolve(parse_flags([*command, "--precision", "fp32"]))
    evaluated, _ = resolve(parse_flags(["--evaluate", "--resume", str(copied)]))
    assert evaluated.precision == "auto"  # a CPU's is fp32


def test_resume_of_a_finished_run_tells_its_results_again(copied, monkeypatch, capsys):
    before = load(copied)
    config = (copied / "config.json").read_bytes()
    (copied / "accuracy.png").unlink()
    monkeypatch.setattr(run_folder, "commit", lambda: "0000000")
    assert run(["--resume", copied]) == 0
    assert (copied / "config.json").read_bytes() == config  # of the code that trained
    out = capsys.readouterr().out
    assert "last (epoch 3)" in out and "nothing is left to train" in out
    assert (copied / "accuracy.png").exists()
    assert_same(load(copied), before)


def test_resume_from_an_older_checkpoint_goes_on_elsewhere(copied, begun, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    older = copied / "ckpt" / "model_best.pth.tar"
    shutil.copy(begun / "ckpt" / "model_latest.pth.tar", older)
    before = snapshot(copied)
    assert run(["--resume", older, "--epochs", 4]) == 0
    assert snapshot(copied) == before
    (elsewhere,) = (tmp_path / "results").iterdir()
    assert load(elsewhere)["epoch"] == 4 and load(elsewhere, "model_best")["state_dict"]


def test_resume_of_nothing(tmp_path, capsys):
    assert run(["--resume", tmp_path / "no"]) == 1
    assert_one_line(capsys, f"checkpoint {tmp_path}/no does not exist")
    assert run(["--resume", tmp_path]) == 1
    assert_one_line(capsys, "holds no checkpoint", "model_latest.pth.tar, model_best.pth.tar")


def test_memory_formats_of_a_checkpoint_do_not_matter(begun, tmp_path):
    """Fused optimizers take their state and the weights as they lie in memory: they must agree."""
    folders = [shutil.copytree(begun, tmp_path / name) for name in ("as it was", "channels last")]
    state = load(folders[1])
    for values in state["optimizer"]["state"].values():
        values.update({name: value.clone(memory_format=torch.channels_last)
                       for name, value in values.items() if value.dim() == 4})
    torch.save(state, folders[1] / "ckpt" / "model_latest.pth.tar")
    assert run(["--resume", folders[0]]) == 0
    assert run(["--resume", folders[1], "--results-dir", folders[1]]) == 0
    assert_same(load(folders[0])["state_dict"], load(folders[1])["state_dict"])


def test_a_published_checkpoint_resumed_with_another_optimizer(trained, tmp_path, tiny_cifar10,
                                                               capsys):
    parameters = MODELS["resnet4q"]([2, 32], width=1).parameters()
    sgd = torch.optim.SGD(parameters, 0.1, momentum=0.9)
    checkpoint = {key: load(trained)[key] for key in ("epoch", "model", "state_dict", "best_prec1")}
    torch.save({**checkpoint, "optimizer": sgd.state_dict()}, tmp_path / "x.pth.tar")
    argv = ["--resume", tmp_path / "x.pth.tar", "--epochs", 4, "--width", 1, "--data-dir",
            tiny_cifar10, "--results-dir", tmp_path / "r"]
    assert run(argv) == 2
    assert_one_line(capsys, "does not say how it was trained: give --train-split, --loss, "
                            "--batch-size, --optimizer, --lr, --lr-decay, --weight-decay")
    argv += ["--train-split", "train", "--loss", "recursive", "--batch-size", 8, "--lr", 0.001,
             "--lr-decay", "", "--weight-decay", 0]
    assert run([*argv, "--optimizer", "adam"]) == 1
    assert_one_line(capsys, "holds another optimizer's state", "--optimizer")
    assert run([*argv, "--optimizer", "sgd"]) == 0


@pytest.mark.parametrize("changes, code, told", [
    ({"optimizer": None}, 1, "holds no optimizer to go on with"),
    ({"epoch": None}, 1, "holds no epoch"),
    ({"epoch": "3"}, 1, "its epoch is '3'"),
    ({"epoch": -3}, 1, "its epoch is -3"),
    ({"optimizer": {"state": {}, "param_groups": []}}, 1, "holds another optimizer's state"),
    ({"arguments": {"precision": "fp16"}}, 2, "--precision fp16 does not exist: choose from fp32")])
def test_what_cannot_be_resumed(changes, code, told, trained, tmp_path, capsys):
    checkpoint = load(trained)
    if "arguments" in changes:
        changes = {"arguments": {**checkpoint["arguments"], **changes["arguments"]}}
    torch.save({**checkpoint, **changes}, tmp_path / "x.pth.tar")
    assert run(["--resume", tmp_path / "x.pth.tar", "--epochs", 9]) == code
    assert_one_line(capsys, told)


def test_a_checkpoint_of_an_older_version_goes_on(begun, trained, tmp_path, capsys):
    """One that knows of arguments and parts which there were, and not of one that came later."""
    folder = shutil.copytree(begun, tmp_path / "r")
    checkpoint = load(folder)
    older = {"plain": False, "resume": str(folder), "start_epoch": 1}
    arguments = {**checkpoint["arguments"], **older}
    for name in ("sync_bn", "schedule", "widths_per_step"):
        del arguments[name]
    del checkpoint["data"]
    (group,) = checkpoint["optimizer"]["param_groups"]
    for name in ("initial_lr", "param_names"):
        del group[name]
    del checkpoint["metrics"]["counts"]
    torch.save({**checkpoint, "scaler": {}, "arguments": arguments},
               folder / "ckpt" / "model_latest.pth.tar")
    assert run(["--resume", folder, "--schedule", "cosine"]) == 2
    assert_one_line(capsys, "--schedule is step, not cosine")
    assert run(["--resume", folder]) == 0
    assert_same_run(folder, trained)


def test_steps_of_an_epoch_are_counted(tmp_path, tiny_cifar10, monkeypatch, capsys):
    with monkeypatch.context() as stopping:
        stop_after(5, stopping)
        assert run(tiny(tiny_cifar10, tmp_path / "r")) == 128 + signal.SIGTERM
    capsys.readouterr()
    assert run(["--resume", tmp_path / "r"]) == 0
    done = f"resuming: 1 of 3 epochs and 2 of 3 steps done, in {tmp_path}/r\n"
    assert done in capsys.readouterr().out


# ---- other data

@pytest.fixture
def change_data(monkeypatch):
    """Return the function that changes cifar10's data, once they are read, until the test ends."""
    def change(function):
        row = DATASETS["cifar10"]

        def opened(root, split):
            dataset = row.open(root, split)
            function(dataset)
            return dataset

        monkeypatch.setitem(DATASETS, "cifar10", row._replace(open=opened, shapes={}))

    return change


def another_pixel(index):
    def change(dataset):
        dataset.data[index if index < len(dataset) else 0, 3, 4, 1] ^= 1

    return change


def another_label(dataset):
    dataset.targets[0] = 7


def fewer(dataset):
    dataset.data = dataset.data[:-1]
    dataset.targets = dataset.targets[:-1]


@pytest.fixture(scope="module")
def midway(tmp_path_factory, tiny_cifar10):
    """The results folder of a run that was stopped within its second epoch. No test changes it."""
    folder = tmp_path_factory.mktemp("midway") / "r"
    with pytest.MonkeyPatch.context() as stopping:
        stop_after(5, stopping)
        assert run(tiny(tiny_cifar10, folder)) == 128 + signal.SIGTERM
    return folder


@pytest.mark.parametrize("when", ["begun", "midway"])
@pytest.mark.parametrize("change, message", [
    (another_pixel(0), "its first image differs, its first image to validate on"),
    (another_pixel(10), "its middle image differs, its"),
    (another_pixel(19), "its last image differs, its"),
    (another_label, "its list of labels differs, its first label was 0 and is 7, "),
    (fewer, "its number of images was 20 and is 19, ")])
def test_other_data_are_refused(when, change, message, change_data, request, capsys):
    folder = request.getfixturevalue(when)
    before = snapshot(folder)
    change_data(change)
    capsys.readouterr()
    assert run(["--resume", folder]) == 1
    assert_one_line(capsys, "model_latest.pth.tar was trained on other data: ", message,
                    "resume on the same data, or start a new run from it with --pretrain")
    assert snapshot(folder) == before


def test_other_classes_are_refused(tmp_path, capsys):
    tiny_data.imagenet(tmp_path, classes=("cat", "dog"))
    for split in ("train", "val"):  # otherwise the same
        shutil.copytree(tmp_path / "imagenet" / split, tmp_path / "other" / "imagenet" / split)
        (tmp_path / "other" / "imagenet" / split / "cat").rename(
            tmp_path / "other" / "imagenet" / split / "cow")
    assert run(["--dataset", "imagenet", "--data-dir", tmp_path, "--model", "bottlenecks",
                "--width", 1, "--bit_width_list", 2, "--epochs", 1, "--batch-size", 4,
                "--workers", 0, "--device", "cpu", "--results-dir", tmp_path / "r"]) == 0
    capsys.readouterr()
    resume = ["--resume", tmp_path / "r", "--epochs", 2, "--data-dir", tmp_path / "other"]
    assert run(resume) == 1
    assert_one_line(capsys, "imagenet does not have the 2 class folders that", "model_latest.pth",
                    "it lacks cat and has besides cow")


def test_a_fingerprint_is_of_the_data_alone(tmp_path, tiny_cifar10):
    dataset = get_dataset("cifar10", "train", data_dir=tiny_cifar10)
    found = fingerprint(dataset)
    assert found["number of images"] == 20
    assert found["middle label"] == dataset[10][1] and found["last label"] == dataset[19][1]
    assert len({found[f"{place} image"] for place in ("first", "middle", "last")}) == 3
    assert fingerprint(list(dataset)) == found  # whatever holds the samples
    flips = transforms.RandomHorizontalFlip()
    assert len({dataset[0][0].tobytes(), *(flips(dataset[0][0]).tobytes() for _ in range(50))}) == 2
    row_s_own = [fingerprint(Transformed(dataset, flips)) for _ in range(10)]
    assert all(again == row_s_own[0] for again in row_s_own)


# ---- the same command again

def test_the_same_command_goes_on_from_the_latest_checkpoint(begun, trained, tmp_path,
                                                            tiny_cifar10, capsys):
    folder = shutil.copytree(begun, tmp_path / "r")
    assert run(tiny(tiny_cifar10, folder, "--print-freq", 1, "--device", "auto")) == 0
    assert f"resuming: 1 of 3 epochs done, in {folder}" in capsys.readouterr().out
    assert_same_run(folder, trained)

    before = load(folder)  # and of a finished run it tells the results again
    assert run(tiny(tiny_cifar10, folder)) == 0
    assert "nothing is left to train" in capsys.readouterr().out
    assert_same(load(folder), before)
    assert run(["--resume", folder, "--epochs", 4]) == 0 and load(folder)["epoch"] == 4
    assert run([*tiny(tiny_cifar10, folder), "--epochs", 4]) == 0


def test_the_same_command_with_more_epochs_lengthens_the_run(copied, tiny_cifar10, tmp_path):
    other = shutil.copytree(copied, tmp_path / "other")
    assert run([*tiny(tiny_cifar10, copied), "--epochs", 4]) == 0
    assert run(["--resume", other, "--epochs", 4]) == 0
    assert load(copied)["epoch"] == 4
    assert_same_run(copied, other)


def test_a_cosine_is_not_lengthened_by_its_command(tmp_path, tiny_cifar10, capsys):
    argv = [*tiny(tiny_cifar10, tmp_path / "r"), "--schedule", "cosine"]
    assert run([*argv, "--epochs", 1]) == 0
    capsys.readouterr()
    assert run([*argv, "--epochs", 2]) == 1
    assert_one_line(capsys, "cannot change on resume: --epochs is 1, not 2")
    assert run([*argv, "--epochs", 1]) == 0


def test_a_run_remembers_its_first_command(copied, monkeypatch):
    def config():
        return json.loads((copied / "config.json").read_text())

    first = config()["command"]
    assert "first_command" not in config()
    for epochs in (4, 5):
        command = ["train.py", "--resume", str(copied), "--epochs", str(epochs)]
        monkeypatch.setattr(sys, "argv", command)
        assert run(command[1:]) == 0
        assert config()["first_command"] == first != config()["command"] == command
        assert config()["arguments"]["epochs"] == epochs
        assert "earlier" not in config()  # nothing else changed


def test_a_run_remembers_the_code_of_its_first_part(copied, monkeypatch, capsys):
    config = copied / "config.json"
    before = json.loads(config.read_text())
    monkeypatch.setattr(run_folder, "commit", lambda: "other")
    assert run(["--resume", copied, "--epochs", 4]) == 0
    after = json.loads(config.read_text())
    assert after["commit"] == "other"
    assert [part["commit"] for part in after["earlier"]] == [before["commit"]]
    assert f"note: the code was {before['commit']} and is other" in capsys.readouterr().out
    assert report.load_run(copied).commit == f"{before['commit']}, then other"


def test_the_command_of_a_run_that_never_was_is_forgotten(tmp_path, tiny_cifar10):
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.json").write_text(json.dumps({"command": ["other"], "commit": "x"}))
    assert run(tiny(tiny_cifar10, tmp_path / "r", "--epochs", 1)) == 0
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert "first_command" not in config and "earlier" not in config


def test_another_run_that_saves_while_this_one_begins(copied, monkeypatch, capsys):
    """As where a scheduler starts a run again while its first part is being stopped."""
    def slow(*args):
        found = make_run(*args)
        path = copied / "ckpt" / "model_latest.pth.tar"
        shutil.copy(path, path.with_name("new"))
        path.with_name("new").replace(path)
        return found

    make_run = train.make_run
    monkeypatch.setattr(train, "make_run", slow)
    before = (copied / "metrics.jsonl").read_bytes()
    assert run(["--resume", copied, "--epochs", 4]) == 1
    assert_one_line(capsys, "model_latest.pth.tar was written by another run while this one began")
    assert (copied / "metrics.jsonl").read_bytes() == before
    monkeypatch.setattr(train, "make_run", make_run)
    assert run(["--resume", copied, "--epochs", 4]) == 0


def test_metrics_that_lack_an_epoch(copied, capsys):
    file = copied / "metrics.jsonl"
    first, _, last = file.read_text().splitlines(keepends=True)
    file.write_text(first + last)
    assert run(["--resume", copied, "--epochs", 4]) == 1
    assert_one_line(capsys, f"{file} lacks epoch 2: bring it back", "--results-dir ANOTHER")
    assert file.read_text() == first + last


def test_metrics_of_epochs_that_are_trained_again_are_dropped_aloud(copied, capsys):
    (copied / "ckpt" / "model_latest.pth.tar").unlink()
    content = load(copied, "model_best")
    content["epoch"] = 2
    torch.save(content, copied / "ckpt" / "model_best.pth.tar")
    assert run(["--resume", copied, "--epochs", 3]) == 0
    assert "epoch 3 and what follows is trained again: dropped from metrics" in (
        capsys.readouterr().out)


def test_a_link_to_the_checkpoints_is_of_the_same_run(copied, tmp_path):
    shutil.move(copied / "ckpt", tmp_path / "disk")
    (copied / "ckpt").symlink_to(tmp_path / "disk")
    assert run(["--resume", copied, "--results-dir", copied, "--epochs", 4]) == 0
    assert load(copied)["epoch"] == 4


def test_a_run_goes_on_from_within_its_folder(copied, monkeypatch):
    monkeypatch.chdir(copied / "ckpt")
    assert run(["--resume", "model_latest.pth.tar", "--epochs", 4]) == 0
    assert load(copied)["epoch"] == 4


def test_several_processes_are_in_the_command_to_go_on(monkeypatch, tmp_path):
    with run_folder.RunFolder(tmp_path, "r") as folder:
        monkeypatch.setattr(run_folder, "world_size", lambda: 2)
        assert folder.command_to_resume().startswith("torchrun --standalone --nproc-per-node 2 ")


def test_numbers_of_python_and_numpy_are_seeded_and_saved(tmp_path, tiny_cifar10, monkeypatch):
    forward = ActivationQ.forward

    def noisy(self, x):
        return forward(self, x + self.training * (random.random() + numpy.random.rand()) / 10)

    monkeypatch.setattr(ActivationQ, "forward", noisy)
    random.seed(5)
    whole = assert_resumes(tiny(tiny_cifar10, tmp_path), tmp_path, monkeypatch)
    random.seed(6)
    assert run(tiny(tiny_cifar10, tmp_path / "again")) == 0
    assert_same_run(tmp_path / "again", whole)


def test_metrics_that_lack_the_best_epoch(copied, tmp_path, capsys):
    """Else a later epoch would be called the best, whose checkpoint is of another one."""
    file = copied / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    content = load(copied)
    content["best"] = [99.0, 99.0]  # of the first epoch
    record = json.loads(lines[0])
    for values in record["val"].values():
        values["top1"] = 99.0
    torch.save(content, copied / "ckpt" / "model_latest.pth.tar")
    file.write_text("".join([json.dumps(record) + "\n", *lines[1:]]))
    assert run(["--resume", copied, "--epochs", 3]) == 0
    assert "best checkpoint (epoch 1)" in capsys.readouterr().out
    file.write_text("".join(lines[1:]))
    assert run(["--resume", copied, "--epochs", 4]) == 1
    assert_one_line(capsys, f"{file} lacks the best epoch", "--results-dir ANOTHER")
    assert run(["--resume", copied, "--epochs", 4, "--results-dir", tmp_path / "another"]) == 0


def test_fewer_epochs_than_are_done(copied, capsys):
    config = (copied / "config.json").read_bytes()
    assert run(["--resume", copied, "--epochs", 1]) == 2
    assert_one_line(capsys, "--epochs 1 is less than the 3 epochs", "give at least 3")
    assert (copied / "config.json").read_bytes() == config


def test_a_resumed_run_does_not_begin_at_another_epoch(copied, capsys):
    assert run(["--resume", copied, "--start-epoch", 1]) == 2
    assert_one_line(capsys, "cannot change on resume: --start-epoch is 0, not 1")


@pytest.mark.parametrize("flags, told", [
    (["--seed", 5], "--seed is 0, not 5"),
    (["--epochs", 9, "--seed", 5], "resume: --seed is 0, not 5: "),  # --epochs may grow
    (["--lr", 0.1, "--all-conv"], "--all-conv is False, not True; --lr is 0.001"),
    (["--pretrain", "x"], "--pretrain is None, not x"),
    (["--resume", "x"], "--resume is None, not x")])
@pytest.mark.parametrize("folder", ["begun", "trained"])
def test_another_command_in_a_run_s_folder_is_refused(folder, flags, told, request, tiny_cifar10,
                                                      capsys):
    folder = request.getfixturevalue(folder)
    before = snapshot(folder)
    assert run([*tiny(tiny_cifar10, folder), *flags]) == 1
    assert_one_line(capsys, f"{folder} holds a run already: cannot change on resume: ", told,
                    f"--resume {folder}", "choose another folder with --results-dir")
    assert snapshot(folder) == before


def test_a_run_s_own_best_checkpoint_is_another_command(begun, capsys):
    before = snapshot(begun)
    best = begun / "ckpt" / "model_best.pth.tar"
    assert run(["--resume", best, "--results-dir", begun]) == 1
    assert_one_line(capsys, f"{begun} holds a run already", f"--resume is None, not {best}")
    assert snapshot(begun) == before


def test_a_run_begun_from_an_older_checkpoint_goes_on_by_its_command(trained, tmp_path, capsys):
    """The same command leaves the older checkpoint alone, once its folder has one of its own."""
    best = shutil.copy(trained / "ckpt" / "model_best.pth.tar", tmp_path / "older.pth.tar")
    command = ["--resume", best, "--results-dir", tmp_path / "new", "--epochs", 4]
    assert run(command) == 0
    first = load(tmp_path / "new")
    assert first["epoch"] == 4
    for other, told in ((["--seed", 1], "--seed is 0, not 1"),
                        (["--resume", trained], f"--resume is {best}, not {trained}")):
        capsys.readouterr()
        assert run([*command, *other]) == 1
        assert_one_line(
            capsys, f"{tmp_path}/new holds a run already: cannot change on resume: {told}")
    best.unlink()
    assert run(command) == 0
    done = f"4 of 4 epochs done, in {tmp_path}/new; nothing is left to train"
    assert done in capsys.readouterr().out
    assert_same(load(tmp_path / "new"), first)
    assert run(["--resume", tmp_path / "new", "--epochs", 5]) == 0  # lengthened, it is still it
    assert run([*command, "--epochs", 5]) == 0 and load(tmp_path / "new")["epoch"] == 5


# ---- --pretrain

def test_pretrain_starts_from_those_weights_prefixed_or_not(trained, tmp_path, tiny_cifar10):
    checkpoint = load(trained, "model_best")
    prefixed = {f"module.{key}": value for key, value in checkpoint["state_dict"].items()}
    torch.save({"state_dict": prefixed}, tmp_path / "parallel.pth.tar")
    after = []
    for index, source in enumerate((trained, tmp_path / "parallel.pth.tar")):
        # By a learning rate below float32's resolution, weights are saved as they were loaded.
        assert run(tiny(tiny_cifar10, tmp_path / f"next{index}", "--epochs", 1, "--lr", "1e-30",
                        "--pretrain", source)) == 0
        after.append(load(tmp_path / f"next{index}")["state_dict"])
    assert_same(*after)
    for key, value in checkpoint["state_dict"].items():
        if "running" not in key and "tracked" not in key:
            assert_same(after[0][key], value)


def test_pretrain_with_other_bit_widths_says_what_it_initialized(trained, tmp_path, tiny_cifar10,
                                                                 capsys):
    argv = tiny(tiny_cifar10, tmp_path / "r", "--epochs", 1, "--lr", "1e-30", "--pretrain", trained)
    assert run([*argv, "--bit_width_list", "4,8,32"]) == 0
    assert "BatchNorms 4-bit from 2-bit, 8-bit from 2-bit\n" in capsys.readouterr().out
    before, after = load(trained, "model_best")["state_dict"], load(tmp_path / "r")["state_dict"]
    assert_same(after["bn.bn_dict.4.weight"], before["bn.bn_dict.2.weight"])
    assert_same(after["layers.0.conv0.weight"], before["layers.0.conv0.weight"])

    assert run(["--resume", tmp_path / "r", "--epochs", 2]) == 0  # which remembers it
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config["arguments"]["pretrain"] == str(trained)


# ---- stopped and killed runs

def test_runs_that_are_killed_go_on_to_the_same_end(forks):
    """python tests/kill_runs.py --kills 20 --signal KILL (or TERM, INT) is the longer trial."""
    done = forks.run(kill_runs.main, ["--signal", "KILL", "TERM", "INT", "--kills", "9"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "9 of 9 identical" in done.stdout
