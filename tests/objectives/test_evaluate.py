"""A trial from the plan to the artifact, on the digits: what is promised is what is deployed and measured."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from paretune.errors import JobError, ParetuneError, TrialError
from paretune.objectives import artifact
from paretune.objectives.artifact import CARD, PLAN, PROBE, WEIGHTS, Card, load_module, probe_difference
from paretune.objectives.baseline import Baseline, make_baseline, probe_widths, profile, profile_layers
from paretune.objectives.checkpoint import CHECKPOINT
from paretune.objectives.compress.lowrank import Factorized
from paretune.objectives.compress.quantization import QuantizedLayer
from paretune.objectives.compress.ties import weights_of
from paretune.objectives.data import call
from paretune.objectives.evaluate import Evaluator
from paretune.objectives.measurement import Measurement, Record
from paretune.objectives.models import ModelSource
from paretune.objectives.packing import unpack
from paretune.objectives.problem import Problem
from paretune.objectives.runtimes import LoadOptions, Target, get_runtime
from paretune.objectives.runtimes.base import LayerReport
from paretune.objectives.runtimes.openvino import OpenVINO
from paretune.objectives.scoring import artifact_outputs
from paretune.objectives.stopwatch import Stopwatch
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

MODEL = "model.onnx"
FILES = (PLAN, WEIGHTS, PROBE, MODEL)
LAYERS = ("conv1", "conv2", "fc1", "fc2")
DENSE = CompressionPlan(finetune=Finetuning(learning_rate=1e-4))
SMALL = CompressionPlan(
    prune=Pruning(ratios={"conv2": 0.5, "fc1": 0.25}),
    quantize=Quantization(bits={"conv1": 32, "conv2": 8, "fc1": 8, "fc2": 8}),
    finetune=Finetuning(learning_rate=3e-3, temperature=2.0),
)


class Trial(NamedTuple):
    plan: CompressionPlan
    record: Record
    folder: Path


@pytest.fixture(scope="module")
def dense(evaluator: Evaluator, tmp_path_factory: pytest.TempPathFactory) -> Trial:
    folder = tmp_path_factory.mktemp("trials") / "dense"
    return Trial(DENSE, evaluator.evaluate(DENSE, folder, seed=0), folder)


@pytest.fixture(scope="module")
def small(evaluator: Evaluator, tmp_path_factory: pytest.TempPathFactory) -> Trial:
    folder = tmp_path_factory.mktemp("trials") / "small"
    return Trial(SMALL, evaluator.evaluate(SMALL, folder, seed=0, epochs=3), folder)


@pytest.fixture(params=["dense", "small"])
def trial(request: pytest.FixtureRequest) -> Trial:
    found: Trial = request.getfixturevalue(request.param)
    return found


def test_record(trial: Trial) -> None:
    record, measured = trial.record.main, trial.record.measurement.main
    assert trial.record.measurement.is_finite()
    assert 0.85 <= measured.accuracy <= 1
    assert 0 < measured.latency_low_ms <= measured.latency_ms <= measured.latency_high_ms
    assert measured.speedup > 0
    assert record.early_latency_ms > 0
    assert measured.size_bytes == record.early_size_bytes == (trial.folder / MODEL).stat().st_size
    assert record.executed == {name: trial.plan.quantize.bits.get(name, 32) for name in LAYERS}
    assert trial.record.seconds.keys() == {"compress", "train", "deploy", "score", "measure", "save"}
    assert all(seconds > 0 for seconds in trial.record.seconds.values())
    assert Record.from_dict(json.loads(json.dumps(trial.record.to_dict()))) == trial.record


def test_parameters_and_macs_are_the_promised_ones(dense: Trial, small: Trial, problem: Problem) -> None:
    analysis = problem.analyse()
    assert (dense.record.measurement.params, dense.record.measurement.macs) == (analysis.params, analysis.macs)
    conv1, conv2 = 16 * 9 + 2 * 16, 16 * 16 * 9 + 2 * 16
    fc1, fc2 = 16 * 4 * 24 + 24, 24 * 10 + 10
    assert small.record.measurement.params == conv1 + conv2 + fc1 + fc2
    assert small.record.measurement.macs == 16 * 9 * 64 + 16 * 16 * 9 * 16 + 64 * 24 + 240
    assert small.record.measurement.main.size_bytes < dense.record.measurement.main.size_bytes


def test_the_folder_is_complete(trial: Trial, problem: Problem) -> None:
    assert {path.name for path in trial.folder.iterdir()} == {*FILES, CARD, CHECKPOINT}
    assert [path.name for path in trial.folder.parent.iterdir()] == [trial.folder.name], "nothing unfinished is left"
    assert CompressionPlan.from_json((trial.folder / PLAN).read_text()) == trial.plan
    card = Card.read(trial.folder)
    assert card.deployed.keys() == {""}
    assert card.main.target == Target("openvino", "cpu", 8, 1)
    assert (card.main.float_bits, card.main.float_format, card.main.model) == (32, "f32", MODEL)
    assert {width: scheme.to_dict() for width, scheme in card.schemes.items()} == {
        width: scheme.to_dict() for width, scheme in problem.schemes.items()
    }
    assert card.plan_hash == trial.plan.hash
    assert Measurement.from_dict(card.metrics["validation"]) == trial.record.measurement
    assert card.metrics.keys() == {"validation"}
    assert card.environment["torch"] == metadata.version("torch")
    artifact.verify_files(trial.folder)


def test_the_artifact_agrees_with_the_module_rebuilt_from_it(trial: Trial, problem: Problem) -> None:
    module = load_module(trial.folder, problem)
    assert not module.training
    split = problem.splits.validation
    outputs, targets = artifact_outputs(get_runtime("openvino"), trial.folder / MODEL, LoadOptions(1), split)
    assert torch.equal(targets, split.targets)
    with torch.no_grad():
        expected = call(module, split.inputs)
    assert (outputs.argmax(1) == expected.argmax(1)).double().mean() >= 0.995
    assert problem.task.metric(outputs, split.targets) == trial.record.measurement.main.accuracy
    if trial.plan is DENSE:
        torch.testing.assert_close(outputs, expected, atol=1e-3, rtol=1e-3)


def test_a_fresh_process_gives_the_same_outputs_bit_for_bit(trial: Trial, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from paretune.objectives.artifact import probe_difference;"
        "print(probe_difference(Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", code, str(trial.folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path, timeout=120)
    assert float(done.stdout) == 0.0
    assert probe_difference(trial.folder) == 0.0


def test_the_probe_is_real_data(trial: Trial, problem: Problem) -> None:
    inputs, outputs = artifact.load_probe(trial.folder)
    assert (inputs["input"] == problem.batch(8)["input"]).all()
    assert outputs.shape == (8, 10)
    assert artifact.load_session(trial.folder).run(inputs).tolist() == outputs.tolist()


def test_equal_seeds_give_equal_weights(small: Trial, evaluator: Evaluator, tmp_path: Path) -> None:
    again = evaluator.evaluate(SMALL, tmp_path / "again", seed=0, epochs=3)
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (small.folder / WEIGHTS).read_bytes()
    assert (tmp_path / "again" / MODEL).read_bytes() == (small.folder / MODEL).read_bytes()
    assert again.measurement.main.accuracy == small.record.measurement.main.accuracy
    evaluator.evaluate(SMALL, tmp_path / "again", seed=1, epochs=3)
    assert (tmp_path / "again" / WEIGHTS).read_bytes() != (small.folder / WEIGHTS).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again"], "the folder was replaced"


def test_evaluating_leaves_the_dense_model_alone(small: Trial, problem: Problem) -> None:
    assert problem.model.weights is not None
    before = load_file(problem.model.weights)
    after = problem.model.build().state_dict()
    assert small.record.measurement.params < sum(tensor.numel() for tensor in before.values())
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())


BAD: list[Any] = [
    pytest.param(
        CompressionPlan(quantize=Quantization(bits={"conv1": 16, "fc1": 32})), "share one float format", id="two floats"
    ),
    pytest.param(
        CompressionPlan(finetune=Finetuning(learning_rate=1e30, distillation_weight=0)), "finite", id="diverges"
    ),
]


@pytest.mark.parametrize(("plan", "message"), BAD)
def test_failed_trials_leave_no_folder(
    evaluator: Evaluator, tmp_path: Path, plan: CompressionPlan, message: str
) -> None:
    with pytest.raises(TrialError, match=message):
        evaluator.evaluate(plan, tmp_path / "trial", seed=0, epochs=2)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_trial_leaves_the_older_artifact(evaluator: Evaluator, small: Trial) -> None:
    before = (small.folder / CARD).read_bytes()
    with pytest.raises(TrialError):
        evaluator.evaluate(BAD[0].values[0], small.folder, seed=0)
    assert (small.folder / CARD).read_bytes() == before
    artifact.verify_files(small.folder)


def test_a_layer_in_another_width_fails_the_trial(
    evaluator: Evaluator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the reason: what the runtime says of the compiled model counts."""
    load = OpenVINO.load

    def load_without_kernels(self: OpenVINO, path: Path, options: LoadOptions) -> Any:
        session = load(self, path, options)
        reports = {**session.layers(), "conv2": LayerReport(32, 0.0)}
        monkeypatch.setattr(session, "layers", lambda: reports)
        return session

    monkeypatch.setattr(OpenVINO, "load", load_without_kernels)
    plan = CompressionPlan(quantize=Quantization(bits={"conv2": 5}))
    with pytest.raises(TrialError, match="conv2 was to run in 5 bits, stored in 8, and runs in 32"):
        evaluator.evaluate(plan, tmp_path / "trial", seed=0)
    assert list(tmp_path.iterdir()) == []


