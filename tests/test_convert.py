"""Float networks made into any-precision ones: the same numbers, and what is told of them."""
import functools
import re

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

import deploy.graph
import reference
import runs
from deploy import packed
from models import MODELS, convert, layer_table, quan_ops, set_bit_width, trained_bit_widths, zoo
from models.converted import fit_float_weights
from models.losses import any_precision_backward
from runs import assert_one_line, assert_same

WIDTHS = [1, 2, 8, 32]
SMALL = "torchvision:shufflenet_v2_x0_5"
NAMES = ("resnet18", "resnet50", "vgg11_bn", "mobilenet_v2", "densenet121", "shufflenet_v2_x1_0",
         "regnet_y_400mf")


def on_meta(name):  # regnet computes its sizes by tensors
    return torch.device("cpu" if name.startswith("regnet") else "meta")


def build(name):
    """Return a float network in evaluation mode, with weights that are cheap to draw."""
    with on_meta(name):
        network = zoo.torchvision_network(f"torchvision:{name}", 10)
        if name == "vgg11_bn":  # 120 million weights less
            network.avgpool = nn.AdaptiveAvgPool2d(1)
            network.classifier[0], network.classifier[3] = nn.Linear(512, 16), nn.Linear(16, 16)
            network.classifier[6] = nn.Linear(16, 10)
    network.to_empty(device="cpu")
    torch.manual_seed(0)
    for key, value in network.state_dict().items():
        if value.dim() > 1:
            value.uniform_(-1, 1).mul_((6 / value[0].numel())**0.5)
        elif key.endswith(("weight", "running_var")):
            value.uniform_(0.5, 1.5)
        elif value.dtype.is_floating_point:
            value.uniform_(-0.1, 0.1)
        else:
            value.zero_()
    return network.eval()


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
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_the_float_networks_logits_at_32_bits(pair, images, monkeypatch):
    network, model = pair
    monkeypatch.setattr(quan_ops, "normalize_weight", lambda w: (w, torch.ones(())))
    assert not model.training and trained_bit_widths(model) == WIDTHS and not model.note
    assert_close(model(images), network(images), rtol=0, atol=1e-5)


def test_weights_go_to_every_bit_width(pair):
    network, model = pair
    own = model.state_dict()
    fitted, left = fit_float_weights(model, network.state_dict())
    assert not left
    assert_same(fitted, dict(own))


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

def float_svhn(e=1):
    def conv(c_in, c_out, size, padding=0):
        return nn.Conv2d(c_in, c_out, size, padding=padding, bias=False)

    network = nn.Sequential()
    network.layers = nn.Sequential(
        nn.Conv2d(3, 6 * e, 5), nn.MaxPool2d(2), nn.ReLU(),
        conv(6 * e, 8 * e, 3, 1), nn.BatchNorm2d(8 * e), nn.ReLU(),
        conv(8 * e, 8 * e, 3, 1), nn.BatchNorm2d(8 * e), nn.MaxPool2d(2), nn.ReLU(),
        conv(8 * e, 16 * e, 3), nn.BatchNorm2d(16 * e), nn.ReLU(),
        conv(16 * e, 16 * e, 3, 1), nn.BatchNorm2d(16 * e), nn.ReLU(),
        conv(16 * e, 16 * e, 3), nn.BatchNorm2d(16 * e), nn.ReLU(inplace=True), nn.Dropout(0.5),
        conv(16 * e, 64 * e, 5), nn.ReLU())
    network.flatten = nn.Flatten()
    network.fc = nn.Linear(64 * e, 10)
    return network, ()


class FloatBlock(nn.Module):
    def __init__(self, c_in, c_out, stride):
        super().__init__()
        self.bn0, self.bn1 = nn.BatchNorm2d(c_in), nn.BatchNorm2d(c_out)
        self.conv0 = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
        self.conv1 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        if stride == 2:
            self.skip_conv = nn.Conv2d(c_in, c_out, 1, stride, bias=False)
            self.skip_bn = nn.BatchNorm2d(c_out)

    def forward(self, x):
        a = functional.relu(self.bn0(x))
        shortcut = self.skip_bn(self.skip_conv(a)) if hasattr(self, "skip_bn") else x
        return self.conv1(torch.relu(self.bn1(self.conv0(a)))) + shortcut


