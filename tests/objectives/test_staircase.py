"""Channel steps of a target: measured, told from noise, and kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from paretune.objectives.clocks import Array, Clock, WallClock
from paretune.objectives.device import Device
from paretune.objectives.nvml import ClockState
from paretune.objectives.problem import Problem
from paretune.objectives.runtimes import Capabilities, Target, get_runtime
from paretune.objectives.runtimes.openvino import OpenVINO
from paretune.objectives.staircase import (
    Staircase,
    Step,
    affordable,
    fine_counts,
    lower_envelope,
    measure_staircase,
    staircases,
    take_turns,
    useful_counts,
)

TARGET = Target("openvino", batch_size=8)


class Readings(Clock):
    """Gives out what each call returns as its milliseconds."""

    name = "readings"

    def time_pairs(self, candidate: Callable[[], object], baseline: Callable[[], object], pairs: int) -> Array:
        return np.array([[candidate(), baseline()] for _ in range(pairs)], dtype=float)

    def state(self) -> ClockState:
        return ClockState()


@pytest.mark.parametrize(
    ("latencies", "expected"),
    [
        pytest.param({}, (), id="nothing"),
        pytest.param({64: 1.0}, (64,), id="one"),
        pytest.param({32: 1.0, 24: 1.0, 16: 0.5, 31: 2.5}, (16, 32), id="a plateau and a cliff"),
        pytest.param({8: 1.0, 16: 2.0, 24: 3.0}, (8, 16, 24), id="each is faster"),
        pytest.param({60: 0.99, 64: 1.0, 56: 0.975}, (56, 64), id="small gains add up"),
        pytest.param({8: 5.0, 16: 1.0}, (16,), id="fewer channels are slower"),
        pytest.param({16: 0.98, 32: 1.0}, (32,), id="just the margin isn't enough"),
    ],
)
def test_lower_envelope(latencies: dict[int, float], expected: tuple[int, ...]) -> None:
    assert lower_envelope(latencies, 0.02) == expected


@pytest.mark.parametrize(
    ("largest", "expected"),
    [
        pytest.param(1, (1,), id="1"),
        pytest.param(8, (4, 8), id="8"),
        pytest.param(30, (4, 8, 12, 16, 20, 24, 28, 30), id="30"),
        pytest.param(80, (*range(4, 65, 4), 72, 80), id="80"),
        pytest.param(1000, (*range(4, 65, 4), *range(72, 129, 8), *range(144, 257, 16)), id="1000"),
    ],
)
def test_fine_counts(largest: int, expected: tuple[int, ...]) -> None:
    assert fine_counts(largest) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        pytest.param(0.1, [28, 24, 20, 16, 12, 8, 4], id="all"),
        pytest.param(2.0, [24, 16, 8], id="multiples of 8"),
        pytest.param(7.0, [16], id="of 16"),
        pytest.param(100.0, [], id="none"),
    ],
)
def test_a_slow_compiler_gets_fewer_counts(seconds: float, expected: list[int]) -> None:
    assert affordable([28, 24, 20, 16, 12, 8, 4], seconds, budget=8.0) == expected


def test_disturbed_calls_do_not_count() -> None:
    """Others on the machine make most calls slower, each round another count's."""
    rng = np.random.default_rng(0)
    true = {8: 1.0, 16: 1.5, 24: 1.6, 31: 4.0, 32: 1.6}

    def call(milliseconds: float) -> Callable[[], float]:
        def noisy() -> float:
            return milliseconds * float(1 + (rng.random() < 0.8) * rng.random())

        return noisy

    found = take_turns({count: call(value) for count, value in true.items()}, Device("cpu"), Readings())
    assert found == pytest.approx(true, rel=0.01)
    assert lower_envelope(found) == (8, 16, 32)


