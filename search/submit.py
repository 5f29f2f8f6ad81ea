"""Sending a job to a Ray cluster through the Ray Jobs API, and asking after it."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from paretune.errors import JobError
from paretune.search._runfiles import redacted
from paretune.search.job import Job, load_job, override
from paretune.search.job_diff import is_file, leaves
from paretune.search.job_yaml import read_yaml

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

STOP_SECONDS = 120
"""How long a stopped job has to end its workers and write its files; Ray's own 3 seconds aren't enough."""

_STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
_POLL_SECONDS = 2.0
_START_SECONDS = 60.0
_T = TypeVar("_T")


@dataclass(frozen=True)
class Submission:
    """What is sent to the cluster.

    Attributes:
        name: The job's.
        entrypoint: The command that is run on the head node, in a copy of the job file's folder.
        runtime_env: Ray's: that folder, what of it stays here, and environment variables.
        run: The run folder to be, on the cluster.
    """

    name: str
    entrypoint: str
    runtime_env: Mapping[str, Any]
    run: Path


def make_submission(path: Path, overrides: Sequence[str] = (), *, exclude: Sequence[str] = ()) -> Submission:
    """Check a job and say what has to be sent.

    The entrypoint says ``--resume``: submitted again, e.g. after the cluster was gone, the job goes on.

    Args:
        path: The job file; its folder is sent.
        overrides: As for `load_job`; they are passed on.
        exclude: Patterns, as in ``.gitignore``, of what in the folder isn't sent.

    Raises:
        JobError: The job is wrong, or needs something that isn't sent and isn't on the cluster.
    """
    job = load_job(path, overrides)
    path = path.resolve()
    content = read_yaml(path)
    for assignment in overrides:
        override(content, assignment)
    _check_results(content)
    _check_files(content, path.parent)
    # The cluster is the one that the job is sent to, and what is sent has the environment of the trials already: Ray
    # refuses to be told the same again.
    arguments = ["-o", "ray.address=auto", "-o", "ray.runtime_env={}"] if job.search.executor == "ray" else []
    given = [part for assignment in overrides for part in ("-o", assignment)]
    command = ["paretune", "run", path.name, "--resume", *given, *arguments]
    return Submission(
        job.name,
        f"exec {shlex.join(command)}",  # exec: SIGTERM must reach it, not a shell
        _environment(job, path.parent, exclude),
        Path(job.results) / job.name,
    )


class Cluster:
    """The jobs of a Ray cluster.

    Args:
        address: Its dashboard, e.g. ``http://10.0.0.1:8265``; None: what RAY_API_SERVER_ADDRESS or RAY_ADDRESS names,
            or one that runs on this machine.

    Raises:
        JobError: It can't be reached.
    """

    def __init__(self, address: str | None = None) -> None:
        self._address = address
        with _ray_variables(address):
            self._client = self._reach()

    def submit(self, submission: Submission) -> str:
        """Send a job; returns its ID."""
        # Ray leaves out what .gitignore names, and weights often are there: a job would miss them on the cluster.
        os.environ.setdefault("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "1")
        end = time.monotonic() + _START_SECONDS
        while not (job_id := self._offer(submission, may_wait=time.monotonic() < end)):
            time.sleep(_POLL_SECONDS)
        return job_id

    def jobs(self) -> list[JobDetails]:
        """All jobs that were submitted, the oldest first."""
        with self._reaching():
            found = [job for job in self._client.list_jobs() if job.submission_id]
        return sorted(found, key=lambda job: job.start_time or 0)

    def details(self, job_id: str) -> JobDetails:
        """What is known of a job."""
        return self._ask(self._client.get_job_info, job_id)

    def logs(self, job_id: str) -> str:
        """All that a job has printed."""
        return self._ask(self._client.get_job_logs, job_id)

    def follow(self, job_id: str) -> Iterator[str]:
        """What a job has printed, and prints until it ends."""
        shown = 0
        while True:
            over = self.details(job_id).status.is_terminal()  # asked first, or the last lines could be missed
            text = self.logs(job_id)
            yield text[shown:]
            shown = len(text)
            if over:
                return
            time.sleep(_POLL_SECONDS)

    def stop(self, job_id: str) -> JobDetails:
        """End a job by SIGTERM, and wait until it has; its run can go on later."""
        self._ask(self._client.stop_job, job_id)
        while not (found := self.details(job_id)).status.is_terminal():
            time.sleep(_POLL_SECONDS / 4)
        return found

    def _offer(self, submission: Submission, *, may_wait: bool) -> str:
        """The ID of the job, or nothing where the head was started a moment ago and doesn't take jobs yet."""
        try:
            return self._client.submit_job(
                entrypoint=submission.entrypoint,
                runtime_env=dict(submission.runtime_env),
                metadata={"job": submission.name},
            )
        except (RuntimeError, ValueError, PermissionError) as error:  # the last one of a file that can't be read
            if may_wait and "No available agent" in str(error):
                return ""
            remedy = "leave large files out with --exclude, or try again when the cluster is up"
            raise JobError("the job", "must be something that the cluster takes", error, remedy) from error
        except OSError as error:
            raise self._unreachable(error) from error

    def _reach(self) -> JobSubmissionClient:
        if find_spec("aiohttp") is None:  # it comes with ray[default] alone
            remedy = "pip install 'paretune[cluster]'"
            raise JobError("Ray's client of jobs", "must be installed", "no package aiohttp", remedy)
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient

        try:
            return JobSubmissionClient(self._address)
        except (OSError, RuntimeError, ValueError) as error:
            raise self._unreachable(error) from error
        except AuthenticationError as error:
            remedy = "copy ~/.ray/auth_token from the head node, or set RAY_AUTH_TOKEN; with RAY_AUTH_MODE=token"
            got = f"{self._address or 'its address'} without, or with another one"
            raise JobError("--address", "must be given with the cluster's token", got, remedy) from error

    def _ask(self, question: Callable[[str], _T], job_id: str) -> _T:
        try:
            with self._reaching():
                return question(job_id)
        except RuntimeError as error:
            if "does not exist" not in str(error):
                raise
            remedy = "`paretune status` without an ID lists those that it knows"
            raise JobError("ID", "must be a job of this cluster", repr(job_id), remedy) from error

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        """Say where a connection was lost, or the cluster has gone."""
        try:
            yield
        except OSError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> JobError:
        got = f"{self._address or 'none'} ({(str(error) or type(error).__name__).splitlines()[0]})"
        remedy = (
            "name it, e.g. --address http://HEAD:8265; its head node must have ray[default] "
            "(pip install 'paretune[cluster]') when `ray start --head` is called"
        )
        return JobError("--address", "must be the dashboard of a Ray cluster that runs", got, remedy)


