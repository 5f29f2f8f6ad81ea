"""Plans as Optuna parameters and back; the sweep that a search must beat."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from paretune.errors import JobError
from paretune.spaces.analysis import Analysis, Layer
from paretune.spaces.graph import Group
from paretune.spaces.grid import kept_of
from paretune.spaces.plan import CompressionPlan, Finetuning, Pruning, Quantization
from paretune.spaces.space import Options, SearchSpace, make_space

OPTIONS = Options(importance=("l1", "taylor"))
SPACE = SearchSpace(
    {"stem": [8, 16], "block.conv": [16, 24, 32, 40, 48, 56, 64], "narrow": [8]},
    {"stem": (32, 8), "block.conv": (32, 8), "head": (32,)},
    OPTIONS,
)
FIXED = Options(temperature=(3.0, 3.0), distillation_weight=(0.0, 0.0), learning_rate=(3e-3, 3e-3))


def draw(rng: random.Random, distribution: BaseDistribution) -> Any:
    if isinstance(distribution, CategoricalDistribution):
        return rng.choice(distribution.choices)
    assert isinstance(distribution, FloatDistribution)
    return rng.uniform(distribution.low, distribution.high)


def test_distributions() -> None:
    assert SPACE.distributions() == {
        "prune/stem": FloatDistribution(0.0, 0.5),
        "prune/block.conv": FloatDistribution(0.0, 0.75),
        "bits/stem": CategoricalDistribution([32, 8]),
        "bits/block.conv": CategoricalDistribution([32, 8]),
        "importance": CategoricalDistribution(["l1", "taylor"]),
        "distill/temperature": FloatDistribution(1.0, 8.0),
        "distill/weight": FloatDistribution(0.0, 1.0),
        "finetune/learning_rate": FloatDistribution(1e-4, 1e-2, log=True),
    }


@pytest.mark.parametrize("seed", range(4))
def test_random_points_become_plans_and_come_back(seed: int) -> None:
    rng = random.Random(seed)
    distributions = SPACE.distributions()
    for _ in range(100):
        params = {name: draw(rng, distribution) for name, distribution in distributions.items()}
        plan = SPACE.to_plan(params)
        for group, grid in SPACE.grids.items():
            assert kept_of(plan.prune.ratios.get(group, 0.0), grid[-1]) in grid
        back = SPACE.to_params(plan)
        assert back.keys() == distributions.keys()
        assert SPACE.to_plan(back) == plan
        for name, value in params.items():
            if name.startswith("prune/"):
                assert abs(back[name] - value) <= 0.25, "no further than half the widest step"
            else:
                assert back[name] == value


def test_missing_parameters_take_the_middle() -> None:
    plan = SPACE.to_plan({})
    assert plan.prune == Pruning()
    assert plan.quantize.bits == {"stem": 32, "block.conv": 32, "head": 32}
    assert plan.finetune.learning_rate == pytest.approx(1e-3)
    assert plan.finetune.temperature == pytest.approx(8**0.5)
    assert plan.finetune.distillation_weight == 0.5


def test_choices_with_one_option_are_constants() -> None:
    space = SearchSpace({"narrow": [8]}, {"head": (16,)}, FIXED)
    assert space.distributions() == {}
    plan = space.to_plan({})
    assert plan == CompressionPlan(
        quantize=Quantization(bits={"head": 16}),
        finetune=Finetuning(learning_rate=3e-3, temperature=3.0, distillation_weight=0.0),
    )
    assert space.to_params(plan) == {}


DENSE = SPACE.uniform(0.0)


@pytest.mark.parametrize(
    ("space", "plan", "where"),
    [
        pytest.param(
            SPACE,
            DENSE.model_copy(update={"prune": Pruning(ratios={"stem": 0.25})}),
            "prune.ratios.stem",
            id="off grid",
        ),
        pytest.param(
            SPACE,
            DENSE.model_copy(update={"prune": Pruning(ratios={"narrow": 0.5})}),
            "prune.ratios.narrow",
            id="no grid",
        ),
        pytest.param(
            SPACE, DENSE.model_copy(update={"prune": Pruning(ratios={"x": 0.5})}), "prune.ratios", id="unknown group"
        ),
        pytest.param(
            SPACE, DENSE.model_copy(update={"prune": Pruning(importance="random")}), "importance", id="importance"
        ),
        pytest.param(
            SPACE,
            DENSE.model_copy(update={"quantize": Quantization(bits={"x": 8})}),
            "quantize.bits",
            id="unknown layer",
        ),
        pytest.param(
            SPACE, DENSE.model_copy(update={"quantize": Quantization(bits={"stem": 16})}), "bits/stem", id="width"
        ),
        pytest.param(
            SPACE, DENSE.model_copy(update={"quantize": Quantization(bits={"head": 8})}), "bits/head", id="only width"
        ),
        pytest.param(
            SPACE, DENSE.model_copy(update={"finetune": Finetuning(temperature=9)}), "distill/temperature", id="range"
        ),
        pytest.param(
            replace(SPACE, options=replace(OPTIONS, temperature=(2.0, 2.0))),
            DENSE.model_copy(update={"finetune": Finetuning(temperature=4)}),
            "distill/temperature",
            id="fixed range",
        ),
        pytest.param(
            replace(SPACE, options=Options()),
            DENSE.model_copy(update={"prune": Pruning(importance="l2")}),
            "importance",
            id="only importance",
        ),
    ],
)
def test_plans_outside_the_space_are_rejected(space: SearchSpace, plan: CompressionPlan, where: str) -> None:
    with pytest.raises(JobError) as caught:
        space.to_params(plan)
    assert where in caught.value.where


def test_uniform_snaps_each_group_to_its_grid() -> None:
    plan = SPACE.uniform(0.6, 8)
    assert plan.prune.ratios == {"stem": 0.5, "block.conv": 0.625}
    assert plan.quantize.bits == {"stem": 8, "block.conv": 8, "head": 32}
    assert SPACE.uniform(0.99).prune.ratios == {"stem": 0.5, "block.conv": 0.75}
    assert SPACE.uniform(0.0, 4).quantize.bits == DENSE.quantize.bits


def test_sweep_goes_through_ratios_and_widths() -> None:
    seen = [
        (plan.prune.ratios.get("block.conv", 0.0), plan.quantize.bits["stem"])
        for plan in (SPACE.sweep(index) for index in range(10))
    ]
    ratios = (0.0, 0.75, 0.375, 0.125, 0.5)
    # 0.1875 and 0.5625 lie in the middle of two counts: the larger one is taken.
    assert seen == [(ratio, bits) for ratio in ratios for bits in (32, 8)]
    assert SPACE.sweep(0) == DENSE


def test_sweep_is_endless_and_always_in_the_space() -> None:
    plans = [SPACE.sweep(index) for index in range(60)]
    assert plans == [SPACE.sweep(index) for index in range(60)]
    found = {(plan.prune.ratios.get("block.conv", 0.0), plan.quantize.bits["stem"]) for plan in plans}
    assert found == {(step / 8, bits) for step in range(7) for bits in (32, 8)}
    for plan in plans:
        assert SPACE.to_plan(SPACE.to_params(plan)) == plan


@pytest.mark.parametrize(
    ("space", "expected"),
    [
        pytest.param(SearchSpace({}, {"a": (32, 16, 8)}), [(0.0, 32), (0.0, 8), (0.0, 16), (0.0, 32)], id="only bits"),
        pytest.param(SearchSpace({"a": [8]}, {"a": (32, 8)}), [(0.0, 32), (0.0, 8), (0.0, 32), (0.0, 8)], id="narrow"),
        pytest.param(
            SearchSpace({"a": [8, 16, 24, 32]}, {}),
            [(0.0, None), (0.75, None), (0.25, None), (0.25, None)],
            id="only ratios",
        ),
        pytest.param(SearchSpace({}, {}), [(0.0, None)] * 4, id="empty"),
    ],
)
def test_sweep_of_smaller_spaces(space: SearchSpace, expected: list[tuple[float, int | None]]) -> None:
    plans = [space.sweep(index) for index in range(4)]
    assert [(plan.prune.ratios.get("a", 0.0), plan.quantize.bits.get("a")) for plan in plans] == expected


@pytest.mark.parametrize(
    ("options", "grids"),
    [
        pytest.param(Options(), {"a": [16, 24, 32, 40, 48, 56, 64], "b": [8, 16]}, id="three quarters"),
        pytest.param(Options(max_ratio=0.4), {"a": [40, 48, 56, 64], "b": [16]}, id="less"),
        pytest.param(Options(prune=False), {}, id="no pruning"),
    ],
)
def test_make_space(options: Options, grids: dict[str, list[int]]) -> None:
    groups = (Group("a", 64, ("a",), ("b",)), Group("b", 16, ("b",), ("c",)))
    analysis = Analysis(groups, (), (Layer("a", "Conv2d", 1, 1, "a"),), 1, 1)
    space = make_space(analysis, {"a": (32, 8)}, options)
    assert space == SearchSpace(grids, {"a": (32, 8)}, options)


def test_measured_counts_make_the_grid() -> None:
    layers = (Layer("a", "Conv2d", 1, 1, "a"), Layer("b", "Linear", 1, 1, "b"))
    groups = (Group("a", 32, ("a",), ()), Group("b", 32, ("b",), ()))
    analysis = Analysis(groups, (), layers, 2, 2, counts={"Conv2d": (12, 20, 32)})
    space = make_space(analysis, {}, Options(max_ratio=0.75))
    assert space.grids == {"a": [12, 20, 32], "b": [8, 16, 24, 32]}


FEEDS = (Layer("a", "Linear", 1, 1, "a"), Layer("b", "Linear", 1, 1, None))


def fed(channels: int, inputs: int) -> Analysis:
    """Group `a`, which gives all inputs of layer `b`."""
    layers = (FEEDS[0], replace(FEEDS[1], inputs=inputs))
    return Analysis((Group("a", channels, ("a",), ("b",)),), (), layers, 2, 2, widths={"b": (32, 8, 4)})


@pytest.mark.parametrize(
    ("channels", "inputs", "grid", "widths"),
    [
        pytest.param(128, 128, [32, 48, 64, 80, 96, 112, 128], (32, 8, 4), id="counts that leave whole blocks"),
        pytest.param(128, 512, [32, 40, 48, 56, 64, 80, 96, 112, 128], (32, 8, 4), id="several inputs a channel"),
        pytest.param(32, 32, [8, 16, 24, 32], (32, 8), id="too few counts would be left"),
    ],
)
def test_layers_with_weights_in_blocks_get_whole_blocks(
    channels: int, inputs: int, grid: list[int], widths: tuple[int, ...]
) -> None:
    space = make_space(fed(channels, inputs), {"b": (32, 8, 4)}, Options(multiples={4: 16}))
    assert space.grids == {"a": grid}
    assert space.widths == {"b": widths}


def test_a_layer_always_has_a_width() -> None:
    space = make_space(fed(32, 32), {"b": (4,)}, Options(multiples={4: 16}))
    assert space.widths == {"b": (32,)}
    assert space.uniform(0.5).quantize.bits == {"b": 32}
