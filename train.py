"""Train one network that runs at any precision (Yu et al., Any-Precision Deep Neural Networks, AAAI 2021).

    python train.py                                              # svhnq on digits: 1, 2, 4, 8 and 32 bits, recursive
    python train.py --loss hard --bit_width_list 2               # a dedicated 2-bit model
    python train.py --dataset cifar10 --model resnet20q --epochs 200 --lr_decay 100,150,180 --batch-size 128
    python train.py --resume results/RUN                         # go on where that run stopped
    torchrun --standalone --nproc-per-node 4 train.py ...        # the same on four GPUs
    python train.py --evaluate --pretrain results/RUN            # its accuracy at every bit-width
    python train.py --evaluate --pretrain results/RUN --bit_width_list 3,5 --calibrate 20    # widths it never saw

The recipes (train_digits.sh, train_cifar10.sh, train_svhn.sh, train_imagenet.sh) call it with the paper's settings.
"""
import argparse
import bisect
import contextlib
import math
import os
import random
import re
import shlex
import signal
import sys
import time
from pathlib import Path

import numpy
import psutil
import torch
from tensorboardX import SummaryWriter
from torch.utils.data import DataLoader, Subset

import distributed
import published
import report
import utils
from dataset.data import (DATASETS, InMemoryLoader, SeededSamples, ShuffledBatches, Transformed, WorkerLoader,
                          get_dataset, get_transform, read_arrays)
from distributed import rank, world_size
from errors import Stopped, UsageError, UserError
from models import (DEFAULT_WIDTH, MODELS, calibrate, check_bit_widths, fit_bit_widths, fused, saved_bit_widths,
                    set_bit_width, switchable_layers, trained_bit_widths)
from models.losses import LOSSES
from step import PRECISIONS, Computation, TrainingStep, check_precision, missing_compiler
from utils import Metrics, log

OPTIMIZERS = ("adam", "sgd")
# What a resumed run must have in common with the run it goes on from, or it would be another run.
FIXED_ON_RESUME = ("model", "width", "all_conv", "bit_width_list", "dataset", "train_split", "loss", "optimizer", "lr",
                   "lr_decay", "weight_decay", "batch_size", "seed", "sync_bn", "train_fraction", "precision", "plain")
# What an evaluation takes from its checkpoint where no flag sets it; those of the network must agree.
OF_NETWORK = ("model", "width", "all_conv")
OF_EVALUATION = (*OF_NETWORK, "dataset", "train_split", "data_dir", "loss", "seed", "batch_size", "precision")


# ---- arguments

def whole_number(least, most=2**31 - 1):
    def parse(text):
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number: give one from {least} up") from None
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{value} is too {'small' if value < least else 'large'}: "
                                             f"give a whole number from {least} up to {most}")
        return value
    return parse


LARGEST = 1e30  # a larger step does not fit into float32


def real_number(text, zero_allowed=False):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (value <= LARGEST and (value > 0 or zero_allowed and value == 0)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not allowed: give a number {'from 0 up' if zero_allowed else 'above 0'}, at most {LARGEST:g}")
    return value


def weight_decay(text):
    return real_number(text, zero_allowed=True)


def fraction(text):
    value = real_number(text)
    if value > 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a part: give a number above 0, at most 1")
    return value


def bit_width_list(text):
    try:
        parts = [part.strip() for part in text.split(",")] if text.strip() else []
        return sorted(check_bit_widths(int(part) if re.fullmatch(r"-?\d+", part) else part for part in parts))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def epoch_list(text):
    try:
        epochs = [int(part) for part in text.split(",")] if text.strip() else []
    except ValueError:
        epochs = [0]
    if any(epoch < 1 for epoch in epochs) or sorted(set(epochs)) != epochs:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of rising epochs from 1 up, such as 100,150,180")
    return epochs


def device_name(text):
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} does not exist: choose auto, cpu, cuda, or one GPU such as cuda:0")
    return text


def one_of(names):
    def parse(text):
        if text not in names:
            raise argparse.ArgumentTypeError(f"{text!r} does not exist: choose from {', '.join(names)}")
        return text
    return parse


