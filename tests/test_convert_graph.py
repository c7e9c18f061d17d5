"""What a conversion sees of a network, what it tells, and what cannot be converted."""
import copy
import random
import re

import numpy
import pytest
import torch
from float_networks import SMALL, FloatBlock, build, noise, on_meta
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune
from torch.testing import assert_close
from torchvision.ops import FrozenBatchNorm2d

import deploy.graph
import models
from models import (MODELS, Assignment, add_assignment, convert, layer_table, load, packed,
                    quan_ops, set_bit_width, zoo)
from models.bit_widths import BitWidth
from models import low_precision
from models.cost import Costs
from models.losses import any_precision_backward
from models.sharing import no_sharing, shared_computation


@pytest.fixture(scope="module")
def images():
    return noise()


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


def assert_shares_right(model, images):
    """Assert that a step that shares what bit-widths have in common has the gradients of none."""
    model = copy.deepcopy(model).double()
    found = []
    for sharing in (shared_computation, no_sharing):
        model.zero_grad()
        torch.manual_seed(0)  # dropout's
        any_precision_backward(model, images.double(), torch.tensor([0, 1]), [1, 32],
                               sharing=sharing)
        found.append({name: value.grad for name, value in model.named_parameters()})
    assert_close(*found, rtol=0, atol=1e-10)


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
    monkeypatch.setattr(quan_ops.DoReFaWeight, "prepare", lambda self, w: (w, torch.ones(())))
    assert_close(model(images), network(images), rtol=0, atol=1e-6)
    assert_shares_right(model, images)
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


class Depth(nn.Module):
    """Stochastic depth as a statement of Python: a graph of it would be that of one draw."""

    def __init__(self):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 16, 1), FloatBlock(16, 16, 1)
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x):
        x = self.stem(x)
        if not self.training or torch.rand(1).item() < 0.5:
            x = self.block(x)
        return self.head(x).mean((2, 3))


@pytest.mark.parametrize("seed", range(4))
def test_a_forward_that_draws_numbers_is_not_traced(seed):
    torch.manual_seed(seed)
    with pytest.warns(UserWarning, match="its forward draws numbers|takes another way"):
        convert(Depth(), [1, 32])


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        relu = nn.ReLU()
        self.stem = nn.Conv2d(3, 8, 1)
        self.a = nn.Sequential(nn.BatchNorm2d(8), relu, nn.Conv2d(8, 8, 1))
        self.b = nn.Sequential(nn.BatchNorm2d(8), relu, nn.Conv2d(8, 8, 1))
        self.relu = functional.relu  # a function, under the name that an activation would get
        self.head = nn.Conv2d(8, 5, 1)

    def forward(self, x):
        return self.head(self.relu(self.b(self.a(self.stem(x))))).mean((2, 3))


def test_a_module_of_two_names_is_kept_whole_or_not():
    with pytest.raises(ValueError, match="keep has a.1 and not b.1, which is the same module"):
        convert(Shared(), [2, 32], keep=["a"])
    with pytest.raises(ValueError, match="keep has b.1 and not a.1, which is the same module"):
        convert(Shared(), [2, 32], keep=["b.1"])
    assert activations(convert(Shared(), [2, 32], keep=["a", "b.1"])) == ["relu_1"]
    assert sorted(activations(convert(Shared(), [2, 32]))) == ["a.1", "a.1_1", "relu_1"]


class Aliased(nn.Module):
    def __init__(self, alias):
        super().__init__()
        self.alias = alias
        self.relu = nn.ReLU(inplace=True)
        self.stem, self.bn = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.conv, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 5, 1)

    def forward(self, x):
        x = self.bn(self.stem(x))
        before = self.alias(x)
        return self.head(self.conv(self.relu(x)) + before).mean((2, 3))


@pytest.mark.parametrize("alias", [
    nn.Identity(), lambda x: x.view(x.shape).contiguous(), lambda x: x.mul_(0.5)])
