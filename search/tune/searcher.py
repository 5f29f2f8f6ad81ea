"""A searcher for Ray Tune over what paretune wants run: in the driver, which alone writes to the study."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray.tune.search import Searcher

from paretune.errors import SearchError
from paretune.objectives.progress import Stopped
from paretune.search.cluster.parcels import Parcel
from paretune.search.executor import Assignment, Outcome, Progress, Work
from paretune.search.tune.equipment import Equipment
from paretune.search.tune.events import Cargo, artifact_of, outcome_of
from paretune.search.tune.failures import Blame, Failure

_START_LIMIT = 3
"""So many workers, or as many as there are, may fail to load what trials need before any was heard; then the search
ends. Later, a request that meets so many of them fails."""

_FETCH_SECONDS = 600.0
"""An artifact that takes longer on its way from another node is lost."""


@dataclass
class _Attempt:
    """A request that a trial of Tune carries out.

    Attributes:
        assignment: The request.
        retries: How often it was begun before.
        failed_starts: How often its worker couldn't load what trials need.
        cargo: What is under way to the worker.
        progress: What it told last.
        is_unwanted: Whether it was asked to end.
        failure: Why it broke off.
    """

    assignment: Assignment
    retries: int = 0
    failed_starts: int = 0
    cargo: list[Cargo] = field(default_factory=list)
    progress: Progress | None = None
    is_unwanted: bool = False
    failure: Failure | None = None


class WorkSearcher(Searcher):
    """Suggests the requests of a `paretune.search.executor.Work`, and tells it once for each what came of it.

    A request whose worker died is suggested again, as another trial of Tune: leave ``FailureConfig.max_failures`` at 0.
    Trials that are under way when Tune is ended otherwise, e.g. by its time budget or Ctrl-C, aren't told: their study
    knows them as running, and `paretune resume` does them again. For the same reason nothing is saved or restored here.

    Args:
        work: What there is to run. Only the thread that runs Tune calls it.
        equipment: Carries artifacts between the workers and this process.
        retries: How often a request is begun again that lost its worker; then it failed.

    Attributes:
        error: What went wrong in the work or here; nothing more is run then. `WorkScheduler` raises it.
    """

    def __init__(self, work: Work, equipment: Equipment, *, retries: int = 1) -> None:
        super().__init__()
        self.error: Exception | None = None
        self._work = work
        self._retries = retries
        self._equipment = equipment
        self._running: dict[str, _Attempt] = {}
        self._waiting: deque[_Attempt] = deque()
        self._failed_starts = 0
        self._was_heard = False

    @property
    def unfinished(self) -> int:
        """How many requests aren't told yet."""
        return len(self._running) + len(self._waiting)

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]  # FINISHED is a text
        """The next request's number, deadline and the request itself; None where there is none now.

        Raises:
            Exception: What the work raised, where nothing runs.
        """
        with self._noting_errors():
            attempt = self._next()
            if attempt is not None:
                config = self._config(attempt)
                self._running[trial_id] = attempt
                return config
            # Tune never asks again after this, and a request that runs may yet be suggested a second time.
            if self.error is None and self._work.is_over and not self._running:
                return str(Searcher.FINISHED)
        if self.error is not None and not self._running:
            raise self.error  # `WorkScheduler` would do it, but Tune now waits ten minutes for a suggestion
        return None

    def got_on(self, trial_id: str, progress: Progress) -> bool:
        """Take how far a trial is; returns whether it shall end."""
        attempt = self._running.get(trial_id)
        if attempt is None or self.error is not None:
            return False
        self._hear()
        attempt.progress = progress
        with self._noting_errors():
            attempt.is_unwanted = self._work.progress(progress)
        return attempt.is_unwanted

    def broke_off(self, trial_id: str, failure: Failure) -> None:
        """Take why a trial broke off, before Tune tells that it did."""
        if attempt := self._running.get(trial_id):
            attempt.failure = failure

    def on_trial_complete(self, trial_id: str, result: Mapping[str, Any] | None = None, error: bool = False) -> None:
        """Tell what came of a trial, unless it is begun again; Tune may call this twice for one."""
        attempt = self._running.pop(trial_id, None)
        if attempt is None:
            return
        with self._noting_errors():
            for cargo in attempt.cargo:
                if isinstance(content := cargo.unload(), Parcel):
                    content.discard()
            if error:
                self._look_into(attempt)
            else:
                self._take(attempt, result or {})

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the study has it all."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the study has it all."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles what it was given, for a restoration that isn't ours

    def _next(self) -> _Attempt | None:
        if self.error is not None:
            return None
        if self._waiting:
            return self._waiting.popleft()
        assignment = self._work.next()
        return None if assignment is None else _Attempt(assignment)

    def _config(self, attempt: _Attempt) -> dict[str, Any]:
        number, request = attempt.assignment.number, attempt.assignment.request
        config = {"number": number, "deadline": attempt.assignment.deadline}
        cargo = {"request": Cargo(request, f"request {number}")}
        if request.resume is not None:
            cargo["resume"] = Cargo(self._equipment.carry_out(request.resume), f"artifact of {number}")
        attempt.cargo = list(cargo.values())
        return config | cargo

    def _take(self, attempt: _Attempt, result: Mapping[str, Any]) -> None:
        number = attempt.assignment.number
        outcome = outcome_of(number, result, attempt.retries)
        if outcome is None:
            return self._work.ended(self._broken_off(attempt))
        self._hear()
        artifact = artifact_of(result)
        if artifact is not None and not outcome.error:
            try:
                parcel: Parcel = ray.get(artifact.unload(), timeout=_FETCH_SECONDS)
            except ray.exceptions.RayError as error:
                reason = f"its artifact was lost with its node ({type(error).__name__})"
                attempt.failure = Failure(Blame.DEATH, reason, str(error))
                return self._look_into(attempt)
            self._equipment.carry_in(parcel, attempt.assignment.request.folder)
        return self._work.ended(outcome)

    def _broken_off(self, attempt: _Attempt) -> Outcome:
        """Of a trial that Tune ended before its end."""
        number = attempt.assignment.number
        if attempt.is_unwanted and attempt.progress:
            stopped: Stopped = attempt.progress.stopped()
            return Outcome(number, stopped, retries=attempt.retries)
        return Outcome(number, error="Ray Tune ended it, by a rule that isn't paretune's", retries=attempt.retries)

    def _look_into(self, attempt: _Attempt) -> None:
        """Begin a trial again that broke off, or tell that it failed."""
        failure = attempt.failure or Failure(Blame.TRIAL, "Ray Tune gave it up without a reason")
        fresh = _Attempt(attempt.assignment, attempt.retries, attempt.failed_starts)
        is_death, is_start = failure.blame is Blame.DEATH, failure.blame is Blame.WORKER
        if (is_death or is_start) and not self._was_heard:
            self._count_failed_start(failure)
        if failure.blame is Blame.NOBODY:
            self._waiting.append(fresh)
        elif is_start and attempt.failed_starts + 1 < _START_LIMIT:
            self._waiting.append(replace(fresh, failed_starts=attempt.failed_starts + 1))
        elif is_death and attempt.retries < self._retries:
            self._waiting.append(replace(fresh, retries=attempt.retries + 1))
        else:
            number = attempt.assignment.number
            self._work.ended(Outcome(number, error=failure.error, details=failure.details, retries=attempt.retries))

    def _count_failed_start(self, failure: Failure) -> None:
        """
        Raises:
            SearchError: Too many in a row.
        """
        self._failed_starts += 1
        if self._failed_starts >= max(_START_LIMIT, self.unfinished):
            raise SearchError(f"workers must start, but {self._failed_starts} in a row didn't: {failure.error}")

    def _hear(self) -> None:
        self._failed_starts = 0
        self._was_heard = True

    @contextmanager
    def _noting_errors(self) -> Iterator[None]:
        """Tune would take an error for one of the trial, and begin that again."""
        try:
            yield
        except Exception as error:
            self.error = self.error or error
