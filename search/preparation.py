"""What a run begins with: its folder is filled, and what the sampler `front` wants to know is found out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from paretune.errors import JobError
from paretune.objectives.accelerator import release_memory
from paretune.objectives.baseline import Baseline, make_baseline
from paretune.objectives.environment import environment
from paretune.objectives.measurement import Measurement
from paretune.objectives.problem import Problem
from paretune.search.job import Job
from paretune.search.problem import BASELINE, float_widths
from paretune.search.profile import Profile, make_job_space, profile_job
from paretune.search.surrogate.knowledge import Knowledge
from paretune.search.surrogate.learn import learn

Report = Callable[[str], None]

_OUTLINES = 24
"""Plans that are measured untrained, at most."""

ENVIRONMENT = "environment.json"
"""File of a run with what its targets were when it began."""

_KNOWLEDGE = "knowledge.json"


def prepare_run(job: Job, problem: Problem, folder: Path, report: Report) -> Profile:
    """Make a run folder: the job, the environment, the measured baseline, what the targets make of the model.

    Args:
        job: What is run.
        problem: What it is about; its targets are here.
        folder: Must not exist yet.
        report: Takes a line for the user.

    Raises:
        JobError: The model can't be deployed, something can't be measured, or nothing is left to choose.
    """
    floats = float_widths(job, problem)
    analysis = problem.analyse()
    report(
        f"{job.name}: {len(analysis.groups)} groups to prune, {len(analysis.frozen)} layers frozen, "
        f"{analysis.params:,} parameters, {analysis.macs:,} MACs"
    )
    folder.mkdir()
    (folder / "job.yaml").write_text(job.to_yaml())
    (folder / ENVIRONMENT).write_text(json.dumps(environment(), indent=2) + "\n")
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


def learn_run(job: Job, problem: Problem, folder: Path, profile: Profile, report: Report) -> None:
    """Find out what the job's sampler wants to know before the first trial, unless the run knows it already.

    Args:
        job: Its sampler may want nothing.
        problem: What it is about; its targets are here.
        folder: The run folder.
        profile: Of the model on the targets.
        report: Takes a line for the user.
    """
    path = folder / _KNOWLEDGE
    if job.search.sampler != "front" or path.is_file():
        return
    baseline = Baseline(folder / BASELINE)
    space = make_job_space(job, problem, profile, baseline.float_bits[""])
    # A short search can't spend as long on finding out as a long one.
    outlines = min(_OUTLINES, 2 * (job.search.trials or _OUTLINES))
    knowledge = learn(job, problem, baseline, profile, space, report, outlines=outlines)
    part = path.with_name(f".{path.name}.part")  # a run that is killed here learns anew
    part.write_text(json.dumps(knowledge.to_dict(), indent=1) + "\n")
    part.replace(path)


def read_knowledge(folder: Path) -> Knowledge | None:
    """What a run found out for its sampler; None where that wanted nothing."""
    path = folder / _KNOWLEDGE
    return Knowledge.from_dict(json.loads(path.read_text())) if path.is_file() else None
