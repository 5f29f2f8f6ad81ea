"""How true are the numbers?

    python benchmarks/latency.py [--quick] [--output FILE]

Artifacts of a ResNet-20 (dense; all layers int8; half of the channels pruned) are measured as a run verifies its front
(`paretune.objectives.verify`), each time in a fresh process. Two parts:

repeat: Is a speed-up the same each time? On a quiet machine, and beside a process that hogs a core, or one on every
    core. Wanted: within 3 % of the median of the quiet readings on a quiet machine, within 5 % beside a hog.
clocks: Does another clock say the same? For OpenVINO its own `benchmark_app`, on the same file with the same settings;
    for every runtime `torch.utils.benchmark`, on the bound call (ONNX Runtime's wheel has no such tool of its own).
    Wanted: within 5 %.

The machine must be quiet but for the hogs that this starts; the load average of each reading is in the JSON. Takes
some 20 minutes for each runtime.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from nets import SHAPE, build, images
from reporting import machine, progress, save, table
from torch.utils.benchmark import Timer

from paretune.objectives.artifact import Card, load_session
from paretune.objectives.baseline import make_baseline
from paretune.objectives.bench import DRIFT
from paretune.objectives.data.splits import Split, Splits
from paretune.objectives.evaluate import Evaluator
from paretune.objectives.finetune import TrainOptions
from paretune.objectives.latency import measure_paired
from paretune.objectives.models import ModelSource
from paretune.objectives.problem import Problem
from paretune.objectives.runtimes import Target
from paretune.objectives.tasks import Classification
from paretune.objectives.verify import ROUND, verify
from paretune.spaces.plan import CompressionPlan, Pruning, Quantization

DENSE, CANDIDATES = "dense", ("int8", "pruned")
QUIET, NEAR_QUIET, NEAR_BUSY, NEAR_CLOCK = "quiet", 0.03, 0.05, 0.05

HOGS = {
    "python": "while True: pass",
    "memory": "import numpy as np; a, b = np.ones(1 << 25), np.ones(1 << 25)\nwhile True: np.copyto(a, b)",
    "avx": "import torch; torch.set_num_threads(1); a = torch.randn(512, 512)\nwhile True: a @ a",
}
"""What each hog runs, on one thread: the interpreter, 512 MiB going through the caches, the vector units."""


@dataclass(frozen=True)
class Reading:
    """One artifact, measured in one fresh process.

    Attributes:
        speedup: Paired, median over the rounds.
        latency_ms: As a front has it.
        baseline_ms: Median of the baseline's calls beside it, raw.
        noisy: Whether that is off the baseline's first measurement, by the rule that marks a trial as noisy.
        load: The machine's load average (1 minute) before it.
    """

    speedup: float
    latency_ms: float
    baseline_ms: float
    noisy: bool
    load: float


def main() -> None:
    """Run both parts for each runtime; or, in a process of its own, one reading."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smallest settings: only to see that it works")
    parser.add_argument("--runtimes", default="openvino,onnxruntime", help="of a CPU, separated by commas")
    parser.add_argument("--parts", default="repeat,clocks", help="which of them")
    parser.add_argument("--hogs", default=",".join(HOGS), help=f"some of {', '.join(HOGS)}")
    parser.add_argument("--readings", type=int, default=10, help="fresh processes for each condition")
    parser.add_argument("--rounds", type=int, default=7, help="of a reading: a job's verify.rounds")
    parser.add_argument("--repeats", type=int, default=7, help="turns of ours and theirs")
    parser.add_argument("--seconds", type=float, default=2.0, help="of one turn of another clock")
    parser.add_argument("--batch", type=int, default=8, help="samples a call")
    parser.add_argument("--output", type=Path, help="JSON file for all readings")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    if "--quick" in sys.argv:
        parser.set_defaults(hogs="python", readings=2, rounds=1, repeats=2, seconds=0.2)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.worker:
        _work(options)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else the hogs would outlive this process
    data: dict[str, Any] = {"machine": machine()}
    for runtime in options.runtimes.split(","):
        with TemporaryDirectory(prefix="paretune-benchmark-") as made:
            bench = Bench(runtime, options, Path(made))
            found = data[runtime] = {"formats": bench.formats}
            print(f"\n## {runtime}, ResNet-20, batch {options.batch}, 1 thread\n\nFloat formats: {bench.formats}")
            parts = {"repeat": repeat, "clocks": clocks}
            for name in options.parts.split(","):
                found[name] = parts[name](bench)
                save(options.output, data)


