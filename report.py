"""Compare runs: accuracy per bit-width as a Markdown table, a picture and CSV.

    python report.py results/*                # prints the table, writes results/report.{md,png,csv}
    python report.py results/* --epoch best --output comparison
"""
import csv
import json
import os
import statistics
from collections import defaultdict
from pathlib import Path

from engine.arguments import OneLineParser
from engine.errors import UserError, run_program
from engine.figures import (COLOURS, best_of_each, best_record, new_figure, plot_by_width,
                            save_figure)
from engine.run_folder import read_metrics
from utils import flag_text, one_line, replacing

# Arguments that do not make another configuration.
NOT_CONFIGURATION = {"seed", "results_dir", "resume", "start_epoch", "device", "workers", "timeout",
                     "print_freq", "save_every", "data_dir", "save_calibrated", "compile"}
# What older runs had, and had no argument for.
DEFAULTS_LATER = [("train_fraction", 1.0), ("precision", "fp32")]
# Those that an evaluation depends on.
OF_EVALUATION = {"dataset", "train_split", "model", "width", "all_conv", "bit_width_list", "loss",
                 "evaluate", "calibrate", "checkpoint", "precision"}
COLUMNS = ("dataset", "model", "configuration", "seed", "bits", "top1", "top5", "loss", "results")


