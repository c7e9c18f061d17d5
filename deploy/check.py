"""Compare an exported file with its network."""
import copy
from collections.abc import Iterable

import numpy
import torch
from torch import Tensor, nn

from deploy.graph import Run, is_rounding
from models import Width, set_bit_width
from models.quan_ops import ActivationQ
from utils import markdown_table, progress, write_json, write_text

AGREE = 99.5  # % of the predictions that must agree
POINTS = 0.1  # largest difference of top-1 in %, or one image where that is more
BATCH = 64
RELATIVE = 1e-4  # of the mean logit: a smaller mean difference from float64 is rounding
ALLOWED = 3  # images that rounding may move further than that, and FREQUENCY of all others
FREQUENCY = 0.02
FEW = 4  # images for each of ALLOWED
FAR = 10  # times torch's mean difference, where so many images may differ
COLUMNS = {  # heading of the table: (key of a result, format)
    "predictions that agree (%)": ("agree", ".2f"),
    "top-1 (%), file": ("top1", ".2f"), "network": ("network_top1", ".2f"),
    "logits, mean difference from float64": ("mean64", ".1e"),
    "torch float32's": ("torch_mean64", ".1e"), "largest": ("largest64", ".1e"),
    "images with another level than float64": ("flipped", "d"),
    "torch float32's images": ("torch_flipped", "d")}

Results = dict[Width, dict[str, float]]


def compare(model: nn.Module, run: Run, images: numpy.ndarray, labels: numpy.ndarray | None,
            bit_widths: Iterable[Width]) -> Results:
    """Return {bit-width: results of `row`} of a file's run and its network.

    images: (n, C, H, W) float32, normalized. labels: (n,), or None where they are not known.
    """
    exact = copy.deepcopy(model).double()
    results = {}
    for bits in bit_widths:
        parts = []
        for start in progress(range(0, len(images), BATCH), f"comparing at {bits} bits"):
            batch = images[start:start + BATCH]
            ours, levels = forward(model, batch, bits)
            theirs, exact_levels = forward(exact, batch.astype(numpy.float64), bits)
            flipped = numpy.zeros(len(batch), bool)
            for one, other in zip(levels, exact_levels):
                flipped |= (one != other).flatten(1).any(1).numpy()
            found = run(batch, bits)
            if found.shape != theirs.shape:
                raise ValueError(f"at {bits} bits the file's logits are of shape {found.shape}, "
                                 f"and the network's of {theirs.shape}: take the packed format")
            parts.append((found, ours, theirs, flipped))
        results[bits] = row(*map(numpy.concatenate, zip(*parts)), labels)
    return results


@torch.no_grad()
def forward(model: nn.Module, images: numpy.ndarray,
            bits: Width) -> tuple[numpy.ndarray, list[Tensor]]:
    """Return NumPy logits (n, classes), and the levels of each activation, (n, ...) uint8."""
    levels = []

    def note(layer, inputs, out):
        if is_rounding(layer):
            step = layer.quantizer.step_size()
            if step is None:  # it depends on the input
                found = layer.quantizer.integers(*inputs)[0]
            else:
                found = out / step
            levels.append(found.round().to(torch.uint8))

    hooks = [layer.register_forward_hook(note) for layer in model.modules()
             if isinstance(layer, ActivationQ)]
    try:
        set_bit_width(model, bits)
        logits = model(torch.from_numpy(images))
        if not isinstance(logits, Tensor):
            raise ValueError(f"the network returns a {type(logits).__name__}, and a file holds one "
                             "output, the logits: wrap it in a module that returns these")
        return logits.numpy(), levels
    finally:
        for hook in hooks:
            hook.remove()


def row(found: numpy.ndarray, ours: numpy.ndarray, exact: numpy.ndarray, flipped: numpy.ndarray,
        labels: numpy.ndarray | None = None) -> dict[str, float]:
    """Return the results of one bit-width, which COLUMNS lists.

    found, ours, exact: logits (n, classes) of the file, and of the network in float32 and float64.
    flipped: (n,) whether float32 and float64 differ in a level. An image of the file counts as
    flipped where its logits are further from float64 than rounding alone takes torch's.
    """
    answers = found.argmax(1)
    expected = ours.argmax(1)
    difference = numpy.abs(found - exact)
    torch_difference = numpy.abs(ours - exact).mean(1)
    bound = RELATIVE * numpy.abs(exact).mean()
    if not flipped.all():
        bound = max(bound, 2 * torch_difference[~flipped].mean())
    result = {"images": len(found), "finite": bool(numpy.isfinite([found, ours, exact]).all()),
              "agree": 100 * float((answers == expected).mean()),
              "mean64": float(difference.mean()), "largest64": float(difference.max()),
              "torch_mean64": float(torch_difference.mean()),
              "relative": float(difference.mean() / numpy.abs(exact).mean()),
              "flipped": int((difference.mean(1) > bound).sum()),
              "torch_flipped": int(flipped.sum())}
    if labels is not None:
        result["top1"] = 100 * float((answers == labels).mean())
        result["network_top1"] = 100 * float((expected == labels).mean())
    return result


def shortfall(results: Results) -> str:
    """Return how the results fall short of the network, as a message; "" where they do not."""
    shortfalls = []
    for bits, values in results.items():
        allowed = 2 * values["torch_flipped"] + FREQUENCY * values["images"]
        allowed += min(ALLOWED, values["images"] // FEW)
        differing = (1 - values["agree"] / 100) * values["images"]
        if allowed < values["images"]:
            is_off = values["flipped"] > allowed and values["mean64"] > 2 * values["torch_mean64"]
        else:  # all may differ, where torch itself differs in half of them
            is_off = values["mean64"] > FAR * values["torch_mean64"]
        if not values["finite"]:
            shortfalls.append(f"at {bits} bits there are logits that are not finite")
        elif is_off:
            shortfalls.append(
                f"at {bits} bits its logits are off by {values['relative']:.1g} of the network's, "
                f"in {values['flipped']} of {values['images']} images by more than rounding")
        elif values["agree"] < AGREE and differing > min(1.5, values["images"] / FEW):
            shortfalls.append(f"at {bits} bits {values['agree']:.2f} % of predictions agree, and "
                              f"{AGREE} % must")
        elif abs(values.get("top1", 0) - values.get("network_top1", 0)) > max(
                POINTS, 100 / values["images"]) + 1e-9:
            shortfalls.append(f"at {bits} bits top-1 is {values['top1']:.2f} %, and the network's "
                              f"{values['network_top1']:.2f} %")
    return "; ".join(shortfalls)


def table(results: Results) -> str:
    """Return a Markdown table, with the columns that all results have."""
    columns = {heading: column for heading, column in COLUMNS.items()
               if all(column[0] in values for values in results.values())}
    rows = [[bits, *(f"{values[name]:{form}}" for name, form in columns.values())]
            for bits, values in results.items()]
    return markdown_table(["bits", *columns], rows) + "\n"


def write(stem: str, results: dict[str, Results], source: str) -> None:
    """Print the tables, and write them to stem.md and all numbers to stem.json.

    results: {name of a runtime: results}.
    """
    count = next(iter(next(iter(results.values())).values()))["images"]
    text = f"{source} beside its network, {count} images\n"
    for name, found in results.items():
        text += f"\n{name}:\n\n{table(found)}"
    write_text(f"{stem}.md", text)
    write_json(f"{stem}.json", {"file": source, "results": {
        name: {"falls_short": shortfall(found), "bit_widths": found}
        for name, found in results.items()}})
    print(f"{text}\nwritten to {stem}.md and {stem}.json")
