"""Local workers, real ones: results, exceptions, deaths, deadlines, and a search that is killed."""

from __future__ import annotations

import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
import torch

from paretune.errors import SearchError, TrialError
from paretune.objectives.evaluate import Evaluator
from paretune.objectives.progress import Rung, Stopped, Watcher
from paretune.search.executor import Outcome, Progress
from paretune.search.job import load_job
from paretune.search.local import WorkerPool
from paretune.search.requests import Request
from tests.search.conftest import TinyJob

START_SECONDS = 60.0
"""Far more than a worker needs to start, also on a busy machine."""


@pytest.fixture(scope="module", autouse=True)
def requests_travel_by_value() -> Iterator[None]:
    """Workers need not find this module."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


@dataclass(frozen=True)
class Pid:
    def __call__(self, evaluator: Evaluator, watcher: Watcher) -> int:
        return os.getpid()


@dataclass(frozen=True)
class Call:
    """Calls a function in the worker."""

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()

    def __call__(self, evaluator: Evaluator, watcher: Watcher) -> Any:
        return self.function(*self.args)


@dataclass(frozen=True)
class Raise:
    error: Exception = field(default_factory=lambda: ValueError("no such layer"))

    def __call__(self, evaluator: Evaluator, watcher: Watcher) -> None:
        raise self.error


@dataclass(frozen=True)
class Train:
    """Stands in for a trial: reaches a rung, then takes steps until it is asked to end, or has taken them all."""

    steps: int
    pause: float = 0.001

    def __call__(self, evaluator: Evaluator, watcher: Watcher) -> Stopped | str:
        outline = {"latency_ms": 2.0}
        watcher.got_on(Stopped(outline, ()))
        rungs = (Rung(0.25, 0.5, 100), Rung(0.5, 0.625, 100))
        for count in range(1, 1 + len(rungs)):
            watcher.got_on(Stopped(outline, rungs[:count]))
        for step in range(self.steps):
            if watcher.wants_end():
                return Stopped(outline, rungs, {"train": 1.0}, step)
            time.sleep(self.pause)
        return "complete"


@pytest.fixture(scope="module")
def executor(measured: Path) -> Iterator[WorkerPool]:
    executor = WorkerPool(load_job(measured), measured, workers=1)
    yield executor
    executor.close()


def events_of(executor: WorkerPool) -> list[Outcome | Progress]:
    """All that comes until a request ended, with this event at the end."""
    events: list[Outcome | Progress] = []
    while not events or isinstance(events[-1], Progress):
        events += executor.wait(START_SECONDS)
    return events


def outcome_of(executor: WorkerPool, request: Request, number: int = 7, *, deadline: float = START_SECONDS) -> Outcome:
    """Run one request; the executor must be as free afterwards as before."""
    free = executor.free
    executor.submit(number, request, deadline=deadline)
    assert executor.free == free - 1
    *progress, outcome = events_of(executor)
    assert progress == []
    assert isinstance(outcome, Outcome)
    assert executor.free == free
    assert outcome.number == number
    return outcome


def pid_of(executor: WorkerPool) -> int:
    outcome = outcome_of(executor, Pid())
    assert outcome.error == ""
    return int(outcome.result)


def ended(pid: int, *, seconds: float = 10.0) -> bool:
    """Whether a process ends in time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
        # The first thread of a process may be a zombie while others (l) still end.
        if not state.stdout.strip() or ("Z" in state.stdout and "l" not in state.stdout):
            return True
        time.sleep(0.1)
    return False


def test_results_come_back_from_one_process_that_is_another(executor: WorkerPool) -> None:
    first = pid_of(executor)
    assert first != os.getpid()
    assert pid_of(executor) == first


def test_each_worker_trains_with_its_share_of_the_cores(executor: WorkerPool) -> None:
    assert outcome_of(executor, Call(torch.get_num_threads)).result == len(os.sched_getaffinity(0))


def test_functions_of_this_process_travel(executor: WorkerPool) -> None:
    factor = 6
    assert outcome_of(executor, Call(lambda value: factor * value, (7,))).result == 42


@pytest.mark.parametrize(
    ("error", "message"),
    [
        pytest.param(ValueError("no such layer"), "ValueError: no such layer", id="any exception"),
        pytest.param(TrialError("the loss isn't finite"), "the loss isn't finite", id="an error of paretune"),
    ],
)
def test_an_exception_is_an_error_and_the_worker_lives_on(executor: WorkerPool, error: Exception, message: str) -> None:
    before = pid_of(executor)
    outcome = outcome_of(executor, Raise(error))
    assert (outcome.result, outcome.error) == (None, message)
    assert "Traceback (most recent call last)" in outcome.details
    assert "__call__" in outcome.details
    assert pid_of(executor) == before


