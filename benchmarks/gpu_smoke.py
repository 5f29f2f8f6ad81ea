"""Does everything that wants a GPU work on this one? Under ten minutes, one table.

    python benchmarks/gpu_smoke.py
    python benchmarks/gpu_smoke.py --device cpu --runtimes openvino     # the same script where there is no GPU

Widths asked for against those executed, latencies with their spread over fresh measurements, training speed, a search
of ten trials, and the tests marked `gpu`. What fails is a row that says so, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import nets
import numpy as np
import torch
from reporting import machine, progress, table

from paretune.errors import JobError
from paretune.objectives.compress import compress_numerics
from paretune.objectives.data import load_splits
from paretune.objectives.finetune import Training, TrainOptions, fit
from paretune.objectives.latency import measure_paired
from paretune.objectives.models import ModelSource
from paretune.objectives.problem import Problem
from paretune.objectives.runtimes import RUNTIMES, Target, get_runtime
from paretune.objectives.tasks import Classification
from paretune.search.demo import demo_job
from paretune.search.front_json import read_front
from paretune.search.run import run
from paretune.spaces.plan import CompressionPlan, Finetuning, Quantization

BATCH = 32
REPEATS = 3
_PRODUCTS = ("Conv2d", "Linear")


class Row(NamedTuple):
    """One check."""

    part: str
    what: str
    result: str
    good: bool


def main() -> int:
    """Run all parts, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--runtimes", help="comma-separated; by default all that have the device")
    parser.add_argument("--nets", default="resnet18,vit")
    parser.add_argument("--no-tests", action="store_true", help="leave pytest -m gpu out")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("there is no GPU that PyTorch can use here; try --device cpu --runtimes openvino", file=sys.stderr)
        return 2
    names = options.runtimes.split(",") if options.runtimes else runtimes_of(options.device)
    rows: list[Row] = []
    for net in options.nets.split(","):
        for name in names:
            rows += attempt("runtime", f"{name}, {net}", lambda name=name, net=net: widths(name, net, options.device))
    rows += attempt("training", options.device, lambda: training(options.device))
    for name in names:
        rows += attempt("search", name, lambda name=name: search(name, options.device))
    if not options.no_tests:
        rows += attempt("tests", "pytest -m gpu", tests)
    for key, value in machine().items():
        if "gpu" in key or key == "cuda":
            print(f"{key}: {value}")
    table(("part", "what", "result", ""), [(*row[:3], "ok" if row.good else "FAILED") for row in rows])
    return 0 if all(row.good for row in rows) else 1


def attempt(part: str, what: str, check: Callable[[], list[Row]]) -> list[Row]:
    """The rows of a check; one that says why if it raises, so that the others are still run."""
    progress(f"{part}: {what}")
    try:
        return check()
    except Exception as error:
        return [Row(part, what, f"{type(error).__name__}: {error}".replace("\n", " ")[:300], False)]


def runtimes_of(device: str) -> list[str]:
    """Runtimes that are installed and have the device."""

    def has_device(name: str) -> bool:
        try:
            get_runtime(name).capabilities(device)
        except JobError as error:
            progress(f"{name} is left out: {error}")
            return False
        return True

    return [name for name in RUNTIMES if has_device(name)]


def problem_of(net: str, runtime: str, device: str) -> Problem:
    """Noise with the net's own predictions as labels: what is checked doesn't depend on the data."""
    inputs = nets.images(2048, seed=2)
    with torch.no_grad():
        labels = torch.cat([nets.build(net)(part).argmax(1) for part in inputs.split(256)])
    parts = [(inputs[i : i + 1024], labels[i : i + 1024]) for i in (0, 1024)]
    splits = load_splits(lambda: (*parts, parts[1]), {})
    options = TrainOptions(device=device if device.startswith("cuda") else "cpu")
    return Problem(ModelSource(nets.build(net)), splits, Classification(), Target(runtime, device, BATCH), options)