class FloatResNet20(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv0 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        sizes = [16] * 4 + [32] * 3 + [64] * 3
        self.layers = nn.Sequential(*(FloatBlock(c_in, c_out, c_out // c_in)
                                      for c_in, c_out in zip(sizes, sizes[1:])))
        self.bn, self.fc = nn.BatchNorm2d(64), nn.Linear(64, 10)

    def forward(self, x):
        return self.fc(self.bn(self.layers(self.conv0(x))).mean((2, 3)))


def float_resnet20():
    shared = [f"layers.{block}.skip_{kind}" for block in (3, 6) for kind in ("conv", "bn")]
    return FloatResNet20(), shared


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


def test_shared_as_computed_anew(twins):
    _, model, images = twins
    assert model.shares_stem
    assert_close(step(model, images), step(model, images, shared=False), rtol=0, atol=1e-10)


def test_a_torchvision_stem_is_shared_once():
    model = convert(build("shufflenet_v2_x0_5").double(), [2, 8, 32])
    images = reference.values("images", (2, 3, 32, 32), 0)
    calls = []
    model.network.conv1[0].register_forward_hook(lambda *call: calls.append(call))
    grads = {}
    for shared in (True, False):
        model.zero_grad()
        model.train()
        any_precision_backward(model, images, torch.tensor([3, 1]), [2, 8, 32], shared=shared)
        grads[shared] = {name: value.grad for name, value in model.named_parameters()}
        assert len(calls) == (1 if shared else 4)
    assert_close(grads[True], grads[False], rtol=1e-9, atol=1e-9)


# ---- what modules do not show

class Functional(nn.Module):
    """Every way to write a ReLU, a module used twice, dropout as a function, a constant."""

    def __init__(self):
        super().__init__()
        self.conv0, self.conv1 = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)
        self.conv2, self.conv3 = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 1)
        self.bn, self.relu, self.fc = nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Linear(4, 3)
        self.scale = nn.Buffer(torch.tensor(2.0))

    def forward(self, x):
        x = self.relu(self.bn(self.conv0(x)))
        x = torch.cat([x, functional.relu(self.conv1(x) * self.scale)], 1)
        x = functional.dropout(self.conv2(x), 0.5, self.training)
        y = functional.relu(x, inplace=True)  # so that x below is what this gives
        x = self.conv3(functional.avg_pool2d(y, 2)) + functional.avg_pool2d(x, 2)
        return self.fc(self.relu(x).relu().mean((2, 3)))


def activations(model):
    return [name.removeprefix("network.") for name, layer in model.named_modules()
            if isinstance(layer, quan_ops.ActivationQ)]


def test_functions_and_a_module_used_twice(monkeypatch, images):
    torch.manual_seed(0)
    network = Functional().eval()
    model = convert(network, [1, 32])
    assert sorted(activations(model)) == ["relu", "relu_1", "relu_2", "relu_3", "relu_4"]
    assert [layer[2:] for layer in model.layers] == [
        ("not", "not", "sees the image"), ("quantized", "quantized", ""),
        ("quantized", "quantized", ""), ("quantized", "not", "input from an average pool"),
        ("not", "not", "gives the logits")]
    monkeypatch.setattr(quan_ops, "normalize_weight", lambda w: (w, torch.ones(())))
    assert_close(model(images), network(images), rtol=0, atol=1e-6)
    assert model.shares_stem
    model.train()
    assert not torch.equal(model(images), model(images))  # dropout, in training alone


class CalledTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 16, 1), FloatBlock(16, 16, 1)

    def forward(self, x):
        return self.block(self.block(self.stem(x))).mean((2, 3))


def test_a_block_called_twice(images):
    model = convert(CalledTwice(), [1, 32])
    assert sorted(activations(model)) == [f"block.relu{end}" for end in ("", "_1", "_2", "_3")]
    assert [(layer.name, layer.input) for layer in model.layers] == [
        ("stem", "not"), ("block.conv0", "quantized"), ("block.conv1", "not")]  # the last
    any_precision_backward(model, images, torch.tensor([0, 1]), [1, 32])


def test_relu6_is_limited_at_32_bits_and_no_other():
    layer, x = quan_ops.ActivationQ(limit=6.0), torch.tensor([-1.0, 0.4, 5.0, 7.0])
    assert layer(x).tolist() == pytest.approx([0, 0.4, 5, 6])
    layer.bits = 1
    assert layer(x).tolist() == [0, 0, 1, 1]
    model = convert(build("mobilenet_v2"), [1, 32])
    assert {layer.limit for layer in model.modules() if isinstance(layer, quan_ops.ActivationQ)} \
        == {6.0}


