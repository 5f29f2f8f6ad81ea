"""Runs on a Ray cluster: trials are trained by Ray Tune's actors on any node, and measured on the target's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from pathlib import Path

from paretune.errors import TrialError
from paretune.objectives.problem import Problem
from paretune.objectives.verify import Verified
from paretune.search.cluster.connection import amounts, connect
from paretune.search.cluster.equipment import Equipment
from paretune.search.cluster.gauge import Station
from paretune.search.cluster.gauges import DisownedError, open_gauges
from paretune.search.cluster.parcels import own_storage
from paretune.search.executor import Executor, Report, Work
from paretune.search.job import Job
from paretune.search.outline import outline
from paretune.search.preparation import ENVIRONMENT, learn_run, prepare_run
from paretune.search.problem import load_problem, without_trainer
from paretune.search.profile import Profile
from paretune.search.tune.run import fit
from paretune.spaces.plan import CompressionPlan

_CONNECTIONS = 5
"""So many are made to a cluster that ends what is begun through them."""


class RayExecutor(Executor):
    """Trains on the nodes of a Ray cluster, and measures on those that the job names for it; see `Executor`.

    Raises:
        JobError: The cluster can't be reached, or has no nodes that fit.
        SearchError: The targets measure unlike one another, or unlike those that the run began with.
    """

    def __init__(self, job: Job, run: Path, report: Report) -> None:
        super().__init__(job, run, report)
        connections = 1
        while not self._connect(is_last=connections == _CONNECTIONS):
            connections += 1

    def _connect(self, *, is_last: bool) -> bool:
        """Connect and start the gauges; returns whether that went well, as it must the last time that it is tried."""
        job, began = self._job, self._run / ENVIRONMENT
        environment = json.loads(began.read_text()) if began.is_file() else None
        try:
            with ExitStack() as stack:
                stack.callback(connect(job).close)
                storage = stack.enter_context(own_storage(job.ray.storage, self._run))
                gauges = open_gauges(job, self.report, storage=storage, environment=environment)
                self._gauges = stack.enter_context(gauges)
                self._open = stack.pop_all()
        except DisownedError:
            if is_last:
                raise
            return False
        return True

    @cached_property
    def problem(self) -> Problem:
        return load_problem(without_trainer(self._job), self._gauges.capabilities)

    @cached_property
    def equipment(self) -> Equipment:
        """What trainers need."""
        return Equipment.of(self._job, self._run, self._gauges)

    @property
    def resources(self) -> dict[str, float]:
        """What each trainer takes of its node, in Ray's names."""
        return amounts(self._job.ray.resources)

    def prepare(self, folder: Path) -> Profile:
        return self._gauges.fill(prepare_run, folder, self.report)

    def learn(self, folder: Path, profile: Profile) -> None:
        self._gauges.fill(partial(learn_run, profile=profile), folder, self.report)

    def outline(self, plan: CompressionPlan) -> dict[str, float] | str:
        work = partial(_outline, plan=plan, seed=self._job.search.seed)
        try:
            with self.problem.device().aside():  # a sampler that asks computes, and the gauge must be alone
                found: dict[str, float] | str = self.equipment.gauges.measure(work, {})
        except TrialError as error:  # it took too long, or the process that measured it died
            return str(error)
        return found

    def run(self, work: Work) -> None:
        job = self._job
        fit(
            work,
            self.equipment,
            workers=job.search.workers,
            resources=self.resources,
            retries=job.ray.retries,
            report=self.report,
        )

    def verify(self, folders: Sequence[Path], *, rounds: int, deadline: float) -> list[Verified]:
        return self.equipment.gauges.verify(folders, rounds=rounds, deadline=deadline)

    def close(self) -> None:
        self._open.close()


def _outline(
    station: Station, folder: Path, report: Report, *, plan: CompressionPlan, seed: int
) -> dict[str, float] | str:
    return outline(station.evaluator, plan, seed)
