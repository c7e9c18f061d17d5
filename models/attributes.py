"""What the modules of a network hold besides what a checkpoint saves, as Python attributes."""
import contextlib
import copy
import random
import sys
from collections.abc import Iterator

import numpy
import torch
from torch import nn
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves

from models.bit_widths import BitWidth
from models.quan_ops import set_bit_width


def named_attributes(model: nn.Module) -> Iterator[tuple[str, object]]:
    """Yield the name, with dots, and the value of each Python attribute of a model's modules."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            yield f"{name}.{attribute}".strip("."), value


@contextlib.contextmanager
def keeping_attributes(model: nn.Module) -> Iterator[None]:
    """Restore on exit the attributes of a model's modules, and what dicts and lists of them hold.

    What stands within that is not restored.
    """
    attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
    values = [value for _, before in attributes for value in before.values()]
    contents = [(value, copy.copy(value)) for value in values if isinstance(value, (dict, list))]
    try:
        yield
    finally:
        for own, before in attributes + contents:
            own.clear()
            own.update(before) if isinstance(own, dict) else own.extend(before)


def attributes_of(model: nn.Module, bit_width: BitWidth) -> dict[str, object]:
    """Return what modules of a model hold and no checkpoint does, at one bit-width, by its path.

    They are buffers that are not persistent, and Python attributes: numbers, texts, tensors, NumPy
    arrays, states of random generators, and modules of other networks, also those that dicts and
    lists hold. Names that begin with an underscore, and `training`, are left out.
    """
    set_bit_width(model, bit_width)
    saved = model.state_dict().keys()
    found = {name: buffer.detach().clone() for name, buffer in model.named_buffers()
             if name not in saved}
    own = saved_ids(model)
    for path, value in named_attributes(model):
        name = path.rpartition(".")[2]
        if not name.startswith("_") and name != "training":
            found.update(held_values(path, value, own))
    return found


def saved_ids(model: nn.Module) -> frozenset[int]:
    """Return the id of each module, parameter and buffer of a model, which a checkpoint holds."""
    return frozenset(map(id, (*model.modules(), *model.parameters(), *model.buffers())))


def held_values(path: str, value: object,
                saved: frozenset[int] = frozenset()) -> Iterator[tuple[str, object]]:
    """Yield copies of the numbers, texts, arrays and states that a value is, or that it holds.

    path: names it; each comes with the path to it. saved: the id of what a checkpoint holds.
    """
    for keys, part in tree_flatten_with_path(value)[0]:
        if id(part) in saved:
            continue
        name = path + keystr(keys)
        state = generator_state(part)
        if isinstance(part, nn.Module):
            for key, tensor in part.state_dict().items():
                if torch.is_tensor(tensor):
                    yield f"{name}.{key}", tensor.detach().clone()
        elif torch.is_tensor(part):
            yield name, part.detach().clone()
        elif isinstance(part, numpy.ndarray):
            yield name, part.copy()
        elif state is not None:
            yield name, state
        elif part is None or isinstance(part, (bool, int, float, str)):
            yield name, part


def is_unchanged(value: object, before: object) -> bool:
    """Return whether two values of held_values are equal; NaN equals NaN."""
    if torch.is_tensor(value) and torch.is_tensor(before):
        return (value.shape, value.dtype) == (before.shape, before.dtype) and torch.allclose(
            value, before.to(value.device), 0, 0, equal_nan=True)
    if isinstance(value, numpy.ndarray) and isinstance(before, numpy.ndarray):
        return (value.shape, value.dtype, value.tobytes()) == (
            before.shape, before.dtype, before.tobytes())
    return repr(value) == repr(before)


def zero_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield names and parameters that are 0, such as a new head's.

    They hide what stands before them: no output depends on it, and no gradient reaches it.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not (parameter.is_inference() or parameter.any()):
            yield name, parameter


@torch.no_grad()
def draw_zeros(model: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw the parameters that are 0; None: by torch's own generator."""
    for _, parameter in zero_parameters(model):
        parameter.normal_(std=0.1, generator=generator)


def is_hooked(layer: nn.Module) -> bool:
    """Return whether a call of a layer runs something else than its class says."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))


def random_texts(network: nn.Module) -> list[str]:
    """Return what changes where Python, NumPy or torch draws a number, or a network's generator."""
    values = tree_leaves([value for _, value in named_attributes(network)])
    own = filter(None, map(generator_state, values))
    return [state_text(random.getstate()), state_text(numpy.random.get_state()),
            state_text(torch.get_rng_state()), *own]


def generator_state(value: object) -> str | None:
    """Return the state of a random generator of Python, NumPy or torch; None of anything else."""
    if isinstance(value, random.Random):
        return state_text(value.getstate())
    if isinstance(value, numpy.random.RandomState):
        return state_text(value.get_state())
    if isinstance(value, numpy.random.Generator):
        return state_text(value.bit_generator.state)
    if isinstance(value, torch.Generator):
        return state_text(value.get_state())
    return None


def state_text(state: object) -> str:
    """Return all of a random generator's state as a text."""
    with numpy.printoptions(threshold=sys.maxsize):
        return str(state.tolist() if torch.is_tensor(state) else state)
