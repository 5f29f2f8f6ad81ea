"""Several jobs, one after the other; and going on with one that a requeued batch had begun."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from paretune.errors import JobError
from paretune.search.front_json import read_front
from paretune.search.job import Job, load_job
from paretune.search.signals import SIGINT_EXIT, SIGTERM_EXIT, sigterm_raises

Report = Callable[[str], None]

_PR_SET_PDEATHSIG = 1
_STOPPED = (SIGINT_EXIT, SIGTERM_EXIT)
_STATES = {None: "not begun", 0: "done", 1: "failed", 2: "wrong", SIGINT_EXIT: "stopped", SIGTERM_EXIT: "stopped"}


@dataclass(frozen=True)
class Ended:
    """What became of a job of a batch.

    Attributes:
        name: The job's.
        folder: Its run folder, which need not exist.
        code: What `paretune run` ended with: an exit code, or minus the signal that killed it; None: not begun.
        seconds: How long that took.
    """

    name: str
    folder: Path
    code: int | None = None
    seconds: float = 0.0

    @property
    def state(self) -> str:
        """The code in words."""
        if self.code is not None and self.code < 0:
            return f"killed ({signal.Signals(-self.code).name})"
        return _STATES.get(self.code, "failed")

    @property
    def points(self) -> str:
        """The ends of its front in words."""
        try:
            front = read_front(self.folder)
        except JobError:  # there is none, or it was torn
            return "no front"
        found = [point.get("test") or point["validation"] for point in front["points"]]
        if not found:
            return "no point"
        best = max(found, key=lambda point: float(point["accuracy"]))
        fastest = min(found, key=lambda point: float(point["latency_ms"]))
        ends = [f"{point['accuracy']:.4f} in {point['latency_ms']:.3g} ms" for point in (best, fastest)]
        count = f"{len(found)} point{'' if len(found) == 1 else 's'}{'' if front['verified'] else ' so far'}"
        return f"{count}, {front['metric']} {' to '.join(dict.fromkeys(ends))}"


def run_or_resume(job: Job, *, report: Report | None = None) -> Path:
    """Go on with a job's run where there is one, else begin it; what a requeued or retried batch job needs.

    Raises:
        JobError: The run was made of another job; else as `run` and `resume`.
    """
    from paretune.search.run import open_search

    with open_search(job, report=report) as search:
        return search.run()


def run_folder(job: Job) -> Path:
    """Where a job's run is, or will be."""
    return Path(job.results) / job.name


def load_jobs(files: Sequence[Path], overrides: Sequence[str] = ()) -> list[Job]:
    """Read the jobs of a batch.

    Raises:
        JobError: Some are wrong, or share a run folder; one error lists all.
    """
    jobs: list[Job] = []
    mistakes: list[str] = []
    homes: dict[Path, Path] = {}
    for file in files:
        try:
            job = load_job(file, overrides)
        except JobError as error:
            mistakes.append(f"{file}: {error}")
            continue
        folder = run_folder(job)
        if folder in homes:
            got = f"{job.name!r}, and so has {homes[folder]}"
            mistakes.append(f"{file}: {JobError('name', 'must be one of its own', got, 'rename one of them')}")
            continue
        homes[folder] = file
        jobs.append(job)
    if mistakes:
        listed = "\n".join(f"  - {mistake}" for mistake in mistakes)
        got = f"mistakes in {len(mistakes)} of {len(files)} jobs"
        raise JobError("jobs", "must all be right before the first is begun", got, f"correct them:\n{listed}")
    return jobs


def run_batch(
    files: Sequence[Path], overrides: Sequence[str] = (), *, resume: bool = False, report: Report
) -> list[Ended]:
    """Run jobs one after the other, whatever becomes of each.

    Each runs in a process of its own: jobs may have different modules of one name, and a crash in native code or for
    want of memory must not end the others. SIGTERM and Ctrl-C end the batch, and the job that runs as if it ran alone.

    Args:
        files: The job files.
        overrides: As for `load_job`, for all of them.
        resume: Go on with the runs that exist; else these jobs fail, and the others are run.
        report: Takes a line for the user before each job.

    Returns:
        What became of each, in order.

    Raises:
        JobError: Some jobs are wrong; nothing was begun.
    """
    jobs = load_jobs(files, overrides)
    ended: list[Ended] = []
    options = [*(["--resume"] if resume else []), *(part for override in overrides for part in ("-o", override))]
    stopped = False
    with sigterm_raises():
        for position, (file, job) in enumerate(zip(files, jobs, strict=True), start=1):
            if stopped:
                ended.append(Ended(job.name, run_folder(job)))
                continue
            report(f"job {position} of {len(jobs)}: {job.name} ({file})")
            began = time.monotonic()
            code, stopped = _run([sys.executable, "-m", "paretune", "run", *options, "--", str(file)])
            ended.append(Ended(job.name, run_folder(job), code, time.monotonic() - began))
    return ended


def exit_code(ended: Sequence[Ended]) -> int:
    """The worst of several: 0 < 1 < 2, and a signal's, which ended all."""
    codes = [job.code for job in ended if job.code is not None]
    return max((code if code in (0, 1, 2, *_STOPPED) else 1 for code in codes), default=0)


def summary(ended: Sequence[Ended]) -> str:
    """A line for each job: name, state, front, seconds, folder."""
    rows = [(job.name, job.state, job.points, f"{job.seconds:.0f} s", str(job.folder)) for job in ended]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _run(command: Sequence[str]) -> tuple[int, bool]:
    """Run a job's program; returns its exit code, and whether a signal shall end the batch with it."""
    # In a session of its own, so that Ctrl-C reaches it once, from us. The kernel ends it if we are killed with -9.
    libc = ctypes.CDLL(None)  # loaded here: little is safe between fork and exec
    child = subprocess.Popen(
        command, start_new_session=True, preexec_fn=lambda: libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    )
    told = 0
    while True:
        try:
            code = child.wait()
            break
        except KeyboardInterrupt:
            told = SIGINT_EXIT
            child.send_signal(signal.SIGINT)
        except SystemExit:
            told = SIGTERM_EXIT
            child.send_signal(signal.SIGTERM)
    if code in (-signal.SIGINT, -signal.SIGTERM):  # before Python, or torch, was ready to catch it
        code = 128 - code
    return told or code, bool(told) or code in _STOPPED
