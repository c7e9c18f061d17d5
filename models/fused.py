"""What follows the convolutions in one pass over memory, for float32 on CPUs: fused.c, compiled when first used.

Each function's values and gradients are those of the torch operations that its docstring names.
"""
import ctypes
import functools
import hashlib
import math
import os
import subprocess
import tempfile
from itertools import accumulate
from pathlib import Path

import torch
from torch.autograd.function import once_differentiable

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = "-O3 -march=native -fno-math-errno -fno-trapping-math -fopenmp -shared -fPIC".split()
RELU, NONE = 0, -1  # activations, as fused.c numbers them; n > 0 rounds to steps of 1/n



class Geometry(ctypes.Structure):
    """fused.c's Layer."""

    _fields_ = [*((name, ctypes.c_int64) for name in (
        "images", "height", "width", "channels", "pooled", "activation", "out", "window", "padding")),
        ("weight", ctypes.c_void_p), ("statistics", ctypes.c_void_p)]


TYPES = {"g": ctypes.POINTER(Geometry), "p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int, "d": ctypes.c_double}
ARGUMENTS = {  # of fused.c's functions
    "normalize": "gpppddpppi", "forward": "gppi", "backward": "gpppppi", "dropout": "pplp",
    "normalize_weight": "plppp", "normalize_weight_backward": "pplpp", "quantize_weight": "plpip"}


def cache_folder():
    """Where what was compiled or downloaded is kept: ~/.cache/any_precision, or under XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "any_precision"


@functools.cache
def load():
    """(the library, None), or, where it cannot be compiled, (None, why not). Kept in cache_folder()."""
    compiler = os.environ.get("CC") or "cc"
    try:
        cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features"))][:1]
        key = hashlib.sha256(repr((SOURCE.read_text(), compiler, FLAGS, cpu)).encode()).hexdigest()[:16]
        library = cache_folder() / f"fused-{key}.so"
        if not library.exists():
            library.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=library.parent) as folder:
                made = Path(folder, library.name)
                subprocess.run([*compiler.split(), *FLAGS, "-o", made, SOURCE, "-lm"], check=True, capture_output=True,
                               errors="replace")
                made.replace(library)
        functions = ctypes.CDLL(str(library))
    except subprocess.CalledProcessError as error:
        return None, next(iter(error.stderr.strip().splitlines()), f"{compiler} failed")
    except (OSError, RuntimeError) as error:  # no compiler, nowhere to write, no home
        return None, str(error)
    for name, letters in ARGUMENTS.items():
        getattr(functions, name).argtypes = [TYPES[letter] for letter in letters]
    return functions, None


def available(tensor):
    """Whether the functions here are for such tensors: float32 on a CPU, and fused.c could be compiled."""
    return (tensor.dtype == torch.float32 and tensor.device.type == "cpu" and not torch.compiler.is_compiling()
            and load()[0] is not None)


def fits(x):
    """Whether they are for the images x (N, C, H, W): in channels last, too."""
    return (x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
            and available(x))


def images(*shape):
    return torch.empty(shape, memory_format=torch.channels_last)


class Chain(torch.autograd.Function):
    """Links one after the other, as one operation: apply(links, x (N, C, H, W), *tensors), tensors those of all links."""

    @staticmethod
    def forward(ctx, links, x, *tensors):
        ctx.links = links
        ctx.save_for_backward(x, *tensors)
        for link in links:
            x = link.forward(x)
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        ctx.saved_tensors  # an error where they were changed since, or are used up
        gradients = []
        for link in reversed(ctx.links):
            grad, *own = link.backward(grad.contiguous(memory_format=torch.channels_last))
            gradients = own + gradients
        return None, grad, *gradients


def chain(links, x):
    """x through links."""
    return Chain.apply(links, x, *(tensor for link in links for tensor in link.tensors))


class Link:
    """A piece of a Chain: out is the shape of its outputs, tensors what else it differentiates by.

    forward(x) returns y and keeps what backward(grad) needs, which returns the gradient of x, and of each of tensors.
    """

    tensors = ()

    def joined(self, link):
        """One link that does what this and the next do; None where there is none."""


class Dropout(Link):
    """dropout(x, 1/2), its mask the bits of random words."""

    def __init__(self, shape):
        self.out = shape

    def forward(self, x):
        self.words = torch.empty(-(-x.numel() // 32), dtype=torch.int32).random_(-2**31, 2**31)
        return self.kept(x)

    def backward(self, grad):
        return self.kept(grad),

    def kept(self, x):
        y = torch.empty_like(x)
        load()[0].dropout(x.data_ptr(), self.words.data_ptr(), x.numel(), y.data_ptr())
        return y


class Layer(Link):
    """conv2d(activation(max_pool2d(batch_norm(x), 2))), of which only what is given; keeps x.

    norm: a torch.nn.BatchNorm2d; by the batch's own statistics, and its running ones move. pooled: True. activation: fused.c's
    number. convolution: (weight (C_out, C, K, K) in channels last, padding), of stride 1.
    """

    ORDER = "norm", "pooled", "activation", "convolution"

    def __init__(self, shape, **parts):
        self.shape, self.parts = shape, parts
        n, c, height, width = shape
        if "pooled" in parts:
            height, width = height // 2, width // 2
        if "convolution" in parts:
            weight, padding = parts["convolution"]
            c, grown = len(weight), 2 * padding - weight.shape[2] + 1
            height, width = height + grown, width + grown
        self.out = n, c, height, width

    def joined(self, link):
        if isinstance(link, Layer) and max(map(self.ORDER.index, self.parts)) < min(map(self.ORDER.index, link.parts)):
            return Layer(self.shape, **self.parts, **link.parts)

    @property
    def tensors(self):
        norm, (weight, _) = self.parts.get("norm"), self.parts.get("convolution", (None, 0))
        return *(() if norm is None else (norm.weight, norm.bias)), *(() if weight is None else (weight,))

    def forward(self, x):
        norm, (weight, padding) = self.parts.get("norm"), self.parts.get("convolution", (None, 0))
        self.x, self.norm, self.weight, y = x, norm, weight, images(*self.out)
        n, c, height, width = self.shape
        self.geometry = Geometry(n, height, width, c, "pooled" in self.parts, self.parts.get("activation", NONE))
        if weight is not None:
            self.geometry.out, self.geometry.window, self.geometry.padding = len(weight), weight.shape[2], padding
            self.geometry.weight = weight.data_ptr()
        if norm is not None:
            norm.num_batches_tracked.add_(1)
            self.statistics = torch.empty(4, c)
            check(load()[0].normalize(
                self.geometry, x.data_ptr(), norm.weight.data_ptr(), norm.bias.data_ptr(), norm.eps, norm.momentum,
                norm.running_mean.data_ptr(), norm.running_var.data_ptr(), self.statistics.data_ptr(),
                torch.get_num_threads()))
            self.geometry.statistics = self.statistics.data_ptr()
        check(load()[0].forward(self.geometry, x.data_ptr(), y.data_ptr(), torch.get_num_threads()))
        return y

    def backward(self, grad):
        dx, dw, of_norm = images(*self.shape), None, None
        if self.weight is not None:
            dw = images(*self.weight.shape)
        if self.norm is not None:
            of_norm = torch.empty(2, self.shape[1])
        check(load()[0].backward(
            self.geometry, grad.data_ptr(), self.x.data_ptr(), dx.data_ptr(), None if dw is None else dw.data_ptr(),
            None if of_norm is None else of_norm.data_ptr(), torch.get_num_threads()))
        return dx, *(() if of_norm is None else of_norm), *(() if dw is None else (dw,))


def check(failed):
    if failed:
        raise MemoryError("no memory to compute in")


def addresses(tensor, shapes):
    """Where the entries of each layer's weight begin in a tensor that joins them."""
    return [tensor.data_ptr() + 4 * start for start in accumulate((math.prod(shape) for shape in shapes[:-1]), initial=0)]


class NormalizeWeights(torch.autograd.Function):
    """(v, scales) as models/quan_ops.py's normalize_weights has them, of weights (C_out, C_in, H, W)."""

    @staticmethod
    def forward(ctx, *weights):
        joined = torch.cat([weight.permute(0, 2, 3, 1).flatten() for weight in weights])
        v, scales, maxima = joined.tanh(), joined.new_empty(len(weights), 1), joined.new_empty(len(weights), 1)
        ctx.shapes = shapes = [weight.shape for weight in weights]
        for w, t, scale, maximum, shape in zip(addresses(joined, shapes), addresses(v, shapes), scales, maxima, shapes):
            load()[0].normalize_weight(w, math.prod(shape), t, scale.data_ptr(), maximum.data_ptr())
        ctx.save_for_backward(v, maxima)
        ctx.mark_non_differentiable(scales)
        return v, scales

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        v, maxima = ctx.saved_tensors
        grad = grad.contiguous()
        gradients = [images(*shape) for shape in ctx.shapes]
        for g, of_v, maximum, gradient in zip(addresses(grad, ctx.shapes), addresses(v, ctx.shapes), maxima, gradients):
            load()[0].normalize_weight_backward(g, of_v, gradient.numel(), maximum.data_ptr(), gradient.data_ptr())
        return tuple(gradients)


class QuantizeWeights(torch.autograd.Function):
    """The quantized weights of layers, of those shapes and in channels last; n = 2^bits - 1, or 0 for 32 bits.

    v (P,) and scales are NormalizeWeights'.
    """

    @staticmethod
    def forward(ctx, v, scales, n, shapes):
        ctx.scales, ctx.shapes, v = scales, shapes, v.contiguous()
        weights = [images(*shape) for shape in shapes]
        for part, scale, weight in zip(addresses(v, shapes), scales, weights):
            load()[0].quantize_weight(part, weight.numel(), scale.data_ptr(), n, weight.data_ptr())
        return tuple(weights)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients):
        dv = torch.empty(sum(map(math.prod, ctx.shapes)))
        for gradient, scale, part in zip(gradients, ctx.scales, addresses(dv, ctx.shapes)):
            gradient = gradient.contiguous(memory_format=torch.channels_last)
            load()[0].quantize_weight(gradient.data_ptr(), gradient.numel(), scale.data_ptr(), 0, part)
        return dv, None, None, None
