"""How a network is computed: precision, memory format, compiled or eager."""
import contextlib
import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from engine.distributed import any_process
from engine.errors import UserError
from engine.run_folder import log
from models import BitWidth, Width, bit_widths_of, set_bit_width
from models.attributes import draw_zeros, keeping_attributes, named_attributes
from models.losses import any_precision_backward, forward_loss
from models.low_precision import prepare_low_precision
from models.sharing import no_sharing, prepare_weights, shared_computation
from utils import keeping_random_states, one_line

PRECISIONS = ("fp32", "tf32", "bf16")
AUTO = "auto"  # tf32 where all processes have it, else fp32
TRAINING = "training"  # tasks
EVALUATION = "evaluation"
CHECKED = 8  # images, of the first batch of a task
TOLERANCE = 1e-3  # of tensors that are equal but for rounding, relative to their norm
LEAST = 0.1  # of the norm of all tensors, below which the norm of one may be rounding
SCALE = 3.0  # of a loss, whose gradients are rounded otherwise


def has_low_precision(device: torch.device) -> bool:
    """Return whether a device computes TF32 and bf16 in hardware."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def choose_precision(precision: str, device: torch.device) -> str:
    """Return a precision of PRECISIONS: what AUTO is on the devices of all processes, or itself."""
    if precision != AUTO:
        return precision
    lacking, = any_process([not has_low_precision(device)])
    return "fp32" if lacking else "tf32"


def check_precision(precision: str, device: torch.device) -> None:
    """Raise UserError where the device cannot compute in `precision`; CPUs emulate bf16."""
    is_slow = device.type == "cpu" and precision == "bf16"
    if precision != "fp32" and not is_slow and not has_low_precision(device):
        choice = "fp32" if device.type == "cuda" else "fp32, or bf16, which is slow on most CPUs"
        raise UserError(f"{device} has no hardware for --precision {precision}: choose "
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
        self.device = device
        self.suits = {}  # {task: whether sharing was found to suit it}
        torch.backends.cudnn.allow_tf32 = precision == "tf32"  # torch's default for convolutions
        torch.backends.cuda.matmul.allow_tf32 = False  # and its default for the classifier
        torch.backends.cudnn.benchmark = True  # chooses the fastest algorithms for fixed shapes
        self.memory_format = torch.contiguous_format
        if device.type == "cuda" and precision != "fp32":  # tensor cores want channels-last
            self.memory_format = torch.channels_last
        model.to(memory_format=self.memory_format)
        self.batch_size = batch_size
        self.prepare_weights = None
        if batch_size:
            self.compile(device, precision, backend)
        self.autocast = contextlib.nullcontext
        if precision == "bf16":
            self.autocast = functools.partial(torch.autocast, device.type, torch.bfloat16)
        if precision != "fp32":
            prepare_low_precision(model)

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
        self.prepare_weights = compiled(prepare_weights)
        warnings.filterwarnings("ignore", "TensorFloat32")  # torch 2.11 advises it at every call

    def __call__(self, model: nn.Module, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        compiles = len(images) == self.batch_size
        with self.autocast():
            return (self.compiled if compiles else forward_loss)(model, images, target)

    def backward(self, images: Tensor, labels: Tensor, bit_widths: Iterable[BitWidth | int | str],
                 loss: str, loss_scale: float = 1.0) -> dict[BitWidth, tuple[Tensor, Tensor]]:
        """Call models.losses.any_precision_backward with this forward pass."""
        if self.shared and TRAINING not in self.suits:
            every = {*bit_widths_of(self.model), *map(BitWidth.of, bit_widths)}

            def gradients(sharing: Callable, scale: float = 1.0) -> dict[str, Tensor | None]:
                any_precision_backward(self.model, images[:CHECKED].clone(), labels[:CHECKED],
                                       every, loss, scale, sharing=sharing)
                return {f"the gradient of {name}": parameter.grad if scale == 1
                        or parameter.grad is None else parameter.grad / scale
                        for name, parameter in self.model.named_parameters()}

            reason = self.find_unsuitable(gradients, functools.partial(gradients, scale=SCALE))
            unsuitable, = any_process([bool(reason)])
            self.note(TRAINING, unsuitable, reason or "another process found a difference")
        return any_precision_backward(self.model, images, labels, bit_widths, loss, loss_scale,
                                      forward=self, sharing=self.sharing)

    def evaluate(self, images: Tensor, labels: Tensor,
                 bit_widths: Iterable[Width]) -> dict[Width, tuple[Tensor, Tensor]]:
        """Return {bit-width: (loss, logits (N, classes))}; within torch.no_grad()."""
        if self.shared and EVALUATION not in self.suits:
            def logits(sharing: Callable) -> dict[str, Tensor]:
                results = evaluate_batch(self.model, images[:CHECKED].clone(), labels[:CHECKED],
                                         bit_widths, forward_loss, sharing)
                return {f"the output at {width}-bit": found
                        for width, (_, found) in results.items()}

            reason = self.find_unsuitable(logits)
            self.note(EVALUATION, bool(reason), reason)
        return evaluate_batch(self.model, images, labels, bit_widths, self,
                              functools.partial(self.sharing, task=EVALUATION))

    def sharing(self, model: nn.Module, images: Tensor,
                task: str = TRAINING) -> AbstractContextManager:
        """Return a context that computes once, for these images, what no bit-width changes."""
        if not self.shared or not self.suits.get(task, True):
            return no_sharing(model, images)
        return shared_computation(model, images, not self.batch_size, self.prepare_weights)

    def note(self, task: str, unsuitable: bool, reason: str) -> None:
        """Keep, and log, whether sharing suits a task."""
        self.suits[task] = not unsuitable
        if unsuitable:
            log.info(f"note: {task} recomputes everything at each bit-width: {reason}")

    def find_unsuitable(self, step: Callable[[Callable], dict[str, Tensor | None]],
                        rounded: Callable[[Callable], dict[str, Tensor | None]] | None = None,
                        ) -> str:
        """Return why sharing does not suit a step, "" where it does.

        step: called with a context such as shared_computation, not compiled; returns named tensors.
        rounded: a step that gives the same but for rounding, by which that is measured.
        """
        sharing = functools.partial(
            shared_computation, share_stem=not self.batch_size,
            prepare=prepare_weights if self.prepare_weights else None)
        found, error = self.trial(step, sharing)  # first, as it refuses an optimizer's steps
        if not error:
            expected, error = self.trial(step, no_sharing)
        if error:
            return one_line(error)
        reason = difference(found, expected, expected if rounded else None)
        if rounded and reason:  # it may be rounding
            again, error = self.trial(rounded, no_sharing)
            reason = one_line(error) if error else difference(found, expected, again)
        return reason

    def trial(self, step: Callable, sharing: Callable) -> tuple[dict | None, Exception | None]:
        """Return what a step gives, in float32 and the same way each time, and its error.

        Undoes its effects.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        options = torch.backends.cudnn
        before = options.allow_tf32, options.benchmark, options.deterministic
        options.allow_tf32, options.benchmark, options.deterministic = False, False, True
        try:
            with keeping_random_states(devices), undoing(self.model):
                try:
                    draw_zeros(self.model)
                    return step(sharing), None
                except Exception as error:  # a refusal, or one of the network's own code
                    return None, error
        finally:
            options.allow_tf32, options.benchmark, options.deterministic = before


