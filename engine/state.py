"""The state of a run, as checkpoints hold it: saved and restored as a whole."""
import math
from pathlib import Path

import torch
from torch import nn

from engine.distributed import gather, rank, wait
from engine.errors import UserError, reading
from engine.metrics import Metrics, best_key
from models import BitWidth
from models.checkpoint import load_weights
from utils import WriteError, one_line, replacing, writing


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
        names = {parameter: name for name, parameter in model.named_parameters()}
        for group in optimizer.param_groups:  # torch's own key, compared on resume
            group["param_names"] = [names[parameter] for parameter in group["params"]]

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
        content = {
            "epoch": self.epoch, "model": self.arguments["model"], "best_prec1": self.best_prec1,
            "best": list(self.best), "network": self.model.spec, "images": self.images,
            "data": self.data,
            "state_dict": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
            "arguments": self.arguments, "num_samples": self.num_samples,
            "step": self.metrics.steps, "metrics": self.metrics.state_dict(),
            "random_states": gather({
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if on_gpu else None})}
        if rank() == 0:
            for name in ("model_best", "model_latest") if best else ("model_latest",):
                save_checkpoint(folder / "ckpt" / f"{name}.pth.tar", content)
        wait()

    def restore(self, path: str | Path, content: dict) -> None:
        """Restore what read_checkpoint read from `path`; raises UserError where it does not fit."""
        with reading(path):
            changed = data_difference(content.get("data"), self.data)
        if changed:
            raise UserError(f"{path} is of a run on other data: {changed}; resume on the same "
                            "data, or start a new run from it with --pretrain")
        load_weights(self.model, content["state_dict"], path)
        load_optimizer(self.optimizer, content["optimizer"], path,
                       published="arguments" not in content)
        with reading(path):
            self.epoch = content["epoch"]
            self.best_prec1 = float(content["best_prec1"])
            # Older checkpoints lack the mean, so a best epoch by the mean is unknown.
            unknown = -math.inf
            by_highest = self.arguments["best_by"] == "highest"
            older = (self.best_prec1 if by_highest else unknown, unknown)
            self.best = tuple(map(float, content.get("best", older)))
            if "metrics" not in content:  # a published checkpoint
                return
            self.metrics.load_state_dict(content["metrics"])
            states = content["random_states"]
            if rank() < len(states):  # an additional process keeps its own
                torch.set_rng_state(states[rank()]["torch"])
                if self.device.type == "cuda" and states[rank()]["cuda"] is not None:
                    torch.cuda.set_rng_state(states[rank()]["cuda"], self.device)
            saved = content["num_samples"]
        if self.metrics.steps and saved != self.num_samples:
            raise UserError(f"{path} stands inside an epoch of {saved} images, but the training "
                            f"split has {self.num_samples}: resume on the same data")


def data_difference(saved: dict | None, own: dict | None) -> str:
    """Return how a saved fingerprint of data differs, as a message; none where one is unknown."""
    changes = []
    if saved and own:
        for name, value in own.items():
            if name in saved and saved[name] != value:
                digest = isinstance(value, str)
                changes.append(f"its {name} is another" if digest else
                               f"its {name} was {saved[name]} and is {value}")
    return ", ".join(changes)


def first_not_finite(model: torch.nn.Module) -> str | None:
    """Return the name of a parameter or buffer that is not finite; None where all are. Waits."""
    entries = {name: tensor for name, tensor in model.state_dict().items()
               if tensor.is_floating_point()}
    finite = torch.stack([tensor.isfinite().all() for tensor in entries.values()]).tolist()
    return next((name for name, good in zip(entries, finite) if not good), None)


def save_checkpoint(path: Path, content: dict) -> None:
    """Write a checkpoint whole or not at all; raises WriteError where the disk is full."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:
            raise WriteError(path, f"{one_line(error)}, as on a full disk") from None


# Settings of an optimizer's group that belong to this run, not to the saved state.
OF_THIS_RUN = ("lr", "initial_lr", "param_names", "fused", "foreach", "capturable")


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict, path: str | Path,
                   published: bool = False) -> None:
    """Load an optimizer's state; raises UserError for another optimizer, network or grouping.

    published: whether the checkpoint is a published one, whose learning rate may differ.
    """
    try:
        difference = group_difference(state["param_groups"], optimizer.param_groups, published)
        if difference is None:
            groups = [{**saved, **{name: own[name] for name in OF_THIS_RUN if name in own}}
                      for saved, own in zip(state["param_groups"], optimizer.param_groups)]
            optimizer.load_state_dict({**state, "param_groups": groups})
            for parameter, values in optimizer.state.items():
                for name, value in values.items():  # fused ones need the same memory format
                    if torch.is_tensor(value) and value.shape == parameter.shape:
                        values[name] = torch.empty_like(parameter).copy_(value)
            missing = [name for group in optimizer.param_groups
                       for name in sorted(optimizer.defaults.keys() - group.keys())]
            difference = f"without {missing[0]}" if missing else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        difference = one_line(error)
    if difference:
        raise UserError(f"{path} holds another optimizer's state ({difference}): check "
                        "--optimizer, --weight-decay and parameter_groups in engine/setup.py")


def group_difference(saved: list[dict], own: list[dict], published: bool = False) -> str | None:
    """Return the first difference of an optimizer's saved groups from its own, or None."""
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
                return f"group {index}: parameter {number} was {was} and is now {name}"
        compared = before.keys() & now.keys() - {"params", *OF_THIS_RUN}
        if not published:
            compared |= before.keys() & now.keys() & {"initial_lr"}
        for name in sorted(compared):
            if before[name] != now[name]:
                return f"group {index}: {name} was {before[name]} and is now {now[name]}"
    return None
