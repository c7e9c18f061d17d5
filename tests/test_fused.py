"""models/fused.c against the torch operations that it stands for, in float64."""
import weakref

import pytest
import torch
from torch.nn.functional import max_pool2d
from torch.testing import assert_close

import distributed
import reference
from models import fused
from models.quan_ops import (ActivationQ, BatchNorm2d, Conv2dQ, Dropout, MaxPool2d, normalize_weight, normalize_weights,
                             quantize_activation, quantize_weight, share_weights, through)
from test_step import batch, gradients, network

needs_compiler = pytest.mark.skipif(fused.load()[0] is None, reason="fused.c could not be compiled here")
ACTIVATIONS = {1: 1, 3: 7, 8: 255, 32: fused.RELU, None: fused.NONE}  # bits: fused.c's number


def images(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


def activated(x, bits):
    return x if bits is None else quantize_activation(x, bits)


def compare(function, equation, inputs, tolerance, level=0):
    """function(inputs) and its gradients, in float32, against equation's in float64.

    level: the step between the levels of outputs, of which a few may be the next one, where float32 rounds otherwise.
    """
    results = []
    for compute, dtype in ((function, torch.float32), (equation, torch.float64)):
        leaves = [value.detach().to(dtype).requires_grad_() for value in inputs]
        out = compute(*leaves)
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(99)).to(dtype)
        results.append([out, *torch.autograd.grad(out, leaves, upstream)])
    for index, (found, expected) in enumerate(zip(*results)):
        error = (found - expected).abs()
        wrong = error > tolerance * expected.abs().max()
        if index == 0 and level:
            assert wrong.sum() <= 3 and error.max() < 1.01 * level
        else:
            assert not wrong.any()


def weight_of(out, channels, window):
    return images(out, channels, window, window) / (channels * window**2) ** 0.5


@needs_compiler
@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (3, 130, 5, 4), (40, 12, 9, 9), (1, 8, 70, 3)])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("bits", ACTIVATIONS)
def test_normalize(bits, pooled, shape):
    torch.manual_seed(0)
    x, channels = images(*shape) + 1, shape[1]
    layers = [kind(channels) for kind in (BatchNorm2d, torch.nn.BatchNorm2d)]
    layers[1].double()
    activation = ActivationQ()
    activation.bits = bits
    following = [*([MaxPool2d()] if pooled else []), *([activation] if bits else [])]

    def function(x, weight, bias):
        del layers[0].weight, layers[0].bias  # parameters: these are not
        layers[0].weight, layers[0].bias = weight, bias
        out = through([layers[0], *following], x)
        assert type(out.grad_fn).__name__ == "ChainBackward" and len(out.grad_fn.links) == 1
        return out

    def equation(x, weight, bias):
        z = torch.nn.functional.batch_norm(x, layers[1].running_mean, layers[1].running_var, weight, bias, True)
        return activated(max_pool2d(z, 2) if pooled else z, bits)

    compare(function, equation, [x, torch.randn(channels), torch.randn(channels)], 1e-5,
            1 / ACTIVATIONS[bits] if bits in (1, 3, 8) else 0)
    assert_close(layers[0].running_mean, layers[1].running_mean, check_dtype=False)
    assert_close(layers[0].running_var, layers[1].running_var, check_dtype=False)
    assert layers[0].num_batches_tracked == 1


@needs_compiler
@pytest.mark.parametrize("count, channels, height, width, out, window, padding", [
    (1, 1, 5, 4, 1, 3, 1), (7, 3, 8, 11, 20, 3, 0), (13, 12, 6, 6, 16, 3, 2), (50, 16, 3, 4, 33, 3, 1), (9, 17, 7, 3, 8, 1, 0),
    (70, 32, 5, 5, 16, 5, 0), (70, 32, 5, 5, 16, 5, 2), (4, 40, 1, 2, 32, 2, 1), (4, 40, 1, 1, 32, 3, 1),
    (5, 64, 9, 9, 64, 4, 0), (5, 64, 9, 9, 64, 4, 3)])
