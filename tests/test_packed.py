"""Packed files: the network that was packed, bit for bit, and what is refused."""
import json
import stat

import numpy
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import prune

import deploy
import models
import reference
from deploy import runtimes
from exported import CHANGES, LinearQ
from exported import network as exported_network
from models import (MODELS, QUANTIZERS, Assignment, add_assignment, build, packed,
                    set_bit_width)
from models.bit_widths import BitWidth
from models.fields import FileError
from models.low_precision import prepare_low_precision
from models.quan_ops import Conv2dQ, DoReFaActivation, DoReFaWeight, QuantizedLayer
from runs import assert_one_line, assert_same, evaluation, run
from small_networks import ShortSVHN

WIDTHS = [1, 2, 4, 8]


def network(name="svhnq", bit_widths=(*WIDTHS, 32), all_conv=False):
    model = MODELS[name](bit_widths, width=1, all_conv=all_conv)
    model = reference.fill(model.double(), seed=0).float().eval()
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, Conv2dQ):
                layer.weight.view(-1)[5:9] = 0  # on a threshold of every bit-width
    return model


def about(name="svhnq", all_conv=False, quantizer="dorefa"):
    return {"network": {"model": name, "width": 1, "all_conv": all_conv, "classes": 10,
                        "quantizer": quantizer}}


def assert_is(found, model, bits, images):
    """Assert that weights and logits are those of the model, to the last bit."""
    set_bit_width(model, bits)
    set_bit_width(found, bits)
    layers = packed.quantized_layers(model)
    with torch.no_grad():
        for name, layer in packed.quantized_layers(found).items():
            assert_same(layer.integer_weight(), layers[name].integer_weight())
            assert_same(layer.quantized_weight(), layers[name].quantized_weight())
        assert torch.equal(found(images), model(images))


@pytest.mark.parametrize("stored", [WIDTHS, packed.ANY], ids=["byte", "any"])
@pytest.mark.parametrize("name, all_conv", [
    ("svhnq", False), ("svhnq", True), ("resnet20q", False), ("resnet20q", True)])
def test_is_the_network_bit_for_bit(name, all_conv, stored, tmp_path):
    model, path = network(name, all_conv=all_conv), tmp_path / "net"
    packed.save(model, WIDTHS, path, about(name, all_conv), stored)
    found = models.load(path)
    assert not found.training
    images = torch.randn(2, 3, 40, 40)
    for bits in (4, 1, 8, 2):
        assert_is(found, model, bits, images)
    with pytest.raises(ValueError, match="no 32-bit BatchNorm; choose from 1, 2, 4, 8"):
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
    tensors, meta = packed.read(tmp_path / "conv")
    found = torch.nn.Sequential(Conv2dQ(conv.in_channels, 1, 1))
    packed.install(found, tensors, packed.read_groups(tensors, meta))
    assert len(found[0].quantizer.rows) <= 512
    for bits in stored:
        for layer in (conv, found[0]):
            layer.switch_bit_width(BitWidth(bits))
        assert_same(found[0].integer_weight(), conv.integer_weight())
        assert_same(found[0].quantized_weight(), conv.quantized_weight())
    absent = next(bits for bits in (6, 32) if bits not in stored)
    found[0].switch_bit_width(BitWidth(absent))
    with pytest.raises(ValueError, match=f"{absent}-bit is not in the packed file"):
        found[0].quantized_weight()


def test_sizes(tmp_path):
    """A byte a weight, or nine bits; on a network of the size of the paper's stage."""
    conv = Conv2dQ(320, 320, 3)
    for stored, most in ((WIDTHS, 1.01), (packed.ANY, 1.13)):
        packed.save(torch.nn.Sequential(conv), stored, tmp_path / "conv", {})
        assert (tmp_path / "conv").stat().st_size < most * conv.weight.numel() + 4 * 320


def test_formats_of_memory_and_number(tmp_path):
    model = network()
    packed.save(model, WIDTHS, tmp_path / "net", about())
    found, images = models.load(tmp_path / "net"), torch.randn(2, 3, 40, 40)
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
    packed.save(models.load(first), [1, 4], second, about())
    assert_is(models.load(second), model, 4, torch.randn(2, 3, 40, 40))


