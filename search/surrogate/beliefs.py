"""What is believed of plans, from all that was seen: their costs, their accuracy, what they would add to the front."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

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

_GROWTH, _LATER_GROWTH, _MANY = 1.15, 1.5, 500
"""How much more must be known before the surrogate's length scales are chosen anew; and from so many trials on."""

_MOST = 300
"""Trials that the surrogate learns from: what it takes grows with their cube."""

_KEPT, _SLACK = 500, 100
"""Trials that are kept in mind at all: those that it learns from are among them, and so is the front. They are chosen
again when so many more came."""

_MOST_ASSUMED = 512
"""Running trials, the latest, that it takes for finished ones."""

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
        count: How many there were.
        rows: One a trial, of those that are kept in mind.
        accuracy: Of each; extrapolated where the trial was stopped.
        sd: Of each; 0 where it was measured.
        failed: Keys of plans that didn't work.
        tried: Key to the settings that a plan was tried with.
    """

    encoding: Encoding
    count: int = 0
    rows: list[Rows] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    sd: list[float] = field(default_factory=list)
    failed: set[Key] = field(default_factory=set)
    tried: dict[Key, list[Floats]] = field(default_factory=dict)

    def take(self, row: Rows, accuracy: float, sd: float) -> None:
        """Note what a trial was worth."""
        self.count += 1
        self.rows.append(row)
        self.accuracy.append(float(accuracy))
        self.sd.append(float(sd))
        [key] = self.encoding.keys(row)
        self.tried.setdefault(key, []).append(row.settings[0])

    def forget_others(self, kept: Sequence[int]) -> None:
        """Keep some trials alone, by their places; that the others were tried isn't forgotten."""
        self.rows = [self.rows[i] for i in kept]
        self.accuracy = [self.accuracy[i] for i in kept]
        self.sd = [self.sd[i] for i in kept]

    def knows(self, row: Rows, *, trained_alike: bool) -> bool:
        """Whether a single plan failed or was tried: in any way, or only trained about as it would be."""
        [key] = self.encoding.keys(row)
        tried = self.tried.get(key, ())
        near = (np.abs(row.settings[0] - settings).max(initial=0) < _NEAR for settings in tried)
        return key in self.failed or (any(near) if trained_alike else bool(tried))


@dataclass(frozen=True)
class Standing:
    """Where the plans that were tried stand.

    Attributes:
        rows: The plans that keep the bounds on what is no objective.
        costs: Shape (N, costs).
        believed: Shape (N,): their accuracies, as they are believed to be.
        measured: Shape (N,): the same as they were found.
    """

    rows: list[Rows]
    costs: Floats
    believed: Floats
    measured: Floats


