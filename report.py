"""Compare runs: accuracy per bit-width as a Markdown table, a picture and CSV.

    python report.py results/*                           # prints the table, writes results/report.{md,png,csv}
    python report.py results/* --epoch best --output comparison
"""
import argparse
import csv
import io
import json
import os
import statistics
from collections import defaultdict
from pathlib import Path

from engine.arguments import HelpFormatter, OneLineParser
from engine.errors import UserError, run_program
from engine.figures import COLOURS, best_of_each, best_record, new_figure, plot_by_width, save_figure
from engine.run_folder import read_metrics
from utils import flag_text, one_line, replacing


# Arguments that do not make another configuration.
NOT_CONFIGURATION = {"seed", "results_dir", "resume", "start_epoch", "device", "workers", "print_freq", "save_every",
                     "data_dir", "save_calibrated", "timeout", "compile"}
# What the runs had that were made before there was an argument for it.
DEFAULTS_LATER = [("train_fraction", 1.0), ("precision", "fp32")]
# Those that an evaluation depends on.
OF_EVALUATION = {"dataset", "train_split", "model", "width", "all_conv", "bit_width_list", "loss", "evaluate",
                 "calibrate", "checkpoint", "precision"}


def load_run(folder):
    """(arguments, records) of a results folder; UserError where it is not one, or has no finished epoch.

    An evaluation is a single record. Two more arguments say what its accuracy is of: "checkpoint", of an evaluation, and
    "done", of a run that has not ended.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        arguments = config["arguments"]
        if arguments.get("evaluate"):
            results = json.loads((folder / "evaluation.json").read_text())
            history = [{"epoch": config["epoch"], "val": {int(bits): values for bits, values in results.items()}}]
            arguments["checkpoint"] = Path(config["checkpoint"]).name.split(".")[0]
        else:
            history = read_metrics(folder / "metrics.jsonl")
            if history and history[-1]["epoch"] < arguments["epochs"]:
                arguments["done"] = f"{history[-1]['epoch']} of {arguments['epochs']} epochs"
        configuration(arguments)  # fails here where the arguments are not those of a run
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is not a results folder of train.py ({one_line(error)})") from None
    if not history:
        raise UserError(f"{folder} has no finished epoch yet: leave it out, or let it go on")
    return arguments, history


def configuration(arguments):
    """What makes two runs repetitions of each other, as a sorted tuple; dedicated models of any width are one."""
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
    """{configuration: name}: as published ("dedicated", "any, recursive"), and whatever else sets it apart."""
    names = {}
    for key in configurations:
        arguments = dict(key)
        peers = [other for other in map(dict, configurations)
                 if all(other.get(name) == arguments.get(name) for name in ("dataset", "model", "evaluate"))]
        varying = [name for name in arguments if name not in ("loss", "bit_width_list", "done", "checkpoint", "calibrate")
                   and len({peer.get(name) for peer in peers}) > 1]
        name = "dedicated" if arguments["loss"] == "dedicated" else f"any, {arguments['loss']}"
        if "evaluate" in arguments:  # one network at several bit-widths, trained at those of bit_width_list
            name += f", trained at {arguments['bit_width_list']}"
            name += f", calibrate {arguments['calibrate']}" if "calibrate" in arguments else ""
            name += f", {arguments['checkpoint']} evaluated"
        names[key] = ", ".join([name, *(f"{what} {arguments[what]}" for what in varying),
                                *([arguments["done"]] if "done" in arguments else [])])
    for name in [name for name in names.values() if list(names.values()).count(name) > 1]:
        for key in [key for key in names if names[key] == name]:  # only their bit-widths differ
            names[key] += f" ({dict(key)['bit_width_list']})"
    return names


def deviation(values):
    """The sample standard deviation; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def markdown(rows, which):
    """The tables, a data set and model each, from rows of the CSV."""
    text = []
    for dataset, model in dict.fromkeys((row["dataset"], row["model"]) for row in rows):
        cells = defaultdict(list)
        for row in rows:
            if (row["dataset"], row["model"]) == (dataset, model):
                cells[row["configuration"], row["bits"]].append(row["top1"])
        widths = sorted({bits for _, bits in cells})
        counts = sorted({len(values) for values in cells.values()})
        runs = f"{counts[0]} run{'s' if counts[0] > 1 else ''}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} runs"
        text += [f"{model} on {dataset}: val top-1 (%) of the {which}, mean ± standard deviation, {runs} a cell", "",
                 f"| model | {' | '.join(map(str, widths))} |", "|---" * (len(widths) + 1) + "|"]
        for name in dict.fromkeys(name for name, _ in cells):
            values = [cells.get((name, bits)) for bits in widths]
            text.append(f"| {name} | " + " | ".join(
                "" if not v else f"{statistics.mean(v):.2f}" + (f" ± {deviation(v):.2f}" if len(v) > 1 else "")
                for v in values) + " |")
        text.append("")
    return "\n".join(text)


