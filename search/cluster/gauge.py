"""A gauge: the process that measures on a target's machine, one thing at a time."""

from __future__ import annotations

import faulthandler
import math
import os
import shutil
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from typing import Any

import cloudpickle
import ray
import torch

from paretune.errors import JobError, ParetuneError, TrialError
from paretune.objectives.accelerator import gpu_is_broken
from paretune.objectives.baseline import Baseline
from paretune.objectives.bench import LocalBench
from paretune.objectives.device import Device, is_cuda
from paretune.objectives.environment import environment
from paretune.objectives.evaluate import Evaluator
from paretune.objectives.problem import Problem
from paretune.search.cluster.hardware import check_alike
from paretune.search.cluster.parcels import Parcel, files_below, pack_files
from paretune.search.cluster.scratch import scratch
from paretune.search.executor import Report
from paretune.search.job import Job
from paretune.search.problem import BASELINE, load_problem, without_trainer

_LOAD_SECONDS = 600.0
"""A gauge that takes longer to load the model and the data hangs."""


@dataclass(frozen=True)
class Station:
    """What there is on a gauge's machine to work with; a live handle.

    Attributes:
        job: Whose targets are here.
        problem: What it is about.
        environment: Of this machine.
        run: The files of the run that trials need; None while there is no run yet.
    """

    job: Job
    problem: Problem
    environment: Mapping[str, Any]
    run: Path | None = None

    @cached_property
    def baseline(self) -> Baseline:
        """The measured dense model."""
        assert self.run is not None, "nothing can be measured against a baseline that isn't made yet"
        return Baseline(self.run / BASELINE)

    @cached_property
    def bench(self) -> LocalBench:
        """Measures artifacts; keeps the baseline loaded."""
        return LocalBench(self.problem, self.baseline, self.problem.device())

    @cached_property
    def evaluator(self) -> Evaluator:
        """For requests as local workers serve them."""
        return Evaluator(self.problem, self.baseline, self.bench)


Work = Callable[[Station, Path, Report], Any]
"""What a gauge is asked to do, picklable: called with the station, the folder of the files that came with it (which
isn't there if none came), and what takes lines for the user."""


@dataclass(frozen=True)
class Errand:
    """A piece of work with what goes with it.

    Attributes:
        work: What to do.
        hardware: What the machine must be, as of `paretune.search.cluster.hardware`; empty for whatever it is.
        limit: Seconds after which the gauge ends itself, with this: even where whoever asked is no more.
        talks: Whether lines for the user go back while it is done, which takes a thread of its own.
        returns: Whether the files go back that it made or changed.
        storage: Through which they go; None for Ray's object store.
    """

    work: Work
    hardware: Mapping[str, Any]
    limit: float = math.inf
    talks: bool = False
    returns: bool = False
    storage: str | None = None


@dataclass(frozen=True)
class Said:
    """A line for the user."""

    line: str


@dataclass(frozen=True)
class Reply:
    """What came of an errand. Errors are values here: raised, they would arrive as Ray's own.

    Attributes:
        value: What the work returned.
        back: Files that it made or changed.
        error: What it raised.
        details: The traceback of that.
    """

    value: Any = None
    back: Parcel | None = None
    error: Exception | None = None
    details: str = ""


