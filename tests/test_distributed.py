"""Several processes as one run, on gloo: the same maths, samples, checkpoints; processes that die."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import psutil
import pytest
import torch
from test_train import ROOT, assert_one_line, assert_same, load, run
from torch.testing import assert_close

import process_checks
import tiny_data
import train
import utils
from dataset.data import InMemoryLoader, ShuffledBatches
from models.losses import LOSSES
from step import Computation
from utils import UserError

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}


def torchrun(processes, *command, flags=("--standalone",), **kwargs):
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *flags, "--nproc-per-node", str(processes), *map(str, command)],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **kwargs)


def finish(process, code=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == code, out + err
    return out, err


# ---- the same maths

@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("found")
    finish(torchrun(2, ROOT / "tests" / "process_checks.py", folder, "steps"))
    return torch.load(folder / "steps.pt")


@pytest.mark.parametrize("loss", LOSSES)
def test_two_processes_equal_one_that_averages_the_gradients_of_the_halves(loss, found):
    alone = process_checks.alone(process_checks.model(), loss, 6, [slice(0, None, 2), slice(1, None, 2)])
    assert_close(found["plain", loss], alone, rtol=1e-12, atol=1e-12)
    start = dict(process_checks.model().named_parameters())
    assert not torch.allclose(alone["conv0.weight"], start["conv0.weight"], rtol=1e-3)


def test_one_gradient_exchange_a_step(found):
    assert found["exchanges"] == len(LOSSES) * process_checks.STEPS


@pytest.mark.parametrize("size", [6, 7])
def test_synchronised_batch_norm_equals_one_process_on_the_whole_batch(size, found):
    net = process_checks.model()
    alone = process_checks.alone(net, "recursive", size, [slice(None)])
    assert_close(found["sync", size], alone, rtol=1e-9, atol=1e-9)
    assert_close(found["buffers", size], dict(net.named_buffers()), rtol=1e-9, atol=1e-9)


def test_evaluation_counts_every_image_once(tmp_path):
    finish(torchrun(3, ROOT / "tests" / "process_checks.py", tmp_path, "evaluation"))
    results, seen = torch.load(tmp_path / "evaluation.pt")
    assert seen == list(range(1000))
    images, labels = process_checks.images_1000().tensors
    cpu = torch.device("cpu")
    loader = InMemoryLoader(images.permute(0, 2, 3, 1), labels, "cifar10", cpu, batch_size=100)
    alone = train.evaluate(Computation(process_checks.model().float(), cpu), loader, process_checks.WIDTHS)
    for bits, values in alone.items():
        assert results[bits]["top1"] == pytest.approx(values["top1"], rel=1e-12)
        assert results[bits] == pytest.approx(values, rel=1e-5)


# ---- the same samples

def epoch(world_size, start=0, stop=None):
    """The batches of an epoch of 22 samples as `world_size` processes see them together."""
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
    seen = Counter(index for batch in epoch(1, 0, 2) + epoch(2, 2, 4) + epoch(1, 4) for index, _ in batch)
    assert seen == Counter(range(22))


def test_a_batch_that_cannot_be_shared():
    with pytest.raises(UserError, match="last batch of an epoch has 1 of the 21 images, fewer than the 2 processes"):
        ShuffledBatches(21, 4, 0, 0, 2)


def test_batch_size_must_divide(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert run(["--batch-size", 64, "--results-dir", tmp_path / "r"]) == 2
    assert_one_line(capsys, "--batch-size 64", "a multiple of 3")


# ---- whole runs

DIGITS = ["--width", "1", "--bit_width_list", "2,32", "--train-fraction", "0.08", "--batch-size", "16", "--epochs", "3",
          "--lr_decay", "2", "--device", "cpu", "--save-every", "1e-9"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    out, _ = finish(torchrun(2, ROOT / "train.py", *DIGITS, "--results-dir", folder))
    assert out.count(" | val ") == 4 and ", 2 processes" in out  # one process tells, the other is silent
    return folder


def test_a_checkpoint_does_not_know_how_many_made_it(undisturbed, tmp_path):
    checkpoint = load(undisturbed)
    assert not any(key.startswith("module.") for key in checkpoint["state_dict"])
    assert [len(path.read_text().splitlines()) for path in undisturbed.glob("metrics.jsonl")] == [3]
    assert run(["--resume", undisturbed / "ckpt" / "model_best.pth.tar", "--epochs", 4, "--results-dir",
                tmp_path / "one"]) == 0
    assert run(["--evaluate", "--pretrain", undisturbed, "--results-dir", tmp_path / "e"]) == 0
    epoch = load(undisturbed, "model_best")["epoch"]
    record = json.loads((undisturbed / "metrics.jsonl").read_text().splitlines()[epoch - 1])
    assert json.loads((tmp_path / "e" / "evaluation.json").read_text()) == {
        bits: pytest.approx(values, rel=1e-5) for bits, values in record["val"].items()}


def until_saved(folder, process, steps):
    """Wait until a checkpoint with more than `steps` steps of some epoch is there."""
    path = folder / "ckpt" / "model_latest.pth.tar"
    while process.poll() is None:
        if path.exists():
            state = utils.load_checkpoint(path)
            if 8 * state["epoch"] + state["step"] > steps:
                return
        time.sleep(0.02)
    raise AssertionError(process.communicate())


def test_sigterm_to_the_launcher_saves_and_other_numbers_of_processes_go_on(tmp_path):
    folder = tmp_path / "r"
    process = torchrun(2, ROOT / "train.py", *DIGITS, "--results-dir", folder)
    until_saved(folder, process, 2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and f"--resume {folder}" in err
    saved = load(folder)
    assert 0 < saved["metrics"]["count"] == min(16 * saved["step"], 115)  # all processes' images
    assert run(["--resume", folder, "--epochs", saved["epoch"] + 1]) == 0  # one process ends the epoch
    finish(torchrun(2, ROOT / "train.py", "--resume", folder, "--epochs", 3))
    assert load(folder)["epoch"] == 3 and len(utils.read_metrics(folder / "metrics.jsonl")) == 3


def workers(launcher):
    return [child for child in psutil.Process(launcher.pid).children() if "train.py" in " ".join(child.cmdline())]


@pytest.mark.parametrize("kills", [int(os.environ.get("KILLS", 1))])
def test_a_killed_worker_is_replaced_and_the_end_is_the_same(kills, undisturbed, tmp_path):
    """KILLS=5 ./run_tests.sh -k killed_worker is the longer trial."""
    folder = tmp_path / "r"
    process = torchrun(2, ROOT / "train.py", *DIGITS, "--results-dir", folder,
                       flags=("--standalone", "--max-restarts", str(kills)))
    moments = random.Random(0)
    for kill in range(kills):
        until_saved(folder, process, 20 * kill // kills)
        time.sleep(moments.uniform(0, 0.3))
        moments.choice(workers(process)).kill()
        time.sleep(5)  # for the launcher to see it
    finish(process)
    for name in ("model_latest", "model_best"):
        ours, theirs = load(folder, name), load(undisturbed, name)
        for part in ("state_dict", "optimizer", "best_prec1", "epoch"):
            assert_same(ours[part], theirs[part])


def test_imagenet_recipe_with_two_processes(tmp_path):
    """Real JPEG files, grey, CMYK and palette ones among them, through the recipe itself."""
    folder = tiny_data.imagenet(tmp_path / "data", classes=("n01440764", "n01443537"), per_class=4)
    done = subprocess.run(
        [ROOT / "train_imagenet.sh", "--data-dir", tmp_path / "data", "--model", "resnet20q", "--width", "1",
         "--bit_width_list", "2,32", "--epochs", "1", "--batch-size", "4", "--workers", "1", "--device", "cpu",
         "--results-dir", tmp_path / "r"], env={**ENVIRONMENT, "PROCESSES": "2"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ", 2 processes" in done.stdout and load(tmp_path / "r")["epoch"] == 1
    assert len(list(folder.rglob("*.JPEG"))) == 16
