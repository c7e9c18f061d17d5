"""ONNX files: integer convolutions with the numbers of the network."""
import numpy
import pytest
import torch
from torch import nn

from deploy.layers import compare_layers
from exported import EDITS, SIZES, assert_logits, assert_refused, network
from models import set_bit_width
from models.quan_ops import (ActivationQ, Conv2dQ, DoReFaActivation, DoReFaWeight,
                             SwitchableBatchNorm2d)

onnx = pytest.importorskip("onnx")
onnx_file = pytest.importorskip("deploy.onnx_file")


def exported(model, bits, path, size, **kwargs):
    onnx_file.export(model, bits if isinstance(bits, list) else [bits], path, size, **kwargs)
    return onnx_file.load(path)


@pytest.mark.parametrize("all_conv", [False, True])
@pytest.mark.parametrize("name", ["svhnq", "resnet20q"])
def test_logits_are_the_networks_at_every_bit_width(name, all_conv, tmp_path):
    widths = (1, 2, 3, 4, 5, 6, 7, 8, 32) if not all_conv else (1, 4, 8)
    model, images = network(name, widths, all_conv)
    for bits in widths:
        run = exported(model, bits, tmp_path / f"{bits}.onnx", SIZES[name])
        assert_logits(run, model, images, bits)
        assert run(images.numpy()[:3], bits).shape == (3, 10)  # any number of images


@pytest.mark.parametrize("name", ["svhnq", "resnet20q"])
def test_one_file_of_any_bit_width_gives_the_same_bits_and_is_small(name, tmp_path):
    model, images = network(name, (1, 2, 4, 8))
    with torch.no_grad():  # exact zeros, and a weight within rounding of a threshold
        layer = next(layer for layer in model.modules() if isinstance(layer, Conv2dQ))
        layer.weight[0, :2] = 0
        layer.weight[0, 2:4] = 1e-9
    run = exported(model, [1, 2, 4, 8], tmp_path / "any.onnx", SIZES[name], any_width=True)
    for bits in (1, 2, 4, 8):
        alone = exported(model, bits, tmp_path / f"{bits}.onnx", SIZES[name])
        numpy.testing.assert_array_equal(run(images.numpy(), bits), alone(images.numpy(), bits))
    with pytest.raises(ValueError, match="3 bits"):
        run(images.numpy(), 3)
    stored = [constant for constant in onnx.load(tmp_path / "any.onnx").graph.initializer
              if constant.data_type == onnx.TensorProto.UINT8 and len(constant.dims) == 4]
    weights = sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, Conv2dQ))
    assert sum(numpy.prod(constant.dims) for constant in stored) <= 1.01 * weights  # and box sums


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_layers_levels_are_float64s_but_at_a_threshold(bits, tmp_path):
    torch.manual_seed(1)
    model = nn.Sequential(ActivationQ(), Conv2dQ(3, 64, 3, padding=1, bias=False),
                          SwitchableBatchNorm2d(64, [bits]), ActivationQ(), nn.Flatten())
    norm = model[2].bn_dict[str(bits)]
    with torch.no_grad():
        for part in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            part.uniform_(0.05, 0.5)
        norm.weight[:8] *= -1
    set_bit_width(model, bits)
    model.eval()
    images = torch.randn(4, 3, 16, 16)
    run = exported(model, bits, tmp_path / "x.onnx", 16)
    n = 2**bits - 1
    levels = n * torch.from_numpy(run(images.numpy(), bits)).double()
    with torch.no_grad():  # from the same levels, as the first ActivationQ's are float32's
        a = model[0](images).double()
        z = n * model.double()[2](model[1](a)).clamp(0, 1).flatten(1)
    odd = levels.round() != z.round()
    assert ((z - z.floor() - 0.5).abs()[odd] < 1e-5 * n).all() and odd.float().mean() < 1e-3
    assert len(levels.unique()) > 1


@pytest.mark.parametrize("change, widths", [
    ("none", ["w2a4", "w4a2", "w8a1"]), ("own bits", [1, 2, 4, "w4a8"]),
    ("a scale per channel", [1, 2, 8]), ("lsq", [1, 2, 4, 8, "w2a4"])])
def test_changed_networks(change, widths, tmp_path):
    model, images = network("svhnq", widths, change=change)
    for bits in widths:
        run = exported(model, bits, tmp_path / f"{bits}.onnx", SIZES["svhnq"])
        assert_logits(run, model, images, bits)
        if change == "own bits":
            stored = onnx.load(tmp_path / f"{bits}.onnx").graph.initializer
            assert any(constant.data_type == onnx.TensorProto.UINT8
                       and constant.dims == [8, 8, 3, 3] for constant in stored)
    with pytest.raises(ValueError, match="has no w1a3 bits"):
        run(images.numpy(), "w1a3")


@pytest.mark.parametrize("change, highest", [
    ("own bits", 8), ("own bits", 4), ("a scale per channel", 8), ("lsq", 8)])
