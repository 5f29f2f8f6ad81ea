"""What each compression technique does alone, at three strengths: the tables of docs/techniques.md.

    python examples/fashion_resnet.py        if its weights aren't there
    python benchmarks/techniques.py --output techniques.json

The ResNet-20 of examples/fashion_resnet.yaml on Fashion-MNIST. Each line is one trial of the ordinary way: compress all
layers alike, fine-tune (150 steps as in that job), deploy, measure. Accuracy is of the deployed artifact on the
validation split, before and after the fine-tuning; latency is paired with the baseline, the dense model in its best
float format; size is what is stored. One seed. Takes about 25 minutes on 2 cores; measure on a quiet machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, get_args

import torch
from reporting import machine, progress, save, table
from safetensors.torch import save_file

from paretune.errors import TrialError
from paretune.objectives.baseline import make_baseline
from paretune.objectives.evaluate import Evaluator
from paretune.objectives.imports import import_string
from paretune.search.job import Job, load_job
from paretune.search.problem import BASELINE, load_problem
from paretune.search.profile import make_job_space, profile_job
from paretune.spaces.plan import CompressionPlan, Importance, Method, Schedule
from paretune.spaces.space import SearchSpace

JOB = Path(__file__).parent.parent / "examples" / "fashion_resnet.yaml"
TECHNIQUES = {f"space.{name}": "true" for name in ("prune", "quantize", "factorize", "sparsify", "share")}
PATTERNS = ("2:4", "1:4", "1:8")
WIDTHS = (12, 8, 4)


class Case(NamedTuple):
    """One line of the table."""

    technique: str
    strength: str
    plan: CompressionPlan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="also write everything as JSON")
    parser.add_argument("--epochs", type=float, help="of the fine-tuning; the job's by default")
    parser.add_argument("--only", default="", help="names of techniques, separated by commas")
    options = parser.parse_args()
    torch.set_num_threads(1)
    data: dict[str, Any] = {"machine": machine(), "cases": [], "tried": []}
    with TemporaryDirectory() as made:
        run = Path(made)
        job = _job(run)
        problem = load_problem(job)
        analysis = problem.analyse()
        baseline = make_baseline(problem, analysis, run / BASELINE)
        found = profile_job(job, problem, baseline, analysis, report=progress)
        space = make_job_space(job, problem, found, baseline.float_bits[""])
        data["tried"] = [one.to_dict() for one in found.tried]
        data["baseline"] = baseline.to_dict()
        evaluator = Evaluator(problem, baseline)
        for case in cases(space):
            if options.only and case.technique not in options.only.split(","):
                continue
            data["cases"].append(_evaluate(evaluator, case, run / "trial", options.epochs))
            save(options.output, data)
    _report(data)


def _job(folder: Path) -> Job:
    """The example's job with every technique on, and untrained variants, whose weights go to `folder`."""
    job = load_job(JOB)
    job.add_python_path()
    build = import_string(str(job.model.factory), where="model.factory")
    variants = []
    for width in WIDTHS:
        torch.manual_seed(0)
        weights = folder / f"w{width}.safetensors"
        save_file(build(width=width).state_dict(), weights)
        variants.append(f"w{width}: {{factory: '{job.model.factory}', args: {{width: {width}}}, weights: '{weights}'}}")
    overrides = [f"model.variants={{{', '.join(variants)}}}", "space.channels=fixed", "space.clusters=[64, 16, 4]"]
    return load_job(JOB, overrides + [f"{key}={value}" for key, value in TECHNIQUES.items()])


