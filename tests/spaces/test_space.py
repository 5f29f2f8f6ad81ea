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
from paretune.spaces.make import make_space
from paretune.spaces.plan import (
    CompressionPlan,
    Factorization,
    Finetuning,
    Pruning,
    Quantization,
    Schedule,
    Sharing,
    Sparsification,
)
from paretune.spaces.space import Options, SearchSpace

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
    if distribution.step:
        steps = round((distribution.high - distribution.low) / distribution.step)
        return distribution.low + distribution.step * rng.randint(0, steps)
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
            elif name != "importance" or plan.prune.ratios:
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


EVERYTHING = Options(
    importance=("l1", "lamp"),
    schedules=("one-shot", "cubic:4"),
    methods=("tucker", "spatial"),
    patterns=("unstructured", "2:4", "1:4"),
    max_sparsity=0.777,
    clusters=(64, 16),
    observers=("minmax", "mse"),
    aware=(True, False),
    activations=("quantized", "float"),
    granularity=("per-channel", "per-tensor"),
    affine=(False, True),
    hint_weight=(0.0, 2.0),
)
WIDE = SearchSpace(
    {"a": [8, 16, 24, 32], "b": [8, 16]},
    {"a": (32, 8, 4), "b": (32, 8), "c": (32, 8)},
    EVERYTHING,
    ranks={"a": 0.5, "b": 0.45},
    sparse=("a", "b", "c"),
    shared=("a", "c"),
)
VARIANT = SearchSpace(
    {"a": [8, 16]}, {"a": (32, 8), "x": (32, 8)}, EVERYTHING, ranks={"x": 0.75}, sparse=("x",), shared=("x",)
)
WHOLE = replace(WIDE, variants={"slim": VARIANT})


def ranked_together(**options: Any) -> SearchSpace:
    """The same space where one number prunes the whole model."""
    known = replace(EVERYTHING, **options)
    slim = replace(VARIANT, grids={}, options=known)
    return replace(WIDE, grids={}, options=known, variants={"slim": slim})


@pytest.mark.parametrize(
    "space",
    [
        pytest.param(WHOLE, id="layer"),
        pytest.param(ranked_together(scope="global"), id="global"),
        pytest.param(ranked_together(scope="threshold"), id="threshold"),
        pytest.param(ranked_together(prune=False), id="no pruning"),
        pytest.param(replace(WHOLE, options=replace(EVERYTHING, max_sparsity=0.25)), id="few zeros"),
    ],
)
def test_every_point_of_a_space_with_everything_is_a_legal_plan(space: SearchSpace) -> None:
    rng, distributions = random.Random(1), space.distributions()
    seen = set()
    for _ in range(400):
        plan = space.to_plan({name: draw(rng, distribution) for name, distribution in distributions.items()})
        assert list(plan.conflicts()) == []
        assert plan == CompressionPlan.from_json(plan.to_json())
        params = space.to_params(plan)
        assert params.keys() == distributions.keys()
        assert space.to_plan(params) == plan
        for name, share in plan.factorize.ranks.items():
            assert share <= (VARIANT if plan.variant else WIDE).ranks[name]
        assert plan.is_resolved == (plan.prune.ratio is None and plan.prune.threshold is None)
        seen |= {plan.variant, plan.sparsify.pattern, plan.factorize.method, str(plan.schedule), plan.quantize.affine}
        seen |= {"shared"} if plan.share.clusters else set()
    assert {None, "slim", "unstructured", "2:4", "1:4", "spatial", "cubic:4", True, "shared"} <= seen


def test_distributions_of_everything() -> None:
    names = WHOLE.distributions()
    of_slim = {name for name in names if name.startswith("slim/")}
    assert of_slim == {
        "slim/prune/a",
        "slim/bits/a",
        "slim/bits/x",
        "slim/rank/x",
        "slim/sparsity/x",
        "slim/clusters/x",
    }
    assert names.keys() - of_slim == {
        *("prune/a", "prune/b", "bits/a", "bits/b", "bits/c", "rank/a", "rank/b", "clusters/a", "clusters/c"),
        *("sparsity/a", "sparsity/b", "sparsity/c", "variant", "importance", "schedule", "method", "pattern"),
        *("observer", "aware", "activations", "granularity", "affine", "factorize", "sparsify", "share"),
        *("distill/temperature", "distill/weight", "distill/hint_weight", "finetune/learning_rate"),
    }
    assert names["variant"] == CategoricalDistribution(["model", "slim"])
    assert names["rank/a"] == FloatDistribution(0.125, 1.0, step=0.125)
    assert names["sparsity/a"] == FloatDistribution(0.0, 0.777)
    assert names["clusters/a"] == CategoricalDistribution([0, 64, 16])
    assert ranked_together(scope="global").distributions()["pruning/ratio"] == FloatDistribution(0, 0.75)


