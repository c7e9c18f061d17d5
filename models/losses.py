"""The any-precision step: who teaches whom (paper, Algorithm 1), and what is computed once."""
import contextlib

import torch
from torch.nn.functional import cross_entropy

from models import quan_ops

# Who teaches the next lower bit-width: (target, logits, labels) -> labels or probabilities.
LOSSES = {
    "hard": lambda target, logits, labels: labels,
    "soft": lambda target, logits, labels: logits.softmax(1) if target is labels else target,
    "recursive": lambda target, logits, labels: logits.softmax(1),
}


def any_precision_backward(model, images, labels, bit_widths, loss="recursive", weight=1.0,
                           shared=True, forward=None, autocast=contextlib.nullcontext):
    """Add the gradients of all bit-widths, from high to low, to `.grad`.

    The highest bit-width learns from the labels, a lower one from what LOSSES[loss] hands over.
    images (N, 3, H, W); labels (N,) int64; weight multiplies every loss. shared=False computes
    everything anew, the reference. forward stands in for forward_loss, such as a compiled one;
    autocast() is entered for the forward passes. Returns {bits: (loss, logits)}, highest first,
    detached: a scalar and (N, classes). Raises ValueError for an unknown loss, or a bit-width that
    the model was not built for.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss {loss} does not exist: choose from {', '.join(LOSSES)}")
    results, target = {}, labels
    with shared_computation(model, images, autocast, shared) as (network, x):
        for bits in quan_ops.check_bit_widths(bit_widths):
            quan_ops.set_bit_width(model, bits)
            with autocast():
                value, logits = (forward or forward_loss)(network, x, target)
            (weight * value).backward()  # here, so that one bit-width's graph is alive at a time
            results[bits] = value.detach(), logits.detach()
            target = LOSSES[loss](target, logits.detach(), labels)
    return results


def forward_loss(network, x, target):
    """Return the batch mean of -sum(p log q), p or classes being the target, and the logits."""
    logits = network(x)
    return cross_entropy(logits, target), logits


@contextlib.contextmanager
def shared_computation(model, images, autocast=contextlib.nullcontext, shared=True):
    """Compute once what no bit-width changes: normalized weights, and a stem in full precision.

    Yields (network, x), where network(x) equals model(images) at the model's bit-width, and
    gradients gather at what is shared, to go back through it once. Not shared: (model, images).
    """
    if not shared:
        yield model, images
        return
    network, x, stem, normalized = model, images, None, []
    layers = [layer for layer in model.modules() if isinstance(layer, quan_ops.Conv2dQ)]
    try:
        for layer in layers * torch.is_grad_enabled():  # else they keep quantized weights
            with torch.no_grad():  # normalized anew for the way back, so that less is kept
                v, scale = quan_ops.normalize_weight(layer.weight)
            layer.shared = v.requires_grad_(layer.weight.requires_grad), scale
            normalized.append((layer.weight, v))
        if getattr(model, "shares_stem", False):
            with autocast():
                network, stem = model.body, model.stem(images)
            stem = stem.to(torch.promote_types(stem.dtype, torch.float32))
            x = stem.detach().requires_grad_(stem.requires_grad)
        yield network, x
    finally:
        for layer in layers:
            layer.shared = None
    if stem is not None and x.grad is not None:
        stem.backward(x.grad)
    while normalized:
        weight, v = normalized.pop()
        if v.grad is not None:
            quan_ops.normalize_weight(weight)[0].backward(v.grad)
