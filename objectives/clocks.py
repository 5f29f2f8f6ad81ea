"""Clocks: what times the calls of a measurement, on a CPU and on a GPU."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from paretune.objectives.device import gpu_uuid, is_cuda
from paretune.objectives.nvml import ClockState, find_gpu

if TYPE_CHECKING:
    import torch

Call = Callable[[], object]
Array = np.ndarray[Any, Any]

_WINDOW_SECONDS = 0.01
"""Least duration of a warm-up window: shorter ones agree by chance."""

_STABLE = 0.03
"""Two warm-up windows agree if both sides' medians differ by at most this share."""

_CLOCK_MOVED = 0.03
"""A multiprocessor clock that moved by more than this share during a block spoils it; one step of it is below 1 %."""


class Clock(ABC):
    """Times two sides in turn.

    `paretune.objectives.latency.measure_paired` calls `time_pairs` first to warm up, until the times are stable, and
    then block by block, with `state` before and after each block; `is_spoilt` tells from the two whether to throw the
    block away. Used by one thread.

    Attributes:
        name: Goes to the record of the measurement.
    """

    name: str

    @abstractmethod
    def time_pairs(self, candidate: Call, baseline: Call, pairs: int) -> Array:
        """Milliseconds of each call, shape (pairs, 2): candidate and baseline; who comes first alternates."""

    @abstractmethod
    def state(self) -> ClockState:
        """How fast the device runs now; all None where that isn't readable."""


class WallClock(Clock):
    """Wall time around calls that return when they are done: all runtimes of a CPU."""

    name = "wall"

    def time_pairs(self, candidate: Call, baseline: Call, pairs: int) -> Array:
        """Time each pair at once: first call, second call, no gap."""
        seconds = np.empty((pairs, 2))
        calls = (candidate, baseline)
        for pair in range(pairs):
            first, second = _order(pair)
            start = time.perf_counter()
            calls[first]()
            middle = time.perf_counter()
            calls[second]()
            end = time.perf_counter()
            seconds[pair, first], seconds[pair, second] = middle - start, end - middle
        return seconds * 1e3

    def state(self) -> ClockState:
        """Not readable."""
        return ClockState()


class CudaQueue:
    """What a clock needs of CUDA: events, and a barrier, on the device's current stream.

    Args:
        device: ``"cuda"`` or ``"cuda:1"``.
        flush_l2: Whether `flush` really writes, or does nothing.
    """

    def __init__(self, device: str, *, flush_l2: bool) -> None:
        import torch

        self._cuda = torch.cuda
        self._device = torch.device(device)
        # Twice the cache, because it doesn't replace strictly by age.
        size = 2 * torch.cuda.get_device_properties(self._device).L2_cache_size if flush_l2 else 0
        self._filler = torch.empty(size, dtype=torch.int8, device=self._device)

    def new_event(self) -> torch.cuda.Event:
        """An event that can be recorded again and again."""
        event = self._cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # PyTorch doesn't annotate it
        # PyTorch creates the event in CUDA when it is first recorded. That must not happen inside of a timed span.
        self.record(event)
        return event

    def record(self, event: torch.cuda.Event) -> None:
        """Have the GPU note the time when it gets here."""
        event.record(self._cuda.current_stream(self._device))

    def flush(self) -> None:
        """Enqueue a write that pushes everything else out of the L2 cache."""
        if self._filler.numel():
            self._filler.zero_()

    def synchronize(self) -> None:
        """Wait until the GPU has done all."""
        self._cuda.synchronize(self._device)


class CudaClock(Clock):
    """CUDA events around calls that enqueue work on the device's current stream and don't wait for it.

    A block of pairs is enqueued as a whole and waited for once, so that the GPU doesn't run dry between two calls and
    waiting isn't timed. Before each call the L2 cache is flushed, outside of the timed span: otherwise a call finds
    what the last one left, and a latency would depend on whom the candidate is paired with.

    What is timed is how long the GPU is at a call. Launching kernels shows only as far as the GPU had to wait for it,
    and work of the other side that is still queued hides it. So calls of many small kernels belong into a CUDA graph;
    `paretune.objectives.usage.Usage.throughput_per_s` tells the ones that don't keep the GPU busy.

    Args:
        device: ``"cuda"`` or ``"cuda:1"``.
        flush_l2: Whether each call finds a cold L2 cache.
        queue: Where events come from.
        read: Tells the clocks of the GPU; through NVML by default.
    """

    name = "cuda events"

    def __init__(
        self,
        device: str,
        *,
        flush_l2: bool = True,
        queue: CudaQueue | None = None,
        read: Callable[[], ClockState] | None = None,
    ) -> None:
        # The reader comes first: it says in words that there is no such GPU.
        self._read = read or _reader(device)
        self._queue = queue or CudaQueue(device, flush_l2=flush_l2)
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def time_pairs(self, candidate: Call, baseline: Call, pairs: int) -> Array:
        """Enqueue all pairs, wait once, then read what the GPU noted."""
        queue, calls = self._queue, (candidate, baseline)
        while len(self._spans) < 2 * pairs:
            self._spans.append((queue.new_event(), queue.new_event()))
        for pair in range(pairs):
            for side in _order(pair):
                start, end = self._spans[2 * pair + side]
                queue.flush()
                queue.record(start)
                calls[side]()
                queue.record(end)
        queue.synchronize()
        elapsed = [start.elapsed_time(end) for start, end in self._spans[: 2 * pairs]]
        return np.array(elapsed, dtype=float).reshape(pairs, 2)

    def state(self) -> ClockState:
        """As NVML says."""
        return self._read()


def clock_for(device: str) -> Clock:
    """The clock for calls on this device: CUDA enqueues work, all other devices' calls return when they are done."""
    return CudaClock(device) if is_cuda(device) else WallClock()


def is_spoilt(before: ClockState, after: ClockState) -> bool:
    """Whether a GPU throttled, or changed its clock, between two readings; False where that isn't readable."""
    if before.spoiling or after.spoiling:
        return True
    if before.sm_clock_mhz is None or after.sm_clock_mhz is None:
        return False
    return abs(after.sm_clock_mhz - before.sm_clock_mhz) > _CLOCK_MOVED * before.sm_clock_mhz


def warm_up(
    clock: Clock,
    candidate: Call,
    baseline: Call,
    *,
    least_seconds: float,
    most_seconds: float,
    now: Callable[[], float] = time.perf_counter,
) -> bool:
    """Call both sides in windows until the medians of two windows in a row agree.

    Args:
        clock: Times them.
        candidate: One side.
        baseline: The other.
        least_seconds: Goes on for so long even if stable.
        most_seconds: No window begins after this, stable or not.
        now: Seconds of a monotonic clock.

    Returns:
        Whether it ended stable.
    """
    begin = start = now()
    pairs = 1
    previous: Array | None = None
    while start - begin < most_seconds:
        medians = np.median(clock.time_pairs(candidate, baseline, pairs), axis=0)
        end = now()
        if end - start < _WINDOW_SECONDS:
            pairs *= 2
        else:
            stable = previous is not None and np.all(np.abs(medians - previous) <= _STABLE * previous)
            if stable and end - begin >= least_seconds:
                return True
            previous = medians
        start = end
    return False


def _order(pair: int) -> tuple[int, int]:
    """Which side of a pair is called first, and which second: 0 is the candidate."""
    return (0, 1) if pair % 2 == 0 else (1, 0)


def _reader(device: str) -> Callable[[], ClockState]:
    gpu = find_gpu(gpu_uuid(device))
    return ClockState if gpu is None else gpu.clocks
