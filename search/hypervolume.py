"""The hypervolume: how much of the space of objectives a set of models dominates, in one number.

Points are *losses*: one coordinate for each objective, all of them to be minimized (`losses` negates the accuracy).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from paretune.search.job_types import Constraint, direction

Point = tuple[float, ...]

SLACK = 0.1
"""How much worse than the dense model, as a share of its value, a point may be and still count."""


def tolerated(value: float) -> float:
    """By how much worse than the dense model's a value may be and still count; more than 0."""
    return SLACK * max(abs(value), 1e-9)


def losses(values: Mapping[str, float], objectives: Sequence[str]) -> Point:
    """The objectives' values with the sign by which less is better."""
    return tuple(-values[name] if direction(name) == "maximize" else float(values[name]) for name in objectives)


def reference_point(
    dense: Mapping[str, float], objectives: Sequence[str], constraints: Iterable[Constraint] = ()
) -> Point:
    """The worst losses that count: what is worse in any objective adds nothing to the hypervolume.

    Tied to the dense model and the job alone, so that two runs of one job can be compared: 1.1 times its latency, size,
    parameters or MACs, and its accuracy minus a tenth. A bound of the job takes its place where it is tighter.

    Args:
        dense: Values of the dense model, by objective.
        objectives: Their names, in the order of the coordinates.
        constraints: Bounds of the job; those on what is no objective don't matter here.
    """
    worst = {
        name: dense[name] - (1 if direction(name) == "maximize" else -1) * tolerated(dense[name]) for name in objectives
    }
    for bound in constraints:
        if bound.name in worst and bound.op == (">=" if direction(bound.name) == "maximize" else "<="):
            tighter = max if bound.op == ">=" else min
            worst[bound.name] = tighter(worst[bound.name], bound.value)
    return losses(worst, objectives)


def hypervolume(points: Iterable[Sequence[float]], reference: Sequence[float]) -> float:
    """The exact volume between a reference point and what `points` dominate (Zitzler and Thiele, 1998).

    Duplicates and dominated points add nothing; neither does a point that isn't strictly better than the
    reference in all coordinates. Two coordinates take O(n log n), each further one a factor of n.

    Args:
        points: Losses, in any order, each as long as `reference`.
        reference: The worst losses that count: one to four of them.

    Raises:
        ValueError: A coordinate isn't finite (an infinite one would win every comparison), or there are too many.
    """
    worst = _checked(reference)
    if not 1 <= len(worst) <= 4:
        raise ValueError(f"a hypervolume must have one to four objectives, but got {len(worst)}")
    found = [_checked(point) for point in points]
    for point in found:
        if len(point) != len(worst):
            raise ValueError(f"points must have {len(worst)} coordinates as the reference has, but got {point}")
    return _volume([point for point in found if all(x < bound for x, bound in zip(point, worst, strict=True))], worst)


def hypervolume_curve(points: Iterable[Sequence[float]], reference: Sequence[float]) -> list[float]:
    """The hypervolume after each of `points`; as long as `points`, never falls."""
    curve: list[float] = []
    useful: list[Point] = []
    for point in map(_checked, points):
        if curve and any(_covers(known, point) for known in useful):
            curve.append(curve[-1])
            continue
        useful = [known for known in useful if not _covers(point, known)]
        useful.append(point)
        curve.append(hypervolume(useful, reference))
    return curve


def _checked(point: Sequence[float]) -> Point:
    values = tuple(float(value) for value in point)
    if not all(map(math.isfinite, values)):
        raise ValueError(f"points must be finite, but got {values}; leave it out")
    return values


def _covers(one: Point, other: Point) -> bool:
    """Whether one is nowhere worse than the other."""
    return all(a <= b for a, b in zip(one, other, strict=True))


def _volume(points: Sequence[Point], worst: Point) -> float:
    """By slices along the first coordinate (as in HSO, While et al., 2006): each is a volume of one dimension less."""
    if len(worst) == 1:
        return worst[0] - min((point[0] for point in points), default=worst[0])
    ordered = sorted(points)
    if len(worst) == 2:
        area, covered = 0.0, worst[1]
        for first, second in ordered:
            if second < covered:
                area += (worst[0] - first) * (covered - second)
                covered = second
        return area
    volume = 0.0
    front: list[Point] = []  # of the points so far, without their first coordinate
    for i, (first, *others) in enumerate(ordered):
        rest = tuple(others)
        if not any(_covers(known, rest) for known in front):
            front = [*(known for known in front if not _covers(rest, known)), rest]
        end = ordered[i + 1][0] if i + 1 < len(ordered) else worst[0]
        if end > first:
            volume += (end - first) * _volume(front, worst[1:])
    return volume
