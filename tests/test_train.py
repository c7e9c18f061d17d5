"""train.py: whole tiny trainings, and what a person and TensorBoard see of them."""
import fcntl
import functools
import json
import math
import os
import pty
import random
import re
import struct
import termios

import pytest
import tiny_data
import torch
from runs import assert_one_line, assert_same, fork, load, run, tiny, wait
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.layout_pb2 import Layout
from torch._inductor import config as inductor
from torch.utils.data import Subset

import report
import train
from dataset.data import DATASETS, get_dataset, get_transform, open_digits
from engine.errors import UserError, explain
from engine.metrics import Metrics
from models import MODELS, set_bit_width

# ---- what a run leaves behind


def test_metrics_file(trained):
    lines = (trained / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert [record["lr"] for record in records] == pytest.approx([0.001, 0.001, 0.0001])
    for record in records:
        assert set(record) == {"epoch", "lr", "images_per_second", "train", "val"}
        for part in ("train", "val"):
            assert list(record[part]) == ["2", "32"]
            for values in record[part].values():
                assert set(values) == {"loss", "top1", "top5"}
                assert 0 <= values["top1"] <= values["top5"] <= 100

    best = max(record["val"]["32"]["top1"] for record in records)
    ties = [record["val"]["2"]["top1"] for record in records
            if record["val"]["32"]["top1"] == best]
    last_best = next(record["epoch"] for record in reversed(records)
                     if record["val"]["32"]["top1"] == best
                     and record["val"]["2"]["top1"] == max(ties))  # the mean breaks ties
    assert load(trained)["epoch"] == 3 and load(trained, "model_best")["epoch"] == last_best
    assert load(trained)["best_prec1"] == best == load(trained, "model_best")["best_prec1"]


def test_checkpoints_and_configuration(trained):
    for name in ("model_latest", "model_best"):
        checkpoint = load(trained, name)
        assert {"epoch", "model", "state_dict", "best_prec1", "optimizer"} <= set(checkpoint)
        assert checkpoint["model"] == "resnet4q"
    config = json.loads((trained / "config.json").read_text())
    assert config["arguments"]["lr"] == 0.001 and config["seed"] == 0
    assert config["device"].startswith("cpu")
    assert {"python", "torch", "torchvision"} <= set(config["versions"]) and "commit" in config
    assert (trained / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(trained.glob("log_*.txt"))) == 1


def test_console(training):
    folder, out = training
    header, *rows = [line for line in out.splitlines()
                     if line.startswith(("epoch  ", "  1/3", "  2/3", "  3/3"))]
    assert len(rows) == 3 and {len(row) for row in rows} == {len(header)}
    assert header.split()[-1] == "eta" and rows[-1].split()[-1] == "0s"
    assert "epoch 1/3  step 1/3  loss " in out and "epoch 1/3  step 2/3  loss " in out
    assert ("epochs 3, steps per epoch 3, batch size 8, adam, lr 0.001 (/ 10 after 2), "
            "weight decay 0, width 1, quantizer dorefa, precision fp32, seed 0"
            ) in out.replace("\n   ", "")
    assert out.splitlines()[-1].startswith(f"in {folder}: accuracy.png, ckpt/, config.json, log_")
    assert "best checkpoint (epoch" in out and "last (epoch 3)" in out
    log = next(folder.glob("log_*.txt")).read_text()
    assert all(row in log for row in rows)


def summary_values(folder):
    """Return {(tag, step): number or bytes} of TensorBoard's event files.

    A record is its length, a checksum of that, an Event, and a checksum of it.
    """
    values = {}
    for path in folder.iterdir():
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12:12 + length])
            content = content[16 + length:]
            values.update({(value.tag, event.step): value.tensor.string_val[0]
                           if value.HasField("tensor") else value.simple_value
                           for value in event.summary.value})
    return values


