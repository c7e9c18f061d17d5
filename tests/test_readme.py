"""The README: its changes of one thing work as they stand, its links and commands exist."""
import importlib
import re
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from torchvision import datasets

from dataset import data
from engine.arguments import parse_flags
from models import MODELS, build, losses, quan_ops, quantizers
from models.losses import any_precision_backward
from runs import load, run

ARGUMENTS = ("model", "images", "labels", "bit_widths", "name")  # of the README's step
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.fixture
def change(monkeypatch):  # which is undone after this
    """Run the README's block for a file in that file's module, until the test ends."""
    changed = []

    def run_block(path):
        block, = re.findall(rf"```python\n# in {path}\n(.*?)```", README, re.DOTALL)
        module = importlib.import_module(path.removesuffix(".py").removesuffix("/__init__")
                                         .replace("/", "."))
        before = {name: dict(value) if isinstance(value, dict) else value
                  for name, value in vars(module).items() if not name.startswith("__")}
        changed.append((module, before))
        exec(block, vars(module))

    yield run_block
    for module, before in changed:
        for name in [name for name in vars(module) if not name.startswith("__")]:
            if name not in before:
                delattr(module, name)
            elif isinstance(before[name], dict):
                getattr(module, name).clear()
                getattr(module, name).update(before[name])
            else:
                setattr(module, name, before[name])


def losses_of(loss="recursive", quantizer="dorefa"):
    torch.manual_seed(0)
    model = build("svhnq", [1, 2, 32], 10, quantizer=quantizer)
    model.layers[19].p = 0  # no dropout
    images, labels = torch.randn(8, 3, 40, 40), torch.arange(8)
    results = any_precision_backward(model, images, labels, [1, 2, 32], loss)
    return {bits: value.item() for bits, (value, _) in results.items()}


def test_the_method_is_the_step():
    block, = re.findall(r"```python\n(target = labels.*?)```", README, re.DOTALL)
    gradients = []
    for step in (lambda names: exec(block, names),
                 lambda names: any_precision_backward(*map(names.get, ARGUMENTS))):
        torch.manual_seed(0)
        model = MODELS["svhnq"]([1, 2, 32], width=1)
        model.layers[19].p = 0  # no dropout
        step({**vars(losses), **vars(quan_ops), "model": model, "images": torch.randn(8, 3, 40, 40),
              "labels": torch.arange(8), "bit_widths": [1, 2, 32], "name": "recursive",
              "optimizer": torch.optim.SGD(model.parameters(), lr=0.0)})
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert_close(*gradients, rtol=0, atol=0)


def test_another_weight_quantizer(change):
    before = losses_of()
    change("models/quantizers.py")
    after = losses_of(quantizer="clipped")
    assert all(before[bits] != after[bits] for bits in before)
    v, _ = quantizers.ClippedWeight().prepare(torch.randn(1000))
    assert v.abs().max() == 1
    assert parse_flags(["--quantizer", "clipped"]).quantizer == "clipped"


def test_another_loss(change, tmp_path):
    before = losses_of("hard"), losses_of("recursive")
    change("models/losses.py")
    mixed = losses_of("mixed")
    assert list(losses.NEXT_TARGET) == ["hard", "soft", "recursive", "half", "mixed"]
    for bits in (1, 2):
        low, high = sorted(each[bits] for each in before)
        assert low < mixed[bits] < high
    assert parse_flags(["--loss", "mixed"]).loss == "mixed"


SHORT = ["--train-fraction", 0.02, "--epochs", 1, "--bit_width_list", "2,32", "--device", "cpu"]


def test_another_network(change, tmp_path):
    change("models/__init__.py")
    assert run(["--model", "tiny", *SHORT, "--results-dir", tmp_path / "r"]) == 0
    assert load(tmp_path / "r")["arguments"]["model"] == "tiny"
    log = "".join(path.read_text() for path in (tmp_path / "r").glob("log_*.txt"))
    assert "recomputes everything" not in log  # for the gradient of 0.bias, which is rounding
    assert run(["--model", "tiny", "--all-conv", *SHORT, "--results-dir", tmp_path / "a"]) == 2
    evaluate = ["--evaluate", "--pretrain", tmp_path / "r", "--results-dir", tmp_path / "e"]
    assert run([*evaluate, "--bit_width_list", "2,4,32", "--calibrate", 1]) == 0


def test_another_data_set(change, tmp_path, monkeypatch):
    opened = []

    def open_downloadable(kind, root, train):
        opened.append((kind, root, train))
        return datasets.FakeData(20, (1, 16, 16), transform=lambda image: image.convert("L"))

    monkeypatch.setattr(data, "open_downloadable", open_downloadable)
    change("dataset/data.py")
    assert run(["--dataset", "usps", "--model", "svhnq", "--width", 1, *SHORT, "--results-dir",
                tmp_path / "r"]) == 0
    assert opened == [(datasets.USPS, "data/usps", train) for train in (True, False)]


def test_links_and_scripts_exist():
    for link in re.findall(r"\]\((docs[^)#]+)", README):
        assert (ROOT / link).exists(), link
    for script in re.findall(r"\./(\w+\.sh)", README):
        assert (ROOT / script).exists(), script


def test_length():
    words = [word for word in README.split() if any(map(str.isalnum, word))]  # no table's bars
    assert len(words) <= 1900
