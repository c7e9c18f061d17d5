"""Several processes as one run, on gloo: the same maths, samples, checkpoints; a death of one."""
import itertools
import json
import os
import signal
from argparse import Namespace
from collections import Counter

import pytest
import torch
import torch.distributed.run
from process_checks import DIGITS
from runs import ROOT, accuracies, assert_same, load, run, tiny
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.testing import assert_close

import process_checks
import train
from dataset.data import DataError
from dataset.loader import InMemoryLoader, ShuffledBatches
from engine import distributed
from engine.errors import UserError
from engine.evaluation import evaluate
from engine.forward_pass import ForwardPass
from engine.run_folder import read_metrics
from engine.setup import synchronize_batch_norm
from models.losses import NEXT_TARGET

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def checks(tmp_path_factory, forks, environment):
    """The folder that process_checks.py has written to."""
    folder = tmp_path_factory.mktemp("checks")
    done = forks.run(process_checks.main, folder, env=environment)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return folder


# ---- the same maths

@pytest.fixture(scope="module")
def found(checks):
    return torch.load(checks / "found.pt")


@pytest.mark.parametrize("loss", NEXT_TARGET)
def test_two_processes_equal_one_that_averages_the_gradients_of_the_halves(loss, found):
    halves = [slice(0, None, 2), slice(1, None, 2)]
    alone = process_checks.alone(process_checks.model(), loss, 6, halves)
    assert_close(found["own statistics", loss], alone, rtol=1e-12, atol=1e-12)
    start = dict(process_checks.model().named_parameters())
    assert not torch.allclose(alone["conv0.weight"], start["conv0.weight"], rtol=1e-3)


def test_steps_that_leave_bit_widths_out_equal_those_of_one_process(found):
    """By name, and a BatchNorm that no process has used is not moved, not by momentum either."""
    many, halves = process_checks.MANY, [slice(0, None, 2), slice(1, None, 2)]

    def widths_of(step):
        return train.choose_bit_widths(many, process_checks.PER_STEP, 0, 0, step)

    assert len({tuple(widths_of(step)) for step in range(process_checks.STEPS)}) > 1
    alone = process_checks.alone(process_checks.model(many), "recursive", 6, halves, widths_of)
    assert_close(found["widths per step"], alone, rtol=1e-12, atol=1e-12)


def test_gradients_of_other_bit_widths_are_summed_by_name_and_stay_absent_where_all_lack_them(
        found):
    """Of the two processes one has visited 2 and 32 bits, the other 8 and 32."""
    parts = [dict(process_checks.gradients_of(process_checks.model(process_checks.MANY), rank)
                  .named_parameters()) for rank in range(2)]
    for grads in found["gradients"]:
        for name, grad in grads.items():
            present = [part[name].grad for part in parts if part[name].grad is not None]
            if name in ("layers.0.conv0.weight", "fc.bias") or not present:
                assert grad is None, name
            else:
                assert_close(grad, sum(present), rtol=1e-12, atol=1e-12)
        assert grads["bn.bn_dict.2.weight"] is not None
        assert grads["bn.bn_dict.8.weight"] is not None
        assert grads["bn.bn_dict.4.weight"] is None


def test_processes_begin_with_the_network_of_the_first(found):
    first, second = found["started"]
    assert_same(first, second)


def test_statistics_are_shared_by_their_own_call_and_not_by_a_save(checks, found):
    first, second = found["saved"]
    key = next(key for key in first if key.endswith("bn_dict.2.running_mean"))
    assert_same(second[key], first[key] + 1)
    assert_same(load(checks / "statistics")["state_dict"], first)
    assert_same(found["shared"], [first, first])


def test_one_exchange_a_step_and_two_small_ones_an_epoch(found):
    """Of all gradients at once, and which of them there are; at the end metrics, twice."""
    parameters = list(process_checks.model().parameters())
    size = sum(parameter.numel() for parameter in parameters) + len(parameters)
    steps = len(NEXT_TARGET) * process_checks.STEPS
    assert [found for found in found["exchanges"] if found > 100] == [size] * steps
    assert len(found["exchanges"]) == steps + 2 * len(NEXT_TARGET)


def test_statistics_that_are_parameters_are_shared_at_the_end_of_an_epoch(monkeypatch):
    net = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1))
    net.ranges_dict = nn.ParameterDict({"4": nn.Parameter(torch.zeros(()), requires_grad=False)})
    shared = []
    monkeypatch.setattr(distributed, "exchange", lambda tensors, _: shared.extend(tensors))
    distributed.broadcast_buffers(net)
    assert set(map(id, shared)) == set(map(id, [*net.buffers(), net.ranges_dict["4"]]))


