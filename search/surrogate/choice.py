"""The choice of the next plan: candidates, what they are believed to add, and the costs of the best ones measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heapreplace

import numpy as np
from scipy.stats import qmc

from paretune.search.surrogate.acquisition import Improvement
from paretune.search.surrogate.beliefs import Beliefs, Prospects
from paretune.search.surrogate.candidates import Candidates
from paretune.search.surrogate.encoding import Encoding, Floats, Key, Levels, Rows
from paretune.spaces.space import MODEL

Measure = Callable[[Rows], Mapping[str, float] | None]
"""Deploys a single plan untrained and tells what it costs; None where it can't be deployed."""

_FIRST = 6
"""Trials before the surrogate decides."""

_SPREAD = (0.45, 0.7, 0.55, 0.25, 0.85, 0.35)
"""Where these are along the front that the probes foresee, from dense to cheapest."""

_ALONG = (0.2, 0.9)
"""Where further ones are, which many workers ask for before anything is known."""

_JITTER = 0.05
"""By how much these places differ from seed to seed."""

_MEASURING = 0.05
"""Share of the search's time that may go into measuring plans: where trials are short, it takes as long as they."""

_POOL, _CHILDREN, _ROUNDS, _BEST = 96, 96, 4, 24
"""Candidates of each kind in the first round; children in each further one; such rounds; how many go on."""

_SPARE = 4
"""Candidates that go on for each plan, where many are wanted."""

_ATTEMPTS = 3
"""How often to look for others where none of the best can be deployed."""

_SURE = 0.03
"""Relative error below which a predicted cost isn't worth a measurement: the clock's own is about as large."""

_NOTHING = 1e-9
"""Share of the whole volume that counts for nothing."""

_ALIKE = 0.85
"""Share of the candidates that are trained nearly as good plans were; the others in any way."""

