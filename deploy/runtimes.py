"""Exported files in the runtimes that read them, as functions of images."""
import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy
import torch
from torch import Tensor, nn

from deploy.graph import Run
from models import load, set_bit_width
from models.packed import quantized_layers
from utils import one_line


def onnxruntime_run(path: str | Path, threads: int = 1) -> Run:
    """Return run(images, bits) of an ONNX file in ONNX Runtime, on the CPU.

    Raises ValueError where the file cannot be run, and for bits that it does not have.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Else its threads go on to use the cores after a call, and slow down what runs next.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # failures are raised
    with runtime_errors("ONNX Runtime", path):
        session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    widths = session.get_modelmeta().custom_metadata_map.get("bits", "").split(",")
    takes_bits = len(session.get_inputs()) > 1

    def run(images, bits):
        if not takes_bits and widths != [""] and str(bits) not in widths:
            raise ValueError(f"{path} has no {bits} bits: choose from {', '.join(widths)}")
        inputs = {"images": images}
        if takes_bits:
            inputs["bits"] = numpy.array(int(str(bits)))
        with runtime_errors("ONNX Runtime", path):
            return session.run(["logits"], inputs)[0]
    return run


def openvino_run(path: str | Path, threads: int = 1) -> Run:
    """Return run(images, bits) of an ONNX or OpenVINO file of one bit-width, on the CPU."""
    import openvino

    with runtime_errors("OpenVINO", path):
        request = openvino_core().compile_model(path, "CPU", {  # bfloat16 would be its default
            openvino.properties.hint.inference_precision(): openvino.Type.f32,
            openvino.properties.inference_num_threads(): threads}).create_infer_request()

    def run(images, bits):
        with runtime_errors("OpenVINO", path):
            return request.infer([images])[0].copy()
    return run


@functools.cache
def openvino_core() -> "openvino.Core":  # noqa: F821  which is imported where it is needed
    """Return OpenVINO's core, one for the whole process.

    After the end of a core, signals would meet a stack that its CPU plugin has freed.
    """
    import openvino

    return openvino.Core()


def packed_run(path: str | Path) -> Run:
    """Return run(images, bits) of a packed file; raises FileError where it cannot be loaded."""
    model = load(path)
    running = []  # names of the quantized layers that are computing

    def ended(layer: nn.Module, inputs: tuple, output: Tensor) -> None:
        running.pop()

    for name, layer in quantized_layers(model).items():
        layer.register_forward_pre_hook(lambda layer, inputs, name=name: running.append(name))
        layer.register_forward_hook(ended)

    def run(images, bits):
        set_bit_width(model, bits)
        running.clear()
        try:
            with torch.no_grad():
                return model(torch.from_numpy(images)).numpy()
        except (RuntimeError, TypeError) as error:
            if not running:
                raise
            # such as of a layer that computes with `weight` itself
            raise ValueError(f"layer {running[-1]} does not run with a packed weight "
                             f"({one_line(error)})") from error
    return run


@contextlib.contextmanager
def runtime_errors(name: str, path: str | Path) -> Iterator[None]:
    """Raise ValueError in the place of a runtime's own errors, which have no common class."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{name} cannot run {path} ({type(error).__name__}: "
                         f"{one_line(error)})") from None
