"""ONNX files: the numbers of the network in ONNX Runtime and OpenVINO."""
import functools
import re

import numpy
import pytest
import torch
from torch import nn

from deploy.files import to_pixels
from deploy.runtimes import onnxruntime_run, openvino_core, openvino_run
from deploy.thresholds import requantization
from exported import EDITS, SIZES, assert_logits, network
from models import BitWidth, set_bit_width
from models.quan_ops import (ActivationQ, Conv2dQ, DoReFaActivation, DoReFaWeight,
                             SwitchableBatchNorm2d)
from models.resnet_quan import Bottleneck

onnx = pytest.importorskip("onnx")
onnx_file = pytest.importorskip("deploy.onnx_file")
onnxruntime = pytest.importorskip("onnxruntime")
RUNTIMES = {"onnxruntime": onnxruntime_run, "openvino": openvino_run}


def exported(model, bits, path, size, runtime="onnxruntime", **kwargs):
    pytest.importorskip(runtime)
    onnx_file.export(model, bits if isinstance(bits, list) else [bits], path, size, **kwargs)
    return RUNTIMES[runtime](path)


@functools.cache
def saturates():
    """Return whether sums of 8 bits are wrong in OpenVINO, as on CPUs without VNNI."""
    from openvino import opset13 as ops, Model

    x = ops.parameter([1, 64, 8, 8], numpy.float32)
    a = ops.fake_quantize(x, *map(numpy.float32, (0, 1, 0, 1)), 256)
    weight = ops.multiply(ops.convert(ops.constant(numpy.full((16, 64, 3, 3), 127, numpy.int8)),
                                      "f32"), numpy.float32(1))
    y = ops.convolution(a, weight, [1, 1], [0, 0], [0, 0], [1, 1])
    content = openvino_core().compile_model(Model([y], [x], "sums"), "CPU")
    found = content(numpy.ones((1, 64, 8, 8), numpy.float32))[0]
    return not numpy.allclose(found, 127 * 64 * 9, rtol=1e-6)


def right_in(runtime, bits):
    """Return whether a runtime computes sums of this bit-width right on this CPU."""
    width = BitWidth.of(bits)
    return runtime == "onnxruntime" or width.activations in (32, *range(8)) or not saturates()


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("name, widths, all_conv", [
    ("svhnq", (1, 2, 3, 4, 5, 6, 7, 8, 32, "w2a4", "w4a2", "w8a1", "w7a8"), False),
    ("svhnq", (1, 4, 8), True), ("resnet20q", (1, 2, 4, 8), False), ("resnet20q", (1, 7), True)])
def test_logits_are_the_networks_at_every_bit_width(name, widths, all_conv, runtime, tmp_path):
    pytest.importorskip(runtime)
    widths = [bits for bits in widths if right_in(runtime, bits)]
    model, images = network(name, widths, all_conv)
    for bits in widths:
        run = exported(model, bits, tmp_path / f"{bits}.onnx", SIZES[name], runtime)
        assert_logits(run, model, images, bits)
        assert run(images.numpy()[:3], bits).shape == (3, 10)  # any number of images


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("change, widths", [
    ("own bits", [1, 4]), ("a scale per channel", [1, 2, 8]), ("lsq", [1, 4, "w2a4"])])
