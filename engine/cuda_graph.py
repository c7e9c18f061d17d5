"""--cuda-graph: a training step recorded once as a CUDA graph, and from then on replayed.

Launching its kernels from Python takes longer than a GPU takes to run them.
"""
import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence

import numpy
import torch
from torch import Tensor

from engine.errors import UserError
from models import BitWidth

Results = dict[BitWidth, tuple[Tensor, Tensor]]
WARM_UP = 2  # steps before the recording: they choose algorithms, compile, and fill the optimizer


class GraphStep:
    """A step of training, which it replaces: recorded after WARM_UP steps, and then replayed.

    Batches of another size than batch_size are computed eagerly. What Python computes in a step is
    recorded with it, and does not change afterwards, except learning rates: those are read at each
    step, and rounded to float32, as a graph holds them.

    Args:
        step: (images, labels, bit_widths, loss_scale) -> results; the same bit-widths and scale
            for all batches of batch_size.
        optimizer: that `step` calls; a fused one.
    """

    def __init__(self, step: Callable[..., Results], optimizer: torch.optim.Optimizer,
                 batch_size: int, device: torch.device):
        check_device(device)
        self.step = step
        self.optimizer = optimizer
        self.batch_size = batch_size
        self.rates = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self.warm_up = WARM_UP
        self.replay = None

    def __call__(self, images: Tensor, labels: Tensor, bit_widths: Sequence[BitWidth],
                 loss_scale: float) -> Results:
        """Take a step; its results are overwritten by the next one's."""
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = float(numpy.float32(group["lr"]))
            rate.fill_(group["lr"])
        if len(labels) != self.batch_size:
            return self.step(images, labels, bit_widths, loss_scale)
        if self.warm_up:
            self.warm_up -= 1
            return on_another_stream(lambda: self.step(images, labels, bit_widths, loss_scale))

        if self.replay is None:
            self.images = images.clone()
            self.labels = labels.clone()
            with recordable(self.optimizer, self.rates):
                self.replay, self.results = record(
                    lambda: self.step(self.images, self.labels, bit_widths, loss_scale))
                if any(group["lr"] is not rate
                       for group, rate in zip(self.optimizer.param_groups, self.rates)):
                    raise UserError("--cuda-graph replays one step, and this step sets its "
                                    "learning rate itself: give --no-cuda-graph")
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.replay()
        return self.results


def check_device(device: torch.device) -> None:
    """Raise UserError where a device has no CUDA graphs."""
    if device.type != "cuda":
        raise UserError(f"--cuda-graph is for GPUs, and this run is on {device}: give "
                        "--no-cuda-graph")


@contextlib.contextmanager
def recordable(optimizer: torch.optim.Optimizer, rates: Sequence[Tensor]) -> Iterator[None]:
    """Have an optimizer read its learning rates from tensors, within the context."""
    before = [dict(group) for group in optimizer.param_groups]
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
        if "capturable" in group:
            group["capturable"] = True
    try:
        yield
    finally:
        for group, values in zip(optimizer.param_groups, before):
            group.update(values)


def on_another_stream(step: Callable[[], Results]) -> Results:
    """Run a step on another stream than the current one, as before a recording."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = step()
    torch.cuda.current_stream().wait_stream(stream)
    return results


def record(step: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
    """Record a step without running it; return what replays it, and where it puts its results.

    Raises UserError where it waits for the GPU, or copies from the CPU.
    """
    gc.collect()  # an earlier graph must not be freed while this one is recorded
    graph = torch.cuda.CUDAGraph()
    try:
        # Another thread may pin memory for the next batches meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = step()
    except RuntimeError as error:
        if "captur" not in str(error):
            raise
        raise UserError(f"--cuda-graph cannot record this step ({str(error).splitlines()[0]}), as "
                        "where a layer reads a value on the CPU: give --no-cuda-graph") from error
    return graph.replay, results
