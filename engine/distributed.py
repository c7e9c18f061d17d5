"""Several processes as one run, started by torchrun; with one process all of it does nothing."""
import contextlib
import datetime
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class ProcessError(Exception):
    """The processes of a run cannot be joined, or lost each other."""


def rank() -> int:
    """Return this process's number, from 0; rank 0 writes."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def processes(device: torch.device, timeout: int) -> Iterator[None]:
    """Join the processes of the run, by NCCL on GPUs and gloo on CPUs.

    timeout: seconds that one waits for the others; with gloo a ProcessError follows, NCCL ends the
    process from a thread of its own. Raises ProcessError where another process dies.
    """
    if world_size() == 1:
        yield
        return
    limit = datetime.timedelta(seconds=timeout)
    try:
        # torchrun's store outlives a restart: a prefix keeps apart what was left in it.
        store, *_ = next(dist.rendezvous("env://", timeout=limit))
        prefix = f"restart{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        on_gpu = device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", store=dist.PrefixStore(prefix, store), rank=rank(),
            world_size=world_size(), timeout=limit, device_id=device if on_gpu else None)
        yield
        dist.destroy_process_group()  # not after an error: it could wait for stuck processes
    except (ValueError, RuntimeError) as error:  # torch's own errors among them
        text = str(error).lower()
        words = ("gloo", "nccl", "connection", "timed out", "timeout", "socket", "rendezvous")
        if not any(word in text for word in words):
            raise
        raise ProcessError(f"process {rank()} of {world_size()} lost the others "
                           f"({text.splitlines()[0][:200]}): see the first error above, and start "
                           "them with torchrun") from None


@contextlib.contextmanager
def one_at_a_time_per_machine() -> Iterator[None]:
    """Let the first process of each machine go first, such as to download, then the others."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    if not first:
        wait()
    yield
    if first:
        wait()


def gather(value: T) -> list[T]:
    """Return every process's value, as a list by rank."""
    values = [value] * world_size()
    if world_size() > 1:
        dist.all_gather_object(values, value)
    return values


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Return the sum of `tensor` over the processes, as a new tensor."""
    total = tensor.clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def any_process(flags: list[bool]) -> list[bool]:
    """Return, for each of the booleans, whether it is true on any process. Waits for all."""
    return [any(flag) for flag in zip(*gather(flags))]


def wait() -> None:
    """Wait until every process has come here."""
    if world_size() > 1:
        dist.barrier()


def exchange_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Sum the gradients over the processes, in place, by one exchange.

    Each process weights its loss by its share of the batch: the sum is the gradient of the mean.
    A gradient that is absent (None) counts as zero; absent on all processes it stays absent, so
    that an optimizer passes over it as in a single process. Waits where one is absent here.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if world_size() == 1 or not trained:
        return
    absent = [index for index, parameter in enumerate(trained) if parameter.grad is None]
    gradients = [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                 for parameter in trained]
    present = gradients[0].new_ones(len(trained))
    for index in absent:
        present[index].zero_()  # on the device, without waiting
    exchange([*gradients, present], dist.all_reduce)
    if absent:
        counts = present.tolist()  # of the processes that have it; synchronises
        for index in absent:
            if counts[index] > 0:
                trained[index].grad = gradients[index]


def broadcast_parameters(model: torch.nn.Module) -> None:
    """Give every process rank 0's parameters."""
    exchange(list(model.parameters()), broadcast)


def broadcast_buffers(model: torch.nn.Module) -> None:
    """Give every process rank 0's BatchNorm statistics, as in the published multi-GPU training."""
    for integers in (False, True):  # the counts of batches, which cannot be joined with the rest
        exchange([buffer for buffer in model.buffers() if buffer.is_floating_point() != integers],
                 broadcast)


def broadcast(tensor: Tensor) -> None:
    """Overwrite a tensor with rank 0's."""
    dist.broadcast(tensor, 0)


@torch.no_grad()
def exchange(tensors: list[Tensor], collective: Callable[[Tensor], object]) -> None:
    """Run an in-place collective once on tensors of one type, joined."""
    if tensors and world_size() > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        collective(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [part.view_as(t) for part, t in zip(parts, tensors)])
