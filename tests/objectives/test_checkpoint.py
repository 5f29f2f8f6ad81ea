"""Trials that go on: from a checkpoint, with every technique, to an artifact that keeps what the plan promises."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from paretune.errors import TrialError
from paretune.objectives import artifact, course
from paretune.objectives.artifact import CARD, PLAN, WEIGHTS, Card, load_module, probe_difference
from paretune.objectives.baseline import Baseline
from paretune.objectives.checkpoint import CHECKPOINT, Checkpoint
from paretune.objectives.compress import compress_structure
from paretune.objectives.compress.quantization import QuantizedLayer
from paretune.objectives.compress.ties import weights_of
from paretune.objectives.data import call
from paretune.objectives.evaluate import Evaluator
from paretune.objectives.finetune import Training, TrainingReport, fit
from paretune.objectives.measurement import Record
from paretune.objectives.models import ModelSource
from paretune.objectives.optimization import pace
from paretune.objectives.problem import Problem
from paretune.objectives.runtimes import LoadOptions, get_runtime
from paretune.objectives.scoring import artifact_outputs
from paretune.spaces.plan import CompressionPlan
from tests.nets import PlainCNN

BITS = {"conv2": 8, "fc1": 8}
LEARNING = {"finetune": {"learning_rate": 3e-3}}


def slim() -> nn.Module:
    """A variant: half of the channels."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        net = PlainCNN()
        net.conv2, net.bn2, net.fc1 = nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.Linear(64, 32)
    return net


def planned(**sections: Any) -> CompressionPlan:
    return CompressionPlan.model_validate(LEARNING | sections)


def weight(module: nn.Module, name: str) -> Tensor:
    (found,) = weights_of(module, name)
    return found.detach()


Promise = Callable[[nn.Module], bool]
CASES: list[Any] = [
    pytest.param(planned(), {}, lambda m: len(weight(m, "conv2")) == 32, id="dense"),
    pytest.param(
        planned(prune={"ratios": {"conv2": 0.5, "fc1": 0.25}}),
        {},
        lambda m: (len(weight(m, "conv2")), len(weight(m, "fc1"))) == (16, 24),
        id="channels",
    ),
    pytest.param(
        planned(prune={"ratio": 0.4}, schedule={"shape": "linear", "steps": 3}, quantize={"bits": BITS}),
        {},
        lambda m: len(weight(m, "conv2")) + len(weight(m, "fc1")) < 64 and isinstance(m.fc1, QuantizedLayer),
        id="channels by a rule, in cuts",
    ),
    pytest.param(
        planned(factorize={"ranks": {"conv2": 0.375}}, quantize={"bits": BITS}),
        {},
        lambda m: all(isinstance(part, QuantizedLayer) for part in m.conv2.children()),
        id="factors",
    ),
    pytest.param(
        planned(sparsify={"sparsity": {"conv2": 0.8, "fc1": 0.6}}, schedule={"shape": "cubic", "steps": 3}),
        {},
        lambda m: float((weight(m, "conv2") == 0).double().mean()) == pytest.approx(0.8, abs=1e-3),
        id="zeros in cuts",
    ),
    pytest.param(
        planned(sparsify={"sparsity": {"fc1": 0.5}, "pattern": "2:4"}, quantize={"bits": BITS}),
        {"ema": 0.9},
        lambda m: bool(((weight(m, "fc1").view(32, -1, 4) == 0).sum(2) >= 2).all()),
        id="pattern, averaged",
    ),
    pytest.param(
        planned(
            sparsify={"sparsity": {"fc1": 0.5}},
            share={"clusters": {"fc1": 8, "conv2": 16}},
            quantize={"bits": {"fc1": 8}, "granularity": "per-tensor"},
        ),
        {},
        lambda m: len(weight(m, "fc1").unique()) <= 8 and len(weight(m, "conv2").unique()) <= 16,
        id="codebooks",
    ),
    pytest.param(
        planned(quantize={"bits": BITS, "aware": False}),
        {"freeze_batchnorm": 0.5},
        lambda m: isinstance(m.conv2, QuantizedLayer),
        id="quantized afterwards",
    ),
    pytest.param(
        planned(variant="slim", prune={"ratios": {"conv2": 0.5}}, quantize={"bits": BITS}),
        {"plateau": 0.05},
        lambda m: len(weight(m, "conv2")) == 8,
        id="variant with a plateau",
    ),
]


