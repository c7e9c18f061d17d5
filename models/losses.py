"""The any-precision training step (paper, Algorithm 1): who teaches whom."""
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from models.attributes import keeping_attributes
from models.bit_widths import BitWidth, highest_first
from models.quan_ops import set_bit_width
from models.sharing import shared_computation
from utils import keeping_random_states


def half_target(target: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of labels and the highest bit-width's probabilities, (N, classes, ...).

    Source: the loss of MBQuant (Zhong et al., 2023, arXiv 2305.08117), without its branches.
    """
    if target is not labels:  # a bit-width that is taught
        return target
    if not labels.is_floating_point():  # else they are probabilities already
        labels = torch.nn.functional.one_hot(labels, logits.shape[1]).movedim(-1, 1)
    return (logits.softmax(1) + labels) / 2


# The target of the next lower bit-width: (target, logits, labels) -> labels or probabilities.
NEXT_TARGET = {
    "hard": lambda target, logits, labels: labels,
    "soft": lambda target, logits, labels: logits.softmax(1) if target is labels else target,
    "recursive": lambda target, logits, labels: logits.softmax(1),
    "half": half_target,
}


def forward_loss(model: nn.Module, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy -sum(p log q), averaged over the batch, and logits (N, classes).

    It is also called in evaluation: guard what is for training alone by `if model.training`.

    target: labels (N,) int64, or probabilities p (N, classes).
    """
    logits = model(images)
    return torch.nn.functional.cross_entropy(logits, target), logits


@torch.no_grad()
def check_forward_loss(model: nn.Module, images: Tensor) -> None:
    """Raise ForwardLossError where forward_loss evaluates to other logits than the network.

    What calibrates, searches, initializes quantizers and exports calls the network itself, which
    would then get other images, or give other logits. images: (N, 3, H, W), a few. Of a network
    that returns anything but logits nothing is known.
    """
    devices = [images.device] if images.is_cuda else []
    with keeping_attributes(model):
        model.eval()
        with keeping_random_states(devices):
            logits = model(images.clone())
        if not torch.is_tensor(logits):
            return
        with keeping_random_states(devices):
            _, found = forward_loss(model, images.clone(), logits.argmax(1))
    if found.shape != logits.shape or not (
            (found - logits).norm() <= 1e-3 * logits.norm() or not logits.isfinite().all()):
        raise ForwardLossError("forward_loss of models/losses.py evaluates to other logits than "
                               "the network does, and calibration, search and export call the "
                               "network alone: move what it adds into the network's forward")


class ForwardLossError(ValueError):
    """A forward_loss that does something which the network does not."""


def any_precision_backward(
        model: nn.Module, images: Tensor, labels: Tensor,
        bit_widths: Iterable[BitWidth | int | str], loss: str = "recursive",
        loss_scale: float = 1.0, forward: Callable = forward_loss,
        sharing: Callable = shared_computation) -> dict[BitWidth, tuple[Tensor, Tensor]]:
    """Run forward and backward at each bit-width, highest first; gradients add up in `.grad`.

    The highest bit-width learns from the labels, a lower one from what NEXT_TARGET[loss] returns.

    Args:
        images: (N, 3, H, W).
        labels: (N,) int64.
        bit_widths: those to train, in any order.
        loss: a key of NEXT_TARGET.
        loss_scale: multiplies every loss.
        forward: called as forward_loss.
        sharing: a context of (model, images), such as no_sharing, the reference.

    Returns:
        {bit-width: (loss, logits (N, classes))}, highest first, detached.

    Raises:
        ValueError: an unknown loss, or a bit-width that the model was not built for.
    """
    if loss not in NEXT_TARGET:
        raise ValueError(f"loss {loss} does not exist: choose from {', '.join(NEXT_TARGET)}")
    results = {}
    target = labels
    with sharing(model, images):
        for bit_width in highest_first(bit_widths):
            set_bit_width(model, bit_width)
            value, logits = forward(model, images, target)
            (loss_scale * value).backward()  # now: frees its graph before the next bit-width
            logits = logits.detach()
            results[bit_width] = value.detach(), logits
            target = NEXT_TARGET[loss](target, logits, labels)
    return results