def test_few_bits_run_in_their_container(evaluator: Evaluator, tmp_path: Path) -> None:
    plan = CompressionPlan(quantize=Quantization(bits={"conv2": 5, "fc1": 8}))
    record = evaluator.evaluate(plan, tmp_path / "trial", seed=0, epochs=0)
    assert record.main.executed == {"conv1": 32, "conv2": 8, "fc1": 8, "fc2": 32}


def test_another_teacher_teaches(problem: Problem, baseline: Baseline, tmp_path: Path) -> None:
    plan = CompressionPlan(finetune=Finetuning(learning_rate=1e-3, distillation_weight=1.0))
    other = replace(problem, teachers=(ModelSource("tests.nets:PlainCNN"),))
    torch.manual_seed(1)
    for name, known in (("own", problem), ("other", other)):
        Evaluator(known, baseline).evaluate(plan, tmp_path / name, seed=0)
    weights = [load_file(tmp_path / name / WEIGHTS)["fc2.weight"] for name in ("own", "other")]
    assert not torch.equal(weights[0], weights[1])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["changed", "missing"])
def test_tampering_is_noticed(small: Trial, tmp_path: Path, name: str, harm: str) -> None:
    for file in small.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    artifact.verify_files(tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / name).write_bytes(content) if harm == "changed" else (tmp_path / name).unlink()
    with pytest.raises(ParetuneError, match=f"{name} must have the SHA-256"):
        artifact.verify_files(tmp_path)