def test_what_cannot_be_packed(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="32 bits is not stored"):
        packed.save(network(), [4, 32], tmp_path / "net", about())
    right = DoReFaWeight.integers

    def doubled(quantizer, v, e):
        integers, scale = right(quantizer, v, e)
        return 2 * integers, scale

    monkeypatch.setattr(DoReFaWeight, "integers", lambda self, v, e: (v, e))
    with pytest.raises(ValueError, match="layer layers.3 at 4 bits: .* are not finite integers"):
        packed.save(network(), [4], tmp_path / "net", about())
    monkeypatch.setattr(DoReFaWeight, "integers", doubled)
    with pytest.raises(ValueError, match="layer layers.3 at 4 bits: .* are not of 16 levels"):
        packed.save(network(), [4], tmp_path / "net", about())
    assert not list(tmp_path.iterdir())


class Standardized(Conv2dQ):
    def prepared_weight(self):
        return self.quantizer.prepare(self.weight - self.weight.mean((1, 2, 3), keepdim=True))


@pytest.mark.parametrize("change, message", [
    (lambda layer: setattr(layer, "__class__", Standardized),
     "layer layers.6 does not run with a packed weight"),
    (nn.utils.parametrizations.weight_norm, "layer layers.6 has a weight that a parametrization"),
    (lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
     "layer layers.6 has a weight that a parametrization")])
def test_layers_that_a_packed_file_does_not_hold(change, message, tmp_path, monkeypatch):
    def changed(*args):
        model = svhnq(*args)
        change(model.layers[6])
        return model

    svhnq = MODELS["svhnq"]
    monkeypatch.setitem(MODELS, "svhnq", changed)
    model = build("svhnq", [4], 10, 1).eval()
    with pytest.raises(ValueError, match=message):
        deploy.export(model, tmp_path / "net", [4], "packed", about_images={"size": 40})
    assert not list(tmp_path.iterdir())


def test_a_network_that_is_built_with_a_computed_weight_takes_no_packed_one(tmp_path):
    packed.save(network(), WIDTHS, tmp_path / "net", about())
    content = packed.read_checkpoint(tmp_path / "net")
    model = network(bit_widths=WIDTHS)
    nn.utils.parametrizations.weight_norm(model.layers[6])
    with pytest.raises(ValueError, match="layer layers.6 is built with a weight that something"):
        packed.install(model, content["state_dict"], **content["packed"])


@pytest.mark.parametrize("form", ["packed", "onnx"])
def test_several_outputs_are_refused(form, tmp_path, monkeypatch):
    class Features(MODELS["svhnq"]):
        def forward(self, x):
            y = self.layers(x).flatten(1)
            return self.fc(y), y

    monkeypatch.setitem(MODELS, "svhnq", Features)
    model = build("svhnq", [4], 10, 1).eval()
    with pytest.raises(ValueError, match="the network returns a tuple, and a file holds one"):
        deploy.export(model, tmp_path / "net", [4], form, about_images={"size": 40})
    assert not list(tmp_path.iterdir())


def test_an_error_of_no_layer_is_not_said_to_be_of_one(tmp_path):
    packed.save(network(), [4], tmp_path / "net", about())
    run = runtimes.packed_run(tmp_path / "net")
    with pytest.raises(RuntimeError, match="double"):
        run(numpy.zeros((1, 3, 40, 40)), 4)
    with pytest.raises(TypeError):
        run([1], 4)
    assert run(numpy.zeros((1, 3, 40, 40), numpy.float32), 4).shape == (1, 10)


def test_bits_of_layers_that_the_file_does_not_know(tmp_path, monkeypatch):
    def changed(*args):
        model = svhnq(*args)
        model.layers[5].own_bits = 8
        return model

    model = network()
    packed.save(model, [4], tmp_path / "net", about())
    svhnq = MODELS["svhnq"]
    monkeypatch.setitem(MODELS, "svhnq", changed)
    assert_is(models.load(tmp_path / "net"), model, 4, torch.randn(2, 3, 40, 40))