def test_an_input_that_is_changed_in_place_under_another_name_is_refused(alias):
    with pytest.raises(ValueError, match="relu changes bn in place, which is read later as"):
        convert(Aliased(alias), [2, 32])
    convert(Aliased(torch.clone), [2, 32])


@pytest.mark.parametrize("alias", [
    lambda x: x.float(), lambda x: x.detach(), lambda x: x.narrow(1, 0, 8), nn.Dropout(),
    lambda x: x.unbind(0)[0].expand(x.shape)])
def test_a_copy_that_computes_something_else_is_refused(alias):
    """Even unquantized, whatever the cause."""
    with pytest.raises(ValueError, match="computes something else, from layer head on"):
        convert(Aliased(alias), [2, 32])


@pytest.mark.parametrize("name", ["head", "bn"])
def test_a_layer_of_zeros_hides_no_difference(name):
    """Such as a new head, or the last BatchNorm of a residual branch."""
    network = Aliased(lambda x: x.detach())
    for parameter in network.get_submodule(name).parameters():
        nn.init.zeros_(parameter)
    with pytest.raises(ValueError, match="computes something else"):
        convert(network, [2, 32])
    network = Aliased(torch.clone)
    for parameter in network.get_submodule(name).parameters():
        nn.init.zeros_(parameter)
    model = convert(network, [2, 32])
    assert model.note == ""
    layer = model.network.get_submodule(name)
    assert not any(parameter.any() for parameter in layer.parameters())


def test_an_output_that_depends_on_no_image_is_not_compared():
    class Constant(Aliased):
        def forward(self, x):
            return 0 * super().forward(x)

    assert "is not known" in convert(Constant(torch.clone), [2, 32]).note


class Heads(nn.Module):
    """Logits of a convolution and of a linear layer, behind a linear layer that gates channels."""

    def __init__(self, result):
        super().__init__()
        self.result = result
        self.relu = nn.ReLU(inplace=True)
        self.stem, self.bn = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.gate, self.conv = nn.Linear(8, 8), nn.Conv2d(8, 8, 1)
        self.boxes, self.classes = nn.Conv2d(8, 4, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.bn(self.stem(x))
        detached = x.detach()
        x = self.relu(x)
        x = self.conv(x * self.gate(x.mean((2, 3))).sigmoid()[:, :, None, None])
        return self.result(self.boxes(x).relu(), self.classes(x.mean((2, 3))), detached)


@pytest.mark.parametrize("result, last", [
    (lambda boxes, classes, x: boxes, ["boxes"]), (lambda boxes, classes, x: classes, ["classes"]),
    (lambda boxes, classes, x: {"a": boxes, "b": [classes]}, ["boxes", "classes"])])
def test_the_layers_that_give_the_logits(result, last):
    model = convert(Heads(result), [2, 32])
    assert sorted(row.name for row in model.layers if row.why == "gives the logits") == last
    assert isinstance(model.network.boxes, quan_ops.Conv2dQ) is ("boxes" not in last)
    assert not model.note


def test_outputs_that_are_no_tensor_are_compared():
    with pytest.raises(ValueError, match="computes something else"):
        convert(Heads(lambda boxes, classes, x: {"a": boxes, "b": (classes, x)}), [2, 32])


class Normalizing(nn.Sequential):
    def forward(self, x):
        return super().forward(x - torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))


def test_a_constant_in_the_forward():
    network = Normalizing(*sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    model = convert(network, [2, 32])
    assert not model.note and len(activations(model)) == 2
    assert model.state_dict().keys() == convert(sequential(nn.Conv2d(4, 4, 1), nn.ReLU(),
                                                           nn.Conv2d(4, 2, 1)), [2, 32]
                                                ).state_dict().keys()
    moved = model.to("meta")
    assert moved(torch.rand(2, 3, 8, 8, device="meta")).shape == (2, 2, 6, 6)


class Scaling(nn.Sequential):
    def forward(self, x):
        return super().forward(x) * torch.tensor(0.5 if self.training else 1.0)


def test_a_constant_of_training_alone_is_not_that_of_evaluation():
    network = Scaling(*sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)))
    with pytest.warns(UserWarning, match="training takes another way than evaluation"):
        convert(network, [2, 32])


