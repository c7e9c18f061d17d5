"""What a run takes from a checkpoint, to resume and to evaluate."""
import os
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path

from dataset.data import DATASETS, images_of
from dataset.folder import is_folder
from engine import published
from engine.arguments import (DEFAULTS, FLAGS, MACHINE, NETWORK, SCHEDULE, TASK,
                              arguments_of, check_saved, flag_name, merge_args)
from engine.distributed import local_rank_zero_first
from engine.errors import UsageError, UserError
from engine.forward_pass import AUTO
from engine.setup import load_pretrained
from engine.state import TrainingState, is_epoch
from models import BitWidth, saved_bit_widths
from models.calibration import without_assignments
from models.checkpoint import (BEST, LATEST, network_spec, old_spec, read_checkpoint,
                               saved_assignments, saved_own_bits)
from models.fields import FileError, check_field, is_count
from models.quantizers import own_bits_of
from utils import brief, escaped, flag_text, without_secrets


class Checkpoint:
    """A checkpoint that is read.

    path, content: of the file. in_place: whether the run resumes in its folder. network: arguments
    of models.build. arguments: those of its training, as far as it has them. flags: settings of the
    network that a published checkpoint lacks.
    """

    def __init__(self, path: Path, in_place: bool = False, flags: Namespace | None = None):
        self.path = path
        self.in_place = in_place
        self.stamp = stamp_of(path)
        self.content = read_checkpoint(path)
        check_field(path, "epoch", self.content.get("epoch"), is_epoch,
                    "a number of epochs done")
        is_published = not self.content.get("network")
        if is_published:
            given = {name: getattr(flags, name) for name in arguments_of(NETWORK)
                     if name != "width" and flags and name in flags}
            self.content["network"] = old_spec(self.content, path, given)
        self.network = network_spec(self.content, path)
        self.arguments = {
            "model": self.network["name"], "width": self.network["width"],
            "all_conv": self.network["all_conv"], "quantizer": self.network["quantizer"],
            "bit_width_list": plain(self.network["bit_widths"])}
        self.has_arguments = bool(self.content.get("arguments"))
        if self.has_arguments:
            later = {name: value for name, value in DEFAULTS.items() if FLAGS[name].kind != MACHINE}
            saved = check_saved(self.content["arguments"], path)
            self.check_network(saved)
            self.arguments = {**later, **self.arguments, **saved}
        else:  # a published checkpoint, or a network of one's own loop
            name = (self.content.get("images") or {}).get("dataset")
            if name not in DATASETS and is_published:
                name = published.DATASET.get(self.network["name"], DEFAULTS["dataset"])
            if name in DATASETS:
                self.arguments["dataset"] = name

    def check_unchanged(self) -> None:
        """Raise UserError where another process has written the file since it was read."""
        if stamp_of(self.path) != self.stamp:
            raise UserError(f"{self.path} was written by another run while this one began: let "
                            "that end, and give the command again")

    def check_network(self, saved: dict) -> None:
        """Raise FileError where the arguments are of another network than the one it holds."""
        for name in arguments_of(NETWORK):
            own = self.arguments[name]
            value = saved.get(name)
            if value is not None and value != own:
                raise FileError(f"{self.path}: its argument {name} is {brief(value)}, and its "
                                f"network's is {brief(own)}: the file may be damaged")

    def train_split(self, dataset: str) -> str | None:
        """Return the split that the network was trained on; None on another data set."""
        same = dataset == self.arguments.get("dataset")
        return self.arguments.get("train_split") if same else None

    def images(self, dataset: str) -> dict:
        """Return a description of the images that the network was trained on; {} if not known.

        dataset: to evaluate on. Where that is a folder, a published network's are taken to be those
        of its paper.
        """
        saved = self.content.get("images")
        name = self.arguments.get("dataset")
        is_known = self.has_arguments or (is_folder(dataset)
                                          and self.network["name"] in published.DATASET)
        if saved:
            return saved
        return images_of(name) if is_known and name in DATASETS and not is_folder(name) else {}

    def follow_normalization(self, dataset: str) -> None:
        """Normalize images of folder:PATH as those that the network was trained on.

        Changes the folder's row in DATASETS. Raises UserError for another data set whose row says
        otherwise.
        """
        images = self.images(dataset)
        saved = {field: tuple(images[field]) for field in ("mean", "std") if images.get(field)}
        row = DATASETS[dataset]
        if is_folder(dataset):
            DATASETS[dataset] = row._replace(**saved)
            self.content["images"] = images or None  # for a calibrated copy
        elif any(value != tuple(getattr(row, field)) for field, value in saved.items()):
            raise UserError(
                f"{self.path} was trained on {images.get('dataset')}, {normalization(saved)}, and "
                f"the row of {dataset} in dataset/data.py says {normalization(row._asdict())}: "
                "give the data set that it was trained on, by --dataset, or correct the row")
        elif images.get("dataset") == dataset and images.get("size") not in (None, row.image_size):
            raise UserError(
                f"{self.path} was trained on images of {images['size']} pixels, and the row of "
                f"{dataset} in dataset/data.py says {row.image_size}: correct the row")


