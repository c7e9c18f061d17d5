"""The command line of train.py."""
import argparse
import errno
import math
import os
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple, NoReturn

from dataset.data import DATASETS, add_folder, named_datasets
from dataset.folder import PREFIX, is_folder
from engine.distributed import rank, world_size
from engine.errors import UsageError, UserError
from engine.forward_pass import AUTO, PRECISIONS
from engine.setup import OPTIMIZERS
from models import DEFAULT_WIDTH, MODELS, QUANTIZERS, highest_first, zoo
from models.losses import NEXT_TARGET
from utils import brief, flag_text, one_line, without_secrets

# Kinds of flags.
NETWORK = "network"  # builds the network: an evaluation's is its checkpoint's
RUN = "run"  # sets a run apart: cannot change on resume
SCHEDULE = "schedule"  # likewise, and the log names those left to their defaults
MACHINE = "machine"  # where a run computes, how fast, what it prints: may change on resume
TASK = "task"  # what a command does


class Flag(NamedTuple):
    """The properties of a flag that do not concern its parsing.

    evaluated: an evaluation takes it from the checkpoint, unless the command line sets it.
    identifies: each run's files must say it, and reports name a run by it.
    """
    kind: str
    evaluated: bool = False
    identifies: bool = False


NAME_LENGTH = 40  # characters of a folder's name in that of a run
FLAGS: dict[str, Flag] = {}  # by argument, as add() declares them


def arguments_of(*kinds: str) -> list[str]:
    """Return the names of the arguments of these kinds of flags."""
    return [name for name, flag in FLAGS.items() if flag.kind in kinds]


def number(kind: type[int] | type[float], least: float, most: float = 2**31 - 1,
           above: bool = False) -> Callable[[str], float]:
    """Return a parser of numbers of `kind` from `least` (excluded if `above`) to `most`."""
    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        is_least = value == least and not above
        if is_least or least < value <= most:
            return value

        name = "whole number" if kind is int else "number"
        allowed = f"above {least}" if above else f"from {least} up"
        raise ArgumentTypeError(
            f"{text!r} is not allowed: give a {name} {allowed}, at most {most:.10g}")
    return parse


def bit_width_list(text: str) -> list[int | str]:
    """Parse bit-widths such as 1,2,w2a4; return them lowest first, as files hold them."""
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    try:
        return [width.plain for width in sorted(highest_first(parts))]
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def model_name(text: str) -> str:
    """Parse the name of a network of MODELS, or of torchvision's."""
    if text in MODELS:
        return text
    if not zoo.is_torchvision(text):
        raise ArgumentTypeError(f"{text!r} (choose from {', '.join(MODELS)}, or "
                                f"{zoo.PREFIX}NAME, such as {zoo.PREFIX}resnet18)")
    try:
        return zoo.check_name(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error)) from None


def epoch_list(text: str) -> list[int]:
    """Parse rising epochs such as 100,150,180; empty text is an empty list."""
    parts = text.split(",") if text.strip() else []
    epochs = [int(part) if part.strip().isdecimal() else 0 for part in parts]
    if 0 in epochs or sorted(set(epochs)) != epochs:
        raise ArgumentTypeError(
            f"{text!r} is not a list of rising epochs from 1 up, such as 100,150,180")
    return epochs


def nonempty(text: str) -> str:
    """Parse a name, which is not empty."""
    if not text.strip():
        raise ArgumentTypeError(f"{text!r} is empty, as an unset shell variable is: give a name, "
                                "or leave it out")
    return text


def path_text(text: str) -> str:
    """Parse a path: not empty, no URL, and no symbolic link to itself; ~ is expanded."""
    if "://" in nonempty(text):
        raise ArgumentTypeError(f"{text!r} is a URL: give a path of this machine's files")
    text = os.path.expanduser(text)
    try:
        os.stat(text)
    except OSError as error:  # it may be made later
        if error.errno == errno.ELOOP:
            raise ArgumentTypeError(f"{text!r} leads by symbolic links to itself: give another "
                                    "path") from None
    return text


def dataset_name(text: str) -> str:
    """Parse the name of a data set of DATASETS, or folder:PATH."""
    if is_folder(text):
        path = text.removeprefix(PREFIX)
        if not path.strip():
            raise ArgumentTypeError(f"{text!r} names no folder: give {PREFIX}PATH")
        return PREFIX + path_text(os.path.expanduser(path))  # shells expand no ~ after a colon
    if text not in DATASETS:
        raise ArgumentTypeError(f"{text!r} (choose from {', '.join(named_datasets())}, or "
                                f"{PREFIX}PATH)")
    return text


