"""Float networks made into any-precision ones: the same numbers as theirs, and as ours."""
import re

import pytest
import torch
from float_networks import SMALL, build, float_resnet20, float_svhn, noise
from torch import nn
from torch.testing import assert_close

import models
import reference
from engine.setup import load_pretrained
from models import MODELS, bit_widths_of, convert, quan_ops, set_bit_width
from models.converted import fit_float_weights
from models.losses import any_precision_backward
from models.lsq import initial_weight_range
from models.sharing import no_sharing, shared_computation
from runs import assert_same

WIDTHS = [1, 2, 8, 32]
NAMES = ("resnet18", "resnet50", "vgg11_bn", "mobilenet_v2", "densenet121", "shufflenet_v2_x1_0",
         "regnet_y_400mf")


@pytest.fixture(scope="module", params=NAMES)
def pair(request):
    """A float network and its conversion. No test changes the first."""
    network = build(request.param)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    yield network, convert(network, WIDTHS)
    assert_same(dict(network.state_dict()), before)
    assert not any(isinstance(layer, (quan_ops.Conv2dQ, quan_ops.ActivationQ))
                   for layer in network.modules())


@pytest.fixture(scope="module")
def images():
    return noise()


@torch.no_grad()
def test_the_float_networks_logits_at_32_bits(pair, images, monkeypatch):
    network, model = pair
    monkeypatch.setattr(quan_ops.DoReFaWeight, "prepare", lambda self, w: (w, torch.ones(())))
    assert not model.training and bit_widths_of(model) == WIDTHS and not model.note
    assert_close(model(images), network(images), rtol=0, atol=1e-5)


def test_weights_go_to_every_bit_width(pair):
    network, model = pair
    own = model.state_dict()
    fitted, left = fit_float_weights(model, network.state_dict())
    assert not left
    assert_same(fitted, dict(own))


def test_weights_go_to_bit_widths_of_two_numbers_and_not_to_quantizers():
    network = build("small_shufflenet")
    model = models.build(SMALL, ["w2a4", 4], 10, quantizer="lsq")
    fitted, left = fit_float_weights(model, network.state_dict())
    quantizers = {key for key in model.state_dict() if ".quantizer." in key}
    assert not left and fitted.keys() == model.state_dict().keys() - quantizers
    state = network.state_dict()
    for width in ("w2a4", "4"):
        fitted_norm = fitted[f"network.conv1.1.bn_dict.{width}.running_mean"]
        assert torch.equal(fitted_norm, state["conv1.1.running_mean"])


def test_quantizers_of_float_weights_are_initialized_from_the_data(images):
    """Those of the weights that were drawn before would be of another size."""
    state = {key: 5 * value if value.ndim == 4 else value
             for key, value in build("small_shufflenet").state_dict().items()}
    model = models.build(SMALL, [4], 10, quantizer="lsq")
    message, are_new = load_pretrained(model, "x", state)
    assert are_new and re.search(r"; \d+ parameters of quantizers are new", message)
    models.initialize_quantizers(model, images, models.highest_first([4]))
    for layer in model.modules():
        if isinstance(layer, quan_ops.QuantizedLayer):
            assert_close(layer.quantizer.log_range_dict["4"].detach(),
                         initial_weight_range(layer.weight, 4).log())


def test_every_width_and_a_step(pair, images):
    _, model = pair
    with torch.no_grad():
        outputs = [set_bit_width(model, bits) or model(images) for bits in (1, 8, 32)]
    assert all(logits.shape == (2, 10) and logits.isfinite().all() for logits in outputs)
    model.train()
    any_precision_backward(model, images, torch.tensor([3, 1]), [2, 32])
    for name, parameter in model.named_parameters():
        used = ".bn_dict." not in name or name.split(".")[-2] in ("2", "32")
        assert (parameter.grad is not None) == used, name
    model.zero_grad()
    model.eval()


# ---- our own networks, by float twins of the same names

@pytest.fixture(
    scope="module", params=[("svhnq", float_svhn, 40), ("resnet20q", float_resnet20, 16)])
def twins(request):
    """One of our networks, the conversion of its float twin with the same weights, and images."""
    name, twin, size = request.param
    ours = reference.fill(MODELS[name](WIDTHS, width=1).double(), seed=0)
    network, keep = twin()
    model = convert(network.double(), WIDTHS, keep)
    model.network.load_state_dict(ours.state_dict())
    return ours, model, reference.values("images", (4, 3, size, size), 0)


def step(model, images, **kwargs):
    """Return the results of an any-precision step from the same weights, and the gradients."""
    model.train()
    model.zero_grad()
    torch.manual_seed(5)  # dropout's
    results = any_precision_backward(model, images, torch.tensor([1, 0, 7, 3]), WIDTHS, **kwargs)
    return results, {name.removeprefix("network."): parameter.grad
                     for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("loss", ("recursive", "hard"))
def test_a_twin_equals_ours(twins, loss):
    ours, model, images = twins
    expected, got = step(ours, images, loss=loss), step(model, images, loss=loss)
    assert_close(got, expected, rtol=0, atol=1e-12)
    for bits in WIDTHS:
        logits = []
        for network in (ours.eval(), model.eval()):
            set_bit_width(network, bits)
            logits.append(network(images))
        assert_close(*logits, rtol=0, atol=1e-12)


@pytest.fixture
def runs_of(monkeypatch):
    """A function that returns how often a float convolution has run since it was last asked."""
    ran = []
    forward = nn.Conv2d.forward
    monkeypatch.setattr(nn.Conv2d, "forward",
                        lambda layer, x: ran.append(layer) or forward(layer, x))

    def count(layer):
        found = sum(other is layer for other in ran)
        ran.clear()
        return found
    return count


def test_shared_as_computed_anew(twins, runs_of):
    _, model, images = twins
    stem = model.network.get_submodule(model.layers[0].name)
    shared = step(model, images)
    assert runs_of(stem) == 1
    assert_close(shared, step(model, images, sharing=no_sharing), rtol=0, atol=1e-10)
    assert runs_of(stem) == len(WIDTHS)


def test_a_torchvision_stem_is_shared_once(runs_of):
    model = convert(build("small_shufflenet").double(), [2, 8, 32])
    images = reference.values("images", (2, 3, 32, 32), 0)
    grads = {}
    runs_of(model.network.conv1[0])  # of the conversion
    for sharing in (shared_computation, no_sharing):
        model.zero_grad()
        model.train()
        any_precision_backward(model, images, torch.tensor([3, 1]), [2, 8, 32], sharing=sharing)
        grads[sharing] = {name: value.grad for name, value in model.named_parameters()}
        assert runs_of(model.network.conv1[0]) == (1 if sharing is shared_computation else 3)
    assert_close(*grads.values(), rtol=1e-9, atol=1e-9)