@dataclass(frozen=True)
class Prospects:
    """What is expected of some plans, whatever the front.

    Attributes:
        costs: Shape (N, costs).
        accuracy: What is believed of it.
        weight: Shape (N,), in [0, 1]: how far an improvement counts, as far as a measurement would tell, and as they
            are likely to keep the bounds.
    """

    costs: Floats
    accuracy: Belief
    weight: Floats

    def take(self, place: int) -> Prospects:
        """Of a single plan."""
        own = slice(place, place + 1)
        return Prospects(self.costs[own], self.accuracy.take(place), self.weight[own])

    def gains(self, improvement: Improvement) -> Floats:
        """Shape (N,): what the plans are expected to add."""
        found: Floats = improvement(self.costs, self.accuracy) * self.weight
        return found


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
        self._encoding = encoding
        self.seen = Seen(encoding)
        self._assumed = Seen(encoding)
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
        count = self.seen.count
        if len(self.seen.rows) > _KEPT + _SLACK:
            self.seen.forget_others(self._informative(_KEPT))
        if count:
            tune = count >= (_GROWTH if count < _MANY else _LATER_GROWTH) * self._tuned_at
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
        latest, real = pending[-_MOST_ASSUMED:], self._model
        assert real is not None
        for row, accuracy in zip(latest, over(latest, self._median), strict=True):
            self._assumed.take(row, float(accuracy), 0.0)
        self._model = real.copy()
        try:
            self._fit()
            yield
        finally:
            self._assumed, self._model = Seen(self._encoding), real

    def knows(self, row: Rows, *, trained_alike: bool) -> bool:
        """Whether a single plan failed, was tried or is running; see `Seen.knows`."""
        return any(seen.knows(row, trained_alike=trained_alike) for seen in (self.seen, self._assumed))

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

    def standing(self) -> Standing:
        """Of the plans that were tried, or are running, and keep the bounds on what is no objective."""
        rows = [*self.seen.rows, *self._assumed.rows]
        measured = np.array([*self.seen.accuracy, *self._assumed.accuracy])
        if not rows:
            return Standing([], np.zeros((0, len(self._costs))), measured, measured)
        values = over(rows, lambda found: self.ledger.predict(found)[0])
        columns = [(bound, self.ledger.names.index(bound.name)) for bound in self._bounds]
        allowed = [i for i, own in enumerate(values) if all(bound.holds(own[column]) for bound, column in columns)]
        rows = [rows[i] for i in allowed]
        believed = over(rows, self._median) if rows else np.zeros(0)
        return Standing(rows, self._signed(values[allowed]), believed, measured[allowed])

    def front(self, standing: Standing) -> list[Rows]:
        """The plans that were tried and that no other one is believed to beat, in no order."""
        losses = np.concatenate([-standing.believed[:, None], standing.costs], 1)
        no_worse = (losses[:, None, :] <= losses[None, :, :]).all(2)
        better = (losses[:, None, :] < losses[None, :, :]).any(2)
        beaten = set(np.flatnonzero((no_worse & better).any(0)).tolist())
        return [row for place, row in enumerate(standing.rows) if place not in beaten]

    def improvement(self, standing: Standing, cheapest: Floats) -> Improvement:
        """Over the front of what was measured, and of what is believed where that is more.

        The front that is reported is of measured values: who joins it must be seen to beat them.

        Args:
            standing: Of the plans that were tried.
            cheapest: Shape (costs,): what plans cost at least.
        """
        costs = standing.costs
        least, *worst = self._reference()
        low = np.minimum(cheapest, costs.min(0, initial=np.inf))
        told_apart = np.abs(costs) * np.array([_CLOCK * name.startswith("latency_ms") for name in self._costs])
        return Improvement(
            costs - told_apart,
            np.maximum(standing.believed, standing.measured),
            worst=np.array(worst),
            best=low - 0.1 * np.abs(low),
            least=-least,
        )

    def prospects(self, rows: Rows) -> Prospects:
        """What is expected of plans."""
        belief = self.believe(rows)
        return Prospects(self.costs(rows), belief, belief.told * np.exp(self._log_allowed(rows)))

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

    def _median(self, rows: Rows) -> Floats:
        """Shape (N,): the accuracies that plans are believed to have."""
        assert self._model is not None
        return self._model.median(self.features(rows))

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
        seen, assumed = self.seen, self._assumed
        kept = self._informative(_MOST) if len(seen.rows) > _MOST else range(len(seen.rows))
        if self._model is None:
            dense = self._dense.get("accuracy", max(seen.accuracy))
            self._model = AccuracyModel(tolerated(dense), DAMAGES, self.features.whole, dense)
        features = over([*(seen.rows[i] for i in kept), *assumed.rows], self.features)
        accuracy = [*(seen.accuracy[i] for i in kept), *assumed.accuracy]
        self._model.fit(features, accuracy, [*(seen.sd[i] for i in kept), *assumed.sd], tune=tune)

    def _informative(self, most: int) -> list[int]:
        """The places of so many trials to learn from: the latest, and those nearest to the front."""
        count = len(self.seen.rows)
        recent = range(count - most // 3, count)
        costs, accuracy = over(self.seen.rows, self.costs), np.array(self.seen.accuracy)
        best = [
            np.where((costs[None, :, :] <= some[:, None, :]).all(2), accuracy, -np.inf).max(1)
            for some in np.array_split(costs, 1 + count // 256)  # of a resumed search there may be thousands
        ]
        behind = np.concatenate(best) - accuracy
        nearest = [int(place) for place in np.argsort(behind) if place not in recent]
        return sorted([*nearest[: most - len(recent)], *recent])


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
