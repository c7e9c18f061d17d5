"""How a network is computed: the plain path or the fast one, its precision, compiled and captured or not."""
import warnings
from functools import partial

import torch

import distributed
from errors import UserError
from models.losses import any_precision_backward, forward_loss, sharing, sharing_nothing
from models.quan_ops import normalize_weights, set_arithmetic
from utils import Metrics, one_line

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}  # of convolutions under autocast
WARM_UP = 3  # steps before a CUDA graph is captured: lazy initialisation must be over


def check_precision(precision, device):
    """UserError where device cannot compute in `precision`."""
    if device.type == "cuda":
        recent = torch.cuda.get_device_capability(device) >= (8, 0)
        lacking = precision in ("tf32", "bf16") and not recent
        instead = "fp32 or fp16"
    else:
        lacking, instead = precision == "tf32", "fp32, or bf16 and fp16, which are slow on most CPUs"
    if lacking:
        raise UserError(f"--precision {precision} is not in the hardware of {device}: choose {instead} (a resumed run "
                        "keeps its own: go on where it began, or begin anew from it with --pretrain)")


def missing_compiler(device):
    """Why torch.compile does not work here, in one line; None where it does. Takes seconds."""
    import torch._inductor.config  # only here, as it takes its time

    try:
        # Without caches: what was compiled before tells nothing. torch warns of those that are off.
        with warnings.catch_warnings(), torch._inductor.config.patch(force_disable_caches=True):
            warnings.simplefilter("ignore")
            torch.compile(lambda x: (x + 1).sin())(torch.zeros(64, device=device))
    except Exception as error:  # no C++ compiler, no Triton, no permission for the cache
        text = str(error).strip().splitlines()
        return text[0] if text else type(error).__name__
    finally:
        torch._dynamo.reset()
    return None


def compiled(function, backend="inductor"):
    """function through torch.compile: one graph a bit-width and mode, whole, of fixed shapes."""
    # Each of 9 bit-widths is a graph for training and one for evaluation; the default limit is 8.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    if hasattr(torch._functorch.config, "backward_pass_autocast"):
        torch._functorch.config.backward_pass_autocast = "off"  # as in the uncompiled backward pass
    return torch.compile(function, dynamic=False, fullgraph=True, backend=backend)


class Computation:
    """A model's forward passes, over several bit-widths, in the chosen way. Sets model up for it, in place.

    plain: by the equations, everything anew at every bit-width. precision: of PRECISIONS. compiles: through
    torch.compile, where a batch has batch_size images; others, such as an epoch's last, go uncompiled.
    """

    def __init__(self, model, device, plain=False, precision="fp32", compiles=False, batch_size=None, backend="inductor"):
        set_arithmetic(model, plain=plain, levels=precision != "fp32")
        self.plain, self.precision, self.compiles = plain, precision, compiles
        self.set_backends()
        if not plain:
            model.to(memory_format=torch.channels_last)
        self.model, self.device, self.batch_size = model, device, batch_size
        self.dtype = DTYPES.get(precision)
        self.compiled_forward = compiled(forward_loss, backend) if compiles else None
        self.share = sharing_nothing if plain else partial(
            sharing, normalize=compiled(normalize_weights, backend) if compiles else normalize_weights,
            autocast=self.autocast)

    def set_backends(self):
        """Torch's settings of the whole process; to be called again where another Computation was used meanwhile."""
        # Whether float32 convolutions and products may be rounded to TF32, as torch does where nothing is said.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = self.precision == "tf32"
        torch.backends.cudnn.benchmark = not self.plain  # the fastest algorithms for shapes that stay the same

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def forward(self, network, x, target):
        """forward_loss of network(x), compiled where it is to be."""
        whole = self.compiles and len(target) == self.batch_size
        with self.autocast():  # and not around the backward pass, which goes by what was done here
            return (self.compiled_forward if whole else forward_loss)(network, x, target)


class TrainingStep:
    """One step of the optimizer over all bit-widths, nothing in it waiting for the device.

    step(images, labels, weight, flags) returns the batch's row of Metrics and the sum over the processes of the tensor
    flags; weight is this process's share of the batch. captures: as one CUDA graph where a batch has
    computation.batch_size images; UserError where that fails.
    """

    def __init__(self, computation, optimizer, bit_widths, loss, captures=False):
        self.computation, self.optimizer, self.bit_widths, self.loss = computation, optimizer, bit_widths, loss
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.scaler = torch.amp.GradScaler(computation.device.type, enabled=computation.dtype == torch.float16)
        self.captures = captures
        self.steps, self.graph = 0, None
        if captures:
            self.stream = torch.cuda.Stream()  # of the steps before capturing, which must not use the default one
            # The optimizer is capturable, and those steps are not captured: as it should be.
            warnings.filterwarnings("ignore", message=".*running without CUDA graph capture")

    def __call__(self, images, labels, weight, flags):
        if not self.captures or len(labels) != self.computation.batch_size:
            return self.run(images, labels, weight, flags)
        if self.graph is None and not self.capture(images, labels):
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                result = self.run(images, labels, weight, flags)
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        self.images.copy_(images)
        self.labels.copy_(labels)
        self.graph.replay()
        return self.row.clone(), flags

    def capture(self, images, labels):
        """Capture the step, without running it, once WARM_UP have been run; returns whether it is captured."""
        self.steps += 1
        if self.steps <= WARM_UP:
            return False
        self.images, self.labels, graph = images.clone(), labels.clone(), torch.cuda.CUDAGraph()
        self.optimizer.zero_grad()  # the graph's gradients get memory of their own
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # another thread may be pinning memory
                self.row, _ = self.run(self.images, self.labels, 1.0, None)
        except RuntimeError as error:
            raise UserError(f"the step could not be captured as a CUDA graph ({one_line(error)}): go on without "
                            "--compile") from None
        self.graph = graph
        return True

    def run(self, images, labels, weight, flags):
        self.optimizer.zero_grad()
        results = any_precision_backward(
            self.computation.model, images, labels, self.bit_widths, self.loss,
            lambda loss: self.scaler.scale(weight * loss), self.computation.share, self.computation.forward)
        flags = distributed.exchange_gradients(self.parameters, flags)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return Metrics.row(results, labels), flags
