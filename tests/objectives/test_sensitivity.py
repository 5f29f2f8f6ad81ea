"""Where slack was planted in a net its profile says so, and what can't be done has its reason there."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from paretune.objectives.compress import compress_numerics, compress_structure, resolve_plan
from paretune.objectives.models import ModelSource
from paretune.objectives.problem import Problem
from paretune.objectives.sensitivity import (
    Probe,
    Sensitivity,
    affordable_samples,
    profile_sensitivity,
    validation_batches,
)
from paretune.objectives.tasks import Classification
from paretune.spaces.plan import CompressionPlan, Factorization, Pruning, Quantization, Sharing, Sparsification
from tests.nets import PlainCNN

SAMPLES = 128


def halved(group: str, ratio: float = 0.5) -> Probe:
    plan = CompressionPlan(prune=Pruning(ratios={group: ratio}, importance="random"))
    return Probe("prune", group, f"{ratio:.0%}", ratio, plan)


def pruned(group: str) -> Probe:
    return Probe("prune", group, "by size", 0.5, CompressionPlan(prune=Pruning(ratios={group: 0.5}, importance="l2")))


def quantized(layer: str, bits: int) -> Probe:
    return Probe("quantize", layer, f"{bits} bits", bits, CompressionPlan(quantize=Quantization(bits={layer: bits})))


def factorized(layer: str, share: float) -> Probe:
    config = Factorization(ranks={layer: share}, method="spatial")
    return Probe("factorize", layer, f"{share:.0%}", share, CompressionPlan(factorize=config))


def sparse(layer: str, share: float) -> Probe:
    config = Sparsification(sparsity={layer: share})
    return Probe("sparsify", layer, f"{share:.0%}", share, CompressionPlan(sparsify=config))


def shared(layer: str, clusters: int) -> Probe:
    config = Sharing(clusters={layer: clusters})
    return Probe("share", layer, f"{clusters} values", clusters, CompressionPlan(share=config))


PROBES = (
    pruned("conv1"),
    pruned("conv2"),
    halved("fc1"),
    quantized("fc1", 8),
    factorized("fc1", 0.25),
    factorized("fc2", 0.1),
    sparse("fc1", 0.4),
    sparse("fc1", 0.99),
    shared("conv2", 64),
    shared("conv2", 2),
)


@pytest.fixture(scope="module")
def planted(problem: Problem, trained: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Problem:
    """The digits, on a net half of whose second convolution is dead, and whose hidden layer has rank 8 of 32."""
    model = copy.deepcopy(trained)
    assert isinstance(model, PlainCNN)
    with torch.no_grad():
        model.conv2.weight[16:] *= 1e-3
        model.bn2.weight[16:], model.bn2.bias[16:] = 1e-3, -1.0  # nothing of it passes the rectifier
        left, values, right = torch.linalg.svd(model.fc1.weight, full_matrices=False)
        model.fc1.weight.copy_(left[:, :8] * values[:8] @ right[:8])
    weights = tmp_path_factory.mktemp("planted") / "weights.safetensors"
    save_file(model.state_dict(), weights)
    return replace(problem, model=ModelSource("tests.nets:PlainCNN", weights=weights))


@pytest.fixture(scope="module")
def profile(planted: Problem) -> Sensitivity:
    return profile_sensitivity(planted, PROBES, samples=SAMPLES)


def lost(profile: Sensitivity, technique: str, name: str, value: float) -> float:
    entry = profile.find(technique, name, value)
    assert entry is not None
    assert entry.loss_increase is not None, entry.reason
    return profile.share_lost(entry.loss_increase)


def test_what_is_redundant_costs_nothing_and_what_is_not_costs_much(profile: Sensitivity) -> None:
    assert abs(lost(profile, "prune", "conv2", 0.5)) < 0.001
    assert lost(profile, "prune", "conv1", 0.5) > 0.05
    assert abs(lost(profile, "factorize", "fc1", 0.25)) < 0.001
    assert lost(profile, "factorize", "fc2", 0.1) > 0.05
    assert lost(profile, "quantize", "fc1", 8) < 0.01


@pytest.mark.parametrize(
    ("technique", "name", "mild", "hard"), [("sparsify", "fc1", 0.4, 0.99), ("share", "conv2", 64, 2)]
)
def test_more_of_the_same_costs_more(profile: Sensitivity, technique: str, name: str, mild: float, hard: float) -> None:
    assert lost(profile, technique, name, hard) > 0.02 + max(0.0, lost(profile, technique, name, mild))


def test_losses_and_metrics_are_those_of_the_dense_model_on_the_same_samples(
    planted: Problem, profile: Sensitivity
) -> None:
    samples = validation_batches(planted, SAMPLES)
    inputs = torch.cat([batch.inputs for batch in samples if isinstance(batch.inputs, Tensor)])
    targets = torch.cat([batch.targets for batch in samples])
    with torch.no_grad():
        outputs = planted.model.build()(inputs)
    task = Classification()
    assert profile.samples == len(targets) == SAMPLES
    assert profile.loss == pytest.approx(float(task.loss(outputs, targets)), rel=1e-4)
    assert profile.metric == task.metric(outputs, targets)
    assert profile.uninformed_loss > math.log(10), "no constant answer is better than the even one by much"
    (entry,) = profile_sensitivity(planted, [pruned("conv1")], samples=SAMPLES).entries
    assert entry.metric_drop is not None
    assert entry.metric_drop > 0


def test_records_repeat_whatever_the_order_and_the_generator(planted: Problem, profile: Sensitivity) -> None:
    torch.rand(7)
    state = torch.random.get_rng_state()
    again = profile_sensitivity(planted, PROBES[::-1], samples=SAMPLES)
    assert replace(again, entries=again.entries[::-1]) == profile
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_rule_for_all_channels_is_probed_as_what_comes_of_it(planted: Problem) -> None:
    rule = CompressionPlan(prune=Pruning(ratio=0.4, importance="l2"))
    context = replace(planted.context([]), grids=planted.grids, exclude=planted.exclude)
    resolved = resolve_plan(planted.model.build(), rule, context)
    assert len(resolved.prune.ratios) > 1
    probes = [Probe("prune", "", "40%", 0.4, plan) for plan in (rule, resolved)]
    by_rule, by_ratios = profile_sensitivity(planted, probes, samples=SAMPLES).entries
    assert by_rule.loss_increase
    assert by_rule == by_ratios


def test_a_probe_compresses_as_a_trial_does(planted: Problem, profile: Sensitivity) -> None:
    (probe,) = [probe for probe in PROBES if probe.technique == "quantize"]
    batches = list(planted.splits.train.batches(64, shuffle_seed=0))[: SAMPLES // 64]
    model = compress_structure(planted.model.build(), probe.plan, planted.context(batches))
    model = compress_numerics(model, probe.plan, planted.context(batches))
    samples = validation_batches(planted, SAMPLES)
    with torch.no_grad():
        losses = [Classification().loss(model(batch.inputs), batch.targets) for batch in samples]
    entry = profile.find("quantize", probe.name, probe.value)
    assert entry is not None
    assert entry.loss_increase == pytest.approx(float(torch.stack(losses).mean()) - profile.loss, abs=1e-6)


def test_json_round_trip(profile: Sensitivity) -> None:
    assert Sensitivity.from_dict(json.loads(json.dumps(profile.to_dict(), allow_nan=False))) == profile


class Overflowing(Classification):
    """Has no finite loss for what is far worse than the dense model."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        loss = super().loss(outputs, targets)
        return loss if loss < 1.5 else loss * math.nan


