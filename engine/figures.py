"""Tables and figures of accuracy against bit-width."""
import statistics
import textwrap
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib import colormaps, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot, which needs a display
from matplotlib.ticker import MaxNLocator

from engine.metrics import best_key
from models import Assignment, BitWidth, Width
from utils import replacing

rcParams["text.usetex"] = False  # names of runs are no TeX, whatever a user's matplotlibrc says
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
MARKERS = "osD^vPX"  # with the colors, so that those who confuse them can tell points apart
LINES = ("-", "--", ":")


def best_record(history: list[dict], best_by: str = "highest") -> dict:
    """Return the record of the epoch of model_best.pth.tar, the last one of a tie."""
    return max(reversed(history), key=lambda record: best_key(record["val"], best_by))


def best_of_each(history: list[dict]) -> dict[BitWidth, dict[str, float]]:
    """Return {bit-width: its best values over all epochs}, which may be of different epochs."""
    return {bits: max((record["val"][bits] for record in history), key=lambda value: value["top1"])
            for bits in sorted(history[0]["val"])}


def best_and_last(history: list[dict], best_by: str = "highest") -> str:
    """Return the closing table of a run: top-1 of its best and last epochs per bit-width."""
    best = best_record(history, best_by)
    last = history[-1]
    rows = [("best epoch of each", best_of_each(history)),
            (f"best checkpoint (epoch {best['epoch']})", best["val"]),
            (f"last (epoch {last['epoch']})", last["val"])]
    lines = [f"{'val top-1 (%), by bits':30} {' '.join(f'{bits:>6}' for bits in rows[0][1])}"]
    for label, values in rows:
        cells = " ".join(f"{values[bits]['top1']:6.2f}" for bits in rows[0][1])
        lines.append(f"{label:30} {cells}")
    return "\n".join(lines)


def evaluation_table(results: dict[Width, dict[str, float]],
                     trained: Container[BitWidth]) -> str:
    """Return a table of an evaluation's results, with untrained bit-widths marked.

    Where they hold what it costs, that too: of the quantized layers, and below of the others.
    """
    first = next(iter(results.values()))
    has_costs = "bit_operations" in first
    width = max(5, *(len(str(bits)) for bits in results))
    header = f"{'bits':>{width}} {'loss':>8} {'top-1 %':>8} {'top-5 %':>8}"
    if has_costs:
        header += f" {'Mbit-ops':>10} {'bytes':>11}"
    lines = [header]
    for bits, value in results.items():
        line = f"{bits:>{width}} {value['loss']:8.4f} {value['top1']:8.2f} {value['top5']:8.2f}"
        if has_costs:
            line += f" {value['bit_operations'] / 1e6:10,.1f} {value['weight_bytes']:11,}"
        lines.append(line if bits in trained else f"{line}   not trained")
    if has_costs:
        operations = first["float_bit_operations"] / 1e6
        lines.append("\nMbit-ops and bytes of the quantized layers, for an image; the float "
                     f"layers, at 32 x 32 bits,\ntake {operations:,.1f} and "
                     f"{first['float_weight_bytes']:,} more at every bit-width")
    return "\n".join(lines)


