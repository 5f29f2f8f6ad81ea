"""Whole runs of Ray Tune on a local Ray: results, early ends, deaths, deadlines, errors; each trial is told once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import ray
from ray import tune

from paretune.errors import SearchError, TrialError
from paretune.objectives.progress import Stopped, Watcher
from paretune.search.executor import Assignment, Outcome, Progress
from paretune.search.tune import PlanTrainable, WorkScheduler, WorkSearcher, fit
from tests.search.tune.trials import OUTLINE, RUNG, Kit, Plan, Script, complete, record, tell, train

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

Run = Callable[..., Script]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs plans to their end; what they are and do is given to `Script`."""

    def run(*plans: Plan, kit: Kit | None = None, workers: int = 1, retries: int = 1, **options: Any) -> Script:
        script = Script(tmp_path, plans, **options)
        start(script, kit, workers=workers, retries=retries)
        return script

    return run


def start(script: Script, kit: Kit | None = None, *, workers: int = 1, retries: int = 1) -> None:
    fit(
        script,
        kit or Kit(),
        workers=workers,
        resources={"CPU": 1, "GPU": 0},
        retries=retries,
    )


def dying(note: Path, times: int) -> Plan:
    """Kills its worker so many times, then completes."""

    def die(folder: Path, watcher: Watcher, resume: Path | None) -> Any:
        tell(watcher, RUNG)
        time.sleep(0.2)  # it is heard
        with note.open("a") as file:
            file.write("x")
        if len(note.read_text()) <= times:
            os._exit(3)
        return complete(folder, watcher, resume)

    return die


