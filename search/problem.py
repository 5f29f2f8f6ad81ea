"""From the job to what the objectives work on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

from paretune.errors import JobError
from paretune.objectives.baseline import Baseline, profile
from paretune.objectives.compress.schemes import Schemes, merge
from paretune.objectives.data import load_splits
from paretune.objectives.device import Device
from paretune.objectives.evaluate import Evaluator
from paretune.objectives.finetune import TrainOptions
from paretune.objectives.models import ModelSource
from paretune.objectives.problem import Problem
from paretune.objectives.runtimes import Capabilities, Target, get_runtime
from paretune.objectives.staircase import Staircase, staircases, useful_counts
from paretune.objectives.tasks import load_task
from paretune.search.job import Job
from paretune.search.job_sections import ModelSection, TargetSection
from paretune.spaces.analysis import EXCLUDED, Analysis
from paretune.spaces.space import Options, SearchSpace, make_space

BASELINE = "baseline"
"""Folder of the dense artifact in a run."""


def load_problem(job: Job) -> Problem:
    """Import, load and check everything that a job names.

    Raises:
        JobError: Something of it is wrong.
    """
    job.add_python_path()
    others = {name: _target(section) for name, section in job.other_targets.items()}
    teacher = job.teacher if isinstance(job.teacher, ModelSection) else None
    problem = Problem(
        model=_source(job.model, "model"),
        splits=load_splits(job.data.source, job.data.args),
        task=load_task(job.task),
        target=_target(job.target),
        others=others,
        training=TrainOptions(**job.finetune.model_dump()),
        teacher=_source(teacher, "teacher") if teacher else None,
        exclude=tuple(job.space.exclude),
    )
    for position, site in enumerate(problem.sites.values()):
        with _naming(f"targets[{position}]" if others else "target"):
            _ = site.capabilities
    problem.check()
    return problem


def _target(section: TargetSection) -> Target:
    return Target(**{key: getattr(section, key) for key in TargetSection.model_fields})


@contextmanager
def _naming(target: str) -> Iterator[None]:
    """Say which of several targets is wrong."""
    try:
        yield
    except JobError as error:
        where = error.where.removeprefix("target")
        raise JobError(f"{target}{where}", error.rule, error.got, error.remedy) from error


def _source(section: ModelSection, key: str) -> ModelSource:
    return ModelSource(section.factory, section.args, Path(section.weights) if section.weights else None, key)


def load_evaluator(job: Job, run: Path) -> Evaluator:
    """The evaluator of a worker; the run holds the baseline already."""
    with Device(*job.devices).shared():
        problem = load_problem(job)
    return Evaluator(problem, Baseline(run / BASELINE))


def float_widths(job: Job) -> tuple[int, ...]:
    """Float widths among which the job lets the baseline choose.

    Raises:
        JobError: A width that the target's runtime doesn't execute, or two float widths.
    """
    capabilities = _capabilities(job)
    if job.space.bits == "auto":
        return capabilities.float_bits
    known = set(capabilities.float_bits).union(*capabilities.integer_bits.values())
    for width in job.space.bits:
        if width not in known:
            raise JobError(
                "space.bits",
                f"must be widths that the runtime {job.target.runtime!r} executes on {job.target.device!r}",
                width,
                f"use some of {sorted(known, reverse=True)}",
            )
    floats = tuple(width for width in job.space.bits if width > 8)
    if len(floats) > 1:
        raise JobError(
            "space.bits",
            f"must name at most one float width: {job.target.runtime!r} runs all unquantized layers in one",
            list(floats),
            "leave one out, or use auto, which takes the faster",
        )
    return floats or capabilities.float_bits


def layer_widths(job: Job, analysis: Analysis, float_bits: int) -> Mapping[str, tuple[int, ...]]:
    """Widths that the search may give to each layer, widest first; empty where the job quantizes nothing."""
    if not job.space.quantize:
        return {}
    allowed: Any = None if job.space.bits == "auto" else set(job.space.bits)
    fixed = {entry.layer for entry in analysis.frozen if entry.reason == EXCLUDED}
    widths = {}
    for name, probed in analysis.widths.items():
        offered = tuple(width for width in probed if allowed is None or width in allowed)
        widths[name] = (float_bits,) if name in fixed or not offered else offered
    return widths


def profile_target(
    job: Job,
    problem: Problem,
    baseline: Baseline,
    analysis: Analysis,
    *,
    staircase: bool = False,
    fresh: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[Analysis, dict[str, Staircase]]:
    """The analysis with what the target makes of the model: latency shares, widths, and useful channel counts.

    Args:
        job: Decides whether channel counts are probed.
        problem: What it is about.
        baseline: The dense artifact.
        analysis: Of the model.
        staircase: Probe channel counts even where the job has fixed ones.
        fresh: Measure them even where this machine remembers them.
        report: Takes a line for the user.

    Returns:
        The analysis, and the staircases by layer kind; none where nothing was probed.
    """
    analysis = profile(problem, baseline, analysis)
    probes = job.space.prune and job.space.channels == "probe"
    if not probes and not staircase:
        return analysis, {}
    report("measuring at which channel counts the target gets faster (remembered for the next run)")
    found = staircases(problem.target, analysis, baseline.float_bits[""], fresh=fresh)
    return replace(analysis, counts=useful_counts(found)) if probes else analysis, found


def make_job_space(job: Job, analysis: Analysis, float_bits: int) -> SearchSpace:
    """The search space of a job."""
    space = job.space
    weight = (0.0, 0.0) if job.teacher is None else space.distillation_weight
    options = Options(
        prune=space.prune,
        max_ratio=space.max_ratio,
        importance=tuple(space.importance),
        temperature=(space.temperature[0],) * 2 if job.teacher is None else space.temperature,
        distillation_weight=weight,
        learning_rate=space.learning_rate,
        multiples={width: scheme.least_block for width, scheme in _schemes(job).items() if scheme.block},
    )
    return make_space(analysis, layer_widths(job, analysis, float_bits), options)


def _capabilities(job: Job) -> Capabilities:
    return _of_target(job.target)


def _schemes(job: Job) -> Schemes:
    """How quantized layers must be quantized to run on every target."""
    return reduce(merge, (_of_target(target).schemes for target in (job.target, *job.targets[1:])))


def _of_target(target: TargetSection) -> Capabilities:
    return get_runtime(target.runtime, target.options).capabilities(target.device)
