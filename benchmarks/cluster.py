"""Does a job find the same on Ray as it does locally, and do two workers halve its time?

    python benchmarks/cluster.py same  --trials 30 --seeds 3     (about 10 minutes on 2 cores)
    python benchmarks/cluster.py speed --trials 12 --rounds 2    (about 10 minutes)

On the digits, with the job of `paretune demo`; the machine must be quiet. `same` compares the hypervolume of the front
that each search measured, `speed` the time of the same trials (a sweep, trained long, so that training is most of each)
with one and with two workers. Seconds are those of the search: from its first proposal, Tune and its workers being
started, to the end of the last trial. What it costs to connect, to measure the baseline and to verify isn't in it. On
Ray each worker trains with one thread; a single local worker takes the threads of all cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from reporting import machine, progress, save, table

from paretune.search.demo import demo_job
from paretune.search.front_json import read_front
from paretune.search.hypervolume import hypervolume, reference_point
from paretune.search.job import Job, load_job
from paretune.search.run import run
from paretune.search.study import open_storage, stored_rows, study_url

_OBJECTIVES = ("latency_ms", "accuracy")


def main() -> None:
    """Run one of the two comparisons, print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["same", "speed"])
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3, help="of `same`")
    parser.add_argument("--rounds", type=int, default=2, help="of `speed`")
    parser.add_argument("--epochs", type=float, default=12.0, help="of each trial in `speed`")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    found: dict[str, Any] = {"machine": machine(), "searches": []}
    with TemporaryDirectory(prefix="paretune-cluster-") as made:
        base = Path(made) / "base.yaml"
        base.write_text(demo_job(Path(made), trials=options.trials, report=progress).to_yaml())
        for changes in _same(options) if options.what == "same" else _speed(options):
            found["searches"].append(changes | _search(base, changes))
            save(options.json, found)
    (_print_same if options.what == "same" else _print_speed)(found["searches"])


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
        for executor in ("local", "ray")
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
        "hypervolume": 1e4 * hypervolume(points, worst),
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
    for executor in ("local", "ray"):
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
