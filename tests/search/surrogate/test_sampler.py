"""The sampler `front` on a problem whose answer is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.trial import FrozenTrial, TrialState

from paretune.search.hypervolume import hypervolume, losses
from paretune.search.job_types import Constraint
from paretune.search.samplers import UniformSampler
from paretune.search.surrogate.knowledge import Architecture, Knowledge, LayerCost
from paretune.search.surrogate.sampler import FrontSampler
from paretune.spaces.plan import CompressionPlan
from paretune.spaces.space import MODEL, Options, SearchSpace

LAYERS = 8
SENSITIVE = np.array([1.0, 0.02, 0.5, 0.02, 0.02, 0.8, 0.05, 0.02])
SPACE = SearchSpace(
    {f"g{i}": [8, 16, 24, 32, 40, 48] for i in range(LAYERS)},
    {f"l{i}": (32, 8) for i in range(LAYERS)},
    Options(max_ratio=0.85),
)
OBJECTIVES = ("accuracy", "latency_ms")
REFERENCE = (-0.81, 1.1)


def outline(plan: CompressionPlan) -> dict[str, float]:
    """Latency 1 for the dense model, size 1000; both sums over layers."""
    ratio = np.array([plan.prune.ratios.get(f"g{i}", 0.0) for i in range(LAYERS)])
    narrow = np.array([plan.quantize.bits.get(f"l{i}", 32) == 8 for i in range(LAYERS)])
    latency = 0.1 + 0.9 * float(((1 - ratio) * np.where(narrow, 0.5, 1.0)).mean())
    return {"latency_ms": latency, "size_bytes": 1000 * float(((1 - ratio) * np.where(narrow, 0.25, 1.0)).mean())}


def accuracy(plan: CompressionPlan) -> float:
    ratio = np.array([plan.prune.ratios.get(f"g{i}", 0.0) for i in range(LAYERS)])
    narrow = np.array([plan.quantize.bits.get(f"l{i}", 32) == 8 for i in range(LAYERS)])
    return 0.9 - float((SENSITIVE * (ratio**2 * 0.3 + 0.02 * narrow)).sum())


def knowledge() -> Knowledge:
    levels = [0.166667, 0.333333, 0.5, 0.666667, 0.833333]
    damage = {f"prune/g{i}": {x: min(1.0, SENSITIVE[i] * x**2) for x in levels} for i in range(LAYERS)}
    damage |= {f"bits/l{i}": {8.0: SENSITIVE[i] * 0.05} for i in range(LAYERS)}
    layers = tuple(LayerCost(f"l{i}", 1000, 1000, 0.9 / LAYERS, f"g{i}") for i in range(LAYERS))
    dense = {"accuracy": 0.9, "latency_ms": 1.0, "size_bytes": 1000.0}
    return Knowledge(dense, {MODEL: Architecture(layers, damage)})


def make(seed: int = 0, **options: Any) -> FrontSampler:
    return FrontSampler(SPACE, knowledge(), measure=outline, seed=seed, **options)


def new_study(sampler: optuna.samplers.BaseSampler, objectives: tuple[str, ...] = OBJECTIVES) -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    directions = ["maximize" if name == "accuracy" else "minimize" for name in objectives]
    return optuna.create_study(directions=directions, sampler=sampler)


def values(plan: CompressionPlan) -> dict[str, float]:
    return {"accuracy": accuracy(plan), **outline(plan)}


def searched(sampler: optuna.samplers.BaseSampler, trials: int, objectives: tuple[str, ...] = OBJECTIVES) -> Any:
    study = new_study(sampler, objectives)
    plans = []
    for _ in range(trials):
        trial = study.ask(SPACE.distributions())
        plans.append(SPACE.to_plan(trial.params))
        found = values(plans[-1])
        study.tell(trial, [found[name] for name in objectives])
    return plans


def volume(plans: list[CompressionPlan]) -> float:
    return hypervolume([losses(values(plan), OBJECTIVES) for plan in plans], REFERENCE)


@pytest.mark.parametrize("seed", [0, 1])
def test_fifteen_trials_beat_fifty_of_the_uniform_sweep(seed: int) -> None:
    assert volume(searched(make(seed), 15)) > volume(searched(UniformSampler(SPACE), 50))


def test_it_repeats_itself_with_its_seed() -> None:
    assert searched(make(3), 8) == searched(make(3), 8)


def test_no_plan_is_tried_twice() -> None:
    plans = searched(make(), 25)
    compressed = {(tuple(plan.prune.ratios.items()), tuple(plan.quantize.bits.items())) for plan in plans}
    assert len(compressed) == len(plans)


def test_a_bound_on_an_objective_moves_the_search() -> None:
    bound = Constraint.model_validate("accuracy >= 0.86")
    plans = searched(make(constraints=[bound]), 30)
    free = searched(make(), 30)
    kept, loose = (np.mean([accuracy(plan) >= 0.86 for plan in found[8:]]) for found in (plans, free))
    assert kept > loose
    assert kept > 0.5


def test_a_bound_on_what_is_no_objective_is_kept() -> None:
    bound = Constraint.model_validate("size_bytes <= 300")
    plans = searched(make(constraints=[bound]), 25)
    assert np.mean([outline(plan)["size_bytes"] <= 300 for plan in plans[8:]]) > 0.8


@pytest.mark.parametrize("objectives", [(*OBJECTIVES, "size_bytes"), ("latency_ms", "accuracy", "size_bytes")])
def test_three_objectives_in_any_order(objectives: tuple[str, ...]) -> None:
    plans = searched(make(objectives=objectives), 20, objectives)
    reference = (-0.81, 1.1, 1100.0)
    names = (*OBJECTIVES, "size_bytes")
    found, sweep = (
        hypervolume([losses(values(plan), names) for plan in some], reference)
        for some in (plans, [SPACE.sweep(i) for i in range(40)])
    )
    assert found > sweep


def test_running_trials_are_not_proposed_again() -> None:
    study = new_study(make())
    for _ in range(8):
        trial = study.ask(SPACE.distributions())
        plan = SPACE.to_plan(trial.params)
        study.tell(trial, [accuracy(plan), outline(plan)["latency_ms"]])
    running = [SPACE.to_plan(study.ask(SPACE.distributions()).params) for _ in range(6)]
    assert len({(tuple(plan.prune.ratios.items()), tuple(plan.quantize.bits.items())) for plan in running}) == 6
    latency = [outline(plan)["latency_ms"] for plan in running]
    assert max(latency) - min(latency) > 0.05  # spread along the front, not all at its best spot


def test_what_failed_is_not_proposed_again() -> None:
    sampler = make()
    study = new_study(sampler)
    failed = []
    for number in range(14):
        trial = study.ask(SPACE.distributions())
        plan = SPACE.to_plan(trial.params)
        key = (tuple(plan.prune.ratios.items()), tuple(plan.quantize.bits.items()))
        assert key not in failed
        if number % 3 == 2:
            failed.append(key)
            study.tell(trial, state=TrialState.FAIL)
        else:
            study.tell(trial, [accuracy(plan), outline(plan)["latency_ms"]])


def test_a_plan_that_cannot_be_deployed_is_not_proposed() -> None:
    refused = []

    def measure(plan: CompressionPlan) -> Mapping[str, float] | None:
        if plan.prune.ratios.get("g4", 0.0) > 0.6:
            refused.append(plan)
            return None
        return outline(plan)

    sampler = FrontSampler(SPACE, knowledge(), measure=measure, seed=0)
    plans = searched(sampler, 15)
    assert refused
    assert not any(plan in refused for plan in plans)


def test_a_stopped_trial_teaches_what_it_was_expected_to_reach() -> None:
    expected: dict[int, tuple[float, float]] = {}

    def results(trial: FrozenTrial) -> tuple[Mapping[str, float], tuple[float, float] | None]:
        return outline(SPACE.to_plan(trial.params)), expected.get(trial.number)

    sampler = make(results=results)
    study = new_study(sampler)
    for number in range(12):
        trial = study.ask(SPACE.distributions())
        plan = SPACE.to_plan(trial.params)
        if number in (7, 9):
            expected[number] = (accuracy(plan), 0.01)
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, [accuracy(plan), outline(plan)["latency_ms"]])
    assert len(sampler._beliefs.seen.rows) == 12


def test_a_resumed_study_goes_on_from_its_trials() -> None:
    study = new_study(make(5))
    for _ in range(10):
        trial = study.ask(SPACE.distributions())
        plan = SPACE.to_plan(trial.params)
        study.tell(trial, [accuracy(plan), outline(plan)["latency_ms"]])
    before = [SPACE.to_plan(trial.params) for trial in study.trials]
    sampler = make(5)
    study.sampler = sampler
    proposed = SPACE.to_plan(study.ask(SPACE.distributions()).params)
    assert len(sampler._beliefs.seen.rows) == 10
    assert proposed not in before


def test_without_knowledge_it_still_searches() -> None:
    plans = searched(FrontSampler(SPACE, seed=0), 25)
    assert volume(plans) > volume(searched(optuna.samplers.RandomSampler(seed=0), 25))


def test_variants_are_searched_too() -> None:
    space = SearchSpace({"g0": [8, 16, 24, 32]}, {"l0": (32, 8)}, variants={"small": SearchSpace({}, {"s": (32, 8)})})
    study = new_study(FrontSampler(space, seed=0))
    used = set()
    for _ in range(16):
        trial = study.ask(space.distributions())
        plan = space.to_plan(trial.params)
        used.add(plan.variant)
        small = plan.variant == "small"
        study.tell(trial, [0.85 if small else 0.9 - sum(plan.prune.ratios.values()) / 3, 0.3 if small else 0.7])
    assert used == {None, "small"}


def test_a_foreign_parameter_is_refused() -> None:
    with pytest.raises(KeyError, match="'other' isn't a parameter of the space"):
        new_study(make()).ask().suggest_float("other", 0, 1)


def test_what_broke_a_bound_is_not_proposed_again() -> None:
    study = new_study(make(constraints=[Constraint.model_validate("latency_ms <= 0.6")]))
    proposed = []
    for _ in range(14):
        trial = study.ask(SPACE.distributions())
        plan = SPACE.to_plan(trial.params)
        proposed.append((tuple(plan.prune.ratios.items()), tuple(plan.quantize.bits.items())))
        if outline(plan)["latency_ms"] > 0.6:  # as it is stopped before its training, with nothing to expect
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, [accuracy(plan), outline(plan)["latency_ms"]])
    assert len(set(proposed)) == len(proposed)


def test_many_workers_get_different_plans_from_the_start() -> None:
    study = new_study(make())
    plans = [SPACE.to_plan(study.ask(SPACE.distributions()).params) for _ in range(10)]
    assert len({(tuple(plan.prune.ratios.items()), tuple(plan.quantize.bits.items())) for plan in plans}) == 10


def test_hundreds_of_workers_get_different_plans_along_the_whole_front() -> None:
    sampler = make()
    study = new_study(sampler)
    trials = [study.ask(SPACE.distributions()) for _ in range(64)]
    for trial in trials[:32]:
        plan = SPACE.to_plan(trial.params)
        study.tell(trial, [accuracy(plan), outline(plan)["latency_ms"]])
    running = [SPACE.to_plan(study.ask(SPACE.distributions()).params) for _ in range(32)]
    assert len({(tuple(plan.prune.ratios.items()), tuple(plan.quantize.bits.items())) for plan in running}) == 32
    latency = [outline(plan)["latency_ms"] for plan in running]
    assert max(latency) - min(latency) > 0.2
    told = [SPACE.to_plan(trial.params) for trial in trials[:32]]
    assert volume([*told, *running]) > 1.02 * volume(told)


def test_several_plans_are_chosen_at_once_where_many_run() -> None:
    sampler = make()
    study = new_study(sampler)
    trials = [study.ask(SPACE.distributions()) for _ in range(33)]
    for trial in trials[:8]:
        plan = SPACE.to_plan(trial.params)
        study.tell(trial, [accuracy(plan), outline(plan)["latency_ms"]])
    study.ask(SPACE.distributions())
    assert len(sampler._planned) == 25 // 8, "a plan for each eight that run, and one that was given out"
    study.tell(trials[8], [0.5, 0.5])
    assert sampler._is_stale, "there is no hurry to learn as long as plans are left"


def test_no_time_is_spent_on_learning_when_nothing_is_asked_any_more() -> None:
    sampler = make()
    study = new_study(sampler)
    trials = [study.ask(SPACE.distributions()) for _ in range(8)]
    stale = []
    for trial in trials:
        plan = SPACE.to_plan(trial.params)
        study.tell(trial, [accuracy(plan), outline(plan)["latency_ms"]])
        stale.append(sampler._is_stale)
    assert stale == [False] + [True] * 7


def test_what_it_keeps_in_mind_does_not_grow() -> None:
    sampler = make(objectives=(*OBJECTIVES, "size_bytes"))
    study = new_study(sampler, (*OBJECTIVES, "size_bytes"))
    draw = np.random.default_rng(0)
    points = []
    for _ in range(700):
        params = SPACE.to_params(SPACE.uniform())
        params |= {f"prune/g{i}": 0.83 * draw.random() for i in range(LAYERS)}
        found = values(SPACE.to_plan(params))
        points.append(losses(found, (*OBJECTIVES, "size_bytes")))
        made = optuna.trial.create_trial(
            params=params,
            distributions=SPACE.distributions(),
            values=[found[name] for name in (*OBJECTIVES, "size_bytes")],
        )
        study.add_trial(made)
    study.ask(SPACE.distributions())
    seen, ledger = sampler._beliefs.seen, sampler._beliefs.ledger
    assert (seen.count, len(seen.rows), len(seen.tried) > 600) == (700, 500, True)
    assert len(ledger._latest["model"]) == 400
    kept, trials = {tuple(row.levels[0]) for row in seen.rows}, study.get_trials(deepcopy=False)
    for place, point in enumerate(points):
        if not any(all(a <= b for a, b in zip(other, point, strict=True)) for other in points if other != point):
            [row] = sampler._encoding.encode(trials[place].params).levels
            assert tuple(row) in kept, "the front stays"


def test_a_throughput_is_better_the_larger_it_is() -> None:
    objectives = ("accuracy", "throughput_per_s")
    study = optuna.create_study(directions=["maximize", "maximize"], sampler=make(objectives=objectives))
    for _ in range(12):
        trial = study.ask(SPACE.distributions())
        plan = SPACE.to_plan(trial.params)
        study.tell(trial, [accuracy(plan), 1 / outline(plan)["latency_ms"]])
    assert max(trial.values[1] for trial in study.trials) > 2


def test_a_model_with_nothing_to_choose_beside_a_variant() -> None:
    space = SearchSpace({}, {}, variants={"small": SearchSpace({"g": [8, 16, 24, 32]}, {"s": (32, 8)})})
    study = new_study(FrontSampler(space, seed=0))
    for _ in range(10):
        trial = study.ask(space.distributions())
        plan = space.to_plan(trial.params)
        study.tell(trial, [0.9 - 0.1 * len(plan.prune.ratios), 0.5 if plan.variant else 1.0])
    assert {space.to_plan(trial.params).variant for trial in study.trials} == {None, "small"}


@pytest.mark.parametrize("scope", ["global", "threshold"])
def test_one_ratio_for_the_whole_model(scope: Any) -> None:
    space = SearchSpace({}, {}, Options(scope=scope, max_ratio=2 / 3))
    study = new_study(FrontSampler(space, seed=0))
    for _ in range(10):
        trial = study.ask(space.distributions())
        plan = space.to_plan(trial.params)
        strength = plan.prune.ratio or plan.prune.threshold or 0.0
        study.tell(trial, [0.9 - strength**2 / 10, 1 - strength / 2])
    assert len({trial.values[1] for trial in study.trials}) > 4


def test_latencies_are_foreseen_before_they_are_measured() -> None:
    sampler = make()
    searched(sampler, 15)
    errors = sampler.latency_errors()
    assert errors is not None
    assert errors.plans >= 10
    assert errors.mape < 0.2