def test_trials_complete_in_one_worker_and_their_artifacts_arrive(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    script = run(complete, complete, complete)
    assert script.outcomes == [Outcome(number, record()) for number in range(3)]
    pids = {(script.artifact(number) / "pid").read_text() for number in range(3)}
    assert len(pids) == 1
    assert pids != {str(os.getpid())}
    assert capsys.readouterr().out == "", "data goes there"


def test_several_workers_share_the_trials(run: Run) -> None:
    def wait(folder: Path, watcher: Watcher, resume: Path | None) -> Any:
        time.sleep(0.5)
        return complete(folder, watcher, resume)

    script = run(*[wait] * 6, workers=2)
    assert sorted(outcome.number for outcome in script.outcomes) == list(range(6))
    assert len({(script.artifact(number) / "pid").read_text() for number in range(6)}) == 2


def test_an_unwanted_trial_ends_at_its_rung_and_its_worker_goes_on(run: Run) -> None:
    script = run(complete, train, complete, unwanted=[1])
    assert script.of(1).result == Stopped(OUTLINE, (RUNG,), {"train": 0.5}, 7)
    assert script.of(2).result == record()
    assert not script.artifact(1).exists()
    assert (script.artifact(0) / "pid").read_text() == (script.artifact(2) / "pid").read_text()
    assert script.heard[-1] == Progress(1, OUTLINE, (RUNG,), {"train": 0.5}, 7)


def test_failures_are_told_with_their_reason(run: Run) -> None:
    def nan(folder: Path, watcher: Watcher, resume: Path | None) -> Any:
        return record(accuracy=float("nan"))

    def fail(folder: Path, watcher: Watcher, resume: Path | None) -> Any:
        raise TrialError("the loss isn't finite")

    def crash(folder: Path, watcher: Watcher, resume: Path | None) -> Any:
        raise ValueError("no such layer")

    def nothing(folder: Path, watcher: Watcher, resume: Path | None) -> Any:
        return None

    def lacking(folder: Path, watcher: Watcher, resume: Path | None) -> Any:
        whole = record()
        return replace(whole, measurement=replace(whole.measurement, on={}))

    script = run(nan, fail, crash, nothing, lacking, complete)
    assert script.of(0).error.startswith("all measured values must be finite, but got {'accuracy': nan")
    assert script.of(1).error == "the loss isn't finite"
    assert "Traceback" in script.of(1).details
    assert script.of(2).error == "ValueError: no such layer"
    assert script.of(3).error == "it must give a record, but gave None"
    assert script.of(4).error.startswith("a record must be whole")
    assert script.of(5).result == record()
    assert [outcome.retries for outcome in script.outcomes] == [0] * 6


def test_a_trial_that_loses_its_worker_is_begun_again(run: Run, tmp_path: Path) -> None:
    script = run(complete, dying(tmp_path / "once", 1), complete)
    assert script.of(1) == Outcome(1, record(), retries=1)
    assert [len(progress.rungs) for progress in script.heard] == [1, 1], "its rungs come again"
    assert script.of(2).result == record()


def test_a_trial_that_loses_its_worker_too_often_fails(run: Run, tmp_path: Path) -> None:
    script = run(complete, dying(tmp_path / "always", 9), complete)
    outcome = script.of(1)
    assert outcome.error.startswith("the worker process died (")
    assert "\n" not in outcome.error
    assert outcome.retries == 1
    assert "actor" in outcome.details
    assert len((tmp_path / "always").read_text()) == 2
    assert script.of(2).result == record()


def test_a_trial_over_its_deadline_fails_and_doesnt_keep_its_worker(run: Run, tmp_path: Path) -> None:
    note = tmp_path / "note"

    def hang(folder: Path, watcher: Watcher, resume: Path | None) -> Any:
        note.write_text(str(os.getpid()))
        time.sleep(600)

    script = run(hang, complete, deadline=1.0)
    assert script.of(0) == Outcome(0, error="it overran its deadline of 1 s (search.trial_timeout)")
    assert script.of(1).result == record()
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


def test_an_artifact_is_sent_to_where_its_training_goes_on(run: Run, tmp_path: Path) -> None:
    def go_on(folder: Path, watcher: Watcher, resume: Path | None) -> Any:
        assert resume is not None
        resume.rename(folder)
        return record()

    resumed, storage = tmp_path / "resumed", tmp_path / "storage"
    resumed.mkdir()
    (resumed / "weights").write_bytes(bytes(1_000_000))
    script = run(go_on, go_on, resume=resumed, kit=Kit(str(storage)))
    assert [outcome.error for outcome in script.outcomes] == ["", ""]
    assert (script.artifact(1) / "weights").stat().st_size == 1_000_000
    assert list(storage.iterdir()) == [], "parcels are used up"


def test_workers_that_cannot_load_the_problem_end_the_search(run: Run) -> None:
    def load() -> None:
        raise FileNotFoundError("data.npz")

    with pytest.raises(SearchError, match=r"3 in a row didn't: FileNotFoundError: data.npz \(on "):
        run(complete, complete, kit=Kit(load=load))


@dataclass
class Broken(Script):
    """Breaks at a place of its own."""

    at: str = ""
    since: float = 0.0

    def give_way(self) -> NoReturn:
        self.since = time.monotonic()
        raise OSError("disk full")

    def next(self) -> Assignment | None:
        if self.at == "next":
            self.give_way()
        return super().next()

    def progress(self, progress: Progress) -> bool:
        if self.at == "progress":
            self.give_way()
        return super().progress(progress)

    def ended(self, outcome: Outcome) -> None:
        super().ended(outcome)
        if self.at == "ended":
            self.give_way()


@pytest.mark.parametrize("at", ["next", "progress", "ended"])
def test_an_error_of_the_work_comes_out(at: str, tmp_path: Path) -> None:
    script = Broken(tmp_path, [train, train] if at == "progress" else [complete], at=at)
    with pytest.raises(OSError, match="disk full"):
        start(script)
    assert time.monotonic() - script.since < 9, "Tune waits ten seconds for workers that train"
    assert len(script.outcomes) == (at == "ended")


def test_where_no_node_has_room_it_says_so_and_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(WorkScheduler, "patience", 0.5)
    holder = ray.remote(lambda: time.sleep(4)).options(num_cpus=2).remote()
    script, lines = Script(tmp_path, [complete]), list[str]()
    fit(script, Kit(), workers=1, resources={"CPU": 1}, report=lines.append)
    ray.get(holder)
    assert script.outcomes == [Outcome(0, record())]
    assert len(lines) == 1
    assert "no trial has started for" in lines[0]


def test_ctrl_c_comes_out_and_ends_the_workers(tmp_path: Path) -> None:
    note = tmp_path / "note"

    def stuck(folder: Path, watcher: Watcher, resume: Path | None) -> Any:
        note.write_text(str(os.getpid()))
        time.sleep(600)

    script = Script(tmp_path, [stuck])

    def interrupt() -> None:
        while not (note.exists() and note.read_text()):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)]
    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        start(script)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGUSR1)] == before
    assert script.outcomes == [], "it goes on when the run is resumed"
    pid, end = int(note.read_text()), time.monotonic() + 30
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not Path(f"/proc/{pid}").exists(), Path(f"/proc/{pid}/status").read_text()


def test_the_parts_serve_a_tuner_of_ones_own(tmp_path: Path) -> None:
    class Impatient(PlanTrainable):
        end_seconds = 0.2

    def stubborn(folder: Path, watcher: Watcher, resume: Path | None) -> None:
        tell(watcher, RUNG)
        time.sleep(600)

    script = Script(tmp_path, [complete, stubborn, complete], unwanted=[1])
    searcher = WorkSearcher(script, Kit())
    results = tune.Tuner(
        tune.with_parameters(Impatient, equipment=Kit()),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=WorkScheduler(searcher),
            num_samples=-1,
            max_concurrent_trials=1,
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(storage_path=str(tmp_path / "results"), verbose=0),
    ).fit()
    assert script.of(0).result == script.of(2).result == record()
    assert isinstance(script.of(1).result, Stopped)
    assert [script.of(number).retries for number in range(3)] == [0, 0, 0], "waiting for a worker is no death"
    table = results.get_dataframe()
    assert sorted(table["number"].dropna()) == [0, 1, 2]
    assert max(table["accuracy"].dropna()) == 0.9
