"""Find bits for each layer of a trained network, within a budget, without training.

    python search.py results/RUN --budget 4bit,12.5%,2bit     # writes layer_bits.json
    python train.py --evaluate --pretrain results/RUN --layer_bits FOLDER/layer_bits.json \\
        --calibrate 20
    python search.py results/RUN --cost 4                     # what each layer costs
"""
if __name__ == "__main__":
    from engine.startup import prepare_process
    prepare_process()

import math
import re
from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Subset

from dataset.data import DATASETS, Samples, get_dataset
from dataset.loader import fingerprint, make_loader
from engine.arguments import OneLineParser, add_source, number, path_text, run_name
from engine.bit_search import Search, Step
from engine.device import choose_device
from engine.distributed import world_size
from engine.errors import UserError, run_program
from engine.figures import COLORS, legend_below, new_figure, save_figure
from engine.forward_pass import CHECKED, ForwardPass
from engine.resume import Checkpoint, resolve
from engine.run_folder import PATH_FILE, RunFolder, damaged, log, parse_json, read_text
from engine.setup import check_classes, make_forward_pass
from models import (Assignment, BitWidth, bit_widths_of, packed, read_assignments,
                    saved_bit_widths)
from models.assignment import is_name
from models.checkpoint import network_of
from models.cost import Costs, cost_table, totals
from models.fields import is_finite_number, is_whole
from models.losses import check_forward_loss
from utils import brief, flag_text, markdown_table, one_line, write_json, write_text

ASSIGNMENTS_FILE, TABLE_FILE, FIGURE_FILE = "layer_bits.json", "path.md", "path.png"
FIELDS = {"budget": ("bit_operations", "ops"), "bytes": ("weight_bytes", "bytes")}


class Budget(NamedTuple):
    """A budget: its text, and a number, a fraction of the highest bit-width's, or a bit-width."""
    text: str
    value: float | BitWidth
    is_fraction: bool = False


def main(args: Namespace) -> Path | None:
    """Search, or print what each layer costs; return the folder of the search."""
    if world_size() > 1:
        raise UserError(f"a search runs in one process, and WORLD_SIZE is {world_size()}: start it "
                        "without torchrun")
    device = choose_device(args.device)
    flags = {"evaluate": True, "pretrain": args.source, "data_dir": args.data_dir,
             "dataset": args.dataset}
    settings, checkpoint = resolve(Namespace(
        **{name: value for name, value in flags.items() if value is not None}))
    model, _ = network_of(checkpoint.content, checkpoint.path)
    try:
        costs = Costs(model.to(device), DATASETS[settings.dataset].image_size)
    except ValueError as error:
        raise UserError(f"{checkpoint.path}: {error}") from None
    if args.cost:
        print_costs(costs, highest(model) if args.cost == "highest" else args.cost)
        return None

    bit_widths = usable_bit_widths(checkpoint)
    forward_pass = make_forward_pass(settings, model, device)
    dataset = get_dataset(settings.dataset, settings.train_split, data_dir=settings.data_dir)
    check_classes(model, checkpoint.content, checkpoint.path, settings.dataset, dataset)
    calibration, held_out, count, data = read_images(args, settings, dataset, forward_pass, device)
    with forward_pass.autocast():
        check_forward_loss(model, calibration[0][:CHECKED])
    field = next(name for name in FIELDS if getattr(args, name))
    search = Search(model, forward_pass, costs, bit_widths, calibration, held_out, FIELDS[field][0])
    budgets = resolve_budgets(search, getattr(args, field), field)

    name = f"{run_name(settings)}_search"
    folder = Path(args.results_dir or f"results/{name}")
    with RunFolder(folder, name, in_place=(folder / PATH_FILE).exists()) as run:
        identity = {"checkpoint": packed.digest(checkpoint.content["state_dict"], {}),
                    "data": data, "bit_widths": flag_text(bit_widths), "by": search.by,
                    "images": count, "seed": args.seed}
        path = read_path(run.path / PATH_FILE, identity)
        damage = search.find_damage(path)
        if damage is not None:
            raise damaged(run.path / PATH_FILE, f"step {damage}", path[damage].unit,
                          "one that follows from the step before it")
        for file in (ASSIGNMENTS_FILE, TABLE_FILE, FIGURE_FILE):
            if not path and (run.path / file).exists():
                raise UserError(f"{run.path / file} is not of a search that could go on: choose "
                                "another folder with --results-dir")
        log.info(f"searching bits for {len(search.units)} layers of {checkpoint.path}, of "
                 f"{flag_text(bit_widths)} bits: predictions on {count} training images, BatchNorm "
                 f"of {sum(map(len, calibration))} others")
        if path:
            log.info(f"going on after {len(path) - 1} steps, in {run.path}")

        def save(steps: list[Step]) -> None:
            write_json(run.path / PATH_FILE, {**identity, "steps": list(map(content_of, steps))})
            log.info(line_of(len(steps) - 1, steps[-1]))

        search.descend(path, min(budgets.values()), save)
        write_results(run.path, search, path, budgets, name)
        log.info(run.contents())
        return run.path