def parse_args(argv=None):
    """The arguments, checked, as a namespace; args.given holds the names of those that argv sets.

    One line on stderr and exit code 2 where an argument is wrong.
    """
    parser = utils.OneLineParser(
        description=__doc__.splitlines()[0], allow_abbrev=False,
        formatter_class=utils.HelpFormatter)
    add = parser.add_argument
    add("--dataset", type=one_of(DATASETS), default="digits", metavar="NAME", help=", ".join(DATASETS))
    add("--train_split", "--train-split", metavar="SPLIT", help="split to train on; unset: train, for svhn train_extra")
    add("--train-fraction", type=fraction, default=1.0, metavar="X",
        help="train on this part of the training split, drawn by the seed; for short honest trials")
    add("--data-dir", metavar="DIR", help="folder that holds the data sets' folders; unset: data")
    add("--model", type=one_of(MODELS), default="svhnq", metavar="NAME", help=", ".join(MODELS))
    add("--width", type=whole_number(1), metavar="N",
        help=f"width multiplier; unset: {', '.join(f'{width} for {name}' for name, width in DEFAULT_WIDTH.items())}")
    add("--all-conv", action="store_true", help="quantize the weights of the stem and the shortcuts too")
    add("--bit_width_list", "--bit-width-list", type=bit_width_list, default=[1, 2, 4, 8, 32], metavar="K,...",
        help="bit-widths to train, of 1 to 8 and 32; a single one trains a dedicated model")
    add("--loss", type=one_of(LOSSES), default="recursive", metavar="NAME",
        help="who teaches the lower bit-widths: hard (labels), soft (the highest), recursive (the next higher)")
    add("--epochs", type=whole_number(1), default=30, metavar="N", help="passes over the training split")
    add("--start-epoch", type=whole_number(0), default=0, metavar="N",
        help="epochs taken as done, for the learning rate too; --resume sets it")
    add("--batch-size", type=whole_number(1), default=64, metavar="N", help="images a step, over all processes")
    add("--optimizer", type=one_of(OPTIMIZERS), default="adam", metavar="NAME", help="adam, or sgd (momentum 0.9)")
    add("--lr", type=real_number, default=0.001, metavar="X", help="learning rate")
    add("--lr_decay", "--lr-decay", type=epoch_list, default=[15, 22, 27], metavar="N,...",
        help='epochs after which the learning rate is divided by 10; "" for never')
    add("--weight-decay", type=weight_decay, default=0.0, metavar="X", help="L2 penalty; 0 is off")
    add("--seed", type=whole_number(0, 2**32 - 1), default=0, metavar="N",
        help="of weights, data order, augmentation and dropout")
    add("--pretrain", metavar="SOURCE",
        help="start from these weights: a checkpoint, a folder with model_best.pth.tar, a URL, or a published name")
    add("--resume", metavar="PATH", help="go on with a run: its results folder, or a checkpoint")
    add("--evaluate", action="store_true",
        help="no training: the accuracy of --pretrain (or --resume) at every bit-width of the list; unset list: all it has")
    add("--calibrate", type=whole_number(0), metavar="N",
        help="with --evaluate: for a bit-width that was not trained, start from the nearest that was and re-estimate the "
             "BatchNorm statistics over N training batches (0: take the nearest as it is)")
    add("--save-calibrated", metavar="FILE", help="with --calibrate: keep the result as a checkpoint")
    add("--results-dir", metavar="DIR", help="where the run is written; unset: results/, named after the run")
    add("--device", type=device_name, default="auto", metavar="NAME",
        help="auto (the GPU with the most free memory, else the CPU), cpu, cuda, cuda:i")
    add("--precision", type=one_of(PRECISIONS), default="fp32", metavar="NAME",
        help=f"of the convolutions' operands: {', '.join(PRECISIONS)}; the quantizers and BatchNorm stay in float32")
    add("--compile", action="store_true",
        help="torch.compile, a graph per bit-width, and on a GPU the whole step as one CUDA graph; minutes to begin with")
    add("--plain", action="store_true",
        help="the reference to measure and check against: by the equations, everything anew at every bit-width, images "
             "transformed one by one, metrics read every step")
    add("--workers", type=whole_number(0), default=0, metavar="N", help="processes that load data; 0 loads in this one")
    add("--sync-bn", action="store_true",
        help="several processes: BatchNorm statistics of the whole batch; unset: of each process's part, as published")
    add("--timeout", type=whole_number(1), default=600, metavar="SECONDS",
        help="several processes: how long one waits for the others before the run ends")
    add("--save-every", type=real_number, metavar="MINUTES",
        help="also save inside an epoch, this often; unset: after every epoch")
    add("--print-freq", "-p", type=whole_number(1), default=50, metavar="N",
        help="steps between progress lines where output is not a terminal")

    defaults = vars(parser.parse_args([]))
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults)))
    args.given = {name for name in defaults if getattr(args, name) is not None}
    for name in defaults.keys() - args.given:
        setattr(args, name, defaults[name])
    try:
        if args.evaluate and not (args.pretrain or args.resume):
            raise UsageError("--evaluate needs something to evaluate: give --pretrain SOURCE")
        if args.pretrain and args.resume:
            raise UsageError(f"--pretrain {args.pretrain} starts a new run and --resume {args.resume} goes on with one: "
                             "give one of them")
        if args.calibrate is not None and not args.evaluate:
            raise UsageError(f"--calibrate {args.calibrate} goes with --evaluate: give both or neither")
        if args.save_calibrated and args.calibrate is None:
            raise UsageError(f"--save-calibrated {args.save_calibrated} goes with --calibrate N: give both or neither")
        if not (args.resume or args.evaluate):  # these two take what is unset from the checkpoint first
            complete(args)
    except UsageError as error:
        parser.error(str(error))
    return args


