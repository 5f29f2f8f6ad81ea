"""What the searcher tells the work, call by call as Tune makes them: each request ends once, whatever happens."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.tune.search import Searcher

from paretune.errors import SearchError
from paretune.search.cluster.parcels import Parcel
from paretune.search.executor import Outcome, Progress
from paretune.search.tune.events import Cargo, End, end_to_result
from paretune.search.tune.failures import Blame, Failure
from paretune.search.tune.searcher import WorkSearcher
from tests.search.tune.trials import OUTLINE, RUNG, Kit, Script, complete, record

pytestmark = pytest.mark.ray

DEATH = Failure(Blame.DEATH, "the worker process died", "at length")
UNREADY = Failure(Blame.WORKER, "no data")
BUSY = Failure(Blame.NOBODY, "the one before doesn't end")


@pytest.fixture
def script(tmp_path: Path) -> Script:
    return Script(tmp_path, [complete, complete], unwanted=[0])


@pytest.fixture
def searcher(script: Script) -> WorkSearcher:
    return WorkSearcher(script, Kit())


def begin(searcher: WorkSearcher, trial: str) -> dict[str, Any]:
    config = searcher.suggest(trial)
    assert isinstance(config, dict)
    return config


def fail(searcher: WorkSearcher, trial: str, failure: Failure) -> None:
    searcher.broke_off(trial, failure)
    searcher.on_trial_complete(trial, error=True)


def finish(searcher: WorkSearcher, trial: str, number: int) -> None:
    searcher.on_trial_complete(trial, end_to_result(number, End(record())))


def test_requests_are_suggested_until_all_of_them_ended(searcher: WorkSearcher, script: Script) -> None:
    assert [begin(searcher, trial)["number"] for trial in "ab"] == [0, 1]
    finish(searcher, "a", 0)
    assert searcher.suggest("c") is None, "the other one may have to be begun again"
    finish(searcher, "b", 1)
    assert searcher.suggest("c") == Searcher.FINISHED
    assert script.outcomes == [Outcome(0, record()), Outcome(1, record())]
    assert searcher.unfinished == 0


def test_a_trial_is_told_once_however_often_tune_ends_it(searcher: WorkSearcher, script: Script) -> None:
    config = begin(searcher, "a")
    finish(searcher, "a", 0)
    fail(searcher, "a", DEATH)
    searcher.on_trial_complete("unknown", error=True)
    assert script.outcomes == [Outcome(0, record())]
    assert config["request"].content is None, "Tune keeps configurations, not what they carried"


def test_a_death_is_retried_and_then_told(searcher: WorkSearcher, script: Script) -> None:
    begin(searcher, "a")
    searcher.got_on("a", Progress(0, OUTLINE))
    fail(searcher, "a", DEATH)
    assert script.outcomes == []
    assert begin(searcher, "b")["number"] == 0
    fail(searcher, "b", DEATH)
    assert script.outcomes == [Outcome(0, error=DEATH.error, details="at length", retries=1)]
    assert begin(searcher, "c")["number"] == 1


def test_who_waits_for_another_worker_isnt_blamed(searcher: WorkSearcher, script: Script) -> None:
    for trial in "abcdefgh":
        assert begin(searcher, trial)["number"] == 0
        fail(searcher, trial, BUSY)
    assert begin(searcher, "last")["number"] == 0
    finish(searcher, "last", 0)
    assert script.outcomes == [Outcome(0, record())]


@pytest.mark.parametrize("failure", [UNREADY, DEATH], ids=["unready", "dead before anything was heard"])
def test_workers_that_never_start_end_the_search(tmp_path: Path, failure: Failure) -> None:
    searcher = WorkSearcher(Script(tmp_path, [complete] * 9), Kit(), retries=9)
    for trial in "abc":
        begin(searcher, trial)
        fail(searcher, trial, failure)
    assert isinstance(searcher.error, SearchError)
    with pytest.raises(SearchError, match=f"3 in a row didn't: {failure.error}"):
        searcher.suggest("d")


def test_many_workers_may_fail_more_often(tmp_path: Path) -> None:
    searcher = WorkSearcher(Script(tmp_path, [complete] * 9), Kit())
    for trial in "abcdef":
        begin(searcher, trial)
    for trial in "abcd":
        fail(searcher, trial, UNREADY)
    assert searcher.error is None
    searcher.got_on("e", Progress(4, OUTLINE))
    fail(searcher, "f", UNREADY)
    assert searcher.error is None, "one has started since"


def test_a_request_that_no_worker_can_begin_fails(searcher: WorkSearcher, script: Script) -> None:
    begin(searcher, "other")
    searcher.got_on("other", Progress(0, OUTLINE))
    for trial in "abc":
        assert begin(searcher, trial)["number"] == 1
        fail(searcher, trial, UNREADY)
    assert searcher.error is None
    assert script.outcomes == [Outcome(1, error="no data")]


def test_an_unwanted_trial_is_stopped(searcher: WorkSearcher, script: Script) -> None:
    begin(searcher, "a")
    assert not searcher.got_on("a", Progress(0, OUTLINE))
    progress = Progress(0, OUTLINE, (RUNG,), {"train": 1.0}, 4)
    assert searcher.got_on("a", progress)
    searcher.on_trial_complete("a", {"done": True})
    assert script.outcomes == [Outcome(0, progress.stopped())]


def test_a_trial_that_tune_ends_by_itself_failed(searcher: WorkSearcher, script: Script) -> None:
    begin(searcher, "a")
    searcher.got_on("a", Progress(0, OUTLINE))
    searcher.on_trial_complete("a", {"done": True})
    assert "by a rule that isn't paretune's" in script.of(0).error


def test_an_error_of_the_work_is_noted_and_nothing_more_is_told(searcher: WorkSearcher, script: Script) -> None:
    begin(searcher, "a")
    script.outcomes = ()  # type: ignore[assignment]  # nothing can be appended to it
    finish(searcher, "a", 0)
    assert isinstance(searcher.error, AttributeError)
    with pytest.raises(AttributeError):
        searcher.suggest("b")


def test_what_tune_pickles_has_nothing_of_the_work(searcher: WorkSearcher) -> None:
    assert len(pickle.dumps(searcher)) < 500


@pytest.mark.usefixtures("cluster")
def test_an_artifact_that_was_lost_with_its_node_is_made_again(tmp_path: Path) -> None:
    @ray.remote(num_cpus=0)
    class Owner:
        def make(self) -> Parcel:
            return Parcel(bytes(1_000_000))

    owner = Owner.remote()  # type: ignore[attr-defined]
    ray.kill(owner)
    lost = owner.make.remote()
    script = Script(tmp_path, [complete])
    searcher = WorkSearcher(script, Kit())
    for trial in "ab":
        assert script.outcomes == []
        begin(searcher, trial)
        searcher.on_trial_complete(trial, end_to_result(0, End(record()), Cargo(lost, "artifact")))
    assert script.of(0).error.startswith("its artifact was lost with its node (")
    assert script.of(0).retries == 1
