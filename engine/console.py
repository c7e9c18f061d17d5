"""The progress on the console: a bar or lines within an epoch, then one aligned row."""
import shutil
import sys
import textwrap
import time

from tqdm import tqdm

from engine.metrics import Metrics, mean_loss
from engine.run_folder import log
from models import BitWidth

COLUMNS = 100  # where there is no terminal
HEADER_EVERY = 20  # rows


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
        self.skipped = 0.0  # of the first epoch, which a resumed run did before
        self.started = time.monotonic()

    def step(self, epoch: int, metrics: Metrics) -> None:
        """Show a step of `epoch`, counted from 0; waits for the device at log points.

        The first step of an epoch is one, but without a bar only that of the first epoch is shown.
        """
        name = f"epoch {epoch + 1}/{self.epochs}"
        is_first = self.bar is None
        if is_first:
            if self.rows == 0:
                self.skipped = (metrics.steps - 1) / self.steps
            self.bar = tqdm(desc=name, total=self.steps, unit="step", initial=metrics.steps - 1,
                            leave=False, file=sys.stdout, disable=not self.shows_bar)
        self.bar.update()
        is_log_point = metrics.steps % self.print_freq == 0
        if not is_log_point and not is_first:
            return

        averages = metrics.averages()  # over all processes
        loss = f"loss {mean_loss(averages):.4f}"
        self.bar.set_postfix_str(loss)
        if not self.shows_bar and (is_log_point or self.rows == 0):
            top1 = "  ".join(f"{bits}b:{values['top1']:.2f}" for bits, values in averages.items())
            log.info(fitted(f"{name}  step {metrics.steps}/{self.steps}  {loss}  top-1 {top1}"))

    def row(self, record: dict) -> None:
        """Show an epoch, given its record in metrics.jsonl: losses are means over bit-widths."""
        self.close()
        epoch = f"{record['epoch']}/{self.epochs}"
        speed = record["images_per_second"]
        taken = time.monotonic() - self.started
        per_epoch = taken / (self.rows + 1 - self.skipped)
        eta = duration(per_epoch * (self.epochs - record["epoch"]))
        width = max(5, 2 * len(str(self.epochs)) + 1)
        start = f"{epoch:>{width}} {record['lr']:7.2g} {mean_loss(record['train']):6.3f} "
        start += f"{mean_loss(record['val']):8.3f} "
        end = f"{speed:6.{1 if speed < 10 else 0}f} {eta:>6}"
        room = columns() - len(start) - len(end)
        decimals = 2 if room >= 7 * len(self.bit_widths) else 1
        size = decimals + 4  # of 100.00
        per_line = max(1, room // (size + 1))
        cells = [f"{record['val'][bits]['top1']:{size}.{decimals}f}" for bits in self.bit_widths]

        if self.rows % HEADER_EVERY == 0:
            names = [f"{f'{bits}b':>{size}}" for bits in self.bit_widths]
            header = f"{'epoch':>{width}} {'lr':>7} {'loss':>6} {'val loss':>8} "
            log.info(in_lines(header, names, f"{'img/s':>6} {'eta':>6}", per_line))
        self.rows += 1
        log.info(in_lines(start, cells, end, per_line))

    def close(self) -> None:
        """Remove the bar, if there is one."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def columns() -> int:
    """Return the width of the terminal, or of the lines where there is none."""
    return shutil.get_terminal_size((COLUMNS, 24)).columns


def in_lines(start: str, cells: list[str], end: str, per_line: int) -> str:
    """Return start, cells and end as one line, but with the cells from `per_line` on below."""
    rest = [" " * len(start) + " ".join(cells[first:first + per_line])
            for first in range(per_line, len(cells), per_line)]
    return "\n".join([f"{start}{' '.join(cells[:per_line])} {end}", *rest])


def fitted(text: str) -> str:
    """Return text in lines that fit, broken at spaces; the second and later ones are indented."""
    return textwrap.fill(text, columns(), subsequent_indent="    ", break_long_words=False,
                         break_on_hyphens=False)


def duration(seconds: float) -> str:
    """Return a duration in its two largest units, in at most 6 characters: 1m05s, 2h10m, 3d04h."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"
