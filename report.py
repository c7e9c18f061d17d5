"""Compare runs: accuracy per bit-width as a Markdown table, a figure and CSV.

    python report.py results/*                # prints the table, writes results/report.{md,png,csv}
    python report.py results/* --epoch best --output comparison
"""
if __name__ == "__main__":
    from engine.startup import prepare_process
    prepare_process()

import csv
import os
import statistics
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from dataset.data import DATASETS
from engine.arguments import DEFAULTS, FLAGS, MACHINE, TASK, OneLineParser, path_text
from engine.errors import UserError, run_program
from engine.figures import Curve, best_of_each, best_record, save_comparison_figure
from engine.forward_pass import AUTO
from engine.run_folder import PATH_FILE, damaged, metrics_of, parse_json, read_metrics, read_text
from models import Assignment, BitWidth, highest_first
from models.bit_widths import FULL_PRECISION
from models.checkpoint import LATEST
from models.fields import is_finite_number, is_whole
from utils import (escaped, flag_text, markdown_table, mean_and_deviation, one_line,
                   replacing, write_text, writing)

EPOCHS = {  # --epoch: (name in the table, function of a run to values per bit-width)
    "last": ("last epoch", lambda run: run.history[-1]["val"]),
    "checkpoint": ("best checkpoint", lambda run: best_record(run.history, run.best_by)["val"]),
    "best": ("best epoch of each bit-width", lambda run: best_of_each(run.history)),
}


SUFFIXES = (".md", ".png", ".csv")  # of what a report writes


class NoEpoch(UserError):
    """A run without a finished epoch."""


class Run(NamedTuple):
    """A results folder."""
    folder: str
    commit: str  # of the code, as config.json says it
    checkpoint: str  # that was evaluated: a digest of its weights, or its path; "" of a training
    kind: tuple[str, str, bool]  # data set, model, whether it is an evaluation
    name: str
    bit_widths: str  # those of training; "all" for dedicated networks
    trained: frozenset[BitWidth]
    settings: dict[str, str]  # {argument: words, "" where off} of what else may differ
    evaluation: dict[str, str]  # likewise, of what was evaluated and how
    assignments: list[str]  # of bits to layers, that were evaluated
    seed: int
    best_by: str
    history: list[dict]  # records of metrics.jsonl; one for an evaluation

    @property
    def configuration(self) -> tuple:
        """What runs of one row have in common."""
        return (self.kind, self.name, self.bit_widths, *self.evaluation.items(),
                *self.settings.items())

    @property
    def identity(self) -> tuple:
        """What a repetition of a run, at any of its bit-widths, has in common with it."""
        return self.configuration, self.trained, self.seed, self.best_by


