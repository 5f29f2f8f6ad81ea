"""The trials of a study, played by the test in an executor's place: who is stopped, and what is told of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paretune.objectives.device import Device
from paretune.objectives.measurement import Record
from paretune.objectives.progress import Stopped
from paretune.search.executor import Outcome, Progress, Work
from paretune.search.front_json import read_front
from paretune.search.job import Job
from paretune.search.requests import Evaluate
from paretune.search.study import SearchStudy
from paretune.search.trials import Trials
from tests.records import measurement, record, stopped
from tests.search.conftest import TinyJob
from tests.search.test_results import SPACE, new_study

HOPELESS = stopped(0.2, 0.3)


@dataclass
class Played:
    """Plays a trial for each request: its result, and what it shows on the way. Heeds a stop only if it `listens`.

    Attributes:
        stops: Numbers of trials that were asked to end, and how often.
        requests: What was to be run.
    """

    trials: Sequence[Record | Stopped]
    listens: bool = True
    stops: Counter[int] = field(default_factory=Counter)
    requests: list[Evaluate] = field(default_factory=list)

    def play(self, work: Work) -> None:
        for trial in self.trials:
            given = work.next()
            assert given is not None
            self.requests.append(given.request)
            work.ended(Outcome(given.number, self._shown(work, given.number, trial)))
        assert work.is_over
        assert work.next() is None

    def _shown(self, work: Work, number: int, trial: Record | Stopped) -> Record | Stopped:
        outline = trial.outline if isinstance(trial, Stopped) else trial.measurement.to_dict()
        for count in range(len(trial.rungs) + 1):
            if work.progress(Progress(number, outline, trial.rungs[:count])):
                self.stops[number] += 1
                if self.listens:
                    return trial
        return record(measurement(0.5, 3.0)) if isinstance(trial, Stopped) else trial


def finished(count: int) -> list[Record]:
    """Trials of 2 ms whose accuracies lie 0.1 and 0.05 above their rungs."""
    finals = np.linspace(0.2, 0.9, count).tolist()
    return [record(measurement(final, 2.0), rungs=stopped(final - 0.1, final - 0.05).rungs) for final in finals]


@dataclass
class Run:
    """What came of the trials that were played."""

    folder: Path
    study: SearchStudy
    executor: Played
    lines: list[str]

    @property
    def states(self) -> list[str]:
        return [row.trial.state.name for row in self.study.rows()]


def play(tiny: TinyJob, tmp_path: Path, trials: Sequence[Record | Stopped], **more: Any) -> Run:
    folder = tmp_path / "small"
    search = {"trials": len(trials)} | more.pop("search", {})
    job: Job = tiny(tmp_path, search=search)
    study = new_study(folder, bound=more.pop("bound", ""))
    for _ in range(len(trials) - 1):
        study.enqueue(SPACE.sweep(1), "uniform")
    study.enqueue(SPACE.sweep(1), more.pop("source", "uniform"))
    executor, lines = Played(trials, **more), list[str]()
    work = Trials(job, folder, study, "accuracy", Device("cpu"), lines.append)
    executor.play(work)
    assert work.begun == len(trials)
    return Run(folder, study, executor, lines)


def test_a_hopeless_trial_is_stopped(tiny: TinyJob, tmp_path: Path) -> None:
    played = play(tiny, tmp_path, [*finished(7), HOPELESS])
    assert played.executor.stops == {7: 1}, "once, at the first rung that says so"
    assert played.states == ["COMPLETE"] * 7 + ["PRUNED"]
    assert (
        played.lines[-1] == "trial 7 (uniform): stopped at 50 %: accuracy 0.3000, at 3 ms the front has 0.9000, 0.5 s"
    )
    row = played.study.rows()[7]
    assert row.stopped == HOPELESS
    assert row.expected is not None
    assert row.expected[0] == pytest.approx(0.35, abs=0.05)
    trial = played.folder / "trials" / "7"
    assert {path.name for path in trial.iterdir()} == {"plan.json", "record.json"}
    found = json.loads((trial / "record.json").read_text())
    assert (found["stopped"], found["steps"]) == ("at 3 ms the front has 0.9000", 12)
    assert found["rungs"] == [
        {"share": 0.25, "accuracy": 0.2, "samples": 100},
        {"share": 0.5, "accuracy": 0.3, "samples": 100},
    ]
    assert found["expected_accuracy"] == list(row.expected)
    assert [point["trial"] for point in read_front(played.folder)["points"]] == [6]
    request = played.executor.requests[7]
    assert isinstance(request, Evaluate)
    assert (list(request.rungs), request.resume) == ([0.25, 0.5], None)


@pytest.mark.parametrize("source", ["dense", "variant", "enqueued"])
def test_what_the_user_asked_for_is_trained_to_its_end(tiny: TinyJob, tmp_path: Path, source: str) -> None:
    played = play(tiny, tmp_path, [*finished(7), HOPELESS], source=source)
    assert (played.executor.stops, played.states[-1]) == ({}, "COMPLETE")


def test_none_stops_nothing(tiny: TinyJob, tmp_path: Path) -> None:
    played = play(tiny, tmp_path, [*finished(7), HOPELESS], search={"stopping": "none", "rungs": [0.5]})
    assert (played.executor.stops, played.states[-1]) == ({}, "COMPLETE")
    assert all(isinstance(request, Evaluate) and request.rungs == [0.5] for request in played.executor.requests)


def test_a_trial_that_completes_all_the_same_is_complete(tiny: TinyJob, tmp_path: Path) -> None:
    played = play(tiny, tmp_path, [*finished(7), HOPELESS], listens=False)
    assert (played.executor.stops, played.states[-1]) == ({7: 1}, "COMPLETE")
    assert "accuracy 0.5000, 3.000 ms" in played.lines[-1]


def test_a_broken_bound_ends_a_trial_before_its_training(tiny: TinyJob, tmp_path: Path) -> None:
    found = [record(measurement(0.9, 2.0)), stopped(latency=3.0)]
    played = play(tiny, tmp_path, found, bound="latency_ms <= 2.5")
    assert (
        played.lines[-1] == "trial 1 (uniform): stopped before the first rung, latency_ms <= 2.5 is broken (3), 0.5 s"
    )
    assert played.study.rows()[1].expected is None


def test_a_search_that_goes_on_knows_what_it_knew(tiny: TinyJob, tmp_path: Path) -> None:
    played = play(tiny, tmp_path, finished(7))
    played.study.enqueue(SPACE.sweep(1), "uniform")
    executor, lines = Played([HOPELESS]), list[str]()
    job: Job = tiny(tmp_path, search={"trials": 8})

    def trials() -> Trials:
        return Trials(job, played.folder, played.study, "accuracy", Device("cpu"), lines.append)

    executor.play(trials())
    assert executor.stops == {7: 1}
    assert trials().is_over, "a stopped one counts"
