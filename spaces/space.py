"""The search space: every choice of a plan as an ordinary Optuna parameter, and plans back as parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from paretune.errors import JobError
from paretune.spaces.analysis import Analysis
from paretune.spaces.graph import Group
from paretune.spaces.grid import channel_grid, kept_of, ratio_of, snap
from paretune.spaces.plan import CompressionPlan, Finetuning, Importance, Pruning, Quantization

Range = tuple[float, float]


@dataclass(frozen=True)
class Options:
    """What the job allows.

    Attributes:
        prune: Whether groups get a ratio.
        max_ratio: Largest share of a group's channels removed, in (0, 1).
        importance: Importances to choose from, at least one.
        temperature: Range of the distillation temperature; equal ends fix it.
        distillation_weight: Range of the teacher's share of the loss.
        learning_rate: Range of the peak learning rate, searched on a log scale.
        multiples: Width to what the inputs of a layer must be a multiple of to run in it.
    """

    prune: bool = True
    max_ratio: float = 0.75
    importance: tuple[Importance, ...] = ("l1",)
    temperature: Range = (1.0, 8.0)
    distillation_weight: Range = (0.0, 1.0)
    learning_rate: Range = (1e-4, 1e-2)
    multiples: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SearchSpace:
    """All plans that a search may propose.

    Parameters are called ``prune/<group>`` (share of channels removed, snapped to the grid), ``bits/<layer>``,
    ``importance``, ``distill/temperature``, ``distill/weight`` and ``finetune/learning_rate``. Choices with one
    option are no parameters.

    Attributes:
        grids: Group to the channel counts it may be cut to, ascending; the last is the dense one.
        widths: Layer to its bit-widths, widest first; empty where nothing is quantized.
        options: What else the job allows.
    """

    grids: Mapping[str, Sequence[int]]
    widths: Mapping[str, Sequence[int]]
    options: Options = Options()

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's view of the space."""
        options = self.options
        found: dict[str, BaseDistribution] = {
            f"prune/{group}": FloatDistribution(0.0, _largest(grid))
            for group, grid in self.grids.items()
            if len(grid) > 1
        }
        found |= {
            f"bits/{layer}": CategoricalDistribution(list(widths))
            for layer, widths in self.widths.items()
            if len(widths) > 1
        }
        if len(options.importance) > 1:
            found["importance"] = CategoricalDistribution(list(options.importance))
        for name, (low, high) in self._ranges().items():
            if low < high:
                found[name] = FloatDistribution(low, high, log=name == "finetune/learning_rate")
        return found

    def to_plan(self, params: Mapping[str, Any]) -> CompressionPlan:
        """The plan that parameters stand for; those that are missing take the middle of their range."""
        ratios = {}
        for group, grid in self.grids.items():
            kept = snap(params.get(f"prune/{group}", 0.0), list(grid))
            if kept < grid[-1]:
                ratios[group] = ratio_of(kept, grid[-1])
        bits = {layer: int(params.get(f"bits/{layer}", widths[0])) for layer, widths in self.widths.items()}
        values = {name: params.get(name, self._middle(name)) for name in self._ranges()}
        return CompressionPlan(
            prune=Pruning(ratios=ratios, importance=params.get("importance", self.options.importance[0])),
            quantize=Quantization(bits=bits),
            finetune=Finetuning(
                learning_rate=values["finetune/learning_rate"],
                temperature=values["distill/temperature"],
                distillation_weight=values["distill/weight"],
            ),
        )

    def to_params(self, plan: CompressionPlan) -> dict[str, Any]:
        """The parameters of a plan of this space, so that it can be enqueued; undoes `to_plan`.

        Raises:
            JobError: The plan isn't in the space.
        """
        values: dict[str, Any] = {
            f"prune/{group}": self._check_ratio(group, plan.prune.ratios.get(group, 0.0)) for group in self.grids
        }
        for name in plan.prune.ratios.keys() - self.grids.keys():
            raise _outside("prune.ratios", "must name prunable groups", name, self.grids)
        values |= {f"bits/{layer}": plan.quantize.bits.get(layer, widths[0]) for layer, widths in self.widths.items()}
        for name in plan.quantize.bits.keys() - self.widths.keys():
            raise _outside("quantize.bits", "must name layers with a choice of widths", name, self.widths)
        values |= {
            "importance": plan.prune.importance,
            "distill/temperature": plan.finetune.temperature,
            "distill/weight": plan.finetune.distillation_weight,
            "finetune/learning_rate": plan.finetune.learning_rate,
        }
        distributions = self.distributions()
        for name, distribution in distributions.items():
            if not _in(distribution, values[name]):
                raise _outside(f"plan: {name}", f"must be in {distribution}", values[name], {})
        for name, constant in self._constants().items():
            if values[name] != constant:
                raise _outside(f"plan: {name}", f"must be {constant}, the only choice", values[name], {})
        return {name: values[name] for name in distributions}

    def uniform(self, ratio: float, bits: int | None = None) -> CompressionPlan:
        """The same ratio and width everywhere, as near as each group's grid and each layer's widths allow.

        Args:
            ratio: Share of channels removed, in [0, 1).
            bits: Width; None is the widest.
        """
        params: dict[str, Any] = {f"prune/{group}": ratio for group in self.grids}
        params |= {f"bits/{layer}": bits if bits in widths else widths[0] for layer, widths in self.widths.items()}
        return self.to_plan(params)

    def sweep(self, index: int) -> CompressionPlan:
        """The plan at a position of the endless sweep over uniform plans: the baseline that a search must beat.

        Position 0 is the dense model. Ratios come in the order 0, 1, 1/2, 1/4, 3/4, … of the largest
        one (van der Corput), each with every width, the widest first, then from the narrowest up.
        """
        widths = sorted({width for options in self.widths.values() for width in options})
        if index == 0:
            return self.uniform(0.0)
        if not any(len(grid) > 1 for grid in self.grids.values()):
            return self.uniform(0.0, widths[(index - 1) % len(widths)] if widths else None)
        largest = max(_largest(grid) for grid in self.grids.values())
        level, position = divmod(index, max(1, len(widths)))
        bits = widths[position - 1] if widths else None
        return self.uniform(largest * _van_der_corput(level), bits)

    def _check_ratio(self, group: str, ratio: float) -> float:
        grid = list(self.grids[group])
        nearest = ratio_of(snap(ratio, grid), grid[-1])
        if kept_of(ratio, grid[-1]) != kept_of(nearest, grid[-1]):
            raise _outside(f"prune.ratios.{group}", "must be on the group's grid", ratio, {str(nearest): None})
        return ratio

    def _ranges(self) -> dict[str, Range]:
        return {
            "distill/temperature": self.options.temperature,
            "distill/weight": self.options.distillation_weight,
            "finetune/learning_rate": self.options.learning_rate,
        }

    def _constants(self) -> dict[str, Any]:
        """What would be parameters if there were a choice; widths that a plan leaves out are the widest."""
        found: dict[str, Any] = {f"bits/{layer}": options[0] for layer, options in self.widths.items()}
        found["importance"] = self.options.importance[0]
        found |= {name: self._middle(name) for name in self._ranges()}
        return {name: value for name, value in found.items() if name not in self.distributions()}

    def _middle(self, name: str) -> float:
        low, high = self._ranges()[name]
        if low == high:
            return low
        return math.sqrt(low * high) if name != "distill/weight" else (low + high) / 2


