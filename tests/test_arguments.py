"""The command line and the recipes: what they mean, and what is told of a wrong one."""
import ast
import itertools
import random
import runpy
import sys

import pytest
import torch
from runs import ROOT, assert_one_line, run

import train
from engine.arguments import DEFAULTS, FLAGS, merge_args, parse_flags

SETTINGS = ("dataset", "train_split", "model", "optimizer", "lr", "lr_decay", "epochs",
            "batch_size", "weight_decay")


def arguments(argv):
    return merge_args(parse_flags(argv))


def settings(args):
    return tuple(getattr(args, name) for name in SETTINGS)


def test_defaults():
    """The batch size is the published one, on which published command lines rely."""
    args = arguments([])
    assert settings(args) == ("digits", "train", "svhnq", "adam", 0.001, [15, 22, 27], 30, 128, 0)
    assert (args.width, args.loss, args.bit_width_list) == (2, "recursive", [1, 2, 4, 8, 32])


def test_flags_existing_users_know():
    args = arguments([
        "--results-dir", "r", "--dataset", "svhn", "--train_split", "train", "--model", "svhnq",
        "--workers", "3", "--epochs", "9", "--start-epoch", "2", "--batch-size", "16",
        "--optimizer", "sgd", "--lr", "0.1", "--lr_decay", "3,6", "--weight-decay", "1e-4",
        "--print-freq", "7", "--pretrain", "p", "--resume", "None", "--bit_width_list", "4,1,32"])
    assert settings(args) == ("svhn", "train", "svhnq", "sgd", 0.1, [3, 6], 9, 16, 1e-4)
    assert (args.results_dir, args.workers, args.start_epoch, args.print_freq, args.pretrain) == (
        "r", 3, 2, 7, "p")
    assert args.bit_width_list == [1, 4, 32]


def test_dashed_spellings():
    args = arguments(["--train-split", "train", "--lr-decay", "", "--bit-width-list", "2",
                      "-p", "4"])
    assert (args.train_split, args.lr_decay, args.bit_width_list, args.print_freq) == (
        "train", [], [2], 4)


def test_flags_hold_what_is_given_and_nothing_else():
    flags = vars(parse_flags(["--lr", "0.5", "--all-conv"]))
    assert flags == {"lr": 0.5, "all_conv": True}


def test_no_source_as_published_scripts_write_it():
    args = arguments(["--pretrain", "None", "--resume", "None"])
    assert args.pretrain is None and args.resume is None


def test_flags_come_before_a_checkpoint_and_that_before_the_defaults():
    """Of a flag that is given twice the last one wins, as the user's come after the recipe's."""
    flags = parse_flags(["--lr", "0.2", "--loss", "hard", "--dataset", "cifar10", "--model",
                         "resnet20q", "--lr", "0.1"])
    args = merge_args(flags, {"lr": 0.3, "epochs": 3, "dataset": "svhn", "seed": 4})
    assert (args.lr, args.epochs, args.loss, args.dataset, args.seed, args.batch_size) == (
        0.1, 3, "hard", "cifar10", 4, 128)


@pytest.mark.parametrize("flags, expected", [
    (["--lr_decay", "2,4,5"], [1, 1, 0.1, 0.1, 0.01, 0.001]),
    (["--schedule", "cosine"], [1, 0.933012702, 0.75, 0.5, 0.25, 0.066987298])])
def test_learning_rate_against_a_table_by_hand(flags, expected):
    args = arguments(["--epochs", "6", *flags])
    found = [train.learning_rate_factor(args, epoch) for epoch in range(6)]
    assert found == pytest.approx(expected)


def test_a_cosine_takes_no_epochs_of_decay():
    """Not of a recipe either, whose --lr_decay a user cannot leave out."""
    args = arguments(["--lr_decay", "3", "--schedule", "cosine"])
    assert (args.schedule, args.lr_decay) == ("cosine", [])


