"""Latency, measured on the artifact, paired with the dense baseline."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from paretune.objectives.clocks import Array, Call, Clock, WallClock, is_spoilt, warm_up

_BLOCK = 50
"""Pairs between two looks at the interval and at the state of the device; even, so that who is first alternates on."""


@dataclass(frozen=True)
class Protocol:
    """How long to measure.

    Attributes:
        warmup_seconds: Both sides are called in turn for this long before the clock counts; 0 for no warm-up.
        max_warmup_seconds: The warm-up goes on for at most this long while the times aren't stable yet.
        min_calls: Calls of each side at the least.
        max_calls: Calls of each side at the most.
        max_seconds: No new round begins after this, once `min_calls` is reached.
        max_repeats: Blocks thrown away at the most because a GPU throttled; after that they are kept, and counted.
        width: Stop when the interval of the speed-up is narrower than this share of it.
        resamples: Bootstrap resamples.
        level: Coverage of the intervals.
    """

    warmup_seconds: float = 0.1
    max_warmup_seconds: float = 0.5
    min_calls: int = 100
    max_calls: int = 1000
    max_seconds: float = 0.5
    max_repeats: int = 10
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
        p95_ms: 95th percentile: the candidate's slow calls.
        clock: What timed the calls: ``"wall"`` or ``"cuda events"``.
        discarded: Pairs thrown away because the GPU throttled or changed its clock meanwhile.
        throttled: Pairs that were kept all the same, after too many had been thrown away; None where the state of
            the device isn't readable.
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
    p95_ms: float
    clock: str = WallClock.name
    discarded: int = 0
    throttled: int | None = None


def measure_paired(
    candidate: Call, baseline: Call, protocol: Protocol = Protocol(), clock: Clock | None = None
) -> Latency:
    """Time both sides call by call in turn, so that a drift of the machine meets both alike.

    The order within a pair alternates. Whoever calls makes sure that nothing else of ours runs on the device
    (`paretune.objectives.device.Device.exclusive`): pairing removes noise, but not the bias of a busy machine.

    Args:
        candidate: What is measured.
        baseline: What it is compared with.
        protocol: How long to measure.
        clock: What times them, see `paretune.objectives.clocks.clock_for`; the wall clock where None.
    """
    clock = clock or WallClock()
    if protocol.warmup_seconds > 0:
        limits = protocol.warmup_seconds, max(protocol.warmup_seconds, protocol.max_warmup_seconds)
        warm_up(clock, candidate, baseline, least_seconds=limits[0], most_seconds=limits[1])
    size = min(_BLOCK, protocol.min_calls + protocol.min_calls % 2)
    blocks: list[Array] = []
    discarded = throttled = 0
    begin = time.perf_counter()
    while True:
        before = clock.state()
        block = clock.time_pairs(candidate, baseline, size)
        spoilt = is_spoilt(before, clock.state())
        if spoilt and discarded < protocol.max_repeats * size:
            discarded += size
        else:
            blocks.append(block)
            throttled += size * spoilt
        calls = size * len(blocks)
        if calls < protocol.min_calls:
            continue
        latency = summarize(np.concatenate(blocks), protocol)
        narrow = latency.speedup_high - latency.speedup_low <= protocol.width * latency.speedup
        spent = time.perf_counter() - begin
        if narrow or calls >= protocol.max_calls or spent >= protocol.max_seconds:
            kept = throttled if before.readable else None
            return replace(latency, clock=clock.name, discarded=discarded, throttled=kept)


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
        p95_ms=float(np.percentile(pairs[:, 0], 95)),
    )
