"""train.py: arguments, bad input, whole tiny trainings, resume, and what a person and TensorBoard see."""
import fcntl
import json
import math
import os
import pty
import struct
import subprocess
import sys
import termios
from functools import partial
from pathlib import Path

import pytest
import torch
from tensorboardX.proto.event_pb2 import Event

import tiny_data
import train
import utils
from dataset.data import DATASETS
from models.quan_ops import FULL_PRECISION

ROOT = Path(__file__).parent.parent


def run(argv):
    """train.py with argv, in this process: its exit code (0 where it ends by itself)."""
    try:
        utils.run(train.main, partial(train.parse_args, [str(word) for word in argv]))
    except SystemExit as ended:
        return ended.code
    return 0


def tiny(data_dir, results_dir, *more):
    """Arguments of a training of seconds: 20 CIFAR images, 3 steps an epoch."""
    return ["--dataset", "cifar10", "--data-dir", data_dir, "--model", "resnet20q", "--width", 1, "--bit_width_list",
            "2,32", "--epochs", 3, "--lr_decay", "2", "--batch-size", 8, "--device", "cpu", "--results-dir",
            results_dir, *more]


def load(folder, name="model_latest"):
    return torch.load(folder / "ckpt" / f"{name}.pth.tar", weights_only=True)


def assert_same(first, second):
    """Equal to the last bit: tensors, in whatever dicts and lists they stand."""
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for one, other in zip(first, second):
            assert_same(one, other)
    elif isinstance(first, torch.Tensor):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    else:
        assert first == second


# ---- arguments

def test_defaults_are_the_digits_recipe():
    args = train.parse_args([])
    assert (args.dataset, args.train_split, args.model, args.width, args.loss) == (
        "digits", "train", "svhnq", 2, "recursive")
    assert args.bit_width_list == [1, 2, 4, 8, 32]
    assert (args.optimizer, args.lr, args.batch_size, args.epochs, args.lr_decay) == (
        "adam", 0.001, 64, 30, [15, 22, 27])


def test_flags_existing_users_know_and_their_dashed_spellings():
    published = ["--results-dir", "r", "--dataset", "svhn", "--train_split", "train", "--model", "svhnq", "--workers",
                 "3", "--epochs", "9", "--start-epoch", "2", "--batch-size", "16", "--optimizer", "sgd", "--lr", "0.1",
                 "--lr_decay", "3,6", "--weight-decay", "1e-4", "--print-freq", "7", "--pretrain", "p", "--resume",
                 "", "--bit_width_list", "4,1,32"]
    args = train.parse_args(published)
    assert (args.results_dir, args.dataset, args.train_split, args.workers, args.epochs, args.start_epoch) == (
        "r", "svhn", "train", 3, 9, 2)
    assert (args.optimizer, args.lr, args.lr_decay, args.weight_decay, args.print_freq, args.pretrain) == (
        "sgd", 0.1, [3, 6], 1e-4, 7, "p")
    assert args.bit_width_list == [1, 4, 32]
    dashed = train.parse_args(["--train-split", "train", "--lr-decay", "", "--bit-width-list", "2", "-p", "4"])
    assert (dashed.train_split, dashed.lr_decay, dashed.bit_width_list, dashed.print_freq) == ("train", [], [2], 4)


RECIPES = {  # REFERENCE.md's table, by hand
    "train_digits.sh": ("digits", "train", "svhnq", "adam", 0.001, [15, 22, 27], 30, 64, 0),
    "train_cifar10.sh": ("cifar10", "train", "resnet20q", "adam", 0.001, [100, 150, 180], 200, 128, 0),
    "train_svhn.sh": ("svhn", "train_extra", "svhnq", "adam", 0.001, [50, 75, 90], 100, 128, 0),
    "train_imagenet.sh": ("imagenet", "train", "resnet50q", "sgd", 0.5, [45, 60, 70], 80, 256, 1e-5),
}
DEDICATED_IMAGENET = ("imagenet", "train", "resnet50q", "sgd", 0.1, [30, 60, 85, 95, 105], 120, 256)


