"""Abuse the programs with seeded cases, and count what is mishandled.

    python tests/abuse.py --cases 2000 --seed 0
    python tests/abuse.py --cases 400 --seed 0 --only bits        # one flipped bit in a checkpoint
    python tests/abuse.py --seed 0 --case packed:17               # one again, and what it printed

A case is mishandled where it ends in a traceback, a crash or a hang; where it exits 0 with another
result than the undamaged files give, though what was put in could not be meant; where its error is
not one printable line with the file and a remedy; or where something saved before is lost.

Cases run within forked workers of a process that has run no backward pass, many in each.
"""
import argparse
import contextlib
import functools
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # exact on a CPU; set before torch looks

import numpy  # noqa: E402
import pytest  # noqa: E402
import safetensors  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torchvision import datasets  # noqa: E402

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import export  # noqa: E402
import models  # noqa: E402
import report  # noqa: E402
import runs  # noqa: E402
import small_networks  # noqa: E402
import tiny_data  # noqa: E402
import train  # noqa: E402
from dataset.loader import count_classes, fingerprint  # noqa: E402
from engine import published  # noqa: E402
from engine.arguments import FLAGS, merge_args, parse_flags  # noqa: E402
from engine.errors import run_program  # noqa: E402
from engine.setup import make_train_loader, make_val_loader, open_data  # noqa: E402
from models import packed  # noqa: E402
from models.checkpoint import read_checkpoint  # noqa: E402
from utils import markdown_table  # noqa: E402

NOWHERE = "http://127.0.0.1:9/"  # refuses at once
LIMIT = 180  # seconds of a case, after which it counts as hanging
KINDS = ("commands", "checkpoints", "packed", "data", "results", "bits")
PATTERN = (  # the kinds of 20 cases in turn
    "checkpoints", "packed", "commands", "results", "checkpoints", "data", "packed", "bits",
    "checkpoints", "commands", "results", "packed", "checkpoints", "commands", "bits", "results",
    "checkpoints", "packed", "data", "commands")
# A message says what to do by one of these, or that a file is damaged.
REMEDY = re.compile(r"\b(give|choose|check|remove|copy|export|leave|correct|move|replace|lower|"
                    r"pass|name|put|list|set|take|add|start|go|let|install|download|resume|update|"
                    r"free|calibrate|damaged|cut short|holds code|goes with|must)\b|--help")


class Outcome(NamedTuple):
    """How a program ended."""
    code: int
    out: str
    err: str


class Case(NamedTuple):
    """What is done to which file, and what may come of it."""
    what: str
    call: Callable[[], Outcome]
    names: tuple[str, ...]  # of which an error must contain one
    problem: Callable[[Outcome], str | None]  # of an exit with 0


# ---- calls, in this process

def call(main, parse, argv):
    """Run a program; return its Outcome, with code 70 and the traceback where it raises."""
    out = io.StringIO()
    err = io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_program(main, partial(parse, [str(word) for word in argv]))
        except SystemExit as ended:
            code = ended.code
        except BaseException:
            code = 70
            err.write(traceback.format_exc())
    return Outcome(code, out.getvalue(), err.getvalue())


def call_train(*argv):
    return call(train.main, parse_flags, argv)


def call_export(*argv):
    return call(export.main, export.parse_args, argv)


def call_report(*argv):
    return call(report.main, report.parse_args, argv)


def call_load(path):
    """Load a network, and print what tells its weights apart, as a program would."""
    return call(lambda args: print(network_digest(args)), lambda argv: argv[0], [path])


def call_content(path):
    """Read a checkpoint, and print what tells all that it holds apart."""
    return call(lambda args: print(digest(read_checkpoint(args))), lambda argv: argv[0], [path])


def call_read(*argv):
    """Read all images of a data set as a training does, and print what tells them apart."""
    return call(read_data, parse_flags, argv)


def read_data(flags):
    args = merge_args(flags)
    train_set, val_set = open_data(args)
    print(count_classes(args.dataset, train_set, val_set))
    torch.manual_seed(args.seed)
    for make, part in ((make_train_loader, train_set), (make_val_loader, val_set)):
        print(fingerprint(part))
        for images, labels in make(args, part, torch.contiguous_format, torch.device("cpu")):
            print(images.double().sum().item(), labels.tolist())


def network_digest(path):
    model = models.load(path)
    return digest([*model.parameters(), *model.buffers()])


