"""All gauges of a run, as the driver and the trainers use them."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import cloudpickle
import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from paretune.errors import SearchError, TrialError
from paretune.objectives.runtimes import Capabilities
from paretune.objectives.verify import Verified, verify
from paretune.search.cluster.connection import gauge_takes
from paretune.search.cluster.gauge import Errand, Gauge, Reply, Said, Station, Work, own_path
from paretune.search.cluster.hardware import hardware
from paretune.search.cluster.parcels import files_below, pack_files
from paretune.search.cluster.scratch import sweep
from paretune.search.executor import Report
from paretune.search.job import Job
from paretune.search.local import cores
from paretune.search.problem import BASELINE

_RETRIES = 1
"""So often work is begun again that was under way when its gauge died: it may have been the cause."""

PATIENCE = 600.0
"""A measuring node that is gone may come back as long as this; a boot takes minutes."""

_START_SECONDS, _SILENT_SECONDS = 600.0, 15.0
"""Another search may hold the measuring nodes; it is waited for so long, and that is said after so long."""

_DEATHS = 10
"""So many gauges may die before they run; more won't help then."""

_MEASURING = 1 / 3
"""Share of a trial's time that one measurement may take: what hangs must be ended before those who wait run out of
theirs."""

_POLL, _PAUSE, _CLOSE_SECONDS = 1.0, 1.0, 5.0

T = TypeVar("T")


class GaugeError(Exception):
    """The cause of an error that came from a gauge: its traceback there, as text."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


class DisownedError(SearchError):
    """Ray takes this process for one that died, and ends what it begins; another connection may help."""


class _Lost(NamedTuple):
    """A gauge died, or isn't there: why, as far as is known, and how long after the errand was begun, if it was."""

    reason: str
    seconds: float

    @property
    def was_begun(self) -> bool:
        return self.seconds >= 0