def test_convolution(count, channels, height, width, out, window, padding):
    torch.manual_seed(0)

    def function(x, w):
        w = w.contiguous(memory_format=torch.channels_last)
        return fused.chain([fused.Layer(x.shape, convolution=(w, padding))], x)

    compare(function, lambda x, w: torch.nn.functional.conv2d(x, w, padding=padding),
            [images(count, channels, height, width), weight_of(out, channels, window)], 2e-6)


@needs_compiler
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("bits", [2, 8, 32, None])
def test_a_layer_is_its_parts(bits, normalized, pooled):
    """The values and gradients of one link are those of a link for each of its parts."""
    torch.manual_seed(0)
    x, w, norm = images(11, 12, 9, 7) + 0.3, weight_of(20, 12, 3), BatchNorm2d(12)
    torch.nn.init.normal_(norm.weight), torch.nn.init.normal_(norm.bias)
    parts = {**({"norm": norm} if normalized else {}), **({"pooled": True} if pooled else {}),
             **({"activation": fused.RELU if bits == 32 else 2**bits - 1} if bits else {}), "convolution": (w, 1)}
    results = []
    for merged in (True, False):
        leaves = [x.clone().requires_grad_(), w.requires_grad_(), norm.weight, norm.bias]
        links = []
        for name, part in parts.items():
            link = fused.Layer(links[-1].out if links else x.shape, **{name: part})
            links.append(links.pop().joined(link) if merged and links else link)
        assert len(links) == (1 if merged else len(parts))
        out = fused.chain(links, leaves[0])
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves, allow_unused=not normalized)])
    for merged, separate in zip(*results):
        assert_close(merged, separate, rtol=1e-5, atol=1e-5)


@needs_compiler
@pytest.mark.parametrize("pooled", [False, True])
def test_results_do_not_depend_on_the_number_of_threads(pooled, monkeypatch):
    torch.manual_seed(0)
    x, weight, bias, w = images(30, 12, 18, 18), torch.rand(12), torch.rand(12), weight_of(20, 12, 3)
    results = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for threads in (1, 2, 3, 50):
        norm = BatchNorm2d(12)
        norm.weight.data, norm.bias.data = weight.clone(), bias.clone()
        leaves = [x.clone().requires_grad_(), *norm.parameters(), w.clone().requires_grad_()]
        link = fused.Layer(x.shape, norm=norm, **({"pooled": True} if pooled else {}), activation=3, convolution=(leaves[3], 1))
        out = fused.chain([link], leaves[0])
        results.append([out, norm.running_mean, norm.running_var, *torch.autograd.grad(out.square().sum(), leaves)])
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(results[0], other))


@needs_compiler
@pytest.mark.parametrize("bits", [1, 2, 8, 32])
def test_activation_and_its_ends(bits):
    torch.manual_seed(0)
    x = images(2, 3, 40, 5).flatten()
    x[:8] = torch.tensor([0.0, 1.0, -1e-30, 1e-30, 1 + 2**-23, 1 - 2**-24, 0.5, 2.0])
    x = x.view(2, 40, 5, 3).permute(0, 3, 1, 2).requires_grad_()
    activation = ActivationQ()
    activation.bits = bits
    found, expected = through([activation], x), quantize_activation(x, bits)
    upstream = torch.randn_like(x)
    assert torch.equal(found, expected) and type(found.grad_fn).__name__ == "ChainBackward"
    assert_close(*(torch.autograd.grad(out, x, upstream)[0] for out in (found, expected)))