def test_a_count_that_looks_useless_has_more_turns() -> None:
    """The smaller one is disturbed in its first eight turns, and then shows to be the faster one."""
    calls = {32: 0, 16: 0}

    def steady() -> float:
        calls[32] += 1
        return 20.0

    def disturbed() -> float:
        calls[16] += 1
        return 40.0 if calls[16] <= 16 else 10.0  # a turn is of two calls where they take so long

    found = take_turns({32: steady, 16: disturbed}, Device("cpu"), Readings())
    assert found == {32: 20.0, 16: 10.0}
    assert calls == {32: 12, 16: 18}


def test_openvino_on_this_machine() -> None:
    """Four times the channels take longer, whatever the machine."""
    found = measure_staircase(OpenVINO(), TARGET, "Conv2d", (32, 8), (16, 64))
    assert found.widths == (32, 8)
    for width in found.widths:
        assert found.useful(width) == (16, 64)
        small, large = (step.latency_ms for step in found.steps if step.width == width)
        assert 0 < small < large / 2
    assert found.counts == (16, 64)


@pytest.mark.parametrize("kind", ["Linear", "Conv1d", "Conv3d"])
def test_other_kinds(kind: str) -> None:
    found = measure_staircase(OpenVINO(), replace(TARGET, batch_size=1), kind, (32,), (8, 24))
    assert [(step.width, step.count) for step in found.steps] == [(32, 8), (32, 24)]
    assert found.steps[1].useful


def test_what_does_not_run_in_the_width_is_left_out() -> None:
    class Floats(OpenVINO):
        """Says that bf16 is its float format, and runs f32."""

        def capabilities(self, device: str) -> Capabilities:
            return replace(super().capabilities(device), float_formats={16: "bf16"})

        def load(self, path, options):  # type: ignore[no-untyped-def]
            return super().load(path, replace(options, float_bits=32))

    found = measure_staircase(Floats(), TARGET, "Conv2d", (16, 8), (8, 16))
    assert found.widths == (8,)
    assert found.useful(16) == ()


def test_a_staircase_survives_json() -> None:
    target = replace(TARGET, options={"half": "fp16"})
    found = Staircase("Conv2d", target, (Step(16, 8, 0.5, True), Step(16, 12, 0.5, False), Step(8, 4, 0.1, True)))
    assert Staircase.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    assert (found.widths, found.useful(16), found.counts) == ((16, 8), (8,), (4, 8))


def test_steps_that_were_not_measured_stay_offered() -> None:
    steps = (Step(32, 4, 0.1, True), Step(32, 8, 0.2, False), Step(32, 16, 0.2, True), Step(32, 32, 0.5, True))
    found = {"Conv2d": Staircase("Conv2d", TARGET, steps), "Linear": Staircase("Linear", TARGET, ())}
    assert useful_counts(found) == {"Conv2d": (4, 16, 24, 32)}


def test_those_of_a_model_are_kept(problem: Problem, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    analysis = problem.analyse()
    analysis = replace(analysis, widths={layer.name: (32, 8) for layer in analysis.layers})
    found = staircases(problem.target, analysis, 32)
    kinds = {layer.kind for layer in analysis.layers if layer.group}
    assert found.keys() == kinds
    largest = max(group.channels for group in analysis.groups)
    assert max(max(staircase.counts) for staircase in found.values()) == largest
    assert all(staircase.widths == (32, 8) for staircase in found.values())
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "paretune").iterdir()}
    assert len(files) == len(kinds)
    assert staircases(problem.target, analysis, 32) == found
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "paretune").iterdir()} == files


def test_a_clock_reads_what_the_target_needs() -> None:
    found = take_turns({8: lambda: sum(range(1000))}, Device("cpu"), WallClock())
    assert 0 < found[8] < 100


def test_counts_that_cant_be_quantized_so_are_left_out() -> None:
    found = measure_staircase(get_runtime("openvino"), Target("openvino"), "Linear", (32, 4), (24, 32))
    assert {(step.width, step.count) for step in found.steps} == {(32, 24), (32, 32), (4, 32)}