@pytest.mark.parametrize(("plan", "options", "promise"), CASES)
def test_every_kind_of_trial_goes_on(
    problem: Problem, baseline: Baseline, tmp_path: Path, plan: CompressionPlan, options: Any, promise: Promise
) -> None:
    known = replace(problem, training=replace(problem.training, **options), variants={"slim": ModelSource(slim)})
    evaluator, short, long = Evaluator(known, baseline), tmp_path / "short", tmp_path / "long"
    first = evaluator.evaluate(plan, short, seed=0, epochs=1)
    found = Checkpoint.read(short)
    resolved = CompressionPlan.from_json((short / PLAN).read_text())
    assert (found.asked, found.plan_hash) == (plan.hash, resolved.hash)
    assert (found.seed, found.epochs, found.step, found.total) == (0, 1, 11, 16)
    # As the trained model was there: alive batch norm, the plan's shape, float weights.
    base = known.of(plan.variant)
    replayed = compress_structure(base.model.build(), resolved, base.context([]))
    stored = load_file(short / CHECKPOINT)
    assert {name: tensor.shape for name, tensor in stored.items()} == {
        name: tensor.shape for name, tensor in replayed.state_dict().items()
    }
    record = evaluator.evaluate(plan, long, seed=0, epochs=2.5, resume=short)
    assert isinstance(first, Record)
    assert isinstance(record, Record)
    assert record.training["resumed_steps"] == found.step
    assert first.training["resumed_steps"] == 0
    left = 40 - found.step
    assert record.training["steps"] == left or (options.get("plateau") and 0 < record.training["steps"] < left)
    assert record.measurement.is_finite()
    assert (record.measurement.params, record.measurement.macs) == (first.measurement.params, first.measurement.macs)
    assert record.measurement.main.accuracy > (0.3 if plan.variant else 0.8), "a variant begins untrained"
    assert record.main.executed == first.main.executed
    assert CompressionPlan.from_json((long / PLAN).read_text()) == resolved
    assert (short / WEIGHTS).read_bytes() != (long / WEIGHTS).read_bytes()
    artifact.verify_files(long)
    assert probe_difference(long) == 0.0
    module = load_module(long, known)
    assert promise(module)
    split = known.splits.validation
    outputs, _ = artifact_outputs(get_runtime("openvino"), long / "model.onnx", LoadOptions(8), split)
    with torch.no_grad():
        expected = call(module, split.inputs)
    assert (outputs.argmax(1) == expected.argmax(1)).double().mean() >= 0.99
    again = Checkpoint.read(long)
    assert (again.epochs, again.step, again.total) == (2.5, 28, 40)


SMALL = planned(prune={"ratios": {"conv2": 0.5}}, quantize={"bits": BITS}, schedule={"shape": "linear", "steps": 3})


