"""What bit-widths share: computed at its first use in a step, reused while its inputs are equal."""
from __future__ import annotations

import contextlib
import itertools
import types
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.checkpoint import checkpoint

from models.quan_ops import DoReFaWeight, QuantizedLayer, WeightQuantizer

# Modules whose output depends only on their input and weights, also in training. Exact types: what
# a subclass computes is not known.
PURE = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.ReLU, nn.ReLU6, nn.Identity,
        nn.ZeroPad2d)


@contextlib.contextmanager
def shared_computation(model: nn.Module, images: Tensor, share_stem: bool = True,
                       prepare: Callable | None = None) -> Iterator[None]:
    """Compute once what no bit-width changes: prepared weights, and the stem of these images.

    Set a bit-width before each use of the model within the context. Gradients accumulate at what is
    shared, and propagate to the parameters on exit, so they are not whole before: clip them, and
    take the optimizer's step, after it. prepare: prepare_weights compiled, called on entry; None:
    prepare each weight at its first use, and again whenever it has changed.

    Raises ValueError where an optimizer of the model steps within the context, for a model whose
    wrapper reduces gradients when they arrive, and where a loss of the context runs backward after
    it.
    """
    for module in model.modules():
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise ValueError(f"{type(module).__name__} does not see the gradients of what bit-"
                             "widths share: give sharing=no_sharing, or its .module, whose "
                             "gradients you average afterwards")

    def refuse_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
        parameters = set(model.parameters())
        if any(parameter in parameters for group in optimizer.param_groups
               for parameter in group["params"]):
            raise ValueError("an optimizer steps within shared_computation, where gradients are "
                             "not whole: take its step after that")

    layers = [layer for layer in model.modules() if isinstance(layer, QuantizedLayer)
              and type(layer.quantizer).prepare is not WeightQuantizer.prepare]
    shared = Shared()
    steps = register_optimizer_step_pre_hook(refuse_step)
    try:
        if prepare is None:
            for layer in layers:
                layer.shared = SharedWeight(shared)
        else:
            # A weight that a hook of the layer computes is not there before the layer is called.
            layers = [layer for layer in layers if hasattr(type(layer), "weight")
                      or "weight" in layer._parameters]
            with forbidding_bit_width(layers):
                prepared = prepare(layers)
            owners = [type(layer.quantizer).__name__ for layer, tensors in zip(layers, prepared)
                      for _ in tensors]
            leaves = iter(shared.leaves("weights", tuple(itertools.chain(*prepared)), owners))
            for layer, tensors in zip(layers, prepared, strict=True):
                layer.shared = tuple(itertools.islice(leaves, len(tensors)))
        with SharedStem(model, images) if share_stem else contextlib.nullcontext():
            yield
    finally:
        steps.remove()
        for layer in layers:
            layer.shared = None
    shared.backward()


def no_sharing(model: nn.Module, images: Tensor) -> contextlib.AbstractContextManager:
    """Compute everything anew at each bit-width: the reference for shared_computation."""
    return contextlib.nullcontext()


def prepare_weights(layers: list[QuantizedLayer]) -> list[tuple[Tensor, ...]]:
    """Return what each layer's quantizer prepares of its weight; the function to compile."""
    return [prepare_weight(layer) for layer in layers]


def prepare_weight(layer: QuantizedLayer) -> tuple[Tensor, ...]:
    """Return what a layer's quantizer prepares of its weight."""
    quantizer = layer.quantizer
    if type(quantizer).prepare is not DoReFaWeight.prepare:
        return quantizer.prepare(layer.weight)
    # Computed again backward rather than kept: it must draw no numbers, which a subclass's may.
    return checkpoint(quantizer.prepare, layer.weight, use_reentrant=False,
                      preserve_rng_state=False)


class Shared:
    """Tensors that are computed once, by label, and the leaves that accumulate their gradients."""

    def __init__(self):
        self.found = {}
        self.outputs = []
        self.versions = []

    def leaves(self, label: Hashable, outputs: tuple[Tensor, ...],
               owners: Sequence[str]) -> tuple[Tensor, ...]:
        """Store outputs under a label; return detached leaves to use in their place.

        owners: of each, what it belongs to, for a message.
        """
        leaves = tuple(t.detach().requires_grad_(t.requires_grad) for t in outputs)
        self.outputs.append((outputs, leaves))
        self.versions += [(leaf, leaf._version, owner)
                          for leaf, owner in zip(leaves, owners, strict=True)
                          if not leaf.is_inference()]
        self.found[label] = leaves
        return leaves

    def backward(self) -> None:
        """Propagate the gradients of the leaves to the outputs they replace, the last first.

        Raises ValueError where a leaf was changed in place, of which later bit-widths saw the end.
        """
        for leaf, version, owner in self.versions:
            if leaf._version != version:
                raise ValueError(f"{owner} changes in place what all bit-widths share, such as "
                                 "what `prepare` returned: compute another tensor")
        for outputs, leaves in reversed(self.outputs):
            used = [(tensor, leaf.grad) for tensor, leaf in zip(outputs, leaves, strict=True)
                    if leaf.grad is not None]
            torch.autograd.backward([tensor for tensor, _ in used], [grad for _, grad in used])
        for leaf, *_ in self.versions:
            if leaf.requires_grad:  # of a graph that is still kept
                leaf.register_hook(refuse_gradient)


