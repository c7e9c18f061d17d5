"""OpenVINO files for x86 CPUs: convolutions of int8, and of single bits at 1 bit.

OpenVINO's CPU plugin uses integer kernels for a FakeQuantize before a convolution whose weight is
int8 times a scale. A quantized activation is clipped to n steps, n = 2^bits - 1, and then rounded
to multiples of a step by a FakeQuantize of 256 levels: the plugin computes other numbers of levels
in float32.
"""
import functools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy
import openvino
from numpy.typing import ArrayLike
from openvino import Node, Output
from openvino import opset13 as ops
from torch import nn

from deploy.graph import (ImageSize, Operation, Run, affine_of, float_weight, image_shape,
                          integer_weight, is_rounding, pool_settings, step_of, takes_levels,
                          trace)
from models.bit_widths import FULL_PRECISION, BitWidth
from utils import one_line

CHANNELS = 8  # a BinaryConvolution needs a multiple of this many input channels
LARGE = numpy.finfo(numpy.float32).max
LEVELS = 256  # of a FakeQuantize that becomes uint8
INT16 = 2**15 - 1


class Value(NamedTuple):
    """A float tensor; before: for a quantized activation, the input of that activation."""
    tensor: Node | Output
    before: Node | Output | None = None


class Writer:
    """Writes the operations of a network at one bit-width as an OpenVINO model."""

    def __init__(self, image_size: ImageSize):
        self.values = {}  # by name of the operation
        self.readers = Counter()  # of each value
        self.is_binary = False
        self.largest_weight = 0  # in magnitude, of those in int8
        self.images = ops.parameter([-1, *image_shape(image_size)], numpy.float32, "images")

    def write(self, operations: list[Operation]) -> openvino.Model:
        """Write all operations; return their model."""
        rounding = [operation.layer for operation in operations
                    if operation.kind == "activation" and is_rounding(operation.layer)]
        # Only if all activations are 0 and 1: the plugin fuses them with others wrongly.
        self.is_binary = all(layer.bits == 1 and step_of(layer) == 1 for layer in rounding)
        self.readers.update(name for operation in operations for name in operation.inputs)
        for operation in operations[:-1]:
            inputs = [self.values[name] for name in operation.inputs]
            self.values[operation.name] = getattr(self, operation.kind)(operation, *inputs)
        logits = self.values[operations[-1].inputs[0]].tensor
        logits.output(0).set_names({"logits"})
        content = openvino.Model([logits], [self.images], "any_precision")
        largest = max((2**layer.bits - 1 for layer in rounding), default=0)
        saturates = 2 * largest * self.largest_weight > INT16  # without VNNI, pairs are added
        content.set_rt_info("yes" if saturates else "no", "saturates")
        return content

    def input(self, operation: Operation) -> Value:
        return Value(self.images)

    def same(self, operation: Operation, value: Value) -> Value:
        return value

    def convolution(self, operation: Operation, value: Value) -> Value:
        layer = operation.layer
        if value.before is None or not takes_levels(layer):
            y = convolve(layer, value.tensor, constant(float_weight(layer).numpy()))
        else:
            m, scale = integer_weight(operation)
            m = m.numpy()
            is_plain = layer.groups == 1 and numpy.ndim(scale) == 0
            is_binary = self.is_binary and is_plain and layer.bits == 1 and m.ndim == 4
            if is_binary and (abs(m) == 1).all():
                y = self.binary_convolution(layer, value.before, m, scale)
            elif m.min() >= -128 and m.max() < 128:
                y = self.integer_convolution(layer, value.tensor, m, scale)
            else:  # 2 k - 255 = 2 (k - 128) + 1
                y = self.integer_convolution(layer, value.tensor, (m - 1) // 2, 2 * scale)
                ones = numpy.ones_like(m[:1] if is_plain else m)
                y = ops.add(y, convolve(layer, value.tensor, scaled_weight(ones, scale)))
        if layer.bias is not None:
            y = ops.add(y, channels(layer.bias.detach().numpy()))
        return Value(y)

    def integer_convolution(self, layer: nn.Conv2d, x: Node, m: numpy.ndarray,
                            scale: float | numpy.ndarray) -> Node:
        """Convolve x with the weight scale * m, of int8 integers m."""
        self.largest_weight = max(self.largest_weight, abs(m).max())
        return convolve(layer, x, scaled_weight(m, scale))

    def binary_convolution(self, layer: nn.Conv2d, x: Node, m: numpy.ndarray,
                           scale: float) -> Node:
        """Convolve the 1-bit activation of x, levels k in {0, 1}, with weights m of -1 and 1.

        A BinaryConvolution computes with a = 2 k - 1, which is -1 outside the image too, so that
        sum m k = (sum m a + sum m) / 2.
        """
        missing = -m.shape[1] % CHANNELS
        if missing:
            m = numpy.pad(m, ((0, 0), (0, missing), (0, 0), (0, 0)), constant_values=1)
            x = ops.pad(x, [0, 0, 0, 0], [0, missing, 0, 0], "constant", numpy.float32(0))
        a = ops.fake_quantize(x, *map(numpy.float32, (0.5, 0.5, 0, 1)), 2)  # not shared with others
        bits = numpy.packbits(m > 0, bitorder="little")  # named: a Tensor does not keep it alive
        tensor = openvino.Tensor(bits, openvino.Shape(m.shape), openvino.Type.u1)
        weight = openvino.op.Constant(tensor, shared_memory=False)
        sums = ops.binary_convolution(a, weight, list(layer.stride), list(layer.padding),
                                      list(layer.padding), list(layer.dilation), "xnor-popcount",
                                      -1.0)
        y = ops.multiply(sums, constant(scale / 2))
        return ops.add(y, channels(m.sum((1, 2, 3)) * scale / 2))

    def batch_norm(self, operation: Operation, value: Value) -> Value:
        scale, shift = (channels(part.numpy()) for part in affine_of(operation.layer))
        return Value(ops.add(ops.multiply(value.tensor, scale), shift))

    def activation(self, operation: Operation, value: Value) -> Value:
        layer = operation.layer
        if layer.bits == FULL_PRECISION:
            return Value(ops.clamp(value.tensor, 0.0, layer.limit) if layer.limit
                         else ops.relu(value.tensor))
        step = step_of(layer)
        clipped = ops.clamp(value.tensor, 0.0, (2**layer.bits - 1) * step)
        if not layer.rounding:
            return Value(clipped)
        if self.is_binary:  # a FakeQuantize would be fused into a BinaryConvolution, wrongly
            above = ops.greater(value.tensor, numpy.float32(0.5))
            return Value(ops.convert(above, numpy.float32), value.tensor)
        low = numpy.float32(0)
        high = numpy.float32((LEVELS - 1) * step)
        return Value(ops.fake_quantize(clipped, low, high, low, high, LEVELS), value.tensor)

    def relu(self, operation: Operation, value: Value) -> Value:
        return Value(ops.relu(value.tensor))

    def max_pool(self, operation: Operation, value: Value) -> Value:
        layer = operation.layer
        size, stride, padding, dilation = pool_settings(layer)

        def pool(x):
            return ops.max_pool(x, stride, dilation, padding, padding, size,
                                "ceil_torch" if layer.ceil_mode else "floor").output(0)
        # The activation is monotonic, so it may also follow the maximum.
        return Value(pool(value.tensor), None if value.before is None else pool(value.before))

    def average(self, operation: Operation, value: Value) -> Value:
        return Value(ops.reduce_mean(value.tensor, numpy.array([2, 3]), keep_dims=True))

    def mean(self, operation: Operation, value: Value) -> Value:
        return self.flatten(operation, self.average(operation, value))

    def add(self, operation: Operation, *values: Value) -> Value:
        y = ops.add(*(value.tensor for value in values))
        # The plugin would fuse a binary convolution, a sum with one reader and rounding, wrongly.
        if self.is_binary and self.readers[operation.name] == 1:
            y = ops.maximum(y, constant(-LARGE))  # prevents that, and changes nothing
        return Value(y)

    def cat(self, operation: Operation, *values: Value) -> Value:
        whole = all(value.before is not None for value in values)
        before = ops.concat([value.before for value in values], 1) if whole else None
        return Value(ops.concat([value.tensor for value in values], 1), before)

    def flatten(self, operation: Operation, value: Value) -> Value:
        return Value(ops.reshape(value.tensor, numpy.array([0, -1]), True))

    def linear(self, operation: Operation, value: Value) -> Value:
        layer = operation.layer
        y = ops.matmul(value.tensor, constant(layer.weight.detach().numpy()), False, True)
        return Value(y if layer.bias is None else ops.add(y, constant(layer.bias.detach().numpy())))


def constant(array: ArrayLike) -> Node:
    """Return a float32 constant."""
    return ops.constant(numpy.asarray(array, numpy.float32))


def channels(values: ArrayLike) -> Node:
    """Return a constant (1, C, 1, 1) of values (C,)."""
    return constant(numpy.asarray(values)[None, :, None, None])


def scaled_weight(integers: numpy.ndarray, scale: float | numpy.ndarray) -> Node:
    """Return the weight scale * integers, integers in [-128, 127], stored as int8."""
    scales = numpy.broadcast_to(numpy.reshape(scale, (-1, 1, 1, 1)), (len(integers), 1, 1, 1))
    integers = ops.convert(ops.constant(integers.astype(numpy.int8)), numpy.float32)
    return ops.multiply(integers, constant(scales))


def convolve(layer: nn.Conv2d, x: Node, weight: Node) -> Node:
    """Return the convolution of x by a weight (O, I / groups, h, w) with a layer's settings."""
    settings = (list(part) for part in (layer.stride, layer.padding, layer.padding, layer.dilation))
    if layer.groups == 1:
        return ops.convolution(x, weight, *settings)
    groups = layer.groups
    out, *rest = weight.shape
    shape = numpy.array([groups, out // groups, *rest])
    return ops.group_convolution(x, ops.reshape(weight, shape, False), *settings)


def export(model: nn.Module, bit_widths: Iterable[BitWidth | int | str], path: str | Path,
           image_size: ImageSize) -> None:
    """Write a model (in evaluation mode, float32, on the CPU) at one bit-width to an .xml file.

    Its weights go to the .bin file beside it. The input `images` is (N, 3, H, W) float32,
    normalized; the output `logits` is (N, classes). Raises ValueError naming a layer that the
    format cannot represent, and OSError where it cannot be written.
    """
    bits, = bit_widths
    content = Writer(image_size).write(trace(model, bits))
    content.set_rt_info(str(bits), "bits")
    try:
        openvino.save_model(content, path, compress_to_fp16=False)
    except RuntimeError as error:
        raise OSError(f"{one_line(error)}, as on a full disk") from None


def load(path: str | Path, threads: int = 1) -> Run:
    """Return run(images, bits) in OpenVINO: float32 (N, 3, H, W) -> logits (N, classes).

    Raises ValueError for a file whose sums saturate on this CPU; run raises it for bits that the
    file does not have.
    """
    content = core().read_model(path)
    own = BitWidth.of(content.get_rt_info("bits").astype(str))
    saturates = own.weights == 8
    if content.has_rt_info("saturates"):
        saturates = content.get_rt_info("saturates").astype(str) == "yes"
    if saturates and not sums_are_exact():
        raise ValueError(f"{path} has sums of 8 bits, which saturate on this CPU, without VNNI: "
                         "export 7 bits or fewer, or another format")
    shape = [part.get_length() for part in list(content.input().partial_shape)[1:]]

    @functools.cache  # a BinaryConvolution needs a fixed batch size
    def compiled_for(count):
        content.reshape([count, *shape])
        return compiled(content, threads).create_infer_request()

    def run(images, bits):
        if bits != own:
            raise ValueError(f"{path} has no {bits} bits: choose {own}")
        return compiled_for(len(images)).infer([images])["logits"].copy()
    return run


@functools.cache
def core() -> openvino.Core:
    """Return OpenVINO's core, one for the whole process.

    After the end of a core, signals would meet a stack that its CPU plugin has freed.
    """
    return openvino.Core()


def compiled(content: openvino.Model, threads: int = 1) -> openvino.CompiledModel:
    """Compile a model for this CPU, in float32: by default it may compute in bfloat16."""
    return core().compile_model(content, "CPU", {
        "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads})


@functools.cache
def sums_are_exact() -> bool:
    """Return whether this CPU sums products of uint8 and int8 without saturation, by trying it."""
    x = ops.parameter([1, 64, 8, 8], numpy.float32)
    low = numpy.float32(0)
    high = numpy.float32(1)
    a = ops.fake_quantize(ops.clamp(x, 0.0, 1.0), low, high, low, high, LEVELS)
    weight = scaled_weight(numpy.full((16, 64, 3, 3), 127), 1.0)
    y = ops.convolution(a, weight, [1, 1], [0, 0], [0, 0], [1, 1])
    found = compiled(openvino.Model([y], [x], "sums"))(numpy.ones((1, 64, 8, 8), numpy.float32))[0]
    return bool(numpy.allclose(found, 127 * 64 * 9, rtol=1e-6))