def complete(args):
    """Fill in what depends on other arguments, in place; UsageError where they do not go together."""
    data = DATASETS[args.dataset]
    args.train_split = args.train_split or next(iter(data.val_split))
    if args.train_split not in data.val_split:
        raise UsageError(f"--train_split {args.train_split!r} does not exist for {args.dataset}: "
                         f"choose from {', '.join(data.val_split)}")
    if args.model == "svhnq" and data.image_size != 40:
        raise UsageError(f"--model svhnq takes 40 x 40 images and {args.dataset} has {data.image_size} x "
                         f"{data.image_size}: choose --model resnet20q or resnet50q")
    if args.plain and (args.compile or args.precision != "fp32"):
        raise UsageError("--plain computes in fp32 and uncompiled: leave out "
                         f"--{'compile' if args.compile else 'precision'}, or --plain")
    if args.compile and args.sync_bn:
        raise UsageError("--sync-bn exchanges statistics within the network, which --compile cannot: give one of them")
    args.width = args.width or DEFAULT_WIDTH[args.model]
    if args.batch_size % world_size() and not args.evaluate:
        raise UsageError(f"--batch-size {args.batch_size} is that of all {world_size()} processes: give a multiple of "
                         f"{world_size()}")
    if world_size() > 1 and args.device.startswith("cuda:"):
        raise UsageError(f"--device {args.device} is one GPU for {world_size()} processes: give cuda, each takes its own")
    if args.start_epoch >= args.epochs and not args.resume:
        raise UsageError(f"--start-epoch {args.start_epoch} leaves nothing to train: "
                         f"give less than --epochs {args.epochs}")


def as_dict(args):
    """The arguments as a results folder and a checkpoint keep them."""
    return {name: value for name, value in vars(args).items() if name != "given"}


def run_name(args):
    """Names a run by what sets it apart: data, model, bit-widths, loss (for more than one bit-width), seed."""
    parts = [args.dataset, args.model, "-".join(map(str, args.bit_width_list))]
    if len(args.bit_width_list) > 1:
        parts.append(args.loss)
    if args.all_conv:
        parts.append("allconv")
    return "_".join([*parts, f"seed{args.seed}"])


# ---- data and model

def make_loader(args, device, train):
    """The batches, on device, of the training split, or of the split to validate on.

    The training loader's batch_sampler is a ShuffledBatches. UserError where the data is missing or damaged.
    """
    row = DATASETS[args.dataset]
    split = args.train_split if train else row.val_split[args.train_split]
    with distributed.one_at_a_time_per_machine():  # the first may have to download it
        dataset = get_dataset(args.dataset, split, data_dir=args.data_dir)
    classes, root = getattr(dataset, "classes", None), getattr(dataset, "root", None)
    if train and args.train_fraction < 1:
        chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(args.seed))
        dataset = Subset(dataset, chosen[:max(1, round(args.train_fraction * len(dataset)))].tolist())
    batches = ShuffledBatches(len(dataset), args.batch_size, args.seed, rank(), world_size()) if train else None
    batch_size = images_per_process(args)
    place = memory_for(args, split, len(dataset), device) if row.in_memory and not args.plain else None
    if place:  # without the random transforms, which are drawn on the device
        images, labels = read_arrays(Transformed(dataset, get_transform(args.dataset, False, False)), args.workers)
        # To validate on (a training batch is as batches say). Nothing is kept for a backward pass, so there is room; what
        # is compiled is so for batches of one size.
        batch_size = batch_size if args.compile else 4 * batch_size
        return InMemoryLoader(images.to(place), labels.to(place), args.dataset, device, batches, batch_size, rank(),
                              world_size())

    dataset = Transformed(dataset, get_transform(args.dataset, train, normalized=args.plain))
    if train:
        dataset, how = SeededSamples(dataset), {"batch_sampler": batches}
    else:
        how = {"batch_size": batch_size, "sampler": range(rank(), len(dataset), world_size())}
    dataset.classes, dataset.root = classes, root
    # A generator of its own: making an iterator must not draw from the training's random numbers.
    loader = DataLoader(dataset, generator=torch.Generator(), num_workers=args.workers, pin_memory=device.type == "cuda",
                        persistent_workers=args.workers > 0, prefetch_factor=4 if args.workers else None,
                        worker_init_fn=utils.ignore_stop_signals, **how)
    return WorkerLoader(loader, args.dataset, device)