def test_tensorboard_tags_and_values(trained):
    """Epochs are counted from 0 there, as published."""
    values = summary_values(trained / "summary")
    tags = {f"{part}_{what}_{bits}" for part in ("train", "val")
            for what in ("loss", "prec_1", "prec_5") for bits in (2, 32)}
    more = {"lr", "images_per_second", "arguments/text_summary", "custom_scalars__config__"}
    assert {tag for tag, _ in values} == {*more, *tags}
    assert {step for _, step in values} == {0, 1, 2}
    assert values["images_per_second", 0] > 0
    assert b"| bit_width_list " in values["arguments/text_summary", 0]
    layout = Layout.FromString(values["custom_scalars__config__", 0])
    charts = {(category.title, chart.title): {
        tag for tag in tags if re.match(chart.multiline.tag[0], tag)}  # as TensorBoard does
        for category in layout.category for chart in category.chart}
    assert charts == {(title, part): {f"{part}_{what}_{bits}" for bits in (2, 32)}
                      for title, what in (("top-1 (%)", "prec_1"), ("loss", "loss"))
                      for part in ("train", "val")}
    last = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    assert values["val_prec_1_2", 2] == pytest.approx(last["val"]["2"]["top1"])
    assert values["train_loss_32", 2] == pytest.approx(last["train"]["32"]["loss"])


def test_metrics_are_those_of_the_saved_network(trained, tiny_cifar10):
    """Recomputes val loss and top-k from the checkpoint, one image at a time."""
    record = json.loads((trained / "metrics.jsonl").read_text().splitlines()[-1])
    model = MODELS["resnet4q"]([2, 32], width=1)
    model.load_state_dict(load(trained)["state_dict"])
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
        assert record["val"][str(bits)] == pytest.approx(
            {"loss": loss, "top1": top1, "top5": top5}, rel=1e-4)


# ---- the best epoch

def validated_as(top1s, monkeypatch):
    """Let the validations of a run give top-1 of (2 bits, 32 bits), one pair an epoch."""
    pairs = iter(top1s)

    def evaluate(*args, **kwargs):
        return {bits: {"loss": 1.0, "top1": top1, "top5": 99.0}
                for bits, top1 in zip((2, 32), next(pairs), strict=True)}

    monkeypatch.setattr(train, "evaluate", evaluate)


@pytest.mark.parametrize("best_by, top1s, best", [
    ("highest", [(60.0, 60.0), (40.0, 70.0), (90.0, 65.0)], 2),
    ("highest", [(40.0, 70.0), (60.0, 60.0), (30.0, 70.0)], 1),  # a tie, which the mean breaks
    ("highest", [(40.0, 70.0), (40.0, 70.0), (60.0, 60.0)], 2),  # one in both: the later epoch
    ("mean", [(60.0, 60.0), (40.0, 70.0), (30.0, 50.0)], 1),
    ("mean", [(60.0, 60.0), (50.0, 70.0), (70.0, 50.0)], 2),
    ("mean", [(60.0, 60.0), (60.0, 60.0), (10.0, 90.0)], 2)])
def test_the_best_epoch_is_the_same_in_checkpoint_log_and_report(best_by, top1s, best, tmp_path,
                                                                tiny_cifar10, monkeypatch, capsys):
    validated_as(top1s, monkeypatch)
    folder = tmp_path / "r"
    assert run(tiny(tiny_cifar10, folder, "--best-by", best_by)) == 0
    low, high = top1s[best - 1]
    checkpoint = load(folder, "model_best")
    assert (checkpoint["epoch"], checkpoint["best_prec1"]) == (best, high)
    assert load(folder)["best_prec1"] == high
    assert f"best checkpoint (epoch {best})" in capsys.readouterr().out
    report.main(report.parse_args([str(folder), "--epoch", "checkpoint", "--output",
                                   str(tmp_path / "table")]))
    assert f"| any, recursive | {low:.2f} | {high:.2f} |" in capsys.readouterr().out


def test_a_run_resumed_into_another_folder_has_a_best_of_its_own(tmp_path, tiny_cifar10,
                                                                 monkeypatch):
    """Even where none of its epochs is better than the best before, whose file is elsewhere."""
    validated_as([(50.0, 70.0), (50.0, 60.0), (50.0, 65.0), (50.0, 75.0)], monkeypatch)
    assert run(tiny(tiny_cifar10, tmp_path / "a", "--epochs", 2)) == 0
    other = ["--resume", tmp_path / "a", "--results-dir", tmp_path / "b"]
    assert run([*other, "--epochs", 3]) == 0
    best = load(tmp_path / "b", "model_best")
    assert best["epoch"] == 3 and best["best_prec1"] == load(tmp_path / "b")["best_prec1"] == 65
    assert run([*other, "--epochs", 4]) == 0
    best = load(tmp_path / "b", "model_best")
    assert best["epoch"] == 4 and best["best_prec1"] == load(tmp_path / "b")["best_prec1"] == 75


# ---- data and seeds

