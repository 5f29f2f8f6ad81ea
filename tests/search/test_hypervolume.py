import itertools
import math

import numpy as np
import pytest

from paretune.search.hypervolume import hypervolume, hypervolume_curve, losses, reference_point
from paretune.search.job_types import Constraint

REFERENCE = (10.0, -50.0)
DENSE = {"latency_ms": 8.0, "accuracy": 0.9, "size_bytes": 1e6, "throughput_per_s": 200.0}


@pytest.mark.parametrize(
    ("points", "area"),
    [
        pytest.param([], 0.0, id="empty"),
        pytest.param([(4, 80)], 6 * 30, id="one point"),
        pytest.param([(4, 80), (2, 60)], 6 * 30 + 2 * 10, id="two points"),
        pytest.param([(2, 60), (4, 80), (8, 90)], 8 * 10 + 6 * 20 + 2 * 10, id="three steps"),
        pytest.param([(4, 80), (5, 70)], 6 * 30, id="dominated"),
        pytest.param([(4, 80), (4, 80)], 6 * 30, id="duplicate"),
        pytest.param([(4, 70), (4, 80)], 6 * 30, id="tie in latency"),
        pytest.param([(6, 80), (4, 80)], 6 * 30, id="tie in accuracy"),
        pytest.param([(11, 99), (1, 49)], 0.0, id="beyond the reference"),
        pytest.param([(10, 99), (1, 50)], 0.0, id="on the border of the reference"),
        pytest.param([(4, 80), (12, 95), (1, 20)], 6 * 30, id="some beyond the reference"),
    ],
)
def test_of_two_objectives_it_is_the_area_counted_by_hand(points: list[tuple[float, float]], area: float) -> None:
    for order in itertools.permutations(points):
        assert hypervolume([(latency, -accuracy) for latency, accuracy in order], REFERENCE) == pytest.approx(area)


@pytest.mark.parametrize("objectives", [1, 2, 3, 4])
def test_it_agrees_with_counting_the_cells_of_a_grid(objectives: int) -> None:
    # Whole numbers, so that there are ties in every coordinate, duplicates, and points beyond the reference.
    draw, size = np.random.default_rng(objectives), 6
    cells = np.array(list(itertools.product(range(size), repeat=objectives)))
    for count in (1, 2, 5, 12, 30):
        points = draw.integers(0, size + 2, (count, objectives))
        covered = (cells[:, None] >= points).all(2).any(1).sum()
        assert hypervolume(points, [size] * objectives) == covered


def test_of_four_objectives_it_agrees_with_a_sample() -> None:
    draw = np.random.default_rng(0)
    points, sample = draw.random((20, 4)), draw.random((40_000, 4))
    share = (sample[:, None] >= points).all(2).any(1).mean()
    assert hypervolume(points, np.ones(4)) == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / len(sample)))


@pytest.mark.parametrize("bad", [(math.nan, 80.0), (4.0, math.nan), (-math.inf, 80.0), (4.0, math.inf)])
def test_it_refuses_what_is_not_finite(bad: tuple[float, float]) -> None:
    for measure in (hypervolume, hypervolume_curve):
        with pytest.raises(ValueError, match="must be finite"):
            measure([(4.0, -80.0), bad], REFERENCE)


@pytest.mark.parametrize("reference", [(), (1.0,) * 5], ids=["none", "five"])
def test_it_refuses_what_it_cannot_count(reference: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=f"one to four objectives, but got {len(reference)}"):
        hypervolume([], reference)


def test_it_refuses_points_of_another_length() -> None:
    with pytest.raises(ValueError, match="must have 2 coordinates"):
        hypervolume([(1.0, 2.0, 3.0)], REFERENCE)


@pytest.mark.parametrize("objectives", [2, 3])
def test_the_curve_is_the_hypervolume_of_every_prefix(objectives: int) -> None:
    draw = np.random.default_rng(5)
    points = draw.uniform(0, 12, (40, objectives))
    points = np.concatenate([points, points[:5]])
    reference = [10.0] * objectives
    curve = hypervolume_curve(points, reference)
    assert curve == pytest.approx([hypervolume(points[: end + 1], reference) for end in range(len(points))])
    assert curve == sorted(curve)


def test_losses_are_less_where_a_model_is_better() -> None:
    assert losses(DENSE, ["latency_ms", "accuracy", "throughput_per_s"]) == (8.0, -0.9, -200.0)
    assert losses({"latency_ms@phone": 3.0}, ["latency_ms@phone"]) == (3.0,)


@pytest.mark.parametrize(
    ("constraints", "expected"),
    [
        pytest.param([], (8.8, -0.81, 1.1e6, -180.0), id="no bounds"),
        pytest.param(["latency_ms <= 5", "accuracy >= 0.85"], (5.0, -0.85, 1.1e6, -180.0), id="tighter"),
        pytest.param(["latency_ms <= 9", "accuracy >= 0.5"], (8.8, -0.81, 1.1e6, -180.0), id="looser"),
        pytest.param(["latency_ms >= 2", "accuracy <= 0.95"], (8.8, -0.81, 1.1e6, -180.0), id="of the other side"),
        pytest.param(["params <= 10"], (8.8, -0.81, 1.1e6, -180.0), id="on what is no objective"),
    ],
)
def test_the_reference_is_a_tenth_worse_than_the_dense_model_or_a_tighter_bound(
    constraints: list[str], expected: tuple[float, ...]
) -> None:
    bounds = [Constraint.model_validate(text) for text in constraints]
    assert reference_point(DENSE, list(DENSE), bounds) == pytest.approx(expected)


def test_the_reference_of_a_negative_metric_is_worse_too() -> None:
    assert reference_point({"accuracy": -2.0}, ["accuracy"]) == pytest.approx((2.2,))
