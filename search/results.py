"""What a run writes for others to read: `front.json` and `trials.csv`."""

from __future__ import annotations

import csv
import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from paretune.objectives.artifact import PLAN
from paretune.objectives.baseline import Baseline
from paretune.objectives.verify import Verified
from paretune.search.front import feasible, pareto_front
from paretune.search.front_json import SCHEMA
from paretune.search.job_types import direction
from paretune.search.problem import BASELINE
from paretune.search.study import SearchStudy, TrialRow
from paretune.spaces.plan import CompressionPlan

_METRICS = (
    "accuracy",
    "latency_ms",
    "latency_low_ms",
    "latency_high_ms",
    "speedup",
    "size_bytes",
    "params",
    "macs",
)


def front_of(rows: Sequence[TrialRow], objectives: Sequence[str], *, without: Container[int] = ()) -> list[TrialRow]:
    """Feasible trials that no other one beats on validation, fastest first.

    Args:
        rows: The trials.
        objectives: Of the study.
        without: Numbers of trials to leave out; what is left has a front of its own.
    """
    feasible_rows = [row for row in rows if row.feasible and row.number not in without]
    front = pareto_front([row.measurement.to_dict() for row in feasible_rows], objectives)
    return [feasible_rows[i] for i in front]


def write_front(run: Path, study: SearchStudy, metric: str, verified: Mapping[int, Verified] | None = None) -> None:
    """Write `front.json`, in one step, so that a reader never sees half of it.

    Args:
        run: The run folder.
        study: The trials.
        metric: What the task calls its accuracy.
        verified: Trial number to its verification. Once given, the front is made of these trials alone, judged by
            their verified values on the validation split. The test split is reported and decides nothing.
    """
    if verified is None:
        points = [_point(run, row, run / "trials" / str(row.number) / "artifact") for row in study.front()]
    else:
        rows = {row.number: row for row in study.rows()}
        good = {n: v for n, v in verified.items() if feasible(v.validation.to_dict(), study.constraints)}
        order = list(good)
        front = pareto_front([good[n].validation.to_dict() for n in order], study.objectives)
        points = [
            _point(run, rows[order[i]], good[order[i]].folder)
            | {"validation": good[order[i]].validation.to_dict(), "test": good[order[i]].test.to_dict()}
            | ({"throttled": good[order[i]].throttled} if good[order[i]].throttled else {})
            for i in front
        ]
    baseline = Baseline(run / BASELINE)
    data = {
        "schema": SCHEMA,
        "run": run.resolve().name,  # `.` has no name
        "verified": verified is not None,
        "target": baseline.card.main.to_dict()["target"],
        "targets": {name: deployed.to_dict()["target"] for name, deployed in baseline.card.others.items()},
        "metric": metric,
        "objectives": [{"name": name, "direction": direction(name)} for name in study.objectives],
        "baseline": baseline.to_dict(),
        "points": points,
    }
    _replace(run / "front.json", json.dumps(data, indent=2) + "\n")


def _point(run: Path, row: TrialRow, artifact: Path) -> dict[str, Any]:
    assert row.plan is not None
    # The artifact's plan says what a global ratio or threshold came to.
    path = artifact / PLAN
    plan = CompressionPlan.from_json(path.read_text()) if path.is_file() else row.plan
    return {
        "trial": row.number,
        "plan": plan.to_dict(),
        "plan_hash": plan.hash,
        "artifact": str(artifact.relative_to(run)),
        "validation": row.measurement.to_dict(),
    }


def write_trials(run: Path, rows: Sequence[TrialRow]) -> None:
    """Write `trials.csv`: one line a trial, its metrics, then its parameters.

    A trial that was stopped early has what was known of it before its training; `rungs` says what it could do then, as
    ``share:accuracy`` in turn.
    """
    names = sorted({name for row in rows for name in row.trial.params})
    measured = dict.fromkeys(name for row in rows for name in _known(row))
    metrics_names = [*_METRICS, *(name for name in measured if name not in _METRICS)]
    header = ["trial", "state", "source", *metrics_names]
    header += ["feasible", "noisy", "rungs", "steps", "seconds", "started", "plan_hash", "error", *names]
    lines = []
    for row in rows:
        started = row.trial.datetime_start
        line = {
            "trial": row.number,
            "state": row.trial.state.name,
            "source": row.source,
            **_known(row),
            "feasible": str(row.feasible).lower() if row.record else "",
            "noisy": str(row.record.noisy).lower() if row.record else "",
            "rungs": " ".join(f"{rung.share:g}:{rung.accuracy:.6g}" for rung in row.rungs),
            "steps": row.steps,
            "seconds": "" if row.seconds is None else round(row.seconds, 3),
            "started": started.isoformat() if started else "",
            "plan_hash": row.plan.hash if row.plan else "",
            "error": row.error,
            **row.trial.params,
        }
        lines.append([line.get(name, "") for name in header])
    path = run / "trials.csv"
    partial = path.with_suffix(".csv.partial")
    with partial.open("w", newline="") as file:
        csv.writer(file).writerows([header, *lines])
    partial.replace(path)


def _known(row: TrialRow) -> Mapping[str, Any]:
    if row.stopped:
        return row.stopped.outline
    return row.measurement.to_dict() if row.record else {}


def _replace(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)
