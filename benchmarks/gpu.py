"""All of the fast path that only a GPU can show: first that it computes the same, then its speed against the targets.

    python benchmarks/gpu.py               # one NVIDIA GPU, nothing to download; exits with 1 where a check fails

Prints Markdown tables for the README.
"""
import copy
import subprocess
import sys
import tempfile
from pathlib import Path

import accuracy
import speed
import torch
from torch.testing import assert_close

import train
import utils
from models import MODELS
from models.losses import any_precision_backward, sharing_nothing
from models.quan_ops import set_arithmetic
from step import Computation, TrainingStep, missing_compiler

WIDTHS = [1, 2, 4, 8, 32]


def network(device, name="resnet20q", width=1):
    torch.manual_seed(0)
    return MODELS[name](WIDTHS, num_classes=10, width=width).to(device).train()


def batch(device, count=16):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, 32, 32, generator=generator).to(device).contiguous(memory_format=torch.channels_last)
    return images, (torch.arange(count) % 10).to(device)


def trained(device, steps=10, captures=False, compiles=False, precision="fp32", optimizer="adam"):
    """Weights and losses after a few steps in the given way, the last but two with fewer images, then at another rate."""
    model = network(device)
    args = train.parse_args(["--dataset", "cifar10", "--model", "resnet20q", "--optimizer", optimizer, "--lr", "0.01"])
    computation = Computation(model, device, precision=precision, compiles=compiles, batch_size=16)
    optimizer = train.make_optimizer(args, model.parameters(), device, captures)
    step = TrainingStep(computation, optimizer, WIDTHS, "recursive", captures)
    losses = []
    for index in range(steps):
        images, labels = batch(device, 7 if index == steps - 3 else 16)
        train.set_learning_rate(optimizer, 0.01 if index < steps - 3 else 0.001)
        losses.append(step(images, labels, 1.0, None)[0][:, 0].clone())
    assert not captures or step.graph, "the step was not captured"
    return model.state_dict(), torch.stack(losses)


# ---- the same numbers

def shared_equals_plain(device):
    model, (images, labels) = network(device).double(), batch(device)
    with torch.no_grad():
        for parameter in model.parameters():  # away from the clamp's ends, see tests/test_step.py
            parameter += 0.1 * torch.randn_like(parameter)
    plain = copy.deepcopy(model)
    set_arithmetic(plain, plain=True)
    model.to(memory_format=torch.channels_last)
    any_precision_backward(plain, images.double(), labels, WIDTHS, share=sharing_nothing)
    any_precision_backward(model, images.double(), labels, WIDTHS)
    for found, expected in zip(model.parameters(), plain.parameters()):
        assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-9)


def nothing_waits(device):
    for precision in ("fp32", "bf16", "fp16"):
        model, (images, labels) = network(device), batch(device)
        computation = Computation(model, device, precision=precision)
        step = TrainingStep(computation, torch.optim.Adam(model.parameters(), fused=True), WIDTHS, "recursive")
        metrics = utils.Metrics(WIDTHS, device)
        for mode in ("default", "error"):
            torch.cuda.set_sync_debug_mode(mode)
            try:
                for _ in range(2):
                    metrics.add(step(images, labels, 1.0, None)[0], len(labels))
            finally:
                torch.cuda.set_sync_debug_mode("default")


def captured_equals_uncaptured(device):
    for precision, optimizer in (("fp32", "adam"), ("fp32", "sgd"), ("fp16", "adam"), ("fp16", "sgd"), ("bf16", "adam")):
        expected, found = (trained(device, captures=captures, precision=precision, optimizer=optimizer)[1]
                           for captures in (False, True))
        assert_close(found, expected, rtol=0.02, atol=0.02, msg=lambda told: f"{precision} {optimizer}: {told}")


def compiled_equals_eager(device):
    for precision in ("fp32", "tf32", "bf16", "fp16"):
        _, expected = trained(device, steps=2, precision=precision)
        _, found = trained(device, steps=2, compiles=True, precision=precision)
        assert_close(found, expected, rtol=0.05, atol=0.05)


