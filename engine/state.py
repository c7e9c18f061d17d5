"""The state of a run, as checkpoints hold it: saved and restored as a whole."""
import copy
import math
import random
from collections import defaultdict
from collections.abc import Collection
from functools import partial
from numbers import Real
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

from engine.distributed import gather, rank, wait
from engine.errors import UserError
from engine.metrics import Metrics, best_key
from models import BitWidth, quantizers
from models.attributes import attributes_of, held_values, is_unchanged, saved_ids
from models.checkpoint import (BEST, LATEST, check_same_layers, find_hooked, load_weights,
                               network_content, rebuilt, save_checkpoint, saved_own_bits)
from models.fields import (FileError, are_texts, check_field, is_count, is_dense,
                           is_finite_number, is_named_values, is_whole, take)
from models.losses import NEXT_TARGET
from utils import brief, escaped, one_line

OPTIMIZER = "optimizer's "  # before a field's name


class TrainingState:
    """A run between two steps: epochs done, steps and metrics of the next, network, optimizer.

    arguments: the run's, as a dict. num_samples: images of an epoch, compared on resume. images: a
    description of the images, as checkpoints hold it. data: the training data's fingerprint,
    compared on resume.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer,
                 bit_widths: list[BitWidth], device: torch.device, arguments: dict,
                 num_samples: int, images: dict | None = None, data: dict | None = None):
        self.model = model
        self.optimizer = optimizer
        self.device = device
        self.bit_widths = bit_widths
        self.arguments = arguments
        self.num_samples = num_samples
        self.images = images
        self.data = data
        self.epoch = arguments["start_epoch"]  # epochs done
        self.best = (-math.inf, -math.inf)  # the largest best_key
        self.best_prec1 = -math.inf  # top-1 (%) of the highest bit-width in that epoch
        self.metrics = Metrics(bit_widths, device)  # of the current epoch
        self.first_values = self.values_not_saved()
        self.first_groups = [copy.deepcopy({name: value for name, value in group.items()
                                            if name != "params"})
                             for group in optimizer.param_groups]
        check_optimizer(optimizer, model)

    def check_rebuilt(self) -> str | None:
        """Raise UserError where a checkpoint's network would be another one than this.

        Returns what has a hook, or a forward of its own, that a checkpoint's lacks; or None.
        """
        weights = self.model.state_dict()
        copy_to_cpu([weights])
        content = {"network": network_content(self.model), "images": self.images,
                   "state_dict": weights}
        try:
            again = rebuilt(content, "a checkpoint of this run")
            check_same_layers(self.model, again)
        except ValueError as error:
            raise UserError(str(error)) from None
        return find_hooked(self.model, again)

    def check_own_bits(self, saved: dict[str, int], path: str | Path) -> None:
        """Raise UserError where a layer has other bits of its own than a checkpoint's."""
        try:
            quantizers.check_own_bits(self.model, saved)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None

    def unsaved(self) -> list[str]:
        """Return what training changed and no checkpoint holds."""
        return [name for name, value in self.values_not_saved().items()
                if not is_unchanged(value, self.first_values.get(name))]

    def values_not_saved(self) -> dict[str, object]:
        """Return what modules, the optimizer and the loss hold and no checkpoint does."""
        found = attributes_of(self.model, self.bit_widths[0])
        saved = saved_ids(self.model)
        owners = {"the loss's": NEXT_TARGET.get(self.arguments.get("loss"))}
        if not has_own_state(self.optimizer):  # which may be whatever it holds
            owners["the optimizer's"] = self.optimizer
        for owner, value in owners.items():
            for name, part in getattr(value, "__dict__", {}).items():
                if not name.startswith("_") and name not in ("state", "param_groups", "defaults"):
                    found.update(held_values(f"{owner} {name}", part, saved))
        return found

    def group_state(self) -> list[str]:
        """Return the names of what training changed in the optimizer's groups, but for --lr's."""
        return sorted({name for before, now in zip(self.first_groups, self.optimizer.param_groups)
                       for name in now.keys() - {"params", *OF_THIS_RUN}
                       if not is_unchanged(now[name], before.get(name))})

    def finish_epoch(self, val_metrics: dict[BitWidth, dict[str, float]]) -> bool:
        """Count an epoch as done; return whether it is the best so far, ties included."""
        key = best_key(val_metrics, self.arguments["best_by"])
        improved = key >= self.best
        if improved:
            self.best = key
            self.best_prec1 = val_metrics[max(self.bit_widths)]["top1"]
        self.epoch += 1
        self.metrics = Metrics(self.bit_widths, self.device)
        return improved

    def save(self, folder: Path, best: bool = False) -> None:
        """Write model_latest.pth.tar, and if `best` model_best.pth.tar, whole or not at all.

        All processes must call it, and return once it is written; the network is rank 0's. Raises
        UserError where losses or weights are not finite, and WriteError where the file cannot be
        written; previous files are unchanged then.
        """
        self.metrics.check_finite(f"epoch {self.epoch + 1}, training")
        name = first_not_finite(self.model)
        if name:
            raise UserError(f"epoch {self.epoch + 1}, step {self.metrics.steps}: {name} is not "
                            "finite: lower --lr; the last good checkpoint is kept")

        on_gpu = self.device.type == "cuda"
        weights = self.model.state_dict()
        optimizer = self.optimizer.state_dict()
        if on_gpu:
            kept = {number: dict(values) for number, values in optimizer["state"].items()}
            optimizer["state"] = kept
            copy_to_cpu([weights, *kept.values()])
        content = {
            "epoch": self.epoch, "model": self.arguments["model"], "best_prec1": self.best_prec1,
            "best": list(self.best), "network": network_content(self.model),
            "images": self.images,
            "data": self.data,
            "state_dict": weights, "optimizer": optimizer, "group_state": self.group_state(),
            "arguments": self.arguments, "num_samples": self.num_samples,
            "metrics": self.metrics.state_dict(),
            "random_states": gather(random_states(self.device))}
        if rank() == 0:
            for name in (BEST, LATEST) if best else (LATEST,):
                save_checkpoint(folder / "ckpt" / name, content)
        wait()

    def restore(self, path: str | Path, content: dict) -> None:
        """Restore what read_checkpoint read from `path`.

        Raises UserError where it is of other data, weights or an optimizer, and FileError for a
        field that is missing or of another type.
        """
        check_field(path, "data", content.get("data"), is_fingerprint, "a fingerprint of data")
        changed = data_difference(content.get("data"), self.data)
        if changed:
            raise UserError(f"{path} was trained on other data: {changed}; resume on the same "
                            "data, or start a new run from it with --pretrain")
        own_bits = saved_own_bits(content, path)
        if own_bits is not None:
            self.check_own_bits(own_bits, path)
        load_weights(self.model, content["state_dict"], path)
        check_field(path, "group_state", content.get("group_state"), are_texts, "a list of names")
        load_optimizer(self.optimizer, content["optimizer"], path,
                       published="arguments" not in content,
                       group_state=content.get("group_state") or ())
        self.epoch = take(path, content, "epoch", is_epoch, "a number of epochs done")
        self.best_prec1 = float(
            take(path, content, "best_prec1", is_accuracy, "an accuracy in percent"))
        # Older checkpoints lack the mean, so a best epoch by the mean is unknown.
        unknown = -math.inf
        by_highest = self.arguments["best_by"] == "highest"
        best = content.get("best")
        check_field(path, "best", best, are_two_accuracies, "a list of two accuracies in percent")
        older = (self.best_prec1 if by_highest else unknown, unknown)
        self.best = tuple(map(float, older if best is None else best))
        if "arguments" in content:  # which a published checkpoint lacks
            self.restore_epoch(path, content)

    def restore_epoch(self, path: str | Path, content: dict) -> None:
        """Restore what a checkpoint holds of an epoch that has begun; raises as `restore`."""
        saved = take(path, content, "num_samples", is_count, "a number of images")
        metrics = take(path, content, "metrics", is_named_values, "a dict of sums")
        begun = metrics.get("steps")
        if is_whole(begun) and begun > 0 and saved != self.num_samples:
            raise UserError(f"{path} was saved within an epoch of {saved} images, but the training "
                            f"split has {self.num_samples}: resume on the same data")
        self.metrics.check_state(metrics, path, self.arguments["batch_size"], self.num_samples)
        self.metrics.load_state_dict(metrics)

        states = take(path, content, "random_states", are_random_states,
                      "a list of states of random generators")
        if rank() >= len(states):  # an additional process keeps its own
            return
        try:
            set_random_states(states[rank()], self.device)
        except (RuntimeError, TypeError, ValueError, KeyError) as error:
            raise FileError(f"{path}: its random_states are not valid ({one_line(error)}): the "
                            "file may be damaged") from None


