"""The course of a training: cuts and quantizers come when they should, and what is tied stays tied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from paretune.objectives import course
from paretune.objectives.compress import Context, compress_numerics, compress_structure
from paretune.objectives.compress.quantization import QuantizedLayer
from paretune.objectives.compress.ties import weights_of
from paretune.objectives.course import cuts, train
from paretune.objectives.finetune import Training, TrainingReport, fit
from paretune.objectives.problem import Problem
from paretune.spaces.plan import (
    CompressionPlan,
    Finetuning,
    Pruning,
    Quantization,
    Schedule,
    Sharing,
    Sparsification,
)

TEACHES_ITSELF = Finetuning(learning_rate=3e-3, distillation_weight=0.0)
BITS = {"conv1": 8, "conv2": 8, "fc1": 8, "fc2": 8}
LAYERS = tuple(BITS)


@pytest.mark.parametrize("text", ["one-shot", "linear:2", "linear:5", "cubic:4", "coarse-fine:3", "linear:100"])
@pytest.mark.parametrize("steps", [0, 1, 2, 3, 7, 100, 1001])
def test_cuts_cover_all_steps_in_order(text: str, steps: int) -> None:
    schedule = Schedule.parse(text)
    fractions, parts = zip(*cuts(schedule, steps), strict=True)
    assert fractions == schedule.fractions
    assert [step for part in parts for step in part] == list(range(steps))
    assert all(0 <= part.start <= part.stop <= steps for part in parts)
    assert len(parts[-1]) >= steps // 2, "the last cut is recovered from"


def test_cuts_are_at_equal_distances() -> None:
    parts = [part for _, part in cuts(Schedule(shape="cubic", steps=5), 80)]
    assert parts == [range(0, 10), range(10, 20), range(20, 30), range(30, 40), range(40, 80)]


class Part(NamedTuple):
    """A part of a training as it began."""

    steps: range
    quantized: set[str]
    channels: int
    zeros: int


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[Part]:
    """What the parts of a training were, in order; they are carried out as ever."""
    seen: list[Part] = []

    def watched(model: nn.Module, training: Training, *rest: Any, **more: Any) -> TrainingReport:
        quantized = {name for name, part in model.named_modules() if isinstance(part, QuantizedLayer)}
        (conv,), (linear,) = weights_of(model, "conv2"), weights_of(model, "fc1")
        seen.append(Part(rest[2], quantized, len(conv), int((linear == 0).sum())))
        return fit(model, training, *rest, **more)

    monkeypatch.setattr(course, "fit", watched)
    return seen


@pytest.fixture(scope="module")
def known(problem: Problem) -> Context:
    return problem.context(list(problem.splits.train.head(128).batches(64)))


@pytest.fixture
def compressed(problem: Problem, known: Context) -> Callable[..., tuple[nn.Module, TrainingReport]]:
    """Compress the digits' model and train it by a plan, for an epoch of 16 steps by default."""

    def make(plan: CompressionPlan, *, epochs: float = 1.0, **options: Any) -> tuple[nn.Module, TrainingReport]:
        torch.manual_seed(0)
        model = compress_structure(problem.model.build(), plan, known, plan.schedule.fractions[0])
        training = Training(problem.splits, problem.task, replace(problem.training, **options))
        return train(model, plan, training, known, seed=0, epochs=epochs)

    return make


def weight(module: nn.Module, name: str) -> Tensor:
    (found,) = weights_of(module, name)
    return found.detach()


def test_one_shot_trains_in_floats_and_then_through_quantizers(parts: list[Part], compressed: Any) -> None:
    module, report = compressed(CompressionPlan(quantize=Quantization(bits=BITS), finetune=TEACHES_ITSELF))
    assert [(part.steps, part.quantized) for part in parts] == [(range(11), set()), (range(11, 16), set(LAYERS))]
    assert (report.steps, report.ended) == (16, "schedule")
    assert not module.training
    assert {part.calibrating for part in module.modules() if isinstance(part, QuantizedLayer)} == {False}


@pytest.mark.parametrize(("bits", "moving"), [(BITS, 8), ({}, 11)], ids=["quantized", "floats"])
def test_batch_norm_is_frozen_before_it_is_folded(
    compressed: Any, problem: Problem, monkeypatch: pytest.MonkeyPatch, bits: dict[str, int], moving: int
) -> None:
    """0.3 of 11 steps in floats, or of all 16."""
    counts = [int(problem.model.build().get_buffer("bn1.num_batches_tracked"))]

    def watched(model: nn.Module, *rest: Any, **more: Any) -> TrainingReport:
        report = fit(model, *rest, **more)
        if isinstance(norm := model.get_submodule("bn1"), nn.BatchNorm2d):
            counts.append(int(norm.get_buffer("num_batches_tracked")))
        return report

    monkeypatch.setattr(course, "fit", watched)
    compressed(CompressionPlan(quantize=Quantization(bits=bits), finetune=TEACHES_ITSELF), freeze_batchnorm=0.3)
    assert counts[1] - counts[0] == moving


def test_post_training_quantization_trains_in_floats_alone(parts: list[Part], compressed: Any) -> None:
    quantize = Quantization(bits=BITS, aware=False)
    module, report = compressed(CompressionPlan(quantize=quantize, finetune=TEACHES_ITSELF))
    assert [part.quantized for part in parts] == [set(), set()]
    assert [len(part.steps) for part in parts] == [16, 0]
    assert report.steps == 16
    floats, _ = compressed(CompressionPlan(finetune=TEACHES_ITSELF))
    for name in LAYERS:
        part = module.get_submodule(name)
        assert isinstance(part, QuantizedLayer)
        assert not part.calibrating
        assert torch.equal(weight(module, name), weight(floats, name)), "trained as if nothing were quantized"


