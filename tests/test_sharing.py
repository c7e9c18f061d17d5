"""What bit-widths share follows whatever a researcher's code does in between."""
import contextlib
import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import prune

from engine.forward_pass import ForwardPass
from models import (build, highest_first, initialize_quantizers, packed, quan_ops, quantizers,
                    set_bit_width)
from models.float_layers import Classifier
from models.low_precision import prepare_low_precision
from models.losses import any_precision_backward, forward_loss
from models.quan_ops import (ActivationQ, Conv2dQ, DoReFaActivation, DoReFaWeight, QuantizedLayer,
                             SwitchableBatchNorm2d, clamp, round_ste)
from models.sharing import no_sharing, shared_computation
from quantized import PadOne
from small_networks import ShortSVHN

WIDTHS = [1, 4, 32]
IMAGES = torch.randn(6, 3, 12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6) % 3


class Net(nn.Module):
    """A stem, a quantized convolution and a classifier; `between` follows the stem."""

    conv = Conv2dQ

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.bn = SwitchableBatchNorm2d(8, WIDTHS)
        self.act = ActivationQ()
        self.body = self.conv(8, 8, 3)
        self.fc = nn.Linear(8, 3)

    def between(self, x):
        return x

    def forward(self, x):
        x = self.act(self.bn(self.between(self.stem(x))))
        return self.fc(self.body(x).mean((2, 3)))


def assert_shared_is_unshared(kind=Net, forward=forward_loss, change=lambda model: None, steps=2):
    """Assert that some steps end in the same weights, shared or not."""
    ends = []
    for sharing in (shared_computation, no_sharing):
        torch.manual_seed(0)
        model = kind().double()
        for width in WIDTHS:
            nn.init.uniform_(model.bn.bn_dict[str(width)].bias, 0.2, 0.6)
        change(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            any_precision_backward(model, IMAGES, LABELS, WIDTHS, sharing=sharing, forward=forward)
            optimizer.step()
        ends.append(model)
    for (name, found), expected in zip(ends[0].named_parameters(), ends[1].parameters()):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12, msg=name)
    evaluated = ends[0].eval()
    with torch.no_grad(), shared_computation(evaluated, IMAGES):
        for width in WIDTHS:
            set_bit_width(evaluated, width)
            found = evaluated(IMAGES)
            expected = copy.deepcopy(evaluated)(IMAGES)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def looked_at_before(model, images, target):
    with torch.no_grad():
        weight = 1 - model(images).softmax(1).amax(1).mean()
    loss, logits = forward_loss(model, images, target)
    return loss * weight, logits


def taught_by_a_copy(model, images, target):
    teacher = vars(model).setdefault("teachers", [])
    if not teacher:
        teacher.append(copy.deepcopy(model))
    loss, logits = forward_loss(model, images, target)
    with torch.no_grad():
        expected = teacher[0](images)
    return loss + (logits - expected).square().mean(), logits


def adversarial(model, images, target):
    images.requires_grad_()
    loss, logits = forward_loss(model, images, target)
    gradient, = torch.autograd.grad(loss, images, retain_graph=True)
    images.requires_grad_(False)
    return loss + forward_loss(model, images + 0.1 * gradient.sign(), target)[0], logits


@pytest.mark.parametrize("forward", [looked_at_before, taught_by_a_copy, adversarial])
def test_other_passes_within_a_step(forward):
    assert_shared_is_unshared(forward=forward)


def test_weights_that_change_between_two_passes():
    torch.manual_seed(0)
    model = Net().double()
    with shared_computation(model, IMAGES), torch.no_grad():
        set_bit_width(model, 4)
        before = model(IMAGES)
        for parameter in (model.stem.weight, model.body.weight):
            parameter.mul_(-1)
        after = model(IMAGES)
    assert not torch.allclose(before, after)
    with torch.no_grad():
        torch.testing.assert_close(after, model(IMAGES), rtol=0, atol=0)


def in_place(function):
    class InPlace(Net):
        def between(self, x):
            function(x)
            return x
    return InPlace


