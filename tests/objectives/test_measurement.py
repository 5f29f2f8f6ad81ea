"""The records of a trial travel as JSON and come back."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from paretune.objectives.measurement import Measurement, Record
from tests.records import measurement, on_target, record

ONE = measurement(0.9, 1.0)
TWO = replace(ONE, on={**ONE.on, "gpu": replace(on_target(0.89, 0.2), energy_mj=3.5)})


@pytest.mark.parametrize("found", [ONE, TWO], ids=["one target", "two"])
def test_round_trip(found: Measurement) -> None:
    before = record(found, noisy=True)
    assert Record.from_dict(json.loads(json.dumps(before.to_dict()))) == before
    assert Measurement.from_dict(found.to_dict()) == found


def test_values_are_named_after_their_target() -> None:
    found = TWO.to_dict()
    assert found["latency_ms"] == 1.0
    assert found["latency_ms@gpu"] == 0.2
    assert found["energy_mj@gpu"] == 3.5
    assert "energy_mj" not in found, "what wasn't measured isn't there"
    assert ONE.to_dict().keys() < found.keys()


@pytest.mark.parametrize("name", ["accuracy", "latency_ms", "latency_low_ms", "latency_high_ms", "speedup"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("target", ["", "gpu"])
def test_every_number_must_be_finite(name: str, value: float, target: str) -> None:
    assert TWO.is_finite()
    spoilt = replace(TWO.on[target], **{name: value})
    assert not replace(TWO, on={**TWO.on, target: spoilt}).is_finite()


def test_one_noisy_target_makes_a_noisy_trial() -> None:
    quiet = record(TWO)
    assert not quiet.noisy
    deployments = {**quiet.deployments, "gpu": replace(quiet.deployments["gpu"], noisy=True)}
    assert replace(quiet, deployments=deployments).noisy
