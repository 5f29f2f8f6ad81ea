"""What a trial found out: the frozen records that are stored, told to the study and reported."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from paretune.objectives.latency import Latency


@dataclass(frozen=True)
class Measurement:
    """One artifact on one split and target.

    Attributes:
        accuracy: The task's metric on the artifact's outputs; higher is better.
        latency_ms: Of a call, in milliseconds: the baseline's median divided by the paired speed-up, so that a
            drift of the machine since the baseline was measured cancels.
        latency_low_ms: Lower end of its 95 % bootstrap interval.
        latency_high_ms: Upper end.
        speedup: Baseline's median over this one's, measured call by call in turn.
        size_bytes: Of the deployed model file.
        params: Parameters of the compressed model.
        macs: Multiply-accumulates for one sample.
    """

    accuracy: float
    latency_ms: float
    latency_low_ms: float
    latency_high_ms: float
    speedup: float
    size_bytes: int
    params: int
    macs: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)

    def is_finite(self) -> bool:
        """Whether every number is; Optuna would take an infinite one for a result and put it on the front."""
        return all(math.isfinite(value) for value in asdict(self).values())


@dataclass(frozen=True)
class Record:
    """A finished trial.

    Attributes:
        measurement: On the validation split.
        early_latency_ms: The same as the measurement's, on the untrained artifact, in few calls.
        early_size_bytes: Size of the untrained artifact; the same as the trained one's.
        executed: Layer to the bit-width in which the runtime really runs it.
        clock: The raw measurement: medians of both sides, 5th percentile, intervals, calls.
        seconds: Phase of the trial to its duration.
        noisy: Whether the baseline's latency was off its first measurement by more than 10 % even when measured again.
    """

    measurement: Measurement
    early_latency_ms: float
    early_size_bytes: int
    executed: dict[str, int]
    clock: Latency
    seconds: dict[str, float] = field(default_factory=dict)
    noisy: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Record:
        """Undo `to_dict`."""
        return cls(**data | {"measurement": Measurement(**data["measurement"]), "clock": Latency(**data["clock"])})
