"""The device of a run."""
import os
import platform
import re
import sys
import warnings
from pathlib import Path

import torch

from engine.errors import UserError
from utils import one_line


def choose_device(name):
    """Return the device called `name`: auto, cpu, cuda or cuda:i.

    auto and cuda take the GPU with the most free memory; of several processes, each takes the GPU
    of its number. Raises UserError where there is no such GPU.
    """
    if name == "cpu" or name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"device {name} is not here: torch sees no CUDA GPU; choose cpu or auto")
    if name in ("auto", "cuda"):
        name = f"cuda:{os.environ.get('LOCAL_RANK') or freest_gpu()}"
    present = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if name not in present:
        raise UserError(f"device {name} is not here: choose from {', '.join(present)}, cpu, auto")
    return torch.device(name)


def freest_gpu():
    """Return the index, among the GPUs that torch sees, of the one with the most free memory."""
    if torch.cuda.device_count() == 1:
        return 0
    import gpustat

    try:
        free = {gpu.uuid.removeprefix("GPU-"): gpu.memory_total - gpu.memory_used
                for gpu in gpustat.new_query()}
    except Exception as error:  # the driver's library may be missing or refuse
        print(f"gpustat could not tell which GPU is free ({error}): taking cuda:0", file=sys.stderr)
        return 0
    uuids = [str(torch.cuda.get_device_properties(index).uuid)
             for index in range(torch.cuda.device_count())]
    return max(range(len(uuids)), key=lambda index: free.get(uuids[index], -1))


def describe(device):
    """Return the device's name for people."""
    if device.type == "cuda":
        return f"{device}: {torch.cuda.get_device_name(device)}"
    cpuinfo = Path("/proc/cpuinfo")  # of Linux
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*: (.*)", text, re.MULTILINE)
    name = found[1] if found else platform.processor() or platform.machine()
    return f"cpu: {name}, {torch.get_num_threads()} threads"


def missing_compiler(device):
    """Return why torch.compile does not work here, or None where it does. Takes seconds."""
    import torch._inductor.config  # only here, as it takes its time

    try:
        # Without caches: what was compiled before tells nothing. torch warns that they are off.
        with warnings.catch_warnings(), torch._inductor.config.patch(force_disable_caches=True):
            warnings.simplefilter("ignore")
            torch.compile(lambda x: (x + 1).sin())(torch.zeros(64, device=device))
    except Exception as error:  # no C++ compiler, no Triton, no permission for the cache
        return one_line(error)
    finally:
        torch._dynamo.reset()
    return None