class TwoBranches(Net):
    def between(self, x):
        first = self.pool(x)
        x.mul_(0.5)
        return first + self.pool(x)

    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool2d(3, 1, 1)


class PoolAgain(Net):
    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool2d(2, 1)

    def between(self, x):
        return self.pool(functional.pad(self.pool(x), (0, 1, 0, 1)))


class ByName(Net):
    def forward(self, x):
        x, _ = functional.max_pool2d(self.stem(input=x), 2, return_indices=True)
        return self.fc(self.body(self.act(self.bn(x))).mean((2, 3)))


class Indices(Net):
    def __init__(self):
        super().__init__()
        self.pool = nn.MaxPool2d(2, 1, return_indices=True)

    def between(self, x):
        return self.pool(x)[0]


@pytest.mark.parametrize("kind", [
    in_place(torch.relu_), in_place(lambda x: x.add_(0.1)),
    in_place(nn.LeakyReLU(inplace=True)), PoolAgain, ByName, Indices])
def test_stems_of_other_networks(kind):
    assert_shared_is_unshared(kind)


def test_a_change_in_place_between_two_uses():
    torch.manual_seed(0)
    model = TwoBranches().double().eval()
    with torch.no_grad(), shared_computation(model, IMAGES):
        for width in WIDTHS:
            set_bit_width(model, width)
            expected = copy.deepcopy(model)(IMAGES)
            torch.testing.assert_close(model(IMAGES), expected, rtol=0, atol=0)


def clamp_weight(model):
    model.body.register_forward_pre_hook(lambda layer, x: clamp_(layer.weight))


@torch.no_grad()
def clamp_(weight):
    weight.clamp_(-0.05, 0.05)


def normalize_weight(model):
    torch.nn.utils.parametrizations.weight_norm(model.body)


def tie(model):
    model.second = Conv2dQ(8, 8, 3).double()
    model.second.weight = model.body.weight


def freeze(model):
    model.stem.requires_grad_(False)
    model.body.weight.requires_grad_(False)


@pytest.mark.parametrize("change", [normalize_weight, tie, freeze])
def test_weights_that_are_not_plain(change):
    assert_shared_is_unshared(change=change)


def test_a_weight_that_a_hook_changes_is_prepared_again():
    torch.manual_seed(0)
    model = Net().double().eval()
    clamp_weight(model)
    set_bit_width(model, 4)
    with torch.no_grad(), shared_computation(model, IMAGES):
        found = model(IMAGES)
    with torch.no_grad():
        torch.testing.assert_close(found, model(IMAGES), rtol=0, atol=0)


# ---- what `prepare` may do

class ByBits(DoReFaWeight):
    def prepare(self, w):
        v, e = super().prepare(w)
        return v, e if self.bits == 1 else 2 * e


class Noisy(DoReFaWeight):
    calls = 0

    def prepare(self, w):
        type(self).calls += 1
        return super().prepare(w + 0.3 * w.detach().std() * torch.randn_like(w))


def with_quantizer(kind):
    def change(model):
        model.body.quantizer = kind()
    return change


def test_prepare_that_depends_on_the_bit_width_fails():
    with pytest.raises(ValueError, match="ByBits.prepare depends on the bit-width"):
        assert_shared_is_unshared(change=with_quantizer(ByBits))


def test_backward_after_the_context_is_refused():
    model = Net().double()
    losses = []
    with shared_computation(model, IMAGES):
        for width in WIDTHS:
            set_bit_width(model, width)
            losses.append(forward_loss(model, IMAGES, LABELS)[0])
    with pytest.raises(ValueError, match=r"call backward\(\) within it"):
        sum(losses).backward()


@pytest.mark.parametrize("kind", [nn.DataParallel, nn.parallel.DistributedDataParallel])
def test_wrappers_that_would_miss_gradients_are_refused(kind):
    model = nn.Sequential(Net().double())
    wrapper = kind.__new__(kind)  # without a process group
    nn.Module.__init__(wrapper)
    wrapper.module = model
    wrapper.forward = model.forward
    with pytest.raises(ValueError, match=f"{kind.__name__} does not see the gradients"):
        any_precision_backward(wrapper, IMAGES, LABELS, WIDTHS)
    any_precision_backward(wrapper, IMAGES, LABELS, WIDTHS, sharing=no_sharing)
    assert model[0].stem.weight.grad is not None