class Gauge:
    """Runs in a Ray actor that takes one call at a time. It keeps nothing that a restarted one doesn't make again.

    Args:
        job: Pickled by cloudpickle; what it holds may be importable only once the path is set.
        path: Folders of the driver's ``sys.path``.
        threads: Of PyTorch, where no runtime sets its own.
    """

    def __init__(self, job: bytes, path: Sequence[str], threads: int) -> None:
        # Nothing here may fail: Ray doesn't restart an actor whose constructor raised.
        self._pickled = job
        self._run = ""
        add_path(path)
        torch.set_num_threads(threads)

    def run(self, errand: Errand, shipped: Parcel | None, files: Sequence[Any]) -> Iterator[Said | Reply]:
        """Do something; a stream of which the first item says that it is begun, and the last one is the reply.

        Args:
            errand: What to do.
            shipped: The files that it is about.
            files: A reference to the parcel of the run's files, or none.
        """
        if gpu_is_broken():  # by an earlier errand; Ray starts this process again
            os._exit(1)
        try:
            with _watchdog(_LOAD_SECONDS):
                check_alike(errand.hardware, self._environment)
                station = self._at(files)
        except Exception as error:
            yield Reply(error=_portable(error), details=traceback.format_exc())
            return
        yield Said("")
        if not errand.talks:
            # In this thread, always the same: what is loaded may hold on to the thread that loaded it.
            yield self._carry_out(errand, station, shipped, lambda line: None)
            return
        said: SimpleQueue[Said | Reply] = SimpleQueue()

        def work() -> None:
            said.put(self._carry_out(errand, station, shipped, lambda line: said.put(Said(line))))

        threading.Thread(target=work, daemon=True).start()
        while not isinstance(item := said.get(), Reply):
            yield item
        yield item

    def close(self) -> None:
        """Remove what lies on this machine's disk."""
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _carry_out(self, errand: Errand, station: Station, shipped: Parcel | None, report: Report) -> Reply:
        try:
            with TemporaryDirectory(dir=self._scratch) as made, _watchdog(errand.limit):
                folder = Path(made) / "files"
                if shipped is not None:
                    shipped.unpack(folder)
                before = _stamps(folder)
                value = errand.work(station, folder, report)
                if not errand.returns:
                    return Reply(value)
                stamps, all_files = _stamps(folder), files_below(folder)
                changed = {name: path for name, path in all_files.items() if stamps[name] != before.get(name)}
                return Reply(value, pack_files(changed, errand.storage))
        except Exception as error:
            return Reply(error=_portable(error), details=traceback.format_exc())

    @cached_property
    def _scratch(self) -> Path:
        return scratch("gauge")

    @cached_property
    def _job(self) -> Job:
        job: Job = cloudpickle.loads(self._pickled)  # from the driver, never from a file
        return job

    @cached_property
    def _environment(self) -> dict[str, Any]:
        if any(map(is_cuda, self._job.devices)):
            torch.cuda.init()  # type: ignore[no-untyped-call]  # what isn't initialized isn't described
        return environment() | {"node": socket.gethostname(), "threads": torch.get_num_threads()}

    @cached_property
    def _problem(self) -> Problem:
        with Device(*self._job.devices).shared():
            return load_problem(without_trainer(self._job))

    def _at(self, files: Sequence[Any]) -> Station:
        """With the files of the run; what was loaded of another's, e.g. before there was one, goes."""
        if not files:
            return Station(self._job, self._problem, self._environment)
        if files[0].hex() != self._run:
            folder = self._scratch / "run"
            parcel: Parcel = ray.get(files[0])
            parcel.unpack(folder)
            self._station = Station(self._job, self._problem, self._environment, folder)
            self._run = files[0].hex()
        return self._station


@contextmanager
def _watchdog(seconds: float) -> Iterator[None]:
    """End this process if the block takes longer, also where native code hangs and holds the interpreter's lock."""
    if seconds < math.inf:
        faulthandler.dump_traceback_later(seconds, exit=True, file=2)  # the actor's log
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def add_path(path: Sequence[str]) -> None:
    """Let this process import what the driver can, where it is on this machine too."""
    sys.path += [folder for folder in path if folder not in sys.path]


def own_path() -> tuple[str, ...]:
    """This process' `sys.path` for processes elsewhere."""
    return tuple(os.path.abspath(folder) for folder in sys.path)  # noqa: PTH100 - the empty one is the working folder


def _portable(error: Exception) -> Exception:
    """The error as one that every process can unpickle."""
    if isinstance(error, JobError):
        return JobError(error.where, error.rule, str(error.got), error.remedy)
    if isinstance(error, ParetuneError | MemoryError):
        return error
    return TrialError(f"{type(error).__name__}: {error}")


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    found = {name: path.stat() for name, path in files_below(folder).items()}
    return {name: (state.st_mtime_ns, state.st_size) for name, state in found.items()}