# ---- what is searched

def usable_bit_widths(checkpoint: Checkpoint) -> list[BitWidth]:
    """Return the integer bit-widths that were trained; raises UserError for fewer than two."""
    calibrated = checkpoint.content.get("calibrated") or ()
    trained = [width for width in saved_bit_widths(checkpoint.content["state_dict"])
               if width not in calibrated]
    found = [width for width in trained if width.is_integer]
    if len(found) < 2:
        raise UserError(f"{checkpoint.path} was trained at {flag_text(trained)} bits: a search "
                        "needs two bit-widths of 1 to 8, such as those of train.py's default")
    return found


def read_images(args: Namespace, settings: Namespace, dataset: Samples, forward_pass: ForwardPass,
                device: torch.device,
                ) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]], int, str]:
    """Return calibration batches, held-out batches, the number of held-out images, and a digest of
    the data set.

    Both are of the training split, drawn by the seed, without augmentation. They share no image,
    and each takes --images, or half of the split where that is less.
    """
    count = min(args.images, len(dataset) // 2)
    if not count:
        raise UserError(f"{settings.train_split} of {settings.dataset} has {len(dataset)} images: "
                        "a search needs two")
    generator = torch.Generator().manual_seed(args.seed)
    order = torch.randperm(len(dataset), generator=generator).tolist()

    def batches(indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        return list(make_loader(Subset(dataset, indices), settings.dataset, device,
                                settings.batch_size, train=False, workers=settings.workers,
                                memory_format=forward_pass.memory_format))

    calibration = [images for images, _ in batches(order[count:2 * count])]
    data = packed.digest({}, fingerprint(dataset))
    return calibration, batches(order[:count]), count, data


def resolve_budgets(search: Search, budgets: list[Budget], flag: str) -> dict[str, int]:
    """Return {name of an assignment: cost that it may have}; UserError for one out of reach."""
    field, prefix = FIELDS[flag]
    highest = totals(search.costs.of(search.bit_widths[-1]))[field]
    least = search.least_cost()
    found = {}
    for budget in budgets:
        value = budget.value
        if isinstance(value, BitWidth):
            if value not in search.bit_widths:
                raise UserError(f"--{flag} {budget.text}: the network was not trained at {value} "
                                f"bits: choose from {flag_text(search.bit_widths)}, or give a "
                                "number, or a share such as 25%")
            value = totals(search.costs.of(value))[field]
        elif budget.is_fraction:
            value = value * highest
        if value < least:
            raise UserError(f"--{flag} {budget.text} is {value:,.0f}, and all layers at their "
                            f"cheapest take {least:,}: give more")
        found[name_of(prefix, budget.text)] = math.floor(value)
    return found


def name_of(prefix: str, budget: str) -> str:
    """Return the name of the assignment that a search finds for a budget."""
    return f"{prefix}-{budget.replace('%', 'pct').replace('.', '_')}"


def uniform_step(search: Search, width: BitWidth) -> Step:
    """Return what a trained bit-width gives on the held-out images, its own BatchNorms in use."""
    divergence, top1 = search.compare(width)
    return Step([], {}, divergence, top1, totals(search.costs.of(width)))


def highest(model: nn.Module) -> BitWidth:
    """Return the highest integer bit-width of a network, or of one that has none the highest."""
    bit_widths = bit_widths_of(model)
    return max([width for width in bit_widths if width.is_integer] or bit_widths)


def print_costs(costs: Costs, bit_width: BitWidth | str) -> None:
    """Print what each layer costs; raises UserError for a bit-width that the network lacks."""
    try:
        print(cost_table(costs.of(bit_width)))
    except ValueError as error:
        raise UserError(f"--cost: {error}") from None


# ---- the path in files

def write_results(folder: Path, search: Search, path: list[Step], budgets: dict[str, int],
                  title: str) -> None:
    """Write the assignments of each budget, the table and the figure of a path; log what was found.

    budgets: {name of an assignment: cost that it may have}.
    """
    uniform = {width: uniform_step(search, width) for width in search.bit_widths}
    found = {name: next(step for step in path if step.cost[search.by] <= budget)
             for name, budget in budgets.items()}
    assignments = [search.assignment(step.layers, name) for name, step in found.items()]
    write_json(folder / ASSIGNMENTS_FILE, [
        each.content for each in with_earlier(assignments, folder / ASSIGNMENTS_FILE)])
    write_text(folder / TABLE_FILE, path_table(path, uniform, found))
    draw(folder / FIGURE_FILE, path, uniform, found, search.by, title)
    for name, step in found.items():
        log.info(f"{name}: step {path.index(step)}, {step.cost['bit_operations'] / 1e6:,.1f} "
                 f"Mbit-ops, {step.cost['weight_bytes']:,} bytes, divergence "
                 f"{step.divergence:.4f}")


def content_of(step: Step) -> dict:
    """Return a Step as path.json holds it."""
    layers = {name: width.plain for name, width in step.layers.items()}
    return {**step._asdict(), "layers": layers}


def read_path(path: Path, identity: dict) -> list[Step]:
    """Return the steps of a path.json, none where there is none yet.

    Raises UserError where it is of another search, or damaged.
    """
    if not path.exists():
        return []
    content = parse_json(read_text(path), path)
    if not isinstance(content, dict) or not isinstance(content.get("steps"), list):
        raise damaged(path, "content", content, "a search's path")
    for name, value in identity.items():
        if content.get(name) != value:
            raise UserError(f"{path.parent} holds another search: its {name} is "
                            f"{brief(content.get(name))}, not {value}: choose another folder with "
                            "--results-dir")
    return [step_of(each, path) for each in content["steps"]]


def with_earlier(assignments: list[Assignment], path: Path) -> list[Assignment]:
    """Return assignments after those that a search of other budgets wrote to a path."""
    if not path.exists():
        return assignments
    try:
        earlier = read_assignments(path)
    except ValueError as error:
        raise UserError(f"{one_line(error)}: correct it, or move the file away") from None
    names = {each.name for each in assignments}
    return [*(each for each in earlier if each.name not in names), *assignments]


def step_of(content: object, path: Path) -> Step:
    """Return the Step of a dict that content_of gave; UserError naming `path` for another one."""
    try:
        step = Step(**content)
        step = step._replace(layers=Assignment("step", 1, step.layers).layers)
        costs = [step.cost[field] for field, _ in FIELDS.values()]
        if not (all(map(is_whole, costs)) and is_finite_number(step.divergence)
                and is_finite_number(step.top1) and all(isinstance(name, str)
                                                        for name in step.unit)):
            raise ValueError
    except (TypeError, ValueError, KeyError, AttributeError):
        raise damaged(path, "step", content, "one of a search") from None
    return step


def line_of(place: int, step: Step) -> str:
    """Return the line of a step on the console."""
    if step.unit:
        name = step.unit[-1]
        what = f"{name[-40:]} to {step.layers[name]}"
    else:
        what = "all at the highest"
    return (f"step {place:3}  {what:43} {step.cost['bit_operations'] / 1e6:10,.1f} Mbit-ops  "
            f"divergence {step.divergence:.4f}")


def path_table(path: list[Step], uniform: dict[BitWidth, Step], found: dict[str, Step]) -> str:
    """Return the path and the uniform bit-widths as a Markdown table."""
    rows = []

    def add(first: object, lowered: str, width: object, step: Step, budget: str) -> None:
        rows.append([first, lowered, width, f"{step.cost['bit_operations'] / 1e6:,.2f}",
                     f"{step.cost['weight_bytes']:,}", f"{step.divergence:.4f}",
                     f"{step.top1:.2f}", budget])

    for place, step in enumerate(path):
        budgets = ", ".join(text for text, chosen in found.items() if chosen is step)
        width = step.layers[step.unit[-1]] if step.unit else ""
        add(place, ", ".join(step.unit), width, step, budgets)
    for width, step in uniform.items():
        add("", "all", width, step, "")
    head = ["step", "lowered", "to bits", "Mbit-ops", "bytes", "divergence", "top-1 (%)", "budget"]
    note = ("divergence (Kullback-Leibler, from predictions of the highest bit-width) and top-1 "
            "on training images that were held out for the search; the bit-widths in the last rows "
            "have their own BatchNorms; Mbit-ops and bytes are of the quantized layers")
    return f"{markdown_table(head, rows)}\n\n{note}\n"


def draw(path: Path, steps: list[Step], uniform: dict[BitWidth, Step], found: dict[str, Step],
         by: str, title: str) -> None:
    """Save a PNG of top-1 and of divergence against the cost: of the path, and uniform bit-widths.
    """
    figure, axes = new_figure(2, f"{title}, on held-out training images")
    for axis, value, label in zip(axes, ("top1", "divergence"),
                                  ("top-1 (%)", "divergence from the highest bit-width")):
        for part, style in ((steps, {"label": "path", "marker": "."}),
                            (uniform.values(), {"label": "uniform bit-widths", "marker": "o",
                                                "color": COLORS[1], "linestyle": "--"}),
                            (found.values(), {"label": "within a budget", "marker": "o",
                                              "linestyle": "none", "markersize": 11,
                                              "markerfacecolor": "none"})):
            axis.plot([step.cost[by] for step in part], [getattr(step, value) for step in part],
                      **{"color": COLORS[0], **style})
        for width, step in uniform.items():
            axis.annotate(f"{width}", (step.cost[by], getattr(step, value)),
                          textcoords="offset points", xytext=(5, -11))
        axis.set(xlabel=f"{by.replace('_', ' ')} of the quantized layers", ylabel=label,
                 xscale="log")
        legend_below(axis)
    axes[1].set_yscale("symlog", linthresh=1e-3)  # it is 0 at the highest bit-width
    axes[1].set_ylim(bottom=0)
    save_figure(figure, path)


# ---- command line

def parse_args(argv: list[str] | None = None) -> Namespace:
    """Parse the command line."""
    parser = OneLineParser(__doc__.splitlines()[0])
    add = parser.add_argument
    add_source(parser, "search")
    add("--budget", type=budget_list, metavar="B,...", help="bit-operations of the quantized "
        "layers for an image: a number, a share of the highest integer bit-width's such as 25%%, "
        "or those of a bit-width such as 4bit")
    add("--bytes", type=budget_list, metavar="B,...", help="likewise, bytes of their weights")
    add("--cost", nargs="?", const="highest", metavar="BITS", help="print what each layer costs at "
        "a bit-width, or an assignment of the checkpoint, and search nothing")
    add("--images", type=number(int, 1), default=2000, metavar="N", help="training images held out "
        "to compare predictions on, and as many others to calibrate on; at most half of the split")
    add("--seed", type=number(int, 0, 2**32 - 1), default=0, help="seed that draws the images")
    add("--results-dir", type=path_text, help="folder of the search; the same command goes on with "
        "what is there; default: results/NAME_search, named after the run")
    add("--device", default="auto", help="auto (GPU with the most free memory), cpu, cuda, cuda:i")
    args = parser.parse_args(argv)
    if sum(map(bool, (args.budget, args.bytes, args.cost))) != 1:
        parser.error("give one of --budget, --bytes and --cost")
    return args


def budget_list(text: str) -> list[Budget]:
    """Parse --budget and --bytes."""
    return [parse_budget(part.strip()) for part in text.split(",")]


def parse_budget(text: str) -> Budget:
    """Parse a number, a share such as 25%, or a bit-width such as 4bit or w2a4bit."""
    try:
        if not is_name(name_of("bytes", text)):
            raise ValueError
        width = re.fullmatch(r"(\w+)bits?", text)
        if width:
            return Budget(text, BitWidth.of(width[1]))
        value = float(text.removesuffix("%"))
        if "_" in text or not 0 < value < 1e18:  # 12_5% would be 125 %
            raise ValueError
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a budget: give a number above 0, a share such as "
                                "25%, or a bit-width such as 4bit") from None
    is_fraction = text.endswith("%")
    return Budget(text, value / 100 if is_fraction else value, is_fraction)


if __name__ == "__main__":
    run_program(main, parse_args)