def test_a_replica_of_data_parallel_computes():
    """It has its weights as attributes, not as parameters."""
    for layer in (Conv2dQ(3, 4, 1), Classifier(3, 4)):
        replica = layer._replicate_for_data_parallel()
        replica.weight, replica.bias = layer.weight.detach(), layer.bias.detach()
        x = torch.randn(2, 3, 4, 4) if isinstance(layer, Conv2dQ) else torch.randn(2, 3)
        assert torch.equal(replica(x), layer(x))


def test_initialize_leaves_modes_as_they_are():
    model = build("svhnq", WIDTHS, 3, 1, quantizer="lsq")
    model.layers[1].eval()  # a frozen BatchNorm
    modes = {name: module.training for name, module in model.named_modules()}
    initialize_quantizers(model, torch.randn(2, 3, 40, 40), highest_first(WIDTHS))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert len(set(modes.values())) == 2


def test_one_quantizer_for_all_layers_is_refused(monkeypatch):
    single = DoReFaWeight()
    monkeypatch.setitem(quantizers.QUANTIZERS, "single", lambda layer, bit_widths: (
        single if isinstance(layer, QuantizedLayer) else DoReFaActivation()))
    with pytest.raises(ValueError, match="'single' gives layers.3 and layers.6 the same object"):
        build("svhnq", [2, 4], 10, 1, quantizer="single")


@pytest.mark.parametrize("compute", [
    lambda layer: prune.l1_unstructured(layer, "weight", 0.3), nn.utils.weight_norm,
    nn.utils.parametrizations.weight_norm])
def test_compiled_weights_that_are_computed(compute):
    """A weight that a hook computes is an older one until the layer is called."""
    torch.manual_seed(0)
    model = ShortSVHN([4], width=1).eval()
    compute(model.get_submodule("layers.3"))
    images, labels = torch.randn(2, 3, 40, 40), torch.tensor([0, 1])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    forward = ForwardPass(model, torch.device("cpu"), batch_size=2, backend="aot_eager")
    with forward.sharing(model, images), torch.no_grad():
        found = forward(model, images, labels)[0]
    torch.testing.assert_close(found, forward_loss(model, images, labels)[0])
    if compute is not nn.utils.weight_norm:
        forward.backward(images, labels, [4], "hard")


def test_a_hook_that_comes_after_compilation():
    model = ShortSVHN([4], width=1).eval()
    images, labels = torch.randn(2, 3, 40, 40), torch.tensor([0, 1])
    forward = ForwardPass(model, torch.device("cpu"), batch_size=2, backend="aot_eager")
    with torch.no_grad():
        before = forward(model, images, labels)[0]
        hook = model.get_submodule("layers.3").register_forward_hook(lambda layer, x, y: y * 0.5)
        torch.testing.assert_close(forward(model, images, labels)[0],
                                   forward_loss(model, images, labels)[0])
        hook.remove()
        assert forward(model, images, labels)[0] == before


def test_integers_that_change_what_was_prepared_are_refused():
    class InPlace(DoReFaWeight):
        def integers(self, v, e):
            e /= 2**self.bits - 1
            return super().integers(v, e)

    model = ShortSVHN(WIDTHS, width=1)
    model.layers[3].quantizer = InPlace()
    images, labels = torch.randn(2, 3, 40, 40), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="InPlace changes in place what all bit-widths share"):
        any_precision_backward(model, images, labels, WIDTHS)
    forward = ForwardPass(model, torch.device("cpu"), batch_size=2, backend="aot_eager")
    forward.suits["training"] = True
    with pytest.raises(ValueError, match="InPlace changes in place what all bit-widths share"):
        forward.backward(images, labels, [4, 1], "recursive")