def stamp_of(path: str | Path) -> tuple[int, int] | None:
    """Return what a file that replaces another one does not have in common with it."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def normalization(fields: dict) -> str:
    """Return mean and standard deviation as a message says them."""
    return " and ".join(f"{field} {', '.join(f'{value:.4g}' for value in fields[field])}"
                        for field in ("mean", "std") if field in fields)


def plain(bit_widths: Iterable[BitWidth]) -> list[int | str]:
    """Return bit-widths as the integers and texts that arguments and files hold."""
    return [width.plain for width in bit_widths]


def resolve(flags: Namespace) -> tuple[Namespace, Checkpoint | None]:
    """Return all arguments, and the Checkpoint to resume or to evaluate, if any."""
    given = Namespace(**{**DEFAULTS, **vars(flags)})
    if given.evaluate:
        return resolve_evaluation(flags, given)
    latest = Path(given.results_dir or "", "ckpt", LATEST)
    own = [path.resolve() for path in (latest, latest.parent, latest.parent.parent)]
    resumed = given.resume and Path(given.resume).resolve() in own
    if given.results_dir and latest.exists() and not resumed:
        return resolve_same_command(flags, Checkpoint(latest, in_place=True))
    if not given.resume:
        return merge_args(flags), None
    path = published.find_checkpoint(given.resume, LATEST, BEST)
    if len(path.parts) < 3:  # as within ckpt/
        path = path.absolute()
    folder = path.parent.parent
    latest = path.with_name(LATEST)
    # A run resumed from an older checkpoint than its folder's latest gets a folder of its own.
    in_place = (path.parent.name == "ckpt" and (path == latest or not latest.exists())
                and Path(given.results_dir or folder).resolve() == folder.resolve())
    return resolve_resumed(flags, given.resume, Checkpoint(path, in_place, flags))


def resolve_resumed(flags: Namespace, source: str | Path,
                    checkpoint: Checkpoint) -> tuple[Namespace, Checkpoint]:
    """Return arguments to go on with: the saved run's; UsageError for a flag that says otherwise.

    The machine's flags may change, and --epochs. A published checkpoint's missing settings are
    those that flags set.
    """
    given = dict(vars(flags))
    if given.get("precision") == AUTO:  # its own
        del given["precision"]
    refuse_packed(checkpoint.content, checkpoint.path, "go on training with")
    for name, kind in (("epoch", int), ("optimizer", dict)):
        if not isinstance(checkpoint.content.get(name), kind):
            raise UserError(f"{source} holds no {name} to go on with: start a new run from it "
                            "with --pretrain")
    saved = checkpoint.arguments
    own_arguments = checkpoint.content.get("arguments") or {}
    missing = [flag_name(name) for name in ("train_split", "loss", *arguments_of(SCHEDULE))
               if name not in {**own_arguments, **given}]
    if missing:
        raise UsageError(f"--resume {source} does not say how it was trained: give "
                         f"{', '.join(missing)}, or start a new run from it with --pretrain")
    for name, flag in FLAGS.items():
        if own_arguments and flag.identifies and name not in own_arguments:
            raise FileError(f"{checkpoint.path} lacks its argument {name}: the file may be damaged")
    free = ["resume"]
    # --epochs stretches a cosine, which takes no --lr_decay, such as a recipe's.
    free.append("lr_decay" if saved.get("schedule") == "cosine" else "epochs")
    moved = is_folder(saved["dataset"]) and is_folder(given.get("dataset", ""))
    if moved or not checkpoint.has_arguments:
        free.append("dataset")  # that of the published model is a guess
    changed = differences(saved, given, free)
    if changed:
        raise UsageError(f"--resume {source}: cannot change on resume: {changed}: leave that out, "
                         "or start a new run from it with --pretrain")
    not_resumed = {"results_dir", "device", *arguments_of(TASK)} - {"resume", "start_epoch"}
    saved = {name: value for name, value in saved.items()
             if name in DEFAULTS and name not in not_resumed}
    if checkpoint.in_place:  # the run keeps its folder, and what it was begun from
        given.pop("resume", None)
        given["results_dir"] = str(checkpoint.path.parent.parent)
    args = merge_args(Namespace(**given), saved)
    done = checkpoint.content["epoch"]
    if args.epochs < done:
        raise UsageError(f"--epochs {args.epochs} is less than the {done} epochs that {source} has "
                         f"done: give at least {done}")
    checkpoint.follow_normalization(args.dataset)
    return args, checkpoint


def resolve_same_command(flags: Namespace, checkpoint: Checkpoint) -> tuple[Namespace, Checkpoint]:
    """Go on by the same command; UserError naming what another command changes."""
    folder = checkpoint.path.parent.parent
    saved = {**DEFAULTS, **checkpoint.arguments}
    ours = vars(flags)  # with --resume, what they leave open came from the run it names
    if not ours.get("resume"):
        epochs = ours.get("epochs", saved["epochs"])
        ours = {**vars(merge_args(flags)), "epochs": epochs, "resume": saved["resume"]}
    free = ["epochs"] if saved["schedule"] != "cosine" else []
    if is_folder(saved["dataset"]) and is_folder(ours.get("dataset", "")):
        free.append("dataset")  # moved, or given by another path
    changed = differences(saved, ours, free)
    if changed:
        raise UserError(f"{folder} holds a run already: cannot change on resume: {changed}: go on "
                        f"with it by --resume {folder}, or choose another folder with "
                        "--results-dir")
    return resolve_resumed(flags, folder, checkpoint)


def differences(saved: dict, ours: dict, free: Sequence[str] = ()) -> str:
    """Return what would change a saved run, as a message; the arguments `free` may differ."""
    machine = arguments_of(MACHINE)
    saved = without_secrets(saved)
    ours = without_secrets(ours)
    return "; ".join(
        f"{flag_name(name)} is {escaped(flag_text(saved[name]))}, not {flag_text(value)}"
        for name, value in ours.items()
        if name in saved and name not in (*machine, *free) and saved[name] != value
        and (name, value) != ("precision", AUTO))


def refuse_packed(content: dict, path: str | Path, purpose: str) -> None:
    """Raise UserError where `content`, from read_checkpoint, is a packed file's."""
    if "packed" in content:
        raise UserError(f"{path} is a packed file, whose integers are no weights to {purpose}: "
                        "give the checkpoint that it was exported from")


