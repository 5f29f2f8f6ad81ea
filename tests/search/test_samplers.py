"""The contract that every sampler keeps, on a study whose values the tests make up."""

from __future__ import annotations

from functools import cache
from typing import Any

import optuna
import pytest

from paretune.search.samplers import SAMPLERS
from paretune.spaces.space import Options, SearchSpace

SPACE = SearchSpace(
    grids={"stem": [8, 16, 24, 32], "body": [16, 32, 48, 64]},
    widths={"stem": (32, 8), "body": (32, 8), "head": (32,)},
    options=Options(importance=("l1", "l2")),
)
TRIALS = 12
NAMES = sorted(SAMPLERS)


def search(name: str, *, space: SearchSpace = SPACE, seed: int = 0, trials: int = TRIALS) -> list[dict[str, Any]]:
    """Parameters proposed by a sampler that is told a trade-off between pruning and accuracy."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=SAMPLERS[name](space, seed))
    for _ in range(trials):
        trial = study.ask(space.distributions())
        plan = space.to_plan(trial.params)
        ratio = sum(plan.prune.ratios.values())
        wide = sum(plan.quantize.bits.values())
        study.tell(trial, [1 - ratio / 4 + wide / 1000, 2 - ratio + wide / 100])
    return [trial.params for trial in study.trials]


@cache
def proposals(name: str) -> list[dict[str, Any]]:
    """What a sampler proposes with seed 0; cached, as fitting Gaussian processes takes seconds."""
    return search(name)


@pytest.mark.parametrize("name", NAMES)
class TestSampler:
    """Holds for every name."""

    def test_proposes_within_the_space(self, name: str) -> None:
        distributions = SPACE.distributions()
        proposed = proposals(name)
        assert len(proposed) == TRIALS
        for params in proposed:
            assert params.keys() == distributions.keys()
            assert all(d._contains(d.to_internal_repr(params[key])) for key, d in distributions.items())
            plan = SPACE.to_plan(params)
            assert SPACE.to_plan(SPACE.to_params(plan)) == plan

    def test_proposes_different_plans(self, name: str) -> None:
        assert len({SPACE.to_plan(params).hash for params in proposals(name)}) > TRIALS / 2

    def test_repeats_itself_with_its_seed(self, name: str) -> None:
        assert search(name) == proposals(name)

    def test_takes_enqueued_plans_first(self, name: str) -> None:
        study = optuna.create_study(directions=["maximize", "minimize"], sampler=SAMPLERS[name](SPACE, 0))
        dense = SPACE.to_params(SPACE.uniform(0.0))
        study.enqueue_trial(dense)
        assert study.ask(SPACE.distributions()).params == dense

    def test_searches_a_space_of_one_choice(self, name: str) -> None:
        space = SearchSpace({"stem": [8, 16]}, {}, Options(temperature=(4, 4), learning_rate=(1e-3, 1e-3)))
        assert all(0 <= params["prune/stem"] <= 0.5 for params in search(name, space=space, trials=5))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "uniform"])
def test_another_seed_proposes_other_plans(name: str) -> None:
    assert search(name, seed=1, trials=3) != proposals(name)[:3]


def test_uniform_follows_the_sweep() -> None:
    plans = [SPACE.to_plan(params) for params in search("uniform", trials=6)]
    assert plans == [SPACE.sweep(index) for index in range(6)]
    assert not plans[0].prune.ratios
    assert set(plans[0].quantize.bits.values()) == {32}


def test_uniform_refuses_parameters_that_are_not_of_the_space() -> None:
    study = optuna.create_study(sampler=SAMPLERS["uniform"](SPACE, 0))
    with pytest.raises(KeyError, match="'other' isn't a parameter of the space"):
        study.ask().suggest_float("other", 0, 1)
