"""The published implementation's numbers, in float64 to 1e-6: quantizers, networks, steps."""
import pytest
import torch
from quantized import quantize_activation, quantize_weight
from torch.testing import assert_close

import reference
from models import BITS, MODELS, set_bit_width
from models.losses import any_precision_backward
from models.sharing import shared_computation

TOLERANCE = {"rtol": 1e-6, "atol": 1e-9}
RECORDS = sorted(path.stem for path in reference.FOLDER.glob("*q_*.json"))
# Three steps of resnet20q are one record's. Another loss is another loss and other gradients of the
# first step, and the same optimizer's from then on.
FIRST_STEP_ALONE = [f"resnet20q_1-2-4-8-32_{loss}_adam" for loss in ("hard", "soft")]


def tensor(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize("bits", BITS)
def test_quantizers(bits):
    record = reference.load("quantizers")
    expected = record[str(bits)]

    w = tensor(record["weight"]).requires_grad_()
    quantized = quantize_weight(w, bits)
    quantized.backward(tensor(record["upstream_grad"]))
    assert_close(quantized.detach(), tensor(expected["weight_q"]), **TOLERANCE)
    assert_close(w.grad, tensor(expected["weight_grad"]), **TOLERANCE)

    x = tensor(record["activation"]).requires_grad_()
    quantized = quantize_activation(x, bits)
    quantized.sum().backward()
    assert_close(quantized.detach(), tensor(expected["activation_q"]), **TOLERANCE)
    assert_close(x.grad, tensor(expected["activation_grad"]), **TOLERANCE)


@pytest.mark.parametrize("name, record", reference.load("state_dict_keys").items())
def test_state_dict(name, record):
    model_name, bit_widths = name.split()
    model = MODELS[model_name]([int(bits) for bits in bit_widths.split(",")])
    shapes = {key: list(entry.shape) for key, entry in model.state_dict().items()}
    assert shapes == record["entries"]
    assert sum(p.numel() for p in model.parameters()) == record["num_parameters"]


@torch.no_grad()
def logits_per_bit_width(model, images, bit_widths):
    model.eval()
    logits = {}
    with shared_computation(model, images):
        for bits in bit_widths:
            set_bit_width(model, bits)
            logits[str(bits)] = model(images)
    model.train()
    return logits


@pytest.mark.parametrize("name", RECORDS)
def test_training(name):
    """With what the bit-widths share computed once, as train.py does."""
    whole = name not in FIRST_STEP_ALONE
    record = reference.load(name)
    bit_widths, seed = record["bits"], record["seed"]
    model = MODELS[record["model"]](bit_widths, num_classes=record["classes"]).double()
    reference.fill(model, seed)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0
    images = reference.values("input", (record["batch"], 3, record["size"], record["size"]), seed)
    labels = torch.tensor(record["labels"])
    optimizer = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[record["optimizer"]](
        model.parameters(), record["lr"], weight_decay=record["weight_decay"],
        **({"momentum": 0.9} if record["optimizer"] == "sgd" else {}))

    def assert_logits(expected):
        assert_close(logits_per_bit_width(model, images, bit_widths),
                     {bits: tensor(numbers) for bits, numbers in expected.items()}, **TOLERANCE)

    if whole:
        assert_logits(record["logits_before"])
    for step in range(record["steps"] if whole else 1):
        optimizer.zero_grad()
        results = any_precision_backward(model, images, labels, bit_widths, record["loss"])
        assert {str(bits): loss.item() for bits, (loss, _) in results.items()} == pytest.approx(
            record["losses"][step], rel=1e-6)
        if step == 0:
            parameters = dict(model.named_parameters())
            norms = {key: parameters[key].grad.norm().item() for key in record["grad_l2_step0"]}
            assert norms == pytest.approx(record["grad_l2_step0"], rel=1e-6, abs=1e-9)
        optimizer.step()

    if whole and "state_after" in record:
        assert_logits(record["logits_after"])
        state = model.state_dict()
        for key, (total, norm) in record["state_after"].items():
            assert state[key].norm().item() == pytest.approx(norm, rel=1e-6), key
            assert state[key].sum().item() == pytest.approx(total, rel=1e-6, abs=1e-6 * norm), key
        counters = {key for key in state if key.endswith("num_batches_tracked")}
        assert record["state_after"].keys() == state.keys() - counters