def resolve_evaluation(flags: Namespace, given: Namespace) -> tuple[Namespace, Checkpoint]:
    """Return an evaluation's arguments: those that no flag sets are the checkpoint's."""
    names = [BEST] if given.pretrain else [LATEST, BEST]
    path = published.find_checkpoint(given.pretrain or given.resume, *names)
    checkpoint = Checkpoint(path, flags=flags)
    saved = {name: value for name, value in checkpoint.arguments.items()
             if name in FLAGS and FLAGS[name].evaluated}
    if saved.get("precision") == "tf32":
        saved["precision"] = AUTO  # fp32, which is finer, where the device has no TF32
    saved.setdefault("loss", None)  # of a published network, which does not say it
    fixed = {name: saved[name] for name in (*arguments_of(NETWORK), "loss")
             if saved.get(name) is not None}
    changed = differences(fixed, vars(flags))
    if changed:
        raise UsageError(f"{path} holds another network: {changed}; leave these flags out")
    trained = saved_bit_widths(checkpoint.content["state_dict"])
    if "dataset" not in {**saved, **vars(flags)}:
        raise UsageError(f"{path} does not say of what images its network is: give --dataset")
    size = checkpoint.images(getattr(flags, "dataset", "")).get("size")
    if is_count(size):  # for a folder's images, whatever data set the network was trained on
        saved["image_size"] = saved.get("image_size") or size
    saved["train_split"] = checkpoint.train_split({**saved, **vars(flags)}["dataset"])
    args = merge_args(flags, {**saved, "bit_width_list": plain(trained)})
    if args.save_calibrated:
        refuse_packed(checkpoint.content, path, "save as a checkpoint")
    stored = checkpoint.content.get("stored", args.bit_width_list)
    absent = [width for width in args.bit_width_list
              if width not in stored and BitWidth.of(width).weights not in stored]
    if absent:
        raise UserError(f"{flag_text(absent)} bits is not in the packed file {path}: choose from "
                        f"{flag_text(stored)}")
    unknown = [width for width in args.bit_width_list if width not in trained]
    if unknown and args.calibrate is None:
        raise UsageError(f"{flag_text(unknown)} bits were not trained; choose from "
                         f"{flag_text(trained)}, or pass --calibrate N")
    checkpoint.follow_normalization(args.dataset)
    return args, checkpoint


def start_from(state: TrainingState, source: str) -> tuple[str, bool]:
    """Load the weights of --pretrain into a new run; return what load_pretrained does."""
    with local_rank_zero_first():  # the first may have to download it
        path = published.find_checkpoint(source, BEST)
    content = read_checkpoint(path)
    refuse_packed(content, path, "train")
    own_bits = saved_own_bits(content, path) or {}
    state.check_own_bits({**own_bits_of(state.model), **own_bits}, path)
    saved = (content.get("network") or {}).get("assignments", [])
    names = map(str, saved_assignments(saved, path))
    return load_pretrained(state.model, path, without_assignments(content["state_dict"], names))
