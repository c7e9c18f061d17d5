"""The any-precision step on a stub network: who teaches whom, in which order; its results."""
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import deploy
import models
import search
from models import losses
from models.losses import NEXT_TARGET, any_precision_backward
from runs import assert_one_line, run, tiny

WIDTHS = [1, 2, 4, 32]  # given in another order than they are run
LABELS = torch.tensor([0, 2, 1])


class Stub(nn.Module):
    """A bit-width's logits are a parameter of their own, whose gradient shows its target."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.bits = 32
        self.table = nn.ParameterDict({
            str(bits): nn.Parameter(torch.randn(3, 4, dtype=torch.float64)) for bits in WIDTHS})
        self.visited = []

    def switch_bit_width(self, bit_width):
        self.bits = bit_width

    def forward(self, images):
        self.visited.append(self.bits)
        return 1 * self.table[str(self.bits)]


def one_hot():
    return nn.functional.one_hot(LABELS, 4).double()


LABEL = None
TEACHERS = {  # of each bit-width, which learns from their mean
    "hard": {32: [LABEL], 4: [LABEL], 2: [LABEL], 1: [LABEL]},
    "soft": {32: [LABEL], 4: [32], 2: [32], 1: [32]},
    "recursive": {32: [LABEL], 4: [32], 2: [4], 1: [2]},
    "half": {32: [LABEL], 4: [LABEL, 32], 2: [LABEL, 32], 1: [LABEL, 32]}}


@pytest.mark.parametrize("loss", NEXT_TARGET)
def test_who_teaches_whom(loss):
    model = Stub()
    results = any_precision_backward(model, None, LABELS, WIDTHS, loss)
    assert model.visited == list(results) == [32, 4, 2, 1]
    for bits, teachers in TEACHERS[loss].items():
        logits = model.table[str(bits)].detach()
        p = sum(one_hot() if teacher is LABEL else model.table[str(teacher)].detach().softmax(1)
                for teacher in teachers) / len(teachers)
        # cross-entropy's gradient is (q - p) / N, and a teacher gets none: it is detached
        assert_close(model.table[str(bits)].grad, (logits.softmax(1) - p) / 3)
        value, returned = results[bits]
        assert_close(value, -(p * logits.log_softmax(1)).sum(1).mean())
        assert_close(returned, logits)
        assert not value.requires_grad and not returned.requires_grad


@pytest.mark.parametrize("loss", NEXT_TARGET)
def test_one_bit_width_learns_from_the_labels(loss):
    model = Stub()
    any_precision_backward(model, None, LABELS, [2], loss)
    assert_close(model.table["2"].grad, (model.table["2"].detach().softmax(1) - one_hot()) / 3)
    assert model.table["32"].grad is None


@pytest.mark.parametrize("kind", ["labels", "probabilities"])
def test_half_of_a_label_for_each_pixel(kind):
    logits = torch.randn(2, 4, 4, 3)  # as many columns as classes
    labels = torch.randint(4, (2, 4, 3))
    expected = (nn.functional.one_hot(labels, 4).movedim(-1, 1) + logits.softmax(1)) / 2
    if kind == "probabilities":
        labels = nn.functional.one_hot(labels, 4).movedim(-1, 1).float()
    assert_close(NEXT_TARGET["half"](labels, logits, labels), expected)


def test_gradients_add_to_what_is_there():
    once, twice = Stub(), Stub()
    any_precision_backward(once, None, LABELS, WIDTHS, "recursive")
    for _ in range(2):
        any_precision_backward(twice, None, LABELS, WIDTHS, "recursive")
    for bits in WIDTHS:
        assert_close(twice.table[str(bits)].grad, 2 * once.table[str(bits)].grad)


def test_shared_weights_get_the_sum_over_bit_widths():
    shared = nn.Parameter(torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 3, dtype=torch.float64))

    class Shared(nn.Module):
        bits = 32

        def switch_bit_width(self, bit_width):
            self.bits = bit_width.weights

        def forward(self, images):
            return shared * self.bits

    any_precision_backward(Shared(), None, LABELS, [1, 32], "hard")
    expected = sum(bits * ((bits * shared).softmax(1) - one_hot()) / 3 for bits in (1, 32))
    assert_close(shared.grad, expected.detach())


def standardized(model, images, target):
    mean, std = (find(images, (1, 2, 3), keepdim=True) for find in (torch.mean, torch.std))
    logits = model((images - mean) / std)
    return nn.functional.cross_entropy(logits, target), logits


def test_what_calls_the_network_itself_refuses_another_forward(
        trained, tiny_cifar10, tmp_path, monkeypatch, capsys):
    """A calibration, a search, an export, and quantizers that start from data."""
    monkeypatch.setattr(losses, "forward_loss", standardized)
    data = ["--data-dir", tiny_cifar10, "--device", "cpu"]
    checkpoint = trained / "ckpt" / "model_latest.pth.tar"
    assert run(["--evaluate", "--pretrain", checkpoint, "--bit_width_list", "2,3", "--calibrate", 1,
                "--results-dir", tmp_path / "e", *data]) == 1
    assert_one_line(capsys, "forward_loss of models/losses.py evaluates to other logits than")
    assert run(tiny(tiny_cifar10, tmp_path / "r", "--quantizer", "lsq")) == 1
    assert_one_line(capsys, "forward_loss of models/losses.py evaluates to other logits than")
    with pytest.raises(losses.ForwardLossError):
        deploy.export(models.load(checkpoint), tmp_path / "net", [2], "packed")
    path = tmp_path / "two.pth.tar"
    models.save(models.load(checkpoint, [2, 4, 32]), path)
    content = models.checkpoint.read_checkpoint(path)
    torch.save({**content, "calibrated": []}, path)
    with pytest.raises(losses.ForwardLossError):
        search.main(search.parse_args(list(map(str, [path, *data, "--budget", "50%"]))))


@pytest.mark.parametrize("outputs", [lambda x: x, lambda x: (x, x), lambda x: x[..., None]])
def test_the_project_s_forward_is_that_of_the_network(outputs):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout()
            self.fc = nn.Linear(3, 4)

        def forward(self, x):
            modes.append(self.training)
            return outputs(self.fc(self.drop(x.mean((2, 3)))))

    modes = []
    model = Net()
    losses.check_forward_loss(model, torch.randn(5, 3, 2, 2))
    assert modes and not any(modes)
    assert model.training and model.drop.training


def test_unknown_loss_and_bit_width():
    message = "loss easy does not exist: choose from hard, soft, recursive, half"
    with pytest.raises(ValueError, match=message):
        any_precision_backward(Stub(), None, LABELS, WIDTHS, "easy")
    with pytest.raises(ValueError, match="bit-width 9 does not exist"):
        any_precision_backward(Stub(), None, LABELS, [9], "hard")
