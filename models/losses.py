"""The any-precision training step (paper, Algorithm 1), and what it computes only once."""
import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.bit_widths import BitWidth, check_bit_widths
from models.quan_ops import DoReFaWeight, QuantizedLayer, WeightQuantizer, set_bit_width
from models.stem import Shared, SharedStem, SharedWeight, without_bit_width


def half_target(target: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean of labels and the highest bit-width's probabilities, (N, classes).

    Source: the loss of MBQuant (Zhong et al., 2023, arXiv 2305.08117), without its branches.
    """
    if target is not labels:  # a bit-width that is taught
        return target
    classes = torch.arange(logits.shape[1], device=logits.device)
    return (logits.softmax(1) + (labels[:, None] == classes)) / 2


# The target of the next lower bit-width: (target, logits, labels) -> labels or probabilities.
NEXT_TARGET = {
    "hard": lambda target, logits, labels: labels,
    "soft": lambda target, logits, labels: logits.softmax(1) if target is labels else target,
    "recursive": lambda target, logits, labels: logits.softmax(1),
    "half": half_target,
}


def forward_loss(model: nn.Module, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy -sum(p log q), averaged over the batch, and logits (N, classes).

    target: labels (N,) int64, or probabilities p (N, classes).
    """
    logits = model(images)
    return torch.nn.functional.cross_entropy(logits, target), logits


def prepare_weights(layers: list[QuantizedLayer]) -> list[tuple[Tensor, ...]]:
    """Return what each layer's quantizer prepares of its weight; the function to compile."""
    return [prepare_weight(layer) for layer in layers]


def prepare_weight(layer: QuantizedLayer) -> tuple[Tensor, ...]:
    """Return what a layer's quantizer prepares of its weight."""
    quantizer = layer.quantizer
    if type(quantizer).prepare is not DoReFaWeight.prepare:
        return quantizer.prepare(layer.weight)
    # Computed again backward rather than kept; another one may draw numbers, or count.
    return checkpoint(quantizer.prepare, layer.weight, use_reentrant=False,
                      preserve_rng_state=False)


def any_precision_backward(
        model: nn.Module, images: Tensor, labels: Tensor,
        bit_widths: Iterable[BitWidth | int | str], loss: str = "recursive",
        loss_scale: float = 1.0, shared: bool = True, share_stem: bool = True,
        forward: Callable = forward_loss, prepare: Callable | None = None,
        autocast: Callable = contextlib.nullcontext) -> dict[BitWidth, tuple[Tensor, Tensor]]:
    """Run forward and backward at each bit-width, highest first; gradients add up in `.grad`.

    The highest bit-width learns from the labels, a lower one from what NEXT_TARGET[loss] returns.

    Args:
        images: (N, 3, H, W).
        labels: (N,) int64.
        bit_widths: those to train, in any order.
        loss: a key of NEXT_TARGET.
        loss_scale: multiplies every loss.
        shared: whether to compute once what no bit-width changes; False is the reference.
        share_stem: whether that includes the stem.
        forward: forward_loss, or that compiled.
        prepare: prepare_weights compiled, or None.
        autocast: its context surrounds the forward passes.

    Returns:
        {bit-width: (loss, logits (N, classes))}, highest first, detached.

    Raises:
        ValueError: an unknown loss, or a bit-width that the model was not built for.
    """
    if loss not in NEXT_TARGET:
        raise ValueError(f"loss {loss} does not exist: choose from {', '.join(NEXT_TARGET)}")
    results = {}
    target = labels
    sharing = contextlib.nullcontext()
    if shared:
        sharing = shared_computation(model, images, share_stem, prepare)
    with sharing:
        for bit_width in check_bit_widths(bit_widths):
            set_bit_width(model, bit_width)
            with autocast():
                value, logits = forward(model, images, target)
            (loss_scale * value).backward()  # now: frees its graph before the next bit-width
            logits = logits.detach()
            results[bit_width] = value.detach(), logits
            target = NEXT_TARGET[loss](target, logits, labels)
    return results


@contextlib.contextmanager
def shared_computation(model: nn.Module, images: Tensor, share_stem: bool = True,
                       prepare: Callable | None = None) -> Iterator[None]:
    """Compute once what no bit-width changes: prepared weights, and the stem of these images.

    Set a bit-width before each use of the model within the context. Gradients accumulate at what is
    shared, and propagate to the parameters on exit. prepare: prepare_weights compiled, called on
    entry; None: prepare each weight at its first use, and again whenever it has changed.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLayer)
              and type(layer.quantizer).prepare is not WeightQuantizer.prepare]
    shared = Shared()
    try:
        if prepare is None:
            for layer in layers:
                layer.shared = SharedWeight(shared, prepare_weight)
        else:
            # A weight that a hook of the layer computes is not there before the layer is called.
            layers = [layer for layer in layers if hasattr(type(layer), "weight")
                      or "weight" in layer._parameters]
            with without_bit_width(layers):
                prepared = prepare(layers)
            owners = [type(layer.quantizer).__name__ for layer, tensors in zip(layers, prepared)
                      for _ in tensors]
            leaves = iter(shared.leaves("weights", tuple(itertools.chain(*prepared)), owners))
            for layer, tensors in zip(layers, prepared, strict=True):
                layer.shared = tuple(itertools.islice(leaves, len(tensors)))
        with SharedStem(model, images) if share_stem else contextlib.nullcontext():
            yield
    finally:
        for layer in layers:
            layer.shared = None
    shared.backward()
