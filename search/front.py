"""The Pareto front: which measured plans no other measured plan beats.

Accuracy, size, parameters and MACs are exact on the data they were counted on. Latency is a measurement with an
interval, so two latencies whose intervals overlap count as equal: a point isn't kept, nor thrown out, for a
difference that the clock can't tell from noise.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

from paretune.search.job_types import Constraint, direction

Metrics = Mapping[str, Any]


def violation(constraint: Constraint, metrics: Metrics) -> float:
    """By how much a bound is broken, in the metric's own unit; 0 or less where it holds."""
    value = float(metrics[constraint.name])
    return constraint.value - value if constraint.op == ">=" else value - constraint.value


def feasible(metrics: Metrics, constraints: Sequence[Constraint]) -> bool:
    """Whether every bound holds."""
    return all(constraint.holds(metrics[constraint.name]) for constraint in constraints)


def _compare(a: Metrics, b: Metrics, name: str) -> int:
    """1 where `a` is better than `b` in this objective, -1 where it is worse, 0 where they can't be told apart."""
    metric, at, target = name.partition("@")
    if metric == "latency_ms":
        low, high = f"latency_low_ms{at}{target}", f"latency_high_ms{at}{target}"
        return 1 if a[high] < b[low] else -1 if b[high] < a[low] else 0
    better = operator.gt if direction(name) == "maximize" else operator.lt
    return int(better(a[name], b[name])) - int(better(b[name], a[name]))


def dominates(a: Metrics, b: Metrics, objectives: Sequence[str]) -> bool:
    """Whether `a` is worse than `b` in no objective and better in at least one.

    Overlapping latency intervals are not transitive, but no cycle can come of it: along a chain of dominance every
    exact objective only improves, and where all of them tie, disjoint intervals order the latencies.
    """
    outcomes = [_compare(a, b, name) for name in objectives]
    return min(outcomes) >= 0 and max(outcomes) > 0


def pareto_front(points: Sequence[Metrics], objectives: Sequence[str]) -> list[int]:
    """Indices of the points that no other point dominates, fastest first.

    Of points that can't be told apart in any objective, the one with the lowest median latency stays (the first
    among equals). Points with a non-finite objective are left out.
    """
    finite = [i for i, point in enumerate(points) if all(math.isfinite(point[name]) for name in objectives)]
    finite.sort(key=lambda i: points[i]["latency_ms"])
    front: list[int] = []
    for i in finite:
        if any(dominates(points[j], points[i], objectives) for j in finite):
            continue
        twin = any(all(_compare(points[j], points[i], name) == 0 for name in objectives) for j in front)
        if not twin:
            front.append(i)
    return front


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
