"""How many workers can one driver feed, and does a trial cost more after ten thousand others?

    python benchmarks/scale.py run --workers 8 --trials 1000
    python benchmarks/scale.py run --workers 512 --trials 10000         (some 15 minutes)
    python benchmarks/scale.py run --workers 64 --trials 1000 --sampler tpe
    python benchmarks/scale.py tables

Hundreds of workers fit on no small machine, so they are simulated: they sleep, in virtual time, while all that a driver
does is done for real: the study on SQLite, the sampler, the rule of early stopping, the run folder, and the searcher
and the scheduler that Ray Tune calls. Whatever that takes advances the virtual clock, and a driver that is busy
with one worker keeps the others waiting. What Tune and Ray themselves take isn't in it. Values are those of the
synthetic problem of docs/benchmarks.md in 61 dimensions. Each run appends a line to a file of JSON lines.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, TypeVar
from unittest.mock import patch

import numpy as np
import torch
from reporting import machine, progress, table
from synthetic import CLOCK_NOISE, OBJECTIVES, Synthetic

from paretune.objectives.artifact import Card, Deployed, write_card
from paretune.objectives.compress.schemes import STATIC
from paretune.objectives.device import Device
from paretune.objectives.latency import Latency
from paretune.objectives.measurement import Deployment, Measurement, OnTarget, Record
from paretune.objectives.progress import Rung, Stopped
from paretune.objectives.runtimes import Target
from paretune.search.executor import Progress
from paretune.search.job import Job, make_job
from paretune.search.problem import BASELINE
from paretune.search.requests import Evaluate
from paretune.search.samplers import SAMPLERS, Known
from paretune.search.study import SearchStudy, results_of, study_url
from paretune.search.trials import Trials
from paretune.search.tune.events import End, end_to_result, progress_to_result
from paretune.search.tune.scheduler import WorkScheduler
from paretune.search.tune.searcher import WorkSearcher
from paretune.spaces.plan import CompressionPlan

LAYERS = 29
"""Of the synthetic net: 61 dimensions."""

SECONDS, SPREAD = 60.0, 0.25
"""Of a trial that is trained to its end: the median, and the standard deviation of the logarithm."""

DEPLOYED, OUTLINE_SECONDS = 0.05, 0.5
"""Share of a trial before its training; and what it takes where the sampler wants to know a plan's costs."""

RUNGS = (0.25, 0.5)
_MARKS = (100, 1000, 3000, 10000)
_CALL = Latency(1.0, 0.9, 1.1, 0.95, 2.0, 2.0, 1.9, 2.1, 100, 1.2)
T = TypeVar("T")


class Clock:
    """Virtual time, which only the driver's work and the waiting for workers advance.

    Args:
        of_process: Count the processor time of this process, and not what passes: for machines that do other things.
    """

    def __init__(self, *, of_process: bool) -> None:
        self.now = 0.0
        self.busy = 0.0
        self._real = time.process_time if of_process else time.perf_counter

    def doing(self, work: Callable[[], T]) -> tuple[T, float]:
        """Do some of the driver's work; returns what came of it, and the seconds that it took."""
        before, start = self.now, self._real()
        found = work()
        self.now += self._real() - start
        self.busy += self.now - before
        return found, self.now - before

    def wait_until(self, moment: float) -> None:
        """Nothing is to do before that."""
        self.now = max(self.now, moment)


@dataclass
class Figures:
    """What was seen, trial by trial.

    Attributes:
        asked: Seconds of each proposal, in their order.
        told: Of taking what came of each trial.
        judged: Of each look at a trial that goes on.
        driver: All of the driver's seconds up to the end of each trial.
        memory: Megabytes of this process at the end of some trials, by how many ended.
        idle: Seconds in which workers had nothing to do, until the last trial began.
        idle_at_first: The same, before each worker had its first trial.
        last_begun: When the last trial began, in seconds of the virtual clock.
        states: How trials ended.
    """

    asked: list[float] = field(default_factory=list)
    told: list[float] = field(default_factory=list)
    judged: list[float] = field(default_factory=list)
    driver: list[float] = field(default_factory=list)
    memory: dict[int, float] = field(default_factory=dict)
    idle: float = 0.0
    idle_at_first: float = 0.0
    last_begun: float = 0.0
    states: dict[str, int] = field(default_factory=dict)


