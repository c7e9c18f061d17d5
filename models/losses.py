"""The any-precision step: who teaches whom (paper, Algorithm 1), and what is computed once."""
import contextlib

import torch
from torch.nn.functional import cross_entropy

from models.quan_ops import Conv2dQ, check_bit_widths, normalize_weight, set_bit_width

LOSSES = ("hard", "soft", "recursive")


def any_precision_backward(model, images, labels, bit_widths, loss="recursive", weight=1.0,
                           shared=True, forward=None, autocast=contextlib.nullcontext):
    """Add the gradients of all bit-widths, from high to low, to `.grad`.

    The highest bit-width learns from the labels, a lower one with loss
        hard:       from the labels
        soft:       from the probabilities of the highest bit-width on this batch, detached
        recursive:  from those of the next-higher bit-width, detached
    images (N, 3, H, W); labels (N,) int64; weight multiplies every loss. shared=False computes
    everything anew at every bit-width, the reference. forward stands in for forward_loss, such as a
    compiled one; autocast() is entered for the forward passes.

    Returns {bits: (loss, logits)}, highest first, detached: a scalar and (N, classes).
    Raises ValueError for an unknown loss, or a bit-width that the model was not built for.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss {loss} does not exist: choose from {', '.join(LOSSES)}")
    results, target = {}, labels
    sharing = shared_computation if shared else nothing_shared
    with sharing(model, images, autocast) as (network, x):
        for bits in check_bit_widths(bit_widths):
            set_bit_width(model, bits)
            with autocast():
                value, logits = (forward or forward_loss)(network, x, target)
            (weight * value).backward()  # here, so that one bit-width's graph is alive at a time
            results[bits] = value.detach(), logits.detach()
            if loss == "recursive" or (loss == "soft" and target is labels):
                target = logits.detach().softmax(dim=1)
    return results


def forward_loss(network, x, target):
    """Return the batch mean of -sum(p log q) and the logits; target: classes (N,), or p (N, classes)."""
    logits = network(x)
    return cross_entropy(logits, target), logits


@contextlib.contextmanager
def nothing_shared(model, images, autocast):
    yield model, images


@contextlib.contextmanager
def shared_computation(model, images, autocast=contextlib.nullcontext):
    """Compute once what no bit-width changes: normalized weights, and a stem in full precision.

    Yields (network, x), where network(x) equals model(images) at the model's bit-width. Gradients of
    all bit-widths gather at what is shared and go back through it once, at the end: the same sum.
    """
    gathered = []  # (tensor, the leaf that stands for it)

    def share(tensor):
        gathered.append((tensor, tensor.detach().requires_grad_(tensor.requires_grad)))
        return gathered[-1][1]

    layers = [layer for layer in model.modules() if isinstance(layer, Conv2dQ)]
    try:
        for layer in layers:
            v, scale = normalize_weight(layer.weight)
            layer.shared = share(v), scale
        if getattr(model, "shares_stem", False):
            with autocast():
                x = model.stem(images)
            yield model.body, share(x.to(torch.promote_types(x.dtype, torch.float32)))
        else:
            yield model, images
    finally:
        for layer in layers:
            layer.shared = None
    reached = [(tensor, leaf.grad) for tensor, leaf in gathered if leaf.grad is not None]
    if reached:
        torch.autograd.backward(*zip(*reached))