def test_the_network_is_initialized_before_its_batch_norms_are_synchronized(monkeypatch):
    """Rank 0 alone initializes quantizers, and a SyncBatchNorm would wait for the others."""
    called = []

    class Ended(Exception):
        pass

    def synchronize(*args):
        called.append("synchronized")
        raise Ended

    state = Namespace(model=None, data={}, check_rebuilt=lambda: called.append("compared"))
    monkeypatch.setattr(train, "make_run", lambda *args: (state, None, None, None))
    monkeypatch.setattr(train, "load_initial_state", lambda *args: called.append("initialized"))
    monkeypatch.setattr(train, "world_size", lambda: 2)
    monkeypatch.setattr(train, "synchronize_batch_norm", synchronize)
    with pytest.raises(Ended):
        train.train(Namespace(sync_bn=True), None, CPU)
    assert called == ["initialized", "compared", "synchronized"]


def test_synchronised_batch_norm_is_torchs_on_gpus_and_refused_elsewhere():
    net = process_checks.model()
    keys = list(net.state_dict())
    with pytest.raises(UserError, match="--sync-bn is torch's SyncBatchNorm, which needs GPUs"):
        synchronize_batch_norm(net, CPU)
    parameters = list(net.parameters())
    synchronize_batch_norm(net, torch.device("cuda"))
    assert all(one is other for one, other in zip(net.parameters(), parameters, strict=True))
    kinds = {type(layer) for layer in net.modules() if hasattr(layer, "running_mean")}
    assert kinds == {torch.nn.SyncBatchNorm}
    assert list(net.state_dict()) == keys


def test_evaluation_counts_every_image_once(found):
    assert found["seen"] == list(range(1001)) and found["batches"] == [6, 5]
    loader = InMemoryLoader(*process_checks.images(), "cifar10", batch_size=100)
    net = process_checks.model().float()
    alone = evaluate(ForwardPass(net, CPU), loader, process_checks.WIDTHS, CPU)
    for bits, values in alone.items():
        assert found["results"][bits]["top1"] == pytest.approx(values["top1"], rel=1e-12)
        assert found["results"][bits] == pytest.approx(values, rel=1e-5)


# ---- processes that are not of one run

def test_a_value_that_differs_between_processes_is_named(monkeypatch):
    monkeypatch.setattr(distributed, "gather", lambda value: [value, {**value, "--lr": "0.1"}])
    with pytest.raises(distributed.ProcessError, match="^--lr is 0.001 in process 0, and 0.1 in "):
        distributed.check_same({"--seed": 0, "--lr": 0.001})
    distributed.check_same({"--lr": 0.1})


def test_flags_and_data_of_processes_are_compared(tmp_path, tiny_cifar10, monkeypatch):
    compared = []
    monkeypatch.setattr(train, "check_same", lambda values: compared.append(values))
    assert run(tiny(tiny_cifar10, tmp_path / "r", "--epochs", 1)) == 0
    flags, data = compared
    assert flags["--lr"] == "0.001" and flags["--loss"] == "recursive"
    assert "--workers" not in flags and "--device" not in flags
    assert data["the data's number of images"] == 20


def test_an_error_of_a_user_s_code_is_no_lost_connection(monkeypatch, tmp_path):
    """Whatever its words are."""
    def failing(*args):
        raise ValueError("the skip connection has 8 channels, not 16")

    store = distributed.dist.HashStore()
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "rendezvous", lambda *args, **kwargs: iter([[store]]))
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda *args, **kwargs: None)
    with pytest.raises(ValueError, match="skip connection"), distributed.processes(CPU, 1):
        failing()
    with pytest.raises(distributed.ProcessError, match="lost the others"), (
            distributed.processes(CPU, 1)):
        next(distributed.dist.distributed_c10d.rendezvous("x://"))


# ---- waiting for downloads

def test_one_process_of_a_machine_goes_first(found):
    assert found["turns"] == [[1, 1], [2, 2]]


def test_the_others_end_where_the_first_fails(checks):
    assert json.loads((checks / "ends.json").read_text()) == [1, 2]


# ---- the same samples

def epoch(world_size, start=0, stop=None):
    """Return the batches of an epoch of 22 samples as `world_size` processes see them together."""
    parts = []
    for rank in range(world_size):
        batches = ShuffledBatches(22, 4, 0, rank, world_size)
        batches.epoch, batches.start = 5, start
        batches.stop = stop or len(batches)
        parts.append(list(batches))
    return [sorted(sum(step, [])) for step in zip(*parts, strict=True)]


def test_batches_do_not_depend_on_the_number_of_processes():
    assert epoch(1) == epoch(2)
    assert [len(batch) for batch in epoch(2)] == [4] * 5 + [2]


def test_an_epoch_over_1_then_2_then_1_processes_sees_every_sample_once():
    batches = epoch(1, 0, 2) + epoch(2, 2, 4) + epoch(1, 4)
    assert Counter(index for batch in batches for index, _ in batch) == Counter(range(22))


def test_a_batch_that_cannot_be_shared():
    told = "last batch of an epoch has 1 of the 21 images, fewer than the 2 processes"
    with pytest.raises(DataError, match=told):
        ShuffledBatches(21, 4, 0, 0, 2)


# ---- whole runs

@pytest.fixture(scope="module")
def undisturbed(checks):
    return checks / "digits"


