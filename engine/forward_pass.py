"""How a network is computed: precision, memory format, compiled or eager."""
import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from engine.distributed import any_process
from engine.errors import UserError
from models import BitWidth
from models.graph import link_inputs
from models.losses import any_precision_backward, forward_loss
from models.quan_ops import find_other_weights
from models.sharing import no_sharing, prepare_weights, shared_computation

PRECISIONS = ("fp32", "tf32", "bf16")
AUTO = "auto"  # tf32 where all processes have it, else fp32


def choose_precision(precision: str, device: torch.device) -> str:
    """Return a precision of PRECISIONS: what AUTO is on the devices of all processes, or itself."""
    if precision != AUTO:
        return precision
    has_tf32 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    lacking, = any_process([not has_tf32])
    return "fp32" if lacking else "tf32"


def check_precision(precision: str, device: torch.device) -> None:
    """Raise UserError where the device cannot compute in `precision`."""
    choice = "fp32, or bf16, which is slow on most CPUs"
    is_missing = precision == "tf32"
    if device.type == "cuda":
        choice = "fp32"
        is_recent = torch.cuda.get_device_capability(device) >= (8, 0)
        is_missing = precision != "fp32" and not is_recent
    if is_missing:
        raise UserError(f"--precision {precision} is not in the hardware of {device}: choose "
                        f"{choice} (a resumed run keeps its own: go on where it began, or begin "
                        "anew from it with --pretrain)")


class ForwardPass:
    """The forward pass of a model: called as models.losses.forward_loss.

    Sets torch's options for the whole process, and the model's memory format.

    Args:
        precision: of the convolutions' operands, one of PRECISIONS.
        batch_size: compiles batches of this size; others are computed eagerly. None: all are.
        backend: of torch.compile.
    """

    shared = True  # compute once what no bit-width changes

    def __init__(self, model: nn.Module, device: torch.device, precision: str = "fp32",
                 batch_size: int | None = None, backend: str | Callable = "inductor"):
        check_precision(precision, device)
        self.model = model
        torch.backends.cudnn.allow_tf32 = precision == "tf32"  # torch's default for convolutions
        torch.backends.cuda.matmul.allow_tf32 = False  # and its default for the classifier
        torch.backends.cudnn.benchmark = True  # chooses the fastest algorithms for fixed shapes
        self.memory_format = torch.contiguous_format
        if device.type == "cuda" and precision != "fp32":  # tensor cores want channels-last
            self.memory_format = torch.channels_last
        model.to(memory_format=self.memory_format)
        self.batch_size = batch_size
        self.prepare = None
        if batch_size:
            self.compile(device, precision, backend)
        self.autocast = contextlib.nullcontext
        if precision == "bf16":
            self.autocast = functools.partial(torch.autocast, device.type, torch.bfloat16)
        if precision != "fp32":
            link_inputs(model)
            find_other_weights(model)

    def compile(self, device: torch.device, precision: str, backend: str | Callable) -> None:
        """Compile the forward pass, and the preparation of weights."""
        # One graph per bit-width and mode: nine bit-widths need 18, and the default limit is 8.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        torch._functorch.config.backward_pass_autocast = "off"  # as in eager mode
        torch._dynamo.config.skip_nnmodule_hook_guards = False  # hooks may come later
        options = {"emulate_precision_casts": precision == "bf16"}  # rounds where eager mode does
        if device.type == "cuda":  # recompute BatchNorm's output: do not write it in float32
            options |= {"realize_reads_threshold": 12, "realize_acc_reads_threshold": 14,
                        "realize_opcount_threshold": 100}
        compiled = functools.partial(torch.compile, dynamic=False, fullgraph=True,
                                     backend=backend, options=options)
        self.compiled = compiled(forward_loss)
        self.prepare = compiled(prepare_weights)
        warnings.filterwarnings("ignore", "TensorFloat32")  # torch 2.11 advises it at every call

    def __call__(self, model: nn.Module, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        compiles = len(images) == self.batch_size
        with self.autocast():
            return (self.compiled if compiles else forward_loss)(model, images, target)

    def backward(self, images: Tensor, labels: Tensor, bit_widths: Iterable[BitWidth | int | str],
                 loss: str, loss_scale: float = 1.0) -> dict[BitWidth, tuple[Tensor, Tensor]]:
        """Call models.losses.any_precision_backward with this forward pass."""
        return any_precision_backward(self.model, images, labels, bit_widths, loss, loss_scale,
                                      forward=self, sharing=self.sharing)

    def sharing(self, model: nn.Module, images: Tensor) -> AbstractContextManager:
        """Return a context that computes once, for these images, what no bit-width changes."""
        if not self.shared:
            return no_sharing(model, images)
        return shared_computation(model, images, not self.batch_size, self.prepare)
