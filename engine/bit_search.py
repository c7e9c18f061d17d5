"""The search for bits per layer: lower one at a time, the one that changes predictions least."""
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from engine.errors import UserError
from engine.forward_pass import ForwardPass
from models import Assignment, BitWidth, Width, add_assignment, calibrate, set_bit_width
from models.cost import Costs, totals
from utils import progress

NAME = "search"  # of the assignment that is tried


class Step(NamedTuple):
    """A point of the path. unit: the layers that were lowered to get there, none for the first.

    layers: {layer: bit-width} of all that are not at the highest. divergence: of its predictions
    from those of the highest bit-width. cost: as `totals` gives it.
    """
    unit: list[str]
    layers: dict[str, BitWidth]
    divergence: float
    top1: float
    cost: dict[str, int]


def find_units(costs: Costs) -> list[list[str]]:
    """Return the groups of layers that are lowered together.

    They are an ActivationQ and the quantized layers that read it, which share multiply-accumulates;
    several, where a layer reads their values together; or one quantized layer, where no ActivationQ
    rounds its input.
    """
    units = []
    for layer, activations in costs.inputs.items():
        joined = [unit for unit in units if not set(activations).isdisjoint(unit)]
        unit = [*dict.fromkeys([name for other in joined for name in other] + activations), layer]
        place = units.index(joined[0]) if joined else len(units)
        units[place:place + 1] = [unit]
        units = [other for other in units if other not in joined]
    return units


class Search:
    """Greedy descent from all layers at the highest of `bit_widths`.

    bit_widths: integer ones. calibration: batches of images (N, 3, H, W) over which BatchNorm is
    re-estimated. held_out: batches of (images, labels) on which predictions are compared. by: the
    field of a cost that is to fall.

    What is compared is the Kullback-Leibler divergence of the probabilities from those of the
    highest bit-width, not the loss: on training images, which the network knows, a bit-width may
    lower the loss by mere confidence.
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
        self.reference = self.log_probabilities(self.bit_widths[-1])

    def assignment(self, layers: dict[str, BitWidth], name: str = NAME) -> Assignment:
        """Return an assignment whose other layers are at the highest bit-width."""
        return Assignment(name, self.bit_widths[-1], layers)

    def measure(self, unit: list[str], layers: dict[str, BitWidth]) -> Step:
        """Return the Step of an assignment, its BatchNorms re-estimated."""
        assignment = self.assignment(layers)
        add_assignment(self.model, assignment)
        with self.forward_pass.autocast():
            calibrate(self.model, assignment, self.calibration)
        divergence, top1 = self.compare(assignment)
        return Step(unit, layers, divergence, top1, totals(self.costs.of(assignment)))

    @torch.no_grad()
    def log_probabilities(self, width: Width) -> list[Tensor]:
        """Return the logarithms of the held-out images' probabilities, (n, classes) a batch."""
        set_bit_width(self.model.eval(), width)
        found = []
        with self.forward_pass.autocast():
            for images, _ in self.held_out:
                logits = self.model(images)
                if not torch.is_tensor(logits):
                    raise UserError(f"the network returns a {type(logits).__name__}, and a search "
                                    "compares logits: wrap it in a module that returns these")
                found.append(logits.log_softmax(1))
        return found

    def compare(self, width: Width) -> tuple[float, float]:
        """Return the mean divergence from the highest bit-width, and top-1 (%), on held-out images.
        """
        found = self.log_probabilities(width)
        divergences = [(expected.exp() * (expected - own)).sum(1)
                       for expected, own in zip(self.reference, found)]
        hits = [own.argmax(1) == labels for own, (_, labels) in zip(found, self.held_out)]
        divergence = torch.cat(divergences).mean().item()
        if not math.isfinite(divergence):
            raise UserError(f"at {width} the network's logits are not finite: take another "
                            "checkpoint")
        return divergence, 100 * torch.cat(hits).double().mean().item()

    def lowered(self, step: Step) -> list[tuple[list[str], dict[str, BitWidth]]]:
        """Return (unit, layers) of each way to lower one unit to the next that costs less."""
        found = []
        for unit in self.units:
            width = step.layers.get(unit[0], self.bit_widths[-1])
            for lower in reversed(self.bit_widths[:self.bit_widths.index(width)]):
                layers = {**step.layers, **dict.fromkeys(unit, lower)}
                if self.cost(layers) < step.cost[self.by]:  # not of layers with bits of their own
                    found.append((unit, layers))
                    break
        return found

    def costs_of(self, layers: dict[str, BitWidth]) -> dict[str, int]:
        """Return all costs of an assignment."""
        assignment = self.assignment(layers)
        add_assignment(self.model, assignment)
        return totals(self.costs.of(assignment))

    def cost(self, layers: dict[str, BitWidth]) -> int:
        """Return the cost of an assignment by which the search goes."""
        return self.costs_of(layers)[self.by]

    def find_damage(self, path: list[Step]) -> int | None:
        """Return the first of a path's steps that does not follow from the one before it."""
        for place, step in enumerate(path):
            before = path[place - 1] if place else None
            if not self.follows(step, before) or step.cost != self.costs_of(step.layers):
                return place
        return None

    def follows(self, step: Step, before: Step | None) -> bool:
        """Return whether a step lowers one unit, and the cost; None: whether it is the first."""
        if before is None:
            return not step.unit and not step.layers
        if step.unit not in self.units:
            return False
        highest = self.bit_widths[-1]
        old, new = (each.layers.get(step.unit[0], highest) for each in (before, step))
        return (new in self.bit_widths and new < old
                and step.layers == {**before.layers, **dict.fromkeys(step.unit, new)}
                and step.cost[self.by] < before.cost[self.by])

    def least_cost(self) -> int:
        """Return the cost with all units at the bit-width that costs least."""
        names = [name for unit in self.units for name in unit]
        return min(self.cost(dict.fromkeys(names, width)) for width in self.bit_widths)

    def descend(self, path: list[Step], budget: int, save: Callable[[list[Step]], None]) -> None:
        """Add steps to a path until its cost is within the budget; call save(path) after each.

        Of the ways to lower one unit, a step takes the one whose divergence rises least per cost
        saved.
        """
        if not path:
            path.append(self.measure([], {}))
            save(path)
        while path[-1].cost[self.by] > budget:
            last = path[-1]
            with progress(self.lowered(last), f"step {len(path)}") as ways:
                found = [self.measure(*way) for way in ways]
            path.append(min(found, key=lambda step: (step.divergence - last.divergence)
                            / (last.cost[self.by] - step.cost[self.by])))
            save(path)
