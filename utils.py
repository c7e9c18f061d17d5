"""What every run needs around the training: run folder and log, meters, checkpoints, device and process helpers."""
import argparse
import contextlib
import datetime
import fcntl
import importlib.metadata
import json
import logging
import multiprocessing
import os
import platform
import signal
import socket
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy
import torch
from tqdm import tqdm

from distributed import launch, rank, restarts, sum_over_processes
from errors import Stopped, UsageError, UserError

log = logging.getLogger("any_precision")


# ---- process

class OneLineParser(argparse.ArgumentParser):
    """Tells of a wrong argument in one line, without the usage."""

    def error(self, message):
        told = f"{self.prog}: error: {one_line(message)} (--help lists the arguments)\n"
        self.exit(UsageError.exit_code, told if rank() == 0 else None)


class HelpFormatter(argparse.HelpFormatter):
    """Adds the default to the help of an argument that has one."""

    def _get_help_string(self, action):
        has_default = action.default not in (None, False, argparse.SUPPRESS)
        return f"{action.help} (default: {flag_text(action.default)})" if has_default else action.help


def run(main, parse_args):
    """main(parse_args()) as a program: what the user can mend is one line on stderr and a non-zero exit code."""
    program = Path(sys.argv[0]).name
    try:
        main(parse_args())
        return
    except Stopped as error:
        message, code = str(error), error.exit_code
    except UserError as error:
        message, code = f"error: {one_line(error)}", error.exit_code
    except OSError as error:  # a full disk, a folder without permission
        message, code = f"error: {one_line(error)}", 1
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            message, code = f"error: out of memory: lower --batch-size or --width ({one_line(error)})", 1
        elif "DataLoader worker" in str(error):
            message, code = f"error: {one_line(error)}: it may have run out of memory, lower --workers", 1
        else:
            raise
    except KeyboardInterrupt:
        message, code = "interrupted", 128 + signal.SIGINT
    finally:
        close_results_folder()
        end_data_workers()
    if code != UsageError.exit_code or rank() == 0:  # of several processes one tells
        print(f"{program}: {message}", file=sys.stderr)
    sys.exit(code)


def one_line(error):
    """What an error says, in one line; its type where it says nothing."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    if "in DataLoader worker process" in lines[0]:  # from there it arrives with the worker's traceback before it
        return lines[-1].split(": ", 1)[-1]
    return " ".join(lines) if lines[0].endswith(":") else lines[0]


@contextlib.contextmanager
def reading(path):
    """UserError naming path where what it holds is not of the kind or shape that the code within expects."""
    try:
        yield
    except (TypeError, KeyError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{path} holds something unexpected ({type(error).__name__}: {one_line(error)}): "
                        "it may be damaged, or not a checkpoint of this project") from None


def flag_text(value):
    """An argument's value as it is typed: lists with commas."""
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


class StopRequest:
    """Remembers SIGTERM or Ctrl-C in `signal` until the step is done; a second one acts at once."""

    def __init__(self):
        self.signal = None

    def __enter__(self):
        self.handlers = {number: signal.signal(number, self.remember) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def remember(self, number, frame):
        self.signal = number
        signal.signal(number, self.handlers[number])

    def __exit__(self, *error):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)


def end_data_workers():
    """End the data workers that are left: Python would send them SIGTERM at its exit, which they ignore, and wait."""
    workers = multiprocessing.active_children()
    if workers:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report them as killed
    for worker in workers:
        worker.kill()