def cases(space: SearchSpace) -> Iterator[Case]:
    """Every technique alone, on all layers alike."""
    for ratio in (0.25, 0.5, 0.75):
        yield Case("channels, the same ratio", f"{ratio:.0%}", space.uniform(ratio))
    for ratio in (0.25, 0.5, 0.75):
        yield Case("channels, ranked globally", f"{ratio:.0%}", _with(space.uniform(), prune={"ratio": ratio}))
    for shape in ("linear", "cubic", "coarse-fine"):
        schedule = Schedule.parse(f"{shape}:4")
        plan = space.uniform(0.5).model_copy(update={"schedule": schedule})
        yield Case("channels in four cuts", f"50%, {shape}", plan)
    for bits in (8, 4, 2):
        yield Case("quantization, trained", f"{bits} bits", _quantized(space, bits))
    for bits in (8, 4, 2):
        yield Case("quantization, post-training", f"{bits} bits, minmax", _quantized(space, bits, aware=False))
    for observer in ("minmax", "percentile", "mse"):
        plan = _quantized(space, 4, aware=False, observer=observer)
        yield Case("observers, post-training", f"4 bits, {observer}", plan)
    for bits in (8, 4, 2):
        yield Case("weights alone", f"{bits} bits", _quantized(space, bits, activations="float"))
    for method in get_args(Method):
        only = replace(space, options=replace(space.options, methods=(method,)))
        for rank in (0.5, 0.375, 0.25):
            yield Case(f"low rank, {method}", f"{rank:.0%} of the rank", only.uniform(rank=rank))
    for sparsity in (0.5, 0.75, 0.9):
        yield Case("zeros, unstructured", f"{sparsity:.0%}", space.uniform(sparsity=sparsity))
    for pattern in PATTERNS:
        only = replace(space, options=replace(space.options, patterns=(pattern,)))
        yield Case("zeros, N:M", pattern, only.uniform(sparsity=0.9))
    for clusters in (64, 16, 4):
        yield Case("shared weights", f"{clusters} values", space.uniform(clusters=clusters))
    for width in WIDTHS:
        yield Case("lighter architecture", f"{width} of 16 channels, untrained", space.uniform(variant=f"w{width}"))
    for weight in (0.0, 0.5, 1.0):
        yield Case("distillation", f"50% of channels, weight {weight}", _with(
            space.uniform(0.5), finetune={"distillation_weight": weight}
        ))  # fmt: skip
    for rule in get_args(Importance):
        yield Case("importance", f"50% of channels, {rule}", _with(space.uniform(0.5), prune={"importance": rule}))


def _with(plan: CompressionPlan, **sections: dict[str, Any]) -> CompressionPlan:
    """The plan with some settings changed."""
    data = plan.to_dict()
    return CompressionPlan.model_validate(data | {name: data[name] | new for name, new in sections.items()})


def _quantized(space: SearchSpace, bits: int, **settings: Any) -> CompressionPlan:
    """Every layer in so many bits, also in few that are executed as 8."""
    return _with(space.uniform(), quantize={"bits": dict.fromkeys(space.widths, bits), **settings})


def _evaluate(evaluator: Evaluator, case: Case, folder: Path, epochs: float | None) -> dict[str, Any]:
    found: dict[str, Any] = {"technique": case.technique, "strength": case.strength}
    try:
        before = evaluator.evaluate(case.plan, folder, seed=0, epochs=0).measurement.main
        record = evaluator.evaluate(case.plan, folder, seed=0, epochs=epochs)
    except TrialError as error:
        progress(f"{case.technique}, {case.strength}: {error}")
        return found | {"error": str(error)}
    after, clock = record.measurement.main, record.main.clock
    found |= {
        "before": before.accuracy,
        "after": after.accuracy,
        "speedup": after.speedup,
        "speedup_low": clock.speedup_low,
        "speedup_high": clock.speedup_high,
        "size_bytes": after.size_bytes,
        "params": record.measurement.params,
        "executed": sorted(set(record.main.executed.values())),
        "seconds": sum(record.seconds.values()),
        "noisy": record.noisy,
    }
    progress(f"{case.technique}, {case.strength}: {before.accuracy:.4f} to {after.accuracy:.4f}, {after.speedup:.2f}x")
    return found


def _report(data: dict[str, Any]) -> None:
    dense = data["baseline"]["validation"]
    print(f"\nBaseline: {dense['accuracy']:.2%}, {dense['latency_ms']:.2f} ms, {dense['size_bytes']:,} bytes")
    head = ("technique", "strength", "accuracy before", "after", "speed-up [interval]", "size", "runs in, bits")
    table(head, [_row(case, dense["size_bytes"]) for case in data["cases"]])
    print("\nWhat a search finds out for itself (untrained, all layers at once):")
    rows = []
    for one in data["tried"]:
        left = [f"{one['left'][name]:.0%}" if name in one["left"] else "-" for name in ("latency_ms", "size_bytes")]
        rows.append((one["technique"], one["setting"], *left, one["reason"]))
    table(("technique", "setting", "latency left", "size left", "why offered or not"), rows)


def _row(case: dict[str, Any], dense_bytes: int) -> tuple[str, ...]:
    name = (case["technique"], case["strength"])
    if "error" in case:
        return (*name, case["error"], "", "", "", "")
    return (
        *name,
        f"{case['before']:.2%}",
        f"{case['after']:.2%}",
        f"{case['speedup']:.2f} [{case['speedup_low']:.2f}, {case['speedup_high']:.2f}]{' noisy' * case['noisy']}",
        f"{case['size_bytes'] / dense_bytes:.0%}",
        ", ".join(map(str, case["executed"])),
    )


if __name__ == "__main__":
    main()
