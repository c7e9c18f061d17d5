"""The progress on the console: a bar or lines within an epoch, then one aligned row."""
import datetime
import sys
import time

from tqdm import tqdm

from engine.metrics import Metrics, mean_loss
from engine.run_folder import log
from models import BitWidth


class Console:
    """Shows the progress of a run of `epochs` epochs of `steps` steps, every `print_freq` steps.

    bar: whether to show a bar, as on a terminal, rather than lines.
    """

    def __init__(self, bit_widths: list[BitWidth], epochs: int, steps: int, print_freq: int,
                 bar: bool):
        self.bit_widths = bit_widths
        self.epochs = epochs
        self.steps = steps
        self.print_freq = print_freq
        self.shows_bar = bar
        self.bar = None
        self.rows = 0
        self.started = time.monotonic()

    def step(self, epoch: int, metrics: Metrics) -> None:
        """Show a step of `epoch`, counted from 0; waits for the device at log points."""
        name = f"epoch {epoch + 1}/{self.epochs}"
        if self.bar is None:
            self.bar = tqdm(desc=name, total=self.steps, unit="step", initial=metrics.steps - 1,
                            leave=False, file=sys.stdout, disable=not self.shows_bar)
        self.bar.update()
        if metrics.steps % self.print_freq:
            return

        averages = metrics.averages()
        loss = f"loss {mean_loss(averages):.4f}"
        self.bar.set_postfix_str(loss)
        if not self.shows_bar:
            top1 = "  ".join(f"{bits}b {values['top1']:.2f}" for bits, values in averages.items())
            log.info(f"{name}  step {metrics.steps}/{self.steps}  {loss}  top-1 {top1}")

    def row(self, record: dict) -> None:
        """Show an epoch, given its record in metrics.jsonl."""
        if self.bar:
            self.bar.close()
            self.bar = None
        if self.rows == 0:
            names = " ".join(f"{f'{width}b':>6}" for width in self.bit_widths)
            log.info(f"{'epoch':>7} {'lr':>7} {'loss':>7} | train {names} | val {names} | "
                     f"{'images/s':>8} {'eta':>8}")

        self.rows += 1
        eta = (time.monotonic() - self.started) / self.rows * (self.epochs - record["epoch"])
        train = self.cells(record["train"])
        val = self.cells(record["val"])
        epoch = f"{record['epoch']}/{self.epochs}"
        log.info(f"{epoch:>7} {record['lr']:7.2g} {mean_loss(record['train']):7.4f} | train {train}"
                 f" | val {val} | {record['images_per_second']:8.0f} "
                 f"{datetime.timedelta(seconds=round(eta))!s:>8}")

    def cells(self, averages: dict[BitWidth, dict[str, float]]) -> str:
        """Return the top-1 of each bit-width, aligned; "-" for one without images."""
        return " ".join(f"{averages[bits]['top1']:6.2f}" if bits in averages else f"{'-':>6}"
                        for bits in self.bit_widths)
