"""Levels of units are values of the space's parameters, mildest first, and each does to the plan what it says."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from paretune.spaces.plan import CompressionPlan
from paretune.spaces.space import Options, SearchSpace
from paretune.spaces.units import Unit, units_of

SPACE = SearchSpace(
    grids={"conv": [8, 16, 24, 32], "wide": [16, 64], "fixed": [8]},
    widths={"conv": (16, 8), "fc": (32, 8, 4), "whole": (32,)},
    ranks={"conv": 0.5, "fc": 0.9},
    sparse=("conv", "fc"),
    shared=("fc",),
    options=Options(max_ratio=0.75, max_sparsity=0.8, clusters=(16, 64)),
)
SWITCHES = {"factorize": True, "sparsify": True, "share": True}
UNITS = units_of(SPACE)


def value_of(plan: CompressionPlan, unit: Unit) -> float:
    """What a plan does about a unit; what it doesn't mention is left alone."""
    sections: dict[str, tuple[Mapping[str, float], float]] = {
        "prune": (plan.prune.ratios, 0.0),
        "factorize": (plan.factorize.ranks, 1.0),
        "sparsify": (plan.sparsify.sparsity, 0.0),
        "share": (plan.share.clusters, 0),
        "quantize": (plan.quantize.bits, 0),
    }
    values, absent = sections[unit.technique]
    return values.get(unit.name, absent)


def test_units_are_what_can_be_chosen() -> None:
    assert {unit.param: unit.levels for unit in UNITS} == {
        "prune/conv": (0.0, 0.25, 0.5, 0.75),
        "prune/wide": (0.0, 0.75),
        "rank/conv": (1.0, 0.5, 0.375, 0.25, 0.125),
        "rank/fc": (1.0, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125),
        "sparsity/conv": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
        "sparsity/fc": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
        "clusters/fc": (0.0, 64.0, 16.0),
        "bits/conv": (16.0, 8.0),
        "bits/fc": (32.0, 8.0, 4.0),
    }
    assert all(unit.param.partition("/")[2] == unit.name for unit in UNITS)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.param)
def test_each_level_is_in_the_plan_alone_and_comes_back_as_the_parameter(unit: Unit) -> None:
    dense = SPACE.to_plan({})
    for level in unit.levels:
        plan = SPACE.to_plan({**SWITCHES, unit.param: level})
        assert value_of(plan, unit) == pytest.approx(level)
        others = [other for other in UNITS if other is not unit]
        assert [value_of(plan, other) for other in others] == [value_of(dense, other) for other in others]
        assert SPACE.to_params(plan)[unit.param] == pytest.approx(level)


def test_the_first_level_does_nothing() -> None:
    params = {unit.param: unit.levels[0] for unit in UNITS}
    assert SPACE.to_plan(params).hash == SPACE.to_plan({}).hash


@pytest.mark.parametrize(("scope", "param"), [("global", "pruning/ratio"), ("threshold", "pruning/threshold")])
def test_channels_that_are_ranked_together_are_one_unit(scope: str, param: str) -> None:
    space = SearchSpace(grids={}, widths={}, options=Options(scope=scope, max_ratio=0.6))  # type: ignore[arg-type]
    (unit,) = units_of(space)
    assert (unit.param, unit.technique, unit.name, unit.levels[0]) == (param, "prune", "", 0.0)
    strongest = unit.levels[-1]
    plan = space.to_plan({param: strongest})
    assert strongest == (plan.prune.ratio or plan.prune.threshold) == (0.6 if scope == "global" else 1.5)


def test_a_pattern_of_blocks_is_on_or_off() -> None:
    space = SearchSpace(grids={}, widths={}, sparse=("conv",), options=Options(patterns=("2:4",)))
    (unit,) = units_of(space)
    assert unit.levels == (0.0, space.options.max_sparsity)
    assert space.to_plan({"sparsify": True, unit.param: unit.levels[1]}).sparsify.sparsity == {"conv": 0.5}