def test_folders_without_a_card_are_no_artifacts(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"must be a folder with a card\.json"):
        Card.read(tmp_path)


def test_cards_of_other_schemas_are_refused(small: Trial, tmp_path: Path) -> None:
    data = json.loads((small.folder / CARD).read_text())
    assert data["schema"] == 2
    (tmp_path / CARD).write_text(json.dumps(data | {"schema": 1}))
    with pytest.raises(JobError, match="must have schema 2"):
        Card.read(tmp_path)


def test_baseline(baseline: Baseline, problem: Problem, trained: torch.nn.Module) -> None:
    measured = baseline.measurement.main
    assert baseline.float_bits == {"": 32}
    assert baseline.measurement.is_finite()
    assert 0 < measured.latency_low_ms <= measured.latency_ms <= measured.latency_high_ms
    assert baseline.measurement.params == problem.analyse().params
    validation = problem.splits.validation
    assert isinstance(validation.inputs, Tensor)
    with torch.no_grad():
        accuracy = problem.task.metric(trained(validation.inputs), validation.targets)
    assert measured.accuracy == pytest.approx(accuracy, abs=0.005)
    assert baseline.to_dict() == {"format": "f32", "validation": baseline.measurement.to_dict()}
    assert Card.read(baseline.folder).plan_hash == CompressionPlan().hash
    assert probe_difference(baseline.folder) == 0.0
    assert baseline.session().run(problem.batch(8)).shape == (8, 10)