def source(text: str) -> str:
    """Parse the source of a checkpoint: a path, a URL or a published name."""
    return text if "://" in text else path_text(text)


def source_or_none(text: str) -> str | None:
    """Parse the source of a checkpoint; published scripts write none as None."""
    return None if text == "None" else source(text)


class HelpFormatter(argparse.HelpFormatter):
    def _get_help_string(self, action):
        if any(action.default is value for value in (None, False, argparse.SUPPRESS)):
            return action.help
        return f"{action.help} (default: {flag_text(action.default)})"


class OneLineParser(argparse.ArgumentParser):
    """A parser that reports a wrong argument in one line, and shows defaults in its help."""

    def __init__(self, description: str | None, **kwargs):
        super().__init__(description=description, allow_abbrev=False, formatter_class=HelpFormatter,
                         **kwargs)

    def _get_values(self, action, arg_strings):
        if action.option_strings and arg_strings == ["--"]:  # argparse would drop it, and stumble
            raise argparse.ArgumentError(action, "'--' is no value: give another")
        return super()._get_values(action, arg_strings)

    def error(self, message: str) -> NoReturn:
        """Exit with the message, which rank 0 prints in one line."""
        message = without_secrets(one_line(message))
        text = f"{self.prog}: error: {message} (--help lists the arguments)\n"
        self.exit(UsageError.exit_code, text if rank() == 0 else None)


def add_source(parser: OneLineParser, purpose: str) -> None:
    """Add SOURCE, the checkpoint of a program that reads one, and --dataset and --data-dir.

    purpose: what the program does on the data set, for the help.
    """
    parser.add_argument("source", type=source, metavar="SOURCE", help="a results folder, a "
                        "checkpoint, a packed file, a URL, or a published name, as --pretrain of "
                        "train.py")
    parser.add_argument("--dataset", type=dataset_name, metavar="NAME", help=f"data set to "
                        f"{purpose} on; default: that of the checkpoint")
    parser.add_argument("--data-dir", type=path_text, help="folder that holds the data sets' "
                        "folders; default: data")


def make_parser(description: str | None = None) -> OneLineParser:
    """Return the parser of all flags of train.py, and declare them in FLAGS."""
    parser = OneLineParser(description)

    def add(flag, *names, kind, evaluated=False, identifies=False, **kwargs):
        action = parser.add_argument(flag, *names, **kwargs)
        FLAGS[action.dest] = Flag(kind, evaluated, identifies)

    add_network(add)
    add_training(add)
    add_running(add)
    return parser


def choice(names: Iterable[str], more: str = "") -> dict[str, object]:
    """Return add_argument's keywords for a choice of names; more: the rest of its help."""
    return {"choices": names, "metavar": "NAME", "help": ", ".join(names) + more}


def add_network(add: Callable[..., None]) -> None:
    """Declare the flags of the network."""
    widths = ", ".join(f"{width} for {name}" for name, width in DEFAULT_WIDTH.items())
    add("--model", kind=NETWORK, evaluated=True, identifies=True, type=model_name, default="svhnq",
        metavar="NAME",
        help=f"{', '.join(MODELS)}, or {zoo.PREFIX}NAME, such as {zoo.PREFIX}resnet18")
    add("--width", kind=NETWORK, evaluated=True, type=number(int, 1),
        help=f"width multiplier; default: {widths}")
    add("--all-conv", kind=NETWORK, evaluated=True, action="store_true",
        help="also quantize the weights of the stem and the shortcuts")
    add("--quantizer", kind=NETWORK, evaluated=True, default="dorefa",
        **choice(QUANTIZERS, ": quantizer of weights and activations"))