class Residual(nn.Module):
    """Without a head: each block adds to its input; the size of another output is read."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.first, self.last, self.side = (sequential(nn.Conv2d(4, 4, 1)) for _ in range(3))
        for block in (self.first, self.last, self.side):
            block[0] = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.first(x)
        side = self.side(x)
        x = x + self.last(x)
        return functional.interpolate(x, size=side.shape[-2:])


def test_of_residual_branches_the_last_gives_the_output():
    model = convert(Residual(), [2, 32])
    why = {row.name: row.why for row in model.layers}
    assert why["last.3"] == "gives the logits" and why["stem"] == "sees the image"
    assert not why["first.3"] and not why["side.3"]


def test_modes_of_training_stay():
    network = sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    network[1].eval()  # frozen
    model = convert(network, [2, 32]).network
    assert not any(part.training for part in model[1].modules())
    assert all(part.training for part in model[4].modules()) and model.training


def test_a_container_that_changes_after_the_conversion():
    network = nn.Sequential(sequential(nn.Conv2d(4, 4, 1)), nn.Flatten(),
                            nn.Sequential(nn.Dropout(), nn.Linear(144, 3)))
    images = torch.rand(2, 3, 8, 8)
    model = convert(network, [2, 32])
    model.network[2][1] = nn.Sequential(nn.Linear(144, 8), nn.ReLU(), nn.Linear(8, 5))
    set_bit_width(model, 2)
    assert model(images).shape == (2, 5)
    for change in (lambda head: head.append(nn.Linear(3, 2)), lambda head: nn.Linear(144, 2)):
        model = convert(network, [2, 32])
        model.network[2] = change(model.network[2])
        with pytest.raises(ValueError, match="^2 has other modules than when it was converted"):
            set_bit_width(model, 2)


def test_images_of_any_channels_are_compared_and_draws_are_the_same():
    network = Aliased(lambda x: x.detach())
    network.stem = nn.Conv2d(1, 8, 1)
    with pytest.raises(ValueError, match="computes something else"):
        convert(network, [2, 32])
    convert(Aliased(lambda x: functional.dropout(x, 0.5, True)), [2, 32])  # in evaluation, too


def test_a_network_of_another_size_says_that_it_was_not_compared():
    class Fixed(Aliased):
        def forward(self, x):
            return super().forward(x.view(-1, 3, 17, 19))

    assert "whether it computes what the float network did is not known" in convert(
        Fixed(torch.clone), [2, 32]).note
    assert convert(Aliased(torch.clone), [2, 32]).note == ""


@pytest.mark.parametrize("name", ["bn", "relu", "conv", "head"])
def test_a_layer_with_a_forward_of_its_own_is_refused(name):
    network = Aliased(torch.clone)
    network.conv1 = nn.Conv2d(3, 3, 1)
    layer = network.get_submodule(name)
    layer.forward = lambda x: 2 * type(layer).forward(layer, x)
    with pytest.raises(ValueError, match=f"layer {name} has a forward of its own"):
        convert(network, [2, 32])


class Moded(Aliased):
    def __init__(self, mode):
        super().__init__(torch.clone)
        self.mode = mode

    def forward(self, x):
        with self.mode():
            x = self.bn(self.stem(x))
        return self.head(self.conv(self.relu(x))).mean((2, 3))


@pytest.mark.parametrize("mode", [
    torch.no_grad, torch.enable_grad, lambda: torch.autocast("cpu", torch.bfloat16),
    lambda: torch.autocast("cpu", enabled=False), lambda: torch.autocast("cuda", enabled=False)])
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_a_forward_with_a_mode_of_its_own_is_not_traced(mode, images):
    with pytest.warns(UserWarning, match="a part of its forward sets no_grad or autocast"):
        model = convert(Moded(mode), [2, 32])
    with torch.no_grad():
        model(images)
    if mode is torch.no_grad:
        model(images).sum().backward()
        assert model.network.stem.weight.grad is None


class Penalized(Aliased):
    """Keeps a tensor in an attribute, for the loss, and one in a list."""

    def __init__(self):
        super().__init__(torch.clone)
        self.kept = []

    def forward(self, x):
        x = self.stem(x)
        self.penalty = x.square().mean()
        self.kept[:] = [x]
        return self.head(self.conv(self.relu(self.bn(x)))).mean((2, 3))


def test_a_tensor_that_a_forward_keeps_is_that_of_the_call(images):
    with pytest.warns(UserWarning, match="its forward keeps a tensor in the attribute kept"):
        model = convert(Penalized(), [2, 32])
    model(images)
    model.network.penalty.backward()
    assert len(model.network.kept[0]) == 2
    assert model.network.stem.weight.grad.any()


class Averaged(nn.Module):
    """Its forward sets attributes: a tensor, a number, an entry of a list."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 4, 3), quan_ops.SwitchableBatchNorm2d(4, [2, 32])
        self.act, self.conv = quan_ops.ActivationQ(), quan_ops.Conv2dQ(4, 5, 3)
        self.mean, self.calls, self.seen = torch.zeros(1), 0, [None]

    def forward(self, x):
        self.mean = 0.9 * self.mean + x.mean().detach()
        self.calls += 1
        self.seen[0] = x
        return self.conv(self.act(self.bn(self.stem(x)))).mean((2, 3))


