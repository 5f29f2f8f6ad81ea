"""What is believed of plans, from all that was seen: their costs, their accuracy, what they would add to the front."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.special import log_ndtr

from paretune.search.hypervolume import reference_point, tolerated
from paretune.search.job_types import Constraint, direction
from paretune.search.surrogate.accuracy import AccuracyModel, Belief
from paretune.search.surrogate.acquisition import Improvement
from paretune.search.surrogate.encoding import Encoding, Floats, Key, Rows
from paretune.search.surrogate.features import DAMAGES, Features
from paretune.search.surrogate.knowledge import Knowledge
from paretune.search.surrogate.ledger import Ledger

_GROWTH = 1.15
"""How much more must be known before the surrogate's length scales are chosen anew."""

_MOST = 300
"""Trials that the surrogate learns from: what it takes grows with their cube."""

_CLOCK = 0.003
"""Relative differences of a latency that no clock tells apart: they aren't credited to a plan."""

_NEAR = 0.05
"""Settings as near as this are the same plan once more."""

_LEAST_ERROR = 0.003
"""Relative error of a cost, at least: it will be measured again."""

_TINY = 1e-12


@dataclass
class Seen:
    """What came of the trials.

    Attributes:
        encoding: Of the space.
        rows: One a trial.
        accuracy: Of each; extrapolated where the trial was stopped.
        sd: Of each; 0 where it was measured.
        failed: Keys of plans that didn't work.
        tried: Key to the settings that a plan was tried with.
    """

    encoding: Encoding
    rows: list[Rows] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    sd: list[float] = field(default_factory=list)
    failed: set[Key] = field(default_factory=set)
    tried: dict[Key, list[Floats]] = field(default_factory=dict)

    def take(self, row: Rows, accuracy: float, sd: float) -> None:
        """Note what a trial was worth."""
        self.rows.append(row)
        self.accuracy.append(float(accuracy))
        self.sd.append(float(sd))
        [key] = self.encoding.keys(row)
        self.tried.setdefault(key, []).append(row.settings[0])

    def knows(self, row: Rows, *, trained_alike: bool) -> bool:
        """Whether a single plan failed or was tried: in any way, or only trained about as it would be."""
        [key] = self.encoding.keys(row)
        tried = self.tried.get(key, ())
        near = (np.abs(row.settings[0] - settings).max(initial=0) < _NEAR for settings in tried)
        return key in self.failed or (any(near) if trained_alike else bool(tried))


