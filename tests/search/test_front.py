"""The Pareto front over exact values and intervals, constraints, and the knee."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest

from paretune.search.front import Front, dominates, feasible, knee, pareto_front, violation
from paretune.search.job_types import Constraint

TWO = ["accuracy", "latency_ms"]
THREE = [*TWO, "size_bytes"]

Point = dict[str, float]


def point(accuracy: float, latency: float, size: float = 100, *, spread: float = 0.01) -> Point:
    """A measurement whose latency interval reaches `spread` to both sides."""
    interval = {"latency_low_ms": latency - spread, "latency_high_ms": latency + spread}
    return {"accuracy": accuracy, "latency_ms": latency, "size_bytes": size, "params": 7, "macs": 9, **interval}


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        pytest.param(point(0.9, 1.0), point(0.8, 2.0), True, id="better in both"),
        pytest.param(point(0.9, 1.0), point(0.9, 2.0), True, id="equal accuracy, faster"),
        pytest.param(point(0.9, 1.0), point(0.8, 1.0), True, id="better accuracy, equal latency"),
        pytest.param(point(0.9, 2.0), point(0.8, 1.0), False, id="trade-off"),
        pytest.param(point(0.9, 1.0), point(0.9, 1.0), False, id="equal in all"),
        pytest.param(point(0.9, 1.0, spread=0.3), point(0.9, 1.5, spread=0.3), False, id="overlap is no gain"),
        pytest.param(point(0.9, 1.5, spread=0.3), point(0.8, 1.0, spread=0.3), True, id="overlap is no loss"),
        pytest.param(point(0.9, 1.0, spread=0.25), point(0.9, 1.5, spread=0.25), False, id="intervals touch"),
        pytest.param(point(0.9, 1.0, spread=0.24), point(0.9, 1.5, spread=0.25), True, id="intervals just apart"),
        pytest.param(point(0.9, 1.0, spread=2.0), point(0.9, 1.5, spread=0.1), False, id="one within the other"),
    ],
)
def test_dominance(a: Point, b: Point, expected: bool) -> None:
    assert dominates(a, b, TWO) is expected
    if expected:
        assert not dominates(b, a, TWO)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        pytest.param(point(0.9, 1.0, 50), point(0.9, 1.0, 60), True, id="smaller alone"),
        pytest.param(point(0.9, 1.0, 60), point(0.8, 2.0, 50), False, id="larger alone"),
        pytest.param(point(0.9, 1.0, 50), point(0.8, 2.0, 50), True, id="ties in one"),
    ],
)
def test_dominance_in_three_objectives(a: Point, b: Point, expected: bool) -> None:
    assert dominates(a, b, THREE) is expected


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        pytest.param([], [], id="no points"),
        pytest.param([point(0.5, 1.0)], [0], id="one point"),
        pytest.param([point(0.9, 3.0), point(0.5, 1.0), point(0.7, 2.0)], [1, 2, 0], id="fastest first"),
        pytest.param([point(0.9, 1.0), point(0.9, 1.0), point(0.9, 1.0)], [0], id="duplicates stay once"),
        pytest.param([point(0.9, 1.002), point(0.9, 1.0)], [1], id="of twins the faster median stays"),
        pytest.param([point(0.9, 1.0), point(0.8, 1.005)], [0], id="equally fast, less accurate"),
        pytest.param([point(math.nan, 0.5), point(0.9, 1.0)], [1], id="NaN accuracy"),
        pytest.param([point(0.99, math.inf), point(math.inf, 0.1), point(0.9, 1.0)], [2], id="infinite values"),
        pytest.param([point(math.nan, 1.0), point(0.9, math.inf)], [], id="none is finite"),
        pytest.param(
            # The wide one can't be told from either neighbour, which can be told from each other.
            [point(0.9, 1.0, spread=0.1), point(0.9, 1.25, spread=0.3), point(0.9, 1.5, spread=0.1)],
            [0],
            id="overlaps aren't transitive",
        ),
    ],
)
def test_front(points: list[Point], expected: list[int]) -> None:
    assert pareto_front(points, TWO) == expected


def test_an_objective_that_is_not_asked_for_decides_nothing() -> None:
    points = [point(0.9, 1.0, 100), point(0.8, 2.0, 10), point(0.7, 3.0, math.nan)]
    assert pareto_front(points, TWO) == [0]
    assert pareto_front(points, THREE) == [0, 1]
    assert pareto_front(points, ["accuracy", "size_bytes"]) == [0, 1]


@pytest.mark.parametrize("objectives", [TWO, THREE], ids=["two", "three"])
@pytest.mark.parametrize("spread", [0.0, 0.3, 1.5], ids=["exact", "overlapping", "mostly overlapping"])
def test_front_of_random_points(objectives: list[str], spread: float) -> None:
    rng = random.Random(0)
    for _ in range(60):
        # Few distinct values, so that ties and duplicates are common.
        points = [
            point(rng.randint(0, 4) / 10, rng.randint(1, 8) / 2, rng.randint(1, 3), spread=spread * rng.random())
            for _ in range(rng.randint(1, 14))
        ]
        front = pareto_front(points, objectives)
        assert front, "points of finite values must have a front"
        assert [points[i]["latency_ms"] for i in front] == sorted(points[i]["latency_ms"] for i in front)
        assert not any(dominates(points[i], points[j], objectives) for i, j in itertools.permutations(front, 2))
        for i in set(range(len(points))) - set(front):
            beaten = any(dominates(other, points[i], objectives) for other in points)
            twin = any(_equal(points[i], points[j], objectives) for j in front)
            assert beaten or twin


@pytest.mark.parametrize("objectives", [TWO, THREE], ids=["two", "three"])
@pytest.mark.parametrize("spread", [0.0, 0.3, 1.5], ids=["exact", "overlapping", "mostly overlapping"])
def test_a_front_that_grows_is_that_of_all_points_so_far(objectives: list[str], spread: float) -> None:
    rng = random.Random(1)
    for _ in range(30):
        points = [
            point(rng.randint(0, 9) / 10, 8 * rng.random(), rng.randint(1, 3), spread=spread * rng.random())
            for _ in range(20)
        ]
        front, before = Front(objectives), list[int]()
        for count, added in enumerate(points):
            known = points[: count + 1]
            beaten = [any(dominates(other, one, objectives) for other in known) for one in known]
            is_new = front.add(count, added)
            assert not any(beaten[number] for number in front.members)
            missing = [number for number, is_beaten in enumerate(beaten) if not is_beaten]
            missing = [number for number in missing if number not in front.members]
            assert all(any(_equal(known[i], known[j], objectives) for j in front.members) for i in missing)
            assert is_new == (front.members != before)
            before = front.members


def test_a_front_forgets_what_never_matters_again() -> None:
    rng = random.Random(2)
    front = Front(TWO)
    for number in range(2000):
        front.add(number, point(rng.random(), rng.random(), spread=0.01))
    assert len(front._uncovered) < 40


def _equal(a: Point, b: Point, objectives: list[str]) -> bool:
    apart = a["latency_high_ms"] < b["latency_low_ms"] or b["latency_high_ms"] < a["latency_low_ms"]
    return not apart and all(a[name] == b[name] for name in objectives if name != "latency_ms")


def test_dominance_has_no_cycles() -> None:
    rng = random.Random(1)
    for _ in range(60):
        points = [point(rng.randint(0, 2), rng.random(), rng.randint(0, 1), spread=rng.random() / 4) for _ in range(9)]
        beats = {i: [j for j in range(9) if dominates(points[i], points[j], THREE)] for i in range(9)}
        left = set(beats)
        while free := {i for i in left if not any(i in beats[j] for j in left)}:
            left -= free
        assert not left, "what is left lies on a cycle"


@pytest.mark.parametrize(
    ("text", "excess", "holds"),
    [
        pytest.param("accuracy >= 0.8", -0.1, True, id="kept"),
        pytest.param("accuracy >= 0.9", 0.0, True, id="just kept"),
        pytest.param("accuracy >= 0.95", 0.05, False, id="broken"),
        pytest.param("latency_ms <= 5", -3.0, True, id="upper bound kept"),
        pytest.param("size_bytes <= 60", 40.0, False, id="upper bound broken, in bytes"),
    ],
)
def test_violation(text: str, excess: float, holds: bool) -> None:
    constraint = Constraint.model_validate(text)
    metrics = point(0.9, 2.0)
    assert violation(constraint, metrics) == pytest.approx(excess)
    assert feasible(metrics, [constraint]) is holds


def test_every_constraint_must_hold_and_nan_holds_none() -> None:
    both = [Constraint.model_validate(text) for text in ("accuracy >= 0.8", "latency_ms <= 1")]
    assert feasible(point(0.9, 2.0), [])
    assert not feasible(point(0.9, 2.0), both)
    assert feasible(point(0.9, 0.5), both)
    assert not feasible(point(math.nan, 0.5), both)


def _front(*values: tuple[float, float]) -> list[dict[str, Any]]:
    return [{"validation": {"latency_ms": latency, "accuracy": accuracy}} for latency, accuracy in values]


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        pytest.param(_front((1, 0.5)), 0, id="one point"),
        pytest.param(_front((1, 0.5), (2, 0.9)), 1, id="of two the more accurate"),
        pytest.param(_front((1, 0.5), (2, 0.85), (5, 0.9)), 1, id="the bend of three"),
        pytest.param(_front((1, 0.5), (1.5, 0.7), (2, 0.86), (4, 0.89), (9, 0.9)), 2, id="the farthest above the line"),
        pytest.param(_front((9, 0.9), (2, 0.86), (1, 0.5)), 1, id="in any order"),
        pytest.param(_front((1, 0.5), (4, 0.55), (5, 0.9)), 2, id="none above the line"),
        pytest.param(_front((1, 0.5), (2, 0.7), (3, 0.9)), 2, id="all on the line"),
        pytest.param(_front((2, 0.9), (2, 0.9)), 0, id="duplicates"),
        pytest.param(_front((2, 0.5), (2, 0.9)), 1, id="equal latencies"),
    ],
)
def test_knee(front: list[dict[str, Any]], expected: int) -> None:
    assert knee(front) == expected