def digest(value):
    """Return a SHA-256 of tensors and numbers in whatever dicts and lists they stand."""
    if isinstance(value, dict):
        value = sorted(digest([str(key), part]) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        value = "".join(map(digest, value))
    total = hashlib.sha256()
    if torch.is_tensor(value):
        total.update(value.detach().contiguous().flatten().view(torch.uint8).numpy())
        value = value.dtype, value.shape
    total.update(str(value).encode())
    return total.hexdigest()


# ---- what is there before: data, a run, its files, and what undamaged files give

class Base:
    """The files that cases damage copies of, in a folder, and the outcomes without damage."""

    def __init__(self, place):
        self.place = place
        self.data = place / "data"
        self.run = place / "run"
        self.packed = place / "net"
        self.begun = place / "begun"
        self.evaluated = place / "evaluated"
        self.expected = functools.cache(self.outcome_of)

    def make(self):
        """Train, stop within an epoch, evaluate, export."""
        must(call_train(*self.training(self.run)))
        step = train.Console.step

        def stopping(console, epoch, metrics):
            step(console, epoch, metrics)
            if metrics.steps == 2:
                signal.raise_signal(signal.SIGINT)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train.Console, "step", stopping)
            must(call_train(*self.training(self.begun)), 130)
        must(self.evaluate(self.run, self.evaluated))
        must(call_export(self.run, "--data-dir", self.data, "--format", "packed", "--bits", "any",
                         "--output", self.packed))

    def training(self, folder):
        return [*runs.tiny(self.data, folder), "--epochs", "2", "--lr_decay", "1"]

    def evaluate(self, source, folder):
        return call_train("--evaluate", "--pretrain", source, "--data-dir", self.data, "--device",
                          "cpu", "--results-dir", folder)

    def read(self, name, data):
        return call_read("--dataset", name, "--data-dir", data, "--batch-size", 4, "--model",
                         "resnet20q")

    def act(self, action, source, folder):
        """Do one of the things that one does with a checkpoint."""
        if action == "load":
            return call_load(source)
        if action == "read":
            return call_content(source)
        if action == "evaluate":
            return self.evaluate(source, folder)
        if action == "resume":
            return call_train("--resume", source, "--epochs", 2, "--device", "cpu",
                              "--results-dir", folder)
        if action == "pretrain":
            return call_train(*self.training(folder), "--epochs", 1, "--pretrain", source)
        folder.mkdir(exist_ok=True)
        return call_export(source, "--format", "packed", "--bits", 2, "--output",
                           folder / "net", "--data-dir", self.data)

    def outcome_of(self, action, source):
        """Return what an action gives with an undamaged file or data set, or None if refused."""
        with tempfile.TemporaryDirectory(dir=self.place.parent) as folder:
            place = Path(folder, "r")
            if action == "images":
                return self.read(source, self.data).out
            outcome = self.act(action, source, place)
            return result_of(action, outcome, place) if outcome.code == 0 else None


def must(outcome, code=0):
    assert outcome.code == code, outcome


DATA = ("mnist", "cifar10", "svhn", "imagenet")


def result_of(action, outcome, folder):
    """Return as text what must not depend on damage that was not seen."""
    if action in ("load", "read"):
        return outcome.out
    if action == "evaluate":
        return (folder / "evaluation.json").read_text()
    if action == "export":
        return network_digest(folder / "net")
    content = runs.load(folder)
    return digest([content[name] for name in ("epoch", "best", "state_dict", "optimizer",
                                              "random_states")])


def offline(patch):
    """Let nothing be downloaded, whatever the machine could reach."""
    patch.setattr(published, "PREFIX", NOWHERE)
    patch.setattr(datasets.CIFAR10, "url", NOWHERE)
    for kind in (datasets.MNIST, datasets.FashionMNIST):
        patch.setattr(kind, "mirrors", [NOWHERE])
    patch.setenv("no_proxy", "*")


def make_data(base, patch):
    """Write the data sets, and have torchvision expect them; make nothing wait for a network."""
    small_networks.register(patch)
    for name in DATA:
        getattr(tiny_data, name)(base.data, patch)
    for path in (base.data / "mnist").rglob("*.gz"):
        if "labels" in path.name:  # so that some raw files stand alone
            path.unlink()
    offline(patch)


# ---- damage to values and to bytes

