"""What a trial found out: the frozen records that are stored, told to the study and reported."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from paretune.errors import JobError
from paretune.objectives.latency import Latency
from paretune.objectives.progress import Rung


@dataclass(frozen=True)
class OnTarget:
    """One artifact on one split and target.

    Attributes:
        accuracy: The task's metric on the artifact's outputs; higher is better.
        latency_ms: Of a call, in milliseconds: the baseline's median divided by the paired speed-up, so that a
            drift of the machine since the baseline was measured cancels.
        latency_low_ms: Lower end of its 95 % bootstrap interval.
        latency_high_ms: Upper end.
        speedup: Baseline's median over this one's, measured call by call in turn.
        size_bytes: Of the deployed model file.
        throughput_per_s: Samples a second, calls back to back; measured on GPUs alone.
        peak_memory_bytes: Of a call's intermediates, on the GPU; see `paretune.objectives.usage.Usage`.
        energy_mj: Millijoules a call, where the GPU counts them.
    """

    accuracy: float
    latency_ms: float
    latency_low_ms: float
    latency_high_ms: float
    speedup: float
    size_bytes: int
    throughput_per_s: float | None = None
    peak_memory_bytes: int | None = None
    energy_mj: float | None = None


@dataclass(frozen=True)
class Measurement:
    """One artifact on one split, on every target of the job.

    Attributes:
        on: Target's name to what was measured there; the first one, which has no name (``""``), is *the* target.
        params: Parameters of the compressed model.
        macs: Multiply-accumulates for one sample.
    """

    on: Mapping[str, OnTarget]
    params: int
    macs: int

    @property
    def main(self) -> OnTarget:
        """What was measured on the job's first target."""
        return self.on[""]

    def to_dict(self) -> dict[str, Any]:
        """Flat JSON-able values: another target's are called ``latency_ms@NAME``; what wasn't measured is left out."""
        found: dict[str, Any] = {}
        for name, measured in self.on.items():
            suffix = f"@{name}" if name else ""
            values = {key: value for key, value in asdict(measured).items() if value is not None}
            found |= {f"{key}{suffix}": value for key, value in values.items()}
            if not name:
                found |= {"params": self.params, "macs": self.macs}
        return found

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Measurement:
        """Undo `to_dict`."""
        known = {entry.name for entry in fields(OnTarget)}
        on: dict[str, dict[str, Any]] = {}
        for key, value in data.items():
            metric, _, name = key.partition("@")
            if metric in known:
                on.setdefault(name, {})[metric] = value
        return cls({name: OnTarget(**values) for name, values in on.items()}, data["params"], data["macs"])

    def is_finite(self) -> bool:
        """Whether every number is; Optuna would take an infinite one for a result and put it on the front."""
        return all(math.isfinite(value) for value in self.to_dict().values())


def by_speedup(expected: float, latency: Latency) -> tuple[float, float, float, float]:
    """Latency, the ends of its interval and the speed-up: the machine drifts between trials, and the baseline with it.

    Args:
        expected: The baseline's latency when it was measured first, in milliseconds.
        latency: Paired with the baseline.
    """
    return (
        expected / latency.speedup,
        expected / latency.speedup_high,
        expected / latency.speedup_low,
        latency.speedup,
    )


@dataclass(frozen=True)
class Deployment:
    """How a trial's artifact was built and timed on one target.

    Attributes:
        early_latency_ms: The same as the measurement's, on the untrained artifact, in few calls.
        early_size_bytes: Size of the untrained artifact; the same as the trained one's.
        executed: Layer to the bit-width in which the runtime really runs it.
        clock: The raw measurement: medians of both sides, percentiles, intervals, calls.
        noisy: Whether the baseline's latency was off its first measurement by more than 10 % even when measured again.
    """

    early_latency_ms: float
    early_size_bytes: int
    executed: dict[str, int]
    clock: Latency
    noisy: bool = False


@dataclass(frozen=True)
class Record:
    """A finished trial.

    Attributes:
        measurement: On the validation split.
        deployments: Target's name, as in the measurement, to how the artifact was deployed and timed there.
        seconds: Phase of the trial to its duration.
        training: How the model was trained: device, precision, memory format, steps, how it ended.
        rungs: What the model could do in the middle of it, in order.
    """

    measurement: Measurement
    deployments: dict[str, Deployment]
    seconds: dict[str, float] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    rungs: tuple[Rung, ...] = ()

    @property
    def main(self) -> Deployment:
        """On the job's first target."""
        return self.deployments[""]

    @property
    def noisy(self) -> bool:
        """Whether the machine was off while any target was measured."""
        return any(deployment.noisy for deployment in self.deployments.values())

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return {
            "measurement": self.measurement.to_dict(),
            "deployments": {name: asdict(deployment) for name, deployment in self.deployments.items()},
            "noisy": self.noisy,
            "seconds": self.seconds,
            "training": self.training,
            "rungs": [asdict(rung) for rung in self.rungs],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Record:
        """Undo `to_dict`.

        Raises:
            JobError: An older version wrote it.
        """
        if "deployments" not in data:
            remedy = "finish that run with the version that began it"
            raise JobError("study", "must hold records of this version", "an older form", remedy)
        deployments = {
            name: Deployment(**values | {"clock": Latency(**values["clock"])})
            for name, values in data["deployments"].items()
        }
        rungs = tuple(Rung(**rung) for rung in data.get("rungs", ()))  # older records have none
        return cls(Measurement.from_dict(data["measurement"]), deployments, data["seconds"], data["training"], rungs)
