"""The choice of the next plan: candidates, what they are believed to add, and the costs of the best ones measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.stats import qmc

from paretune.search.surrogate.acquisition import Improvement
from paretune.search.surrogate.beliefs import Beliefs
from paretune.search.surrogate.candidates import Candidates
from paretune.search.surrogate.encoding import Encoding, Floats, Rows
from paretune.spaces.space import MODEL

Measure = Callable[[Rows], Mapping[str, float] | None]
"""Deploys a single plan untrained and tells what it costs; None where it can't be deployed."""

_FIRST = 6
"""Trials before the surrogate decides."""

_SPREAD = (0.45, 0.7, 0.55, 0.25, 0.85, 0.35)
"""Where these are along the front that the probes foresee, from dense to cheapest."""

_MEASURING = 0.1
"""Share of the time between proposals that may go into measuring plans: where trials are short, it takes as long."""

_POOL, _CHILDREN, _ROUNDS, _BEST = 96, 96, 6, 24
"""Candidates of each kind in the first round; children in each further one; such rounds; how many go on."""

_SURE = 0.03
"""Relative error below which a predicted cost isn't worth a measurement: the clock's own is about as large."""

_ALIKE = 0.85
"""Share of the candidates that are trained nearly as good plans were; the others in any way."""

_TINY = 1e-12


@dataclass(frozen=True, order=True)
class _Rated:
    """A single plan and what it is expected to add."""

    gain: float
    row: Rows = field(compare=False)


