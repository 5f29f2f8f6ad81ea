"""The Optuna study: the only truth about trials; those of a run are written by its driver alone."""

from __future__ import annotations

import sqlite3
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import optuna
import sqlalchemy
from optuna.samplers import BaseSampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState

from paretune.errors import JobError
from paretune.objectives.measurement import Measurement, Record
from paretune.objectives.progress import Rung, Stopped
from paretune.search._runfiles import redacted
from paretune.search.front import Front, feasible, violation
from paretune.search.job import Job
from paretune.search.job_types import Constraint, direction
from paretune.search.storage import TrialStorage
from paretune.spaces.plan import CompressionPlan
from paretune.spaces.space import SearchSpace

_SOURCE, _PLAN, _RECORD, _ERROR, _SPENT = "source", "plan", "record", "error", "spent_seconds"
_STOPPED, _EXPECTED = "stopped", "expected_accuracy"
_RUN = "run"
"""The driver of a trial, in a study that several share."""

_SAMPLER = "sampler"
"""The source of trials that carry none, which are most."""

_OPENINGS, _PAUSE = 30, 0.2
"""A database that others open at the same moment is opened so often; it has a dozen tables."""

_DRIVERS = MappingProxyType({"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql"})
"""Database to how a URL begins whose driver comes with the extra of that name."""


@dataclass(frozen=True)
class Proposal:
    """A plan to evaluate, under the number of its trial."""

    number: int
    plan: CompressionPlan
    source: str