def test_a_step_that_depends_on_the_input_is_packed(tmp_path, monkeypatch):
    class Dynamic(DoReFaActivation):
        def integers(self, x, rounding=True):
            scale = x.amax() / (2**self.bits - 1)
            return (x / scale).clamp(min=0).round(), scale

        def step_size(self):
            return None

    monkeypatch.setitem(QUANTIZERS, "dynamic", lambda layer, widths: (
        DoReFaWeight() if isinstance(layer, QuantizedLayer) else Dynamic()))
    model = build("svhnq", [4], 10, 1, quantizer="dynamic").eval()
    found = deploy.export(model, tmp_path / "net", [4], "packed", about_images={"size": 40})
    assert found.results[BitWidth(4)]["agree"] == 100


def test_an_assignment_alone_is_not_packed(tmp_path):
    model = network()
    add_assignment(model, Assignment("mix", 4, {"layers.6": 2}))
    with pytest.raises(ValueError, match="needs a bit-width beside its assignments"):
        packed.save(model, ["mix"], tmp_path / "net", about())


def test_a_bit_width_whose_state_is_not_known_is_refused(tmp_path):
    """Where a quantizer has state per bit-width, of several with the same bits none stands for all.
    """
    torch.manual_seed(0)
    model = build("svhnq", [2, "w2a4"], 10, 1, quantizer="lsq").eval()
    deploy.export(model, tmp_path / "net", None, "packed", about_images={"size": 40})
    found = models.load(tmp_path / "net")
    assert_is(found, model, "w2a4", torch.randn(2, 3, 40, 40))
    add_assignment(found, Assignment("mix", "w2a4"))
    set_bit_width(found, "mix")
    with pytest.raises(ValueError, match="2-bit, of mix, is not in the packed file: choose from"):
        found(torch.randn(2, 3, 40, 40))


def test_an_assignment_beside_one_that_the_file_has(tmp_path):
    torch.manual_seed(0)
    model = build("svhnq", [2, 8], 10, 1, quantizer="lsq").eval()
    add_assignment(model, Assignment("mix", 8, {"layers.6": 2}))
    deploy.export(model, tmp_path / "net", None, "packed", about_images={"size": 40})
    found = models.load(tmp_path / "net")
    for each in (model, found):
        add_assignment(each, Assignment("other", 8, {"layers.3": 2}))
    assert_is(found, model, "other", torch.randn(2, 3, 40, 40))


def test_another_quantizer_is_packed_too(tmp_path, monkeypatch):
    def prepare(self, w):
        return (w / (2 * w.std().detach())).clamp(-1, 1), w.abs().mean().detach()

    monkeypatch.setattr(DoReFaWeight, "prepare", prepare)
    model = network()
    packed.save(model, WIDTHS, tmp_path / "net", about())
    assert_is(models.load(tmp_path / "net"), model, 2, torch.randn(2, 3, 40, 40))


# ---- what a researcher changes

@pytest.mark.parametrize("change, widths", [
    ("none", ["w2a4", 4, "w1a8"]), ("own bits", [1, 2, 4, 8]), ("own bits", ["w2a4"]),
    ("a scale per channel", WIDTHS), ("a linear layer", WIDTHS), ("lsq", [4]), ("lsq", WIDTHS),
    ("lsq", ["w2a4"])])
def test_a_changed_network_bit_for_bit(change, widths, tmp_path, monkeypatch):
    model, images = exported_network("svhnq", widths, change=change)
    monkeypatch.setitem(MODELS, "svhnq", CHANGES[change].network)
    meta = about(quantizer=CHANGES[change].quantizer or "dorefa")
    packed.save(model, widths, tmp_path / "net", meta)
    found = models.load(tmp_path / "net")
    prepare_low_precision(model)
    prepare_low_precision(found)
    for width in widths:
        assert_is(found, model, width, images)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(found(images), model(images))
    packed.save(found, widths, tmp_path / "again", meta)
    assert_is(models.load(tmp_path / "again"), model, widths[0], images)


