"""Committed reference runs stay readable: by `show`, and by `report`, which they have no study for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from paretune.search.front_json import read_front
from paretune.search.job import load_job
from paretune.search.report import write_report
from paretune.search.run import refresh_trials
from paretune.spaces.plan import CompressionPlan

RUNS = sorted(path.parent for path in (Path(__file__).parents[2] / "results" / "reference").glob("*/front.json"))
EACH = pytest.mark.parametrize("run", [pytest.param(run, id=run.name) for run in RUNS])


def test_there_is_a_reference_run() -> None:
    assert [run.name for run in RUNS] == ["fashion-resnet"]


@EACH
def test_its_front_is_verified(run: Path) -> None:
    front = read_front(run)
    assert front["verified"]
    assert len(front["points"]) >= 4
    for point in front["points"]:
        assert CompressionPlan.model_validate(point["plan"]).hash == point["plan_hash"]
        for split in ("validation", "test"):
            measured = point[split]
            assert measured["latency_low_ms"] <= measured["latency_ms"] <= measured["latency_high_ms"]
            assert 0 < measured["accuracy"] <= 1


@EACH
def test_its_report_can_be_written_anew(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / run.name
    shutil.copytree(run, folder)
    before = (folder / "trials.csv").read_text()
    refresh_trials(folder)
    assert (folder / "trials.csv").read_text() == before
    assert not (folder / "study.db").exists()
    report = write_report(folder).read_text()
    assert all(f"trial {point['trial']}" in report for point in read_front(folder)["points"])


@EACH
def test_its_job_can_be_read(run: Path) -> None:
    job = load_job(run)
    assert job.name == run.name
    assert job.search.trials is not None
    assert job.search.trials >= 60