def test_changed_networks(change, widths, runtime, tmp_path):
    pytest.importorskip(runtime)
    widths = [bits for bits in widths if right_in(runtime, bits)]
    model, images = network("svhnq", widths, change=change)
    for bits in widths:
        run = exported(model, bits, tmp_path / f"{bits}.onnx", SIZES["svhnq"], runtime)
        assert_logits(run, model, images, bits)
        if change == "own bits":
            stored = onnx.load(tmp_path / f"{bits}.onnx").graph.initializer
            assert any(constant.data_type == onnx.TensorProto.INT8
                       and constant.dims == [8, 8, 3, 3] for constant in stored)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_bottlenecks_at_one_bit(runtime, tmp_path):
    """resnet50q ends with an activation before its average, which only the average reads."""
    torch.manual_seed(0)
    bn = functools.partial(SwitchableBatchNorm2d, bit_widths=[1])
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), *(Bottleneck(channels, 8, stride, bn, nn.Conv2d)
                               for channels, stride in ((16, 2), (32, 1), (32, 1))),
        bn(32), ActivationQ(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()
    images = torch.randn(4, 3, 12, 12)
    model(images)
    run = exported(model.eval(), 1, tmp_path / "x.onnx", 12, runtime)
    assert_logits(run, model, images, 1, flipped=0)


# ---- integer biases

@pytest.mark.parametrize("n, highest, largest, found", [
    (1, 1, 1, 1.0), (3, 3, 3, 1.0), (7, 15, 7, 0.99), (15, 15, 15, 0.8)])
def test_sums_are_requantized_to_the_same_levels(n, highest, largest, found):
    """At every integer sum that a channel can have, in float32 as runtimes compute it."""
    generator = numpy.random.default_rng(0)
    count = 0
    for _ in range(100):
        integers = generator.integers(-largest, largest + 1, (1, 16, 3, 3))
        p = generator.uniform(0.5, 4, 1) * n / (highest * largest * 60) * generator.choice([-1, 1])
        q = generator.uniform(-1, 1.5, 1) * n
        way = requantization(integers, p, q, n, highest)
        if way is None:
            continue
        count += 1
        sums = numpy.arange(-highest * abs(integers).sum(), highest * abs(integers).sum() + 1)
        wide = numpy.float32(way.factor * sums + way.bias) * numpy.float32(way.ratio)
        reached = (sums >= highest * integers[integers < 0].sum()) & (
            sums <= highest * integers[integers > 0].sum())
        expected = numpy.rint(p * sums + q).clip(0, n)
        numpy.testing.assert_array_equal(numpy.rint(wide).clip(0, n)[reached], expected[reached])
        assert abs(way.factor * integers).max() <= 127
        assert 2 * highest * abs(way.factor * integers).max() < 2**15
    assert count >= 100 * found


def test_ties_and_channels_without_a_way():
    one = numpy.ones((1, 4, 1, 1), int)
    way = requantization(one, numpy.array([0.5]), numpy.array([0.0]), 1, 3)
    sums = numpy.arange(13)
    found = numpy.rint(numpy.float32(way.ratio) * numpy.float32(way.factor * sums + way.bias))
    numpy.testing.assert_array_equal(found.clip(0, 1), sums > 1)  # half goes to even: 0
    assert requantization(one, numpy.array([0.5]), numpy.array([0.0]), 3, 3) is None
    assert requantization(one, numpy.array([0.0]), numpy.array([0.7]), 3, 3) is None
    assert requantization(255 * one, numpy.array([0.1]), numpy.array([0.7]), 3, 3) is None
    assert requantization(200 * one, numpy.array([1e-12]), numpy.array([9.0]), 3, 3) is None


def test_a_bias_is_no_integer_where_that_is_not_exact(tmp_path):
    """ONNX Runtime rounds the bias of a convolution whose levels follow it, if it sees that."""
    model, images = network("svhnq", (6,))
    run = exported(model, 6, tmp_path / "x.onnx", SIZES["svhnq"])
    assert_logits(run, model, images, 6, flipped=1e-6)
    kinds = {node.op_type for node in onnx.load(tmp_path / "x.onnx").graph.node}
    assert "Min" in kinds


def test_convolutions_are_integer(tmp_path):
    model, _ = network("resnet20q", (2,))
    onnx_file.export(model, [2], tmp_path / "x.onnx", 32)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(str(tmp_path / "x.onnx"), options, ["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert kinds.count("QLinearConv") == 9  # those before an activation

    pytest.importorskip("openvino")
    compiled = openvino_core().compile_model(tmp_path / "x.onnx", "CPU")
    layers = [layer for layer in compiled.get_runtime_model().get_ops()
              if layer.get_rt_info()["layerType"].astype(str) == "Convolution"]
    integer = [layer for layer in layers
               if layer.get_input_element_type(0).get_type_name() == "u8"]
    assert len(integer) == 18


# ---- one file of any bit-width

@pytest.mark.parametrize("change, widths", [
    ("none", [1, 2, 4, 8]), ("none", [3, 5]), ("own bits", [1, 4]), ("a scale per channel", [2, 8]),
    ("lsq", [1, 2])])
def test_one_file_of_any_bit_width_gives_the_same_bits(change, widths, tmp_path):
    model, images = network("svhnq", widths, change=change)
    with torch.no_grad():  # exact zeros, and a weight within rounding of a threshold
        layer = [layer for layer in model.modules() if isinstance(layer, Conv2dQ)][1]
        layer.weight[0, :2] = 0
        layer.weight[0, 2:4] = 1e-9
    run = exported(model, widths, tmp_path / "any.onnx", SIZES["svhnq"], any_width=True)
    alone = {}
    for bits in widths:
        alone[bits] = exported(model, bits, tmp_path / f"{bits}.onnx", SIZES["svhnq"])
        numpy.testing.assert_allclose(run(images.numpy(), bits), alone[bits](images.numpy(), bits),
                                      rtol=0, atol=1e-6)
        assert_logits(run, model, images, bits)
    if change == "none" and 8 in widths:
        stored = [constant for constant in onnx.load(tmp_path / "any.onnx").graph.initializer
                  if constant.data_type == onnx.TensorProto.INT8 and len(constant.dims) == 4]
        weights = sum(layer.weight.numel() for layer in model.modules()
                      if isinstance(layer, Conv2dQ))
        assert sum(numpy.prod(constant.dims) for constant in stored) < 1.01 * weights  # and ones


def test_other_bits_fail_in_the_runtime_itself(tmp_path):
    model, images = network("svhnq", [2, 4])
    exported(model, [2, 4], tmp_path / "any.onnx", SIZES["svhnq"], any_width=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(tmp_path / "any.onnx"), options,
                                           ["CPUExecutionProvider"])
    for bits in (-1, 0, 1, 3, 32):
        with pytest.raises(Exception, match="bits_must_be_one_of_2_4"):
            session.run(None, {"images": images.numpy(), "bits": numpy.array(bits)})


# ---- what a file says of itself

def test_names_shapes_metadata_and_pixels(tmp_path):
    model, _ = network("svhnq", [4])
    about = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}
    run = exported(model, 4, tmp_path / "x.onnx", SIZES["svhnq"], metadata={"bits": "4", "a": "b"},
                   pixels=(about["mean"], about["std"]))
    session = onnxruntime.InferenceSession(str(tmp_path / "x.onnx"))
    images, = session.get_inputs()
    logits, = session.get_outputs()
    assert (images.name, images.type, images.shape) == ("images", "tensor(uint8)",
                                                        ["batch", 40, 40, 3])
    assert (logits.name, logits.type, logits.shape) == ("logits", "tensor(float)", ["batch", 10])
    assert session.get_modelmeta().custom_metadata_map == {"bits": "4", "a": "b"}

    pixels = numpy.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), numpy.uint8)
    values = (pixels / 255 - numpy.array(about["mean"])) / numpy.array(about["std"])
    normalized = values.transpose(0, 3, 1, 2).astype(numpy.float32)
    numpy.testing.assert_array_equal(to_pixels(normalized, about), pixels)
    with torch.no_grad():
        expected = model(torch.from_numpy(normalized)).numpy()
    numpy.testing.assert_allclose(run(pixels, 4), expected, rtol=0, atol=1e-5)


