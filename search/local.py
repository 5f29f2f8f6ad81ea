"""Local workers: processes that can be killed, each reused while it is healthy."""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import cloudpickle
import torch

from paretune.errors import SearchError
from paretune.objectives.baseline import Baseline
from paretune.objectives.device import is_cuda
from paretune.objectives.environment import environment
from paretune.objectives.evaluate import Evaluator
from paretune.objectives.problem import Problem
from paretune.objectives.verify import Verified
from paretune.search.cluster.hardware import check_alike, hardware
from paretune.search.executor import Executor, Outcome, Progress, Report, Work
from paretune.search.job import Job
from paretune.search.outline import outline
from paretune.search.preparation import ENVIRONMENT, learn_run, prepare_run
from paretune.search.problem import BASELINE, load_problem
from paretune.search.profile import Profile
from paretune.search.requests import Request, Verify
from paretune.spaces.plan import CompressionPlan

_START_SECONDS = 600.0
"""A worker that takes longer to load the model and the data hangs; a trial's own deadline begins after that."""

_START_LIMIT = 3
"""So many workers in a row may die before they are ready; then the search ends."""

_DYING_SECONDS = 5.0
"""A worker whose pipe is closed is about to exit; killed at once, it would look as if it ran out of memory."""


_POLL = 1.0


class LocalExecutor(Executor):
    """Trains and measures on this machine; for its arguments see `Executor`.

    Raises:
        SearchError: This machine isn't like the one on which the run began.
    """

    def __init__(self, job: Job, run: Path, report: Report) -> None:
        super().__init__(job, run, report)
        self._pool: WorkerPool | None = None
        began = run / ENVIRONMENT
        if began.is_file():
            if any(map(is_cuda, job.devices)):
                torch.cuda.init()  # type: ignore[no-untyped-call]  # what isn't initialized isn't described
            here = environment() | {"node": socket.gethostname()}
            check_alike(hardware(json.loads(began.read_text())), here)

    @cached_property
    def problem(self) -> Problem:
        return load_problem(self._job)

    def prepare(self, folder: Path) -> Profile:
        return prepare_run(self._job, self.problem, folder, self.report)

    def learn(self, folder: Path, profile: Profile) -> None:
        learn_run(self._job, self.problem, folder, profile, self.report)

    @cached_property
    def _evaluator(self) -> Evaluator:
        return Evaluator(self.problem, Baseline(self._run / BASELINE))

    def outline(self, plan: CompressionPlan) -> dict[str, float] | str:
        return outline(self._evaluator, plan, self._job.search.seed)

    def run(self, work: Work) -> None:
        workers = self._job.search.workers
        self._pool = self._pool or WorkerPool(self._job, self._run, workers=workers)
        running = 0
        while True:
            while self._pool.free > 0 and (given := work.next()):
                self._pool.submit(given.number, given.request, deadline=given.deadline)
                running += 1
            if not running and work.is_over:
                return
            for event in self._pool.wait(_POLL):
                if isinstance(event, Outcome):
                    running -= 1
                    work.ended(event)
                elif work.progress(event):
                    self._pool.stop(event.number)

    def verify(self, folders: Sequence[Path], *, rounds: int, deadline: float) -> list[Verified]:
        self.close()
        fresh = WorkerPool(self._job, self._run, workers=1)
        try:
            fresh.submit(0, Verify(folders, rounds), deadline=deadline)
            while not (outcomes := [event for event in fresh.wait(_POLL) if isinstance(event, Outcome)]):
                pass
        finally:
            fresh.close()
        if outcomes[0].error:
            raise SearchError(f"the front must be measured afresh, but that failed: {outcomes[0].error}")
        found: list[Verified] = outcomes[0].result
        return found

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None


