"""Does the artifact compute what was trained?

    python benchmarks/agreement.py RUN

For the dense artifact and each point of a finished run's front (of classifiers): the accuracy of the PyTorch module
(floats and fake quantization) and of the artifact in its runtime on the test split, and the share of samples for which
both predict the same class. Exits with 1 where they don't agree.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from paretune.objectives.artifact import MODEL, Card, load_module
from paretune.objectives.data import call
from paretune.objectives.problem import Problem
from paretune.objectives.runtimes import LoadOptions, get_runtime
from paretune.objectives.scoring import artifact_outputs
from paretune.search.front_json import read_front
from paretune.search.job import load_job
from paretune.search.problem import BASELINE, load_problem


def main() -> None:
    """Print a line for each artifact."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run folder")
    run = parser.parse_args().run
    problem = load_problem(load_job(run))
    print(f"{'artifact':24} {'module':>8} {'artifact':>8} {'points':>7} {'same':>8}")
    artifacts = [BASELINE, *(point["artifact"] for point in read_front(run)["points"])]
    good = [compare(problem, run, artifact) for artifact in artifacts]
    print(f"{sum(good)} of {len(good)} within 0.1 point and with at least 99.5 % same predictions")
    sys.exit(0 if all(good) else 1)


def compare(problem: Problem, run: Path, artifact: str) -> bool:
    """Compare one classifier's artifact with its module; whether they agree."""
    folder, split = run / artifact, problem.splits.test
    card = Card.read(folder)
    options = LoadOptions(1, card.target.threads, card.float_bits)
    deployed, targets = artifact_outputs(get_runtime(card.target.runtime), folder / MODEL, options, split)
    module = load_module(folder, problem)
    with torch.no_grad():
        trained = torch.cat([call(module, batch.inputs) for batch in split.batches(250)])
    one, other = (problem.task.metric(outputs, targets) for outputs in (trained, deployed))
    same = (trained.argmax(1) == deployed.argmax(1)).float().mean().item()
    print(f"{artifact:24} {one:8.4f} {other:8.4f} {abs(one - other) * 100:7.2f} {same:8.2%}", flush=True)
    return abs(one - other) <= 0.001 and same >= 0.995


if __name__ == "__main__":
    main()
