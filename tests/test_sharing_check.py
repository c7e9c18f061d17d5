"""A run finds by its first step whether what bit-widths share can be computed once."""
import contextlib
import math
import random
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import models
from engine import forward_pass
from engine.forward_pass import ForwardPass
from models import highest_first, set_bit_width
from models.losses import any_precision_backward, forward_loss
from models.quan_ops import ActivationQ, Conv2dQ, DoReFaWeight, SwitchableBatchNorm2d
from models.sharing import no_sharing, shared_computation
from runs import run, tiny

WIDTHS = [1, 4, 32]
CPU = torch.device("cpu")
IMAGES = torch.randn(10, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(10) % 3


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, bias=False)
        self.bn = SwitchableBatchNorm2d(8, WIDTHS)
        self.act = ActivationQ()
        self.body = Conv2dQ(8, 8, 3)
        self.fc = nn.Linear(8, 3)

    def forward(self, x):
        return self.fc(self.body(self.act(self.bn(self.stem(x)))).mean((2, 3)))


def network(change=lambda model: None):
    torch.manual_seed(0)
    model = Net().double()
    for width in WIDTHS:
        nn.init.uniform_(model.bn.bn_dict[str(width)].bias, 0.2, 0.6)
    change(model)
    return model


# ---- changes of a network

def gradient_per_bit(model):
    model.body.weight.register_hook(lambda grad: grad / model.body.bits)


def gradient_behind_a_new_head(model):
    """Whose weights are 0, so that no gradient comes through in the first step."""
    gradient_per_bit(model)
    nn.init.zeros_(model.fc.weight)


def stem_gradient_per_bit(model):
    model.stem.weight.register_hook(lambda grad: grad / model.body.bits)


def quantized_stem(model):
    """A pre-hook computes the weight, as those of torch's pruning do."""
    weight = model.stem._parameters.pop("weight")
    model.stem.register_parameter("weight_orig", weight)

    def quantize(layer, inputs):
        n = 2**min(model.body.bits, 8) - 1
        rounded = (weight * n).round() / n
        layer.weight = weight + (rounded - weight).detach()

    model.stem.register_forward_pre_hook(quantize)


class NoisyInTraining(DoReFaWeight):
    def prepare(self, w):
        if self.training:
            w = w + 0.5 * w.detach().std() * torch.randn_like(w)
        return super().prepare(w)


class Scaled(DoReFaWeight):
    """Returns a number beside the tensors."""

    def prepare(self, w):
        return *super().prepare(w), 2.0

    def full_precision(self, v, e, factor):
        return factor * super().full_precision(v, e)

    def integers(self, v, e, factor):
        integers, scale = super().integers(v, e)
        return integers, factor * scale


class ByBits(DoReFaWeight):
    def prepare(self, w):
        return super().prepare(w * self.bits)


class Ranged(DoReFaWeight):
    """A learned range, whose gradient is small beside all others, and of another scale per width.
    """

    def __init__(self):
        super().__init__()
        self.range = nn.Parameter(torch.ones((), dtype=torch.float64))
        self.range.register_hook(lambda grad: 1e-5 * grad / self.bits)

    def prepare(self, w):
        return (w / self.range).clamp(-1, 1), self.range


class Running(DoReFaWeight):
    """What `prepare` returns depends on what the last bit-width computed."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.ones((), dtype=torch.float64))

    def prepare(self, w):
        return super().prepare(w / self.mean.clone())

    def integers(self, v, e):
        if self.training:
            self.mean.mul_(0.9)
        return super().integers(v, e)


def with_quantizer(kind):
    def change(model):
        model.body.quantizer = kind()
        set_bit_width(model, 32)
    return change


def clipped_weights(model):
    """BinaryConnect's."""
    def clip(layer, inputs):
        with torch.no_grad():
            layer.weight.clamp_(-0.05, 0.05)
    model.body.register_forward_pre_hook(clip)


