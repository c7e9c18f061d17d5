"""What a person sees: in an epoch a bar on a terminal, lines elsewhere; then one aligned row."""
import datetime
import sys
import time

from tqdm import tqdm

from engine.metrics import mean_loss
from engine.run_folder import log


class Console:
    """The progress of a run of `epochs` epochs of `steps` steps, told every print_freq steps."""

    def __init__(self, bit_widths, epochs, steps, print_freq, bar):
        self.bit_widths, self.epochs, self.steps = bit_widths, epochs, steps
        self.print_freq, self.wants_bar = print_freq, bar
        self.rows, self.started, self.bar = 0, time.monotonic(), None

    def step(self, epoch, metrics):
        """Tell of a step of `epoch`, counted from 0; at log points waits for the device."""
        averages = metrics.averages() if metrics.steps % self.print_freq == 0 else None
        if self.wants_bar:
            if self.bar is None:
                self.bar = tqdm(desc=f"epoch {epoch + 1}/{self.epochs}", total=self.steps,
                                unit="step", initial=metrics.steps - 1, leave=False,
                                file=sys.stdout)
            self.bar.update()
            if averages:
                self.bar.set_postfix(loss=f"{mean_loss(averages):.4f}")
        elif averages:
            top1 = "  ".join(f"{bits}b {values['top1']:.2f}" for bits, values in averages.items())
            log.info("epoch %d/%d  step %d/%d  loss %.4f  top-1 %s", epoch + 1, self.epochs,
                     metrics.steps, self.steps, mean_loss(averages), top1)

    def row(self, record):
        """Tell of an epoch by its record of metrics.jsonl."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None
        if self.rows == 0:
            names = [f"{bits}b" for bits in self.bit_widths]
            log.info(aligned("epoch", "lr", "loss", names, names, "images/s", "left"))
        self.rows += 1
        left = (time.monotonic() - self.started) / self.rows * (self.epochs - record["epoch"])
        train, val = ([f"{record[part][bits]['top1']:.2f}" for bits in self.bit_widths]
                      for part in ("train", "val"))
        log.info(aligned(f"{record['epoch']}/{self.epochs}", f"{record['lr']:.2g}",
                         f"{mean_loss(record['train']):.4f}", train, val,
                         f"{record['images_per_second']:.0f}",
                         str(datetime.timedelta(seconds=round(left)))))


def aligned(epoch, lr, loss, train, val, speed, left):
    train, val = (" ".join(f"{cell:>6}" for cell in cells) for cells in (train, val))
    return f"{epoch:>7} {lr:>7} {loss:>7} | train {train} | val {val} | {speed:>8} {left:>8}"
