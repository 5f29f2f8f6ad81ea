"""Records of trials that nobody ran, for tests of what stores and reads them."""

from __future__ import annotations

from paretune.objectives.latency import Latency
from paretune.objectives.measurement import Deployment, Measurement, OnTarget, Record
from paretune.objectives.progress import Rung, Stopped

CLOCK = Latency(1.0, 0.9, 1.1, 0.95, 2.0, 2.0, 1.9, 2.1, 100, 1.2)


def on_target(accuracy: float, latency: float, *, half_width: float = 0.05, size: int = 900) -> OnTarget:
    """Of a baseline of 4 ms."""
    return OnTarget(accuracy, latency, latency - half_width, latency + half_width, 4 / latency, size)


def measurement(accuracy: float, latency: float, *, half_width: float = 0.05, size: int = 900) -> Measurement:
    """On the first target alone."""
    return Measurement({"": on_target(accuracy, latency, half_width=half_width, size=size)}, 200, 3000)


def record(found: Measurement, *, noisy: bool = False, rungs: tuple[Rung, ...] = ()) -> Record:
    """Of a trial with that measurement."""
    deployments = {
        name: Deployment(on.latency_ms, on.size_bytes, {"stem": 8, "body": 32}, CLOCK, noisy)
        for name, on in found.on.items()
    }
    return Record(found, deployments, {"train": 1.5}, {"steps": 40}, rungs)


def stopped(*accuracies: float, latency: float = 3.0, size: int = 900, steps: int = 12) -> Stopped:
    """A trial that was ended after rungs at 25 % and 50 % of its training, with these accuracies."""
    rungs = tuple(Rung(share, value, 100) for share, value in zip((0.25, 0.5), accuracies, strict=False))
    outline = {"params": 200.0, "macs": 3000.0, "latency_ms": latency, "latency_high_ms": latency + 0.05}
    return Stopped(outline | {"size_bytes": size}, rungs, {"train": 0.5}, steps)