def test_weights_that_a_parametrization_computes():
    """Such a weight lives for one pass: the next one may have its id."""
    model = build("svhnq", WIDTHS, 10, 1).double()
    for layer in model.modules():
        if isinstance(layer, QuantizedLayer):
            nn.utils.parametrizations.weight_norm(layer)
    images = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    with shared_computation(model, images), torch.no_grad():
        for number in range(6):
            for bits in WIDTHS:
                set_bit_width(model, bits)
                found = model.eval()(images)
                with contextlib.ExitStack() as stack:
                    for layer in model.modules():
                        if isinstance(layer, QuantizedLayer):
                            shared, layer.shared = layer.shared, None
                            stack.callback(setattr, layer, "shared", shared)
                    assert torch.equal(found, model(images)), (number, bits)
            for parameter in model.parameters():
                parameter.mul_(1.1)


def test_noise_in_prepare_is_drawn_once_a_step():
    Noisy.calls = 0
    model = Net().double()
    with_quantizer(Noisy)(model)
    any_precision_backward(model, IMAGES, LABELS, WIDTHS)
    assert Noisy.calls == 1


class StaticActivation(DoReFaActivation):
    """A scale that initialize sets, in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("most", torch.tensor(1.0))

    def initialize(self, x):
        self.most.fill_(float(x.max()))


def test_initialize_sets_buffers_and_leaves_those_of_batch_norm(monkeypatch):
    monkeypatch.setitem(quantizers.QUANTIZERS, "static", lambda layer, bit_widths: (
        DoReFaWeight() if isinstance(layer, QuantizedLayer) else StaticActivation()))
    model = build("svhnq", WIDTHS, 10, quantizer="static")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    initialize_quantizers(model, torch.randn(4, 3, 40, 40), highest_first(WIDTHS))
    changed = {key.rpartition(".")[2] for key, value in model.state_dict().items()
               if not torch.equal(value, before[key])}
    assert changed == {"most"}


# ---- low precision

def bf16_error(layer, x):
    """Return the largest difference of a layer in bf16 from float32, relative to its output."""
    with torch.no_grad():
        expected = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            found = layer(x)
    return float((found - expected).abs().max() / expected.abs().max())


class Dynamic(DoReFaActivation):
    """Its step depends on the input, so that `step_size` cannot say it."""

    def integers(self, x, rounding=True):
        scale = x.detach().amax() / (2**self.bits - 1)
        a = clamp(x / scale, 0, 2**self.bits - 1)
        return round_ste(a) if rounding else a, scale

    def step_size(self):
        return None


class Wider(DoReFaActivation):
    """Whoever wrote it forgot that `step_size` says the scale of `integers`."""

    def integers(self, x, rounding=True):
        integers, scale = super().integers(x / 1.5, rounding)
        return integers, 1.5 * scale


class PerChannel(DoReFaActivation):
    def integers(self, x, rounding=True):
        integers, _ = super().integers(x / self.ranges(), rounding)
        return integers, self.step_size()

    def ranges(self):
        return torch.linspace(0.5, 1.5, 8).view(8, 1, 1)

    def step_size(self):
        return self.ranges() / (2**self.bits - 1)


class Shifted(ActivationQ):
    def forward(self, x):
        return super().forward(x) + 0.1


def of_quantizer(quantizer):
    layer = ActivationQ()
    layer.quantizer = quantizer
    return layer


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("activation", [
    [ActivationQ()], [ActivationQ(), nn.Dropout(0.5)], [ActivationQ(), nn.Dropout(0.3)],
    [ActivationQ(), nn.Dropout2d(0.2)], [of_quantizer(Dynamic())], [of_quantizer(Wider())],
    [of_quantizer(PerChannel())], [Shifted()]],
    ids=["plain", "dropout of a half", "dropout", "dropout of channels", "dynamic", "wider",
         "per channel", "shifted"])
def test_low_precision_takes_activations_as_they_are(activation, bits):
    torch.manual_seed(0)
    model = nn.Sequential(*activation, Conv2dQ(8, 8, 3)).train()
    prepare_low_precision(model)
    assert model[-1].input_quantizer is model[0].quantizer
    set_bit_width(model, bits)
    x = 2 * torch.rand(4, 8, 9, 9)
    assert bf16_error(model[-1], model[:-1](x)) < 0.02


def test_a_layer_that_was_not_prepared_computes_with_its_weight():
    torch.manual_seed(0)
    layer = PadOne(8, 8, 3)
    set_bit_width(layer, 2)
    assert bf16_error(layer, torch.randint(4, (4, 8, 9, 9)) / 3) < 0.02


def test_low_precision_follows_a_weight_that_was_edited_where_it_stands(monkeypatch):
    product = QuantizedLayer.quantized_weight

    def corrected(layer):
        weight = product(layer)
        return weight - weight.mean((1, 2, 3), keepdim=True)

    monkeypatch.setattr(QuantizedLayer, "quantized_weight", corrected)
    torch.manual_seed(0)
    model = build("svhnq", [1, 4, 32], 10, 1)
    before = torch.get_rng_state()
    ForwardPass(model, torch.device("cpu"), "bf16")
    assert torch.equal(torch.get_rng_state(), before)
    layer = model.get_submodule("layers.6")
    for bits in (1, 4):
        set_bit_width(model, bits)
        assert bf16_error(layer, torch.randint(2**bits, (4, 8, 9, 9)) / (2**bits - 1)) < 0.02


class Learned(Conv2dQ):
    """A factor and a shift of the output, which are 1 and 0 at first."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.factor = nn.Parameter(torch.ones(8, 1, 1))
        self.shift = nn.Parameter(torch.zeros(8, 1, 1))

    def forward(self, x):
        return self.apply_quantized(x, lambda x, w, b: self.factor * functional.conv2d(
            x, w, b) + self.shift)


