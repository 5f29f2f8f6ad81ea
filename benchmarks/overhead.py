"""What a trial costs beside its training, and what the search adds to it.

    python benchmarks/overhead.py

Prints two tables: the seconds of each phase of a trial of the Fashion-MNIST ResNet-20 (random weights, two training
steps: neither changes the cost of the other phases), and the milliseconds that proposing, telling and writing the front
take, over the trials of a search in its space with made-up measurements. Medians and ranges; run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file

from paretune.objectives.baseline import make_baseline
from paretune.objectives.evaluate import Evaluator
from paretune.objectives.imports import import_string
from paretune.objectives.latency import Latency
from paretune.objectives.measurement import Deployment, Measurement, OnTarget, Record
from paretune.search.job import load_job
from paretune.search.problem import BASELINE, load_problem
from paretune.search.profile import make_job_space, profile_job
from paretune.search.results import write_front
from paretune.search.run import open_study
from paretune.spaces.space import SearchSpace

JOB = Path(__file__).parent.parent / "examples" / "fashion_resnet.yaml"
OUTSIDE = ("compress", "deploy", "measure", "score", "save")


def main() -> None:
    """Run both parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plans", type=int, default=10, help="random plans to evaluate")
    parser.add_argument("--trials", type=int, default=64, help="trials of the made-up search")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        run = Path(folder)
        weights = run / "random.safetensors"
        job = load_job(JOB, ["model.weights=null", "finetune.epochs=0.005"])
        job.add_python_path()
        save_file(import_string(str(job.model.factory), where="model.factory")().state_dict(), weights)
        job = load_job(JOB, [f"model.weights={weights}", "finetune.epochs=0.005"])
        problem = load_problem(job)
        analysis = problem.analyse()
        baseline = make_baseline(problem, analysis, run / BASELINE)
        profile = profile_job(job, problem, baseline, analysis)
        space = make_job_space(job, problem, profile, baseline.float_bits[""])
        evaluator = Evaluator(problem, baseline)
        _trials(evaluator, space, run, options.plans)
        study = open_study(job, run, space)
        spent: dict[str, list[float]] = {"propose": [], "tell": [], "front": []}
        rng = random.Random(0)
        for _ in range(options.trials):
            marks = [time.perf_counter()]
            proposal = study.propose()
            marks.append(time.perf_counter())
            study.complete(proposal.number, _made_up(rng, [layer.name for layer in analysis.layers]))
            marks.append(time.perf_counter())
            write_front(run, study, "accuracy")
            marks.append(time.perf_counter())
            for name, start, end in zip(spent, marks, marks[1:], strict=False):
                spent[name].append((end - start) * 1e3)
    totals = [sum(parts) for parts in zip(*spent.values(), strict=True)]
    print(f"\nsearch, {options.trials} trials, {len(space.distributions())} parameters, sampler {job.search.sampler}")
    for name, values in [*spent.items(), ("all", totals)]:
        print(f"  {name:8} {statistics.median(values):7.1f} ms a trial ({min(values):.1f} to {max(values):.1f})")


def _trials(evaluator: Evaluator, space: SearchSpace, run: Path, count: int) -> None:
    rng = random.Random(0)
    plans = [space.sweep(0)]
    for _ in range(count):
        ratios = {f"prune/{group}": rng.uniform(0, 0.75) for group in space.grids}
        bits = {f"bits/{layer}": rng.choice(list(widths)) for layer, widths in space.widths.items()}
        plans.append(space.to_plan(ratios | bits))
    evaluator.evaluate(plans[-1], run / "warm-up", seed=0)
    records = [evaluator.evaluate(plan, run / str(i), seed=0) for i, plan in enumerate(plans)]
    print(f"trial, ResNet-20, batch 8, 1 thread, {len(plans)} plans: the dense one and random ones")
    for name in OUTSIDE:
        _row(name, [record.seconds[name] for record in records])
    _row("all", [sum(record.seconds[name] for name in OUTSIDE) for record in records])
    ratios = [record.main.early_latency_ms / record.measurement.main.latency_ms for record in records]
    print(
        f"  latency before training / after: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    )
    sizes = sum(record.main.early_size_bytes == record.measurement.main.size_bytes for record in records)
    print(f"  same size before training and after: {sizes} of {len(records)}")
    print(f"  noisy measurements: {sum(record.noisy for record in records)} of {len(records)}", file=sys.stdout)


def _row(name: str, values: list[float]) -> None:
    print(f"  {name:8} {statistics.median(values):7.2f} s ({min(values):.2f} to {max(values):.2f})")


def _made_up(rng: random.Random, layers: list[str]) -> Record:
    latency = rng.uniform(1, 10)
    clock = Latency(latency, latency * 0.99, latency * 1.01, latency, 10.0, 10 / latency, 1.0, 10.0, 100, latency)
    on = OnTarget(rng.random(), latency, latency * 0.99, latency * 1.01, 10 / latency, 10**6)
    deployment = Deployment(latency, 10**6, dict.fromkeys(layers, 8), clock)
    return Record(Measurement({"": on}, 10**6, 10**6), {"": deployment}, {"train": 10.0})


if __name__ == "__main__":
    main()
