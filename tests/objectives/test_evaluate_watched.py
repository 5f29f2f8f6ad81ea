"""A trial that is watched: it tells how far it is, isn't changed by that, and ends when it is told to."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from paretune.errors import JobError
from paretune.objectives import course
from paretune.objectives.artifact import WEIGHTS
from paretune.objectives.baseline import Baseline
from paretune.objectives.checkpoint import CHECKPOINT
from paretune.objectives.evaluate import Evaluator
from paretune.objectives.finetune import Training, TrainingReport, fit
from paretune.objectives.measurement import Record
from paretune.objectives.problem import Problem
from paretune.objectives.progress import Rung, Stopped
from paretune.objectives.stopwatch import Stopwatch
from paretune.spaces.plan import CompressionPlan, Finetuning, Pruning, Quantization

PLAN = CompressionPlan(
    prune=Pruning(ratios={"conv2": 0.5}),
    quantize=Quantization(bits={"conv2": 8, "fc1": 8}),
    finetune=Finetuning(learning_rate=3e-3),
)


class Watcher:
    """Notes what it is told, and wants the end after so many rungs, or so many questions."""

    def __init__(self, *, rungs: int = 1000, questions: int = 1000) -> None:
        self.told: list[str] = []
        self.outline: dict[str, float] = {}
        self.rungs: list[Rung] = []
        self.questions = 0
        self._most = rungs, questions

    def got_on(self, so_far: Stopped) -> None:
        self.told.append("rung" if so_far.rungs else "outline")
        self.outline = so_far.outline
        self.rungs = list(so_far.rungs)

    def wants_end(self) -> bool:
        self.questions += 1
        return len(self.rungs) >= self._most[0] or self.questions > self._most[1]


def test_a_trial_tells_how_far_it_is_and_stays_the_same(evaluator: Evaluator, tmp_path: Path) -> None:
    watcher = Watcher()
    record = evaluator.evaluate(PLAN, tmp_path / "seen", seed=0, epochs=1, rungs=(0.25, 0.5, 0.9), watcher=watcher)
    assert isinstance(record, Record)
    assert watcher.told == ["outline", "rung", "rung", "rung"]
    assert watcher.questions == 1 + 15, "before the training, and after each step but the last"
    assert [rung.share for rung in watcher.rungs] == [0.25, 0.5, 0.9]
    trained = evaluator._problem.training.epochs * len(evaluator._problem.splits.train)
    assert {rung.samples for rung in watcher.rungs} == {max(128, round(trained / 8))}, "few, after a short training"
    assert all(0.5 < rung.accuracy <= 1 for rung in watcher.rungs)
    assert record.rungs == tuple(watcher.rungs)
    assert record.seconds["rung"] > 0
    promised = evaluator.outline(PLAN, seed=0)
    assert watcher.outline.keys() == promised.keys()
    assert all(watcher.outline[name] == promised[name] for name in ("params", "macs", "size_bytes"))
    assert watcher.outline["latency_ms"] == record.main.early_latency_ms
    unseen = evaluator.evaluate(PLAN, tmp_path / "unseen", seed=0, epochs=1)
    assert isinstance(unseen, Record)
    assert unseen.rungs == ()
    assert "rung" not in unseen.seconds
    for name in (WEIGHTS, "model.onnx", CHECKPOINT):
        assert (tmp_path / "seen" / name).read_bytes() == (tmp_path / "unseen" / name).read_bytes(), name


def test_records_keep_their_rungs_and_older_ones_have_none(evaluator: Evaluator, tmp_path: Path) -> None:
    record = evaluator.evaluate(PLAN, tmp_path / "trial", seed=0, rungs=(0.5,))
    assert isinstance(record, Record)
    stored = json.loads(json.dumps(record.to_dict()))
    assert len(record.rungs) == 1, "with nobody to watch"
    assert Record.from_dict(stored) == record
    del stored["rungs"]
    assert Record.from_dict(stored) == replace(record, rungs=())


def test_it_ends_at_a_rung_and_leaves_nothing(evaluator: Evaluator, tmp_path: Path) -> None:
    watcher = Watcher(rungs=1)
    stopped = evaluator.evaluate(PLAN, tmp_path / "trial", seed=0, epochs=1, rungs=(0.25, 0.5), watcher=watcher)
    assert isinstance(stopped, Stopped)
    assert stopped.rungs == tuple(watcher.rungs)
    assert len(stopped.rungs) == 1
    assert stopped.steps == 4
    assert stopped.outline == watcher.outline
    assert stopped.seconds.keys() == {"compress", "deploy", "measure", "train", "rung"}
    assert list(tmp_path.iterdir()) == []
    assert json.loads(json.dumps(stopped.to_dict()))["steps"] == 4
    assert isinstance(evaluator.evaluate(PLAN, tmp_path / "trial", seed=0), Record), "the devices are free again"


def test_an_end_in_the_last_part_counts_all_steps(evaluator: Evaluator, tmp_path: Path) -> None:
    stopped = evaluator.evaluate(PLAN, tmp_path / "trial", seed=0, epochs=1, watcher=Watcher(questions=14))
    assert isinstance(stopped, Stopped)
    assert (stopped.steps, stopped.rungs) == (14, ())
    assert list(tmp_path.iterdir()) == []


def test_it_ends_before_the_training(evaluator: Evaluator, tmp_path: Path) -> None:
    (tmp_path / "trial").mkdir()
    (tmp_path / "trial" / "older").touch()
    stopped = evaluator.evaluate(PLAN, tmp_path / "trial", seed=0, epochs=1, watcher=Watcher(questions=0))
    assert isinstance(stopped, Stopped)
    assert (stopped.steps, stopped.rungs) == (0, ())
    assert "train" not in stopped.seconds
    assert stopped.outline["latency_ms"] > 0
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*")] == [Path("trial"), Path("trial/older")]


def test_what_was_ended_is_let_go(evaluator: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the memory of a GPU is given back."""
    trained: list[weakref.ref[nn.Module]] = []
    alive: list[bool] = []

    def watched(model: nn.Module, training: Training, *rest: Any, **more: Any) -> TrainingReport:
        trained.append(weakref.ref(model))
        return fit(model, training, *rest, **more)

    monkeypatch.setattr(course, "fit", watched)
    module = "paretune.objectives.evaluate.release_memory"
    monkeypatch.setattr(module, lambda: alive.append(any(ref() is not None for ref in trained)))
    stopped = evaluator.evaluate(PLAN, tmp_path / "trial", seed=0, epochs=1, watcher=Watcher(questions=14))
    assert isinstance(stopped, Stopped)
    assert len(trained) == 2
    assert alive == [False]


