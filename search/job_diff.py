"""Comparing a job with the one that a run was made of."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from paretune.errors import JobError
from paretune.search.job import Job, load_job

_MAY_DIFFER = (
    "python_path",
    "ray",
    "results",
    "search.executor",
    "search.timeout",
    "search.trial_timeout",
    "search.trials",
    "search.workers",
)
"""How long to search, and where: all else decides what the trials of a run have in common."""

_FILE = re.compile(r"(model(\.variants\.(?!.*\.args\.).+)?|teacher(\[\d+\])?)\.weights|data\.args\.(path|root)")


def check_same_job(job: Job, run: Path) -> None:
    """Check that a run was made of a job, so that its trials and those to come can be compared.

    Folders may differ: a job that is submitted lies in another one each time.

    Raises:
        JobError: It was made of another job.
    """
    if unlike := differences(settings(load_job(run)), settings(job)):
        raise JobError(
            "name",
            "must name a run of this job, or none yet",
            f"{job.name!r}, and {run / 'job.yaml'} differs in {unlike}",
            "choose another name (-o name=…), or undo these changes",
        )


def differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """In which keys two jobs' `settings` differ, in words; empty where they don't."""
    differing = sorted(key for key in stored.keys() | now.keys() if stored.get(key) != now.get(key))
    more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
    return ", ".join(differing[:5]) + more


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings and lists as dotted keys, such as ``targets[1].runtime``, with their plain values."""
    if isinstance(value, Mapping):
        for name, entry in value.items():
            yield from leaves(entry, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for position, entry in enumerate(value):
            yield from leaves(entry, f"{key}[{position}]")
    else:
        yield key, value


def is_file(key: str) -> bool:
    """Whether a dotted key names a file or folder relative to the job file: weights of a model, or the data."""
    return _FILE.fullmatch(key) is not None


def settings(job: Job) -> dict[str, Any]:
    """What decides about trials, as dotted keys with JSON-able values."""
    found = leaves({key: value for key, value in job.model_dump(mode="json").items() if key not in _MAY_DIFFER})
    return {
        key: Path(value).name if isinstance(value, str) and is_file(key) else value
        for key, value in found
        if key not in _MAY_DIFFER
    }
