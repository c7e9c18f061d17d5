"""Loss and accuracy per bit-width."""
import torch

from engine.distributed import rank, sum_over_processes
from engine.errors import UserError


class Metrics:
    """Sums of loss and of top-1 and top-5 hits per bit-width, on the device until they are read."""

    def __init__(self, bit_widths, device):
        self.sums = torch.zeros(len(bit_widths), 3, dtype=torch.float64, device=device)
        self.bit_widths = sorted(bit_widths)
        self.count = 0  # images seen
        self.steps = 0
        self.seconds = 0.0  # spent on them
        self.unread = []  # the (bit_widths,) losses since the last check_finite

    def add(self, results, labels):
        """Add a batch: {bits: (mean loss, logits (N, classes))} and labels (N,). Does not wait."""
        losses, logits = zip(*(results[bits] for bits in self.bit_widths))
        losses, logits = torch.stack(losses), torch.stack(logits)  # logits (bit_widths, N, classes)
        k = min(5, logits.shape[2])  # with fewer than 5 classes top-5 is always right
        hits = logits.topk(k, dim=2).indices == labels[:, None]  # (bit_widths, N, k)
        sums = losses * len(labels), hits[..., 0].sum(1), hits.sum((1, 2))
        self.sums += torch.stack(sums, dim=1)
        self.unread.append(losses)
        self.count += len(labels)
        self.steps += 1

    def check_finite(self, what):
        """Raise UserError naming `what` and the first loss that is not finite. Waits."""
        if not self.unread:
            return
        finite = torch.stack(self.unread).isfinite().tolist()  # synchronises
        first = self.steps - len(self.unread) + 1
        self.unread = []
        for step, row in enumerate(finite, start=first):
            for bits, good in reversed(list(zip(self.bit_widths, row))):  # as they are run
                if not good:
                    raise UserError(
                        f"{what}: the {bits}-bit loss is not finite at step {step}: lower --lr, or "
                        "look at the data; the last good checkpoint is kept")

    def averages(self):
        """Return {bits: {"loss", "top1", "top5"}} over all processes, top-k in percent. Waits."""
        totals = self.state_dict()
        table = (totals["sums"] / totals["count"]).tolist()
        return {bits: {"loss": loss, "top1": 100 * top1, "top5": 100 * top5}
                for bits, (loss, top1, top5) in zip(self.bit_widths, table)}

    def state_dict(self):
        """Return the sums and count over all processes, each of which must ask. Waits."""
        counted = torch.cat([self.sums.flatten(), self.sums.new_tensor([self.count])])
        total = sum_over_processes(counted)
        return {"sums": total[:-1].view_as(self.sums), "count": int(total[-1]),
                "steps": self.steps, "seconds": self.seconds}

    def load_state_dict(self, state):
        """Restore saved sums, on rank 0; other processes have counted none of them."""
        self.steps, self.seconds = state["steps"], state["seconds"]
        if rank() == 0:
            self.sums.copy_(state["sums"])
            self.count = state["count"]


def mean_loss(averages):
    return sum(values["loss"] for values in averages.values()) / len(averages)
