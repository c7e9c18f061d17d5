"""What tests/test_distributed.py has torchrun start: each check writes what it found to FOLDER, by rank 0.

    torchrun --standalone --nproc-per-node 2 tests/process_checks.py FOLDER steps
    torchrun --standalone --nproc-per-node 3 tests/process_checks.py FOLDER evaluation
"""
import os
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["CUDA_VISIBLE_DEVICES"] = ""
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.utils.data import TensorDataset  # noqa: E402

import distributed  # noqa: E402
import reference  # noqa: E402
import train  # noqa: E402
from models import resnet20q  # noqa: E402
from models.losses import LOSSES, any_precision_backward  # noqa: E402
from step import Computation, TrainingStep  # noqa: E402
from utils import Metrics  # noqa: E402

WIDTHS = [2, 8, 32]
STEPS = 3


def model():
    return reference.fill(resnet20q(WIDTHS, width=1).double(), seed=0)


def batch(step, size):
    """float64 images and labels of a step."""
    return reference.values(f"images{step}", (size, 3, 12, 12), 0), torch.arange(size) % 10


def optimizer_of(net):
    return torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)


def parameters_of(net):
    return {key: value.detach().clone() for key, value in net.named_parameters()}


def alone(net, loss, size, shares):
    """STEPS steps of one process that, of each batch of `size`, works on the `shares` (slices) one after the other."""
    optimizer = optimizer_of(net)
    for step in range(STEPS):
        images, labels = batch(step, size)
        optimizer.zero_grad()
        for share in shares:
            any_precision_backward(net, images[share], labels[share], WIDTHS, loss,
                                   lambda value: len(labels[share]) / size * value)
        optimizer.step()
    return parameters_of(net)


class Batches(list):
    """What train_one_epoch needs of a loader: this process's shares, and the size of each whole batch."""

    def __init__(self, size):
        share = slice(distributed.rank(), None, distributed.world_size())
        super().__init__([part[share] for part in batch(step, size)] for step in range(STEPS))
        self.batch_sampler = SimpleNamespace(size=lambda step: size)


def together(net, loss, size):
    """The same steps by train.py's own loop, on every process."""
    step = TrainingStep(Computation(net, torch.device("cpu")), optimizer_of(net), WIDTHS, loss)
    train.train_one_epoch(Batches(size), step, Metrics(WIDTHS, "cpu"), 50, "training", lambda: torch.zeros(2),
                          lambda wished: None)
    return parameters_of(net)


def steps(folder):
    """Two processes: plain, and with the statistics of the whole batch, also of a batch that does not divide."""
    calls = []
    all_reduce = dist.all_reduce

    def counted(*args, **kwargs):
        calls.append(args[0].numel())
        return all_reduce(*args, **kwargs)

    dist.all_reduce = counted

    found = {}
    for loss in LOSSES:
        found["plain", loss] = together(model(), loss, 6)
    found["exchanges"] = len(calls)
    for size in (6, 7):
        net = model()
        distributed.synchronise_batch_norm(net)
        found["sync", size] = together(net, "recursive", size)
        found["buffers", size] = dict(net.named_buffers())
    if distributed.rank() == 0:
        torch.save(found, folder / "steps.pt")


def images_1000():
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randint(256, (1000, 3, 12, 12), dtype=torch.uint8, generator=generator),
                         torch.randint(10, (1000,), generator=generator))


def evaluation(folder):
    """Any number of processes: an evaluation of 1,000 images through train.py's own loader."""
    train.get_dataset = lambda *args, **how: images_1000()
    train.get_transform = lambda *args: lambda image: image
    args = train.parse_args(["--dataset", "cifar10", "--model", "resnet20q", "--batch-size", "48"])
    loader = train.make_loader(args, torch.device("cpu"), train=False)
    results = train.evaluate(Computation(model().float(), torch.device("cpu")), loader, WIDTHS)
    seen = sorted(index for indices in distributed.gather(torch.cat(loader.indices).tolist()) for index in indices)
    if distributed.rank() == 0:
        torch.save((results, seen), folder / "evaluation.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with distributed.processes(torch.device("cpu"), 120):
        {"steps": steps, "evaluation": evaluation}[sys.argv[2]](Path(sys.argv[1]))
