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

TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "i": ctypes.c_int, "d": ctypes.c_double}
ARGUMENTS = {  # of fused.c's functions
    "activation": "plippi", "activation_backward": "pplpi", "dropout": "pplp",
    "pool": "pllllppi", "pool_backward": "ppllllpi",
    "normalize": "pppllll" "did" "ppppp" "i", "normalize_backward": "ppppllll" "ippi",
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


class Activation(torch.autograd.Function):
    """activation(x) of x (N, C, H, W); keeps a byte a number for its backward pass, and not x."""

    @staticmethod
    def forward(ctx, x, activation):
        y, passed = torch.empty_like(x), torch.empty(x.numel(), dtype=torch.uint8)
        load()[0].activation(x.data_ptr(), x.numel(), activation, y.data_ptr(), passed.data_ptr(), torch.get_num_threads())
        ctx.save_for_backward(passed)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        passed, = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        dx = torch.empty_like(grad)
        load()[0].activation_backward(
            grad.data_ptr(), passed.data_ptr(), grad.numel(), dx.data_ptr(), torch.get_num_threads())
        return dx, None


class Dropout(torch.autograd.Function):
    """dropout(x, 1/2) of x (N, C, H, W), its mask the bits of random words."""

    @staticmethod
    def forward(ctx, x):
        words = torch.empty(-(-x.numel() // 32), dtype=torch.int32).random_(-2**31, 2**31)
        ctx.save_for_backward(words)
        return Dropout.kept(x, words)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        words, = ctx.saved_tensors
        return Dropout.kept(grad.contiguous(memory_format=torch.channels_last), words)

    @staticmethod
    def kept(x, words):
        y = torch.empty_like(x)
        load()[0].dropout(x.data_ptr(), words.data_ptr(), x.numel(), y.data_ptr())
        return y


class Pool(torch.autograd.Function):
    """max_pool2d(x, 2) of x (N, C, H, W), H and W at least 2; keeps a byte an output for its backward pass, and not x."""

    @staticmethod
    def forward(ctx, x):
        n, c, height, width = ctx.shape = x.shape
        y = images(n, c, height // 2, width // 2)
        where = torch.empty(y.numel(), dtype=torch.uint8)
        load()[0].pool(x.data_ptr(), n, height, width, c, y.data_ptr(), where.data_ptr(), torch.get_num_threads())
        ctx.save_for_backward(where)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        where, = ctx.saved_tensors
        n, c, height, width = ctx.shape
        grad, dx = grad.contiguous(memory_format=torch.channels_last), images(*ctx.shape)
        load()[0].pool_backward(grad.data_ptr(), where.data_ptr(), n, height, width, c, dx.data_ptr(),
                                torch.get_num_threads())
        return dx


def check(failed):
    if failed:
        raise MemoryError("no memory for the sums of a BatchNorm")


class Normalize(torch.autograd.Function):
    """activation(batch_norm(x)), or if pooled activation(max_pool2d(batch_norm(x), 2)), of x (N, C, H, W), by the batch's
    own statistics; the running ones move by momentum. Keeps x and, if pooled (H and W at least 2), a byte an output."""

    @staticmethod
    def forward(ctx, x, batch_norm_weight, bias, eps, activation, pooled, momentum, running_mean, running_variance):
        n, c, height, width = x.shape
        y = images(n, c, height // 2, width // 2) if pooled else torch.empty_like(x)
        where = torch.empty(y.numel() if pooled else 0, dtype=torch.uint8)  # its data_ptr is NULL where it is empty
        statistics = torch.empty(4, c)
        check(load()[0].normalize(
            x.data_ptr(), batch_norm_weight.data_ptr(), bias.data_ptr(), n, height, width, c, eps, activation, momentum,
            running_mean.data_ptr(), running_variance.data_ptr(), y.data_ptr(), where.data_ptr(), statistics.data_ptr(),
            torch.get_num_threads()))
        ctx.save_for_backward(x, where, statistics)
        ctx.activation = activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, where, statistics = ctx.saved_tensors
        n, c, height, width = x.shape
        grad, dx, gradients = grad.contiguous(memory_format=torch.channels_last), torch.empty_like(x), torch.empty(2, c)
        check(load()[0].normalize_backward(
            grad.data_ptr(), x.data_ptr(), where.data_ptr(), statistics.data_ptr(), n, height, width, c, ctx.activation,
            dx.data_ptr(), gradients.data_ptr(), torch.get_num_threads()))
        return dx, gradients[0], gradients[1], *[None] * 6


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