@pytest.fixture(scope="module")
def short(evaluator: Evaluator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trial of 16 steps, 11 of them in floats; don't change it."""
    folder = tmp_path_factory.mktemp("trials") / "short"
    evaluator.evaluate(SMALL, folder, seed=0, epochs=1)
    return folder


def test_a_checkpoint_is_no_part_of_the_artifact(evaluator: Evaluator, short: Path, tmp_path: Path) -> None:
    assert CHECKPOINT not in Card.read(short).files
    shutil.copytree(short, tmp_path / "shipped", ignore=shutil.ignore_patterns(CHECKPOINT))
    artifact.verify_files(tmp_path / "shipped")
    assert probe_difference(tmp_path / "shipped") == 0.0


def test_untrained_trials_have_none(evaluator: Evaluator, tmp_path: Path) -> None:
    evaluator.evaluate(SMALL, tmp_path / "trial", seed=0, epochs=0)
    assert (tmp_path / "trial" / CARD).is_file()
    assert not (tmp_path / "trial" / CHECKPOINT).exists()


def test_it_goes_on_where_it_was(
    evaluator: Evaluator, problem: Problem, short: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the checkpoint's weights, without a cut, on the longer schedule, with other batches."""
    parts: list[tuple[range, int, int]] = []
    began: list[dict[str, Tensor]] = []
    batches: list[Tensor] = []

    def watched(model: nn.Module, training: Training, config: Any, stream: Any, *rest: Any, **more: Any) -> Any:
        parts.append((rest[0], rest[1], more["floats"]))
        began.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

        def noted() -> Any:
            for batch in stream:
                batches.append(batch.indices)
                yield batch

        return fit(model, training, config, noted(), *rest, **more)

    monkeypatch.setattr(course, "fit", watched)
    record = evaluator.evaluate(SMALL, tmp_path / "long", seed=0, epochs=2, resume=short)
    assert isinstance(record, Record)
    assert parts == [(range(11, 22), 32, 22), (range(22, 32), 32, 22)]
    stored = load_file(short / CHECKPOINT)
    assert all(torch.equal(tensor, stored[name]) for name, tensor in began[0].items())
    options = problem.training
    ours = Training(problem.splits, problem.task, options)
    first = [batch.indices.tolist() for batch in islice(ours.batches(0), 16)]
    assert not any(indices.tolist() in first for indices in batches)
    assert [indices.tolist() for indices in batches[:5]] == [
        batch.indices.tolist() for batch in islice(islice(ours.batches(0), 16, None), 5)
    ], "those of the second epoch"
    assert pace(11, 32, options).rate > pace(11, 16, options).rate


def test_equal_resumptions_give_equal_weights(evaluator: Evaluator, short: Path, tmp_path: Path) -> None:
    before = (short / CHECKPOINT).read_bytes()
    for name in ("one", "other"):
        evaluator.evaluate(SMALL, tmp_path / name, seed=0, epochs=2, resume=short)
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "other" / WEIGHTS).read_bytes()
    assert (short / CHECKPOINT).read_bytes() == before


def test_rungs_behind_it_dont_come_again(evaluator: Evaluator, short: Path, tmp_path: Path) -> None:
    record = evaluator.evaluate(SMALL, tmp_path / "long", seed=0, epochs=2, resume=short, rungs=(0.2, 0.34, 0.5, 0.8))
    assert isinstance(record, Record)
    assert [rung.share for rung in record.rungs] == [0.5, 0.8], "it begins at step 11 of 32"


def test_it_goes_on_twice_and_in_its_own_place(evaluator: Evaluator, short: Path, tmp_path: Path) -> None:
    place = shutil.copytree(short, tmp_path / "trial")
    evaluator.evaluate(SMALL, place, seed=0, epochs=2, resume=place)
    record = evaluator.evaluate(SMALL, place, seed=0, epochs=3, resume=place)
    assert isinstance(record, Record)
    assert (record.training["resumed_steps"], record.training["steps"]) == (22, 48 - 22)
    assert [path.name for path in tmp_path.iterdir()] == ["trial"]


def test_a_resolved_plan_goes_on_as_the_one_that_was_asked_for(evaluator: Evaluator, tmp_path: Path) -> None:
    asked = planned(prune={"ratio": 0.3, "importance": "random"})
    evaluator.evaluate(asked, tmp_path / "short", seed=0, epochs=0.5)
    resolved = CompressionPlan.from_json((tmp_path / "short" / PLAN).read_text())
    for name, plan in (("asked", asked), ("resolved", resolved)):  # another seed would choose other channels
        evaluator.evaluate(plan, tmp_path / name, seed=1, epochs=1, resume=tmp_path / "short")
        assert CompressionPlan.from_json((tmp_path / name / PLAN).read_text()) == resolved
        assert Checkpoint.read(tmp_path / name).asked == asked.hash, "which may go on again"


def refused(evaluator: Evaluator, tmp_path: Path, message: str, resume: Path, **other: Any) -> None:
    given = {"plan": SMALL, "epochs": 2.0} | other
    with pytest.raises(TrialError, match=message):
        evaluator.evaluate(given["plan"], tmp_path / "new" / "trial", seed=0, epochs=given["epochs"], resume=resume)
    assert list((tmp_path / "new").iterdir()) == []


def test_what_cant_go_on_says_why(evaluator: Evaluator, short: Path, tmp_path: Path) -> None:
    refused(evaluator, tmp_path, "must have a checkpoint.safetensors to go on from, but .* start it anew", tmp_path)
    other = planned(prune={"ratios": {"conv2": 0.25}})
    refused(evaluator, tmp_path, f"own plan, {SMALL.hash[:12]}…, but got {other.hash[:12]}…", short, plan=other)
    for epochs in (0, 0.5, 1):
        message = f"for more than the 1 epochs that it was, but got {epochs:g}; "
        refused(evaluator, tmp_path, message, short, epochs=epochs)


def test_a_damaged_checkpoint_is_refused(evaluator: Evaluator, short: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(short, tmp_path / "broken")
    whole = (short / CHECKPOINT).read_bytes()
    (broken / CHECKPOINT).write_bytes(whole[: len(whole) // 2])
    refused(evaluator, tmp_path, r"must be whole and of the model .* start the trial anew", broken)
    shutil.copy(short / WEIGHTS, broken / CHECKPOINT)
    refused(evaluator, tmp_path, r"must be whole and of the model .* start the trial anew", broken)
    Checkpoint(broken, SMALL.hash, SMALL.hash, 0, 1.0, 11, 16).save(nn.Linear(2, 2))
    refused(evaluator, tmp_path, r"must be whole and of the model .*Missing key", broken)


def test_after_the_checkpoint_comes_what_comes_after_the_training_in_floats(
    evaluator: Evaluator, short: Path, tmp_path: Path
) -> None:
    """The record says what was run: less time for steps that weren't."""
    record = evaluator.evaluate(SMALL, tmp_path / "long", seed=0, epochs=2, resume=short)
    assert isinstance(record, Record)
    assert TrainingReport(**record.training).steps == 32 - 11
    assert record.seconds.keys() == {"compress", "train", "deploy", "score", "measure", "save"}
