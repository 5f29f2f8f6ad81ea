"""The seam of the executors: what a search wants run, and where it is run."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paretune.objectives.problem import Problem
from paretune.objectives.progress import Rung, Stopped
from paretune.objectives.verify import Verified
from paretune.search.job import Job
from paretune.search.profile import Profile
from paretune.search.requests import Evaluate
from paretune.spaces.plan import CompressionPlan

Report = Callable[[str], None]
"""Takes a line for the user."""


@dataclass(frozen=True)
class Assignment:
    """A request to run.

    Attributes:
        number: Names it in its progress and outcome.
        request: What to do.
        deadline: Seconds after which it is stopped as failed.
    """

    number: int
    request: Evaluate
    deadline: float


@dataclass(frozen=True)
class Progress:
    """How far a request is that goes on.

    Attributes:
        number: The request's number.
        outline: What is known of its plan without the training.
        rungs: Those that it reached so far.
        seconds: Phase of the trial to its duration so far.
        steps: Training steps so far.
    """

    number: int
    outline: Mapping[str, float]
    rungs: tuple[Rung, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    steps: int = 0

    @classmethod
    def of(cls, number: int, so_far: Stopped) -> Progress:
        """Of a trial that would be `so_far` if it were ended now."""
        return cls(number, so_far.outline, so_far.rungs, so_far.seconds, so_far.steps)

    def stopped(self) -> Stopped:
        """The trial, if it is ended here."""
        return Stopped(dict(self.outline), self.rungs, dict(self.seconds), self.steps)


@dataclass(frozen=True)
class Outcome:
    """What came of a request.

    Attributes:
        number: The request's number.
        result: What it returned; None where it failed.
        error: One line that says why it failed; empty where it didn't.
        details: The traceback, or what else is known of a failure.
        retries: How often it was begun again because its worker died.
    """

    number: int
    result: Any = None
    error: str = ""
    details: str = ""
    retries: int = 0


class Work(ABC):
    """What there is to run. All of it is called by one thread, which is the only one that writes to the study."""

    @abstractmethod
    def next(self) -> Assignment | None:
        """The next request, which is begun at once; None where there is none now, or ever."""

    @property
    @abstractmethod
    def is_over(self) -> bool:
        """Whether no further request will come, whatever becomes of those that run."""

    @abstractmethod
    def progress(self, progress: Progress) -> bool:
        """Take how far a request is; returns whether it shall end early. It may end as if it hadn't been asked."""

    @abstractmethod
    def ended(self, outcome: Outcome) -> None:
        """Take what came of a request, once for each."""


class Executor(ABC):
    """Where a run's work is done: compressing and training on its workers, measuring on the job's targets.

    Args:
        job: What is run.
        run: The run folder, which `prepare` need not have filled yet. Where it is filled already, the targets must be
            what they were when it was.
        report: Takes one line for each thing that happens.

    Attributes:
        report: The same.
    """

    def __init__(self, job: Job, run: Path, report: Report) -> None:
        self._job = job
        self._run = run
        self.report = report

    @property
    @abstractmethod
    def problem(self) -> Problem:
        """What the job is about, for this process: it never measures anything with it where the targets are elsewhere.

        Raises:
            JobError: Something of the job is wrong.
        """

    @abstractmethod
    def prepare(self, folder: Path) -> Profile:
        """Fill the folder of a new run, where the targets are; see `paretune.search.preparation.prepare_run`."""

    @abstractmethod
    def learn(self, folder: Path, profile: Profile) -> None:
        """Find out what the job's sampler wants to know; see `paretune.search.preparation.learn_run`."""

    @abstractmethod
    def outline(self, plan: CompressionPlan) -> dict[str, float] | str:
        """What a plan of the run costs untrained, or why it can't be deployed; see `paretune.search.outline`."""

    @abstractmethod
    def run(self, work: Work) -> None:
        """Run requests, as many at a time as there are workers, until the work is over and all of them ended.

        A request whose worker died, or that overran its deadline, ends with an error; the worker is replaced.

        Raises:
            SearchError: The work can't go on, e.g. because no worker can be started.
        """

    @abstractmethod
    def verify(self, folders: Sequence[Path], *, rounds: int, deadline: float) -> list[Verified]:
        """Measure artifacts together, in a process that did nothing else; see `paretune.objectives.verify`.

        Raises:
            SearchError: That failed, or took longer than `deadline` seconds.
        """

    @abstractmethod
    def close(self) -> None:
        """End all workers at once, with what they run."""


_EXECUTORS = {"local": ("paretune.search.local", "LocalExecutor"), "ray": ("paretune.search.ray", "RayExecutor")}


def make_executor(job: Job, run: Path, report: Report) -> Executor:
    """The executor that the job names; see `Executor`."""
    module, attribute = _EXECUTORS[job.search.executor]  # imported when asked for: Ray takes seconds
    executor: Executor = getattr(importlib.import_module(module), attribute)(job, run, report)
    return executor
