"""What the sampler `front` is given in a run: what is known before the first trial, and a way to measure plans."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from paretune.objectives.baseline import Baseline
from paretune.objectives.evaluate import Evaluator
from paretune.objectives.problem import Problem
from paretune.search.job import Job
from paretune.search.outline import outline
from paretune.search.problem import BASELINE
from paretune.search.profile import Profile
from paretune.search.samplers import Known
from paretune.search.study import results_of
from paretune.search.surrogate.knowledge import Knowledge
from paretune.search.surrogate.learn import learn
from paretune.spaces.plan import CompressionPlan
from paretune.spaces.space import SearchSpace

_OUTLINES = 24
"""Plans that are measured untrained, at most."""

KNOWLEDGE = "knowledge.json"
"""File of a run with what was found out for the sampler before the first trial."""


def prepare(
    job: Job, folder: Path, problem: Problem, profile: Profile, space: SearchSpace, report: Callable[[str], None]
) -> Known:
    """Find out what the job's sampler wants to know, or read what the run found out before.

    Args:
        job: Its sampler may want nothing.
        folder: The run folder.
        problem: What it is about.
        profile: Of the model on the targets.
        space: What the search may choose.
        report: Takes a line for the user.
    """
    objectives, constraints = tuple(job.all_objectives), tuple(job.constraints)
    if job.search.sampler != "front":
        return Known(objectives, constraints)
    baseline = Baseline(folder / BASELINE)
    path = folder / KNOWLEDGE
    if path.is_file():
        knowledge = Knowledge.from_dict(json.loads(path.read_text()))
    else:
        # A short search can't spend as long on finding out as a long one.
        outlines = min(_OUTLINES, 2 * (job.search.trials or _OUTLINES))
        knowledge = learn(job, problem, baseline, profile, space, report, outlines=outlines)
        part = path.with_name(f".{path.name}.part")  # a run that is killed here learns anew
        part.write_text(json.dumps(knowledge.to_dict(), indent=1) + "\n")
        part.replace(path)
    evaluator = Evaluator(problem, baseline)

    def measure(plan: CompressionPlan) -> Mapping[str, float] | None:
        found = outline(evaluator, plan, job.search.seed)
        if isinstance(found, str):
            report(f"a plan can't be deployed, so it isn't proposed: {found}")
            return None
        return found

    return Known(objectives, constraints, knowledge, measure, results_of)