def load_run(folder: str | Path) -> Run:
    """Load the Run of a folder; raises UserError where it is none, NoEpoch where it has none."""
    config_file = Path(folder, "config.json")
    results_file = Path(folder, "evaluation.json")
    metrics_file = Path(folder, "metrics.jsonl")
    assignments = []
    try:
        config = parse_json(read_text(config_file), config_file)
        arguments = arguments_of(config, config_file)
        if arguments["evaluate"]:
            results = parse_json(read_text(results_file), results_file)
            assignments = assignments_in(config, config_file)
            history = [{"val": metrics_of(results, results_file, "results", assignments)}]
            if "trained_bit_widths" in config:  # else the arguments are of older versions
                check_widths(history, arguments, results_file, assignments)
        else:
            history = read_metrics(metrics_file)
            check_widths(history, arguments, metrics_file)
    except OSError as error:
        raise UserError(
            f"{folder} is not a results folder of train.py ({one_line(error)})") from None
    if not history:
        raise NoEpoch(f"{folder} has no finished epoch yet: leave it out, or let it go on")

    bit_widths = config.get("trained_bit_widths") or arguments["bit_width_list"]
    trained = frozenset(map(BitWidth.of, bit_widths))
    name = "dedicated"
    if len(trained) > 1:
        name = f"any, {arguments['loss']}" if arguments["loss"] else "any"  # a published network
    evaluation = {"evaluation": "", "calibration": "", "images": ""}
    training = trained_with(config, arguments)
    if arguments["evaluate"]:
        if len(trained) == 1 and history[0]["val"].keys() != trained:
            name += f" {flag_text(bit_widths)}-bit"
        evaluation = evaluation_words(arguments, config["checkpoint"], training)
        done, of_all = config.get("epoch"), config.get("trained_with", {}).get("epochs")
        is_last = Path(config["checkpoint"]).name == LATEST
        if is_last and is_whole(done) and is_whole(of_all) and done < of_all:
            name += f", {done} of {of_all} epochs"
    elif history[-1]["epoch"] < arguments["epochs"]:
        name += f", {history[-1]['epoch']} of {arguments['epochs']} epochs"
    if arguments["precision"] not in (AUTO, "fp32"):
        name += f", {arguments['precision']}"
    settings = {argument: escaped(setting_words(argument, value))
                for argument, value in sorted(training.items()) if sets_apart(argument)}
    if not arguments["evaluate"]:
        settings["processes"] = escaped(f"processes {each_value(config, 'processes', 1)}")
    kind = (escaped(arguments["dataset"]), escaped(arguments["model"]), arguments["evaluate"])
    listed = flag_text(bit_widths) if len(bit_widths) > 1 else "all"
    commit = escaped(each_value(config, "commit"))
    checkpoint = ""
    if arguments["evaluate"]:
        checkpoint = str(config.get("weights") or config["checkpoint"])  # older ones say no weights
    return Run(str(folder), commit, checkpoint, kind, escaped(name), listed, trained, settings,
               evaluation, list(map(repr, assignments)), training.get("seed", arguments["seed"]),
               arguments["best_by"], history)


def each_value(config: dict, name: str, default: object = None) -> str:
    """Return a value of a config.json, after those that it had before the run was resumed."""
    earlier = config.get("earlier")
    parts = [*earlier, config] if isinstance(earlier, list) else [config]
    parts = [part for part in parts if isinstance(part, dict)]
    return ", then ".join(dict.fromkeys(str(part.get(name, default)) for part in parts))


def arguments_of(config: object, where: Path) -> dict:
    """Return the arguments of a config.json, with defaults for those that an older run lacks.

    where: the file. Raises UserError naming a field that is missing or of another type.
    """
    if not isinstance(config, dict) or not isinstance(config.get("arguments"), dict):
        raise UserError(f"{where} does not hold the arguments of a run: leave its folder out")
    arguments = {**DEFAULTS, **config["arguments"]}
    for name, flag in FLAGS.items():
        if flag.identifies and name not in config["arguments"]:
            raise damaged(where, f"argument {name}", None, "that of a run")
        is_known = name != "loss" or arguments[name] or not arguments["evaluate"]
        if is_known and not is_like(arguments[name], DEFAULTS[name]):
            raise damaged(where, f"argument {name}", arguments[name],
                          f"of the type of {flag_text(DEFAULTS[name])}")
    if arguments["best_by"] not in ("highest", "mean"):
        raise damaged(where, "argument best_by", arguments["best_by"], "highest or mean")
    trained = config.get("trained_bit_widths")
    for name, widths in (("argument bit_width_list", arguments["bit_width_list"]),
                         ("trained_bit_widths", trained or [FULL_PRECISION])):
        try:
            highest_first(widths)
        except (TypeError, ValueError):
            raise damaged(where, name, widths, "a list of bit-widths") from None
    if arguments["evaluate"] and not isinstance(config.get("checkpoint"), str):
        raise damaged(where, "checkpoint", config.get("checkpoint"), "a path")
    if not isinstance(config.get("trained_with", {}), dict):
        raise damaged(where, "trained_with", config["trained_with"], "arguments")
    return arguments


