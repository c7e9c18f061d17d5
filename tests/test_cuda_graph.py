"""--cuda-graph, on a CPU: a recording that is replayed by running the recorded step anew."""
import contextlib

import pytest
import torch
from runs import assert_one_line, assert_same, load, run, tiny

import train
from engine import cuda_graph
from engine.arguments import parse_flags
from engine.cuda_graph import GraphStep, record, recordable
from engine.errors import UserError


CPU = torch.device("cpu")


@pytest.fixture
def replays(monkeypatch):
    """A list that gets an entry at each replay of a stand-in for CUDA's graphs."""
    replays = []
    recorded = []

    def note(optimizer, rates):
        recorded[:] = optimizer, rates
        return recordable(optimizer, rates)

    def fake_record(step):
        results = {}

        def replay():
            replays.append(1)
            with recordable(*recorded):  # what a graph holds of the optimizer
                results.update(step())
        return replay, results

    monkeypatch.setattr(cuda_graph, "check_device", lambda device: None)
    monkeypatch.setattr(cuda_graph, "on_another_stream", lambda step: step())
    monkeypatch.setattr(cuda_graph, "recordable", note)
    monkeypatch.setattr(cuda_graph, "record", fake_record)
    return replays


def test_a_step_that_sets_its_learning_rate_is_not_recorded(monkeypatch):
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([parameter], 0.1)

    def step(*args):
        optimizer.param_groups[0]["lr"] = 0.01

    for name, stand_in in (("check_device", lambda device: None),
                           ("on_another_stream", lambda step: step()),
                           ("record", lambda step: (step, step()))):
        monkeypatch.setattr(cuda_graph, name, stand_in)
    graph = GraphStep(step, optimizer, 1, CPU)
    for _ in range(cuda_graph.WARM_UP):
        graph(torch.ones(1), torch.ones(1), [], 1)
    with pytest.raises(UserError, match="this step sets its learning rate itself"):
        graph(torch.ones(1), torch.ones(1), [], 1)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_run_with_a_graph_ends_as_one_without(optimizer, replays, tiny_cifar10, tmp_path,
                                                monkeypatch):
    """Two batches of 8 an epoch, and an odd one; learning rates that float32 holds."""
    monkeypatch.setattr(train, "learning_rate_factor", lambda args, epoch: 0.5**epoch)

    def trained(name, *flags):
        return run(tiny(tiny_cifar10, tmp_path / name, "--lr", 2**-10, "--optimizer", optimizer,
                        *flags))

    assert trained("plain") == 0 and not replays
    assert trained("graph", "--cuda-graph") == 0 and len(replays) == 4
    expected = load(tmp_path / "plain")
    assert_same(load(tmp_path / "graph")["state_dict"], expected["state_dict"])
    assert_same(load(tmp_path / "graph")["optimizer"], expected["optimizer"])
    if optimizer == "sgd":
        return

    assert trained("begun", "--epochs", 1) == 0
    assert run(["--resume", tmp_path / "begun", "--epochs", 3, "--cuda-graph"]) == 0
    assert len(replays) == 6
    assert trained("ended", "--epochs", 2, "--cuda-graph") == 0 and len(replays) == 8
    assert run(["--resume", tmp_path / "ended", "--epochs", 3, "--no-cuda-graph"]) == 0
    assert len(replays) == 8
    for name in ("begun", "ended"):
        found = load(tmp_path / name)
        assert_same(found["state_dict"], expected["state_dict"])
        assert_same(found["optimizer"], expected["optimizer"])


def test_learning_rates_are_those_that_a_graph_holds(replays):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.001)
    seen = []
    step = GraphStep(lambda *args: seen.append(optimizer.param_groups[0]["lr"]), optimizer, 8,
                     CPU)
    step(torch.zeros(3, 1), torch.zeros(3), [], 1.0)
    assert seen == [torch.tensor(0.001).item()] and seen != [0.001]
    assert float(step.rates[0]) == seen[0]


@pytest.mark.parametrize("message, raised", [
    ("CUDA error: operation not permitted when stream is capturing\nmore", UserError),
    ("shapes do not match", RuntimeError)])
def test_a_step_that_cannot_be_recorded(message, raised, monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **more: contextlib.nullcontext())

    def step():
        raise RuntimeError(message)

    with pytest.raises(raised) as error:
        record(step)
    assert "more" not in str(error.value)
    assert ("--no-cuda-graph" in str(error.value)) == (raised is UserError)


def test_where_there_is_no_graph(tiny_cifar10, tmp_path, monkeypatch, capsys):
    assert run(tiny(tiny_cifar10, tmp_path / "r", "--cuda-graph")) == 1
    assert_one_line(capsys, "--cuda-graph is for GPUs, and this run is on cpu", "--no-cuda-graph")
    parse_flags(["--cuda-graph", "--widths-per-step", "5"])  # all of them
    for flags, told in ((["--widths-per-step", "2"], "draws other bit-widths at each step"),
                        ([], "takes one process, and there are 2")):
        with pytest.raises(SystemExit):
            parse_flags(["--cuda-graph", *flags])
        assert_one_line(capsys, told)
        monkeypatch.setenv("WORLD_SIZE", "2")