def test_baseline_picks_among_the_formats_of_the_runtime(problem: Problem, tmp_path: Path) -> None:
    made = make_baseline(problem, problem.analyse(), tmp_path / "run" / "baseline")
    formats = get_runtime("openvino").capabilities("cpu").float_formats
    assert made.to_dict()["format"] == formats[made.float_bits[""]]
    assert probe_difference(made.folder) == 0.0
    assert [path.name for path in made.folder.parent.iterdir()] == ["baseline"]


def test_profile(problem: Problem, baseline: Baseline) -> None:
    shares = profile_layers(problem, baseline)
    layers = {name: shares[name] for name in LAYERS}
    assert layers["conv1"] > 0
    assert layers["conv2"] > 0
    assert sum(layers.values()) <= 1.2, "medians of shares, which needn't add up exactly"
    assert all(0 <= share <= 1 for share in shares.values())


def test_probed_widths_are_those_that_the_runtime_executes(problem: Problem, baseline: Baseline) -> None:
    analysis = problem.analyse()
    executed = get_runtime("openvino").capabilities("cpu").integer_bits
    probed = probe_widths(problem, analysis, baseline)
    # None of the layers is large enough for weights in blocks of 4 bits to pay.
    assert probed == {
        layer.name: (32, *(bits for bits in executed[layer.kind] if bits == 8)) for layer in analysis.layers
    }
    known = profile(problem, baseline, analysis)
    assert known.widths == probed
    assert set(LAYERS) <= known.latency_share.keys()
    assert replace(known, widths={}, latency_share={}) == analysis


def test_verification_scores_both_splits_and_rewrites_the_cards(
    evaluator: Evaluator, problem: Problem, baseline: Baseline, small: Trial, dense: Trial, tmp_path: Path
) -> None:
    trials = (small, dense)
    originals = (baseline.folder, small.folder, dense.folder)
    folders = [shutil.copytree(original, tmp_path / original.name) for original in originals]
    found = evaluator.verify(folders, rounds=2)
    assert [verified.folder for verified in found] == folders
    for verified in found:
        card = Card.read(verified.folder)
        assert card.metrics == {"validation": verified.validation.to_dict(), "test": verified.test.to_dict()}
        scored = artifact_outputs(get_runtime("openvino"), verified.folder / MODEL, LoadOptions(1), problem.splits.test)
        test = verified.test.main
        assert test.accuracy == problem.task.metric(*scored)
        assert test.latency_low_ms <= test.latency_ms <= test.latency_high_ms
        assert replace(test, accuracy=0.0) == replace(verified.validation.main, accuracy=0.0)
        assert verified.test.is_finite()
        artifact.verify_files(verified.folder)
    for trial, verified in zip(trials, found[1:], strict=True):
        assert verified.validation.main.accuracy == trial.record.measurement.main.accuracy, "as before"
        before = Card.read(trial.folder)
        assert replace(Card.read(verified.folder), metrics=before.metrics) == before


def test_stopwatch_adds_up() -> None:
    watch = Stopwatch()
    for _ in range(2):
        with watch.phase("train"):
            first = watch.seconds.get("train", 0.0)
    assert watch.seconds["train"] > first >= 0
    with pytest.raises(ZeroDivisionError), watch.phase("score"):
        raise ZeroDivisionError
    assert watch.seconds.keys() == {"train", "score"}


@pytest.fixture(scope="module")
def two_targets(problem: Problem) -> Problem:
    return replace(problem, others={"big": Target("openvino", batch_size=32), "ort": Target("onnxruntime")})


@pytest.fixture(scope="module")
def two_baselines(two_targets: Problem, tmp_path_factory: pytest.TempPathFactory) -> Baseline:
    folder = tmp_path_factory.mktemp("targets") / "baseline"
    return make_baseline(two_targets, two_targets.analyse(), folder, float_bits=(32,))