def test_bits_of_its_own_are_in_the_file(tmp_path, monkeypatch):
    """A layer of 8 bits is stored at 8 bits alone, and one that got bits after it was made, too."""
    model, images = exported_network("svhnq", [1, 4], change="own bits")
    monkeypatch.setitem(MODELS, "svhnq", CHANGES["own bits"].network)
    model.layers[5].own_bits = 3  # an activation
    model.layers[10].own_bits = 2
    packed.save(model, [1, 4], tmp_path / "net", about(), packed.ANY)
    columns = {name: group["columns"] for group in packed.read(tmp_path / "net")[1]["groups"]
               for name in group["layers"]}
    assert columns["layers.0"] == columns["layers.6"] == [["8", 8]]
    assert columns["layers.3"] == [[str(bits), bits] for bits in packed.ANY]
    assert columns["layers.10"] == [["2", 2]]
    found = models.load(tmp_path / "net")
    assert found.layers[5].bits == 3 and found.layers[10].bits == 2
    for width in (1, 4):
        assert_is(found, model, width, images)

def test_several_lsq_bit_widths_are_refused(tmp_path):
    """Of so many that there are not rows enough for all their levels."""
    model, _ = exported_network("svhnq", packed.ANY, change="lsq")
    with pytest.raises(ValueError, match="layer layers.3: its levels at 1, 2, .* bits do not come "
                                         "from rounding one number: pack one bit-width a file"):
        packed.save(model, packed.ANY, tmp_path / "net", about(quantizer="lsq"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [Conv2dQ, LinearQ])
def test_a_scale_per_channel_in_bf16(kind):
    """Operands are exact: each output is float64's, but for its own rounding to 8 bits."""
    torch.manual_seed(0)
    layer = kind(64, 32, 3) if kind is Conv2dQ else kind(64, 32)
    layer.quantizer = CHANGES["a scale per channel"].weight_quantizer()
    with torch.no_grad():
        layer.weight *= torch.logspace(-2, 2, 32).view(-1, *[1] * (layer.weight.ndim - 1))
    prepare_low_precision(layer)
    for bits in (1, 2, 5, 8):
        layer.switch_bit_width(BitWidth(bits))
        shape = (4, 64, 6, 6) if kind is Conv2dQ else (4, 64)
        n = 2**bits - 1
        levels = torch.randint(n + 1, shape)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found = layer(levels / n).double()
        integers, scale = layer.integer_weight()
        bias = layer.bias.double().view(-1, *[1] * (integers.ndim - 2))
        linear_map = layer._conv_forward if kind is Conv2dQ else torch.nn.functional.linear
        exact = linear_map(levels.double(), integers.double(), None) * scale.double()[:, 0] / n
        error = (found - bias - exact).abs()
        assert (error <= 1.01 * 2**-8 * exact.abs() + 1e-6 * bias.abs()).all(), bits


# ---- files that are refused

def flipped(path):
    content = bytearray(path.read_bytes())
    content[-50] ^= 1
    path.write_bytes(content)


def newer(path):
    tensors, meta = packed.read(path)
    save_file(load_file(path), path, {packed.KEY: json.dumps({**meta, "format": 4})})


def of_another_network(path):
    packed.save(network(), WIDTHS, path, about("resnet20q"))


DAMAGES = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:5000]), "cut short"),
    "cut at once": (lambda path: path.write_bytes(path.read_bytes()[:5]),
                    "is not a checkpoint that can be read safely"),
    "flipped": (flipped, "is damaged"), "newer": (newer, "has packed format 4"),
    "foreign": (lambda path: save_file({"a": torch.zeros(2)}, path), "of something else"),
    "another network": (of_another_network, "cannot be loaded"),
    "code": (lambda path: torch.save(print, path), "is not a checkpoint that can be read safely")}


