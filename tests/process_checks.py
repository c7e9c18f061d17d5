"""What test_distributed.py has two processes do, as torchrun would start them but forked.

main(folder) writes what it found to found.pt there, and trains into digits and imagenet there.
"""
import copy
import json
import os
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from PIL import Image

import reference
import runs
import small_networks
import tiny_data
import train
from dataset.data import DATASETS, DataError, get_dataset
from engine import distributed
from engine.arguments import merge_args, parse_flags
from engine.errors import StopRequest
from engine.evaluation import evaluate
from engine.forward_pass import ForwardPass
from engine.metrics import Metrics
from engine.setup import make_val_loader
from models.losses import NEXT_TARGET, any_precision_backward
from models.sharing import no_sharing

CPU = torch.device("cpu")
WIDTHS = [2, 8, 32]
MANY = [1, 2, 4, 8, 32]
PER_STEP = 3  # of MANY
STEPS = 3

DIGITS = ["--dataset", "digits", "--model", "svhnq", "--width", "1", "--bit_width_list", "2,32",
          "--train-fraction", "0.08", "--batch-size", "16", "--epochs", "3", "--optimizer", "adam",
          "--lr", "0.001", "--lr_decay", "2", "--weight-decay", "0", "--workers", "0",
          "--device", "cpu", "--save-every", "1e-9", "--print-freq", "2"]  # 8 steps per epoch
IMAGENET = ["--dataset", "imagenet", "--model", "bottlenecks", "--width", "1", "--bit_width_list",
            "2,32", "--epochs", "1", "--batch-size", "4", "--workers", "1", "--device", "cpu"]


def model(bit_widths=WIDTHS):
    return reference.fill(small_networks.ResNet8(bit_widths, width=1).double(), seed=0)


def batch(step, size):
    """Return float64 images and labels of a step."""
    return reference.values(f"images{step}", (size, 3, 12, 12), 0), torch.arange(size) % 10


def optimizer_of(net):
    return torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)


def parameters_of(net):
    return {key: value.detach().clone() for key, value in net.named_parameters()}


def alone(net, loss, size, shares, widths_of=lambda step: WIDTHS):
    """Take STEPS steps in one process, which works on each batch's shares (slices) in turn.

    widths_of: the bit-widths of a step.
    """
    optimizer = optimizer_of(net)
    for step in range(STEPS):
        images, labels = batch(step, size)
        optimizer.zero_grad()
        for share in shares:
            part = len(labels[share]) / size
            any_precision_backward(net, images[share], labels[share], widths_of(step), loss,
                                   part, sharing=no_sharing)
        optimizer.step()
    return parameters_of(net)


class Batches(list):
    """What train_one_epoch needs of a loader: this process's shares, and each batch's size."""

    def __init__(self, size):
        share = slice(distributed.rank(), None, distributed.world_size())
        super().__init__([part[share] for part in batch(step, size)] for step in range(STEPS))
        self.batch_sampler = Sampler(size)


class Sampler:
    def __init__(self, batch_size):
        self.batch_size = batch_size

    def __len__(self):
        return STEPS

    def size(self, step):
        return self.batch_size


def together(net, loss, size, bit_widths=WIDTHS, per_step=None):
    """Take the same steps by train.py's own loop, on every process."""
    state = SimpleNamespace(model=net, optimizer=optimizer_of(net), bit_widths=bit_widths,
                            device=CPU, metrics=Metrics(bit_widths, CPU), epoch=0,
                            arguments={"widths_per_step": per_step, "seed": 0})
    console = SimpleNamespace(print_freq=50, step=lambda epoch, metrics: None)
    run = SimpleNamespace(save_is_due=lambda: False)
    step = partial(train.take_step, state, ForwardPass(net, CPU), loss)
    train.train_one_epoch(state, Batches(size), step, console, run, StopRequest())
    return parameters_of(net)


def counted_exchanges():
    """Return a list that gets the size of every tensor that is summed over the processes."""
    sizes, all_reduce = [], dist.all_reduce

    def counted(tensor, *args, **kwargs):
        sizes.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counted
    return sizes


def steps():
    """Train with every loss, and count the exchanges."""
    sizes = counted_exchanges()
    found = {("own statistics", loss): together(model(), loss, 6) for loss in NEXT_TARGET}
    found["exchanges"] = list(sizes)
    return found


def some_bit_widths():
    """Train with PER_STEP of MANY bit-widths a step."""
    return {"widths per step": together(model(MANY), "recursive", 6, MANY, PER_STEP)}


def widths_of(rank):
    """Return the bit-widths that a process visits in `gradients`: 1 and 4 are no one's."""
    return [[2, 32], [8, 32]][rank]


def gradients_of(net, rank):
    """Return net with the gradients of a process's part of a batch, at its bit-widths."""
    images, labels = batch(0, 6)
    share = slice(rank, None, 2)
    any_precision_backward(net, images[share], labels[share], widths_of(rank), loss_scale=0.5)
    return net


