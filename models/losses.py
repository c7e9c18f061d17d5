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
    gathered = []  # (tensor, the leaf that stands for it)

    def share(tensor):
        gathered.append((tensor, tensor.detach().requires_grad_(tensor.requires_grad)))
        return gathered[-1][1]

    network, x = model, images
    layers = [layer for layer in model.modules() if isinstance(layer, quan_ops.Conv2dQ)]
    try:
        for layer in layers:
            v, scale = quan_ops.normalize_weight(layer.weight)
            layer.shared = share(v), scale
        if getattr(model, "shares_stem", False):
            with autocast():
                network, x = model.body, model.stem(images)
            x = share(x.to(torch.promote_types(x.dtype, torch.float32)))
        yield network, x
    finally:
        for layer in layers:
            layer.shared = None
    reached = [(tensor, leaf.grad) for tensor, leaf in gathered if leaf.grad is not None]
    if reached:
        torch.autograd.backward(*zip(*reached))
