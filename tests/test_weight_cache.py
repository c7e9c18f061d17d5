"""Weights that evaluation quantizes once: that it does, and that none of them is ever stale."""
import copy

import pytest
import torch
from torch.testing import assert_close

import reference
from engine.forward_pass import ForwardPass
from models import calibrate, quan_ops, svhnq, set_bit_width
from models.quan_ops import Conv2dQ
from models.weight_cache import KEPT

IMAGES = torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    return reference.fill(svhnq([1, 2, 4, 8, 32], width=1).double(), seed=0).float().eval()


def logits(model, bits=4):
    set_bit_width(model, bits)
    with torch.no_grad():
        return model(IMAGES.to(model.fc.weight.dtype))


def anew(model, bits=4):
    """Return the logits of a copy that has kept nothing, with gradients, where nothing is kept."""
    other = copy.deepcopy(model)
    set_bit_width(other, bits)
    return other(IMAGES.to(model.fc.weight.dtype)).detach()


def test_each_width_is_quantized_once(model, monkeypatch):
    counted, original = [], quan_ops.quantize_weight
    monkeypatch.setattr(quan_ops, "quantize_weight",
                        lambda v, scale, bits: counted.append(bits) or original(v, scale, bits))
    for bits in (4, 2, 4, 2, 32, 4):
        assert_close(logits(model, bits), anew(model, bits), rtol=0, atol=0)
    layers = sum(isinstance(layer, Conv2dQ) for layer in model.modules())
    assert len(counted) == layers * (3 + 6)  # three widths, and six times anew


CHANGES = {
    "in place": lambda model, layer: layer.weight.detach().mul_(-1),
    "load_state_dict": lambda model, layer: model.load_state_dict(negated(model)),
    "assigned": lambda model, layer: model.load_state_dict(negated(model), assign=True),
    "another parameter": lambda model, layer: setattr(
        layer, "weight", torch.nn.Parameter(-layer.weight.detach())),
    "data replaced": lambda model, layer: setattr(layer.weight, "data", -layer.weight.data),
    "data written, then trained": lambda model, layer: (
        layer.weight.data.mul_(-1), model.train(), model.eval()),
    "rounded to bf16 and back": lambda model, layer: model.bfloat16().float(),
    "float64": lambda model, layer: model.double(),
    "optimizer": lambda model, layer: step(model),
}


def negated(model):
    return {key: value if "bn_dict" in key else -value
            for key, value in model.state_dict().items()}


def step(model):
    for layer in model.modules():
        if isinstance(layer, Conv2dQ):
            layer.weight.grad = torch.randn_like(layer.weight)
    torch.optim.Adam(model.parameters(), lr=0.3, fused=True).step()  # in evaluation mode


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_weights_is_seen(model, change):
    before = logits(model)
    layer = next(layer for layer in model.modules() if isinstance(layer, Conv2dQ))
    CHANGES[change](model, layer)
    after = logits(model)
    assert_close(after, anew(model), rtol=0, atol=0)
    assert not torch.equal(before.double(), after.double())


@pytest.mark.parametrize("name", ["normalize_weight", "quantize_weight"])
def test_another_quantizer_is_seen(model, name, monkeypatch):
    before, original = logits(model), getattr(quan_ops, name)

    def other(x, *args):
        found = original(x, *args)
        return (found[0], 2 * found[1]) if name == "normalize_weight" else 2 * found

    monkeypatch.setattr(quan_ops, name, other)
    assert not torch.equal(before, logits(model))
    monkeypatch.undo()
    assert torch.equal(before, logits(model))


def kept(model):
    return sum(layer in KEPT for layer in model.modules())


def test_nothing_is_kept_where_it_must_not_be(model):
    model(IMAGES)  # gradients may be wanted
    model.train()
    logits(model)
    model.eval()
    with torch.no_grad():
        torch.compile(model, backend="eager")(IMAGES)
        negative = {key: -value for key, value in model.named_parameters()}
        torch.func.functional_call(model, negative, IMAGES)
    assert not kept(model)
    with torch.inference_mode():
        inside = svhnq([4], width=1).eval()
        inside(IMAGES)
    assert not kept(inside)


def test_copies_and_state_dicts_do_not_carry_it(model):
    keys = model.state_dict().keys()
    logits(model)
    assert kept(model) and not kept(copy.deepcopy(model))
    assert model.state_dict().keys() == keys
    model.train()
    assert not kept(model)


def test_gradients_after_evaluation(model):
    logits(model)
    set_bit_width(model, 4)
    model(IMAGES).sum().backward()
    assert all(layer.weight.grad is not None for layer in model.modules()
               if isinstance(layer, Conv2dQ))


def test_low_precision_keeps_integers_apart(model):
    forward_pass = ForwardPass(model, torch.device("cpu"), "bf16")
    before = logits(model)
    for _ in "ab":
        with forward_pass.autocast():
            rounded = logits(model)
        with forward_pass.autocast(), torch.enable_grad():
            assert torch.equal(rounded, model(IMAGES))
        assert torch.equal(logits(model), before) and not torch.equal(rounded, before)


def test_calibration_uses_what_is_kept(model):
    calibrate(model, 4, [IMAGES])
    assert_close(logits(model), anew(model), rtol=0, atol=0)
