"""Compare searched bits per layer with uniform bit-widths, over networks of several seeds.

    python benchmarks/layer_bits.py results/fashion_table/recursive_seed?/ckpt/model_latest.pth.tar

For each network: search.py at the budgets, then train.py --evaluate --layer_bits on the validation
split (of Fashion-MNIST its test split), in folders under --output: the same command continues where
it stopped. Prints and writes a Markdown table and a picture. A gain is the top-1 of a mixture less
that of the straight line between the uniform bit-widths beside it, at the mixture's own
bit-operations and in the same network: a line over the logarithm of bit-operations, and one over
bit-operations, which is what one gets by running some of the images at either bit-width. The
uniform ones, all-1 and so on, have BatchNorms that are re-estimated as the mixtures' are.
"""
import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

from reference_way import ROOT  # first: it adds the project to the path
from scipy import stats

from engine.arguments import OneLineParser, path_text
from engine.errors import UserError, run_program
from engine.figures import COLORS, legend_below, new_figure, save_figure
from engine.run_folder import PATH_FILE
from models.assignment import is_name
from models.bit_widths import BITS, FULL_PRECISION
from utils import markdown_table, write_json, write_text

UNIFORM = {f"all-{bits}": bits for bits in BITS if bits != FULL_PRECISION}  # names of assignments
OPTIONS_FILE = "options.json"
LINES = {"log": math.log, "linear": float}
SIGNIFICANT = 0.05


def name_of(source):
    """Return the name of a network's folders: that of its results folder, or of its file."""
    path = Path(source)
    if path.parent.name == "ckpt":
        path = path.parent.parent
    return path.name.split(".")[0]


def measured(source, options):
    """Search and evaluate, unless that is done; return the network's evaluation.json."""
    folder = Path(options.output, name_of(source))
    search = folder / "search"
    evaluation = folder / "evaluation"
    more = ["--data-dir", options.data_dir] if options.data_dir else []
    more += ["--device", options.device]
    wanted = {"source": str(Path(source).resolve()), "budget": options.budget,
              "images": options.images, "calibrate": options.calibrate,
              "data_dir": options.data_dir}
    if (folder / OPTIONS_FILE).exists() and json.loads(
            (folder / OPTIONS_FILE).read_text()) != wanted:
        raise UserError(f"{folder} is of another network or other options: choose another "
                        "--output")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / OPTIONS_FILE, wanted)
    if not (evaluation / "evaluation.json").exists():
        run("search.py", source, "--budget", options.budget, "--images", options.images,
            "--results-dir", search, *more)
        found = json.loads((search / "layer_bits.json").read_text())
        trained = json.loads((search / PATH_FILE).read_text())["bit_widths"].split(",")
        found += [{"name": name, "default": bits, "layers": {}} for name, bits in UNIFORM.items()
                  if str(bits) in trained]
        write_json(folder / "layer_bits.json", found)
        run("train.py", "--evaluate", "--pretrain", source, "--layer_bits",
            folder / "layer_bits.json", "--calibrate", options.calibrate, "--results-dir",
            evaluation, *more)
    return json.loads((evaluation / "evaluation.json").read_text())


def run(program, *arguments):
    """Run a program of the project; it prints its own progress."""
    command = [sys.executable, str(ROOT / program), *map(str, arguments)]
    code = subprocess.run(command).returncode
    if code:
        raise UserError(f"{program} ended with exit code {code}: correct that, and start this anew")


def on_line(results, cost, scale):
    """Return the top-1 at a cost on the line between the uniform bit-widths beside it."""
    points = sorted((values["bit_operations"], values["top1"]) for bits, values in results.items()
                    if bits in UNIFORM)
    for (low, first), (high, second) in zip(points, points[1:]):
        if low <= cost <= high:
            share = (scale(cost) - scale(low)) / (scale(high) - scale(low))
            return first + share * (second - first)
    raise UserError(f"{cost:,} bit-operations are not between those of two uniform bit-widths")