# ---- what is held, and what is refused

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


def test_a_tensor_that_is_read_twice(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = ActivationQ()
            self.conv = Conv2dQ(3, 3, 3, padding=1)
            self.last = Conv2dQ(6, 5, 1)

        def forward(self, x):
            a = self.act(x)
            y = self.conv(a) + a
            return self.last(torch.cat([y, y], 1)).flatten(1)

    torch.manual_seed(0)
    model, images = Twice().eval(), torch.rand(2, 3, 8, 8)
    set_bit_width(model, 4)
    with torch.no_grad():
        expected = model(images)
    found = exported(model, 4, tmp_path / "x.onnx", 8)(images.numpy(), 4)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-6)


def test_a_batch_norm_without_weight_and_bias(tmp_path):
    model, images = network("svhnq", [4])
    norm = nn.BatchNorm2d(8, affine=False).eval()
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    model.layers[4].bn_dict["4"] = norm
    assert_logits(exported(model, 4, tmp_path / "x.onnx", 40), model, images, 4)


def test_the_lowest_weight_of_8_bits(tmp_path):
    """-128, which int8 holds, though it is larger than the largest; the others are even and odd."""
    model, images = network("svhnq", [8], change="lsq")
    layer = model.get_submodule("layers.6")
    set_bit_width(model, 8)
    with torch.no_grad():
        layer.weight.view(-1)[0] = -500 * layer.integer_weight()[1]
        assert layer.integer_weight()[0].min() == -128
        assert_logits(exported(model, 8, tmp_path / "x.onnx", 40), model, images, 8)


