"""Verification: front members measured once more, together, and scored on the split that the search never saw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from paretune.objectives.artifact import Card, Deployed, load_session, write_card
from paretune.objectives.data.splits import Split
from paretune.objectives.latency import Latency, Protocol, measure_paired
from paretune.objectives.measurement import Measurement
from paretune.objectives.problem import Problem
from paretune.objectives.scoring import artifact_outputs

ROUND = Protocol(warmup_seconds=0.05, max_calls=100)
"""One artifact in one round: as many calls for each."""


@dataclass(frozen=True)
class Verified:
    """An artifact's measurements, by split; both share the latency of the joint rounds.

    Attributes:
        folder: The artifact.
        validation: On the validation split.
        test: On the test split.
        throttled: Pairs of calls among them during which a GPU throttled all the time.
    """

    folder: Path
    validation: Measurement
    test: Measurement
    throttled: int = 0


def verify(problem: Problem, baseline: Path, folders: Sequence[Path], *, rounds: int) -> list[Verified]:
    """Measure artifacts against the baseline, round by round, and score them on validation and test.

    Each round measures every artifact once on each target, paired with the baseline. What is reported rests on the
    rounds' speed-ups: their median, and the baseline's median latency over all rounds divided by it, so that a drift of
    the machine between two artifacts cancels; intervals are bootstrapped over the rounds. The cards are rewritten.

    Args:
        problem: Data, task and targets.
        baseline: The dense artifact; paired with each, and verified itself where it is among `folders`.
        folders: Artifacts.
        rounds: At least 1.
    """
    speedups: list[dict[str, _Speedup]] = [{} for _ in folders]
    for name, site in problem.sites.items():
        batch = problem.batch(site.target.batch_size)
        measured: list[list[Latency]] = [[] for _ in folders]
        with problem.device().exclusive():  # also for loading: it computes, and may time kernels
            reference = load_session(baseline, name).bind(batch)
            calls = [load_session(folder, name).bind(batch) for folder in folders]
            for _ in range(rounds):
                for call, latencies in zip(calls, measured, strict=True):
                    latencies.append(measure_paired(call, reference, ROUND, site.clock))
        reference_ms = float(np.median([latency.baseline_ms for latencies in measured for latency in latencies]))
        for found, latencies in zip(speedups, measured, strict=True):
            throttled = sum(latency.throttled or 0 for latency in latencies)
            median, low, high = median_over_rounds([latency.speedup for latency in latencies])
            found[name] = _Speedup(reference_ms, median, low, high, throttled)
    with problem.device().shared():
        return [_verified(problem, folder, found) for folder, found in zip(folders, speedups, strict=True)]


class _Speedup(NamedTuple):
    """Over the rounds on one target: the baseline's latency, the median speed-up, its interval, throttled pairs."""

    reference_ms: float
    median: float
    low: float
    high: float
    throttled: int


def _verified(problem: Problem, folder: Path, speedups: Mapping[str, _Speedup]) -> Verified:
    card = Card.read(folder)
    known = Measurement.from_dict(card.metrics["validation"])
    splits = {"validation": problem.splits.validation, "test": problem.splits.test}
    found = {}
    for split_name, split in splits.items():
        on = {
            name: replace(
                known.on[name],
                accuracy=_score(problem, folder, card.deployed[name], split),
                latency_ms=speedup.reference_ms / speedup.median,
                latency_low_ms=speedup.reference_ms / speedup.high,
                latency_high_ms=speedup.reference_ms / speedup.low,
                speedup=speedup.median,
            )
            for name, speedup in speedups.items()
        }
        found[split_name] = replace(known, on=on)
    metrics = {name: measurement.to_dict() for name, measurement in found.items()}
    write_card(folder, replace(card, metrics=metrics))
    throttled = sum(speedup.throttled for speedup in speedups.values())
    return Verified(folder, found["validation"], found["test"], throttled)


def median_over_rounds(values: Sequence[float]) -> tuple[float, float, float]:
    """The median of the rounds' values and its 95 % bootstrap interval; with few rounds that is their whole range."""
    rng = np.random.default_rng(0)
    drawn = np.array(values)[rng.integers(0, len(values), (2000, len(values)))]
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(np.median(values)), float(low), float(high)


def _score(problem: Problem, folder: Path, deployed: Deployed, split: Split) -> float:
    scored = artifact_outputs(deployed.runtime(), folder / deployed.model, deployed.options(), split)
    return problem.task.metric(*scored)