def add_training(add: Callable[..., None]) -> None:
    """Declare the flags of data, loss and optimization."""
    add("--dataset", kind=RUN, evaluated=True, identifies=True, type=dataset_name, default="digits",
        metavar="NAME", help=f"{', '.join(named_datasets())}, or {PREFIX}PATH: images of your own, "
        "a folder per class, in train/ and val/ or to be split")
    add("--image-size", kind=RUN, evaluated=True, type=number(int, 1), metavar="PIXELS",
        help=f"of {PREFIX}PATH: height and width after the transforms, which are ImageNet's; "
        "default: 224")
    add("--train_split", "--train-split", kind=RUN, evaluated=True, type=nonempty,
        help="split to train on; default: train, for svhn train_extra")
    add("--train-fraction", kind=RUN, type=number(float, 0, 1, above=True), default=1.0,
        help="fraction of the training split to train on, drawn by the seed; for short trials")
    add("--bit_width_list", "--bit-width-list", kind=RUN, identifies=True, type=bit_width_list,
        default=[1, 2, 4, 8, 32], metavar="K,...", help="bit-widths of 1 to 8 and 32, such as 4, "
        "or w2a4 for 2 bits of weights and 4 of activations; one alone trains a dedicated model")
    add("--loss", kind=RUN, evaluated=True, identifies=True, default="recursive",
        **choice(NEXT_TARGET, "; what a lower bit-width learns from: hard = the labels, soft = "
                 "the highest bit-width, recursive = the next higher one, half = the mean of hard "
                 "and soft"))
    add("--widths-per-step", kind=RUN, type=number(int, 2), metavar="N",
        help="bit-widths that a step trains: the highest, the lowest and N - 2 of the others, "
        "drawn by the seed; default: all")
    add("--epochs", kind=SCHEDULE, type=number(int, 1), default=30, help="passes over the split")
    add("--start-epoch", kind=TASK, type=number(int, 0), default=0,
        help="number of the first epoch, from 0; --lr_decay counts those before it")
    add("--batch-size", kind=SCHEDULE, evaluated=True, type=number(int, 1), default=128,
        help="images per step, over all processes")
    add("--optimizer", kind=SCHEDULE, default="adam",
        **choice(OPTIMIZERS, " (momentum 0.9)"))
    add("--lr", kind=SCHEDULE, type=number(float, 0, 1e30, above=True), default=0.001,
        help="learning rate; that of lsq's ranges is ten times it")
    add("--schedule", kind=RUN, default="step",
        **choice(("step", "cosine"), ", of the learning rate: --lr_decay, or half a cosine over "
                 "--epochs"))
    add("--lr_decay", "--lr-decay", kind=SCHEDULE, type=epoch_list, default=[15, 22, 27],
        metavar="N,...", help="--schedule step: epochs after which the learning rate is divided by "
        '10; "" for never')
    add("--weight-decay", kind=SCHEDULE, type=number(float, 0, 1e30), default=0.0,
        help="L2 penalty, adamw's decoupled, of all but quantizers' parameters; 0 is off")
    add("--best-by", kind=RUN, default="highest", **choice(
        ("highest", "mean"), ": model_best.pth.tar is chosen by the top-1 of the highest "
        "bit-width, or by the mean over bit-widths; ties by the other, then the later epoch"))
    add("--precision", kind=RUN, evaluated=True, identifies=True, default=AUTO,
        **choice((AUTO, *PRECISIONS), ": of the convolutions' operands; auto is tf32 on GPUs that "
                 "have it and fp32 elsewhere, and a resumed run keeps its own"))
    add("--seed", kind=RUN, evaluated=True, identifies=True, type=number(int, 0, 2**32 - 1),
        default=0, help="seed of weights, data and dropout")
    add("--sync-bn", kind=RUN, action="store_true", help="with several processes: BatchNorm uses "
        "the statistics of the whole batch; default: of each process's part, as published")


def add_running(add: Callable[..., None]) -> None:
    """Declare the flags of the task and the machine."""
    add("--pretrain", kind=RUN, type=source_or_none,
        help="load these weights first: a checkpoint, a folder with model_best.pth.tar, a URL, a "
        "published name, the float network's state dict for torchvision:NAME, or with --evaluate a "
        "packed file")
    add("--resume", kind=TASK, type=source_or_none,
        help="resume a run: its results folder, or a checkpoint")
    add("--evaluate", kind=TASK, action="store_true", help="do not train: print the accuracy of "
        "--pretrain (or --resume) at every bit-width of the list; default: all that it has")
    add("--calibrate", kind=TASK, type=number(int, 0), help="with --evaluate: a bit-width that was "
        "not trained copies the nearest one that was, and re-estimates BatchNorm's statistics over "
        "this many training batches, or all (0: none)")
    add("--layer_bits", "--layer-bits", kind=TASK, type=path_text, metavar="FILE",
        help="with --calibrate: evaluate the assignments of bits to layers of a JSON file, too, "
        "such as search.py writes")
    add("--save-calibrated", kind=TASK, type=path_text, metavar="FILE",
        help="with --calibrate: save the result as a checkpoint")
    add("--results-dir", kind=MACHINE, type=path_text,
        help="folder of the run; the same command resumes what is there; default: a new folder "
        "under results/, named after the run")
    add("--data-dir", kind=MACHINE, type=path_text,
        help="folder that holds the data sets' folders, in an evaluation too, which takes none "
        "from its checkpoint; default: data")
    add("--device", kind=MACHINE, default="auto",
        help="auto (GPU with the most free memory), cpu, cuda, cuda:i")
    add("--compile", kind=MACHINE, action=argparse.BooleanOptionalAction, default=False,
        help="torch.compile, a graph per bit-width; takes minutes at the start")
    add("--cuda-graph", kind=MACHINE, action=argparse.BooleanOptionalAction, default=False,
        help="on a GPU: record the step as one CUDA graph and replay it, at all bit-widths in one "
        "process; what a layer of your own computes in Python is recorded with it")
    add("--workers", kind=MACHINE, type=number(int, 0), default=0,
        help="processes that load data; 0: the training process")
    add("--timeout", kind=MACHINE, type=number(int, 1), default=600,
        help="seconds to wait for other processes")
    add("--save-every", kind=MACHINE, type=number(float, 0, above=True),
        help="minutes between saves in an epoch")
    add("--print-freq", "-p", kind=MACHINE, type=number(int, 1), default=50,
        help="steps between progress lines")