@pytest.mark.parametrize(
    ("probe", "reason"),
    [
        pytest.param(halved("conv9"), "conv9", id="no such group"),
        pytest.param(factorized("bn1", 0.5), "BatchNorm2d", id="not a layer that has factors"),
        pytest.param(quantized("pool", 8), "pool", id="no such layer"),
        pytest.param(shared("conv2", 2), "must be finite", id="loss that isn't finite"),
    ],
)
def test_what_fails_has_its_reason_and_the_rest_its_numbers(planted: Problem, probe: Probe, reason: str) -> None:
    problem = replace(planted, task=Overflowing())
    found = profile_sensitivity(problem, [probe, quantized("fc1", 8)], samples=SAMPLES)
    assert found.uninformed_loss == found.loss, "neither is that of a constant answer finite here"
    failed, fine = found.entries
    assert (failed.loss_increase, failed.metric_drop) == (None, None)
    assert reason in failed.reason
    assert fine.loss_increase is not None
    assert fine.reason == ""


def test_samples_are_drawn_from_the_whole_split(problem: Problem) -> None:
    indices = torch.cat([batch.indices for batch in validation_batches(problem, 20)])
    every = problem.splits.validation.indices
    assert len(indices) == len(indices.unique()) == 20
    assert set(indices.tolist()) <= set(every.tolist())
    assert int(torch.isin(indices, every[: len(every) // 2]).sum()) in range(4, 17)


@pytest.mark.parametrize(
    ("macs", "probes", "samples"),
    [(10_000_000, 100, 512), (40_000_000, 125, 200), (4_000_000_000, 300, 64), (0, 0, 512)],
)
def test_costly_models_are_looked_at_on_fewer_samples(macs: int, probes: int, samples: int) -> None:
    assert affordable_samples(macs, probes) == samples