@pytest.mark.parametrize("dataset",
                         [name for name in DATASETS if name not in ("digits", "cifar10")])
def test_training_on_every_data_set(dataset, tmp_path, monkeypatch):
    getattr(tiny_data, dataset.replace("-", "_"))(tmp_path / "data", monkeypatch)
    model = "svhnq" if DATASETS[dataset].image_size == 40 else "resnet20q"
    if dataset == "imagenet":
        model = "bottlenecks"
    argv = ["--dataset", dataset, "--model", model, "--width", 1, "--data-dir", tmp_path / "data",
            "--epochs", 1, "--bit_width_list", "1,32", "--batch-size", 4, "--device", "cpu",
            "--results-dir", tmp_path / "r"]
    assert run(argv) == 0
    assert load(tmp_path / "r")["epoch"] == 1


def test_seeds_and_workers(tmp_path, tiny_cifar10):
    """The same seed gives the same weights whoever loads the data; another seed gives others."""
    for name, flags in {"a": (), "b": ("--workers", 2), "c": ("--seed", 1)}.items():
        assert run(tiny(tiny_cifar10, tmp_path / name, "--epochs", 1, *flags)) == 0
    a, b, c = (load(tmp_path / name)["state_dict"] for name in "abc")
    assert_same(a, b)
    assert not torch.equal(a["conv0.weight"], c["conv0.weight"])


# ---- bad data: one line that names the place

def test_missing_data_folder(capsys, tmp_path):
    assert run(["--dataset", "imagenet", "--model", "resnet50q", "--data-dir", tmp_path]) == 1
    assert_one_line(capsys, f"{tmp_path}/imagenet/train", "put one folder of images per class",
                    "--data-dir")


def test_class_folders_that_differ(capsys, tmp_path):
    folder = tiny_data.imagenet(tmp_path) / "val"
    (folder / "n01484850").rename(folder / "n99999999")
    assert run(["--dataset", "imagenet", "--model", "resnet50q", "--data-dir", tmp_path]) == 1
    assert_one_line(capsys, "must hold the same class folders", "2 stand in only one", "n01484850")


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_named(workers, capsys, tmp_path):
    path = tiny_data.imagenet(tmp_path) / "train" / "n01440764" / "n01440764_1.JPEG"
    path.write_bytes(path.read_bytes()[:200])
    assert run(["--dataset", "imagenet", "--model", "resnet20q", "--width", 1, "--data-dir",
                tmp_path, "--device", "cpu", "--bit_width_list", 2, "--workers", workers,
                "--results-dir", tmp_path / "r"]) == 1
    assert_one_line(capsys, str(path), "not a readable image", "replace or remove it")


# ---- losses that are not finite

@pytest.mark.parametrize("save_every", [(), ("--save-every", "1e-9")])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_checkpoint(
        save_every, capsys, tmp_path, tiny_cifar10, monkeypatch):
    monkeypatch.setattr(train, "learning_rate_factor",
                        lambda args, epoch: (100, math.inf, 1e33)[epoch])
    sgd = ("--optimizer", "sgd")
    assert run(tiny(tiny_cifar10, tmp_path / "good", *sgd, "--epochs", 1)) == 0
    assert run(tiny(tiny_cifar10, tmp_path / "r", *sgd, *save_every)) == 1
    if save_every:  # a diverged network is not saved, though the loss last looked at was finite
        assert_one_line(capsys, "epoch 2, step 1: ", " is not finite", "lower --lr")
    else:
        assert_one_line(capsys, "epoch 2, training: the ", "-bit loss is not finite at step ",
                        "lower --lr")
    assert_same(load(tmp_path / "r")["state_dict"], load(tmp_path / "good")["state_dict"])


def test_the_step_that_is_named_is_the_first_bad_one():
    metrics = Metrics([1, 32], "cpu")
    for step in range(1, 6):
        losses = {32: torch.tensor(1.0), 1: torch.tensor(math.inf if step >= 4 else 1.0)}
        results = {bits: (losses[bits], torch.zeros(2, 10)) for bits in (32, 1)}
        metrics.add(results, torch.tensor([0, 1]))
        if step == 2:
            metrics.check_finite("epoch 7, training")
    told = "epoch 7, training: the 1-bit loss is not finite at step 4"
    with pytest.raises(UserError, match=told):
        metrics.check_finite("epoch 7, training")


