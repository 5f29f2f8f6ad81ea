"""The plan's canonical form, its hash, and all that it refuses."""

from __future__ import annotations

import json
import math
import random
from typing import Any, get_args

import pytest
from pydantic import ValidationError

from paretune.errors import JobError
from paretune.spaces.plan import (
    CompressionPlan,
    Factorization,
    Finetuning,
    Importance,
    Method,
    Observer,
    Pruning,
    Quantization,
    Schedule,
    Shape,
    Sharing,
    Sparsification,
)

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


def test_the_hashes_of_older_plans_are_fixed() -> None:
    """They are stored in artifacts: a change of them needs a new schema."""
    assert CompressionPlan().hash == "549a2cb3c21f8de2f6e39c5a264798b090abfb3b7f21405aa91acd0d04e4683c"
    assert PLAN.hash == "57931785f3900ed465fa056c94de1a6929e540a369ef1c32708780ba680126f8"


@pytest.mark.parametrize(
    "sections",
    [
        pytest.param({"sparsify": {"sparsity": {"fc": 0.0}}}, id="no zeros"),
        pytest.param({"share": {"clusters": {}}, "factorize": {"ranks": {}}}, id="no layers"),
        pytest.param({"schedule": {"shape": "one-shot", "steps": 1}, "variant": None}, id="defaults"),
        pytest.param({"quantize": {"bits": {}, "observer": "minmax", "aware": True, "affine": False}}, id="quantizers"),
        pytest.param({"finetune": {"hint_weight": 0}}, id="no hints"),
    ],
)
def test_what_does_nothing_is_left_out(sections: dict[str, Any]) -> None:
    assert CompressionPlan.model_validate(sections).to_dict() == CompressionPlan().to_dict()


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


LAYERS = ("stem", "block.0", "block.1", "head")


def random_plan(rng: random.Random) -> CompressionPlan:
    """Any legal plan, whatever it leaves to the weights."""

    def some(*values: Any) -> dict[str, Any]:
        return {name: rng.choice(values) for name in LAYERS if rng.random() < 0.5}

    ranks = some(0.125, 0.4, 0.999999)
    whole = [name for name in LAYERS if name not in ranks]
    bits = some(32, 8, 4, 2)
    pattern = rng.choice(["unstructured", "2:4", "1:8"])
    share = {"unstructured": 0.3, "2:4": 0.5, "1:8": 0.875}[pattern]
    activations = rng.choice(["quantized", "float"])
    shape = rng.choice(get_args(Shape))
    return CompressionPlan(
        variant=rng.choice([None, "slim"]),
        prune=Pruning(importance=rng.choice(get_args(Importance)), **rng.choice(
            [{"ratios": some(0.25, 0.0, 1 / 3)}, {"ratio": 0.5}, {"threshold": 0.7}]
        )),
        factorize=Factorization(ranks=ranks, method=rng.choice(get_args(Method))),
        sparsify=Sparsification(sparsity=dict.fromkeys(whole, share), pattern=pattern),
        share=Sharing(clusters={name: 16 for name in LAYERS if bits.get(name, 32) > 8}),
        quantize=Quantization(
            bits=bits,
            observer=rng.choice(get_args(Observer)),
            aware=rng.random() < 0.5,
            activations=activations,
            granularity=rng.choice(["per-channel", "per-tensor"]),
            affine=activations == "float" and rng.random() < 0.5,
        ),
        schedule=Schedule(shape=shape, steps=1 if shape == "one-shot" else rng.randint(2, 9)),
        finetune=Finetuning(learning_rate=rng.uniform(1e-4, 1e-2), hint_weight=rng.choice([0.0, 0.3])),
    )  # fmt: skip


def test_random_plans_round_trip() -> None:
    rng, hashes = random.Random(0), set()
    for _ in range(300):
        plan = random_plan(rng)
        read = CompressionPlan.from_json(plan.to_json())
        assert read.to_json() == plan.to_json()
        assert CompressionPlan.model_validate(plan.to_dict()).hash == read.hash == plan.hash
        assert {**plan.prune.ratios} == {**read.prune.ratios, **{n: 0 for n, r in plan.prune.ratios.items() if r == 0}}
        assert plan.model_copy(update={"prune": read.prune}) == read, "but for ratios of zero nothing is lost"
        hashes.add(plan.hash)
    assert len(hashes) == 300


