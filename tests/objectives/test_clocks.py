"""Clocks: who is called when, what is inside of a timed span, when a block is spoilt and a warm-up done."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from paretune.errors import JobError
from paretune.objectives.clocks import Clock, CudaClock, WallClock, clock_for, is_spoilt, warm_up
from paretune.objectives.latency import Protocol, measure_paired
from paretune.objectives.nvml import ClockState

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Event:
    """Holds the time at which the GPU passed it; none before that."""

    at: float | None = None

    def elapsed_time(self, end: Event) -> float:
        assert self.at is not None
        assert end.at is not None, "CUDA raises for an event that hasn't been reached"
        return end.at - self.at


class Gpu:
    """CUDA's queue: what is enqueued happens when somebody waits for it, each thing after the one before."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits = 0
        self.events = 0
        self.log: list[str] = []
        self._queue: list[Callable[[], None]] = []

    def kernel(self, name: str, milliseconds: float) -> Callable[[], None]:
        def run() -> None:
            self.log.append(name)
            self.now += milliseconds

        return lambda: self._queue.append(run)

    def new_event(self) -> Event:
        self.events += 1
        return Event()

    def record(self, event: Event) -> None:
        event.at = None

        def reach() -> None:
            event.at = self.now

        self._queue.append(reach)

    def flush(self) -> None:
        self.kernel("flush", 1000.0)()

    def synchronize(self) -> None:
        self.waits += 1
        while self._queue:
            self._queue.pop(0)()


def cuda_clock(gpu: Any) -> CudaClock:
    return CudaClock("cuda", queue=gpu, read=lambda: ClockState(1980, ()))


def test_cuda_times_belong_to_their_sides() -> None:
    gpu = Gpu()
    times = cuda_clock(gpu).time_pairs(gpu.kernel("candidate", 2.0), gpu.kernel("baseline", 5.0), 3)
    assert times.tolist() == [[2.0, 5.0]] * 3, "and the flush isn't in them"


def test_cuda_order_alternates_and_each_call_finds_a_cold_cache() -> None:
    gpu = Gpu()
    cuda_clock(gpu).time_pairs(gpu.kernel("candidate", 2.0), gpu.kernel("baseline", 5.0), 3)
    assert gpu.log[::2] == ["flush"] * 6
    assert gpu.log[1::2] == ["candidate", "baseline", "baseline", "candidate", "candidate", "baseline"]


def test_a_block_is_waited_for_once_and_events_are_used_again() -> None:
    gpu = Gpu()
    clock = cuda_clock(gpu)
    clock.time_pairs(gpu.kernel("candidate", 1.0), gpu.kernel("baseline", 2.0), 8)
    assert (gpu.waits, gpu.events) == (1, 32)
    times = clock.time_pairs(gpu.kernel("candidate", 3.0), gpu.kernel("baseline", 4.0), 5)
    assert (gpu.waits, gpu.events) == (2, 32)
    assert times.tolist() == [[3.0, 4.0]] * 5


def test_a_measurement_with_cuda_events() -> None:
    gpu = Gpu()
    clock = cuda_clock(gpu)
    protocol = Protocol(warmup_seconds=0.0, min_calls=10, max_calls=10)
    latency = measure_paired(gpu.kernel("candidate", 2.0), gpu.kernel("baseline", 6.0), protocol, clock)
    assert (latency.median_ms, latency.baseline_ms, latency.speedup) == (2.0, 6.0, 3.0)
    assert (latency.clock, latency.discarded, latency.throttled) == ("cuda events", 0, 0)


def test_wall_times_belong_to_their_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def take(seconds: float) -> Callable[[], None]:
        def call() -> None:
            nonlocal now
            now += seconds

        return call

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    times = WallClock().time_pairs(take(0.5), take(2.0), 4)
    assert times.tolist() == [[500.0, 2000.0]] * 4
    assert not WallClock().state().readable


GOOD = ClockState(1980, ("application clocks",))


