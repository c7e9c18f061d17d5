"""Rebuilds the inputs of the records in tests/reference (see its README.md)."""
import json
import zlib
from pathlib import Path

import numpy
import torch

FOLDER = Path(__file__).parent / "reference"


def load(name):
    return json.loads((FOLDER / f"{name}.json").read_text())


def values(name, shape, seed):
    """The array called `name`: standard normal, float64, the same everywhere."""
    random = numpy.random.RandomState((zlib.crc32(name.encode()) + seed) % 2**32)
    return torch.from_numpy(numpy.asarray(random.standard_normal(shape)))


def fill(model, seed):
    """Give a float64 model the reference weights, in place."""
    state = model.state_dict()
    for key, tensor in state.items():
        r = values(key, tuple(tensor.shape), seed)
        if key.endswith("num_batches_tracked"):
            r = torch.zeros(())
        elif key.endswith("running_mean"):
            r = 0.1 * r
        elif key.endswith("running_var"):
            r = torch.exp(0.1 * r)
        elif tensor.dim() == 1:
            r = 0.1 * r + (1 if key.endswith("weight") else 0)
        else:
            r = r * (2 / tensor[0].numel()) ** 0.5
        tensor.copy_(r)
    model.load_state_dict(state)
    return model
