"""Checkpoints: written whole, read as data, restored where each field is what it must be."""
import copy
import errno
import math
import os
import pickle
from argparse import Namespace

import pytest
import torch
from runs import assert_same, load

from engine.arguments import merge_args
from engine.errors import UserError
from engine.setup import make_optimizer
from engine.state import TrainingState, copies
from models import MODELS, BitWidth
from models.checkpoint import read_checkpoint, save_checkpoint
from models.fields import FileError
from utils import WriteError


def test_a_full_disk_keeps_the_old_checkpoint_and_says_so(tmp_path, monkeypatch):
    path = tmp_path / "model_latest.pth.tar"
    save_checkpoint(path, {"epoch": 1})

    def full(state, target):
        target.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    told = "cannot be written .*No space left.* what was saved before is kept"
    with pytest.raises(WriteError, match=told):
        save_checkpoint(path, {"epoch": 2})
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    assert os.listdir(tmp_path) == [path.name]


class Malice:
    def __reduce__(self):
        return os.mkdir, ("harm",)


@pytest.mark.parametrize("content", [
    b"", b"<!DOCTYPE html><html>404</html>", b"PK\x03\x04 cut short", pickle.dumps(Malice()),
    "malice in a checkpoint", "cut short"])
def test_what_is_not_a_checkpoint_is_one_line_and_runs_nothing(content, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model_best.pth.tar"
    if content == "malice in a checkpoint":
        torch.save({"state_dict": {}, "extra": Malice()}, path)
    elif content == "cut short":
        torch.save({"state_dict": {"weight": torch.zeros(1000)}}, path)
        path.write_bytes(path.read_bytes()[:-500])
    else:
        path.write_bytes(content)
    told = "model_best.pth.tar is not a checkpoint that can be read safely"
    with pytest.raises(FileError, match=told) as error:
        read_checkpoint(path)
    assert "\n" not in str(error.value) and not (tmp_path / "harm").exists()


@pytest.mark.parametrize("content", [[1, 2], {"weights": {}}, {"state_dict": 5}])
def test_a_file_without_weights_is_not_a_checkpoint(content, tmp_path):
    torch.save(content, tmp_path / "x.pth.tar")
    with pytest.raises(FileError, match="must be a dict with a state_dict"):
        read_checkpoint(tmp_path / "x.pth.tar")


def test_tensors_copied_together_are_the_same_apart():
    model = MODELS["resnet4q"]([2, 32], 10, 1).to(memory_format=torch.channels_last)
    tensors = [*model.parameters(), torch.tensor(3.0), torch.zeros(0)]
    copied = copies(tensors)
    assert_same(copied, [tensor.detach() for tensor in tensors])
    for value in copied:
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size()
    copied[0].zero_()
    assert tensors[0].any()


# ---- what a run takes from a checkpoint

@pytest.fixture(scope="module")
def state():
    """A run of resnet4q, 20 images and 8 a step, that has done nothing yet."""
    arguments = vars(merge_args(Namespace(model="resnet4q", dataset="cifar10", width=1,
                                          bit_width_list=[2, 32], batch_size=8,
                                          epochs=3, lr_decay=[2])))
    model = MODELS["resnet4q"]([2, 32], 10, 1)
    optimizer = make_optimizer(Namespace(**arguments), model.parameters())
    return TrainingState(model, optimizer, [BitWidth(2), BitWidth(32)], torch.device("cpu"),
                         arguments, 20)


@pytest.fixture
def content(trained):
    return load(trained)


def first_step(content):
    """Change the metrics to those after one step."""
    metrics = content["metrics"]
    metrics.update(steps=1, count=8, counts=[8, 8], seconds=1.0)
    metrics["sums"] = torch.ones(2, 3, dtype=torch.float64)
    return metrics


def kept(content):
    return content["optimizer"]["state"][0]


def group(content):
    return content["optimizer"]["param_groups"][0]


def test_a_whole_checkpoint_is_restored(state, content):
    first_step(content)
    state.restore("x", content)
    assert (state.epoch, state.metrics.steps, state.metrics.count) == (3, 1, 8)
    assert_same(state.optimizer.state_dict()["state"], content["optimizer"]["state"])
    assert_same(torch.get_rng_state(), content["random_states"][0]["torch"])


ESCAPE = "\x1b[31m"
FIELDS = {
    "its epoch is -3": lambda c: c.update(epoch=-3),
    "its epoch is '3'": lambda c: c.update(epoch="3"),
    "lacks its best_prec1": lambda c: c.pop("best_prec1"),
    "its best_prec1 is '9'": lambda c: c.update(best_prec1="9"),
    "its best_prec1 is nan": lambda c: c.update(best_prec1=math.nan),
    "its best is [1.0]": lambda c: c.update(best=[1.0]),
    "its best is {}": lambda c: c.update(best={}),
    "its data is [1]": lambda c: c.update(data=[1]),
    "its num_samples is 0": lambda c: c.update(num_samples=0),
    "lacks its num_samples": lambda c: c.pop("num_samples"),
    "lacks its metrics": lambda c: c.pop("metrics"),
    "its metrics is [1]": lambda c: c.update(metrics=[1]),
    "lacks its metrics' sums": lambda c: c["metrics"].pop("sums"),
    "its metrics' steps is '1'": lambda c: first_step(c).update(steps="1"),
    "its metrics' steps is tensor([1., 1.])": lambda c: first_step(c).update(steps=torch.ones(2)),
    "its metrics' steps is 4, not a number of steps up to the 3": lambda c: first_step(c).update(
        steps=4),
    "its metrics' count is 9, not the 8 images of 1 steps": lambda c: first_step(c).update(count=9),
    "its metrics' counts is [8]": lambda c: first_step(c).update(counts=[8]),
    "its metrics' counts is [8, 99]": lambda c: first_step(c).update(counts=[8, 99]),
    "its metrics' seconds is None": lambda c: first_step(c).update(seconds=None),
    "its metrics' sums is tensor([1.])": lambda c: first_step(c).update(sums=torch.ones(1)),
    "its metrics' sums is tensor([[nan": lambda c: first_step(c)["sums"].fill_(math.nan),
    "its random_states is []": lambda c: c.update(random_states=[]),
    "its random_states is [3]": lambda c: c.update(random_states=[3]),
    "its random_states are not valid": lambda c: c["random_states"][0].update(torch=torch.zeros(3)),
    "lacks its optimizer's state": lambda c: c["optimizer"].pop("state"),
    "its optimizer's state is [1]": lambda c: c["optimizer"].update(state=[1]),
    "its optimizer's param_groups is 5": lambda c: c["optimizer"].update(param_groups=5),
    "its optimizer's param_groups is [{": lambda c: group(c).update(params=[0, 0]),
    "its optimizer's state of conv0.weight, exp_avg is tensor": lambda c: kept(c).update(
        exp_avg=torch.ones(3)),
    "its optimizer's state of conv0.weight, exp_avg is 5": lambda c: kept(c).update(exp_avg=5),
    "conv0.weight, exp_avg_sq is tensor(indices": lambda c: kept(c).update(
        exp_avg_sq=kept(c)["exp_avg_sq"].to_sparse()),
    "conv0.weight, exp_avg is tensor([[[[nan": lambda c: kept(c)["exp_avg"].fill_(math.nan),
    "conv0.weight, exp_avg_sq is tensor([[[[-1": lambda c: kept(c)["exp_avg_sq"].fill_(-1),
    "conv0.weight, step is 'x'": lambda c: kept(c).update(step="x"),
    "conv0.weight, step is -1": lambda c: kept(c).update(step=-1),
    "its state of conv0.weight has exp_avg_sq, step)": lambda c: kept(c).pop("exp_avg"),
    r"its state of conv0.weight has \x1b[31m, exp_avg": lambda c: kept(c).update({ESCAPE: 1.5}),
    "which no group has": lambda c: c["optimizer"]["state"].update({"x": {}}),
    "betas was tensor([0.9000, 0.9990]) and is now": lambda c: group(c).update(
        betas=torch.tensor([0.9, 0.999])),
    "parameter 0 was \\x1b[31m and is now conv0.weight": lambda c: group(c).update(
        param_names=[ESCAPE, *group(c)["param_names"][1:]]),
}


@pytest.mark.parametrize("told", FIELDS)
def test_a_field_that_is_not_what_it_must_be(told, state, content):
    before = copy.deepcopy(content)
    FIELDS[told](content)
    with pytest.raises((UserError, FileError)) as error:
        state.restore("x.pth.tar", content)
    message = str(error.value)
    assert message.startswith("x.pth.tar") and told in message and message.isprintable()
    state.restore("x.pth.tar", before)
