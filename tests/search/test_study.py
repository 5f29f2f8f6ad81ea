"""The study: what is stored of each trial, and what a run that goes on finds of the one that was killed."""

from __future__ import annotations

import sqlite3
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import optuna
import pytest
from optuna.samplers import BaseSampler, NSGAIISampler
from optuna.trial import TrialState

from paretune.errors import JobError
from paretune.objectives.measurement import Record
from paretune.search.job_types import Constraint
from paretune.search.samplers import SAMPLERS
from paretune.search.study import SearchStudy, open_storage, study_url
from paretune.spaces.space import Options, SearchSpace
from tests.records import measurement, stopped
from tests.records import record as make_record

SPACE = SearchSpace(
    grids={"stem": [8, 16, 32], "body": [16, 32]},
    widths={"stem": (32, 8), "body": (32, 8)},
    options=Options(temperature=(4.0, 4.0)),
)
NAMES = {"prune/stem", "prune/body", "bits/stem", "bits/body", "distill/weight", "finetune/learning_rate"}


def open_study(run: Path, *, constraints: tuple[str, ...] = (), sampler: str = "random") -> SearchStudy:
    return SearchStudy(
        "small",
        study_url(run),
        SPACE,
        SAMPLERS[sampler](SPACE, 0),
        objectives=["accuracy", "latency_ms"],
        constraints=[Constraint.model_validate(text) for text in constraints],
    )


def record(accuracy: float = 0.9, latency: float = 2.0) -> Record:
    return make_record(measurement(accuracy, latency, half_width=0.1, size=1000), noisy=True)


def load(run: Path) -> optuna.Study:
    """The study as any user of Optuna opens it."""
    return optuna.load_study(study_name="small", storage=f"sqlite:///{run / 'study.db'}")


def waiting(run: Path) -> int:
    """How many enqueued plans weren't begun yet."""
    return len(load(run).get_trials(deepcopy=False, states=(TrialState.WAITING,)))


def test_what_optuna_sees_of_a_complete_trial(tmp_path: Path) -> None:
    study = open_study(tmp_path, constraints=("accuracy >= 0.8", "latency_ms <= 1.5"))
    proposal = study.propose()
    study.complete(proposal.number, record())
    seen = load(tmp_path)
    assert seen.metric_names == ["accuracy", "latency_ms"]
    assert [direction.name for direction in seen.directions] == ["MAXIMIZE", "MINIMIZE"]
    (trial,) = seen.trials
    assert (trial.number, trial.state) == (0, TrialState.COMPLETE)
    assert trial.params.keys() == NAMES
    assert SPACE.to_plan(trial.params) == proposal.plan
    assert trial.values == [0.9, 2.0]
    assert "source" not in trial.user_attrs, "only plans that were enqueued carry one"
    assert trial.user_attrs["plan"] == proposal.plan.to_dict()
    assert Record.from_dict(trial.user_attrs["record"]) == record()
    assert trial.constraints == pytest.approx({"accuracy >= 0.8": -0.1, "latency_ms <= 1.5": 0.5})


def test_rows_of_complete_trials(tmp_path: Path) -> None:
    study = open_study(tmp_path, constraints=("accuracy >= 0.8",))
    for accuracy in (0.9, 0.7):
        study.complete(study.propose().number, record(accuracy))
    good, bad = study.rows()
    assert (good.number, good.feasible, good.error) == (0, True, "")
    assert (bad.number, bad.feasible, bad.error) == (1, False, "")
    assert good.measurement == record().measurement
    assert good.record is not None
    assert good.record.noisy
    assert good.seconds is not None
    assert good.seconds >= 0
    assert good.plan == SPACE.to_plan(good.trial.params)


def test_a_stopped_trial_keeps_what_it_had_shown(tmp_path: Path) -> None:
    study = open_study(tmp_path, constraints=("accuracy >= 0.8", "latency_ms <= 2.5"))
    found = stopped(0.5, 0.625, latency=3.0)
    study.stop(study.propose().number, found, (0.75, 0.05))
    study.stop(study.propose().number, stopped(), None)
    for row in (study.rows()[0], open_study(tmp_path).rows()[0]):
        assert (row.trial.state, row.error, row.feasible, row.record) == (TrialState.PRUNED, "", False, None)
        assert row.stopped == found
        assert row.rungs == found.rungs
        assert row.expected == (0.75, 0.05)
        assert (row.steps, row.plan) == (12, SPACE.to_plan(row.trial.params))
    other = study.rows()[1]
    assert other.stopped == stopped()
    assert (other.rungs, other.expected) == ((), None)
    (seen, _) = load(tmp_path).trials
    assert seen.values is None
    assert seen.user_attrs["stopped"]["rungs"][1] == {"share": 0.5, "accuracy": 0.625, "samples": 100}
    assert seen.constraints == {"latency_ms <= 2.5": 0.5}, "the accuracy isn't known"
    assert (study.recover(), study.proposed()) == (0, 2), "it counts as a trial, and isn't begun anew"