def test_one_training_serves_every_target(two_targets: Problem, two_baselines: Baseline, tmp_path: Path) -> None:
    names = {"", "big", "ort"}
    evaluator = Evaluator(two_targets, two_baselines)
    record = evaluator.evaluate(SMALL, tmp_path / "trial", seed=0)
    assert record.measurement.on.keys() == record.deployments.keys() == names
    assert record.measurement.is_finite()
    assert len({on.latency_ms for on in record.measurement.on.values()}) == 3
    assert all(deployment.executed["conv2"] == 8 for deployment in record.deployments.values())
    card = Card.read(tmp_path / "trial")
    models = {name: deployed.model for name, deployed in card.deployed.items()}
    assert models == {"": MODEL, "big": MODEL, "ort": "model@ort.onnx"}, "one runtime needs one file"
    assert card.files.keys() == {PLAN, WEIGHTS, PROBE, *models.values()}
    batches = {name: deployed.target.batch_size for name, deployed in card.deployed.items()}
    assert batches == {"": 8, "big": 32, "ort": 1}
    for name in names:
        session = artifact.load_session(tmp_path / "trial", name)
        assert session.run(two_targets.batch(batches[name])).shape == (batches[name], 10)
    verified = evaluator.verify([tmp_path / "trial"], rounds=1)[0]
    assert verified.test.on.keys() == names
    assert len({on.latency_ms for on in verified.test.on.values()}) == 3


def test_baselines_of_every_target(two_baselines: Baseline) -> None:
    assert two_baselines.float_bits.keys() == {"", "big", "ort"}
    assert two_baselines.float_bits["ort"] == 32
    described = two_baselines.to_dict()
    assert (described["format"], described["format@ort"]) == ("f32", "f32")
    assert described["validation"]["latency_ms@big"] > 0


def test_layers_get_the_widths_that_every_target_runs(two_targets: Problem, two_baselines: Baseline) -> None:
    probed = probe_widths(two_targets, two_targets.analyse(), two_baselines)
    capabilities = [site.capabilities for site in two_targets.sites.values()]
    for layer in two_targets.analyse().layers:
        assert probed[layer.name][0] == 32
        assert all(set(probed[layer.name][1:]) <= set(known.widths(layer.kind)) for known in capabilities)
    assert probed["conv2"] == (32, 8)


def test_what_a_runtime_refuses_in_a_width_stays_in_floats(
    problem: Problem, baseline: Baseline, monkeypatch: pytest.MonkeyPatch
) -> None:
    deploy = OpenVINO.deploy

    def picky(self: OpenVINO, module: torch.nn.Module, inputs: Any, path: Path) -> None:
        if isinstance(module.get_submodule("conv2"), QuantizedLayer):
            raise RuntimeError("no conv2 of mine")
        deploy(self, module, inputs, path)

    monkeypatch.setattr(OpenVINO, "deploy", picky)
    probed = probe_widths(problem, problem.analyse(), baseline)
    assert probed == {"conv1": (32, 8), "conv2": (32,), "fc1": (32, 8), "fc2": (32, 8)}


