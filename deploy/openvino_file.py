"""OpenVINO files for x86 CPUs: convolutions of int8, and of single bits at 1 bit.

OpenVINO's CPU plugin makes integer kernels of a FakeQuantize before a convolution whose weight is
int8 times a scale. A quantized activation is clipped to [0, 1] and then rounded to multiples of
1 / n, n = 2^bits - 1, by a FakeQuantize of 256 levels: the plugin computes other numbers of levels
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

CHANNELS = 8  # a BinaryConvolution's inputs come in multiples of it
LARGE = numpy.finfo(numpy.float32).max
LEVELS = 256  # of a FakeQuantize that becomes uint8
INT16 = 2**15 - 1


class Value(NamedTuple):
    """A float tensor; where it is a quantized activation also what it is the activation of."""
    tensor: Node | Output
    before: Node | Output | None = None


class Writer:
    """Writes the operations of a network at one bit-width as an OpenVINO model."""

    def __init__(self, image_size: ImageSize):
        self.values, self.readers, self.is_binary = {}, Counter(), False
        self.largest_weight = 0  # of those stored in int8
        self.images = ops.parameter([-1, *image_shape(image_size)], numpy.float32, "images")

    def write(self, operations: list[Operation]) -> openvino.Model:
        """Return the openvino.Model of all operations."""
        rounding = [operation.layer for operation in operations
                    if operation.kind == "activation" and is_rounding(operation.layer)]
        # Only where all activations are 0 and 1: next to others the plugin fuses them wrongly.
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
            if self.is_binary and layer.bits == 1 and layer.groups == 1 and m.ndim == 4 \
                    and (abs(m) == 1).all() and numpy.ndim(scale) == 0:
                y = self.binary_convolution(layer, value.before, m, scale)
            elif m.min() >= -128 and m.max() < 128:
                y = self.integer_convolution(layer, value.tensor, m, scale)
            else:  # 2 k - 255 = 2 (k - 128) + 1
                y = self.integer_convolution(layer, value.tensor, (m - 1) // 2, 2 * scale)
                alike = layer.groups == 1 and numpy.ndim(scale) == 0
                ones = numpy.ones_like(m[:1] if alike else m)
                y = ops.add(y, convolve(layer, value.tensor, scaled_weight(ones, scale)))
        if layer.bias is not None:
            y = ops.add(y, channels(layer.bias.detach().numpy()))
        return Value(y)

    def integer_convolution(self, layer: nn.Conv2d, x: Node, m: numpy.ndarray,
                            scale: float | numpy.ndarray) -> Node:
        self.largest_weight = max(self.largest_weight, abs(m).max())
        return convolve(layer, x, scaled_weight(m, scale))

    def binary_convolution(self, layer: nn.Conv2d, x: Node, odd: numpy.ndarray,
                           scale: float) -> Node:
        """Convolve the 1-bit activation of x, levels k in {0, 1}, with weights m of -1 and 1.

        A BinaryConvolution takes k as a = 2 k - 1, and what lies outside the image as -1 too:
        sum m k = (sum m a + sum m) / 2.
        """
        missing = -odd.shape[1] % CHANNELS
        if missing:
            odd = numpy.pad(odd, ((0, 0), (0, missing), (0, 0), (0, 0)), constant_values=1)
            x = ops.pad(x, [0, 0, 0, 0], [0, missing, 0, 0], "constant", numpy.float32(0))
        a = ops.fake_quantize(x, *map(numpy.float32, (0.5, 0.5, 0, 1)), 2)  # its own, not shared
        bits = numpy.packbits(odd > 0, bitorder="little")  # a Tensor of it does not keep it alive
        tensor = openvino.Tensor(bits, openvino.Shape(odd.shape), openvino.Type.u1)
        weight = openvino.op.Constant(tensor, shared_memory=False)
        sums = ops.binary_convolution(a, weight, list(layer.stride), list(layer.padding),
                                      list(layer.padding), list(layer.dilation), "xnor-popcount",
                                      -1.0)
        y = ops.multiply(sums, constant(scale / 2))
        return ops.add(y, channels(odd.sum((1, 2, 3)) * scale / 2))

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
        low, high = numpy.float32(0), numpy.float32((LEVELS - 1) * step)
        return Value(ops.fake_quantize(clipped, low, high, low, high, LEVELS), value.tensor)

    def relu(self, operation: Operation, value: Value) -> Value:
        return Value(ops.relu(value.tensor))

    def max_pool(self, operation: Operation, value: Value) -> Value:
        layer = operation.layer
        size, stride, padding, dilation = pool_settings(layer)

        def pool(x):
            return ops.max_pool(x, stride, dilation, padding, padding, size,
                                "ceil_torch" if layer.ceil_mode else "floor").output(0)
        # The activation rises with its input, so it may as well come after the maximum.
        return Value(pool(value.tensor), None if value.before is None else pool(value.before))

    def average(self, operation: Operation, value: Value) -> Value:
        return Value(ops.reduce_mean(value.tensor, numpy.array([2, 3]), keep_dims=True))

    def mean(self, operation: Operation, value: Value) -> Value:
        return self.flatten(operation, self.average(operation, value))

    def add(self, operation: Operation, *values: Value) -> Value:
        y = ops.add(*(value.tensor for value in values))
        # A binary convolution, a sum that nothing else reads, and rounding would be fused, wrongly.
        if self.is_binary and self.readers[operation.name] == 1:
            y = ops.maximum(y, constant(-LARGE))  # changes nothing
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
    groups, out, *rest = layer.groups, *weight.shape
    shape = numpy.array([groups, out // groups, *rest])
    return ops.group_convolution(x, ops.reshape(weight, shape, False), *settings)


def export(model: nn.Module, bit_widths: Iterable[BitWidth | int | str], path: str | Path,
           image_size: ImageSize) -> None:
    """Write a model (in evaluation, float32, on the CPU) at one bit-width to path, an .xml file.

    Its weights go to the .bin file beside it. Its input `images` is (N, 3, H, W) float32, as the
    network takes it, its output `logits` (N, classes). Raises ValueError for what cannot be held,
    naming the layer.
    """
    bits, = bit_widths
    content = Writer(image_size).write(trace(model, bits))
    content.set_rt_info(str(bits), "bits")
    openvino.save_model(content, path, compress_to_fp16=False)


def load(path: str | Path, threads: int = 1) -> Run:
    """Return run(images, bits): float32 images (N, 3, H, W) to logits (N, classes), by OpenVINO.

    Raises ValueError for bits that the file does not have, and for a file whose sums saturate on
    this CPU.
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

    @functools.cache  # a BinaryConvolution wants a fixed number of images
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
    """Return OpenVINO, the same as long as the process runs: where it ends, signals meet a stack
    that its CPU plugin has taken back."""
    return openvino.Core()


def compiled(content: openvino.Model, threads: int = 1) -> openvino.CompiledModel:
    """Compile a model for this CPU; without the hint it would compute in bfloat16."""
    return core().compile_model(content, "CPU", {
        "INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads})


@functools.cache
def sums_are_exact() -> bool:
    """Return whether this CPU adds products of uint8 and int8 without saturating, by trying it."""
    x = ops.parameter([1, 64, 8, 8], numpy.float32)
    low, high = numpy.float32(0), numpy.float32(1)
    a = ops.fake_quantize(ops.clamp(x, 0.0, 1.0), low, high, low, high, LEVELS)
    weight = scaled_weight(numpy.full((16, 64, 3, 3), 127), 1.0)
    y = ops.convolution(a, weight, [1, 1], [0, 0], [0, 0], [1, 1])
    found = compiled(openvino.Model([y], [x], "sums"))(numpy.ones((1, 64, 8, 8), numpy.float32))[0]
    return bool(numpy.allclose(found, 127 * 64 * 9, rtol=1e-6))