def trained_with(config: dict, arguments: dict) -> dict:
    """Return the arguments of a run's training; of an evaluation, as far as they are known."""
    if not arguments["evaluate"]:
        return arguments
    known = {name: value for name, value in arguments.items()
             if name in FLAGS and FLAGS[name].evaluated}
    return {**known, **config.get("trained_with", {})}


def assignments_in(config: dict, where: Path) -> list[Assignment]:
    """Return the assignments that an evaluation's config.json lists; UserError naming `where`."""
    saved = config.get("assignments", [])
    try:
        return list(map(Assignment.of, saved))
    except (TypeError, ValueError):
        raise damaged(where, "assignments", saved, "a list of assignments") from None


def check_widths(history: list[dict], arguments: dict, where: Path,
                 assignments: list[Assignment] = ()) -> None:
    """Raise UserError where a file's results are not of the bit-widths of the arguments."""
    expected = [*map(BitWidth.of, arguments["bit_width_list"]), *assignments]
    widths = flag_text(expected)
    for record in history[:1]:
        found = flag_text(sorted(record["val"]))
        if found != flag_text(sorted(expected)):
            raise UserError(f"{where} is of {found} bits, and the run's config.json of {widths}: "
                            "one of them is damaged; correct it, or leave the folder out")


def is_like(value: object, default: object) -> bool:
    """Return whether a value from a JSON file may be that of an argument with this default."""
    if default is None:
        return value is None or isinstance(value, (str, int, float))
    if isinstance(default, list):
        return isinstance(value, list) and all(isinstance(part, (str, int)) for part in value)
    if type(default) is float:
        return is_finite_number(value)
    return type(value) is type(default)


def setting_words(argument: str, value: object) -> str:
    """Return an argument and its value in words: "batch size 64", "all conv", "no lr decay".

    Those of one that is off are "".
    """
    name = argument.replace("_", " ")
    if value is None or value is False or (argument, value) == ("start_epoch", 0):
        return ""
    if value is True:
        return name
    return f"no {name}" if value == [] else f"{name} {flag_text(value)}"


def evaluation_words(arguments: dict, checkpoint: str, training: dict) -> dict[str, str]:
    """Return in words what was evaluated: which checkpoint, by what batches calibrated, on what.

    training: the arguments of its training, which the words leave out where they are the same.
    """
    batches = arguments["calibrate"]
    stem = escaped(Path(checkpoint).name.split(".")[0])
    named = {"model_best": "best checkpoint", "model_latest": "last checkpoint"}
    calibration = ""
    if batches is not None:
        count = "1 batch" if batches == 1 else f"{batches} batches"
        calibration = f"calibrated on {count}" if batches else "not calibrated"
        if batches and arguments["batch_size"] != training.get("batch_size"):
            calibration += f" of {arguments['batch_size']}"
    images = []
    split = arguments["train_split"]
    if split != training.get("train_split"):
        row = DATASETS.get(arguments["dataset"])
        images.append(f"on {row.val_split.get(split, split) if row else split}")
    if arguments["image_size"] != training.get("image_size"):
        images.append(f"at {arguments['image_size']} pixels")
    return {"evaluation": f"{named.get(stem, stem)} evaluated", "calibration": calibration,
            "images": escaped(" ".join(images))}


def sets_apart(argument: str) -> bool:
    """Return whether an argument that is not part of a run's name may distinguish runs."""
    flag = FLAGS.get(argument)
    if flag is None or flag.identifies:
        return False
    return flag.kind not in (MACHINE, TASK) or argument == "start_epoch"


def configuration_names(runs: list[Run]) -> list[str]:
    """Return the runs' names, each with the settings that are not the same in all of its kind.

    What an evaluation is of also distinguishes it from trainings on the same data. Runs of one name
    are of one configuration.
    """
    names = []
    for run in runs:
        peers = [peer for peer in runs if peer.kind == run.kind]
        panel = [peer for peer in runs if peer.kind[:2] == run.kind[:2]]
        alike = {peer.bit_widths for peer in peers
                 if (peer.name, peer.settings, peer.evaluation)
                 == (run.name, run.settings, run.evaluation)}
        name = ", ".join([run.name,
                          *varying(run.evaluation, [peer.evaluation for peer in panel]),
                          *varying(run.settings, [peer.settings for peer in peers])])
        names.append(f"{name} ({run.bit_widths})" if len(alike) > 1 else name)
    return names


