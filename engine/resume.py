"""What a run takes over from a checkpoint: to resume, to go on by the same command, to evaluate."""
from argparse import Namespace
from pathlib import Path

from engine import published
from engine.arguments import DEFAULTS, OF_SCHEDULE, flag_name, settle
from engine.errors import UsageError, UserError, reading
from engine.state import load_checkpoint, refuse_packed
from models import MODELS, BitWidth, saved_bit_widths, zoo
from utils import flag_text

# What the same command may change: where and how fast a run computes, and what it tells.
OF_THE_MACHINE = ("results_dir", "device", "compile", "workers", "timeout", "save_every",
                  "print_freq", "data_dir")
# What an evaluation takes from its checkpoint where no flag sets it; the network's must agree.
OF_NETWORK = {"model", "width", "all_conv", "quantizer"}
OF_EVALUATION = (*OF_NETWORK, "dataset", "train_split", "data_dir", "loss", "seed", "batch_size",
                 "precision")
# Flags that came later: a run that was saved without them had the default.
NEWER = {name: DEFAULTS[name] for name in ("quantizer", "schedule", "widths_per_step")}
NAMES = ("model_latest.pth.tar", "model_best.pth.tar")


class Checkpoint:
    """A checkpoint that is read: its path and content, and whether a run goes on in its folder."""

    def __init__(self, path, in_place=False):
        self.path, self.in_place, self.content = path, in_place, load_checkpoint(path)


def resolve(flags):
    """Return all arguments, and the Checkpoint to go on from or to evaluate, if any."""
    given = Namespace(**{**DEFAULTS, **flags.recipe, **vars(flags)})
    if given.evaluate:
        return resolve_evaluation(flags, given)
    latest = Path(given.results_dir or "", "ckpt", NAMES[0])
    own = latest.resolve()
    resumed = given.resume and Path(given.resume).resolve() in (own, own.parent, own.parent.parent)
    if given.results_dir and latest.exists() and not resumed:
        return resolve_same_command(flags, Checkpoint(latest, in_place=True))
    if not given.resume:
        return settle(flags), None
    path = published.find_checkpoint(given.resume, *NAMES)
    folder, latest = path.parent.parent, path.with_name(NAMES[0])
    # From an older checkpoint than its folder's latest, a run goes on in a folder of its own.
    in_place = (path.parent.name == "ckpt" and (path == latest or not latest.exists())
                and Path(given.results_dir or folder).resolve() == folder.resolve())
    return resolve_resumed(flags, given.resume, Checkpoint(path, in_place))


def resolve_resumed(flags, source, checkpoint):
    """--resume: what no flag sets is the saved run's; UsageError for a flag that must stay."""
    content, given = checkpoint.content, dict(vars(flags))
    refuse_packed(content, checkpoint.path, "go on training with")
    with reading(checkpoint.path):
        for name, kind in (("epoch", int), ("optimizer", dict)):
            if not isinstance(content.get(name), kind):
                raise UserError(f"{source} holds no {name} to go on with: start a new run from it "
                                "with --pretrain")
        saved, guessed = saved_arguments(flags, checkpoint)
        untold = [flag_name(name) for name in ("train_split", "loss", *OF_SCHEDULE)
                  if guessed and name not in {**given, **flags.recipe}]
        if untold:
            raise UsageError(f"--resume {source} does not tell how it was trained: give "
                             f"{', '.join(untold)}, or start a new run from it with --pretrain")
        free = ["resume", "start_epoch"]
        if saved.get("schedule") != "cosine":  # which --epochs stretches
            free.append("epochs")
        changed = differences(saved, given, free)
        if changed:
            raise UsageError(f"--resume {source} goes on with the run as it was started, but "
                             f"{changed}: leave these flags out, or start a new run from it with "
                             "--pretrain")
        saved = {name: value for name, value in saved.items()
                 if name in DEFAULTS and name not in ("results_dir", "device")}
        if checkpoint.in_place:  # the run keeps its folder, and what it was begun from
            given.pop("resume", None)
            given["results_dir"] = str(checkpoint.path.parent.parent)
        return settle(Namespace(**given), saved, guessed), checkpoint