# ---- changes of the forward pass

def sam(model, images, target):
    loss, logits = forward_loss(model, images, target)
    if not model.training:
        return loss, logits
    named = dict(model.named_parameters())
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    grads = {name: grad for name, grad in zip(named, grads) if grad is not None}
    norm = torch.stack([grad.norm() for grad in grads.values()]).norm()
    moved = {name: named[name] + 0.05 * grad / norm for name, grad in grads.items()}
    logits = torch.func.functional_call(model, moved, (images,))
    return nn.functional.cross_entropy(logits, target), logits


def trained_by_one(name, widths):
    def forward(model, images, target):
        model.get_submodule(name).weight.requires_grad_(model.act.bits in widths)
        return forward_loss(model, images, target)
    return forward


def padded(model, images, target):
    model.stem.padding = (1, 1) if model.act.bits == 1 else (0, 0)
    return forward_loss(model, images, target)


def perturbed(model, images, target):
    weight = model.body.weight
    old = weight.data.clone()
    weight.data.add_(0.5 * old.std() * torch.randn_like(old))
    found = forward_loss(model, images, target)
    weight.data.copy_(old)
    return found


def cutout(model, images, target):
    images[:, :, :model.act.bits % 7, :5] = 0
    return forward_loss(model, images, target)


def with_a_look(model, images, target):
    with torch.inference_mode():
        model(images)
    return forward_loss(model, images, target)


def masked(model, images, target):
    if not hasattr(model.stem, "weight_orig"):
        prune.random_unstructured(model.stem, "weight", 0.3)
    magnitude = model.stem.weight_orig.detach().abs()
    least = magnitude.flatten().kthvalue(1 + 3 * model.act.bits).values
    model.stem.weight_mask = (magnitude > least).to(magnitude.dtype)
    return forward_loss(model, images, target)


CHANGES = [gradient_per_bit, gradient_behind_a_new_head, stem_gradient_per_bit, quantized_stem,
           clipped_weights, *map(with_quantizer, (NoisyInTraining, Scaled, ByBits, Ranged))]
FORWARDS = [sam, padded, perturbed, cutout, masked,
            *(trained_by_one(name, widths) for name in ("stem", "body")
              for widths in ((32,), (1, 4)))]
CASES = [*((change, forward_loss) for change in CHANGES),
         *((lambda model: None, forward) for forward in FORWARDS)]


@pytest.fixture
def messages(monkeypatch):
    found = []
    monkeypatch.setattr(forward_pass.log, "info", found.append)
    return found


def patch_forward(monkeypatch, forward):
    """Let all call a forward pass, as an edit of models/losses.py would."""
    monkeypatch.setattr(forward_pass, "forward_loss", forward)
    *before, _, sharing = any_precision_backward.__defaults__
    monkeypatch.setattr(any_precision_backward, "__defaults__", (*before, forward, sharing))


@pytest.mark.parametrize("change, forward", CASES)
def test_what_sharing_does_not_suit_is_computed_anew(change, forward, monkeypatch, messages):
    patch_forward(monkeypatch, forward)
    steps = []
    for shared in (True, False):
        model = network(change)
        computed = ForwardPass(model, CPU)
        computed.shared = shared
        torch.manual_seed(1)
        for _ in range(2):
            losses = computed.backward(IMAGES.clone(), LABELS, WIDTHS, "recursive")
        assert computed.suits == ({"training": False} if shared else {})
        steps.append(({str(width): loss for width, (loss, _) in losses.items()},
                      {name: parameter.grad for name, parameter in model.named_parameters()}))
    torch.testing.assert_close(*steps, rtol=0, atol=0)
    message, = messages
    assert message.startswith("note: training recomputes everything at each bit-width: ")


def test_a_look_in_inference_mode_is_shared(monkeypatch, messages):
    patch_forward(monkeypatch, with_a_look)
    found = []
    for shared in (True, False):
        model = network(lambda model: None)
        computed = ForwardPass(model, CPU)
        computed.shared = shared
        computed.backward(IMAGES, LABELS, WIDTHS, "recursive")
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*found)
    assert messages == []