def varying(own: dict[str, str], of_all: list[dict[str, str]]) -> list[str]:
    """Return the words of `own` that are not those of all that have them; where it lacks some, that
    the training is unknown.
    """
    keys = dict.fromkeys(key for one in of_all for key in one)
    found = [own[key] for key in keys if key in own
             and any(one.get(key, own[key]) != own[key] for one in of_all)]
    if not keys.keys() <= own.keys():
        found.append("training unknown")
    return list(filter(None, found))


def read_runs(folders: list[str]) -> tuple[list[Run], list[str], list[str]]:
    """Load the runs of folders.

    Returns them, the reasons for runs that are left out, and those for what holds no run.
    """
    runs = []
    left_out = []
    no_runs = []
    for folder in folders:
        if (os.path.isfile(folder) and folder.endswith(SUFFIXES)
                or os.path.isfile(os.path.join(folder, PATH_FILE))
                and not os.path.exists(os.path.join(folder, "config.json"))):
            continue  # results/* of a shell includes our own files, and search.py's folders
        if not os.path.exists(folder):
            no_runs.append(f"{folder} does not exist: name results folders of train.py")
            continue
        try:
            run = load_run(folder)
        except NoEpoch as error:
            left_out.append(str(error))
            continue
        except UserError as error:
            no_runs.append(str(error))
            continue
        same = [other for other in runs if other.identity == run.identity
                and (other.checkpoint != run.checkpoint
                     or other.history[-1]["val"].keys() & run.history[-1]["val"].keys())]
        if same and same[0].checkpoint != run.checkpoint:
            left_out.append(f"{folder} is of another checkpoint than {same[0].folder}, and nothing "
                            "else tells them apart: report it alone")
        elif same:
            left_out.append(f"{folder} repeats seed {run.seed} of {same[0].folder}")
        else:
            runs.append(run)
    if not runs:
        raise UserError("; ".join([*no_runs, *left_out]) or f"{folders[0]} is no run: name results "
                        "folders of train.py")
    return runs, left_out, no_runs


def differences(runs: list[Run]) -> list[str]:
    """Return a line for each configuration whose runs differ in code, or in their assignments."""
    lines = []
    rows = defaultdict(list)
    for run, name in zip(runs, configuration_names(runs)):
        rows[run.kind, name].append(run)
    for (_, name), members in rows.items():
        commits = {run.commit: run.folder for run in reversed(members)}
        if len(commits) > 1:
            of = [f"{folder} of {commit}" for commit, folder in reversed(commits.items())]
            lines.append(f"the runs of {name} used different versions of the code: {', '.join(of)}")
        first = members[0]
        other = next((run for run in members if run.assignments != first.assignments), None)
        if other:
            lines.append(f"the runs of {name} have other assignments of bits to layers, as of "
                         f"{first.folder} and {other.folder}")
    return lines


def table_rows(runs: list[Run],
               values_of: Callable[[Run], dict[BitWidth, dict]]) -> list[dict]:
    """Return the rows of the CSV; values_of: a function of EPOCHS."""
    return [{"dataset": run.kind[0], "model": run.kind[1], "configuration": name,
             "seed": run.seed, "bits": bits, "top1": values["top1"], "top5": values["top5"],
             "loss": values["loss"], "results": run.folder}
            for run, name in zip(runs, configuration_names(runs))
            for bits, values in sorted(values_of(run).items())]


def title_of(row: dict) -> str:
    """Return the title of the table that a row belongs to."""
    return f"{row['model']} on {row['dataset']}"