def gradients():
    """Exchange the gradients of different bit-widths; return them by name."""
    net = gradients_of(model(MANY), distributed.rank())
    net.layers[0].conv0.weight.grad = None
    net.fc.bias.requires_grad_(False)
    net.fc.bias.grad = None
    distributed.exchange_gradients(list(net.parameters()))
    return {"gradients": distributed.gather(
        {name: parameter.grad for name, parameter in net.named_parameters()})}


def initial_values(folder):
    """Begin a run whose network depends on the process, then save one whose statistics do."""
    args = merge_args(parse_flags(DIGITS))
    state, forward_pass, train_loader, _ = train.make_run(args, CPU)
    add_rank(state.model.state_dict().values())
    train.load_initial_state(state, args, None, forward_pass, train_loader)
    found = {"started": distributed.gather(copy.deepcopy(state.model.state_dict()))}
    add_rank(state.model.buffers())
    state.save(folder / "statistics")
    found["saved"] = distributed.gather(copy.deepcopy(state.model.state_dict()))
    distributed.broadcast_buffers(state.model)
    return {**found, "shared": distributed.gather(state.model.state_dict())}


@torch.no_grad()
def add_rank(tensors):
    for tensor in tensors:
        tensor += distributed.rank()


def images():
    """Return 1,001 images (N, 12, 12, 3) uint8, and labels (N,)."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (1001, 12, 12, 3), dtype=torch.uint8, generator=generator)
    return pixels, torch.randint(10, (1001,), generator=generator)


def evaluation():
    """Evaluate on the images by train.py's loader, of which one process has a batch more."""
    pixels, labels = images()
    dataset = [(Image.fromarray(image.numpy()), int(label)) for image, label in zip(pixels, labels)]
    args = merge_args(parse_flags(["--dataset", "cifar10", "--model", "resnet8q",
                                   "--batch-size", "50"]))
    net = model().float()
    forward_pass = ForwardPass(net, CPU)
    DATASETS["cifar10"] = DATASETS["cifar10"]._replace(image_size=12)
    loader = make_val_loader(args, dataset, forward_pass.memory_format, CPU)
    own = torch.cat(loader.indices).tolist()
    return {"results": evaluate(forward_pass, loader, WIDTHS, CPU),
            "seen": sorted(sum(distributed.gather(own), [])),
            "batches": distributed.gather(len(loader))}


def turns():
    """Take turns, twice; return what each process saw of the other's."""
    found = []
    for turn in range(2):
        with distributed.local_rank_zero_first():
            found.append(distributed.Downloads.store.add(f"turn{turn}", 1))
    return {"turns": distributed.gather(found)}


def first_fails():
    """Let the first process fail in its turn; return 1 there, 2 where the other ends by itself."""
    try:
        with distributed.processes(CPU, 120):
            with distributed.local_rank_zero_first():
                raise DataError("no network")
    except distributed.ProcessError:
        return 2
    except DataError:
        return 1


def check(folder):
    with distributed.processes(CPU, 120):
        found = {**steps(), **some_bit_widths(), **gradients(), **initial_values(folder),
                 **evaluation(), **turns()}
        if distributed.rank() == 0:
            torch.save(found, folder / "found.pt")
    return 0


def as_rank(rank, port, function):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                      TORCHELASTIC_USE_AGENT_STORE="True")
    return function()


def in_two_processes(function, folder, name):
    """Fork two processes, with stdout and stderr in folder/name.RANK.out and .err.

    They meet at a store of this process, as at torchrun's, whose port is free and stays taken.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [
        runs.fork(partial(as_rank, rank, store.port, function), folder / f"{name}.{rank}.out",
                  folder / f"{name}.{rank}.err") for rank in range(2)]
    return [runs.wait(process) for process in processes]


def main(folder):
    torch.set_num_threads(1)
    small_networks.register(pytest.MonkeyPatch())
    # Real JPEG files, grey, CMYK and palette ones among them.
    tiny_data.imagenet(folder / "data", classes=("n01440764", "n01443537"), per_class=4)
    imagenet = [*IMAGENET, "--data-dir", folder / "data"]
    get_dataset("digits", "train")  # imports scikit-learn once, too
    (folder / "ends").mkdir()  # where torch warns, too
    ends = in_two_processes(first_fails, folder / "ends", "fails")
    (folder / "ends.json").write_text(json.dumps(ends))
    codes = in_two_processes(partial(check, folder), folder, "check")
    for name, flags in (("digits", DIGITS), ("imagenet", imagenet)):
        training = partial(runs.run, [*flags, "--results-dir", folder / name])
        codes += in_two_processes(training, folder, name)
    for path in folder.glob("*.err"):
        print(path.read_text(), end="", file=sys.stderr)
    return any(codes)
