"""Layers, from a BatchNorm to the convolution after it, in one go for float32 on CPUs: fused.c, compiled when first used.

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
LONGEST_LINE = 2**15  # width * channels
RELU, NONE = 0, -1  # activations, as fused.c numbers them; n > 0 rounds to steps of 1/n


class Geometry(ctypes.Structure):
    """fused.c's."""

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
    """Whether they are for the images x (N, C, H, W): in channels last, too, and a line of them has its place on a stack."""
    return (x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
            and x.shape[1] * x.shape[3] <= LONGEST_LINE and available(x))


def images(*shape):
    return torch.empty(shape, dtype=torch.float32, device="cpu", memory_format=torch.channels_last)


class Chain(torch.autograd.Function):
    """Links one after the other, as one operation: apply(links, x (N, C, H, W), *tensors), tensors those of all links.

    The links serve this once.
    """

    @staticmethod
    def forward(ctx, links, x, *tensors):
        ctx.links, inputs = links, []
        for link in links:
            inputs.append(x)
            x = link.forward(x)
        ctx.save_for_backward(*inputs, *tensors)  # the tensors, too: it is an error to change them
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        gradients = []
        for link, x in reversed(list(zip(ctx.links, ctx.saved_tensors))):
            grad, *own = link.backward(grad.contiguous(memory_format=torch.channels_last), x)
            gradients = own + gradients
        return None, grad, *gradients


def chain(links, x):
    """x (N, C, H, W) through links."""
    return Chain.apply(links, x, *(tensor for link in links for tensor in link.tensors))


class Link:
    """A piece of a Chain: out is the shape of its outputs, tensors what else it differentiates by.

    forward(x (N, C, H, W)) returns y (out); backward(grad (out), x) the gradients of x and of each of tensors.
    """

    tensors = ()

    def joined(self, link):
        """One link that does what this and the next do; None where there is none."""


class Dropout(Link):
    """dropout(x, 1/2), its mask the bits of random words."""

    def __init__(self, shape):
        self.out = shape

    def forward(self, x):
        self.words = torch.empty(-(-x.numel() // 32), dtype=torch.int32, device="cpu").random_(-2**31, 2**31)
        return self.kept(x)

    def backward(self, grad, x):
        return self.kept(grad),

    def kept(self, x):
        y = images(*self.out)
        load()[0].dropout(x.data_ptr(), self.words.data_ptr(), x.numel(), y.data_ptr())
        return y


class Layer(Link):
    """conv2d(activation(max_pool2d(batch_norm(x), 2))), of which only what is given.

    norm: a torch.nn.BatchNorm2d; by the batch's own statistics, and its running ones move. pooled: True. activation: fused.c's
    number. convolution: (weight (C_out, C, K, K) in channels last, padding), of stride 1.
    """

    ORDER = "norm", "pooled", "activation", "convolution"

    def __init__(self, shape, **parts):
        self.shape, self.parts = shape, parts
        self.norm, (self.weight, padding) = parts.get("norm"), parts.get("convolution", (None, 0))
        n, c, height, width = shape
        self.geometry = Geometry(n, height, width, c, "pooled" in parts, parts.get("activation", NONE))
        self.tensors = ()
        if "pooled" in parts:
            height, width = height // 2, width // 2
        if self.norm is not None:
            self.tensors += self.norm.weight, self.norm.bias
        if self.weight is not None:
            self.tensors += self.weight,
            c, window = len(self.weight), self.weight.shape[2]
            height, width = height + 2 * padding - window + 1, width + 2 * padding - window + 1
            self.geometry.out, self.geometry.window, self.geometry.padding = c, window, padding
            self.geometry.weight = self.weight.data_ptr()
        self.out = n, c, height, width

    def joined(self, link):
        if isinstance(link, Layer) and max(map(self.ORDER.index, self.parts)) < min(map(self.ORDER.index, link.parts)):
            return Layer(self.shape, **self.parts, **link.parts)

    def forward(self, x):
        y, norm = images(*self.out), self.norm
        if norm is not None:
            norm.num_batches_tracked.add_(1)
            self.statistics = x.new_empty(4, self.shape[1])
            check(load()[0].normalize(
                self.geometry, x.data_ptr(), norm.weight.data_ptr(), norm.bias.data_ptr(), norm.eps, norm.momentum,
                norm.running_mean.data_ptr(), norm.running_var.data_ptr(), self.statistics.data_ptr(),
                torch.get_num_threads()))
            self.geometry.statistics = self.statistics.data_ptr()
        check(load()[0].forward(self.geometry, x.data_ptr(), y.data_ptr(), torch.get_num_threads()))
        return y

    def backward(self, grad, x):
        dx = images(*self.shape)
        dw = () if self.weight is None else (images(*self.weight.shape),)
        of_norm = x.new_empty(0 if self.norm is None else 2, self.shape[1])  # its data_ptr is NULL where it is empty
        check(load()[0].backward(
            self.geometry, grad.data_ptr(), x.data_ptr(), dx.data_ptr(), dw[0].data_ptr() if dw else None,
            of_norm.data_ptr(), torch.get_num_threads()))
        return dx, *of_norm, *dw


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
        dv = torch.empty(sum(map(math.prod, ctx.shapes)), dtype=torch.float32, device="cpu")
        for gradient, scale, part in zip(gradients, ctx.scales, addresses(dv, ctx.shapes)):
            gradient = gradient.contiguous(memory_format=torch.channels_last)
            load()[0].quantize_weight(gradient.data_ptr(), gradient.numel(), scale.data_ptr(), 0, part)
        return dv, None, None, None
