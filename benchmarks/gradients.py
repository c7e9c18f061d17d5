"""Compare one step's gradients of train.py's way and of the reference way with float64's.

    python benchmarks/gradients.py results/RUN
    python benchmarks/gradients.py results/RUN --batches 50 --loss hard

Each batch starts from the run's weights again, on its data set's default training split, without
dropout and on the CPU. Prints a Markdown table of distances, relative to float64's gradient: the
norm of the difference of all gradients together.
"""
import argparse
import copy
import statistics
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from reference_way import ReferenceForwardPass  # first: it adds the project to the path

import models
from dataset.data import DATASETS, get_dataset
from dataset.loader import make_loader
from engine.arguments import OneLineParser, number
from engine.errors import UserError, run_program
from engine.forward_pass import ForwardPass
from models.losses import NEXT_TARGET
from utils import markdown_table

CPU = torch.device("cpu")


def gradient(way: type[ForwardPass], model: nn.Module, images: Tensor, labels: Tensor,
             loss: str) -> Tensor:
    """Return all gradients of a step, from the model's weights, as one float64 vector."""
    model = copy.deepcopy(model).train()
    way(model, CPU).backward(images, labels, model.spec["bit_widths"], loss)
    return torch.cat([parameter.grad.double().flatten() for parameter in model.parameters()
                      if parameter.grad is not None])


def main(options: argparse.Namespace) -> dict[str, list[float]]:
    """Print the table; return {what is compared: a distance for each batch}."""
    model = models.load(options.run)
    name = (model.images or {}).get("dataset")
    if name not in DATASETS:
        raise UserError(f"{options.run} does not say which data set it was trained on: give a run "
                        "of one of train.py's own data sets")
    for layer in model.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    images = get_dataset(name, next(iter(DATASETS[name].val_split)), data_dir=options.data_dir)
    loader = make_loader(images, name, CPU, options.batch_size, train=True)
    distances = {"default from float64": [], "reference from float64": [],
                 "default from reference": []}
    for batch, labels in islice(loader, options.batches):
        exact = gradient(ReferenceForwardPass, model.double(), batch.double(), labels, options.loss)
        model.float()
        default = gradient(ForwardPass, model, batch, labels, options.loss)
        reference = gradient(ReferenceForwardPass, model, batch, labels, options.loss)
        for what, difference in zip(distances, (default - exact, reference - exact,
                                                default - reference)):
            distances[what].append(float(difference.norm() / exact.norm()))
    widths = ", ".join(map(str, model.spec["bit_widths"]))
    count = len(distances["default from reference"])
    print(f"{model.spec['model']} on {name} at {widths} bits, {options.loss} loss, {count} batches "
          f"of at most {options.batch_size}, torch {torch.__version__}\n")
    rows = [[what, f"{statistics.median(values):.2g}", f"{max(values):.2g}"]
            for what, values in distances.items()]
    print(markdown_table(["relative distance of gradients", "median", "largest"], rows))
    return distances


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="a results folder or a checkpoint")
    parser.add_argument("--batches", type=number(int, 1), default=20)
    parser.add_argument("--batch-size", type=number(int, 2), default=64)
    parser.add_argument("--loss", choices=NEXT_TARGET, default="recursive")
    parser.add_argument("--data-dir", type=Path)
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_program(main, parse_args)