CONFLICTS: list[Any] = [
    pytest.param(
        {"share": {"clusters": {"a": 16}}, "quantize": {"bits": {"a": 4}}},
        "a must not be both shared and quantized to 4 bits",
        id="codebook and few bits",
    ),
    pytest.param(
        {"share": {"clusters": {"a": 16}}, "quantize": {"bits": {"a": 4}, "granularity": "per-tensor"}},
        "quantized to 4 bits",
        id="few bits per tensor",
    ),
    pytest.param(
        {"share": {"clusters": {"a": 16}}, "quantize": {"bits": {"a": 8}}},
        "a must not be both shared and quantized per channel",
        id="codebook and scales",
    ),
    pytest.param(
        {"factorize": {"ranks": {"a": 0.5}}, "sparsify": {"sparsity": {"a": 0.5}}},
        "a must not be both factorized and sparse",
        id="factors and zeros",
    ),
    pytest.param(
        {"factorize": {"ranks": {"a": 0.5}}, "sparsify": {"ratio": 0.5}},
        "sparsify.ratio, which takes all layers",
        id="factors and a ratio of zeros",
    ),
    pytest.param(
        {"factorize": {"energy": 0.9}, "sparsify": {"threshold": 0.5}},
        "sparsify.threshold, which takes all layers",
        id="energy and a threshold",
    ),
    pytest.param({"quantize": {"affine": True}}, "affine must be false where activations are quantized", id="affine"),
    pytest.param(
        {"prune": {"ratio": 0.5, "threshold": 0.5}}, "at most one of ratios, ratio, threshold", id="two rules to prune"
    ),
    pytest.param({"prune": {"ratio": 0.5, "ratios": {"a": 0.5}}}, "ratios and ratio", id="ratio beside ratios"),
    pytest.param({"factorize": {"energy": 0.9, "ranks": {"a": 0.5}}}, "ranks and energy", id="energy beside ranks"),
    pytest.param(
        {"sparsify": {"ratio": 0.9, "sparsity": {"a": 0.5}}}, "sparsity and ratio", id="ratio beside sparsity"
    ),
    pytest.param(
        {"sparsify": {"pattern": "2:4", "sparsity": {"a": 0.6}}},
        "sparsity of a must be 0.5 with the pattern 2:4, but got 0.6",
        id="share of a pattern",
    ),
    pytest.param({"sparsify": {"pattern": "4:4"}}, "N must lie between 0 and M", id="4 of 4"),
    pytest.param({"sparsify": {"pattern": "0:4"}}, "N must lie between 0 and M", id="0 of 4"),
    pytest.param(
        {"sparsify": {"pattern": "2:4", "ratio": 0.5}}, "must not stand beside the pattern 2:4", id="pattern and ratio"
    ),
    pytest.param({"sparsify": {"pattern": "2-4"}}, "sparsify.pattern", id="pattern in other words"),
    pytest.param(
        {"schedule": {"shape": "linear"}},
        "steps must be 1 for one-shot and at least 2 otherwise, but got 1",
        id="one cut in steps",
    ),
    pytest.param({"schedule": {"steps": 3}}, "but got 3", id="one shot in three"),
    pytest.param({"factorize": {"ranks": {"a": 1.0}}}, "factorize.ranks.a", id="whole rank"),
    pytest.param({"share": {"clusters": {"a": 1}}}, "share.clusters.a", id="one value"),
    pytest.param({"share": {"clusters": {"a": 257}}}, "share.clusters.a", id="more values than indices"),
]