def compiles_once(device):
    model, (images, labels) = network(device), batch(device)
    computation = Computation(model, device, compiles=True, batch_size=16)
    step = TrainingStep(computation, torch.optim.Adam(model.parameters(), fused=True), WIDTHS, "recursive")
    step(images, labels, 1.0, None)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            step(images, labels, 1.0, None)


def resumed_run_goes_on(device):
    """A compiled and captured run on digits, stopped after its first epoch and gone on with, ends as the whole one."""
    with tempfile.TemporaryDirectory() as folder:
        def run(name, *flags):
            subprocess.run([sys.executable, speed.ROOT / "train.py", *flags, "--results-dir", f"{folder}/{name}"],
                           check=True, stdout=subprocess.DEVNULL)
            return utils.read_metrics(Path(folder, name, "metrics.jsonl"))[-1]
        same = ["--precision", "bf16", "--compile", "--lr_decay", "2"]
        whole = run("whole", *same, "--epochs", "3")
        run("parts", *same, "--epochs", "1")
        parts = run("parts", "--resume", f"{folder}/parts", "--epochs", "3")
        for bits, values in whole["train"].items():
            assert abs(values["loss"] - parts["train"][bits]["loss"]) < 0.1 * values["loss"], (whole, parts)


def accuracy_is_kept(device):
    """Digits, 3 seeds: bf16, compiled, is at most 0.3 points below the plain path at every bit-width."""
    with tempfile.TemporaryDirectory() as folder:
        differences = accuracy.main(accuracy.parse_args(
            ["--seeds", "3", "--fast", "--precision bf16 --compile", "--folder", folder]))
    for bits, difference in differences.items():
        assert difference > -0.3, (bits, differences)


# ---- speed

def target(name, value, least):
    print(f"\n{name}: {value:.2f}, target {least}: {'ok' if value >= least else 'FAILED'}", flush=True)
    return value >= least


def speeds():
    fast = ["--precision", "bf16", "--compile"]
    good = []
    cifar = speed.main(speed.parse_args(["step", "--model", "resnet20q", "--steps", "20", *fast]))
    good.append(target("share of the bf16 matmul peak, resnet20q", cifar["share"], 0.45))
    good.append(target("peak memory of plain over fast", 1 / cifar["memory"], 1))
    epoch = speed.main(speed.parse_args(["epoch", "--model", "resnet20q", "--images", "50000", "--repeats", "3", *fast]))
    good.append(target("epoch of 50,000 images, resnet20q, over plain", epoch["ratio"], 5))
    imagenet = speed.main(speed.parse_args(["step", "--model", "resnet50q", "--steps", "5", "--repeats", "5", *fast]))
    good.append(target("step of resnet50q over plain", imagenet["ratio"], 3))
    loader = speed.main(speed.parse_args(["loader", "--model", "resnet20q", "--images", "50000", *fast]))
    good.append(target("loader over what the step consumes", loader["loader"], 20))
    speed.main(speed.parse_args(["widths", "--model", "resnet20q", *fast]))
    return all(good)


def main():
    device = utils.choose_device("cuda")
    torch.cuda.set_device(device)
    reason = missing_compiler(device)
    if reason:
        raise utils.UserError(f"torch.compile does not work here: {reason}")
    good = True
    for check in (shared_equals_plain, nothing_waits, captured_equals_uncaptured, compiled_equals_eager, compiles_once,
                  resumed_run_goes_on, accuracy_is_kept):
        try:
            check(device)
            told = "ok"
        except Exception as error:  # the others are still worth knowing
            told, good = f"FAILED: {type(error).__name__}: {str(error)[:500]}", False
        print(f"{check.__name__.replace('_', ' ')}: {told}", flush=True)
    good = speeds() and good
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    utils.run(lambda _: main(), lambda: None)
