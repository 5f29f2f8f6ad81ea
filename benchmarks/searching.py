"""One search of benchmarks/search.py, from its settings to its results: on the synthetic problem or on real data.

A real search goes the ordinary way, `paretune.search.run.run`, in a process of its own.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import optuna
from curves import OBJECTIVES, front, seen
from optuna.trial import TrialState
from reporting import progress
from synthetic import CLOCK_NOISE, Kind, Synthetic

from paretune.errors import ParetuneError
from paretune.objectives.artifact import Card
from paretune.objectives.problem import Problem
from paretune.objectives.scoring import artifact_outputs
from paretune.search.demo import demo_job
from paretune.search.job import Job, load_job
from paretune.search.job_types import direction
from paretune.search.problem import BASELINE, load_problem
from paretune.search.run import resume, run
from paretune.search.samplers import SAMPLERS
from paretune.search.storage import TrialStorage
from paretune.search.study import SearchStudy, TrialRow, open_storage, stored_rows
from paretune.search.surrogate.sampler import FrontSampler
from paretune.spaces.plan import CompressionPlan

SEEDED = "tpe after 12 uniform"
_UNIFORM = 12
_FASHION = Path(__file__).parent.parent / "examples" / "fashion_resnet.yaml"
_OVERRIDES = {
    "digits": [],
    # Trials of a few seconds, so that a search of 60 takes minutes: 10 % of an epoch, scored on 2,000 images.
    "fashion": ["finetune.epochs=0.1", "data.args.validation=2000"],
}
DATA = tuple(_OVERRIDES)


@dataclass(frozen=True)
class Case:
    """What tells one search from the others.

    Attributes:
        benchmark: What it belongs to: synthetic, asking, real, stopping or joint.
        data: The kind of synthetic problem; memory or sqlite; or the real data.
        label: What is compared, e.g. the sampler.
        seed: Of the sampler and the trainings.
        overrides: What it changes in the job.
        seconds: Of trial work that it may spend; None is no limit.
        trials: That it may begin; None is no limit.
        workers: At a time.
    """

    benchmark: str
    data: str
    label: str
    seed: int
    overrides: tuple[str, ...] = ()
    seconds: float | None = None
    trials: int | None = None
    workers: int = 2

    @property
    def key(self) -> dict[str, Any]:
        """As JSON gives it back, by which its line of results is known again."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found

    @property
    def name(self) -> str:
        """Of its run folder."""
        budget = f"{self.seconds:g}s" if self.seconds else f"{self.trials}t"
        return f"{self.benchmark}-{self.data}-{self.label.replace(' ', '-')}-{budget}-{self.seed}"


def synthetic_sampler(name: str, problem: Synthetic, seed: int, outlined: list[float]) -> optuna.samplers.BaseSampler:
    """A sampler by name; `outlined` gets the seconds of each plan that it deploys untrained."""

    def measure(plan: CompressionPlan) -> dict[str, float]:
        outlined.append(problem.outline_seconds)
        return problem.outline(plan)

    if name == "front":
        return FrontSampler(problem.space, problem.knowledge, objectives=OBJECTIVES, measure=measure, seed=seed)
    return SAMPLERS["tpe" if name == SEEDED else name](problem.space, seed)


def search_synthetic(name: str, kind: Kind, seed: int, count: int) -> dict[str, Any]:
    """A plain Optuna study on the synthetic problem of this seed, one trial at a time."""
    problem, noise = Synthetic(kind, seed=seed), np.random.default_rng(seed)
    outlined: list[float] = []
    sampler = synthetic_sampler(name, problem, seed, outlined)
    study = optuna.create_study(directions=list(map(direction, OBJECTIVES)), sampler=sampler)
    if name == SEEDED:
        for index in range(_UNIFORM):
            study.enqueue_trial(problem.space.to_params(problem.space.sweep(index)))
    dense_ms, trials = problem.dense["latency_ms"], []
    for _ in range(count):
        start = time.perf_counter()
        trial = study.ask(problem.space.distributions())
        asking = time.perf_counter() - start + sum(outlined)
        outlined.clear()
        plan = problem.space.to_plan(trial.params)
        true_ms, accuracy = problem.true_outline(plan)["latency_ms"], problem.accuracy(plan, noise)
        latency = true_ms * float(np.exp(CLOCK_NOISE * noise.standard_normal()))  # read anew after the training
        start = time.perf_counter()
        study.tell(trial, [latency, accuracy])
        trials.append(
            {
                "work": problem.seconds(plan),
                "sampler": asking + time.perf_counter() - start,
                "latency": latency / dense_ms,
                "accuracy": accuracy,
                "true_latency": true_ms / dense_ms,
                "true": problem.true_accuracy(plan),
            }
        )
    return {
        "dense": {"accuracy": problem.dense["accuracy"]},
        "attainable": problem.attainable / dense_ms,
        "profile_seconds": problem.profile_seconds if name == "front" else 0.0,
        "trials": trials,
    }