def as_row(job: JobDetails) -> dict[str, Any]:
    """A job's ID, status, message and times (seconds since 1970), as JSON can hold them, without passwords in URLs."""
    return {
        "id": job.submission_id,
        "job": (job.metadata or {}).get("job"),
        "status": job.status.value,
        "message": redacted(job.message or ""),
        "exit_code": job.driver_exit_code,
        "began": job.start_time and job.start_time / 1000,
        "ended": job.end_time and job.end_time / 1000,
        "entrypoint": redacted(job.entrypoint),
    }


def _check_results(content: Mapping[str, Any]) -> None:
    """The job runs in a folder that Ray makes and removes, so a relative one would be lost."""
    results = content.get("results")
    if not isinstance(results, str) or not Path(results).is_absolute():
        raise JobError(
            "results",
            "must be an absolute path that the cluster's head node keeps, for a job that is submitted",
            repr(results),
            "add e.g. -o results=/shared/results",
        )


def _check_files(content: Mapping[str, Any], folder: Path) -> None:
    """What is named relative to the job file must be in its folder, which is what is sent."""
    for key, value in leaves(content):
        if not isinstance(value, str) or not (is_file(key) or key.startswith("python_path")):
            continue
        file = Path(value)
        if file.is_absolute():
            continue
        if value.startswith("~") or not (folder / file).resolve().is_relative_to(folder):
            remedy = "move it there, or give its absolute path on the cluster"
            raise JobError(key, "must be in the job file's folder, for a job that is submitted", repr(value), remedy)
        if not (folder / file).exists():
            raise JobError(key, "must exist", repr(value), f"put it into {folder}")


def _environment(job: Job, folder: Path, exclude: Sequence[str]) -> dict[str, Any]:
    wanted: dict[str, Any] = dict(job.ray.runtime_env)
    results = Path(job.results)
    own = ["/results"]  # of runs on this machine
    if results.is_relative_to(folder):
        own.append(f"/{results.relative_to(folder)}")
    # Ray's supervisor of the job runs in this environment too, and reads there how long it has to wait.
    variables = {_STOP_WAIT: str(STOP_SECONDS)} | wanted.get("env_vars", {})
    return wanted | {
        "working_dir": str(folder),
        "excludes": [*wanted.get("excludes", []), *dict.fromkeys(own), *exclude],
        "env_vars": variables,
    }


def _has_token() -> bool:
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(named) or (Path.home() / ".ray" / "auth_token").is_file()


@contextmanager
def _ray_variables(address: str | None) -> Iterator[None]:
    """What Ray reads when its client of jobs is imported and made; the variables are as before afterwards."""
    saved = dict(os.environ)
    if address:  # Ray prefers these to what it is told; here what the user typed counts
        os.environ.pop("RAY_API_SERVER_ADDRESS", None)
        os.environ.pop("RAY_ADDRESS", None)
    if _has_token():  # Ray's own programs look for one, but its client of jobs must be told to
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        yield
    finally:
        for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS", "RAY_AUTH_MODE"):
            if name in saved:
                os.environ[name] = saved[name]
            else:
                os.environ.pop(name, None)
