"""The results folder of a run: its lock, log, configuration and metrics, written by rank 0."""
import contextlib
import fcntl
import itertools
import json
import logging
import math
import os
import platform
import shlex
import socket
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from engine.device import describe
from engine.distributed import gather, rank, world_size
from engine.errors import UserError
from engine.metrics import best_key
from engine.state import TrainingState
from models import Assignment, BitWidth, Width
from models.checkpoint import LATEST
from models.fields import is_finite_number, is_whole
from utils import (WriteError, brief, commit, one_line, with_text_keys,
                   without_secrets, write_json, write_text)

log = logging.getLogger("any_precision")  # to stdout, and log_<hostname>.txt in the folder
log.setLevel(logging.INFO)
log.propagate = False
ANOTHER = "choose another folder with --results-dir"
PATH_FILE = "path.json"  # in the folder of a search


class LogFile(logging.FileHandler):
    """A log file that the run cannot do without: raises WriteError where it cannot be written."""

    def __init__(self, path: Path):
        super().__init__(path, encoding="utf-8", errors="backslashreplace")  # appends
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))

    def handleError(self, record: logging.LogRecord) -> None:
        """Raise the error of writing a record, once the file is closed."""
        error = sys.exc_info()[1]
        with contextlib.suppress(OSError):  # what is still buffered cannot be written either
            self.stream.close()
        self.stream = None
        if not isinstance(error, OSError):
            raise error
        raise WriteError(self.baseFilename, error) from None