@needs_compiler
@pytest.mark.parametrize("bits", [1, 2, 32])
def test_gradients_where_normalized_values_lie_on_the_ends(bits):
    """x of -1 and 1 has mean 0 and variance 1: times 1/2 plus 1/2 it is exactly 0 and 1."""
    torch.manual_seed(0)
    x = torch.cat([torch.ones(3, 2, 4, 5), -torch.ones(3, 2, 4, 5)])[torch.randperm(6)]

    def function(x, weight, bias):
        norm = BatchNorm2d(2, eps=0.0)
        del norm.weight, norm.bias
        norm.weight, norm.bias = weight, bias
        x = x.contiguous(memory_format=torch.channels_last)
        return fused.chain([fused.Layer(x.shape, norm=norm, activation=ACTIVATIONS.get(bits, 2**bits - 1))], x)

    def equation(x, weight, bias):
        centred = x - x.mean((0, 2, 3), keepdim=True)
        deviation = centred.square().mean((0, 2, 3), keepdim=True).sqrt()
        return activated(centred / deviation * weight[:, None, None] + bias[:, None, None], bits)

    compare(function, equation, [x, torch.full((2,), 0.5), torch.full((2,), 0.5)], 1e-6)


@needs_compiler
@pytest.mark.parametrize("following", [
    (ActivationQ(), MaxPool2d()), (MaxPool2d(), MaxPool2d()), (ActivationQ(rounding=False),), (torch.nn.ReLU(),),
    (Dropout(0.0), ActivationQ()), (BatchNorm2d(4),)])
def test_layers_that_follow_in_another_order(following):
    torch.manual_seed(0)
    for layer in following:
        layer.bits = 2
    x, layer, expected = images(3, 4, 9, 8), BatchNorm2d(4), torch.nn.BatchNorm2d(4)
    out = expected(x.contiguous())
    for after in following:
        out = after(out)
    assert_close(through([layer, *following], x), out, rtol=1e-5, atol=1e-6)


def conv_of(**how):
    return Conv2dQ(**{"in_channels": 16, "out_channels": 8, "kernel_size": 3, "bias": False, **how})


@needs_compiler
@pytest.mark.parametrize("linked, conv", [
    (True, conv_of()), (True, conv_of(padding=2)), (True, conv_of(kernel_size=1)), (True, conv_of(out_channels=90)),
    (False, conv_of(bias=True)), (False, conv_of(stride=2)), (False, conv_of(padding=(1, 0))),
    (False, conv_of(kernel_size=(3, 1))), (False, conv_of(kernel_size=9)), (False, conv_of(out_channels=130)),
    (False, conv_of(padding=3)), (False, conv_of(quantized_input=False)), (False, conv_of(groups=4)),
    (False, conv_of(dilation=2)), (False, conv_of(padding="same")), (False, conv_of(padding=1, padding_mode="circular"))])
def test_which_convolutions_are_links(linked, conv):
    torch.manual_seed(0)
    x = images(5, 16, 9, 9)
    share_weights([conv], *normalize_weights([conv.weight]))
    try:
        assert (conv.link(x.shape) is not None) == linked
        found = through([conv], x)
        conv.shared = None
        assert_close(found, conv(x), rtol=1e-4, atol=1e-5)
    finally:
        conv.shared = None


@needs_compiler
@pytest.mark.parametrize("norm", [{"affine": False}, {"track_running_stats": False}])
def test_other_batch_norms_are_torchs(norm):
    torch.manual_seed(0)
    x = images(5, 4, 3, 3)
    assert_close(through([BatchNorm2d(4, **norm)], x), torch.nn.BatchNorm2d(4, **norm)(x), rtol=1e-5, atol=1e-5)


@needs_compiler
def test_the_plain_path_comes_nowhere_near(monkeypatch):
    model = network("svhnq", widths=[2, 32]).to(memory_format=torch.channels_last)
    monkeypatch.setattr(fused, "chain", None)
    x, labels = batch("svhnq")
    gradients(model, x.float().contiguous(memory_format=torch.channels_last), labels, "recursive", plain=True, widths=[2, 32])


@needs_compiler
def test_a_batch_norm_over_processes_has_no_link(monkeypatch):
    layer = torch.nn.Sequential(BatchNorm2d(4))
    distributed.synchronise_batch_norm(layer)
    assert layer[0].link((2, 4, 3, 3)) is not None
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert layer[0].link((2, 4, 3, 3)) is None