def any_value(rng):
    """Return a value that hardly any field may have."""
    digits = int("7" * 50)
    return rng.choice([
        None, True, 0, -1, -3, 1, 2, 99, digits, -digits, 1.5, -0.5, 1e308, math.nan, math.inf, "",
        "x", "0", "\x1b[31mred\x1b[0m", "two\nlines", "\u202eabc", "a" * 500, [], [1], [None],
        [[2]], ["x"], {}, {"x": 1}, {"\x1b[2J": {}}])


def any_tensor(rng, like=None):
    """Return a tensor, or one that is like another but for its type, shape or values."""
    own = like if torch.is_tensor(like) and like.layout == torch.strided else torch.ones(3, 2)
    number = rng.randrange(14)
    if number == 0:
        return own.to_sparse()
    if number == 1:
        return own.to(torch.complex64)
    if number == 2:
        return own.to(rng.choice([torch.float64, torch.float16, torch.bfloat16, torch.int32,
                                  torch.uint8, torch.bool, torch.int64]))
    if number == 3:
        return own[None]
    if number == 4:
        return own.flatten()[:1]
    if number == 5:
        return own.flatten()[:0]
    if number == 6:
        return own.clone().double().fill_(rng.choice([math.nan, math.inf])).to(torch.float32)
    if number == 7:
        return torch.empty(own.shape, device="meta")
    if number == 8:
        return torch.quantize_per_tensor(own.float(), 0.1, 0, torch.quint8)
    if number == 9:
        return own.expand(2, *own.shape)
    if number == 10:
        return torch.tensor(rng.choice([0, -1, 1, 2**62]))
    if number == 11:
        return own.to(torch.float8_e4m3fn) if own.is_floating_point() else own.float()
    if number == 12:
        return own.transpose(0, -1).clone() if own.ndim > 1 else own.repeat(2)
    return (own.double() * -1e6 - 1).to(own.dtype)


def mutate(rng, content, make):
    """Change one value anywhere in dicts and lists; return its path, and it before and after.

    make: function of (rng, old value) that returns a new one. None stands for no value.
    """
    path = []
    owner = content
    while True:
        keys = list(owner) if isinstance(owner, dict) else list(range(len(owner)))
        key = rng.choice(keys) if keys else None
        value = owner[key] if keys else None
        path.append(key)
        inner = isinstance(value, (dict, list)) and len(value) > 0
        if not inner or rng.random() < 0.15:
            break
        owner = value
    how = rng.choice(["replace"] * 6 + ["delete", "add", "rename"])
    if not keys or how == "add":
        new = make(rng, None)
        if isinstance(owner, dict):
            owner[rng.choice(["x", "\x1b[31m", "fc.extra", 5] if keys else ["x"])] = new
        else:
            owner.append(new)
        return [*path[:-1], "+"], None, new
    if how == "delete":
        del owner[key]
        return path, value, None
    if how == "rename" and isinstance(owner, dict):
        del owner[key]
        owner[f"{key}\x1b[1m" if rng.random() < 0.5 else f"module.{key}"] = value
        return path, value, None
    new = make(rng, value)
    owner[key] = new
    return path, value, new


# Fields that older or published files lack, and which may be None.
MAY_LACK = {"images", "network", "best", "data", "counts", "dataset", "size", "mean", "std",
            "class_names", "param_names", "initial_lr", "arguments", "quantizer", "own_bits",
            *(name for name, flag in FLAGS.items() if not flag.identifies)}


def may_be_meant(path, old, new):
    """Return whether a change is to a value that the field may well have.

    path: "+" at its end is one more. None: a field that is missing.
    """
    if path[-1] == "+":
        return "lr_decay" in path
    if old is None or new is None:
        return path[-1] in MAY_LACK or "state" in path
    if torch.is_tensor(old) or torch.is_tensor(new):
        return (torch.is_tensor(old) and torch.is_tensor(new) and old.shape == new.shape
                and old.is_floating_point() == new.is_floating_point()
                and new.layout == torch.strided)
    numbers = (int, float)
    if type(old) in numbers and type(new) in numbers:
        return math.isfinite(new) and (new >= 0 or old < 0)
    return type(old) is type(new)