@pytest.mark.parametrize(
    ("before", "after", "spoilt"),
    [
        pytest.param(GOOD, GOOD, False, id="steady"),
        pytest.param(GOOD, ClockState(1965, ()), False, id="one step of the clock"),
        pytest.param(GOOD, ClockState(1800, ()), True, id="slower"),
        pytest.param(ClockState(345, ("idle",)), GOOD, True, id="woke up"),
        pytest.param(GOOD, ClockState(1980, ("hardware slowdown",)), True, id="throttles at the end"),
        pytest.param(ClockState(1980, ("software power cap",)), GOOD, True, id="throttled at the beginning"),
        pytest.param(ClockState(), ClockState(), False, id="not readable"),
        pytest.param(ClockState(None, ()), ClockState(None, ("hardware power brake",)), True, id="reasons alone"),
        pytest.param(ClockState(1980), ClockState(1500), True, id="clock alone"),
    ],
)
def test_is_spoilt(before: ClockState, after: ClockState, spoilt: bool) -> None:
    assert is_spoilt(before, after) is spoilt


class Scripted(Clock):
    """Gives one latency a window to both sides; each window takes `seconds`."""

    name = "scripted"

    def __init__(self, latencies: Iterator[float], seconds: float) -> None:
        self.now = 100.0
        self.windows: list[int] = []
        self._latencies = latencies
        self._seconds = seconds

    def time_pairs(self, candidate: Callable[[], object], baseline: Callable[[], object], pairs: int) -> np.ndarray:
        self.windows.append(pairs)
        self.now += self._seconds
        return np.full((pairs, 2), next(self._latencies))

    def state(self) -> ClockState:
        return ClockState()

    def warm_up(self, least: float, most: float) -> bool:
        times = {"least_seconds": least, "most_seconds": most}
        return warm_up(self, lambda: None, lambda: None, **times, now=lambda: self.now)


def falling(to: float) -> Iterator[float]:
    """A device that wakes up: 20 % faster in each window, until it is steady."""
    latency = 10.0
    while True:
        yield latency
        latency = max(to, 0.8 * latency)


def test_warm_up_ends_when_two_windows_agree() -> None:
    clock = Scripted(falling(to=8.0), seconds=0.02)
    assert clock.warm_up(0.0, 10.0)
    assert len(clock.windows) == 3, "10, 8, 8"


def test_warm_up_goes_on_for_the_least_time() -> None:
    clock = Scripted(falling(to=10.0), seconds=0.02)
    assert clock.warm_up(0.09, 10.0)
    assert len(clock.windows) == 5


def test_warm_up_gives_up_at_the_cap() -> None:
    clock = Scripted(falling(to=0.0), seconds=0.02)
    assert not clock.warm_up(0.0, 0.09)
    assert len(clock.windows) == 5


def test_short_windows_grow_and_arent_believed() -> None:
    clock = Scripted(falling(to=10.0), seconds=0.001)
    assert not clock.warm_up(0.0, 0.0095)
    assert clock.windows == [2**place for place in range(10)]


@pytest.mark.parametrize("device", ["cpu", "CPU", "GPU"])
def test_synchronous_devices_have_the_wall_clock(device: str) -> None:
    assert isinstance(clock_for(device), WallClock)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_no_wall_clock_for_a_gpu_that_isnt_there(device: str) -> None:
    with pytest.raises(JobError, match=r"target.device must be a GPU that PyTorch sees"):
        clock_for(device)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.filterwarnings("ignore:Clocks, throttling and energy:RuntimeWarning")
def test_a_gpus_larger_product_takes_longer() -> None:
    small, large = (torch.randn(size, size, device="cuda") for size in (512, 4096))
    clock = clock_for("cuda")
    assert isinstance(clock, CudaClock)
    latency = measure_paired(lambda: small @ small, lambda: large @ large, clock=clock)
    assert latency.clock == "cuda events"
    assert 0 < latency.median_ms < latency.baseline_ms


@pytest.mark.gpu
@needs_gpu
@pytest.mark.filterwarnings("ignore:Clocks, throttling and energy:RuntimeWarning")
def test_events_agree_with_waiting_on_the_host() -> None:
    matrix = torch.randn(4096, 4096, device="cuda")

    def multiply() -> object:
        return matrix @ matrix

    latency = measure_paired(multiply, multiply, clock=clock_for("cuda"))
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        multiply()
    torch.cuda.synchronize()
    per_call = (time.perf_counter() - start) / 20 * 1e3
    assert latency.median_ms == pytest.approx(per_call, rel=0.2)