@needs_compiler
def test_gradients_in_any_layout():
    torch.manual_seed(0)
    x, w, upstream = images(5, 4, 6, 6).requires_grad_(), weight_of(8, 4, 3), torch.randn(5, 8, 4, 4)
    out = fused.chain([fused.Layer(x.shape, activation=3, convolution=(w, 0))], x)
    found = [torch.autograd.grad(out, x, grad, retain_graph=True)[0]
             for grad in (upstream, upstream.contiguous(memory_format=torch.channels_last), torch.ones(()).expand(5, 8, 4, 4))]
    assert torch.equal(found[0], found[1])
    assert_close(found[2], torch.autograd.grad(out, x, torch.ones(5, 8, 4, 4))[0])


@needs_compiler
def test_what_lies_between_links_goes_with_the_backward_pass(monkeypatch):
    kept = []
    forward = fused.Layer.forward
    monkeypatch.setattr(fused.Layer, "forward", lambda link, x: kept.append(weakref.ref(x)) or forward(link, x))
    x = images(2, 3, 8, 8).requires_grad_()
    first = fused.Layer(x.shape, pooled=True)
    out = fused.chain([first, fused.Layer(first.out, activation=3)], x).sum()
    assert kept[1]() is not None
    out.backward()
    assert out.grad_fn is not None and kept[1]() is None