def damage_bytes(rng, path):
    """Damage a file; return how."""
    content = bytearray(path.read_bytes())
    how = rng.choice(["bit", "bit", "cut", "zeros", "insert", "noise", "empty"])
    place = rng.randrange(max(1, len(content)))
    if how == "bit" and content:
        content[place] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del content[place:]
    elif how == "zeros":
        content[place:place + 64] = bytes(len(content[place:place + 64]))
    elif how == "insert":
        content[place:place] = bytes([rng.randrange(256)])
    elif how == "noise":
        content[place:place + 64] = rng.randbytes(len(content[place:place + 64]))
    elif how == "empty":
        content = bytearray()
    path.write_bytes(content)
    return f"{how} at {place}"


# ---- the kinds of cases: functions of (rng, base, place), place a folder of the case

def case_of_file(base, place, path, action, source, what, meant):
    """Return the Case of a damaged checkpoint or packed file; meant: any result is right."""
    folder = place / "r"

    def problem(outcome):
        same = meant or result_of(action, outcome, folder) == base.expected(action, source)
        return None if same else "another result, and exit 0"

    return Case(f"{action}: {what}", lambda: base.act(action, path, folder), (path.name,), problem)


def checkpoints(rng, base, place):
    source = rng.choice([base.run, base.begun]) / "ckpt" / "model_latest.pth.tar"
    path = place / "x.pth.tar"
    action = rng.choice(["load", "evaluate", "evaluate", "resume", "resume", "resume", "pretrain",
                         "export"])
    if rng.random() < 0.15:
        shutil.copy(source, path)
        return case_of_file(base, place, path, action, source, damage_bytes(rng, path), False)
    content = torch.load(source, weights_only=True)

    def make(rng, old):
        of_tensors = 0.8 if torch.is_tensor(old) else 0.15
        return any_tensor(rng, old) if rng.random() < of_tensors else any_value(rng)

    inner = rng.choice([content] * 3 + [content["arguments"], content["optimizer"],
                                        content["state_dict"], content["metrics"],
                                        content["network"], content["images"]])
    where, old, new = mutate(rng, inner, make)
    torch.save(content, path)
    return case_of_file(base, place, path, action, source, describe(where, new),
                        may_be_meant(where, old, new))


def describe(where, new):
    text = f"tensor {new.dtype} {new.layout} {tuple(new.shape)}" if torch.is_tensor(new) else new
    return f"{'.'.join(map(str, where))} = {text!r}"[:200]


def bits(rng, base, place):
    source = base.run / "ckpt" / "model_latest.pth.tar"
    path = place / "x.pth.tar"
    content = bytearray(source.read_bytes())
    at = rng.randrange(len(content))
    content[at] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return case_of_file(base, place, path, "read", source, f"bit of byte {at}", False)


def packed_files(rng, base, place):
    path = place / "x.safetensors"
    action = rng.choice(["load", "load", "evaluate", "export", "resume", "pretrain"])
    if rng.random() < 0.2:
        shutil.copy(base.packed, path)
        return case_of_file(base, place, path, action, base.packed, damage_bytes(rng, path), False)
    with safetensors.safe_open(base.packed, "pt") as file:
        about = json.loads(file.metadata()[packed.KEY])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    if rng.random() < 0.6:
        where, old, new = mutate(rng, about, lambda rng, old: any_value(rng))
    else:
        where, old, new = mutate(rng, tensors, any_tensor)
        tensors = {str(name): storable(value) for name, value in tensors.items()}
    what = describe(where, new)
    about = json.loads(json.dumps(about))
    if rng.random() < 0.9:
        about["sha256"] = packed.digest(tensors, about)
    safetensors.torch.save_file(tensors, path, {packed.KEY: json.dumps(about)})
    return case_of_file(base, place, path, action, base.packed, what,
                        may_be_meant(where, old, new))


def storable(value):
    """Return a tensor as safetensors files hold it; another one for those that they do not."""
    dense = value.layout == torch.strided and value.device.type == "cpu"
    if not dense or value.is_quantized or value.is_complex():
        return torch.zeros(2)
    return value.clone(memory_format=torch.contiguous_format)


