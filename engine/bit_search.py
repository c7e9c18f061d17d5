"""The search for bits per layer: lower one layer at a time, the one that costs least loss."""
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.console import progress
from engine.forward_pass import ForwardPass
from engine.metrics import Metrics
from models import Assignment, BitWidth, add_assignment, calibrate, set_bit_width
from models.bit_widths import FULL_PRECISION
from models.cost import Costs, totals

NAME = "search"  # of the assignment that is tried


class Step(NamedTuple):
    """A point of the path. unit: the layers that were lowered to get there, none for the first.

    layers: {layer: bit-width} of all that are not at the highest. cost: as `totals` gives it.
    """
    unit: list[str]
    layers: dict[str, BitWidth]
    loss: float
    top1: float
    cost: dict[str, int]


def find_units(costs: Costs) -> list[list[str]]:
    """Return the groups of layers that are lowered together.

    They are an ActivationQ and the quantized layers that read it, which share multiply-accumulates;
    or one quantized layer, where no ActivationQ rounds its input.
    """
    units = {}
    for layer, activation in costs.inputs.items():
        units.setdefault(activation or layer, [activation] if activation else []).append(layer)
    return list(units.values())


class Search:
    """Greedy descent from all layers at the highest of `bit_widths`.

    bit_widths: integer ones. calibration: batches of images (N, 3, H, W) over which BatchNorm is
    re-estimated. held_out: batches of (images, labels) whose loss is measured. by: the field of a
    cost that is to fall.
    """

    def __init__(self, model: nn.Module, forward_pass: ForwardPass, costs: Costs,
                 bit_widths: Iterable[BitWidth], calibration: list[Tensor],
                 held_out: list[tuple[Tensor, Tensor]], by: str):
        self.model = model
        self.forward_pass = forward_pass
        self.costs = costs
        self.bit_widths = sorted(bit_widths)
        self.calibration = calibration
        self.held_out = held_out
        self.by = by
        self.units = find_units(costs)

    def assignment(self, layers: dict[str, BitWidth], name: str = NAME) -> Assignment:
        """Return an assignment whose other layers are at the highest bit-width."""
        return Assignment(name, self.bit_widths[-1], layers)

    def measure(self, unit: list[str], layers: dict[str, BitWidth]) -> Step:
        """Return the Step of an assignment, its BatchNorms re-estimated."""
        assignment = self.assignment(layers)
        add_assignment(self.model, assignment)
        with self.forward_pass.autocast():
            calibrate(self.model, assignment, self.calibration)
        loss, top1 = self.loss(assignment)
        return Step(unit, layers, loss, top1, totals(self.costs.of(assignment)))

    @torch.no_grad()
    def loss(self, width: BitWidth | Assignment) -> tuple[float, float]:
        """Return the mean loss and the top-1 (%) at a bit-width on the held-out images."""
        metrics = Metrics([width], self.held_out[0][0].device)
        set_bit_width(self.model.eval(), width)
        with self.forward_pass.autocast():
            for images, labels in self.held_out:
                metrics.add({width: self.forward_pass(self.model, images, labels)}, labels)
        metrics.check_finite("search")
        found = metrics.averages()[width]
        return found["loss"], found["top1"]

    def lowered(self, step: Step) -> list[tuple[list[str], dict[str, BitWidth]]]:
        """Return (unit, layers) of each way to lower one unit by one bit-width, at less cost."""
        found = []
        for unit in self.units:
            width = step.layers.get(unit[0], self.bit_widths[-1])
            place = self.bit_widths.index(width)
            if place:
                layers = {**step.layers, **dict.fromkeys(unit, self.bit_widths[place - 1])}
                if self.cost(layers) < step.cost[self.by]:  # not of layers with bits of their own
                    found.append((unit, layers))
        return found

    def cost(self, layers: dict[str, BitWidth]) -> int:
        """Return the cost of an assignment."""
        assignment = self.assignment(layers)
        add_assignment(self.model, assignment)
        return totals(self.costs.of(assignment))[self.by]

    def least_cost(self) -> int:
        """Return the cost with all units at the lowest bit-width."""
        return self.cost({name: self.bit_widths[0] for unit in self.units for name in unit})

    def descend(self, path: list[Step], budget: int, save: Callable[[list[Step]], None]) -> None:
        """Add steps to a path until its cost is within the budget; call save(path) after each.

        Of the ways to lower one unit, a step takes the one whose loss rises least per cost saved.
        """
        if not path:
            path.append(self.measure([], {}))
            save(path)
        while path[-1].cost[self.by] > budget:
            last = path[-1]
            with progress(self.lowered(last), f"step {len(path)}") as ways:
                found = [self.measure(*way) for way in ways]
            path.append(min(found, key=lambda step: (step.loss - last.loss)
                            / (last.cost[self.by] - step.cost[self.by])))
            save(path)


def integer_widths(bit_widths: Iterable[BitWidth]) -> list[BitWidth]:
    """Return those of bit-widths that a search may choose: without full precision."""
    return [width for width in bit_widths
            if FULL_PRECISION not in (width.weights, width.activations)]
