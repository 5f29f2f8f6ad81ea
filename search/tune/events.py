"""What goes between the search and its trainables through Ray Tune: plain results, and objects that Tune only carries.

Tune flattens, compares, logs and keeps every field of a result. So the whole truth travels as one text, and beside it
only a few numbers for people who look at Tune's own tables.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from paretune.errors import SearchError
from paretune.objectives.measurement import Record
from paretune.objectives.progress import Rung
from paretune.search.executor import Outcome, Progress

_PROGRESS, _END, _ARTIFACT = "paretune/progress", "paretune/end", "paretune/artifact"

_SHOWN = ("accuracy", "latency_ms", "size_bytes", "params", "macs")


class Cargo:
    """An object on its way through Tune, which copies, shows and keeps what it is given: of this, only the shell.

    Args:
        content: Is pickled on its way to another process.
        label: What logs and tables show.
    """

    def __init__(self, content: Any, label: str) -> None:
        self.content = content
        self._label = label

    def unload(self) -> Any:
        """The content, which isn't kept any longer; None where it is gone already."""
        content, self.content = self.content, None
        return content

    def __deepcopy__(self, _memo: dict[int, Any]) -> Cargo:
        return self  # what is unloaded is unloaded everywhere

    def __repr__(self) -> str:
        return f"<{self._label}>"


@dataclass(frozen=True)
class End:
    """How a trial ended on its worker.

    Attributes:
        record: What it found out; None where it failed.
        error: One line that says why.
        details: The traceback.
        ends_search: Whether no other trial would fare better, e.g. as nothing can be measured any more.
    """

    record: Record | None = None
    error: str = ""
    details: str = ""
    ends_search: bool = False


def progress_to_result(progress: Progress) -> dict[str, Any]:
    """A result for Tune."""
    last = progress.rungs[-1] if progress.rungs else None
    shown = {**progress.outline, **({"accuracy": last.accuracy} if last else {})}
    truth = {
        "number": progress.number,
        "outline": progress.outline,
        "rungs": [vars(rung) for rung in progress.rungs],
        "seconds": progress.seconds,
        "steps": progress.steps,
    }
    return _shown(progress.number, shown, last.share if last else 0.0) | {_PROGRESS: json.dumps(truth)}


def end_to_result(number: int, end: End, artifact: Cargo | None = None) -> dict[str, Any]:
    """The last result for Tune.

    Args:
        number: The request's.
        end: What is told.
        artifact: On its way to the driver, where there is one.
    """
    measured = end.record.measurement.to_dict() if end.record else {}
    truth = {
        "record": end.record.to_dict() if end.record else None,
        "error": end.error,
        "details": end.details,
        "ends_search": end.ends_search,
    }
    result = _shown(number, measured, 1.0) | {_END: json.dumps(truth), "done": True}
    return result | ({_ARTIFACT: artifact} if artifact else {})


def _shown(number: int, values: Mapping[str, Any], share: float) -> dict[str, Any]:
    return {"number": number, "share": share, **{name: values[name] for name in _SHOWN if name in values}}


def progress_of(result: Mapping[str, Any]) -> Progress | None:
    """What `progress_to_result` told; None where a result is no progress."""
    if _PROGRESS not in result:
        return None
    truth = json.loads(result[_PROGRESS])
    rungs = tuple(Rung(**rung) for rung in truth["rungs"])
    return Progress(truth["number"], truth["outline"], rungs, truth["seconds"], truth["steps"])


def outcome_of(number: int, result: Mapping[str, Any], retries: int) -> Outcome | None:
    """What `end_to_result` told; None where a result isn't the last one.

    A record that lacks values, or whose values aren't finite, becomes a failure: Optuna would put an infinite one on
    the front, and leave a trial with a missing one running for ever.

    Raises:
        SearchError: No other trial would fare better; this one is begun anew by whoever goes on with the search.
    """
    if _END not in result:
        return None
    truth = json.loads(result[_END])
    if truth["ends_search"]:
        raise SearchError(truth["error"])
    if truth["error"]:
        return Outcome(number, error=truth["error"], details=truth["details"], retries=retries)
    try:
        record = Record.from_dict(truth["record"])
    except (KeyError, TypeError) as problem:
        error = f"a record must be whole, but reading it gave {type(problem).__name__}: {problem}"
        return Outcome(number, error=error, details=result[_END], retries=retries)
    if not record.measurement.is_finite():
        error = f"all measured values must be finite, but got {record.measurement.to_dict()}"
        return Outcome(number, error=error, retries=retries)
    return Outcome(number, record, retries=retries)


def artifact_of(result: Mapping[str, Any]) -> Cargo | None:
    """The artifact on its way with a result."""
    return result.get(_ARTIFACT)
