"""Running a job: from the run folder to the verified front."""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from paretune.errors import JobError, SearchError
from paretune.objectives.accelerator import release_memory
from paretune.objectives.baseline import Baseline, make_baseline
from paretune.objectives.environment import environment
from paretune.objectives.measurement import Measurement
from paretune.objectives.problem import Problem
from paretune.search.executor import make_executor
from paretune.search.front_json import read_front
from paretune.search.job import Job, load_job, make_job
from paretune.search.preparation import prepare
from paretune.search.problem import BASELINE, float_widths, load_problem
from paretune.search.profile import Profile, make_job_space, profile_job
from paretune.search.report import write_report
from paretune.search.results import candidates, write_trials
from paretune.search.samplers import NOTHING, SAMPLERS, Known
from paretune.search.study import SearchStudy, check_new_study, stored_rows, study_url
from paretune.search.surrogate.sampler import FrontSampler
from paretune.search.trials import run_trials
from paretune.search.verify_front import verify_front
from paretune.spaces.analysis import Analysis
from paretune.spaces.space import SearchSpace

Report = Callable[[str], None]
"""Takes a line for the user."""


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
    known = prepare(job, folder, problem, profile, space, report)
    study = open_study(job, folder, space, known)
    if known.knowledge and not study.spent_seconds:
        study.spent_seconds = sum(known.knowledge.seconds.values())  # what was learnt first is part of the search
    if lost := study.recover():
        report(f"{lost} unfinished trials are begun anew")
    _enqueue(job, study, space)
    executor = make_executor(job, folder, workers=job.search.workers)
    with _sigterm_raises():
        try:
            begun = run_trials(job, folder, study, executor, metric, problem.device(), report)
            errors = study.sampler.latency_errors() if isinstance(study.sampler, FrontSampler) else None
            if errors and errors.plans > 2:
                report(f"latency model: {errors}, each foreseen before it was measured")
                _write_json(folder / "latency_model.json", asdict(errors))
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


def open_study(job: Job, folder: Path, space: SearchSpace, known: Known = NOTHING) -> SearchStudy:
    """The study of a run, made if there is none yet."""
    return SearchStudy(
        job.name,
        job.storage or study_url(folder),
        space,
        SAMPLERS[job.search.sampler](space, job.search.seed, known),
        objectives=job.all_objectives,
        constraints=job.constraints,
    )


def _enqueue(job: Job, study: SearchStudy, space: SearchSpace) -> None:
    """The dense model, variants and uniform plans come first; a resumed study has them already."""
    if study.rows() or job.search.sampler == "uniform":
        return
    count = job.search.uniform_trials
    if count is None:  # the sampler `front` has uniform plans among its candidates
        count = 0 if job.search.sampler == "front" else min(8, (job.search.trials or 40) // 5)
    study.enqueue(space.sweep(0), "dense")
    for variant in space.variants:
        study.enqueue(space.uniform(variant=variant), "variant")
    seen = {space.sweep(0).hash}
    for plan in map(space.sweep, range(1, 1 + count)):
        if plan.hash not in seen:  # a small space has fewer uniform plans than that
            seen.add(plan.hash)
            study.enqueue(plan, "uniform")


def _why_nothing(study: SearchStudy) -> str:
    rows = study.rows()
    errors = [row.error for row in rows if row.error]
    if complete := sum(row.record is not None for row in rows):
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
