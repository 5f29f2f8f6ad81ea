"""Comparing a job with the one that a run was made of."""

from __future__ import annotations

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


def check_same_job(job: Job, run: Path) -> None:
    """Check that a run was made of a job, so that its trials and those to come can be compared.

    Folders may differ: a job that is submitted lies in another one each time.

    Raises:
        JobError: It was made of another job.
    """
    stored, now = _settings(load_job(run)), _settings(job)
    differing = sorted(key for key in stored.keys() | now.keys() if stored.get(key) != now.get(key))
    if differing:
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise JobError(
            "name",
            "must name a run of this job, or none yet",
            f"{job.name!r}, and {run / 'job.yaml'} differs in {', '.join(differing[:5])}{more}",
            "choose another name (-o name=…), or undo these changes",
        )


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


def is_weights(key: str) -> bool:
    """Whether a dotted key names a file of weights, of the model or of another."""
    return key.endswith(".weights") and not key.startswith("data.")


def _settings(job: Job) -> dict[str, Any]:
    found = leaves({key: value for key, value in job.model_dump(mode="json").items() if key not in _MAY_DIFFER})
    return {
        key: Path(value).name if value and is_weights(key) else value for key, value in found if key not in _MAY_DIFFER
    }
