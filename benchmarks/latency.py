"""Measure how fast a network's ONNX files are beside float32, and int8 by the runtimes' own tools.

    python benchmarks/latency.py                                     # resnet20q, batch 8
    python benchmarks/latency.py --model svhnq --batch-size 64

Weights and BatchNorms are those of no training, so nothing has an accuracy: export.py --benchmark
measures a trained network. Here NNCF also quantizes only the layers that are quantized in ours.
Prints a Markdown table: milliseconds a batch on one thread, medians of CPU time in turn, and how
many times as fast as float32 in the same runtime. It needs requirements-export.txt and nncf.
"""
import functools
import platform
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy
import torch

import reference_way  # noqa: F401  first: it adds the project to the path
from deploy import benchmark, graph, onnx_file, runtimes
from engine.arguments import OneLineParser, bit_width_list
from engine.device import describe
from engine.errors import UserError, run_program
from models import DEFAULT_WIDTH, MODELS, build
from models.bit_widths import FULL_PRECISION
from models.quan_ops import QuantizedLayer
from utils import markdown_table

IMAGE_SIZE = 40
CALIBRATION = 16  # images; what is measured does not depend on their number


def float_nodes(model, path):
    """Return the nodes of a 32-bit ONNX file whose layers are not quantized here."""
    import onnx

    nodes = [node.name for node in onnx.load(path).graph.node if node.op_type in ("Conv", "Gemm")]
    layers = [operation.layer for operation in graph.operations_of(model, FULL_PRECISION)
              if operation.kind in ("convolution", "linear")]
    return [node for node, layer in zip(nodes, layers, strict=True)
            if not isinstance(layer, QuantizedLayer)]


def candidates(model, bit_widths, images, folder):
    """Return float32, int8 by the tools, and the files, in both runtimes; and notes."""
    about = {"size": IMAGE_SIZE}
    found, notes = benchmark.float_candidates(model, True, about, images, folder)
    in_float = float_nodes(model, folder / "float.onnx")
    folder_of_same = folder / "same"
    folder_of_same.mkdir()
    same = benchmark.quantize_by_nncf(folder / "float.onnx", images, folder_of_same, in_float)
    found.append(benchmark.Candidate(
        "OpenVINO int8 by NNCF of the layers that are quantized here", "8", 0,
        functools.partial(benchmark.file_run, runtimes.openvino_run, same, FULL_PRECISION, None)))
    exported = {}
    for bits in bit_widths:
        exported[bits] = folder / f"net_{bits}.onnx"
        onnx_file.export(model, [bits], exported[bits], IMAGE_SIZE)
    return [*found, *benchmark.exported_candidates(exported, "onnx", about, "float32")], notes


def main(options):
    for package in ("onnxruntime", "openvino", "nncf"):
        if not find_spec(package):
            raise UserError(f"{package} is not installed: pip install -r requirements-export.txt "
                            "nncf")
    torch.manual_seed(0)
    model = build(options.model, {*options.bits, FULL_PRECISION}, 10,
                  DEFAULT_WIDTH.get(options.model, 1)).eval()
    images = torch.randn(CALIBRATION, 3, IMAGE_SIZE, IMAGE_SIZE).numpy()
    with tempfile.TemporaryDirectory() as folder:
        found, notes = candidates(model, options.bits, images, Path(folder))
        batch = numpy.resize(images, (options.batch_size, *images.shape[1:]))
        times = benchmark.measure([each.make(1) for each in found], batch, 1)

    lines = []
    for runtime in ("OpenVINO", "ONNX Runtime"):
        rows = [(each, ms) for each, ms in zip(found, times) if runtime in each.name]
        float_ms, = (ms for each, ms in rows if each.name == f"{runtime} float32")
        for each, ms in rows:
            lines.append([each.name, each.bits, f"{ms:.1f}", f"{float_ms / ms:.2f}"])
    print(markdown_table(["", "bits", "ms", "times as fast as float32"], lines))
    print(f"\n{options.model}, {IMAGE_SIZE} x {IMAGE_SIZE} pixels, batch {options.batch_size}, one "
          f"thread; {describe(torch.device('cpu'))}, Python {platform.python_version()}, torch "
          f"{torch.__version__}{benchmark.versions()}")
    print("; ".join(notes))


def parse_args(argv=None):
    parser = OneLineParser(__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="resnet20q")
    parser.add_argument("--bits", type=bit_width_list, default=[1, 2, 4, 7, 8], metavar="K,...")
    parser.add_argument("--batch-size", type=int, choices=benchmark.REPEATS, default=8)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_program(main, parse_args)