def time_asking(name: str, storage: str, count: int, *, layers: int = 29, most: int = 20) -> dict[str, Any]:
    """Milliseconds of asking and telling once there are so many trials, in a space of 61 dimensions.

    The trials before are drawn at random and told at once. The first proposal after them, for which a sampler reads
    all of them anew, isn't counted. Ends after a minute, but not before three proposals.
    """
    problem, draw, outlined = Synthetic("tolerant", seed=0, layers=layers), np.random.default_rng(0), list[float]()
    backend = TrialStorage(open_storage(storage)) if storage else None
    study = optuna.create_study(
        directions=list(map(direction, OBJECTIVES)),
        sampler=synthetic_sampler(name, problem, 0, outlined),
        storage=backend,
    )
    distributions = problem.space.distributions()

    def measured(plan: CompressionPlan) -> list[float]:
        return [problem.outline(plan)["latency_ms"], problem.accuracy(plan, draw)]

    for _ in range(count):
        plan = problem.random_plan(draw)
        params = problem.space.to_params(plan)
        study.add_trial(optuna.create_trial(params=params, distributions=distributions, values=measured(plan)))
    asked, told, start = list[float](), list[float](), time.perf_counter()
    while len(asked) <= most and (len(asked) < 4 or time.perf_counter() - start < 60):
        marks = [time.perf_counter()]
        trial = study.ask(distributions)
        if backend:
            backend.flush()  # as a run's study does
        marks.append(time.perf_counter())
        values = measured(problem.space.to_plan(trial.params))
        marks.append(time.perf_counter())
        study.tell(trial, values)
        marks.append(time.perf_counter())
        asked.append((marks[1] - marks[0]) * 1e3)
        told.append((marks[3] - marks[2]) * 1e3)
    return {"dimensions": len(distributions), "asked": asked[1:], "told": told[1:]}


def make_base(data: str, folder: Path) -> Path:
    """The job that all searches on some data vary, as a file; for digits the dense model is trained first, once."""
    path = folder / f"{data}.yaml"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        job = demo_job(folder, trials=60, report=progress) if data == "digits" else load_job(_FASHION)
        path.write_text(job.to_yaml())
    return path


def search_real(case: Case, base: Path, runs: Path) -> dict[str, Any]:
    """Run a case, or go on with it, and collect what came of it."""
    job = make_case_job(case, base, runs)
    folder, asked = runs / case.name, runs / f"{case.name}.sampler.jsonl"
    with _sampler_timed(asked):
        try:
            if folder.exists():
                resume(folder, report=progress)
            else:
                run(job, report=progress)
        except ParetuneError as error:
            if not (folder / "study.db").exists():
                raise
            progress(f"{case.name}: {error}")  # e.g. nothing feasible: that is a result too
    return _collected(job, folder, asked, case)


def make_case_job(case: Case, base: Path, runs: Path) -> Job:
    """The base job with what all searches share, and with what this case changes."""
    overrides = [
        f"name={case.name}",
        f"results={runs}",
        f"search.seed={case.seed}",
        f"search.workers={case.workers}",
        f"search.trials={case.trials or 'null'}",
        "space.channels=fixed",  # probing takes minutes, is no part of the search, and would differ from run to run
        "verify.points=1",  # the front is scored here, as far as its cost goes
        "verify.rounds=1",
        *_OVERRIDES[case.data],
        *case.overrides,
    ]
    if case.seconds:
        # Workers wait for each other while one measures, so that they work less than the clock says; some more
        # time makes sure that the budget is spent, and what is beyond it isn't counted.
        waiting = 1.25 if case.workers > 1 else 1.0
        overrides.append(f"search.timeout={waiting * case.seconds / case.workers + 20}")
    short = load_job(base, overrides).finetune.epochs  # no longer training of what is verified
    return load_job(base, [*overrides, f"verify.epochs={short}"])


