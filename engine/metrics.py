"""Loss and accuracy per bit-width."""
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.distributed import rank, sum_over_processes
from engine.errors import UserError
from models import Width
from models.fields import is_dense, is_finite_number, is_whole, take

METRICS = "metrics' "  # before a field's name


class Metrics:
    """Sums of loss and of top-1 and top-5 hits per bit-width, which stay on the device until read.

    A step may leave bit-widths out: each is averaged over the images that it was given.
    """

    def __init__(self, bit_widths: Sequence[Width], device: torch.device):
        self.sums = torch.zeros(len(bit_widths), 3, dtype=torch.float64, device=device)
        self.bit_widths = sorted(bit_widths)
        self.counts = dict.fromkeys(self.bit_widths, 0)  # images of each
        self.count = 0  # images of all steps
        self.steps = 0
        self.seconds = 0.0  # spent on the steps
        self.unread = []  # a step's (bit-widths, losses), since the last check_finite

    def add(self, results: dict[Width, tuple[Tensor, Tensor]], labels: Tensor) -> None:
        """Add a batch without synchronizing.

        results: {bit-width: (mean loss, logits (N, classes))}. labels: (N,).
        """
        visited = [bits for bits in self.bit_widths if bits in results]
        losses = torch.stack([results[bits][0] for bits in visited])
        logits = torch.stack([results[bits][1] for bits in visited])  # (visited, N, classes)
        k = min(5, logits.shape[2])  # with fewer than 5 classes top-5 is always a hit
        hits = logits.topk(k, dim=2).indices == labels[:, None]  # (visited, N, k)
        sums = torch.stack((losses * len(labels), hits[..., 0].sum(1), hits.sum((1, 2))), dim=1)
        if len(visited) == len(self.bit_widths):
            self.sums += sums
        else:
            for bits, row in zip(visited, sums):
                self.sums[self.bit_widths.index(bits)] += row
        for bits in visited:
            self.counts[bits] += len(labels)
        self.unread.append((visited, losses))
        self.count += len(labels)
        self.steps += 1

    def check_finite(self, what: str) -> None:
        """Raise UserError naming `what` and the first loss that is not finite. Synchronizes."""
        if not self.unread:
            return
        unread = self.unread
        self.unread = []
        losses = torch.cat([losses for _, losses in unread])
        finite = iter(losses.isfinite().tolist())  # synchronizes
        for step, (visited, _) in enumerate(unread, start=self.steps - len(unread) + 1):
            found = [(bits, next(finite)) for bits in visited]
            for bits, is_finite in reversed(found):  # in the order in which they ran
                if not is_finite:
                    raise UserError(
                        f"{what}: the {bits}-bit loss is not finite at step {step}: train with a "
                        "lower --lr, or look at the data; what was saved before is kept")

    def averages(self) -> dict[Width, dict[str, float]]:
        """Return {bit-width: {"loss", "top1", "top5"}} over all processes, top-k in percent.

        Omits a bit-width without images. Synchronizes.
        """
        totals = self.state_dict()
        averages = {}
        for bits, sums, count in zip(self.bit_widths, totals["sums"].tolist(), totals["counts"]):
            if count:
                loss, top1, top5 = (value / count for value in sums)
                averages[bits] = {"loss": loss, "top1": 100 * top1, "top5": 100 * top5}
        return averages

    def state_dict(self) -> dict[str, Tensor | list[int] | int | float]:
        """Return sums and counts over all processes, all of which must call it. Synchronizes."""
        counted = self.sums.new_tensor([*self.counts.values(), self.count])
        total = sum_over_processes(torch.cat([self.sums.flatten(), counted]))
        sums, counts, count = total.split([self.sums.numel(), len(self.counts), 1])
        return {"sums": sums.view_as(self.sums), "counts": list(map(int, counts.tolist())),
                "count": int(count), "steps": self.steps, "seconds": self.seconds}

    def check_state(self, state: dict, path: str | Path, batch_size: int, num_samples: int) -> None:
        """Raise FileError naming a field that load_state_dict would not take.

        state: of the file `path`, within an epoch of num_samples images.
        """
        widths = len(self.bit_widths)
        most = -(-num_samples // batch_size)
        steps = take(path, state, "steps", lambda value: is_whole(value, most),
                     f"a number of steps up to the {most} of an epoch", METRICS)
        images = min(steps * batch_size, num_samples)
        take(path, state, "count", lambda value: value == images and is_whole(value),
             f"the {images} images of {steps} steps", METRICS)
        take(path, state, "seconds", lambda value: is_finite_number(value) and value >= 0,
             "a number of seconds", METRICS)
        take(path, state, "sums", lambda value: are_sums(value, widths),
             f"a tensor of {widths} x 3 sums", METRICS)
        if "counts" in state:
            take(path, state, "counts", lambda value: are_counts(value, widths, images),
                 f"a list of {widths} numbers of images up to {images}", METRICS)

    def load_state_dict(self, state: dict[str, Tensor | list[int] | int | float]) -> None:
        """Restore saved sums on rank 0; those of the other processes start at zero."""
        self.steps = state["steps"]
        self.seconds = state["seconds"]
        if rank() == 0:
            self.sums.copy_(state["sums"])
            self.count = state["count"]
            # Older versions saved none: every step had all bit-widths.
            counts = state.get("counts", [self.count] * len(self.bit_widths))
            self.counts = dict(zip(self.bit_widths, counts, strict=True))


def are_sums(value: object, widths: int) -> bool:
    """Return whether a value is a tensor (widths, 3) of finite sums, of hits from 0 up."""
    return (is_dense(value) and value.is_floating_point() and value.shape == (widths, 3)
            and bool(value.isfinite().all() and (value[:, 1:] >= 0).all()))


def are_counts(value: object, widths: int, most: int) -> bool:
    """Return whether a value is a list of whole numbers from 0 to `most`, one per bit-width."""
    return (isinstance(value, list) and len(value) == widths
            and all(is_whole(count, most) for count in value))


def best_key(averages: dict[Width, dict[str, float]], best_by: str) -> tuple[float, float]:
    """Return the key by which the best epoch is the maximum: two values of top-1.

    best_by: highest or mean: the value that comes first, of the highest bit-width or the mean over
    bit-widths; the other one breaks ties.
    """
    highest = averages[max(averages)]["top1"]
    mean = sum(values["top1"] for values in averages.values()) / len(averages)
    return (highest, mean) if best_by == "highest" else (mean, highest)


def mean_loss(averages: dict[Width, dict[str, float]]) -> float:
    """Return the mean loss over the bit-widths in `averages`."""
    return sum(values["loss"] for values in averages.values()) / len(averages)
