"""The seam of the executors: what runs requests, and how their outcomes come back."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretune.objectives.progress import Rung
from paretune.search.job import Job
from paretune.search.requests import Request


@dataclass(frozen=True)
class Outcome:
    """What came of a request.

    Attributes:
        number: The request's number.
        result: What it returned; None where it failed.
        error: One line that says why it failed; empty where it didn't.
        details: The traceback, or what else is known of a failure.
    """

    number: int
    result: Any = None
    error: str = ""
    details: str = ""


@dataclass(frozen=True)
class Progress:
    """How far a request is that goes on.

    Attributes:
        number: The request's number.
        outline: What is known of its plan without the training.
        rungs: Those that it reached so far.
    """

    number: int
    outline: Mapping[str, float]
    rungs: tuple[Rung, ...] = ()


EXECUTORS = {"local": ("paretune.search.local", "LocalExecutor")}
"""Name to module and class; imported when first asked for."""


def make_executor(job: Job, run: Path, *, workers: int) -> Executor:
    """The executor that the job names, for a run, with so many workers."""
    module, attribute = EXECUTORS[job.search.executor]
    executor: Executor = getattr(importlib.import_module(module), attribute)(job, run, workers=workers)
    return executor


class Executor(ABC):
    """Runs requests in processes of its own. The search submits while `free` is positive, then waits.

    Attributes:
        free: How many requests can be submitted now.
    """

    free: int

    @abstractmethod
    def submit(self, number: int, request: Request, *, deadline: float) -> None:
        """Begin a request; `number` names it in its outcome. It is stopped after `deadline` seconds."""

    @abstractmethod
    def wait(self, timeout: float) -> list[Outcome | Progress]:
        """What ended or got on since the last call, in its order for each request; blocks up to `timeout` seconds.

        A request that got on doesn't wait for an answer. One whose worker died, or that overran its deadline, ends
        with an error; the worker is replaced.

        Raises:
            SearchError: No worker can be started.
        """

    @abstractmethod
    def stop(self, number: int) -> None:
        """Ask a request to end early; no answer is waited for. It may end as if it hadn't been asked, or have ended."""

    @abstractmethod
    def close(self) -> None:
        """End all workers at once, with what they run."""
