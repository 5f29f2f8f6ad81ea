"""Expected hypervolume improvement, against hypervolumes of drawn accuracies."""

from __future__ import annotations

import numpy as np
import pytest

from paretune.search.hypervolume import hypervolume
from paretune.search.surrogate.accuracy import Belief
from paretune.search.surrogate.acquisition import Improvement


@pytest.mark.parametrize("costs", [1, 2, 3])
def test_it_is_the_mean_of_what_drawn_accuracies_add(costs: int) -> None:
    rng = np.random.default_rng(costs)
    front, accuracy = rng.uniform(0.3, 0.9, (6, costs)), rng.uniform(0.5, 0.9, 6)
    plans = rng.uniform(0.2, 0.8, (5, costs))
    belief = Belief(top=1.0, mean=np.log(rng.uniform(0.05, 0.4, 5)), sd=np.full(5, 0.3), noise=np.zeros(5))
    worst, least = np.full(costs, 1.0), 0.4
    improvement = Improvement(front, accuracy, worst=worst, best=np.full(costs, 0.15), least=least)
    found = improvement(plans, belief)
    reference = (-least, *worst)
    points = [(-a, *c) for a, c in zip(accuracy, front, strict=True)]
    before = hypervolume(points, reference)
    for place, plan in enumerate(plans):
        drawn = belief.top - np.exp(belief.mean[place] + belief.sd[place] * rng.normal(size=400))
        added = [hypervolume([*points, (-a, *plan)], reference) - before for a in drawn]
        assert found[place] == pytest.approx(np.mean(added), rel=0.15, abs=2e-3)


def test_a_plan_that_costs_more_than_what_counts_adds_nothing() -> None:
    improvement = Improvement(
        np.array([[0.5]]), np.array([0.8]), worst=np.array([1.0]), best=np.array([0.1]), least=0.4
    )
    sure = Belief(top=1.0, mean=np.log([0.1, 0.1, 0.3]), sd=np.full(3, 1e-6), noise=np.zeros(3))
    dear, better, dominated = improvement(np.array([[1.2], [0.7], [0.6]]), sure)
    assert dear == 0
    assert better == pytest.approx(0.3 * 0.1, rel=0.01)  # 0.9 from 0.7 on, where the front has 0.8
    assert dominated == pytest.approx(0, abs=1e-9)


def test_a_bound_leaves_what_is_below_it_without_worth() -> None:
    empty = np.zeros((0, 1)), np.zeros(0)
    free = Improvement(*empty, worst=np.array([1.0]), best=np.array([0.0]), least=0.4)
    bound = Improvement(*empty, worst=np.array([1.0]), best=np.array([0.0]), least=0.8)
    belief = Belief(top=1.0, mean=np.log([0.4]), sd=np.array([0.01]), noise=np.zeros(1))
    assert free(np.array([[0.5]]), belief)[0] == pytest.approx(0.5 * 0.2, rel=0.02)
    assert bound(np.array([[0.5]]), belief)[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("costs", [1, 2])
def test_a_plan_that_joins_the_front_raises_it(costs: int) -> None:
    rng = np.random.default_rng(costs)
    front, accuracy = rng.uniform(0.3, 0.9, (6, costs)), rng.uniform(0.5, 0.9, 6)
    ends = {"worst": np.full(costs, 1.0), "best": np.full(costs, 0.15), "least": 0.4}
    belief = Belief(top=1.0, mean=np.log(rng.uniform(0.05, 0.4, 5)), sd=np.full(5, 0.3), noise=np.zeros(5))
    plans = rng.uniform(0.2, 0.8, (5, costs))
    before = Improvement(front[:4], accuracy[:4], **ends)
    gains = before(plans, belief)
    one_by_one = before.after(front[4], accuracy[4]).after(front[5], accuracy[5])
    assert one_by_one(plans, belief) == pytest.approx(Improvement(front, accuracy, **ends)(plans, belief))
    assert before(plans, belief) == pytest.approx(gains), "what it was made from stays"
