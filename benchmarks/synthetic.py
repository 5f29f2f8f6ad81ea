"""A synthetic compression problem: how good a search is, without training a net for each of its trials.

It has what makes the real problem hard, with numbers drawn from a seed: layers whose sensitivities differ by orders of
magnitude, damage that grows convexly, interactions, accuracy that falls to chance, fine-tuning that repairs some layers
better than others (which no probe of an untrained model sees), settings of the fine-tuning that matter, latency in
steps with costs at the borders between widths, and noise. Accuracy is a share in [0, 1]; times are in ms and seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from paretune.search.hypervolume import hypervolume, reference_point
from paretune.search.surrogate.knowledge import Architecture, Knowledge, LayerCost, Outlined
from paretune.spaces.grid import channel_grid, kept_of
from paretune.spaces.plan import CompressionPlan
from paretune.spaces.space import MODEL, Options, SearchSpace
from paretune.spaces.units import units_of

Kind = Literal["tolerant", "brittle"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Array = npt.NDArray[np.float64]

OBJECTIVES = ("latency_ms", "accuracy")
DENSE_ACCURACY, CHANCE = 0.92, 0.1
NOISE, CLOCK_NOISE, PROBE_NOISE = 0.002, 0.01, 0.2
"""Standard deviations: of an accuracy, of a latency as a share of it, of a probe's damage as a share of it."""

WIDTHS = (32, 8, 4)
_TIME = {32: 1.0, 8: 0.45, 4: 0.4}
_ROUNDED = {32: 0.0, 8: 0.01, 4: 1.0}
_DENSE_MS, _CALL_MS, _LAYER_MS, _BORDER_MS = 8.0, 0.3, 0.02, 0.06
"""Of all layers' work; of a call; of a layer without work; of a border behind 64 channels."""

_TRAINING_S, _REST_S, _OUTLINE_S, _PROBE_S = 6.0, 1.0, 0.5, 0.03
"""Of fine-tuning the dense model; of a trial otherwise; of an outline; of a probe."""

_OUTLINES = 24


@dataclass(frozen=True)
class Hardness:
    """What tells the kinds apart; damage 0.1 costs about a tenth of the accuracy.

    Attributes:
        cut: Damage of the median layer without half of its channels, before any fine-tuning.
        rounding: Of the median layer in the fewest bits.
        spread: Standard deviation of the logarithm of the layers' sensitivities.
        left: Share of the damage that fine-tuning leaves, of the median layer.
        cliff: Damage from which on accuracy falls to chance.
    """

    cut: float
    rounding: float
    spread: float
    left: float
    cliff: float


HARDNESS: Mapping[Kind, Hardness] = {
    "tolerant": Hardness(cut=0.05, rounding=0.03, spread=1.0, left=0.022, cliff=1.0),
    "brittle": Hardness(cut=0.06, rounding=0.5, spread=1.0, left=0.05, cliff=0.1),
}


class Rows(NamedTuple):
    """Plans as arrays.

    Attributes:
        kept: Channels of each layer, (N, layers).
        bits: Of each layer, (N, layers).
        settings: Logarithm of the temperature, weight of the distillation, logarithm of the learning rate, (N, 3).
    """

    kept: Array
    bits: Array
    settings: Array


