"""The trials of a run: proposed, evaluated, ended early where they can't reach the front, told."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paretune.objectives.device import Device
from paretune.objectives.measurement import Record
from paretune.objectives.progress import Stopped
from paretune.search.executor import Assignment, Outcome, Progress, Work
from paretune.search.job import Job
from paretune.search.requests import Evaluate
from paretune.search.results import write_front
from paretune.search.stopping import FrontStopping
from paretune.search.study import Proposal, SearchStudy
from paretune.spaces.plan import CompressionPlan
from paretune.spaces.settings import INTEGER

_KEPT = ("dense", "variant", "enqueued")
"""Sources of plans that are always trained to their end: the dense model and the variants as what all else is compared
with, and those that the user asked for by name, who wants to know what they are worth."""


class Trials(Work):
    """The trials of a study: proposed until the budget is spent, ended early where they can't reach the front, told.

    Args:
        job: What to do.
        folder: The run folder.
        study: Proposes and is told.
        metric: What the task calls its accuracy.
        device: Where this process computes; the sampler does it there too.
        report: Takes a line for each trial.
    """

    def __init__(
        self,
        job: Job,
        folder: Path,
        study: SearchStudy,
        metric: str,
        device: Device,
        report: Callable[[str], None],
    ) -> None:
        self._job = job
        self._folder = folder
        self._study = study
        self._metric = metric
        self._device = device
        self._report = report
        self._before = self._begun = study.proposed()
        self._start = time.monotonic() - study.spent_seconds
        self._end = self._start + job.search.timeout if job.search.timeout else math.inf
        self._running: dict[int, Proposal] = {}
        self._reasons: dict[int, str] = {}
        self._front_is_stale = True  # a run that was killed may not have written its last one
        self._rule = FrontStopping(study.objectives, study.constraints)
        for row in study.rows():
            if row.record and row.plan:
                self._rule.add(row.measurement.to_dict(), row.rungs, kind_of(row.plan))

    @property
    def begun(self) -> int:
        """How many trials were begun here."""
        return self._begun - self._before

    @property
    def is_over(self) -> bool:
        """Whether the budget is spent; however long it took to learn what the sampler wants to know, one is made."""
        is_late = self._begun > 0 and time.monotonic() >= self._end
        return is_late or self._begun >= (self._job.search.trials or sys.maxsize)

    def next(self) -> Assignment | None:
        """Propose a plan."""
        if self.is_over:
            return None
        with self._device.shared():  # samplers compute too, and somebody may be measuring
            proposal = self._study.propose()
        self._begun += 1
        self._running[proposal.number] = proposal
        return Assignment(proposal.number, self._request(proposal), self._job.search.trial_timeout)

    def progress(self, progress: Progress) -> bool:
        """Whether a trial can't reach the front any more."""
        number = progress.number
        proposal = self._running[number]
        if self._job.search.stopping != "front" or proposal.source in _KEPT:
            return False
        if number not in self._reasons:
            reason = self._rule.verdict(number, progress.outline, progress.rungs, kind_of(proposal.plan))
            if not reason:
                return False
            self._reasons[number] = reason
        return True

    def ended(self, outcome: Outcome) -> None:
        """Store what came of a trial, and learn from it."""
        proposal = self._running.pop(outcome.number)
        with self._device.shared():  # samplers learn when they are told
            line = self._tell(proposal, outcome)
        self._study.spent_seconds = time.monotonic() - self._start
        if self._front_is_stale:
            write_front(self._folder, self._study, self._metric)
            self._front_is_stale = False
        self._report(line)

    def _request(self, proposal: Proposal) -> Evaluate:
        trial = self._folder / "trials" / str(proposal.number)
        trial.mkdir(parents=True, exist_ok=True)
        (trial / "plan.json").write_text(proposal.plan.to_json() + "\n")
        search = self._job.search
        return Evaluate(proposal.plan, trial / "artifact", search.seed, rungs=search.rungs)

    def _tell(self, proposal: Proposal, outcome: Outcome) -> str:
        """Store what came of a trial; returns a line about it."""
        study, number = self._study, proposal.number
        trial = self._folder / "trials" / str(number)
        head = f"trial {number} ({proposal.source})"
        result, error = outcome.result, outcome.error
        if isinstance(result, Record) and (lacking := study.lacking(result.measurement)):
            error = f"every objective and bound must be measured, but {lacking} couldn't be read on its target"
        known = {"number": number, "source": proposal.source, "plan_hash": proposal.plan.hash}
        if outcome.retries:
            head += f", begun {1 + outcome.retries} times"
            known |= {"retries": outcome.retries}
        if error:
            (trial / "error.txt").write_text(f"{error}\n\n{outcome.details}".rstrip() + "\n")
            study.fail(number, error)
            return f"{head}: failed: {error}"
        if isinstance(result, Stopped):
            expected, reason = self._rule.expected(result.rungs, kind_of(proposal.plan)), self._reasons[number]
            found = {"stopped": reason, **result.to_dict(), "expected_accuracy": expected}
            _write_json(trial / "record.json", known | found)
            study.stop(number, result, expected)
            return f"{head}: {_stopped_line(self._metric, result, reason)}"
        _write_json(trial / "record.json", known | result.to_dict())
        self._front_is_stale |= study.complete(number, result)
        self._rule.add(result.measurement.to_dict(), result.rungs, kind_of(proposal.plan))
        return f"{head}: {_complete_line(self._metric, result)}"


def kind_of(plan: CompressionPlan) -> str:
    """What tells learning curves apart: a rung shows neither the cuts nor the rounding that still lie before it."""
    narrowest = min((bits for bits in plan.quantize.bits.values() if bits <= INTEGER), default=0)
    after = [f"{narrowest} bits" if narrowest else "floats", str(plan.schedule)]
    after += ["afterwards"] * (narrowest > 0 and not plan.quantize.aware) + ["codebooks"] * bool(plan.share.clusters)
    return ", ".join(after)


def _stopped_line(metric: str, stopped: Stopped, reason: str) -> str:
    last = stopped.rungs[-1] if stopped.rungs else None
    where = f"at {100 * last.share:.0f} %: {metric} {last.accuracy:.4f}" if last else "before the first rung"
    return f"stopped {where}, {reason}, {sum(stopped.seconds.values()):.1f} s"


def _complete_line(metric: str, record: Record) -> str:
    measured = record.measurement.main
    others = record.measurement.on.items()
    return (
        f"{metric} {measured.accuracy:.4f}, {measured.latency_ms:.3f} ms ({measured.speedup:.2f}x), "
        + "".join(f"{other.latency_ms:.3f} ms on {name} ({other.speedup:.2f}x), " for name, other in others if name)
        + f"{measured.size_bytes:,} bytes, {sum(record.seconds.values()):.1f} s"
        + (", noisy" if record.noisy else "")
    )


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")
