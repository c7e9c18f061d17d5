"""The command line of train.py."""
import argparse
import math
import os
import sys
from argparse import ArgumentTypeError, Namespace

from dataset.data import DATASETS
from engine.distributed import rank, world_size
from engine.errors import UsageError
from engine.forward_pass import PRECISIONS
from models import DEFAULT_WIDTH, MODELS, QUANTIZERS, check_bit_widths, zoo
from models.losses import NEXT_TARGET
from utils import flag_text, one_line

# What decides how a run trains; told at the start where it is left to the defaults.
OF_SCHEDULE = ("epochs", "batch_size", "optimizer", "lr", "lr_decay", "weight_decay")


def number(kind, least, most=2**31 - 1, above=False):
    """Return a type: a number of `kind`, int or float, from `least` up (or above it) to `most`."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if least < value <= most or value == least and not above:
            return value
        name = "whole number" if kind is int else "number"
        allowed = f"above {least}" if above else f"from {least} up"
        raise ArgumentTypeError(
            f"{text!r} is not allowed: give a {name} {allowed}, at most {most:.10g}")
    return parse


def bit_width_list(text):
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    try:
        return [width.plain for width in sorted(check_bit_widths(parts))]
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def model_name(text):
    if text in MODELS:
        return text
    if not zoo.is_torchvision(text):
        raise ArgumentTypeError(f"{text!r} (choose from {', '.join(MODELS)}, or "
                                f"{zoo.PREFIX}NAME, such as {zoo.PREFIX}resnet18)")
    try:
        return zoo.check_name(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def epoch_list(text):
    parts = text.split(",") if text.strip() else []
    epochs = [int(part) if part.strip().isdecimal() else 0 for part in parts]
    if 0 in epochs or sorted(set(epochs)) != epochs:
        raise ArgumentTypeError(
            f"{text!r} is not a list of rising epochs from 1 up, such as 100,150,180")
    return epochs


def source(text):
    return None if text in ("", "None") else text  # as published scripts write it


class HelpFormatter(argparse.HelpFormatter):
    def _get_help_string(self, action):
        if action.default in (None, False, argparse.SUPPRESS):
            return action.help
        return f"{action.help} (default: {flag_text(action.default)})"


class OneLineParser(argparse.ArgumentParser):
    """Tells of a wrong argument in one line, and defaults in the help."""

    def __init__(self, description, **kwargs):
        super().__init__(description=description, allow_abbrev=False, formatter_class=HelpFormatter,
                         **kwargs)

    def error(self, message):
        told = f"{self.prog}: error: {one_line(message)} (--help lists the arguments)\n"
        self.exit(UsageError.exit_code, told if rank() == 0 else None)


def make_parser(description=None):
    parser = OneLineParser(description, epilog="--recipe FLAG...: all that follows counts where "
                           "neither a flag nor a checkpoint says otherwise")
    add_training(parser.add_argument)
    add_running(parser.add_argument)
    return parser


def add_training(add):
    def add_choice(flag, names, default, told=""):
        add(flag, choices=names, default=default, metavar="NAME", help=", ".join(names) + told)

    widths = ", ".join(f"{width} for {name}" for name, width in DEFAULT_WIDTH.items())
    add_choice("--dataset", DATASETS, "digits")
    add("--train_split", "--train-split", help="unset: train, for svhn train_extra")
    add("--train-fraction", type=number(float, 0, 1, above=True), default=1.0,
        help="train on this part of the training split, drawn by the seed; for short honest trials")
    add("--model", type=model_name, default="svhnq", metavar="NAME",
        help=f"{', '.join(MODELS)}, or {zoo.PREFIX}NAME, such as {zoo.PREFIX}resnet18")
    add("--width", type=number(int, 1), help=f"width multiplier; unset: {widths}")
    add("--all-conv", action="store_true", help="quantize stem's and shortcuts' weights too")
    add("--bit_width_list", "--bit-width-list", type=bit_width_list, default=[1, 2, 4, 8, 32],
        metavar="K,...", help="bit-widths, of 1 to 8 and 32, such as 4, or w2a4 for 2 bits of "
        "weights and 4 of activations; a single one trains a dedicated model")
    add_choice("--quantizer", QUANTIZERS, "dorefa", ": of weights and activations")
    add_choice("--loss", NEXT_TARGET, "recursive", ": what teaches each lower bit-width: the "
               "labels, the highest or the next higher")
    add("--epochs", type=number(int, 1), default=30, help="passes over the split")
    add("--start-epoch", type=number(int, 0), default=0, help="epochs taken as done by --lr_decay")
    add("--batch-size", type=number(int, 1), default=128, help="images a step, over all processes")
    add_choice("--optimizer", ("adam", "adamw", "sgd"), "adam", " (momentum 0.9)")
    add("--lr", type=number(float, 0, 1e30, above=True), default=0.001, help="learning rate")
    add_choice("--schedule", ("step", "cosine"), "step",
               ", of the learning rate: --lr_decay, or half a cosine over --epochs")
    add("--lr_decay", "--lr-decay", type=epoch_list, default=[15, 22, 27], metavar="N,...",
        help='epochs after which the learning rate is divided by 10; "" for never')
    add("--weight-decay", type=number(float, 0, 1e30), default=0.0,
        help="L2 penalty, adamw's decoupled; 0 is off")
    add("--widths-per-step", type=number(int, 2), metavar="N",
        help="bit-widths that a step visits: the highest, the lowest and N - 2 of those between, "
        "drawn by the seed; unset: all")
    add_choice("--precision", PRECISIONS, "fp32", ": of the convolutions' operands")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="of weights, data and dropout")


def add_running(add):
    add("--data-dir", help="folder that holds the data sets' folders; unset: data")
    add("--pretrain", type=source, help="start from these weights: a checkpoint, a folder with "
        "model_best.pth.tar, a URL, or a published name")
    add("--resume", type=source, help="go on with a run: its results folder, or a checkpoint")
    add("--evaluate", action="store_true", help="no training: the accuracy of --pretrain (or "
        "--resume) at every bit-width of the list; unset list: all it has")
    add("--calibrate", type=number(int, 0), help="with --evaluate: for a bit-width that was not "
        "trained, start from the nearest that was and re-estimate BatchNorm's statistics over this "
        "many training batches (0: as it is)")
    add("--save-calibrated", metavar="FILE", help="with --calibrate: keep it as a checkpoint")
    add("--results-dir", help="where the run is written; the same command goes on with what is "
        "there; unset: a new folder under results/, named after the run")
    add("--device", default="auto", help="auto (GPU with the most free memory), cpu, cuda, cuda:i")
    add("--compile", action=argparse.BooleanOptionalAction, default=False,
        help="torch.compile, a graph per bit-width; minutes to begin with")
    add("--workers", type=number(int, 0), default=0, help="processes that load data; 0: this one")
    add("--sync-bn", action="store_true", help="several processes: BatchNorm by the statistics of "
        "the whole batch; unset: of each process's part, as published")
    add("--timeout", type=number(int, 1), default=600, help="seconds to wait for other processes")
    add("--save-every", type=number(float, 0, above=True), help="minutes between saves in an epoch")
    add("--print-freq", "-p", type=number(int, 1), default=50, help="steps between progress lines")


DEFAULTS = vars(make_parser().parse_args([]))


def parse_flags(argv=None, description=None):
    """Return the arguments that argv sets, as a namespace; those after --recipe in its `recipe`.

    Where one is wrong, ends with one line on stderr and exit code 2.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    end = argv.index("--recipe") if "--recipe" in argv else len(argv)
    parser = make_parser(description)
    unset = dict.fromkeys(DEFAULTS)
    parsed = (parser.parse_args(part, Namespace(**unset)) for part in (argv[:end], argv[end + 1:]))
    given, recipe = ({name: value for name, value in vars(part).items() if value is not None}
                     for part in parsed)
    flags = Namespace(**given, recipe=recipe)
    try:
        check_purpose(Namespace(**{**DEFAULTS, **given}))
        if "resume" not in given and "evaluate" not in given:
            settle(flags)
    except UsageError as error:
        parser.error(str(error))
    return flags


