"""The last step of a search: front members trained longer, measured together afresh, scored on the test split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from paretune.errors import TrialError
from paretune.objectives.checkpoint import Checkpoint
from paretune.search._runfiles import plural
from paretune.search.executor import Assignment, Executor, Outcome, Progress, Work
from paretune.search.job import Job
from paretune.search.problem import BASELINE
from paretune.search.requests import Evaluate
from paretune.search.results import front_of, write_front
from paretune.search.study import SearchStudy, TrialRow


def verify_front(
    job: Job, run: Path, study: SearchStudy, executor: Executor, metric: str, report: Callable[[str], None]
) -> None:
    """Verify the front's members and write the verified `front.json`.

    The plans just behind the front are verified with it, as far as `verify.points` allows. The training of each goes on
    from its trial's checkpoint to `verify.epochs`, or begins anew where there is none to go on from; of its two
    artifacts the one with the better validation accuracy stays. All are then measured together and scored.

    Raises:
        SearchError: The measuring failed.
    """
    members = _members(study, job.verify.points)
    epochs = job.verify.epochs or 2 * job.finetune.epochs
    # As for a training from the beginning: what is resumed goes on from within its first one.
    deadline = job.search.trial_timeout * max(1.0, epochs / job.finetune.epochs)
    trainings = _Trainings(run, members, job.search.seed, epochs, deadline, report)
    report(f"verifying {plural(len(members), 'plan')}, the front and the next best: {trainings.how()}")
    executor.run(trainings)
    folders = [run / BASELINE, *trainings.artifacts.values()]
    found = executor.verify(folders, rounds=job.verify.rounds, deadline=deadline * (1 + len(members)))
    verified = {row.number: one for row, one in zip(members, found[1:], strict=True)}
    write_front(run, study, metric, verified)


class _Trainings(Work):
    """The longer trainings of a front's members.

    Attributes:
        artifacts: Number of each trial to the better of its artifacts, as far as they were trained.
    """

    def __init__(
        self,
        run: Path,
        members: Sequence[TrialRow],
        seed: int,
        epochs: float,
        deadline: float,
        report: Callable[[str], None],
    ) -> None:
        self._run = run
        self._members = {row.number: row for row in members}
        self._seed = seed
        self._epochs = epochs
        self._deadline = deadline
        self._report = report
        self.artifacts = {number: self._trial(number) / "artifact" for number in self._members}
        self._trained = {number: _trained(artifact, epochs) for number, artifact in self.artifacts.items()}
        self._waiting = [(number, done > 0) for number, done in self._trained.items()]
        self._resumed: set[int] = set()

    def how(self) -> str:
        """What will be done, in words."""
        resumed = sum(done > 0 for done in self._trained.values())
        anew = len(self._trained) - resumed
        parts = [f"{resumed} trained on from their trials to {self._epochs:g} epochs"] if resumed else []
        return ", ".join([*parts, *([f"{anew} trained anew for {self._epochs:g} epochs"] if anew else [])])

    def next(self) -> Assignment | None:
        """Train the next one, longer than its trial did."""
        if not self._waiting:
            return None
        number, resumes = self._waiting.pop(0)
        if resumes:
            self._resumed.add(number)
        plan, trial = self._members[number].plan, self._trial(number)
        assert plan is not None
        resume = trial / "artifact" if resumes else None
        request = Evaluate(plan, trial / "verified", self._seed, self._epochs, resume=resume)
        return Assignment(number, request, self._deadline)

    @property
    def is_over(self) -> bool:
        """Whether all were begun; one that can't be trained on is begun anew."""
        return not self._waiting and not self._resumed

    def progress(self, progress: Progress) -> bool:
        """All are trained to their end."""
        return False

    def ended(self, outcome: Outcome) -> None:
        """Keep the better artifact of a plan."""
        number = outcome.number
        resumed = number in self._resumed
        self._resumed.discard(number)
        if not outcome.error:
            if outcome.result.measurement.main.accuracy >= self._members[number].measurement.main.accuracy:
                self.artifacts[number] = self._trial(number) / "verified"
        elif resumed:
            self._report(f"trial {number}: begins anew, as it couldn't be trained on: {outcome.error}")
            self._waiting.append((number, False))
        else:
            self._report(f"trial {number}: longer training failed, its artifact stays: {outcome.error}")

    def _trial(self, number: int) -> Path:
        return self._run / "trials" / str(number)


def _trained(artifact: Path, epochs: float) -> float:
    """Epochs after which a trial's training can go on; 0 where it begins anew, as that of older versions."""
    try:
        trained = Checkpoint.read(artifact).epochs
    except TrialError:
        return 0.0
    return trained if trained < epochs else 0.0


def _members(study: SearchStudy, limit: int | None) -> list[TrialRow]:
    """The front and, as far as `limit` allows, the fronts behind it.

    Short trainings rank plans roughly: a plan just behind the front may be on it when all are trained longer.
    """
    members, rows = _spread(study.front(), limit), study.rows()
    while limit is not None and len(members) < limit:
        behind = front_of(rows, study.objectives, without={row.number for row in members})
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