def widths(runtime: str, net: str, device: str) -> list[Row]:
    """Each width of a runtime: executed as asked, the same predictions, and its paired latency."""
    problem = problem_of(net, runtime, device)
    site, rows = problem.site, []
    kinds = {name: type(module).__name__ for name, module in problem.model.build().named_modules()}
    batch, calibration = problem.batch(BATCH), list(problem.splits.train.head(256).batches(64))
    reference = None
    with TemporaryDirectory() as made, problem.device().exclusive():
        folder = Path(made)
        asked = {bits: {name: bits for name, kind in kinds.items() if bits in site.capabilities.widths(kind)}
                 for bits in (*site.capabilities.float_bits, *sorted(problem.schemes, reverse=True))}  # fmt: skip
        for bits, layers in asked.items():
            floats = bits if bits > 8 else site.capabilities.float_bits[-1]
            plan = CompressionPlan(quantize=Quantization(bits=layers if bits <= 8 else {}))
            module = compress_numerics(problem.model.build(), plan, problem.context(calibration))
            start = time.perf_counter()
            site.runtime.deploy(module, problem.example, folder / site.model)
            session = site.load(folder, floats)
            seconds = time.perf_counter() - start
            reports = session.layers()
            # A layer that the width isn't offered for stays in floats.
            wanted = {name: layers.get(name, floats) for name, kind in kinds.items() if kind in _PRODUCTS}
            wrong = [name for name, width in wanted.items() if name not in reports or reports[name].bits != width]
            with torch.no_grad():
                expected = module(problem.splits.validation.head(BATCH).inputs).numpy()
            error = float(np.abs(session.run(batch) - expected).mean() / np.ptp(expected))
            call = session.bind(batch)
            reference = reference or session.bind(batch)
            speeds = [measure_paired(call, reference, clock=site.clock) for _ in range(REPEATS)]
            ratios = sorted(latency.speedup for latency in speeds)
            usage = "".join(f", {key} {value:.4g}" for key, value in site.usage(call).items() if value is not None)
            result = (
                f"{speeds[-1].median_ms:.3f} ms ({speeds[-1].clock}), {ratios[REPEATS // 2]:.2f}x the first row "
                f"[{ratios[0]:.2f}, {ratios[-1]:.2f}], mean error {error:.1e} of the range, "
                f"built in {seconds:.1f} s{usage}" + (f"; not executed as asked: {', '.join(wrong)}" if wrong else "")
            )
            rows.append(Row("runtime", f"{runtime}, {net}, {bits} bits", result, not wrong and error <= 0.02))
    return rows


def training(device: str) -> list[Row]:
    """Steps a second of fine-tuning, in each precision."""
    problem = problem_of("resnet18", "openvino", "cpu")
    rows = []
    for precision in ("float32", "bfloat16"):
        options = TrainOptions(device=device, precision=precision, batch_size=128)  # type: ignore[arg-type]
        train = Training(problem.splits, problem.task, replace(options, epochs=1))
        model, batches = problem.model.build(), train.batches(0)
        steps = 200 if device.startswith("cuda") else 3
        fit(model, train, Finetuning(), batches, range(2), steps)  # the first steps also choose kernels
        start = time.perf_counter()
        report = fit(model, train, Finetuning(), batches, range(2, steps), steps)
        rate = (steps - 2) / (time.perf_counter() - start)
        rows.append(Row("training", f"resnet18, {precision}", f"{rate:.1f} steps of 128 a second, {report}", True))
    return rows


def search(runtime: str, device: str) -> list[Row]:
    """Ten trials on the digits, to the verified front."""
    with TemporaryDirectory() as made:
        demo = demo_job(Path(made), trials=10, report=progress).model_dump(exclude={"target", "finetune", "verify"})
        keys = {
            "target": {"runtime": runtime, "device": device, "batch_size": 64},
            "finetune": {"epochs": 1.0, "batch_size": 64, "device": device if device.startswith("cuda") else "cpu"},
            "verify": {"points": 4, "rounds": 3},
        }
        folder = run({**demo, **keys}, report=progress)
        front = read_front(folder)
        best = max(point["test"]["speedup"] for point in front["points"])
        result = f"{len(front['points'])} verified points, up to {best:.2f}x the dense {front['baseline']['format']}"
        return [Row("search", runtime, result, front["verified"])]


def tests() -> list[Row]:
    """The tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    progress(done.stdout)
    last = (done.stdout.strip().splitlines() or ["nothing was said"])[-1]
    return [Row("tests", "pytest -m gpu", last, done.returncode == 0)]


if __name__ == "__main__":
    sys.exit(main())
