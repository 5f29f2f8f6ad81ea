"""Exporting a model of the front: a folder with a program that runs it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from paretune.errors import JobError, ParetuneError
from paretune.objectives.artifact import Card, verify_files
from paretune.objectives.checkpoint import CHECKPOINT
from paretune.objectives.environment import environment
from paretune.search.front import knee
from paretune.search.front_json import read_front

Point = Mapping[str, Any]

_STANDALONE = ("openvino", "onnxruntime")
"""Runtimes whose exported models run without paretune."""


def pick(
    run: Path,
    *,
    trial: int | None = None,
    max_latency_ms: float | None = None,
    min_accuracy: float | None = None,
    at_knee: bool = False,
) -> Point:
    """Choose a point of a run's front by exactly one rule, on the validation split.

    Args:
        run: The run folder.
        trial: That trial; it needn't be on the front.
        max_latency_ms: The most accurate point that is at most so slow.
        min_accuracy: The fastest point that is at least so accurate.
        at_knee: The front's knee.

    Raises:
        JobError: No rule, several, or no point that fits.
    """
    if sum((trial is not None, max_latency_ms is not None, min_accuracy is not None, at_knee)) != 1:
        raise JobError(
            "export",
            "needs exactly one rule",
            "none or several",
            "use --trial, --max-latency-ms, --min-accuracy or --knee",
        )
    points: Sequence[Point] = read_front(run)["points"]
    if trial is not None:
        return _trial(run, points, trial)
    if not points:
        raise JobError("export", "needs a front with points", "an empty one", "search longer or loosen the constraints")
    if at_knee:
        return points[knee(points)]
    if max_latency_ms is not None:
        fitting = [point for point in points if point["validation"]["latency_ms"] <= max_latency_ms]
        if not fitting:
            fastest = min(point["validation"]["latency_ms"] for point in points)
            raise JobError(
                "--max-latency-ms", f"must be at least {fastest:.4g}, the fastest point", max_latency_ms, "raise it"
            )
        return max(fitting, key=lambda point: point["validation"]["accuracy"])
    fitting = [point for point in points if point["validation"]["accuracy"] >= (min_accuracy or 0.0)]
    if not fitting:
        best = max(point["validation"]["accuracy"] for point in points)
        raise JobError(
            "--min-accuracy", f"must be at most {best:.4g}, the most accurate point", min_accuracy, "lower it"
        )
    return min(fitting, key=lambda point: point["validation"]["latency_ms"])


def export(run: Path, point: Point, destination: Path) -> str:
    """Copy a point's artifact, add a program that runs it on the first target, and have that program check it.

    Args:
        run: The run folder.
        point: From `pick`.
        destination: A folder that doesn't exist yet.

    Returns:
        What the check said.

    Raises:
        JobError: The destination exists.
        ParetuneError: The artifact was changed since it was measured, or doesn't answer as recorded; nothing is left.
    """
    if destination.exists():
        raise JobError("--output", "must be a folder that doesn't exist yet", destination, "choose another one")
    artifact = run / point["artifact"]
    verify_files(artifact)
    destination.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=destination.parent, prefix=".exporting-") as made:
        folder = Path(made) / "model"
        shutil.copytree(artifact, folder, ignore=shutil.ignore_patterns(CHECKPOINT))
        card = Card.read(folder)
        name = "run_artifact.py" if card.main.target.runtime in _STANDALONE else "run_with_paretune.py"
        program = files("paretune.search") / "templates" / name
        (folder / "run.py").write_text(program.read_text())
        # Where the artifact was measured it must answer bit for bit. Other processors may round otherwise, and so may
        # kernels that are chosen anew at each load.
        target = card.main.target
        same = card.environment["processor"] == environment()["processor"] and target.device == "cpu"
        exactly = same and target.runtime in _STANDALONE
        command = [sys.executable, "run.py", *(["--exactly"] if exactly else [])]
        # A program of its own, outside this process: as it will run where it is deployed.
        checked = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if checked.returncode != 0:
            said = (checked.stdout + checked.stderr).strip()
            raise ParetuneError(
                f"an exported model must answer as its card says, but it said {said!r}; evaluate it anew"
            )
        verify_files(folder)
        folder.rename(destination)
    return checked.stdout.strip()


def _trial(run: Path, points: Sequence[Point], trial: int) -> Point:
    for point in points:
        if point["trial"] == trial:
            return point
    artifact = Path("trials") / str(trial) / "artifact"
    if not (run / artifact / "card.json").is_file():
        raise JobError("--trial", "must be a trial with an artifact", trial, f"choose one of {run / 'trials'}")
    return {"trial": trial, "artifact": str(artifact)}
