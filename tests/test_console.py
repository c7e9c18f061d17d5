"""What a run shows: rows that fit, the loss from the first step on, bars on a terminal alone."""
import io
import logging
import sys

import pytest
import torch

from engine.console import Console, duration, log
from engine.metrics import Metrics
from models import BitWidth
from utils import progress

NINE = (1, 2, 3, 4, 5, 6, 7, 8, 32)


@pytest.fixture
def shown(monkeypatch):
    """A stream that gets the lines of the log."""
    stream = io.StringIO()
    monkeypatch.setattr(log, "handlers", [logging.StreamHandler(stream)])
    return stream


def show_rows(widths, epochs, count, speed=1234.5):
    widths = [BitWidth.of(bits) for bits in widths]
    console = Console(widths, epochs, 10, 50, bar=False)
    for epoch in range(count):
        console.row({"epoch": epoch + 1, "lr": 0.00012, "images_per_second": speed,
                     "train": {bits: {"loss": 1.5, "top1": 50.0} for bits in widths},
                     "val": {bits: {"loss": 2.25, "top1": 100 - bits.weights / 4}
                             for bits in widths}})


@pytest.mark.parametrize("widths, first, columns", [
    ((1, 2, 4, 8, 32), "99.75", 100), (NINE, "99.8", 100), ((1, 2, 4, 8, 32), "99.75", 80),
    (NINE, "99.75", 120)])
def test_rows_fit_the_terminal_in_one_line_each(widths, first, columns, shown, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    show_rows(widths, 200, 3)
    header, *rows = shown.getvalue().splitlines()
    assert len(rows) == 3 and {len(line) for line in (header, *rows)} == {len(header)}
    assert len(header) <= columns
    assert header.split() == ["epoch", "lr", "loss", "val", "loss",
                              *(f"{bits}b" for bits in widths), "img/s", "eta"]
    epoch, lr, loss, val_loss, *top1, speed, eta = rows[0].split()
    assert (epoch, lr, loss, val_loss, speed) == ("1/200", "0.00012", "1.500", "2.250", "1234")
    assert len(top1) == len(widths) and top1[0] == first


def test_bit_widths_that_do_not_fit_stand_below(shown, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    show_rows(NINE, 30, 1)
    lines = shown.getvalue().splitlines()
    assert len(lines) == 4 and max(map(len, lines)) <= 80
    header = " ".join(lines[:2]).split()
    row = " ".join(lines[2:]).split()
    assert [name for name in header if name.endswith("b")] == [f"{bits}b" for bits in NINE]
    assert {"99.8", "99.5", "92.0", "98.0"} <= set(row)


def test_the_header_comes_again(shown):
    show_rows((4,), 50, 41)
    headers = [index for index, line in enumerate(shown.getvalue().splitlines())
               if "val loss" in line]
    assert headers == [0, 21, 42]


def test_slow_runs_have_a_decimal(shown):
    show_rows((4,), 2, 1, speed=8.44)
    assert " 8.4 " in shown.getvalue()


def test_the_loss_is_shown_from_the_first_step_on(shown):
    widths = [BitWidth.of(bits) for bits in NINE]
    console = Console(widths, 2, 10, 4, bar=False)
    for epoch in range(2):
        metrics = Metrics(widths, "cpu")
        for _ in range(5):
            metrics.add({bits: (torch.tensor(1.0), torch.zeros(2, 10)) for bits in widths},
                        torch.tensor([0, 1]))
            console.step(epoch, metrics)
        values = {bits: {"loss": 1.0, "top1": 1.0} for bits in widths}
        console.row({"epoch": epoch + 1, "lr": 1, "images_per_second": 1, "train": values,
                     "val": values})
    lines = shown.getvalue().splitlines()
    steps = [line.split("  loss 1.0000")[0] for line in lines if "  step " in line]
    assert steps == ["epoch 1/2  step 1/10", "epoch 1/2  step 4/10", "epoch 2/2  step 4/10"]
    assert max(map(len, lines)) <= 100 and "32b:" in shown.getvalue()


def test_the_time_to_the_end_of_a_run_that_resumes_within_an_epoch(shown, monkeypatch):
    clock = 100.0
    monkeypatch.setattr("time.monotonic", lambda: clock)
    console = Console([BitWidth(4)], 3, 10, 50, bar=False)
    values = {BitWidth(4): {"loss": 1.0, "top1": 1.0}}
    metrics = Metrics([BitWidth(4)], "cpu")
    metrics.steps = 6  # 5 before
    monkeypatch.setattr(metrics, "averages", lambda: values)
    console.step(0, metrics)
    for epoch in range(2):
        clock += (50, 100)[epoch]
        console.row({"epoch": epoch + 1, "lr": 1, "images_per_second": 1, "train": values,
                     "val": values})
    assert [line.split()[-1] for line in shown.getvalue().splitlines()[2:]] == ["3m20s", "1m40s"]


@pytest.mark.parametrize("seconds, text", [
    (0.4, "0s"), (59, "59s"), (59.6, "1m00s"), (3599, "59m59s"), (7800, "2h10m"),
    (86400 * 12 + 3600 * 4, "12d04h")])
def test_duration(seconds, text):
    assert duration(seconds) == text


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream, rank, is_shown", [
    (Terminal(), "0", True), (Terminal(), "1", False), (io.StringIO(), "0", False)])
def test_bars_are_shown_on_a_terminal_by_one_process(stream, rank, is_shown, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys, "stderr", stream)
    with progress([1, 2, 3], "epoch 1, validation") as batches:
        assert list(batches) == [1, 2, 3]
    assert ("epoch 1, validation" in stream.getvalue()) is is_shown