class Slim(nn.Module):
    """A lighter architecture for the digits."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.head = nn.Linear(16 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.first(x)))
        out: Tensor = self.head(torch.relu(self.second(x)).flatten(1))
        return out


def slim() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Slim()


@pytest.fixture(scope="module")
def with_variant(problem: Problem) -> Problem:
    return replace(problem, variants={"slim": ModelSource(slim)})


EVERYTHING = CompressionPlan(
    prune=Pruning(ratios={"conv2": 0.25, "fc1": 0.25}, importance="hessian"),
    factorize=Factorization(ranks={"conv2": 0.375}),
    sparsify=Sparsification(sparsity={"fc1": 0.5}, pattern="2:4"),
    share=Sharing(clusters={"fc1": 16, "conv1": 16}),
    quantize=Quantization(
        bits={"conv1": 32, "conv2": 8, "fc1": 8, "fc2": 4},
        observer="percentile",
        aware=True,
        granularity="per-tensor",
    ),
    schedule=Schedule(shape="cubic", steps=3),
    finetune=Finetuning(learning_rate=3e-3, distillation_weight=0.5),
)
PLANS: list[Any] = [
    pytest.param(EVERYTHING, id="everything"),
    pytest.param(
        CompressionPlan(
            variant="slim",
            prune=Pruning(ratios={"first": 0.5}),
            factorize=Factorization(ranks={"head": 0.25}),
            quantize=Quantization(bits={"first": 32, "second": 8, "head": 8}),
            finetune=Finetuning(learning_rate=1e-2),
        ),
        id="variant",
    ),
    pytest.param(CompressionPlan(variant="slim"), id="dense variant"),
    pytest.param(
        CompressionPlan(
            variant="slim",
            prune=Pruning(ratio=0.4),
            sparsify=Sparsification(threshold=0.5),
            quantize=Quantization(bits={"second": 4, "head": 8}, activations="float", affine=True, aware=False),
        ),
        id="variant by rules",
    ),
    pytest.param(
        CompressionPlan(
            prune=Pruning(ratio=0.3),
            factorize=Factorization(energy=0.8, method="spatial"),
            schedule=Schedule(shape="coarse-fine", steps=2),
            quantize=Quantization(bits={"conv2": 8, "fc1": 8}, observer="mse"),
        ),
        id="by rules in cuts",
    ),
]


@pytest.mark.parametrize("plan", PLANS)
def test_every_kind_of_trial_gives_an_artifact_that_is_replayed(
    with_variant: Problem, baseline: Baseline, plan: CompressionPlan, tmp_path: Path
) -> None:
    evaluator, folder = Evaluator(with_variant, baseline), tmp_path / "trial"
    outline = evaluator.outline(plan, seed=0)
    record = evaluator.evaluate(plan, folder, seed=0)
    assert record.measurement.is_finite()
    artifact.verify_files(folder)
    assert probe_difference(folder) == 0.0
    stored = CompressionPlan.from_json((folder / PLAN).read_text())
    assert stored.is_resolved
    assert Card.read(folder).plan_hash == stored.hash
    assert stored == plan or not plan.is_resolved
    module = load_module(folder, with_variant)
    split = with_variant.splits.validation
    outputs, _ = artifact_outputs(get_runtime("openvino"), folder / MODEL, LoadOptions(8), split)
    with torch.no_grad():
        expected = call(module, split.inputs)
    assert (outputs.argmax(1) == expected.argmax(1)).double().mean() >= 0.99
    # Its own parameters, whatever stands around them: quantizers have none.
    pruned = record.measurement.params
    norms = sum(p.numel() for p in with_variant.of(plan.variant).model.build().parameters() if p.dim() == 1)
    assert abs(sum(parameter.numel() for parameter in module.parameters()) - pruned) <= norms
    assert (outline["params"], outline["macs"]) == (pruned, record.measurement.macs)
    packed = folder / f"{MODEL}.packed"
    assert packed.is_file() == stored.is_packable
    assert outline["size_bytes"] == pytest.approx(record.measurement.main.size_bytes, rel=0.1 * stored.is_packable)
    assert outline["latency_ms"] > 0
    for name, bits in stored.quantize.bits.items():
        parts = module.get_submodule(name)
        layers = list(parts.children()) if isinstance(parts, Factorized) else [parts]
        assert all(isinstance(layer, QuantizedLayer) == (bits <= 8) for layer in layers)


def test_the_executed_widths_of_everything(evaluator: Evaluator, tmp_path: Path) -> None:
    record = evaluator.evaluate(EVERYTHING, tmp_path / "trial", seed=0, epochs=2)
    assert record.main.executed == {
        **{"conv1": 32, "fc1": 8, "fc2": 8},
        **{f"conv2.{factor}": 8 for factor in range(3)},
    }
    assert record.measurement.main.accuracy > 0.8
    module = load_module(tmp_path / "trial", evaluator._problem)
    (weight,) = weights_of(module, "fc1")
    assert ((weight.view(len(weight), -1, 4) == 0).sum(2) >= 2).all(), "2:4 after the training, in the artifact"
    assert len(torch.unique(weight)) <= 16
    assert len(weight) == 24
    assert len(torch.unique(weights_of(module, "conv1")[0])) <= 16


def test_cuts_end_at_the_ratios_of_the_plan(evaluator: Evaluator, problem: Problem, tmp_path: Path) -> None:
    plan = SMALL.model_copy(
        update={"schedule": Schedule(shape="linear", steps=3), "sparsify": Sparsification(sparsity={"fc1": 0.75})}
    )
    evaluator.evaluate(plan, tmp_path / "trial", seed=0, epochs=2)
    module = load_module(tmp_path / "trial", problem)
    (conv,), (linear,) = weights_of(module, "conv2"), weights_of(module, "fc1")
    assert (len(conv), len(linear)) == (16, 24)
    assert int((linear == 0).sum()) == 0.75 * linear.numel()


@pytest.mark.parametrize(
    "section",
    [
        pytest.param({"sparsify": {"sparsity": {"conv2": 0.8, "fc1": 0.8}}}, id="zeros"),
        pytest.param({"share": {"clusters": {"conv2": 16, "fc1": 16}}}, id="codebooks"),
        pytest.param({"quantize": {"bits": {"conv2": 3, "fc1": 3}}}, id="few bits"),
    ],
)
def test_packed_files_are_smaller_and_whole(
    evaluator: Evaluator, dense: Trial, section: dict[str, Any], tmp_path: Path
) -> None:
    plan, folder = CompressionPlan.model_validate(section), tmp_path / "trial"
    record = evaluator.evaluate(plan, folder, seed=0)
    packed = folder / f"{MODEL}.packed"
    size = record.measurement.main.size_bytes
    assert size == packed.stat().st_size < (folder / MODEL).stat().st_size
    assert size < 0.65 * dense.record.measurement.main.size_bytes
    assert packed.name in Card.read(folder).files
    unpack(packed, tmp_path / MODEL)
    assert (tmp_path / MODEL).read_bytes() == (folder / MODEL).read_bytes()
    packed.write_bytes(packed.read_bytes()[:-1])
    with pytest.raises(ParetuneError, match=r"model\.onnx\.packed must have the SHA-256"):
        artifact.verify_files(folder)


def test_what_doesnt_take_few_bits_isnt_packed(small: Trial) -> None:
    assert not small.plan.is_packable
    assert not list(small.folder.glob("*.packed"))


def test_pruned_first_and_quantized_then_keeps_what_both_keep(evaluator: Evaluator, tmp_path: Path) -> None:
    prune = {"ratios": {"conv2": 0.5, "fc1": 0.5}}
    quantize = {"bits": dict.fromkeys(LAYERS, 8)}
    finetune = {"learning_rate": 3e-3, "distillation_weight": 0.5}
    sections: dict[str, dict[str, Any]] = {"pruned": {"prune": prune}, "quantized": {"quantize": quantize}}
    sections["both"] = sections["pruned"] | sections["quantized"]
    accuracy = {
        name: evaluator.evaluate(
            CompressionPlan.model_validate(found | {"finetune": finetune}), tmp_path / name, seed=0, epochs=1
        ).measurement.main.accuracy
        for name, found in sections.items()
    }
    assert accuracy["both"] >= min(accuracy["pruned"], accuracy["quantized"]) - 0.03, accuracy


def test_an_outline_leaves_nothing_and_fails_as_a_trial_does(evaluator: Evaluator) -> None:
    with pytest.raises(TrialError, match="share one float format"):
        evaluator.outline(CompressionPlan(quantize=Quantization(bits={"conv1": 16, "fc1": 32})), seed=0)
    found = evaluator.outline(SMALL, seed=0)
    assert {"params", "macs", "latency_ms", "size_bytes"} <= found.keys()


def test_a_variant_learns_from_the_model(with_variant: Problem) -> None:
    own = with_variant.of("slim")
    assert with_variant.of(None) is with_variant
    assert own is with_variant.of("slim"), "what is found out of it is found out once"
    assert own.teachers == (with_variant.model,)
    assert own.channels == {"first": 16, "second": 16, "head": 10}


def test_an_artifact_can_be_shipped_packed(evaluator: Evaluator, problem: Problem, tmp_path: Path) -> None:
    plan = CompressionPlan(sparsify=Sparsification(sparsity={"conv2": 0.9, "fc1": 0.9}))
    record = evaluator.evaluate(plan, tmp_path / "trial", seed=0)
    model, packed = tmp_path / "trial" / MODEL, tmp_path / "trial" / f"{MODEL}.packed"
    assert record.measurement.main.size_bytes == packed.stat().st_size < model.stat().st_size / 2
    model.unlink()
    assert probe_difference(tmp_path / "trial") == 0.0
    assert model.is_file()
