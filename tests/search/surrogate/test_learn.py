"""Before the first trial every unit was probed, some plans were deployed, and what failed is left out with a word."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from paretune.errors import JobError, TrialError
from paretune.objectives.baseline import Baseline
from paretune.objectives.evaluate import Evaluator
from paretune.objectives.latency import Protocol
from paretune.objectives.problem import Problem
from paretune.search.job import Job, load_job
from paretune.search.problem import BASELINE, load_problem
from paretune.search.profile import Profile, make_job_space
from paretune.search.surrogate.encoding import Encoding
from paretune.search.surrogate.knowledge import Knowledge
from paretune.search.surrogate.learn import design, latency_errors, learn, probe_damage
from paretune.spaces.plan import CompressionPlan
from paretune.spaces.space import MODEL, Options, SearchSpace
from paretune.spaces.units import Unit, units_of
from tests.search.conftest import MODULE, TinyJob

OUTLINES = 5


class Known(NamedTuple):
    """The tiny job, before its first trial."""

    job: Job
    problem: Problem
    baseline: Baseline
    profile: Profile
    space: SearchSpace

    def learn(self, lines: list[str]) -> Knowledge:
        return learn(*self, lines.append, outlines=OUTLINES)


@pytest.fixture(scope="module")
def known(measured: Path) -> Known:
    job = load_job(measured / "job.yaml")
    problem, baseline = load_problem(job), Baseline(measured / BASELINE)
    profile = Profile.read(measured, problem)
    return Known(job, problem, baseline, profile, make_job_space(job, problem, profile, baseline.float_bits[""]))


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return []


@pytest.fixture(scope="module")
def knowledge(known: Known, lines: list[str]) -> Knowledge:
    return known.learn(lines)


def test_every_unit_is_probed_at_its_own_levels(known: Known, knowledge: Knowledge) -> None:
    damage = knowledge.architectures[MODEL].damage
    units = units_of(known.space)
    assert list(damage) == [unit.param for unit in units]
    for unit in units:
        assert set(damage[unit.param]) <= set(unit.levels[1:])
        assert unit.levels[-1] in damage[unit.param], "the strongest one tells the most"
        assert all(math.isfinite(lost) for lost in damage[unit.param].values())


def test_layers_are_those_of_the_analysis(known: Known, knowledge: Knowledge) -> None:
    layers = knowledge.architectures[MODEL].layers
    assert [layer.name for layer in layers] == [layer.name for layer in known.profile.analysis.layers]
    assert sum(layer.share for layer in layers) == pytest.approx(sum(known.profile.analysis.latency_share.values()))


def test_outlines_are_plans_of_the_space_with_what_they_cost(known: Known, knowledge: Knowledge) -> None:
    assert len(knowledge.outlines) == OUTLINES
    plans = [known.space.to_plan(one.params) for one in knowledge.outlines]
    assert len({plan.hash for plan in plans}) == OUTLINES
    assert known.space.to_params(plans[1]) == knowledge.outlines[1].params
    dense, strongest = knowledge.outlines[0].values, knowledge.outlines[1].values
    assert dense["params"] == knowledge.dense["params"]
    assert strongest["params"] < dense["params"]
    assert strongest["size_bytes"] < dense["size_bytes"]
    assert all(one.values["latency_ms"] > 0 for one in knowledge.outlines)


def test_the_baseline_and_the_time_are_in_it(known: Known, knowledge: Knowledge) -> None:
    assert knowledge.dense == known.baseline.measurement.to_dict()
    assert knowledge.seconds.keys() == {"sensitivity", "outlines"}
    assert all(seconds > 0 for seconds in knowledge.seconds.values())


def test_it_survives_json(knowledge: Knowledge) -> None:
    assert Knowledge.from_dict(json.loads(json.dumps(knowledge.to_dict(), allow_nan=False))) == knowledge


def test_the_last_line_publishes_the_error_of_the_latency_model(
    known: Known, knowledge: Knowledge, lines: list[str]
) -> None:
    errors = latency_errors(Encoding(known.space), knowledge)
    assert errors is not None
    assert errors.plans == OUTLINES
    assert lines[-1] == f"latency model: {errors} measured untrained"
    few = replace(knowledge, outlines=knowledge.outlines[:3])
    assert latency_errors(Encoding(known.space), few) is None


def test_variants_are_learnt_of_too(known: Known, knowledge: Knowledge, tiny: TinyJob, tmp_path: Path) -> None:
    job = tiny(tmp_path, model={"variants": {"twin": {"factory": f"{MODULE}:build"}}})
    profile = replace(known.profile, variants={"twin": known.profile.analysis})
    space = replace(known.space, variants={"twin": known.space})
    learnt = learn(job, load_problem(job), known.baseline, profile, space, lambda line: None, outlines=3)
    assert [one.params["variant"] for one in learnt.outlines] == [MODEL, MODEL, MODEL, "twin"]
    assert learnt.outlines[3].values["params"] == learnt.outlines[0].values["params"]
    twin = learnt.architectures["twin"]
    assert twin.layers == knowledge.architectures[MODEL].layers
    for param, levels in knowledge.architectures[MODEL].damage.items():
        assert twin.damage[param] == pytest.approx(levels, abs=1e-6)


def test_what_a_disturbed_machine_said_is_measured_again(known: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def disturbed(self: Evaluator, plan: CompressionPlan, *, seed: int, protocol: Protocol) -> dict[str, float]:
        asked.append(plan.hash)
        dense = known.baseline.measurement.to_dict()["latency_ms"]
        eight = sum(width == 8 for width in plan.quantize.bits.values()) / 3
        latency = dense * (1 - 0.3 * sum(plan.prune.ratios.values())) * (1 - 0.3 * eight)
        return {"latency_ms": latency / (5 if len(asked) == 6 else 1)}

    monkeypatch.setattr(Evaluator, "outline", disturbed)
    found: list[str] = []
    learnt = learn(*known, found.append, outlines=20)
    assert asked[20:] == [asked[5]], "that one alone"
    assert min(one.values["latency_ms"] for one in learnt.outlines) > learnt.dense["latency_ms"] / 5
    assert sum("measuring 1 of them again" in line for line in found) == 1


def test_a_plan_that_fails_is_left_out_with_a_word(known: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = SearchSpace(known.space.grids, {}, known.space.options)
    outline = Evaluator.outline
    faults: list[Exception] = [TrialError("another width"), AssertionError("whatever a runtime raises")]

    def failing(self: Evaluator, plan: CompressionPlan, *, seed: int, protocol: Protocol) -> dict[str, float]:
        if faults:
            raise faults.pop()
        return outline(self, plan, seed=seed, protocol=protocol)

    monkeypatch.setattr(Evaluator, "outline", failing)
    found: list[str] = []
    learnt = learn(*known._replace(space=bare), found.append, outlines=3)
    assert len(learnt.outlines) == 1
    said = [line for line in found if "can't be deployed" in line]
    assert ["AssertionError: whatever a runtime raises" in said[0], "another width" in said[1]] == [True, True]
    monkeypatch.setattr(Evaluator, "outline", _raises_job_error)
    with pytest.raises(JobError, match="the job"):
        learn(*known._replace(space=bare), found.append, outlines=3)


def _raises_job_error(self: Evaluator, plan: CompressionPlan, *, seed: int, protocol: Protocol) -> dict[str, float]:
    raise JobError("the job", "must be right", "wrong", "mend it")


def test_probes_that_fail_have_no_entry(known: Known) -> None:
    units = [
        Unit("prune/nowhere", "prune", "nowhere", (0.0, 0.5)),
        Unit("bits/0", "quantize", "0", (32.0, 8.0)),
    ]
    found: list[str] = []
    damage = probe_damage(known.problem, known.profile.analysis.macs, known.space, units, found.append)
    assert list(damage) == ["bits/0"]
    assert found[-1].startswith("1 probes failed; the first: prune/nowhere at 0.5:")
    assert probe_damage(known.problem, 1, known.space, [], found.append) == {}


def test_every_technique_can_be_probed(known: Known) -> None:
    options = replace(known.space.options, patterns=("2:4",), methods=("spatial",), clusters=(16, 4))
    space = SearchSpace(
        {"3": [8, 16]},
        {},
        options,
        ranks={"3": 0.5},
        sparse=("0", "3", "7"),
        shared=("7",),
        narrow={"0": ("2:4",)},
    )
    damage = probe_damage(known.problem, known.profile.analysis.macs, space, units_of(space), lambda line: None)
    assert {param: list(levels) for param, levels in damage.items()} == {
        "prune/3": [0.5],
        "rank/3": [0.375, 0.125],
        "sparsity/3": [options.max_sparsity],
        "sparsity/7": [options.max_sparsity],
        "clusters/7": [16.0, 4.0],
    }


@pytest.mark.parametrize("scope", ["global", "threshold"])
def test_channels_that_are_ranked_together_are_probed_together(known: Known, scope: str) -> None:
    options = replace(known.space.options, scope=scope)  # type: ignore[arg-type]
    space = SearchSpace({}, {}, options)
    (unit,) = units_of(space)
    damage = probe_damage(known.problem, known.profile.analysis.macs, space, [unit], lambda line: None)
    assert len(damage[unit.param]) == 3
    assert any(lost != 0 for lost in damage[unit.param].values())


WIDE = SearchSpace(
    grids={f"g{i}": [8, 16, 24, 32] for i in range(6)},
    widths={f"g{i}": (32, 8, 4) for i in range(6)},
    ranks={f"g{i}": 0.5 for i in range(6)},
    variants={"small": SearchSpace(grids={"h": [8, 16]}, widths={"h": (32, 8)})},
)


def _levels(encoding: Encoding, plans: int, seed: int = 0) -> list[tuple[str, tuple[int, ...]]]:
    return [(row.variant, tuple(map(int, row.levels[0]))) for row in design(encoding, plans, seed=seed)]


def test_a_design_spans_the_space_and_repeats() -> None:
    encoding = Encoding(WIDE)
    found = _levels(encoding, 24)
    assert found == _levels(encoding, 24)
    assert found != _levels(encoding, 24, seed=1)
    assert len(set(found)) == len(found)
    of_model = [levels for variant, levels in found if variant == MODEL]
    assert len(of_model) == 24
    units = encoding.units[MODEL]
    assert of_model[0] == (0,) * len(units)
    assert of_model[1] == tuple(len(unit.levels) - 1 for unit in units)
    eight = tuple(int(unit.technique == "quantize") for unit in units)
    assert {eight, tuple(2 * one for one in eight)} <= set(of_model), "each width all over"
    for place, unit in enumerate(units):
        seen = {levels[place] for levels in of_model}
        assert len(seen) >= min(3, len(unit.levels)), unit.param


def test_a_design_has_no_more_plans_than_the_space() -> None:
    found = _levels(Encoding(WIDE), 24)
    assert sorted(levels for variant, levels in found if variant == "small") == [(0, 0), (0, 1), (1, 0), (1, 1)]
    lone = SearchSpace({}, {}, Options(prune=False))
    assert len(_levels(Encoding(lone), 24)) == 1
