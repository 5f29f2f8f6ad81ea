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
from paretune.search.executor import Executor, Outcome, Progress
from paretune.search.job import Job
from paretune.search.requests import Evaluate
from paretune.search.results import write_front
from paretune.search.stopping import FrontStopping
from paretune.search.study import Proposal, SearchStudy
from paretune.spaces.plan import CompressionPlan
from paretune.spaces.settings import INTEGER

_POLL = 1.0

_KEPT = ("dense", "variant", "enqueued")
"""Sources of plans that are always trained to their end: the dense model and the variants as what all else is compared
with, and those that the user asked for by name, who wants to know what they are worth."""


def run_trials(
    job: Job,
    folder: Path,
    study: SearchStudy,
    executor: Executor,
    metric: str,
    device: Device,
    report: Callable[[str], None],
) -> int:
    """Propose, evaluate, tell, until the budget is spent; returns how many trials were begun.

    Args:
        job: What to do.
        folder: The run folder.
        study: Proposes and is told.
        executor: Evaluates.
        metric: What the task calls its accuracy.
        device: Where trials compute; the sampler does it there too.
        report: Takes a line for each trial.
    """
    before = begun = study.proposed()
    start = time.monotonic() - study.spent_seconds
    end = start + job.search.timeout if job.search.timeout else math.inf
    limit = job.search.trials or sys.maxsize
    running: dict[int, Proposal] = {}
    stopping = _Stopping(job, study, executor)
    while True:
        # However long it took to learn what the sampler wants to know, one trial is made.
        while executor.free > 0 and begun < limit and (time.monotonic() < end or not begun):
            with device.shared():  # samplers compute too, and somebody may be measuring
                proposal = study.propose()
            begun += 1
            running[proposal.number] = proposal
            executor.submit(proposal.number, _request(job, folder, proposal), deadline=job.search.trial_timeout)
        if not running:
            return begun - before
        for event in executor.wait(_POLL):
            if isinstance(event, Progress):
                stopping.look_at(event, running[event.number])
                continue
            proposal = running.pop(event.number)
            with device.shared():  # samplers learn when they are told
                line = _tell(folder, study, stopping, proposal, event, metric)
            study.spent_seconds = time.monotonic() - start
            if not isinstance(event.result, Stopped):
                write_front(folder, study, metric)
            report(line)


class _Stopping:
    """Applies the rule to what the executor tells of running trials, if the job wants it."""

    def __init__(self, job: Job, study: SearchStudy, executor: Executor) -> None:
        self.rule = FrontStopping(study.objectives, study.constraints)
        self.reasons: dict[int, str] = {}
        self._is_on = job.search.stopping == "front"
        self._executor = executor
        for row in study.rows():
            if row.record and row.plan:
                self.rule.add(row.measurement.to_dict(), row.rungs, kind_of(row.plan))

    def look_at(self, progress: Progress, proposal: Proposal) -> None:
        """Ask a trial to end that can't reach the front any more."""
        number = progress.number
        if not self._is_on or proposal.source in _KEPT or number in self.reasons:
            return
        if reason := self.rule.verdict(number, progress.outline, progress.rungs, kind_of(proposal.plan)):
            self.reasons[number] = reason
            self._executor.stop(number)


def kind_of(plan: CompressionPlan) -> str:
    """What tells learning curves apart: a rung shows neither the cuts nor the rounding that still lie before it."""
    narrowest = min((bits for bits in plan.quantize.bits.values() if bits <= INTEGER), default=0)
    after = [f"{narrowest} bits" if narrowest else "floats", str(plan.schedule)]
    after += ["afterwards"] * (narrowest > 0 and not plan.quantize.aware) + ["codebooks"] * bool(plan.share.clusters)
    return ", ".join(after)


def _request(job: Job, folder: Path, proposal: Proposal) -> Evaluate:
    trial = folder / "trials" / str(proposal.number)
    trial.mkdir(parents=True, exist_ok=True)
    (trial / "plan.json").write_text(proposal.plan.to_json() + "\n")
    return Evaluate(proposal.plan, trial / "artifact", job.search.seed, rungs=job.search.rungs)


def _tell(
    folder: Path, study: SearchStudy, stopping: _Stopping, proposal: Proposal, outcome: Outcome, metric: str
) -> str:
    """Store what came of a trial; returns a line about it."""
    trial = folder / "trials" / str(proposal.number)
    head = f"trial {proposal.number} ({proposal.source})"
    result, error = outcome.result, outcome.error
    if isinstance(result, Record) and (lacking := study.lacking(result.measurement)):
        error = f"every objective and bound must be measured, but {lacking} couldn't be read on its target"
    if error:
        (trial / "error.txt").write_text(f"{error}\n\n{outcome.details}".rstrip() + "\n")
        study.fail(proposal.number, error)
        return f"{head}: failed: {error}"
    known = {"number": proposal.number, "source": proposal.source, "plan_hash": proposal.plan.hash}
    if isinstance(result, Stopped):
        expected = stopping.rule.expected(result.rungs, kind_of(proposal.plan))
        reason = stopping.reasons[proposal.number]
        found = {"stopped": reason, **result.to_dict(), "expected_accuracy": expected}
        _write_json(trial / "record.json", known | found)
        study.stop(proposal.number, result, expected)
        return f"{head}: {_stopped_line(metric, result, reason)}"
    _write_json(trial / "record.json", known | result.to_dict())
    study.complete(proposal.number, result)
    stopping.rule.add(result.measurement.to_dict(), result.rungs, kind_of(proposal.plan))
    return f"{head}: {_complete_line(metric, result)}"


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