@pytest.mark.parametrize("name, told", [
    ("resnet18", {"layer2.0.downsample.0": ""}),
    ("mobilenet_v2", {"features.2.conv.0.0": "a BatchNorm without activation",
                      "features.4.conv.0.0": "an addition", "features.1.conv.1": ""}),
    ("densenet121", {"features.denseblock1.denselayer2.conv1": ""}),
    ("shufflenet_v2_x1_0", {"stage2.1.branch2.0": "", "stage2.0.branch2.5":
                            "a BatchNorm without activation"}),  # across cat and channel shuffle
    ("regnet_y_400mf", {"trunk_output.block1.block1-0.f.se.fc1": "an average pool",
                        "trunk_output.block1.block1-0.f.se.fc2": "",
                        "trunk_output.block1.block1-0.f.c.0": "a product"})])
def test_which_inputs_are_quantized(name, told):
    with on_meta(name):
        model = convert(zoo.torchvision_network(f"torchvision:{name}", 10), [2, 32])
    layers = {layer.name: layer for layer in model.layers}
    for layer, maker in told.items():
        assert layers[layer][2:] == ("quantized", "not" if maker else "quantized",
                                     maker and f"input from {maker}")
    kept = [layer.name for layer in model.layers if layer.weights == "not"]
    assert len(kept) == 2 and kept == [model.layers[0].name, model.layers[-1].name]
    table = layer_table(model).splitlines()
    assert len({len(line) for line in table[:-2]}) == 1 and len(table) == len(layers) + 4
    assert table[-1].startswith(f"{len(layers)} layers: the weights of {len(layers) - 2} are")


class Untraceable(Functional):
    def forward(self, x):
        return super().forward(x if x.sum() > 0 else -x)


def test_untraceable(images):
    with pytest.warns(UserWarning, match="cannot trace") as told:
        model = convert(Untraceable(), [1, 32])
    assert len(told) == 1 and "\n" not in model.note and model.note in layer_table(model)
    assert activations(model) == ["relu"] and not model.shares_stem
    assert [layer.input for layer in model.layers] == ["not", *["unknown"] * 3, "not"]
    any_precision_backward(model, images, torch.tensor([0, 1]), [1, 32])


def test_keep(images):
    model = convert(build("resnet18"), [2, 32], keep=["layer1", "layer2.0.downsample"])
    kinds = {name: type(model.network.get_submodule(name)) for name in (
        "layer1.0.conv1", "layer2.0.downsample.0", "layer2.0.conv1")}
    assert list(kinds.values()) == [nn.Conv2d, nn.Conv2d, quan_ops.Conv2dQ]
    assert isinstance(model.network.layer1[0].bn1, nn.BatchNorm2d)
    assert [layer.why for layer in model.layers].count("in keep") == 5


# ---- exported

@torch.no_grad()
def test_a_packed_file(tmp_path, images):
    model, path = convert(build("shufflenet_v2_x0_5"), [1, 2]), tmp_path / "net.safetensors"
    packed.save(model, [1, 2], path, {"model": SMALL, "width": 1, "all_conv": False, "classes": 10})
    loaded = packed.load(path)
    for bits in (1, 2):
        logits = [set_bit_width(network, bits) or network(images) for network in (model, loaded)]
        assert torch.equal(*logits)


@pytest.mark.parametrize("name, layer", [
    ("resnet18", None), ("mobilenet_v2", None), ("densenet121", "transition1.pool (AvgPool2d)")])
def test_what_other_formats_hold(name, layer):
    model = convert(build(name), [2, 32])
    if layer is None:
        assert len(deploy.graph.trace(model, 2)) > 20
        return
    with pytest.raises(ValueError, match=re.escape(layer)):
        deploy.graph.trace(model, 2)


# ---- what cannot be converted, and train.py

def sequential(*layers):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *layers)


@pytest.mark.parametrize("network, keep, told", [
    (nn.Sequential(nn.Conv2d(3, 4, 3)), (), "no BatchNorm2d"),
    (nn.Sequential(nn.BatchNorm2d(4)), (), "no Conv2d"),
    (sequential(), (), "no convolution is left"),
    (sequential(nn.ConvTranspose2d(4, 4, 3)), (), "layer 3 is a ConvTranspose2d"),
    (sequential(nn.GroupNorm(1, 4)), (), "layer 3 is a GroupNorm"),
    (sequential(nn.BatchNorm2d(4, affine=False)), (), "layer 3 is a BatchNorm2d without"),
    (sequential(nn.LazyConv2d(4, 3)), (), "layer 3 is a LazyConv2d"),
    (sequential(nn.Conv2d(4, 4, 3)), ["conv9"], "keep names 'conv9'"),
    (MODELS["svhnq"]([2, 32], width=1), (), "no BatchNorm2d")])