def test_floats_alone_train_in_one_part(parts: list[Part], compressed: Any) -> None:
    compressed(CompressionPlan(quantize=Quantization(bits=dict.fromkeys(BITS, 32)), finetune=TEACHES_ITSELF))
    assert [part.steps for part in parts] == [range(16), range(16, 16)]


def test_cuts_are_trained_in_between(parts: list[Part], compressed: Any) -> None:
    plan = CompressionPlan(
        prune=Pruning(ratios={"conv2": 0.75}),
        sparsify=Sparsification(sparsity={"fc1": 0.8}),
        schedule=Schedule(shape="linear", steps=3),
        finetune=TEACHES_ITSELF,
    )
    module, report = compressed(plan)
    assert [part.steps for part in parts] == [range(4), range(4, 8), range(8, 16), range(16, 16)]
    assert [part.channels for part in parts] == [24, 16, 8, 8]
    shares = [part.zeros / (32 * 4 * part.channels) for part in parts]
    assert shares == pytest.approx([0.8 / 3, 1.6 / 3, 0.8, 0.8], abs=0.01)
    assert report.steps == 16
    assert weight(module, "conv2").shape[0] == 8


@pytest.mark.parametrize("text", ["one-shot", "linear:3"])
@pytest.mark.parametrize("aware", [True, False])
def test_without_epochs_nothing_is_trained_but_all_is_compressed(
    problem: Problem, known: Context, compressed: Any, text: str, aware: bool
) -> None:
    plan = CompressionPlan(
        prune=Pruning(ratios={"conv2": 0.5}),
        sparsify=Sparsification(sparsity={"fc1": 0.5}),
        quantize=Quantization(bits=BITS, aware=aware),
        schedule=Schedule.parse(text),
    )
    module, report = compressed(plan, epochs=0)
    assert report.steps == 0
    expected = compress_numerics(compress_structure(problem.model.build(), plan, known), plan, known)
    assert {name: tensor.shape for name, tensor in module.state_dict().items()} == {
        name: tensor.shape for name, tensor in expected.state_dict().items()
    }
    assert int((weight(module, "fc1") == 0).sum()) == int((weight(expected, "fc1") == 0).sum())
    if text == "one-shot":  # the channels that go in several cuts may be other ones: each cut looks anew
        assert all(torch.equal(weight(module, name), weight(expected, name)) for name in LAYERS)
    assert all(isinstance(module.get_submodule(name), QuantizedLayer) for name in LAYERS)


@pytest.mark.parametrize("zeros", [0.0, 0.5])
@pytest.mark.parametrize("clusters", [2, 16, 256])
def test_trained_codebooks_are_shared_again_without_a_change(
    problem: Problem, known: Context, clusters: int, zeros: float
) -> None:
    """As it happens to those that are quantized after the training."""
    torch.manual_seed(0)
    plan = CompressionPlan(
        sparsify=Sparsification(sparsity={"fc1": zeros}), share=Sharing(clusters={"fc1": clusters, "conv2": clusters})
    )
    module = compress_numerics(compress_structure(problem.model.build(), plan, known), plan, known)
    for name in plan.share.clusters:
        found = weight(module, name)
        values, index = found.unique(return_inverse=True)
        moved = values * (1 + torch.randn(len(values)) * 0.3)  # apart from each other, and zeros nowhere
        found.copy_(moved[index])
        assert 2 <= len(found.unique()) <= clusters
    again = compress_numerics(module, plan, known)
    assert all(torch.equal(weight(again, name), weight(module, name)) for name in plan.share.clusters)


@pytest.mark.parametrize("ema", [None, 0.9], ids=["plain", "averaged"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("aware", [True, False], ids=["aware", "post-training"])
def test_ties_hold_to_the_end(
    compressed: Any, problem: Problem, optimizer: str, ema: float | None, aware: bool
) -> None:
    plan = CompressionPlan(
        sparsify=Sparsification(sparsity={"fc1": 0.5, "conv2": 0.5}, pattern="2:4"),
        share=Sharing(clusters={"fc1": 8, "conv1": 5}),
        quantize=Quantization(bits=BITS, granularity="per-tensor", aware=aware),
        finetune=TEACHES_ITSELF,
    )
    module, _ = compressed(plan, optimizer=optimizer, ema=ema)
    dense = problem.model.build()
    assert not torch.equal(weight(module, "fc2"), weight(dense, "fc2")), "it was trained"
    blocks = weight(module, "fc1").view(32, -1, 4)
    assert ((blocks == 0).sum(2) >= 2).all()
    blocks = weight(module, "conv2").movedim(1, -1).reshape(32, 3, 3, -1, 4)
    assert ((blocks == 0).sum(4) >= 2).all()
    assert len(torch.unique(weight(module, "fc1"))) <= 8
    assert len(torch.unique(weight(module, "conv1"))) <= 5
    for name, most in (("fc1", 8), ("conv1", 5)):
        layer = module.get_submodule(name)
        assert isinstance(layer, QuantizedLayer)
        assert len(torch.unique(layer.weight_levels())) <= most