def test_all_bit_widths_are_tried_whichever_the_first_step_trains(monkeypatch, messages):
    patch_forward(monkeypatch, trained_by_one("stem", (1, 32)))
    computed = ForwardPass(network(), CPU)
    computed.backward(IMAGES, LABELS, [1, 32], "recursive")
    assert computed.suits == {"training": False}


def test_a_compiled_run_is_tried_as_it_prepares_weights(messages):
    for batch_size in (None, len(IMAGES)):
        computed = ForwardPass(network(with_quantizer(Running)), CPU, batch_size=batch_size,
                               backend="eager")
        computed.backward(IMAGES, LABELS, WIDTHS, "hard")
        assert computed.suits == {"training": not batch_size}


def test_what_is_said(messages):
    computed = ForwardPass(network(gradient_per_bit), CPU)
    computed.backward(IMAGES, LABELS, WIDTHS, "recursive")
    assert re.search(r"the gradient of body.weight differs by \d+\.\d %", messages.pop())
    computed = ForwardPass(network(with_quantizer(ByBits)), CPU)
    computed.backward(IMAGES, LABELS, WIDTHS, "recursive")
    assert "ByBits.prepare depends on the bit-width" in messages.pop()


def test_an_evaluation_is_tried_too(messages):
    model = network(quantized_stem).eval()
    computed = ForwardPass(model, CPU)
    with torch.no_grad():
        found = computed.evaluate(IMAGES, LABELS, WIDTHS)
        for width, (_, logits) in found.items():
            set_bit_width(model, width)
            assert torch.equal(logits, model(IMAGES))
    assert re.search(r"the output at \d+-bit differs by \d+\.\d %", messages.pop())


def test_the_project_s_own_networks_share(messages):
    for quantizer in ("dorefa", "lsq"):
        model = models.build("svhnq", WIDTHS, 10, 1, quantizer=quantizer)
        computed = ForwardPass(model, CPU)
        computed.backward(torch.randn(4, 3, 40, 40), torch.arange(4), WIDTHS, "recursive")
        with torch.no_grad():
            computed.evaluate(torch.randn(4, 3, 40, 40), torch.arange(4), WIDTHS)
        assert computed.suits == {"training": True, "evaluation": True}
    assert not messages


def test_a_trial_leaves_no_trace():
    """Not in attributes, lists, buffers, weights, gradients, hooks or random states."""
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0
            self.seen = []
            self.register_buffer("mean", torch.zeros(3))
            self.plain = torch.zeros(3)
            self.bn = SwitchableBatchNorm2d(3, WIDTHS)
            self.fc = nn.Linear(3, 3)
            self.hook = self.fc.register_forward_hook(lambda layer, x, y: y + self.calls)

        def forward(self, x):
            self.calls += 1
            self.seen.append(self.calls)
            self.mean = self.mean + torch.rand(3) + random.random()
            self.plain += 1
            with torch.no_grad():
                self.fc.bias += 1
            return self.fc(nn.functional.dropout(self.bn(x).mean((2, 3))))

    ends = []
    for checked in (True, False):
        torch.manual_seed(0)
        random.seed(0)
        model = Counting()
        model.fc.weight.grad = torch.ones(3, 3)
        computed = ForwardPass(model, CPU)
        computed.shared = checked
        computed.backward(IMAGES.float(), LABELS, WIDTHS, "hard")
        model.hook.remove()
        assert not model.fc._forward_hooks
        ends.append([model.calls, model.seen, model.plain, model.state_dict(), torch.rand(1),
                     [parameter.grad for parameter in model.parameters()]])
    torch.testing.assert_close(*ends, rtol=0, atol=0)


