"""Several processes as one run: what torchrun starts, over torch.distributed. With one process all of it is a no-op."""
import contextlib
import datetime
import os
import socket

import psutil
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_reduce as all_reduce_with_gradient

from errors import UserError
from models.quan_ops import BatchNorm2d


def rank():
    """This process's number, from 0; rank 0 writes."""
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank():
    """This process's number on its machine, and so its GPU's."""
    return int(os.environ.get("LOCAL_RANK", 0))


def restarts():
    """How often torchrun has started this run again after a process died (--max-restarts)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def launch():
    """What tells this launch of torchrun from every other, and stays over its restarts; None without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    launcher = psutil.Process(os.getppid())
    return f"{socket.gethostname()} {launcher.pid} {launcher.create_time()}"


@contextlib.contextmanager
def processes(device, timeout):
    """Within it the processes of the run are joined: by NCCL on GPUs, gloo on CPUs.

    timeout: seconds that one waits for the others. UserError where another process dies or keeps silent.
    """
    if world_size() == 1:
        yield
        return
    try:
        limit = datetime.timedelta(seconds=timeout)
        # torchrun's store outlives a restart: a prefix keeps apart what the processes before have left in it.
        store, *_ = next(dist.rendezvous("env://", timeout=limit))
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", store=dist.PrefixStore(f"restart{restarts()}", store),
            rank=rank(), world_size=world_size(), timeout=limit)
        yield
        dist.destroy_process_group()  # not after an error: it could wait for processes that are stuck
    except (KeyError, ValueError) as error:
        if dist.is_initialized():
            raise
        raise UserError(f"WORLD_SIZE is {world_size()}, but the processes cannot be joined ({error}): start them with "
                        "torchrun") from None
    except (dist.DistError, RuntimeError) as error:
        text = str(error).lower()
        if not any(word in text for word in ("gloo", "nccl", "connection", "timed out", "timeout", "socket")):
            raise
        raise UserError(f"process {rank()} of {world_size()} lost the others ({text.splitlines()[0][:200]}): see "
                        "the first error above") from None


@contextlib.contextmanager
def one_at_a_time_per_machine():
    """Within it the first process of each machine goes first, such as to download, then the others."""
    if world_size() > 1 and local_rank() > 0:
        dist.barrier()
    yield
    if world_size() > 1 and local_rank() == 0:
        dist.barrier()


def from_first(value):
    """rank 0's value, on every process."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def gather(value):
    """Every process's value, as a list by rank."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_processes(tensor):
    """The sum of `tensor` over the processes, as a new tensor."""
    total = tensor.clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def wait():
    """Until every process has come here."""
    if world_size() > 1:
        dist.barrier()


def exchange_gradients(parameters, flags):
    """Sum the gradients over the processes, in place, in one exchange; returns the sum of the tensor `flags`, too.

    Each process's loss has been weighted by its share of the batch, so the sum is the gradient of the batch's mean.
    """
    if world_size() == 1:
        return flags
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), flags.to(gradients[0])])
    dist.all_reduce(flat)
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start:start + gradient.numel()].view_as(gradient))
        start += gradient.numel()
    return flat[start:]


def share_buffers(model):
    """Give every process rank 0's BatchNorm statistics, as the published multi-GPU training evaluates and saves them."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


class SyncBatchNorm2d(BatchNorm2d):
    """BatchNorm2d whose training statistics are those of the batch over all processes, on CPUs too (torch's own
    SyncBatchNorm works on GPUs alone)."""

    def link(self, shape):
        return super().link(shape) if world_size() == 1 else None

    def forward(self, x):  # (N, C, H, W)
        if not self.training or world_size() == 1:
            return super().forward(x)
        count = x.new_full((1,), x.numel() / x.shape[1])
        totals = all_reduce_with_gradient(torch.cat([x.sum((0, 2, 3)), count]))
        count = totals[-1].detach()
        mean = totals[:-1] / count
        centred = x - mean[:, None, None]
        var = all_reduce_with_gradient(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            momentum = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(var * (count / (count - 1)), momentum)
        return centred * (self.weight * (var + self.eps).rsqrt())[:, None, None] + self.bias[:, None, None]


def synchronise_batch_norm(model):
    """Make every BatchNorm of the model a SyncBatchNorm2d, in place; its state stays."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.__class__ = SyncBatchNorm2d