def results(rng, base, place):
    """A damaged results folder, reported beside a good one, alone, or resumed in place."""
    source = rng.choice([base.run, base.run, base.evaluated])
    folder = place / "x"
    resumed = source is base.run and rng.random() < 0.2
    shutil.copytree(source, folder)
    name = rng.choice(["config.json", "metrics.jsonl" if source is base.run else "evaluation.json"])
    path = folder / ("metrics.jsonl" if resumed else name)
    if rng.random() < 0.4:
        what = damage_bytes(rng, path)
        meant = True  # digits are damaged to other digits
    else:
        lines = [json.loads(line) for line in path.read_text().splitlines()] if (
            path.suffix == ".jsonl") else [json.loads(path.read_text())]
        where, old, new = mutate(rng, lines, lambda rng, old: any_value(rng))
        what = describe(where, new)
        meant = may_be_meant(where, old, new)
        path.write_text("".join(json.dumps(as_json(line)) + "\n" for line in lines))
    before = runs.snapshot(folder / "ckpt")

    def problem(outcome):
        if resumed:
            return None if runs.snapshot(folder / "ckpt") == before else "checkpoints changed"
        expected = call_report(*argv[:-3], source, "--output", place / "u").out
        same = outcome.out.replace(str(folder), "") == expected.replace(
            str(source), "").replace(str(place / "u"), str(place / "t"))
        return None if meant or same else "another table, and exit 0"

    argv = [folder, "--output", place / "t"]
    if rng.random() < 0.5:
        argv = [base.run if source is not base.run else base.evaluated, *argv]
    call = partial(call_report, *argv)
    if resumed:
        call = partial(call_train, "--resume", folder, "--device", "cpu")
    return Case(f"{'resume' if resumed else 'report'}: {path.name}: {what}", call, (str(folder),),
                problem)


def as_json(value):
    """Return a value with text as keys."""
    if isinstance(value, dict):
        return {str(key): as_json(part) for key, part in value.items()}
    return [as_json(part) for part in value] if isinstance(value, list) else value


def data(rng, base, place):
    name = rng.choice(["mnist", "mnist", "cifar10", "svhn", "imagenet", "imagenet", "imagenet"])
    folder = place / "data"
    shutil.copytree(base.data / name, folder / name, symlinks=True)
    files = sorted(path for path in (folder / name).rglob("*") if path.is_file())
    path = rng.choice(files)
    outcome_is = "any"
    if name == "imagenet":
        what = rng.choice(sorted(IMAGE_DAMAGES))
        outcome_is = IMAGE_DAMAGES[what](rng, path) or "refused"
    elif name == "mnist" and rng.random() < 0.6:
        what, outcome_is = damage_idx(rng, rng.choice([p for p in files if p.suffix != ".gz"]))
    elif rng.random() < 0.3:
        what = rng.choice(["removed", "a folder", "a pipe", "a link to itself"])
        path.unlink()
        {"removed": lambda: None, "a folder": path.mkdir, "a pipe": lambda: os.mkfifo(path),
         "a link to itself": lambda: path.symlink_to(path)}[what]()
    else:
        what = damage_bytes(rng, path)

    def problem(outcome):
        if outcome_is == "refused":
            return "damaged data, and exit 0"
        same = outcome.out == base.expected("images", name)
        return None if same or name in ("imagenet", "mnist") else "other data, and exit 0"

    return Case(f"{name}: {path.name}: {what}", partial(base.read, name, folder), (str(folder),),
                problem)