@dataclass(frozen=True)
class Gauges:
    """Where a run's measuring is done; picklable, so that each trainer has them.

    Attributes:
        handles: Of their actors.
        environment: Of the first one's machine.
        capabilities: What the targets execute, by name.
        hardware: What all of them are; one that restarts elsewhere, on another kind of machine, refuses to work.
        limit: Seconds that a measurement may take.
        patience: Seconds to wait for a gauge's node that is gone.
        storage: Through which files go to them; None for Ray's object store.
        files: A reference to the parcel of the run's files, or none as long as there is no run.
    """

    handles: tuple[Any, ...]
    environment: Mapping[str, Any]
    capabilities: Mapping[str, Capabilities]
    hardware: Mapping[str, Any]
    limit: float
    patience: float
    storage: str | None = None
    files: tuple[Any, ...] = ()

    def of_run(self, run: Path) -> Gauges:
        """The same, to measure against the baseline of a run."""
        names = {f"{BASELINE}/{name}": path for name, path in files_below(run / BASELINE).items()}
        return replace(self, files=(ray.put(pack_files(names, self.storage)),))

    def measure(self, work: Work, files: Mapping[str, Path]) -> Any:
        """Do something that a trial needs, on any of the gauges.

        Args:
            work: What to do.
            files: What it is about, by the names that they have in its folder.

        Raises:
            TrialError: The work failed, took too long, or the gauge died of it, again when it was begun again.
            SearchError: There is no gauge any more, or one that isn't like the others.
        """
        errand = Errand(work, self.hardware, self.limit)
        return self._ask(errand, files, start=random.randrange(len(self.handles))).value

    def fill(self, function: Callable[..., T], folder: Path, report: Report) -> T:
        """Let a function work on a run folder where the targets are: ``function(job, problem, folder, report=report)``.

        It finds there what its machine needs to know of the run (its JSON files and its baseline), or no folder if
        there is none yet; what it makes or changes comes back.

        Raises:
            SearchError: It can't be done there; also what else the function raised.
        """
        known = [*folder.glob("*.json"), *(folder / BASELINE).rglob("*")]
        files = {path.relative_to(folder).as_posix(): path for path in known if path.is_file()}
        errand = Errand(partial(_fill, function=function), self.hardware, talks=True, returns=True)
        try:
            reply = self._ask(errand, files, report=report)
        except TrialError as error:
            raise SearchError(f"the run must be prepared on its target, but that failed: {error}") from error
        assert reply.back is not None
        reply.back.merge(folder)
        reply.back.discard()
        value: T = reply.value
        return value

    def verify(self, folders: Sequence[Path], *, rounds: int, deadline: float) -> list[Verified]:
        """Measure artifacts together, in a process that did nothing else; their cards are rewritten.

        Args:
            folders: Artifacts.
            rounds: At least 1.
            deadline: Seconds that it may take.

        Raises:
            SearchError: It failed.
        """
        files = {
            f"{position}/{name}": path
            for position, folder in enumerate(folders)
            for name, path in files_below(folder).items()
            if not name.startswith("checkpoint.")
        }
        for gauge in self.handles:
            ray.kill(gauge, no_restart=False)
        work = partial(_verify, count=len(folders), rounds=rounds)
        try:
            self._ask(Errand(_describe, self.hardware), {})  # until one is there again
            reply = self._ask(Errand(work, self.hardware, deadline, returns=True), files)
        except TrialError as error:
            raise SearchError(f"the front must be measured afresh, but that failed: {error}") from error
        assert reply.back is not None
        for position, folder in enumerate(folders):
            reply.back.merge(folder, below=f"{position}/")
        reply.back.discard()
        return [replace(one, folder=folder) for one, folder in zip(reply.value, folders, strict=True)]

    def _ask(
        self,
        errand: Errand,
        files: Mapping[str, Path],
        *,
        start: int = 0,
        report: Report = lambda line: None,
    ) -> Reply:
        """Ship the files, have the errand done on the gauge of that position, or else on another, and raise its error.

        Args:
            errand: What to do.
            files: By their names in the work's folder.
            start: Position of the first gauge to try.
            report: Takes its lines.
        """
        errand = replace(errand, storage=self.storage)
        parcel = pack_files(files, self.storage) if files else None
        try:
            reply = self._insist(errand, ray.put(parcel) if parcel else None, start, report)
        finally:
            if parcel:
                parcel.discard()
        if reply.error is not None:
            raise reply.error from GaugeError(reply.details)
        return reply

    def _insist(self, errand: Errand, shipped: Any, start: int, report: Report) -> Reply:
        """Begin again where a gauge dies: without end while it wasn't begun, but for the patience; else a few times.

        Ray's own retries would also count for those who waited in its queue when somebody else's artifact killed it.
        """
        deaths, gone_since = 0, math.inf
        for position in itertools.count(start):
            found = self._follow(self.handles[position % len(self.handles)], errand, shipped, report)
            if isinstance(found, Reply):
                return found
            if found.seconds > errand.limit:
                raise TrialError(f"a measurement must end within {errand.limit:g} s (search.trial_timeout), but didn't")
            deaths += found.was_begun
            if deaths > _RETRIES:
                rule = "what is measured must not end the process that measures it"
                raise TrialError(f"{rule}, but that died {deaths} times under it: {found.reason}")
            gone_since = math.inf if found.was_begun else min(gone_since, time.monotonic())
            if time.monotonic() - gone_since > self.patience:
                raise SearchError(
                    f"a measuring node must be reachable, but none has been for {self.patience:.0f} s "
                    f"({found.reason}); every finished trial is kept: start the node again, then go on with "
                    "`paretune resume`, or run the job again if it hadn't begun"
                )
            time.sleep(_PAUSE)
        raise AssertionError  # for mypy: counting has no end

    def _follow(self, gauge: Any, errand: Errand, shipped: Any, report: Report) -> Reply | _Lost:
        """See an errand through on one gauge."""
        begun = math.inf
        try:
            for reference in _stream(gauge, errand, shipped, self.files):
                item: Said | Reply = ray.get(reference)
                if isinstance(item, Reply):
                    return item
                if begun < math.inf:
                    report(item.line)
                begun = min(begun, time.monotonic())
        except RayTaskError:
            raise  # a fault of ours: what goes wrong in the work is a reply
        except RayError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            return _Lost(f"{type(error).__name__}: {' '.join(lines)[:400]}", time.monotonic() - begun)
        raise AssertionError("the stream of a gauge must end with a reply")


@contextmanager
def open_gauges(
    job: Job, report: Report, *, storage: str | None = None, environment: Mapping[str, Any] | None = None
) -> Iterator[Gauges]:
    """Start a gauge on each measuring node of the cluster; they end with the block.

    Args:
        job: Names the measuring resource, or none: then one gauge is on this node.
        report: Takes a line where they have to be waited for.
        storage: Folder or URL through which files go; None for Ray's object store.
        environment: Of the machine on which the run was begun; None where it begins now.

    Raises:
        JobError: The job can't be loaded there.
        SearchError: The nodes measure unlike one another, or unlike the run's first ones; a `DisownedError` where no
            gauge can be started through this connection.
    """
    options, limit = _actor_options(job), _MEASURING * job.search.trial_timeout
    setup = cloudpickle.dumps(job), own_path(), _threads(job)
    actor: Any = ray.remote(Gauge)
    made: list[Any] = []
    try:
        handles = _started(lambda: actor.options(**options).remote(*setup), job, made, report)
        expected = hardware(environment) if environment else {}
        for handle in handles:  # so that all of them load at once
            _stream(handle, Errand(_describe, expected), None, ())
        described = []
        for position, _ in enumerate(handles):
            lone = Gauges(handles[position : position + 1], {}, {}, expected, limit, PATIENCE, storage)
            described.append(lone._ask(Errand(_describe, expected), {}).value)
            expected = expected or hardware(described[0][0])
        found, capabilities = described[0]
        yield Gauges(handles, found, capabilities, expected, limit, PATIENCE, storage)
    finally:
        _close(made)