def make_problem(runtime: str, batch: int) -> Problem:
    """The net on noise; equal in every process.

    Targets are the dense model's own predictions where it is surest, so that bf16 changes none of them and the baseline
    is the fastest float format, as it would be for a trained model.
    """
    model, pool = ModelSource(partial(build, "resnet20")), images(512, seed=2)
    with torch.no_grad():
        outputs = model.build()(pool)
    best = outputs.topk(2).values
    sure = (best[:, 0] - best[:, 1]).argsort(descending=True)[:64]
    data = Split(pool[sure], outputs[sure].argmax(1))
    training = TrainOptions(epochs=1, batch_size=32, device="cpu")
    return Problem(model, Splits(data, data, data), Classification(), Target(runtime, "cpu", batch, 1), training)


class Bench:
    """One runtime's artifacts, and how to read them.

    Args:
        runtime: Its name.
        options: Of the command.
        folder: Where the artifacts go.
    """

    def __init__(self, runtime: str, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder, self.runtime = options, folder, runtime
        problem = make_problem(runtime, options.batch)
        self.device = problem.device()
        progress(f"{runtime}: building {DENSE}")
        analysis = problem.analyse()
        baseline = make_baseline(problem, analysis, folder / DENSE)
        self.first_ms = baseline.measurement.main.latency_ms
        evaluator = Evaluator(problem, baseline)
        plans = {
            "int8": CompressionPlan(quantize=Quantization(bits={layer.name: 8 for layer in analysis.layers})),
            "pruned": CompressionPlan(prune=Pruning(ratios={group.name: 0.5 for group in analysis.groups})),
        }
        for name, plan in plans.items():
            progress(f"{runtime}: building {name}")
            evaluator.evaluate(plan, folder / name, seed=0)
        self.formats = {name: Card.read(folder / name).main.float_format for name in (DENSE, *plans)}

    def work(self, *what: str, repeats: int | None = None) -> Any:
        """What a fresh process, given these words, prints as JSON."""
        options = self.options
        repeats = repeats or options.repeats
        command = [sys.executable, __file__, "--batch", str(options.batch), "--rounds", str(options.rounds)]
        command += ["--seconds", str(options.seconds), "--repeats", str(repeats)]
        return json.loads(_run([*command, "--worker", what[0], self.runtime, str(self.folder), *what[1:]]))

    def read(self, *artifacts: str) -> dict[str, Reading]:
        """Measure artifacts together in a fresh process."""
        load = os.getloadavg()[0]
        found = {}
        for name, (speedup, latency_ms) in self.work("verify", *artifacts).items():
            baseline_ms = speedup * latency_ms
            noisy = abs(baseline_ms / self.first_ms - 1) > DRIFT
            found[name] = Reading(speedup, latency_ms, baseline_ms, noisy, load)
        return found


def _work(options: argparse.Namespace) -> None:
    """One reading, in a process that does nothing else; prints JSON."""
    kind, runtime, folder, *names = options.worker
    problem, root = make_problem(runtime, options.batch), Path(folder)
    if kind == "verify":
        verified = verify(problem, root / DENSE, [root / name for name in names], rounds=options.rounds)
        found: Any = {
            name: (reading.validation.main.speedup, reading.validation.main.latency_ms)
            for name, reading in zip(names, verified, strict=True)
        }
    else:
        found = {name: _take_turns(problem, root, name, options) for name in names}
    print(json.dumps(found))


def _take_turns(problem: Problem, root: Path, name: str, options: argparse.Namespace) -> list[list[float]]:
    """[beside, alone, PyTorch's] in milliseconds, turn by turn: medians of one bound call; see `clocks`."""
    batch, clock = problem.batch(options.batch), problem.site.clock
    call, reference = load_session(root / name).bind(batch), load_session(root / DENSE).bind(batch)
    timer, turns = Timer("call()", globals={"call": call}), []
    with problem.device().exclusive():
        for _ in range(options.repeats):
            beside = measure_paired(call, reference, ROUND, clock).median_ms
            alone = measure_paired(call, call, ROUND, clock).median_ms
            turns.append([beside, alone, timer.blocked_autorange(min_run_time=options.seconds).median * 1e3])
    return turns


def _run(command: Sequence[str]) -> str:
    """A command's stdout; raises with its stderr where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


@contextmanager
def hogging(kind: str, count: int) -> Iterator[None]:
    """Run that many hogs beside the block."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    hogs = [subprocess.Popen([sys.executable, "-c", HOGS[kind]], env=environment) for _ in range(count)]
    try:
        yield
        if any(hog.poll() is not None for hog in hogs):
            raise RuntimeError(f"a hog ({kind}) must run until it is stopped, but it ended by itself")
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


def repeat(bench: Bench) -> dict[str, Any]:
    """Part one: readings of each condition, how far each is from the quiet median."""
    options = bench.options
    cores = sorted({1, len(os.sched_getaffinity(0))})
    conditions = [(QUIET, "", 0)]
    conditions += [(f"{kind} x {count}", kind, count) for kind in options.hogs.split(",") if kind for count in cores]
    readings: dict[str, list[dict[str, Reading]]] = {name: [] for name, _, _ in conditions}
    # A reading of each condition in turn, so that a drift over the hour of this run doesn't look like a hog's effect.
    for index in range(options.readings):
        for name, kind, count in conditions:
            progress(f"{bench.runtime}: reading {index + 1} of {options.readings}, {name}")
            with hogging(kind, count):
                readings[name].append(bench.read(*CANDIDATES))
    loads = [reading.load for one in readings[QUIET] for reading in one.values()]
    print(
        f"\n{options.readings} readings a condition, {options.rounds} rounds each. The baseline was first measured at "
        f"{bench.first_ms:.3f} ms. Load average before the quiet readings: {min(loads):.1f} to {max(loads):.1f}."
    )
    head = ("artifact", "beside", "speed-up", "range", "largest deviation", "near", "noisy", "CV", "CV of raw medians")
    table(head, [_row(artifact, name, readings) for artifact in CANDIDATES for name in readings])
    return {
        name: [{artifact: reading.__dict__ for artifact, reading in one.items()} for one in taken]
        for name, taken in readings.items()
    }


def _row(artifact: str, condition: str, readings: dict[str, list[dict[str, Reading]]]) -> list[str]:
    taken = [reading[artifact] for reading in readings[condition]]
    truth = statistics.median(reading[artifact].speedup for reading in readings[QUIET])
    speedups = [reading.speedup for reading in taken]
    off = [speedup / truth - 1 for speedup in speedups]
    limit = NEAR_QUIET if condition == QUIET else NEAR_BUSY
    near = sum(abs(deviation) <= limit for deviation in off)
    return [
        artifact,
        condition,
        f"{statistics.median(speedups):.3f}",
        f"{min(speedups):.3f} to {max(speedups):.3f}",
        f"{max(off, key=abs):+.1%}",
        f"{near} of {len(taken)} within {limit:.0%}",
        f"{sum(reading.noisy for reading in taken)} of {len(taken)}",
        f"{_variation(speedups):.1%}",
        f"{_variation([reading.baseline_ms for reading in taken]):.1%}",
    ]


def _variation(values: Sequence[float]) -> float:
    """Coefficient of variation."""
    return statistics.stdev(values) / statistics.mean(values) if len(values) > 1 else 0.0


def clocks(bench: Bench) -> dict[str, Any]:
    """Part two: ours and another clock's in turn, because raw medians drift; medians of each are compared.

    Ours is taken twice: *beside* the baseline, as candidates are measured, and *alone*, the artifact paired with
    itself, call after call as the other clocks do. The first finds the caches as the baseline left them. Where theirs
    is near to the second but not to the first, the clock is right, and the difference is that of the caches.
    """
    names = (DENSE, *CANDIDATES)
    found: dict[str, dict[str, list[list[float]]]] = {}
    progress(f"{bench.runtime}: torch.utils.benchmark")
    found["torch.utils.benchmark"] = {name: bench.work("turns", name)[name] for name in names}
    if bench.runtime == "openvino":
        turns: dict[str, list[list[float]]] = {name: [] for name in names}
        for index in range(bench.options.repeats):
            progress(f"{bench.runtime}: benchmark_app, turn {index + 1} of {bench.options.repeats}")
            for name in names:
                own = bench.work("turns", name, repeats=1)[name][0][:2]
                with bench.device.exclusive():
                    turns[name].append([*own, benchmark_app(bench.folder / name, seconds=bench.options.seconds)])
        found["benchmark_app"] = turns
    print(f"\n{bench.options.repeats} turns of ours and theirs, medians of each in ms; ranges over the turns.")
    head = (
        "artifact",
        "other clock",
        "ours: beside",
        "alone",
        "theirs",
        "theirs / beside",
        "theirs / alone",
        "speed-ups",
    )
    table(head, [_clock_row(name, clock, turns) for clock, turns in found.items() for name in names])
    return found


def _clock_row(name: str, clock: str, turns: dict[str, list[list[float]]]) -> list[str]:
    columns = list(zip(*turns[name], strict=True))
    medians = [statistics.median(column) for column in columns]
    dense = [statistics.median(column) for column in zip(*turns[DENSE], strict=True)]
    cells = [name, clock, *(f"{median:.3f}" for median in medians)]
    for own in (0, 1):
        ratio = medians[2] / medians[own]
        each = [turn[2] / turn[own] for turn in turns[name]]
        verdict = "within" if abs(ratio - 1) <= NEAR_CLOCK else "not within"
        cells.append(f"{ratio:.3f} ({min(each):.3f} to {max(each):.3f}), {verdict} {NEAR_CLOCK:.0%}")
    return [*cells, ", ".join(f"{top / own:.2f}" for top, own in zip(dense, medians, strict=True))]


def benchmark_app(folder: Path, *, seconds: float) -> float:
    """OpenVINO's own tool on an artifact's file, in a process of its own: its median in milliseconds.

    It compiles with the settings in the artifact's card, the batch fixed, and calls synchronously. Left alone it takes
    the input for an image and compiles a conversion from bytes in, which took as long as the pruned net.
    """
    card = Card.read(folder).main
    settings = {
        key: ("YES" if value else "NO") if isinstance(value, bool) else str(value)
        for key, value in card.settings.items()
    }
    config = folder.with_name(f"{folder.name}-settings.json")
    config.write_text(json.dumps({"CPU": settings}))
    shape = [card.target.batch_size, *SHAPE]
    # The console script stands beside the interpreter; an environment need not be activated.
    command = [str(Path(sys.executable).with_name("benchmark_app")), "-m", str(folder / card.model), "-d", "CPU"]
    command += [
        "-api",
        "sync",
        "-hint",
        "none",
        "-shape",
        str(shape).replace(" ", ""),
        "-load_config",
        str(config),
        "-ip",
        "f32",
    ]
    output = _run([*command, "-t", str(max(1, round(seconds)))])
    median = re.search(r"Median:\s+([\d.]+) (us|ms|s)\b", output)
    if median is None:
        raise RuntimeError(f"benchmark_app must print a median, but got:\n{output}")
    return float(median[1]) * {"us": 1e-3, "ms": 1.0, "s": 1e3}[median[2]]


if __name__ == "__main__":
    main()
