"""The parts of a run, made from its arguments."""
import os
from argparse import Namespace
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from dataset.data import DATASETS, Samples, get_dataset, images_of
from dataset.loader import Loader, count_classes, make_loader, without_subset
from engine.distributed import local_rank_zero_first, rank, world_size
from engine.errors import UsageError, UserError
from engine.forward_pass import CHECKED, ForwardPass, choose_precision
from models import (BitWidth, add_missing_bit_widths, bit_widths_of, build,
                    initialize_quantizers, layers_to_initialize, saved_bit_widths, zoo)
from models.calibration import ENTRY, copies_quantizers
from models.checkpoint import check_keyed_by_name, load_weights
from models.converted import AnyPrecisionNetwork, fit_float_weights
from models.losses import check_forward_loss
from models.quan_ops import Quantizer


OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW,
              "sgd": partial(torch.optim.SGD, momentum=0.9)}


def open_data(args: Namespace, train: bool = True) -> list[Samples | None]:
    """Return the data sets to train and to validate on, without transforms; downloads them.

    train: False for None in the place of the first.
    """
    splits = [args.train_split if train else None,
              DATASETS[args.dataset].val_split[args.train_split]]
    with local_rank_zero_first():  # the first may have to download them
        return [split and get_dataset(args.dataset, split, data_dir=args.data_dir)
                for split in splits]


def describe_images(name: str, dataset: Samples) -> dict:
    """Return a description of a data set's images and classes, as checkpoints hold it.

    Raises UserError for a row that cannot be of the networks' images.
    """
    row = DATASETS[name]
    for field in ("mean", "std"):
        if len(getattr(row, field)) != 3:
            raise UserError(f"the row of {name} in dataset/data.py has the {field} "
                            f"{getattr(row, field)}: give three numbers, one per channel")
    names = getattr(without_subset(dataset), "classes", None)
    is_list = isinstance(names, (list, tuple))
    if not is_list or len(names) != count_classes(name, dataset):  # then they are of other labels
        names = None
    else:  # those of folders may be no UTF-8, which files in JSON could not hold
        names = [os.fsencode(str(name)).decode(errors="backslashreplace") for name in names]
    return {**images_of(name), "class_names": names}


def check_class_names(content: dict, path: str | Path, images: dict) -> None:
    """Raise UserError where folders of images hold other classes than a checkpoint's network has.

    content, path: of the checkpoint. images: a description from describe_images.
    """
    saved = (content.get("images") or {}).get("class_names")
    names = images["class_names"]
    if DATASETS[images["dataset"]].num_classes or not (saved and names) or saved == names:
        return
    lacking = [name for name in saved if name not in names]
    besides = [name for name in names if name not in saved]
    changes = [f"{what} {', '.join(map(str, found[:3]))}{', ...' * (len(found) > 3)}"
               for what, found in (("lacks", lacking), ("has besides", besides)) if found]
    raise UserError(f"{images['dataset']} does not have the {len(saved)} class folders that {path} "
                    f"was trained on: it {' and '.join(changes) or 'has another order'}")


def check_classes(model: nn.Module, content: dict, path: str | Path, name: str,
                  dataset: Samples) -> None:
    """Raise UserError where a data set has other classes than a checkpoint's network.

    content, path: of the checkpoint. name: of the data set.
    """
    check_class_names(content, path, describe_images(name, dataset))
    classes = count_classes(name, dataset)
    outputs = model.spec["classes"]
    is_by_folders = not DATASETS[name].num_classes  # of some of them nobody knows which they are
    if outputs < classes or is_by_folders and outputs != classes:
        raise UserError(f"{path} has {outputs} classes and {name} has {classes}: choose the data "
                        "set that it was trained on, by --dataset")


def make_train_loader(args: Namespace, dataset: Samples, memory_format: torch.memory_format,
                      device: torch.device) -> Loader:
    """Return the loader of training batches, of --train-fraction of the data set."""
    if args.train_fraction < 1:
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(args.seed))
        count = max(1, round(args.train_fraction * len(dataset)))
        dataset = Subset(dataset, order[:count].tolist())
    return make_loader(dataset, args.dataset, device, args.batch_size, train=True, seed=args.seed,
                       rank=rank(), world_size=world_size(), workers=args.workers,
                       memory_format=memory_format)


def make_val_loader(args: Namespace, dataset: Samples, memory_format: torch.memory_format,
                    device: torch.device) -> Loader:
    """Return the loader of this process's part of the validation split."""
    batch_size = images_per_process(args)
    if DATASETS[args.dataset].in_memory and not args.compile:  # compiled batches have one size
        batch_size *= 4  # without a backward pass there is room
    return make_loader(dataset, args.dataset, device, batch_size, train=False, seed=args.seed,
                       rank=rank(), world_size=world_size(), workers=args.workers,
                       memory_format=memory_format)


