"""Packed files: the network that was packed, bit for bit, and what is refused."""
import json
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

import deploy
import reference
from models import MODELS, packed, quan_ops, set_bit_width
from models.quan_ops import Conv2dQ
from runs import assert_one_line, assert_same, evaluation, run

WIDTHS = [1, 2, 4, 8]


def network(name="svhnq", bit_widths=(*WIDTHS, 32), all_conv=False):
    model = MODELS[name](bit_widths, width=1, all_conv=all_conv)
    model = reference.fill(model.double(), seed=0).float().eval()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, Conv2dQ):
                layer.weight.view(-1)[5:9] = 0  # on a threshold of every bit-width
    return model


def about(name="svhnq", all_conv=False):
    return {"model": name, "width": 1, "all_conv": all_conv, "classes": 10, "arguments": {}}


def assert_is(found, model, bits, images):
    """Assert that weights and logits are those of the model, to the last bit."""
    layers = packed.quantized_layers(model)
    for name, layer in packed.quantized_layers(found).items():
        for integers in (False, True):
            assert_same(layer.operand(bits, integers), layers[name].operand(bits, integers))
    set_bit_width(model, bits)
    set_bit_width(found, bits)
    with torch.no_grad():
        for _ in "ab":  # the second time from what is kept
            assert torch.equal(found(images), model(images))


@pytest.mark.parametrize("stored", [WIDTHS, packed.ANY], ids=["byte", "any"])
@pytest.mark.parametrize("name, all_conv", [
    ("svhnq", False), ("svhnq", True), ("resnet20q", False), ("resnet20q", True)])
def test_is_the_network_bit_for_bit(name, all_conv, stored, tmp_path):
    model, path = network(name, all_conv=all_conv), tmp_path / "net"
    packed.save(model, WIDTHS, path, about(name, all_conv), stored)
    found = deploy.load(path)
    assert not found.training
    images = torch.randn(2, 3, 40, 40)
    for bits in (4, 1, 8, 2):
        assert_is(found, model, bits, images)
    with pytest.raises(ValueError, match="32 bits was not trained; choose from 1, 2, 4, 8"):
        set_bit_width(found, 32)
    state, own = found.state_dict(), model.state_dict()
    assert all(torch.equal(state[key], own[key]) for key in own.keys() & state.keys()
               if key.rpartition(".")[0] not in packed.quantized_layers(model)
               and "num_batches" not in key)


def on_every_threshold():
    """Return a convolution with v at, just below and just above each threshold of 1 to 8 bits."""
    thresholds = torch.cat([(2 * torch.arange(2**bits - 1) + 1) / (2**bits - 1) - 1
                            for bits in packed.ANY])
    v = torch.cat([thresholds, thresholds.nextafter(torch.tensor(9.0)),
                   thresholds.nextafter(torch.tensor(-9.0)), torch.zeros(3), torch.ones(1)])
    conv = Conv2dQ(len(v), 1, 1)
    conv.weight.data = torch.atanh(v * 0.9).view(1, -1, 1, 1)
    return conv


@pytest.mark.parametrize("stored", [(4,), WIDTHS, (3, 5), packed.ANY], ids=str)
def test_weights_on_thresholds(stored, tmp_path):
    conv = on_every_threshold()
    packed.save(torch.nn.Sequential(conv), stored, tmp_path / "conv", {})
    tensors, told = packed.read(tmp_path / "conv")
    found = torch.nn.Sequential(Conv2dQ(conv.in_channels, 1, 1))
    packed.install(found, tensors, tensors["levels"], told["stored_bits"])
    assert len(tensors["levels"]) <= 512
    for bits in stored:
        assert_same(found[0].operand(bits), conv.operand(bits))
    absent = next(bits for bits in (6, 32) if bits not in stored)
    with pytest.raises(ValueError, match=f"{absent} bits is not in the packed file"):
        found[0].operand(absent)


def test_sizes(tmp_path):
    """A byte a weight, or nine bits; on a network of the size of the paper's stage."""
    conv = Conv2dQ(320, 320, 3)
    for stored, most in ((WIDTHS, 1.01), (packed.ANY, 1.13)):
        packed.save(torch.nn.Sequential(conv), stored, tmp_path / "conv", {})
        assert (tmp_path / "conv").stat().st_size < most * conv.weight.numel() + 4 * 320


def test_formats_of_memory_and_number(tmp_path):
    model = network()
    packed.save(model, WIDTHS, tmp_path / "net", about())
    found, images = deploy.load(tmp_path / "net"), torch.randn(2, 3, 40, 40)
    set_bit_width(found, 4)
    with torch.no_grad():
        expected = found(images)
        for changed in (found.to(memory_format=torch.channels_last), found.double(), found.float()):
            logits = changed(images.to(changed.fc.weight.dtype))
            torch.testing.assert_close(logits.float(), expected, rtol=1e-3, atol=1e-3)