class RunFolder:
    """A context manager that locks a results folder and logs to it.

    folder: its path; None: the first free one of results/<name>, <name>_2, ... in_place: resume the
    run in the folder. save_every: minutes between saves. Raises UserError where the folder cannot
    be written, another run writes to it, or it holds a run and `in_place` is False.
    """

    def __init__(self, folder: str | Path | None, name: str, in_place: bool = False,
                 save_every: float | None = None):
        self.in_place = in_place
        self.save_every = save_every
        self.last_save = time.monotonic()
        self.has_noted = False  # that a checkpoint does not hold all
        self.history = []  # records of metrics.jsonl
        self.writer = None
        self.lock = None
        self.log_file = None
        self.path = Path(gather(self.open(folder, name, in_place) if rank() == 0 else None)[0])
        self.metrics_file = self.path / "metrics.jsonl"

    def open(self, results_dir: str | Path | None, name: str, in_place: bool) -> Path:
        """Create and lock the folder, and open its log; return its path."""
        folder = Path(results_dir or f"results/{name}")
        outputs = ("ckpt/*.pth.tar", "evaluation.json", "metrics.jsonl", PATH_FILE)
        must_be_free = results_dir and not in_place
        if must_be_free and any(
                path.stat().st_size for pattern in outputs for path in folder.glob(pattern)):
            resume = ""
            if (folder / "ckpt" / LATEST).exists():
                resume = f"go on with it by --resume {folder}, or "
            raise UserError(f"{folder} holds a run already: {resume}{ANOTHER}")

        try:
            if results_dir:
                folder.mkdir(parents=True, exist_ok=True)
            else:
                folder = make_free_folder(name)
            self.lock = open(folder / ".lock", "w")  # held until it is closed
            try:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{folder} is being written by another run: let it end or stop it, "
                                f"or {ANOTHER}") from None
            except OSError:
                pass  # a file system without locks
            self.log_file = LogFile(folder / f"log_{socket.gethostname()}.txt")
        except OSError as error:
            raise UserError(f"results folder {folder} cannot be written ({error.strerror}): "
                            f"{ANOTHER}") from None
        log.handlers = [logging.StreamHandler(sys.stdout), self.log_file]
        return folder

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        message = str(error)
        resumable = isinstance(error, WriteError) and (self.path / "ckpt" / LATEST).exists()
        if resumable:
            message += f"; then go on: {self.command_to_resume()}"
        if self.log_file and isinstance(error, (UserError, WriteError)):  # a terminal may be gone
            with contextlib.suppress(WriteError):
                self.log_file.handle(log.makeRecord(
                    log.name, logging.INFO, __file__, 0, message, (), None))

        for file in (*log.handlers, self.writer, self.lock):
            if file:
                file.close()
        log.handlers = []
        if resumable:
            raise UserError(message) from None

    def command_to_resume(self) -> str:
        """Return the command that goes on with this run, for a shell."""
        start = [sys.executable]
        if world_size() > 1:  # of one machine; on several the user knows how
            start = ["torchrun", "--standalone", "--nproc-per-node", str(world_size())]
        return shlex.join([*start, sys.argv[0], "--resume", str(self.path.resolve())])

    def contents(self) -> str:
        """Return a line that names what is in the folder."""
        names = sorted(path.name + "/" * path.is_dir() for path in self.path.iterdir()
                       if not path.name.startswith("."))
        return f"in {self.path}: {', '.join(names)}"

    def write_config(self, arguments: dict, device: torch.device, **more: object) -> None:
        """Write config.json: arguments, seed, command, versions, commit and device."""
        if rank() > 0:
            return
        packages = ("torch", "torchvision", "numpy", "tensorboardX", "scikit-learn")
        versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
        for name in packages:
            with contextlib.suppress(PackageNotFoundError):  # some go on without one
                versions[name] = version(name)

        path = self.path / "config.json"
        where = {"processes": world_size(), "versions": versions, "commit": commit(),
                 "device": describe(device)}
        first = self.earlier_config(path, where) if self.in_place else {}
        write_json(path, {
            "arguments": without_secrets(arguments), "seed": arguments["seed"],
            "command": without_secrets(sys.argv), **without_secrets(first), **more, **where})

    def earlier_config(self, path: Path, where: dict) -> dict:
        """Return what a resumed run's config.json says of the run's beginning; logs another commit.

        where: processes, versions, commit and device of today. A damaged file gives what it can.
        """
        first = {}
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError,
                                 RecursionError):
            saved = json.loads(path.read_text())
            first["first_command"] = saved.get("first_command") or saved["command"]
            was = {name: saved.get(name) for name in where}
            earlier = saved.get("earlier", [])
            if was != where:
                earlier = [*earlier, was]
            if earlier:
                first["earlier"] = earlier
            if was["commit"] != where["commit"]:
                log.info(f"note: the code was {was['commit']} and is {where['commit']}")
        return first

    def begin(self, epoch: int, arguments: dict,
              best: tuple[float, float] = (-math.inf, -math.inf)) -> None:
        """Drop the records after `epoch` epochs, which a resumed run repeats.

        Raises UserError where the best epoch, whose best_key is `best`, is not among the others.
        """
        if rank() == 0:
            records = read_metrics(self.metrics_file) if self.metrics_file.exists() else []
            self.history = [record for record in records if record["epoch"] <= epoch]
            epochs = [record["epoch"] for record in self.history]
            missing = sorted({*range(epochs[0], epoch + 1)}.difference(epochs)) if epochs else []
            if missing:
                raise UserError(f"{self.metrics_file} lacks epoch {missing[0]}: bring it back, or "
                                f"go on with --resume {self.path} --results-dir ANOTHER")
            keys = [best_key(record["val"], arguments["best_by"]) for record in self.history]
            if best > max(keys, default=(-math.inf, -math.inf)):
                raise UserError(f"{self.metrics_file} lacks the best epoch, whose checkpoint is "
                                f"kept: bring it back, or go on with --resume {self.path} "
                                "--results-dir ANOTHER")
            if len(records) > len(self.history):
                log.info(f"epoch {epoch + 1} and what follows is trained again: dropped from "
                         f"{self.metrics_file.name}")
            write_metrics(self.metrics_file, self.history)
            self.writer = open_event_file(self.path / "summary", epoch, without_secrets(arguments))

    def log_epoch(self, record: dict) -> None:
        """Append an epoch's record to metrics.jsonl and TensorBoard, with the published tags."""
        if rank() > 0:
            return
        self.history.append(record)
        write_metrics(self.metrics_file, self.history)
        if self.writer is None:
            return
        scalars = {"lr": record["lr"], "images_per_second": record["images_per_second"]}
        for part in ("train", "val"):
            for bits, values in record[part].items():
                for tag, name in (("loss", "loss"), ("prec_1", "top1"), ("prec_5", "top5")):
                    scalars[f"{part}_{tag}_{bits}"] = values[name]
        self.writer.add_scalars(scalars, record["epoch"] - 1)  # from 0 there, as published

    def save(self, state: TrainingState, best: bool = False) -> None:
        """Save a TrainingState to this folder; all processes must call it."""
        state.save(self.path, best)
        self.last_save = time.monotonic()
        unsaved = state.unsaved()
        if unsaved and not self.has_noted:
            self.has_noted = True
            log.info(f"note: training changed {', '.join(unsaved[:3])}"
                     f"{', ...' * (len(unsaved) > 3)}, which no checkpoint holds: a resumed run "
                     "starts it afresh; make it a buffer, if it is state")

    def save_is_due(self) -> bool:
        """Return whether `save_every` minutes have passed since the last save; rank 0 decides."""
        minutes = (time.monotonic() - self.last_save) / 60
        return rank() == 0 and self.save_every is not None and minutes > self.save_every