def test_untrained_trials_have_no_rungs(evaluator: Evaluator, tmp_path: Path) -> None:
    watcher = Watcher()
    record = evaluator.evaluate(PLAN, tmp_path / "trial", seed=0, epochs=0, rungs=(0.5,), watcher=watcher)
    assert isinstance(record, Record)
    assert record.rungs == ()
    assert watcher.told == ["outline"]
    assert watcher.questions == 1


def test_a_metric_that_isnt_finite_is_no_rung(problem: Problem, baseline: Baseline, tmp_path: Path) -> None:
    class Odd(type(problem.task)):  # type: ignore[misc]  # whatever the task is
        asked = 0

        def metric(self, outputs: torch.Tensor, targets: torch.Tensor) -> float:
            Odd.asked += 1
            return float("nan") if Odd.asked == 1 else super().metric(outputs, targets)

    evaluator, watcher = Evaluator(replace(problem, task=Odd()), baseline), Watcher()
    record = evaluator.evaluate(PLAN, tmp_path / "trial", seed=0, rungs=(0.25, 0.5), watcher=watcher)
    assert isinstance(record, Record)
    assert [rung.share for rung in watcher.rungs] == [0.5]


@pytest.mark.parametrize("rungs", [(0.5, 0.25), (0.0, 0.5), (0.5, 1.0), (0.5, 0.5), (float("nan"),)])
def test_rungs_are_shares_in_order(evaluator: Evaluator, tmp_path: Path, rungs: tuple[float, ...]) -> None:
    with pytest.raises(JobError, match=r"search\.rungs must be shares of a training, between 0 and 1, ascending"):
        evaluator.evaluate(PLAN, tmp_path / "trial", seed=0, rungs=rungs)
    assert list(tmp_path.iterdir()) == []


def test_a_phase_within_another_counts_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 4.0, 5.0, 5.5, 10.0, 10.0, 11.0])
    monkeypatch.setattr("paretune.objectives.stopwatch.time.perf_counter", lambda: next(now))
    watch = Stopwatch()
    with watch.phase("train"):
        with watch.phase("rung"):
            pass
        with watch.phase("save"):
            pass
    with watch.phase("save"):
        pass
    assert watch.seconds == {"rung": 3.0, "save": 1.5, "train": 6.5}