@dataclass
class Running:
    """A trial on a worker.

    Attributes:
        name: Tune's, of the trial.
        number: The study's.
        plan: What is evaluated.
        seconds: It takes, if nobody ends it.
        shown: What it told so far.
    """

    name: str
    number: int
    plan: CompressionPlan
    seconds: float
    shown: Stopped


class Fleet:
    """Simulated workers, and the real driver that feeds them.

    Args:
        problem: Where the values come from.
        searcher: Of the driver.
        clock: Of both.
        workers: How many.
    """

    def __init__(self, problem: Synthetic, searcher: WorkSearcher, clock: Clock, workers: int) -> None:
        self.figures = Figures()
        self._problem = problem
        self._searcher = searcher
        self._scheduler = WorkScheduler(searcher)
        self._clock = clock
        self._draw = np.random.default_rng(problem.seed)
        self._workers = workers
        self._events: list[tuple[float, int, Running, float]] = []
        self._begun = 0

    def run(self) -> Figures:
        """Until no trial is left."""
        for _ in range(self._workers):
            self._begin(0.0)
        while self._events:
            moment, _, trial, share = heapq.heappop(self._events)
            self._clock.wait_until(moment)
            if share < 1:
                if self._is_unwanted(trial, share):
                    self._end(trial, self._clock.now, self._progress(trial))
            else:
                self._end(trial, moment, end_to_result(trial.number, self._result(trial)))
        return self.figures

    def _begin(self, free_since: float) -> None:
        """Give a worker its next trial, if there is one."""
        name = str(self._begun)
        config, seconds = self._clock.doing(lambda: self._searcher.suggest(name))
        if not isinstance(config, Mapping):
            if self._searcher.error is not None:
                raise self._searcher.error
            return
        self._begun += 1
        figures = self.figures
        figures.asked.append(seconds)
        figures.idle += self._clock.now - free_since
        figures.last_begun = self._clock.now
        if self._begun == self._workers:
            figures.idle_at_first = figures.idle
        request: Evaluate = config["request"].unload()
        slower = self._problem.seconds(request.plan) / self._problem.seconds(self._problem.space.uniform())
        seconds = SECONDS * slower * float(np.exp(SPREAD * self._draw.standard_normal()))
        outline = self._outline(request.plan)
        trial = Running(name, config["number"], request.plan, seconds, Stopped(outline, ()))
        for share in (0.0, *RUNGS, 1.0):
            at = self._clock.now + seconds * (DEPLOYED + (1 - DEPLOYED) * share)
            heapq.heappush(self._events, (at, self._begun, trial, share))

    def _is_unwanted(self, trial: Running, share: float) -> bool:
        """Tell how far a trial is; whether it ends here."""
        if trial.seconds < 0:  # it was ended, and what it would have told wasn't
            return False
        if share:
            accuracy = self._problem.curve(trial.plan, self._draw, share)
            rungs = (*trial.shown.rungs, Rung(share, accuracy, 1000))
            trial.shown = Stopped(trial.shown.outline, rungs, {"train": share * trial.seconds}, int(1000 * share))
        result, known = self._progress(trial), SimpleNamespace(trial_id=trial.name)
        answer, seconds = self._clock.doing(lambda: self._scheduler.on_trial_result(None, known, result))
        self.figures.judged.append(seconds)
        return bool(answer == "STOP")

    def _end(self, trial: Running, moment: float, result: Mapping[str, Any]) -> None:
        """Tell what came of a trial, whose worker is free since then."""
        if trial.seconds < 0:
            return
        trial.seconds = -1.0
        figures = self.figures
        _, seconds = self._clock.doing(lambda: self._searcher.on_trial_complete(trial.name, result))
        figures.told.append(seconds)
        figures.driver.append(self._clock.busy)
        if len(figures.told) % 50 == 0:
            figures.memory[len(figures.told)] = memory()
        if len(figures.told) % 500 == 0:
            progress(f"{len(figures.told)} trials, {self._clock.busy:.0f} s of the driver, {self._clock.now:.0f} s")
        self._begin(moment)

    def _progress(self, trial: Running) -> dict[str, Any]:
        return progress_to_result(Progress.of(trial.number, trial.shown))

    def _outline(self, plan: CompressionPlan) -> dict[str, float]:
        return within(self._problem.outline(plan))

    def _result(self, trial: Running) -> End:
        """The record of a trial that was trained to its end, as its worker makes it."""
        true = self._problem.true_outline(trial.plan)
        latency = true["latency_ms"] * float(np.exp(CLOCK_NOISE * self._draw.standard_normal()))
        values = within(true | {"latency_ms": latency})
        accuracy = self._problem.accuracy(trial.plan, self._draw)
        speedup = self._problem.dense["latency_ms"] / latency
        ends = values["latency_low_ms"], values["latency_high_ms"]
        on = OnTarget(accuracy, latency, *ends, speedup, int(values["size_bytes"]))
        deployment = Deployment(latency, int(values["size_bytes"]), dict(trial.plan.quantize.bits), _CALL)
        phases = dict.fromkeys(("compress", "train", "deploy", "score", "measure", "save"), trial.seconds / 6)
        measured = Measurement({"": on}, int(values["params"]), int(values["macs"]))
        record = Record(measured, {"": deployment}, phases, {"steps": 1000}, trial.shown.rungs)
        return End(record)