@pytest.mark.parametrize(("data", "reason"), CONFLICTS)
def test_what_excludes_each_other_is_refused_with_the_reason(data: dict[str, Any], reason: str) -> None:
    with pytest.raises(JobError) as caught:
        CompressionPlan.from_json(json.dumps(data))
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param({"share": {"clusters": {"a": 16}}, "quantize": {"bits": {"a": 16}}}, id="codebook of floats"),
        pytest.param(
            {"share": {"clusters": {"a": 16}}, "quantize": {"bits": {"a": 8}, "granularity": "per-tensor"}},
            id="codebook in one scale",
        ),
        pytest.param({"factorize": {"ranks": {"a": 0.5}}, "sparsify": {"sparsity": {"a": 0.0}}}, id="no zeros"),
        pytest.param({"factorize": {"ranks": {"a": 0.5}}, "sparsify": {"sparsity": {"b": 0.5}}}, id="other layers"),
        pytest.param({"factorize": {"ranks": {"a": 0.5}}, "share": {"clusters": {"a": 4}}}, id="shared factors"),
        pytest.param({"sparsify": {"sparsity": {"a": 0.0, "b": 0.75}, "pattern": "1:4"}}, id="pattern"),
    ],
)
def test_what_can_be_combined(data: dict[str, Any]) -> None:
    assert list(CompressionPlan.from_json(json.dumps(data)).conflicts()) == []


@pytest.mark.parametrize("shape", [shape for shape in get_args(Shape) if shape != "one-shot"])
def test_fractions_ascend_to_one(shape: Shape) -> None:
    for steps in range(2, 101):
        fractions = Schedule(shape=shape, steps=steps).fractions
        assert len(fractions) == steps
        assert fractions[0] > 0
        assert list(fractions) == sorted(set(fractions))
        assert fractions[-1] == 1, "exactly: some techniques wait for the last cut"


def test_fractions_of_the_papers() -> None:
    assert Schedule().fractions == (1.0,)
    assert Schedule(shape="linear", steps=4).fractions == (0.25, 0.5, 0.75, 1.0)
    assert Schedule(shape="cubic", steps=2).fractions == (0.875, 1.0)
    assert Schedule(shape="coarse-fine", steps=4).fractions == pytest.approx((0.7, 0.8, 0.9, 1.0))


@pytest.mark.parametrize("text", ["one-shot", "linear:4", "cubic:5", "coarse-fine:2"])
def test_schedules_as_text(text: str) -> None:
    assert str(Schedule.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "linear", "linear:1", "one-shot:2", "cubic:x", "cubic:0", "spiral:3", "cubic:101"]
)
def test_other_text_is_no_schedule(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Schedule.parse(text)


@pytest.mark.parametrize(
    ("data", "resolved", "packable"),
    [
        pytest.param({}, True, False, id="dense"),
        pytest.param({"prune": {"ratio": 0.5}}, False, False, id="ratio"),
        pytest.param({"prune": {"threshold": 0.5}}, False, False, id="threshold"),
        pytest.param({"factorize": {"energy": 0.5}}, False, False, id="energy"),
        pytest.param({"sparsify": {"ratio": 0.5}}, False, False, id="ratio of zeros"),
        pytest.param({"sparsify": {"threshold": 0.5}}, False, False, id="threshold of zeros"),
        pytest.param({"sparsify": {"sparsity": {"a": 0.0}}}, True, False, id="no zeros"),
        pytest.param({"sparsify": {"sparsity": {"a": 0.5}}}, True, True, id="zeros"),
        pytest.param({"share": {"clusters": {"a": 16}}}, True, True, id="codebook"),
        pytest.param({"quantize": {"bits": {"a": 8, "b": 32}}}, True, False, id="8 bits"),
        pytest.param({"quantize": {"bits": {"a": 7, "b": 32}}}, True, True, id="few bits"),
        pytest.param(
            {"prune": {"ratios": {"a": 0.5}}, "factorize": {"ranks": {"a": 0.5}}}, True, False, id="structure"
        ),
    ],
)
def test_resolved_and_packable(data: dict[str, Any], resolved: bool, packable: bool) -> None:
    plan = CompressionPlan.model_validate(data)
    assert (plan.is_resolved, plan.is_packable) == (resolved, packable)