def load_run(folder):
    """Return (arguments, records) of a results folder; an evaluation is a single record.

    Two more arguments say what an accuracy is of: "checkpoint" of an evaluation, "done" of a run
    that has not ended. Raises UserError where it is no results folder, or has no finished epoch.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        arguments = config["arguments"]
        if arguments.get("evaluate"):
            results = json.loads((folder / "evaluation.json").read_text())
            history = [{"val": {int(bits): values for bits, values in results.items()}}]
            arguments["checkpoint"] = Path(config["checkpoint"]).name.split(".")[0]
        else:
            history = read_metrics(folder / "metrics.jsonl")
            if history and history[-1]["epoch"] < arguments["epochs"]:
                arguments["done"] = f"{history[-1]['epoch']} of {arguments['epochs']} epochs"
        configuration(arguments)  # fails here where the arguments are not those of a run
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder} is not a results folder of train.py ({one_line(error)})") from None
    if not history:
        raise UserError(f"{folder} has no finished epoch yet: leave it out, or let it go on")
    return arguments, history


def configuration(arguments):
    """Return what repetitions have in common, as do dedicated models of any bit-width."""
    evaluation = arguments.get("evaluate")
    chosen = {name: value for name, value in arguments.items()
              if value is not None and value is not False and (name, value) not in DEFAULTS_LATER
              and (name in OF_EVALUATION if evaluation else name not in NOT_CONFIGURATION)}
    if not {"dataset", "model", "loss", "bit_width_list"} <= chosen.keys():
        raise KeyError("arguments of a run")
    if len(chosen["bit_width_list"]) == 1:
        chosen["loss"] = "dedicated"
        if not evaluation:
            chosen["bit_width_list"] = "all"
    return tuple(sorted((name, flag_text(value)) for name, value in chosen.items()))


def labels(configurations):
    """Return {configuration: name}: as published, and whatever else sets it apart."""
    names, kind = {}, ("dataset", "model", "evaluate")
    told = ("loss", "bit_width_list", "done", "checkpoint", "calibrate")
    for key in configurations:
        ours = dict(key)
        peers = [peer for peer in map(dict, configurations)
                 if all(peer.get(name) == ours.get(name) for name in kind)]
        varying = [f"{name} {value}" for name, value in ours.items()
                   if name not in told and len({peer.get(name) for peer in peers}) > 1]
        parts = ["dedicated" if ours["loss"] == "dedicated" else f"any, {ours['loss']}"]
        if "evaluate" in ours:  # one network at several bit-widths, trained at those of its list
            parts.append(f"trained at {ours['bit_width_list']}")
            parts += [f"calibrate {ours['calibrate']}"] if "calibrate" in ours else []
            parts.append(f"{ours['checkpoint']} evaluated")
        names[key] = ", ".join([*parts, *varying, *([ours["done"]] if "done" in ours else [])])
    return {key: f"{name} ({dict(key)['bit_width_list']})" if list(names.values()).count(name) > 1
            else name for key, name in names.items()}  # alike but for their bit-widths


def read_runs(folders):
    """Return ([(folder, arguments, history)], [why another folder is left out])."""
    runs, left_out, seen = [], [], {}
    for folder in filter(os.path.isdir, folders):  # a shell's results/* names our own files too
        try:
            arguments, history = load_run(folder)
        except UserError as error:
            left_out.append(str(error))
            continue
        key = configuration(arguments), arguments["seed"], *sorted(history[-1]["val"])
        if key in seen:
            left_out.append(f"{folder} repeats seed {arguments['seed']} of {seen[key]}")
        else:
            seen[key] = folder
            runs.append((folder, arguments, history))
    if not runs:
        raise UserError(left_out[0] if left_out
                        else f"{folders[0]} is not a results folder of train.py")
    return runs, left_out


def table_rows(runs, epoch):
    """Return the rows of the CSV, by configuration, as dicts of COLUMNS."""
    choose = {"last": lambda history: history[-1]["val"], "best": best_of_each,
              "checkpoint": lambda history: best_record(history)["val"]}[epoch]
    names = labels(dict.fromkeys(configuration(arguments) for _, arguments, _ in runs))
    return [dict(zip(COLUMNS, (
        arguments["dataset"], arguments["model"], name, arguments["seed"], bits, values["top1"],
        values["top5"], values["loss"], str(folder))))
        for key, name in names.items()
        for folder, arguments, history in runs if configuration(arguments) == key
        for bits, values in sorted(choose(history).items())]


def panels(rows):
    """Return [(title, bit-widths, {configuration: {bits: [top-1 per seed]}})] of the figure."""
    found = {}
    for row in rows:
        panel = found.setdefault(f"{row['model']} on {row['dataset']}", {})
        cells = panel.setdefault(row["configuration"], defaultdict(list))
        cells[row["bits"]].append(row["top1"])
    return [(title, sorted(set().union(*panel.values())), panel) for title, panel in found.items()]


def markdown(rows, which):
    """Return the tables, one a data set and model."""
    text = []
    for title, widths, configurations in panels(rows):
        counts = sorted({len(v) for cells in configurations.values() for v in cells.values()})
        runs = " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
        text += [f"{title}: val top-1 (%) of the {which}, mean ± standard deviation, {runs} "
                 f"run{'s' if counts[-1] > 1 else ''} a cell", "",
                 f"| model | {' | '.join(map(str, widths))} |", "|---" * (len(widths) + 1) + "|"]
        for name, cells in configurations.items():
            texts = [cell_text(cells[bits]) if bits in cells else "" for bits in widths]
            text.append(f"| {name} | {' | '.join(texts)} |")
        text.append("")
    return "\n".join(text)


def cell_text(values):
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def save_comparison_figure(path, rows):
    """Draw a panel a data set and model, a line a configuration, with standard deviations."""
    drawn = panels(rows)
    figure, axes = new_figure(len(drawn))
    for axis, (title, widths, configurations) in zip(axes, drawn):
        for index, (name, cells) in enumerate(configurations.items()):
            spread = {bits: statistics.stdev(v) for bits, v in cells.items() if len(v) > 1}
            plot_by_width(axis, widths, {bits: statistics.mean(v) for bits, v in cells.items()},
                          spread, color=COLOURS[index % len(COLOURS)], label=name)
        axis.set_title(title)
        axis.legend()
    save_figure(figure, path)


def parse_args(argv=None):
    parser = OneLineParser(__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="results folders of train.py")
    parser.add_argument("--epoch", choices=("last", "checkpoint", "best"), default="last",
                        help="report the last epoch, that of model_best (best top-1 of the highest "
                             "bit-width), or the best epoch of each bit-width by itself")
    parser.add_argument("--output", default="results/report", metavar="PATH",
                        help="write PATH.md, PATH.png, PATH.csv")
    return parser.parse_args(argv)


def main(args):
    """Print the table; write it, the picture and the numbers."""
    runs, left_out = read_runs(args.results)
    rows = table_rows(runs, args.epoch)
    which = {"last": "last epoch", "checkpoint": "best checkpoint",
             "best": "best epoch of each bit-width"}[args.epoch]
    evaluations = [bool(arguments.get("evaluate")) for _, arguments, _ in runs]
    if any(evaluations):
        which = ("evaluated checkpoint" if all(evaluations)
                 else f"{which}, or the checkpoint that was evaluated")
    table = markdown(rows, which)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    with replacing(f"{args.output}.md") as temporary:
        temporary.write_text(table)
    with replacing(f"{args.output}.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    save_comparison_figure(f"{args.output}.png", rows)
    print(table)
    for reason in left_out:
        print(f"left out: {reason}")
    print(f"written to {args.output}.md, {args.output}.png and {args.output}.csv")


if __name__ == "__main__":
    run_program(main, parse_args)
