"""Several jobs: what is checked before, what each comes to, and what signals do."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from paretune.errors import JobError
from paretune.search.batch import Ended, exit_code, load_jobs, summary

HANGING = """
import os, time
from pathlib import Path

def build():
    raise AssertionError("the data come first")

def data():
    Path("began").write_text(str(os.getpid()))
    time.sleep(120)
"""


@pytest.fixture
def jobs(tmp_path: Path) -> list[Path]:
    """Two jobs whose data are never there."""
    (tmp_path / "project.py").write_text(HANGING)
    paths = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    for path in paths:
        path.write_text(f"name: {path.stem}\nmodel: {{factory: 'project:build'}}\ndata: project:data\n")
    return paths


@pytest.fixture
def batch(jobs: list[Path], tmp_path: Path) -> subprocess.Popen[str]:
    """A batch of them, whose first job waits for its data."""
    command = [sys.executable, "-m", "paretune", "run", *map(str, jobs)]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: (tmp_path / "began").exists() and (tmp_path / "began").read_text() != "")
    return process


def wait_for(condition: Callable[[], bool]) -> None:
    for _ in range(600):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("not within a minute")


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def test_all_mistakes_are_told_before_anything_is_begun(jobs: list[Path], tmp_path: Path) -> None:
    jobs[1].write_text(jobs[1].read_text() + "serach: {}\n")
    missing = tmp_path / "missing.yaml"
    with pytest.raises(JobError) as error:
        load_jobs([*jobs, missing])
    text = str(error.value)
    assert text.startswith("jobs must all be right before the first is begun, but got mistakes in 2 of 3 jobs; correct")
    assert str(pickle.loads(pickle.dumps(error.value))) == text
    assert f"\n  - {jobs[1]}: serach must be a known key" in text
    assert f"\n  - {missing}: " in text


def test_two_jobs_must_not_share_a_run_folder(jobs: list[Path]) -> None:
    assert [job.name for job in load_jobs(jobs)] == ["a", "b"]
    with pytest.raises(JobError, match=r"b\.yaml: name must be one of its own, but got 'one', and so has .*a\.yaml"):
        load_jobs(jobs, ["name=one"])


def test_the_worst_exit_code_is_the_batch_s() -> None:
    def batch(*codes: int | None) -> int:
        return exit_code([Ended("a", Path("a"), code) for code in codes])

    assert batch(0, 0) == 0
    assert batch(0, 1) == 1
    assert batch(2, 0, 1) == 2
    assert batch(0, -signal.SIGKILL) == 1
    assert batch(0, 143, None) == 143
    assert batch(2, 130, None) == 130


def test_summary_has_a_line_for_each_job(tmp_path: Path) -> None:
    def point(accuracy: float, latency: float) -> dict[str, float]:
        return {"accuracy": accuracy, "latency_ms": latency}

    front = {"schema": 1, "metric": "accuracy", "verified": True, "points": []}
    front["points"] = [
        {"validation": point(0.5, 9), "test": point(0.9, 1.25)},
        {"validation": point(0.5, 9), "test": point(0.8, 0.5)},
    ]
    (tmp_path / "front.json").write_text(json.dumps(front))
    text = summary(
        [
            Ended("good", tmp_path, 0, 61.4),
            Ended("bad", tmp_path / "bad", 1, 3),
            Ended("crashed", tmp_path / "crashed", -signal.SIGSEGV, 3),
            Ended("last", tmp_path / "last"),
        ]
    )
    assert [line.split("  ")[0] for line in text.splitlines()] == ["good", "bad", "crashed", "last"]
    assert "2 points, accuracy 0.9000 in 1.25 ms to 0.8000 in 0.5 ms  61 s" in text.splitlines()[0]
    assert "failed" in text.splitlines()[1]
    assert "killed (SIGSEGV)  no front" in text.splitlines()[2]
    assert "not begun" in text.splitlines()[3]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_ends_the_job_that_runs_and_the_batch(
    batch: subprocess.Popen[str], tmp_path: Path, number: signal.Signals, code: int
) -> None:
    batch.send_signal(number)
    output, errors = batch.communicate(timeout=60)
    assert batch.returncode == code, errors
    assert [line.split()[:2] for line in output.splitlines()] == [["a", "stopped"], ["b", "not"]]
    assert "job 2 of 2" not in errors
    assert not is_alive(int((tmp_path / "began").read_text()))


def test_a_job_ends_with_a_batch_that_is_killed(batch: subprocess.Popen[str], tmp_path: Path) -> None:
    batch.kill()
    batch.communicate(timeout=60)
    wait_for(lambda: not is_alive(int((tmp_path / "began").read_text())))
