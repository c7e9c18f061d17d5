"""Check on a GPU what only a GPU can show: that the numbers are right, then the speed.

    python benchmarks/gpu.py               # one NVIDIA GPU; exits with 1 where a check fails

Downloads nothing; prints Markdown tables.
"""
import copy
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.testing import assert_close

from reference_way import ROOT  # first: the project's modules are found through it
import accuracy
import speed
from engine.device import choose_device
from engine.errors import run_program
from engine.forward_pass import PRECISIONS, ForwardPass
from engine.metrics import Metrics
from engine.run_folder import read_metrics
from models import resnet20q
from models.losses import any_precision_backward

BITS = (1, 2, 4, 8, 32)
COUNT = 16  # images of a batch


class Step:
    """Training steps of a narrow resnet20q on one random batch."""

    def __init__(self, device, precision="fp32", compiles=False):
        self.model = network(device)
        self.forward_pass = ForwardPass(self.model, device, precision, COUNT if compiles else None)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01, fused=True)
        self.metrics = Metrics(BITS, device)
        images, self.labels = batch(device)
        self.images = images.contiguous(memory_format=self.forward_pass.memory_format)

    def __call__(self):
        """Take a step; return its losses, lowest bit-width first."""
        self.optimizer.zero_grad()
        results = any_precision_backward(
            self.model, self.images, self.labels, BITS, forward=self.forward_pass,
            autocast=self.forward_pass.autocast)
        self.optimizer.step()
        self.metrics.add(results, self.labels)
        return torch.stack([results[bits][0] for bits in BITS])


def network(device):
    torch.manual_seed(0)
    return resnet20q(BITS, num_classes=10, width=1).to(device).train()


def batch(device):
    images = torch.randn(COUNT, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return images.to(device), torch.arange(COUNT, device=device) % 10


# ---- checks

def shared_equals_not_shared(device):
    model, (images, labels) = network(device).double(), batch(device)
    with torch.no_grad():
        for parameter in model.parameters():  # so that no activation lies on the clamp's ends
            parameter += 0.1 * torch.randn_like(parameter)
    reference = copy.deepcopy(model)
    any_precision_backward(reference, images.double(), labels, BITS, shared=False)
    any_precision_backward(model, images.double(), labels, BITS)
    for found, expected in zip(model.parameters(), reference.parameters()):
        assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-9)


def nothing_waits(device):
    for precision in PRECISIONS:
        for compiles in (False, True):
            step = Step(device, precision, compiles)
            step()  # the first may wait
            torch.cuda.set_sync_debug_mode("error")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")


def compiled_equals_eager(device):
    for precision in PRECISIONS:
        eager, compiled = Step(device, precision), Step(device, precision, compiles=True)
        for _ in range(2):
            assert_close(compiled(), eager(), rtol=0.05, atol=0.05)


def compiles_once(device):
    step = Step(device, compiles=True)
    step()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            step()


def resumed_run_goes_on(device):
    """A compiled run on digits, ended after its first epoch and resumed, ends as the whole one."""
    with tempfile.TemporaryDirectory() as folder:
        def run(name, *flags):
            command = [sys.executable, ROOT / "train.py", "--device", str(device), *flags]
            subprocess.run([*command, "--results-dir", f"{folder}/{name}"], check=True,
                           stdout=subprocess.DEVNULL)
            return read_metrics(Path(folder, name, "metrics.jsonl"))[-1]["train"]
        same = ["--precision", "bf16", "--compile", "--lr_decay", "2"]
        whole = run("whole", *same, "--epochs", "3")
        run("parts", *same, "--epochs", "1")
        parts = run("parts", "--resume", f"{folder}/parts", "--epochs", "3")
    for bits, values in whole.items():
        assert abs(values["loss"] - parts[bits]["loss"]) < 0.1 * values["loss"], (whole, parts)


def accuracy_is_kept(device):
    """Compiled bf16 on digits is at most 0.3 points below the reference at every bit-width."""
    with tempfile.TemporaryDirectory() as folder:
        differences = accuracy.main(accuracy.parse_args(
            ["--seeds", "3", "--flags=--precision bf16 --compile", "--folder", folder]))
    assert all(difference > -0.3 for difference in differences.values()), differences


CHECKS = (shared_equals_not_shared, nothing_waits, compiled_equals_eager, compiles_once,
          resumed_run_goes_on, accuracy_is_kept)


def passes(check, device):
    """Run a check and tell of it; return whether it passed."""
    try:
        check(device)
        told = "ok"
    except Exception as error:  # the others are still worth knowing
        told = f"FAILED: {type(error).__name__}: {str(error)[:500]}"
    print(f"{check.__name__.replace('_', ' ')}: {told}", flush=True)
    return told == "ok"


# ---- speed

def measured(*words):
    """Return a table of speed.py, of compiled bf16."""
    return speed.main(speed.parse_args([*words, "--precision", "bf16", "--compile"]))


def reaches(name, value, target):
    good = value >= target
    print(f"\n{name}: {value:.2f}, target {target}: {'ok' if good else 'FAILED'}", flush=True)
    return good


def speeds():
    """Measure; return whether every target is reached."""
    cifar = ["--model", "resnet20q"]
    step = measured("step", *cifar, "--steps", "20")
    good = [reaches("resnet20q, % of the bf16 matmul peak", step["share of matmul peak, %"][1], 20),
            reaches("memory of a step, reference over default", step["MiB"][0] / step["MiB"][1], 1)]
    epoch = measured("epoch", *cifar, "--images", "50000", "--repeats", "3")
    good.append(reaches("epoch of 50,000 images, resnet20q, ratio", epoch["ratio"][1], 5))
    imagenet = measured("step", "--model", "resnet50q", "--repeats", "5")
    good.append(reaches("step of resnet50q, ratio", imagenet["ratio"][1], 3))
    loader = measured("loader", *cifar, "--images", "50000")
    good.append(reaches("images loaded for one trained", loader["ratio"][1], 20))
    measured("widths", *cifar)
    return all(good)


def main(_):
    device = choose_device("cuda")
    torch.cuda.set_device(device)
    good = [passes(check, device) for check in CHECKS]
    sys.exit(0 if speeds() and all(good) else 1)


if __name__ == "__main__":
    run_program(main, lambda: None)