def resolve_same_command(flags, checkpoint):
    """The same command again: it goes on; UserError naming what another command changes."""
    folder = checkpoint.path.parent.parent
    with reading(checkpoint.path):
        saved = {**DEFAULTS, **saved_arguments(flags, checkpoint)[0]}
        ours = vars(flags)  # with --resume, what they leave open came from the run it names
        if not ours.get("resume"):
            ours = {**vars(settle(flags)), "resume": saved["resume"]}
        changed = differences(saved, ours)
    if changed:
        raise UserError(f"{folder} holds a run already, and {changed}: go on with it by --resume "
                        f"{folder}, or choose another folder with --results-dir")
    return resolve_resumed(flags, folder, checkpoint)


def differences(saved, ours, free=()):
    """Return what makes another run of ours than of saved arguments; `free` ones may differ."""
    return "; ".join(
        f"{flag_name(name)} was {flag_text(saved[name])} and is now {flag_text(value)}"
        for name, value in ours.items()
        if name in saved and name not in (*OF_THE_MACHINE, *free) and saved[name] != value)


def saved_arguments(flags, checkpoint):
    """Return the arguments that a checkpoint was trained with, and what is guessed of others.

    A published one tells its model and bit-widths; its data set is that of the published model.
    """
    content = checkpoint.content
    model = content.get("model", getattr(flags, "model", None))
    if model not in list(MODELS) and not zoo.is_torchvision(model):
        raise UserError(f"{checkpoint.path} is of model {model!r}: choose a checkpoint of "
                        f"{', '.join(MODELS)}")
    if content.get("arguments"):
        return {**NEWER, **content["arguments"]}, {}
    told = {"model": model, "bit_width_list": plain(saved_bit_widths(content["state_dict"]))}
    return told, {"dataset": published.DATASET.get(model, DEFAULTS["dataset"])}


def plain(bit_widths):
    """Return bit-widths as arguments hold them, and files."""
    return [width.plain for width in bit_widths]


def resolve_evaluation(flags, given):
    """--evaluate: what no flag sets is taken from the checkpoint."""
    names = NAMES[1:] if given.pretrain else NAMES
    checkpoint = Checkpoint(published.find_checkpoint(given.pretrain or given.resume, *names))
    path = checkpoint.path
    with reading(path):
        saved, guessed = saved_arguments(flags, checkpoint)
        saved = {name: saved[name] for name in OF_EVALUATION if name in saved}
        network = {name: saved[name] for name in OF_NETWORK & saved.keys()}
        changed = differences(network, vars(flags))
        if changed:
            raise UsageError(f"{path} holds another network: {changed}; leave these flags out")
        trained = saved_bit_widths(checkpoint.content["state_dict"])
        args = settle(flags, {**saved, "bit_width_list": plain(trained)}, guessed)
    if not trained:
        raise UserError(f"{path} does not fit the model: it has BatchNorms for no bit-width")
    if args.save_calibrated:
        refuse_packed(checkpoint.content, path, "save as a checkpoint")
    stored = checkpoint.content.get("packed", {}).get("stored", args.bit_width_list)
    absent = [width for width in args.bit_width_list
              if width not in stored and BitWidth.of(width).weights not in stored]
    if absent:
        raise UserError(f"{flag_text(absent)} bits is not in the packed file {path}: choose from "
                        f"{flag_text(stored)}")
    unknown = [bits for bits in args.bit_width_list if bits not in trained]
    if unknown and args.calibrate is None:
        raise UsageError(f"{flag_text(unknown)} bits were not trained; choose from "
                         f"{flag_text(trained)}, or pass --calibrate N")
    return args, checkpoint