class Choice:
    """Chooses plans.

    Args:
        encoding: Of the space.
        beliefs: What is known.
        rng: Random numbers.
    """

    def __init__(self, encoding: Encoding, beliefs: Beliefs, rng: np.random.Generator) -> None:
        self._encoding = encoding
        self._beliefs = beliefs
        self.rng = rng
        self._candidates: dict[str, Candidates] = {}
        self._cheapest = np.zeros(0)
        self._begun = time.monotonic()
        self._spent = 0.0

    def _has_time(self) -> bool:
        return self._spent <= _MEASURING * (time.monotonic() - self._begun)

    def refresh(self) -> None:
        """Look at what each level saves, as the costs are predicted now."""
        found = {name: self._look(name) for name in self._encoding.units}
        self._candidates = {name: candidates for name, (candidates, _) in found.items()}
        self._cheapest = np.min([costs for _, costs in found.values()], axis=0)

    def next(self, pending: Sequence[Rows], measure: Measure | None, measured: int) -> Rows:
        """The plan for the next trial.

        Args:
            pending: Plans of trials that are still running.
            measure: Measures what plans cost; None trusts the predictions.
            measured: How many plans may be measured, at most.
        """
        position = len(self._beliefs.seen.rows) + len(pending)
        if position <= _FIRST or not self._beliefs.is_ready:
            return self._designed(position)
        with self._beliefs.assuming(pending):
            improvement, best = self._searched()
            if measure is None:
                return best[0].row
            known = self._measured(best, measure, measured)
            gains = [float(self._beliefs.gains(improvement, row)[0]) for row in known]
            return known[int(np.argmax(gains))] if known else best[0].row

    def _searched(self) -> tuple[Improvement, list[_Rated]]:
        """The best candidates, best first."""
        front = self._beliefs.front()
        pools = [self._pool(name, [row for row in front if row.variant == name]) for name in self._encoding.units]
        improvement = self._beliefs.improvement(self._cheapest)
        best = self._rated(improvement, pools)
        if best and best[0].gain <= _TINY:  # nothing is believed to reach what counts: go where it is nearest
            improvement = self._beliefs.improvement(self._cheapest, anywhere=True)
            best = self._rated(improvement, pools)
        for _ in range(_ROUNDS):
            best = sorted([*best, *self._rated(improvement, self._children(best))], reverse=True)[:_BEST]
        # In a small space all plans may have been tried: then in another way, then, should it last for ever, again.
        return improvement, best or self._rated(improvement, pools, trained_alike=True) or [
            _Rated(0.0, pools[0].take([0]))
        ]

    def _rated(self, improvement: Improvement, pools: Sequence[Rows], *, trained_alike: bool = False) -> list[_Rated]:
        """The best of some plans that weren't tried, best first.

        Trained in another way the same plan would hardly add to the front, and how to train is learnt from any plan.
        """
        found = []
        for rows in pools:
            gains = self._beliefs.gains(improvement, rows)
            own: list[_Rated] = []
            for place in np.argsort(-gains, kind="stable"):
                row = rows.take([place])
                if len(own) == _BEST:
                    break
                if not self._beliefs.seen.knows(row, trained_alike=trained_alike):
                    own.append(_Rated(float(gains[place]), row))
            found += own
        return sorted(found, reverse=True)[:_BEST]

    def _measured(self, best: Sequence[_Rated], measure: Measure, measured: int) -> list[Rows]:
        """The best plans that cost differently, now known for sure; without those that can't be deployed."""
        found: dict[tuple[str, bytes], Rows] = {}
        seen, ledger = self._beliefs.seen, self._beliefs.ledger
        for row in (rated.row for rated in best):
            [key] = row.keys()
            if len(found) == measured:
                break
            if key in found or key in seen.failed:
                continue
            if not ledger.knows(row)[0] and ledger.predict(row)[1].max() > _SURE and self._has_time():
                began = time.monotonic()
                values = measure(row)
                self._spent += time.monotonic() - began
                if values is None:
                    seen.failed.add(key)
                    continue
                ledger.note(row, values)
            found[key] = row
        return list(found.values())

    def _designed(self, position: int) -> Rows:
        """A plan of the front that the probes foresee, the trials spread along it.

        Every other one has just one technique beside quantization, so that it shows how well each is repaired; and each
        is trained in another way.
        """
        candidates = self._candidates[MODEL]
        structural = candidates.structural
        only = structural[position // 2 % len(structural)] if position % 2 and structural else None
        without = [name for name in structural if only not in (None, name)]
        levels = candidates.traded(4 * _POOL, self.rng, sure=True, without=without)
        rows = Rows(MODEL, levels, np.tile(self._spread_settings(position), (len(levels), 1)))
        cost = self._beliefs.ledger.predict(rows)[0][:, 0]
        wanted = cost.max() + (cost.min() - cost.max()) * _SPREAD[position % len(_SPREAD)]
        return rows.take([int(np.abs(cost - wanted).argmin())])

    def _spread_settings(self, position: int) -> Floats:
        """The middle first, then points that fill the ranges evenly (Halton, 1960); first choices throughout."""
        middle = self._encoding.default_settings()
        if position < 2 or not len(middle):
            return middle
        point = qmc.Halton(len(middle), scramble=False).random(position + 1)[-1]
        return np.where(self._encoding.continuous, 0.1 + 0.8 * point, middle)

    def _pool(self, variant: str, front: Sequence[Rows]) -> Rows:
        """Candidates of an architecture, whose plans on the front are given."""
        candidates, rng = self._candidates[variant], self.rng
        foreseen = candidates.traded(_POOL, rng, sure=True)
        parents = np.concatenate([row.levels for row in front]) if front else foreseen
        levels = np.concatenate(
            [
                foreseen,
                candidates.traded(_POOL, rng),
                candidates.mutated(parents, _POOL, rng),
                candidates.uniform(),
                candidates.random(_POOL // 4, rng),
            ]
        )
        return Rows(variant, levels, self._settings(len(levels), [row.settings[0] for row in front]))

    def _children(self, best: Sequence[_Rated]) -> list[Rows]:
        """Children of the best plans, an architecture at a time."""
        found = []
        for variant in dict.fromkeys(rated.row.variant for rated in best):
            parents = Rows.join([rated.row for rated in best if rated.row.variant == variant])
            chosen = self.rng.integers(len(parents), size=_CHILDREN)
            levels = self._candidates[variant].mutated(parents.levels, _CHILDREN, self.rng)
            alike = self.rng.random(_CHILDREN) < 0.3  # the same plan, trained in another way
            levels[alike] = parents.levels[chosen[alike]]
            found.append(Rows(variant, levels, self._settings(_CHILDREN, list(parents.settings[chosen]))))
        return found

    def _settings(self, count: int, parents: Sequence[Floats]) -> Floats:
        """How to train so many plans: mostly nearly as good ones were, else at random; shape (count, settings)."""
        drawn = self._encoding.random_settings(count, self.rng)
        known = np.stack([self._encoding.default_settings(), *parents])
        near = known[self.rng.integers(len(known), size=count)]
        ranges = self._encoding.continuous
        moved = np.clip(near + ranges * self.rng.normal(0, 0.1, near.shape), 0, 1)
        near = np.where(ranges, moved, near)
        return np.where(self.rng.random((count, 1)) < _ALIKE, near, drawn)

    def _look(self, variant: str) -> tuple[Candidates, Floats]:
        """What each level of an architecture saves alone, and what its strongest plan costs."""
        counts = [len(unit.levels) for unit in self._encoding.units[variant]]
        ends = np.cumsum([1, *counts])
        levels = np.zeros((ends[-1] + 1, len(counts)), dtype=np.int64)
        for unit, (start, count) in enumerate(zip(ends, counts, strict=False)):
            levels[start : start + count, unit] = np.arange(count)
        levels[-1] = np.array(counts) - 1
        rows = Rows(variant, levels, np.tile(self._encoding.default_settings(), (len(levels), 1)))
        costs = self._beliefs.costs(rows)
        saved = (costs[:1] - costs[1:-1]) / np.maximum(np.abs(costs[:1]), _TINY)
        damage = self._beliefs.features.of[variant].damage
        return Candidates(self._encoding, variant, damage, np.split(saved, ends[1:-1] - 1)), costs[-1]
