"""Running a job: from the run folder to the verified front."""

from __future__ import annotations

import fcntl
import json
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from paretune.errors import JobError, SearchError
from paretune.objectives.baseline import Baseline
from paretune.search.executor import Executor, Report, make_executor
from paretune.search.front_json import read_front
from paretune.search.job import Job, load_job, make_job
from paretune.search.job_diff import check_same_job
from paretune.search.preparation import ENVIRONMENT, read_knowledge
from paretune.search.problem import BASELINE, float_widths
from paretune.search.profile import Profile, make_job_space
from paretune.search.report import write_report
from paretune.search.results import write_trials
from paretune.search.samplers import NOTHING, SAMPLERS, Known
from paretune.search.sharing import check_new_study, check_sharing, claim
from paretune.search.signals import sigterm_raises
from paretune.search.study import SearchStudy, results_of, stored_rows, study_url
from paretune.search.surrogate.sampler import FrontSampler
from paretune.search.trials import Trials
from paretune.search.verify_front import verify_front
from paretune.spaces.plan import CompressionPlan
from paretune.spaces.space import SearchSpace


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
    job = as_job(job)
    folder = Path(job.results) / job.name
    if folder.exists():
        raise JobError(
            "name",
            "must name a run that doesn't exist yet",
            f"{job.name!r}, and {folder} exists",
            f"go on with `paretune resume {folder}`, or choose another name (-o name=…)",
        )
    with open_search(job, report=report) as search:
        return search.run()


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
    with _opened(as_job(job or folder / "job.yaml"), folder, report or _to_stderr) as search:
        return search.run()


@contextmanager
def open_search(job: Job | Mapping[str, Any] | str | Path, *, report: Report | None = None) -> Iterator[Search]:
    """Open the run of a job, a new one or one that was stopped, for whoever wants to carry its trials out themselves.

    The block holds the run's lock. When it ends, so do the workers, and the files of the run are brought up to date.

    Args:
        job: As for `run`.
        report: As for `run`.

    Raises:
        JobError: The job is wrong, the folder of its name is another job's run, or the run is open elsewhere.
    """
    job = as_job(job)
    folder = Path(job.results) / job.name
    if folder.exists():
        check_same_job(job, folder)
    with _opened(job, folder, report or _to_stderr) as search:
        yield search


def refresh_trials(folder: Path) -> None:
    """Write `trials.csv` from the study as it is now, also while the run goes on.

    A run that was put away without its study, as reference runs are, keeps the `trials.csv` that it has.
    """
    job = load_job(folder)
    if job.storage or (folder / "study.db").is_file():
        write_trials(folder, stored_rows(job, folder))


class Search:
    """An open run.

    Attributes:
        job: What is searched.
        folder: The run folder.
        executor: Where the work is done.
        study: Proposes, and is told.
        trials: What there is to evaluate.
    """

    def __init__(self, job: Job, folder: Path, executor: Executor, study: SearchStudy, report: Report) -> None:
        self.job = job
        self.folder = folder
        self.executor = executor
        self.study = study
        self._metric = executor.problem.task.metric_name
        self._report = report
        self.trials = Trials(job, folder, study, self._metric, executor.problem.device(), report)

    def run(self) -> Path:
        """Carry the trials out and finish; returns the run folder; see `paretune.search.run.run`."""
        self.executor.run(self.trials)
        return self.finish()

    def finish(self) -> Path:
        """Verify the front and write the report, once the budget is spent; returns the run folder.

        Raises:
            SearchError: No trial succeeded, or none is feasible.
        """
        sampler = self.study.sampler
        errors = sampler.latency_errors() if isinstance(sampler, FrontSampler) else None
        if errors and errors.plans > 2:
            self._report(f"latency model: {errors}, each foreseen before it was measured")
            _write_json(self.folder / "latency_model.json", asdict(errors))
        if not self.trials.begun and _is_verified(self.folder):
            self._report("nothing is left to do: the budget is spent and the front is verified")
        elif not self.study.front():
            raise SearchError(_why_nothing(self.study))
        else:
            verify_front(self.job, self.folder, self.study, self.executor, self._metric, self._report)
            self.close()
            write_report(self.folder)
            self._report(f"report: {self.folder / 'report.html'}")
        if not read_front(self.folder)["points"]:
            bounds = ", ".join(map(str, self.job.constraints))
            raise SearchError(f"a verified point must keep all of {bounds}, but none did; loosen them or search longer")
        return self.folder

    def close(self) -> None:
        """End the workers with what they run, and bring the files up to date."""
        self.executor.close()
        for unfinished in self.folder.glob("trials/*/.unfinished-*"):  # of workers that were killed
            shutil.rmtree(unfinished)
        write_trials(self.folder, self.study.rows())


