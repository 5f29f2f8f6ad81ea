"""Paired latency: the statistics on made-up times, the order and number of calls. No speed is asserted."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from paretune.objectives.clocks import Clock
from paretune.objectives.latency import Latency, Protocol, measure_paired, summarize
from paretune.objectives.nvml import ClockState


class Calls:
    """Two sides that only write down who was called."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def candidate(self) -> None:
        self.log.append("candidate")

    def baseline(self) -> None:
        self.log.append("baseline")

    def measure(self, protocol: Protocol) -> Latency:
        return measure_paired(self.candidate, self.baseline, protocol)


def drift(calls: int, seed: int = 0) -> np.ndarray:
    """A machine that gets slower: both sides double, the baseline always takes twice as long."""
    rng = np.random.default_rng(seed)
    speed = np.linspace(1, 2, calls)
    return np.stack([speed, 2 * speed], 1) * rng.normal(1, 0.001, (calls, 2))


def test_summary_of_equal_calls() -> None:
    latency = summarize(np.tile([2.0, 6.0], (10, 1)))
    assert latency == Latency(2.0, 2.0, 2.0, 2.0, 6.0, 3.0, 3.0, 3.0, 10, p95_ms=2.0)


def test_medians_and_percentiles() -> None:
    pairs = np.array([[1.0, 10.0], [2.0, 30.0], [3.0, 20.0], [4.0, 50.0], [100.0, 40.0]])
    latency = summarize(pairs)
    assert latency.median_ms == 3.0
    assert latency.baseline_ms == 30.0
    assert latency.speedup == 10.0
    assert latency.p5_ms == pytest.approx(1.2)
    assert latency.p95_ms == pytest.approx(80.8)
    assert latency.calls == 5


@pytest.mark.parametrize("seed", range(5))
def test_intervals_contain_the_medians(seed: int) -> None:
    pairs = np.random.default_rng(seed).lognormal(0, 0.3, (101, 2))
    latency = summarize(pairs)
    assert pairs[:, 0].min() <= latency.low_ms <= latency.median_ms <= latency.high_ms <= pairs[:, 0].max()
    assert latency.speedup_low <= latency.speedup <= latency.speedup_high
    assert latency.p5_ms <= latency.median_ms


def test_intervals_cover_the_truth_and_narrow_with_calls() -> None:
    rng = np.random.default_rng(0)
    hits, widths = 0, {50: 0.0, 800: 0.0}
    for _ in range(60):
        for calls in widths:
            latency = summarize(rng.normal(5, 1, (calls, 2)))
            widths[calls] += latency.high_ms - latency.low_ms
        hits += latency.low_ms <= 5 <= latency.high_ms
    assert 50 <= hits <= 60
    assert widths[800] < widths[50] / 2


def test_a_lower_level_gives_narrower_intervals() -> None:
    pairs = np.random.default_rng(0).normal(5, 1, (100, 2))
    wide, narrow = summarize(pairs, Protocol(level=0.99)), summarize(pairs, Protocol(level=0.5))
    assert wide.low_ms < narrow.low_ms < narrow.high_ms < wide.high_ms


def test_pairs_are_resampled_together() -> None:
    """A drift widens the interval of the latency, but not that of the speed-up."""
    pairs = drift(200)
    latency = summarize(pairs)
    assert latency.speedup == pytest.approx(2, rel=0.01)
    together = latency.speedup_high - latency.speedup_low
    shuffled = np.stack([pairs[:, 0], np.random.default_rng(1).permutation(pairs[:, 1])], 1)
    apart = summarize(shuffled)
    assert together < 0.3 * (apart.speedup_high - apart.speedup_low)
    assert latency.high_ms - latency.low_ms > 0.05


def test_summaries_are_reproducible() -> None:
    assert summarize(drift(50)) == summarize(drift(50))


NO_WARMUP = Protocol(warmup_seconds=0.0, min_calls=60, max_calls=60, max_seconds=60.0)


