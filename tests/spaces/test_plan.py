"""The plan's canonical form, its hash, and all that it refuses."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from pydantic import ValidationError

from paretune.errors import JobError
from paretune.spaces.plan import CompressionPlan, Finetuning, Pruning, Quantization

PLAN = CompressionPlan(
    prune=Pruning(ratios={"conv2": 0.25, "conv1": 0.5}, importance="taylor"),
    quantize=Quantization(bits={"fc": 8, "conv1": 32}),
    finetune=Finetuning(learning_rate=0.01, temperature=2.0, distillation_weight=0.75),
)


def test_json_is_canonical() -> None:
    assert json.loads(PLAN.to_json()) == {
        "schema": 1,
        "prune": {"ratios": {"conv1": 0.5, "conv2": 0.25}, "importance": "taylor"},
        "quantize": {"bits": {"conv1": 32, "fc": 8}},
        "finetune": {"learning_rate": 0.01, "temperature": 2.0, "distillation_weight": 0.75},
    }
    assert list(json.loads(PLAN.to_json())) == ["finetune", "prune", "quantize", "schema"]
    assert "\n" not in PLAN.to_json(indent=None)
    assert json.loads(PLAN.to_json(indent=None)) == PLAN.to_dict()


@pytest.mark.parametrize(
    "ratios",
    [
        pytest.param({"conv1": 0.5, "conv2": 0.25}, id="order of keys"),
        pytest.param({"conv2": 0.25, "conv1": 0.5, "conv3": 0.0}, id="a ratio of zero"),
        pytest.param({"conv2": 0.25, "conv1": 0.5, "conv3": 4e-7}, id="a ratio that rounds to zero"),
        pytest.param({"conv2": 0.25, "conv1": 0.5, "conv3": -1e-9}, id="a negative zero"),
        pytest.param({"conv2": 0.2500003, "conv1": 0.4999999}, id="the seventh digit"),
    ],
)
def test_equal_plans_have_equal_hashes(ratios: dict[str, float]) -> None:
    plan = CompressionPlan(
        prune=Pruning(ratios=ratios, importance="taylor"), quantize=PLAN.quantize, finetune=PLAN.finetune
    )
    assert plan.to_json() == PLAN.to_json()
    assert plan.hash == PLAN.hash


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(PLAN.model_copy(update={"prune": Pruning()}), id="ratios"),
        pytest.param(PLAN.model_copy(update={"prune": Pruning(ratios=PLAN.prune.ratios)}), id="importance"),
        pytest.param(PLAN.model_copy(update={"quantize": Quantization(bits={"fc": 8})}), id="bits"),
        pytest.param(PLAN.model_copy(update={"finetune": Finetuning()}), id="fine-tuning"),
    ],
)
def test_other_plans_have_other_hashes(other: CompressionPlan) -> None:
    assert other.hash != PLAN.hash
    assert len(other.hash) == 64


def test_the_hash_of_the_dense_plan_is_fixed() -> None:
    """It is stored in artifacts: a change of it needs a new schema."""
    assert CompressionPlan().hash == "549a2cb3c21f8de2f6e39c5a264798b090abfb3b7f21405aa91acd0d04e4683c"


@pytest.mark.parametrize(
    "plan", [pytest.param(PLAN, id="everything"), pytest.param(CompressionPlan(), id="nothing but defaults")]
)
def test_round_trip(plan: CompressionPlan) -> None:
    read = CompressionPlan.from_json(plan.to_json())
    assert read == plan
    assert read.hash == plan.hash


def test_plans_are_frozen() -> None:
    with pytest.raises(ValidationError):
        PLAN.prune = Pruning()  # type: ignore[misc]
    with pytest.raises(ValidationError):
        PLAN.finetune.temperature = 1.0  # type: ignore[misc]


BAD: list[Any] = [
    pytest.param({"prune": {"ratios": {"conv": 1.0}}}, "prune.ratios.conv", id="ratio of one"),
    pytest.param({"prune": {"ratios": {"conv": 0.9999999}}}, "prune.ratios.conv", id="ratio that rounds to one"),
    pytest.param({"prune": {"ratios": {"conv": -0.1}}}, "prune.ratios.conv", id="negative ratio"),
    pytest.param({"prune": {"ratios": {"conv": math.nan}}}, "prune.ratios.conv", id="ratio NaN"),
    pytest.param({"prune": {"ratios": {"conv": "much"}}}, "prune.ratios.conv", id="ratio in words"),
    pytest.param({"prune": {"ratios": {"conv": None}}}, "prune.ratios.conv", id="no ratio"),
    pytest.param({"prune": {"ratios": [0.5]}}, "prune.ratios", id="ratios without names"),
    pytest.param({"prune": {"importance": "l3"}}, "prune.importance", id="unknown importance"),
    pytest.param({"quantize": {"bits": {"conv": 1}}}, "quantize.bits.conv", id="one bit"),
    pytest.param({"quantize": {"bits": {"conv": 64}}}, "quantize.bits.conv", id="64 bits"),
    pytest.param({"quantize": {"bits": {"conv": 7.5}}}, "quantize.bits.conv", id="half a bit"),
    pytest.param({"finetune": {"learning_rate": 0}}, "finetune.learning_rate", id="no learning"),
    pytest.param({"finetune": {"learning_rate": math.inf}}, "finetune.learning_rate", id="infinite learning rate"),
    pytest.param({"finetune": {"temperature": 0.5}}, "finetune.temperature", id="cold teacher"),
    pytest.param({"finetune": {"distillation_weight": 1.5}}, "finetune.distillation_weight", id="too much teacher"),
    pytest.param({"finetune": {"distillation_weight": -0.5}}, "finetune.distillation_weight", id="negative weight"),
    pytest.param({"finetune": {"learningrate": 0.1}}, "finetune.learningrate", id="unknown key within"),
    pytest.param({"sparsity": {}}, "sparsity", id="unknown key"),
    pytest.param({"schema": 2}, "schema", id="schema of the future"),
    pytest.param({"schema_version": 1}, "schema_version", id="python's name of the schema"),
]


@pytest.mark.parametrize(("data", "where"), BAD)
def test_wrong_plans_are_rejected(data: dict[str, Any], where: str) -> None:
    with pytest.raises(JobError, match="must be a compression plan of schema 1") as caught:
        CompressionPlan.from_json(json.dumps(data))
    assert where in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3"])
def test_other_json_is_rejected(text: str) -> None:
    with pytest.raises(JobError, match=r"use a plan\.json of a run"):
        CompressionPlan.from_json(text)