@contextmanager
def _sampler_timed(path: Path) -> Iterator[None]:
    """Append to a file the seconds that each trial's proposing and telling takes."""

    def note(number: int, start: float) -> None:
        with path.open("a") as file:
            file.write(json.dumps([number, time.perf_counter() - start]) + "\n")

    propose = SearchStudy.propose

    def proposing(self: SearchStudy) -> Any:
        start = time.perf_counter()
        proposal = propose(self)
        note(proposal.number, start)
        return proposal

    def telling(tell: Any) -> Any:
        def told(self: SearchStudy, number: int, *args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            found = tell(self, number, *args, **kwargs)
            note(number, start)
            return found

        return told

    names = [name for name in ("complete", "fail", "stop") if hasattr(SearchStudy, name)]
    tells = {name: telling(getattr(SearchStudy, name)) for name in names}
    with patch.multiple(SearchStudy, propose=proposing, **tells):
        yield


def _collected(job: Job, folder: Path, asked: Path, case: Case) -> dict[str, Any]:
    """A run's line of results."""
    problem = load_problem(job)
    dense = Card.read(folder / BASELINE).metrics["validation"]
    sampler: dict[int, float] = {}
    for number, seconds in map(json.loads, asked.read_text().splitlines()):
        sampler[number] = sampler.get(number, 0.0) + seconds
    rows = [row for row in stored_rows(job, folder) if row.trial.state.is_finished() and not _is_lost(row)]
    rows.sort(key=_ended)
    knowledge = folder / "knowledge.json"
    profile = json.loads(knowledge.read_text())["seconds"] if knowledge.is_file() else {}
    line: dict[str, Any] = {
        "dense": {"accuracy": dense["accuracy"], "test": _test_accuracy(problem, folder / BASELINE)},
        "profile_seconds": sum(profile.values()),
        "trials": [_trial(row, sampler[row.number], dense["latency_ms"]) for row in rows],
    }
    for trial in front(seen(line, case.seconds or float("inf"))):
        trial["test"] = _test_accuracy(problem, folder / "trials" / str(trial["number"]) / "artifact")  # type: ignore[index]
    return line


def _is_lost(row: TrialRow) -> bool:
    """Whether it was running when the search was killed: it is begun anew, and how long it ran nobody knows."""
    return row.trial.state == TrialState.FAIL and "error" not in row.trial.user_attrs


def _ended(row: TrialRow) -> datetime:
    assert row.trial.datetime_complete is not None
    return row.trial.datetime_complete


def _trial(row: TrialRow, sampler: float, dense_ms: float) -> dict[str, Any]:
    """What a trial cost and found; no accuracy where it failed or was stopped."""
    found: dict[str, Any] = {"number": row.number, "state": row.trial.state.name, "source": row.source}
    phases = _phases(row)
    # What failed left no record: it counts with its whole time.
    work = sum(phases.values()) if phases else max(0.0, (row.seconds or 0.0) - sampler)
    found |= {"sampler": sampler, "work": work, "phases": phases}
    if row.record and row.feasible:
        main = row.measurement.main
        found |= {"latency": main.latency_ms / dense_ms, "accuracy": main.accuracy}
    return found


def _phases(row: TrialRow) -> Mapping[str, float]:
    ended = row.record or row.stopped
    return ended.seconds if ended else {}


def _test_accuracy(problem: Problem, artifact: Path) -> float:
    """Of an artifact on the test split, in its runtime."""
    deployed = Card.read(artifact).main
    path = artifact / deployed.model
    return problem.task.metric(*artifact_outputs(deployed.runtime(), path, deployed.options(), problem.splits.test))