def test_tracing_leaves_the_attributes_of_a_network():
    model = Averaged()
    model.bn.eval()
    low_precision.link_inputs(model)
    assert model.conv.input_quantizer is model.act.quantizer
    add_assignment(model, Assignment("mix", 2, {"conv": 32}))
    Costs(model, 8)
    with pytest.raises(ValueError, match="layer mean"):
        deploy.graph.operations_of(model, 2)
    assert (model.mean.item(), model.calls, model.seen) == (0, 0, [None])
    assert model.training and not model.bn.training


@pytest.mark.parametrize("generator", [
    random.Random(0), numpy.random.default_rng(0), numpy.random.RandomState(0),
    torch.Generator().manual_seed(0)], ids=lambda value: type(value).__name__)
def test_a_generator_of_the_network_s_own_is_drawn_from_at_each_call(generator, images):
    def draw(network):
        if isinstance(network.generator, torch.Generator):
            return torch.rand(1, generator=network.generator)
        return network.generator.random() if hasattr(network.generator, "random") else (
            network.generator.rand())

    class Noisy(Aliased):
        def forward(self, x):
            return super().forward(x) * draw(self)

    network = Noisy(torch.clone)
    network.generator = generator
    with pytest.warns(UserWarning, match="its forward draws numbers"):
        model = convert(network, [2, 32])
    assert not torch.equal(model(images), model(images))


def test_a_network_without_finite_outputs_is_compared_on_other_images_or_says_so():
    """The logarithm of normal images is none; x is changed in place under another name."""
    def rooted(power):
        def alias(x):
            return x.detach()

        class Rooted(Aliased):
            def forward(self, x):
                return super().forward(x.log() if power else x * float("nan"))
        return Rooted(alias)

    with pytest.raises(ValueError, match="changes .* in place|computes something else"):
        convert(rooted(1), [2, 32])
    assert "returns no tensors of finite numbers" in convert(rooted(0), [2, 32]).note


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def features(self, x):
        return functional.relu(self.conv(x))

    forward = features