_SLIGHT, _LOOSE = 0.01, 0.3
"""A damage that counts for nothing; and by how much, as a logarithm, damages of plans that are trained alike differ."""

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
        self._shift = rng.random(len(encoding.settings))
        self._begun = time.monotonic()
        self._spent = 0.0

    def _has_time(self) -> bool:
        return self._spent <= _MEASURING * (time.monotonic() - self._begun)

    def refresh(self) -> None:
        """Look at what each level saves, as the costs are predicted now."""
        found = {name: self._look(name) for name in self._encoding.units}
        self._candidates = {name: candidates for name, (candidates, _) in found.items()}
        self._cheapest = np.min([costs for _, costs in found.values()], axis=0)

    def next(self, pending: Sequence[Rows], measure: Measure | None, measured: int, *, plans: int = 1) -> list[Rows]:
        """The plans for the next trials, at least one, best first.

        Args:
            pending: Plans of trials that are still running.
            measure: Measures what plans cost; None trusts the predictions.
            measured: How many plans may be measured, at most.
            plans: How many are wanted; there may be fewer.
        """
        seen = self._beliefs.seen
        position = seen.count + len(seen.failed) + len(pending)
        if position <= _FIRST or not self._beliefs.is_ready:
            return self._designed(position, pending, plans)
        with self._beliefs.assuming(pending):
            for _ in range(_ATTEMPTS):
                improvement, best = self._searched(max(_BEST, _SPARE * plans))
                rows = [rated.row for rated in best]
                if measure is None:
                    return self._together(improvement, rows[0], rows[1:], plans)
                if known := self._measured(rows, measure, measured):
                    gains = [float(self._beliefs.prospects(row).gains(improvement)[0]) for row in known]
                    return self._together(improvement, known[int(np.argmax(gains))], rows, plans)
            return self._designed(position, pending)  # nothing that looks well can be deployed

    def _together(self, improvement: Improvement, first: Rows, others: Sequence[Rows], plans: int) -> list[Rows]:
        """A plan and those that add most beside it, each with those before it on the front as they are believed to be.

        What a plan adds can only become less with each that joins the front, so most needn't be looked at again
        (Minoux, 1978, "Accelerated greedy algorithms").
        """
        chosen = [first]
        if plans == 1:
            return chosen
        taken = {*self._encoding.keys(first), *self._beliefs.seen.failed}
        left = [row for row in others if self._encoding.keys(row)[0] not in taken]
        prospects = self._prospects([first, *left])
        improvement = improvement.after(prospects[0].costs[0], float(prospects[0].accuracy.median[0]))
        queue = [(-float(one.gains(improvement)[0]), place) for place, one in enumerate(prospects) if place]
        heapify(queue)
        while queue and len(chosen) < plans:
            place = queue[0][1]
            gain = float(prospects[place].gains(improvement)[0])
            heapreplace(queue, (-gain, place))
            if queue[0][1] != place:  # another one may add more now
                continue
            heappop(queue)
            chosen.append(left[place - 1])
            one = prospects[place]
            improvement = improvement.after(one.costs[0], float(one.accuracy.median[0]))
        return chosen

    def _prospects(self, rows: Sequence[Rows]) -> list[Prospects]:
        """Of single plans, in their order."""
        found: dict[int, Prospects] = {}
        for variant in dict.fromkeys(row.variant for row in rows):
            places = [place for place, row in enumerate(rows) if row.variant == variant]
            own = self._beliefs.prospects(Rows.join([rows[place] for place in places]))
            found |= {place: own.take(position) for position, place in enumerate(places)}
        return [found[place] for place in range(len(rows))]

    def _searched(self, most: int) -> tuple[Improvement, list[_Rated]]:
        """The best candidates, best first."""
        standing = self._beliefs.standing()
        front = self._beliefs.front(standing)
        pools = [self._pool(name, [row for row in front if row.variant == name]) for name in self._encoding.units]
        improvement = self._beliefs.improvement(standing, self._cheapest)

        def gains(rows: Rows) -> Floats:
            return self._beliefs.prospects(rows).gains(improvement)

        best, rate = self._rated(gains, pools, most), gains
        if best and best[0].gain <= _NOTHING * improvement.whole:  # nothing is believed to reach what counts
            best, rate = self._rated(self._beliefs.nearness, pools, most), self._beliefs.nearness
        for _ in range(_ROUNDS):
            children = self._children(best[: max(_BEST, most // _SPARE)])
            best = self._different([*best, *self._rated(rate, children, most)], most)
        # In a small space all plans may have been tried: then in another way, then, should it last for ever, again.
        best = best or self._rated(rate, pools, most, trained_alike=True)
        return improvement, best or [_Rated(0.0, pools[0].take([0]))]

    def _rated(
        self, rate: Callable[[Rows], Floats], pools: Sequence[Rows], most: int, *, trained_alike: bool = False
    ) -> list[_Rated]:
        """The best of some plans that weren't tried, best first.

        Trained in another way the same plan would hardly add to the front, and how to train is learnt from any plan.
        """
        found: list[_Rated] = []
        for rows in pools:
            gains = rate(rows)
            own: dict[Key, _Rated] = {}
            keys = self._encoding.keys(rows)
            for place in np.argsort(-gains, kind="stable"):
                if len(own) == most:
                    break
                row = rows.take([place])
                if keys[place] not in own and not self._beliefs.knows(row, trained_alike=trained_alike):
                    own[keys[place]] = _Rated(float(gains[place]), row)
            found += own.values()
        return self._different(found, most)

    def _different(self, rated: Sequence[_Rated], most: int) -> list[_Rated]:
        """The best of plans that compress differently, best first."""
        found: dict[Key, _Rated] = {}
        for one in sorted(rated, reverse=True):
            found.setdefault(self._encoding.keys(one.row)[0], one)
        return list(found.values())[:most]

    def _measured(self, best: Sequence[Rows], measure: Measure, measured: int) -> list[Rows]:
        """The best plans, measured as far as there is time; without those that can't be deployed."""
        found: dict[Key, Rows] = {}
        seen, ledger = self._beliefs.seen, self._beliefs.ledger
        for row in best:
            [key] = self._encoding.keys(row)
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

    def _designed(self, position: int, pending: Sequence[Rows], plans: int = 1) -> list[Rows]:
        """Plans of the front that the probes foresee, the trials spread along it.

        Every other one has just one technique beside quantization, so that it shows how well each is repaired; and each
        is trained in another way.
        """
        candidates = self._candidates[MODEL]
        structural = candidates.structural
        only = structural[position // 2 % len(structural)] if position % 2 and structural else None
        without = [name for name in structural if only not in (None, name)]
        levels = candidates.traded(4 * _POOL, self.rng, sure=True, without=without)
        levels = self._encoding.settled(MODEL, levels)
        rows = Rows(MODEL, levels, np.tile(self._spread_settings(position), (len(levels), 1)))
        cost = self._beliefs.costs(rows)[:, 0]
        taken = {key for row in pending for key in self._encoding.keys(row)}
        keys, found = self._encoding.keys(rows), list[Rows]()
        for number in range(position, position + plans):
            order = np.abs(cost - self._wanted(number, cost)).argsort(kind="stable")
            place = next((i for i in order if keys[i] not in taken and self._is_new(rows.take([i]))), order[0])
            taken.add(keys[place])
            found.append(replace(rows.take([place]), settings=self._spread_settings(number)[None]))
        return found

    def _is_new(self, row: Rows) -> bool:
        return not self._beliefs.knows(row, trained_alike=False)

    def _wanted(self, position: int, cost: Floats) -> float:
        """What the plan of a trial should cost, between the most and the least of some plans."""
        place = _SPREAD[position % len(_SPREAD)] if position <= _FIRST else self.rng.uniform(*_ALONG)
        share = place + self.rng.uniform(-_JITTER, _JITTER)
        return float(cost.max() + (cost.min() - cost.max()) * share)

    def _spread_settings(self, position: int) -> Floats:
        """The middle first, then points that fill the ranges evenly (Halton, 1960); first choices throughout."""
        middle = self._encoding.default_settings()
        if position < 2 or not len(middle):
            return middle
        point = (qmc.Halton(len(middle), scramble=False).random(position + 1)[-1] + self._shift) % 1
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
        levels = self._encoding.settled(variant, levels)
        return Rows(variant, levels, self._settings(variant, levels, front))

    def _children(self, best: Sequence[_Rated]) -> list[Rows]:
        """Children of the best plans, an architecture at a time."""
        found = []
        for variant in dict.fromkeys(rated.row.variant for rated in best):
            parents = Rows.join([rated.row for rated in best if rated.row.variant == variant])
            chosen = self.rng.integers(len(parents), size=_CHILDREN)
            levels = self._candidates[variant].mutated(parents.levels, _CHILDREN, self.rng)
            alike = self.rng.random(_CHILDREN) < 0.3  # the same plan, trained in another way
            levels[alike] = parents.levels[chosen[alike]]
            levels = self._encoding.settled(variant, levels)
            found.append(Rows(variant, levels, self._settings(variant, levels, [parents])))
        return found

    def _settings(self, variant: str, levels: Levels, parents: Sequence[Rows]) -> Floats:
        """How to train plans: mostly nearly as a good one that is about as much damaged was; shape (N, settings).

        How to train best depends on nothing as much as on the damage: a learning rate that repairs a large one ruins a
        plan with hardly any.
        """
        drawn = self._encoding.random_settings(len(levels), self.rng)
        known = np.concatenate([self._encoding.default_settings()[None], *(rows.settings for rows in parents)])
        near = np.zeros(len(levels), dtype=np.int64)
        if parents:
            lost = self._beliefs.features.of[variant].lost
            of_parents = np.log(_SLIGHT + np.concatenate([lost(rows.levels).sum(1) for rows in parents]))
            apart = np.abs(np.log(_SLIGHT + lost(levels).sum(1))[:, None] - of_parents)
            near = 1 + (apart + self.rng.exponential(_LOOSE, apart.shape)).argmin(1)
        ranges = self._encoding.continuous
        settings = known[near]
        moved = np.clip(settings + ranges * self.rng.normal(0, 0.1, settings.shape), 0, 1)
        settings = np.where(ranges, moved, settings)
        return np.where(self.rng.random((len(levels), 1)) < _ALIKE, settings, drawn)

    def _look(self, variant: str) -> tuple[Candidates, Floats]:
        """What each level of an architecture saves alone, and what its strongest plan costs."""
        counts = [len(unit.levels) for unit in self._encoding.units[variant]]
        ends = np.cumsum([1, *counts])
        levels = np.zeros((ends[-1] + 1, len(counts)), dtype=np.int64)
        for unit, (start, count) in enumerate(zip(ends, counts, strict=False)):
            levels[start : start + count, unit] = np.arange(count)
        levels[-1] = np.array(counts) - 1
        rows = Rows(variant, levels, np.tile(self._encoding.default_settings(), (len(levels), 1)))
        costs = self._beliefs.costs(rows, known=False)  # a measured one among predicted ones would be off
        saved = (costs[:1] - costs[1:-1]) / np.maximum(np.abs(costs[:1]), _TINY)
        damage = self._beliefs.features.of[variant].damage
        return Candidates(self._encoding.units[variant], damage, np.split(saved, ends[1:-1] - 1)), costs[-1]
