"""The accuracy surrogate on accuracies that follow from damages."""

from __future__ import annotations

import numpy as np
import pytest

from paretune.search.surrogate.accuracy import AccuracyModel, Belief
from paretune.search.surrogate.repair import Repair

TOLERATED = 0.09


def problem(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Features (3 damages, 4 of the whole plan, 10 shares of units) and the accuracies that come of them."""
    rng = np.random.default_rng(seed)
    units = rng.uniform(0, 1, (count, 10)) * rng.uniform(0, 0.6, (count, 1))
    damages = np.stack([units[:, :5].sum(1), units[:, 5:8].sum(1), units[:, 8:].sum(1)], 1)
    settings = rng.uniform(0, 1, (count, 2))
    repair = np.array([0.04] * 5 + [0.02] * 3 + [0.1] * 2)
    gap = 0.01 + units @ repair + 0.02 * (settings[:, 0] - 0.5) ** 2
    features = np.concatenate([damages, np.log(0.01 + damages[:, :2]), settings, units / units.sum(1)[:, None]], 1)
    return features, 0.93 - gap + 0.001 * rng.normal(size=count)


def learnt(count: int) -> tuple[Belief, np.ndarray]:
    features, accuracy = problem(count + 200, seed=1)
    model = AccuracyModel(TOLERATED, damages=3, whole=4, dense=0.92)
    model.fit(features[:count], accuracy[:count], np.zeros(count), tune=True)
    return model.believe(features[count:]), accuracy[count:]


def test_more_trials_foresee_better() -> None:
    errors = [np.abs(belief.median - true).mean() for belief, true in map(learnt, (6, 60))]
    assert errors[1] < 0.7 * errors[0]
    assert errors[1] < 0.006


@pytest.mark.parametrize("count", [6, 20, 60])
def test_most_of_the_truth_lies_within_two_deviations(count: int) -> None:
    belief, true = learnt(count)
    off = np.abs(np.log(np.maximum(belief.top - true, 1e-4)) - belief.mean) / np.hypot(belief.sd, 0.1)
    assert (off < 2).mean() > 0.8


def test_an_extrapolated_accuracy_counts_less_than_a_measured_one() -> None:
    features, accuracy = problem(20, seed=2)
    wrong = accuracy.copy()
    wrong[0] -= 0.2
    believed = []
    for sd in (0.0, 0.2):
        model = AccuracyModel(TOLERATED, damages=3, whole=4)
        model.fit(features, wrong, np.array([sd, *[0.0] * 19]), tune=True)
        believed.append(float(model.believe(features[:1]).median[0]))
    trusted, doubted = (abs(value - accuracy[0]) for value in believed)
    assert doubted < trusted / 3


def test_expected_improvement_is_that_of_draws() -> None:
    belief = Belief(top=0.95, mean=np.log([0.05, 0.2]), sd=np.array([0.3, 0.5]), noise=np.zeros(2))
    levels = np.array([0.5, 0.8, 0.9])
    drawn = 0.95 - np.exp(
        belief.mean[:, None] + belief.sd[:, None] * np.random.default_rng(0).normal(size=(2, 100_000))
    )
    expected = np.maximum(drawn[:, :, None] - levels, 0).mean(1)
    assert belief.improvement(levels) == pytest.approx(expected, abs=1e-3)


def test_a_few_trials_settle_what_each_technique_leaves() -> None:
    rng = np.random.default_rng(0)
    damages = rng.uniform(0, 2, (12, 3))
    gap = 0.02 + damages @ np.array([0.08, 0.01, 0.04])
    repair = Repair(TOLERATED, 3)
    before = np.abs(np.exp(repair(damages)) - gap).mean()
    repair.fit(damages, np.log(gap), np.zeros(12))
    assert np.abs(np.exp(repair(damages)) - gap).mean() < 0.4 * before
