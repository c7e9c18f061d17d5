"""The any-precision training step: who teaches whom (paper, Algorithm 1)."""
from torch.nn.functional import cross_entropy

from models.quan_ops import check_bit_widths, set_bit_width

LOSSES = ("hard", "soft", "recursive")


def any_precision_backward(model, images, labels, bit_widths, loss="recursive", weight=1.0):
    """Run every bit-width from high to low and add its gradient to `.grad`; zeroes nothing, steps nothing.

    The highest bit-width learns from the labels, a lower one with loss
        hard:       from the labels
        soft:       from the highest bit-width's probabilities on this batch, detached
        recursive:  from the next-higher bit-width's probabilities on this batch, detached
    With probabilities p the loss is the batch mean of -sum(p log q). A one-entry list trains a dedicated model.

    images (N, 3, H, W); labels (N,) int64; bit_widths in any order. weight multiplies the gradients: this process's
    share of a batch that several work on.
    Returns {bit_width: (loss, logits)}, highest first, detached: a scalar and (N, classes).
    ValueError for an unknown loss, or a bit-width that the model was not built for.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss {loss} does not exist: choose from {', '.join(LOSSES)}")
    results = {}
    target = labels
    for bits in check_bit_widths(bit_widths):
        set_bit_width(model, bits)
        logits = model(images)
        value = cross_entropy(logits, target)
        (weight * value).backward()  # inside the loop: one bit-width's graph alive at a time
        results[bits] = value.detach(), logits.detach()
        if loss == "recursive" or (loss == "soft" and target is labels):
            target = logits.detach().softmax(dim=1)
    return results