def save_comparison_figure(path, rows):
    """PNG: a panel a data set and model, a line a configuration, error bars of one standard deviation."""
    panels = list(dict.fromkeys((row["dataset"], row["model"]) for row in rows))
    figure, axes = new_figure(len(panels))
    for axis, panel in zip(axes, panels):
        chosen = [row for row in rows if (row["dataset"], row["model"]) == panel]
        widths = sorted({row["bits"] for row in chosen})
        for index, name in enumerate(dict.fromkeys(row["configuration"] for row in chosen)):
            values = defaultdict(list)
            for row in chosen:
                if row["configuration"] == name:
                    values[row["bits"]].append(row["top1"])
            plot_by_width(axis, widths, {bits: statistics.mean(v) for bits, v in values.items()},
                          {bits: deviation(v) for bits, v in values.items()} if max(map(len, values.values())) > 1 else None,
                          color=COLOURS[index % len(COLOURS)], label=name)
        axis.set_title(f"{panel[1]} on {panel[0]}")
        axis.legend()
    save_figure(figure, path)


COLUMNS = ("dataset", "model", "configuration", "seed", "bits", "top1", "top5", "loss", "results")


def parse_args(argv=None):
    parser = OneLineParser(__doc__.splitlines()[0])
    parser.add_argument("results", nargs="+", metavar="RESULTS", help="results folders of train.py")
    parser.add_argument("--epoch", choices=("last", "checkpoint", "best"), default="last",
                        help="report the last epoch, that of model_best (best top-1 of the highest bit-width), or the best "
                             "epoch of each bit-width by itself")
    parser.add_argument("--output", default="results/report", metavar="PATH", help="write PATH.md, PATH.png, PATH.csv")
    return parser.parse_args(argv)


def main(args):
    """Print the table; write it, the picture and the numbers."""
    runs, left_out, seen = [], [], {}
    for folder in filter(os.path.isdir, args.results):  # a shell's results/* names this program's own files too
        try:
            arguments, history = load_run(folder)
            key = configuration(arguments), arguments["seed"], *sorted(history[-1]["val"])
            if key in seen:
                left_out.append(f"{folder} repeats seed {arguments['seed']} of {seen[key]}")
            else:
                seen[key] = folder
                runs.append((folder, arguments, history))
        except UserError as error:
            left_out.append(str(error))
    if not runs:
        raise UserError(left_out[0] if left_out else f"{args.results[0]} is not a results folder of train.py")
    names = labels(list(dict.fromkeys(configuration(arguments) for _, arguments, _ in runs)))
    rows = []
    for folder, arguments, history in runs:
        chosen = {"last": history[-1]["val"], "checkpoint": best_record(history)["val"], "best": best_of_each(history)}
        rows += [dict(zip(COLUMNS, (
            arguments["dataset"], arguments["model"], names[configuration(arguments)], arguments["seed"], bits,
            values["top1"], values["top5"], values["loss"], str(folder))))
            for bits, values in sorted(chosen[args.epoch].items())]
    rows.sort(key=lambda row: list(names.values()).index(row["configuration"]))

    which = {"last": "last epoch", "checkpoint": "best checkpoint", "best": "best epoch of each bit-width"}[args.epoch]
    evaluations = [bool(arguments.get("evaluate")) for _, arguments, _ in runs]
    if any(evaluations):
        which = "evaluated checkpoint" if all(evaluations) else f"{which}, or the checkpoint that was evaluated"
    table = markdown(rows, which)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    for ending, content in (("md", table), ("csv", text.getvalue())):
        with replacing(f"{output}.{ending}") as temporary:
            temporary.write_text(content)
    save_comparison_figure(f"{output}.png", rows)
    print(table)
    for reason in left_out:
        print(f"left out: {reason}")
    print(f"written to {output}.md, {output}.png and {output}.csv")


if __name__ == "__main__":
    run_program(main, parse_args)
