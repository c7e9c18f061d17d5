"""report.py on results folders with known numbers."""
import csv
import io
import json
import os
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch

import report
from engine.arguments import merge_args, parse_flags, run_name
from engine.errors import run_program
from engine.run_folder import write_metrics
from models import MODELS
from runs import compact, tiny
from runs import run as train


def write_run(folder, top1, *flags):
    """Make a results folder of train.py's `flags`, with val top-1 {bits: [per epoch]}."""
    folder.mkdir(parents=True)
    epochs = len(next(iter(top1.values())))
    arguments = vars(merge_args(parse_flags(["--epochs", str(max(1, epochs)), *flags,
                                         "--bit_width_list", ",".join(map(str, top1))])))
    (folder / "config.json").write_text(json.dumps({"arguments": arguments}))
    records = []
    for epoch in range(epochs):
        val = {bits: {"loss": 1.0, "top1": values[epoch], "top5": 99.0}
               for bits, values in top1.items()}
        records.append({"epoch": epoch + 1, "train": val, "val": val})
    write_metrics(folder / "metrics.jsonl", records)
    return str(folder)


def write_evaluation(folder, trained, top1, batches=20):
    """Make a folder of an evaluation of write_run's folder, with top-1 {bits: %}."""
    folder.mkdir()
    arguments = json.loads((trained / "config.json").read_text())["arguments"]
    (folder / "config.json").write_text(json.dumps({
        "arguments": {**arguments, "evaluate": True, "calibrate": batches,
                      "bit_width_list": list(top1)}, "epoch": 3,
        "trained_bit_widths": arguments["bit_width_list"],
        "checkpoint": f"{trained}/ckpt/model_best.pth.tar"}))
    (folder / "evaluation.json").write_text(json.dumps(
        {bits: {"loss": 1.0, "top1": value, "top5": 99.0} for bits, value in top1.items()}))
    return str(folder)


def run(argv):
    try:
        run_program(report.main, partial(report.parse_args, argv))
    except SystemExit as ended:
        return ended.code
    return 0


@pytest.fixture
def runs(tmp_path):
    return [
        write_run(tmp_path / "a0", {1: [90.0, 91.0], 32: [99.0, 98.0]}, "--seed", "0"),
        write_run(tmp_path / "a1", {1: [92.0, 93.0], 32: [97.0, 98.0]}, "--seed", "1",
                  "--workers", "3"),
        write_run(tmp_path / "h0", {1: [80.0, 81.0], 32: [98.0, 98.0]}, "--loss", "hard"),
        write_run(tmp_path / "d1", {1: [70.0, 72.0]}),
        write_run(tmp_path / "d32", {32: [95.0, 96.0]}, "--loss", "hard")]


def test_runs_of_other_code_are_said(runs, tmp_path, capsys):
    for folder, commit in zip(runs, ("abc", "abc with local changes")):
        path = Path(folder, "config.json")
        path.write_text(json.dumps({**json.loads(path.read_text()), "commit": commit}))
    assert run([*runs, "--output", str(tmp_path / "table")]) == 0
    out = capsys.readouterr().out
    assert ("note: the runs of any, recursive used different versions of the code: "
            f"{runs[0]} of abc, {runs[1]} of abc with local changes\n") in out