def check_purpose(args):
    """Raise UsageError where training, evaluating and their sources do not go together."""
    if args.evaluate and not (args.pretrain or args.resume):
        raise UsageError("--evaluate needs something to evaluate: give --pretrain SOURCE")
    if args.pretrain and args.resume:
        raise UsageError(f"--pretrain {args.pretrain} and --resume {args.resume}: give one of them")
    if args.calibrate is not None and not args.evaluate:
        raise UsageError(f"--calibrate {args.calibrate} goes with --evaluate: give both or neither")
    if args.save_calibrated and args.calibrate is None:
        raise UsageError(
            f"--save-calibrated {args.save_calibrated} goes with --calibrate: give both")


def settle(flags, saved=None, guessed=None):
    """Return all arguments: given, else saved, else the recipe's, else guessed, else default.

    Raises UsageError where they do not go together.
    """
    given = dict(vars(flags))
    recipe = given.pop("recipe", {})
    args = Namespace(**{**DEFAULTS, **(guessed or {}), **recipe, **(saved or {}), **given})
    args.train_split = args.train_split or next(iter(DATASETS[args.dataset].val_split))
    args.width = args.width or DEFAULT_WIDTH.get(args.model, 1)
    if args.schedule == "cosine":
        if given.get("lr_decay"):
            raise UsageError(f"--lr_decay {flag_text(args.lr_decay)} goes with --schedule step: "
                             'leave it out, or "", with --schedule cosine')
        args.lr_decay = []  # whatever a recipe or the default says
    check_settings(args)
    return args


