"""Verification: front members measured once more, together, and scored on the split that the search never saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from paretune.objectives.artifact import MODEL, Card, load_session, write_card
from paretune.objectives.data.splits import Split
from paretune.objectives.device import Device
from paretune.objectives.latency import Latency, Protocol, measure_paired
from paretune.objectives.measurement import Measurement
from paretune.objectives.problem import Problem
from paretune.objectives.runtimes import LoadOptions, get_runtime
from paretune.objectives.scoring import artifact_outputs

ROUND = Protocol(warmup_seconds=0.05, max_calls=300)


@dataclass(frozen=True)
class Verified:
    """An artifact's measurements, by split; both share the latency of the joint rounds."""

    folder: Path
    validation: Measurement
    test: Measurement


def verify(problem: Problem, baseline: Path, folders: Sequence[Path], *, rounds: int) -> list[Verified]:
    """Measure artifacts against the baseline, round by round, and score them on validation and test.

    Each round measures every artifact once, so that a drift of the machine meets all alike. A reported latency is the
    median of the rounds' medians, its interval reaches over the intervals of all rounds. The cards are rewritten.

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
    return [_verified(problem, folder, latencies) for folder, latencies in zip(folders, measured, strict=True)]


def _verified(problem: Problem, folder: Path, latencies: Sequence[Latency]) -> Verified:
    card = Card.read(folder)
    middle = sorted(latencies, key=lambda latency: latency.median_ms)[len(latencies) // 2]
    speedups = sorted(latency.speedup for latency in latencies)
    known = replace(
        Measurement(**card.metrics["validation"]),
        latency_ms=middle.median_ms,
        latency_low_ms=min(latency.low_ms for latency in latencies),
        latency_high_ms=max(latency.high_ms for latency in latencies),
        speedup=speedups[len(speedups) // 2],
    )
    splits = problem.splits
    validation = replace(known, accuracy=_score(problem, folder, card, splits.validation))
    test = replace(known, accuracy=_score(problem, folder, card, splits.test))
    metrics = {"validation": validation.to_dict(), "test": test.to_dict()}
    write_card(folder, replace(card, metrics=metrics))
    return Verified(folder, validation, test)


def _score(problem: Problem, folder: Path, card: Card, split: Split) -> float:
    runtime = get_runtime(card.target.runtime)
    options = LoadOptions(1, card.target.threads, card.float_bits)
    return problem.task.metric(artifact_outputs(runtime, folder / MODEL, options, split), split.targets)