def test_functions_of_a_kept_block_that_is_not_called_are_not_known_to_be_its():
    class Outer(nn.Module):
        def __init__(self, is_called):
            super().__init__()
            self.is_called = is_called
            self.stem, self.bn, self.block = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), Inner()
            self.conv, self.head = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 5, 1)

        def forward(self, x):
            run = self.block if self.is_called else self.block.features
            return self.head(self.conv(run(self.bn(self.stem(x))))).mean((2, 3))

    assert activations(convert(Outer(True), [1, 32], keep=["block"])) == []
    with pytest.raises(ValueError, match="keep names 'block', and the network calls something"):
        convert(Outer(False), [1, 32], keep=["block"])
    assert activations(convert(Outer(False), [1, 32], keep=["block.conv"])) == ["relu"]


def test_functions_in_keep_stay_as_they_are():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = FloatBlock(8, 8, 1), FloatBlock(8, 8, 1)
            self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1)

        def forward(self, x):
            return self.head(self.b(self.a(self.stem(x)))).mean((2, 3))

    names = activations(convert(Two(), [1, 32], keep=["a"]))
    assert names and all(name.startswith("b.") for name in names)


def test_what_is_replaced_keeps_what_it_has_or_is_refused():
    network = Shared().requires_grad_(False)
    network.b[0].weight.requires_grad_(True)
    trained = {name for name, value in convert(network, [2, 32]).named_parameters()
               if value.requires_grad}
    assert trained == {f"network.b.0.bn_dict.{width}.weight" for width in (2, 32)}
    network.b[0].register_forward_hook(print)
    with pytest.raises(ValueError, match="layer b.0 has hooks, and is replaced"):
        convert(network, [2, 32])


def test_batch_norms_of_an_assignment_follow_the_activation_that_is_called_next(images):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu = nn.ReLU()  # before what precedes it
            self.conv, self.bn = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)

        def forward(self, x):
            return self.relu(self.bn(self.conv(x)))

    network = nn.Sequential(nn.Conv2d(3, 8, 1), Block(), Block(), nn.Conv2d(8, 5, 1))
    model = convert(network, [2, 8])
    for number in (1, 2):
        for width in (2, 8):
            nn.init.constant_(model.network[number].bn.bn_dict[str(width)].weight, width)
    add_assignment(model, Assignment("mix", 8, {"network.2.*": 2}))
    assert [model.network[number].bn.bn_dict["mix"].weight[0] for number in (1, 2)] == [8, 2]


def test_relu6_is_limited_at_32_bits_and_no_other():
    layer, x = quan_ops.ActivationQ(limit=6.0), torch.tensor([-1.0, 0.4, 5.0, 7.0])
    assert layer(x).tolist() == pytest.approx([0, 0.4, 5, 6])
    layer.switch_bit_width(BitWidth(1))
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
    assert activations(model) == ["relu"]
    assert [layer.input for layer in model.layers] == ["not", *["unknown"] * 3, "not"]
    for x in (images, images - 1, images + 1):  # both ways through the network
        assert_shares_right(model, x)


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
    model, path = convert(build("small_shufflenet"), [1, 2]), tmp_path / "net.safetensors"
    packed.save(model, [1, 2], path, {"network": {
        "model": SMALL, "width": 1, "all_conv": False, "classes": 10}})
    loaded = load(path)
    for bits in (1, 2):
        logits = [set_bit_width(network, bits) or network(images) for network in (model, loaded)]
        assert torch.equal(*logits)