def save_training_figure(path: str | Path, history: list[dict], title: str,
                         best_by: str = "highest") -> None:
    """Save a PNG of a run's val top-1 against bit-width, and against epoch per bit-width."""
    figure, (by_width, by_epoch) = new_figure(2, title, width=5)
    widths = sorted(history[0]["val"])
    best = best_record(history, best_by)
    last = history[-1]
    plot_by_width(by_width, widths, top1_of(last), label=f"last, epoch {last['epoch']}")
    plot_by_width(by_width, widths, top1_of(best), label=f"best checkpoint, epoch {best['epoch']}",
                  color=COLORS[1], linestyle="--", marker="o", markersize=11,
                  markerfacecolor="none")  # a ring, around the last where they are equal
    scale_to(by_width, [*top1_of(last).values(), *top1_of(best).values()])
    legend_below(by_width)

    epochs = [record["epoch"] for record in history]
    rainbow = colormaps["turbo_r"]
    for index, bits in enumerate(widths):  # from red to blue
        by_epoch.plot(epochs, [record["val"][bits]["top1"] for record in history], marker=".",
                      color=rainbow(0.05 + 0.9 * index / max(1, len(widths) - 1)),
                      label=f"{bits}-bit")
    later = history[len(history) // 2:] if len(history) > 3 else history
    shown = [value for record in later for value in top1_of(record).values()]
    if later is not history:  # some of the rise to them, not all: that would flatten them
        lowest = min(value for record in history for value in top1_of(record).values())
        shown.append(max(lowest, 2 * min(shown) - max(shown)))
    scale_to(by_epoch, shown)
    by_epoch.set(xlabel="epoch", ylabel="val top-1 (%)", xlim=(epochs[0] - 0.5, epochs[-1] + 0.5))
    by_epoch.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    legend_beside(by_epoch)
    save_figure(figure, path)


def top1_of(record: dict) -> dict[BitWidth, float]:
    """Return the val top-1 (%) of each bit-width in a record of metrics.jsonl."""
    return {bits: values["top1"] for bits, values in record["val"].items()}


def save_evaluation_figure(path: str | Path,
                           results: dict[Width, dict[str, float]], title: str,
                           trained: Container[BitWidth]) -> None:
    """Save a PNG of an evaluation's top-1 against bit-width; hollow where it was not trained.

    Assignments follow the bit-widths, and no line joins them.
    """
    figure, (axis,) = new_figure(1, title, width=7.5)
    top1 = {bits: values["top1"] for bits, values in results.items()}
    places = sorted(results)
    for kind, style in ((BitWidth, {}), (Assignment, {"linestyle": "none", "color": COLORS[1]})):
        part = {bits: value for bits, value in top1.items() if isinstance(bits, kind)}
        plot_by_width(axis, places, part, trained, **style)
    has_assignments = any(isinstance(bits, Assignment) for bits in places)
    if has_assignments:
        axis.tick_params("x", rotation=30)
        axis.set_xlabel("bits (weights and activations), and assignments of bits to layers")
    scale_to(axis, top1.values())
    if any(bits not in trained for bits in results):
        explain_hollow(axis)
        if has_assignments:  # whose names take the room below
            legend_beside(axis)
        else:
            legend_below(axis)
    save_figure(figure, path)


class Curve(NamedTuple):
    """The top-1 (%) of a configuration, over its seeds.

    spread: standard deviations, of bit-widths with several seeds. trained: the bit-widths that were
    trained. joined: whether one network runs at several bit-widths, so that a line joins them.
    """
    name: str
    mean: dict[BitWidth, float]
    spread: dict[BitWidth, float]
    trained: Container[BitWidth]
    joined: bool


def save_comparison_figure(path: str | Path, panels: Sequence[tuple[str, Sequence[Curve]]],
                           split: str = "val") -> None:
    """Save a PNG of 1,200 pixels: of each panel (title, curves) its curves, with names beside.

    Where a few low values would flatten all others, a second look leaves them out.
    """
    names = [[textwrap.fill(curve.name, 44, break_on_hyphens=False) for curve in curves]
             for _, curves in panels]
    lines = [sum(name.count("\n") + 1 for name in panel) for panel in names]
    heights = [max(4, 0.22 * count + 1) for count in lines]
    figure = Figure(figsize=(10, sum(heights)), layout="constrained")
    rows = figure.subfigures(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for row, (title, curves), labels in zip(rows, panels, names):
        values = [mean for curve in curves for mean in curve.mean.values()]
        floor = common_floor(values)
        row.suptitle(literal(title))
        axes = row.subplots(1, 1 if floor is None else 2, squeeze=False)[0]
        widths = sorted({bits for curve in curves for bits in curve.mean})
        for axis in axes:
            plot_curves(axis, widths, curves, labels, split)
        scale_to(axes[0], ends_of(curves))
        if floor is not None:
            axes[1].set_title("the upper part", fontsize="medium")
            axes[1].set_ylabel(None)
            scale_to(axes[1], ends_of(curves, floor))
        legend_beside(axes[-1])
    save_figure(figure, path)


def plot_curves(axis: Axes, widths: list[BitWidth], curves: Sequence[Curve],
                labels: Sequence[str], split: str) -> None:
    """Plot curves over evenly spaced widths, side by side at each."""
    step = min(0.08, 0.6 / len(curves))
    for index, (curve, label) in enumerate(zip(curves, labels)):
        style = index // len(COLORS)  # each color comes again with another marker and line
        plot_by_width(axis, widths, curve.mean, curve.trained, curve.spread,
                      offset=step * (index - (len(curves) - 1) / 2), label=literal(label),
                      color=COLORS[index % len(COLORS)],
                      marker=MARKERS[(index + style) % len(MARKERS)],
                      linestyle=LINES[style % len(LINES)] if curve.joined else "none")
    axis.set_ylabel(f"{split} top-1 (%)")
    axis.grid(alpha=0.3)
    if any(bits not in curve.trained for curve in curves for bits in curve.mean):
        explain_hollow(axis)


def ends_of(curves: Sequence[Curve], floor: float = 0) -> list[float]:
    """Return the ends of the error bars of all means from `floor` up."""
    return [mean + sign * curve.spread.get(bits, 0)
            for curve in curves for bits, mean in curve.mean.items() if mean >= floor
            for sign in (-1, 1)]


def common_floor(values: Sequence[float]) -> float | None:
    """Return the least of the values that are no outliers below; None where a scale fits all.

    An outlier is 1.5 interquartile ranges below the lower quartile, as in a box plot.
    """
    if len(values) < 4:
        return None
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    floor = min(value for value in values if value >= lower - 1.5 * (upper - lower))
    span = max(values) - min(values)
    is_flattened = span > 20 and span > 2.5 * (max(values) - floor)
    return floor if is_flattened else None


def new_figure(columns: int, title: str | None = None,
               width: float = 6) -> tuple[Figure, Sequence[Axes]]:
    """Return a figure and its axes, side by side, each `width` inches wide."""
    figure = Figure(figsize=(width * columns, 4.5), layout="constrained")
    figure.suptitle(title and literal(title), fontsize="medium")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes


def literal(text: str) -> str:
    """Return text in which Matplotlib sees no mathematics between dollar signs."""
    return text.replace("$", r"\$")


def plot_by_width(axis: Axes, widths: list[BitWidth], top1: dict[BitWidth, float],
                  trained: Container[BitWidth] | None = None,
                  spread: dict[BitWidth, float] | None = None, offset: float = 0,
                  color: str = COLORS[0], marker: str = "o", **style: object) -> None:
    """Plot top1 {bit-width: %} over evenly spaced widths, with error bars of spread, if given.

    trained: the points of other bit-widths are hollow; None: of all are filled. offset: to the
    right, in places of the axis.
    """
    place = {bits: widths.index(bits) + offset for bits in widths if bits in top1}
    axis.errorbar(list(place.values()), [top1[bits] for bits in place],
                  yerr=[spread.get(bits, 0) for bits in place] if spread else None,
                  capsize=3, color=color, marker=marker, **style)
    hollow = [bits for bits in place if trained is not None and bits not in trained]
    axis.plot([place[bits] for bits in hollow], [top1[bits] for bits in hollow], linestyle="none",
              marker=marker, color=color, markerfacecolor="white", zorder=3)
    axis.set_xticks(range(len(widths)), widths)
    axis.set_xlim(-0.5, len(widths) - 0.5)
    axis.set(xlabel="bits (weights and activations)", ylabel="val top-1 (%)")


def explain_hollow(axis: Axes) -> None:
    """Add to the legend, as its last entry, what hollow points are."""
    axis.errorbar([], [], linestyle="none", marker="o", color="grey", markerfacecolor="white",
                  label="hollow: bit-width not trained")


def scale_to(axis: Axes, values: Iterable[float]) -> None:
    """Scale an axis of accuracy (%) to these values, and to 4 points at least."""
    values = list(values)
    middle = (max(values) + min(values)) / 2
    half = max(max(values) - min(values), 4) * 0.54
    axis.set_ylim(max(middle - half, -1), min(middle + half, 101))


def legend_below(axis: Axes) -> None:
    """Put the legend below the axis, where it covers nothing."""
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)


def legend_beside(axis: Axes) -> None:
    """Put the legend to the right of the axis, where it covers nothing."""
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Save a figure as a PNG."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
