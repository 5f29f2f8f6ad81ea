"""Optuna's parameters as rows of numbers, and back: what the models and the candidates of the sampler compute with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from paretune.spaces.settings import INTEGER
from paretune.spaces.space import MODEL, SearchSpace, default_of
from paretune.spaces.units import Unit, units_of

Levels = NDArray[np.int64]
Floats = NDArray[np.float64]
Key = tuple[str, bytes]

SWITCHES = {"factorize": "factorize", "sparsify": "sparsify", "share": "share"}
"""Technique to the parameter that switches it on for the whole plan."""


_INERT = Unit("", "prune", "", (0.0,))


@dataclass(frozen=True)
class Rows:
    """Plans of one architecture, one a row.

    Attributes:
        variant: The architecture: `MODEL` or a variant's name.
        levels: Shape (N, units): index into each unit's levels.
        settings: Shape (N, settings): a number of a range scaled to [0, 1], or the index of a choice.
    """

    variant: str
    levels: Levels
    settings: Floats

    def __len__(self) -> int:
        return len(self.levels)

    def take(self, index: Any) -> Rows:
        """Some of the rows."""
        return replace(self, levels=self.levels[index], settings=self.settings[index])

    @staticmethod
    def join(parts: Sequence[Rows]) -> Rows:
        """Rows of one architecture, one after the other."""
        levels, settings = np.concatenate([p.levels for p in parts]), np.concatenate([p.settings for p in parts])
        return replace(parts[0], levels=levels, settings=settings)


class Encoding:
    """The rows of a space.

    Args:
        space: What plans are made of.
    """

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self._distributions = space.distributions()
        spaces = {MODEL: space, **space.variants}
        # One with nothing to choose has a unit that does nothing, so that nobody else needs to think of it.
        self.units: dict[str, tuple[Unit, ...]] = {name: units_of(own) or (_INERT,) for name, own in spaces.items()}
        self._exclusive = {name: list(_excluded(units)) for name, units in self.units.items()}
        of_units = {self._param(name, unit) for name, units in self.units.items() for unit in units}
        other = of_units | set(SWITCHES.values()) | {"variant"}
        self.settings: dict[str, BaseDistribution] = {
            name: found for name, found in self._distributions.items() if name not in other
        }

    @property
    def continuous(self) -> NDArray[np.bool_]:
        """Which settings are numbers of a range."""
        return np.array([isinstance(found, FloatDistribution) for found in self.settings.values()], dtype=bool)

    @property
    def choices(self) -> NDArray[np.bool_]:
        """Which settings are choices."""
        return ~self.continuous

    def keys(self, rows: Rows, columns: Sequence[int] | NDArray[np.bool_] | None = None) -> list[Key]:
        """What is equal for plans that compress alike, whatever the numbers that they are trained with.

        Args:
            rows: The plans.
            columns: The settings that tell them apart; None is all that are choices.
        """
        settings = rows.settings[:, self.choices if columns is None else columns].astype(np.int8)
        levels = rows.levels.astype(np.int16)
        return [(rows.variant, a.tobytes() + b.tobytes()) for a, b in zip(levels, settings, strict=True)]

    def settled(self, variant: str, levels: Levels) -> Levels:
        """The same plans, without what the space leaves out: of two techniques that exclude each other it takes one."""
        levels = levels.copy()
        for stays, least, goes in self._exclusive[variant]:
            levels[levels[:, stays] >= least, goes] = 0
        return levels

    def encode(self, params: Mapping[str, Any]) -> Rows:
        """One row for the parameters of a trial; parameters without effect are read as what the plan has."""
        params = {**params, **self.space.to_params(self.space.to_plan(params))}
        variant = params.get("variant", MODEL)
        levels = [self._level(params, variant, unit) for unit in self.units[variant]]
        settings = [_scaled(found, params[name]) for name, found in self.settings.items()]
        return Rows(variant, np.array([levels], dtype=np.int64), np.array([settings], dtype=np.float64))

    def decode(self, row: Rows) -> dict[str, Any]:
        """The parameters of a single row; those of other architectures are what they are by default."""
        values: dict[str, Any] = {"variant": row.variant}
        used = set()
        for unit, level in zip(self.units[row.variant], row.levels[0], strict=True):
            values[self._param(row.variant, unit)] = unit.levels[level]
            if level:
                used.add(unit.technique)
        values |= {switch: technique in used for technique, switch in SWITCHES.items()}
        for (name, found), value in zip(self.settings.items(), row.settings[0], strict=True):
            values[name] = _unscaled(found, float(value))
        return {
            name: _choice(found, values[name]) if name in values else default_of(name, found)
            for name, found in self._distributions.items()
        }

    def default_settings(self) -> Floats:
        """Shape (settings,): the middle of each range, and each first choice."""
        return np.array([_scaled(found, default_of(name, found)) for name, found in self.settings.items()])

    def random_settings(self, count: int, rng: np.random.Generator) -> Floats:
        """Shape (count, settings)."""
        columns = [
            rng.random(count) if isinstance(found, FloatDistribution) else rng.integers(_count(found), size=count)
            for found in self.settings.values()
        ]
        return np.stack(columns, 1).astype(np.float64) if columns else np.zeros((count, 0))

    def one_hot(self, settings: Floats) -> Floats:
        """Shape (N, columns): ranges as they are, choices as one column for each but the first."""
        columns = []
        for position, found in enumerate(self.settings.values()):
            column = settings[:, position]
            if isinstance(found, FloatDistribution):
                columns.append(column)
            else:
                columns += [(column == choice).astype(np.float64) for choice in range(1, _count(found))]
        return np.stack(columns, 1) if columns else np.zeros((len(settings), 0))

    def _param(self, variant: str, unit: Unit) -> str:
        whole = not unit.name
        return unit.param if variant == MODEL or whole else f"{variant}/{unit.param}"

    def _level(self, params: Mapping[str, Any], variant: str, unit: Unit) -> int:
        switch = SWITCHES.get(unit.technique)
        param = self._param(variant, unit)
        if (switch and not params.get(switch, True)) or param not in params:
            return 0
        distances = np.abs(np.array(unit.levels) - float(params[param]))
        return int(distances.argmin())


def _excluded(units: Sequence[Unit]) -> Iterator[tuple[int, int, int]]:
    """A unit, its level from which on another one is left alone, and that other one: factors before zeros, and eight
    bits and fewer before codebooks."""
    place = {unit.param: position for position, unit in enumerate(units)}
    for position, unit in enumerate(units):
        if unit.technique == "sparsify" and (rank := place.get(f"rank/{unit.name}")) is not None:
            yield rank, 1, position
        if unit.technique == "share" and (bits := place.get(f"bits/{unit.name}")) is not None:
            few = [level for level, width in enumerate(units[bits].levels) if width <= INTEGER]
            if few:
                yield bits, few[0], position


def _count(distribution: BaseDistribution) -> int:
    assert isinstance(distribution, CategoricalDistribution)
    return len(distribution.choices)


def _choice(distribution: BaseDistribution, value: Any) -> Any:
    """The value as Optuna knows it: 8.0 bits are the choice 8."""
    if isinstance(distribution, CategoricalDistribution):
        return next(choice for choice in distribution.choices if choice == value)
    return value


def _scaled(distribution: BaseDistribution, value: Any) -> float:
    if isinstance(distribution, CategoricalDistribution):
        return float(distribution.choices.index(value))
    assert isinstance(distribution, FloatDistribution)
    low, high = distribution.low, distribution.high
    if distribution.log:
        return (math.log(value) - math.log(low)) / (math.log(high) - math.log(low))
    return float((value - low) / (high - low))


def _unscaled(distribution: BaseDistribution, value: float) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[round(value)]
    assert isinstance(distribution, FloatDistribution)
    low, high = distribution.low, distribution.high
    if distribution.log:
        value = math.exp(math.log(low) + value * (math.log(high) - math.log(low)))
    else:
        value = low + value * (high - low)
    return min(max(value, low), high)
