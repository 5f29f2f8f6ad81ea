"""What a call costs besides its latency: throughput, memory and energy."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from paretune.objectives.clocks import Call
from paretune.objectives.device import gpu_uuid, is_cuda
from paretune.objectives.nvml import find_gpu

_PILOT = 0.1
"""Share of the run that is spent on finding out how many calls it takes."""

_LEAST_SECONDS_OF_ENERGY = 0.8
"""The energy counter moves some ten times a second; over a shorter run its steps would show."""


@dataclass(frozen=True)
class Usage:
    """What one bound call takes.

    Attributes:
        throughput_per_s: Samples a second, calls back to back. On CUDA they are enqueued without waiting, so a batch
            that takes clearly longer here than the latency says is launched more slowly than the GPU computes.
        peak_memory_bytes: The most that PyTorch's allocator gave out on the GPU during a call beyond what was given out
            before it: intermediates and the output, not weights. None on a CPU, and where a call allocates nothing
            there: other runtimes have allocators of their own, and a CUDA graph keeps its intermediates.
        energy_mj: Millijoules a call, of the whole GPU, its idle power included; None where it isn't readable.
    """

    throughput_per_s: float
    peak_memory_bytes: int | None
    energy_mj: float | None


def measure_usage(call: Call, *, batch_size: int, device: str, seconds: float = 1.0) -> Usage:
    """Run a bound call back to back; whoever calls holds the device (`paretune.objectives.device.Device.exclusive`).

    Args:
        call: Enqueues its work where `device` is a GPU, and is done when it returns otherwise.
        batch_size: Samples per call.
        device: The target's.
        seconds: Of the run, about. Energy takes at least 0.8.
    """
    if not is_cuda(device):
        rate, _ = _run(call, seconds, lambda: None, lambda: None)
        return Usage(rate * batch_size, None, None)
    import torch

    def synchronize() -> None:
        torch.cuda.synchronize(device)

    gpu = find_gpu(gpu_uuid(device))
    rate, energy = _run(call, seconds, synchronize, (lambda: None) if gpu is None else gpu.energy_mj)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    synchronize()
    peak = torch.cuda.max_memory_allocated(device) - before
    return Usage(rate * batch_size, peak or None, energy)


def _run(
    call: Call, seconds: float, synchronize: Callable[[], None], read_energy: Callable[[], int | None]
) -> tuple[float, float | None]:
    """Calls a second, and millijoules a call."""

    def timed(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize()
        return time.perf_counter() - start

    timed(1)  # The first call may compile or allocate.
    # The number of calls is settled beforehand: a loop that looked at the time would run far ahead of a GPU.
    calls = 1
    while (elapsed := timed(calls)) < _PILOT * seconds:
        calls *= 2
    calls = max(1, math.ceil(calls * seconds / elapsed))
    before = read_energy()
    elapsed = timed(calls)
    return calls / elapsed, energy_per_call(before, read_energy(), calls=calls, seconds=elapsed)


def energy_per_call(before: int | None, after: int | None, *, calls: int, seconds: float) -> float | None:
    """Millijoules a call from two readings of the counter; None where unreadable, unmoved, or over too short a run."""
    if before is None or after is None or after <= before or seconds < _LEAST_SECONDS_OF_ENERGY:
        return None
    return (after - before) / calls