@contextlib.contextmanager
def undoing(model: nn.Module) -> Iterator[None]:
    """Undo, on exit, changes of a model: of its tensors, gradients, and modules' attributes.

    Of attributes that are dicts or lists, what they hold; not what stands within that.
    """
    values = [value for _, value in named_attributes(model)]
    tensors = {*model.parameters(), *model.buffers(), *filter(torch.is_tensor, values)}
    saved = [(tensor, tensor.detach().clone(), tensor.requires_grad, tensor.grad)
             for tensor in tensors if tensor.is_leaf and not tensor.is_inference()]
    for tensor, *_ in saved:
        tensor.grad = None
    try:
        with keeping_attributes(model):
            yield
    finally:
        with torch.no_grad():
            for tensor, value, requires_grad, grad in saved:
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
                tensor.requires_grad_(requires_grad).grad = grad


def evaluate_batch(model: nn.Module, images: Tensor, labels: Tensor, bit_widths: Iterable[Width],
                   forward: Callable, sharing: Callable) -> dict[Width, tuple[Tensor, Tensor]]:
    """Return {bit-width: (loss, logits (N, classes))} of a batch."""
    results = {}
    with sharing(model, images):
        for width in bit_widths:
            set_bit_width(model, width)
            results[width] = forward(model, images, labels)
    return results


def difference(found: dict[str, Tensor | None], expected: dict[str, Tensor | None],
               rounded: dict[str, Tensor | None] | None = None) -> str:
    """Return which tensor is another one than expected, beyond rounding; "" where none is.

    rounded: the same as `expected`, with other rounding errors: a hundred times as much may be due
    to rounding, and the precision of all tensors together. None: rounding errors are not known.
    """
    norms = {name: float(tensor.norm()) for name, tensor in expected.items() if tensor is not None}
    total = math.hypot(*norms.values())
    for name, tensor in found.items():
        if (tensor is None) != (name not in norms):
            return f"with sharing, {name} is {'None' if tensor is None else 'not None'}"
        if tensor is None:
            continue
        if not math.isfinite(norms[name]):
            return f"{name} is not finite, so nothing can be compared"
        least = TOLERANCE * LEAST * total
        if rounded:
            again = rounded.get(name)
            if again is None:
                return f"{name} is not the same each time"
            noise = 100 * float((again - expected[name]).norm())
            least = min(least, noise + torch.finfo(tensor.dtype).eps * total)
        distance = float((tensor - expected[name]).norm())
        if not distance <= TOLERANCE * norms[name] + least:
            return (f"with sharing, {name} differs by "
                    f"{100 * distance / (norms[name] or 1):.1f} %")
    return ""
