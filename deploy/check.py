"""Compare an exported file with its network, on images of the validation split."""
import copy
from argparse import Namespace
from collections.abc import Iterable

import numpy
import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from dataset.loader import make_loader
from deploy.graph import ImageSize, Run, image_shape, is_rounding, step_of
from engine.setup import open_data
from models import BitWidth, set_bit_width
from models.quan_ops import ActivationQ
from utils import write_json, write_text

AGREE = 99.5  # % of the answers that must agree
POINTS = 0.1  # largest difference of top-1 in %, or one image where that is more
BATCH = 64
IMAGES = 16  # random images on which every exported file is checked
RELATIVE = 1e-3  # largest difference of logits, relative to the largest logit
COLUMNS = {  # heading of the table: (key of compare()'s results, format)
    "answers that agree (%)": ("agree", ".2f"),
    "top-1 (%), file": ("top1", ".2f"), "network": ("network_top1", ".2f"),
    "logits, largest difference from float32": ("largest32", ".1e"), "mean": ("mean32", ".1e"),
    "largest from float64": ("largest64", ".1e"), "mean from float64": ("mean64", ".1e"),
    "torch float32's": ("torch_mean64", ".1e"),
    "images where float32 and float64 differ in a level": ("flipped", "d")}
LAYERS = {  # likewise, for compare_layers()
    "integer layers, from the same inputs": ("layers", "d"), "levels": ("levels", "d"),
    "not float64's": ("differ", "d"), "and not near a threshold": ("far", "d"),
    "largest relative difference of other outputs": ("relative", ".1e")}