def test_what_cannot_be_converted(network, keep, told):
    with pytest.raises(ValueError, match=told) as error:
        convert(network, [1, 32], keep)
    assert "\n" not in str(error.value)


def test_a_layer_without_a_form_can_be_kept():
    network = sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(1, 4), nn.Conv2d(4, 2, 1))
    model = convert(network, [1, 32], keep=["4"])
    assert model(torch.ones(2, 3, 4, 4)).shape == (2, 2, 2, 2)


@pytest.mark.parametrize("argv, told", [
    (["--model", "torchvision:resnt18"], ("'resnt18' is no", "resnet18")),
    (["--model", "torchvision:fcn_resnet50"], ("is no classification network",)),
    (["--model", "torchvision:resnet18", "--width", 2], ("--width 2 is of",)),
    (["--model", "torchvision:resnet18", "--all-conv"], ("--all-conv is of",)),
    (["--model", "torchvision:squeezenet1_1"], ("torchvision:squeezenet1_1: the network has no",)),
    (["--model", "torchvision:vit_b_32"], ("has no BatchNorm2d",)),
    (["--model", "torchvision:googlenet"], ("several outputs",))])
def test_bad_models(argv, told, tiny_cifar10, tmp_path, capsys):
    with torch.device("meta"):
        code = runs.run(["--dataset", "cifar10", "--data-dir", tiny_cifar10, "--device", "cpu",
                         "--results-dir", tmp_path / "r", *argv])
    assert code == 2
    assert_one_line(capsys, *told)


@pytest.fixture(scope="module")
def small():
    return functools.partial(torchvision.models.get_model, "shufflenet_v2_x0_5", weights=None)


def tiny(data_dir, folder, *more):
    return ["--dataset", "cifar10", "--data-dir", data_dir, "--model", SMALL, "--batch-size", 10,
            "--bit_width_list", "2,32", "--epochs", 2, "--device", "cpu", "--results-dir", folder,
            *more]


def test_train_resume_evaluate(tiny_cifar10, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert runs.run(tiny(tiny_cifar10, whole)) == 0
    table = (whole / "layers.md").read_text()
    assert table in capsys.readouterr().out and "| stage2.0.branch1.0" in table
    assert runs.run([*tiny(tiny_cifar10, parts), "--epochs", 1]) == 0
    assert runs.run(["--resume", parts, "--epochs", 2]) == 0
    assert_same(runs.load(parts)["state_dict"], runs.load(whole)["state_dict"])
    latest = whole / "ckpt" / "model_latest.pth.tar"
    assert runs.run(["--evaluate", "--pretrain", latest, "--bit_width_list", "2,4,32",
                     "--calibrate", 1, "--device", "cpu", "--results-dir", tmp_path / "e"]) == 0
    assert runs.evaluation(tmp_path / "e").keys() == {"2", "4", "32"}


def test_pretrain(tiny_cifar10, tmp_path, small, capsys):
    network = small(num_classes=7)
    torch.save(network.state_dict(), tmp_path / "float.pth")
    zero = ["--pretrain", tmp_path / "float.pth", "--epochs", 1, "--lr", 1e-30]
    assert runs.run(tiny(tiny_cifar10, tmp_path / "r", *zero)) == 0
    told = capsys.readouterr().out
    assert "a float network" in told and "left new: fc.weight, fc.bias" in told
    weights = runs.load(tmp_path / "r")["state_dict"]
    assert_close(weights["network.stage2.0.branch1.0.weight"],
                 network.stage2[0].branch1[0].weight.detach())
    assert weights["network.fc.weight"].shape == (10, 1024)


def test_a_wrong_state_dict(tiny_cifar10, tmp_path, small, capsys):
    good = small(num_classes=10).state_dict()
    conv = "stage2.0.branch1.0.weight"
    for name, content, told in (
            ("missing", {key: value for key, value in good.items() if key != conv}, "1 missing"),
            ("left over", {**good, "stage9.weight": good[conv]}, "1 unexpected"),
            ("another shape", {**good, conv: good[conv][:1]}, "1 of another shape")):
        torch.save(content, tmp_path / "float.pth")
        folder = tmp_path / name
        assert runs.run(tiny(tiny_cifar10, folder, "--pretrain", tmp_path / "float.pth")) == 1
        assert_one_line(capsys, "does not fit", told, "stage")


def test_one_image_of_one_pixel(tiny_cifar10, tmp_path, capsys):
    argv = tiny(tiny_cifar10, tmp_path / "r", "--batch-size", 19)
    assert runs.run(argv) == 1
    assert_one_line(capsys, "one image of one pixel", "--batch-size")