class WorkerPool:
    """Runs requests in processes of this machine. Its owner submits while `free` is positive, then waits.

    Workers are programs of their own and not forks: a fork would copy the threads' locks of torch and OpenVINO, and
    spawning through multiprocessing would run the user's script again.

    Args:
        job: What each worker loads.
        run: The run folder; the workers' output is appended to its `workers.log`.
        workers: How many, at least 1. Each trains with its share of the cores.

    Attributes:
        free: How many requests can be submitted now.
    """

    def __init__(self, job: Job, run: Path, *, workers: int) -> None:
        self.free = workers
        self._setup = cloudpickle.dumps((job, run))
        self._log = run / "workers.log"
        self._threads = max(1, cores() // workers)
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._size = workers

    def submit(self, number: int, request: Request, *, deadline: float) -> None:
        """Begin a request; `number` names it in its outcome. It is stopped after `deadline` seconds."""
        for dead in [worker for worker in self._workers if worker.is_dead()]:
            self._workers.remove(dead)
            dead.kill()
        worker = next((worker for worker in self._workers if worker.number is None), None)
        if worker is None:
            worker = _Worker.start(self._setup, self._log, self._threads)
            self._workers.append(worker)
        worker.begin(number, request, deadline)
        self.free -= 1

    def wait(self, timeout: float) -> list[Outcome | Progress]:
        """What ended or got on since the last call, in its order for each request; blocks up to `timeout` seconds.

        A request that got on doesn't wait for an answer. One whose worker died, or that overran its deadline, ends
        with an error; the worker is replaced.

        Raises:
            SearchError: No worker can be started.
        """
        end = time.monotonic() + timeout
        events: list[Outcome | Progress] = []
        while not events:
            busy = {worker.connection: worker for worker in self._workers if worker.number is not None}
            limits = [end, *(worker.limit for worker in busy.values())]
            pause = max(0.0, min(limits) - time.monotonic())
            for ready in wait(list(busy), timeout=pause):
                events += self._receive(busy[ready])  # type: ignore[index]
            # What a worker sent in time, while the search was busy, is read first.
            late = [worker for worker in busy.values() if self._overdue(worker) and not worker.connection.poll()]
            events += [self._kill(worker) for worker in late]
            if time.monotonic() >= end:
                break
        self.free += sum(isinstance(event, Outcome) for event in events)
        return events

    def stop(self, number: int) -> None:
        """Ask a request to end early; no answer is waited for. It may end as if it hadn't been asked, or have ended."""
        for worker in self._workers:
            if worker.number == number:
                worker.send(cloudpickle.dumps(number))

    def close(self) -> None:
        """End all workers at once, with what they run."""
        for worker in self._workers:
            worker.kill()
        self._workers.clear()

    def _receive(self, worker: _Worker) -> list[Outcome | Progress]:
        number = worker.number
        assert number is not None
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):  # at once, or in the middle of a message
            return [self._bury(worker, number)]
        if message == "ready":
            self._failed_starts = 0
            worker.is_ready = True
            worker.limit = time.monotonic() + worker.deadline
            return []
        if isinstance(message, Progress):
            return [message]
        worker.number = None
        result, error, details = message
        return [Outcome(number, result, error, details)]

    def _bury(self, worker: _Worker, number: int) -> Outcome:
        self._workers.remove(worker)
        worker.number = None
        code = worker.reap()
        if not worker.is_ready:
            self._count_failed_start(f"died (exit code {code})")
        cause = f"signal {-code}, {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        hint = "; perhaps the machine ran out of memory" if code == -signal.SIGKILL else ""
        return Outcome(number, error=f"the worker process died ({cause}{hint})", details=f"see {self._log.name}")

    def _count_failed_start(self, what: str) -> None:
        self._failed_starts += 1
        if self._failed_starts >= _START_LIMIT:
            said = self._log.read_text(errors="replace").strip().splitlines()
            raise SearchError(
                f"workers must start, but {_START_LIMIT} in a row {what}; see {self._log}"
                + (f", which ends with: {said[-1]}" if said else "")
            )

    def _overdue(self, worker: _Worker) -> bool:
        return worker.number is not None and time.monotonic() >= worker.limit

    def _kill(self, worker: _Worker) -> Outcome:
        number = worker.number
        assert number is not None
        self._workers.remove(worker)
        worker.kill()
        if not worker.is_ready:
            self._count_failed_start(f"took longer than {_START_SECONDS:g} s")
            return Outcome(number, error=f"its worker didn't start within {_START_SECONDS:g} s; see {self._log.name}")
        return Outcome(number, error=f"it overran its deadline of {worker.deadline:g} s (search.trial_timeout)")


@dataclass
class _Worker:
    """A worker process, and the number of the request that it runs."""

    process: subprocess.Popen[bytes]
    connection: Connection[Any, Any]
    limit: float = math.inf
    deadline: float = math.inf
    number: int | None = None
    is_ready: bool = False

    @classmethod
    def start(cls, setup: bytes, log: Path, threads: int) -> _Worker:
        ours, theirs = socket.socketpair()
        # Thread pools read these when torch is imported, so they can't be set later.
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        with log.open("ab") as output, theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "paretune.search.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,  # Ctrl-C in the terminal is for the search, which then ends its workers
            )
        connection: Connection[Any, Any] = Connection(ours.detach())
        worker = cls(process, connection)
        # The job may hold objects of modules that only this process knows where to find.
        worker.send(cloudpickle.dumps(sys.path))
        worker.send(setup)
        return worker

    def send(self, message: bytes) -> None:
        with suppress(OSError):  # it died: whoever reads the connection finds out, and why
            self.connection.send_bytes(message)

    def begin(self, number: int, request: Request, deadline: float) -> None:
        self.number = number
        self.deadline = deadline
        self.limit = time.monotonic() + (deadline if self.is_ready else _START_SECONDS)
        self.send(cloudpickle.dumps((number, request)))

    def is_dead(self) -> bool:
        """Whether it died since its last request: an idle worker says nothing, so all there is to read is the end."""
        return self.number is None and (self.connection.poll() or self.process.poll() is not None)

    def reap(self) -> int:
        """See a worker end that closed its connection; returns its exit code."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_DYING_SECONDS)
        self.kill()
        return self.process.returncode

    def kill(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.wait()


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