def batch_results(loss, hits, count=4):
    """Return a mean loss and logits of `count` images of label 0, of which `hits` are right."""
    logits = torch.zeros(count, 10)
    logits[:hits, 0] = 1
    logits[hits:, 1:7] = 1
    return torch.tensor(loss), logits


def test_an_error_of_a_user_s_transform_in_a_worker_is_its_own():
    own = ValueError("Caught ValueError in DataLoader worker process 0.\nOriginal Traceback ...")
    with pytest.raises(ValueError, match="Caught ValueError"):
        explain(own)
    killed = RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed.")
    assert explain(killed).endswith("it may have run out of memory, lower --workers")


def test_each_bit_width_is_averaged_over_the_images_that_it_has_seen():
    metrics = Metrics([1, 4, 8, 32], "cpu")
    for results in ({1: batch_results(1.0, 0), 32: batch_results(2.0, 4)},
                    {1: batch_results(3.0, 2), 32: batch_results(4.0, 3)},
                    {4: batch_results(7.0, 1), 32: batch_results(6.0, 2)}):
        metrics.add(results, torch.zeros(4, dtype=torch.int64))
    assert metrics.averages() == {
        1: {"loss": 2.0, "top1": 25.0, "top5": 25.0},
        4: {"loss": 7.0, "top1": 25.0, "top5": 25.0},
        32: {"loss": 4.0, "top1": 75.0, "top5": 75.0}}  # 8 bits was not seen
    assert metrics.state_dict()["counts"] == [8, 4, 0, 12] and metrics.state_dict()["count"] == 12

    restored = Metrics([1, 4, 8, 32], "cpu")
    restored.load_state_dict(metrics.state_dict())
    assert restored.averages() == metrics.averages()


def test_a_bit_width_that_steps_leave_out_is_named_where_its_loss_is_not_finite():
    metrics = Metrics([1, 4, 32], "cpu")
    for middle, loss in ((1, 1.0), (4, 1.0), (4, math.nan), (1, 1.0)):
        results = {middle: batch_results(loss, 1), 32: batch_results(1.0, 1)}
        metrics.add(results, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(UserError, match="training: the 4-bit loss is not finite at step 3"):
        metrics.check_finite("training")


def test_metrics_that_an_older_version_saved():
    """A count of images for all bit-widths together."""
    metrics = Metrics([2, 32], "cpu")
    metrics.load_state_dict({"sums": torch.tensor([[8.0, 2, 4], [4.0, 3, 4]]), "count": 4,
                             "steps": 1, "seconds": 2.0})
    metrics.add({32: batch_results(3.0, 4)}, torch.zeros(4, dtype=torch.int64))
    assert metrics.averages() == {2: {"loss": 2.0, "top1": 50.0, "top5": 100.0},
                                  32: {"loss": 2.0, "top1": 87.5, "top5": 100.0}}


def test_a_run_whose_steps_leave_bit_widths_out(tmp_path, tiny_cifar10, monkeypatch, capsys):
    """Console, metrics.jsonl, TensorBoard and report.py do without one that no step has visited."""
    monkeypatch.setattr(random.Random, "sample", lambda self, population, k: [4])
    folder = tmp_path / "r"
    assert run(tiny(tiny_cifar10, folder, "--bit_width_list", "1,2,4,32", "--widths-per-step", 3,
                    "--print-freq", 2, "--epochs", 1)) == 0
    out = capsys.readouterr().out
    header, row = [line for line in out.splitlines() if line.startswith(("epoch  ", "  1/1"))]
    assert len(header) == len(row)
    text = (folder / "metrics.jsonl").read_text()
    record = json.loads(text, parse_constant=pytest.fail)
    assert list(record["train"]) == ["1", "4", "32"]
    assert list(record["val"]) == ["1", "2", "4", "32"]
    tags = {tag for tag, _ in summary_values(folder / "summary")}
    assert "val_loss_2" in tags and "train_loss_2" not in tags and "train_loss_4" in tags
    report.main(report.parse_args([str(folder), "--output", str(tmp_path / "table")]))
    assert "| any, recursive |" in capsys.readouterr().out


def test_fewer_than_five_classes():
    metrics = Metrics([4], "cpu")
    results = {4: (torch.tensor(1.0), torch.tensor([[0.0, 1.0, 2.0]] * 3))}
    metrics.add(results, torch.tensor([2, 0, 1]))
    assert metrics.averages() == {4: {"loss": 1.0, "top1": pytest.approx(100 / 3), "top5": 100.0}}


# ---- as programs

DIGITS = ["--width", "1", "--bit_width_list", "2,32", "--epochs", "1", "--device", "cpu",
          "--train-fraction", "0.2"]


def on_a_terminal(argv, errors):
    """Run train.py in a fork whose stdout is a terminal; print that, and return the exit code."""
    outer, inner = pty.openpty()
    size = struct.pack("HHHH", 40, 140, 0, 0)  # rows, columns
    fcntl.ioctl(inner, termios.TIOCSWINSZ, size)
    process = fork(functools.partial(run, argv), os.ttyname(inner), errors)
    os.close(inner)
    shown = b""
    try:
        while part := os.read(outer, 4096):
            shown += part
    except OSError:  # the other end is closed
        pass
    os.close(outer)
    print(shown.decode(), end="")
    return wait(process)


def test_digits_recipe_with_data_workers_on_a_terminal_shows_a_bar(tmp_path, forks, recipe_argv):
    argv = recipe_argv("train_digits.sh", *DIGITS, "--results-dir", tmp_path / "r",
                       "--workers", "2")
    done = forks.run(on_a_terminal, argv, tmp_path / "errors")
    errors = (tmp_path / "errors").read_text()
    assert done.returncode == 0 and errors == "", errors
    for part in ("epoch 1/1:", "step/s", ", loss ", "val loss", "best checkpoint (epoch 1)"):
        assert part in done.stdout
    assert load(tmp_path / "r")["epoch"] == 1


def compile_without_a_compiler(argv, folder):
    """Run train.py with argv and --compile, where `folder` holds no compiler; return its exit code.
    """
    with inductor.patch({"cpp.cxx": (None, str(folder / "none")), "compile_threads": 1}):
        return run([*argv, "--compile"])


def test_compile_without_a_compiler_is_one_line_and_the_run_goes_on_without(tmp_path, forks):
    """In a process that has not compiled before: afterwards inductor logs more than the error."""
    argv = ["--dataset", "digits", "--model", "svhnq", "--width", 1, "--bit_width_list", "2,32",
            "--train-fraction", 0.02, "--batch-size", 8, "--epochs", 1, "--device", "cpu",
            "--results-dir", tmp_path / "r"]
    done = forks.run(compile_without_a_compiler, argv, tmp_path, env={
        **os.environ, "PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")})
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert ": error: --compile needs a compiler that works here (" in done.stderr
    assert "): pass --no-compile" in done.stderr
    assert run([*argv, "--no-compile"]) == 0
    assert load(tmp_path / "r")["arguments"]["compile"] is False


