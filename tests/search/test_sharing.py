"""Several drivers in one study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from paretune.errors import JobError
from paretune.search.job import Job, make_job
from paretune.search.samplers import SAMPLERS
from paretune.search.sharing import check_new_study, check_sharing, claim
from paretune.search.study import SearchStudy
from tests.records import measurement
from tests.search.test_results import SPACE, tell

ENVIRONMENT = {"processor": "fast", "cores": 2, "load": 0.5}
POSTGRESQL = "postgresql+psycopg://user@localhost/studies"


def driver(folder: Path, run: str) -> SearchStudy:
    """As another process makes it; the study is in SQLite here, which jobs are refused."""
    url = f"sqlite:///{folder / 'shared.db'}"
    return SearchStudy(
        "shared", url, SPACE, SAMPLERS["random"](SPACE, 0), objectives=("accuracy", "latency_ms"), run=run
    )


def job(**keys: Any) -> Job:
    return make_job(
        {"name": "one", "model": {"factory": "m:f"}, "data": "digits", "study": "shared", "storage": POSTGRESQL} | keys
    )


def test_each_driver_answers_for_its_own_trials(tmp_path: Path) -> None:
    one, other = driver(tmp_path, "one"), driver(tmp_path, "other")
    assert one.is_new
    tell(one, measurement(0.9, 1.0), "a reason")
    assert not other.is_new
    tell(other, measurement(0.8, 2.0))
    one.spent_seconds = 7.0
    assert [row.number for row in one.rows()] == [0, 1]
    assert [row.number for row in other.rows()] == [2]
    assert [row.number for row in other.front()] == [2], "what the other one measured has no artifact here"
    assert (one.proposed(), other.proposed(), one.spent_seconds, other.spent_seconds) == (2, 1, 7.0, 0.0)
    told = optuna.load_study(study_name="shared", storage=f"sqlite:///{tmp_path / 'shared.db'}").trials
    assert [trial.user_attrs["run"] for trial in told] == ["one", "one", "other"]


def test_a_driver_that_was_killed_takes_no_trial_of_others_with_it(tmp_path: Path) -> None:
    one, other = driver(tmp_path, "one"), driver(tmp_path, "other")
    one.propose()
    proposal = other.propose()
    assert driver(tmp_path, "one").recover() == 1
    tell(other, "enqueued anew by the one, begun by the other")
    other.fail(proposal.number, "still running")
    assert [row.error for row in other.rows()] == ["still running", "enqueued anew by the one, begun by the other"]


@pytest.mark.parametrize("planned", [False, True])
def test_a_trial_has_its_driver_before_its_parameters(tmp_path: Path, planned: bool) -> None:
    one, other = driver(tmp_path, "one"), driver(tmp_path, "other")
    if planned:
        one.enqueue(SPACE.sweep(0), "dense")
    one._study.ask(one._distributions)  # and then it is killed: what it drew was never written
    assert other.recover() == 0
    assert driver(tmp_path, "one").recover() == 1
    assert all(trial.state != TrialState.RUNNING for trial in other._study.get_trials(deepcopy=False))
    if planned:
        assert other.propose().plan == SPACE.sweep(0), "it isn't lost"


def test_a_name_is_of_one_run(tmp_path: Path) -> None:
    folders = [tmp_path / "here", tmp_path / "elsewhere"]
    for folder in folders:
        folder.mkdir()
    one = driver(tmp_path, "one")
    claim(one, "one", folders[0])
    running = one.propose()
    claim(driver(tmp_path, "other"), "other", folders[1])
    with pytest.raises(JobError, match="name must name a run that the study doesn't have yet, but got 'one'"):
        claim(driver(tmp_path, "one"), "one", folders[1])
    one.fail(running.number, "was still running")
    claim(driver(tmp_path, "one"), "one", folders[0])


def test_samplers_learn_from_all(tmp_path: Path) -> None:
    one, other = driver(tmp_path, "one"), driver(tmp_path, "other")
    tell(one, measurement(0.9, 1.0))
    assert [trial.values for trial in other._study.get_trials(deepcopy=False)] == [[0.9, 1.0]]


def test_the_first_one_decides_what_is_shared(tmp_path: Path) -> None:
    check_sharing(driver(tmp_path, "one"), job(), ENVIRONMENT)
    joined = driver(tmp_path, "other")
    check_sharing(joined, job(name="other", search={"seed": 1, "trials": 5}), ENVIRONMENT | {"load": 3.0})
    with pytest.raises(
        JobError, match=r"study must be shared by runs of the same job, but got another finetune\.epochs"
    ):
        check_sharing(joined, job(name="other", finetune={"epochs": 7}), ENVIRONMENT)
    with pytest.raises(JobError, match="study must be shared by runs on like hardware, but got cores is 8, not 2"):
        check_sharing(joined, job(name="other"), ENVIRONMENT | {"cores": 8})


def test_a_storage_is_not_told_to_others(tmp_path: Path) -> None:
    study = driver(tmp_path, "one")
    check_sharing(study, job(storage="postgresql+psycopg://me:secret@localhost/studies"), ENVIRONMENT)
    check_sharing(study, job(storage="postgresql+psycopg://you@db/studies"), ENVIRONMENT)
    assert "storage" not in study._study.user_attrs["job"]
    assert "secret" not in str(study._study.user_attrs)


def test_what_does_not_fit_is_said_before_anything_is_spent(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"

    def check(**keys: Any) -> None:
        check_new_study(job(**keys).model_copy(update={"storage": url}))

    check(name="one")
    study = driver(tmp_path, "one")
    check(name="one")
    check_sharing(study, job(), ENVIRONMENT)
    claim(study, "one", tmp_path)
    check(name="other", search={"seed": 7})
    with pytest.raises(JobError, match=r"study must be shared by runs of the same job.*finetune\.epochs"):
        check(name="other", finetune={"epochs": 7})
    with pytest.raises(JobError, match="name must name a run that the study doesn't have yet, but got 'one'"):
        check(name="one")


@pytest.mark.parametrize("storage", [None, "sqlite:////tmp/study.db"])
def test_only_a_server_is_shared(storage: str | None) -> None:
    with pytest.raises(JobError, match="study must be shared through a database server"):
        job(storage=storage)