@needs_compiler
def test_torchs_defaults_do_not_matter():
    x = images(2, 3, 8, 8)
    expected = through([BatchNorm2d(3), MaxPool2d()], x)
    norm = BatchNorm2d(3)
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            found = through([norm, MaxPool2d()], x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


@needs_compiler
def test_what_does_not_fit_is_torchs_error():
    with pytest.raises(RuntimeError, match="running_mean"):
        through([BatchNorm2d(6)], images(2, 8, 4, 4))
    with pytest.raises(RuntimeError, match="[Oo]utput size is too small"):
        through([BatchNorm2d(8), MaxPool2d()], images(2, 8, 1, 4))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        through([MaxPool2d(), BatchNorm2d(8)], images(1, 8, 2, 2))
    conv = Conv2dQ(8, 4, 3, bias=False)
    share_weights([conv], *normalize_weights([conv.weight]))
    with pytest.raises(RuntimeError, match="channels"):
        through([conv], images(2, 6, 4, 4))
    with pytest.raises(RuntimeError, match="[Kk]ernel size"):
        through([conv], images(2, 8, 2, 4))


@needs_compiler
def test_pool_and_activation_pass_on_what_is_not_a_number():
    for place in range(4):
        x = images(1, 2, 2, 2)
        x[0, 0, place // 2, place % 2] = float("nan")
        assert through([MaxPool2d()], x)[0, :, 0, 0].isnan().tolist() == [True, False]
        assert fused.chain([fused.Layer(x.shape, activation=3)], x).isnan().sum() == 1


@needs_compiler
def test_gradients_are_not_differentiated_again():
    x = images(2, 3, 4, 4).requires_grad_()
    gradient, = torch.autograd.grad(fused.chain([fused.Layer(x.shape, activation=3)], x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


@needs_compiler
def test_what_the_gradient_needs_must_not_change():
    x = images(2, 3, 4, 4).requires_grad_()
    inside = x + 0
    out = fused.chain([fused.Layer(x.shape, activation=3)], inside).sum()
    inside.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@needs_compiler
@pytest.mark.parametrize("bits", [1, 2, 5, 8, 32])
def test_weights(bits):
    torch.manual_seed(0)
    weights = [torch.randn(shape) for shape in ((4, 3, 3, 3), (300, 5, 1, 1), (2, 40, 5, 5))]
    weights[1][:2] = torch.tensor([4.0, -4.0])[:, None, None, None]  # they share the maximum, and its gradient
    shapes = [weight.shape for weight in weights]

    def function(*leaves):
        v, scales = fused.NormalizeWeights.apply(*leaves)
        parts = fused.QuantizeWeights.apply(v, list(scales), 0 if bits == 32 else 2**bits - 1, shapes)
        assert [part.shape for part in parts] == shapes
        return torch.cat([part.flatten() for part in parts])[None, :, None, None]

    def equation(*leaves):
        return torch.cat([quantize_weight(leaf, bits).flatten() for leaf in leaves])[None, :, None, None]

    compare(function, equation, weights, 2e-6)
    v, scales = fused.NormalizeWeights.apply(weights[0])
    expected, scale = normalize_weight(weights[0].double())
    assert_close(v.double(), expected.permute(0, 2, 3, 1).flatten(), rtol=1e-6, atol=1e-7)
    assert_close(scales[0, 0].double(), scale, rtol=1e-6, atol=0)
    leaf = weights[0].requires_grad_()
    found, = torch.autograd.grad(fused.NormalizeWeights.apply(leaf)[0].sum(), leaf)  # an upstream of one number, expanded
    expected, = torch.autograd.grad(normalize_weight(leaf)[0].sum(), leaf)
    assert_close(found, expected, rtol=1e-5, atol=1e-5)


def near_the_equations(widths, name="svhnq", all_conv=False):
    found = []
    for dtype, plain in ((torch.float32, False), (torch.float64, True)):
        model = reference.fill(network(name, all_conv, widths=widths), seed=0).to(dtype)
        model.to(memory_format=torch.contiguous_format if plain else torch.channels_last)
        images, labels = batch(name, 8)
        results, by_name = gradients(model, images.to(dtype), labels, "recursive", plain, widths)
        found.append((torch.stack([loss.double() for loss, _ in results.values()]),
                      torch.cat([gradient.double().flatten() for gradient in by_name.values()])))
    assert_close(found[0][0], found[1][0], rtol=1e-3, atol=0)
    # Not to the last digits: where a sum crosses a rounding threshold a level changes.
    assert torch.nn.functional.cosine_similarity(found[0][1], found[1][1], dim=0) > 0.999


@needs_compiler
def test_a_network_is_near_the_equations(monkeypatch):
    chains, weights = [], []
    monkeypatch.setattr(fused, "chain", lambda links, x, chain=fused.chain: chains.append(links) or chain(links, x))
    monkeypatch.setattr(fused.QuantizeWeights, "apply",
                        lambda *args, apply=fused.QuantizeWeights.apply: weights.append(args) or apply(*args))
    near_the_equations([8, 32])
    first, inner = ["activation", "convolution"], ["norm", "activation", "convolution"]
    pooled, last = ["norm", "pooled", "activation", "convolution"], ["norm", "activation"]
    body = [first, inner, pooled, inner, inner, last]
    assert [[list(link.parts) for link in links] for links in chains] == [[["pooled"]], body, body]
    assert len(weights) == 2


@needs_compiler
@pytest.mark.parametrize("name, all_conv", [("resnet20q", False), ("resnet20q", True), ("resnet50q", False), ("svhnq", True)])
def test_other_networks_are_near_the_equations(name, all_conv):
    near_the_equations([8, 32], name, all_conv)


@pytest.mark.parametrize("compiler, reason", [
    ("no-such-compiler", "No such file"), ("false", "false failed"),
    pytest.param("cc -no-such-flag", "no-such-flag", marks=needs_compiler)])
def test_without_a_compiler(compiler, reason, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fused.load.cache_clear()
    try:
        library, why_not = fused.load()
        assert library is None and reason in why_not and "\n" not in why_not
        near_the_equations([8, 32])
        assert list(tmp_path.rglob("*.so")) == []
    finally:
        fused.load.cache_clear()


@needs_compiler
def test_what_was_compiled_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    fused.load.cache_clear()
    try:
        assert fused.load()[0] is not None
        kept, = tmp_path.rglob("*.so")
        made = kept.stat().st_mtime_ns
        fused.load.cache_clear()
        assert fused.load()[0] is not None and kept.stat().st_mtime_ns == made
        assert [path.name for path in kept.parent.iterdir()] == [kept.name]
    finally:
        fused.load.cache_clear()
