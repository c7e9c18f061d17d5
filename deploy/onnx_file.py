"""ONNX files whose quantized convolutions are integer: uint8 weights, uint8 activations.

A layer's output is s acc + shift, where acc is an integer sum, and s and shift follow from the
scales and the BatchNorm. It is requantized as round(n (s acc + shift)), clipped to [0, n], where
n = 2^bits - 1.
"""
from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy
import onnx
import onnxruntime
from numpy.typing import ArrayLike, DTypeLike
from onnx import GraphProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from torch import Tensor, nn

from deploy.graph import (NESTED, ImageSize, Operation, Run, affine_of, float_weight, image_shape,
                          integer_weight, pool_settings, step_of, takes_levels, trace)
from models.bit_widths import FULL_PRECISION, BitWidth, check_bit_widths
from models.quan_ops import QuantizedLayer

OPSET = 21
IR_VERSION = 10  # of ONNX 1.16
ZERO = 128  # zero point of weights: ONNX Runtime's fast kernels take uint8
MAX_EXCEPTIONS = 0.01  # share of a layer's weights; each exception takes 36 bytes
LARGE = 1000  # constants with more numbers than this are shared by the bit-widths


class Value(NamedTuple):
    """A tensor of a graph, and the value that it stands for: scale * tensor + shift, per channel.

    kind: levels (uint8, 0 to n), sums (int32) or float. scale, shift: None for 1 and 0.
    """
    tensor: str
    kind: str = "float"
    scale: numpy.ndarray | None = None  # float64, (C, 1, 1) or one number
    shift: numpy.ndarray | None = None


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
        self.values = {}  # by name of the operation

    def node(self, kind: str, *inputs: str, **attributes: object) -> str:
        """Write a node; return the name of its output."""
        name = f"{self.prefix}{kind}{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def constant(self, array: ArrayLike, dtype: DTypeLike = numpy.float32) -> str:
        """Write a constant, or find an equal one; return its name."""
        array = numpy.ascontiguousarray(numpy.asarray(array, dtype))
        if self.outer and array.size >= LARGE:  # the Reshape is folded on load
            flat = self.outer.constant(array.ravel(), dtype)
            return self.node("Reshape", flat, self.constant(array.shape, numpy.int64))
        key = array.dtype.str, array.shape, array.tobytes()
        if key not in self.known:
            self.known[key] = f"{self.prefix}constant{len(self.constants)}"
            self.constants.append(numpy_helper.from_array(array, self.known[key]))
        return self.known[key]

    def write(self, operations: list[Operation], output: str) -> None:
        """Write all operations; output: the name of the logits."""
        for operation in operations[:-1]:
            inputs = [self.values[name] for name in operation.inputs]
            self.values[operation.name] = getattr(self, operation.kind)(operation, *inputs)
        last = self.as_float(self.values[operations[-1].inputs[0]])
        self.nodes.append(helper.make_node("Identity", [last], [output]))

    # ---- numbers

    def scaled(self, value: Value, factor: float = 1.0) -> str:
        """Write factor times a Value as a float tensor; return its name."""
        tensor, kind, scale, shift = value
        if kind != "float":
            tensor = self.node("Cast", tensor, to=TensorProto.FLOAT)
        if scale is not None or factor != 1:
            factors = factor if scale is None else factor * scale
            tensor = self.node("Mul", tensor, self.constant(factors))
        if shift is not None and numpy.any(shift):
            tensor = self.node("Add", tensor, self.constant(shift * factor))
        return tensor

    def as_float(self, value: Value) -> str:
        """Write a Value as a float tensor, that of levels once; return its name."""
        known = self.values.setdefault("floats", {})
        if value.tensor not in known or value.kind != "levels":
            known[value.tensor] = self.scaled(value)
        return known[value.tensor]

    def clipped(self, tensor: str, high: float) -> str:
        """Write a clip to [0, high]; return the name of its output."""
        return self.node("Clip", tensor, self.constant(0), self.constant(high))

    # ---- operations, a method per kind

    def input(self, operation: Operation) -> Value:
        return Value("images")

    def same(self, operation: Operation, value: Value) -> Value:
        return value

    def convolution(self, operation: Operation, value: Value) -> Value:
        layer = operation.layer
        settings = dict(strides=layer.stride, pads=layer.padding * 2, dilations=layer.dilation,
                        group=layer.groups, kernel_shape=layer.kernel_size)
        bias = None if layer.bias is None else column(layer.bias)
        if value.kind != "levels" or not takes_levels(layer):
            weight = self.constant(float_weight(layer).numpy())
            return Value(self.node("Conv", self.as_float(value), weight, **settings), shift=bias)

        weight, scale, doubled = self.integer_weight(operation)
        zero = self.constant(ZERO, numpy.uint8)
        sums = self.node("ConvInteger", value.tensor, weight, "", zero, **settings)
        if doubled:  # 2 k - 255 = 2 (k - 128) + 1
            ones = numpy.ones((1 if layer.groups == 1 else len(layer.weight),
                               *layer.weight.shape[1:]))
            box = self.node("ConvInteger", value.tensor, self.constant(ones, numpy.uint8),
                            **settings)
            twice = self.node("Mul", sums, self.constant(2, numpy.int32))
            sums = self.node("Add", twice, box)
        return Value(sums, "sums", scale * value.scale, bias)

    def integer_weight(self, operation: Operation) -> tuple[str, float | numpy.ndarray, bool]:
        """Return the tensor of a Conv2dQ's uint8 weight, its scale, and whether it is halved.

        The uint8 weight is the integers plus 128; or where these are odd and up to 255, their
        levels, which is halved.
        """
        integers, scale = integer_weight(operation)
        integers = integers.numpy()
        n = 2**operation.layer.bits - 1
        is_odd = (integers % 2 == 1).all()
        levels = (integers + n) // 2
        if is_odd and n == 255:
            return self.constant(levels, numpy.uint8), scale, True

        tensor = None
        if is_odd and self.outer:
            tensor = self.from_highest(operation, levels)
        if tensor is None:
            tensor = self.constant(integers + ZERO, numpy.uint8)
        return tensor, scale, False

    def from_highest(self, operation: Operation, levels: numpy.ndarray) -> str | None:
        """Return the tensor of a uint8 weight, computed from the levels at the highest bit-width.

        Returns None where more than MAX_EXCEPTIONS of its levels differ from that.
        """
        n = 2**operation.layer.bits - 1
        most = 2**self.outer.bits - 1
        with at_bits(operation.layer, self.outer.bits):
            stored = (integer_weight(operation)[0].numpy() + most) // 2
        places = numpy.argwhere(numpy.rint(stored * (n / most)) != levels)
        if len(places) > MAX_EXCEPTIONS * levels.size:
            return None
        level = self.node("Cast", self.constant(stored, numpy.uint8), to=TensorProto.FLOAT)
        level = self.node("Mul", level, self.constant(n / most))
        level = self.node("Round", level)
        if len(places):  # within rounding of a threshold
            exceptions = self.constant(levels[tuple(places.T)])
            level = self.node("ScatterND", level, self.constant(places, numpy.int64), exceptions)
        level = self.node("Mul", level, self.constant(2))
        level = self.node("Add", level, self.constant(ZERO - n))
        return self.node("Cast", level, to=TensorProto.UINT8)

    def batch_norm(self, operation: Operation, value: Value) -> Value:
        scale, shift = (column(part) for part in affine_of(operation.layer))
        if value.kind == "levels":
            value = Value(self.as_float(value))
        before = 1 if value.scale is None else value.scale
        added = 0 if value.shift is None else scale * value.shift
        return Value(value.tensor, value.kind, scale * before, shift + added)

    def activation(self, operation: Operation, value: Value) -> Value:
        layer = operation.layer
        if layer.bits == FULL_PRECISION:
            tensor = self.as_float(value)
            return Value(self.clipped(tensor, layer.limit) if layer.limit
                         else self.node("Relu", tensor))
        step = step_of(layer)
        n = 2**layer.bits - 1
        if not layer.rounding:
            return Value(self.clipped(self.as_float(value), n * step))
        level = self.node("Round", self.clipped(self.scaled(value, 1 / step), n))
        return Value(self.node("Cast", level, to=TensorProto.UINT8), "levels", numpy.float64(step))

    def relu(self, operation: Operation, value: Value) -> Value:
        return Value(self.node("Relu", self.as_float(value)))

    def max_pool(self, operation: Operation, value: Value) -> Value:
        layer = operation.layer
        size, stride, padding, dilation = pool_settings(layer)
        if value.kind != "levels":
            value = Value(self.as_float(value))
        tensor = self.node("MaxPool", value.tensor, kernel_shape=size, strides=stride,
                           pads=padding * 2, dilations=dilation, ceil_mode=int(layer.ceil_mode))
        return value._replace(tensor=tensor)

    def average(self, operation: Operation, value: Value) -> Value:
        return Value(self.node("GlobalAveragePool", self.as_float(value)))

    def mean(self, operation: Operation, value: Value) -> Value:
        return self.flatten(operation, self.average(operation, value))

    def add(self, operation: Operation, *values: Value) -> Value:
        return Value(self.node("Add", *map(self.as_float, values)))

    def cat(self, operation: Operation, *values: Value) -> Value:
        are_levels = all(value.kind == "levels" for value in values)
        if are_levels and len({float(value.scale) for value in values}) == 1:
            tensor = self.node("Concat", *(value.tensor for value in values), axis=1)
            return values[0]._replace(tensor=tensor)
        return Value(self.node("Concat", *map(self.as_float, values), axis=1))

    def flatten(self, operation: Operation, value: Value) -> Value:
        return Value(self.node("Flatten", self.as_float(value), axis=1))

    def linear(self, operation: Operation, value: Value) -> Value:
        layer = operation.layer
        inputs = [self.as_float(value), self.constant(layer.weight.detach().numpy())]
        if layer.bias is not None:
            inputs.append(self.constant(layer.bias.detach().numpy()))
        return Value(self.node("Gemm", *inputs, transB=1))