def test_complete_trials_keep_their_rungs(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    rungs = stopped(0.5, 0.625).rungs
    study.complete(study.propose().number, make_record(measurement(0.9, 2.0), rungs=rungs))
    (row,) = open_study(tmp_path).rows()
    assert (row.rungs, row.steps, row.stopped, row.expected) == (rungs, 40, None, None)


@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
@pytest.mark.parametrize(
    "sampler",
    [
        pytest.param(SAMPLERS["tpe"](SPACE, 0), id="tpe"),
        pytest.param(SAMPLERS["gp"](SPACE, 0), id="gp"),
        pytest.param(NSGAIISampler(population_size=4, seed=0), id="nsga2"),
        pytest.param(SAMPLERS["random"](SPACE, 0), id="random"),
    ],
)
def test_samplers_go_on_beside_stopped_trials(tmp_path: Path, sampler: BaseSampler) -> None:
    bounds = [Constraint.model_validate(text) for text in ("accuracy >= 0.8", "latency_ms <= 2.5")]
    objectives = ["accuracy", "latency_ms"]
    study = SearchStudy("small", study_url(tmp_path), SPACE, sampler, objectives=objectives, constraints=bounds)
    for number in range(16):  # past ten complete ones, the random start of TPE and GP
        assert study.propose().number == number
        if number % 3 == 2:
            study.stop(number, stopped(0.5), (0.6, 0.1))
        else:
            study.complete(number, record(0.7 + 0.02 * number, 1.0 + 0.2 * number))
    seen = load(tmp_path)
    states = [trial.state.name for trial in seen.trials]
    assert (states.count("PRUNED"), states.count("COMPLETE")) == (5, 11)
    assert all(trial.state == TrialState.COMPLETE for trial in seen.best_trials), "Optuna's own front has none either"


def test_a_failed_trial_keeps_its_reason(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    study.fail(study.propose().number, "the loss isn't finite")
    (row,) = open_study(tmp_path).rows()
    assert (row.trial.state, row.error) == (TrialState.FAIL, "the loss isn't finite")
    assert (row.record, row.feasible) == (None, False)
    assert row.plan == SPACE.to_plan(row.trial.params)
    assert load(tmp_path).trials[0].user_attrs["error"] == "the loss isn't finite"


@pytest.mark.parametrize("sampler", ["tpe", "uniform"])
def test_enqueued_plans_come_first_with_their_source(tmp_path: Path, sampler: str) -> None:
    study = open_study(tmp_path, sampler=sampler)
    plans = [SPACE.sweep(0), SPACE.sweep(3)]
    for plan, source in zip(plans, ["dense", "uniform"], strict=True):
        study.enqueue(plan, source)
    assert (waiting(tmp_path), study.proposed()) == (2, 0)
    assert [row.plan for row in study.rows()] == [None, None]
    proposals = [study.propose() for _ in range(3)]
    assert [proposal.number for proposal in proposals] == [0, 1, 2]
    assert [proposal.source for proposal in proposals] == ["dense", "uniform", "sampler"]
    assert [proposal.plan for proposal in proposals[:2]] == plans
    assert [row.source for row in study.rows()] == ["dense", "uniform", "sampler"]
    assert waiting(tmp_path) == 0


def test_a_plan_outside_the_space_is_not_enqueued(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    other = SearchSpace({"other": [8, 16]}, {}, Options()).uniform(0.5)
    with pytest.raises(JobError, match=r"prune\.ratios must name groups or layers of the space, but got other"):
        study.enqueue(other, "enqueued")
    assert study.rows() == []


def test_a_killed_run_is_recovered_once(tmp_path: Path) -> None:
    killed = open_study(tmp_path)
    killed.enqueue(SPACE.sweep(0), "dense")
    proposals = [killed.propose() for _ in range(4)]
    killed.complete(0, record())
    killed.fail(1, "no such layer")

    study = open_study(tmp_path)
    assert study.proposed() == 4
    assert study.recover() == 2
    assert study.proposed() == 2, "lost trials don't count: the complete one and the failed one remain"
    assert waiting(tmp_path) == 2
    assert study.recover() == 0
    assert waiting(tmp_path) == 2

    again = [study.propose() for _ in range(2)]
    assert [proposal.number for proposal in again] == [4, 5]
    assert [proposal.plan for proposal in again] == [proposal.plan for proposal in proposals[2:]]
    assert {proposal.source for proposal in again} == {"retry"}
    for proposal in again:
        study.complete(proposal.number, record())
    states = [row.trial.state.name for row in study.rows()]
    assert states == ["COMPLETE", "FAIL", "FAIL", "FAIL", "COMPLETE", "COMPLETE"]
    assert [row.error for row in study.rows()[1:4]] == ["no such layer", *["lost when the run was killed"] * 2]
    assert study.proposed() == 4


def test_plans_that_wait_survive_a_kill(tmp_path: Path) -> None:
    killed = open_study(tmp_path)
    for index in range(3):
        killed.enqueue(SPACE.sweep(index), "uniform")
    killed.propose()
    study = open_study(tmp_path)
    assert (study.recover(), waiting(tmp_path)) == (1, 3)
    plans = {study.propose().plan.hash for _ in range(3)}
    assert plans == {SPACE.sweep(index).hash for index in range(3)}


def test_a_trial_without_all_its_parameters_is_given_up(tmp_path: Path) -> None:
    open_study(tmp_path)
    load(tmp_path).ask({"bits/stem": SPACE.distributions()["bits/stem"]})
    study = open_study(tmp_path)
    assert (study.recover(), waiting(tmp_path), study.proposed()) == (1, 0, 0)
    assert [row.trial.state for row in study.rows()] == [TrialState.FAIL]


def test_an_enqueued_plan_without_all_its_parameters_is_begun_anew(tmp_path: Path) -> None:
    killed = open_study(tmp_path)
    killed.enqueue(SPACE.sweep(3), "uniform")
    load(tmp_path).ask({"bits/stem": SPACE.distributions()["bits/stem"]})
    study = open_study(tmp_path)
    assert (study.recover(), waiting(tmp_path)) == (1, 1)
    proposal = study.propose()
    assert (proposal.plan, proposal.source) == (SPACE.sweep(3), "uniform")


def test_spent_seconds_survive_a_kill(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    assert study.spent_seconds == 0
    study.spent_seconds = 12.5
    assert open_study(tmp_path).spent_seconds == 12.5


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_a_resumed_study_does_not_propose_the_same_again(tmp_path: Path, sampler: str) -> None:
    first = open_study(tmp_path, sampler=sampler)
    before = [first.propose() for _ in range(3)]
    for proposal in before:
        first.complete(proposal.number, record())
    study = open_study(tmp_path, sampler=sampler)
    after = [study.propose() for _ in range(3)]
    assert {proposal.plan.hash for proposal in before}.isdisjoint(proposal.plan.hash for proposal in after)


def test_sqlite_is_in_write_ahead_mode(tmp_path: Path) -> None:
    study = open_study(tmp_path)
    study.propose()
    with sqlite3.connect(tmp_path / "study.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    storage = open_storage(study_url(tmp_path))
    with storage.engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 1


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("nonsense", id="no URL"),
        pytest.param("oracle9://host/x", id="unknown database"),
        pytest.param("sqlite:////no/such/folder/study.db", id="no folder"),
        pytest.param("postgresql+nodriver://host/x", id="unknown driver"),
    ],
)
def test_a_bad_url_is_a_mistake_of_the_job(url: str) -> None:
    with pytest.raises(JobError, match=r"^storage must be a database URL that opens") as caught:
        open_storage(url)
    assert repr(url) in str(caught.value)


@pytest.mark.parametrize(
    ("url", "driver", "remedy"),
    [
        ("postgresql+psycopg://host/x", "psycopg", r"pip install 'paretune\[postgresql\]'$"),
        (
            "postgresql://host/x",
            "psycopg2",
            r"pip install 'paretune\[postgresql\]' and begin it with postgresql\+psycopg://$",
        ),
        ("mysql+pymysql://host/x", "pymysql", r"pip install 'paretune\[mysql\]'$"),
        ("oracle+cx_oracle://host/x", "cx_Oracle", r"install the driver of oracle\+cx_oracle$"),
    ],
)
def test_a_missing_driver_is_named(monkeypatch: pytest.MonkeyPatch, url: str, driver: str, remedy: str) -> None:
    monkeypatch.setitem(sys.modules, driver, None)  # as if it weren't installed
    with pytest.raises(JobError, match=remedy):
        open_storage(url)


def test_a_new_database_is_opened_by_several_at_once(tmp_path: Path) -> None:
    """Drivers of one study are started together, and each makes the tables that aren't there yet."""
    start = Barrier(4)

    def go() -> int:
        start.wait()
        storage = open_storage(f"sqlite:///{tmp_path / 'new.db'}")
        return len(storage.get_all_studies())

    with ThreadPoolExecutor(4) as pool:
        assert [one.result() for one in [pool.submit(go) for _ in range(4)]] == [0] * 4