@pytest.mark.pictures
def test_table_in_the_published_form(runs, tmp_path, capsys):
    assert run([*runs, "--output", str(tmp_path / "out" / "table")]) == 0
    out = compact(capsys.readouterr().out)
    assert out.splitlines()[:6] == [
        "svhnq on digits: val top-1 (%) of the last epoch, mean ± standard deviation, "
        "1 to 2 runs a cell", "",
        "| model | 1 | 32 |", "|---|---|---|",
        "| any, recursive | 92.00 ± 1.41 | 98.00 ± 0.00 |", "| any, hard | 81.00 | 98.00 |"]
    assert "| dedicated | 72.00 | 96.00 |" in out
    assert compact((tmp_path / "out" / "table.md").read_text()) in out
    assert (tmp_path / "out" / "table.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((tmp_path / "out" / "table.csv").open()))
    assert len(rows) == 8 and rows[0] == {
        "dataset": "digits", "model": "svhnq", "configuration": "any, recursive", "seed": "0",
        "bits": "1", "top1": "91.0", "top5": "99.0", "loss": "1.0", "results": runs[0]}


@pytest.mark.parametrize("epoch, row", [
    ("last", "91.00 | 98.00"),
    ("checkpoint", "90.00 | 99.00"),  # of epoch 1, where 32 bits was best
    ("best", "91.00 | 99.00")])
def test_which_epoch(epoch, row, runs, tmp_path, capsys):
    assert run([runs[0], "--epoch", epoch, "--output", str(tmp_path / "t")]) == 0
    assert f"| any, recursive | {row} |" in compact(capsys.readouterr().out)


def test_what_sets_configurations_apart_is_in_their_names(runs, tmp_path, capsys):
    slow = write_run(tmp_path / "slow", {1: [45.0, 50.0], 32: [55.0, 60.0]}, "--lr", "0.01")
    resnet = write_run(tmp_path / "resnet", {1: [40.0], 32: [41.0]}, "--model", "resnet20q",
                       "--epochs", "1")
    assert run([runs[0], slow, resnet, "--output", str(tmp_path / "t")]) == 0
    out = compact(capsys.readouterr().out)
    assert "| any, recursive, lr 0.001 | 91.00 | 98.00 |" in out
    assert "| any, recursive, lr 0.01 | 50.00 | 60.00 |" in out
    assert "resnet20q on digits" in out and "| any, recursive | 40.00 | 41.00 |" in out


def test_names_say_what_is_not_the_same_in_all(runs, tmp_path, capsys):
    top1 = {1: [40.0, 50.0], 32: [50.0, 60.0]}
    others = {"sgd": ["--optimizer", "sgd"], "conv": ["--all-conv"], "low": ["--precision", "bf16"]}
    for name, flags in others.items():
        runs.append(write_run(tmp_path / name, top1, *flags))
    assert run([*runs, "--output", str(tmp_path / "t")]) == 0
    out = compact(capsys.readouterr().out)
    names = [row.split(" | ")[0] for row in out.splitlines() if row.startswith("| any")]
    assert names == [
        "| any, recursive, optimizer adam", "| any, hard, optimizer adam",
        "| any, recursive, optimizer sgd", "| any, recursive, all conv, optimizer adam",
        "| any, recursive, bf16, optimizer adam"]


def row_of(runs, tmp_path, capsys):
    """Return the rows of a report of runs as {name: top-1 at its first bit-width}."""
    assert run([*runs, "--output", str(tmp_path / "t")]) == 0
    rows = [line.strip("| ").split(" | ") for line in compact(capsys.readouterr().out).splitlines()
            if line.startswith("| any")]
    return {cells[0]: cells[1] for cells in rows}


@pytest.mark.parametrize("flags, words", [
    (["--all-conv"], "all conv"), (["--widths-per-step", "2"], "widths per step 2"),
    (["--sync-bn"], "sync bn"), (["--start-epoch", "1"], "start epoch 1")])
def test_a_run_without_what_most_have_has_its_own_row(flags, words, tmp_path, capsys):
    runs = [write_run(tmp_path / f"{seed}", {1: [0.0, 90.0], 2: [0.0, 90.0]}, *flags, "--seed",
                      str(seed)) for seed in range(3)]
    runs.append(write_run(tmp_path / "plain", {1: [0.0, 50.0], 2: [0.0, 50.0]}))
    assert row_of(runs, tmp_path, capsys) == {
        f"any, recursive, {words}": "90.00 ± 0.00", "any, recursive": "50.00"}


def test_a_training_among_its_evaluations_has_its_own_row(tmp_path, capsys):
    runs = []
    for seed in range(3):
        trained = tmp_path / f"a{seed}"
        runs.append(write_run(trained, {1: [90.0]}, "--seed", str(seed)))
        write_evaluation(tmp_path / f"e{seed}", trained, {1: 70.0, 2: 75.0}, batches=None)
    found = [runs[0], *(str(tmp_path / f"e{seed}") for seed in range(3))]
    assert run([*found, "--output", str(tmp_path / "t")]) == 0
    out = compact(capsys.readouterr().out)
    assert "| dedicated | 90.00 |" in out
    assert "| dedicated 1-bit, best checkpoint evaluated | 70.00 ± 0.00 | 75.00 ± 0.00 |" in out


def test_runs_on_other_numbers_of_processes_are_apart(tmp_path, capsys):
    runs = [write_run(tmp_path / name, {1: [top1], 32: [99.0]}, "--seed", seed)
            for name, top1, seed in (("a", 90.0, "0"), ("b", 50.0, "1"))]
    edit(tmp_path / "b" / "config.json", "processes", value=8)
    assert row_of(runs, tmp_path, capsys) == {
        "any, recursive, processes 1": "90.00", "any, recursive, processes 8": "50.00"}


def test_evaluations_of_networks_that_were_trained_otherwise_are_apart(
        tmp_path, tiny_cifar10, capsys):
    """By what train.py writes."""
    folders = []
    for name, more in (("a", ["--lr", 0.01]), ("b", ["--lr", 0.1, "--seed", 1])):
        assert train(tiny(tiny_cifar10, tmp_path / name, "--epochs", 1, *more)) == 0
        folders.append(tmp_path / f"{name}_e")
        assert train(["--evaluate", "--pretrain", tmp_path / name, "--data-dir", tiny_cifar10,
                      "--results-dir", folders[-1]]) == 0
    config = json.loads((folders[0] / "config.json").read_text())
    assert config["trained_with"]["lr"] == 0.01 and "lr" not in config["arguments"]
    capsys.readouterr()
    assert row_of(map(str, folders), tmp_path, capsys).keys() == {
        "any, recursive, lr 0.01", "any, recursive, lr 0.1"}


def test_other_assignments_of_one_name_are_said(tmp_path, capsys):
    folders = []
    for seed, bits in enumerate((8, 2)):
        trained = tmp_path / f"a{seed}"
        write_run(trained, {8: [90.0]}, "--seed", str(seed))
        folders.append(write_evaluation(tmp_path / f"e{seed}", trained, {8: 90.0}))
        edit(tmp_path / f"e{seed}" / "config.json", "assignments",
             value=[{"name": "mix", "default": bits, "layers": {}}])
        edit(tmp_path / f"e{seed}" / "evaluation.json", "mix",
             value={"loss": 1.0, "top1": 50.0, "top5": 90.0})
    assert run([*folders, "--output", str(tmp_path / "t")]) == 0
    assert ("note: the runs of dedicated 8-bit have other assignments of bits to layers, as of "
            f"{folders[0]} and {folders[1]}\n") in compact(capsys.readouterr().out)


def test_an_evaluation_that_does_not_say_its_training_is_apart(tmp_path, capsys):
    """As of an earlier version, beside one that does."""
    folders = []
    for seed in range(2):
        trained = tmp_path / f"a{seed}"
        write_run(trained, {1: [90.0], 2: [90.0]}, "--seed", str(seed))
        folders.append(write_evaluation(tmp_path / f"e{seed}", trained, {1: seed, 2: seed}))
    edit(tmp_path / "e1" / "config.json", "trained_with", value={"lr": 0.1})
    rows = row_of(folders, tmp_path, capsys)
    assert sorted(rows.values()) == ["0.00", "1.00"]
    assert [name for name, top1 in rows.items() if "training unknown" in name and top1 == "0.00"]


def test_evaluations_of_one_network_are_one_run(tmp_path, capsys):
    """At bit-widths of which some are the same, or with another seed of the evaluation."""
    trained = tmp_path / "a"
    write_run(trained, {1: [90.0], 2: [90.0]}, "--seed", "3")
    folders = [write_evaluation(tmp_path / "e", trained, {1: 70.0, 2: 80.0}, batches=None),
               write_evaluation(tmp_path / "e2", trained, {2: 80.0}, batches=None),
               write_evaluation(tmp_path / "seed", trained, {1: 70.0, 2: 80.0}, batches=None)]
    for folder in folders:
        edit(Path(folder, "config.json"), "trained_with", value={"seed": 3})
    edit(Path(folders[2], "config.json"), "arguments", "seed", value=1)
    assert run([*folders, "--output", str(tmp_path / "t")]) == 0
    out = compact(capsys.readouterr().out)
    assert "| any, recursive | 70.00 | 80.00 |" in out
    for folder in folders[1:]:
        assert f"left out: {folder} repeats seed 3 of {folders[0]}" in out
    parts = [write_evaluation(tmp_path / name, trained, {bits: top1}, batches=None)
             for name, bits, top1 in (("one", 1, 70.0), ("two", 2, 80.0))]
    assert run([*parts, "--output", str(tmp_path / "t")]) == 0
    assert "| any, recursive | 70.00 | 80.00 |" in compact(capsys.readouterr().out)


def test_evaluations_of_other_weights_or_images_are_apart(tmp_path, capsys):
    trained = tmp_path / "a"
    write_run(trained, {1: [90.0], 2: [90.0]})
    names = ("one", "weights", "apart", "split", "size", "batch")
    folders = {name: write_evaluation(tmp_path / name, trained, {1: 70.0}, batches=2)
               for name in names}
    arguments = json.loads((trained / "config.json").read_text())["arguments"]
    for name, folder in folders.items():
        config = Path(folder, "config.json")
        edit(config, "trained_with", value={**arguments, "train_split": "train_auto_quan"})
        edit(config, "arguments", "train_split", value="train_auto_quan")
        edit(config, "weights", value="other" if name in ("weights", "apart") else "own")
    edit(Path(folders["weights"], "evaluation.json"), "2", value={
        "loss": 1.0, "top1": 60.0, "top5": 99.0})
    edit(Path(folders["weights"], "config.json"), "arguments", "bit_width_list", value=[1, 2])
    Path(folders["apart"], "evaluation.json").write_text(
        '{"2": {"loss": 1.0, "top1": 60.0, "top5": 99.0}}')  # at no bit-width of the first
    edit(Path(folders["apart"], "config.json"), "arguments", "bit_width_list", value=[2])
    edit(Path(folders["split"], "config.json"), "arguments", "train_split", value="train")
    edit(Path(folders["size"], "config.json"), "arguments", "image_size", value=64)
    edit(Path(folders["batch"], "config.json"), "arguments", "batch_size", value=5)
    assert run([*folders.values(), "--output", str(tmp_path / "t")]) == 0
    out = compact(capsys.readouterr().out)
    for name in ("calibrated on 2 batches, on val", "calibrated on 2 batches, at 64 pixels",
                 "calibrated on 2 batches of 5"):
        assert f"| any, recursive, {name} | 70.00 |" in out
    for name in ("weights", "apart"):
        assert f"left out: {folders[name]} is of another checkpoint than {folders['one']}" in out


def test_evaluations_of_unfinished_runs_are_apart(tmp_path, capsys):
    folders = []
    for name, done in (("a", 3), ("b", 30)):
        trained = tmp_path / name
        write_run(trained, {1: [90.0]}, "--seed", str(done))
        folders.append(write_evaluation(tmp_path / f"{name}_e", trained, {1: done, 2: done}))
        config = tmp_path / f"{name}_e" / "config.json"
        edit(config, "epoch", value=done)
        edit(config, "checkpoint", value="model_latest.pth.tar")
        edit(config, "trained_with", value={"epochs": 30})
    assert run([*folders, "--output", str(tmp_path / "t")]) == 0
    out = compact(capsys.readouterr().out)
    assert "| dedicated 1-bit, 3 of 30 epochs | 3.00 | 3.00 |" in out
    assert "| dedicated 1-bit | 30.00 | 30.00 |" in out


def test_a_published_network_is_not_said_to_have_the_default_loss(tmp_path, tiny_cifar10, capsys):
    model = MODELS["resnet4q"]([2, 32], width=1)
    torch.save({"model": "resnet4q", "state_dict": model.state_dict()}, tmp_path / "x.pth.tar")
    assert train(["--evaluate", "--pretrain", tmp_path / "x.pth.tar", "--dataset", "cifar10",
                  "--data-dir", tiny_cifar10, "--results-dir", tmp_path / "e"]) == 0
    capsys.readouterr()
    assert row_of([str(tmp_path / "e")], tmp_path, capsys).keys() == {"any"}


def test_a_run_in_bf16_is_named_so_alone_too(tmp_path, capsys):
    folder = write_run(tmp_path / "low", {4: [50.0]}, "--precision", "bf16")
    assert run([folder, "--output", str(tmp_path / "t")]) == 0
    assert "| dedicated, bf16 | 50.00 |" in compact(capsys.readouterr().out)
    arguments = json.loads((tmp_path / "low" / "config.json").read_text())["arguments"]
    assert run_name(Namespace(**arguments)) == "digits_svhnq_4_bf16_seed0"
    assert run_name(Namespace(**{**arguments, "precision": "fp32"})) == "digits_svhnq_4_seed0"


def test_what_the_figure_draws(runs, tmp_path, monkeypatch, capsys):
    """Dedicated networks are separate; a network that runs at several bit-widths is one."""
    drawn = []
    monkeypatch.setattr(report, "save_comparison_figure", lambda path, panels: drawn.extend(panels))
    evaluated = write_evaluation(tmp_path / "e", tmp_path / "d32", {1: 20.0, 32: 96.0})
    assert run([*runs, evaluated, "--output", str(tmp_path / "t")]) == 0
    (title, found), = drawn
    assert title == "svhnq on digits"
    assert {curve.name: (curve.joined, sorted(curve.trained)) for curve in found} == {
        "any, recursive": (True, [1, 32]), "any, hard": (True, [1, 32]),
        "dedicated": (False, [1, 32]),
        "dedicated 32-bit, best checkpoint evaluated, calibrated on 20 batches": (True, [32])}
    assert found[0].mean == {1: 92.0, 32: 98.0}
    assert found[0].spread == {1: pytest.approx(2 ** 0.5), 32: 0} and found[2].spread == {}


def test_unfinished_runs_have_a_row_of_their_own_and_repeated_seeds_none(runs, tmp_path, capsys):
    half = write_run(tmp_path / "half", {1: [10.0], 32: [11.0]}, "--epochs", "2")
    again = write_run(tmp_path / "again", {1: [1.0, 2.0], 32: [3.0, 4.0]}, "--seed", "1")
    assert run([*runs, half, again, "--output", str(tmp_path / "t")]) == 0
    out = compact(capsys.readouterr().out)
    assert "| any, recursive | 92.00 ± 1.41 | 98.00 ± 0.00 |" in out
    assert "| any, recursive, 1 of 2 epochs | 10.00 | 11.00 |" in out
    assert f"left out: {again} repeats seed 1 of {runs[1]}" in out


def test_evaluations_say_what_they_are_of(runs, tmp_path, capsys):
    folder = write_evaluation(tmp_path / "e", tmp_path / "d32", {1: 20.0})
    assert run([*runs, folder, "--output", str(tmp_path / "t")]) == 0
    out = compact(capsys.readouterr().out)
    assert "of the last epoch, or the checkpoint that was evaluated," in out
    name = "dedicated 32-bit, best checkpoint evaluated, calibrated on 20 batches"
    assert f"| {name} | 20.00 |" in out

    other = write_evaluation(tmp_path / "e0", tmp_path / "d32", {1: 15.0}, batches=0)
    own = write_evaluation(tmp_path / "own", tmp_path / "d32", {32: 96.0}, batches=0)
    assert run([folder, other, own, "--output", str(tmp_path / "t")]) == 0
    out = compact(capsys.readouterr().out)
    assert "| dedicated 32-bit, calibrated on 20 batches | 20.00 |" in out
    assert "| dedicated 32-bit, not calibrated | 15.00 |" in out
    assert "| dedicated, not calibrated | | 96.00 |" in out


def test_evaluations_of_two_runs_of_one_seed_are_no_repetition(tmp_path, capsys):
    write_run(tmp_path / "a", {1: [1.0]})
    write_run(tmp_path / "b", {1: [2.0]}, "--lr", "0.1")
    first, second = (write_evaluation(tmp_path / f"{name}_e", tmp_path / name, {1: 20.0})
                     for name in "ab")
    assert run([first, second, "--output", str(tmp_path / "t")]) == 0
    out = capsys.readouterr().out
    assert f"left out: {second} is of another checkpoint than {first}" in out


def test_bit_width_lists_tell_apart_what_nothing_else_does(runs, tmp_path, capsys):
    more = write_run(tmp_path / "more", {1: [45.0, 50.0], 2: [50.0, 55.0], 32: [50.0, 60.0]})
    assert run([runs[0], more, "--output", str(tmp_path / "t")]) == 0
    out = compact(capsys.readouterr().out)
    assert "| any, recursive (1,32) | 91.00 | | 98.00 |" in out
    assert "| any, recursive (1,2,32) | 50.00 | 55.00 | 60.00 |" in out


def test_a_report_s_own_files_are_no_runs(runs, tmp_path, capsys):
    """As a shell's results/* has it, the second time."""
    for _ in range(2):
        argv = [*map(str, sorted(tmp_path.iterdir())), "--output", str(tmp_path / "report")]
        assert run(argv) == 0
    assert "| any, recursive | 92.00" in compact(capsys.readouterr().out)


def test_what_is_no_run_is_named_beside_the_report_of_those_that_are(runs, tmp_path, capsys):
    (tmp_path / "container").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    wrong = [str(tmp_path / name) for name in ("typo", "container", "notes.txt")]
    assert run([*runs, *wrong, "--output", str(tmp_path / "t")]) == 1
    out, err = map(compact, capsys.readouterr())
    assert "| any, recursive | 92.00" in out and compact((tmp_path / "t.md").read_text()) in out
    assert "error: the report lacks " in err
    assert err.count("\n") == 1 and f"{wrong[0]} does not exist" in err
    for path in wrong[1:]:
        assert f"{path} is not a results folder" in err


@pytest.mark.parametrize("argv, flag", [([""], "RESULTS"), (["x", "--output", ""], "--output")])
def test_empty_arguments(argv, flag, capsys):
    assert run(argv) == 2
    err = capsys.readouterr().err
    assert f"{flag}: '' is empty" in err and err.count("\n") == 1


def test_a_path_that_is_not_utf_8(tmp_path, monkeypatch):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    run_folder = write_run(folder, {1: [90.0]})
    other = write_run(tmp_path / "b", {1: [90.0]}, "--pretrain", str(folder / "x"))
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))
    assert run([run_folder, other, "--output", str(folder / "t")]) == 0
    assert b"caf\\udce9" in shown.getvalue() and b"mean \\xb1 standard" in shown.getvalue()
    assert b"caf\xe9" in (folder / "t.csv").read_bytes()
    assert (folder / "t.png").exists()


