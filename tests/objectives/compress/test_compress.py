"""The order of the techniques, and a compressed shape that depends on the plan alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paretune.errors import TrialError
from paretune.objectives.compress import (
    NUMERICS,
    STRUCTURE,
    Context,
    compress_numerics,
    compress_structure,
    resolve_plan,
)
from paretune.objectives.compress.quantization import QuantizedLayer
from paretune.objectives.data import Batch, Splits
from paretune.objectives.tasks import Classification
from paretune.spaces.plan import (
    CompressionPlan,
    Factorization,
    Importance,
    Pruning,
    Quantization,
    Schedule,
    Sharing,
    Sparsification,
)
from tests.nets import PlainCNN, wake_norms

CHANNELS = {"conv1": 16, "conv2": 32, "fc1": 32, "fc2": 10}
PLAN = CompressionPlan(
    prune=Pruning(ratios={"conv1": 0.5, "conv2": 0.25, "fc1": 0.0}),
    quantize=Quantization(bits={"conv1": 32, "conv2": 8, "fc1": 4, "fc2": 16}),
)
GRIDS = {"conv1": [8, 16], "conv2": [8, 16, 24, 32], "fc1": [8, 16, 24, 32]}
EVERYTHING = CompressionPlan(
    prune=Pruning(ratios={"conv2": 0.25, "fc1": 0.25}, importance="taylor"),
    factorize=Factorization(ranks={"conv2": 0.375}),
    sparsify=Sparsification(sparsity={"fc1": 0.5}, pattern="2:4"),
    share=Sharing(clusters={"conv1": 16, "fc1": 16}),
    quantize=Quantization(bits={"conv1": 8, "conv2": 8, "fc1": 8, "fc2": 4}, granularity="per-tensor", observer="mse"),
    schedule=Schedule(shape="cubic", steps=3),
)


def context(splits: Splits, batches: int) -> Context:
    found: list[Batch] = list(splits.train.head(64 * batches).batches(64)) if batches else []
    return Context(splits.validation.head(2).inputs, CHANNELS, Classification(), found, grids=GRIDS)


def shapes(module: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in module.state_dict().items()}


def test_structure_comes_before_numerics(digit_splits: Splits) -> None:
    assert [technique.field for technique in (*STRUCTURE, *NUMERICS)] == [
        "prune",
        "factorize",
        "sparsify",
        "share",
        "quantize",
    ]
    known = context(digit_splits, 2)
    model = compress_structure(wake_norms(PlainCNN()), PLAN, known)
    assert [len(model.get_parameter(f"{name}.weight")) for name in CHANNELS] == [8, 24, 32, 10]
    assert not any(isinstance(module, QuantizedLayer) for module in model.modules())
    module = compress_numerics(model, PLAN, known)
    quantized = {name: part.bits for name, part in module.named_modules() if isinstance(part, QuantizedLayer)}
    assert quantized == {"conv2": 8, "fc1": 4}
    assert not any(isinstance(part, nn.BatchNorm2d) for part in module.modules())
    assert any(isinstance(part, nn.BatchNorm2d) for part in model.modules()), "a copy was folded"
    assert module(known.example).shape == (2, 10)


def test_calibration_sees_the_batches(digit_splits: Splits) -> None:
    known = context(digit_splits, 2)
    plan = CompressionPlan(quantize=Quantization(bits={"conv1": 8}))
    module = compress_numerics(PlainCNN(), plan, known)
    assert float(module.get_buffer("conv1.input.high")) == max(float(batch.inputs.max()) for batch in known.batches)  # type: ignore[union-attr]
    assert float(module.get_buffer("conv1.input.scale")) == pytest.approx(1 / 255)


def test_the_dense_plan_only_folds(digit_splits: Splits, trained: nn.Module) -> None:
    known = context(digit_splits, 1)
    model = copy.deepcopy(trained)
    module = compress_numerics(compress_structure(model, CompressionPlan(), known), CompressionPlan(), known)
    inputs = digit_splits.validation.head(16).inputs
    assert isinstance(inputs, Tensor)
    with torch.no_grad():
        torch.testing.assert_close(module(inputs), trained(inputs), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("importance", ["l1", "l2", "bn-scale", "taylor", "random"])
def test_a_fresh_model_gets_the_same_shape_without_data(
    digit_splits: Splits, trained: nn.Module, importance: Importance
) -> None:
    """An artifact is loaded into a model that was rebuilt from the plan alone."""
    plan = PLAN.model_copy(update={"prune": PLAN.prune.model_copy(update={"importance": importance})})
    known, blind = context(digit_splits, 2), context(digit_splits, 0)
    made = compress_numerics(compress_structure(copy.deepcopy(trained), plan, known), plan, known)
    rebuilt = compress_numerics(compress_structure(PlainCNN(), plan, blind), plan, blind)
    assert shapes(rebuilt) == shapes(made)
    rebuilt.load_state_dict(made.state_dict())
    inputs = digit_splits.validation.head(16).inputs
    assert isinstance(inputs, Tensor)
    with torch.no_grad():
        assert torch.equal(rebuilt(inputs), made(inputs))


@pytest.mark.parametrize("importance", ["l1", "l2", "bn-scale", "taylor"])
def test_importances_beat_chance_on_a_trained_model(
    digit_splits: Splits, trained: nn.Module, importance: Importance
) -> None:
    known = context(digit_splits, 4)
    seen = digit_splits.train.head(256)
    assert isinstance(seen.inputs, Tensor)

    def loss(name: Importance, seed: int) -> float:
        torch.manual_seed(seed)
        plan = CompressionPlan(prune=Pruning(ratios={"conv2": 0.5}, importance=name))
        model = compress_structure(copy.deepcopy(trained), plan, known).eval()
        with torch.no_grad():
            return float(Classification().loss(model(seen.inputs), seen.targets))

    assert loss(importance, 0) < sum(loss("random", seed) for seed in range(5)) / 5


RULES: list[Any] = [
    pytest.param({"prune": {"ratio": 0.5}}, id="ratio of channels"),
    pytest.param({"prune": {"ratio": 0.5}, "schedule": {"shape": "coarse-fine", "steps": 3}}, id="by sensitivity"),
    pytest.param({"prune": {"threshold": 1.0}}, id="threshold of channels"),
    pytest.param({"factorize": {"energy": 0.7}}, id="energy"),
    pytest.param({"factorize": {"energy": 0.7, "method": "spatial"}}, id="energy along the axes"),
    pytest.param({"sparsify": {"ratio": 0.7}}, id="ratio of zeros"),
    pytest.param({"sparsify": {"threshold": 0.5}}, id="threshold of zeros"),
    pytest.param({"prune": {"ratio": 0.4}, "sparsify": {"ratio": 0.7}}, id="channels and zeros"),
    pytest.param({"prune": {"threshold": 1.0}, "factorize": {"energy": 0.6}}, id="channels and factors"),
]


@pytest.mark.parametrize("rules", RULES)
def test_rules_become_values_that_fix_the_shape(
    digit_splits: Splits, trained: nn.Module, rules: dict[str, Any]
) -> None:
    plan = CompressionPlan.model_validate(rules | {"quantize": {"bits": {"conv2": 8, "fc1": 8}}})
    known, blind, model = context(digit_splits, 2), context(digit_splits, 0), copy.deepcopy(trained)
    resolved = resolve_plan(model, plan, known)
    assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert resolved.is_resolved
    assert list(resolved.conflicts()) == []
    assert CompressionPlan.from_json(resolved.to_json()) == resolved
    given = (resolved.prune.ratios, resolved.factorize.ranks, resolved.sparsify.sparsity)
    asked = [rules.get(section, {}).keys() - {"method"} for section in ("prune", "factorize", "sparsify")]
    assert [bool(found) for found in given] == [bool(found) for found in asked]
    assert resolved.finetune == plan.finetune
    assert (resolved.quantize, resolved.schedule) == (plan.quantize, plan.schedule)
    made = compress_numerics(compress_structure(model, resolved, known), resolved, known)
    rebuilt = compress_numerics(compress_structure(PlainCNN(), resolved, blind), resolved, blind)
    assert shapes(rebuilt) == shapes(made)


def test_a_resolved_plan_is_left_alone(digit_splits: Splits) -> None:
    for plan in (PLAN, EVERYTHING, CompressionPlan()):
        assert resolve_plan(PlainCNN(), plan, context(digit_splits, 1)) is plan


def test_a_global_ratio_is_nearly_kept(digit_splits: Splits, trained: nn.Module) -> None:
    plan = CompressionPlan(prune=Pruning(ratio=0.5), sparsify=Sparsification(ratio=0.8))
    resolved = resolve_plan(trained, plan, context(digit_splits, 1))
    removed = sum(ratio * CHANNELS[name] for name, ratio in resolved.prune.ratios.items())
    assert removed == pytest.approx(40, abs=4), "half of 80, in steps of 8"
    model = compress_structure(copy.deepcopy(trained), resolved, context(digit_splits, 1))
    weights = [model.get_parameter(f"{name}.weight") for name in CHANNELS]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros / sum(weight.numel() for weight in weights) == pytest.approx(0.8, abs=0.01)


def test_rules_whose_values_exclude_each_other_fail_the_trial(digit_splits: Splits) -> None:
    model, known = PlainCNN(), context(digit_splits, 0)
    sparse = Sparsification(sparsity={"conv2": 0.5})
    plan = CompressionPlan(factorize=Factorization(energy=0.7), sparsify=sparse)
    with pytest.raises(TrialError, match="conv2 must not be both factorized and sparse"):
        resolve_plan(model, plan, known)
    shared = CompressionPlan(factorize=Factorization(energy=0.7), share=Sharing(clusters={"conv2": 16}))
    assert "conv2" in resolve_plan(model, shared, known).factorize.ranks, "factors may have codebooks"


def test_a_rule_leaves_alone_what_is_excluded(digit_splits: Splits) -> None:
    model, known = PlainCNN(), context(digit_splits, 0)
    few = replace(known, exclude=("conv*",))
    plan = CompressionPlan(factorize=Factorization(energy=0.6))
    ranks = resolve_plan(model, plan, known).factorize.ranks
    assert {"conv2", "fc1"} <= ranks.keys()
    assert resolve_plan(model, plan, few).factorize.ranks.keys() == ranks.keys() - {"conv1", "conv2"}
    plan = CompressionPlan(sparsify=Sparsification(threshold=0.5))
    assert resolve_plan(model, plan, known).sparsify.sparsity.keys() == {"conv1", "conv2", "fc1", "fc2"}
    assert resolve_plan(model, plan, few).sparsify.sparsity.keys() == {"fc1", "fc2"}


def test_everything_at_once_is_replayed_without_data(digit_splits: Splits, trained: nn.Module) -> None:
    known, blind = context(digit_splits, 2), context(digit_splits, 0)
    made = compress_numerics(compress_structure(copy.deepcopy(trained), EVERYTHING, known), EVERYTHING, known)
    rebuilt = compress_numerics(compress_structure(PlainCNN(), EVERYTHING, blind), EVERYTHING, blind)
    assert shapes(rebuilt) == shapes(made)
    rebuilt.load_state_dict(made.state_dict())
    inputs = digit_splits.validation.head(16).inputs
    assert isinstance(inputs, Tensor)
    with torch.no_grad():
        assert torch.equal(rebuilt(inputs), made(inputs))


def test_cuts_in_steps_end_where_one_cut_does(digit_splits: Splits, trained: nn.Module) -> None:
    known, stepwise = context(digit_splits, 1), copy.deepcopy(trained)
    counts = []
    for fraction in EVERYTHING.schedule.fractions:
        stepwise = compress_structure(stepwise, EVERYTHING, known, fraction)
        counts.append(sum(parameter.numel() for parameter in stepwise.parameters()))
    assert counts[0] > counts[-1]
    assert counts == sorted(counts, reverse=True)
    at_once = compress_structure(copy.deepcopy(trained), EVERYTHING, known)
    assert shapes(stepwise) == shapes(at_once)
    assert int((stepwise.get_parameter("fc1.weight") == 0).sum()) == int(
        (at_once.get_parameter("fc1.weight") == 0).sum()
    )
