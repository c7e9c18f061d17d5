"""The device of a run."""
import os
import platform
import sys
import warnings
from pathlib import Path

import torch

from engine.errors import UserError


def choose_device(name):
    """Return the device called `name`: auto, cpu, cuda or cuda:i.

    auto and cuda take the GPU with the most free memory; of several processes, each takes the GPU
    of its number. Raises UserError where there is no such GPU.
    """
    if name == "cpu" or name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError(f"device {name} is not here: torch sees no CUDA GPU; choose cpu or auto")
    count = torch.cuda.device_count()
    if name in ("auto", "cuda") and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    if name in ("auto", "cuda"):
        return torch.device("cuda", freest_gpu() if count > 1 else 0)
    device = torch.device(name)
    if device.index >= count:
        present = ", ".join(f"cuda:{index}" for index in range(count))
        raise UserError(f"device {name} is not here: choose from {present}, cpu, auto")
    return device


def freest_gpu():
    """Return the index, among the GPUs that torch sees, of the one with the most free memory."""
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
    return f"cpu: {processor_name()}, {torch.get_num_threads()} threads"


def processor_name():
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def missing_compiler(device):
    """Return why torch.compile does not work here, or None where it does. Takes seconds."""
    import torch._inductor.config  # only here, as it takes its time

    try:
        # Without caches: what was compiled before tells nothing. torch warns that they are off.
        with warnings.catch_warnings(), torch._inductor.config.patch(force_disable_caches=True):
            warnings.simplefilter("ignore")
            torch.compile(lambda x: (x + 1).sin())(torch.zeros(64, device=device))
    except Exception as error:  # no C++ compiler, no Triton, no permission for the cache
        text = str(error).strip().splitlines()
        return text[0] if text else type(error).__name__
    finally:
        torch._dynamo.reset()
    return None