def test_packing_again_and_the_same_file(tmp_path):
    model, first, second = network(), tmp_path / "a", tmp_path / "b"
    packed.save(model, WIDTHS, first, about())
    packed.save(model, WIDTHS, second, about())
    assert first.read_bytes() == second.read_bytes()
    assert stat.S_IMODE(first.stat().st_mode) & 0o044  # as other files, not its owner's alone
    packed.save(deploy.load(first), [1, 4], second, about())
    assert_is(deploy.load(second), model, 4, torch.randn(2, 3, 40, 40))


def test_what_cannot_be_packed(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="32 bits is not stored"):
        packed.save(network(), [4, 32], tmp_path / "net", about())
    monkeypatch.setattr(quan_ops, "quantize_weight", lambda v, scale, bits: scale * v)
    with pytest.raises(ValueError, match="at 4 bits are not finite, or not 16 even levels"):
        packed.save(network(), [4], tmp_path / "net", about())
    assert not list(tmp_path.iterdir())


def test_another_quantizer_is_packed_too(tmp_path, monkeypatch):
    def normalize_weight(w):
        return (w / (2 * w.std().detach())).clamp(-1, 1), w.abs().mean().detach()

    monkeypatch.setattr(quan_ops, "normalize_weight", normalize_weight)
    model = network()
    packed.save(model, WIDTHS, tmp_path / "net", about())
    assert_is(deploy.load(tmp_path / "net"), model, 2, torch.randn(2, 3, 40, 40))


# ---- files that are refused

def flipped(path):
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


def newer(path):
    tensors, told = packed.read(path)
    save_file(load_file(path), path, {packed.KEY: json.dumps({**told, "format": 2})})


def of_another_network(path):
    packed.save(network(), WIDTHS, path, {**about(), "model": "resnet20q"})


DAMAGES = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:5000]), "cut short"),
    "cut at once": (lambda path: path.write_bytes(path.read_bytes()[:5]), "cut short"),
    "flipped": (flipped, "is damaged"), "newer": (newer, "has packed format 2"),
    "foreign": (lambda path: save_file({"a": torch.zeros(2)}, path), "of something else"),
    "another network": (of_another_network, "does not fit"),
    "code": (lambda path: torch.save(print, path), "")}


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_are_refused(damage, tmp_path, capsys):
    path, (spoil, told) = tmp_path / "net", DAMAGES[damage]
    packed.save(network(), WIDTHS, path, {**about(), "arguments": {
        "model": "svhnq", "width": 1, "all_conv": False, "dataset": "digits"}})
    spoil(path)
    with pytest.raises(ValueError) as error:
        deploy.load(path)
    assert "\n" not in str(error.value) and (told in str(error.value) or damage == "cut at once")
    if damage != "another network":
        assert run(["--evaluate", "--pretrain", path, "--results-dir", tmp_path / "e"]) == 1
        assert_one_line(capsys, str(path))


# ---- as a checkpoint

@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A packed network of 2 and 4 bits that knows its data set."""
    path = tmp_path_factory.mktemp("packed") / "net"
    model = network(bit_widths=[2, 4])
    packed.save(model, [2, 4], path, {**about(), "arguments": {
        "model": "svhnq", "width": 1, "all_conv": False, "dataset": "digits", "seed": 0,
        "train_split": "train", "loss": "recursive"}}, packed.ANY)
    return path


def test_evaluation_of_a_packed_file(digits, tmp_path):
    argv = ["--evaluate", "--pretrain", digits, "--device", "cpu", "--train-fraction", 0.1]
    assert run([*argv, "--results-dir", tmp_path / "a"]) == 0
    assert list(evaluation(tmp_path / "a")) == ["2", "4"]
    more = ["--bit_width_list", "2,3", "--calibrate", 1, "--results-dir", tmp_path / "b"]
    assert run([*argv, *more]) == 0
    assert list(evaluation(tmp_path / "b")) == ["2", "3"]


@pytest.mark.parametrize("argv, parts", [
    (["--evaluate", "--bit_width_list", "4,32"], ["32 bits is not in the packed file"]),
    (["--evaluate", "--bit_width_list", "3"], ["3 bits were not trained", "--calibrate N"]),
    (["--evaluate", "--calibrate", 1, "--save-calibrated", "x"], ["packed file", "checkpoint"]),
    (["--epochs", 1, "--bit_width_list", "2,4", "--width", 1], ["packed file", "train"])])
def test_what_a_packed_file_is_not(argv, parts, digits, tmp_path, capsys):
    assert run(["--pretrain", digits, *argv, "--results-dir", tmp_path / "r"]) > 0
    assert_one_line(capsys, *parts)


def test_a_packed_file_is_not_resumed(digits, tmp_path, capsys):
    assert run(["--resume", digits, "--results-dir", tmp_path / "r"]) == 1
    assert_one_line(capsys, "packed file")
