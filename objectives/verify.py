"""Verification: front members measured once more, together, and scored on the split that the search never saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from paretune.objectives.artifact import MODEL, Card, load_session, write_card
from paretune.objectives.data.splits import Split
from paretune.objectives.device import Device
from paretune.objectives.latency import Latency, Protocol, measure_paired
from paretune.objectives.measurement import Measurement
from paretune.objectives.problem import Problem
from paretune.objectives.runtimes import LoadOptions, get_runtime
from paretune.objectives.scoring import artifact_outputs

ROUND = Protocol(warmup_seconds=0.05, max_calls=100)
"""One artifact in one round: as many calls for each."""


@dataclass(frozen=True)
class Verified:
    """An artifact's measurements, by split; both share the latency of the joint rounds."""

    folder: Path
    validation: Measurement
    test: Measurement


def verify(problem: Problem, baseline: Path, folders: Sequence[Path], *, rounds: int) -> list[Verified]:
    """Measure artifacts against the baseline, round by round, and score them on validation and test.

    Each round measures every artifact once, paired with the baseline. What is reported rests on the rounds' speed-ups:
    their median, and the baseline's median latency over all rounds divided by it, so that a drift of the machine
    between two artifacts cancels; intervals are bootstrapped over the rounds. The cards are rewritten.

    Args:
        problem: Data, task and target.
        baseline: The dense artifact; paired with each, and verified itself where it is among `folders`.
        folders: Artifacts.
        rounds: At least 1.
    """
    batch = problem.batch()
    reference = load_session(baseline).bind(batch)
    calls = [load_session(folder).bind(batch) for folder in folders]
    measured: list[list[Latency]] = [[] for _ in folders]
    with Device(problem.target.device).exclusive():
        for _ in range(rounds):
            for call, latencies in zip(calls, measured, strict=True):
                latencies.append(measure_paired(call, reference, ROUND))
    reference_ms = float(np.median([latency.baseline_ms for latencies in measured for latency in latencies]))
    with Device(problem.target.device).shared():
        return [
            _verified(problem, folder, reference_ms, [latency.speedup for latency in latencies])
            for folder, latencies in zip(folders, measured, strict=True)
        ]


def _verified(problem: Problem, folder: Path, reference_ms: float, speedups: Sequence[float]) -> Verified:
    card = Card.read(folder)
    speedup, slow, fast = median_over_rounds(speedups)
    known = replace(
        Measurement(**card.metrics["validation"]),
        latency_ms=reference_ms / speedup,
        latency_low_ms=reference_ms / fast,
        latency_high_ms=reference_ms / slow,
        speedup=speedup,
    )
    splits = problem.splits
    validation = replace(known, accuracy=_score(problem, folder, card, splits.validation))
    test = replace(known, accuracy=_score(problem, folder, card, splits.test))
    metrics = {"validation": validation.to_dict(), "test": test.to_dict()}
    write_card(folder, replace(card, metrics=metrics))
    return Verified(folder, validation, test)


def median_over_rounds(values: Sequence[float]) -> tuple[float, float, float]:
    """The median of the rounds' values and its 95 % bootstrap interval; with few rounds that is their whole range."""
    rng = np.random.default_rng(0)
    drawn = np.array(values)[rng.integers(0, len(values), (2000, len(values)))]
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(np.median(values)), float(low), float(high)


def _score(problem: Problem, folder: Path, card: Card, split: Split) -> float:
    runtime = get_runtime(card.target.runtime)
    options = LoadOptions(1, card.target.threads, card.float_bits)
    return problem.task.metric(*artifact_outputs(runtime, folder / MODEL, options, split))
