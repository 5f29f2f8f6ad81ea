"""What a job will meet, before anything is spent: the model's groups, the space, and what the search will cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from paretune.objectives.baseline import Baseline, make_baseline
from paretune.objectives.finetune import Training, fit
from paretune.objectives.problem import Problem
from paretune.objectives.staircase import Staircase, staircases
from paretune.search.job import Job
from paretune.search.local import cores
from paretune.search.problem import float_widths, load_problem, make_job_space, profile_target
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
    staircases: Mapping[str, Staircase] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return {
            "analysis": self.analysis.to_dict(),
            "space": {name: str(value) for name, value in self.space.distributions().items()},
            "baseline": self.baseline,
            "estimate": self.estimate.__dict__,
            "staircases": {kind: staircase.to_dict() for kind, staircase in self.staircases.items()},
        }


def check(job: Job, *, profile_channels: bool = False, fresh: bool = False) -> Check:
    """Analyse a job's model, measure the dense baseline, and time a few training steps.

    Args:
        job: The job.
        profile_channels: Also find out at which channel counts the target gets faster.
        fresh: Measure that even where the cache has it.

    Raises:
        JobError: Something is wrong with the job.
    """
    floats = float_widths(job)
    problem = load_problem(job)
    analysis = problem.analyse()
    with TemporaryDirectory(prefix="paretune-check-") as folder:
        baseline, seconds = _timed(
            lambda: make_baseline(problem, analysis, Path(folder) / "baseline", float_bits=floats)
        )
        analysis = profile_target(job, problem, baseline, analysis)
        estimate = _estimate(job, problem, baseline, seconds / len(floats))
        float_bits = baseline.float_bits[""]
        space = make_job_space(job, analysis, float_bits)
        found = staircases(problem.target, analysis, float_bits, fresh=fresh) if profile_channels else {}
        return Check(analysis, space, baseline.to_dict(), estimate, found)


def print_staircases(found: Mapping[str, Staircase]) -> None:
    """Print latency over channels, a table for each kind of layer; counts that gain nothing are dim."""
    console = Console(soft_wrap=True, highlight=False)
    for kind, staircase in found.items():
        target = staircase.target
        table = Table(title=f"channels of {kind} on {target.runtime}, batch {target.batch_size}; * gets faster")
        table.add_column("channels", justify="right")
        for width in staircase.widths:
            table.add_column(f"{width} bits, ms", justify="right")
        cells = {
            (step.count, step.width): f"{step.latency_ms:.3f} {'*' if step.useful else ' '}" for step in staircase.steps
        }
        for count in sorted({count for count, _ in cells}):
            row = [cells.get((count, width), "-  ") for width in staircase.widths]
            table.add_row(str(count), *row, style="" if count in staircase.counts else "dim")
        console.print(table)


def _estimate(job: Job, problem: Problem, baseline: Baseline, deploy_seconds: float) -> Estimate:
    workers = min(job.search.workers, cores())
    training = Training(problem.splits, problem.task, problem.training)
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
    size = sum(path.stat().st_size for path in baseline.folder.iterdir())
    trials = job.search.trials or round(workers * (job.search.timeout or 0) / trial)
    return Estimate(trial, trials * trial / workers, size, trials * size)


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start
