"""Local workers, real ones: results, exceptions, deaths, deadlines, and a search that is killed."""

from __future__ import annotations

import os
import re
import signal
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
from paretune.search.executor import Outcome
from paretune.search.job import load_job
from paretune.search.local import LocalExecutor
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
    def __call__(self, evaluator: Evaluator) -> int:
        return os.getpid()


@dataclass(frozen=True)
class Call:
    """Calls a function in the worker."""

    function: Callable[..., Any]
    args: tuple[Any, ...] = ()

    def __call__(self, evaluator: Evaluator) -> Any:
        return self.function(*self.args)


@dataclass(frozen=True)
class Raise:
    error: Exception = field(default_factory=lambda: ValueError("no such layer"))

    def __call__(self, evaluator: Evaluator) -> None:
        raise self.error


@pytest.fixture(scope="module")
def executor(measured: Path) -> Iterator[LocalExecutor]:
    executor = LocalExecutor(load_job(measured), measured, workers=1)
    yield executor
    executor.close()


def outcome_of(
    executor: LocalExecutor, request: Request, number: int = 7, *, deadline: float = START_SECONDS
) -> Outcome:
    """Run one request; the executor must be as free afterwards as before."""
    free = executor.free
    executor.submit(number, request, deadline=deadline)
    assert executor.free == free - 1
    outcomes: list[Outcome] = []
    while not outcomes:
        outcomes = executor.wait(START_SECONDS)
    (outcome,) = outcomes
    assert executor.free == free
    assert outcome.number == number
    return outcome


def pid_of(executor: LocalExecutor) -> int:
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


def test_results_come_back_from_one_process_that_is_another(executor: LocalExecutor) -> None:
    first = pid_of(executor)
    assert first != os.getpid()
    assert pid_of(executor) == first


def test_each_worker_trains_with_its_share_of_the_cores(executor: LocalExecutor) -> None:
    assert outcome_of(executor, Call(torch.get_num_threads)).result == len(os.sched_getaffinity(0))


def test_functions_of_this_process_travel(executor: LocalExecutor) -> None:
    factor = 6
    assert outcome_of(executor, Call(lambda value: factor * value, (7,))).result == 42


@pytest.mark.parametrize(
    ("error", "message"),
    [
        pytest.param(ValueError("no such layer"), "ValueError: no such layer", id="any exception"),
        pytest.param(TrialError("the loss isn't finite"), "the loss isn't finite", id="an error of paretune"),
    ],
)
def test_an_exception_is_an_error_and_the_worker_lives_on(
    executor: LocalExecutor, error: Exception, message: str
) -> None:
    before = pid_of(executor)
    outcome = outcome_of(executor, Raise(error))
    assert (outcome.result, outcome.error) == (None, message)
    assert "Traceback (most recent call last)" in outcome.details
    assert "__call__" in outcome.details
    assert pid_of(executor) == before


def test_nothing_comes_back_before_its_time(executor: LocalExecutor) -> None:
    pid_of(executor)
    executor.submit(1, Call(time.sleep, (0.5,)), deadline=START_SECONDS)
    assert executor.wait(0.05) == []
    assert [outcome.error for outcome in executor.wait(START_SECONDS)] == [""]


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
    executor: LocalExecutor, request_: Request, message: str
) -> None:
    before = pid_of(executor)
    outcome = outcome_of(executor, request_)
    assert outcome.result is None
    assert re.search(message, outcome.error)
    assert pid_of(executor) != before


def test_a_worker_that_dies_between_two_requests_costs_nothing(executor: LocalExecutor) -> None:
    before = pid_of(executor)
    os.kill(before, signal.SIGKILL)
    assert ended(before)
    assert pid_of(executor) not in (before, os.getpid())


def test_a_request_over_its_deadline_is_killed(executor: LocalExecutor) -> None:
    before = pid_of(executor)
    outcome = outcome_of(executor, Call(time.sleep, (600,)), deadline=0.5)
    assert outcome.result is None
    assert outcome.error == "it overran its deadline of 0.5 s (search.trial_timeout)"
    assert ended(before)


def test_workers_that_cannot_start_end_the_search(
    tiny: TinyJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os; os.write(2, b'out of licences'); os._exit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    # So much data that the job doesn't fit into the pipe: sending it fails when the worker is dead.
    weights = torch.zeros(1_000_000)
    job = tiny(tmp_path, data={"source": lambda: weights})
    executor = LocalExecutor(job, tmp_path, workers=1)
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
from paretune.search.local import LocalExecutor

class Hang:
    def __call__(self, evaluator):
        note.with_suffix(".partial").write_text(str(os.getpid()))
        note.with_suffix(".partial").rename(note)
        # A worker that computes doesn't look at its pipe.
        while True:
            pass

run, note = Path(sys.argv[1]), Path(sys.argv[2])
job = load_job(run)
# By reference, from a module that only this script's folder has.
job = job.model_copy(update={"model": job.model.model_copy(update={"factory": helper.build})})
executor = LocalExecutor(job, run, workers=1)
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