def test_without_parameters_comes_the_dense_model() -> None:
    for space in (WHOLE, ranked_together(scope="global"), SearchSpace({}, {})):
        plan = space.to_plan({})
        assert (plan.variant, plan.is_resolved, plan.is_packable) == (None, True, False)
        assert (plan.prune.ratios, plan.factorize, plan.schedule) == ({}, Factorization(), Schedule())
        assert set(plan.quantize.bits.values()) <= {32}
        assert plan == space.uniform() == space.sweep(0)


ON = {"factorize": True, "sparsify": True, "share": True}


def test_parameters_of_a_dropped_technique_say_nothing() -> None:
    dense = WHOLE.to_plan({})
    assert WHOLE.to_plan({"method": "spatial", "pattern": "2:4", "affine": True}) == dense
    assert WHOLE.to_plan({"slim/prune/a": 0.5, "slim/sparsity/x": 0.5}) == dense
    assert WHOLE.to_plan({"rank/a": 0.25, "sparsity/b": 0.5, "clusters/c": 16}) == dense, "switched off"
    factorized = WHOLE.to_plan({**ON, "rank/a": 0.25, "sparsity/a": 0.5, "sparsity/b": 0.5})
    assert factorized.factorize.ranks == {"a": 0.25}
    assert factorized.sparsify.sparsity == {"b": 0.5}, "factors before zeros"
    few = {"bits/a": 4, "bits/c": 8, "clusters/a": 16, "clusters/c": 16}
    quantized = WHOLE.to_plan({**ON, **few})
    assert quantized.share.clusters == {}, "few bits before a codebook"
    alike = WHOLE.to_plan({**ON, **few, "granularity": "per-tensor"})
    assert alike.share.clusters == {"c": 16}
    assert WHOLE.to_plan({**ON, "rank/a": 0.5}).factorize.ranks == {"a": 0.5}
    assert WHOLE.to_plan({**ON, "rank/a": 0.625}).factorize.ranks == {}, "factors that save nothing"


def test_a_pattern_is_on_or_off() -> None:
    params = {**ON, "pattern": "1:4", "sparsity/a": 0.1, "sparsity/b": 0.7}
    plan = WHOLE.to_plan(params)
    assert plan.sparsify == Sparsification(sparsity={"b": 0.75}, pattern="1:4")
    assert WHOLE.to_params(plan)["sparsity/b"] == 0.777
    assert WHOLE.to_params(plan)["sparsity/a"] == 0.0


def test_uniform_of_everything() -> None:
    assert WHOLE.uniform(0.5).prune.ratios == {"a": 0.5, "b": 0.5}
    assert WHOLE.uniform(bits=8).quantize.bits == {"a": 8, "b": 8, "c": 8}
    assert WHOLE.uniform(bits=4).quantize.bits == {"a": 4, "b": 32, "c": 32}
    assert WHOLE.uniform(rank=0.5).factorize.ranks == {"a": 0.5}
    assert WHOLE.uniform(rank=0.3).factorize.ranks == {"a": 0.25, "b": 0.25}, "on the grid"
    assert WHOLE.uniform(rank=0.01).factorize.ranks == {"a": 0.125, "b": 0.125}
    assert WHOLE.uniform(sparsity=0.5).sparsify.sparsity == {"a": 0.5, "b": 0.5, "c": 0.5}
    assert WHOLE.uniform(sparsity=0.99).sparsify.sparsity == {"a": 0.777, "b": 0.777, "c": 0.777}
    assert WHOLE.uniform(clusters=16).share.clusters == {"a": 16, "c": 16}
    assert WHOLE.uniform(clusters=5).share.clusters == {}, "no choice of the space"
    slim = WHOLE.uniform(0.5, 8, rank=0.5, variant="slim")
    assert (slim.variant, slim.prune.ratios, slim.factorize.ranks) == ("slim", {"a": 0.5}, {"x": 0.5})
    assert slim.quantize.bits == {"a": 8, "x": 8}
    ranked = ranked_together(scope="global")
    assert ranked.uniform(0.5).prune == Pruning(ratio=0.5)
    assert ranked.uniform(0.9).prune == Pruning(ratio=0.75)
    bounded = ranked_together(scope="threshold")
    assert bounded.uniform(0.5).prune == Pruning(threshold=1.0)
    for space in (WHOLE, ranked, bounded):
        for plan in (space.uniform(0.9, 8, rank=0.3), space.uniform(sparsity=0.99, clusters=64), space.sweep(7)):
            assert space.to_plan(space.to_params(plan)) == plan


