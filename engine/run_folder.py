"""The results folder of a run: its lock, log, configuration and metrics, written by rank 0."""
import contextlib
import fcntl
import json
import logging
import platform
import socket
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from tensorboardX import SummaryWriter

from engine.device import describe
from engine.distributed import gather, rank, world_size
from engine.errors import UserError
from engine.state import TrainingState
from models import BitWidth
from utils import commit, one_line, with_text_keys, write_json, write_text

log = logging.getLogger("any_precision")  # to stdout, and log_<hostname>.txt in the folder
log.setLevel(logging.INFO)
log.propagate = False
ANOTHER = "choose another folder with --results-dir"


class RunFolder:
    """A context manager that locks a results folder and logs to it.

    folder: its path; None: the first free one of results/<name>, <name>_2, ... in_place: resume the
    run in the folder. save_every: minutes between saves. Raises UserError where the folder cannot
    be written, another run writes to it, or it holds a run and `in_place` is False.
    """

    def __init__(self, folder: str | Path | None, name: str, in_place: bool = False,
                 save_every: float | None = None):
        self.save_every = save_every
        self.last_save = time.monotonic()
        self.history = []  # records of metrics.jsonl
        self.writer = None
        self.lock = None
        self.path = Path(gather(self.open(folder, name, in_place) if rank() == 0 else None)[0])
        self.metrics_file = self.path / "metrics.jsonl"

    def open(self, results_dir: str | Path | None, name: str, in_place: bool) -> Path:
        """Create and lock the folder, and open its log; return its path."""
        folder = Path(results_dir or f"results/{name}")
        count = 1
        outputs = ("ckpt/*.pth.tar", "evaluation.json", "metrics.jsonl")
        must_be_free = results_dir and not in_place
        if must_be_free and any(
                path.stat().st_size for pattern in outputs for path in folder.glob(pattern)):
            raise UserError(f"{folder} holds a run already: go on with it by --resume {folder}, or "
                            f"{ANOTHER}")
        while not results_dir and folder.exists():
            count += 1
            folder = Path(f"results/{name}_{count}")

        try:
            folder.mkdir(parents=True, exist_ok=bool(results_dir))
            self.lock = open(folder / ".lock", "w")  # held until it is closed
            try:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{folder} is being written by another run: let it end or stop it, "
                                f"or {ANOTHER}") from None
            except OSError:
                pass  # a file system without locks
            file = logging.FileHandler(folder / f"log_{socket.gethostname()}.txt")  # appends
        except OSError as error:
            raise UserError(f"results folder {folder} cannot be written ({error.strerror}): "
                            f"{ANOTHER}") from None
        file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
        log.handlers = [logging.StreamHandler(sys.stdout), file]
        return folder

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for file in (*log.handlers, self.writer, self.lock):
            if file:
                file.close()
        log.handlers = []

    def write_config(self, arguments: dict, device: torch.device, **more: object) -> None:
        """Write config.json: arguments, seed, command, versions, commit and device."""
        if rank() > 0:
            return
        packages = ("torch", "torchvision", "numpy", "tensorboardX", "scikit-learn")
        versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
        versions.update((name, version(name)) for name in packages)

        path = self.path / "config.json"
        first = {}
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # a resumed run's
            before = json.loads(path.read_text())
            first["first_command"] = before.get("first_command") or before["command"]
        write_json(path, {
            "arguments": arguments, "seed": arguments["seed"], "command": sys.argv, **first,
            "processes": world_size(), **more, "versions": versions, "commit": commit(),
            "device": describe(device)})

    def begin(self, epoch: int) -> None:
        """Drop the records after `epoch` epochs, which a resumed run repeats."""
        if rank() == 0:
            records = read_metrics(self.metrics_file) if self.metrics_file.exists() else []
            self.history = [record for record in records if record["epoch"] <= epoch]
            write_metrics(self.metrics_file, self.history)
            self.writer = SummaryWriter(str(self.path / "summary"), purge_step=epoch)

    def log_epoch(self, record: dict) -> None:
        """Append an epoch's record to metrics.jsonl and TensorBoard, with the published tags."""
        if rank() > 0:
            return
        self.history.append(record)
        write_metrics(self.metrics_file, self.history)
        epoch = record["epoch"] - 1  # counted from 0 in TensorBoard, as published
        self.writer.add_scalar("lr", record["lr"], epoch)
        for part in ("train", "val"):
            for bits, values in record[part].items():
                for tag, name in (("loss", "loss"), ("prec_1", "top1"), ("prec_5", "top5")):
                    self.writer.add_scalar(f"{part}_{tag}_{bits}", values[name], epoch)
        self.writer.flush()

    def save(self, state: TrainingState, best: bool = False) -> None:
        """Save a TrainingState to this folder; all processes must call it."""
        state.save(self.path, best)
        self.last_save = time.monotonic()

    def save_is_due(self) -> bool:
        """Return whether `save_every` minutes have passed since the last save; rank 0 decides."""
        minutes = (time.monotonic() - self.last_save) / 60
        return rank() == 0 and self.save_every is not None and minutes > self.save_every


def write_metrics(path: Path, records: list[dict]) -> None:
    """Write a metrics.jsonl, one line per record; raises UserError where the disk is full."""
    try:
        write_text(path, "".join(json.dumps(with_text_keys(record)) + "\n" for record in records))
    except OSError as error:
        raise UserError(f"{path} cannot be written ({one_line(error)}): make room there") from None


def read_metrics(path: Path) -> list[dict]:
    """Return the records of a metrics.jsonl; skips a line that a kill cut short."""
    records = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            for part in ("train", "val"):
                record[part] = {BitWidth.of(width): values
                                for width, values in record[part].items()}
            records.append(record)
    return records
