"""The last step of a search: front members trained longer, measured together afresh, scored on the test split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from paretune.errors import SearchError, TrialError
from paretune.objectives.checkpoint import Checkpoint
from paretune.search._runfiles import plural
from paretune.search.executor import Executor, Outcome, make_executor
from paretune.search.job import Job
from paretune.search.problem import BASELINE
from paretune.search.requests import Evaluate, Verify
from paretune.search.results import candidates, write_front
from paretune.search.study import SearchStudy, TrialRow


def verify_front(
    job: Job, run: Path, study: SearchStudy, executor: Executor, metric: str, report: Callable[[str], None]
) -> None:
    """Verify the front's members and write the verified `front.json`.

    The plans just behind the front are verified with it, as far as `verify.points` allows. The training of each goes on
    from its trial's checkpoint to `verify.epochs`, or begins anew where there is none to go on from; of its two
    artifacts the one with the better validation accuracy stays. The executor is then closed, and a process that did
    nothing else measures all together and scores them.

    Raises:
        SearchError: The measuring failed.
    """
    members = _members(study, job.verify.points)
    artifacts = {row.number: run / "trials" / str(row.number) / "artifact" for row in members}
    epochs = job.verify.epochs or 2 * job.finetune.epochs
    trained = {number: _trained(artifact, epochs) for number, artifact in artifacts.items()}
    report(f"verifying {plural(len(members), 'plan')}, the front and the next best: {_how(trained.values(), epochs)}")
    requests = [_longer(run, row, job.search.seed, epochs, trained[row.number]) for row in members]
    # As for a training from the beginning: what is resumed goes on from within its first one.
    deadline = job.search.trial_timeout * max(1.0, epochs / job.finetune.epochs)
    outcomes = {outcome.number: outcome for outcome in _run_all(executor, requests, deadline)}
    refused = [row for row in members if trained[row.number] and outcomes[row.number].error]
    for row in refused:
        report(f"trial {row.number}: begins anew, as it couldn't be trained on: {outcomes[row.number].error}")
    anew = [_longer(run, row, job.search.seed, epochs, 0.0) for row in refused]
    outcomes |= {outcome.number: outcome for outcome in _run_all(executor, anew, deadline)}
    for row in members:
        outcome = outcomes[row.number]
        if outcome.error:
            report(f"trial {row.number}: longer training failed, its artifact stays: {outcome.error}")
        elif outcome.result.measurement.main.accuracy >= row.measurement.main.accuracy:
            artifacts[row.number] = run / "trials" / str(row.number) / "verified"
    executor.close()
    fresh = make_executor(job, run, workers=1)
    try:
        folders = [run / BASELINE, *artifacts.values()]
        (outcome,) = _run_all(fresh, [(0, Verify(folders, job.verify.rounds))], deadline * (1 + len(members)))
    finally:
        fresh.close()
    if outcome.error:
        raise SearchError(f"the front must be measured afresh, but that failed: {outcome.error}")
    verified = {row.number: found for row, found in zip(members, outcome.result[1:], strict=True)}
    write_front(run, study, metric, verified)


def _trained(artifact: Path, epochs: float) -> float:
    """Epochs after which a trial's training can go on; 0 where it begins anew, as that of older versions."""
    try:
        trained = Checkpoint.read(artifact).epochs
    except TrialError:
        return 0.0
    return trained if trained < epochs else 0.0


def _how(trained: Iterable[float], epochs: float) -> str:
    begins = Counter(done > 0 for done in trained)
    resumed, anew = begins[True], begins[False]
    parts = [f"{resumed} trained on from their trials to {epochs:g} epochs"] if resumed else []
    return ", ".join([*parts, *([f"{anew} trained anew for {epochs:g} epochs"] if anew else [])])


def _longer(run: Path, row: TrialRow, seed: int, epochs: float, trained: float) -> tuple[int, Evaluate]:
    assert row.plan is not None
    trial = run / "trials" / str(row.number)
    resume = trial / "artifact" if trained else None
    return row.number, Evaluate(row.plan, trial / "verified", seed, epochs, resume=resume)


def _run_all(executor: Executor, requests: Sequence[tuple[int, Evaluate | Verify]], deadline: float) -> list[Outcome]:
    waiting = list(requests)
    outcomes: list[Outcome] = []
    while len(outcomes) < len(requests):
        while waiting and executor.free > 0:
            number, request = waiting.pop(0)
            executor.submit(number, request, deadline=deadline)
        outcomes += [event for event in executor.wait(1.0) if isinstance(event, Outcome)]
    return outcomes


def _members(study: SearchStudy, limit: int | None) -> list[TrialRow]:
    """The front and, as far as `limit` allows, the fronts behind it.

    Short trainings rank plans roughly: a plan just behind the front may be on it when all are trained longer.
    """
    members = _spread(candidates(study), limit)
    while limit is not None and len(members) < limit:
        behind = candidates(study, without={row.number for row in members})
        if not behind:
            break
        members += _spread(behind, limit - len(members))
    return sorted(members, key=lambda row: row.measurement.main.latency_ms)


def _spread(front: Sequence[TrialRow], limit: int | None) -> list[TrialRow]:
    """At most `limit` members, evenly spread along the front, both ends among them."""
    if limit is None or len(front) <= limit:
        return list(front)
    if limit == 1:
        return [front[-1]]
    return [front[round(i * (len(front) - 1) / (limit - 1))] for i in range(limit)]