def seed_generators(seed: int) -> None:
    """Seed the random generators of Python, NumPy and torch, for what a network may draw from."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_states(device: torch.device) -> dict[str, object]:
    """Return the states of the random generators of Python, NumPy and torch, for a checkpoint."""
    kind, keys, *rest = numpy.random.get_state()
    return {"torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
            "python": random.getstate(), "numpy": (kind, keys.tolist(), *rest)}


def set_random_states(states: dict[str, object], device: torch.device) -> None:
    """Set what random_states returned; an older checkpoint lacks those of Python and NumPy."""
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and states["cuda"] is not None:
        torch.cuda.set_rng_state(states["cuda"], device)
    if "python" in states:
        random.setstate(states["python"])
        numpy.random.set_state(states["numpy"])


def is_epoch(value: object) -> bool:
    return is_whole(value, 2**31 - 1)


def is_accuracy(value: object) -> bool:
    """Return whether a value is a number up to 100, as of a run that has no epoch yet too."""
    if is_dense(value) and value.numel() == 1 and not value.is_complex():
        value = value.item()
    return isinstance(value, Real) and not isinstance(value, bool) and value <= 100


def are_two_accuracies(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(is_accuracy, value))


def are_random_states(value: object) -> bool:
    """Return whether a value is a list of {"torch": bytes, "cuda": bytes or None}."""
    return isinstance(value, list) and len(value) > 0 and all(
        isinstance(state, dict) and state.keys() >= {"torch", "cuda"}
        and is_dense(state["torch"]) and (state["cuda"] is None or is_dense(state["cuda"]))
        for state in value)


def is_fingerprint(value: object) -> bool:
    return is_named_values(value) and all(type(part) in (int, str) for part in value.values())


def data_difference(saved: dict | None, own: dict | None) -> str:
    """Return how a saved fingerprint of data differs, as a message; none where one is unknown."""
    changes = []
    if saved and own:
        for name, value in own.items():
            if name in saved and saved[name] != value:
                digest = isinstance(value, str)
                changes.append(f"its {name} differs" if digest else
                               f"its {name} was {brief(saved[name])} and is {value}")
    return ", ".join(changes)


def first_not_finite(model: torch.nn.Module) -> str | None:
    """Return the name of a parameter or buffer that is not finite; None where all are. Waits."""
    entries = {name: tensor for name, tensor in model.state_dict().items()
               if tensor.is_floating_point()}
    finite = torch.stack([tensor.isfinite().all() for tensor in entries.values()]).tolist()
    return next((name for name, good in zip(entries, finite) if not good), None)


def copy_to_cpu(dicts: list[dict]) -> None:
    """Replace the tensors in dicts that are on another device by copies on the CPU.

    Those of one type of number are copied at once: each copy waits for the device.
    """
    places = defaultdict(list)
    for each in dicts:
        for key, value in each.items():
            if torch.is_tensor(value) and value.device.type != "cpu":
                places[value.dtype].append((each, key))
    for found in places.values():
        for (each, key), copied in zip(found, copies([each[key] for each, key in found])):
            each[key] = copied


def copies(tensors: list[Tensor]) -> list[Tensor]:
    """Return copies on the CPU of tensors of one type and device, copied at once."""
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape).clone()  # a file would hold all of `flat`
            for tensor, part in zip(tensors, parts)]


# Settings of an optimizer's group that belong to this run, not to the saved state.
OF_THIS_RUN = ("lr", "initial_lr", "param_names", "fused", "foreach", "capturable")
# What torch's optimizers keep of each parameter; of any other, what it keeps is not known.
KEPT = {torch.optim.Adam: {"step", "exp_avg", "exp_avg_sq"},
        torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"},
        torch.optim.SGD: {"momentum_buffer"}}
AMSGRAD = "max_exp_avg_sq"  # which Adam keeps, too, where a group says amsgrad


def has_own_state(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether an optimizer says itself what its state_dict holds."""
    return type(optimizer).state_dict is not torch.optim.Optimizer.state_dict


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """Raise UserError for an optimizer whose state no checkpoint would hold, or whose groups are
    not the network's parameters; and name the parameters of each group.
    """
    for name, value in vars(optimizer).items():
        if isinstance(value, torch.optim.Optimizer) and not has_own_state(optimizer):
            raise UserError(f"the optimizer {type(optimizer).__name__} holds another one, "
                            f"{name}, and its state_dict does not have the state of that, so a "
                            "run could not be resumed: give it a state_dict and "
                            "load_state_dict that do")
    names = {parameter: name for name, parameter in model.named_parameters()}
    grouped = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    if not grouped <= names.keys():
        raise UserError("parameter_groups in engine/setup.py has a parameter that is not of "
                        "the network, whose checkpoints would lack it: make it one")
    left = [name for parameter, name in names.items()
            if parameter.requires_grad and parameter not in grouped]
    if left:
        raise UserError(f"parameter_groups in engine/setup.py leaves out {left[0]}, which "
                        "would not be trained: set its requires_grad to False, or give it a "
                        "group")
    for group in optimizer.param_groups:  # torch's own key, compared on resume
        group["param_names"] = [names[parameter] for parameter in group["params"]]


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict, path: str | Path,
                   published: bool = False, group_state: Collection[str] = ()) -> None:
    """Load an optimizer's state; raises UserError for another optimizer, network or grouping.

    published: whether the checkpoint is a published one, whose learning rate may differ.
    group_state: what training changes in the groups, which is the file's and not compared. Raises
    FileError for a field that is missing or of another type.
    """
    saved = take(path, state, "param_groups", are_groups, "a list of groups", OPTIMIZER)
    moments = take(path, state, "state", is_state, "a dict of dicts", OPTIMIZER)
    difference = group_difference(saved, optimizer.param_groups, published, group_state)
    if difference is None:
        groups = [{**{name: value for name, value in own.items()  # equal, or of this run
                      if name in before or name in OF_THIS_RUN},
                   **{name: value for name, value in before.items() if name in group_state},
                   "params": before["params"]}
                  for before, own in zip(saved, optimizer.param_groups)]
        difference = state_difference(optimizer, saved, moments, path)
    if difference is None:
        defaults = sorted(optimizer.defaults)  # loading may add some
        optimizer.load_state_dict({**state, "param_groups": groups})
        for parameter, values in optimizer.state.items():
            for name, value in values.items():  # fused ones need the same memory format
                if torch.is_tensor(value) and value.shape == parameter.shape:
                    values[name] = torch.empty_like(parameter).copy_(value)
        missing = [name for group in optimizer.param_groups
                   for name in defaults if name not in group]
        difference = f"without {missing[0]}" if missing else None
    if difference:
        raise UserError(f"{path} holds another optimizer's state ({difference}): check "
                        "--optimizer, --weight-decay and parameter_groups in engine/setup.py")