@contextlib.contextmanager
def at_bits(layer: QuantizedLayer, bits: int) -> Iterator[None]:
    """Quantize a layer's weight to other bits within the context."""
    before = layer.quantizer.state
    layer.quantizer.switch(bits, str(bits))
    try:
        yield
    finally:
        layer.quantizer.state = before


def column(values: Tensor) -> numpy.ndarray:
    """Return values per channel (C,) as NumPy float64 (C, 1, 1)."""
    return values.detach().double().numpy()[:, None, None]


def export(model: nn.Module, bit_widths: Iterable[BitWidth | int | str], path: str | Path,
           image_size: ImageSize, any_width: bool = False) -> None:
    """Write a model (in evaluation mode, float32, on the CPU) as one ONNX file.

    The input `images` is (N, 3, H, W) float32, normalized; the output `logits` is (N, classes).
    any_width: one file for all bit_widths, with a second input `bits`, int64; False: bit_widths has
    one element. Raises ValueError naming a layer that the format cannot represent.
    """
    bit_widths = check_bit_widths(bit_widths)
    if any_width:
        nodes, inputs, constants = any_width_graph(model, bit_widths)
    else:
        writer = Writer()
        writer.write(trace(model, *bit_widths), "logits")
        nodes = writer.nodes
        inputs = []
        constants = writer.constants

    images = helper.make_tensor_value_info(
        "images", TensorProto.FLOAT, ["batch", *image_shape(image_size)])
    graph = helper.make_graph(nodes, "any_precision", [images, *inputs], [logits_info("logits")],
                              constants)
    content = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)],
                                ir_version=IR_VERSION)
    content.metadata_props.add(key="bits", value=",".join(map(str, sorted(bit_widths))))
    onnx.checker.check_model(content, full_check=True)
    Path(path).write_bytes(content.SerializeToString(deterministic=True))