class Synthetic:
    """A chain of layers, each with bits of its own and a group that cuts its output channels.

    Args:
        kind: ``tolerant``: most plans live. ``brittle``: most fall to chance.
        seed: Draws the problem.
        layers: How many; the space has three dimensions more than twice as many.

    Attributes:
        space: All plans.
        dense: Noise-free values of the dense model.
        reference: The losses (latency in ms, negated accuracy) that a point must be better than to count.
    """

    def __init__(self, kind: Kind, *, seed: int, layers: int = 20) -> None:
        self.kind, self.seed, hard = kind, seed, HARDNESS[kind]
        draw = np.random.default_rng([KINDS.index(kind), seed, layers])
        self._cliff = hard.cliff
        self._channels = np.array([(48, 64, 96)[3 * i // layers] for i in range(layers)])
        self._inputs = np.array([16, *self._channels[:-1]])
        self._area = np.round(8e4 / self._channels**1.5)  # positions of a layer's outputs
        self._cut = hard.cut * draw.lognormal(0, hard.spread, layers)
        self._rounding = hard.rounding * draw.lognormal(0, hard.spread, layers)
        # Fine-tuning repairs each layer better or worse than others, which no probe shows.
        self._left_cut, self._left_rounding = np.minimum(hard.left * draw.lognormal(0, 0.6, (2, layers)), 1)
        self._together = draw.uniform(0, 0.8, layers - 1)
        self._best = np.array([draw.uniform(0.7, 1.5), draw.uniform(0.3, 0.8), draw.uniform(-7, -6)])
        self._shift = np.array([draw.uniform(0.2, 0.5), draw.uniform(0.1, 0.2), draw.uniform(-0.8, -0.3)])
        self._pace = draw.uniform(4, 8)
        speed = draw.lognormal(0, 0.3, layers)  # of a layer's kernel, beyond what its MACs say
        work = _steps(self._inputs) * _steps(self._channels) * self._area * speed
        self._ms = _DENSE_MS * speed / work.sum()
        grids = {f"group{i:02}": channel_grid(int(n), max_ratio=0.9) for i, n in enumerate(self._channels)}
        self.space = SearchSpace(grids, {f"layer{i:02}": WIDTHS for i in range(layers)}, Options(max_ratio=0.9))
        self.dense = {**self.true_outline(self.space.uniform()), "accuracy": DENSE_ACCURACY}
        self.reference = reference_point(self.dense, OBJECTIVES)

    def rows(self, plans: Sequence[CompressionPlan]) -> Rows:
        """Plans of the space as arrays."""
        grids, layers = self.space.grids.items(), list(self.space.widths)
        kept = [[kept_of(plan.prune.ratios.get(group, 0.0), grid[-1]) for group, grid in grids] for plan in plans]
        bits = [[plan.quantize.bits.get(layer, WIDTHS[0]) for layer in layers] for plan in plans]
        settings = [
            (np.log(tuned.temperature), tuned.distillation_weight, np.log(tuned.learning_rate))
            for tuned in (plan.finetune for plan in plans)
        ]
        return Rows(np.array(kept, float), np.array(bits, float), np.array(settings, float))

    def outline(self, plan: CompressionPlan) -> dict[str, float]:
        """What is known of a plan without training, the latency as a clock reads it (the same each time)."""
        draw = np.random.default_rng([self.seed, int(plan.hash[:12], 16)])
        values = self.true_outline(plan)
        return {**values, "latency_ms": values["latency_ms"] * float(np.exp(CLOCK_NOISE * draw.standard_normal()))}

    def true_outline(self, plan: CompressionPlan) -> dict[str, float]:
        """Latency in ms, size in bytes, parameters and MACs, without noise."""
        rows = self.rows([plan])
        params = self._params(rows.kept)[0]
        return {
            "latency_ms": float(self.latencies(rows)[0]),
            "size_bytes": float((params * rows.bits[0] / 8).sum()) + 4000.0,
            "params": float(params.sum()),
            "macs": float((params * self._area).sum()),
        }

    def latencies(self, rows: Rows) -> Array:
        """In ms, noise-free, (N,)."""
        inputs = np.concatenate([np.full((len(rows.kept), 1), 16.0), rows.kept[:, :-1]], 1)
        work = _steps(inputs) * _steps(rows.kept) * self._area * self._ms
        layers = work * np.vectorize(_TIME.__getitem__)(rows.bits) + _LAYER_MS
        borders = (rows.bits[:, 1:] != rows.bits[:, :-1]) * _steps(rows.kept[:, :-1]) / 64 * _BORDER_MS
        return np.asarray(_CALL_MS + layers.sum(1) + borders.sum(1))

    def true_accuracy(self, plan: CompressionPlan) -> float:
        """After a full training, averaged over its noise."""
        return float(self.accuracies(self.rows([plan]))[0])

    def accuracy(self, plan: CompressionPlan, rng: np.random.Generator) -> float:
        """After a full training, as one seed gives it."""
        return self.curve(plan, rng, 1.0)

    def curve(self, plan: CompressionPlan, rng: np.random.Generator, share: float) -> float:
        """The accuracy after a share of the training in [0, 1]; noisier early, slower the more is damaged."""
        rows = self.rows([plan])
        raw = self._damage(rows, trained=False)
        before, after = float(self._alive(raw)[0]), float(self.accuracies(rows)[0])
        pace = self._pace / (1 + float(raw[0]) / 4)
        reached = (1 - np.exp(-pace * share)) / (1 - np.exp(-pace))
        noise = NOISE * (1 + 2 * (1 - share)) * rng.standard_normal()
        return float(np.clip(before + (after - before) * reached + noise, 0, 1))

    def accuracies(self, rows: Rows) -> Array:
        """After a full training, noise-free, (N,)."""
        off = ((rows.settings - self._best_settings(rows)) ** 2 * (1.0, 4.0, 0.2)).sum(1)
        return self._alive(self._damage(rows, trained=True) * (1 + 0.3 * off) + 0.004 * off)

    def seconds(self, plan: CompressionPlan, share: float = 1.0) -> float:
        """What a trial takes that trains for this share of the training; smaller nets train faster."""
        macs = self.true_outline(plan)["macs"] / self.dense["macs"]
        slower = 1.2 if any(bits < WIDTHS[0] for bits in plan.quantize.bits.values()) else 1.0
        return _REST_S + share * slower * _TRAINING_S * (0.4 + 0.6 * macs)

    @property
    def outline_seconds(self) -> float:
        """What deploying and measuring a plan without training takes."""
        return _OUTLINE_S

    @property
    def profile_seconds(self) -> float:
        """What `knowledge` cost."""
        return sum(self.knowledge.seconds.values())

    @cached_property
    def knowledge(self) -> Knowledge:
        """What a search may know before its first trial."""
        draw = np.random.default_rng([self.seed, 1])
        units = units_of(self.space)
        damage = {unit.param: self._probe(unit.param, unit.levels[1:], draw) for unit in units}
        dense = self.rows([self.space.uniform()])
        params, ms = self._params(dense.kept)[0], self._ms * _steps(self._inputs) * _steps(self._channels) * self._area
        groups = list(self.space.grids)
        layers = tuple(
            LayerCost(
                name,
                int(params[i] * self._area[i]),
                int(params[i]),
                float((ms[i] + _LAYER_MS) / self.dense["latency_ms"]),
                groups[i],
                tuple(groups[i - 1 : i]),
            )
            for i, name in enumerate(self.space.widths)
        )
        plans = [self.space.sweep(index) for index in range(_OUTLINES // 3)]
        plans += [self.random_plan(draw) for _ in range(_OUTLINES - len(plans))]
        outlines = tuple(Outlined(self.space.to_params(plan), self.outline(plan)) for plan in plans)
        seconds = {"sensitivity": _PROBE_S * sum(map(len, damage.values())), "outlines": _OUTLINE_S * len(outlines)}
        return Knowledge(self.dense, {MODEL: Architecture(layers, damage)}, outlines, seconds)

    def random_plan(self, draw: np.random.Generator) -> CompressionPlan:
        """Every group and layer by itself, the settings at their defaults."""
        params = {unit.param: draw.choice(unit.levels) for unit in units_of(self.space)}
        return self.space.to_plan({name: int(v) if name.startswith("bits/") else v for name, v in params.items()})

    def hypervolume(self, plans: Sequence[CompressionPlan]) -> float:
        """Of their true latency and accuracy."""
        return hypervolume(self._losses(self.rows(plans)), self.reference) if plans else 0.0

    @cached_property
    def attainable(self) -> float:
        """The hypervolume that 30,000 noise-free evaluations reach which know the best settings; takes seconds."""
        draw = np.random.default_rng([self.seed, 2])
        rows = self._refined(self.rows([self.space.sweep(index) for index in range(300)]))
        for _ in range(_GENERATIONS):
            parents, others = (_take(rows, draw.integers(len(rows.kept), size=_CHILDREN)) for _ in range(2))
            rows = self._front(_joined(rows, self._refined(self._children(parents, others, draw))))
        return hypervolume(self._losses(rows), self.reference)

    def _children(self, parents: Rows, others: Rows, draw: np.random.Generator) -> Rows:
        """Crossed over at two points in half of the cases, then one to four layers changed at random."""
        count, layers = parents.kept.shape
        ends = np.sort(draw.integers(0, layers + 1, (count, 2)), 1)
        within = (np.arange(layers) >= ends[:, :1]) & (np.arange(layers) < ends[:, 1:])
        within &= draw.random((count, 1)) < 0.5
        kept, bits = (np.where(within, theirs, own) for own, theirs in zip(parents[:2], others[:2], strict=True))
        grids = list(self.space.grids.values())
        for row in range(count):
            for layer in draw.integers(layers, size=draw.integers(1, 5)):
                if draw.random() < 0.6:
                    grid = grids[layer]
                    step = grid.index(int(kept[row, layer])) + draw.integers(-2, 3)
                    kept[row, layer] = grid[min(max(step, 0), len(grid) - 1)]
                else:  # of neighbours at once: a lone one pays for two borders
                    bits[row, layer : layer + draw.integers(1, 4)] = draw.choice(WIDTHS)
        return Rows(kept, bits, parents.settings)

    def _refined(self, rows: Rows) -> Rows:
        return rows._replace(settings=self._best_settings(rows))

    def _front(self, rows: Rows) -> Rows:
        """Those that no other dominates, fastest first."""
        points = self._losses(rows)
        order = np.lexsort((points[:, 1], points[:, 0]))
        best = np.minimum.accumulate(points[order, 1])
        new = np.concatenate([[True], best[1:] < best[:-1]])
        return _take(rows, order[new & (points[order] < self.reference).all(1)])

    def _losses(self, rows: Rows) -> Array:
        return np.stack([self.latencies(rows), -self.accuracies(rows)], 1)

    def _params(self, kept: Array) -> Array:
        inputs = np.concatenate([np.full((len(kept), 1), 16.0), kept[:, :-1]], 1)
        return 9 * inputs * kept

    def _best_settings(self, rows: Rows) -> Array:
        """More damage wants a softer teacher, more of it, and smaller steps."""
        raw = self._damage(rows, trained=False)[:, None]
        return np.asarray(self._best + self._shift * raw / (1 + raw))

    def _damage(self, rows: Rows, *, trained: bool) -> Array:
        """Of whole plans, (N,), 0 and more, without or after fine-tuning with the best settings."""
        ratio = 1 - rows.kept / self._channels
        cut = self._cut * ratio**2 / (1.05 - ratio) * (0.55 / 0.25)
        rounding = self._rounding * np.vectorize(_ROUNDED.__getitem__)(rows.bits)
        if trained:
            cut, rounding = cut * self._left_cut, rounding * self._left_rounding
        layers = cut + rounding + 0.8 * np.sqrt(cut * rounding)
        neighbours = self._together * np.sqrt(layers[:, 1:] * layers[:, :-1])
        return np.asarray(layers.sum(1) + neighbours.sum(1))

    def _alive(self, damage: Array) -> Array:
        """The accuracy that is left."""
        return np.asarray(CHANCE + (DENSE_ACCURACY - CHANCE) * np.exp(-damage - (damage / self._cliff) ** 4))

    def _probe(self, param: str, levels: Sequence[float], draw: np.random.Generator) -> dict[float, float]:
        """Share lost by one unit alone at each level, as a profile without training measures it."""
        found = {}
        for level in levels:
            value = int(level) if param.startswith("bits/") else level
            raw = self._damage(self.rows([self.space.to_plan({param: value})]), trained=False)[0]
            noisy = raw * np.exp(PROBE_NOISE * draw.standard_normal())
            found[level] = float(1 - np.exp(-noisy) + 0.003 * draw.standard_normal())
        return found


_CHILDREN, _GENERATIONS = 300, 100


def _take(rows: Rows, index: npt.NDArray[np.int64]) -> Rows:
    return Rows(*(array[index] for array in rows))


def _joined(one: Rows, other: Rows) -> Rows:
    return Rows(*(np.concatenate(pair) for pair in zip(one, other, strict=True)))


def _steps(channels: npt.ArrayLike) -> Array:
    """Channels that a kernel computes: it works on blocks of 16."""
    return np.asarray(np.ceil(np.asarray(channels, float) / 16) * 16)