def recipe_args(script, *flags, tmp_path):
    """What a recipe, run by bash with these flags, gives train.py."""
    python = tmp_path / "python"  # prints the arguments of train.py, and passes all else on
    python.write_text(f'#!/bin/bash\ncase "$1" in */train.py) shift; printf "%s\\n" "$@" ;; '
                      f'*) exec {sys.executable} "$@" ;; esac\n')
    python.chmod(0o755)
    done = subprocess.run(["bash", ROOT / script, *flags], env={**os.environ, "PYTHON": str(python)},
                          cwd=tmp_path, capture_output=True, text=True, check=True)
    return train.parse_args(done.stdout.split("\n")[:-1])


def recipe_of(args):
    return (args.dataset, args.train_split, args.model, args.optimizer, args.lr, args.lr_decay, args.epochs,
            args.batch_size, args.weight_decay)


@pytest.mark.parametrize("script", RECIPES)
def test_recipe(script, tmp_path):
    args = recipe_args(script, tmp_path=tmp_path)
    assert recipe_of(args) == RECIPES[script]
    assert (args.bit_width_list, args.loss) == ([1, 2, 4, 8, 32], "recursive")
    dedicated = recipe_args(script, "--loss", "hard", "--bit_width_list", "2", "--results-dir", "a folder",
                            tmp_path=tmp_path)
    assert (dedicated.bit_width_list, dedicated.loss, dedicated.results_dir) == ([2], "hard", "a folder")


@pytest.mark.parametrize("script", RECIPES)
def test_a_resumed_run_keeps_its_own_settings(script, tmp_path):
    assert recipe_args(script, "--resume", "results/x", "--workers", "1", tmp_path=tmp_path).given == {"resume", "workers"}


@pytest.mark.parametrize("bits, decay", [("1", 1e-5), ("2", 1e-5), ("4", 1e-4), ("8", 1e-4), ("32", 1e-4)])
@pytest.mark.parametrize("spelling", ["--bit_width_list {}", "--bit-width-list={}"])
def test_dedicated_imagenet_recipe(bits, decay, spelling, tmp_path):
    args = recipe_args("train_imagenet.sh", *spelling.format(bits).split(), tmp_path=tmp_path)
    assert recipe_of(args) == (*DEDICATED_IMAGENET, decay) and args.bit_width_list == [int(bits)]


def test_learning_rate_against_a_table_by_hand():
    args = train.parse_args(["--lr", "0.5", "--lr_decay", "2,4,5", "--epochs", "7"])
    expected = [0.5, 0.5, 0.05, 0.05, 0.005, 0.0005, 0.0005]
    assert [train.learning_rate(args, epoch) for epoch in range(7)] == pytest.approx(expected)


# ---- bad input: one line on stderr that names the value and what is allowed, a non-zero exit code

