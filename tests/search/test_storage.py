"""The storage of a driver: what it holds in memory is what Optuna reads from the database, and others are seen."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from paretune.search.storage import Packed, TrialStorage

SPACE = {f"x{i}": FloatDistribution(0, 1) for i in range(8)} | {"y": CategoricalDistribution((32, 8))}


def url(folder: Path) -> str:
    return f"sqlite:///{folder / 'study.db'}"


def open_study(folder: Path) -> tuple[optuna.Study, TrialStorage]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = TrialStorage(RDBStorage(url(folder)))
    directions = ["maximize", "minimize"]
    study = optuna.create_study(
        study_name="s",
        storage=storage,
        directions=directions,
        load_if_exists=True,
        sampler=optuna.samplers.RandomSampler(0),
    )
    return study, storage


def others(folder: Path) -> optuna.Study:
    """The study as another process has it, with Optuna's own storage."""
    return optuna.load_study(study_name="s", storage=url(folder))


def fields(trial: FrozenTrial) -> dict[str, Any]:
    return vars(trial) | {"_user_attrs": dict(trial.user_attrs)}


def run_some(study: optuna.Study) -> None:
    """A trial of each fate."""
    for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.COMPLETE):
        trial = study.ask(SPACE)
        trial.set_user_attr("record", {"nested": [1, {"two": 2.5}], "name": "ü"})
        trial.set_constraint("a <= 1", 0.5)
        if state == TrialState.COMPLETE:
            study.tell(trial, [0.5, float("inf") if trial.number else 2.0])
        else:
            study.tell(trial, state=state)
    study.enqueue_trial({"x0": 0.25}, user_attrs={"source": "me"})


def test_memory_and_database_say_the_same(tmp_path: Path) -> None:
    study, storage = open_study(tmp_path)
    run_some(study)
    study.ask(SPACE).set_user_attr("plan", [1])
    storage.flush()
    kept, anew, optunas = (one.get_trials(deepcopy=False) for one in (study, open_study(tmp_path)[0], others(tmp_path)))
    assert [trial.number for trial in kept] == [0, 1, 2, 3, 4]
    assert kept[4].state == TrialState.RUNNING, "what is enqueued comes first"
    for one, two, three in zip(kept, anew, optunas, strict=True):
        assert fields(two) == fields(three)
        ended = {"datetime_complete": two.datetime_complete}
        assert fields(one) | ended == fields(two) | ended, "but for the microseconds between clock and transaction"


def test_a_trial_is_written_at_once(tmp_path: Path) -> None:
    study, storage = open_study(tmp_path)
    study.tell(study.ask(SPACE), [0.5, 1.0])
    commits = list[int]()
    engines = sqlalchemy.engine.Engine
    sqlalchemy.event.listen(engines, "commit", lambda connection: commits.append(1))
    study.ask(SPACE)
    assert all(not trial.params for trial in others(tmp_path).trials[1:]), "not before it is asked for"
    commits.clear()
    storage.flush()
    assert len(commits) == 1
    assert others(tmp_path).trials[1].params.keys() == SPACE.keys()
    commits.clear()
    storage.flush()
    assert not commits, "there is nothing left"


def test_what_was_set_is_written_before_the_state(tmp_path: Path) -> None:
    study, _ = open_study(tmp_path)
    trial = study.ask(SPACE)
    trial.set_user_attr("error", "first")
    trial.set_user_attr("error", "second")
    study.tell(trial, state=TrialState.FAIL)
    (seen,) = others(tmp_path).trials
    assert (seen.state, seen.params, seen.user_attrs) == (TrialState.FAIL, trial.params, {"error": "second"})


def test_an_attribute_may_be_set_again(tmp_path: Path) -> None:
    study, storage = open_study(tmp_path)
    trial = study.ask(SPACE)
    for value in (1, 2):
        trial.set_user_attr("plan", value)
        storage.flush()
    assert others(tmp_path).trials[0].user_attrs == {"plan": 2}


def test_what_others_do_in_the_study_is_seen(tmp_path: Path) -> None:
    study, _ = open_study(tmp_path)
    mine = study.ask(SPACE)
    other = others(tmp_path)
    other.enqueue_trial({"x0": 0.125})
    theirs = study.ask(SPACE)
    assert theirs.params["x0"] == 0.125
    running = other.ask(SPACE)
    assert [trial.state for trial in study.get_trials(deepcopy=False)] == [TrialState.RUNNING] * 3
    assert study.get_trials(deepcopy=False)[2].params == running.params
    other.tell(running, [0.5, 2.0])
    study.tell(mine, [0.5, 1.0])
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    assert [(trial.number, trial.values) for trial in complete] == [(0, [0.5, 1.0]), (2, [0.5, 2.0])]
    other.add_trial(create_trial(params={"x0": 0.5}, distributions={"x0": SPACE["x0"]}, values=[0.1, 0.2]))
    assert [trial.number for trial in study.get_trials(deepcopy=False)] == [0, 1, 2, 3]


def test_a_trial_of_others_that_runs_gets_its_parameters_later(tmp_path: Path) -> None:
    study, _ = open_study(tmp_path)
    running = others(tmp_path).ask()
    assert study.get_trials(deepcopy=False)[0].params == {}
    running.suggest_float("x0", 0, 1)
    assert study.get_trials(deepcopy=False)[0].params == running.params


def test_what_was_given_out_stays_as_it_was(tmp_path: Path) -> None:
    study, _ = open_study(tmp_path)
    trial = study.ask(SPACE)
    (before,) = study.get_trials(deepcopy=False)
    study.tell(trial, [0.5, 1.0])
    assert before.state == TrialState.RUNNING
    with pytest.raises(optuna.exceptions.UpdateFinishedTrialError):
        trial.set_user_attr("late", 1)


def test_a_parameter_keeps_its_kind(tmp_path: Path) -> None:
    study, _ = open_study(tmp_path)
    study.tell(study.ask(SPACE), [0.5, 1.0])
    with pytest.raises(ValueError, match="kind"):
        open_study(tmp_path)[0].ask({"x0": CategoricalDistribution((1, 2))})


def test_a_storage_is_of_one_study(tmp_path: Path) -> None:
    study, storage = open_study(tmp_path)
    study.ask(SPACE)
    other = optuna.create_study(study_name="other", storage=storage)
    with pytest.raises(ValueError, match="of one study"):
        other.ask(SPACE)


def test_finished_trials_take_little_memory(tmp_path: Path) -> None:
    study, _ = open_study(tmp_path)
    for _ in range(2):
        trial = study.ask(SPACE)
        trial.set_user_attr("record", {f"phase{i}": 1.0 for i in range(200)})
        study.tell(trial, [0.5, 1.0])
    one, two = study.get_trials(deepcopy=False)
    assert one.distributions is two.distributions
    assert len(pickle.dumps(one.user_attrs)) < len(pickle.dumps(dict(one.user_attrs))) / 4


def test_packed_attributes() -> None:
    packed = Packed({"one": "1", "two": '{"a": [null, "ä"]}'})
    assert dict(packed) == {"one": 1, "two": {"a": [None, "ä"]}}
    assert ("one" in packed, "three" in packed, packed.get("three")) == (True, False, None)
