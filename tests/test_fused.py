"""models/fused.c against the torch operations that it stands for, in float64."""
import pytest
import torch
from torch.nn.functional import max_pool2d
from torch.testing import assert_close

import reference
from models import fused
from models.quan_ops import ActivationQ, BatchNorm2d, MaxPool2d, normalize_weight, quantize_activation, quantize_weight
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
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(99)).to(dtype).contiguous(memory_format=torch.channels_last)
        results.append([out, *torch.autograd.grad(out, leaves, upstream)])
    for index, (found, expected) in enumerate(zip(*results)):
        error = (found - expected).abs()
        wrong = error > tolerance * expected.abs().max()
        if index == 0 and level:
            assert wrong.sum() <= 3 and error.max() < 1.01 * level
        else:
            assert not wrong.any()


@needs_compiler
@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (3, 130, 5, 4), (40, 12, 9, 9)])
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
        return layers[0](x, *following)

    def equation(x, weight, bias):
        z = torch.nn.functional.batch_norm(x, layers[1].running_mean, layers[1].running_var, weight, bias, True)
        return activated(max_pool2d(z, 2) if pooled else z, bits)

    compare(function, equation, [x, torch.randn(channels), torch.randn(channels)], 1e-5,
            1 / ACTIVATIONS[bits] if bits in (1, 3, 8) else 0)
    assert_close(layers[0].running_mean, layers[1].running_mean, check_dtype=False)
    assert_close(layers[0].running_var, layers[1].running_var, check_dtype=False)
    assert layers[0].num_batches_tracked == 1


@needs_compiler
@pytest.mark.parametrize("pooled", [False, True])
def test_results_do_not_depend_on_the_number_of_threads(pooled):
    torch.manual_seed(0)
    x, weight, bias = images(30, 12, 18, 18), torch.rand(12), torch.rand(12)
    results = []
    for threads in (2, 3, 1):  # ends as the other tests have it
        torch.set_num_threads(threads)
        statistics = torch.zeros(12), torch.ones(12)
        leaves = [value.clone().requires_grad_() for value in (x, weight, bias)]
        out = fused.Normalize.apply(*leaves, 1e-5, 3, pooled, 0.1, *statistics)
        results.append([out, *statistics, *torch.autograd.grad(out.square().sum(), leaves)])
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
    found, expected = activation(x), quantize_activation(x, bits)
    upstream = torch.randn_like(x)
    assert torch.equal(found, expected) and type(found.grad_fn).__name__ == "ActivationBackward"
    assert_close(*(torch.autograd.grad(out, x, upstream)[0] for out in (found, expected)))


@needs_compiler
@pytest.mark.parametrize("bits", [1, 2, 32])
def test_gradients_where_normalized_values_lie_on_the_ends(bits):
    """x of -1 and 1 has mean 0 and variance 1: times 1/2 plus 1/2 it is exactly 0 and 1."""
    torch.manual_seed(0)
    x = torch.cat([torch.ones(3, 2, 4, 5), -torch.ones(3, 2, 4, 5)])[torch.randperm(6)]

    def function(x, weight, bias):
        return fused.Normalize.apply(x.contiguous(memory_format=torch.channels_last), weight, bias, 0.0, ACTIVATIONS.get(
            bits, 2**bits - 1), False, 0.1, torch.zeros(2), torch.ones(2))

    def equation(x, weight, bias):
        centred = x - x.mean((0, 2, 3), keepdim=True)
        deviation = centred.square().mean((0, 2, 3), keepdim=True).sqrt()
        return activated(centred / deviation * weight[:, None, None] + bias[:, None, None], bits)

    compare(function, equation, [x, torch.full((2,), 0.5), torch.full((2,), 0.5)], 1e-6)


@needs_compiler
@pytest.mark.parametrize("following", [
    (ActivationQ(), MaxPool2d()), (MaxPool2d(), MaxPool2d()), (ActivationQ(rounding=False),), (torch.nn.ReLU(),)])
def test_layers_that_follow_in_another_order(following):
    torch.manual_seed(0)
    for layer in following:
        layer.bits = 2
    x, layer, expected = images(3, 4, 9, 8), BatchNorm2d(4), torch.nn.BatchNorm2d(4)
    out = expected(x.contiguous())
    for after in following:
        out = after(out)
    assert_close(layer(x, *following), out, rtol=1e-5, atol=1e-6)


@needs_compiler
def test_what_does_not_fit_is_torchs_error():
    with pytest.raises(RuntimeError, match="running_mean"):
        BatchNorm2d(6)(images(2, 8, 4, 4))
    with pytest.raises(RuntimeError, match="[Oo]utput size is too small"):
        BatchNorm2d(8)(images(2, 8, 1, 4), MaxPool2d())


@needs_compiler
def test_pool_and_activation_pass_on_what_is_not_a_number():
    for place in range(4):
        x = images(1, 2, 2, 2)
        x[0, 0, place // 2, place % 2] = float("nan")
        assert fused.Pool.apply(x)[0, :, 0, 0].isnan().tolist() == [True, False]
        assert fused.Activation.apply(x, 3).isnan().sum() == 1


@needs_compiler
def test_gradients_are_not_differentiated_again():
    x = images(2, 3, 4, 4).requires_grad_()
    gradient, = torch.autograd.grad(fused.Activation.apply(x, 3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


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


def near_the_equations(widths):
    found = []
    for dtype, plain in ((torch.float32, False), (torch.float64, True)):
        model = reference.fill(network("svhnq", widths=widths), seed=0).to(dtype)
        model.to(memory_format=torch.contiguous_format if plain else torch.channels_last)
        images, labels = batch("svhnq", 8)
        results, by_name = gradients(model, images.to(dtype), labels, "recursive", plain, widths)
        found.append((torch.stack([loss.double() for loss, _ in results.values()]),
                      torch.cat([gradient.double().flatten() for gradient in by_name.values()])))
    assert_close(found[0][0], found[1][0], rtol=1e-3, atol=0)
    # Not to the last digits: where a sum crosses a rounding threshold a level changes.
    assert torch.nn.functional.cosine_similarity(found[0][1], found[1][1], dim=0) > 0.999


@needs_compiler
def test_a_network_is_near_the_equations(monkeypatch):
    calls = []
    for name in ("Normalize", "Pool", "Activation", "NormalizeWeights", "QuantizeWeights"):
        function = getattr(fused, name)
        monkeypatch.setattr(function, "apply", lambda *args, name=name, apply=function.apply: calls.append(name) or apply(*args))
    near_the_equations([8, 32])
    assert {name: calls.count(name) for name in calls} == {
        "NormalizeWeights": 1, "QuantizeWeights": 2, "Pool": 1, "Activation": 2, "Normalize": 10}


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