@torch.no_grad()
def test_a_packed_file_of_statistics_that_no_bit_width_changes(tmp_path, images, monkeypatch):
    def made(bit_widths, num_classes=10, width=1, all_conv=False):
        network = sequential(nn.Conv2d(4, 4, 3), FrozenBatchNorm2d(4), nn.Conv2d(4, 4, 3),
                             nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return convert(network, bit_widths, keep=["4"])

    monkeypatch.setitem(MODELS, "frozen", made)
    model = models.build("frozen", [1, 2], 4, 1)
    packed.save(model, [1, 2], tmp_path / "net", {"network": model.spec})
    loaded = load(tmp_path / "net")
    logits = [set_bit_width(network, 2) or network(images) for network in (model.eval(), loaded)]
    assert torch.equal(*logits)


@pytest.mark.parametrize("name, layer", [
    ("resnet18", None), ("mobilenet_v2", None), ("densenet121", "transition1.pool (AvgPool2d)")])
def test_what_other_formats_hold(name, layer):
    model = convert(build(name), [2, 32])
    if layer is None:
        assert len(deploy.graph.operations_of(model, 2)) > 20
        return
    with pytest.raises(ValueError, match=re.escape(layer)):
        deploy.graph.operations_of(model, 2)


# ---- what cannot be converted

def sequential(*layers):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *layers)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean, self.variance = nn.Buffer(torch.zeros(4)), nn.Buffer(torch.ones(4))

    def forward(self, x):
        return functional.batch_norm(x, self.mean, self.variance, training=self.training)


class Paired(Aliased):
    def __init__(self):
        super().__init__(torch.clone)

    def forward(self, x, y):
        return super().forward(x + y)


def with_hook(register):
    network = sequential(nn.Conv2d(4, 4, 3))
    register(network, print)
    return network


def pruned(network):
    prune.random_unstructured(network[3], "weight", 0.5)
    return network


def zero(layer):
    nn.init.zeros_(layer.weight)
    return layer


@pytest.mark.parametrize("network, keep, told", [
    (nn.Sequential(nn.Conv2d(3, 4, 3)), (), "no BatchNorm2d"),
    (nn.Sequential(nn.BatchNorm2d(4)), (), "no Conv2d"),
    (sequential(), (), "no convolution is left"),
    (sequential(nn.ConvTranspose2d(4, 4, 3)), (), "layer 3 is a ConvTranspose2d"),
    (sequential(nn.GroupNorm(1, 4)), (), "layer 3 is a GroupNorm"),
    (sequential(nn.BatchNorm2d(4, affine=False)), (), "layer 3 is a BatchNorm2d without"),
    (sequential(nn.BatchNorm1d(4, affine=False)), (), "layer 3 is a BatchNorm1d"),
    (sequential(FrozenBatchNorm2d(4)), (), "layer 3 is a FrozenBatchNorm2d"),
    (sequential(nn.InstanceNorm2d(4, track_running_stats=True)), (), "3 is a InstanceNorm2d"),
    (sequential(nn.Conv2d(4, 4, 1), Normed(), nn.Conv2d(4, 4, 1)), (),
     "the function batch_norm has running statistics"),
    (with_hook(lambda network, hook: network[2].register_full_backward_hook(hook)), (),
     "layer 2 has hooks"),
    (with_hook(lambda network, hook: network[0].weight.register_hook(hook)), (),
     "0.weight has a hook on its gradient"),
    (pruned(sequential(nn.Conv2d(4, 4, 3))), (), "3.weight is a tensor that was computed"),
    (Paired(), (), "takes x, y, and a converted one takes images alone"),
    (sequential(nn.LazyConv2d(4, 3)), (), "layer 3 is a LazyConv2d"),
    (sequential(nn.Conv2d(4, 4, 3)), ["conv9"], "keep names 'conv9'"),
    (sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3))), (),
     "layer 3 is a ParametrizedConv2d"),
    (sequential(zero(nn.Conv2d(4, 4, 3)), nn.Conv2d(4, 4, 3)), (), "layer 3 has no weight but 0"),
    (MODELS["svhnq"]([2, 32], width=1), (), "no BatchNorm2d")])
def test_what_cannot_be_converted(network, keep, told):
    with pytest.raises(ValueError, match=told) as error:
        convert(network, [1, 32], keep)
    assert "\n" not in str(error.value)


def test_a_layer_without_a_form_can_be_kept():
    network = sequential(nn.Conv2d(4, 4, 1), nn.GroupNorm(1, 4), nn.Conv2d(4, 2, 1))
    model = convert(network, [1, 32], keep=["4"])
    assert model(torch.ones(2, 3, 4, 4)).shape == (2, 2, 2, 2)