def are_groups(value: object) -> bool:
    """Return whether a value is a list of an optimizer's groups, each of other parameters."""
    if not isinstance(value, list) or not all(map(is_named_values, value)):
        return False
    every = []
    for group in value:
        numbers = group.get("params")
        if not isinstance(numbers, list) or not all(map(is_whole, numbers)):
            return False
        names = group.get("param_names", numbers)  # older versions saved none
        if not isinstance(names, (list, tuple)) or len(names) != len(numbers):
            return False
        every += numbers
    return len(set(every)) == len(every)


def is_state(value: object) -> bool:
    return isinstance(value, dict) and all(map(is_named_values, value.values()))


def state_difference(optimizer: torch.optim.Optimizer, saved: list[dict], state: dict,
                     path: str | Path) -> str | None:
    """Return how what a file holds of parameters differs from what this optimizer keeps, or None.

    saved: the file's groups. Raises FileError for values of another type.
    """
    numbers = [number for group in saved for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    unknown = [number for number in state if number not in numbers]
    if unknown:
        return f"its state is of a parameter {brief(unknown[0])}, which no group has"
    kept = KEPT.get(type(optimizer))
    amsgrad = [group.get("amsgrad") for group in optimizer.param_groups for _ in group["params"]]
    for number, name, parameter, has_most in zip(numbers, names, parameters, amsgrad):
        values = state.get(number)
        expected = kept and kept | ({AMSGRAD} if has_most else set())
        if kept and values and values.keys() != expected:
            return f"its state of {name} has {', '.join(map(escaped, sorted(values)))}"
        for key in values or ():
            if key == "step":
                what, is_right = "a number from 0 up", is_step
            elif kept:
                what = f"finite numbers of shape {tuple(parameter.shape)}"
                is_right = partial(is_kept, key, parameter.shape)
            else:  # what others keep is not known
                what, is_right = "finite numbers", is_finite
            take(path, values, key, is_right, what, f"{OPTIMIZER}state of {name}, ")
    return None


def is_step(value: object) -> bool:
    """Return whether a value is a number of steps, or a tensor of one."""
    number = value.item() if is_dense(value) and value.numel() == 1 else value
    return is_finite_number(number) and number >= 0


def is_kept(key: str, shape: torch.Size, value: object) -> bool:
    """Return whether a value is what an optimizer of KEPT keeps of a parameter of this shape."""
    if not torch.is_tensor(value) or not is_finite(value):
        return False
    if value.shape != shape or not value.is_floating_point():
        return False
    return key not in ("exp_avg_sq", AMSGRAD) or bool((value >= 0).all())


def is_finite(value: object) -> bool:
    """Return whether a value is no tensor, or one of finite numbers on the CPU."""
    return not torch.is_tensor(value) or (
        is_dense(value) and not value.is_complex() and bool(value.isfinite().all()))


def group_difference(saved: list[dict], own: list[dict], published: bool = False,
                     group_state: Collection[str] = ()) -> str | None:
    """Return the first difference of an optimizer's saved groups from its own, or None.

    group_state: names that are not compared.
    """
    if len(saved) != len(own):
        return f"parameter groups were {len(saved)} and are now {len(own)}"
    for index, (before, now) in enumerate(zip(saved, own)):
        if len(before["params"]) != len(now["params"]):
            return (f"group {index}: parameters were {len(before['params'])} and are now "
                    f"{len(now['params'])}")
        own_names = now.get("param_names", ())
        names = before.get("param_names", own_names)  # older versions saved none
        for number, (was, name) in enumerate(zip(names, own_names)):
            if was != name:
                return (f"group {index}: parameter {number} was {escaped(str(was))} and is now "
                        f"{name}")
        compared = before.keys() & now.keys() - {"params", *OF_THIS_RUN, *group_state}
        if not published:
            compared |= before.keys() & now.keys() & {"initial_lr"}
        for name in sorted(compared):
            if not is_same(before[name], now[name]):
                return (f"group {index}: {name} was {brief(before[name])} and is now "
                        f"{brief(now[name])}")
    return None


def is_same(one: object, other: object) -> bool:
    """Return whether two values are equal; a tensor of several numbers equals none."""
    try:
        return bool(one == other)
    except (RuntimeError, ValueError, TypeError):
        return False