def damage_idx(rng, path):
    """Damage a raw file of MNIST's format; return how, and what must come of it."""
    content = bytearray(path.read_bytes())
    head = 16 if "images" in path.name else 8
    has_packed = path.with_name(f"{path.name}.gz").exists()
    how = rng.choice(["header", "cut", "longer", "content", "whole header"])
    if how == "header":
        content[rng.randrange(head)] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del content[rng.randrange(len(content)):]
    elif how == "longer":
        content += bytes(rng.randrange(1, 99))
    elif how == "content":
        content[rng.randrange(head, len(content))] = 200
    else:
        shape = [rng.choice([0, 1, 6, 12, 28, 56, 2**31]) for _ in range(head // 4 - 1)]
        content[4:head] = struct.pack(f">{len(shape)}I", *shape)
    seen = how in ("header", "cut", "longer") or has_packed or "labels" in path.name
    same = content == path.read_bytes()
    path.write_bytes(content)
    return f"{path.name}: {how}", "any" if same or not seen else "refused"


def write_image(path, mode, size, kind):
    Image.fromarray(numpy.full(size, 99, numpy.uint8)).convert(mode).save(path, kind)


def png_of(width, height):
    """Return a PNG's beginning that claims a size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header + bytes(4)


def in_place_of(path, make):
    path.unlink()
    make(path)


# {damage: function of (rng, path of an image) that returns "any" where it may pass}
IMAGE_DAMAGES = {
    "bytes": lambda rng, path: damage_bytes(rng, path) and "any",
    "text": lambda rng, path: path.write_text("no image") and None,
    "half": lambda rng, path: os.truncate(path, path.stat().st_size // 2),
    "postscript": lambda rng, path: path.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n") and None,
    "a GIF": lambda rng, path: write_image(path, "P", (40, 40), "GIF"),
    "a bomb": lambda rng, path: path.write_bytes(png_of(2**20, 2**20)) and None,
    "no size": lambda rng, path: path.write_bytes(png_of(0, 0)) and None,
    "one pixel": lambda rng, path: write_image(path, "L", (1, 1), "PNG") or "any",
    "a line": lambda rng, path: write_image(path, "RGB", (1, 400), "PNG") or "any",
    "one bit": lambda rng, path: write_image(path, "1", (40, 40), "PNG") or "any",
    "a TIFF of floats": lambda rng, path: write_image(path, "F", (40, 40), "TIFF") or "any",
    "a pipe": lambda rng, path: in_place_of(path, os.mkfifo),
    "a link to nothing": lambda rng, path: in_place_of(path, lambda p: p.symlink_to("nothing")),
    "a link to itself": lambda rng, path: in_place_of(path, lambda p: p.symlink_to(p.name)),
    "a folder's link to itself": lambda rng, path: (path.parent / "again").symlink_to(
        path.parent, target_is_directory=True),
    "a split without images": lambda rng, path: shutil.rmtree(path.parent.parent),
    "a class without images": lambda rng, path: (path.parent.parent / "n0").mkdir(),
    "a class of one split": lambda rng, path: shutil.copytree(
        path.parent, path.parent.parent / "n1") and None,
    "a class that is gone": lambda rng, path: shutil.rmtree(path.parent),
    "names that are no UTF-8": lambda rng, path: path.rename(
        os.fsdecode(os.fsencode(path.parent) + b"/\xff\x1b[31m.JPEG")) and "any",
}


# Values of flags; those of COSTLY flags would take long where they are taken.
TEXTS = ("", " ", "--", "None", "x", "0", "1", "2", "-1", "8", "20", "1.5", "1e3", "1e999", "nan",
         "-inf", "0x10", "\uff11", "1_0", "2,4", "2,32", "w2a4", "w2a99", "2,2", ",", "é",
         "\x1b[31mred", "two\nlines", "caf\udce9", "x" * 3000, "9" * 400, "..", "/dev/null",
         "/proc/self/mem", "http://[x", "http://127.0.0.1:9/x.pth.tar", "~", "*", "resnet20q",
         "resnet20q_any_recursive", "svhnq", "torchvision:resnet18", "torchvision:vit_b_16",
         "cifar10", "mnist", "digits", "recursive", "hard", "sgd", "adamw", "cosine", "lsq", "cpu",
         "cuda:7", "bf16", "mean")
CHEAP = ("", "--", "x", "0", "-1", "1", "2", "nan", "1e999", "1.5", "9" * 400)
COSTLY = {"--epochs": CHEAP, "--width": ("", "x", "0", "-1", "1", "2", "1000000000", "nan"),
          "--workers": ("", "x", "-1", "0", "nan"), "--start-epoch": CHEAP,
          "--dataset": ("", "x", "cifar10", "CIFAR10", "\x1b[31m", "svhn", "mnist"),
          "--model": ("", "x", "resnet20q", "svhnq", "torchvision:vit_b_16", "torchvision:x",
                      "torchvision:googlenet", "torchvision:", "\x1b[2J")}


def commands(rng, base, place):
    program = rng.choice(["train", "train", "train", "evaluate", "resume", "export", "report"])
    sources = [base.run, base.begun, base.packed, base.run / "ckpt", base.data, place / "none",
               base.place, base.run / "config.json"]
    folder = place / "r"
    if program == "report":
        argv = [*rng.choices(sources, k=rng.randrange(1, 4)), "--output", place / "t"]
        flags = ["--epoch", "--output", None]
        function = call_report
    elif program == "export":
        argv = [rng.choice(sources), "--format", "packed", "--output", place / "net", "--data-dir",
                base.data]
        flags = ["--format", "--bits", "--output", "--check", "--dataset", "--data-dir", None]
        function = call_export
    else:
        flags = [f"--{name.replace('_', '-')}" for name, flag in FLAGS.items()
                 if name not in ("compile", "results_dir")] + [None]
        function = call_train
        argv = [*base.training(folder), "--epochs", 1]
        if program == "evaluate":
            argv = ["--evaluate", rng.choice(["--pretrain", "--resume"]), rng.choice(sources),
                    "--data-dir", base.data, "--device", "cpu", "--results-dir", folder]
        if program == "resume":
            argv = ["--resume", rng.choice(sources), "--device", "cpu", "--results-dir", folder]
    given = []
    for flag in rng.choices(flags, k=rng.randrange(0 if program == "report" else 1, 4)):
        if flag in ("--all-conv", "--evaluate", "--sync-bn"):
            given.append(flag)
            continue
        paths = [*map(str, sources), str(place / "u")]
        text = rng.choice(COSTLY.get(flag) or [*TEXTS, *paths])
        if flag is None:
            given.append(text)
        else:
            given += [f"{flag}={text}"] if rng.random() < 0.5 else [flag, text]
    argv = [str(word) for word in [*argv, *given]]

    def problem(outcome):
        if program in ("report", "export"):
            return None
        written = list(folder.glob("config.json"))
        if not written:
            return None if program == "resume" else "no config.json, and exit 0"
        found = json.loads(written[0].read_text())["arguments"]
        for name, value in vars(parse_flags(argv)).items():
            text = "***" in str(found[name])
            if found[name] != value and not text and name not in ("resume", "lr_decay"):
                return f"{name} is {found[name]!r}, not {value!r}"
        return None

    def run():
        os.chdir(place)
        return function(*argv)

    shown = given if program == "train" else argv
    return Case(f"{program}: {shown!r}"[:400], run, ("",), problem)


MAKE = {"commands": commands, "checkpoints": checkpoints, "packed": packed_files, "data": data,
        "results": results, "bits": bits}


# ---- a case, judged

def run_case(base, seed, kind, number):
    """Run a case; return (what it is, its exit code, what is mishandled or None, what it printed).

    It has a folder of its own, and may change nothing that was there before.
    """
    rng = random.Random(f"{seed} {kind} {number}")
    here = os.getcwd()
    place = Path(tempfile.mkdtemp(prefix=f"{kind}_", dir=base.place.parent))
    before = stamps(base.place)
    try:
        os.chdir(place)
        os.environ["XDG_CACHE_HOME"] = str(place / "cache")
        case = MAKE[kind](rng, base, place)
        case = case._replace(what=case.what.replace(str(place), "."))
        outcome = case.call()
        problem = judge(case, outcome)
        if stamps(base.place) != before:
            problem = "something saved before is changed"
        return case.what, outcome.code, problem, f"{outcome.out}{outcome.err}"
    finally:
        os.chdir(here)
        shutil.rmtree(place, ignore_errors=True)


def stamps(folder):
    """Return {path: (size, time)} of all files under a folder."""
    found = {}
    for path in folder.rglob("*"):
        stat = path.lstat()
        if path.is_file() and path.name != ".lock":
            found[path] = stat.st_size, stat.st_mtime_ns
    return found


def judge(case, outcome):
    """Return what is mishandled in an outcome, or None."""
    if outcome.code == 0:
        return case.problem(outcome)
    if outcome.code == 70:
        return f"traceback: {outcome.err.strip().splitlines()[-1]}"
    lines = outcome.err.splitlines()
    if len(lines) != 1:
        return f"{len(lines)} lines on stderr"
    if not all(each.isprintable() for each in lines[0]):
        return "escape sequences on stderr"
    if not any(name in lines[0] for name in case.names):
        return "an error that does not name the file"
    if not REMEDY.search(lines[0]):
        return "an error without a remedy"
    return None


# ---- workers

def work(base, seed, cases, path):
    """Run cases; write a line of JSON before and after each."""
    torch.set_num_threads(1)
    with open(path, "a", buffering=1) as file:
        for kind, number in cases:
            print(json.dumps([kind, number]), file=file)
            what, code, problem, text = run_case(base, seed, kind, number)
            print(json.dumps([kind, number, what, code, problem, text[-2000:]]), file=file)
    return 0


class Worker:
    """A forked process that runs cases, and another one after a case that ended it."""

    def __init__(self, base, seed, cases, path):
        self.base = base
        self.seed = seed
        self.cases = cases
        self.path = path
        self.done = []
        self.position = 0
        path.write_text("")
        self.fork()

    def fork(self):
        rest = self.cases[len(self.done):]
        self.since = time.monotonic()
        log = self.path.with_suffix(".log")
        self.process = runs.fork(partial(work, self.base, self.seed, rest, self.path), log, log)

    def poll(self):
        """Read what is new; return whether all cases are done."""
        with open(self.path) as file:
            file.seek(self.position)
            while line := file.readline():
                if not line.endswith("\n"):
                    break
                self.position = file.tell()
                self.since = time.monotonic()
                row = json.loads(line)
                if len(row) > 2:
                    self.done.append(row)
        if len(self.done) == len(self.cases):
            return True
        ended, status = os.waitpid(self.process, os.WNOHANG)
        hangs = time.monotonic() - self.since > LIMIT
        if not ended and not hangs:
            return False
        problem = f"crash: {os.waitstatus_to_exitcode(status)}" if ended else "hang"
        if hangs and not ended:
            os.kill(self.process, signal.SIGKILL)
            os.waitpid(self.process, 0)
        kind, number = self.cases[len(self.done)]
        log = self.path.with_suffix(".log").read_text()
        self.done.append([kind, number, problem, None, problem, log[-2000:]])
        self.fork()
        return False


def choose(count, kinds):
    """Return the first cases of these kinds: (kind, number)."""
    pattern = [kind for kind in PATTERN if kind in kinds]
    numbers = Counter()
    cases = []
    for index in range(count):
        kind = pattern[index % len(pattern)]
        cases.append((kind, numbers[kind]))
        numbers[kind] += 1
    return cases


def summary(rows, seed):
    """Return a table of counts per kind, and each mishandled case with the command to repeat it."""
    counts = []
    for kind in KINDS:
        own = [row for row in rows if row[0] == kind]
        passed = sum(row[3] == 0 for row in own)
        bad = sum(row[4] is not None for row in own)
        if own:
            counts.append([kind, len(own), len(own) - passed, passed, bad])
    lines = [markdown_table(["kind", "cases", "refused", "passed", "mishandled"], counts)]
    for kind, number, what, _, problem, _ in rows:
        if problem:
            lines.append(f"{problem}\n    {what}\n    python tests/abuse.py --seed {seed} "
                         f"--case {kind}:{number}")
    return "\n".join(lines)


@contextlib.contextmanager
def prepared(place, make):
    """Yield the Base in a folder; make: function that calls its method `make`."""
    base = Base(place / "base")
    base.data.mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        make_data(base, patch)
        make(base)
        yield base


def make_forked(base):
    """Make a Base in a process of its own: this one must not run a backward pass."""
    log = base.place / "log"
    if runs.wait(runs.fork(lambda: base.make() or 0, log, log)):
        sys.exit(f"the undamaged files do not work:\n{log.read_text()}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(KINDS), help=f"of {','.join(KINDS)}")
    parser.add_argument("--case", metavar="KIND:NUMBER", nargs="+",
                        help="run these alone, and show what they printed")
    parser.add_argument("--list", action="store_true", help="list all cases")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    args = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place, prepared(Path(place), make_forked) as base:
        cases = choose(args.cases, args.only.split(","))
        if args.case:
            cases = [(kind, int(number)) for kind, number in (
                case.split(":") for case in args.case)]
        workers = [Worker(base, args.seed, cases[index::args.processes], Path(place, f"{index}"))
                   for index in range(min(args.processes, len(cases)))]
        waiting = list(workers)
        try:
            while waiting:
                time.sleep(0.2)
                waiting = [worker for worker in waiting if not worker.poll()]
        finally:
            for worker in waiting:
                os.kill(worker.process, signal.SIGKILL)
        rows = [row for worker in workers for row in worker.done]
    for row in rows if args.case else ():
        print(f"---- {row[0]}:{row[1]} {row[2]}\n{row[5]}")
    if args.list:
        for kind, number, what, code, *_ in rows:
            print(f"{kind}:{number} exit {code} {what}")
    print(summary(rows, args.seed))
    mishandled = sum(row[4] is not None for row in rows)
    print(f"{mishandled} of {len(rows)} cases mishandled, {time.monotonic() - began:.0f} s")
    sys.exit(mishandled > 0)


if __name__ == "__main__":
    main()