@pytest.mark.parametrize("what, message", [
    ("normalization", "layer bn .GroupNorm. has no running statistics"),
    ("statistics", "layer bn .BatchNorm2d. has no running statistics"),
    ("per channel", "layer layers.0.act0 at 2 bits: it is not a clip"),
    ("weight", "layer layers.0.conv0 at 2 bits: its quantizer's weights"),
    ("activation", "layer layers.0.act0 at 2 bits: it is not a clip"),
    ("layer", "layer pool .AdaptiveMaxPool2d. has no place"),
    ("network", "cannot be traced"),
])
def test_what_a_file_cannot_hold_is_named(what, message, tmp_path, monkeypatch):
    model, _ = network("resnet20q", (2, 3))
    if what == "weight":
        monkeypatch.setattr(DoReFaWeight, "integers", lambda self, v, e: (v**3, e))
    if what == "activation":
        monkeypatch.setattr(DoReFaActivation, "integers",
                            lambda self, x, rounding: (x.clamp(0, 2), 1.0))
    if what == "normalization":
        model.bn.bn_dict["2"] = nn.GroupNorm(4, 64)
    if what == "statistics":
        model.bn.bn_dict["2"] = nn.BatchNorm2d(64, track_running_stats=False)
    if what == "per channel":
        shift = torch.linspace(0, 1, 16).view(16, 1, 1)
        monkeypatch.setattr(DoReFaActivation, "integers", lambda self, x, rounding: (
            (3 * (x + shift)).clamp(0, 3).round(), 1 / 3))
    if what == "layer":
        model.pool = nn.AdaptiveMaxPool2d(1)
    if what == "network":
        monkeypatch.setattr(type(model), "forward", lambda self, x: x if x.sum() > 0 else -x)
    with pytest.raises(ValueError, match=message):
        onnx_file.export(model, [2], tmp_path / "x.onnx", 32)
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
    model, _ = network("resnet20q", (2,))
    change, message = EDITS[edit]
    change(model, monkeypatch)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        onnx_file.export(model, [2], tmp_path / "x.onnx", 32)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_linear_layer_between_others_and_bit_widths_of_two_numbers_are_refused(tmp_path):
    model, _ = network("svhnq", [2], change="a linear layer")
    with pytest.raises(ValueError, match="layer fc .LinearQ. has no place in an exported file"):
        onnx_file.export(model, [2], tmp_path / "x.onnx", 40)
    model, _ = network("svhnq", ["w2a4", 8])
    with pytest.raises(ValueError, match="w2a4 is not one number of bits"):
        onnx_file.export(model, ["w2a4", 8], tmp_path / "x.onnx", 40, any_width=True)
    assert not list(tmp_path.iterdir())
