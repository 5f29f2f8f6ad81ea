"""Does a job find the same on Ray as it does locally, do two workers halve its time, and what does Tune cost?

    python benchmarks/cluster.py overhead --trials 200           (a minute)
    python benchmarks/cluster.py same  --trials 30 --seeds 3     (about 10 minutes on 2 cores)
    python benchmarks/cluster.py speed --trials 16 --rounds 2    (about 20 minutes)

The machine must be quiet. `overhead` runs trials that do nothing through `paretune.search.tune.fit` with two workers,
each with a rung and an artifact of 1 MB. The others search the digits with the job of `paretune demo`. `same` compares
the hypervolume of the front that each search measured, `speed` the time of the same trials (a sweep, trained thirty
times as long as there, so that training is most of each) with one and with two workers. Seconds are those of the
search: from its first proposal, Tune and its workers being started, to the end of the last trial. What it costs to
connect, to measure the baseline and to verify isn't in it. On Ray each worker trains with one thread; a single local
worker takes the threads of all cores.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from reporting import machine, progress, save, table

from paretune.objectives.latency import Latency
from paretune.objectives.measurement import Deployment, Measurement, OnTarget, Record
from paretune.objectives.progress import Rung, Stopped, Watcher
from paretune.search.cluster.parcels import Parcel, pack
from paretune.search.demo import demo_job
from paretune.search.executor import Assignment, Outcome, Progress, Work
from paretune.search.front_json import read_front
from paretune.search.hypervolume import hypervolume, reference_point
from paretune.search.job import Job, load_job
from paretune.search.requests import Evaluate
from paretune.search.run import run
from paretune.search.study import open_storage, stored_rows, study_url
from paretune.search.tune import fit
from paretune.search.tune.equipment import Waiting
from paretune.spaces.plan import CompressionPlan

_OBJECTIVES = ("latency_ms", "accuracy")


def main() -> None:
    """Run one of the comparisons, print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["overhead", "same", "speed"])
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3, help="of `same`")
    parser.add_argument("--rounds", type=int, default=2, help="of `speed`")
    parser.add_argument("--executors", default="local,ray", help="of `speed`")
    parser.add_argument("--epochs", type=float, default=100.0, help="of each trial in `speed`")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    if options.what == "overhead":
        _overhead(options.trials)
        return
    found: dict[str, Any] = {"machine": machine(), "searches": []}
    with TemporaryDirectory(prefix="paretune-cluster-") as made:
        base = Path(made) / "base.yaml"
        base.write_text(demo_job(Path(made), trials=options.trials, report=progress).to_yaml())
        for changes in _same(options) if options.what == "same" else _speed(options):
            found["searches"].append(changes | _search(base, changes))
            save(options.json, found)
    (_print_same if options.what == "same" else _print_speed)(found["searches"])


class Idle:
    """An evaluator whose trials are over at once."""

    def evaluate(self, plan: CompressionPlan, folder: Path, *, watcher: Watcher, **_options: Any) -> Record:
        """Show a rung, leave an artifact."""
        watcher.got_on(Stopped({"latency_ms": 1.0}, (Rung(0.5, 0.9, 100),)))
        folder.mkdir(parents=True)
        (folder / "model").write_bytes(bytes(10**6))
        clock = Latency(1.0, 0.9, 1.1, 0.9, 2.0, 1.0, 0.9, 1.1, 100, 1.0)
        measured = Measurement({"": OnTarget(0.9, 1.0, 0.9, 1.1, 1.0, 10**6)}, 10, 10)
        return Record(measured, {"": Deployment(1.0, 10**6, {}, clock)})


class IdleEquipment:
    """Loads nothing."""

    def open(self, waiting: Waiting) -> Any:
        """Give the evaluator."""
        return Idle()

    def carry_out(self, folder: Path) -> Parcel:
        """Pack."""
        return pack(folder)

    def carry_in(self, parcel: Parcel, folder: Path) -> None:
        """Unpack."""
        parcel.unpack(folder)


class Idling(Work):
    """So many trials; `ended_at` has the moments at which they were told."""

    def __init__(self, folder: Path, trials: int) -> None:
        self._folder = folder
        self._left = list(range(trials))
        self.ended_at: list[float] = []

    def next(self) -> Assignment | None:
        """One more."""
        if not self._left:
            return None
        number = self._left.pop(0)
        return Assignment(number, Evaluate(CompressionPlan(), self._folder / str(number) / "artifact", 0), 60.0)

    @property
    def is_over(self) -> bool:
        """Whether all were begun."""
        return not self._left

    def progress(self, progress: Progress) -> bool:
        """All go on."""
        return False

    def ended(self, outcome: Outcome) -> None:
        """Note when."""
        assert not outcome.error, outcome.error
        self.ended_at.append(time.perf_counter())


