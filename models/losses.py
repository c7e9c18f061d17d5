"""The any-precision step: who teaches whom (paper, Algorithm 1), and what is computed once."""
import contextlib

import torch
from torch.utils.checkpoint import checkpoint

from models import quan_ops

# Who teaches the next lower bit-width: (target, logits, labels) -> labels or probabilities.
LOSSES = {
    "hard": lambda target, logits, labels: labels,
    "soft": lambda target, logits, labels: logits.softmax(1) if target is labels else target,
    "recursive": lambda target, logits, labels: logits.softmax(1),
}


def forward_loss(network, x, target):
    """Return the batch mean of -sum(p log q), p or classes being the target, and the logits."""
    logits = network(x)
    return torch.nn.functional.cross_entropy(logits, target), logits


def normalize_weights(weights):
    """Return normalize_weight of each; what that computes is computed again backward, not kept."""
    return [checkpoint(quan_ops.normalize_weight, w, use_reentrant=False, preserve_rng_state=False)
            for w in weights]


def any_precision_backward(model, images, labels, bit_widths, loss="recursive", weight=1.0,
                           shared=True, forward=forward_loss, normalize=normalize_weights,
                           autocast=contextlib.nullcontext):
    """Add the gradients of all bit-widths, from high to low, to `.grad`.

    The highest bit-width learns from the labels, a lower one from what LOSSES[loss] hands over.
    images (N, 3, H, W); labels (N,) int64; weight multiplies every loss. shared=False computes
    everything anew, the reference. forward and normalize: those, or compiled; autocast() is entered
    for the forward passes. Returns {bits: (loss, logits (N, classes))}, highest first, detached.
    Raises ValueError for an unknown loss, or a bit-width that the model was not built for.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss {loss} does not exist: choose from {', '.join(LOSSES)}")
    results, target = {}, labels
    with shared_computation(model, images, autocast, shared, normalize) as (network, x):
        for bits in quan_ops.check_bit_widths(bit_widths):
            quan_ops.set_bit_width(model, bits)
            with autocast():
                value, logits = forward(network, x, target)
            (weight * value).backward()  # here, so that one bit-width's graph is alive at a time
            results[bits] = value.detach(), logits.detach()
            target = LOSSES[loss](target, logits.detach(), labels)
    return results


@contextlib.contextmanager
def shared_computation(model, images, autocast=contextlib.nullcontext, shared=True,
                       normalize=normalize_weights):
    """Compute once what no bit-width changes: normalized weights, and a stem in full precision.

    Yields (network, x), where network(x) equals model(images) at the model's bit-width, and
    gradients gather at what is shared, to go back through it once. Not shared: (model, images).
    """
    layers = [layer for layer in model.modules()  # without gradients they keep quantized weights
              if isinstance(layer, quan_ops.Conv2dQ) and shared and torch.is_grad_enabled()]
    normalized = normalize([layer.weight for layer in layers]) if layers else []
    once = [part for v_and_scale in normalized for part in v_and_scale]
    shares_stem = shared and getattr(model, "shares_stem", False)
    if shares_stem:
        with autocast():
            once.append(model.stem(images))
    leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in once]
    network, x = (model.body, leaves[-1]) if shares_stem else (model, images)
    try:
        for layer, v, scale in zip(layers, leaves[::2], leaves[1::2]):
            layer.shared = v, scale
        yield network, x
    finally:
        for layer in layers:
            layer.shared = None
    used = [(tensor, leaf) for tensor, leaf in zip(once, leaves) if leaf.grad is not None]
    torch.autograd.backward([tensor for tensor, _ in used], [leaf.grad for _, leaf in used])
