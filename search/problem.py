"""From the job to what the objectives work on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from paretune.errors import JobError
from paretune.objectives.accelerator import float_format, training_device
from paretune.objectives.baseline import Baseline
from paretune.objectives.data import load_splits
from paretune.objectives.device import Device
from paretune.objectives.evaluate import Evaluator
from paretune.objectives.finetune import TrainOptions
from paretune.objectives.models import ModelSource
from paretune.objectives.problem import Problem
from paretune.objectives.runtimes import Capabilities, Target
from paretune.objectives.tasks import load_task
from paretune.search.job import Job
from paretune.search.job_sections import ModelSection, TargetSection

BASELINE = "baseline"
"""Folder of the dense artifact in a run."""


def load_problem(job: Job, capabilities: Mapping[str, Capabilities] | None = None) -> Problem:
    """Import, load and check everything that a job names.

    Args:
        job: What is run.
        capabilities: What the targets execute, by name, where they are on another machine.

    Raises:
        JobError: Something of it is wrong.
    """
    job.add_python_path()
    others = {name: _target(section) for name, section in job.other_targets.items()}
    problem = Problem(
        model=_source(job.model, "model"),
        splits=load_splits(job.data.source, job.data.args),
        task=load_task(job.task),
        target=_target(job.target),
        others=others,
        training=TrainOptions(**job.finetune.model_dump()),
        teachers=_teachers(job),
        exclude=tuple(job.space.exclude),
        variants={name: _source(section, f"model.variants.{name}") for name, section in job.model.variants.items()},
        capabilities=capabilities or {},
    )
    for position, site in enumerate(problem.sites.values()):
        with _naming(f"targets[{position}]" if others else "target"):
            _ = site.capabilities
    problem.check()
    return problem


def without_trainer(job: Job) -> Job:
    """The job for a process that doesn't train: the trainers' device and precision need not be on its machine."""
    try:
        float_format(job.finetune.precision, training_device(job.finetune.device))
    except JobError:
        own = job.finetune.model_copy(update={"device": "auto", "precision": "auto"})
        return job.model_copy(update={"finetune": own})
    return job


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


def _teachers(job: Job) -> tuple[ModelSource, ...]:
    """Empty where the dense model teaches alone, or nothing does."""
    if isinstance(job.teacher, ModelSection):
        return (_source(job.teacher, "teacher"),)
    several = job.teacher if isinstance(job.teacher, list) else []
    return tuple(
        _source(job.model if section == "same" else section, f"teacher[{position}]")
        for position, section in enumerate(several)
    )


def load_evaluator(job: Job, run: Path) -> Evaluator:
    """The evaluator of a worker; the run holds the baseline already."""
    with Device(*job.devices).shared():
        problem = load_problem(job)
    return Evaluator(problem, Baseline(run / BASELINE))


def float_widths(job: Job, problem: Problem) -> tuple[int, ...]:
    """Float widths among which the job lets the baseline choose, on its first target.

    Raises:
        JobError: A width that the target's runtime doesn't execute, or two float widths.
    """
    capabilities = problem.site.capabilities
    if job.space.bits == "auto":
        return capabilities.float_bits
    known = set(capabilities.float_bits).union(*capabilities.integer_bits.values())
    if 8 in known or "float" in job.space.activations:
        known |= set(range(2, 9))  # without kernels of their own they are stored, and run, in 8
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