def test_one_file_of_any_bit_width_of_changed_networks(change, highest, tmp_path):
    widths = [bits for bits in (1, 2, 4, 8) if bits <= highest]
    model, images = network("svhnq", widths, change=change)
    run = exported(model, widths, tmp_path / "any.onnx", SIZES["svhnq"], any_width=True)
    for bits in widths:
        alone = exported(model, bits, tmp_path / f"{bits}.onnx", SIZES["svhnq"])
        numpy.testing.assert_array_equal(run(images.numpy(), bits), alone(images.numpy(), bits))
    sizes = {path.stem: path.stat().st_size for path in tmp_path.iterdir()}
    total = sum(sizes[str(bits)] for bits in widths)
    assert sizes["any"] < 1.1 * total  # without long lists of exceptions


def test_a_concatenation_of_sums_with_scales_of_channels(tmp_path):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = ActivationQ()
            self.conv = Conv2dQ(3, 4, 1)
            self.bn = SwitchableBatchNorm2d(4, [4])

        def forward(self, x):
            a = self.act(x)
            y = self.conv(a)
            return torch.cat([self.bn(y), y, a], 1).flatten(1)

    torch.manual_seed(0)
    model, images = Both().eval(), torch.rand(2, 3, 8, 8)
    nn.init.uniform_(model.bn.bn_dict["4"].weight)
    set_bit_width(model, 4)
    with torch.no_grad():
        expected = model(images)
    found = exported(model, 4, tmp_path / "x.onnx", 8)(images.numpy(), 4)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-6)


def test_weights_and_activations_are_uint8_in_integer_convolutions(tmp_path):
    model, _ = network("resnet20q", (4,))
    onnx_file.export(model, [4], tmp_path / "x.onnx", 32)
    kinds = [node.op_type for node in onnx.load(tmp_path / "x.onnx").graph.node]
    assert kinds.count("ConvInteger") == 18 and kinds.count("Conv") == 3  # stem and two shortcuts


@pytest.mark.parametrize("what, message", [
    ("weight", "layer layers.0.conv0 at 2 bits: its quantizer's weights"),
    ("activation", "layer layers.0.act0 at 2 bits: it is not a clip"),
    ("layer", "layer pool .AdaptiveMaxPool2d. has no place"),
    ("network", "cannot be traced"),
    ("any", "3 bits do not follow from 8-bit weights"),
])
def test_what_a_file_cannot_hold_is_named(what, message, tmp_path, monkeypatch):
    model, _ = network("resnet20q", (2, 3))
    if what == "weight":
        monkeypatch.setattr(DoReFaWeight, "integers", lambda self, v, e: (v**3, e))
    if what == "activation":
        monkeypatch.setattr(DoReFaActivation, "integers",
                            lambda self, x, rounding: (x.clamp(0, 2), 1.0))
    if what == "layer":
        model.pool = nn.AdaptiveMaxPool2d(1)
    if what == "network":
        monkeypatch.setattr(type(model), "forward", lambda self, x: x if x.sum() > 0 else -x)
    with pytest.raises(ValueError, match=message):
        onnx_file.export(model, [2, 3] if what == "any" else [2], tmp_path / "x.onnx", 32,
                         any_width=what == "any")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dims, is_held", [
    ((2, 3), True), ((-2, -1), True), (1, False), (2, False), ((1, 2), False)])
def test_a_mean_is_over_height_and_width(dims, is_held, tmp_path):
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 1)
            self.fc = nn.Linear(6, 5)

        def forward(self, x):
            return self.fc(self.conv(x).mean(dims).flatten(1))

    model, images = Mean().eval(), torch.rand(2, 3, 6, 1)
    if not is_held:
        with pytest.raises(ValueError, match="layer mean .mean. has no place"):
            onnx_file.export(model, [4], tmp_path / "x.onnx", (3, 6, 1))
        return
    found = exported(model, 4, tmp_path / "x.onnx", (3, 6, 1))(images.numpy(), 4)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_network_is_refused(edit, tmp_path, monkeypatch):
    assert_refused(edit, onnx_file, tmp_path / "x.onnx", monkeypatch)


def test_a_linear_layer_between_others_and_bit_widths_of_two_numbers_are_refused(tmp_path):
    model, _ = network("svhnq", [2], change="a linear layer")
    with pytest.raises(ValueError, match="layer fc .LinearQ. has no place in an exported file"):
        onnx_file.export(model, [2], tmp_path / "x.onnx", 40)
    model, _ = network("svhnq", ["w2a4", 8])
    with pytest.raises(ValueError, match="w2a4 bits do not follow from 8-bit weights"):
        onnx_file.export(model, ["w2a4", 8], tmp_path / "x.onnx", 40, any_width=True)
    assert not list(tmp_path.iterdir())


def test_layers_one_by_one(monkeypatch):
    model, images = network("resnet20q", (4,))
    found = compare_layers(model, onnx_file, images.numpy(), 4)
    assert found["layers"] == 18 and found["levels"] > 100_000
    assert found["far"] == 0 and 0 < found["relative"] < 1e-6
    right = onnx_file.affine_of
    monkeypatch.setattr(
        onnx_file, "affine_of", lambda layer: [1.01 * part for part in right(layer)])
    assert compare_layers(model, onnx_file, images.numpy(), 4)["far"] > 1000