BAD_ARGUMENTS = [
    (["--model", "resnet18"], "'resnet18'", "choose from resnet20q, resnet50q, svhnq"),
    (["--dataset", "cifar"], "'cifar'", "choose from digits, cifar10"),
    (["--train_split", "test"], "'test'", "digits: choose from train"),
    (["--dataset", "svhn", "--train_split", "val"], "'val'", "train_extra, train, extra, train_extra_auto_quan"),
    (["--loss", "easy"], "'easy'", "choose from hard, soft, recursive"),
    (["--optimizer", "lion"], "'lion'", "choose from adam, sgd"),
    (["--device", "gpu"], "'gpu'", "choose auto, cpu, cuda"),
    (["--device", "cuda:x"], "'cuda:x'", "choose auto, cpu, cuda"),
    (["--bit_width_list", "0"], "bit-width 0", "choose from 1 to 8 and 32"),
    (["--bit_width_list", "4,9"], "bit-width 9", "choose from 1 to 8 and 32"),
    (["--bit_width_list", "16"], "bit-width 16", "choose from 1 to 8 and 32"),
    (["--bit_width_list", "33"], "bit-width 33", "choose from 1 to 8 and 32"),
    (["--bit_width_list", "-4"], "bit-width -4", "choose from 1 to 8 and 32"),
    (["--bit_width_list", "two"], "bit-width 'two'", "choose from 1 to 8 and 32"),
    (["--bit_width_list", "1,2,2"], "1,2,2 repeat", "each of them once"),
    (["--bit_width_list", ""], "no bit-width given", "list at least one"),
    (["--bit_width_list", "1,"], "bit-width ''", "choose from 1 to 8 and 32"),
    (["--epochs", "0"], "0 is too small", "from 1 up"),
    (["--epochs", "-3"], "-3 is too small", "from 1 up"),
    (["--epochs", "many"], "'many'", "from 1 up"),
    (["--batch-size", "0"], "0 is too small", "from 1 up"),
    (["--batch-size", "-8"], "-8 is too small", "from 1 up"),
    (["--lr", "0"], "'0'", "above 0"),
    (["--lr", "-0.1"], "'-0.1'", "above 0"),
    (["--lr", "nan"], "'nan'", "above 0"),
    (["--lr_decay", "20,10"], "'20,10'", "rising epochs"),
    (["--lr_decay", "soon"], "'soon'", "rising epochs"),
    (["--weight-decay", "-1"], "'-1'", "from 0 up"),
    (["--width", "0"], "0 is too small", "from 1 up"),
    (["--workers", "-1"], "-1 is too small", "from 0 up"),
    (["--print-freq", "0"], "0 is too small", "from 1 up"),
    (["--start-epoch", "30"], "--start-epoch 30", "less than --epochs 30"),
    (["--dataset", "cifar10"], "cifar10 has 32 x 32", "choose --model resnet20q or resnet50q"),
    (["--seed", "-1"], "-1 is too small", "from 0 up"),
    (["--seed", "4294967296"], "4294967296 is too large", "up to 4294967295"),
    (["--lr", "1e38"], "'1e38'", "at most 1e+30"),
    (["--precision", "int8"], "'int8'", "choose from fp32, tf32, bf16, fp16"),
    (["--plain", "--precision", "bf16"], "--plain computes in fp32", "leave out --precision"),
    (["--plain", "--compile"], "uncompiled", "leave out --compile"),
    (["--sync-bn", "--compile"], "--sync-bn", "give one of them"),
    (["--lrr", "1"], "--lrr", "--help"),
    (["--bit_width"], "--bit_width", "--help"),
]


def assert_one_line(capsys, *parts):
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.endswith("\n"), err
    for part in parts:
        assert part in err
    assert "Traceback" not in err


@pytest.mark.parametrize("argv, value, allowed", BAD_ARGUMENTS, ids=lambda value: str(value) if type(value) is list else "")
def test_wrong_argument(argv, value, allowed, capsys, tmp_path):
    assert run(["--results-dir", tmp_path / "r", *argv]) == 2
    assert_one_line(capsys, "error: ", value, allowed)
    assert not (tmp_path / "r").exists()


