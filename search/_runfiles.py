"""The files of a run folder as values, and how values are written for people."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paretune.errors import JobError

UNKNOWN = "\u2013"


def number(record: Mapping[str, Any] | None, key: str) -> float | None:
    """The finite number under `key`, or None where there isn't one."""
    try:
        value = float((record or {}).get(key, ""))
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


@dataclass(frozen=True)
class Scale:
    """How the metric is written: the accuracy in percent, any other metric as it is."""

    name: str

    @property
    def factor(self) -> float:
        return 100.0 if self.name == "accuracy" else 1.0

    @property
    def axis(self) -> str:
        return "accuracy (%)" if self.name == "accuracy" else self.name

    @property
    def unit(self) -> str:
        return "points" if self.name == "accuracy" else self.name

    def show(self, value: float | None) -> str:
        if value is None:
            return UNKNOWN
        return f"{value:.2%}".replace("%", "\u202f%") if self.name == "accuracy" else f"{value:.4g}"

    def difference(self, value: float) -> str:
        return f"{value * 100:.2f}" if self.name == "accuracy" else f"{value:.4g}"


@dataclass(frozen=True)
class RunFiles:
    """What the files of a run folder say; whatever is missing is empty."""

    path: Path
    front: dict[str, Any]
    trials: list[dict[str, str]]
    analysis: dict[str, Any]
    techniques: list[dict[str, Any]]
    environment: dict[str, Any]
    job: str

    @property
    def name(self) -> str:
        return str(self.front.get("run") or self.path.resolve().name)

    @property
    def baseline(self) -> dict[str, Any]:
        return self.front.get("baseline") or {}

    @property
    def points(self) -> list[dict[str, Any]]:
        """The points of the front, fastest first."""
        points = self.front.get("points") or []
        return sorted(points, key=lambda point: number(point["validation"], "latency_ms") or 0.0)

    @property
    def targets(self) -> dict[str, dict[str, Any]]:
        """The targets beside the main one, by name."""
        return self.front.get("targets") or {}

    @property
    def further_objectives(self) -> list[str]:
        """The objectives that no column of their own shows anyway: throughput, memory, energy."""
        shown = ("accuracy", "latency_ms", "size_bytes", "params", "macs")
        names = [str(objective.get("name")) for objective in self.front.get("objectives") or []]
        return [name for name in names if name not in shown and not name.startswith("latency_ms@")]

    @property
    def verified(self) -> bool:
        """Whether the baseline and every point of the front were measured on the test split."""
        tested = all(point.get("test") for point in self.points) and bool(self.baseline.get("test"))
        return bool(self.front.get("verified")) and tested

    @property
    def scale(self) -> Scale:
        return Scale(str(self.front.get("metric") or "accuracy"))

    @property
    def states(self) -> Counter[str]:
        return Counter(trial.get("state") or "" for trial in self.trials)

    @property
    def counts(self) -> str:
        """How many trials there are, and how they ended."""
        states = self.states
        names = {"COMPLETE": "complete", "PRUNED": "stopped early", "FAIL": "failed"}
        names |= {"RUNNING": "running", "WAITING": "waiting"}
        complete = [trial for trial in self.trials if trial.get("state") == "COMPLETE"]
        if infeasible := sum(trial.get("feasible", "").lower() == "false" for trial in complete):
            names["COMPLETE"] += f" ({infeasible} of them infeasible)"
        parts = [f"{states[state]} {name}" for state, name in names.items() if states[state]]
        return f"{plural(len(self.trials), 'trial')}: {', '.join(parts)}" if parts else "no trials yet"

    @property
    def saved(self) -> str:
        """What early stopping left out, in a sentence; empty where no trial was stopped, or no other is complete."""
        steps = {
            state: [number(trial, "steps") or 0.0 for trial in self.trials if trial.get("state") == state]
            for state in ("COMPLETE", "PRUNED")
        }
        # At a plateau of the loss, or from a checkpoint, a training is shorter than the schedule.
        whole = max(steps["COMPLETE"], default=0.0)
        if not whole or not steps["PRUNED"]:
            return ""
        left_out = sum(max(0.0, whole - run) for run in steps["PRUNED"])
        share = left_out / (whole * sum(map(len, steps.values())))
        count = len(steps["PRUNED"])
        were = "was" if count == 1 else "were"
        return (
            f"{plural(count, 'trial')} {were} stopped early, out of reach of the front: that saved "
            f"{left_out:,.0f} training steps, {share:.0%} of what all trials would have taken."
        )

    @property
    def shown_path(self) -> str:
        """The run folder as a user would type it: an absolute path says nothing on another machine."""
        here = Path.cwd()
        path = self.path.relative_to(here) if self.path.is_relative_to(here) else self.path
        return shlex.quote(str(path))

    def executed(self, trial: object) -> dict[str, int]:
        """Layer to the width in which it ran in a trial, on the main target; empty where that isn't recorded."""
        path = self.path / "trials" / str(trial) / "record.json"
        try:
            return dict(json.loads(path.read_text())["deployments"][""]["executed"])
        except (OSError, ValueError, KeyError, TypeError):  # a report is made of whatever there is
            return {}

    def picks(self) -> dict[int, list[str]]:
        """Trial number to what it is picked for, chosen by validation: the test split must not choose."""
        points = self.front.get("points") or []
        if not points:
            return {}
        from paretune.search.front import knee

        def speed(index: int) -> tuple[float, float]:
            latency, accuracy = (number(points[index]["validation"], key) for key in ("latency_ms", "accuracy"))
            return math.inf if latency is None else latency, math.inf if accuracy is None else -accuracy

        chosen = {
            "fastest": min(range(len(points)), key=speed),
            "knee": knee(points),
            "most accurate": min(range(len(points)), key=lambda index: speed(index)[::-1]),
        }
        picks: dict[int, list[str]] = {}
        for name, index in chosen.items():
            picks.setdefault(int(points[index]["trial"]), []).append(name)
        return picks


