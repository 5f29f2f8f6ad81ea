"""Running a job: from the run folder to the verified front."""

from __future__ import annotations

import fcntl
import json
import math
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from paretune.errors import JobError, SearchError
from paretune.objectives.accelerator import release_memory
from paretune.objectives.baseline import Baseline, make_baseline
from paretune.objectives.device import Device
from paretune.objectives.environment import environment
from paretune.objectives.measurement import Measurement
from paretune.objectives.problem import Problem
from paretune.search.executor import Executor, Outcome, make_executor
from paretune.search.front_json import read_front
from paretune.search.job import Job, load_job, make_job
from paretune.search.problem import BASELINE, float_widths, load_problem
from paretune.search.profile import Profile, make_job_space, profile_job
from paretune.search.report import write_report
from paretune.search.requests import Evaluate
from paretune.search.results import candidates, write_front, write_trials
from paretune.search.samplers import SAMPLERS
from paretune.search.study import Proposal, SearchStudy, check_new_study, stored_rows, study_url
from paretune.search.verify_front import verify_front
from paretune.spaces.analysis import Analysis
from paretune.spaces.space import SearchSpace

Report = Callable[[str], None]
"""Takes a line for the user."""

_POLL = 1.0


def run(job: Job | Mapping[str, Any] | str | Path, *, report: Report | None = None) -> Path:
    """Run a job to its verified front.

    Args:
        job: A `Job`, a job file, or the keys of one as a mapping, in which live objects (a callable or module as
            `model.factory`, a callable or `Splits` as `data.source`, a `Task`) may stand for import strings.
        report: Takes one line for each thing that happens; by default they go to stderr.

    Returns:
        The run folder, with `front.json`, `trials.csv`, `report.html` and the artifacts.

    Raises:
        JobError: The job is wrong; nothing was spent.
        SearchError: No trial succeeded, or none is feasible.
    """
    if isinstance(job, str | Path):
        job = load_job(job)
    elif not isinstance(job, Job):
        job = make_job(job)
    report = report or _to_stderr
    folder = Path(job.results) / job.name
    if folder.exists():
        raise JobError(
            "name",
            "must name a run that doesn't exist yet",
            f"{job.name!r}, and {folder} exists",
            f"go on with `paretune resume {folder}`, or choose another name (-o name=…)",
        )
    check_new_study(job)
    floats = float_widths(job)
    problem = load_problem(job)
    analysis = problem.analyse()
    report(
        f"{job.name}: {len(analysis.groups)} groups to prune, {len(analysis.frozen)} layers frozen, "
        f"{analysis.params:,} parameters, {analysis.macs:,} MACs"
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{job.name}-") as made:
        prepared = Path(made) / job.name
        profile = _prepare(job, problem, analysis, prepared, floats, report)
        # In one step, so that a job that can't be deployed leaves no run behind, and a run is never half made.
        prepared.rename(folder)
    return _search(job, folder, problem, profile, report)


def resume(folder: str | Path, *, job: Job | Mapping[str, Any] | None = None, report: Report | None = None) -> Path:
    """Go on with a run that was stopped or killed; what was running is begun anew.

    Args:
        folder: The run folder.
        job: Only for a job with live objects: the same job again.
        report: As for `run`.

    Raises:
        JobError: The folder isn't a run, or its job has live objects and none were given.
    """
    folder = Path(folder)
    if not (folder / "job.yaml").is_file():
        raise JobError("run", "must be a run folder with a job.yaml", folder, "name a folder below results/")
    if job is None:
        job = load_job(folder / "job.yaml")
    elif not isinstance(job, Job):
        job = make_job(job)
    report = report or _to_stderr
    problem = load_problem(job)
    return _search(job, folder, problem, Profile.read(folder, problem), report)


def refresh_trials(folder: Path) -> None:
    """Write `trials.csv` from the study as it is now, also while the run goes on.

    A run that was put away without its study, as reference runs are, keeps the `trials.csv` that it has.
    """
    job = load_job(folder)
    if job.storage or (folder / "study.db").is_file():
        write_trials(folder, stored_rows(job, folder))


def _prepare(
    job: Job, problem: Problem, analysis: Analysis, folder: Path, floats: tuple[int, ...], report: Report
) -> Profile:
    """Make a run folder: the job, the environment, the measured baseline, what the targets make of the model."""
    folder.mkdir()
    (folder / "job.yaml").write_text(job.to_yaml())
    _write_json(folder / "environment.json", environment())
    baseline = make_baseline(problem, analysis, folder / BASELINE, float_bits=floats)
    _check_measurable(job, baseline.measurement)
    profile = profile_job(job, problem, baseline, analysis, report=report)
    release_memory()
    make_job_space(job, problem, profile, baseline.float_bits[""])  # so that a space that can't be made leaves no run
    profile.write(folder)
    for name, measured in baseline.measurement.on.items():
        report(
            f"baseline{f' on {name}' if name else ''}: {problem.task.metric_name} {measured.accuracy:.4f}, "
            f"{measured.latency_ms:.3f} ms as {baseline.card.deployed[name].float_format}, "
            f"{measured.size_bytes:,} bytes"
        )
    for one in profile.tried:
        report(f"{one.technique} ({one.setting}): {'offered' if one.offered else 'not offered'}, {one.reason}")
    return profile


def _check_measurable(job: Job, measured: Measurement) -> None:
    """Raise JobError for an objective or a bound on what the targets don't give, e.g. the energy of a CPU."""
    known = measured.to_dict()
    bounds = [constraint.name for constraint in job.constraints]
    for key, names in (("objectives", job.objectives), ("constraints", bounds)):
        for position, name in enumerate(names):
            if name not in known:
                rule = "must be something that its target tells"
                remedy = f"choose among {', '.join(known)}"
                raise JobError(f"{key}[{position}]", rule, repr(name), remedy)


def _search(job: Job, folder: Path, problem: Problem, profile: Profile, report: Report) -> Path:
    with _alone(folder):
        return _search_alone(job, folder, problem, profile, report)


def _search_alone(job: Job, folder: Path, problem: Problem, profile: Profile, report: Report) -> Path:
    metric = problem.task.metric_name
    space = make_job_space(job, problem, profile, Baseline(folder / BASELINE).float_bits[""])
    study = open_study(job, folder, space)
    if lost := study.recover():
        report(f"{lost} unfinished trials are begun anew")
    _enqueue(job, study, space)
    executor = make_executor(job, folder, workers=job.search.workers)
    with _sigterm_raises():
        try:
            begun = _trials(job, folder, study, executor, metric, report)
            if not begun and _is_verified(folder):
                report("nothing is left to do: the budget is spent and the front is verified")
                return folder
            if not candidates(study):
                raise SearchError(_why_nothing(study))
            verify_front(job, folder, study, executor, metric, report)
        finally:
            executor.close()
            for unfinished in folder.glob("trials/*/.unfinished-*"):  # of workers that were killed
                shutil.rmtree(unfinished)
            write_trials(folder, study.rows())
    write_report(folder)
    report(f"report: {folder / 'report.html'}")
    if not read_front(folder)["points"]:
        bounds = ", ".join(map(str, job.constraints))
        raise SearchError(f"a verified point must keep all of {bounds}, but none did; loosen them or search longer")
    return folder


def open_study(job: Job, folder: Path, space: SearchSpace) -> SearchStudy:
    """The study of a run, made if there is none yet."""
    return SearchStudy(
        job.name,
        job.storage or study_url(folder),
        space,
        SAMPLERS[job.search.sampler](space, job.search.seed),
        objectives=job.all_objectives,
        constraints=job.constraints,
    )


def _enqueue(job: Job, study: SearchStudy, space: SearchSpace) -> None:
    """The dense model and uniform plans come first; a resumed study has them already."""
    if study.rows() or job.search.sampler == "uniform":
        return
    count = job.search.uniform_trials
    if count is None:
        count = min(8, (job.search.trials or 40) // 5)
    study.enqueue(space.sweep(0), "dense")
    for variant in space.variants:
        study.enqueue(space.uniform(variant=variant), "variant")
    seen = {space.sweep(0).hash}
    for plan in map(space.sweep, range(1, 1 + count)):
        if plan.hash not in seen:  # a small space has fewer uniform plans than that
            seen.add(plan.hash)
            study.enqueue(plan, "uniform")


def _trials(job: Job, folder: Path, study: SearchStudy, executor: Executor, metric: str, report: Report) -> int:
    """Propose, evaluate, tell, until the budget is spent; returns how many trials were begun."""
    before = begun = study.proposed()
    start = time.monotonic() - study.spent_seconds
    end = start + job.search.timeout if job.search.timeout else math.inf
    running: dict[int, Proposal] = {}
    limit = job.search.trials or sys.maxsize
    device = Device(*job.devices)
    while True:
        while executor.free > 0 and begun < limit and time.monotonic() < end:
            with device.shared():  # samplers compute too, and somebody may be measuring
                proposal = study.propose()
            begun += 1
            running[proposal.number] = proposal
            executor.submit(proposal.number, _request(job, folder, proposal), deadline=job.search.trial_timeout)
        if not running:
            return begun - before
        for outcome in executor.wait(_POLL):
            proposal = running.pop(outcome.number)
            error = _tell(folder, study, proposal, outcome)
            study.spent_seconds = time.monotonic() - start
            write_front(folder, study, metric)
            report(_line(metric, proposal, outcome, error))


def _request(job: Job, folder: Path, proposal: Proposal) -> Evaluate:
    trial = folder / "trials" / str(proposal.number)
    trial.mkdir(parents=True, exist_ok=True)
    (trial / "plan.json").write_text(proposal.plan.to_json() + "\n")
    return Evaluate(proposal.plan, trial / "artifact", job.search.seed)


def _tell(folder: Path, study: SearchStudy, proposal: Proposal, outcome: Outcome) -> str:
    """Store what came of a trial; returns why it failed, if it did."""
    trial = folder / "trials" / str(proposal.number)
    error = outcome.error
    if not error and (lacking := study.lacking(outcome.result.measurement)):
        error = f"every objective and bound must be measured, but {lacking} couldn't be read on its target"
    if error:
        (trial / "error.txt").write_text(f"{error}\n\n{outcome.details}".rstrip() + "\n")
        study.fail(proposal.number, error)
        return error
    record = {"number": proposal.number, "source": proposal.source, "plan_hash": proposal.plan.hash}
    _write_json(trial / "record.json", record | outcome.result.to_dict())
    study.complete(proposal.number, outcome.result)
    return ""


def _line(metric: str, proposal: Proposal, outcome: Outcome, error: str) -> str:
    head = f"trial {proposal.number} ({proposal.source})"
    if error:
        return f"{head}: failed: {error}"
    measured = outcome.result.measurement.main
    others = outcome.result.measurement.on.items()
    seconds = sum(outcome.result.seconds.values())
    return (
        f"{head}: {metric} {measured.accuracy:.4f}, {measured.latency_ms:.3f} ms "
        f"({measured.speedup:.2f}x), "
        + "".join(f"{other.latency_ms:.3f} ms on {name} ({other.speedup:.2f}x), " for name, other in others if name)
        + f"{measured.size_bytes:,} bytes, {seconds:.1f} s"
        + (", noisy" if outcome.result.noisy else "")
    )


def _why_nothing(study: SearchStudy) -> str:
    rows = study.rows()
    errors = [row.error for row in rows if row.error]
    complete = sum(row.record is not None for row in rows)
    if complete:
        bounds = ", ".join(map(str, study.constraints))
        return f"a trial must keep all of {bounds}, but none of {complete} did; loosen them or search longer"
    last = f"; the last one: {errors[-1]}" if errors else ""
    return f"a trial must succeed, but {len(errors)} of {len(rows)} failed{last}"


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n")


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)  # noqa: T201 - the search's progress is for people


def _is_verified(folder: Path) -> bool:
    try:
        return bool(read_front(folder)["verified"])
    except JobError:  # there is none yet, or it was torn: it is made anew
        return False


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep a second search out of a run: the study has one writer. The kernel frees the lock of one that is killed."""
    with (folder / ".lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise JobError("run", "must not be searched by two at once", folder, "wait for the other one") from error
        yield


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Let SIGTERM end the search as Ctrl-C does, with the workers stopped and the files written."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