def refuse_gradient(grad: Tensor) -> None:
    raise ValueError("a loss runs backward after shared_computation, where gradients no longer "
                     "reach the weights: call backward() within it")


def state_of(tensors: Iterable[Tensor]) -> Hashable:
    """Return a key that changes with the content of the tensors, and with torch's modes."""
    return (tuple((id(t), t._version) for t in tensors), torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda"))


@contextlib.contextmanager
def forbidding_bit_width(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Make quantizers raise where they read their bit-width, as what they prepare is for all."""
    for layer in layers:
        layer.quantizer.preparing = True
    try:
        yield
    finally:
        for layer in layers:
            vars(layer.quantizer).pop("preparing", None)


class SharedStem:
    """A context in which the stem runs once: modules of PURE that images reach through PURE alone.

    Those precede the first layer that switches. At the first bit-width they run; at the others they
    return copies of their first output. Gradients accumulate there, and propagate to the weights of
    the stem on exit without an error. Hooks fire at every bit-width. Any other module, function or
    in-place change ends the stem.
    """

    def __init__(self, model: nn.Module, images: Tensor):
        self.images = images
        self.shared = Shared()
        self.modules = [module for module in model.modules()
                        if type(module) in PURE and "forward" not in vars(module)]

    def __enter__(self) -> SharedStem:
        for module in self.modules:
            module.forward = StemForward(self, module)
        return self

    def run(self, module: nn.Module, *args: object, **kwargs: object) -> Tensor:
        """Run a module of PURE, or return a copy of its output where that is shared."""
        label = self.label(module, args, kwargs)
        if label is None:
            return type(module).forward(module, *args, **kwargs)
        if label not in self.shared.found:
            output = type(module).forward(module, *args)
            if not isinstance(output, Tensor) or output is args[0]:
                return output
            self.shared.leaves(label, (output,), [type(module).__name__])
        leaf, = self.shared.found[label]
        output = leaf.clone()  # later layers may change it in place
        output.stem = label, output._version
        return output

    def label(self, module: nn.Module, args: tuple, kwargs: dict) -> Hashable | None:
        """Return the label of a module's output, or None where it is not shared."""
        x = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(x, Tensor) or getattr(module, "inplace", False):
            return None
        if x.is_inference() or torch.is_inference_mode_enabled():  # which keeps no versions
            return None
        source, version = getattr(x, "stem", (None, None))
        if x is self.images and not x.requires_grad:
            source = "images"
            version = x._version
        if source is None or version != x._version:
            return None
        return module, source, version, state_of(module.parameters())

    def __exit__(self, error, *details):
        for module in self.modules:
            del module.forward
        if error is None:
            self.shared.backward()


class StemForward:
    """The forward of a module within SharedStem; copies of the module get their own forward."""

    def __init__(self, stem: SharedStem, module: nn.Module):
        self.stem = stem
        self.module = module

    def __call__(self, *args, **kwargs):
        return self.stem.run(self.module, *args, **kwargs)

    def __deepcopy__(self, memo):
        return types.MethodType(type(self.module).forward, memo[id(self.module)])


class SharedWeight:
    """The result of a quantizer's `prepare`, computed once for each state of the weight."""

    def __init__(self, shared: Shared):
        self.shared = shared
        self.weights = []

    def prepared(self, layer: nn.Module) -> tuple[Tensor, ...]:
        """Return what the layer's quantizer prepares of its weight."""
        weight = layer.weight
        label = layer, state_of((weight, *layer.quantizer.parameters(), *layer.quantizer.buffers()))
        if label not in self.shared.found:
            with forbidding_bit_width([layer]):
                prepared = prepare_weight(layer)
            self.shared.leaves(label, prepared, [type(layer.quantizer).__name__] * len(prepared))
            self.weights.append(weight)  # one that a parametrization computes must keep its id
        return self.shared.found[label]

    def __deepcopy__(self, memo):
        return None  # a copy of the layer shares nothing