def test_one_process_tells_and_the_other_is_silent(checks):
    told, silence = ((checks / f"digits.{rank}.out").read_text() for rank in range(2))
    rows = [line for line in told.splitlines()
            if line.startswith(("epoch  ", "  1/", "  2/", "  3/"))]
    assert len(rows) == 4 and ", 2 processes" in told and silence == ""


def test_jpeg_files_in_two_processes(checks, tmp_path):
    """Both validate with rank 0's statistics, though nothing is saved within the epoch."""
    folder = checks / "imagenet"
    assert load(folder)["epoch"] == 1
    assert len(list((checks / "data").rglob("*.JPEG"))) == 16
    assert run(["--evaluate", "--pretrain", folder, "--data-dir", checks / "data", "--results-dir",
                tmp_path / "e"]) == 0
    (record,) = read_metrics(folder / "metrics.jsonl")
    assert accuracies(tmp_path / "e") == {
        str(bits): pytest.approx(values, rel=1e-5) for bits, values in record["val"].items()}


def test_a_checkpoint_does_not_know_how_many_made_it(undisturbed, tmp_path):
    checkpoint = load(undisturbed)
    assert not any(key.startswith("module.") for key in checkpoint["state_dict"])
    records = read_metrics(undisturbed / "metrics.jsonl")
    assert len(records) == 3
    best = undisturbed / "ckpt" / "model_best.pth.tar"
    assert run(["--resume", best, "--epochs", 4, "--results-dir", tmp_path / "one"]) == 0
    assert run(["--evaluate", "--pretrain", undisturbed, "--results-dir", tmp_path / "e"]) == 0
    record = records[load(undisturbed, "model_best")["epoch"] - 1]
    assert accuracies(tmp_path / "e") == {
        str(bits): pytest.approx(values, rel=1e-5) for bits, values in record["val"].items()}


def send_in_a_step(to_launcher, number, step, starts):
    """Let each worker of torchrun send a signal in a step of its own, to itself or the launcher.

    starts: in how many starts of the workers; rank 0 sends in the first, then rank 1, and so on by
    turns.
    """
    count = itertools.count(1)

    def send(*args):
        start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        if start < starts and int(os.environ["RANK"]) == start % 2 and next(count) == step:
            os.kill(os.getppid() if to_launcher else os.getpid(), number)

    register_optimizer_step_post_hook(send)


def launch(words, *sends):
    """Be torchrun, whose workers are forked; it gives them as long as they need to save."""
    send_in_a_step(*sends)
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "600"
    torch.distributed.run.main(["--start-method", "fork", "--run-path", *words])
    return 0


def test_sigterm_to_the_launcher_saves_and_other_numbers_of_processes_go_on(tmp_path, forks):
    folder = tmp_path / "r"
    assert run([*DIGITS, "--epochs", 1, "--results-dir", folder]) == 0  # one process begins
    words = ["--standalone", "--nproc-per-node", "2", f"{ROOT}/train.py", "--resume", f"{folder}",
             "--epochs", "100"]
    done = forks.run(launch, words, True, signal.SIGTERM, 3, 1)
    assert done.returncode != 0 and f"--resume {folder}" in done.stderr, done.stderr
    saved = load(folder)
    steps = saved["metrics"]["steps"]
    assert saved["epoch"] < 100 and steps % 2 == 0  # they look at log points
    assert saved["metrics"]["count"] == min(16 * steps, 115)  # all processes' images
    assert run(["--resume", folder, "--epochs", saved["epoch"] + 1]) == 0  # one process ends it
    assert load(folder)["epoch"] == saved["epoch"] + 1 > 1
    assert len(read_metrics(folder / "metrics.jsonl")) == saved["epoch"] + 1


@pytest.mark.parametrize("kills", [int(os.environ.get("KILLS", 1))])
def test_a_killed_worker_is_replaced_and_the_end_is_the_same(kills, undisturbed, tmp_path, forks,
                                                             recipe_argv):
    """By the ImageNet recipe, with other data: it starts processes anew, in a folder of its own.

    KILLS=5 ./run_tests.sh -k killed_worker is the longer trial.
    """
    step = 24 // (kills + 1) + 1  # of 24 in all, and every second one is saved
    module, name, *words = recipe_argv(
        "train_imagenet.sh", *DIGITS, processes="2", restarts=str(kills), whole=True)
    assert (module, name) == ("-m", "torch.distributed.run")
    done = forks.run(launch, words, False, signal.SIGKILL, step, kills, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 2 processes" in done.stdout
    assert "done, in results/imagenet_resnet50q_any" in done.stdout
    folder = tmp_path / "results" / "imagenet_resnet50q_any"
    log = next(folder.glob("log_*.txt")).read_text()
    assert log.count("resuming: ") == kills and "resuming: 0 of 3 epochs done" not in log
    for name in ("model_latest", "model_best"):
        ours, theirs = load(folder, name), load(undisturbed, name)
        for part in ("state_dict", "optimizer", "best_prec1", "epoch"):
            assert_same(ours[part], theirs[part])