def test_a_change_that_cannot_be_compiled_is_named_by_its_line():
    def forward(model, x):
        model.register_forward_hook(print).remove()
        return model(x)

    with pytest.raises(Exception) as caught:
        torch.compile(forward, fullgraph=True, backend="eager")(torch.nn.ReLU(), torch.ones(1))
    line = forward.__code__.co_firstlineno + 1
    message = explain(caught.value)
    assert f"--compile cannot follow {__file__}, line {line} (" in message
    assert "\n" not in message


def test_a_number_that_changes_is_named_where_it_is_compiled_again_and_again():
    def forward(model, x):
        return x * model.factor

    model = torch.nn.ReLU()
    compiled = torch.compile(forward, fullgraph=True, backend="eager", dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2), pytest.raises(Exception) as caught:
        for model.factor in range(4):
            compiled(model, torch.ones(1))
    assert "--compile compiles again and again" in explain(caught.value)


@pytest.mark.parametrize("kind", [list, lambda items: Subset(items, range(len(items)))])
def test_the_same_images_to_train_and_to_validate_on_are_noted(kind, tmp_path, monkeypatch, capsys):
    """As of a row whose `open` ignores the split; what only one of the two says tells nothing."""
    images = open_digits("", "train")[:16]
    monkeypatch.setitem(DATASETS, "digits", DATASETS["digits"]._replace(
        shapes={}, open=lambda root, split: images if split == "train" else kind(images)))
    assert run(["--width", 1, "--bit_width_list", 2, "--epochs", 1, "--lr_decay", "",
                "--batch-size", 8, "--device", "cpu", "--results-dir", tmp_path / "r"]) == 0
    is_noted = "note: the images to validate on are those to train on" in capsys.readouterr().out
    assert is_noted == (kind is list)
