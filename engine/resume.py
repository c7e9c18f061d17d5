"""What a run takes over from a checkpoint: to resume, to go on by the same command, to evaluate."""
from argparse import Namespace
from pathlib import Path

from engine import published
from engine.arguments import DEFAULTS, settle
from engine.errors import UsageError, UserError, reading
from engine.state import load_checkpoint
from models import MODELS, check_bit_widths, saved_bit_widths
from utils import flag_text

# What --resume cannot change, or it would be another run.
FIXED_ON_RESUME = ("model", "width", "all_conv", "bit_width_list", "dataset", "train_split", "loss",
                   "optimizer", "lr", "lr_decay", "weight_decay", "batch_size", "seed", "sync_bn",
                   "train_fraction", "precision")
# What the same command may change: where and how fast it runs, and what it tells.
OF_THE_MACHINE = ("results_dir", "device", "compile", "workers", "timeout", "save_every",
                  "print_freq", "data_dir")
# What an evaluation takes from its checkpoint where no flag sets it; the network's must agree.
OF_NETWORK = ("model", "width", "all_conv")
OF_EVALUATION = (*OF_NETWORK, "dataset", "train_split", "data_dir", "loss", "seed", "batch_size",
                 "precision")


class Checkpoint:
    """A checkpoint that was read: its path and content, and whether a run goes on in its folder."""

    def __init__(self, path, in_place=False):
        self.path, self.in_place = path, in_place
        self.content = load_checkpoint(path)


def resolve(flags):
    """Return (all arguments, the Checkpoint to go on from or to evaluate, or None).

    Raises UserError where a checkpoint is missing, damaged, or of something else.
    """
    given = Namespace(**{**DEFAULTS, **vars(flags)})
    if given.evaluate:
        return resolve_evaluation(flags, given)
    latest = Path(given.results_dir or "", "ckpt", "model_latest.pth.tar")
    if given.results_dir and latest.exists() and not is_of(given.resume, latest):
        return resolve_same_command(flags, Checkpoint(latest, in_place=True))
    if not given.resume:
        return settle(flags), None
    path = published.find_checkpoint(given.resume, "model_latest.pth.tar", "model_best.pth.tar")
    own = path.parent.parent
    latest = path.with_name("model_latest.pth.tar")
    # From an older checkpoint than its folder's latest, a run goes on in a folder of its own.
    in_place = (path.parent.name == "ckpt" and (path == latest or not latest.exists())
                and Path(given.results_dir or own).resolve() == own.resolve())
    return resolve_resumed(flags, given.resume, Checkpoint(path, in_place))


def is_of(source, latest):
    """Return whether --resume `source` means the checkpoint at `latest`."""
    latest = latest.resolve()
    return source and Path(source).resolve() in (latest, latest.parent, latest.parent.parent)


def resolve_resumed(flags, source, checkpoint):
    """--resume: what no flag sets is the saved run's; UsageError for a flag that must stay."""
    content = checkpoint.content
    with reading(checkpoint.path):
        for name, kind in (("epoch", int), ("best_prec1", object), ("optimizer", dict)):
            if name not in content or not isinstance(content[name], kind):
                raise UserError(f"{source} holds no {name} to go on with: start a new run from it "
                                "with --pretrain")
        saved = saved_arguments(flags, checkpoint)
        changed = differences(saved, vars(flags), FIXED_ON_RESUME)
        if changed:
            raise UsageError(f"--resume {source} goes on with the run as it was started, but "
                             f"{'; '.join(changed)}: leave these flags out, or start a new run "
                             "from it with --pretrain")
        saved = {name: value for name, value in saved.items()
                 if name in DEFAULTS and name not in ("results_dir", "device")}
        check_bit_widths(saved["bit_width_list"])
        ours = dict(vars(flags))
        if checkpoint.in_place:  # the run keeps its folder, and what it was begun from
            ours.pop("resume", None)
            ours["results_dir"] = str(checkpoint.path.parent.parent)
        return settle(Namespace(**ours), saved), checkpoint


def resolve_same_command(flags, checkpoint):
    """The same command again: it goes on; UserError naming what another command changes."""
    folder = checkpoint.path.parent.parent
    with reading(checkpoint.path):
        saved = {**DEFAULTS, **saved_arguments(flags, checkpoint)}
        ours = vars(flags)  # with --resume, what they leave open came from the run it names
        if not ours.get("resume"):
            ours = {**vars(settle(flags)), "resume": saved["resume"]}
        changed = differences(saved, ours, [name for name in ours if name not in OF_THE_MACHINE])
    if changed:
        raise UserError(f"{folder} holds a run already, and {'; '.join(changed)}: go on with it by "
                        f"--resume {folder}, or choose another folder with --results-dir")
    flags = {name: value for name, value in vars(flags).items() if name != "resume"}
    return resolve_resumed(Namespace(**flags), folder, checkpoint)


def differences(saved, ours, names):
    return [f"--{name.replace('_', '-')} was {flag_text(saved[name])} and is now "
            f"{flag_text(ours[name])}"
            for name in names if name in saved and name in ours and saved[name] != ours[name]]


def saved_arguments(flags, checkpoint):
    """Return the arguments that a checkpoint was trained with; of a published one its model's."""
    content = checkpoint.content
    model = content.get("model", getattr(flags, "model", None))
    if model not in list(MODELS):
        raise UserError(f"{checkpoint.path} is of model {model!r}: choose a checkpoint of "
                        f"{', '.join(MODELS)}")
    return content.get("arguments") or {
        "model": model, "dataset": published.DATASET[model],
        "bit_width_list": saved_bit_widths(content["state_dict"])}


def resolve_evaluation(flags, given):
    """--evaluate: what no flag sets is taken from the checkpoint."""
    names = "model_latest.pth.tar", "model_best.pth.tar"
    names = names[1:] if given.pretrain else names
    checkpoint = Checkpoint(published.find_checkpoint(given.pretrain or given.resume, *names))
    path = checkpoint.path
    with reading(path):
        saved = saved_arguments(flags, checkpoint)
        saved = {name: saved[name] for name in OF_EVALUATION if name in saved}
        for name in OF_NETWORK:
            ours = getattr(flags, name, saved.get(name))
            if name in saved and ours != saved[name]:
                flag = name.replace("_", "-")
                raise UsageError(f"--{flag} {ours} is not what {path} holds ({flag} "
                                 f"{saved[name]}): leave the flag out")
        trained = saved_bit_widths(checkpoint.content["state_dict"])
        args = settle(flags, {**saved, "bit_width_list": trained})
    if not trained:
        raise UserError(f"{path} does not fit the model: it has BatchNorms for no bit-width")
    unknown = [bits for bits in args.bit_width_list if bits not in trained]
    if unknown and args.calibrate is None:
        were = "was" if len(unknown) == 1 else "were"
        raise UsageError(f"{flag_text(unknown)} bits {were} not trained; choose from "
                         f"{flag_text(trained)}, or pass --calibrate N")
    return args, checkpoint
