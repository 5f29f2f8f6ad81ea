"""Why a trainable broke off: told from the exception with which Ray ends its trial."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import cloudpickle
from ray.air.execution._internal import RayActorManager
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.tune.experiment import Trial


class TrialBrokeOffError(Exception):
    """A trial failed in a way that leaves its worker unfit for another one.

    Args:
        error: One line that says why.
        details: The traceback, if there is one.
    """

    def __init__(self, error: str, details: str = "") -> None:
        super().__init__(error, details)
        self.error = error
        self.details = details

    def __str__(self) -> str:
        return self.error


class WorkerUnreadyError(TrialBrokeOffError):
    """A worker couldn't load what trials need."""


class WorkerBusyError(TrialBrokeOffError):
    """A worker can't take a trial, as the one before doesn't end; it ends itself."""


class Blame(Enum):
    """What a failure means for the trial that it hit."""

    TRIAL = "it failed"
    DEATH = "its worker died: perhaps it is to blame, perhaps not"
    WORKER = "its worker never began it"
    NOBODY = "it has to wait for another worker"


@dataclass(frozen=True)
class Failure:
    """Why a trainable broke off.

    Attributes:
        blame: What it means for the trial.
        error: One line that says why.
        details: What else is known.
    """

    blame: Blame
    error: str
    details: str = ""


def failure_of(trial: Trial) -> Failure:
    """What Tune noted when it gave a trial up."""
    if trial.pickled_error_file is None:  # none of Ray's own errors
        return Failure(Blame.TRIAL, "Ray Tune gave it up", _noted(trial))
    try:
        # Tune tells nobody but its files; this process has just written them.
        error = cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    except Exception as problem:  # whatever unpickling an exception of others may raise
        return Failure(Blame.TRIAL, f"its error couldn't be read ({type(problem).__name__}: {problem})", _noted(trial))
    return understand(error)


def _noted(trial: Trial) -> str:
    return Path(trial.error_file).read_text() if trial.error_file else ""


def understand(error: Exception) -> Failure:
    """Tell from what a call of an actor raised."""
    if not isinstance(error, RayTaskError):
        return Failure(Blame.DEATH, f"the worker process died ({_cause_of_death(error)})", str(error))
    cause = error.cause
    if isinstance(cause, WorkerUnreadyError):
        return Failure(Blame.WORKER, cause.error, cause.details)
    if isinstance(cause, WorkerBusyError):
        return Failure(Blame.NOBODY, cause.error, cause.details)
    if isinstance(cause, TrialBrokeOffError):
        return Failure(Blame.TRIAL, cause.error, cause.details)
    return Failure(Blame.TRIAL, f"{type(cause).__name__}: {cause}".partition("\n")[0], str(error))


def _cause_of_death(error: Exception) -> str:
    """What is worth reading of Ray's page-long messages."""
    text = str(error)
    if isinstance(error, OutOfMemoryError) or "low on memory" in text:
        return "Ray ended it as its machine ran out of memory"
    if "node has died" in text or "node died" in text.lower():
        return "its node is gone"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = next((line for line in lines if "exit detail" in line), lines[-1] if lines else type(error).__name__)
    return told.partition("exit detail:")[2].strip().partition(". ")[0] or told


@contextmanager
def survive_deaths() -> Iterator[None]:
    """Let Tune take each death of a worker for one.

    Ray 2.60 tells a worker that its memory monitor ended by `OutOfMemoryError`, and a result that was lost with its
    node by `ObjectLostError`; neither is a `RayActorError`, and Tune ends the whole run on such an error of one trial.
    """
    method = "_actor_task_failed"
    original = getattr(RayActorManager, method)

    def failed(self: RayActorManager, tracked_actor_task: object, exception: Exception) -> None:
        if isinstance(exception, RayError) and not isinstance(exception, RayActorError | RayTaskError):
            exception = RayActorError(error_msg=f"{type(exception).__name__}: {exception}")
        original(self, tracked_actor_task, exception)

    setattr(RayActorManager, method, failed)
    try:
        yield
    finally:
        setattr(RayActorManager, method, original)
