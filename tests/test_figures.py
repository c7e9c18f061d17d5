"""Figures: what is drawn is seen, names stand beside it, axes show what matters."""
import sys

import pytest
from matplotlib.colors import to_rgba
from runs import ROOT

from engine import figures
from engine.figures import (Curve, save_comparison_figure, save_evaluation_figure,
                            save_training_figure)
from models import BitWidth

sys.path.append(str(ROOT / "benchmarks"))
import fashion_figure  # noqa: E402

pytestmark = pytest.mark.pictures

ANY = {BitWidth.of(bits): top1 for bits, top1 in
       {1: 84.5, 2: 88.8, 4: 89.6, 8: 89.7, 32: 90.0}.items()}


@pytest.fixture
def drawn(monkeypatch):
    """A list of the figures that would have been saved."""
    found = []

    def keep(figure, path):
        figure.draw_without_rendering()
        found.append(figure)

    monkeypatch.setattr(figures, "save_figure", keep)
    return found


def history_of(top1s, bits=(2, 32)):
    return [{"epoch": epoch + 1, "val": {BitWidth.of(width): {"top1": top1} for width in bits}}
            for epoch, top1 in enumerate(top1s)]


def curves(count, length=12):
    return [Curve(f"{index} {'x' * length}", {bits: top1 - index / 4 for bits, top1 in ANY.items()},
                  {}, set(ANY), joined=True) for index in range(count)]


@pytest.mark.parametrize("counts, length", [([1, 1], 10), ([3, 4], 30), ([15, 15], 40),
                                            ([15, 2], 90)])
def test_names_stand_within_the_figure_and_cover_no_curve(counts, length, drawn):
    save_comparison_figure("x", [(f"data {n}", curves(n, length)) for n in counts])
    figure, = drawn
    assert figure.get_figwidth() * 120 == 1200
    assert len(figure.axes) == len(counts)
    for axis, count in zip(figure.axes, counts):
        legend = axis.get_legend()
        assert len(legend.get_texts()) == count
        box = legend.get_window_extent()
        assert box.x0 >= axis.get_window_extent().x1
        assert box.x1 <= figure.bbox.x1 and box.y0 >= figure.bbox.y0
        assert axis.get_window_extent().width > 0.4 * figure.bbox.width


def points_of(axis):
    """Return the lines of an axis that have points and markers, without the legend's own."""
    return [line for line in axis.lines if len(line.get_xdata()) and line.get_marker() in "osD^vPX"]


def test_each_of_15_curves_looks_unlike_the_others(drawn):
    save_comparison_figure("x", [("data", curves(15))])
    looks = {(line.get_color(), line.get_marker()) for line in points_of(drawn[0].axes[0])}
    assert len(looks) == 15
    places = {line.get_xdata()[0] for line in points_of(drawn[0].axes[0])}
    assert len(places) == 15 and max(places) - min(places) < 0.7


def test_separate_networks_are_not_joined_and_untrained_points_are_hollow(drawn):
    dedicated = Curve("dedicated", ANY, {}, set(ANY), joined=False)
    evaluated = Curve("evaluated", ANY, {}, {BitWidth(32)}, joined=True)
    save_comparison_figure("x", [("data", [dedicated, evaluated])])
    axis, = drawn[0].axes
    separate, joined, hollow = points_of(axis)
    assert separate.get_linestyle() == "None" and joined.get_linestyle() == "-"
    assert len(hollow.get_xdata()) == 4 and hollow.get_markerfacecolor() == "white"
    names = [text.get_text() for text in axis.get_legend().get_texts()]
    assert names == ["dedicated", "evaluated", "hollow: bit-width not trained"]


def test_few_low_values_do_not_flatten_the_rest(drawn):
    low = dict(zip(ANY, (17.4, 55.3, 81.6, 82.7, 90.0)))
    save_comparison_figure("x", [("data", [*curves(3), Curve("low", low, {}, set(), True)])])
    whole, upper = drawn[0].axes
    assert whole.get_ylim()[0] < 17 and 70 < upper.get_ylim()[0] < 81.6
    assert upper.get_ylim()[1] > 90 and whole.get_legend() is None

    drawn.clear()
    save_comparison_figure("x", [("data", curves(3))])
    assert len(drawn[0].axes) == 1


def test_equal_values_get_no_axis_of_less_than_a_point(drawn):
    save_comparison_figure("x", [("data", [Curve("one", {BitWidth(4): 10.0}, {}, set(), False)])])
    bottom, top = drawn[0].axes[0].get_ylim()
    assert top - bottom >= 4 and bottom < 10 < top


def test_names_are_no_mathematics(tmp_path):
    curve = Curve("cost$_$5", ANY, {}, set(ANY), joined=True)
    save_comparison_figure(tmp_path / "x.png", [("x$_$", [curve])])
    save_evaluation_figure(tmp_path / "y.png", {bits: {"top1": top1} for bits, top1 in ANY.items()},
                           "cost$_$5", list(ANY))
    assert (tmp_path / "x.png").stat().st_size and (tmp_path / "y.png").stat().st_size


def test_training_figure(drawn):
    save_training_figure("x", history_of([28, 80, 90, 96, 97, 98, 97.5, 98, 98.2, 98.1]), "run")
    by_width, by_epoch = drawn[0].axes
    assert 90 < by_epoch.get_ylim()[0] < 97  # not from 28
    last, best = points_of(by_width)
    assert list(last.get_ydata()) == [98.1, 98.1] and list(best.get_ydata()) == [98.2, 98.2]
    assert best.get_markerfacecolor() == "none" and best.get_markersize() > last.get_markersize()
    names = [text.get_text() for text in by_width.get_legend().get_texts()]
    assert names == ["last, epoch 10", "best checkpoint, epoch 9"]


@pytest.mark.parametrize("epochs", [1, 2, 3, 30])
def test_ticks_are_whole_epochs(epochs, drawn):
    save_training_figure("x", history_of([90 + epoch / 10 for epoch in range(epochs)]), "run")
    ticks = drawn[0].axes[1].get_xticks()
    assert all(tick == round(tick) for tick in ticks) and any(1 <= tick <= epochs for tick in ticks)


def test_evaluation_figure_marks_what_was_not_trained(drawn):
    results = {bits: {"top1": top1} for bits, top1 in ANY.items()}
    save_evaluation_figure("x", results, "run", [BitWidth(2), BitWidth(32)])
    save_evaluation_figure("x", results, "run", list(ANY))
    some, all_trained = (figure.axes[0] for figure in drawn)
    hollow = points_of(some)[1]
    assert list(hollow.get_ydata()) == [84.5, 89.6, 89.7]
    assert to_rgba(hollow.get_markerfacecolor()) == (1, 1, 1, 1)
    assert some.get_legend() and not all_trained.get_legend()


def test_the_figure_of_the_docs_has_all_rows_of_the_tables(monkeypatch):
    saved = []
    monkeypatch.setattr(fashion_figure, "save_comparison_figure",
                        lambda path, panels, split: saved.append((panels, split)))
    fashion_figure.main(fashion_figure.parse_args(["--output", "x"]))
    ([(_, converged), (_, others)], split), = saved
    assert split == "test"
    names = [curve.name for curve in converged]
    assert names in (list(fashion_figure.CONVERGED.values()), ["any, recursive", names[-1]])
    assert [curve.name for curve in others] == [
        *fashion_figure.SIX_EPOCHS.values(), *fashion_figure.PAPER_S.values()]
    assert others[-1].mean == {1: 85.38, 2: 88.91, 4: 90.01, 8: 89.95, 32: 91.24}