def panels(rows: list[dict]) -> list[tuple[str, list[BitWidth], dict]]:
    """Return (title, bit-widths, {configuration: {bit-width: [top-1 per seed]}}) of each table."""
    found = {}
    for row in rows:
        panel = found.setdefault(title_of(row), {})
        cells = panel.setdefault(row["configuration"], defaultdict(list))
        cells[row["bits"]].append(row["top1"])
    return [(title, sorted(set().union(*panel.values())), panel) for title, panel in found.items()]


def markdown(rows: list[dict], which: str) -> str:
    """Return the Markdown tables, one per data set and model; which: the name of the epoch."""
    text = []
    for title, widths, configurations in panels(rows):
        counts = {len(values) for cells in configurations.values() for values in cells.values()}
        runs = " to ".join(map(str, sorted({min(counts), max(counts)})))
        text += [f"{title}: val top-1 (%) of the {which}, mean ± standard deviation, {runs} "
                 f"run{'s' if max(counts) > 1 else ''} a cell", "",
                 markdown_table(["model", *widths], [
                     [name, *(mean_and_deviation(cells.get(bits, ())) for bits in widths)]
                     for name, cells in configurations.items()]), ""]
    return "\n".join(text)


def curves(runs: list[Run], rows: list[dict]) -> list[tuple[str, list[Curve]]]:
    """Return (title, its Curves) for each data set and model, to be drawn."""
    trained = {run.folder: run.trained for run in runs}
    drawn = []
    for title, _, configurations in panels(rows):
        found = []
        for name, cells in configurations.items():
            own = [row for row in rows
                   if (title_of(row), row["configuration"]) == (title, name)]
            folders = [row["results"] for row in own]
            found.append(Curve(
                name, {bits: statistics.mean(top1) for bits, top1 in cells.items()},
                {bits: statistics.stdev(top1) for bits, top1 in cells.items() if len(top1) > 1},
                frozenset().union(*(trained[folder] for folder in folders)),
                joined=len(set(folders)) < len(folders)))
        drawn.append((title, found))
    return drawn


def parse_args(argv: list[str] | None = None) -> Namespace:
    """Parse the command line."""
    parser = OneLineParser(__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", type=path_text, metavar="RESULTS",
                        help="results folders of train.py")
    parser.add_argument("--epoch", choices=EPOCHS, default="last",
                        help="report the last epoch, that of model_best (by the run's own "
                             "--best-by), or the best epoch of each bit-width by itself")
    parser.add_argument("--output", type=path_text, default="results/report", metavar="PATH",
                        help="write PATH.md, PATH.png, PATH.csv")
    return parser.parse_args(argv)


def main(args: Namespace) -> None:
    """Print the table; write it, the figure and the CSV; raise UserError for what holds no run."""
    runs, left_out, no_runs = read_runs(args.results)
    which, values_of = EPOCHS[args.epoch]
    rows = table_rows(runs, values_of)

    evaluated = {run.kind[2] for run in runs}
    if evaluated == {True}:
        which = "evaluated checkpoint"
    elif True in evaluated:
        which += ", or the checkpoint that was evaluated"

    table = markdown(rows, which)
    if os.path.isdir(args.output):
        args.output = os.path.join(args.output, "report")
    folder = Path(args.output).parent
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_text(f"{args.output}.md", table)
    write_csv(f"{args.output}.csv", rows)
    print(table)
    save_comparison_figure(f"{args.output}.png", curves(runs, rows))
    for reason in left_out:
        print(f"left out: {reason}")
    for reason in differences(runs):
        print(f"note: {reason}")
    print(f"written to {args.output}.md, {args.output}.png and {args.output}.csv")
    if no_runs:
        raise UserError(f"the report lacks {'; '.join(no_runs)}: name folders of runs alone")


def write_csv(path: str, rows: list[dict]) -> None:
    """Write the rows, whole or not at all; paths that are not UTF-8 keep their bytes."""
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8",
                                            errors="surrogateescape") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    run_program(main, parse_args)
