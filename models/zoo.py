"""Torchvision's classification networks, by name."""
import difflib

from torch import nn
from torchvision import models

PREFIX = "torchvision:"


def is_torchvision(name: object) -> bool:
    """Return whether a model's name is torchvision:NAME."""
    return isinstance(name, str) and name.startswith(PREFIX)


def check_name(name: str) -> str:
    """Return the name; raises ValueError where torchvision has no classification network of it."""
    known = models.list_models(module=models)
    given = name.removeprefix(PREFIX)
    if given not in known:
        near = difflib.get_close_matches(given, known, 3) or ["resnet18", "mobilenet_v2"]
        raise ValueError(f"{given!r} is not a classification network of torchvision: choose one of "
                         f"its names, such as {', '.join(near)}")
    return name


def torchvision_network(name: str, num_classes: int) -> nn.Module:
    """Return a new float network; raises ValueError for unknown ones and for several outputs."""
    check_name(name)
    given = name.removeprefix(PREFIX)
    if given in ("googlenet", "inception_v3"):
        raise ValueError(f"{given} gives several outputs in training: choose another network")
    return models.get_model(given, weights=None, num_classes=num_classes)
