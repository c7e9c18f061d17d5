"""The networks: construction, switching, the ALL CONV variant, width."""
import pytest
import torch

import models
import reference
from models import DEFAULT_WIDTH, MODELS, bit_widths_of, set_bit_width
from models.quan_ops import (Conv2dQ, DoReFaActivation, DoReFaWeight, QuantizedLayer,
                             SwitchableBatchNorm2d)
from small_networks import Bottlenecks

SIZE = {"resnet20q": 32, "resnet50q": 64, "svhnq": 40}


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def test_a_new_network_stands_at_its_highest_bit_width(name):
    model = MODELS[name]([4, 32, 2], num_classes=7, width=1)
    assert {layer.bits for layer in model.modules() if hasattr(layer, "bits")} == {32}
    assert bit_widths_of(model) == [2, 4, 32]
    assert model(torch.randn(2, 3, SIZE[name], SIZE[name])).shape == (2, 7)


@pytest.mark.parametrize("kind, size", [
    (MODELS["resnet20q"], 32), (MODELS["svhnq"], 40), (Bottlenecks, 64)])
def test_switching_reaches_every_layer_and_changes_the_output(kind, size):
    model = reference.fill(kind([1, 2, 32], width=1).double(), seed=0).eval()
    images = reference.values("input", (2, 3, size, size), seed=0)
    logits = {}
    for bits in (1, 2, 32):
        set_bit_width(model, bits)
        assert {layer.bits for layer in model.modules() if hasattr(layer, "bits")} == {bits}
        logits[bits] = model(images)
    assert not torch.equal(logits[1], logits[2]) and not torch.equal(logits[2], logits[32])
    set_bit_width(model, 1)
    torch.testing.assert_close(model(images), logits[1], rtol=0, atol=0)


def test_a_bit_width_that_was_not_trained_is_refused_and_nothing_moves():
    model = MODELS["svhnq"]([1, 2, 4, 8, 32], width=1)
    with pytest.raises(ValueError, match="no 3-bit BatchNorm; choose from 1, 2, 4, 8, 32"):
        set_bit_width(model, 3)
    assert {layer.bits for layer in model.modules() if hasattr(layer, "bits")} == {32}


@pytest.mark.parametrize("bit_widths", [[], [0], [16], [2, 2], ["x"]])
def test_wrong_bit_widths_are_refused(name, bit_widths):
    with pytest.raises(ValueError, match="bit-width"):
        MODELS[name](bit_widths)


@pytest.mark.parametrize("bit_widths", [[3], [8, 7, 6, 5, 4, 3, 2, 1, 32]])
def test_any_list_of_bit_widths(name, bit_widths):
    model = MODELS[name](bit_widths, width=1)
    assert bit_widths_of(model) == sorted(bit_widths)


def test_training_moves_only_the_active_batch_norms(name):
    torch.manual_seed(0)
    model = MODELS[name]([1, 4, 32], width=1)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    set_bit_width(model, 4)
    model(torch.rand(2, 3, SIZE[name], SIZE[name]))
    moved = {key for key, value in model.state_dict().items()
             if not torch.equal(before[key], value)}
    counted = {key for key in moved if key.endswith("num_batches_tracked")}
    shared = {key for key in moved if "skip_bn" in key}  # resnet20q's shortcut serves all
    switchable = sum(isinstance(layer, SwitchableBatchNorm2d) for layer in model.modules())
    assert all(".bn_dict.4." in f".{key}" for key in moved - shared)
    assert len(counted - shared) == switchable
    assert bool(shared) == (name == "resnet20q")


def test_all_conv_quantizes_every_convolution(name):
    def kinds(all_conv):
        model = MODELS[name]([2, 32], width=1, all_conv=all_conv)
        full_precision = [key for key, layer in model.named_modules()
                          if isinstance(layer, torch.nn.Conv2d) and not isinstance(layer, Conv2dQ)]
        return full_precision, model

    stem_and_shortcuts = {
        "svhnq": {"layers.0"}, "resnet20q": {"conv0", "layers.3.skip_conv", "layers.6.skip_conv"},
        "resnet50q": {"conv1", *(f"layer{stage}.0.downsample.0" for stage in range(1, 5))}}
    assert set(kinds(False)[0]) == stem_and_shortcuts[name]
    full_precision, model = kinds(True)
    assert full_precision == []
    assert model.state_dict().keys() == kinds(False)[1].state_dict().keys()
    assert model(torch.rand(2, 3, SIZE[name], SIZE[name])).shape[0] == 2


def test_width_multiplies_the_channels(name):
    def channels(width):
        return [layer.out_channels for layer in MODELS[name]([4], width=width).modules()
                if isinstance(layer, torch.nn.Conv2d)]

    assert channels(2) == [2 * count for count in channels(1)]
    assert channels(DEFAULT_WIDTH[name]) == [
        layer.out_channels for layer in MODELS[name]([4]).modules()
        if isinstance(layer, torch.nn.Conv2d)]


def test_resnet50q_initialisation():
    torch.manual_seed(0)
    model = MODELS["resnet50q"]([4])
    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d):  # Kaiming normal, fan-out
            fan_out = layer.out_channels * layer.kernel_size[0] ** 2
            assert layer.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
        if isinstance(layer, torch.nn.BatchNorm2d):
            assert (layer.weight == 1).all() and (layer.bias == 0).all()


def test_another_default_quantizer_takes_effect(monkeypatch):
    """Nothing that a reader edits is without effect."""
    class Own(DoReFaWeight):
        pass

    monkeypatch.setitem(models.QUANTIZERS, "dorefa", lambda layer, bit_widths: (
        Own() if isinstance(layer, QuantizedLayer) else DoReFaActivation()))
    found = {type(layer.quantizer) for layer in models.build("svhnq", [2, 8], 10, 1).modules()
             if isinstance(layer, QuantizedLayer)}
    assert found == {Own}


def test_new_quantizers_are_in_the_mode_of_their_layers():
    model = models.build("svhnq", [2, 8], 10, 1).eval()
    models.set_quantizers(model, "lsq", [2, 8])
    assert not any(module.training for module in model.modules())


def test_dorefa_is_not_set_afterwards():
    model = models.build("svhnq", [2, 8], 10, 1, quantizer="lsq")
    with pytest.raises(ValueError, match="dorefa is what layers hold when they are built"):
        models.set_quantizers(model, "dorefa", [2, 8])