@pytest.mark.parametrize(
    ("section", "where"),
    [
        pytest.param({"factorize": Factorization(ranks={"c": 0.5})}, "factorize.ranks", id="layer that stays whole"),
        pytest.param({"factorize": Factorization(ranks={"a": 0.625})}, "factorize.ranks.a", id="saves nothing"),
        pytest.param({"factorize": Factorization(ranks={"a": 0.3})}, "rank/a", id="between two ranks"),
        pytest.param({"factorize": Factorization(energy=0.9)}, "factorize.energy", id="energy"),
        pytest.param({"sparsify": Sparsification(sparsity={"x": 0.5})}, "sparsify.sparsity", id="another's layer"),
        pytest.param({"sparsify": Sparsification(sparsity={"a": 0.9})}, "sparsity/a", id="too many zeros"),
        pytest.param({"sparsify": Sparsification(sparsity={"a": 0.875}, pattern="1:8")}, "pattern", id="pattern"),
        pytest.param({"sparsify": Sparsification(ratio=0.5)}, "sparsify.ratio", id="ratio of zeros"),
        pytest.param({"sparsify": Sparsification(threshold=0.5)}, "sparsify.threshold", id="threshold of zeros"),
        pytest.param({"share": Sharing(clusters={"b": 16})}, "share.clusters", id="no codebook there"),
        pytest.param({"share": Sharing(clusters={"a": 5})}, "clusters/a", id="size of a codebook"),
        pytest.param({"prune": Pruning(ratio=0.5)}, "pruning/ratio", id="ratio in a space of layers"),
        pytest.param({"prune": Pruning(threshold=0.5)}, "pruning/threshold", id="threshold in a space of layers"),
        pytest.param({"schedule": Schedule(shape="linear", steps=2)}, "schedule", id="schedule"),
        pytest.param({"quantize": Quantization(observer="percentile")}, "observer", id="observer"),
        pytest.param({"variant": "fat"}, "variant", id="variant"),
        pytest.param({"variant": "slim", "prune": Pruning(ratios={"b": 0.5})}, "prune.ratios", id="variant's group"),
        pytest.param({"finetune": Finetuning(hint_weight=3.0)}, "distill/hint_weight", id="hint weight"),
    ],
)
def test_further_plans_outside_the_space_are_rejected(section: dict[str, Any], where: str) -> None:
    with pytest.raises(JobError) as caught:
        WHOLE.to_params(CompressionPlan(**section))
    assert where in caught.value.where


def test_heads_are_offered_as_wholes() -> None:
    groups = (Group("a", 36, ("a",), (), unit=12),)
    analysis = Analysis(groups, (), (Layer("a", "Linear", 1, 1, "a"),), 1, 1)
    assert make_space(analysis, {}, Options(max_ratio=0.9)).grids == {"a": [12, 24, 36]}
    assert make_space(analysis, {}, Options(scope="global")).grids == {}


def test_how_nothing_is_done_says_nothing() -> None:
    said = {"importance": "lamp", "schedule": "cubic:4", "observer": "mse", "aware": False, "activations": "float"}
    said |= {"granularity": "per-tensor", "affine": True}
    assert WHOLE.to_plan(said) == WHOLE.to_plan({})
    pruned = WHOLE.to_plan({**said, "prune/a": 0.5})
    assert (pruned.prune.importance, str(pruned.schedule), pruned.quantize.observer) == ("lamp", "cubic:4", "minmax")
    sparse = WHOLE.to_plan({**said, "sparsify": True, "sparsity/a": 0.5})
    assert (sparse.prune.importance, str(sparse.schedule)) == ("l1", "cubic:4")
    quantized = WHOLE.to_plan({**said, "bits/c": 8})
    assert quantized.schedule == Schedule()
    assert quantized.quantize.model_dump(exclude={"bits"}) == {
        "observer": "mse",
        "aware": False,
        "activations": "float",
        "granularity": "per-tensor",
        "affine": True,
    }
    for plan in (pruned, sparse, quantized):
        assert WHOLE.to_plan(WHOLE.to_params(plan)) == plan