class Standardized(Conv2dQ):
    def forward(self, x):
        return self.apply_quantized(x, lambda x, w, b: functional.conv2d(
            x, (w - w.mean()) / w.std(), b))


@pytest.mark.parametrize("kind", [PadOne, Learned, Standardized])
@pytest.mark.parametrize("bias", [True, False])
def test_low_precision_follows_what_a_layer_makes_of_its_weight(kind, bias):
    torch.manual_seed(0)
    model = build("svhnq", [1, 2, 8, 32], 10, 1)
    model.layers[6] = layer = kind(8, 8, 3, bias=bias)
    ForwardPass(model, torch.device("cpu"), "bf16")
    assert not layer.is_scalable
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name in ("factor", "shift"):
                parameter.fill_(3)
    for bits in (1, 2, 8):
        set_bit_width(model, bits)
        assert bf16_error(layer, torch.randint(2**bits, (4, 8, 9, 9)) / (2**bits - 1)) < 0.02


@pytest.mark.parametrize("kind", [PadOne, Learned, Standardized, Conv2dQ])
@pytest.mark.parametrize("makes", ["packed", "pruned", "weight_norm"])
def test_low_precision_follows_what_a_layer_makes_of_a_computed_weight(kind, makes, tmp_path):
    torch.manual_seed(0)
    model = build("svhnq", [1, 2, 8], 10, 1)
    model.layers[6] = layer = kind(8, 8, 3)
    if makes == "pruned":
        prune.random_unstructured(layer, "weight", 0.5)
    elif makes == "weight_norm":
        nn.utils.parametrizations.weight_norm(layer)
    else:
        packed.save(model, [1, 2, 8], tmp_path / "net", {"network": model.spec})
        content = packed.read_checkpoint(tmp_path / "net")
        packed.install(model, content["state_dict"], **content["packed"])
    ForwardPass(model, torch.device("cpu"), "bf16")
    assert layer.is_scalable == (kind is Conv2dQ)
    for bits in (1, 2, 8):
        set_bit_width(model, bits)
        assert bf16_error(layer, torch.randint(2**bits, (4, 8, 9, 9)) / (2**bits - 1)) < 0.02


class Bilinear(QuantizedLayer, nn.Bilinear):
    """Neither a convolution nor linear: its inputs are not known."""

    def forward(self, x):
        return self.apply_quantized(x, lambda x, w, b: functional.bilinear(x, x, w, b))