def _overhead(trials: int) -> None:
    machine()
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    with TemporaryDirectory(prefix="paretune-cluster-") as made:
        work, start = Idling(Path(made), trials), time.perf_counter()
        fit(work, IdleEquipment(), workers=2, resources={"CPU": 1})
        ended = time.perf_counter()
    ray.shutdown()
    apart = sorted(1e3 * (after - before) for before, after in pairwise(work.ended_at))
    each = (work.ended_at[-1] - work.ended_at[0]) / (trials - 1)
    rows = [[trials, f"{1e3 * each:.0f}", f"{statistics.median(apart):.0f}", f"{apart[int(0.95 * len(apart))]:.0f}"]]
    rows[0] += [f"{work.ended_at[0] - start:.1f}", f"{ended - work.ended_at[-1]:.1f}"]
    table(["trials", "ms a trial", "median", "95th percentile", "s to the first", "s after the last"], rows)


def _same(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Executors take turns, so that a drift of the machine hits both."""
    return [
        {"search.executor": executor, "search.seed": seed, "search.workers": 2, "verify.points": 1, "verify.rounds": 1}
        for seed in range(options.seeds)
        for executor in ("local", "ray")
    ]


def _speed(options: argparse.Namespace) -> list[dict[str, Any]]:
    shared = {"search.sampler": "uniform", "search.stopping": "none", "finetune.epochs": options.epochs}
    shared |= {"verify.points": 1, "verify.rounds": 1, "verify.epochs": options.epochs}
    return [
        shared | {"search.executor": executor, "search.workers": workers}
        for _ in range(options.rounds)
        for executor in options.executors.split(",")
        for workers in (1, 2)
    ]


def _search(base: Path, changes: dict[str, Any]) -> dict[str, Any]:
    name = f"search-{len(list(base.parent.iterdir()))}"
    overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
    job = load_job(base, [f"name={name}", *overrides])
    progress(", ".join(f"{key} {value}" for key, value in changes.items() if key.startswith("search")))
    folder = run(job, report=lambda line: None)
    return _measured(job, folder)


def _measured(job: Job, folder: Path) -> dict[str, Any]:
    """What a search found, with latencies as shares of the baseline's, and what it took."""
    dense = read_front(folder)["baseline"]["validation"]
    rows = stored_rows(job, folder)
    records = [row for row in rows if row.record]
    points = [
        (row.measurement.main.latency_ms / dense["latency_ms"], -row.measurement.main.accuracy) for row in records
    ]
    worst = reference_point({"latency_ms": 1.0, "accuracy": dense["accuracy"]}, _OBJECTIVES)
    storage = open_storage(study_url(folder))
    [study] = storage.get_all_studies()
    phases: dict[str, float] = {}
    for row in records:
        assert row.record is not None
        for phase, seconds in row.record.seconds.items():
            phases[phase] = phases.get(phase, 0.0) + seconds
    knowledge = folder / "knowledge.json"
    learnt = sum(json.loads(knowledge.read_text())["seconds"].values()) if knowledge.is_file() else 0.0
    return {
        "trials": len(rows),
        "hypervolume": 100 * hypervolume(points, worst),
        "seconds": storage.get_study_user_attrs(study._study_id)["spent_seconds"] - learnt,
        "training": phases.get("train", 0.0),
        "work": sum(phases.values()),
    }


def _print_same(searches: list[dict[str, Any]]) -> None:
    rows = []
    for executor in ("local", "ray"):
        of = [search for search in searches if search["search.executor"] == executor]
        volumes = [search["hypervolume"] for search in of]
        each = ", ".join(f"{volume:.2f}" for volume in volumes)
        seconds = statistics.median(search["seconds"] for search in of)
        rows.append([executor, len(of), f"{statistics.median(volumes):.2f}", each, f"{seconds:.0f}"])
    table(["executor", "seeds", "hypervolume, median", "of each seed", "seconds, median"], rows)


def _print_speed(searches: list[dict[str, Any]]) -> None:
    rows = []
    for executor in dict.fromkeys(search["search.executor"] for search in searches):
        seconds = {}
        for workers in (1, 2):
            of = [s for s in searches if (s["search.executor"], s["search.workers"]) == (executor, workers)]
            seconds[workers] = [search["seconds"] for search in of]
            share = statistics.median(search["training"] / search["work"] for search in of)
            each = ", ".join(f"{value:.0f}" for value in seconds[workers])
            rows.append([executor, workers, f"{statistics.median(seconds[workers]):.0f}", each, f"{share:.0%}", ""])
        ratios = [two / one for one, two in zip(seconds[1], seconds[2], strict=True)]
        rows[-1][-1] = f"{statistics.median(ratios):.2f} ({', '.join(f'{ratio:.2f}' for ratio in ratios)})"
    table(["executor", "workers", "seconds, median", "of each round", "training, share of work", "two / one"], rows)


if __name__ == "__main__":
    main()