def last_rung(trial: Mapping[str, str]) -> tuple[float, float] | None:
    """Share of the training and accuracy at the last rung in a row of `trials.csv`; None without any."""
    share, _, accuracy = (trial.get("rungs") or "").rpartition(" ")[2].partition(":")
    try:
        return float(share), float(accuracy)
    except ValueError:
        return None


def load_run(run: Path) -> RunFiles:
    """Read a run folder.

    Raises:
        JobError: A JSON file of the run isn't a JSON object.
    """

    def text(name: str) -> str:
        path = run / name
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def mapping(name: str) -> dict[str, Any]:
        try:
            value = json.loads(text(name) or "{}")
        except ValueError as error:
            raise JobError(name, "must be JSON", error, "restore it or remove it") from error
        if not isinstance(value, dict):
            raise JobError(name, "must be a JSON object", type(value).__name__, "restore it or remove it")
        return value

    # Records are told apart by csv itself: an error text may hold line breaks.
    rows = csv.DictReader(io.StringIO(text("trials.csv"), newline=""))
    trials = [{key: value or "" for key, value in row.items() if key} for row in rows]
    return RunFiles(
        run,
        mapping("front.json"),
        trials,
        mapping("analysis.json"),
        mapping("techniques.json").get("tried", []),
        mapping("environment.json"),
        text("job.yaml"),
    )


def redacted(text: object) -> str:
    """Reports are passed around; the password of a storage URL must not be."""
    return re.sub(r"(://[^\s:/@]*:)[^\s/@]+@", r"\1***@", str(text))


def flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested mappings as dotted keys with their values as text."""
    for key, item in value.items():
        if isinstance(item, Mapping):
            yield from flat(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", ", ".join(map(str, item)) if isinstance(item, list) else str(item)


def amount(value: float | None, unit: str = "") -> str:
    """A count or a size in steps of 1000, with three digits."""
    if value is None:
        return UNKNOWN
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}\u202f{letter}{unit}"
    return f"{value:.0f}\u202f{unit}".rstrip("\u202f")


def milliseconds(metrics: Mapping[str, Any] | None, target: str = "") -> str:
    """The median latency on a target with three digits and, where known, its interval."""
    suffix = f"@{target}" if target else ""
    keys = ("latency_ms", "latency_low_ms", "latency_high_ms")
    median, low, high = (number(metrics, f"{key}{suffix}") for key in keys)
    if median is None:
        return UNKNOWN
    digits = max(0, 2 - math.floor(math.log10(median))) if median > 0 else 2
    interval = "" if low is None or high is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{median:.{digits}f}{interval}"


def describe_target(target: Mapping[str, Any] | None) -> str:
    """The target of a front.json in words."""
    if not target:
        return ""
    threads = target.get("threads")
    text = f"{target.get('runtime')} on {target.get('device')}, batch size {target.get('batch_size')}"
    text += f", {threads} thread{'' if threads == 1 else 's'}" if threads else ""
    return text + "".join(f", {key} {value}" for key, value in (target.get("options") or {}).items())


def plural(count: int, noun: str) -> str:
    """`count` with its noun, in the right number."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
