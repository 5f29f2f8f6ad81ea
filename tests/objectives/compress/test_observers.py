"""Ranges of grids: extremes, outermost values, rounding errors, histograms of bounded memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from paretune.errors import TrialError
from paretune.objectives.compress.observers import Histogram, Levels, find_range, least_error
from paretune.spaces.plan import Observer

GRIDS = [pytest.param(affine, id="affine" if affine else "symmetric") for affine in (False, True)]


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def full_range(values: Tensor) -> tuple[Tensor, Tensor]:
    return values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)


def seen(*batches: Tensor) -> Histogram:
    histogram = Histogram()
    for batch in batches:
        histogram.add(batch)
    return histogram


@pytest.mark.parametrize(
    ("bits", "affine", "least", "most"), [(8, False, -128, 127), (2, False, -2, 1), (8, True, 0, 255), (3, True, 0, 7)]
)
def test_levels(bits: int, affine: bool, least: int, most: int) -> None:
    assert Levels.of(bits, affine=affine) == Levels(least, most)
    assert Levels(least, most).affine == affine


@pytest.mark.parametrize("affine", GRIDS)
def test_grids_reach_the_ends_of_their_range(affine: bool) -> None:
    levels, low, high = Levels.of(4, affine=affine), torch.tensor([-1.0, 0.0]), torch.tensor([3.0, 0.0])
    scale, zero = levels.fit(low, high)
    assert bool((scale > 0).all()), "a row of zeros too"
    assert float((levels.most - zero[0]) * scale[0]) == pytest.approx(3.0, abs=float(scale[0]) / 2)
    assert float((levels.least - zero[0]) * scale[0]) <= -1.0 + float(scale[0]) / 2
    assert bool(((zero >= levels.least) & (zero <= levels.most)).all())


def test_the_error_is_that_of_torch() -> None:
    rows, low, high = normal(3, 50), torch.tensor([-1.0, -2.0, -0.1]), torch.tensor([1.0, 0.5, 0.1])
    for affine in (False, True):
        levels = Levels.of(4, affine=affine)
        scale, zero = levels.fit(low, high)
        rounded = torch.fake_quantize_per_channel_affine(rows, scale, zero.int(), 0, levels.least, levels.most)
        torch.testing.assert_close(levels.error(rows, low, high), (rounded - rows).square().sum(1))
        twice = levels.error(rows, low, high, torch.full_like(rows, 2))
        torch.testing.assert_close(twice, 2 * levels.error(rows, low, high))


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_zero_is_in_every_range(observer: Observer) -> None:
    rows = torch.stack([normal(100).abs() + 1, -normal(100).abs() - 1, torch.zeros(100)])
    for affine in (False, True):
        low, high = find_range(rows, Levels.of(4, affine=affine), observer)
        assert bool((low <= 0).all())
        assert bool((high >= 0).all())
        assert (float(low[0]), float(high[1]), float(low[2]), float(high[2])) == (0, 0, 0, 0)


def test_percentile_leaves_out_whole_values() -> None:
    rows = torch.arange(-20_000.0, 20_001).repeat(2, 1)
    rows[0, 0], rows[0, -1] = -1e9, 1e9
    low, high = find_range(rows, Levels.of(8, affine=True), "percentile")
    assert low.tolist() == [-19_996.0] * 2, "4 of 40,001"
    assert high.tolist() == [19_996.0] * 2
    short = rows[:, :9_999]
    assert torch.equal(find_range(short, Levels.of(8, affine=True), "percentile")[0], short.amin(1)), "none of so few"


@pytest.mark.parametrize("affine", GRIDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mse_never_rounds_worse_than_the_extremes(bits: int, affine: bool) -> None:
    levels = Levels.of(bits, affine=affine)
    rows = torch.cat([normal(4, 300), normal(4, 300) ** 3, normal(2, 300).relu(), torch.rand(2, 300)])
    widest = levels.error(rows, *find_range(rows, levels, "minmax"))
    found = levels.error(rows, *find_range(rows, levels, "mse"))
    assert bool((found <= widest).all())
    if bits <= 4:
        assert bool((found[:4] < widest[:4]).all()), "tails are clipped"


def test_least_error_is_least() -> None:
    values, levels = normal(1, 400), Levels.of(3, affine=False)
    low, high = least_error(values, levels, *full_range(values))
    best = float(levels.error(values, low, high))
    for share in torch.linspace(0.1, 1.0, 50):
        bounds = [bound * share for bound in full_range(values)]
        assert best <= float(levels.error(values, *bounds)) * 1.05, "steps of 7 %"


def test_histograms_dont_depend_on_the_order() -> None:
    small, large, empty = normal(1000), 37 * normal(500), torch.zeros(10)
    for observer in ("percentile", "mse"):
        ranges = []
        for batches in ((small, large, empty), (empty, large, small)):
            low, high = full_range(torch.cat(batches))
            histogram = seen(*batches)
            ranges.append(torch.stack(histogram.range(Levels.of(8, affine=True), observer, low, high)))  # type: ignore[arg-type]
        torch.testing.assert_close(ranges[0], ranges[1], rtol=0.07, atol=0.0)


@pytest.mark.parametrize("affine", GRIDS)
@pytest.mark.parametrize("make", [torch.relu, torch.nn.functional.gelu, torch.tanh, lambda x: x**3])
def test_mse_of_a_histogram_is_that_of_its_values(make: object, affine: bool) -> None:
    values = make(normal(20_000))  # type: ignore[operator]
    levels, ends = Levels.of(8, affine=affine), full_range(values)
    found = seen(*values.split(4_000)).range(levels, "mse", *ends)
    exact = least_error(values[None], levels, ends[0][None], ends[1][None])
    errors = [float(levels.error(values[None], low.reshape(1), high.reshape(1))) for low, high in (found, exact, ends)]
    assert errors[0] <= 1.02 * errors[1]
    assert errors[0] <= errors[2]


def test_percentiles_of_a_histogram() -> None:
    values = torch.cat([torch.linspace(-1, 3, 100_000), torch.tensor([-500.0] * 9 + [900.0] * 9)])
    low, high = seen(values).range(Levels.of(8, affine=True), "percentile", values.min(), values.max())
    assert float(low) == pytest.approx(-1, abs=0.3)
    assert float(high) == pytest.approx(3, abs=0.3)
    few = seen(values[::50]).range(Levels.of(8, affine=True), "percentile", values[::50].min(), values[::50].max())
    assert [float(end) for end in few] == [float(values[::50].min()), float(values[::50].max())]


def test_memory_stays_bounded_and_counts_exact() -> None:
    histogram = seen(*(normal(1000) * 10.0**power for power in range(-6, 7)))
    assert histogram._counts is not None
    assert histogram._counts.numel() == 8192
    assert int(histogram._counts.sum()) == 13_000


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_numbers_that_arent_finite_fail_the_trial(wrong: float) -> None:
    with pytest.raises(TrialError, match="must be finite"):
        seen(torch.tensor([1.0, wrong]))


def test_nothing_seen() -> None:
    low, high = torch.tensor(0.0), torch.tensor(0.0)
    assert Histogram().range(Levels.of(8, affine=True), "mse", low, high) == (low, high)
