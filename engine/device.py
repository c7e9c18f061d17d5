"""The device that a run computes on."""
import os
import platform
import re
import sys
from pathlib import Path

import torch

from engine.errors import UsageError, UserError


def choose_device(name: str) -> torch.device:
    """Return the device called `name`: auto, cpu, cuda or cuda:i.

    auto and cuda choose the GPU with the most free memory, or with several processes the GPU of
    the process's number. Raises UsageError for another name, UserError for a GPU that is absent.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise UsageError(f"--device {name!r} does not exist: choose auto, cpu, cuda, or one GPU "
                         "such as cuda:0")
    present = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if name in ("auto", "cuda") and len(present) > 1:
        name = f"cuda:{os.environ.get('LOCAL_RANK') or freest_gpu()}"
    name = "cpu" if name == "auto" else name
    if name not in present:
        raise UserError(f"no device {name}; available: auto, {', '.join(present)}")
    return torch.device(name)


def freest_gpu() -> int:
    """Return the index, as torch counts, of the GPU with the most free memory."""
    if torch.cuda.device_count() == 1:
        return 0
    try:
        import gpustat

        free = {gpu.uuid.removeprefix("GPU-"): gpu.memory_total - gpu.memory_used
                for gpu in gpustat.new_query()}
    except Exception as error:  # it, or the driver's library, may be missing or refuse
        print(f"gpustat could not tell which GPU is free ({error}): taking cuda:0", file=sys.stderr)
        return 0
    return max(range(torch.cuda.device_count()), key=lambda index: free.get(
        str(torch.cuda.get_device_properties(index).uuid), -1))


def describe(device: torch.device) -> str:
    """Return a description of the device for people: its index and model."""
    if device.type == "cuda":
        return f"{device}: {torch.cuda.get_device_name(device)}"
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    name = found[1] if found else platform.machine()
    threads = torch.get_num_threads()
    return f"cpu: {name}, {threads} thread{'s' if threads > 1 else ''}"
