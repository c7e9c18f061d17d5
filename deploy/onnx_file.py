"""ONNX files in quantize/dequantize (QDQ) form, which ONNX Runtime, OpenVINO and TensorRT read.

Activations pass through QuantizeLinear, whose levels are clipped to [0, n], and DequantizeLinear;
weights are int8 times a scale per channel, which holds the BatchNorm that follows. All
else is float32. A runtime that knows the pattern computes such convolutions in integers.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy
import onnx
import torch
from numpy.typing import ArrayLike, DTypeLike
from onnx import GraphProto, TensorProto, ValueInfoProto, helper, numpy_helper
from torch import nn

from deploy.graph import (ImageSize, Operation, affine_of, float_weight, image_shape,
                          integer_weight, is_rounding, operations_of, pool_settings,
                          takes_levels)
from deploy.thresholds import LARGEST, requantization
from models.assignment import Width
from models.bit_widths import FULL_PRECISION, BitWidth, highest_first
from models.quan_ops import width_of
from utils import one_line

OPSET = 17
IR_VERSION = 8  # of ONNX 1.12
MAX_EXCEPTIONS = 0.01  # share of a layer's weights; each exception takes 36 bytes
LARGE = 1000  # constants with more numbers than this are shared by the bit-widths


class Value(NamedTuple):
    """A float tensor of a graph.

    levels: it as uint8 before DequantizeLinear, or None. step, highest: of the levels. requantizes:
    whether a convolution made it that the next activation turns into levels without a clip.
    """
    tensor: str
    levels: str | None = None
    step: float = 1.0
    highest: int = 0
    requantizes: bool = False


class Writer:
    """Writes the operations of a network at one bit-width as the nodes of an ONNX graph.

    prefix: of all names. outer: the Writer of the enclosing graph, with what bit-widths share.
    """

    def __init__(self, prefix: str = "", outer: Writer | None = None):
        self.prefix = prefix
        self.outer = outer
        self.nodes = []
        self.constants = []
        self.known = {}  # names of constants, by content
        self.stored = {}  # weights that bit-widths share, {path: (int8 array, names)}
        self.values = {}  # by name of the operation
        self.folded = set()  # names of the BatchNorms that a convolution holds

    def node(self, kind: str, *inputs: str, **attributes: object) -> str:
        """Write a node; return the name of its output."""
        name = f"{self.prefix}{kind}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def constant(self, array: ArrayLike, dtype: DTypeLike = numpy.float32) -> str:
        """Write a constant, or find an equal one; return its name."""
        array = numpy.asarray(array, dtype, order="C")
        if self.outer and array.size >= LARGE:
            return self.outer.constant(array, dtype)
        key = array.dtype.str, array.shape, array.tobytes()
        if key not in self.known:
            self.known[key] = f"{self.prefix}constant{len(self.constants)}"
            self.constants.append(numpy_helper.from_array(array, self.known[key]))
        return self.known[key]

    def write(self, operations: Sequence[Operation], images: str, output: str) -> None:
        """Write all operations; images, output: the names of the input and of the logits."""
        self.images = images
        self.counts = Counter(name for operation in operations for name in operation.inputs)
        self.readers = {name: operation for operation in operations for name in operation.inputs}
        for operation in operations[:-1]:
            inputs = [self.values[name] for name in operation.inputs]
            if operation.name in self.folded:
                self.values[operation.name] = inputs[0]
            else:
                self.values[operation.name] = getattr(self, operation.kind)(operation, *inputs)
        last = self.values[operations[-1].inputs[0]].tensor
        self.nodes.append(helper.make_node("Identity", [last], [output]))

    def only_reader(self, operation: Operation, kind: str) -> Operation | None:
        """Return the operation of this kind that alone reads the output of another, or None."""
        reader = self.readers[operation.name]
        return reader if self.counts[operation.name] == 1 and reader.kind == kind else None

    def normalized(self, pixels: str, mean: numpy.ndarray, std: numpy.ndarray) -> str:
        """Write the normalization of uint8 images (N, H, W, C); return the name of (N, C, H, W)."""
        images = self.node("Transpose", pixels, perm=[0, 3, 1, 2])
        images = self.node("Cast", images, to=TensorProto.FLOAT)
        images = self.node("Mul", images, self.constant(column(1 / (255 * std))))
        return self.node("Add", images, self.constant(column(-mean / std)))

    # ---- operations, a method per kind

    def input(self, operation: Operation) -> Value:
        return Value(self.images)

    def same(self, operation: Operation, value: Value) -> Value:
        return value

    def convolution(self, operation: Operation, value: Value) -> Value:
        layer = operation.layer
        settings = dict(strides=layer.stride, pads=layer.padding * 2, dilations=layer.dilation,
                        group=layer.groups, kernel_shape=layer.kernel_size)
        scale = numpy.ones(layer.out_channels)
        shift = numpy.zeros(layer.out_channels)
        if layer.bias is not None:
            shift = layer.bias.detach().double().numpy()
        last = operation
        norm = self.only_reader(operation, "batch_norm")
        is_integer = value.levels is not None and takes_levels(layer)
        if norm and (is_integer or not self.outer):  # bit-widths share float weights
            scale, added = (part.numpy() for part in affine_of(norm.layer))
            shift = scale * shift + added
            self.folded.add(norm.name)
            last = norm

        if not is_integer:
            weight = float_weight(layer).double().numpy() * scale[:, None, None, None]
            return Value(self.node("Conv", value.tensor, self.constant(weight),
                                   self.constant(shift), **settings))
        return self.integer_convolution(operation, value, scale, shift, settings,
                                        self.only_reader(last, "activation"))

    def integer_convolution(self, operation: Operation, value: Value, scale: numpy.ndarray,
                            shift: numpy.ndarray, settings: dict,
                            activation: Operation | None) -> Value:
        """Write a convolution of levels; activation: the operation that alone reads it, or None.

        scale, shift: (O,) float64, which follow the convolution.
        """
        integers, unit = integer_weight(operation)
        integers = integers.numpy()
        gain = scale * (unit if isinstance(unit, float) else unit[:, 0, 0])
        if integers.max() > LARGEST or integers.min() < -LARGEST - 1:  # then they are odd
            return self.halved_convolution(operation, value, integers, gain, shift, settings)

        found = None
        if activation and is_rounding(activation.layer):
            step = float(activation.layer.quantizer.step_size())
            found = requantization(integers, gain * value.step / step, shift / step,
                                   2**activation.layer.bits - 1, value.highest)
        if not found:
            weight = self.scaled_int8_weight(operation, integers, gain)
            return Value(self.node("Conv", value.tensor, weight, self.constant(shift), **settings))

        weight = self.node("DequantizeLinear",
                           self.int8_weight(operation, integers, found.factor),
                           self.constant(found.ratio * step / value.step),
                           self.constant(numpy.zeros(len(gain)), numpy.int8), axis=0)
        bias = self.node("DequantizeLinear", self.constant(found.bias, numpy.int32),
                         self.constant(found.ratio * step),
                         self.constant(numpy.zeros(len(gain)), numpy.int32), axis=0)
        return Value(self.node("Conv", value.tensor, weight, bias, **settings), requantizes=True)

    def halved_convolution(self, operation: Operation, value: Value, integers: numpy.ndarray,
                           gain: numpy.ndarray, shift: numpy.ndarray, settings: dict) -> Value:
        """Write a convolution whose odd integers, up to 255, are 2 k + 1 with k in int8."""
        weight = self.scaled_int8_weight(operation, integers // 2, 2 * gain)
        y = self.node("Conv", value.tensor, weight, self.constant(shift), **settings)
        channels = 1 if settings["group"] == 1 else len(integers)
        ones = self.constant(numpy.ones((channels, *integers.shape[1:])), numpy.int8)
        ones = self.scaled(ones, numpy.ones(channels))  # in integers, too
        box = self.node("Conv", value.tensor, ones, **settings)
        return Value(self.node("Add", y, self.node("Mul", box, self.constant(column(gain)))))

    # ---- integer weights

    def scaled_int8_weight(self, operation: Operation, integers: numpy.ndarray,
                           scale: numpy.ndarray) -> str:
        """Write integers, in int8, times a scale per channel; return the name of the product.

        This is DequantizeLinear in other words, which ONNX Runtime computes when it loads the file.
        It leaves the convolution alone, whose bias it would else round to an integer.
        """
        return self.scaled(self.int8_weight(operation, integers), scale)

    def scaled(self, weight: str, scale: numpy.ndarray) -> str:
        """Write an int8 tensor times a scale per channel; return the name of the product."""
        tensor = self.node("Cast", weight, to=TensorProto.FLOAT)
        return self.node("Mul", tensor, self.constant(scale[:, None, None, None]))

    def int8_weight(self, operation: Operation, integers: numpy.ndarray,
                    factor: numpy.ndarray | None = None) -> str:
        """Write integers times a factor per channel; return the name of the int8 tensor."""
        if factor is None:
            factor = numpy.ones(len(integers), int)
        if self.outer:
            tensor = self.from_stored(operation, integers, factor)
            if tensor:
                return tensor
        return self.constant(integers * factor[:, None, None, None], numpy.int8)

    def from_stored(self, operation: Operation, integers: numpy.ndarray,
                    factor: numpy.ndarray) -> str | None:
        """Return the name of an int8 weight that is computed from the one that bit-widths share.

        That is the first that is written, at the most bits. Returns None where more than
        MAX_EXCEPTIONS of the weights do not follow from it by a table.
        """
        if operation.path not in self.outer.stored:
            name = self.outer.constant(integers, numpy.int8)
            self.outer.stored[operation.path] = integers, self.outer.node(
                "Cast", name, to=TensorProto.INT32)
        stored, indices = self.outer.stored[operation.path]
        pairs = 256 * (stored.ravel() % 256) + integers.ravel() % 256
        table = numpy.bincount(pairs, minlength=2**16).reshape(256, 256).argmax(1)
        table = table.astype(numpy.uint8).view(numpy.int8).astype(int)
        places = numpy.argwhere(table[stored] != integers)  # negative indices count from the end
        if len(places) > MAX_EXCEPTIONS * integers.size:
            return None

        tensor = self.node("Gather", self.constant(table, numpy.int32), indices)
        if len(places):  # within rounding of a threshold
            exceptions = self.constant(integers[tuple(places.T)], numpy.int32)
            tensor = self.node("ScatterND", tensor, self.constant(places, numpy.int64), exceptions)
        if (factor != 1).any():
            tensor = self.node("Mul", tensor,
                               self.constant(factor[:, None, None, None], numpy.int32))
        return self.node("Cast", tensor, to=TensorProto.INT8)

    # ---- other operations

    def batch_norm(self, operation: Operation, value: Value) -> Value:
        scale, shift = (self.constant(column(part.numpy())) for part in affine_of(operation.layer))
        return Value(self.node("Add", self.node("Mul", value.tensor, scale), shift))

    def activation(self, operation: Operation, value: Value) -> Value:
        layer = operation.layer
        if layer.bits == FULL_PRECISION:
            return Value(self.clipped(value.tensor, layer.limit) if layer.limit
                         else self.node("Relu", value.tensor))
        step = float(layer.quantizer.step_size())
        n = 2**layer.bits - 1
        if not layer.rounding:
            return Value(self.clipped(value.tensor, n * step))
        size = self.constant(step)
        zero = self.constant(0, numpy.uint8)
        if not value.requantizes:  # Min, unlike Clip, keeps ONNX Runtime from rounding the bias
            below = self.node("Min", value.tensor, self.constant((n + 0.25) * step))
            levels = self.node("QuantizeLinear", below, size, zero)
        else:
            levels = self.node("QuantizeLinear", value.tensor, size, zero)
            if n < 255:
                levels = self.node("Clip", levels, zero, self.constant(n, numpy.uint8))
        return self.of_levels(levels, step, n)

    def of_levels(self, levels: str, step: float, highest: int) -> Value:
        """Write DequantizeLinear of levels."""
        tensor = self.node("DequantizeLinear", levels, self.constant(step),
                           self.constant(0, numpy.uint8))
        return Value(tensor, levels, step, highest)

    def clipped(self, tensor: str, high: float) -> str:
        """Write a clip to [0, high]; return the name of its output."""
        return self.node("Clip", tensor, self.constant(0), self.constant(high))

    def relu(self, operation: Operation, value: Value) -> Value:
        return Value(self.node("Relu", value.tensor))

    def max_pool(self, operation: Operation, value: Value) -> Value:
        layer = operation.layer
        size, stride, padding, dilation = pool_settings(layer)
        settings = dict(kernel_shape=size, strides=stride, pads=padding * 2, dilations=dilation,
                        ceil_mode=int(layer.ceil_mode))
        if value.levels is None:
            return Value(self.node("MaxPool", value.tensor, **settings))
        levels = self.node("MaxPool", value.levels, **settings)
        return self.of_levels(levels, value.step, value.highest)

    def average(self, operation: Operation, value: Value) -> Value:
        return Value(self.node("GlobalAveragePool", value.tensor))

    def mean(self, operation: Operation, value: Value) -> Value:
        return self.flatten(operation, self.average(operation, value))

    def add(self, operation: Operation, *values: Value) -> Value:
        return Value(self.node("Add", *(value.tensor for value in values)))

    def cat(self, operation: Operation, *values: Value) -> Value:
        if all(value.levels for value in values) and len({value[2:] for value in values}) == 1:
            levels = self.node("Concat", *(value.levels for value in values), axis=1)
            return self.of_levels(levels, values[0].step, values[0].highest)
        return Value(self.node("Concat", *(value.tensor for value in values), axis=1))

    def flatten(self, operation: Operation, value: Value) -> Value:
        return Value(self.node("Flatten", value.tensor, axis=1))

    def linear(self, operation: Operation, value: Value) -> Value:
        layer = operation.layer
        inputs = [value.tensor, self.constant(layer.weight.detach().numpy())]
        if layer.bias is not None:
            inputs.append(self.constant(layer.bias.detach().numpy()))
        return Value(self.node("Gemm", *inputs, transB=1))


def column(values: numpy.ndarray) -> numpy.ndarray:
    """Return values per channel (C,) as (C, 1, 1)."""
    return values[:, None, None]


def export(model: nn.Module, bit_widths: Iterable[Width | int | str],
           path: str | Path, image_size: ImageSize, any_width: bool = False,
           metadata: dict[str, str] | None = None,
           pixels: tuple[Sequence[float], Sequence[float]] | None = None) -> None:
    """Write a model (in evaluation mode, float32, on the CPU) as one ONNX file.

    The input `images` is (N, C, H, W) float32, normalized; the output `logits` is (N, classes).
    any_width: one file for all bit_widths, with a second input `bits`, int64; False: bit_widths has
    one element, which may be an assignment. metadata: {name: text}. pixels: mean and std per
    channel; the input is then uint8 (N, H, W, C), and the file normalizes it. Raises ValueError
    naming a layer that the format cannot represent.
    """
    bit_widths = [width_of(model, width) for width in bit_widths]
    channels, height, width = image_shape(image_size)
    outer = Writer()
    name = "images"
    shape = ["batch", channels, height, width]
    if pixels:
        shape = ["batch", height, width, channels]
        name = outer.normalized(name, *(numpy.asarray(part, float) for part in pixels))
    images = helper.make_tensor_value_info(
        "images", TensorProto.UINT8 if pixels else TensorProto.FLOAT, shape)
    inputs = [images]
    if any_width:
        inputs.append(helper.make_tensor_value_info("bits", TensorProto.INT64, []))
        write_branches(outer, model, highest_first(bit_widths), name)
    else:
        outer.write(operations_of(model, *bit_widths), name, "logits")

    with torch.no_grad():
        logits = logits_info("logits", model(torch.zeros(1, channels, height, width)).shape[-1])
    graph = helper.make_graph(outer.nodes, "any_precision", inputs, [logits], outer.constants)
    content = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)],
                                ir_version=IR_VERSION)
    helper.set_model_props(content, metadata or {})
    try:
        onnx.checker.check_model(content, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ValueError(f"the network does not fit ONNX ({one_line(error)}): take the packed "
                         "format") from None
    Path(path).write_bytes(content.SerializeToString(deterministic=True))


def logits_info(name: str, classes: int | None = None) -> ValueInfoProto:
    """Describe logits, (batch, classes) float32, by name."""
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", classes])


def write_branches(outer: Writer, model: nn.Module, bit_widths: Iterable[BitWidth],
                   images: str) -> None:
    """Write a branch per bit-width, weights stored once; the input `bits` chooses among them."""
    others = [width for width in bit_widths if not isinstance(width.plain, int)]
    if others:
        raise ValueError(f"{others[0]} is not one number of bits, as the input of one file of any "
                         "bit-width is: export it as a file of its own")
    bit_widths = sorted(bit_widths, reverse=True)
    checked = checked_bits(outer, [width.weights for width in bit_widths])
    branch = None
    for bits in bit_widths:
        writer = Writer(f"b{bits}_", outer)
        output = f"logits{bits}"
        writer.write(operations_of(model, bits), images, output)
        graph = helper.make_graph(writer.nodes, f"bits{bits}", [], [logits_info(output)],
                                  writer.constants)
        branch = graph if branch is None else choose(checked, bits, graph, branch)
    outer.nodes += branch.node
    outer.constants += branch.initializer
    outer.nodes.append(helper.make_node("Identity", [branch.output[0].name], ["logits"]))


def checked_bits(writer: Writer, choices: Sequence[int]) -> str:
    """Write nodes that fail when they run with other `bits`; return the name of these bits."""
    equal = writer.node("Equal", "bits", writer.constant(choices, numpy.int64))
    found = writer.node("ReduceMax", writer.node("Cast", equal, to=TensorProto.INT64), keepdims=0)
    missing = writer.node("Sub", writer.constant(1, numpy.int64), found)
    name = f"bits_must_be_one_of_{'_'.join(map(str, sorted(choices)))}"
    zero = writer.constant([0], numpy.int64)  # which has no element 1
    writer.nodes.append(helper.make_node("Gather", [zero, missing], ["checked"], name))
    return writer.node("Add", "bits", "checked")


def choose(chosen: str, bits: BitWidth, graph: GraphProto, otherwise: GraphProto) -> GraphProto:
    """Return a graph that runs `graph` where the tensor `chosen` is `bits`, else `otherwise`."""
    number = numpy_helper.from_array(numpy.array(bits.weights), f"is{bits}")
    equal = helper.make_node("Equal", [chosen, number.name], [f"equal{bits}"])
    choice = helper.make_node("If", [f"equal{bits}"], [f"choice{bits}"], then_branch=graph,
                              else_branch=otherwise)
    return helper.make_graph([equal, choice], f"either{bits}", [], [logits_info(f"choice{bits}")],
                             [number])


def add_metadata(path: str | Path, metadata: dict[str, str]) -> None:
    """Add {name: text} to a file's metadata."""
    content = onnx.load(path)
    known = {entry.key: entry.value for entry in content.metadata_props}
    helper.set_model_props(content, {**known, **metadata})
    Path(path).write_bytes(content.SerializeToString(deterministic=True))
