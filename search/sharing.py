"""Runs that share a storage, or a study: their names differ, and their trials are worth comparing."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna

from paretune.errors import JobError
from paretune.search.cluster.hardware import differences as unlike_hardware
from paretune.search.cluster.hardware import hardware
from paretune.search.job import Job
from paretune.search.job_diff import differences, settings
from paretune.search.study import SearchStudy, open_storage

_OWN = ("name", "search.seed", "search.uniform_trials", "storage")
"""What each of the runs has for itself; a storage's URL names a user, perhaps with a password."""

_REMEDY = "give it a study of its own (-o study=null), or undo that"

_JOB, _HARDWARE = "job", "hardware"
"""What the drivers of a study agree upon, in its user attributes."""

DRIVER = "driver"
"""File of a run folder whose run shares its study: by what it says there, the study knows whose trials are whose."""


def check_new_study(job: Job) -> None:
    """Check the storage that a new run names, before anything is spent; one in the run folder is always new.

    Raises:
        JobError: It can't be opened, or holds a study of that name, whose trials would pass for those of the new run;
            or the study that is to be shared is another job's, or has a run of that name.
    """
    if not job.storage:
        return
    storage = open_storage(job.storage)
    if job.study_name not in optuna.get_all_study_names(storage):
        return
    if not job.study:
        raise JobError(
            "name",
            "must name a study that the storage doesn't hold yet",
            repr(job.name),
            "choose another name (-o name=…), or go on with that study's run (`paretune resume`)",
        )
    said = storage.get_study_user_attrs(storage.get_study_id_from_name(job.study))
    _check_same_job(said.get(_JOB, _shared(job)), job)
    if _driver_of(job.name) in said:
        raise _taken(job.name)


def check_sharing(study: SearchStudy, job: Job, environment: Mapping[str, Any]) -> None:
    """Check that a run may have its trials in a study beside those of others: the same job, on like hardware.

    Args:
        study: The first run to come decides.
        job: Of this run.
        environment: Of its target.

    Raises:
        JobError: It is another job, or its target is another machine.
    """
    _check_same_job(study.agree(_JOB, _shared(job)), job)
    here = hardware(environment)
    if other := unlike_hardware(study.agree(_HARDWARE, here), here):
        raise JobError("study", "must be shared by runs on like hardware", "; ".join(other), _REMEDY)


def claim(study: SearchStudy, name: str, folder: Path) -> None:
    """Have a name in a shared study for the run in a folder alone, which tells its trials by that name.

    Args:
        study: That is shared.
        name: The run's.
        folder: The run folder; whose it is, is kept there, too.

    Raises:
        JobError: The name is that of a run in another folder.
    """
    file = folder / DRIVER
    if not file.exists():
        file.write_text(uuid.uuid4().hex + "\n")
    own = file.read_text().strip()
    if study.agree(_driver_of(name), own) != own:
        raise _taken(name)


def _shared(job: Job) -> dict[str, Any]:
    """What the runs of a study must have in common."""
    return {key: value for key, value in settings(job).items() if key not in _OWN}


def _check_same_job(said: Mapping[str, Any], job: Job) -> None:
    if unlike := differences(said, _shared(job)):
        raise JobError("study", "must be shared by runs of the same job", f"another {unlike}", _REMEDY)


def _driver_of(name: str) -> str:
    return f"{DRIVER} of {name}"


def _taken(name: str) -> JobError:
    return JobError(
        "name",
        "must name a run that the study doesn't have yet",
        f"{name!r}, which has its run folder elsewhere",
        "choose another name (-o name=…), or go on in that folder (`paretune resume`)",
    )