def test_sides_alternate_who_comes_first() -> None:
    calls = Calls()
    latency = calls.measure(NO_WARMUP)
    pairs = list(zip(calls.log[::2], calls.log[1::2], strict=True))
    assert all(set(pair) == {"candidate", "baseline"} for pair in pairs)
    assert all(one == other[::-1] for one, other in pairwise(pairs))
    assert latency.calls == len(pairs)


def test_warm_up_calls_both_sides_and_isnt_counted() -> None:
    calls = Calls()
    latency = calls.measure(Protocol(warmup_seconds=0.02, min_calls=10, max_calls=10))
    assert len(calls.log) > 2 * latency.calls
    assert calls.log.count("candidate") == calls.log.count("baseline")


def test_a_wide_interval_goes_on_to_the_cap() -> None:
    protocol = Protocol(warmup_seconds=0.0, min_calls=50, max_calls=200, max_seconds=60.0, width=-1.0)
    assert Calls().measure(protocol).calls == 200


def test_a_narrow_interval_stops_at_once() -> None:
    protocol = Protocol(warmup_seconds=0.0, min_calls=50, max_calls=10_000, max_seconds=60.0, width=1e9)
    assert Calls().measure(protocol).calls == 50


def test_time_stops_it_too_but_not_before_the_least_calls() -> None:
    protocol = Protocol(warmup_seconds=0.0, min_calls=120, max_calls=10_000, max_seconds=0.0, width=-1.0)
    assert 120 <= Calls().measure(protocol).calls <= 150


def test_errors_of_a_side_are_raised() -> None:
    def broken() -> None:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        measure_paired(broken, lambda: None, NO_WARMUP)


def test_the_wall_clock_is_the_default() -> None:
    latency = Calls().measure(NO_WARMUP)
    assert (latency.clock, latency.discarded, latency.throttled) == ("wall", 0, None)


GOOD, HOT = ClockState(1980, ()), ClockState(1980, ("hardware thermal slowdown",))


class Throttling(Clock):
    """A GPU that is hot in its first blocks, and then twice as slow."""

    name = "throttling"

    def __init__(self, hot_blocks: int) -> None:
        self._hot = hot_blocks
        self.blocks = 0

    def time_pairs(self, candidate: Callable[[], object], baseline: Callable[[], object], pairs: int) -> np.ndarray:
        self.blocks += 1
        return np.full((pairs, 2), 2.0 if self.blocks <= self._hot else 1.0)

    def state(self) -> ClockState:
        return HOT if 0 < self.blocks <= self._hot else GOOD

    def measure(self, max_repeats: int) -> Latency:
        protocol = Protocol(warmup_seconds=0.0, min_calls=20, max_calls=20, max_repeats=max_repeats)
        return measure_paired(lambda: None, lambda: None, protocol, self)


def test_throttled_blocks_are_thrown_away_and_repeated() -> None:
    clock = Throttling(hot_blocks=3)
    latency = clock.measure(max_repeats=10)
    # A fourth goes as well: it began hot.
    assert (clock.blocks, latency.discarded, latency.throttled, latency.calls) == (5, 80, 0, 20)
    assert (latency.median_ms, latency.clock) == (1.0, "throttling")


def test_a_gpu_that_stays_hot_is_measured_hot_and_says_so() -> None:
    clock = Throttling(hot_blocks=100)
    latency = clock.measure(max_repeats=3)
    assert (clock.blocks, latency.discarded, latency.throttled, latency.calls) == (4, 60, 20, 20)
    assert latency.median_ms == 2.0


@pytest.mark.parametrize("least", [1, 7, 99])
def test_an_odd_number_of_calls_still_alternates(least: int) -> None:
    calls = Calls()
    calls.measure(Protocol(warmup_seconds=0.0, min_calls=least, max_calls=least))
    assert calls.log.count("candidate") >= least
    assert calls.log[::4] == calls.log[3::4] == ["candidate"] * (len(calls.log) // 4)
