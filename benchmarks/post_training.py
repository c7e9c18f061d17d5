"""Quantize float networks after training by the runtimes' own tools, and measure their accuracy.

    python benchmarks/post_training.py results/fashion_table/dedicated_32_seed?

Each is a results folder, or a checkpoint, with a 32-bit network. It becomes an ONNX file in
float32, and int8 by ONNX Runtime's quantize_static and by NNCF (pip install nncf), calibrated on
300 training images. Prints top-1 on the whole validation split of each, and mean and standard
deviation of all. Writes post_training.json into each folder; the same command again measures only
those without one.
"""
import json
import tempfile
from pathlib import Path

import torch

import reference_way  # noqa: F401  first: it adds the project to the path
import export
from deploy import benchmark
from engine.arguments import OneLineParser
from engine.errors import UserError, run_program
from engine.resume import Checkpoint
from engine.setup import open_data
from models.bit_widths import FULL_PRECISION
from models.checkpoint import LATEST, find_file, network_of
from utils import markdown_table, mean_and_deviation, progress, write_json


def measure(path):
    """Return {way: top-1 in %} of a float network as it is and after each tool, and notes."""
    checkpoint = Checkpoint(find_file(path, LATEST))
    network, _ = network_of(checkpoint.content, checkpoint.path, [FULL_PRECISION])
    if FULL_PRECISION in network.calibrated:
        raise UserError(f"{path} was not trained at 32 bits: give networks that were")
    about = export.image_description(checkpoint)
    settings = export.data_settings(checkpoint, about)
    train_set, val_set = open_data(settings)
    images, labels = export.read_images(val_set, settings, len(val_set))
    calibration, _ = export.read_images(train_set, settings, export.CALIBRATION)
    with tempfile.TemporaryDirectory() as folder:
        candidates, notes = benchmark.float_candidates(network, True, about, calibration,
                                                       Path(folder))
        with progress(candidates, str(path)) as shown:
            found = {each.name: benchmark.top1(each, images, labels) for each in shown}
    return {"top1": found, "images": len(labels), "notes": notes,
            "versions": f"torch {torch.__version__}{benchmark.versions()}"}


def main(options):
    results = []
    for run in options.runs:
        file = Path(run) / "post_training.json" if Path(run).is_dir() else None
        if file and file.exists():
            found = json.loads(file.read_text())
        else:
            found = measure(run)
            if file:
                write_json(file, found)
        print(f"{run}: {', '.join(f'{name} {top1:.2f}' for name, top1 in found['top1'].items())}",
              flush=True)
        results.append(found)

    rows = [[name, mean_and_deviation([found["top1"][name] for found in results
                                       if name in found["top1"]])]
            for name in results[0]["top1"]]
    head = [f"top-1 (%) on {results[0]['images']} images", "mean ± standard deviation"]
    print(f"\n{markdown_table(head, rows)}")
    notes = dict.fromkeys(note for found in results for note in found["notes"])
    print("; ".join(["", *dict.fromkeys(found["versions"] for found in results), *notes])[2:])


def parse_args(argv=None):
    parser = OneLineParser(__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", help="results folders or checkpoints")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_program(main, parse_args)