def images_per_process(args: Namespace) -> int:
    """Return the images of a batch that each process gets."""
    return max(1, args.batch_size // world_size())


def make_model(args: Namespace, bit_widths: Iterable[BitWidth | int | str],
               num_classes: int) -> nn.Module:
    """Build the network of --model; raises UsageError where it does not fit."""
    try:
        model = build(args.model, bit_widths, num_classes, args.width, args.all_conv,
                      args.quantizer)
    except ValueError as error:
        if not zoo.is_torchvision(args.model):
            raise
        raise UsageError(f"--model {args.model}: {error}") from None
    if args.all_conv:
        plain = [name for name, layer in model.named_modules() if type(layer) is nn.Conv2d]
        if plain:
            raise UsageError(f"--all-conv: {args.model} has a convolution that is not quantized, "
                             f"{plain[0]}: build a Conv2dQ where all_conv is set, or leave the "
                             "flag out")
    names = list(map(str, bit_widths_of(model)))
    if not names:
        raise UsageError(f"--model {args.model} has no SwitchableBatchNorm2d, by which a "
                         "checkpoint says its bit-widths: give it one")
    for key in model.state_dict():
        entry = ENTRY.fullmatch(key)
        if entry and entry["width"] not in names:
            raise UsageError(f"--model {args.model} has {key}: the keys of a `{entry['dict']}` are "
                             "taken for bit-widths: give it a name that does not end in _dict")
    return model


def load_pretrained(model: nn.Module, path: str | Path,
                    state_dict: dict[str, Tensor]) -> tuple[str, bool]:
    """Load the weights of --pretrain: of this model, or of the float network that it converts.

    Returns a message for the log, and whether the quantizers' parameters are new, as they are
    where the checkpoint has none. Raises UserError where the state dict does not fit.
    """
    message = f"initialized from {path}"
    if isinstance(model, AnyPrecisionNetwork) and not saved_bit_widths(state_dict):
        state_dict, resized = fit_float_weights(model, state_dict)
        count = len(state_dict) - len(resized)
        message += f", a float network: {count} entries, every bit-width's "
        message += "BatchNorm from its one"
        if resized:
            classes = model.spec["classes"]
            message += f"; the classifier is new, for {classes} classes, as its own has another "
            message += f"number ({', '.join(resized)})"
    else:
        saved = state_dict
        try:
            state_dict, added = add_missing_bit_widths(saved, model)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from None
        check_keyed_by_name(model, saved_bit_widths(saved), path)
        copies = [f"{width}-bit from {source}-bit" for width, source in added.items()]
        if copies:
            message += f": BatchNorms {', '.join(copies)}"
            if copies_quantizers(model):
                message += ", quantizers from the nearest bits"

    own = model.state_dict()
    new = [key for key in own if ".quantizer." in key and key not in state_dict]
    are_new = not any(".quantizer." in key for key in state_dict)
    if new and are_new:
        state_dict = {**state_dict, **{key: own[key] for key in new}}
        message += f"; {len(new)} parameters of quantizers are new"

    load_weights(model, state_dict, path)
    return message, are_new


def initialize_model(model: nn.Module, forward_pass: ForwardPass, loader: Loader,
                     bit_widths: Iterable[BitWidth]) -> None:
    """Initialize the quantizers from the first training batch of rank 0."""
    if not layers_to_initialize(model) or rank() > 0:
        return
    images, _ = next(iter(loader))
    with forward_pass.autocast():
        initialize_quantizers(model, images, bit_widths)
        check_forward_loss(model, images[:CHECKED])


def synchronize_batch_norm(model: nn.Module, device: torch.device) -> None:
    """Convert to torch's SyncBatchNorm, in place; raises UserError on CPUs, where it cannot run."""
    if device.type != "cuda":
        raise UserError("--sync-bn is torch's SyncBatchNorm, which needs GPUs, and this run is on "
                        f"{device}: leave it out")
    torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)


def make_forward_pass(args: Namespace, model: nn.Module, device: torch.device) -> ForwardPass:
    """Return the ForwardPass of --precision and --compile."""
    return ForwardPass(model, device, choose_precision(args.precision, device),
                       images_per_process(args) if args.compile else None)


def parameter_groups(model: torch.nn.Module, args: Namespace) -> list[dict]:
    """Return the optimizer's groups. Edit this to train some parameters differently.

    Parameters of quantizers, where there are any, have no weight decay, and a learning rate of
    --lr times their quantizer's lr_factor. A group is a dict of "params" and, where they differ
    from --lr and --weight-decay, "lr" and "weight_decay". The schedule multiplies each group's own
    learning rate.
    """
    factors = {parameter: module.lr_factor for module in model.modules()
               if isinstance(module, Quantizer) for parameter in module.parameters()}
    groups = [{"params": [parameter for parameter in model.parameters()
                          if parameter not in factors]}]
    for factor in sorted(set(factors.values())):
        of_factor = [parameter for parameter in model.parameters()
                     if factors.get(parameter) == factor]
        groups.append({"params": of_factor, "lr": factor * args.lr, "weight_decay": 0.0})
    return groups


def make_optimizer(args: Namespace,
                   parameters: Iterable[dict] | Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer of --optimizer, for groups or parameters.

    Each group has its learning rate before any schedule as "initial_lr".
    """
    optimizer = OPTIMIZERS[args.optimizer](
        parameters, lr=args.lr, weight_decay=args.weight_decay, fused=True)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer
