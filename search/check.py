"""What a job will meet, before anything is spent: the model's groups, the space, and what the search will cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from paretune.objectives.artifact import WEIGHTS
from paretune.objectives.baseline import Baseline, make_baseline
from paretune.objectives.finetune import Training, fit
from paretune.objectives.problem import Problem
from paretune.objectives.staircase import Staircase
from paretune.search.job import Job
from paretune.search.local import cores
from paretune.search.problem import float_widths, load_problem
from paretune.search.profile import make_job_space, profile_job
from paretune.search.slack import Slack, find_slack
from paretune.search.techniques import Tried
from paretune.spaces.analysis import Analysis
from paretune.spaces.plan import Finetuning
from paretune.spaces.space import SearchSpace

_QUANTIZED_COST = 1.5
"""A training step through quantizers took 1.5 times as long as one without, on a ResNet-20."""


@dataclass(frozen=True)
class Estimate:
    """What the search will cost, roughly: the dense model was timed, and pruned ones train faster.

    Attributes:
        trial_seconds: One trial.
        seconds: All trials of the budget, by all workers; without the verification.
        trial_bytes: Disk for one trial's artifact.
        bytes: Disk for all of them.
    """

    trial_seconds: float
    seconds: float
    trial_bytes: int
    bytes: int


@dataclass(frozen=True)
class Check:
    """What `paretune check` prints."""

    analysis: Analysis
    space: SearchSpace
    baseline: dict[str, Any]
    estimate: Estimate
    techniques: tuple[Tried, ...]
    staircases: Mapping[str, Staircase] = field(default_factory=dict)
    slack: Slack | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return {
            "analysis": self.analysis.to_dict(),
            "space": {name: str(value) for name, value in self.space.distributions().items()},
            "baseline": self.baseline,
            "estimate": self.estimate.__dict__,
            "techniques": [one.to_dict() for one in self.techniques],
            "staircases": {kind: staircase.to_dict() for kind, staircase in self.staircases.items()},
            **(self.slack.to_dict() if self.slack else {}),
        }


def check(
    job: Job,
    *,
    deep: bool = False,
    fresh: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Check:
    """Analyse a job's model, measure the dense baseline, and time a few training steps.

    Args:
        job: The job.
        deep: Also show at which channel counts the target gets faster, and where the model has slack.
        fresh: Measure channel counts even where this machine remembers it.
        report: Takes a line for the user.

    Raises:
        JobError: Something is wrong with the job.
    """
    problem = load_problem(job)
    floats = float_widths(job, problem)
    analysis = problem.analyse()
    with TemporaryDirectory(prefix="paretune-check-") as folder:
        baseline, seconds = _timed(
            lambda: make_baseline(problem, analysis, Path(folder) / "baseline", float_bits=floats)
        )
        profile = profile_job(job, problem, baseline, analysis, staircase=deep, fresh=fresh, report=report)
        estimate = _estimate(job, problem, baseline, seconds / len(floats))
        float_bits = baseline.float_bits[""]
        space = make_job_space(job, problem, profile, float_bits)
        found = Check(profile.analysis, space, baseline.to_dict(), estimate, profile.tried)
    if not deep:
        return found
    return replace(
        found, staircases=profile.staircases, slack=find_slack(problem, profile.analysis, space, report=report)
    )


def _estimate(job: Job, problem: Problem, baseline: Baseline, deploy_seconds: float) -> Estimate:
    workers = min(job.search.workers, cores())
    training = Training(problem.splits, problem.task, replace(problem.training, compile=False))
    total = training.steps(problem.training.epochs)
    batches = training.batches(seed=0)
    model = problem.model.build()
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, cores() // job.search.workers))
    try:
        with problem.device().shared():
            fit(model, training, Finetuning(), batches, range(2), total)  # the first steps also choose kernels
            _, seconds = _timed(lambda: fit(model, training, Finetuning(), batches, range(2, 5), total))
    finally:
        torch.set_num_threads(threads)
    share = problem.training.quantized_share if job.space.quantize else 0.0
    trial = total * seconds / 3 * (1 + share * (_QUANTIZED_COST - 1)) + deploy_seconds
    # A trial's artifact has a checkpoint beside it, about as large as its weights.
    size = sum(path.stat().st_size for path in baseline.folder.iterdir()) + (baseline.folder / WEIGHTS).stat().st_size
    trials = job.search.trials or round(workers * (job.search.timeout or 0) / trial)
    return Estimate(trial, trials * trial / workers, size, trials * size)


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start