DEFAULTS = vars(make_parser().parse_args([]))


def parse_flags(argv: list[str] | None = None, description: str | None = None) -> Namespace:
    """Return the arguments that a command line sets, and no others.

    Exits with one line on stderr and exit code 2 where one is wrong.
    """
    parser = make_parser(description)
    parsed = vars(parser.parse_args(argv, Namespace(**dict.fromkeys(DEFAULTS))))
    flags = Namespace(**{name: value for name, value in parsed.items() if value is not None})
    try:
        check_task(Namespace(**{**DEFAULTS, **vars(flags)}))
        if "resume" not in flags and "evaluate" not in flags:
            merge_args(flags)
    except UsageError as error:
        parser.error(str(error))
    return flags


def check_saved(arguments: dict, path: str | Path) -> dict:
    """Return a checkpoint's arguments; UserError naming one that no command line could have set.

    A loss or a data set that is not here, and a precision that there was once, pass: merge_args
    says what to do, where they are needed.
    """
    parser = make_parser()
    actions = {action.dest: action for action in parser._actions}
    for name, value in arguments.items():
        action = actions.get(name)
        if action is None or value is None and (action.default is None or name == "loss"):
            continue  # a published network does not say its loss
        try:
            if isinstance(action.default, bool):
                right = isinstance(value, bool)
            else:
                right = action.type is None or action.type(flag_text(value)) == value
        except (ArgumentTypeError, AttributeError, ValueError):  # a path that is none, too
            right = False
        if name in ("dataset", "loss", "precision"):
            right = isinstance(value, str)
        elif action.type is None and not isinstance(action.default, bool):
            right = isinstance(value, str) and value in (action.choices or [value])
        if not right:
            raise UserError(f"{path}: its argument {name} is {brief(value)}, which "
                            f"{flag_name(name)} does not take: the file may be damaged")
    return arguments


def check_task(args: Namespace) -> None:
    """Raise UsageError for a combination of task flags that has no meaning."""
    if args.evaluate and not (args.pretrain or args.resume):
        raise UsageError("--evaluate needs something to evaluate: give --pretrain SOURCE")
    if args.pretrain and args.resume:
        raise UsageError(f"--pretrain {args.pretrain} and --resume {args.resume}: give one of them")
    if args.calibrate is not None and not args.evaluate:
        raise UsageError(f"--calibrate {args.calibrate} goes with --evaluate: give both or neither")
    if args.layer_bits and args.calibrate is None:
        raise UsageError(f"--layer_bits {args.layer_bits} goes with --evaluate --calibrate N: give "
                         "all three")
    if args.save_calibrated and args.calibrate is None:
        raise UsageError(
            f"--save-calibrated {args.save_calibrated} goes with --calibrate: give both")


def merge_args(flags: Namespace, saved: dict | None = None) -> Namespace:
    """Return all arguments: those that flags set, else the saved ones, else the defaults.

    Raises UsageError for settings that exclude each other.
    """
    args = Namespace(**{**DEFAULTS, **(saved or {}), **vars(flags)})
    if not is_folder(args.dataset) and args.dataset not in DATASETS:  # of other code
        raise UsageError(f"--dataset {args.dataset} does not exist: choose from "
                         f"{', '.join(named_datasets())}, or add its row to dataset/data.py")
    add_folder(args.dataset, args.image_size)
    row = DATASETS[args.dataset]
    if getattr(flags, "image_size", None) and not is_folder(args.dataset):
        raise UsageError(f"--image-size {args.image_size} applies to --dataset {PREFIX}PATH, and "
                         f"{args.dataset} has a size of its own: leave it out")
    args.image_size = row.image_size if is_folder(args.dataset) else None
    args.train_split = args.train_split or next(iter(row.val_split))
    args.width = args.width or DEFAULT_WIDTH.get(args.model, 1)
    if args.schedule == "cosine":
        args.lr_decay = []
    check_settings(args)
    return args