def ignore_stop_signals(worker=None):
    """For data workers: Ctrl-C reaches the whole process group, but the training process decides when to stop."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


# ---- run folder and log

def open_log(folder):
    """Log to stdout and to folder/log_<hostname>.txt, which is continued where it exists."""
    log.setLevel(logging.INFO)
    log.propagate = False
    console = logging.StreamHandler(sys.stdout)
    file = logging.FileHandler(Path(folder, f"log_{socket.gethostname()}.txt"))
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.handlers = [console, file]


def close_results_folder():
    """Close the log and let go of the folder's lock."""
    for handler in log.handlers:
        handler.close()
    log.handlers = []
    while locks:
        locks.pop().close()


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path`; rename it to `path` once it is written and flushed to disk.

    Whatever happens meanwhile, `path` holds its old content or its new one, whole.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # one name, so that a killed save's is overwritten by the next
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name too, lest a power cut undo it
        finally:
            os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def open_results_folder(results_dir, name, in_place=False):
    """Make the results folder and open its log: results_dir, or the first free of results/<name>, <name>_2, ...

    UserError where it cannot be written, or holds a run that is not to be gone on with in_place: none is overwritten.
    """
    folder = Path(results_dir or Path("results", name))
    if results_dir and not in_place and holds_run(folder):
        raise UserError(f"{folder} holds a run already: go on with it by --resume {folder}, "
                        "or choose another folder with --results-dir")
    count = 1
    try:
        while not results_dir:
            try:
                folder.mkdir(parents=True)
                break
            except FileExistsError:
                count += 1
                folder = Path("results", f"{name}_{count}")
        folder.mkdir(parents=True, exist_ok=True)
        close_results_folder()
        lock(folder)
        open_log(folder)
    except OSError as error:
        raise UserError(f"results folder {folder} cannot be written ({error.strerror}): "
                        "choose another with --results-dir") from None
    return folder


locks = []  # the open file that holds the lock of the results folder


def lock(folder):
    """Keep other processes out of the folder until this one ends, however it ends; UserError where one is in it."""
    file = open(folder / ".lock", "w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"{folder} is being written by another run: let it end or stop it, or choose another folder with "
                        "--results-dir") from None
    except OSError:
        pass  # a file system without locks
    locks.append(file)


def begun_by_this_launch(results_dir):
    """The results folder that this launch of torchrun began before a process of it died; None where there is none."""
    if not restarts():
        return None
    for config in [Path(results_dir, "config.json")] if results_dir else Path("results").glob("*/config.json"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if json.loads(config.read_text()).get("launch") == launch():
                return config.parent
    return None


def holds_run(folder):
    metrics = Path(folder, "metrics.jsonl")
    return (any(Path(folder, "ckpt").glob("*.pth.tar")) or Path(folder, "evaluation.json").exists()
            or metrics.exists() and metrics.stat().st_size > 0)


def append_json_line(path, record):
    try:
        with open(path, "a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): make room there") from None


def read_metrics(path):
    """The records of a metrics.jsonl, bit-widths as whole numbers; a line cut short by a kill is passed over."""
    records = []
    for line in path.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            for part in ("train", "val"):
                record[part] = {int(bits): values for bits, values in record[part].items()}
            records.append(record)
    return records


def keep_epochs(path, epoch):
    """The records of metrics.jsonl up to `epoch`; later ones, which a resumed run makes again, are dropped from it."""
    records = [record for record in read_metrics(path) if record["epoch"] <= epoch] if path.exists() else []
    with replacing(path) as temporary:
        temporary.write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def write_summary(writer, record):
    """One epoch's record as TensorBoard scalars, tagged as the published code tags them."""
    epoch = record["epoch"]
    writer.add_scalar("lr", record["lr"], epoch)
    for part in ("train", "val"):
        for bits, values in record[part].items():
            writer.add_scalar(f"{part}_loss_{bits}", values["loss"], epoch)
            writer.add_scalar(f"{part}_prec_1_{bits}", values["top1"], epoch)
            writer.add_scalar(f"{part}_prec_5_{bits}", values["top5"], epoch)
    writer.flush()


class Console:
    """What a person sees: within an epoch a bar on a terminal, plain lines elsewhere; after it one aligned row."""

    def __init__(self, bit_widths, epochs, steps, print_freq, bar):
        self.bit_widths, self.epochs, self.steps, self.print_freq = bit_widths, epochs, steps, print_freq
        self.wants_bar = bar
        self.rows = 0
        self.started = time.monotonic()
        self.bar = None

    def step(self, epoch, metrics):
        """Call after each step; waits for the device every print_freq steps."""
        averages = metrics.averages() if metrics.steps % self.print_freq == 0 else None
        if self.wants_bar:
            if self.bar is None:
                self.bar = tqdm(desc=f"epoch {epoch + 1}/{self.epochs}", total=self.steps, initial=metrics.steps - 1,
                                unit="step", leave=False, file=sys.stdout)
            self.bar.update()
            if averages:
                self.bar.set_postfix(loss=f"{mean_loss(averages):.4f}")
        elif averages:
            log.info("epoch %d/%d  step %d/%d  loss %.4f  top-1 %s", epoch + 1, self.epochs, metrics.steps, self.steps,
                     mean_loss(averages), "  ".join(f"{bits}b {v['top1']:.2f}" for bits, v in averages.items()))

    def row(self, record):
        """Call after each epoch, with its record of metrics.jsonl."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.rows == 0:
            names = [f"{bits}b" for bits in self.bit_widths]
            log.info(self.format("epoch", "lr", "loss", names, names, "images/s", "left"))
        self.rows += 1
        left = (time.monotonic() - self.started) / self.rows * (self.epochs - record["epoch"])
        top1 = {part: [f"{record[part][bits]['top1']:.2f}" for bits in self.bit_widths] for part in ("train", "val")}
        log.info(self.format(f"{record['epoch']}/{self.epochs}", f"{record['lr']:.2g}",
                             f"{mean_loss(record['train']):.4f}", top1["train"], top1["val"],
                             f"{record['images_per_second']:.0f}", str(datetime.timedelta(seconds=round(left)))))

    @staticmethod
    def format(epoch, lr, loss, train, val, speed, left):
        return (f"{epoch:>7} {lr:>7} {loss:>7} | train {' '.join(f'{cell:>6}' for cell in train)}"
                f" | val {' '.join(f'{cell:>6}' for cell in val)} | {speed:>8} {left:>8}")


def mean_loss(averages):
    return sum(values["loss"] for values in averages.values()) / len(averages)


def write_json(path, value):
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def environment(device):
    """Versions, commit and device, for a results folder's config.json."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "numpy", "tensorboardX", "scikit-learn"):
        versions[package] = importlib.metadata.version(package)
    if device.type == "cuda":
        versions["cuda"] = torch.version.cuda

    def git(*command):
        folder = Path(__file__).parent
        try:
            done = subprocess.run(["git", "-C", folder, *command], capture_output=True, text=True)
        except OSError:
            return None  # no git here
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit and git("status", "--porcelain", "--untracked-files=no"):
        commit += " with local changes"
    return {"versions": versions, "commit": commit, "device": describe(device)}


# ---- device

def choose_device(name):
    """The device called `name`: auto, cpu, cuda or cuda:i. auto and cuda take the GPU with the most free memory; of
    several processes each takes the GPU of its number.

    UserError where there is no such GPU.
    """
    if name == "cpu" or name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"device {name} is not here: torch sees no CUDA GPU; choose cpu or auto")
    count = torch.cuda.device_count()
    if name in ("auto", "cuda") and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if name in ("auto", "cuda"):
        return torch.device("cuda", freest_gpu() if count > 1 else 0)
    device = torch.device(name)
    if device.index >= count:
        raise UserError(f"device {name} is not here: choose from {', '.join(f'cuda:{i}' for i in range(count))}, cpu, auto")
    return device


def freest_gpu():
    """Index, among the GPUs that torch sees, of the one with the most free memory as gpustat tells."""
    import gpustat

    try:
        free = {gpu.uuid.removeprefix("GPU-"): gpu.memory_total - gpu.memory_used for gpu in gpustat.new_query()}
    except Exception as error:  # the driver's library may be missing or refuse
        print(f"gpustat could not tell which GPU is free ({error}): taking cuda:0", file=sys.stderr)
        return 0
    uuids = [str(torch.cuda.get_device_properties(index).uuid) for index in range(torch.cuda.device_count())]
    return max(range(len(uuids)), key=lambda index: free.get(uuids[index], -1))


def describe(device):
    if device.type == "cuda":
        return f"{device}: {torch.cuda.get_device_name(device)}"
    return f"cpu: {processor_name()}, {torch.get_num_threads()} threads"


def processor_name():
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


# ---- metrics

class Metrics:
    """Sums of loss and of top-1 and top-5 hits per bit-width. They stay on the device until they are read."""

    def __init__(self, bit_widths, device):
        self.sums = torch.zeros(len(bit_widths), 3, dtype=torch.float64, device=device)  # loss, top-1, top-5
        self.bit_widths = sorted(bit_widths)
        self.count = 0  # images seen
        self.steps = 0
        self.seconds = 0.0  # spent on them
        self.unread = []  # (len(bit_widths),) losses since the last check_finite

    @staticmethod
    def row(results, labels):
        """What a batch adds to sums, from results {bit_width: (mean loss, logits (N, classes))} and labels (N,)."""
        losses, logits = zip(*(results[bits] for bits in sorted(results)))
        logits = torch.stack(logits)  # (bit_widths, N, classes)
        k = min(5, logits.shape[2])  # fewer than 5 classes: top-5 is always right
        hits = logits.topk(k, dim=2).indices == labels[:, None]  # (bit_widths, N, k)
        return torch.stack([torch.stack(losses) * len(labels), hits[..., 0].sum(1), hits.sum((1, 2))], dim=1).double()

    def add(self, row, count):
        """Add a batch of `count` images by its row."""
        self.sums += row
        self.unread.append(row[:, 0])
        self.count += count
        self.steps += 1

    def check_finite(self, what):
        """UserError naming `what`, the bit-width and the step of the first loss that is not finite.

        Waits for the device.
        """
        if not self.unread:
            return
        finite = torch.stack(self.unread).isfinite().tolist()  # a synchronisation point
        first = self.steps - len(self.unread) + 1
        self.unread = []
        for step, row in enumerate(finite, start=first):
            for bits, good in reversed(list(zip(self.bit_widths, row))):  # in the order they are run
                if not good:
                    raise UserError(f"{what}: the {bits}-bit loss is not finite at step {step}: lower --lr, or look at "
                                    "the data; the last good checkpoint is kept")

    def over_processes(self):
        """(sums, count) over all processes, each of which must ask."""
        total = sum_over_processes(torch.cat([self.sums.flatten(), self.sums.new_tensor([self.count])]))
        return total[:-1].view_as(self.sums), int(total[-1])

    def averages(self):
        """{bit_width: {"loss", "top1", "top5"}} over all processes, lowest first, top-k in percent. Waits for the device."""
        sums, count = self.over_processes()
        table = (sums / count).tolist()  # a synchronisation point
        return {bits: {"loss": loss, "top1": 100 * top1, "top5": 100 * top5}
                for bits, (loss, top1, top5) in zip(self.bit_widths, table)}

    def state_dict(self):
        sums, count = self.over_processes()
        return {"sums": sums, "count": count, "steps": self.steps, "seconds": self.seconds}

    def load_state_dict(self, state, first=True):
        """Take up saved sums, on the first of several processes; the others have counted none of them."""
        self.steps, self.seconds = state["steps"], state["seconds"]
        if first:
            self.sums.copy_(state["sums"])
            self.count = state["count"]


# ---- checkpoints

def save_checkpoint(path, state):
    """Write a checkpoint whole or not at all; UserError where the disk is full or cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            torch.save(state, temporary)
    except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as RuntimeError
        raise UserError(f"{path} cannot be written ({one_line(error)}): make room there, or choose another folder; "
                        "what was saved before is kept") from None


# A NumPy number, such as best_prec1 may be, is data; under the name that NumPy 2 gives it and the one before.
NUMPY_NUMBERS = [(numpy.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
NUMPY_NUMBERS += [numpy.dtype, numpy.dtypes.Float64DType, numpy.dtypes.Float32DType, numpy.dtypes.Int64DType]


def load_checkpoint(path):
    """Read a checkpoint onto the CPU, as data only: code in it is refused. UserError where it is not a checkpoint."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a file may also be odd without being dangerous
            with torch.serialization.safe_globals(NUMPY_NUMBERS):
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch's own text would advise to run the file's code
        raise UserError(f"{path} is not a checkpoint that can be read safely ({type(error).__name__}): "
                        "it is cut short, not a checkpoint, or holds code") from None
    weights = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(key, str) for key in weights):
        raise UserError(f"{path} is not a checkpoint of this kind: it must be a dict with a state_dict")
    checkpoint["state_dict"] = {key.removeprefix("module."): value for key, value in weights.items()}  # DataParallel's
    return checkpoint


def load_weights(model, state_dict, path):
    """Load every entry of state_dict into model; UserError naming those that are missing, unexpected or mis-shaped."""
    own = model.state_dict()
    problems = {
        "missing": sorted(own.keys() - state_dict.keys()),
        "unexpected": sorted(state_dict.keys() - own.keys()),
        "of another shape": sorted(key for key in own.keys() & state_dict.keys()
                                   if own[key].shape != getattr(state_dict[key], "shape", None))}
    if any(problems.values()):
        told = "; ".join(f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
                         for what, keys in problems.items() if keys)
        raise UserError(f"{path} does not fit the model: {told}; check --model, --width and --bit_width_list")
    model.load_state_dict(state_dict)


# What an optimizer's parameter group holds of how and at what learning rate it goes on, not of what it has learnt.
IMPLEMENTATION = ("lr", "fused", "foreach", "capturable")


def load_optimizer(optimizer, state, path):
    """Load an optimizer's state; UserError where it is another optimizer's, or another network's."""
    try:
        own = [{name: group[name] for name in IMPLEMENTATION if name in group} for group in optimizer.param_groups]
        optimizer.load_state_dict({**state, "param_groups": [
            {**group, **mine} for group, mine in zip(state["param_groups"], own, strict=True)]})
        for parameter, values in optimizer.state.items():
            for name, value in values.items():
                if torch.is_tensor(value) and value.shape == parameter.shape and value.stride() != parameter.stride():
                    values[name] = torch.empty_like(parameter).copy_(value)  # fused kernels need one memory format
        odd = [name for group in optimizer.param_groups for name in optimizer.defaults.keys() - group.keys()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        odd = [one_line(error)]
    if odd:
        raise UserError(f"{path} holds another optimizer's state ({odd[0]}): check --optimizer")