def logits_info(name: str) -> ValueInfoProto:
    """Describe logits, (batch, classes) float32, by name."""
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", None])


def any_width_graph(model: nn.Module, bit_widths: tuple[BitWidth, ...],
                    ) -> tuple[Sequence[NodeProto], list[ValueInfoProto], list[TensorProto]]:
    """Return nodes, further inputs and constants: a branch per bit-width, weights stored once."""
    others = sorted(set(bit_widths) - {*NESTED})
    if others:
        raise ValueError(f"{others[0]} bits do not follow from 8-bit weights: one ONNX file of any "
                         "bit-width holds 1, 2, 4 and 8 of them")

    outer = Writer()
    outer.bits = max(bit_widths).weights
    branch = None
    for bits in sorted(bit_widths):
        writer = Writer(f"b{bits}_", outer)
        output = f"logits{bits}"
        writer.write(trace(model, bits), output)
        graph = helper.make_graph(writer.nodes, f"bits{bits}", [], [logits_info(output)],
                                  writer.constants)
        branch = graph if branch is None else choose(bits, graph, branch)

    inputs = [helper.make_tensor_value_info("bits", TensorProto.INT64, [])]
    branch.node.append(helper.make_node("Identity", [branch.output[0].name], ["logits"]))
    return branch.node, inputs, [*outer.constants, *branch.initializer]


def choose(bits: BitWidth, graph: GraphProto, otherwise: GraphProto) -> GraphProto:
    """Return a graph that runs `graph` where the input `bits` has this value, else `otherwise`."""
    number = numpy_helper.from_array(numpy.array(bits.weights), f"is{bits}")
    equal = helper.make_node("Equal", ["bits", number.name], [f"equal{bits}"])
    choice = helper.make_node("If", [f"equal{bits}"], [f"choice{bits}"], then_branch=graph,
                              else_branch=otherwise)
    return helper.make_graph([equal, choice], f"either{bits}", [], [logits_info(f"choice{bits}")],
                             [number])


def load(path: str | Path, threads: int = 1) -> Run:
    """Return run(images, bits) in ONNX Runtime: float32 (N, 3, H, W) -> logits (N, classes).

    It raises ValueError for bits that the file does not have.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    widths = session.get_modelmeta().custom_metadata_map["bits"].split(",")
    chooses = len(session.get_inputs()) > 1

    def run(images, bits):
        if str(bits) not in widths:
            raise ValueError(f"{path} has no {bits} bits: choose from {', '.join(widths)}")
        inputs = {"images": images, **({"bits": numpy.array(int(str(bits)))} if chooses else {})}
        return session.run(None, inputs)[0]
    return run