@pytest.mark.parametrize("make, told", [
    (lambda folder: None, "does not exist"),
    (lambda folder: folder.mkdir(), "is not a results folder of train.py"),
    (lambda folder: write_run(folder, {1: []}) and (folder / "metrics.jsonl").write_text(""),
     "no finished epoch")])
def test_what_is_no_run(make, told, tmp_path, capsys):
    make(tmp_path / "x")
    assert run([str(tmp_path / "x"), "--output", str(tmp_path / "t")]) == 1
    err = capsys.readouterr().err
    assert told in err and str(tmp_path / "x") in err and err.count("\n") == 1


def evaluation_folder(folder, **config):
    """Make a results folder of an evaluation at 1 and 32 bits."""
    write_run(folder, {1: [90.0], 32: [91.0]})
    written = json.loads((folder / "config.json").read_text())
    written["arguments"]["evaluate"] = True
    (folder / "config.json").write_text(json.dumps(
        {**written, "checkpoint": "x.pth.tar", "trained_bit_widths": [1, 32], **config}))
    values = {"loss": 1.0, "top1": 20.0, "top5": 50.0}
    (folder / "evaluation.json").write_text(json.dumps({"1": values, "32": values}))
    return folder


def edit(path, *keys, value):
    """Change a value within a JSON file."""
    content = json.loads(path.read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("file, keys, value, told", [
    ("config.json", ["arguments"], None, "does not hold the arguments of a run"),
    ("config.json", ["arguments"], {}, "its argument model is None, not that of a run"),
    ("config.json", ["arguments", "seed"], "x", "its argument seed is 'x'"),
    ("config.json", ["arguments", "loss"], ["x"], "its argument loss is ['x']"),
    ("config.json", ["arguments", "dataset"], None, "its argument dataset is None"),
    ("config.json", ["arguments", "lr"], {}, "its argument lr is {}"),
    ("config.json", ["arguments", "evaluate"], 1, "its argument evaluate is 1"),
    ("config.json", ["arguments", "best_by"], "luck", "its argument best_by is 'luck'"),
    ("config.json", ["arguments", "bit_width_list"], [1, 99], "bit_width_list is [1, 99]"),
    ("config.json", ["arguments", "bit_width_list"], [], "its argument bit_width_list is []"),
    ("config.json", ["trained_bit_widths"], 5, "its trained_bit_widths is 5"),
    ("config.json", ["checkpoint"], 5, "its checkpoint is 5, not a path"),
    ("evaluation.json", ["1"], None, "its results at 1 bits is None"),
    ("evaluation.json", ["x"], {}, "its results is 'x', not a key (bit-width 'x' does not exist"),
    ("evaluation.json", ["1", "top1"], "x", "its top1 of results at 1 bits is 'x'"),
    ("evaluation.json", ["2"], {"loss": 1, "top1": 1, "top5": 1}, "is of 1,2,32 bits")])
def test_a_damaged_field_is_named(file, keys, value, told, tmp_path, capsys):
    folder = evaluation_folder(tmp_path / "x")
    edit(folder / file, *keys, value=value)
    assert run([str(folder), "--output", str(tmp_path / "t")]) == 1
    err = capsys.readouterr().err
    assert str(folder / file) in err and told in err and err.count("\n") == 1
    assert not (tmp_path / "t.md").exists()


@pytest.mark.parametrize("file", ["config.json", "evaluation.json"])
@pytest.mark.parametrize("content, told", [
    (b"", "is not JSON"), (b"{", "is not JSON"), (b"[" * 10**5, "is not JSON"),
    (b"\xff", "is damaged"), (b"[1]", "")])
def test_a_damaged_file_is_named(file, content, told, runs, tmp_path, capsys):
    folder = evaluation_folder(tmp_path / "x")
    (folder / file).write_bytes(content)
    assert run([*runs, str(folder), "--output", str(tmp_path / "t")]) == 1
    out, err = map(compact, capsys.readouterr())
    assert "| any, recursive | 92.00" in out
    assert f"{folder / file}" in err and told in err and err.count("\n") == 1


def test_metrics_of_other_bit_widths_than_the_run_s(tmp_path, capsys):
    folder = tmp_path / "x"
    write_run(folder, {1: [90.0], 32: [91.0]})
    edit(folder / "config.json", "arguments", "bit_width_list", value=[1, 2])
    assert run([str(folder), "--output", str(tmp_path / "t")]) == 1
    assert "metrics.jsonl is of 1,32 bits, and the run's config.json of 1,2" in (
        capsys.readouterr().err)


def test_names_reach_the_terminal_without_escape_sequences(tmp_path, capsys):
    folder = evaluation_folder(tmp_path / "x", checkpoint="\x1b[31mred.pth.tar")
    edit(folder / "config.json", "arguments", "model", value="m\x1b[2J")
    assert run([str(folder), "--output", str(tmp_path / "t")]) == 0
    out = compact(capsys.readouterr().out)
    assert "\x1b" not in out and r"m\x1b[2J on digits" in out
    assert report.load_run(folder).evaluation["evaluation"] == r"\x1b[31mred evaluated"