def _stream(gauge: Any, errand: Errand, shipped: Any, files: Sequence[Any]) -> Any:
    """References to what the gauge yields. It goes on when an item has arrived, so that its death can't take one along:
    what kills it at once was begun all the same."""
    options = {"num_returns": "streaming", "_generator_backpressure_num_objects": 1}
    return gauge.run.options(**options).remote(errand, shipped, files)


def _started(make: Callable[[], Any], job: Job, made: list[Any], report: Report) -> tuple[Any, ...]:
    """As many gauges as there are measuring nodes, each of which runs.

    A node that died a moment ago may still be counted. And an actor may die while it is registered, for good: Ray takes
    its driver for a failed one where the same process was connected to the cluster before, for a moment or for good.

    Args:
        make: Begins one.
        job: Names the measuring nodes.
        made: Gets all that were begun.
        report: Takes a line where that takes long.

    Raises:
        SearchError: They don't start; a `DisownedError` where they die.
    """
    waiting: dict[Any, Any] = {}
    begun = time.monotonic()
    is_said, deaths = False, 0
    while (waited := time.monotonic() - begun) < _START_SECONDS:
        if waited > _SILENT_SECONDS and not is_said:
            is_said = True
            report("waiting for the measuring nodes, which another search may hold; `ray status` shows who has them")
        while len(waiting) < _measuring_nodes(job):
            made.append(make())
            waiting[made[-1].__ray_ready__.remote()] = made[-1]
        ready, others = ray.wait(list(waiting), num_returns=len(waiting), timeout=_POLL)
        dead = [reference for reference in ready if not _lives(reference)]
        for reference in dead:
            del waiting[reference]
            deaths += 1
            time.sleep(_PAUSE)
        if deaths >= _DEATHS:
            raise DisownedError(f"a process must start on each measuring node, but {deaths} died of it; see Ray's logs")
        if not dead and len(ready) >= _measuring_nodes(job):
            for reference in others:
                ray.kill(waiting[reference])
            return tuple(waiting[reference] for reference in ready)
    raise SearchError(
        f"a process must start on each of {_measuring_nodes(job)} measuring nodes, but only {len(ready)} did within "
        f"{_START_SECONDS:.0f} s; look at `ray status`, and wait for other searches that measure there"
    )


def _lives(reference: Any) -> bool:
    try:
        ray.get(reference)
    except RayError:
        return False
    return True


def _measuring_nodes(job: Job) -> int:
    resource = job.ray.measure
    return sum(node["Alive"] and resource in node["Resources"] for node in ray.nodes()) if resource else 1  # type: ignore[no-untyped-call]


def _actor_options(job: Job) -> dict[str, Any]:
    """Where a gauge is, what it takes there, and that it is started again, at any time and as often as need be."""
    env = {
        "OMP_NUM_THREADS": str(_threads(job)),  # else by num_cpus
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # older versions hide the GPUs from actors that take none
    }
    common = {"num_cpus": 0, "max_restarts": -1, "runtime_env": {"env_vars": env}}
    if job.ray.measure is None:  # it shares the GPU with the trainers, in turn: see the lock of the devices
        here = ray.get_runtime_context().get_node_id()
        return common | {"scheduling_strategy": NodeAffinitySchedulingStrategy(here, soft=False)}
    # A node has 1 of the resource, so that each has one gauge; one that replaces a node takes over its gauge.
    takes = gauge_takes(job)
    return common | {"num_gpus": takes.pop("GPU", 0), "resources": takes}


def _threads(job: Job) -> int:
    return max(target.threads for target in (job.target, *job.targets))


def _close(handles: Sequence[Any]) -> None:
    with suppress(RayError):  # the cluster may be gone
        ray.wait([handle.close.remote() for handle in handles], num_returns=len(handles), timeout=_CLOSE_SECONDS)
        for handle in handles:
            ray.kill(handle)
    sweep()  # if all were on this machine, nothing stays; elsewhere the next one sweeps


def _describe(station: Station, folder: Path, report: Report) -> tuple[Mapping[str, Any], dict[str, Capabilities]]:
    return station.environment, {name: site.capabilities for name, site in station.problem.sites.items()}


def _fill(station: Station, folder: Path, report: Report, *, function: Callable[..., T]) -> T:
    pinned = torch.get_num_threads()
    torch.set_num_threads(cores())  # it may train, and nobody else does meanwhile
    try:
        return function(station.job, station.problem, folder, report=report)
    finally:
        torch.set_num_threads(pinned)


def _verify(station: Station, folder: Path, report: Report, *, count: int, rounds: int) -> list[Verified]:
    folders = [folder / str(position) for position in range(count)]
    return verify(station.problem, station.baseline.folder, folders, rounds=rounds)