def within(values: Mapping[str, float]) -> dict[str, float]:
    """With the ends of a latency's interval."""
    latency = values["latency_ms"]
    return {**values, "latency_low_ms": latency * (1 - CLOCK_NOISE), "latency_high_ms": latency * (1 + CLOCK_NOISE)}


def memory() -> float:
    """Megabytes that this process has in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024


class NoArtifacts:
    """Equipment of workers that make none."""

    def open(self) -> Any:
        raise NotImplementedError("nobody works")

    def carry_out(self, folder: Path) -> Any:
        raise NotImplementedError("there are no artifacts")

    def carry_in(self, parcel: Any, folder: Path) -> None:
        raise NotImplementedError("there are no artifacts")


def simulate(sampler: str, workers: int, trials: int, folder: Path, *, of_process: bool) -> dict[str, Any]:
    """One search, from its first proposal to the end of its last trial."""
    problem, clock = Synthetic("tolerant", seed=0, layers=LAYERS), Clock(of_process=of_process)
    job = make_scale_job(sampler, workers, trials, folder)
    run = folder / job.name
    write_baseline(problem, run / BASELINE)

    def measure(plan: CompressionPlan) -> dict[str, float]:
        clock.now += OUTLINE_SECONDS  # while the driver waits for it
        return problem.outline(plan)

    with at_virtual_time(clock):
        known = Known(OBJECTIVES, (), problem.knowledge, measure, results_of)
        made = SAMPLERS[sampler](problem.space, 0, known)
        study = SearchStudy(job.name, study_url(run), problem.space, made, objectives=OBJECTIVES)
        work = Trials(job, run, study, "accuracy", Device("cpu"), lambda line: None)
        start = memory()
        figures = Fleet(problem, WorkSearcher(work, NoArtifacts()), clock, workers).run()
    rows = study.rows()
    figures.states = {state: sum(row.trial.state.name == state for row in rows) for state in ("COMPLETE", "PRUNED")}
    front = [problem.space.to_plan(row.trial.params) for row in study.front()]
    quality = problem.hypervolume(front) / problem.attainable
    more = {"hypervolume": quality, "memory_at_start": start, "seconds": clock.now, "driver_seconds": clock.busy}
    return asdict(figures) | more | {"database_mb": (run / "study.db").stat().st_size / 1e6}


def make_scale_job(sampler: str, workers: int, trials: int, results: Path) -> Job:
    """A job whose model and data nobody looks at."""
    search = {"sampler": sampler, "trials": trials, "workers": workers, "rungs": list(RUNGS), "stopping": "front"}
    keys = {"name": f"{sampler}-{workers}", "results": str(results), "search": search}
    return make_job(keys | {"model": {"factory": torch.nn.Identity}, "data": {"source": list}})


def write_baseline(problem: Synthetic, folder: Path) -> None:
    """What `front.json` tells of the dense model."""
    folder.mkdir(parents=True)
    dense = within(problem.dense) | {"speedup": 1.0}
    target = Target(runtime="openvino", device="cpu", batch_size=1, threads=1)
    plan = problem.space.uniform()
    write_card(
        folder,
        Card(Deployed(target, "model.onnx", 32, "f32", {}), {}, STATIC, {"validation": dense}, {}, plan.hash, {}),
    )


@contextmanager
def at_virtual_time(clock: Clock) -> Iterator[None]:
    """What limits itself to a share of the time sees the virtual one."""
    with patch("time.monotonic", lambda: clock.now):
        yield


def main() -> None:
    """Run a simulation, or print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "tables"):
        command = commands.add_parser(name)
        command.add_argument("--output", type=Path, default=Path("results/benchmarks/scale.jsonl"), help="JSON lines")
    run = commands.choices["run"]
    run.add_argument("--workers", type=int, default=512)
    run.add_argument("--trials", type=int, default=10000)
    run.add_argument("--sampler", choices=["front", "random", "tpe"], default="front")
    run.add_argument("--processor-time", action="store_true", help="for a machine that does other things, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    output: Path = options.output
    if options.command == "run":
        case = {key: getattr(options, key) for key in ("sampler", "workers", "trials", "processor_time")}
        output.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="paretune-scale-") as made:
            found = simulate(
                options.sampler, options.workers, options.trials, Path(made), of_process=options.processor_time
            )
        line = {"case": case, "machine": machine()} | found
        with output.open("a") as file:
            file.write(json.dumps(line) + "\n")
    print_tables([json.loads(text) for text in output.read_text().splitlines()])