@contextmanager
def _opened(job: Job, folder: Path, report: Report) -> Iterator[Search]:
    """Open a run, which is made where there is none yet."""
    is_new = not folder.exists()
    if is_new:
        check_new_study(job)
    with sigterm_raises(), ExitStack() as stack:
        if not is_new:
            stack.enter_context(_alone(folder))
            _write_text(folder / "job.yaml", job.to_yaml())  # with another budget, perhaps
        executor = stack.enter_context(closing(make_executor(job, folder, report)))
        if is_new:
            profile = _prepared(job, folder, executor, report)
            stack.enter_context(_alone(folder))
        else:
            profile = Profile.read(folder, executor.problem)
        executor.learn(folder, profile)
        study = _study(job, folder, executor, profile, report)
        yield stack.enter_context(closing(Search(job, folder, executor, study, report)))


def _prepared(job: Job, folder: Path, executor: Executor, report: Report) -> Profile:
    """Make the run folder."""
    float_widths(job, executor.problem)  # what is wrong with either is said before anything is made
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{job.name}-") as made:
        prepared = Path(made) / job.name
        profile = executor.prepare(prepared)
        # In one step, so that a job that can't be deployed leaves no run behind, and a run is never half made.
        prepared.rename(folder)
    return profile


def _study(job: Job, folder: Path, executor: Executor, profile: Profile, report: Report) -> SearchStudy:
    """The study of a run, ready to propose."""
    space = make_job_space(job, executor.problem, profile, Baseline(folder / BASELINE).float_bits[""])
    known = _known(job, folder, executor, report)
    study = open_study(job, folder, space, known)
    if job.study:
        check_sharing(study, job, json.loads((folder / ENVIRONMENT).read_text()))
        claim(study, job.name, folder)
    if known.knowledge and not study.spent_seconds:
        study.spent_seconds = sum(known.knowledge.seconds.values())  # what was learnt first is part of the search
    if lost := study.recover():
        report(f"{lost} unfinished trials are begun anew")
    _enqueue(job, study, space)
    return study


def _known(job: Job, folder: Path, executor: Executor, report: Report) -> Known:
    """What a sampler may use; `front` also has plans measured."""

    def measure(plan: CompressionPlan) -> Mapping[str, float] | None:
        found = executor.outline(plan)
        if isinstance(found, str):
            report(f"a plan can't be deployed, so it isn't proposed: {found}")
            return None
        return found

    objectives, constraints = tuple(job.all_objectives), tuple(job.constraints)
    knowledge = read_knowledge(folder)
    if knowledge is None:
        return Known(objectives, constraints)
    return Known(objectives, constraints, knowledge, measure, results_of)


def open_study(job: Job, folder: Path, space: SearchSpace, known: Known = NOTHING) -> SearchStudy:
    """The study of a run, made if there is none yet."""
    return SearchStudy(
        job.study_name,
        job.storage or study_url(folder),
        space,
        SAMPLERS[job.search.sampler](space, job.search.seed, known),
        objectives=job.all_objectives,
        constraints=job.constraints,
        run=job.name if job.study else None,
    )


def _enqueue(job: Job, study: SearchStudy, space: SearchSpace) -> None:
    """The dense model, variants and uniform plans come first; a resumed study has them already."""
    if not study.is_new or job.search.sampler == "uniform":
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
    _write_text(path, json.dumps(data, indent=2) + "\n")


def _write_text(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.replace(path)


def as_job(job: Job | Mapping[str, Any] | str | Path) -> Job:
    """A job in any of the forms that `run` takes."""
    if isinstance(job, str | Path):
        return load_job(job)
    return job if isinstance(job, Job) else make_job(job)


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