def test_nothing_comes_back_before_its_time(executor: WorkerPool) -> None:
    pid_of(executor)
    executor.submit(1, Call(time.sleep, (0.5,)), deadline=START_SECONDS)
    assert executor.wait(0.05) == []
    assert events_of(executor) == [Outcome(1)]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        pytest.param(Call(os._exit, (3,)), r"worker process died \(exit code 3\)$", id="exit"),
        pytest.param(
            Call(lambda: os.kill(os.getpid(), signal.SIGKILL)),
            r"worker process died \(signal 9, SIGKILL; perhaps the machine ran out of memory\)$",
            id="SIGKILL",
        ),
    ],
)
def test_a_death_is_an_error_and_the_next_request_gets_a_new_process(
    executor: WorkerPool, request_: Request, message: str
) -> None:
    before = pid_of(executor)
    outcome = outcome_of(executor, request_)
    assert outcome.result is None
    assert re.search(message, outcome.error)
    assert pid_of(executor) != before


def test_a_worker_that_dies_between_two_requests_costs_nothing(executor: WorkerPool) -> None:
    before = pid_of(executor)
    os.kill(before, signal.SIGKILL)
    assert ended(before)
    assert pid_of(executor) not in (before, os.getpid())


def test_a_request_over_its_deadline_is_killed(executor: WorkerPool) -> None:
    before = pid_of(executor)
    outcome = outcome_of(executor, Call(time.sleep, (600,)), deadline=0.5)
    assert outcome.result is None
    assert outcome.error == "it overran its deadline of 0.5 s (search.trial_timeout)"
    assert ended(before)


def test_progress_comes_while_the_request_goes_on(executor: WorkerPool) -> None:
    free = executor.free
    executor.submit(3, Train(steps=10), deadline=START_SECONDS)
    events = events_of(executor)
    shown = [Rung(0.25, 0.5, 100), Rung(0.5, 0.625, 100)]
    assert events[:-1] == [Progress(3, {"latency_ms": 2.0}, tuple(shown[:count])) for count in range(3)]
    assert events[-1] == Outcome(3, "complete"), "it waited for no answer"
    assert executor.free == free


def test_a_request_ends_when_it_is_asked_to(executor: WorkerPool) -> None:
    executor.submit(3, Train(steps=1_000_000), deadline=START_SECONDS)
    (first,) = executor.wait(START_SECONDS)
    assert first == Progress(3, {"latency_ms": 2.0})
    assert executor.free == 0, "it still runs"
    executor.stop(3)
    last = events_of(executor)[-1]
    assert isinstance(last, Outcome)
    assert isinstance(last.result, Stopped)
    assert [rung.accuracy for rung in last.result.rungs] == [0.5, 0.625]
    assert last.result.steps < 1_000_000


def test_a_late_stop_ends_nothing_else(executor: WorkerPool) -> None:
    before = pid_of(executor)
    executor.submit(3, Train(steps=0), deadline=START_SECONDS)
    time.sleep(0.3)  # the outcome lies in the pipe
    executor.stop(3)
    executor.stop(3)
    assert events_of(executor)[-1] == Outcome(3, "complete")
    executor.stop(3)  # of no running request
    executor.submit(4, Train(steps=50), deadline=START_SECONDS)
    executor.stop(3)
    assert events_of(executor)[-1] == Outcome(4, "complete")
    executor.submit(3, Train(steps=50), deadline=START_SECONDS)  # verification uses the numbers again
    assert events_of(executor)[-1] == Outcome(3, "complete")
    assert pid_of(executor) == before


def test_a_stop_of_another_number_is_read_and_ignored(executor: WorkerPool) -> None:
    executor.submit(3, Train(steps=100), deadline=START_SECONDS)
    executor.wait(START_SECONDS)
    (worker,) = executor._workers
    worker.send(cloudpickle.dumps(2))
    assert events_of(executor)[-1] == Outcome(3, "complete")


