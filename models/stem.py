"""The stem: what lies before the first layer that switches, found as the network runs."""
import functools

import torch
from torch import Tensor, nn

# Modules whose output depends on their input and weights alone, in training too. Exact types: what
# a subclass does is not known.
PURE = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.ReLU, nn.ReLU6, nn.Identity,
        nn.ZeroPad2d)


class SharedStem:
    """Within it, modules of PURE that images reach through such modules alone run once.

    At the first bit-width they run as ever; at the next ones they return what they returned then.
    Gradients gather there, and go on to the weights of the stem when it is left without an error.
    Hooks fire at every bit-width. Any other module or function between ends the stem.
    """

    def __init__(self, model: nn.Module, images: Tensor):
        self.modules = [module for module in model.modules()
                        if type(module) in PURE and "forward" not in vars(module)
                        and not getattr(module, "inplace", False)]
        self.shared = {id(images): images}  # by identity: the same tensor at every bit-width
        self.found = {}
        self.outputs = []

    def __enter__(self):
        for module in self.modules:
            module.forward = functools.partial(self.run, module)
        return self

    def run(self, module: nn.Module, x: Tensor) -> Tensor:
        if id(x) not in self.shared:
            return type(module).forward(module, x)
        leaf, version = self.found.get((module, id(x)), (None, None))
        if leaf is None or leaf._version != version:  # new, or written to
            output = type(module).forward(module, x)
            leaf = output.detach().requires_grad_(output.requires_grad)
            self.outputs.append((output, leaf))
            self.found[module, id(x)] = leaf, leaf._version
            self.shared[id(leaf)] = leaf
        return leaf

    def __exit__(self, error, *details):
        for module in self.modules:
            del module.forward
        if error is None:
            backward(self.outputs)


def backward(outputs: list[tuple[Tensor, Tensor]]) -> None:
    """Continue from the gradients of leaves to the tensors they were detached from, last first."""
    for tensor, leaf in reversed(outputs):
        if leaf.grad is not None:
            torch.autograd.backward(tensor, leaf.grad)
