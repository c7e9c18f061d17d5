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

import utils
from errors import UserError

# Told apart by colour-blind readers too (Okabe and Ito), then by whoever can.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999", "#6a3d9a"]
# Arguments that do not make another configuration.
NOT_CONFIGURATION = {"seed", "results_dir", "resume", "start_epoch", "device", "workers", "print_freq", "save_every",
                     "data_dir", "save_calibrated", "timeout", "compile"}
# What the runs had that were made before there was an argument for it.
DEFAULTS_LATER = [("train_fraction", 1.0), ("precision", "fp32")]
# Those that an evaluation depends on.
OF_EVALUATION = {"dataset", "train_split", "model", "width", "all_conv", "bit_width_list", "loss", "evaluate",
                 "calibrate", "checkpoint", "precision"}


# ---- one run: the end of train.py

def best_record(history):
    """The epoch whose checkpoint is model_best: the first with the highest val top-1 at the highest bit-width."""
    highest = max(history[0]["val"])
    return max(history, key=lambda record: record["val"][highest]["top1"])


def best_of_each(history):
    """{bit_width: its best val values over all epochs}: no one network has them all, and they are chosen on val."""
    return {bits: max((record["val"][bits] for record in history), key=lambda values: values["top1"])
            for bits in sorted(history[0]["val"])}


def best_and_last(history):
    """The closing table of a run: val top-1 per bit-width."""
    best, last = best_record(history), history[-1]
    rows = [("val top-1 (%), by bits", [str(bits) for bits in sorted(last["val"])])]
    for label, values in (("best epoch of each", best_of_each(history)),
                          (f"best checkpoint (epoch {best['epoch']})", best["val"]),
                          (f"last (epoch {last['epoch']})", last["val"])):
        rows.append((label, [f"{values[bits]['top1']:.2f}" for bits in sorted(values)]))
    label_width = max(len(label) for label, _ in rows)
    return "\n".join(f"{label:{label_width}} {' '.join(f'{cell:>6}' for cell in cells)}" for label, cells in rows)


def save_training_figure(path, history, title):
    """PNG of one run: val top-1 against bit-width (best and last epoch), and against epoch per bit-width."""
    figure, (by_width, by_epoch) = new_figure(2)
    widths = sorted(history[0]["val"])
    for name, record in (("best checkpoint, epoch", best_record(history)), ("last epoch,", history[-1])):
        plot_by_width(by_width, widths, {bits: record["val"][bits]["top1"] for bits in widths},
                      label=f"{name} {record['epoch']}")
    by_width.legend()
    for bits, colour in zip(widths, COLOURS):
        by_epoch.plot([record["epoch"] for record in history], [record["val"][bits]["top1"] for record in history],
                      color=colour, label=f"{bits} bit{'s' * (bits > 1)}", marker="." if len(history) < 3 else None)
    by_epoch.set_xlabel("epoch")
    by_epoch.set_ylabel("val top-1 (%)")
    # The first third would press all that follows into one line.
    settled = [values["top1"] for record in history[len(history) // 3:] for values in record["val"].values()]
    by_epoch.set_ylim(max(0, min(settled) - 2), min(100.5, max(settled) + 1))
    by_epoch.legend()
    figure.suptitle(title)
    save_figure(figure, path)


# ---- one evaluation: train.py --evaluate

def evaluation_table(results, trained):
    """Loss, top-1 and top-5 per bit-width of {bit_width: {"loss", "top1", "top5"}}; untrained ones are marked."""
    rows = [f"{'bits':>5} {'loss':>8} {'top-1 %':>8} {'top-5 %':>8}"]
    for bits, values in results.items():
        mark = "" if bits in trained else "   not trained"
        rows.append(f"{bits:>5} {values['loss']:8.4f} {values['top1']:8.2f} {values['top5']:8.2f}{mark}")
    return "\n".join(rows)


def save_evaluation_figure(path, results, title):
    figure, (axis,) = new_figure(1)
    plot_by_width(axis, sorted(results), {bits: values["top1"] for bits, values in results.items()})
    axis.set_title(title)
    save_figure(figure, path)


# ---- figures

def new_figure(columns):
    from matplotlib.figure import Figure  # without pyplot: no display is asked for

    figure = Figure(figsize=(6 * columns, 4.5), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes


def plot_by_width(axis, widths, top1, spread=None, **style):
    """A line of top1 {bits: %} over the evenly spaced `widths`, with error bars where spread is given."""
    present = [bits for bits in widths if bits in top1]
    axis.errorbar([widths.index(bits) for bits in present], [top1[bits] for bits in present],
                  yerr=spread and [spread[bits] for bits in present], marker="o", capsize=3, **style)
    axis.set_xticks(range(len(widths)), [str(bits) for bits in widths])
    axis.set_xlabel("bits (weights and activations)")
    axis.set_ylabel("val top-1 (%)")


def save_figure(figure, path):
    with utils.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


# ---- several runs

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
            history = utils.read_metrics(folder / "metrics.jsonl")
            if history and history[-1]["epoch"] < arguments["epochs"]:
                arguments["done"] = f"{history[-1]['epoch']} of {arguments['epochs']} epochs"
        configuration(arguments)  # fails here where the arguments are not those of a run
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder} is not a results folder of train.py ({utils.one_line(error)})") from None
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
    return tuple(sorted((name, utils.flag_text(value)) for name, value in chosen.items()))


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
    parser = utils.OneLineParser(description=__doc__.splitlines()[0], formatter_class=utils.HelpFormatter,
                                 allow_abbrev=False)
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
        with utils.replacing(f"{output}.{ending}") as temporary:
            temporary.write_text(content)
    save_comparison_figure(f"{output}.png", rows)
    print(table)
    for reason in left_out:
        print(f"left out: {reason}")
    print(f"written to {output}.md, {output}.png and {output}.csv")


if __name__ == "__main__":
    utils.run(main, parse_args)
