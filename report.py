"""Compare runs: their accuracy per bit-width as a Markdown table, a picture and CSV."""
from pathlib import Path

import utils

# The figure's colours: one per bit-width or configuration, told apart by colour-blind readers too.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999", "#6a3d9a"]


def best_record(history):
    """The epoch whose checkpoint is model_best: the first with the highest val top-1 at the highest bit-width."""
    highest = max(history[0]["val"])
    return max(history, key=lambda record: record["val"][highest]["top1"])


def best_and_last(history):
    """The closing table of a run: val top-1 per bit-width at its best epoch and its last."""
    widths = sorted(history[0]["val"])
    rows = [(f"best checkpoint (epoch {best_record(history)['epoch']})", best_record(history)),
            (f"last (epoch {history[-1]['epoch']})", history[-1])]
    label_width = max(len(label) for label, _ in rows)
    lines = [f"{'val top-1, %, at bits':{label_width}} " + " ".join(f"{bits:>6}" for bits in widths)]
    for label, record in rows:
        cells = " ".join(f"{record['val'][bits]['top1']:6.2f}" for bits in widths)
        lines.append(f"{label:{label_width}} {cells}")
    return "\n".join(lines)


def save_training_figure(path, history, title):
    """PNG of one run: val top-1 against bit-width (best and last epoch), and against epoch per bit-width."""
    figure, (by_width, by_epoch) = new_figure(2)
    widths = sorted(history[0]["val"])
    for name, record in (("best checkpoint", best_record(history)), ("last epoch", history[-1])):
        by_width.plot(range(len(widths)), [record["val"][bits]["top1"] for bits in widths], marker="o",
                      label=f"{name} ({record['epoch']})")
    label_bit_widths(by_width, widths)
    for bits, colour in zip(widths, COLOURS):
        by_epoch.plot([record["epoch"] for record in history], [record["val"][bits]["top1"] for record in history],
                      color=colour, label=f"{bits} bits")
    by_epoch.set_xlabel("epoch")
    by_epoch.set_ylabel("val top-1 (%)")
    by_epoch.legend()
    figure.suptitle(title)
    save_figure(figure, path)


def new_figure(columns):
    from matplotlib.figure import Figure  # without pyplot: no display is asked for

    figure = Figure(figsize=(6 * columns, 4.5), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for axis in axes:
        axis.grid(alpha=0.3)
    return figure, axes


def label_bit_widths(axis, widths):
    axis.set_xticks(range(len(widths)), [str(bits) for bits in widths])
    axis.set_xlabel("bits (weights and activations)")
    axis.set_ylabel("val top-1 (%)")
    axis.legend()


def save_figure(figure, path):
    with utils.replacing(Path(path)) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