def check_settings(args: Namespace) -> None:
    """Raise UsageError for settings of a run that exclude each other."""
    data = DATASETS[args.dataset]
    count = world_size()
    if args.train_split not in data.val_split:
        raise UsageError(f"--train_split {args.train_split!r} does not exist for {args.dataset}: "
                         f"choose from {', '.join(data.val_split)}")
    size = data.image_size
    if args.model == "svhnq" and size != 40:
        others = "resnet20q or resnet50q"
        if is_folder(args.dataset):
            others += f" or {zoo.PREFIX}resnet18, or --image-size 40"
        raise UsageError(f"--model svhnq takes 40 x 40 images and {args.dataset} has {size} x "
                         f"{size}: choose --model {others}")
    if zoo.is_torchvision(args.model) and (args.width != 1 or args.all_conv):
        flag = "--all-conv" if args.all_conv else f"--width {args.width}"
        raise UsageError(f"{flag} applies to {', '.join(MODELS)}: leave it out with --model "
                         f"{args.model}")
    if args.precision not in (AUTO, *PRECISIONS):  # an older run's
        raise UsageError(f"--precision {args.precision} does not exist: choose from "
                         f"{', '.join(PRECISIONS)}, to train on with --pretrain")
    if args.compile and args.sync_bn:
        raise UsageError("--sync-bn exchanges statistics within the network, which --compile "
                         "cannot: give one of them")
    if args.precision == "bf16" and args.sync_bn:
        raise UsageError("--sync-bn computes in the precision of its input, and BatchNorm stays in "
                         "float32 in --precision bf16: give one of them")
    if count > 1 and args.device.startswith("cuda:"):
        raise UsageError(f"--device {args.device} is one GPU for {count} processes: give cuda, "
                         "each takes its own")
    if args.evaluate:
        return
    if args.loss not in NEXT_TARGET:  # of other code
        raise UsageError(f"--loss {args.loss} does not exist: choose from "
                         f"{', '.join(NEXT_TARGET)}, or add it to models/losses.py")
    if args.cuda_graph and count > 1:
        raise UsageError(f"--cuda-graph takes one process, and there are {count}: give "
                         "--no-cuda-graph")
    if args.cuda_graph and (args.widths_per_step or math.inf) < len(args.bit_width_list):
        raise UsageError(f"--widths-per-step {args.widths_per_step} draws other bit-widths at each "
                         "step, and --cuda-graph replays one: give one of them")
    if args.batch_size % count:
        raise UsageError(f"--batch-size {args.batch_size} is that of all {count} processes: give "
                         f"a multiple of {count}")
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0)
    if restarts and not args.results_dir and not args.resume:
        raise UsageError(f"--max-restarts {restarts} goes on from the results folder after a "
                         "process died: name it with --results-dir")
    if args.start_epoch >= args.epochs and not args.resume:
        raise UsageError(f"--start-epoch {args.start_epoch} leaves nothing to train: give less "
                         f"than --epochs {args.epochs}")


def flag_name(name: str) -> str:
    """Return an argument's name as it is typed."""
    return f"--{name.replace('_', '-')}"


def run_name(args: Namespace) -> str:
    """Return a run's name: data, model, bit-widths, loss if known, the method's flags, seed."""
    dataset = args.dataset
    if is_folder(dataset):
        path = os.path.abspath(dataset.removeprefix(PREFIX))
        dataset = f"folder-{os.path.basename(path)[:NAME_LENGTH]}"
    parts = [dataset, args.model.replace(":", "-"), "-".join(map(str, args.bit_width_list))]
    if len(args.bit_width_list) > 1 and args.loss:
        parts.append(args.loss)
    if args.all_conv:
        parts.append("allconv")
    if args.quantizer != DEFAULTS["quantizer"]:
        parts.append(args.quantizer)
    if args.widths_per_step:
        parts.append(f"{args.widths_per_step}perstep")
    if args.precision not in (AUTO, "fp32"):
        parts.append(args.precision)
    return "_".join([*parts, f"seed{args.seed}"])