def test_each_task_decides_for_itself(messages):
    """So that a resumed run trains as one that was not stopped."""
    class NoisyInEvaluation(NoisyInTraining):
        def prepare(self, w):
            if not self.training:
                w = w + 0.5 * w.detach().std() * torch.randn_like(w)
            return DoReFaWeight.prepare(self, w)

    model = network(with_quantizer(NoisyInEvaluation))
    computed = ForwardPass(model, CPU)
    computed.backward(IMAGES, LABELS, WIDTHS, "hard")
    model.eval()
    with torch.no_grad():
        computed.evaluate(IMAGES, LABELS, WIDTHS)
    assert computed.suits == {"training": True, "evaluation": False}


def test_an_optimizer_that_steps_within_backward_keeps_its_state(messages):
    steps = []
    for shared in (True, False):
        model = network()
        optimizer = torch.optim.Adam(model.fc.parameters())
        for parameter in model.fc.parameters():
            parameter.register_post_accumulate_grad_hook(lambda _: optimizer.step())
        computed = ForwardPass(model, CPU)
        computed.shared = shared
        computed.backward(IMAGES, LABELS, WIDTHS, "hard")
        steps.append([state["step"] for state in optimizer.state.values()])
    assert steps[0] == steps[1]
    assert "an optimizer steps within shared_computation" in messages.pop()


def test_numbers_that_are_zero_suit_and_those_that_are_not_finite_do_not():
    nothing = {"a": torch.zeros(3), "b": torch.ones(2), "c": None}
    assert forward_pass.difference(nothing, nothing) == ""
    broken = {**nothing, "a": torch.tensor([1, math.nan, 2])}
    assert "a is not finite" in forward_pass.difference(broken, broken)
    assert "b differs by" in forward_pass.difference({**nothing, "b": torch.zeros(2)}, nothing)
    assert forward_pass.difference(nothing, nothing, nothing) == ""
    assert "b is not the same each time" in forward_pass.difference(
        nothing, nothing, {**nothing, "b": None})
    assert "b differs" in forward_pass.difference({**nothing, "b": torch.tensor([1, math.nan])},
                                                  nothing)


def test_buffers_that_cannot_be_written_stay(messages):
    model = network()
    model.register_buffer("same", torch.ones(1).expand(8))
    computed = ForwardPass(model, CPU)
    computed.backward(IMAGES, LABELS, WIDTHS, "hard")
    assert computed.suits == {"training": True} and not messages
    assert model.bn.bn_dict["4"].num_batches_tracked == 1


def test_errors_of_the_network_are_raised_as_they_are():
    def broken(model, images, target):
        raise KeyError("my own")

    computed = ForwardPass(network(), CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch_forward(patch, broken)
        with pytest.raises(KeyError, match="my own"):
            computed.backward(IMAGES, LABELS, WIDTHS, "hard")


def test_an_optimizer_that_steps_too_early_is_refused():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    other = torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1)
    for sharing in (shared_computation, no_sharing):
        refused = pytest.raises(ValueError, match="an optimizer steps within shared_computation")
        with refused if sharing is shared_computation else contextlib.nullcontext():
            with sharing(model, IMAGES):
                for width in highest_first(WIDTHS):
                    set_bit_width(model, width)
                    forward_loss(model, IMAGES, LABELS)[0].backward()
                    other.step()
                    optimizer.step()
    optimizer.step()


def test_a_run_says_it_in_its_log(tmp_path, monkeypatch, tiny_cifar10):
    prepare = DoReFaWeight.prepare
    monkeypatch.setattr(DoReFaWeight, "prepare", lambda self, w: prepare(
        self, w + 0.3 * w.detach().std() * torch.randn_like(w)))
    assert run(tiny(tiny_cifar10, tmp_path / "r", "--epochs", 1)) == 0
    log, = (tmp_path / "r").glob("log_*.txt")
    note = "note: training recomputes everything at each bit-width: with sharing, the gradient"
    assert log.read_text().count(note) == 1
