"""OpenVINO files: int8 and single-bit convolutions with the numbers of the network."""
import resource
from functools import partial

import pytest
import torch
from torch import nn

from exported import EDITS, SIZES, assert_logits, assert_refused, network
from models import set_bit_width
from models.quan_ops import ActivationQ, Conv2dQ, SwitchableBatchNorm2d
from models.resnet_quan import Bottleneck

openvino = pytest.importorskip("openvino")
openvino_file = pytest.importorskip("deploy.openvino_file")


def exported(model, bits, path, size):
    openvino_file.export(model, [bits], path, size)
    return openvino_file.load(path)


needs_vnni = pytest.mark.skipif(not openvino_file.sums_are_exact(),
                                reason="8-bit sums saturate on this CPU")


@pytest.mark.parametrize("name, bits, all_conv", [
    *((name, bits, False) for name in ("svhnq", "resnet20q") for bits in (1, 2, 4, 7, 32)),
    *(pytest.param(name, 8, False, marks=needs_vnni) for name in ("svhnq", "resnet20q")),
    ("svhnq", 1, True), ("resnet20q", 1, True), ("resnet20q", 2, True)])
def test_logits_are_the_networks(name, bits, all_conv, tmp_path):
    model, images = network(name, (bits,), all_conv)
    run = exported(model, bits, tmp_path / "x.xml", SIZES[name])
    assert_logits(run, model, images, bits)
    assert run(images.numpy()[:3], bits).shape == (3, 10)  # any number of images
    with pytest.raises(ValueError, match="has no 3 bits"):
        run(images.numpy(), 3)


@pytest.mark.parametrize("change, bits", [
    ("none", "w2a4"), ("none", "w1a4"), ("none", "w4a1"), ("own bits", 1), ("own bits", 4),
    ("a scale per channel", 1), ("a scale per channel", 4), ("lsq", 1), ("lsq", 4), ("lsq", "w2a4"),
    *(pytest.param(change, 8, marks=needs_vnni)
      for change in ("own bits", "a scale per channel", "lsq"))])
def test_changed_networks(change, bits, tmp_path):
    model, images = network("svhnq", (bits,), change=change)
    run = exported(model, bits, tmp_path / "x.xml", SIZES["svhnq"])
    assert_logits(run, model, images, bits)
    with pytest.raises(ValueError, match="has no w1a3 bits"):
        run(images.numpy(), "w1a3")


@pytest.mark.parametrize("change, bits, saturates", [
    ("none", 7, False), ("none", 8, True), ("none", "w8a7", False), ("none", "w7a8", True),
    ("none", "w8a1", False), ("own bits", 8, True), ("own bits", 4, False)])
def test_sums_that_saturate_are_refused_where_they_do(change, bits, saturates, tmp_path,
                                                      monkeypatch):
    """Two products of the largest numbers must fit 16 bits, where a CPU adds them so."""
    monkeypatch.setattr(openvino_file, "sums_are_exact", lambda: False)
    model, _ = network("svhnq", (bits,), change=change)
    openvino_file.export(model, [bits], tmp_path / "x.xml", SIZES["svhnq"])
    if saturates:
        with pytest.raises(ValueError, match="sums of 8 bits, which saturate on this CPU"):
            openvino_file.load(tmp_path / "x.xml")
    else:
        openvino_file.load(tmp_path / "x.xml")


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
            openvino_file.export(model, [4], tmp_path / "x.xml", (3, 6, 1))
        return
    found = exported(model, 4, tmp_path / "x.xml", (3, 6, 1))(images.numpy(), 4)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(images), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_network_is_refused(edit, tmp_path, monkeypatch):
    assert_refused(edit, openvino_file, tmp_path / "x.xml", monkeypatch)


def test_bottlenecks_at_one_bit(tmp_path):
    """resnet50q ends with an activation before its average, which only the average reads."""
    torch.manual_seed(0)
    bn = partial(SwitchableBatchNorm2d, bit_widths=[1])
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), *(Bottleneck(channels, 8, stride, bn, nn.Conv2d)
                               for channels, stride in ((16, 2), (32, 1), (32, 1))),
        bn(32), ActivationQ(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).train()
    images = torch.randn(4, 3, 12, 12)
    model(images)
    run = exported(model.eval(), 1, tmp_path / "x.xml", 12)
    assert_logits(run, model, images, 1, flipped=0)


@pytest.mark.parametrize("channels", [3, 12, 16])
def test_one_bit_takes_any_number_of_channels(channels, tmp_path):
    """Sums at 1 bit are integers times a scale: the file's are torch's, outside the image too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, channels, 1), ActivationQ(),
                          Conv2dQ(channels, 16, 3, stride=2, padding=1)).eval()
    set_bit_width(model, 1)
    images = torch.rand(2, 3, 9, 9)
    with torch.no_grad():
        expected = model(images)
    found = exported(model, 1, tmp_path / "x.xml", 9)(images.numpy(), 1)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-6)


def test_an_activation_with_two_readers(tmp_path):
    """A single-bit convolution and an average read the same levels."""
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.act = Conv2dQ(3, 3, 3, padding=1), ActivationQ()

        def forward(self, x):
            a = self.act(x)
            return self.conv(a) + a
    torch.manual_seed(0)
    model, images = Both().eval(), torch.rand(2, 3, 8, 8)
    for bits in (1, 4):
        set_bit_width(model, bits)
        with torch.no_grad():
            expected = model(images)
        found = exported(model, bits, tmp_path / f"{bits}.xml", 8)(images.numpy(), bits)
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-6)


@needs_vnni
def test_convolutions_are_integer(tmp_path):
    model, images = network("resnet20q", (1, 4))
    for bits, kind in ((1, "u1"), (4, "u8")):
        openvino_file.export(model, [bits], tmp_path / f"{bits}.xml", 32)
        content = openvino_file.core().read_model(tmp_path / f"{bits}.xml")
        content.reshape([1, 3, 32, 32])
        layers = openvino_file.compiled(content).get_runtime_model().get_ops()
        told = [(layer.get_rt_info()["layerType"].astype(str),
                 layer.get_input_element_type(0).get_type_name())
                for layer in layers if layer.get_input_size()]
        integer = [one for one in told if "Convolution" in one[0] and one[1] == kind]
        assert len(integer) == 18, told


def test_a_full_disk(tmp_path):
    """OpenVINO's own error is a RuntimeError that names no file and no reason."""
    model, _ = network("svhnq", (2,), False)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # bytes
    try:
        with pytest.raises(OSError, match="as on a full disk"):
            openvino_file.export(model, [2], tmp_path / "x.xml", SIZES["svhnq"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