def test_a_layer_of_an_unknown_kind_computes_with_its_weight():
    torch.manual_seed(0)
    layer = Bilinear(4, 4, 3)
    del layer.in1_features, layer.in2_features
    model = nn.Sequential(SwitchableBatchNorm2d(4, [2]), layer)
    ForwardPass(model, torch.device("cpu"), "bf16")
    assert not layer.is_scalable
    set_bit_width(model, 2)
    assert bf16_error(layer, torch.randint(4, (8, 4)) / 3) < 0.02


def test_low_precision_follows_a_weight_of_training_alone(monkeypatch):
    """Quant-Noise (Fan et al., 2021): some weights stay as they are."""
    product = QuantizedLayer.quantized_weight

    def partly(layer):
        weight = product(layer)
        kept = torch.rand_like(weight) < 0.5
        return torch.where(kept, layer.weight, weight) if layer.training else weight

    monkeypatch.setattr(QuantizedLayer, "quantized_weight", partly)
    model = build("svhnq", [2, 32], 10, 1)
    ForwardPass(model, torch.device("cpu"), "bf16")
    assert not any(layer.is_scalable for layer in model.modules()
                   if isinstance(layer, QuantizedLayer))


@pytest.mark.parametrize("edited", [True, False])
def test_low_precision_follows_the_gradient_of_a_weight(edited, monkeypatch):
    """Gradient scaling, and other straight-through estimators, leave the weight as it is."""
    product = QuantizedLayer.quantized_weight
    if edited:
        monkeypatch.setattr(QuantizedLayer, "quantized_weight", lambda layer: (
            product(layer).detach() + 3 * (product(layer) - product(layer).detach())))
    torch.manual_seed(0)
    model = build("svhnq", [1, 4, 32], 10, 1).eval()
    layer = model.layers[6]
    gradients = []
    for precision in ("fp32", "bf16"):
        forward_pass = ForwardPass(model, torch.device("cpu"), precision)
        set_bit_width(model, 4)
        x = torch.rand(4, layer.in_channels, 9, 9, generator=torch.Generator().manual_seed(0))
        with forward_pass.autocast():
            loss = layer(x).float().square().sum()
        gradients.append(torch.autograd.grad(loss, layer.weight)[0])
    assert layer.is_scalable != edited
    exact, low = gradients
    assert (low - exact).norm() < 0.02 * exact.norm()


