"""A job's search for a `ray.tune.Tuner` of one's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune

from paretune.errors import JobError
from paretune.search.executor import Report
from paretune.search.job import Job
from paretune.search.ray import RayExecutor
from paretune.search.run import Search, as_job
from paretune.search.run import open_search as open_any_search
from paretune.search.tune.failures import survive_deaths
from paretune.search.tune.scheduler import WorkScheduler
from paretune.search.tune.searcher import WorkSearcher
from paretune.search.tune.trainable import PlanTrainable


@dataclass(frozen=True)
class TuneSearch:
    """What a `ray.tune.Tuner` needs to search a job.

    Attributes:
        trainable: Evaluates a plan.
        searcher: Proposes plans from the run's study, and is told.
        scheduler: Ends trials that can't reach the front any more.
        search: The open run.
    """

    trainable: Any
    searcher: WorkSearcher
    scheduler: WorkScheduler
    search: Search

    def finish(self) -> Path:
        """Verify the front and write the report; returns the run folder; see `paretune.search.run.Search.finish`."""
        return self.search.finish()


@contextmanager
def open_search(job: Job | Mapping[str, Any] | str | Path, *, report: Report | None = None) -> Iterator[TuneSearch]:
    """Open the run of a job, a new one or one that was stopped, with its parts for Ray Tune.

    The measuring nodes are held as long as the block lasts. Trials beyond the job's budget aren't proposed, so
    ``num_samples=-1`` is right.

    Args:
        job: A job with ``search.executor: ray``, as for `paretune.search.run.run`.
        report: Takes one line for each thing that happens; by default they go to stderr.

    Raises:
        JobError: The job is wrong, names another executor, or its run is open elsewhere.
    """
    job = as_job(job)
    if job.search.executor != "ray":
        got = repr(job.search.executor)
        raise JobError("search.executor", "must be ray for Ray Tune", got, "set it, or use paretune.run")
    with open_any_search(job, report=report) as search, survive_deaths():
        executor = search.executor
        assert isinstance(executor, RayExecutor)
        searcher = WorkSearcher(search.trials, executor.equipment, retries=search.job.ray.retries)
        trainable = tune.with_resources(
            tune.with_parameters(PlanTrainable, equipment=executor.equipment),
            tune.PlacementGroupFactory([executor.resources]),
        )
        yield TuneSearch(trainable, searcher, WorkScheduler(searcher, executor.report), search)