def read_images(settings: Namespace, count: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """Return NumPy images (n, 3, H, W) float32 and labels (n,) of the validation split.

    They are evenly spaced, as some splits are sorted by class: `count` of them, or all.
    """
    _, val_set = open_data(settings)
    wanted = torch.linspace(0, len(val_set) - 1, min(count, len(val_set))).long().tolist()
    loader = make_loader(Subset(val_set, wanted), settings.dataset, torch.device("cpu"), BATCH,
                         train=False, memory_format=torch.contiguous_format)
    images, labels = zip(*loader)
    return torch.cat(images).numpy(), torch.cat(labels).numpy()


def compare(model: nn.Module, run: Run, images: numpy.ndarray, labels: numpy.ndarray,
            bit_widths: Iterable[BitWidth]) -> dict[BitWidth, dict[str, float]]:
    """Return {bit-width: results of `row`} of a file's run and its network."""
    exact = copy.deepcopy(model).double()
    results = {}
    for bits in bit_widths:
        parts = []
        for start in range(0, len(images), BATCH):
            batch = images[start:start + BATCH]
            ours, levels = forward(model, batch, bits)
            theirs, exact_levels = forward(exact, batch.astype(numpy.float64), bits)
            flipped = numpy.zeros(len(batch), bool)
            for one, other in zip(levels, exact_levels):
                flipped |= (one != other).flatten(1).any(1).numpy()
            parts.append((run(batch, bits), ours, theirs, flipped))
        results[bits] = row(*map(numpy.concatenate, zip(*parts)), labels)
    return results


def check_logits(model: nn.Module, run: Run, bit_widths: Iterable[BitWidth],
                 image_size: ImageSize) -> None:
    """Raise ValueError unless a file gives the network's logits on random images.

    The median over the images counts, as rounding may change a level in some of them.
    """
    shape = image_shape(image_size)
    images = torch.randn(IMAGES, *shape, generator=torch.Generator().manual_seed(0)).numpy()
    exact = copy.deepcopy(model).double()
    for width in bit_widths:
        expected, _ = forward(exact, images.astype(numpy.float64), width)
        found = run(images, width)
        if found.shape != expected.shape:
            raise ValueError(f"at {width} bits the file's logits are of shape {found.shape}, and "
                             f"the network's of {expected.shape}: take the packed format")
        difference = numpy.abs(found - expected).max(1) / numpy.abs(expected).max()
        if not numpy.isfinite(expected).all():
            raise ValueError(f"at {width} bits the network's logits are not finite")
        if not numpy.median(difference) < RELATIVE:
            raise ValueError(f"at {width} bits the file's logits are off by "
                             f"{numpy.median(difference):.1g} of the network's (at most "
                             f"{RELATIVE:g} is allowed): a layer computes something that this "
                             "format does not hold; take the packed format")


def row(found: numpy.ndarray, ours: numpy.ndarray, exact: numpy.ndarray, flipped: numpy.ndarray,
        labels: numpy.ndarray) -> dict[str, float]:
    """Return the results of one bit-width, which COLUMNS lists.

    found, ours, exact: logits (N, classes) of the file, and of the network in float32 and float64.
    flipped: (N,) whether float32 and float64 differ in a level.
    """
    answers = found.argmax(1)
    expected = ours.argmax(1)
    from32 = numpy.abs(found - ours)
    from64 = numpy.abs(found - exact)
    return {"images": len(labels), "agree": 100 * float((answers == expected).mean()),
            "top1": 100 * float((answers == labels).mean()),
            "network_top1": 100 * float((expected == labels).mean()),
            "largest32": float(from32.max()), "mean32": float(from32.mean()),
            "largest64": float(from64.max()), "mean64": float(from64.mean()),
            "torch_mean64": float(numpy.abs(ours - exact).mean()), "flipped": int(flipped.sum())}


@torch.no_grad()
def forward(model: nn.Module, images: numpy.ndarray,
            bits: BitWidth) -> tuple[numpy.ndarray, list[Tensor]]:
    """Return NumPy logits (n, classes), and the levels of each activation, (n, ...) uint8."""
    levels = []

    def note(layer, inputs, out):
        if is_rounding(layer):
            levels.append((out / step_of(layer)).round().to(torch.uint8))

    hooks = [layer.register_forward_hook(note) for layer in model.modules()
             if isinstance(layer, ActivationQ)]
    try:
        set_bit_width(model, bits)
        return model(torch.from_numpy(images)).numpy(), levels
    finally:
        for hook in hooks:
            hook.remove()


def falls_short(results: dict[BitWidth, dict[str, float]]) -> str:
    """Return how the results miss AGREE or POINTS, as a message; "" where they do not."""
    shortfalls = []
    for bits, values in results.items():
        allowed = max(POINTS, 100 / values["images"]) + 1e-9
        if values["agree"] < AGREE:
            shortfalls.append(f"at {bits} bits {values['agree']:.2f} % of answers agree, and "
                              f"{AGREE} % must")
        if abs(values["top1"] - values["network_top1"]) > allowed:
            shortfalls.append(f"at {bits} bits top-1 is {values['top1']:.2f} %, and the network's "
                              f"{values['network_top1']:.2f} %")
        if values.get("far"):
            shortfalls.append(f"at {bits} bits {values['far']} levels of single layers are wrong")
    return "; ".join(shortfalls)


def table(results: dict[BitWidth, dict[str, float]], columns: dict[str, tuple[str, str]]) -> str:
    """Return a Markdown table, with a row for each bit-width that has all columns."""
    lines = [f"| bits | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
    for bits, values in results.items():
        if not all(name in values for name, _ in columns.values()):
            continue
        cells = (f"{values[name]:{form}}" for name, form in columns.values())
        lines.append(f"| {bits} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write(stem: str, results: dict[BitWidth, dict[str, float]], source: str, form: str) -> None:
    """Print the tables, and write them to stem.md and all numbers to stem.json."""
    count = next(iter(results.values()))["images"]
    text = f"{source} ({form}) beside its network, {count} images\n\n{table(results, COLUMNS)}"
    if any("layers" in values for values in results.values()):
        text += f"\n{table(results, LAYERS)}"
    write_text(f"{stem}.md", text)
    write_json(f"{stem}.json", {"file": source, "format": form, "falls_short": falls_short(results),
                                "bit_widths": results})
    print(f"{text}\nwritten to {stem}.md and {stem}.json")