class Running(DoReFaWeight):
    """The scale is a running mean."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Buffer(torch.ones(()))

    def integers(self, v, e):
        if self.training:
            self.scale.lerp_(e, 0.1)
        integers, _ = super().integers(v, e)
        return integers, self.scale / (2**self.bits - 1)


class Stochastic(DoReFaWeight):
    def integers(self, v, e):
        n = 2**self.bits - 1
        return 2 * (n * (v / 2 + 0.5) + torch.rand_like(v)).floor() - n, e / n


@pytest.mark.parametrize("quantizer", ["dorefa", "lsq", "running", "stochastic"])
def test_layers_are_known_to_be_scalable(quantizer, monkeypatch):
    for kind in (Running, Stochastic):
        def made(layer, bit_widths, kind=kind):
            return kind() if isinstance(layer, QuantizedLayer) else DoReFaActivation()

        monkeypatch.setitem(quantizers.QUANTIZERS, kind.__name__.lower(), made)
    monkeypatch.setattr(torch, "manual_seed", None)  # it would seed GPUs, too
    model = build("svhnq", ["w2a4", 4, 32], 10, 1, quantizer=quantizer)
    before = copy.deepcopy(model.state_dict())
    ForwardPass(model, torch.device("cpu"), "bf16")
    assert all(layer.is_scalable for layer in model.modules()
               if isinstance(layer, QuantizedLayer))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_weights_are_shared_in_inference_mode():
    model = Net().double()
    set_bit_width(model, 4)
    with torch.inference_mode():
        expected = model(IMAGES)
        with shared_computation(model, IMAGES):
            assert torch.equal(model(IMAGES), expected)


def test_a_quantizer_s_matrix_product_is_not_rounded():
    class Rotated(DoReFaWeight):
        def prepare(self, w):
            rotation = torch.linalg.qr(torch.arange(64.0).view(8, 8).sin())[0]
            return super().prepare((rotation @ w.flatten(1)).view_as(w))

    layer = Conv2dQ(8, 8, 3)
    layer.quantizer = Rotated()
    set_bit_width(layer, 8)
    expected = layer.quantized_weight()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.quantized_weight(), expected)
        assert torch.equal(layer.integer_weight()[0], layer.integer_weight()[0].float())
    set_bit_width(layer, 32)
    expected = layer.quantized_weight()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.quantized_weight(), expected)


def test_a_weight_that_pruning_computes_in_low_precision():
    torch.manual_seed(0)
    model = build("svhnq", [4], 10, 1)
    layer = model.get_submodule("layers.6")
    prune.l1_unstructured(layer, "weight", 0.3)
    ForwardPass(model, torch.device("cpu"), "bf16")
    assert bf16_error(layer, torch.randint(16, (4, 8, 9, 9)) / 15) < 0.02


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_learned_clip_of_one_number_has_exact_operands(shape):
    class Clipped(DoReFaActivation):
        def integers(self, x, rounding=True):
            return super().integers(x / 1.3)[0], self.step_size()

        def step_size(self):
            return torch.full(shape, 1.3) / (2**self.bits - 1)

    torch.manual_seed(0)
    model = nn.Sequential(of_quantizer(Clipped()), Conv2dQ(8, 8, 3, bias=False))
    prepare_low_precision(model)
    set_bit_width(model, 8)
    operands = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quan_ops, "low_precision", lambda x: True)
        model[1].apply_quantized(model[0](2 * torch.rand(2, 8, 9, 9)),
                                 lambda x, w, b: operands.append(x) or x)
    assert torch.equal(operands[0] * 256, (operands[0] * 256).round())


class TransposedQ(QuantizedLayer, nn.ConvTranspose2d):
    def forward(self, x):
        return self.apply_quantized(
            x, lambda x, w, b: functional.conv_transpose2d(x, w, b, self.stride, self.padding))


class PerRow(DoReFaWeight):
    def prepare(self, w):
        v, _ = super().prepare(w)
        return v, w.abs().mean((1, 2, 3), keepdim=True).detach()


class Louder(Conv2dQ):
    def quantized_weight(self):
        return 1.7 * super().quantized_weight()


class Unscaled(DoReFaWeight):
    def integers(self, v, e):
        integers, _ = super().integers(v, e)
        return integers, 1 / (2**self.bits - 1)


def with_rows(kind):
    layer = kind(8, 8, 3)
    layer.weight.data *= torch.logspace(-1, 1, 8)[:, None, None, None]
    layer.quantizer = PerRow()
    return layer


def unscaled():
    layer = Conv2dQ(8, 8, 3)
    layer.quantizer = Unscaled()
    return layer


@pytest.mark.parametrize("make", [
    lambda: with_rows(TransposedQ), lambda: with_rows(Conv2dQ), lambda: Louder(8, 8, 3), unscaled])
def test_low_precision_is_near(make):
    torch.manual_seed(0)
    layer = make()
    for bits in (1, 2, 8):
        set_bit_width(layer, bits)
        levels = torch.randint(2**bits, (4, 8, 9, 9)) / (2**bits - 1)
        assert bf16_error(layer, levels) < 0.02, bits


@pytest.mark.parametrize("width", ["w4a32", "w32a4", 4])
def test_learned_steps_in_bf16(width):
    torch.manual_seed(0)
    model = build("resnet20q", [width], 10, quantizer="lsq").eval()
    images = torch.randn(2, 3, 16, 16)
    initialize_quantizers(model, images, highest_first([width]))
    forward = ForwardPass(model, torch.device("cpu"), "bf16")
    with torch.no_grad(), forward.autocast():
        assert model(images).isfinite().all()
