"""Costs are predicted before anything is deployed, better the more was measured, with errors that are told honestly."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import spearmanr
from sklearn.linear_model import RidgeCV

from paretune.search.surrogate.costs import CostErrors, CostModel, cost_errors
from paretune.search.surrogate.knowledge import Architecture, LayerCost
from paretune.spaces.units import Unit

Floats = NDArray[np.float64]
Levels = NDArray[np.int64]

LAYERS = 8
DENSE = 5.0
RATIOS = (0.0, 0.25, 0.5, 0.75)
PRUNE = tuple(Unit(f"prune/layer{i}", "prune", f"layer{i}", RATIOS) for i in range(LAYERS))
BITS = tuple(Unit(f"bits/layer{i}", "quantize", f"layer{i}", (16.0, 8.0)) for i in range(LAYERS))
UNITS = (*PRUNE, *BITS)

_draw = np.random.default_rng(5)
WORK = _draw.dirichlet(np.full(LAYERS, 3.0))
SPEED = _draw.lognormal(0, 0.3, LAYERS)
ARCHITECTURE = Architecture(
    tuple(
        LayerCost(f"layer{i}", int(1e6 * WORK[i]), 1000, float(share), f"layer{i}", (f"layer{i - 1}",) if i else ())
        for i, share in enumerate(WORK * SPEED / (WORK * SPEED).sum() * 0.9)
    )
)
NONE = np.zeros((0, 0))


def latency(levels: Levels, noise: float = 0.02) -> Floats:
    """A machine that isn't the model's formula: 25 % fewer channels gain nothing, and borders cost a fixed time."""
    kept = 1 - np.array([0.0, 0.0, 0.5, 0.7])[levels[:, :LAYERS]]
    inputs = np.concatenate([np.ones((len(kept), 1)), kept[:, :-1]], 1)
    eight = levels[:, LAYERS:] == 1
    work = WORK * SPEED / (WORK * SPEED).sum()
    times = work * (0.85 * kept * inputs + 0.15) * np.where(eight, 0.45, 1.0)
    borders = (eight[:, 1:] != eight[:, :-1]).sum(1)
    clock = np.exp(noise * np.random.default_rng(int(levels.sum())).standard_normal(len(levels)))
    return np.asarray(DENSE * (0.1 + 0.9 * times.sum(1) + 0.02 * borders) * clock)


def macs(levels: Levels) -> Floats:
    kept = 1 - np.array(RATIOS)[levels[:, :LAYERS]]
    inputs = np.concatenate([np.ones((len(kept), 1)), kept[:, :-1]], 1)
    return np.asarray(1e6 * (WORK * kept * inputs).sum(1))


def some(count: int, seed: int) -> Levels:
    """Plans that a search would look at: about as strong everywhere, or not."""
    draw = np.random.default_rng(seed)
    middle, spread = draw.random((count, 1)), draw.choice([0.1, 0.5], (count, 1))
    cuts = np.clip(np.round(3 * (middle + spread * draw.standard_normal((count, LAYERS)))), 0, 3)
    return np.concatenate([cuts, draw.random((count, LAYERS)) < draw.random((count, 1))], 1).astype(np.int64)


def model(**settings: str | float | None) -> CostModel:
    return CostModel(UNITS, ARCHITECTURE, **({"dense": DENSE} | settings))  # type: ignore[arg-type]


def no_extra(levels: Levels) -> Floats:
    return np.zeros((len(levels), 0))


def fitted(levels: Levels) -> CostModel:
    found = model()
    found.fit(levels, no_extra(levels), latency(levels))
    return found


TEST = some(300, seed=99)


def errors_of(found: CostModel) -> CostErrors:
    return cost_errors(np.exp(found.predict(TEST, no_extra(TEST))[0]), latency(TEST, noise=0.0))


def test_before_anything_is_measured_the_prior_alone_predicts() -> None:
    found, dense, strongest = model(), np.zeros((1, 16), np.int64), np.array([[3] * LAYERS + [1] * LAYERS])
    found.fit(np.zeros((0, 16), np.int64), NONE, np.zeros(0))
    mean, sd = found.predict(np.concatenate([dense, strongest]), np.zeros((2, 0)))
    assert mean[0] == pytest.approx(math.log(DENSE), abs=0.01)
    assert mean[1] < mean[0] - 0.7
    assert (sd > 0.1).all(), "nothing is sure yet"
    assert errors_of(found).spearman > 0.9


def test_every_step_of_every_unit_makes_the_prior_cheaper() -> None:
    dense = np.zeros((1, 16), np.int64)
    found = model()
    for unit in range(16):
        steps = np.repeat(dense, len(UNITS[unit].levels), 0)
        steps[:, unit] = np.arange(len(steps))
        # A border between widths may cost what 8 bits gain on a small layer.
        steps[:, LAYERS:] = steps[:, LAYERS:].max(1, keepdims=True)
        assert (np.diff(found.predict(steps, no_extra(steps))[0]) < 0).all(), UNITS[unit].param


def test_macs_and_parameters_are_known_beforehand() -> None:
    found = model(quantity="macs", dense=1e6)
    assert cost_errors(np.exp(found.predict(TEST, no_extra(TEST))[0]), macs(TEST)).mape < 0.01


def test_a_size_falls_with_the_bits() -> None:
    eight = np.array([[0] * LAYERS + [1] * LAYERS])
    mean, _ = model(quantity="size_bytes@gpu", dense=4000.0).predict(eight, no_extra(eight))
    assert float(np.exp(mean[0])) == pytest.approx(1000, rel=0.1)


def test_two_dozen_plans_beat_the_prior_macs_and_a_regression_on_levels() -> None:
    train = some(24, seed=1)
    found = errors_of(fitted(train))
    truth = latency(TEST, noise=0.0)

    def one_hot(levels: Levels) -> Floats:
        columns = [levels[:, [u]] == np.arange(1, len(unit.levels)) for u, unit in enumerate(UNITS)]
        return np.concatenate(columns, 1).astype(np.float64)

    ridge = RidgeCV(np.logspace(-3, 3, 13)).fit(one_hot(train), np.log(latency(train))).predict(one_hot(TEST))
    line = np.polyfit(np.log(macs(train)), np.log(latency(train)), 1)
    by_macs = np.polyval(line, np.log(macs(TEST)))
    assert found.mape < 0.05
    assert found.mape < errors_of(model()).mape / 1.5
    assert found.mape < cost_errors(np.exp(ridge), truth).mape / 1.5
    assert found.mape < cost_errors(np.exp(by_macs), truth).mape / 2
    assert found.spearman > spearmanr(macs(TEST), truth).statistic


def test_more_plans_make_it_better_and_surer() -> None:
    few, many = fitted(some(12, seed=2)), fitted(some(250, seed=2))
    assert errors_of(many).mape < 0.6 * errors_of(few).mape
    sure = many.predict(TEST, no_extra(TEST))[1].mean()
    assert sure < 0.6 * few.predict(TEST, no_extra(TEST))[1].mean()


@pytest.mark.parametrize("plans", [10, 24, 100])
def test_its_deviation_is_honest(plans: int) -> None:
    mean, sd = fitted(some(plans, seed=plans)).predict(TEST, no_extra(TEST))
    off = np.abs(np.log(latency(TEST, noise=0.0)) - mean) / sd
    assert np.mean(off < 2) > 0.8
    assert np.median(off) > 0.15, "it doesn't claim to know less than it does"


def test_one_plan_is_learnt_from_and_equal_ones_do_no_harm() -> None:
    one, found = some(1, seed=4), model()
    before, unsure = found.predict(one, no_extra(one))
    found.fit(one, no_extra(one), 1.3 * np.exp(before))
    after, surer = found.predict(one, no_extra(one))
    assert after[0] == pytest.approx(before[0] + math.log(1.3), abs=0.05)
    assert surer[0] < unsure[0] / 3
    twice = np.repeat(one, 30, 0)
    found.fit(twice, no_extra(twice), np.full(30, 2.0))
    assert found.predict(one, no_extra(one))[0][0] == pytest.approx(math.log(2), abs=0.05)


def test_a_disturbed_measurement_is_named_and_does_not_spoil_the_rest() -> None:
    levels = some(24, seed=12)
    clean, found = fitted(levels), model()
    values = latency(levels)
    values[[3, 8]] *= (0.3, 3.0)
    found.fit(levels, no_extra(levels), values)
    assert found.disturbed() == [3, 8]
    assert clean.disturbed() == model().disturbed() == []
    assert errors_of(found).mape < errors_of(clean).mape + 0.02


def test_a_fit_forgets_the_one_before() -> None:
    levels = some(20, seed=6)
    found = fitted(some(9, seed=7))
    found.fit(levels, no_extra(levels), latency(levels))
    afresh = fitted(levels).predict(TEST, no_extra(TEST))
    assert np.array_equal(found.predict(TEST, no_extra(TEST)), afresh)


def test_settings_of_the_whole_plan_count() -> None:
    levels = some(60, seed=8)
    setting = (np.arange(60) % 2)[:, None].astype(np.float64)
    found = model()
    found.fit(levels, setting, latency(levels) * np.where(setting[:, 0] > 0, 1.1, 1.0))
    with_it, _ = found.predict(TEST, np.ones((300, 1)))
    without, _ = found.predict(TEST, np.zeros((300, 1)))
    assert np.median(with_it - without) == pytest.approx(math.log(1.1), abs=0.03)


def test_a_dense_value_that_is_not_known_is_learnt() -> None:
    levels = some(24, seed=9)
    found = model(dense=None)
    assert found.predict(levels, no_extra(levels))[1].min() > 0.9
    found.fit(levels, no_extra(levels), latency(levels))
    assert errors_of(found).mape < 0.09


def test_without_layers_every_unit_counts_alike() -> None:
    levels = some(60, seed=10)
    found = CostModel(UNITS, Architecture(()), dense=DENSE)
    prior = cost_errors(np.exp(found.predict(TEST, no_extra(TEST))[0]), latency(TEST))
    assert prior.spearman > 0.7
    found.fit(levels, no_extra(levels), latency(levels))
    assert errors_of(found).mape < 0.6 * prior.mape


@pytest.mark.parametrize("param", ["pruning/ratio", "pruning/threshold"])
def test_channels_that_are_ranked_together_cut_every_layer(param: str) -> None:
    unit = Unit(param, "prune", "", (0.0, 0.25, 0.5, 0.75))
    found = CostModel([unit], ARCHITECTURE, quantity="macs", dense=1e6)
    mean, _ = found.predict(np.arange(4)[:, None], np.zeros((4, 0)))
    assert (np.diff(mean) < -0.1).all()


def test_factors_zeros_and_codebooks_cost_less_where_they_save_something() -> None:
    units = [
        Unit("rank/layer0", "factorize", "layer0", (1.0, 0.5, 0.25)),
        Unit("sparsity/layer0", "sparsify", "layer0", (0.0, 0.4, 0.8)),
        Unit("clusters/layer0", "share", "layer0", (0.0, 64.0, 16.0)),
    ]
    architecture = Architecture((LayerCost("layer0", 1000, 1000, 0.9, None),))
    for quantity, saves in {"latency_ms": (True, False, False), "size_bytes": (True, True, True)}.items():
        found = CostModel(units, architecture, quantity=quantity, dense=1.0)
        for unit, does in enumerate(saves):
            levels = np.zeros((3, 3), np.int64)
            levels[:, unit] = (0, 1, 2)
            mean, _ = found.predict(levels, np.zeros((3, 0)))
            assert (np.diff(mean) < -0.05).all() if does else np.ptp(mean) == 0


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_values_that_have_no_logarithm_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        model().fit(TEST[:2], no_extra(TEST[:2]), np.array([1.0, bad]))


def test_cross_validation_tells_what_new_plans_will_show_and_changes_nothing() -> None:
    levels = some(40, seed=11)
    found = fitted(levels)
    before = found.predict(TEST, no_extra(TEST))[0]
    errors = found.cross_validate(levels, no_extra(levels), latency(levels))
    assert np.array_equal(found.predict(TEST, no_extra(TEST))[0], before)
    assert errors.plans == 40
    assert errors.mape == pytest.approx(cost_errors(np.exp(before), latency(TEST)).mape, rel=0.6)
    assert found.cross_validate(levels[:2], no_extra(levels[:2]), latency(levels[:2])).plans == 2


def test_errors_are_those_of_pairs() -> None:
    errors = cost_errors([1.1, 1.8, 3.0, 4.4], [1.0, 2.0, 3.0, 4.0])
    assert errors.plans == 4
    assert [errors.mape, errors.spearman] == pytest.approx([0.075, 1.0])
    assert str(errors) == "error 7.5% (MAPE), rank correlation 1.00, over 4 plans"
    assert cost_errors([3.0, 2.0, 1.0], [1.0, 2.0, 3.0]).spearman == pytest.approx(-1.0)


@pytest.mark.parametrize(
    ("predicted", "measured", "mape"),
    [([], [], math.nan), ([2.0], [1.0], 1.0), ([1.0, 1.0, 1.0], [1.0, 2.0, 4.0], 1.25 / 3)],
    ids=["none", "one", "constant"],
)
def test_where_pairs_tell_no_rank_it_is_nan(predicted: list[float], measured: list[float], mape: float) -> None:
    errors = cost_errors(predicted, measured)
    assert errors.mape == pytest.approx(mape, nan_ok=True)
    assert math.isnan(errors.spearman)
    assert errors.plans == len(measured)


def test_pairs_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        cost_errors([1.0, 2.0], [1.0])
