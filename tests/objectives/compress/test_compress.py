"""The order of the techniques, and a compressed shape that depends on the plan alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from paretune.objectives.compress import NUMERICS, STRUCTURE, Context, compress_numerics, compress_structure
from paretune.objectives.compress.quantization import QuantizedLayer
from paretune.objectives.data import Batch, Splits
from paretune.objectives.tasks import Classification
from paretune.spaces.plan import CompressionPlan, Importance, Pruning, Quantization
from tests.nets import PlainCNN, wake_norms

CHANNELS = {"conv1": 16, "conv2": 32, "fc1": 32, "fc2": 10}
PLAN = CompressionPlan(
    prune=Pruning(ratios={"conv1": 0.5, "conv2": 0.25, "fc1": 0.0}),
    quantize=Quantization(bits={"conv1": 32, "conv2": 8, "fc1": 4, "fc2": 16}),
)


def context(splits: Splits, batches: int) -> Context:
    found: list[Batch] = list(splits.train.head(64 * batches).batches(64)) if batches else []
    return Context(splits.validation.head(2).inputs, CHANNELS, Classification(), found)


def shapes(module: nn.Module) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (tensor.shape, tensor.dtype) for name, tensor in module.state_dict().items()}


def test_structure_comes_before_numerics(digit_splits: Splits) -> None:
    assert [technique.field for technique in (*STRUCTURE, *NUMERICS)] == ["prune", "quantize"]
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
