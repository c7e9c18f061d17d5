"""The any-precision training step: who teaches whom (paper, Algorithm 1), and what the bit-widths share."""
import contextlib

import torch
from torch.nn.functional import cross_entropy

from models.quan_ops import Conv2dQ, check_bit_widths, normalize_weights, set_bit_width, share_weights, switchable_layers

LOSSES = ("hard", "soft", "recursive")


def forward_loss(network, x, target):
    """(loss, logits): the batch mean of -sum(p log q), p the classes (N,) or probabilities (N, classes) in target."""
    logits = network(x)
    return cross_entropy(logits, target), logits


@contextlib.contextmanager
def sharing(model, images, normalize=normalize_weights, autocast=contextlib.nullcontext):
    """Compute once what no bit-width changes: tanh, maximum and mean of each weight and, where it is not quantized, the
    stem.

    Yields a function that returns (network, x) with network(x) equal to model(images) at the model's bit-width. Their
    gradients gather at what is shared and go back through it once, at the end: the same sum, for the cost of one.
    normalize stands for normalize_weights, such as a compiled one; autocast() is entered for the stem.
    """
    gathering = []  # (tensor, the leaf that stands for it)

    def once(tensor):
        leaf = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)).requires_grad_(tensor.requires_grad)
        gathering.append((tensor, leaf))
        return leaf

    layers = [layer for layer in model.modules() if isinstance(layer, Conv2dQ)]
    if layers:
        v, scales = normalize([layer.weight for layer in layers])
        v = once(v)
    network, x = model, images
    if getattr(model, "stem_is_shared", False):
        with autocast():
            network, x = model.body, once(model.stem(images))

    def shared():
        if layers:
            share_weights(layers, v, scales)
        return network, x

    try:
        yield shared
    finally:
        for layer in layers:
            layer.shared = None
    used = [(tensor, leaf.grad.to(tensor.dtype)) for tensor, leaf in gathering if leaf.grad is not None]
    if used:
        torch.autograd.backward(*zip(*used))


def any_precision_backward(model, images, labels, bit_widths, loss="recursive", scale=lambda loss: loss, share=sharing,
                           forward=forward_loss):
    """Run every bit-width from high to low and add its gradient to `.grad`; zeroes nothing, steps nothing.

    The highest bit-width learns from the labels, a lower one with loss
        hard:       from the labels
        soft:       from the highest bit-width's probabilities on this batch, detached
        recursive:  from the next-higher bit-width's probabilities on this batch, detached
    With probabilities p the loss is the batch mean of -sum(p log q). A one-entry list trains a dedicated model.

    images (N, 3, H, W); labels (N,) int64; bit_widths in any order. scale(loss) is what goes backward, such as this
    process's share of a batch that several work on. share stands for sharing, such as sharing_nothing to compute
    everything anew; forward stands for forward_loss, such as a compiled one.
    Returns {bit_width: (loss, logits)}, highest first, detached: a scalar and (N, classes).
    ValueError for an unknown loss, or a bit-width that the model was not built for.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss {loss} does not exist: choose from {', '.join(LOSSES)}")
    results = {}
    layers = switchable_layers(model)
    target = labels
    with share(model, images) as shared:
        for bits in check_bit_widths(bit_widths):
            set_bit_width(layers, bits)
            value, logits = forward(*shared(), target)
            scale(value).backward()  # inside the loop: one bit-width's graph alive at a time
            results[bits] = value.detach(), logits.detach()
            if loss == "recursive" or (loss == "soft" and target is labels):
                target = logits.detach().softmax(dim=1)
    return results


@contextlib.contextmanager
def sharing_nothing(model, images):
    """The plain path's stand-in for sharing."""
    yield lambda: (model, images)