@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_are_refused(damage, tmp_path, capsys):
    path, (spoil, part) = tmp_path / "net", DAMAGES[damage]
    packed.save(network(), WIDTHS, path, {**about(), "images": {"dataset": "digits"}})
    spoil(path)
    with pytest.raises(ValueError) as error:
        models.load(path)
    assert "\n" not in str(error.value) and part in str(error.value)
    if damage != "another network":
        assert run(["--evaluate", "--pretrain", path, "--results-dir", tmp_path / "e"]) == 1
        assert_one_line(capsys, str(path))


def again(path, change):
    """Change a packed file's tensors and metadata, and give it the digest of what it holds."""
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()[packed.KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    change(tensors, meta)
    meta["sha256"] = packed.digest(tensors, meta)
    save_file(tensors, path, {packed.KEY: json.dumps(meta)})


LAYER = "layers.3"
UNFIT = "weights and their table do not fit each other"
CHANGES_OF_FIELDS = {
    "its stored is 5": lambda t, meta: meta.update(stored=5),
    "its stored is [2, 1]": lambda t, meta: meta.update(stored=[2, 1]),
    "its stored is [1.0]": lambda t, meta: meta.update(stored=[1.0]),
    "does not hold its 'groups'": lambda t, meta: meta.pop("groups"),
    "its groups is {}": lambda t, meta: meta.update(groups={}),
    "its groups is [{'columns'": lambda t, meta: meta["groups"][0].update(columns=[["1", 99]]),
    "its groups is [5]": lambda t, meta: meta.update(groups=[5]),
    "its network's own_bits is [1]": lambda t, meta: meta["network"].update(own_bits=[1]),
    "own_bits is {'x': 'y'}": lambda t, meta: meta["network"].update(own_bits={"x": "y"}),
    r"it has bits of '\x1b[2J', which": lambda t, meta: meta["network"].update(
        own_bits={"\x1b[2J": 3}),
    "its network is 5": lambda t, meta: meta.update(network=5),
    "does not hold its 'network'": lambda t, meta: meta.pop("network"),
    "its arguments is 5": lambda t, meta: meta.update(arguments=5),
    "is of model None": lambda t, meta: meta["network"].pop("model"),
    "is of model ['svhnq']": lambda t, meta: meta["network"].update(model=["svhnq"]),
    "its network's width is 1.5": lambda t, meta: meta["network"].update(width=1.5),
    "its images' size is 'x'": lambda t, meta: meta.update(images={"size": "x"}),
    "its images' mean is 0": lambda t, meta: meta.update(images={"mean": 0}),
    "has packed format True": lambda t, meta: meta.update(format=True),
    "it lacks the weights of": lambda t, meta: meta["groups"][0]["layers"].pop(),
    "it has weights of 'x', which": lambda t, meta: meta["groups"][0]["layers"].append("x"),
    f"it lacks {LAYER}.quantizer.scale": lambda t, meta: t.pop(f"{LAYER}.quantizer.scale"),
    "have 2 bits": lambda t, meta: meta["groups"][0].update(
        columns=[["2", 1], ["1", 2], ["4", 4], ["8", 8]]),
    f"{UNFIT}, of a type": lambda t, meta: t.update({f"{LAYER}.weight": t[
        f"{LAYER}.weight"].float()}),
    f"{UNFIT}, of a shape": lambda t, meta: t.update({f"{LAYER}.weight": t[
        f"{LAYER}.weight"].flatten(1)}),
    f"{UNFIT}, of a grid": lambda t, meta: t[f"{LAYER}.quantizer.grid"].add_(1),
    f"{UNFIT}, of a scale": lambda t, meta: t.update({f"{LAYER}.quantizer.scale": torch.ones(
        4, 7, 1, 1, 1)}),
    f"{UNFIT}, of a scale's type": lambda t, meta: t.update({f"{LAYER}.quantizer.scale": t[
        f"{LAYER}.quantizer.scale"].to(torch.bfloat16)}),
    f"{LAYER}.quantizer.scale has 1 values that are not finite": lambda t, meta: t[
        f"{LAYER}.quantizer.scale"].view(-1)[:1].fill_(float("nan")),
    f"{UNFIT}, of high bits": lambda t, meta: t.update({
        f"{LAYER}.quantizer.high_bits": torch.zeros(1, dtype=torch.uint8)}),
    f"it lacks the exceptions of {LAYER}": lambda t, meta: t.pop(f"{LAYER}.quantizer.exceptions"),
    f"{UNFIT}, of exceptions": lambda t, meta: t.update({
        f"{LAYER}.quantizer.exceptions": torch.tensor([-1], dtype=torch.int32),
        f"{LAYER}.quantizer.exception_levels": torch.zeros(1, 4, dtype=torch.uint8)}),
    f"{UNFIT}, of exceptions' levels": lambda t, meta: t.update({
        f"{LAYER}.quantizer.exceptions": torch.tensor([0], dtype=torch.int32),
        f"{LAYER}.quantizer.exception_levels": torch.full((1, 4), 9, dtype=torch.uint8)}),
    "its rows are not of the levels": lambda t, meta: t.update({
        "rows.0": torch.full((1, 4), 200, dtype=torch.uint8)}),
    "1 unexpected (x)": lambda t, meta: t.update(x=torch.ones(1)),
    "1 of another type (fc.bias)": lambda t, meta: t.update({"fc.bias": torch.ones(
        10, dtype=torch.int32)})}


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "net"
    packed.save(network(), WIDTHS, path, about())
    return path.read_bytes()


@pytest.mark.parametrize("part", CHANGES_OF_FIELDS)
def test_a_field_that_fits_its_digest_alone(part, whole_file, tmp_path):
    path = tmp_path / "net"
    path.write_bytes(whole_file)
    again(path, CHANGES_OF_FIELDS[part])
    with pytest.raises(FileError) as error:
        models.load(path)
    message = str(error.value)
    assert message.isprintable() and str(path) in message
    assert part.split(", of ")[0] in message


def test_row_numbers_with_high_bits_are_within_the_table(tmp_path):
    path = tmp_path / "net"
    packed.save(network(), WIDTHS, path, about(), packed.ANY)
    def change(tensors, meta):
        for name in ("weight", "quantizer.high_bits"):
            tensors[f"{LAYER}.{name}"].fill_(255)

    whole = path.read_bytes()
    again(path, change)
    with pytest.raises(FileError, match=UNFIT):
        models.load(path)
    path.write_bytes(whole)
    again(path, lambda tensors, meta: tensors.pop(f"{LAYER}.quantizer.high_bits"))
    with pytest.raises(FileError, match=UNFIT):
        models.load(path)


def test_all_metadata_are_in_the_digest(whole_file, tmp_path):
    """No value of the JSON text can change, and no other text stand beside it."""
    path = tmp_path / "net"
    path.write_bytes(whole_file)
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()[packed.KEY])
    for name in meta:
        changed = {**meta, name: [meta[name]]}
        save_file(load_file(path), path, {packed.KEY: json.dumps(changed)})
        with pytest.raises(ValueError, match="is damaged|has packed format"):
            packed.read(path)
    save_file(load_file(path), path, {packed.KEY: json.dumps(meta), "more": "x"})
    with pytest.raises(ValueError, match="is damaged"):
        packed.read(path)
    save_file(load_file(path), path, {packed.KEY: json.dumps(meta)})
    packed.read(path)


# ---- as a checkpoint

@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A packed network of 2 and 4 bits that knows its data set."""
    path = tmp_path_factory.mktemp("packed") / "net"
    model = network(bit_widths=[2, 4])
    packed.save(model, [2, 4], path, {
        **about(), "images": {"dataset": "digits"}, "arguments": {
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


def test_layers_that_share_a_weight_and_layers_of_two_names(tmp_path):
    model = ShortSVHN([2], width=1).eval()
    model.other = torch.nn.Linear(*model.fc.weight.shape[::-1])
    model.other.weight = model.fc.weight
    packed.save(model, [2], tmp_path / "net", about())
    tensors, _ = packed.read(tmp_path / "net")
    assert torch.equal(tensors["other.weight"], tensors["fc.weight"])
    model.again = model.layers[3]
    with pytest.raises(ValueError, match="layer again is a module that has another name, too"):
        packed.save(model, [2], tmp_path / "other", about())
