"""The records of a trial travel as JSON and come back."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from paretune.objectives.latency import Latency
from paretune.objectives.measurement import Measurement, Record

CLOCK = Latency(1.0, 0.9, 1.1, 0.95, 2.0, 2.0, 1.9, 2.1, 100)

MEASUREMENT = Measurement(0.9, 1.0, 0.9, 1.1, 2.0, 1000, 500, 10_000)
RECORD = Record(MEASUREMENT, 1.2, 1000, {"conv": 8, "fc": 32}, CLOCK, {"train": 3.5}, noisy=True)


def test_round_trip() -> None:
    assert Record.from_dict(json.loads(json.dumps(RECORD.to_dict()))) == RECORD
    assert Measurement(**MEASUREMENT.to_dict()) == MEASUREMENT


@pytest.mark.parametrize("name", ["accuracy", "latency_ms", "latency_low_ms", "latency_high_ms", "speedup"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_every_number_must_be_finite(name: str, value: float) -> None:
    assert MEASUREMENT.is_finite()
    assert not replace(MEASUREMENT, **{name: value}).is_finite()
