"""Which machines measure alike."""

from typing import Any

import pytest

from paretune.objectives.environment import environment
from paretune.search.cluster.hardware import differences, hardware

BOX: dict[str, Any] = {
    "processor": "AMD EPYC 7763",
    "cores": 8,
    "memory_gib": 31.3,
    "governor": "performance",
    "load": 0.2,
    "openvino": "2026.1.0",
    "gpu 0": {"name": "NVIDIA H200", "driver": "580.1", "temperature_c": 40},
}


def test_this_machine_is_like_itself() -> None:
    assert differences(hardware(environment()), hardware(environment())) == []


@pytest.mark.parametrize(
    "changed",
    [
        {"load": 7.5},
        {"memory_gib": 30.9},
        {"optuna": "5.1"},
        {"gpu 0": {"name": "NVIDIA H200", "driver": "580.1", "temperature_c": 71}},
        {"gpu 1": {"name": "NVIDIA A100"}},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_changes_nothing(changed: dict[str, Any]) -> None:
    assert differences(hardware(BOX), hardware(BOX | changed)) == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"processor": "Intel N100"}, "processor is Intel N100, not AMD EPYC 7763"),
        ({"cores": 4}, "cores is 4, not 8"),
        ({"memory_gib": 15.6}, "memory_gib is 15.6, not 31.3"),
        ({"openvino": "2026.2.0"}, "openvino is 2026.2.0, not 2026.1.0"),
        ({"gpu 0": {"name": "NVIDIA A100", "driver": "580.1"}}, "gpu 0 is NVIDIA A100, driver 580.1, not NVIDIA H200"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_makes_a_difference(changed: dict[str, Any], words: str) -> None:
    (found,) = differences(hardware(BOX), hardware(BOX | changed))
    assert found.startswith(words)