def check_settings(args):
    """Raise UsageError where the settings of a run do not go together."""
    data, count = DATASETS[args.dataset], world_size()
    if args.train_split not in data.val_split:
        raise UsageError(f"--train_split {args.train_split!r} does not exist for {args.dataset}: "
                         f"choose from {', '.join(data.val_split)}")
    size = data.image_size
    if args.model == "svhnq" and size != 40:
        raise UsageError(f"--model svhnq takes 40 x 40 images and {args.dataset} has {size} x "
                         f"{size}: choose --model resnet20q or resnet50q")
    if zoo.is_torchvision(args.model) and (args.width != 1 or args.all_conv):
        flag = "--all-conv" if args.all_conv else f"--width {args.width}"
        raise UsageError(f"{flag} is of {', '.join(MODELS)}: leave it out with --model "
                         f"{args.model}")
    if args.precision not in PRECISIONS:  # an older run's
        raise UsageError(f"--precision {args.precision} does not exist: choose from "
                         f"{', '.join(PRECISIONS)}, to train on with --pretrain")
    if args.compile and args.sync_bn:
        raise UsageError("--sync-bn exchanges statistics within the network, which --compile "
                         "cannot: give one of them")
    if args.evaluate:
        return
    if args.batch_size % count:
        raise UsageError(f"--batch-size {args.batch_size} is that of all {count} processes: give "
                         f"a multiple of {count}")
    if count > 1 and args.device.startswith("cuda:"):
        raise UsageError(f"--device {args.device} is one GPU for {count} processes: give cuda, "
                         "each takes its own")
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0))
    if restarts and not args.results_dir and not args.resume:
        raise UsageError(f"--max-restarts {restarts} goes on from the results folder after a "
                         "process died: name it with --results-dir")
    if args.start_epoch >= args.epochs and not args.resume:
        raise UsageError(f"--start-epoch {args.start_epoch} leaves nothing to train: give less "
                         f"than --epochs {args.epochs}")


def flag_name(name):
    return f"--{name.replace('_', '-')}"


def run_name(args):
    """Name a run by what sets it apart: data, model, bit-widths, loss, widths per step, seed."""
    parts = [args.dataset, args.model.replace(":", "-"), "-".join(map(str, args.bit_width_list))]
    parts += [args.loss] * (len(args.bit_width_list) > 1) + ["allconv"] * args.all_conv
    parts += [args.quantizer] * (args.quantizer != DEFAULTS["quantizer"])
    parts += [f"{args.widths_per_step}perstep"] if args.widths_per_step else []
    return "_".join([*parts, f"seed{args.seed}"])
