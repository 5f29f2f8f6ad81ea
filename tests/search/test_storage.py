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


def test_what_others_made_between_two_of_ones_own_is_seen(tmp_path: Path) -> None:
    study, _ = open_study(tmp_path)
    other = others(tmp_path)
    for one in (other, study, other):
        one.enqueue_trial({"x0": 0.25})
    assert [trial.number for trial in study.get_trials(deepcopy=False)] == [0, 1, 2]
    assert study.ask(SPACE).number == 0


def test_what_others_begin_of_ones_own_plans_is_seen(tmp_path: Path) -> None:
    study, _ = open_study(tmp_path)
    study.enqueue_trial({"x0": 0.25})
    other = others(tmp_path)
    taken = other.ask(SPACE)
    (seen,) = study.get_trials(deepcopy=False)
    assert (seen.state, seen.params) == (TrialState.RUNNING, taken.params)
    other.tell(taken, [0.5, 1.0])
    assert study.get_trials(deepcopy=False)[0].state == TrialState.COMPLETE
    assert study.ask(SPACE).number == 1


def test_a_trial_that_waits_is_begun_by_one(tmp_path: Path) -> None:
    (study, storage), (_, slower) = open_study(tmp_path), open_study(tmp_path)
    study.enqueue_trial({"x0": 0.25})
    study_id = slower.get_study_id_from_name("s")
    (waiting,) = slower.get_all_trials(study_id)
    assert storage.set_trial_state_values(waiting._trial_id, TrialState.RUNNING)
    assert not slower.set_trial_state_values(waiting._trial_id, TrialState.RUNNING)
    assert slower.get_all_trials(study_id)[0].state == TrialState.RUNNING


def test_a_trial_that_ends_while_it_is_read_is_not_taken_for_half(tmp_path: Path) -> None:
    study, storage = open_study(tmp_path)
    other = others(tmp_path)
    running = [other.ask(SPACE)]

    def end(*args: Any) -> None:
        if running and "FROM trial_user_attributes" in args[2]:
            other.tell(running.pop(), [0.5, 1.0])

    sqlalchemy.event.listen(storage._backend.engine, "before_cursor_execute", end)
    study.get_trials(deepcopy=False)
    assert not running
    (seen,) = study.get_trials(deepcopy=False)
    assert (seen.state, seen.values) == (TrialState.COMPLETE, [0.5, 1.0])


def test_marks_are_there_as_soon_as_a_trial_runs(tmp_path: Path) -> None:
    open_study(tmp_path)
    storage = TrialStorage(RDBStorage(url(tmp_path)), {"run": "one"})
    study = optuna.load_study(study_name="s", storage=storage)
    study.enqueue_trial({"x0": 0.25}, user_attrs={"source": "me"})
    study.enqueue_trial({"x0": 0.5}, user_attrs={"run": "another"})
    assert [trial.user_attrs for trial in others(tmp_path).trials] == [{"source": "me"}, {"run": "another"}]
    began = [study.ask() for _ in range(3)]
    seen = others(tmp_path).trials
    assert [trial.state for trial in seen] == [TrialState.RUNNING] * 3
    assert [trial.user_attrs for trial in seen] == [{"source": "me", "run": "one"}, {"run": "one"}, {"run": "one"}]
    assert all(trial.datetime_start for trial in seen)
    study.tell(began[2], [0.5, 1.0])
    assert others(tmp_path).trials[2].user_attrs == {"run": "one"}


def test_of_several_drivers_one_is_the_first(tmp_path: Path) -> None:
    (study, storage), (_, other) = open_study(tmp_path), open_study(tmp_path)
    study_id = storage.get_study_id_from_name("s")

    def look(*args: Any) -> None:
        if args[2].startswith("INSERT"):  # nothing stood there when this one looked
            other.agree(study_id, "job", {"theirs": 1})

    assert other.agree(study_id, "hardware", [1]) == storage.agree(study_id, "hardware", [2]) == [1]
    sqlalchemy.event.listen(storage._backend.engine, "before_cursor_execute", look)
    assert storage.agree(study_id, "job", {"mine": 1}) == {"theirs": 1}
    assert study.user_attrs == {"hardware": [1], "job": {"theirs": 1}}


def test_only_what_is_stored_is_replaced(tmp_path: Path) -> None:
    study, storage = open_study(tmp_path)
    trial = study.ask(SPACE)
    statements = list[str]()
    sqlalchemy.event.listen(
        storage._backend.engine, "before_cursor_execute", lambda *args: statements.append(args[2].split()[0])
    )
    trial.set_user_attr("plan", 1)
    trial.set_user_attr("plan", 2)
    storage.flush()
    assert set(statements) == {"INSERT"}, "a row that isn't there is neither deleted nor updated, which locks gaps"
    statements.clear()
    trial.set_user_attr("plan", 3)
    storage.flush()
    assert (statements, others(tmp_path).trials[0].user_attrs) == (["UPDATE"], {"plan": 3})


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
