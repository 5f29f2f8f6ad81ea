"""The Pareto front: which measured plans no other measured plan beats.

Accuracy, size, parameters and MACs are exact on the data they were counted on. Latency is a measurement with an
interval, so two latencies whose intervals overlap count as equal: a point isn't kept, nor thrown out, for a
difference that the clock can't tell from noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from paretune.search.job_types import Constraint, direction

Metrics = Mapping[str, Any]
Ends = tuple[tuple[float, float], ...]
"""Between which losses each objective lies."""


def violation(constraint: Constraint, metrics: Metrics) -> float:
    """By how much a bound is broken, in the metric's own unit; 0 or less where it holds."""
    value = float(metrics[constraint.name])
    return constraint.value - value if constraint.op == ">=" else value - constraint.value


def feasible(metrics: Metrics, constraints: Sequence[Constraint]) -> bool:
    """Whether every bound holds."""
    return all(constraint.holds(metrics[constraint.name]) for constraint in constraints)


def _ends(metrics: Metrics, objectives: Sequence[str]) -> Ends:
    """Of a latency the ends of its interval; other values are exact."""
    found = []
    for name in objectives:
        metric, at, target = name.partition("@")
        if metric == "latency_ms":
            found.append((metrics[f"latency_low_ms{at}{target}"], metrics[f"latency_high_ms{at}{target}"]))
        else:
            loss = -metrics[name] if direction(name) == "maximize" else metrics[name]
            found.append((loss, loss))
    return tuple(found)


def _is_better(one: Ends, other: Ends) -> bool:
    """Whether one is told apart from the other as the better one in some objective."""
    return any(high < low for (_, high), (low, _) in zip(one, other, strict=True))


def _dominates(one: Ends, other: Ends) -> bool:
    return _is_better(one, other) and not _is_better(other, one)


def _covers(one: Ends, other: Ends) -> bool:
    """Whether one is no worse at both ends of all objectives."""
    return all(a <= c and b <= d for (a, b), (c, d) in zip(one, other, strict=True))


def dominates(a: Metrics, b: Metrics, objectives: Sequence[str]) -> bool:
    """Whether `a` is worse than `b` in no objective and better in at least one.

    Overlapping latency intervals are not transitive, but no cycle can come of it: along a chain of dominance every
    exact objective only improves, and where all of them tie, disjoint intervals order the latencies.
    """
    return _dominates(_ends(a, objectives), _ends(b, objectives))


class Front:
    """The Pareto front of points that come one after the other.

    A point that is dominated may dominate one that nothing else does, as overlaps of intervals aren't transitive. Only
    a point that another one *covers*, with both ends of all intervals no worse, never matters again: whatever it
    dominates, the other one does, too. So few points must be kept, and a new one costs about as much after ten thousand
    as after a hundred.

    Args:
        objectives: Names of values, as in the points.
    """

    def __init__(self, objectives: Sequence[str]) -> None:
        self._objectives = tuple(objectives)
        self._uncovered: list[Ends] = []
        self._undominated: dict[int, tuple[float, Ends]] = {}
        self._members: list[int] = []

    @property
    def members(self) -> list[int]:
        """Numbers of the points that no other one dominates, fastest first.

        Of points that can't be told apart in any objective, the one with the lowest median latency stays (the first
        among equals).
        """
        return list(self._members)

    def add(self, number: int, point: Metrics) -> bool:
        """Take a point under a number of its own; returns whether the members are others now.

        One with a non-finite objective is left out.
        """
        if not all(math.isfinite(point[name]) for name in self._objectives):
            return False
        ends = _ends(point, self._objectives)
        is_dominated = any(_dominates(known, ends) for known in self._uncovered)
        if not any(_covers(known, ends) for known in self._uncovered):
            self._uncovered = [*(known for known in self._uncovered if not _covers(ends, known)), ends]
            kept = {n: known for n, known in self._undominated.items() if not _dominates(ends, known[1])}
            self._undominated = kept
        if not is_dominated:
            self._undominated[number] = float(point["latency_ms"]), ends
        before, self._members = self._members, self._told_apart()
        return self._members != before

    def _told_apart(self) -> list[int]:
        """Those that aren't dominated, fastest first, without twins of faster ones."""
        found: dict[int, Ends] = {}
        for number, (_, ends) in sorted(self._undominated.items(), key=lambda item: item[1][0]):
            if all(_is_better(known, ends) or _is_better(ends, known) for known in found.values()):
                found[number] = ends
        return list(found)


def pareto_front(points: Sequence[Metrics], objectives: Sequence[str]) -> list[int]:
    """Indices of the points that no other point dominates, fastest first; see `Front`."""
    front = Front(objectives)
    for index, point in enumerate(points):
        front.add(index, point)
    return front.members


def knee(points: Sequence[Mapping[str, Any]]) -> int:
    """Index of the front's knee: the point farthest above the line from the fastest to the most accurate point.

    Args:
        points: The `points` of a front.json, at least one; judged by their validation accuracy and latency, each
            scaled to the front's own range. Where no point lies above the line, the most accurate one is the knee.

    Source: the normal-boundary reading of a knee (Das, 1999, "On characterizing the knee of the Pareto curve").
    """
    latency = [float(point["validation"]["latency_ms"]) for point in points]
    accuracy = [float(point["validation"]["accuracy"]) for point in points]
    width = max(latency) - min(latency) or 1.0
    height = max(accuracy) - min(accuracy) or 1.0
    # On the unit square the line runs from the lower left to the upper right: height above it is y - x.
    above = [(y - min(accuracy)) / height - (x - min(latency)) / width for x, y in zip(latency, accuracy, strict=True)]
    return max(range(len(points)), key=lambda i: (above[i], accuracy[i]))
