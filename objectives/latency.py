"""Latency, measured on the artifact, paired with the dense baseline."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Call = Callable[[], object]
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Protocol:
    """How long to measure.

    Attributes:
        warmup_seconds: Both sides are called in turn for this long before the clock counts.
        min_calls: Calls of each side at the least.
        max_calls: Calls of each side at the most.
        max_seconds: No new round begins after this, once `min_calls` is reached.
        width: Stop when the interval of the speed-up is narrower than this share of it.
        resamples: Bootstrap resamples.
        level: Coverage of the intervals.
    """

    warmup_seconds: float = 0.1
    min_calls: int = 100
    max_calls: int = 1000
    max_seconds: float = 0.5
    width: float = 0.01
    resamples: int = 200
    level: float = 0.95


@dataclass(frozen=True)
class Latency:
    """A paired measurement; times in milliseconds, one call each, intervals by bootstrap of the median.

    Attributes:
        median_ms: Median of the candidate's calls.
        low_ms: Lower end of its interval.
        high_ms: Upper end.
        p5_ms: 5th percentile: the candidate undisturbed.
        baseline_ms: Median of the baseline's calls in the same rounds.
        speedup: Baseline's median over the candidate's, > 1 where the candidate is faster.
        speedup_low: Lower end of its interval; pairs are resampled together.
        speedup_high: Upper end.
        calls: Calls of each side.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    p5_ms: float
    baseline_ms: float
    speedup: float
    speedup_low: float
    speedup_high: float
    calls: int


def measure_paired(candidate: Call, baseline: Call, protocol: Protocol = Protocol()) -> Latency:
    """Time both sides call by call in turn, so that a drift of the machine meets both alike.

    The order within a pair alternates. Whoever calls makes sure that nothing else of ours runs on the device
    (`paretune.objectives.device.Device.exclusive`): pairing removes noise, but not the bias of a busy machine.
    """
    end = time.perf_counter() + protocol.warmup_seconds
    while time.perf_counter() < end:
        candidate()
        baseline()
    pairs: list[tuple[float, float]] = []
    begin = time.perf_counter()
    while True:
        for _ in range(min(50, protocol.min_calls)):
            pairs.append(_pair(candidate, baseline, candidate_first=len(pairs) % 2 == 0))
        if len(pairs) < protocol.min_calls:
            continue
        latency = summarize(np.array(pairs) * 1e3, protocol)
        narrow = latency.speedup_high - latency.speedup_low <= protocol.width * latency.speedup
        spent = time.perf_counter() - begin
        if narrow or len(pairs) >= protocol.max_calls or spent >= protocol.max_seconds:
            return latency


def summarize(pairs: Array, protocol: Protocol = Protocol()) -> Latency:
    """Medians and bootstrap intervals of `pairs`, shape (calls, 2): candidate and baseline, in milliseconds."""
    rng = np.random.default_rng(0)
    drawn = pairs[rng.integers(0, len(pairs), (protocol.resamples, len(pairs)))]
    medians = np.median(drawn, axis=1)
    tail = 50 * (1 - protocol.level)
    low, high = np.percentile(medians[:, 0], [tail, 100 - tail])
    speedup_low, speedup_high = np.percentile(medians[:, 1] / medians[:, 0], [tail, 100 - tail])
    median, baseline = np.median(pairs, axis=0)
    return Latency(
        median_ms=float(median),
        low_ms=float(low),
        high_ms=float(high),
        p5_ms=float(np.percentile(pairs[:, 0], 5)),
        baseline_ms=float(baseline),
        speedup=float(baseline / median),
        speedup_low=float(speedup_low),
        speedup_high=float(speedup_high),
        calls=len(pairs),
    )


def _pair(candidate: Call, baseline: Call, *, candidate_first: bool) -> tuple[float, float]:
    first, second = (candidate, baseline) if candidate_first else (baseline, candidate)
    start = time.perf_counter()
    first()
    middle = time.perf_counter()
    second()
    end = time.perf_counter()
    return (middle - start, end - middle) if candidate_first else (end - middle, middle - start)