def test_flags_are_listed_where_they_are_declared_alone():
    """Three or more names of flags in one literal are a list that a new flag would have to join."""
    assert FLAGS.keys() == DEFAULTS.keys()
    programs = [ROOT / name for name in ("train.py", "report.py", "export.py")]
    for path in (*programs, *(ROOT / "engine").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if path.name != "arguments.py" and isinstance(node, (ast.Tuple, ast.List, ast.Set)):
                values = {getattr(element, "value", None) for element in node.elts
                          if isinstance(element, ast.Constant)}
                assert len(values & DEFAULTS.keys()) < 3, f"{path}:{node.lineno}"


# ---- bit-widths per step

def test_a_step_visits_the_highest_the_lowest_and_some_between():
    widths = [8, 1, 32, 4, 2]
    drawn = [train.choose_bit_widths(widths, 4, 0, 1, step) for step in range(100)]
    assert all(found[0] == 1 and found[-1] == 32 and len(found) == 4 for found in drawn)
    assert {tuple(found[1:-1]) for found in drawn} == {
        pair for pair in itertools.permutations([2, 4, 8], 2)}
    assert train.choose_bit_widths(widths, 2, 0, 1, 0) == [1, 32]
    for count in (None, 5, 9):
        assert sorted(train.choose_bit_widths(widths, count, 0, 1, 0)) == [1, 2, 4, 8, 32]


def test_bit_widths_of_a_step_are_of_seed_epoch_and_step_alone():
    def drawn(seed, epoch):
        return [train.choose_bit_widths(list("abcdef"), 3, seed, epoch, step)
                for step in range(20)]

    torch.manual_seed(0)
    random.seed(0)
    states = torch.get_rng_state(), random.getstate()
    assert drawn(0, 0) == drawn(0, 0)
    assert drawn(0, 0) != drawn(1, 0) and drawn(0, 0) != drawn(0, 1)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert [found[1] for found in drawn(0, 0)[:6]] == list("dbeccc")  # older runs go on


# ---- recipes

RECIPES = {  # REFERENCE.md's table, by hand
    "train_digits.sh": ("digits", "train", "svhnq", "adam", 0.001, [15, 22, 27], 30, 64, 0),
    "train_fashion.sh": ("fashion-mnist", "train", "svhnq", "adam", 0.001, [3, 5], 6, 128, 0),
    "train_cifar10.sh": ("cifar10", "train", "resnet20q", "adam", 0.001, [100, 150, 180], 200, 128,
                         0),
    "train_svhn.sh": ("svhn", "train_extra", "svhnq", "adam", 0.001, [50, 75, 90], 100, 128, 0),
    "train_imagenet.sh": ("imagenet", "train", "resnet50q", "sgd", 0.5, [45, 60, 70], 80, 256,
                          1e-5),
}
DEDICATED_IMAGENET = ("imagenet", "train", "resnet50q", "sgd", 0.1, [30, 60, 85, 95, 105], 120, 256)


@pytest.fixture
def recipe_flags(recipe_argv):
    """A function that runs a recipe by bash, and returns the flags that train.py gets of it."""
    return lambda *words, **options: parse_flags(recipe_argv(*words, **options))


@pytest.mark.parametrize("script", RECIPES)
def test_recipe(script, recipe_flags):
    args = merge_args(recipe_flags(script))
    assert settings(args) == RECIPES[script]
    assert (args.bit_width_list, args.loss) == ([1, 2, 4, 8, 32], "recursive")
    args = merge_args(recipe_flags(script, "--loss", "hard", "--bit_width_list", "2",
                               "--results-dir", "a folder"))
    assert (args.bit_width_list, args.loss, args.results_dir) == ([2], "hard", "a folder")


@pytest.mark.parametrize("script", RECIPES)
def test_of_a_recipe_s_flag_and_the_user_s_the_last_wins(script, recipe_flags):
    flags = recipe_flags(script, "--lr", "0.7", "--epochs", "3", "--lr_decay", "2", "--workers",
                         "1", "--optimizer", "adamw")
    args = merge_args(flags)
    assert (args.lr, args.epochs, args.lr_decay, args.workers, args.optimizer) == (
        0.7, 3, [2], 1, "adamw")


@pytest.mark.parametrize("script", RECIPES)
def test_a_cosine_through_a_recipe(script, recipe_flags):
    args = merge_args(recipe_flags(script, "--schedule", "cosine"))
    assert (args.schedule, args.lr_decay) == ("cosine", [])
    factors = [train.learning_rate_factor(args, epoch) for epoch in (0, args.epochs // 2)]
    assert factors == pytest.approx([1, 0.5])


@pytest.mark.parametrize("bits, decay, spelling", [
    ("1", 1e-5, "--bit_width_list {}"), ("2", 1e-5, "--bit-width-list={}"),
    ("4", 1e-4, "--bit-width-list {}"), ("8", 1e-4, "--bit_width_list={}"),
    ("32", 1e-4, "--bit_width_list {}")])
def test_dedicated_imagenet_recipe(bits, decay, spelling, recipe_flags):
    args = merge_args(recipe_flags("train_imagenet.sh", *spelling.format(bits).split()))
    assert settings(args) == (*DEDICATED_IMAGENET, decay) and args.bit_width_list == [int(bits)]


@pytest.mark.parametrize("processes", ["1", "2"])
def test_the_imagenet_recipe_names_its_results_folder(processes, recipe_flags):
    def results_dir(*flags):
        flags = recipe_flags("train_imagenet.sh", *flags, processes=processes)
        return getattr(flags, "results_dir", None)

    assert results_dir() == "results/imagenet_resnet50q_any"
    assert results_dir("--bit_width_list", "2,32") == "results/imagenet_resnet50q_any"
    assert results_dir("--bit_width_list=4") == "results/imagenet_resnet50q_4"
    assert results_dir("--precision=bf16") == "results/imagenet_resnet50q_any_bf16"
    assert results_dir("--precision", "fp32") == "results/imagenet_resnet50q_any"
    assert results_dir("--results-dir", "mine") == "mine"
    for flags in (["--evaluate", "--pretrain", "x"], ["--resume", "x"], ["--resume=x"]):
        assert results_dir(*flags) is None


# ---- bad input: one line on stderr that names the value and what is allowed, and exit code 2

BAD_ARGUMENTS = [
    (["--model", "resnet18"], "'resnet18' (choose from", "resnet50q"),
    (["--dataset", "cifar"], "'cifar' (choose from", "digits"),
    (["--train_split", "test"], "'test'", "digits: choose from train"),
    (["--dataset", "svhn", "--train_split", "val"], "'val'",
     "train_extra, train, extra, train_extra_auto_quan"),
    (["--loss", "easy"], "'easy' (choose from", "soft"),
    (["--optimizer", "lion"], "'lion' (choose from", "sgd"),
    (["--device", "gpu"], "'gpu'", "choose auto, cpu, cuda"),
    (["--device", "cuda:x"], "'cuda:x'", "choose auto, cpu, cuda"),
    (["--bit_width_list", "0"], "bit-width '0'", "choose from 1 to 8 and 32"),
    (["--bit_width_list", "4,9"], "bit-width '9'", "choose from 1 to 8 and 32"),
    (["--bit_width_list", "16"], "bit-width '16'", "choose from 1 to 8 and 32"),
    (["--bit_width_list", "33"], "bit-width '33'", "choose from 1 to 8 and 32"),
    (["--bit_width_list", "-4"], "bit-width '-4'", "choose from 1 to 8 and 32"),
    (["--bit_width_list", "two"], "bit-width 'two'", "choose from 1 to 8 and 32"),
    (["--bit_width_list", "1,2,2"], "1,2,2 repeat", "list each once"),
    (["--bit_width_list", ""], "no bit-width given", "list at least one"),
    (["--bit_width_list", "1,"], "bit-width ''", "choose from 1 to 8 and 32"),
    (["--epochs", "0"], "'0'", "from 1 up"),
    (["--epochs", "-3"], "'-3'", "from 1 up"),
    (["--epochs", "many"], "'many'", "from 1 up"),
    (["--batch-size", "0"], "'0'", "from 1 up"),
    (["--batch-size", "-8"], "'-8'", "from 1 up"),
    (["--lr", "0"], "'0'", "above 0"),
    (["--lr", "-0.1"], "'-0.1'", "above 0"),
    (["--lr", "nan"], "'nan'", "above 0"),
    (["--lr", "1e38"], "'1e38'", "at most 1e+30"),
    (["--lr_decay", "20,10"], "'20,10'", "rising epochs"),
    (["--lr_decay", "soon"], "'soon'", "rising epochs"),
    (["--widths-per-step", "1"], "'1' is not allowed", "from 2 up"),
    (["--weight-decay", "-1"], "'-1'", "from 0 up"),
    (["--train-fraction", "1.5"], "'1.5'", "above 0, at most 1"),
    (["--width", "0"], "'0'", "from 1 up"),
    (["--workers", "-1"], "'-1'", "from 0 up"),
    (["--print-freq", "0"], "'0'", "from 1 up"),
    (["--start-epoch", "30"], "--start-epoch 30", "less than --epochs 30"),
    (["--dataset", "cifar10"], "cifar10 has 32 x 32", "choose --model resnet20q or resnet50q"),
    (["--seed", "-1"], "'-1'", "from 0 up"),
    (["--seed", "4294967296"], "'4294967296'", "at most 4294967295"),
    (["--precision", "int8"], "'int8' (choose from", "bf16"),
    (["--sync-bn", "--compile"], "--sync-bn", "give one of them"),
    (["--sync-bn", "--precision", "bf16"], "--sync-bn", "give one of them"),
    (["--lrr", "1"], "--lrr", "--help"),
    (["--bit_width"], "--bit_width", "--help"),
    # an unset shell variable
    (["--resume", ""], "--resume: '' is empty", "an unset shell variable"),
    (["--resume="], "--resume: '' is empty", "an unset shell variable"),
    (["--pretrain", ""], "--pretrain: '' is empty", "an unset shell variable"),
    (["--results-dir", " "], "--results-dir: ' ' is empty", "an unset shell variable"),
    (["--results-dir", "s3://bucket/x"], "'s3://bucket/x' is a URL", "give a path"),
    (["--data-dir", ""], "--data-dir: '' is empty", "an unset shell variable"),
    (["--train_split", ""], "'' is empty", "an unset shell variable"),
    (["--evaluate", "--pretrain", "x", "--calibrate", "1", "--save-calibrated", ""],
     "--save-calibrated: '' is empty", "an unset shell variable"),
    # what argparse stumbles over
    (["--lr=--"], "--lr: '--' is no value", "give another"),
    (["--results-dir=--"], "--results-dir: '--' is no value", "give another"),
    (["-p--"], "'--' is no value", "give another"),
    # what goes with --evaluate
    (["--evaluate"], "--evaluate", "give --pretrain"),
    (["--evaluate", "--pretrain", "x", "--resume", "y"], "--pretrain x", "give one of them"),
    (["--pretrain", "x", "--calibrate", "3"], "--calibrate 3", "goes with --evaluate"),
    (["--evaluate", "--pretrain", "x", "--calibrate", "-1"], "'-1'", "from 0 up"),
    (["--evaluate", "--pretrain", "x", "--calibrate", "all"], "'all'", "from 0 up"),
    (["--evaluate", "--pretrain", "x", "--save-calibrated", "y"], "--save-calibrated y",
     "goes with --calibrate"),
    (["--evaluate", "--pretrain", "x", "--bit_width_list", "12"], "bit-width '12'",
     "choose from 1 to 8 and 32"),
]


def test_a_home_is_known_after_an_equals_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    args = parse_flags(["--results-dir=~/runs", "--pretrain=~/x", "--data-dir=~"])
    assert (args.results_dir, args.pretrain, args.data_dir) == (
        "/home/someone/runs", "/home/someone/x", "/home/someone")
    assert parse_flags(["--pretrain", "https://x.org/~a"]).pretrain == "https://x.org/~a"


@pytest.mark.parametrize("argv, value, allowed", BAD_ARGUMENTS,
                         ids=lambda value: " ".join(value) if type(value) is list else "")
def test_wrong_argument(argv, value, allowed, capsys, tmp_path):
    assert run(["--results-dir", tmp_path / "r", *argv]) == 2
    assert_one_line(capsys, "error: ", value, allowed)
    assert not (tmp_path / "r").exists()


def as_program(*words):
    """Run a program as Python does; return its exit code."""
    sys.argv = list(words)
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as ended:
        return ended.code
    return 0


def test_wrong_argument_as_a_program(forks):
    done = forks.run(as_program, f"{ROOT}/train.py", "--lr", "fast")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "train.py: error: argument --lr: 'fast' is not allowed: give a number above 0, at most "
        "1e+30 (--help lists the arguments)\n")


@pytest.mark.parametrize("flag", ["--resume", "--pretrain", "--results-dir", "--data-dir"])
def test_a_symbolic_link_to_itself(flag, capsys, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert run([flag, tmp_path / "loop" / "r"]) == 2
    assert_one_line(capsys, f"{flag}: '{tmp_path}/loop/r' leads by symbolic links to itself")


@pytest.mark.parametrize("variables, told", [
    ({"RANK": "1"}, "RANK is 1 in the environment, and WORLD_SIZE only 1: unset both"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 in the environment, and WORLD_SIZE only 2"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two' in the environment, not a whole number"),
    ({"RANK": "-1"}, "RANK is '-1' in the environment"),
    ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x' in the environment")])
def test_an_environment_that_torchrun_does_not_make(variables, told, monkeypatch, capsys, tmp_path):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run(["--results-dir", tmp_path / "r"]) == 1
    assert_one_line(capsys, told, "torchrun")
    assert not (tmp_path / "r").exists()


def test_variables_of_torchrun_that_are_empty_are_as_unset(monkeypatch, trained):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_MAX_RESTARTS"):
        monkeypatch.setenv(name, "")
    assert run(["--resume", trained, "--lr", "0.5"]) == 2  # and so it has read the checkpoint


def test_batch_size_must_divide(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert run(["--batch-size", 64, "--results-dir", tmp_path / "r"]) == 2
    assert_one_line(capsys, "--batch-size 64", "a multiple of 3")


def test_one_gpu_for_several_processes(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run(["--device", "cuda:0", "--results-dir", tmp_path / "r"]) == 2
    assert_one_line(capsys, "--device cuda:0", "give cuda")


def test_restarts_need_a_results_folder(monkeypatch, capsys):
    """A run that torchrun starts again by the same command must find what it had begun."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    assert run(["--width", 1]) == 2
    assert_one_line(capsys, "--max-restarts 3", "name it with --results-dir")
    for flags in (["--results-dir", "r"], ["--resume", "r"], ["--evaluate", "--pretrain", "x"]):
        assert vars(parse_flags(flags))


def test_a_precision_that_is_not_there(capsys, tmp_path):
    assert run(["--precision", "tf32", "--device", "cpu", "--results-dir", tmp_path / "r"]) == 1
    assert_one_line(capsys, "cpu has no hardware for --precision tf32", "choose fp32")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_gpu_that_is_not_there(device, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert run(["--device", device, "--results-dir", tmp_path / "r"]) == 1
    assert_one_line(capsys, f"no device {device}; available: auto, cpu")


def test_a_network_larger_than_the_memory(capsys, tmp_path):
    assert run(["--width", 2**31 - 1, "--device", "cpu", "--results-dir", tmp_path / "r"]) == 1
    assert_one_line(capsys, "out of memory", "--width")