def print_tables(lines: Sequence[Mapping[str, Any]]) -> None:
    """What one needs to know of each run, and how it changes with the number of trials."""
    head = (
        "sampler",
        "workers",
        "trials",
        "idle",
        "idle later",
        "driver busy",
        "tells/s",
        "MB per 1,000",
        "hypervolume",
    )
    table(head, (_whole(line) for line in lines))
    head = ("sampler", "workers", "trials so far", "ms a trial", "ask, median", "95th percentile", "tell", "judge")
    table(head, (row for line in lines for row in _at_marks(line)))


def _whole(line: Mapping[str, Any]) -> list[str]:
    case, trials = line["case"], len(line["told"])
    time_of_all = case["workers"] * line["last_begun"]
    later = (line["idle"] - line["idle_at_first"]) / time_of_all
    counts = np.array([float(count) for count in line["memory"]])
    later_ones = counts >= min(1000, trials / 2)
    growth = math.nan  # unless there is a line to draw
    if later_ones.sum() > 1:
        growth = np.polyfit(counts[later_ones], np.array(list(line["memory"].values()))[later_ones], 1)[0] * 1000
    return [
        case["sampler"],
        str(case["workers"]),
        f"{trials:,}",
        f"{line['idle'] / time_of_all:.2%}",
        f"{later:.2%}",
        f"{line['driver_seconds'] / line['seconds']:.0%}",
        f"{trials / line['driver_seconds']:.1f}",
        f"{growth:.1f}",
        f"{line['hypervolume']:.1%}",
    ]


def _at_marks(line: Mapping[str, Any]) -> Iterator[list[str]]:
    case, trials = line["case"], len(line["told"])
    for mark in _MARKS:
        if mark > trials:
            break
        some = slice(mark - max(50, mark // 10), mark)
        driver = line["driver"][some]
        asked = np.array(line["asked"][some]) * 1e3
        told = 1e3 * statistics.median(line["told"][some])
        looks = len(line["judged"]) / trials
        judged = 1e3 * statistics.median(line["judged"][int(some.start * looks) : int(some.stop * looks)])
        each = 1e3 * (driver[-1] - driver[0]) / (len(driver) - 1)
        figures = (each, *np.percentile(asked, [50, 95]), told, judged)
        yield [case["sampler"], str(case["workers"]), f"{mark:,}", *(f"{value:.1f}" for value in figures)]


if __name__ == "__main__":
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    main()
