"""Quantized weights in evaluation: computed once a bit-width, as long as the weight stays."""
import weakref

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

KEPT = weakref.WeakKeyDictionary()  # layer: (what its values are of, ..., {key: value}); not copied
register_optimizer_step_post_hook(lambda *step: KEPT.clear())  # a fused one raises no version


class CachingConv2d(nn.Conv2d):
    """A convolution that keeps what it computes of its weight, in evaluation without gradients."""

    def kept(self, compute, arguments, *functions):
        """Return compute(*arguments), or what it gave in evaluation for the same weight.

        functions: what compute calls; where another stands in its place nothing is known.

        The weight is known by its parameter, memory, layout and version, which operations on it
        raise; writing to `weight.data` does not, and is seen after train(), or load_state_dict().
        """
        weight = self.weight
        if not can_keep(self, weight):
            return compute(*arguments)
        source = weight.data_ptr(), weight.stride(), weight._version
        kept = KEPT.get(self)
        if not (kept and kept[0] is weight and kept[1] == source):
            # The alias keeps its memory from being used again, by other numbers at this address.
            kept = KEPT[self] = weight, source, weight.detach(), {}
        values, key = kept[-1], (arguments, functions)
        if key not in values:
            values[key] = compute(*arguments)
        return values[key]

    def train(self, mode=True):
        KEPT.pop(self, None)
        return super().train(mode)

    def _apply(self, function, recurse=True):  # to another device, data type or layout
        KEPT.pop(self, None)
        return super()._apply(function, recurse)


def can_keep(layer, weight):
    """Return whether values of this weight are those of the next forward pass, and no gradient's.

    Parametrized weights, those of torch.func, and inference tensors have no version that tells.
    """
    return not (layer.training or torch.is_grad_enabled() or torch.compiler.is_compiling()
                or type(weight) is not nn.Parameter or weight.is_inference())