def test_a_precision_that_is_not_there(capsys, tmp_path):
    assert run(["--precision", "tf32", "--device", "cpu", "--results-dir", tmp_path / "r"]) == 1
    assert_one_line(capsys, "--precision tf32 is not in the hardware of cpu", "choose fp32")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_gpu_that_is_not_there(device, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(["--device", device, "--results-dir", tmp_path / "r"]) == 1
    assert_one_line(capsys, f"device {device} is not here", "choose cpu or auto")


def test_a_network_larger_than_the_memory(capsys, tmp_path):
    assert run(["--width", "1000000", "--device", "cpu", "--results-dir", tmp_path / "r"]) == 1
    assert_one_line(capsys, "out of memory", "--width")


def test_missing_data_folder(capsys, tmp_path):
    assert run(["--dataset", "imagenet", "--model", "resnet50q", "--data-dir", tmp_path]) == 1
    assert_one_line(capsys, f"{tmp_path}/imagenet/train", "put one folder of images per class", "--data-dir")


def test_class_folders_that_differ(capsys, tmp_path):
    tiny_data.imagenet(tmp_path)
    (tmp_path / "imagenet" / "val" / "n01484850").rename(tmp_path / "imagenet" / "val" / "n99999999")
    assert run(["--dataset", "imagenet", "--model", "resnet50q", "--data-dir", tmp_path]) == 1
    assert_one_line(capsys, "must hold the same class folders", "2 stand in only one", "n01484850")


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_named(workers, capsys, tmp_path):
    path = tiny_data.imagenet(tmp_path) / "train" / "n01440764" / "n01440764_1.JPEG"
    path.write_bytes(path.read_bytes()[:200])
    assert run(["--dataset", "imagenet", "--model", "resnet20q", "--width", 1, "--data-dir", tmp_path, "--device",
                "cpu", "--bit_width_list", 2, "--workers", workers, "--results-dir", tmp_path / "r"]) == 1
    assert_one_line(capsys, str(path), "not a readable image", "replace or remove it")


def test_results_folder_that_cannot_be_written(capsys, tmp_path, tiny_cifar10):
    (tmp_path / "file").write_text("not a folder")
    assert run(tiny(tiny_cifar10, tmp_path / "file" / "run")) == 1
    assert_one_line(capsys, f"{tmp_path}/file/run cannot be written", "--results-dir")


def test_a_run_is_not_overwritten(capsys, tmp_path, tiny_cifar10):
    argv = tiny(tiny_cifar10, tmp_path / "r", "--epochs", 1, "--lr_decay", "")
    assert run(argv) == 0
    before = load(tmp_path / "r")
    capsys.readouterr()
    assert run([*argv, "--seed", 5]) == 1
    assert_one_line(capsys, f"{tmp_path}/r holds a run already", "--resume", "--results-dir")
    assert_same(load(tmp_path / "r"), before)


def test_a_folder_that_a_run_is_writing_is_refused(tmp_path, tiny_cifar10, capsys):
    assert run(tiny(tiny_cifar10, tmp_path / "r", "--epochs", 1)) == 0
    holder = subprocess.Popen([sys.executable, "-c", "import fcntl, sys; file = open(sys.argv[1], 'w'); "
                               "fcntl.lockf(file, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()",
                               tmp_path / "r" / ".lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    capsys.readouterr()
    assert run(["--resume", tmp_path / "r", "--epochs", 2]) == 1
    assert_one_line(capsys, f"{tmp_path}/r is being written by another run")
    holder.communicate()
    assert run(["--resume", tmp_path / "r", "--epochs", 2]) == 0


def test_unnamed_runs_take_free_names(tmp_path, tiny_cifar10, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = tiny(tiny_cifar10, "", "--epochs", 1)
    for _ in range(2):
        assert run(argv) == 0
    assert {path.name for path in Path("results").iterdir()} == {
        "cifar10_resnet20q_2-32_recursive_seed0", "cifar10_resnet20q_2-32_recursive_seed0_2"}


@pytest.mark.parametrize("save_every", [(), ("--save-every", "1e-9")])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(save_every, capsys, tmp_path,
                                                                               tiny_cifar10, monkeypatch):
    monkeypatch.setattr(train, "learning_rate", lambda args, epoch: (0.1, math.inf, 1e30)[epoch])
    assert run(tiny(tiny_cifar10, tmp_path / "good", "--optimizer", "sgd", "--epochs", 1)) == 0
    assert run(tiny(tiny_cifar10, tmp_path / "r", "--optimizer", "sgd", *save_every)) == 1
    if save_every:  # a diverged network is not saved, though its loss was finite when it was last looked at
        assert_one_line(capsys, "epoch 2, step 1: the weights are not finite", "lower --lr")
    else:
        assert_one_line(capsys, "epoch 2, training: the ", "-bit loss is not finite at step ", "lower --lr")
    assert_same(load(tmp_path / "r")["state_dict"], load(tmp_path / "good")["state_dict"])


def test_the_step_that_is_named_is_the_first_bad_one():
    metrics = utils.Metrics([1, 32], "cpu")
    labels = torch.tensor([0, 1])
    for step in range(1, 6):
        loss = {32: torch.tensor(1.0), 1: torch.tensor(math.inf if step >= 4 else 1.0)}
        metrics.add(utils.Metrics.row({bits: (loss[bits], torch.zeros(2, 10)) for bits in (32, 1)}, labels), 2)
        if step == 2:
            metrics.check_finite("epoch 7, training")
    with pytest.raises(utils.UserError, match="epoch 7, training: the 1-bit loss is not finite at step 4"):
        metrics.check_finite("epoch 7, training")


# ---- whole trainings

@pytest.mark.parametrize("dataset", [name for name in DATASETS if name not in ("digits", "cifar10")])
def test_training_on_every_data_set(dataset, tmp_path, monkeypatch):
    getattr(tiny_data, dataset)(tmp_path / "data", monkeypatch)
    model = {"svhn": "svhnq", "imagenet": "resnet50q"}.get(dataset, "resnet20q")
    argv = ["--dataset", dataset, "--model", model, "--width", 1, "--data-dir", tmp_path / "data", "--epochs", 1,
            "--bit_width_list", "1,32", "--batch-size", 4, "--results-dir", tmp_path / "r", "--device", "cpu"]
    assert run(argv) == 0
    assert load(tmp_path / "r")["epoch"] == 1


def test_results_folder(tmp_path, tiny_cifar10, capsys):
    folder = tmp_path / "r"
    argv = tiny(tiny_cifar10, folder, "--print-freq", 2)
    assert run(argv) == 0
    out = capsys.readouterr().out

    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert [record["lr"] for record in records] == pytest.approx([0.001, 0.001, 0.0001])
    for record in records:
        assert set(record) == {"epoch", "lr", "images_per_second", "train", "val"}
        for part in ("train", "val"):
            assert list(record[part]) == ["2", "32"]
            for values in record[part].values():
                assert set(values) == {"loss", "top1", "top5"} and 0 <= values["top1"] <= values["top5"] <= 100

    for name in ("model_latest", "model_best"):
        checkpoint = load(folder, name)
        assert {"epoch", "model", "state_dict", "best_prec1", "optimizer"} <= set(checkpoint)
        assert checkpoint["model"] == "resnet20q"
    assert load(folder)["epoch"] == 3
    best = max(record["val"]["32"]["top1"] for record in records)
    first_best = next(record["epoch"] for record in records if record["val"]["32"]["top1"] == best)
    assert load(folder, "model_best")["epoch"] == first_best
    assert load(folder)["best_prec1"] == best == load(folder, "model_best")["best_prec1"]

    config = json.loads((folder / "config.json").read_text())
    assert config["arguments"]["lr"] == 0.001 and config["seed"] == 0 and config["device"].startswith("cpu")
    assert {"python", "torch", "torchvision"} <= set(config["versions"]) and "commit" in config
    assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(folder.glob("log_*.txt"))) == 1

    header, *rows = [line for line in out.splitlines() if " | val " in line]
    assert len(rows) == 3 and {len(row) for row in rows} == {len(header)}
    assert "epoch 1/3  step 2/3" in out and "best checkpoint (epoch" in out and "last (epoch 3)" in out
    log = next(folder.glob("log_*.txt")).read_text()
    assert all(row in log for row in rows)


def summary_values(folder):
    """{(tag, step): value} of TensorBoard's event files: records of length, checksum, Event, checksum."""
    values = {}
    for path in folder.iterdir():
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12:12 + length])
            content = content[16 + length:]
            values.update({(value.tag, event.step): value.simple_value for value in event.summary.value})
    return values


def test_tensorboard_tags_and_values(tmp_path, tiny_cifar10):
    assert run(tiny(tiny_cifar10, tmp_path / "r", "--epochs", 2)) == 0
    values = summary_values(tmp_path / "r" / "summary")
    tags = {f"{part}_{what}_{bits}" for part in ("train", "val") for what in ("loss", "prec_1", "prec_5")
            for bits in (2, 32)}
    assert {tag for tag, _ in values} == {"lr", *tags} and {step for _, step in values} == {1, 2}
    last = json.loads((tmp_path / "r" / "metrics.jsonl").read_text().splitlines()[-1])
    assert values["val_prec_1_2", 2] == pytest.approx(last["val"]["2"]["top1"])
    assert values["train_loss_32", 2] == pytest.approx(last["train"]["32"]["loss"])


def test_metrics_are_those_of_the_saved_network(tmp_path, tiny_cifar10):
    """Recomputes val loss and top-k from the checkpoint, one image at a time."""
    from dataset.data import get_dataset, get_transform
    from models import resnet20q, set_bit_width

    assert run(tiny(tiny_cifar10, tmp_path / "r", "--epochs", 1)) == 0
    record = json.loads((tmp_path / "r" / "metrics.jsonl").read_text())
    model = resnet20q([2, FULL_PRECISION], width=1)
    model.load_state_dict(load(tmp_path / "r")["state_dict"])
    model.eval()
    images = get_dataset("cifar10", "test", get_transform("cifar10", False), tiny_cifar10)
    for bits in (2, 32):
        set_bit_width(model, bits)
        loss = top1 = top5 = 0
        for image, label in images:
            logits = model(image[None])[0]
            rank = (logits > logits[label]).sum().item()
            loss -= logits.log_softmax(0)[label].item() / len(images)
            top1 += 100 * (rank < 1) / len(images)
            top5 += 100 * (rank < 5) / len(images)
        assert record["val"][str(bits)] == pytest.approx({"loss": loss, "top1": top1, "top5": top5}, rel=1e-4)


def test_fewer_than_five_classes():
    metrics = utils.Metrics([4], "cpu")
    results = {4: (torch.tensor(1.0), torch.tensor([[0.0, 1.0, 2.0]] * 3))}
    metrics.add(utils.Metrics.row(results, torch.tensor([2, 0, 1])), 3)
    assert metrics.averages() == {4: {"loss": 1.0, "top1": pytest.approx(100 / 3), "top5": 100.0}}


def test_seeds_and_workers(tmp_path, tiny_cifar10):
    """The same seed gives the same weights whoever loads the data; another seed gives others."""
    runs = {"a": (), "b": ("--workers", 2), "c": ("--seed", 1)}
    for name, flags in runs.items():
        assert run(tiny(tiny_cifar10, tmp_path / name, "--epochs", 1, *flags)) == 0
    a, b, c = (load(tmp_path / name)["state_dict"] for name in runs)
    assert_same(a, b)
    assert not torch.equal(a["conv0.weight"], c["conv0.weight"])


@pytest.mark.parametrize("argv", [["--optimizer", "adam"], ["--optimizer", "sgd"], ["--plain"], ["--precision", "fp16"]],
                         ids=" ".join)
def test_resume_continues_as_if_never_stopped(argv, tmp_path, tiny_cifar10):
    assert run(tiny(tiny_cifar10, tmp_path / "whole", *argv)) == 0
    assert run(tiny(tiny_cifar10, tmp_path / "parts", *argv, "--epochs", 1, "--start-epoch", 0)) == 0
    assert run(["--resume", tmp_path / "parts", "--epochs", 3]) == 0
    whole, parts = load(tmp_path / "whole"), load(tmp_path / "parts")
    for part in ("epoch", "state_dict", "optimizer", "scaler", "best_prec1", "random_states"):
        assert_same(parts[part], whole[part])
    history = [utils.read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts")]
    for first, second in zip(*history, strict=True):
        assert (first["lr"], first["train"], first["val"]) == (second["lr"], second["train"], second["val"])
    log = next((tmp_path / "parts").glob("log_*.txt")).read_text()
    assert " 1/1 " in log and " 3/3 " in log  # continued, not begun anew


@pytest.mark.parametrize("flags, told", [
    (["--loss", "hard"], "--loss was recursive and is now hard"), (["--seed", "4"], "--seed was 0 and is now 4"),
    (["--bit_width_list", "2"], "--bit-width-list was 2,32 and is now 2"), (["--model", "resnet50q"], "--model was"),
    (["--optimizer", "sgd"], "--optimizer was adam and is now sgd"), (["--batch-size", "4"], "--batch-size was 8"),
    (["--dataset", "cifar100"], "--dataset was cifar10 and is now cifar100"), (["--lr", "0.1"], "--lr was 0.001"), (["--plain"], "--plain was False and is now True"),
    (["--precision", "bf16"], "--precision was fp32 and is now bf16"),
    (["--lr_decay", "1"], "--lr-decay was 2 and is now 1"), (["--weight-decay", "0.5"], "--weight-decay was 0.0")])
def test_resume_with_other_flags_is_refused(flags, told, tmp_path, tiny_cifar10, capsys):
    assert run(tiny(tiny_cifar10, tmp_path / "r", "--epochs", 1)) == 0
    capsys.readouterr()
    assert run(["--resume", tmp_path / "r", *flags]) == 2
    assert_one_line(capsys, told)


def test_plain_and_fast_train_alike(tmp_path):
    """resnet20q on digits draws nothing at random but its weights and the order, so one step gives the same losses."""
    losses = {}
    for path in ("--plain", "--precision=fp32"):
        assert run(["--model", "resnet20q", "--width", 1, "--bit_width_list", "8,32", "--train-fraction", 0.01,
                    "--epochs", 2, "--device", "cpu", "--results-dir", tmp_path / path, path]) == 0
        first, second = utils.read_metrics(tmp_path / path / "metrics.jsonl")
        losses[path] = [epoch["train"][bits]["loss"] for epoch in (first, second) for bits in (8, 32)]
    assert losses["--plain"] == pytest.approx(losses["--precision=fp32"], rel=1e-3)
    assert losses["--plain"][2:] != pytest.approx(losses["--plain"][:2], rel=1e-2)  # a step was taken


def test_memory_formats_of_a_checkpoint_do_not_matter(tmp_path, tiny_cifar10):
    """A fused optimizer takes its state and the weights as they lie in memory: both must lie alike."""
    assert run(tiny(tiny_cifar10, tmp_path / "r", "--epochs", 1)) == 0
    (tmp_path / "copy" / "ckpt").mkdir(parents=True)
    state = load(tmp_path / "r")
    for values in state["optimizer"]["state"].values():
        values.update({name: value.clone(memory_format=torch.contiguous_format) for name, value in values.items()})
    torch.save(state, tmp_path / "copy" / "ckpt" / "model_latest.pth.tar")
    assert run(["--resume", tmp_path / "r", "--epochs", 2]) == 0
    assert run(["--resume", tmp_path / "copy", "--results-dir", tmp_path / "copy", "--epochs", 2]) == 0
    assert_same(load(tmp_path / "copy")["state_dict"], load(tmp_path / "r")["state_dict"])


def test_compile_without_a_compiler_goes_on_and_says_so(tmp_path, tiny_cifar10, environment):
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *map(str, tiny(tiny_cifar10, tmp_path / "r", "--dataset", "digits", "--epochs",
                                                           1, "--train-fraction", 0.01, "--compile"))],
        env={**environment, "PATH": str(tmp_path), "CC": "cc", "CXX": str(tmp_path / "none"), "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told, = [line for line in done.stdout.splitlines() if "--compile" in line]
    assert told.startswith("--compile needs a compiler that works here, and is left out: ")
    told, = [line for line in done.stdout.splitlines() if "fused.c" in line]
    assert told.startswith("models/fused.c could not be compiled here, and without it training takes longer: ") and "'cc'" in told
    assert load(tmp_path / "r")["arguments"]["compile"] is True  # a resumed run asks again


def test_resume_of_a_finished_run_tells_its_results_again(tmp_path, tiny_cifar10, capsys):
    assert run(tiny(tiny_cifar10, tmp_path / "r", "--epochs", 2)) == 0
    before = load(tmp_path / "r")
    (tmp_path / "r" / "accuracy.png").unlink()
    capsys.readouterr()
    assert run(["--resume", tmp_path / "r"]) == 0
    assert "last (epoch 2)" in capsys.readouterr().out
    assert (tmp_path / "r" / "accuracy.png").exists()
    assert_same(load(tmp_path / "r"), before)


def test_resume_from_an_older_checkpoint_goes_on_elsewhere(tmp_path, tiny_cifar10, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(tiny(tiny_cifar10, tmp_path / "r")) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file()}
    assert run(["--resume", tmp_path / "r" / "ckpt" / "model_best.pth.tar", "--epochs", 4]) == 0
    assert {path: path.read_bytes() for path in (tmp_path / "r").rglob("*") if path.is_file()} == before
    (elsewhere,) = (tmp_path / "results").iterdir()
    assert load(elsewhere)["epoch"] == 4 and load(elsewhere, "model_best")["state_dict"]


def test_a_run_without_its_checkpoints_is_not_overwritten_either(tmp_path, tiny_cifar10, capsys):
    assert run(tiny(tiny_cifar10, tmp_path / "r", "--epochs", 1)) == 0
    for path in (tmp_path / "r" / "ckpt").iterdir():
        path.unlink()
    capsys.readouterr()
    assert run(tiny(tiny_cifar10, tmp_path / "r", "--epochs", 1)) == 1
    assert_one_line(capsys, "holds a run already")


def test_resume_remembers_what_the_run_was_pretrained_from(tmp_path, tiny_cifar10):
    assert run(tiny(tiny_cifar10, tmp_path / "a", "--epochs", 1)) == 0
    assert run(tiny(tiny_cifar10, tmp_path / "b", "--epochs", 1, "--pretrain", tmp_path / "a")) == 0
    assert run(["--resume", tmp_path / "b", "--epochs", 2]) == 0
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["arguments"]["pretrain"] == str(tmp_path / "a")


def test_resume_of_nothing(tmp_path, capsys):
    assert run(["--resume", tmp_path / "no"]) == 1
    assert_one_line(capsys, f"checkpoint {tmp_path}/no does not exist")
    assert run(["--resume", tmp_path]) == 1
    assert_one_line(capsys, "holds no checkpoint", "model_latest.pth.tar, model_best.pth.tar")


def test_pretrain_starts_from_those_weights_prefixed_or_not(tmp_path, tiny_cifar10, capsys):
    assert run(tiny(tiny_cifar10, tmp_path / "first", "--epochs", 1)) == 0
    checkpoint = load(tmp_path / "first", "model_best")
    prefixed = {f"module.{key}": value for key, value in checkpoint["state_dict"].items()}
    torch.save({"state_dict": prefixed}, tmp_path / "parallel.pth.tar")
    after = []
    for index, source in enumerate((tmp_path / "first", tmp_path / "parallel.pth.tar")):
        # A learning rate below float32's resolution: what is saved is what was loaded, but for BatchNorm's statistics.
        argv = tiny(tiny_cifar10, tmp_path / f"next{index}", "--epochs", 1, "--lr", "1e-30", "--pretrain", source)
        assert run(argv) == 0
        after.append(load(tmp_path / f"next{index}")["state_dict"])
    assert_same(*after)
    for key, value in checkpoint["state_dict"].items():
        if "running" not in key and "tracked" not in key:
            assert_same(after[0][key], value)


# ---- as programs

@pytest.fixture
def environment():
    return {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


DIGITS = ["--width", "1", "--bit_width_list", "2,32", "--epochs", "1", "--device", "cpu"]


@pytest.mark.parametrize("workers", ["0", "2"])
def test_digits_recipe_as_a_program(workers, tmp_path, environment):
    done = subprocess.run([ROOT / "train_digits.sh", *DIGITS, "--results-dir", tmp_path / "r", "--workers", workers],
                          env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "best checkpoint (epoch 1)" in done.stdout
    assert load(tmp_path / "r")["epoch"] == 1


def test_a_terminal_shows_a_bar(tmp_path, environment):
    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 140, 0, 0))  # rows, columns
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *DIGITS, "--results-dir", tmp_path / "r"],
                               env=environment, stdout=inner, stderr=inner)
    os.close(inner)
    shown = b""
    try:
        while part := os.read(outer, 4096):
            shown += part
    except OSError:  # the other end is closed
        pass
    assert process.wait() == 0
    assert "epoch 1/1:" in shown.decode() and "step/s" in shown.decode()
    assert " | val " in shown.decode()


@pytest.mark.parametrize("what", ["step", "epoch"])
def test_speed_benchmark(what, environment):
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "speed.py", what, "--batch-size", "4", "--images", "6",
                           "--repeats", "1", "--steps", "1", "--device", "cpu"], env=environment, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    plain, fast = [row.split(" | ") for row in done.stdout.splitlines() if row.startswith(("| plain", "| fast"))]
    assert plain[3] == "1.00" or plain[3] == "1.00 |"
    assert float(fast[1]) > 0 and float(fast[2]) > 0


def test_wrong_argument_as_a_program(environment):
    done = subprocess.run([sys.executable, ROOT / "train.py", "--lr", "fast"], env=environment, capture_output=True,
                          text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == ("train.py: error: argument --lr: 'fast' is not allowed: give a number above 0, at most 1e+30 "
                           "(--help lists the arguments)\n")
