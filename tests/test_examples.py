"""The networks in examples/ give the numbers that are beside them.

    PYTHONPATH=. python tests/test_examples.py examples/digits.safetensors    # writes digits.json
"""
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import Subset

import models
import reference
from dataset.data import DATASETS, DataError, get_dataset
from dataset.loader import make_loader
from models import MODELS, bit_widths_of, packed, set_bit_width
from runs import evaluation, run
from utils import write_json

FOLDER = Path(__file__).parent.parent / "examples"
FILES = sorted(FOLDER.glob("*.safetensors"))
IMAGES = 120


def measure(path, count=IMAGES):
    """Return what a JSON file holds: what the network is, and its right answers on few images.

    These are evenly spaced over the validation split. Raises DataError where it is not there.
    """
    network = models.load(path)
    name = network.images["dataset"]
    val_set = get_dataset(name, next(iter(DATASETS[name].val_split.values())))
    wanted = torch.linspace(0, len(val_set) - 1, count).long().tolist()
    loader = make_loader(Subset(val_set, wanted), name, torch.device("cpu"), count, train=False)
    (images, labels), = loader
    correct = {}
    for width in bit_widths_of(network):
        set_bit_width(network, width)
        with torch.no_grad():
            answers = network(images).argmax(1)
        correct[str(width)] = int((answers == labels).sum())
    return {"dataset": name, "calibrated": network.calibrated, "images": count, "correct": correct}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_numbers(path, monkeypatch):
    expected = json.loads(path.with_suffix(".json").read_text())
    network = models.load(path)
    assert list(map(str, bit_widths_of(network))) == list(expected["correct"])
    assert network.calibrated == expected["calibrated"]
    for name in ("CIFAR10", "CIFAR100", "MNIST", "FashionMNIST", "SVHN"):
        monkeypatch.setattr(f"torchvision.datasets.{name}.download", refuse)
    try:
        found = measure(path, expected["images"])
    except DataError as error:
        pytest.skip(f"its data set is not here: {error}")
    assert found["dataset"] == expected["dataset"]
    for width, correct in expected["correct"].items():
        assert abs(found["correct"][width] - correct) <= 1, width  # rounding may turn one answer


def refuse(*args):
    raise OSError("a test downloads nothing")


@pytest.mark.skipif(not (FOLDER / "digits.safetensors").exists(), reason="it is not there")
def test_the_lines_of_python(capsys, monkeypatch):
    monkeypatch.chdir(FOLDER.parent)
    block, = re.findall(r"```python\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)
    exec(block, {})
    label, answer = capsys.readouterr().out.split()
    assert label == answer


def test_a_packed_file_is_evaluated_at_all_that_it_has(tiny_cifar10, tmp_path, capsys):
    path = tmp_path / "net.safetensors"
    model = reference.fill(MODELS["resnet20q"]([1, 2, 3], width=1).double(), seed=0).float().eval()
    packed.save(model, [1, 2, 3], path, {
        "network": {"model": "resnet20q", "width": 1, "all_conv": False, "classes": 10},
        "calibrated": [3], "arguments": {"dataset": "cifar10", "train_split": "train"}})
    assert models.load(path).calibrated == [3]
    assert run(["--evaluate", "--pretrain", path, "--data-dir", tiny_cifar10, "--device", "cpu",
                "--results-dir", tmp_path / "e"]) == 0
    assert list(evaluation(tmp_path / "e")) == ["1", "2", "3"]
    out = capsys.readouterr().out
    assert "trained at 1,2 bits" in out
    assert re.findall(r"^ +(\d) .*not trained", out, re.MULTILINE) == ["3"]


if __name__ == "__main__":
    source = Path(sys.argv[1])
    write_json(source.with_suffix(".json"), measure(source))