class SearchStudy:
    """A run's study: proposes plans and is told what came of them. Nobody else writes to its trials.

    Args:
        name: The study's name in its storage.
        url: Any database URL that Optuna takes.
        space: What plans are made of.
        sampler: Who proposes.
        objectives: Names of measured values, told in this order.
        constraints: Bounds that feasible trials keep.
        run: Whose trials are told here, where other drivers have theirs in the same study: all that is said of trials
            is said of these, and only the sampler looks at the others. None for a study of one's own.
    """

    def __init__(
        self,
        name: str,
        url: str,
        space: SearchSpace,
        sampler: BaseSampler,
        *,
        objectives: Sequence[str],
        constraints: Sequence[Constraint] = (),
        run: str | None = None,
    ) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space = space
        self.objectives = tuple(objectives)
        self.constraints = tuple(constraints)
        self._distributions = space.distributions()
        self._storage = TrialStorage(open_storage(url), {} if run is None else {_RUN: run})
        self._study = optuna.create_study(
            study_name=name,
            storage=self._storage,
            sampler=sampler,
            directions=[direction(objective) for objective in objectives],
            load_if_exists=True,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.set_metric_names(list(objectives))
        if self._study.get_trials(deepcopy=False):
            sampler.reseed_rng()  # else a resumed search would propose again what it proposed with its seed before
        self.sampler = sampler
        self._run = run
        self._running: dict[int, optuna.Trial] = {}
        self._front = Front(self.objectives)
        self._members: dict[int, TrialRow] = {}
        for row in self.rows():
            if row.feasible:
                self._front.add(row.number, row.measurement.to_dict())

    @property
    def is_new(self) -> bool:
        """Whether nobody has begun or enqueued a trial yet."""
        return not self._study.get_trials(deepcopy=False)

    def agree(self, key: str, value: Any) -> Any:
        """What the first of the drivers that share a study has said under a key: this value, if nobody has."""
        return self._storage.agree(self._storage.get_study_id_from_name(self._study.study_name), key, value)

    def _trials(self, *states: TrialState) -> list[FrozenTrial]:
        """Those of this run, in the order of their numbers."""
        return _of_run(self._study.get_trials(deepcopy=False, states=states or None), self._run)

    def enqueue(self, plan: CompressionPlan, source: str) -> None:
        """Have a plan evaluated before the sampler's own."""
        params = self.space.to_params(plan)
        self._study.enqueue_trial(params, user_attrs={_SOURCE: source})

    def propose(self) -> Proposal:
        """Ask for the next plan; its trial is running from now on."""
        trial = self._study.ask(self._distributions)
        plan = self.space.to_plan(trial.params)
        source = _source_of(self._study.get_trials(deepcopy=False)[trial.number])
        trial.set_user_attr(_PLAN, plan.to_dict())
        self._storage.flush()  # before anybody works on it
        self._running[trial.number] = trial
        return Proposal(trial.number, plan, source)

    def lacking(self, found: Measurement) -> str:
        """Name of an objective, or of what is bounded, that wasn't measured; empty where all were."""
        known = found.to_dict()
        wanted = (*self.objectives, *(constraint.name for constraint in self.constraints))
        return next((name for name in wanted if name not in known), "")

    def complete(self, number: int, record: Record) -> bool:
        """Tell what a trial measured; returns whether the front is another one now."""
        trial = self._running.pop(number)
        trial.set_user_attr(_RECORD, record.to_dict())
        metrics = record.measurement.to_dict()
        for constraint in self.constraints:
            trial.set_constraint(str(constraint), violation(constraint, metrics))
        self._study.tell(trial, [metrics[name] for name in self.objectives])
        return feasible(metrics, self.constraints) and self._front.add(number, metrics)

    def stop(self, number: int, stopped: Stopped, expected: tuple[float, float] | None = None) -> None:
        """Tell that a trial was ended in its training, as Optuna's PRUNED; it has no values.

        Args:
            number: The trial's.
            stopped: What it had shown.
            expected: Mean and standard deviation of the accuracy that it would have come to, where that can be said.
        """
        trial = self._running.pop(number)
        trial.set_user_attr(_STOPPED, stopped.to_dict())
        if expected is not None:
            trial.set_user_attr(_EXPECTED, list(expected))
        for constraint in self.constraints:
            if constraint.name in stopped.outline:
                trial.set_constraint(str(constraint), violation(constraint, stopped.outline))
        self._study.tell(trial, state=TrialState.PRUNED)

    def fail(self, number: int, error: str) -> None:
        """Tell that a trial failed, and why."""
        trial = self._running.pop(number)
        trial.set_user_attr(_ERROR, error)
        self._study.tell(trial, state=TrialState.FAIL)

    def recover(self) -> int:
        """Fail the trials that a killed run left running and enqueue them anew; returns how many."""
        lost = self._trials(TrialState.RUNNING)
        for trial in lost:
            # Enqueued plans are known whole from the start; a sampler's, killed before its last parameter, isn't.
            params = trial.system_attrs.get("fixed_params", trial.params)
            if params.keys() == self._distributions.keys():
                self._study.enqueue_trial(params, user_attrs={_SOURCE: trial.user_attrs.get(_SOURCE, "retry")})
            self._study.tell(trial.number, state=TrialState.FAIL)
        return len(lost)

    def proposed(self) -> int:
        """How many trials were begun, but for those that were lost when a run was killed."""
        begun = [trial for trial in self._trials() if trial.state != TrialState.WAITING]
        return sum(trial.state != TrialState.FAIL or _ERROR in trial.user_attrs for trial in begun)

    @property
    def spent_seconds(self) -> float:
        """Seconds of search so far, over all resumptions, up to the last trial that ended."""
        return float(self._study.user_attrs.get(self._spent, 0.0))

    @spent_seconds.setter
    def spent_seconds(self, seconds: float) -> None:
        self._study.set_user_attr(self._spent, seconds)

    @property
    def _spent(self) -> str:
        return _SPENT if self._run is None else f"{_SPENT} of {self._run}"

    def rows(self) -> list[TrialRow]:
        """Every trial, in the order of its number."""
        return [TrialRow(trial, self.constraints) for trial in self._trials()]

    def front(self) -> list[TrialRow]:
        """The feasible trials that no other one beats, fastest first; costs the same after any number of trials."""
        trials, known = self._study.get_trials(deepcopy=False), self._members
        self._members = {n: known.get(n) or TrialRow(trials[n], self.constraints) for n in self._front.members}
        return list(self._members.values())


def _source_of(trial: FrozenTrial) -> str:
    source = trial.user_attrs.get(_SOURCE)
    return str(source or ("enqueued" if "fixed_params" in trial.system_attrs else _SAMPLER))


def _of_run(trials: Iterable[FrozenTrial], run: str | None) -> list[FrozenTrial]:
    return [trial for trial in trials if run is None or trial.user_attrs.get(_RUN) == run]


def _rungs(stopped: Mapping[str, Any]) -> tuple[Rung, ...]:
    return tuple(Rung(**rung) for rung in stopped["rungs"])


def stored_rows(job: Job, run: Path) -> list[TrialRow]:
    """Every trial of a run, in the order of its number; only reads, also while the run goes on."""
    url = job.storage or study_url(run)
    storage = open_storage(url)
    if job.study_name not in optuna.get_all_study_names(storage):
        return []  # the run is still being prepared
    study = optuna.load_study(study_name=job.study_name, storage=TrialStorage(storage))
    trials = _of_run(study.get_trials(deepcopy=False), job.name if job.study else None)
    return [TrialRow(trial, job.constraints) for trial in trials]


class TrialRow:
    """A stored trial, as paretune reads it.

    Args:
        trial: Optuna's record of it.
        constraints: Decide whether it is feasible.
    """

    def __init__(self, trial: FrozenTrial, constraints: Sequence[Constraint]) -> None:
        self.trial = trial
        self._constraints = constraints

    @cached_property
    def record(self) -> Record | None:
        """Of a complete trial; read when it is asked for first."""
        found = self.trial.user_attrs.get(_RECORD) if self.trial.state == TrialState.COMPLETE else None
        return Record.from_dict(found) if found else None

    @cached_property
    def feasible(self) -> bool:
        """Whether it is complete and keeps all bounds."""
        return self.record is not None and feasible(self.measurement.to_dict(), self._constraints)

    @cached_property
    def stopped(self) -> Stopped | None:
        """Of a trial that was stopped early; read when it is asked for first."""
        found = self.trial.user_attrs.get(_STOPPED) if self.trial.state == TrialState.PRUNED else None
        return Stopped(**found | {"rungs": _rungs(found)}) if found else None

    @property
    def number(self) -> int:
        """The trial's number."""
        return self.trial.number

    @property
    def source(self) -> str:
        """Who proposed it: dense, variant, uniform, retry, sampler, or enqueued, by the user in the study itself."""
        return _source_of(self.trial)

    @property
    def measurement(self) -> Measurement:
        """Its measurement; only of a complete trial."""
        assert self.record is not None
        return self.record.measurement

    @property
    def rungs(self) -> tuple[Rung, ...]:
        """Those that it reached, of a trial that is complete or was stopped."""
        ended = self.record or self.stopped
        return ended.rungs if ended else ()

    @property
    def steps(self) -> int | None:
        """Training steps that were run, where that is known."""
        return self.stopped.steps if self.stopped else self.record.training.get("steps") if self.record else None

    @property
    def expected(self) -> tuple[float, float] | None:
        """Mean and standard deviation of the final accuracy that a stopped trial would have come to, where known."""
        found = self.trial.user_attrs.get(_EXPECTED)
        return (found[0], found[1]) if found else None

    @cached_property
    def plan(self) -> CompressionPlan | None:
        """Its plan, once it was begun."""
        data = self.trial.user_attrs.get(_PLAN)
        return CompressionPlan.model_validate(data) if data else None

    @property
    def error(self) -> str:
        """Why it failed; empty where it didn't."""
        if self.trial.state != TrialState.FAIL:
            return ""
        return str(self.trial.user_attrs.get(_ERROR, "lost when the run was killed"))

    @property
    def seconds(self) -> float | None:
        """Its duration, once it ended."""
        duration = self.trial.duration
        return duration.total_seconds() if duration else None


def results_of(trial: FrozenTrial) -> tuple[Mapping[str, float], tuple[float, float] | None] | None:
    """What an ended trial is known to cost, and the mean and deviation of the accuracy that a stopped one expected.

    None where nothing came of it because the run was killed.
    """
    attributes = trial.user_attrs
    if not {_RECORD, _STOPPED, _ERROR} & attributes.keys():
        return None
    measured = (attributes.get(_RECORD) or {}).get("measurement") or (attributes.get(_STOPPED) or {}).get("outline")
    expected = attributes.get(_EXPECTED)
    return measured or {}, (expected[0], expected[1]) if expected else None


def open_storage(url: str) -> RDBStorage:
    """Optuna's storage behind a URL; SQLite in write-ahead mode.

    A trial writes five transactions. With SQLite's defaults each waits for the disk; write-ahead with normal
    synchronisation survives any kill of the process just as well.

    Raises:
        JobError: It can't be opened.
    """
    try:
        storage = _with_tables(url)
    except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        remedy = _install_driver(url) if isinstance(error, ImportError) else f"correct it ({redacted(error)})"
        raise JobError("storage", "must be a database URL that opens", repr(redacted(url)), remedy) from error
    if url.startswith("sqlite"):
        sqlalchemy.event.listen(storage.engine, "connect", _write_ahead)
        storage.engine.dispose()  # connections made before the listener don't have the settings
    return storage


def _with_tables(url: str, openings: int = _OPENINGS) -> RDBStorage:
    """In a new database each driver creates the tables that it doesn't find. Where two do so at once, one fails at each
    that the other was faster with, and finds that one when it begins again."""
    try:
        return RDBStorage(url)
    except sqlalchemy.exc.DBAPIError as error:
        is_there = isinstance(error, sqlalchemy.exc.IntegrityError) or "already exists" in str(error)
        if not is_there or openings == 1:
            raise
    time.sleep(_PAUSE)
    return _with_tables(url, openings - 1)


def _install_driver(url: str) -> str:
    """What to do where a database's driver isn't installed."""
    scheme = url.partition("://")[0]
    database = scheme.partition("+")[0]
    if database not in _DRIVERS:
        return f"install the driver of {scheme}"
    named = "" if scheme == _DRIVERS[database] else f" and begin it with {_DRIVERS[database]}://"
    return f"pip install 'paretune[{database}]'{named}"


def _write_ahead(connection: sqlite3.Connection, _record: Any) -> None:
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=NORMAL")


def study_url(run: Path) -> str:
    """Where a run's study is unless the job says otherwise."""
    return f"sqlite:///{run.resolve() / 'study.db'}"
