"""Tables and pictures of accuracy against bit-width."""
from matplotlib.figure import Figure  # without pyplot: no display is asked for

from utils import replacing

# Told apart by colour-blind readers too (Okabe and Ito), then by whoever can.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999", "#6a3d9a"]


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
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
