"""A look at a model in the middle of its training: it sees what would be left, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paretune.objectives import course, finetune
from paretune.objectives.compress import Context, compress_numerics, compress_structure
from paretune.objectives.course import train
from paretune.objectives.data import call
from paretune.objectives.distillation import Hints
from paretune.objectives.finetune import Moment, Training, TrainingReport
from paretune.objectives.models import ModelSource
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
from tests.nets import PlainCNN

RUNGS = (0.2, 0.4, 0.6, 0.9)
BITS = {"conv1": 8, "conv2": 8, "fc1": 8, "fc2": 8}


class Noisy(PlainCNN):
    """Draws random numbers in evaluation too, and counts in a Python attribute how often it has run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = x * (1 + 0.01 * torch.rand(()) + 1e-4 * self.calls)
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 2)
        x = F.max_pool2d(F.relu(self.bn2(self.conv2(x))), 2)
        return self.fc2(F.dropout(F.relu(self.fc1(x.flatten(1))), 0.2, self.training))


def noisy() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Noisy()


def plain() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PlainCNN()


AWARE = CompressionPlan(
    prune=Pruning(ratios={"conv2": 0.5}),
    sparsify=Sparsification(sparsity={"fc2": 0.5}),
    share=Sharing(clusters={"fc1": 16}),
    quantize=Quantization(bits=BITS, granularity="per-tensor", observer="mse"),
    schedule=Schedule(shape="linear", steps=2),
    finetune=Finetuning(learning_rate=3e-3, distillation_weight=0.0),
)
FLOATS = CompressionPlan(finetune=Finetuning(learning_rate=3e-3, distillation_weight=0.0))
HINTED = FLOATS.model_copy(update={"finetune": FLOATS.finetune.model_copy(update={"hint_weight": 0.5})})

Look = Callable[[Moment], None]


@pytest.fixture
def run(problem: Problem) -> Callable[..., tuple[nn.Module, TrainingReport]]:
    """Train by a plan, for an epoch of 16 steps by default, and look at each moment."""

    def make(
        plan: CompressionPlan,
        look: Look,
        *,
        rungs: tuple[float, ...] = (),
        epochs: float = 1.0,
        factory: Callable[[], nn.Module] = noisy,
        keep: Callable[[nn.Module, int, int], None] | None = None,
        **options: Any,
    ) -> tuple[nn.Module, TrainingReport]:
        torch.manual_seed(0)
        known = replace(problem, model=ModelSource(factory))
        context: Context = known.context(list(known.splits.train.head(128).batches(64)))
        model = compress_structure(known.model.build(), plan, context, plan.schedule.fractions[0])
        hints = Hints(known.model.build(), ["conv2"]) if plan.finetune.hint_weight else None
        chosen = replace(problem.training, **options)
        training = Training(problem.splits, problem.task, chosen, after_step=look, hints=hints, rungs=rungs)
        return train(model, plan, training, context, seed=0, epochs=epochs, keep=keep)

    return make


OPTIONS: list[Any] = [
    pytest.param(AWARE, {}, id="quantized"),
    pytest.param(AWARE, {"ema": 0.9}, id="averaged"),
    pytest.param(AWARE, {"freeze_batchnorm": 0.5, "optimizer": "sgd"}, id="frozen batch norm"),
    pytest.param(AWARE, {"precision": "bfloat16"}, id="bfloat16"),
    pytest.param(AWARE, {"augment": ("crop", "mixup"), "channels_last": True}, id="augmented"),
    pytest.param(FLOATS, {"plateau": 0.05, "epochs": 2.5}, id="plateau"),
    pytest.param(HINTED, {}, id="hints"),
]


@pytest.mark.parametrize(("plan", "options"), OPTIONS)
def test_looking_changes_nothing(run: Any, problem: Problem, plan: CompressionPlan, options: dict[str, Any]) -> None:
    batches = list(problem.splits.validation.head(100).batches(64))
    seen: list[tuple[Tensor, Tensor]] = []
    unseen, report = run(plan, lambda _: None, **options)
    after = torch.get_rng_state()
    looked, same = run(plan, lambda moment: seen.append(moment.outputs(batches, lambda: None)), rungs=RUNGS, **options)
    assert torch.equal(torch.get_rng_state(), after)
    assert same == report
    assert len(seen) == report.steps
    assert report.ended == ("plateau" if "plateau" in options else "schedule")
    theirs = looked.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in unseen.state_dict().items())
    assert {outputs.shape for outputs, _ in seen} == {(100, 10)}
    assert {outputs.dtype for outputs, _ in seen} == {torch.float32}
    targets = problem.splits.validation.head(100).targets
    assert all(torch.equal(found, targets) for _, found in seen)
    assert not torch.equal(seen[0][0], seen[-1][0])


@pytest.mark.parametrize(("plan", "options"), OPTIONS[:3])
def test_the_last_look_sees_what_is_left(run: Any, problem: Problem, plan: CompressionPlan, options: Any) -> None:
    some = problem.splits.validation.head(64)
    seen: dict[int, Tensor] = {}

    def look(moment: Moment) -> None:
        seen[moment.done], _ = moment.outputs(list(some.batches(64)), lambda: None)

    module, _ = run(plan, look, factory=plain, **options)
    with torch.no_grad():
        left = call(module, some.inputs)
    torch.testing.assert_close(seen[16], left, rtol=1e-5, atol=1e-5)
    assert (seen[8] - left).abs().max() > 1e-3


def test_moments_count_steps_over_all_parts(run: Any) -> None:
    moments: list[Moment] = []
    run(AWARE, moments.append)
    assert [(moment.steps, moment.done, moment.total) for moment in moments] == [(n, n, 16) for n in range(1, 17)]