def images_per_process(args):
    return max(1, args.batch_size // world_size())


def memory_for(args, split, num_images, device):
    """Where the images of an in-memory split lie, with half of the memory left free: on device, else the host; None
    where they fit in neither. Says so where it is not the device."""
    needed = num_images * 3 * DATASETS[args.dataset].image_size ** 2
    host = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host
    if needed <= min(free, host) / 2:  # on their way to the device they pass through the host's
        return device
    place = torch.device("cpu") if device.type == "cuda" and needed <= host / 2 else None
    if not place:
        device, free = "the host", host
    if rank() == 0:
        print(f"{args.dataset} {split}: {needed / 2**20:.0f} MiB are more than half of what is free on {device} "
              f"({free / 2**20:.0f} MiB): {'kept in host memory' if place else 'read anew every epoch'}")
    return place


def count_classes(args, *loaders):
    """The number of classes; UserError where the loaders' class folders differ, and so their labels."""
    known = DATASETS[args.dataset].num_classes
    if known:
        return known
    first, *others = [loader.dataset for loader in loaders]
    for other in others:
        odd = sorted(set(first.classes) ^ set(other.classes))
        if odd:
            raise UserError(f"{first.root} and {other.root} must hold the same class folders: "
                            f"{len(odd)} stand in only one of them, {odd[0]} for one")
    return len(first.classes)


def make_model(args, num_classes):
    return MODELS[args.model](args.bit_width_list, num_classes=num_classes, width=args.width, all_conv=args.all_conv)


def make_optimizer(args, parameters, device, captures=False):
    """The optimizer; where it captures, one whose steps a CUDA graph can hold: they read the learning rate on the device."""
    how = {"lr": torch.tensor(args.lr, device=device) if captures else args.lr, "weight_decay": args.weight_decay,
           "fused": None if args.plain else True}
    if args.optimizer == "adam":
        return torch.optim.Adam(parameters, capturable=captures, **how)
    return torch.optim.SGD(parameters, momentum=0.9, **how)


def set_learning_rate(optimizer, lr):
    for group in optimizer.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def make_computation(args, model, device):
    """The Computation that args ask for; says so where --compile does not work here.

    UserError where the device lacks the precision.
    """
    check_precision(args.precision, device)
    reason = missing_compiler(device) if args.compile else None
    if reason and rank() == 0:
        print(f"--compile needs a compiler that works here, and is left out: {reason}")
    compiles = args.compile and not reason
    if not args.plain and device.type == "cpu" and fused.load()[1] and rank() == 0:
        print(f"models/fused.c could not be compiled here, and without it training takes longer: {fused.load()[1]}")
    return Computation(model, device, args.plain, args.precision, compiles, images_per_process(args))


def learning_rate(args, epoch):
    """The learning rate of epoch 0, 1, ...: a function of the epoch alone, so a resumed run cannot be out of step."""
    return args.lr * 0.1 ** bisect.bisect_right(args.lr_decay, epoch)


# ---- loop and evaluation

def train_one_epoch(loader, step, metrics, read_every, what, wishes, after_step):
    """Train over `loader` by `step`, a TrainingStep, adding to `metrics`.

    wishes() gives a tensor that is summed over the processes along with the gradients; after_step(sum) runs after the
    step. UserError, beginning with `what`, where a loss is not finite: that is looked at every read_every steps.
    """
    step.computation.model.train()
    batches = loader.batch_sampler
    start = time.perf_counter()
    for images, labels in loader:
        row, wished = step(images, labels, len(labels) / batches.size(metrics.steps), wishes())
        metrics.add(row, len(labels))
        now = time.perf_counter()
        metrics.seconds += now - start
        start = now
        if metrics.steps % read_every == 0:
            metrics.check_finite(what)  # a synchronisation point
        after_step(wished)
    metrics.check_finite(what)  # waits for the device, so that the time is that of the work
    metrics.seconds += time.perf_counter() - start


@torch.no_grad()
def evaluate(computation, loader, bit_widths, what="validation", after_batch=lambda: None):
    """{bit_width: {"loss", "top1", "top5"}} of the model over the loaders of all processes, every image counted once.

    after_batch() runs after every batch. UserError, beginning with `what`, where a loss is not finite.
    """
    model = computation.model
    model.eval()
    layers = switchable_layers(model)
    metrics = Metrics(bit_widths, computation.device)
    for images, labels in loader:
        results = {}
        with computation.share(model, images) as shared:
            for bits in bit_widths:
                set_bit_width(layers, bits)
                results[bits] = computation.forward(*shared(), labels)
        metrics.add(Metrics.row(results, labels), len(labels))
        after_batch()
    metrics.check_finite(what)
    return metrics.averages()


# ---- checkpoint

def random_state(device):
    version, internal, gauss = random.getstate()
    name, keys, *rest = numpy.random.get_state()
    return {"python": [version, list(internal), gauss], "numpy": [name, keys.tolist(), *rest],
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None}


def set_random_state(state, device):
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    numpy.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


def take_up(args, checkpoint):
    """Give a resumed run's arguments the values of the run it goes on from, in place, where no flag sets them.

    UsageError where a flag contradicts what must stay.
    """
    for name, kind in (("epoch", int), ("best_prec1", (int, float, torch.Tensor)), ("optimizer", dict)):
        if not isinstance(checkpoint.get(name), kind):
            raise UserError(f"{args.resume} holds no {name} to go on with: start a new run from it with --pretrain")
    saved = saved_arguments(args, checkpoint, args.resume)
    changed = [f"--{name.replace('_', '-')} was {utils.flag_text(saved[name])} and is now "
               f"{utils.flag_text(getattr(args, name))}"
               for name in FIXED_ON_RESUME if name in args.given and name in saved and getattr(args, name) != saved[name]]
    if changed:
        raise UsageError(f"--resume {args.resume} goes on with the run as it was started, but {'; '.join(changed)}: "
                         "leave these flags out, or start a new run from it with --pretrain")
    for name, value in saved.items():
        if name not in args.given and name not in ("results_dir", "device"):  # this machine's, not that one's
            setattr(args, name, value)
    args.start_epoch = checkpoint["epoch"]
    check_bit_widths(args.bit_width_list)


def saved_arguments(args, checkpoint, path):
    """The arguments that a checkpoint was trained with; of a published one what its model tells."""
    model = checkpoint.get("model", args.model if "model" in args.given else None)
    if model not in list(MODELS):
        raise UserError(f"{path} is of model {model!r}: choose a checkpoint of {', '.join(MODELS)}")
    return checkpoint.get("arguments") or {
        "model": model, "dataset": published.DATASET[model], "bit_width_list": saved_bit_widths(checkpoint["state_dict"])}


def open_evaluated(args):
    """(path, checkpoint) to evaluate; what no flag sets in args is taken from it, in place.

    UsageError where flags differ.
    """
    if args.pretrain:
        path = published.find_checkpoint(args.pretrain, "model_best.pth.tar")
    else:
        path = published.find_checkpoint(args.resume, "model_latest.pth.tar", "model_best.pth.tar")
    checkpoint = utils.load_checkpoint(path)
    with utils.reading(path):
        saved = saved_arguments(args, checkpoint, path)
        for name in OF_EVALUATION:
            if name in saved and name not in args.given:
                setattr(args, name, saved[name])
            elif name in OF_NETWORK and name in saved and getattr(args, name) != saved[name]:
                flag = name.replace("_", "-")
                raise UsageError(f"--{flag} {getattr(args, name)} is not what {path} holds ({flag} {saved[name]}): "
                                 "leave the flag out")
        complete(args)
        trained = saved_bit_widths(checkpoint["state_dict"])
    if not trained:
        raise UserError(f"{path} does not fit the model: it has BatchNorms for no bit-width")
    if "bit_width_list" not in args.given:
        args.bit_width_list = trained
    unknown = [bits for bits in args.bit_width_list if bits not in trained]
    if unknown and args.calibrate is None:
        raise UsageError(f"{utils.flag_text(unknown)} bits {'was' if len(unknown) == 1 else 'were'} not trained; "
                         f"choose from {utils.flag_text(trained)}, or pass --calibrate N")
    return path, checkpoint


def evaluate_checkpoint(args, device, path, checkpoint):
    """--evaluate: write evaluation.json, the table and the picture; returns the results folder."""
    saved = saved_arguments(args, checkpoint, path)
    present = saved_bit_widths(checkpoint["state_dict"])
    calibrated = list(checkpoint.get("calibrated", ()))  # by an earlier --save-calibrated
    trained = [bits for bits in present if bits not in calibrated]
    bit_widths = args.bit_width_list
    args.bit_width_list = trained
    name = f"{run_name(args)}_evaluation"
    val_loader = make_loader(args, device, train=False)
    if args.calibrate and not set(bit_widths) <= set(present):
        train_loader = make_loader(args, device, train=True)
        if args.calibrate > len(train_loader):
            raise UsageError(f"--calibrate {args.calibrate} is more than the {len(train_loader)} batches of "
                             f"{args.train_split}: give at most that")
        batches = train_loader.batch_sampler
        batches.rank, batches.world_size, batches.stop = 0, 1, args.calibrate  # every process sees the whole batches
    args.bit_width_list = sorted({*present, *bit_widths})
    with utils.reading(path):
        model = make_model(args, count_classes(args, val_loader)).to(device)
    state_dict, added = fit_bit_widths(checkpoint["state_dict"], args.bit_width_list)
    utils.load_weights(model, state_dict, path)
    computation = make_computation(args, model, device)
    if args.save_calibrated:
        target = Path(args.save_calibrated)
        if target.exists():
            raise UserError(f"--save-calibrated {target} exists: remove it, or give another name")
        target.parent.mkdir(parents=True, exist_ok=True)
    folder = open_results_folder(args, name)
    log.info("evaluating %s, a %s trained at %s bits, on %s (%s) on %s", path, args.model, utils.flag_text(trained),
             args.dataset, DATASETS[args.dataset].val_split[args.train_split], utils.describe(device))

    for bits, origin in added.items():
        if args.calibrate:
            with computation.autocast():
                calibrate(model, bits, (images for images, _ in train_loader))
        log.info("%d bits was not trained: BatchNorm of %d bits%s", bits, origin,
                 f", statistics re-estimated over {args.calibrate} training batches" if args.calibrate else "")
    results = evaluate(computation, val_loader, bit_widths)
    if rank() > 0:
        return folder

    utils.write_json(folder / "config.json", {
        "arguments": {**as_dict(args), "bit_width_list": trained}, "seed": args.seed, "command": sys.argv,
        "checkpoint": str(path), "epoch": checkpoint.get("epoch"), **utils.environment(device)})
    utils.write_json(folder / "evaluation.json", results)
    report.save_evaluation_figure(folder / "accuracy.png", results, name)
    log.info("\n%s\n", report.evaluation_table(results, trained))
    if args.save_calibrated:
        utils.save_checkpoint(target, {
            "epoch": checkpoint.get("epoch"), "model": args.model, "state_dict": model.state_dict(),
            "best_prec1": checkpoint.get("best_prec1"), "optimizer": None, "calibrated": sorted({*calibrated, *added}),
            "arguments": {**saved, **{name: getattr(args, name) for name in OF_EVALUATION},
                          "bit_width_list": trained_bit_widths(model)}})
        log.info("calibrated checkpoint: %s", target)
    log.info("evaluation.json and accuracy.png are in %s", folder)
    return folder


# ---- main

def seed_random_numbers(seed):
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def open_results_folder(args, name, in_place=False):
    """The results folder, which rank 0 makes and logs to; its path on every process."""
    return distributed.from_first(
        utils.open_results_folder(args.results_dir, name, in_place) if rank() == 0 else None)


def open_resumed(args):
    """(path, checkpoint, whether it goes on in its own folder) of --resume; args get the run's values, in place."""
    path = published.find_checkpoint(args.resume, "model_latest.pth.tar", "model_best.pth.tar")
    checkpoint = utils.load_checkpoint(path)
    with utils.reading(path):
        take_up(args, checkpoint)
        complete(args)
    # From an older checkpoint than the folder's latest a run goes on in a folder of its own, losing neither.
    latest = path.with_name("model_latest.pth.tar")
    if path.parent.name != "ckpt" or path != latest and latest.exists():
        return path, checkpoint, False
    own = path.parent.parent
    args.results_dir = args.results_dir or str(own)
    return path, checkpoint, own.resolve() == Path(args.results_dir).resolve()


def main(args):
    """Train, or evaluate, as args say (see parse_args), writing the results folder; returns its path."""
    device = utils.choose_device(args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)  # helper threads, such as the one that pins memory, use the current device
    with distributed.processes(device, args.timeout):
        if args.evaluate:
            with distributed.one_at_a_time_per_machine():  # the first may have to download it
                path, checkpoint = open_evaluated(args)
            seed_random_numbers(args.seed)
            return evaluate_checkpoint(args, device, path, checkpoint)
        # Where torchrun has started the run again after a process died, it goes on with what it had begun.
        begun = distributed.from_first(utils.begun_by_this_launch(args.results_dir) if rank() == 0 else None)
        if begun:
            args.results_dir = str(begun)
            if (begun / "ckpt" / "model_latest.pth.tar").exists():
                args.resume = str(begun)
        path, checkpoint, in_place = None, None, False
        if args.resume:
            with distributed.one_at_a_time_per_machine():
                path, checkpoint, in_place = open_resumed(args)
        seed_random_numbers(args.seed)
        return train(args, device, path, checkpoint, in_place)


def train(args, device, path, checkpoint, in_place):
    """Train, from the checkpoint at `path` where there is one; returns the results folder."""
    train_loader, val_loader = make_loader(args, device, train=True), make_loader(args, device, train=False)
    with utils.reading(path) if checkpoint else contextlib.nullcontext():
        model = make_model(args, count_classes(args, train_loader, val_loader)).to(device)
    if args.sync_bn:
        distributed.synchronise_batch_norm(model)
    if rank() > 0:  # the same weights, but dropout of its own
        torch.manual_seed(args.seed + 1_000_003 * rank())
    computation = make_computation(args, model, device)
    captures = computation.compiles and device.type == "cuda" and world_size() == 1
    optimizer = make_optimizer(args, model.parameters(), device, captures)
    step = TrainingStep(computation, optimizer, args.bit_width_list, args.loss, captures)
    batches = train_loader.batch_sampler
    bit_widths = args.bit_width_list
    highest = max(bit_widths)
    best = -math.inf
    metrics = Metrics(bit_widths, device)
    if checkpoint:
        utils.load_weights(model, checkpoint["state_dict"], path)
        utils.load_optimizer(optimizer, checkpoint["optimizer"], path)
        with utils.reading(path):
            if checkpoint.get("scaler"):
                step.scaler.load_state_dict(checkpoint["scaler"])
            if in_place:
                best = float(checkpoint["best_prec1"])
            if "metrics" in checkpoint:
                metrics.load_state_dict(checkpoint["metrics"], first=rank() == 0)
                states = checkpoint["random_states"]  # a process that the saved run did not have keeps its fresh one
                if rank() < len(states):
                    set_random_state(states[rank()], device)
        if metrics.steps and checkpoint["num_samples"] != batches.num_samples:
            raise UserError(f"{path} stands inside an epoch of {checkpoint['num_samples']} images, but {args.train_split} "
                            f"of {args.dataset} has {batches.num_samples}: resume on the same data")
    elif args.pretrain:
        with distributed.one_at_a_time_per_machine():
            path = published.find_checkpoint(args.pretrain, "model_best.pth.tar")
        with utils.reading(path):
            state_dict, added = fit_bit_widths(utils.load_checkpoint(path)["state_dict"], bit_widths)
        utils.load_weights(model, state_dict, path)

    folder = open_results_folder(args, run_name(args), in_place)
    arguments = as_dict(args)
    metrics_file = folder / "metrics.jsonl"
    history, writer = [], None
    if rank() == 0:
        utils.write_json(folder / "config.json", {
            "arguments": arguments, "seed": args.seed, "command": sys.argv, "processes": world_size(),
            "launch": distributed.launch(), **utils.environment(device)})
        history = utils.keep_epochs(metrics_file, args.start_epoch)
        writer = SummaryWriter(str(folder / "summary"), purge_step=args.start_epoch + 1)

    log.info("%s on %s (%s), %s bits, %s loss, on %s%s%s", args.model, args.dataset, args.train_split,
             utils.flag_text(bit_widths), args.loss if len(bit_widths) > 1 else "hard", utils.describe(device),
             " (no GPU found)" if args.device == "auto" and device.type == "cpu" else "",
             f", {world_size()} processes" if world_size() > 1 else "")
    if args.pretrain and not checkpoint and added:
        log.info("initialised from %s: BatchNorms of %s", path,
                 ", ".join(f"{bits} bits (as those of {origin} bits)" for bits, origin in added.items()))
    if checkpoint:
        log.info("resuming in %s: %d of %d epochs done%s", folder, args.start_epoch, args.epochs,
                 "" if args.start_epoch < args.epochs else ", nothing is left to train (--epochs)")
    else:
        log.info("writing to %s", folder)

    def save(epoch, metrics, names=("model_latest",)):
        """Save a checkpoint of `epoch` epochs done, and metrics.steps steps of the next; never a diverged one.

        All processes call it and return when it is written.
        """
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise UserError(f"epoch {epoch + 1}, step {metrics.steps}: the weights are not finite: lower --lr; "
                            "the last good checkpoint is kept")
        distributed.share_buffers(model)
        state = {
            "epoch": epoch, "model": args.model, "state_dict": model.state_dict(), "best_prec1": best,
            "optimizer": optimizer.state_dict(), "scaler": step.scaler.state_dict(), "arguments": arguments,
            "step": metrics.steps, "num_samples": batches.num_samples, "metrics": metrics.state_dict(),
            "random_states": distributed.gather(random_state(device))}
        if rank() == 0:
            for name in names:
                utils.save_checkpoint(folder / "ckpt" / f"{name}.pth.tar", state)
        distributed.wait()

    if not in_place:
        save(args.start_epoch, metrics)  # shows before an hour's work whether it can be saved

    console = utils.Console(bit_widths, args.epochs, len(batches), args.print_freq, rank() == 0 and sys.stdout.isatty())
    last_save = time.monotonic()
    wished = None

    def wishes():
        """Whether this process was asked to stop, and whether it is time to save by rank 0's clock."""
        due = rank() == 0 and args.save_every and time.monotonic() - last_save > 60 * args.save_every
        values = float(stop.signal is not None), float(bool(due))
        if world_size() == 1:
            return torch.tensor(values)  # on the CPU, where reading them waits for nothing
        return torch.stack([torch.full((), value, device=device) for value in values])  # no copy from here, no waiting

    def stop_or_save(flags):
        """Between steps: save if it is time to, or if any process was asked to stop; then all stop."""
        nonlocal last_save, wished
        wished = flags if wished is None else wished + flags
        if wished.device.type == "cuda" and metrics.steps % args.print_freq and metrics.steps < len(batches):
            return  # reading it would wait for the device: at the next log point
        asked, due = wished.tolist()
        wished = None
        if asked or due:
            metrics.check_finite(f"epoch {epoch + 1}, training")
            save(epoch, metrics)
            last_save = time.monotonic()
        if asked:
            raise Stopped(stop.signal or signal.SIGTERM, f"in epoch {epoch + 1}, after step {metrics.steps} of "
                          f"{len(batches)}; to go on: "
                          f"{shlex.join([sys.executable, sys.argv[0], '--resume', str(folder.resolve())])}")

    def after_step(flags):
        console.step(epoch, metrics)
        stop_or_save(flags)

    def after_batch():  # of the validation: several processes would have to ask each other
        if world_size() == 1:
            stop_or_save(wishes())

    with utils.StopRequest() as stop:
        for epoch in range(args.start_epoch, args.epochs):
            lr = learning_rate(args, epoch)
            set_learning_rate(optimizer, lr)
            batches.epoch, batches.start = epoch, metrics.steps
            train_one_epoch(train_loader, step, metrics, 1 if args.plain else args.print_freq,
                            f"epoch {epoch + 1}, training", wishes, after_step)
            if world_size() > 1:
                save(epoch, metrics)  # several do not stop within the validation; it shares the BatchNorm statistics too
            trained = metrics.state_dict()
            record = {"epoch": epoch + 1, "lr": lr, "images_per_second": trained["count"] / trained["seconds"],
                      "train": metrics.averages(),
                      "val": evaluate(computation, val_loader, bit_widths, f"epoch {epoch + 1}, validation", after_batch)}

            history.append(record)
            if rank() == 0:
                utils.append_json_line(metrics_file, record)
                utils.write_summary(writer, record)
            console.row(record)
            improved = record["val"][highest]["top1"] > best
            best = max(best, record["val"][highest]["top1"])
            metrics = Metrics(bit_widths, device)
            save(epoch + 1, metrics, ("model_best", "model_latest") if improved else ("model_latest",))
            last_save = time.monotonic()

    if rank() > 0:
        return folder
    writer.close()
    if history:  # a finished run, resumed into another folder, has none
        report.save_training_figure(folder / "accuracy.png", history, run_name(args))
        log.info("\n%s\n", report.best_and_last(history))
    log.info("checkpoints, metrics.jsonl and accuracy.png are in %s", folder)
    return folder


if __name__ == "__main__":
    utils.run(main, parse_args)