def test_settings_of_techniques_that_a_space_lacks_are_no_parameters() -> None:
    floats = dict.fromkeys("abc", (32,))
    settings = {"importance", "schedule", "method", "pattern", "observer", "aware", "activations", "granularity"}
    settings |= {"affine"}

    def left(space: SearchSpace) -> set[str]:
        for index in range(5):
            plan = space.sweep(index)
            assert space.to_params(plan).keys() == space.distributions().keys()
            assert space.to_plan(space.to_params(plan)) == plan
        return settings & space.distributions().keys()

    bare = SearchSpace({"a": [8]}, floats, EVERYTHING)
    quantizing = {"observer", "aware", "activations", "granularity", "affine"}
    assert left(bare) == set()
    assert left(replace(bare, grids={"a": [8, 16]})) == {"importance", "schedule"}
    assert left(replace(bare, widths={"a": (8,)})) == quantizing
    assert left(replace(bare, ranks={"a": 0.5})) == {"method"}
    assert left(replace(bare, sparse=("a",))) == {"pattern", "schedule"}
    assert left(replace(bare, variants={"slim": VARIANT})) == settings
    assert left(replace(bare, options=replace(EVERYTHING, scope="global"))) == {"importance", "schedule"}


@pytest.mark.parametrize(
    ("space", "compresses"),
    [
        pytest.param(SearchSpace({"a": [8]}, {"a": (32,)}, EVERYTHING), False, id="nothing"),
        pytest.param(SearchSpace({"a": [8, 16]}, {}), True, id="channels"),
        pytest.param(SearchSpace({}, {}, Options(scope="global")), True, id="channels ranked together"),
        pytest.param(SearchSpace({}, {}, Options(prune=False, scope="global")), False, id="not pruned"),
        pytest.param(SearchSpace({}, {"a": (32, 8)}), True, id="widths"),
        pytest.param(SearchSpace({}, {"a": (8,)}), True, id="always quantized"),
        pytest.param(SearchSpace({}, {}, ranks={"a": 0.5}), True, id="ranks"),
        pytest.param(SearchSpace({}, {}, sparse=("a",)), True, id="zeros"),
        pytest.param(SearchSpace({}, {}, shared=("a",)), True, id="codebooks"),
        pytest.param(SearchSpace({}, {}, variants={"slim": SearchSpace({}, {})}), True, id="variants"),
    ],
)
def test_whether_a_space_compresses_anything(space: SearchSpace, compresses: bool) -> None:
    assert space.compresses == compresses


def test_layers_with_too_few_inputs_for_a_pattern_stay_dense_there() -> None:
    space = replace(WIDE, narrow={"a": ("2:4", "1:4"), "b": ("1:4",)})
    params = {"sparsify": True, **{f"sparsity/{layer}": 0.7 for layer in "abc"}}
    found = {pattern: space.to_plan({**params, "pattern": pattern}) for pattern in ("unstructured", "2:4", "1:4")}
    assert {pattern: set(plan.sparsify.sparsity) for pattern, plan in found.items()} == {
        "unstructured": {"a", "b", "c"},
        "2:4": {"b", "c"},
        "1:4": {"c"},
    }
    for plan in found.values():
        assert space.to_plan(space.to_params(plan)) == plan
    with pytest.raises(JobError, match=r"sparsify\.sparsity\.a must not be sparse in the pattern 2:4"):
        space.to_params(CompressionPlan(sparsify=Sparsification(sparsity={"a": 0.5}, pattern="2:4")))


def test_the_sweep_of_a_space_without_channels_or_widths() -> None:
    space = replace(WIDE, grids={}, widths=dict.fromkeys("abc", (32,)))
    plans = [space.sweep(index) for index in range(11)]
    assert len({plan.hash for plan in plans}) == 11
    assert [space.sweep(index) for index in range(11, 21)] == plans[1:]
    assert [place for place, plan in enumerate(plans) if plan.factorize.ranks] == [1, 4, 7, 9]
    assert {max(plan.sparsify.sparsity.values(), default=0) for plan in plans} == {0, 0.777, 0.39, 0.19, 0.58}
    assert {max(plan.share.clusters.values(), default=0) for plan in plans} == {0, 16, 64}
    for plan in plans:
        assert space.to_plan(space.to_params(plan)) == plan
    pattern = replace(space, ranks={}, shared=(), options=replace(EVERYTHING, patterns=("2:4",)))
    assert [bool(pattern.sweep(index).sparsify.sparsity) for index in range(4)] == [False, True, True, True]


def test_ranks_zeros_and_codebooks_are_swept_after_the_widths() -> None:
    space = replace(WIDE, grids={})
    plans = [space.sweep(index) for index in range(12)]
    plain = replace(space, ranks={}, sparse=(), shared=())
    assert plans[:4] == [plain.sweep(index) for index in range(4)]
    assert [place for place, plan in enumerate(plans) if plan in plans[:place]] == [3], "the widest again"
