"""Several processes as one run, launched by torchrun; with one process these do nothing."""
import contextlib
import datetime
import itertools
import os
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
FROM_RANK_ZERO = partial(dist.broadcast, src=0)


class ProcessError(Exception):
    """The processes of a run cannot connect, or have lost each other."""


def check_launch() -> None:
    """Raise ProcessError where the variables that torchrun sets are no numbers, or do not fit."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_MAX_RESTARTS"):
        text = os.environ.get(name)
        if text and not text.isdecimal():
            raise ProcessError(f"{name} is {text!r} in the environment, not a whole number from 0 "
                               "up: unset it, or start with torchrun, which sets it")
    if rank() >= world_size():
        raise ProcessError(f"RANK is {rank()} in the environment, and WORLD_SIZE only "
                           f"{world_size()}: unset both, or start with torchrun, which sets them")


def rank() -> int:
    """Return the index of this process, from 0; rank 0 writes files and logs."""
    return int(os.environ.get("RANK") or 0)


def world_size() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE") or 1)


@contextlib.contextmanager
def processes(device: torch.device, timeout: int) -> Iterator[None]:
    """Connect the processes of the run, by NCCL on GPUs and gloo on CPUs.

    timeout: seconds to wait for another process. Raises ProcessError where one dies or is silent
    for that long; NCCL then ends the process from a thread of its own.
    """
    if world_size() == 1:
        yield
        return
    limit = datetime.timedelta(seconds=timeout)
    try:
        # torchrun's store outlives a restart: a prefix separates the entries of each start.
        store, *_ = next(dist.rendezvous("env://", timeout=limit))
        prefix = f"restart{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        store = dist.PrefixStore(prefix, store)
        Downloads.store = dist.PrefixStore("downloads", store)
        on_gpu = device.type == "cuda"
        dist.init_process_group(
            "nccl" if on_gpu else "gloo", store=store, rank=rank(), world_size=world_size(),
            timeout=limit, device_id=device if on_gpu else None)
        yield
        dist.destroy_process_group()  # not after an error, when it could wait for stuck processes
    except (ValueError, RuntimeError) as error:  # torch's own errors among them
        text = str(error).lower()
        words = ("gloo", "nccl", "connection", "timed out", "timeout", "socket", "rendezvous")
        is_known = is_of_distributed(error) and any(word in text for word in words)
        if not isinstance(error, dist.DistError) and not is_known:
            raise
        raise ProcessError(f"process {rank()} of {world_size()} lost the others "
                           f"({text.splitlines()[0][:200]}): see the first error above, and start "
                           "them with torchrun") from None


def is_of_distributed(error: Exception) -> bool:
    """Return whether torch.distributed raised an error, and not a user's own code."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").startswith("torch.distributed")


class Downloads:
    """Where the processes of a run say which downloads have ended."""
    store: dist.Store
    numbers = itertools.count()  # of the downloads, the same on all processes


@contextlib.contextmanager
def local_rank_zero_first() -> Iterator[None]:
    """Run the context on the first process of each machine, then on the others: for downloads.

    These wait for as long as it takes; torchrun ends them where another process dies. Raises
    ProcessError where one of the first fails.
    """
    if world_size() == 1:
        yield
        return
    first = int(os.environ.get("LOCAL_RANK") or 0) == 0
    number = next(Downloads.numbers)
    awaited = {index: f"{number}/{index}" for index, is_first in enumerate(gather(first))
               if is_first}
    if first:
        outcome = "failed"
        try:
            yield
            outcome = "done"
        finally:
            Downloads.store.set(awaited[rank()], outcome)
    while not Downloads.store.check(list(awaited.values())):
        time.sleep(0.1)
    for index, key in awaited.items():
        if Downloads.store.get(key) != b"done":
            raise ProcessError(f"process {index} failed: see its error above")
    if not first:
        yield


def check_same(values: dict[str, object]) -> None:
    """Raise ProcessError naming the first of some values that is not the same in all processes."""
    first, *others = gather({name: str(value) for name, value in values.items()})
    for index, own in enumerate(others, start=1):
        for name in {**first, **own}:
            if first.get(name) != own.get(name):
                raise ProcessError(f"{name} is {first.get(name)} in process 0, and {own.get(name)} "
                                   f"in process {index}: start all with the same command, on the "
                                   "same data, and with a results folder that all see")


def gather(value: T) -> list[T]:
    """Return the values of all processes, in order of rank."""
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
    """Return, for each boolean, whether it is true on any process. Waits for all processes."""
    return [any(flag) for flag in zip(*gather(flags))]


def wait() -> None:
    """Wait until all processes have called this."""
    if world_size() > 1:
        dist.barrier()


def exchange_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Sum the gradients over the processes, in place, in one collective.

    Each process scales its loss by its fraction of the batch, so that the sum is the gradient of
    the mean. A gradient that is None counts as zero; where it is None on all processes it stays
    None, so that the optimizer skips it as in a single process. Synchronizes where one is None.
    """
    if world_size() == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        return
    absent = [index for index, parameter in enumerate(trained) if parameter.grad is None]
    gradients = [torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                 for parameter in trained]

    present = gradients[0].new_ones(len(trained))
    for index in absent:
        present[index].zero_()  # does not synchronize
    exchange([*gradients, present], dist.all_reduce)
    if absent:
        counts = present.tolist()  # of processes that have each one; synchronizes
        for index in absent:
            if counts[index] > 0:
                trained[index].grad = gradients[index]


def broadcast_parameters(model: torch.nn.Module) -> None:
    """Overwrite the parameters of all processes with rank 0's."""
    exchange(list(model.parameters()), FROM_RANK_ZERO)


def broadcast_buffers(model: torch.nn.Module) -> None:
    """Overwrite BatchNorm statistics with rank 0's, as the published multi-GPU training does.

    And parameters without gradient, as a quantizer's statistics per bit-width may be.
    """
    fixed = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    tensors = [*model.buffers(), *fixed]
    for integers in (False, True):  # batch counts cannot be concatenated with the rest
        exchange([tensor for tensor in tensors if tensor.is_floating_point() != integers],
                 FROM_RANK_ZERO)


@torch.no_grad()
def exchange(tensors: list[Tensor], collective: Callable[[Tensor], object]) -> None:
    """Run an in-place collective once, on the concatenation of tensors of one type."""
    if tensors and world_size() > 1:
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        collective(flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(tensors, [part.view_as(t) for part, t in zip(parts, tensors)])