def test_asking_costs_microseconds(executor: WorkerPool) -> None:
    def ask(watcher: Watcher) -> float:
        start = time.perf_counter()
        for _ in range(1000):
            assert not watcher.wants_end()
        return (time.perf_counter() - start) / 1000

    @dataclass(frozen=True)
    class Ask:
        def __call__(self, evaluator: Evaluator, watcher: Watcher) -> float:
            return min(ask(watcher) for _ in range(5))

    assert outcome_of(executor, Ask()).result < 1e-4


def test_a_request_that_gets_on_has_its_deadline_all_the_same(executor: WorkerPool) -> None:
    executor.submit(3, Train(steps=1_000_000), deadline=0.5)
    executor.wait(START_SECONDS)
    last = events_of(executor)[-1]
    assert isinstance(last, Outcome)
    assert last.error == "it overran its deadline of 0.5 s (search.trial_timeout)"
    executor.stop(3)


def half_a_message() -> None:
    os.write(int(sys.argv[1]), struct.pack("!i", 1000) + b"the first bytes")
    os._exit(3)


def test_a_worker_that_dies_in_a_message_or_while_it_is_asked_to_end(executor: WorkerPool) -> None:
    outcome = outcome_of(executor, Call(half_a_message))
    assert outcome.error == "the worker process died (exit code 3)"
    executor.submit(3, Train(steps=1_000_000), deadline=START_SECONDS)
    executor.wait(START_SECONDS)
    (worker,) = executor._workers
    os.kill(worker.process.pid, signal.SIGKILL)
    assert ended(worker.process.pid)
    executor.stop(3)
    last = events_of(executor)[-1]
    assert isinstance(last, Outcome)
    assert "signal 9, SIGKILL" in last.error
    assert executor.free == 1


def test_workers_that_cannot_start_end_the_search(
    tiny: TinyJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os; os.write(2, b'out of licences'); os._exit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    # So much data that the job doesn't fit into the pipe: sending it fails when the worker is dead.
    weights = torch.zeros(1_000_000)
    job = tiny(tmp_path, data={"source": lambda: weights})
    executor = WorkerPool(job, tmp_path, workers=1)
    try:
        for _ in range(2):
            outcome = outcome_of(executor, Pid())
            assert outcome.error == "the worker process died (exit code 3)"
        executor.submit(1, Pid(), deadline=START_SECONDS)
        with pytest.raises(SearchError, match=r"3 in a row died \(exit code 3\); see .*workers\.log.*out of licences"):
            executor.wait(START_SECONDS)
    finally:
        executor.close()
    assert (tmp_path / "workers.log").read_text() == "out of licences" * 3


PARENT = """
import os, sys, time
from pathlib import Path
import cloudpickle
import helper
from paretune.search.job import load_job, make_job
from paretune.search.local import WorkerPool

class Hang:
    def __call__(self, evaluator, watcher):
        note.with_suffix(".partial").write_text(str(os.getpid()))
        note.with_suffix(".partial").rename(note)
        # A worker that computes doesn't look at its pipe.
        while True:
            pass

run, note = Path(sys.argv[1]), Path(sys.argv[2])
job = load_job(run)
# By reference, from a module that only this script's folder has.
job = job.model_copy(update={"model": job.model.model_copy(update={"factory": helper.build})})
executor = WorkerPool(job, run, workers=1)
executor.submit(0, Hang(), deadline=600)
for outcome in executor.wait(600):
    print(outcome.error, outcome.details)
"""
HELPER = """
import tiny_digits

def build():
    return tiny_digits.build()
"""


def test_workers_end_with_a_parent_that_is_killed(measured: Path, tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    (tmp_path / "helper.py").write_text(HELPER)
    (tmp_path / "elsewhere").mkdir()
    note = tmp_path / "pid"
    command = [sys.executable, str(tmp_path / "parent.py"), str(measured), str(note)]
    environment = os.environ | {"PYTHONPATH": load_job(measured).python_path[0]}
    with (tmp_path / "log").open("w") as log:
        parent = subprocess.Popen(command, cwd=tmp_path / "elsewhere", stdout=log, stderr=log, env=environment)
    try:
        end = time.monotonic() + START_SECONDS
        while not note.exists() and parent.poll() is None and time.monotonic() < end:
            time.sleep(0.1)
        assert note.exists(), (tmp_path / "log").read_text() + (measured / "workers.log").read_text()
    finally:
        parent.kill()
        parent.wait()
    worker = int(note.read_text())
    try:
        assert ended(worker)
    finally:
        if not ended(worker, seconds=0.2):
            os.kill(worker, signal.SIGKILL)