def summary(networks):
    """Return {assignment or uniform bit-width: its numbers over the networks}, by cost.

    networks: their evaluation.json. Gains and their standard errors are of assignments alone.
    """
    found = {}
    for name in networks[0]:
        if not is_name(name):  # a bit-width, with its own BatchNorms
            continue
        values = [network[name] for network in networks]
        top1 = [each["top1"] for each in values]
        row = {"bit_operations": statistics.mean(each["bit_operations"] for each in values),
               "weight_bytes": statistics.mean(each["weight_bytes"] for each in values),
               "top1": statistics.mean(top1), "spread": spread(top1)}
        for line, scale in LINES.items() if name not in UNIFORM else ():
            gains = [each["top1"] - on_line(network, each["bit_operations"], scale)
                     for network, each in zip(networks, values)]
            row[f"{line}_gain"] = statistics.mean(gains)
            row[f"{line}_error"] = spread(gains) / math.sqrt(len(gains))
            row[f"{line}_p"] = float(stats.ttest_1samp(gains, 0).pvalue) if gains[1:] else math.nan
        found[name] = row
    return dict(sorted(found.items(), key=lambda item: item[1]["bit_operations"]))


def spread(values):
    """Return a standard deviation; NaN of one value."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def with_error(text, error):
    """Return a number with its error, where several networks give one."""
    return text if math.isnan(error) else f"{text} ± {error:.2f}"


def table(rows, count):
    """Return a Markdown table of a summary of `count` networks."""
    several = f"s; mean ± standard deviation, gain ± standard error, over {count} networks; "
    several += f"**bold**: p < {SIGNIFICANT} in a paired t-test"
    title = (f"val top-1 (%) of searched bits per layer and of uniform bit-width{several}"
             if count > 1 else "val top-1 (%) of one network")
    lines = []
    for name, row in rows.items():
        cells = [name, f"{row['bit_operations'] / 1e6:,.2f}", f"{row['weight_bytes']:,.0f}",
                 with_error(f"{row['top1']:.2f}", row["spread"])]
        for line in LINES:
            gain = row.get(f"{line}_gain")
            if gain is None:
                cells.append("")
                continue
            error = row[f"{line}_error"]
            text = with_error(f"{gain:+.2f}", error)
            cells.append(f"**{text}**" if row[f"{line}_p"] < SIGNIFICANT else text)
        lines.append(cells)
    head = ["bits", "Mbit-ops", "weight bytes", "top-1", "gain, log line", "gain, linear line"]
    return f"{title}\n\n{markdown_table(head, lines)}\n"


def draw(path, rows):
    """Save a PNG of top-1 against bit-operations: the mixtures, and the uniform bit-widths."""
    figure, (axis,) = new_figure(1, "bits per layer", width=7.5)
    parts = {"uniform bit-widths": [name for name in rows if name in UNIFORM],
             "searched bits per layer": [name for name in rows if name not in UNIFORM]}
    for (label, names), color, line in zip(parts.items(), COLORS, ("--", "none")):
        part = [rows[name] for name in names]
        axis.errorbar([row["bit_operations"] for row in part], [row["top1"] for row in part],
                      yerr=[row["spread"] for row in part], capsize=3, marker="o", color=color,
                      linestyle=line, label=label)
        for name, row in zip(names, part):
            axis.annotate(name, (row["bit_operations"], row["top1"]), textcoords="offset points",
                          xytext=(6, -11), fontsize="small")
    axis.set(xlabel="bit-operations of the quantized layers", ylabel="top-1 (%)", xscale="log")
    legend_below(axis)
    save_figure(figure, path)


def main(options):
    names = [name_of(source) for source in options.sources]
    if len(set(names)) < len(names):
        raise UserError(f"two networks have the name {max(names, key=names.count)}: rename one's "
                        "folder")
    networks = [measured(source, options) for source in options.sources]
    rows = summary(networks)
    text = table(rows, len(networks))
    write_text(f"{options.output}/layer_bits.md", text)
    write_json(f"{options.output}/layer_bits.json", rows)
    draw(f"{options.output}/layer_bits.png", rows)
    print(f"\n{text}\nwritten to {options.output}/layer_bits.md, .json and .png")


def parse_args(argv=None):
    parser = OneLineParser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("sources", nargs="+", type=path_text, metavar="RUN", help="networks, as search.py takes")
    add("--budget", default="50%,20%,12.5%,4%", help="of search.py")
    add("--images", default="2000", help="of search.py")
    add("--calibrate", default="20", help="training batches, of train.py")
    add("--output", type=path_text, default="results/layer_bits", help="folder of the results")
    add("--data-dir", type=path_text, help="folder that holds the data sets' folders")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:i")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_program(main, parse_args)