def test_between_the_batches_others_may_go_first(run: Any, problem: Problem) -> None:
    turns: list[int] = []

    def look(moment: Moment) -> None:
        moment.outputs(list(problem.splits.validation.head(100).batches(30)), lambda: turns.append(moment.done))

    run(FLOATS, look)
    assert turns == [step for step in range(1, 17) for _ in range(4)]


def test_a_gpu_is_looked_at_seldom_but_at_rungs(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU that is treated likewise."""
    monkeypatch.setitem(finetune._STEPS_AHEAD, "cpu", 5)
    moments: list[Moment] = []
    rungs = (0.25, 0.375, 0.5, 0.99)
    floats, report = run(FLOATS, moments.append, rungs=rungs)
    assert [moment.done for moment in moments] == [4, 5, 6, 8, 10, 15, 16]
    assert [moment.steps for moment in moments] == [4, 5, 6, 8, 10, 15, 16]
    moments.clear()
    unseen, same = run(FLOATS, moments.append)
    assert [moment.done for moment in moments] == [5, 10, 15, 16]
    assert same == report
    assert all(torch.equal(tensor, unseen.state_dict()[name]) for name, tensor in floats.state_dict().items())


def test_a_gpu_sees_a_plateau_where_it_is_without_rungs(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(finetune._STEPS_AHEAD, "cpu", 5)
    found = []
    for rungs in ((), tuple(step / 40 for step in range(1, 40))):
        moments: list[Moment] = []
        _, report = run(FLOATS, moments.append, rungs=rungs, plateau=0.05, epochs=2.5)
        assert report.ended == "plateau"
        found.append([(moment.steps, moment.done) for moment in moments if moment.done == 40 or not rungs])
        assert report.steps == found[-1][-1][0] < 40
    assert found[0][-1] == found[1][-1]


@pytest.mark.parametrize(
    ("plan", "epochs", "share", "kept"),
    [
        pytest.param(FLOATS, 1, 0.3, [(11, 16)], id="floats"),
        pytest.param(AWARE, 1, 0.3, [(11, 16)], id="border"),
        pytest.param(AWARE, 1, 0.5, [(8, 16)], id="early border"),
        pytest.param(AWARE, 1, 0.1, [(11, 16)], id="late border"),
        pytest.param(AWARE, 1, 1.0, [], id="nothing in floats"),
        pytest.param(AWARE, 0, 0.3, [], id="no training"),
        pytest.param(AWARE, 2 / 16, 0.0, [(2, 2)], id="after the last cut"),
    ],
)
@pytest.mark.parametrize("ahead", [1, 5])
def test_the_model_is_kept_once_and_whole(
    run: Any,
    monkeypatch: pytest.MonkeyPatch,
    plan: CompressionPlan,
    epochs: float,
    share: float,
    kept: list[tuple[int, int]],
    ahead: int,
) -> None:
    monkeypatch.setitem(finetune._STEPS_AHEAD, "cpu", ahead)
    found: list[tuple[int, int]] = []

    def keep(model: nn.Module, step: int, total: int) -> None:
        found.append((step, total))
        assert not model.training
        assert isinstance(model.get_submodule("bn2"), nn.BatchNorm2d)
        assert model.get_submodule("conv2").get_parameter("weight").shape[0] == (32 if plan is FLOATS else 16)
        zeros = float((model.get_submodule("fc2").get_parameter("weight") == 0).double().mean())
        assert zeros == (0 if plan is FLOATS else 0.5)

    module, report = run(plan, lambda _: None, epochs=epochs, quantized_share=share, keep=keep)
    assert found == kept
    unkept, same = run(plan, lambda _: None, epochs=epochs, quantized_share=share)
    assert same == report
    theirs = unkept.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("ema", [None, 0.9], ids=["last", "averaged"])
def test_what_is_kept_at_the_border_is_what_was_trained(
    run: Any, monkeypatch: pytest.MonkeyPatch, ema: float | None
) -> None:
    kept: list[dict[str, Tensor]] = []
    compressed: list[dict[str, Tensor]] = []

    def watched(model: nn.Module, *rest: Any) -> nn.Module:
        compressed.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return compress_numerics(model, *rest)

    monkeypatch.setattr(course, "compress_numerics", watched)
    run(AWARE, lambda _: None, keep=lambda model, *_: kept.append(model.state_dict()), ema=ema)
    assert len(kept) == len(compressed) == 1
    assert kept[0].keys() == compressed[0].keys()
    assert all(torch.equal(tensor, kept[0][name]) for name, tensor in compressed[0].items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device")
@pytest.mark.parametrize("options", [{}, {"precision": "bfloat16", "ema": 0.9}], ids=["float32", "bfloat16"])
def test_looking_on_a_gpu(run: Any, problem: Problem, options: dict[str, Any]) -> None:
    batches = list(problem.splits.validation.head(100).batches(64))
    seen: dict[int, Tensor] = {}

    def look(moment: Moment) -> None:
        before = torch.cuda.get_rng_state()
        seen[moment.done], targets = moment.outputs(batches, lambda: None)
        assert torch.equal(torch.cuda.get_rng_state(), before)
        assert targets.device.type == "cpu"

    module, report = run(AWARE, look, factory=plain, rungs=RUNGS, device="cuda", **options)
    assert report.device == "cuda:0"
    assert list(seen) == [4, 6, 7, 10, 11, 15, 16], "at rungs, and where a part ends"
    assert {outputs.device.type for outputs in seen.values()} == {"cpu"}
    with torch.no_grad():
        left = call(module, problem.splits.validation.head(100).inputs)
    assert (seen[16].argmax(1) == left.argmax(1)).double().mean() >= 0.95
