"""Throughput, memory and energy of a call; no speed is asserted."""

from __future__ import annotations

import time

import pytest
import torch

from paretune.objectives.usage import Usage, energy_per_call, measure_usage


def test_throughput_on_a_cpu_counts_samples() -> None:
    calls = 0

    def call() -> None:
        nonlocal calls
        calls += 1
        time.sleep(0.001)

    start = time.perf_counter()
    usage = measure_usage(call, batch_size=8, device="cpu", seconds=0.05)
    spent = time.perf_counter() - start
    assert usage == Usage(usage.throughput_per_s, None, None), "memory and energy are a GPU's"
    assert 0 < usage.throughput_per_s <= 8 / 0.001
    assert calls * 8 / usage.throughput_per_s <= 3 * spent, "the rate is that of the calls that were made"


def test_twice_the_batch_is_twice_the_throughput(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def call() -> None:
        nonlocal now
        now += 0.25

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    assert measure_usage(call, batch_size=1, device="cpu").throughput_per_s == 4.0
    assert measure_usage(call, batch_size=2, device="cpu").throughput_per_s == 8.0


@pytest.mark.parametrize(
    ("before", "after", "seconds", "expected"),
    [
        pytest.param(1_000_000, 1_300_000, 1.0, 300.0, id="readable"),
        pytest.param(None, None, 1.0, None, id="not readable"),
        pytest.param(1_000_000, None, 1.0, None, id="lost"),
        pytest.param(1_000_000, 1_000_000, 1.0, None, id="a counter that stands still"),
        pytest.param(1_000_000, 1_300_000, 0.2, None, id="too short"),
    ],
)
def test_energy(before: int | None, after: int | None, seconds: float, expected: float | None) -> None:
    assert energy_per_call(before, after, calls=1000, seconds=seconds) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:Clocks, throttling and energy:RuntimeWarning")
def test_usage_of_a_gpu() -> None:
    matrix = torch.randn(4096, 4096, device="cuda")
    usage = measure_usage(lambda: matrix @ matrix, batch_size=4, device="cuda")
    assert usage.throughput_per_s > 0
    assert usage.peak_memory_bytes is not None
    assert usage.peak_memory_bytes >= 2 * matrix.nbytes, "the factor and the product"
    assert usage.energy_mj is None or usage.energy_mj > 0
