"""Candidates: within the space, at equal marginal cost, and varied."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from paretune.search.surrogate.candidates import Candidates, equal_marginal_cost
from paretune.spaces.space import SearchSpace
from paretune.spaces.units import units_of

SPACE = SearchSpace(grids={f"g{i}": [8, 16, 24, 32] for i in range(4)}, widths={f"l{i}": (32, 8) for i in range(4)})
COUNTS = [4] * 4 + [2] * 4


def candidates(seed: int = 0) -> Candidates:
    rng = np.random.default_rng(seed)
    damage = [np.cumsum([0.0, *rng.uniform(0.01, 0.2, count - 1)]) for count in COUNTS]
    saved = [np.cumsum([0.0, *rng.uniform(0.01, 0.1, count - 1)])[:, None] for count in COUNTS]
    return Candidates(units_of(SPACE), damage, saved)


def test_plans_at_equal_marginal_cost_are_beaten_by_none() -> None:
    rng = np.random.default_rng(0)
    damage, saved = rng.uniform(0, 1, (2, 4, 3))
    damage[:, 0] = saved[:, 0] = 0
    trades = np.array([0.3, 1.0, 3.0])
    chosen = equal_marginal_cost(np.stack([damage] * 3), np.stack([saved] * 3), trades)
    everything = np.array(list(product(range(3), repeat=4)))
    units = np.arange(4)
    total = damage[units, everything].sum(1), saved[units, everything].sum(1)
    for plan in chosen:
        lost, won = damage[units, plan].sum(), saved[units, plan].sum()
        better = (total[0] <= lost) & (total[1] >= won) & ((total[0] < lost) | (total[1] > won))
        assert not better.any()


def test_trades_run_from_the_mildest_to_the_strongest_plan() -> None:
    levels = candidates().traded(32, np.random.default_rng(0), sure=True)
    assert not levels[0].any()
    assert levels[-1].tolist() == [count - 1 for count in COUNTS]
    assert (np.diff(levels.sum(1)) >= 0).all()


@pytest.mark.parametrize("kind", ["traded", "mutated", "random", "uniform"])
def test_levels_are_of_the_space(kind: str) -> None:
    rng, found = np.random.default_rng(1), candidates()
    levels = {
        "traded": lambda: found.traded(200, rng),
        "mutated": lambda: found.mutated(found.random(5, rng), 200, rng),
        "random": lambda: found.random(200, rng),
        "uniform": found.uniform,
    }[kind]()
    assert levels.shape[1] == len(COUNTS)
    assert (levels >= 0).all()
    assert (levels < np.array(COUNTS)).all()
    assert len(np.unique(levels, axis=0)) >= 8


def test_children_differ_from_their_parents_and_leave_them_alone() -> None:
    rng, found = np.random.default_rng(2), candidates()
    parents = found.random(3, rng)
    before = parents.copy()
    children = found.mutated(parents, 100, rng)
    assert np.array_equal(parents, before)
    same = (children[:, None, :] == parents[None]).all(2).any(1)
    assert same.mean() < 0.3
