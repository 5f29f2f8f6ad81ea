"""Records of trials that nobody ran, for tests of what stores and reads them."""

from __future__ import annotations

from paretune.objectives.latency import Latency
from paretune.objectives.measurement import Deployment, Measurement, OnTarget, Record

CLOCK = Latency(1.0, 0.9, 1.1, 0.95, 2.0, 2.0, 1.9, 2.1, 100, 1.2)


def on_target(accuracy: float, latency: float, *, half_width: float = 0.05, size: int = 900) -> OnTarget:
    """Of a baseline of 4 ms."""
    return OnTarget(accuracy, latency, latency - half_width, latency + half_width, 4 / latency, size)


def measurement(accuracy: float, latency: float, *, half_width: float = 0.05, size: int = 900) -> Measurement:
    """On the first target alone."""
    return Measurement({"": on_target(accuracy, latency, half_width=half_width, size=size)}, 200, 3000)


def record(found: Measurement, *, noisy: bool = False) -> Record:
    """Of a trial with that measurement."""
    deployments = {
        name: Deployment(on.latency_ms, on.size_bytes, {"stem": 8, "body": 32}, CLOCK, noisy)
        for name, on in found.on.items()
    }
    return Record(found, deployments, {"train": 1.5})