def open_event_file(folder: Path, epoch: int, arguments: dict) -> object | None:
    """Return a new EventFile; None, with a line in the log, where tensorboardX is missing."""
    try:
        from engine.event_file import EventFile
    except Exception as error:  # as where its protobuf does not fit
        log.info(f"no curves for TensorBoard ({one_line(error)}): pip install tensorboardX")
        return None
    return EventFile(folder, epoch, arguments)


def write_metrics(path: Path, records: list[dict]) -> None:
    """Write a metrics.jsonl, one line per record; raises WriteError where the disk is full."""
    write_text(path, "".join(json.dumps(with_text_keys(record)) + "\n" for record in records))


def make_free_folder(name: str) -> Path:
    """Make the first of results/<name>, <name>_2, ... that does not exist yet; return it."""
    for count in itertools.count(1):
        folder = Path("results", name if count == 1 else f"{name}_{count}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:  # perhaps of another run, since a moment
            if not os.path.lexists(folder):  # it is `results`, a link to what is gone
                raise


def read_metrics(path: Path) -> list[dict]:
    """Return the records of a metrics.jsonl.

    Raises UserError naming the line and the field that is missing or of another type.
    """
    records = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        where = f"{path}, line {number}"
        record = parse_json(line, where)
        check_record(record, where, records)
        records.append(record)
    return records


def check_record(record: object, where: str, before: list[dict]) -> None:
    """Check an epoch's record, and give its metrics bit-widths as keys.

    where: file and line, for the error. before: the records before it. Raises UserError.
    """
    if not isinstance(record, dict):
        raise damaged(where, "record", record, "a dict")
    last = before[-1]["epoch"] if before else 0
    epoch = record.get("epoch")
    if not is_whole(epoch) or epoch <= last:
        raise damaged(where, "epoch", epoch, f"a whole number above {last}")
    for part in ("train", "val"):
        record[part] = metrics_of(record.get(part), where, part)
    if before and record["val"].keys() != before[0]["val"].keys():
        raise damaged(where, "val", list(map(str, record["val"])), "of the bit-widths of the lines "
                      "before")


def metrics_of(value: object, where: str, name: str, assignments: Sequence[Assignment] = (),
               ) -> dict[Width, dict[str, float]]:
    """Return a file's {bit-width: {"loss", "top1", "top5"}}; UserError where it is something else.

    where: the file, for the error. name: of the field. assignments: those that may be keys too.
    """
    if not isinstance(value, dict) or not value:
        raise damaged(where, name, value, "a dict by bit-widths")
    metrics = {}
    known = {assignment.name: assignment for assignment in assignments}
    for key, values in value.items():
        try:
            width = known.get(key) or BitWidth.of(key)
        except ValueError as error:
            raise damaged(where, name, key, f"a key ({error})") from None
        if not isinstance(values, dict):
            raise damaged(where, f"{name} at {width} bits", values, "a dict of metrics")
        for metric in ("loss", "top1", "top5"):
            number = values.get(metric)
            allowed = "a number" if metric == "loss" else "a number from 0 to 100"
            is_right = is_finite_number(number) and (metric == "loss" or 0 <= number <= 100)
            if not is_right:
                raise damaged(where, f"{metric} of {name} at {width} bits", number, allowed)
        metrics[width] = values
    return metrics


def damaged(where: str | Path, name: str, value: object, what: str) -> UserError:
    """Return the error for a field of a results folder's file that is not `what` it must be."""
    return UserError(f"{where}: its {name} is {brief(value)}, not {what}: correct it, or move the "
                     "file away")


def read_text(path: Path) -> str:
    """Return a file's text; raises UserError where it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except ValueError as error:
        raise UserError(f"{path} is damaged ({one_line(error)}): correct it, or move it "
                        "away") from None


def parse_json(text: str, where: str | Path) -> object:
    """Return what a text in JSON holds; raises UserError naming `where` it stands."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON ({one_line(error)}): correct it, or move the file "
                        "away") from None