def make_space(analysis: Analysis, widths: Mapping[str, Sequence[int]], options: Options) -> SearchSpace:
    """The space over a model.

    Args:
        analysis: Of the model.
        widths: Layer to the bit-widths that the target really executes, widest first; empty to quantize nothing.
        options: What the job allows.
    """
    kinds = {layer.name: layer.kind for layer in analysis.layers}
    grids: dict[str, list[int]] = {}
    offered = {name: tuple(values) for name, values in widths.items()}
    for group in analysis.groups if options.prune else ():
        counts = analysis.counts.get(kinds.get(group.name, ""))
        grid = channel_grid(group.channels, max_ratio=options.max_ratio, counts=counts)
        for name, width, each in _fed_in_blocks(group, analysis, offered, options):
            whole = [kept for kept in grid if (group.channels - kept) * each % options.multiples[width] == 0]
            if len(whole) > 2:
                grid = whole
            else:  # too few: better give up the width than the pruning
                rest = tuple(other for other in offered[name] if other != width)
                offered[name] = rest or analysis.widths[name][:1]
        grids[group.name] = grid
    return SearchSpace(grids, offered, options)


def _fed_in_blocks(
    group: Group, analysis: Analysis, offered: Mapping[str, Sequence[int]], options: Options
) -> Iterator[tuple[str, int, int]]:
    """(layer, width, inputs for each channel) for the group's readers that a width takes in blocks of inputs alone."""
    inputs = {layer.name: layer.inputs for layer in analysis.layers}
    for name in group.consumers:
        for width in options.multiples.keys() & set(offered.get(name, ())):
            # Behind a flatten, each channel gives several inputs.
            yield name, width, max(1, inputs.get(name, 0) // group.channels)


def _in(distribution: BaseDistribution, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices  # its internal form doesn't exist for other values
    return distribution._contains(value)


def _largest(grid: Sequence[int]) -> float:
    return ratio_of(grid[0], grid[-1])


def _van_der_corput(index: int) -> float:
    """0, 1, 1/2, 1/4, 3/4, 1/8, …: both ends first, then ever finer."""
    if index <= 1:
        return float(index)
    value, scale, index = 0.0, 0.5, index - 1
    while index:
        index, bit = divmod(index, 2)
        value += bit * scale
        scale /= 2
    return value


def _outside(where: str, rule: str, got: object, known: Mapping[str, Any]) -> JobError:
    names = ", ".join(list(known)[:5])
    return JobError(where, rule, got, f"use e.g. {names}" if names else "use a value of the space")
