"""What plans cost: measured where they were deployed, predicted where they weren't."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from paretune.search.job_types import direction
from paretune.search.surrogate.costs import CostModel
from paretune.search.surrogate.encoding import Encoding, Floats, Key, Rows
from paretune.search.surrogate.knowledge import Architecture, Knowledge
from paretune.spaces.space import MODEL

_COSTLY = frozenset({"method", "pattern", "activations", "granularity", "affine"})
"""Settings of the whole plan on which its costs depend."""


_MOST = 400
"""Plans that a cost model learns from, the latest: what it takes grows with their cube."""

V = TypeVar("V", float, Floats)


class Ledger:
    """Costs by name, for all architectures of a space.

    Args:
        encoding: Of the space.
        knowledge: With the plans that were measured before the first trial.
        names: What is wanted: ``latency_ms``, ``size_bytes`` and so on, all > 0.
    """

    def __init__(self, encoding: Encoding, knowledge: Knowledge, names: Sequence[str]) -> None:
        self._encoding = encoding
        self._knowledge = knowledge
        self.names = tuple(names)
        self._columns = [i for i, name in enumerate(encoding.settings) if name in _COSTLY]
        self._measured: dict[Key, dict[str, float]] = {}
        self._latest: dict[str, dict[Key, Rows]] = {name: {} for name in encoding.units}
        self._models: dict[tuple[str, str], CostModel] = {}
        self._stale = set(encoding.units)
        self.predicted: list[tuple[float, float]] = []
        """Pairs of what the latency was predicted to be, before it was known, and what it was."""
        for outlined in knowledge.outlines:
            self.note(encoding.encode(outlined.params), outlined.values)
        self.predicted.clear()

    def note(self, row: Rows, values: Mapping[str, float]) -> None:
        """Learn what a single plan was measured to cost; what it was measured to before is forgotten."""
        known = {name: _cost(name, float(values[name])) for name in self.names if values.get(name, 0) > 0}
        if not known:
            return
        [key], variant = self._keys(row), row.variant
        if key in self._measured:
            self._measured[key].update(known)
        else:
            if "latency_ms" in known and (variant, "latency_ms") in self._models:
                self.predicted.append((float(np.exp(self._model_of(row, "latency_ms")[0][0])), known["latency_ms"]))
            self._measured[key] = known
            latest = self._latest[variant]
            latest[key] = row
            if len(latest) > _MOST:
                del latest[next(iter(latest))]
        self._stale.add(variant)

    def knows(self, rows: Rows) -> list[bool]:
        """Whether each plan was measured."""
        return [key in self._measured for key in self._keys(rows)]

    def refit(self) -> None:
        """Fit the models of what is new."""
        for variant in sorted(self._stale):
            architecture = self._knowledge.architectures.get(variant, Architecture(()))
            for name in self.names:
                known = [key for key in self._latest[variant] if name in self._measured[key]]
                dense = self._knowledge.dense.get(name) if variant == MODEL or not known else None
                dense = _cost(name, dense) if dense else None
                quantity = name if direction(name) == "minimize" else "latency_ms"
                model = CostModel(self._encoding.units[variant], architecture, quantity=quantity, dense=dense)
                if known:
                    rows = Rows.join([self._latest[variant][key] for key in known])
                    values = np.array([self._measured[key][name] for key in known], dtype=np.float64)
                    model.fit(rows.levels, self._extra(rows), values)
                self._models[variant, name] = model
        self._stale.clear()

    def predict(self, rows: Rows, *, known: bool = True) -> tuple[Floats, Floats]:
        """Values and the relative error of each, both of shape (N, names).

        Args:
            rows: The plans.
            known: Take what was measured, without an error, where it was; else all are predicted.
        """
        values, error = np.zeros((2, len(rows), len(self.names)))
        unknown = []
        for position, key in enumerate(self._keys(rows)):
            measured = self._measured.get(key, {}) if known else {}
            values[position] = [measured.get(name, 0.0) for name in self.names]
            if len(measured) < len(self.names):
                unknown.append(position)
        if unknown:
            asked = rows.take(unknown)
            for column, name in enumerate(self.names):
                mean, sd = self._model_of(asked, name)
                left = values[unknown, column] == 0.0  # nothing costs nothing
                values[unknown, column] = np.where(left, np.exp(mean), values[unknown, column])
                error[unknown, column] = np.where(left, sd, 0.0)
        for column, name in enumerate(self.names):
            values[:, column] = _cost(name, values[:, column])
        return values, error

    def _model_of(self, rows: Rows, name: str) -> tuple[Floats, Floats]:
        return self._models[rows.variant, name].predict(rows.levels, self._extra(rows))

    def _extra(self, rows: Rows) -> Floats:
        """The settings that costs depend on, as regressors."""
        kept = np.zeros_like(rows.settings)
        kept[:, self._columns] = rows.settings[:, self._columns]
        return self._encoding.one_hot(kept)

    def _keys(self, rows: Rows) -> list[Key]:
        return self._encoding.keys(rows, self._columns)


def _cost(name: str, value: V) -> V:
    """What grows with the work: of what is the better the larger it is, as a throughput, the reciprocal; and back."""
    return value if direction(name) == "minimize" else 1 / value