class Beliefs:
    """Models of costs and accuracy.

    Args:
        encoding: Of the space.
        knowledge: What was known before the first trial.
        objectives: ``accuracy`` and one to three more.
        constraints: Bounds.
    """

    def __init__(
        self, encoding: Encoding, knowledge: Knowledge, objectives: Sequence[str], constraints: Sequence[Constraint]
    ) -> None:
        self.seen = Seen(encoding)
        self.features = Features(encoding, knowledge)
        self._dense = knowledge.dense
        # The accuracies on further targets follow that on the first.
        alike = {"name": "accuracy"}
        self._constraints = tuple(c.model_copy(update=alike) if _is_accuracy(c.name) else c for c in constraints)
        # Where accuracies alone are wanted, a smaller model counts as the better one of two.
        self._costs = tuple(name for name in objectives if not _is_accuracy(name)) or ("params",)
        self._bounds = tuple(c for c in self._constraints if not _is_accuracy(c.name) and c.name not in self._costs)
        names = dict.fromkeys([*self._costs, *(bound.name for bound in self._bounds)])
        self.ledger = Ledger(encoding, knowledge, list(names))
        self._model: AccuracyModel | None = None
        self._tuned_at = 0

    @property
    def is_ready(self) -> bool:
        """Whether any accuracy is known."""
        return self._model is not None

    def learn(self) -> None:
        """Bring the models up to date with what was seen and measured."""
        self.ledger.refit()
        count = len(self.seen.rows)
        if count:
            tune = count >= _GROWTH * self._tuned_at
            self._fit(tune=tune)
            self._tuned_at = count if tune else self._tuned_at

    @contextmanager
    def assuming(self, pending: Sequence[Rows]) -> Iterator[None]:
        """Within the block, trials that are running came out as they are believed to.

        This keeps others from proposing the same (kriging believer, Ginsbourger et al., 2010).
        """
        if not pending:
            yield
            return
        before = self.seen
        believed = over(pending, lambda rows: self.believe(rows).median)
        tried = {key: list(settings) for key, settings in before.tried.items()}
        self.seen = replace(
            before, rows=[*before.rows], accuracy=[*before.accuracy], sd=[*before.sd], failed=before.failed, tried=tried
        )
        for row, accuracy in zip(pending, believed, strict=True):
            self.seen.take(row, float(accuracy), 0.0)
        try:
            self._fit()
            yield
        finally:
            self.seen = before
            self._fit()

    def believe(self, rows: Rows) -> Belief:
        """What is believed of the accuracy of plans."""
        assert self._model is not None
        return self._model.believe(self.features(rows))

    def costs(self, rows: Rows, *, known: bool = True) -> Floats:
        """The objectives other than the accuracy, signed so that less is better; shape (N, costs).

        Args:
            rows: The plans.
            known: Take what was measured where it was; else all are predicted.
        """
        return self._signed(self.ledger.predict(rows, known=known)[0])

    def front(self) -> list[Rows]:
        """The plans that were tried and that no other one is believed to beat, in no order."""
        rows = self._allowed()
        costs, accuracy = self._standing(rows)
        losses = np.concatenate([-accuracy[:, None], costs], 1)
        no_worse = (losses[:, None, :] <= losses[None, :, :]).all(2)
        better = (losses[:, None, :] < losses[None, :, :]).any(2)
        beaten = np.flatnonzero((no_worse & better).any(0))
        return [row for place, row in enumerate(rows) if place not in beaten]

    def improvement(self, cheapest: Floats) -> Improvement:
        """Over the front of what was measured, and of what is believed where that is more.

        The front that is reported is of measured values: who joins it must be seen to beat them.

        Args:
            cheapest: Shape (costs,): what plans cost at least.
        """
        rows = self._allowed()
        costs, accuracy = self._standing(rows)
        measured = {id(row): value for row, value in zip(self.seen.rows, self.seen.accuracy, strict=True)}
        accuracy = np.maximum(accuracy, [measured[id(row)] for row in rows])
        least, *worst = self._reference()
        low = np.minimum(cheapest, costs.min(0, initial=np.inf))
        told_apart = np.abs(costs) * np.array([_CLOCK * name.startswith("latency_ms") for name in self._costs])
        return Improvement(
            costs - told_apart,
            accuracy,
            worst=np.array(worst),
            best=low - 0.1 * np.abs(low),
            least=-least,
        )

    def gains(self, improvement: Improvement, rows: Rows) -> Floats:
        """Shape (N,): what plans are expected to add, as far as they are likely to keep the bounds."""
        belief = self.believe(rows)
        found: Floats = improvement(self.costs(rows), belief) * belief.told * np.exp(self._log_allowed(rows))
        return found

    def nearness(self, rows: Rows) -> Floats:
        """Shape (N,): logarithm of the chance to keep all bounds and to be better than the reference in all.

        Where nothing is expected to add anything, it tells which way that lies.
        """
        least, *worst = self._reference()
        values, error = self.ledger.predict(rows)
        columns = [self.ledger.names.index(name) for name in self._costs]
        signed = self._signed(values)
        room = (np.array(worst) - signed) / (np.maximum(error[:, columns], _LEAST_ERROR) * np.abs(signed))
        found: Floats = self.believe(rows).log_chance(-least) + log_ndtr(room).sum(1) + self._log_allowed(rows)
        return found

    def _log_allowed(self, rows: Rows) -> Floats:
        """Shape (N,): logarithm of the chance to keep the bounds on what is no objective."""
        values, error = self.ledger.predict(rows)
        found = np.zeros(len(rows))
        for bound in self._bounds:
            column = self.ledger.names.index(bound.name)
            sign = 1.0 if bound.op == "<=" else -1.0
            room = sign * (np.log(max(bound.value, _TINY)) - np.log(values[:, column]))
            found += log_ndtr(room / np.maximum(error[:, column], _LEAST_ERROR))
        return found

    def _allowed(self) -> list[Rows]:
        """The plans that were tried and keep the bounds on what is no objective."""
        rows = self.seen.rows
        if not self._bounds or not rows:
            return rows
        values = over(rows, lambda found: self.ledger.predict(found)[0])
        columns = [(bound, self.ledger.names.index(bound.name)) for bound in self._bounds]
        return [
            row for row, own in zip(rows, values, strict=True) if all(b.holds(own[column]) for b, column in columns)
        ]

    def _standing(self, rows: Sequence[Rows]) -> tuple[Floats, Floats]:
        """Costs and believed accuracy; shapes (N, costs) and (N,)."""
        if not rows:
            return np.zeros((0, len(self._costs))), np.zeros(0)
        return over(rows, self.costs), over(rows, lambda found: self.believe(found).median)

    def _signed(self, values: Floats) -> Floats:
        signs = np.array([-1.0 if direction(name) == "maximize" else 1.0 for name in self._costs])
        found: Floats = values[:, [self.ledger.names.index(name) for name in self._costs]] * signs
        return found

    def _reference(self) -> tuple[float, ...]:
        """The worst accuracy that counts, negated, then the worst costs."""
        known = dict(self._dense)
        if not {"accuracy", *self._costs} <= known.keys():
            most = over(self.seen.rows, lambda rows: self.ledger.predict(rows)[0]).max(0)
            seen = dict(zip(self.ledger.names, map(float, most), strict=True))
            known = {**seen, "accuracy": max(self.seen.accuracy), **known}
        return reference_point(known, ("accuracy", *self._costs), self._constraints)

    def _fit(self, *, tune: bool = False) -> None:
        seen = self.seen
        kept = self._informative() if len(seen.rows) > _MOST else range(len(seen.rows))
        if self._model is None:
            dense = self._dense.get("accuracy", max(seen.accuracy))
            self._model = AccuracyModel(tolerated(dense), DAMAGES, self.features.whole, dense)
        features = over([seen.rows[i] for i in kept], self.features)
        self._model.fit(features, [seen.accuracy[i] for i in kept], [seen.sd[i] for i in kept], tune=tune)

    def _informative(self) -> list[int]:
        """The trials to learn from, of too many: the latest, and those nearest to the front."""
        count = len(self.seen.rows)
        recent = range(count - _MOST // 3, count)
        cost = over(self.seen.rows, self.costs)[:, 0]
        accuracy = np.array(self.seen.accuracy)
        order = np.argsort(cost)
        behind = np.empty(count)
        behind[order] = np.maximum.accumulate(accuracy[order]) - accuracy[order]
        nearest = [int(place) for place in np.argsort(behind) if place not in recent]
        return [*nearest[: _MOST - len(recent)], *recent]


def over(rows: Sequence[Rows], of: Callable[[Rows], Floats]) -> Floats:
    """Apply a function to plans of any architectures, all of one architecture at once; in their order."""
    found: Floats | None = None
    for variant in dict.fromkeys(row.variant for row in rows):
        places = [i for i, row in enumerate(rows) if row.variant == variant]
        values = of(Rows.join([rows[i] for i in places]))
        if found is None:
            found = np.empty((len(rows), *values.shape[1:]))
        found[places] = values
    assert found is not None, "there must be a plan"
    return found


def _is_accuracy(name: str) -> bool:
    return name.partition("@")[0] == "accuracy"
