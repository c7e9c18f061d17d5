"""Tables and figures of accuracy against bit-width."""
from collections.abc import Container, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot, which needs a display

from engine.metrics import best_key
from models import BitWidth
from utils import replacing


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


def evaluation_table(results: dict[BitWidth, dict[str, float]],
                     trained: Container[BitWidth]) -> str:
    """Return a table of an evaluation's results, with untrained bit-widths marked."""
    header = f"{'bits':>5} {'loss':>8} {'top-1 %':>8} {'top-5 %':>8}"
    return "\n".join([header, *(
        f"{bits:>5} {value['loss']:8.4f} {value['top1']:8.2f} {value['top5']:8.2f}"
        f"{'' if bits in trained else '   not trained'}" for bits, value in results.items())])


def save_training_figure(path: str | Path, history: list[dict], title: str,
                         best_by: str = "highest") -> None:
    """Save a PNG of a run's val top-1 against bit-width, and against epoch per bit-width."""
    figure, (by_width, by_epoch) = new_figure(2, title)
    widths = sorted(history[0]["val"])
    best = best_record(history, best_by)
    for name, record in (("best checkpoint,", best), ("last", history[-1])):
        plot_by_width(by_width, widths, {bits: record["val"][bits]["top1"] for bits in widths},
                      label=f"{name} epoch {record['epoch']}")
    for bits in widths:
        by_epoch.plot([record["epoch"] for record in history],
                      [record["val"][bits]["top1"] for record in history], marker=".",
                      label=f"{bits}-bit")
    by_epoch.set(xlabel="epoch", ylabel="val top-1 (%)")
    by_width.legend()
    by_epoch.legend()
    save_figure(figure, path)


def save_evaluation_figure(path: str | Path, results: dict[BitWidth, dict[str, float]],
                           title: str) -> None:
    """Save a PNG of an evaluation's top-1 against bit-width."""
    figure, (axis,) = new_figure(1, title)
    plot_by_width(axis, sorted(results), {bits: value["top1"] for bits, value in results.items()})
    save_figure(figure, path)


def new_figure(columns: int, title: str | None = None) -> tuple[Figure, Sequence[Axes]]:
    """Return a figure and its axes, side by side."""
    figure = Figure(figsize=(6 * columns, 4.5), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes


def plot_by_width(axis: Axes, widths: list[BitWidth], top1: dict[BitWidth, float],
                  spread: dict[BitWidth, float] | None = None, **style: object) -> None:
    """Plot top1 {bit-width: %} over evenly spaced widths, with error bars of spread, if given."""
    present = [bits for bits in widths if bits in top1]
    axis.errorbar([widths.index(bits) for bits in present], [top1[bits] for bits in present],
                  yerr=[spread.get(bits, 0) for bits in present] if spread else None,
                  marker="o", capsize=3, **style)
    axis.set_xticks(range(len(widths)), widths)
    axis.set(xlabel="bits (weights and activations)", ylabel="val top-1 (%)")


def save_figure(figure: Figure, path: str | Path) -> None:
    """Save a figure as a PNG."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
