"""Gauges: real ones, in actors of a real Ray on this machine."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from paretune.errors import JobError, SearchError, TrialError
from paretune.objectives.artifact import Card, verify_files
from paretune.objectives.baseline import Baseline
from paretune.objectives.environment import environment
from paretune.objectives.measurement import Record
from paretune.objectives.problem import Problem
from paretune.search.cluster import gauges as gauges_module
from paretune.search.cluster.equipment import Equipment
from paretune.search.cluster.gauge import Gauge, Station
from paretune.search.cluster.gauges import DisownedError, GaugeError, Gauges
from paretune.search.cluster.parcels import own_storage
from paretune.search.job import Job
from paretune.search.problem import BASELINE
from paretune.spaces.plan import CompressionPlan, Pruning

pytestmark = pytest.mark.ray


def sizes(station: Station, folder: Path, report: Callable[[str], None]) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.rglob("*")}


def die(station: Station, folder: Path, report: Callable[[str], None], *, marks: Path, times: int) -> str:
    """Kill this process as a crashing runtime would, so many times in all."""
    if len(list(marks.iterdir())) < times:
        (marks / str(os.getpid())).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def fail(station: Station, folder: Path, report: Callable[[str], None], *, error: Exception) -> None:
    raise error


def hang(station: Station, folder: Path, report: Callable[[str], None]) -> None:
    time.sleep(60)


def note(job: Job, problem: Problem, folder: Path, *, report: Callable[[str], None]) -> list[str]:
    found = sorted(path.name for path in folder.iterdir())
    report(f"noting {job.name}")
    (folder / "deep").mkdir()
    (folder / "deep" / "notes").write_text(problem.task.metric_name)
    report("noted")
    return found


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    folder = tmp_path / "marks"
    folder.mkdir()
    return folder


@pytest.fixture
def artifact(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "model.onnx").write_bytes(bytes(1000))
    return {"model.onnx": tmp_path / "model.onnx"}


def test_says_what_and_where_it_is(gauges: Gauges) -> None:
    assert gauges.environment["processor"] == environment()["processor"]
    assert gauges.environment["threads"] == 1
    assert 32 in gauges.capabilities[""].float_bits


def test_takes_files_along(gauges: Gauges, artifact: dict[str, Path]) -> None:
    assert gauges.measure(sizes, artifact) == {"model.onnx": 1000}


def test_takes_files_through_a_storage(gauges: Gauges, artifact: dict[str, Path], tmp_path: Path) -> None:
    with own_storage(str(tmp_path / "share"), tmp_path / "run") as storage:
        assert replace(gauges, storage=storage).measure(sizes, artifact) == {"model.onnx": 1000}
        assert list(Path(str(storage)).iterdir()) == []


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (JobError("task", "must be one", open, "write one"), JobError, "task must be one, but got <built-in"),
        (TrialError("no kernel"), TrialError, "no kernel"),
        (SearchError("no disk"), SearchError, "no disk"),
        (ValueError("axis"), TrialError, "ValueError: axis"),
    ],
    ids=["job", "trial", "search", "a runtime's own"],
)
def test_errors_come_as_themselves(gauges: Gauges, error: Exception, kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as found:
        gauges.measure(partial(fail, error=error), {})
    assert type(found.value) is kind
    assert str(found.value).startswith(text)
    assert isinstance(found.value.__cause__, GaugeError)
    assert "in fail" in str(found.value.__cause__)


def test_begins_again_when_it_was_killed(gauges: Gauges, marks: Path) -> None:
    assert gauges.measure(partial(die, marks=marks, times=1), {}) == "alive"
    assert len(list(marks.iterdir())) == 1


def test_what_kills_it_twice_fails(gauges: Gauges, marks: Path) -> None:
    with pytest.raises(TrialError, match="must not end the process that measures it, but that died 2 times"):
        gauges.measure(partial(die, marks=marks, times=9), {})
    assert len(list(marks.iterdir())) == 2
    assert gauges.measure(sizes, {}) == {}


def test_what_hangs_is_ended_by_the_gauge_itself(gauges: Gauges) -> None:
    with pytest.raises(TrialError, match=r"a measurement must end within 0\.5 s"):
        replace(gauges, limit=0.5).measure(hang, {})
    assert gauges.measure(sizes, {}) == {}


def test_refuses_other_hardware(gauges: Gauges) -> None:
    moved = replace(gauges, hardware=gauges.hardware | {"processor": "Intel N100"})
    with pytest.raises(SearchError, match=rf"on {gauges.environment['node']} processor is .*, not Intel N100"):
        moved.measure(sizes, {})


def test_waits_so_long_for_one_that_is_gone(gauges: Gauges) -> None:
    gone = ray.remote(Gauge).options(num_cpus=0).remote(b"", (), 1)
    ray.kill(gone)
    lost = replace(gauges, handles=(gone,), patience=1.0)
    with pytest.raises(SearchError, match=r"every finished trial is kept: start the node .* `paretune resume`"):
        lost.measure(sizes, {})
    assert replace(lost, handles=(gone, *gauges.handles), patience=60.0).measure(sizes, {}) == {}


def test_waits_for_a_measuring_node_and_says_so(gauges: Gauges, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauges_module, "_SILENT_SECONDS", 0.5)
    cpus = int(ray.cluster_resources()["CPU"])
    holder = ray.remote(lambda: time.sleep(4)).options(num_cpus=cpus).remote()
    lines, made = list[str](), list[Any]()
    options = ray.remote(Gauge).options(num_cpus=cpus)
    (gauge,) = gauges_module._started(lambda: options.remote(b"", (), 1), job, made, lines.append)
    assert len(lines) == 1
    assert "waiting for the measuring nodes" in lines[0]
    ray.get(holder)
    ray.kill(gauge)


def test_where_each_one_dies_it_gives_up(gauges: Gauges, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stillborn:
        def __init__(self) -> None:
            raise ValueError("no")

    monkeypatch.setattr(gauges_module, "_PAUSE", 0.0)
    made = list[Any]()
    with pytest.raises(DisownedError, match="must start on each measuring node, but 10 died"):
        gauges_module._started(lambda: ray.remote(Stillborn).options(num_cpus=0).remote(), job, made, print)
    assert len(made) == 10


def test_fills_a_run_folder_there(gauges: Gauges, measured: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(measured, run)
    lines: list[str] = []
    found = gauges.fill(note, run, lines.append)
    assert lines == ["noting tiny", "noted"]
    assert found == ["analysis.json", BASELINE, "techniques.json"]
    assert (run / "deep" / "notes").read_text() == "accuracy"
    assert (run / "job.yaml").is_file()


@pytest.fixture(scope="module")
def equipment(gauges: Gauges, job: Job, measured: Path) -> Equipment:
    return Equipment.of(job, measured, gauges)


def test_a_trainer_measures_there(equipment: Equipment, tmp_path: Path) -> None:
    """In this process, which holds the lock of the device on which the gauge must be alone."""
    threads = torch.get_num_threads()
    evaluator = equipment.open()
    folder = tmp_path / "artifact"
    record = evaluator.evaluate(CompressionPlan(prune=Pruning(ratio=0.5)), folder, seed=0)
    torch.set_num_threads(threads)
    assert isinstance(record, Record)
    assert record.measurement.is_finite()
    assert record.seconds["wait"] > 0
    assert record.seconds["measure"] > 0
    assert record.deployments[""].executed
    verify_files(folder)
    equipment.carry_in(equipment.carry_out(folder), tmp_path / "home")
    assert Card.read(tmp_path / "home") == Card.read(folder)


def test_verifies_there(equipment: Equipment, measured: Path, tmp_path: Path) -> None:
    folder = tmp_path / BASELINE
    shutil.copytree(measured / BASELINE, folder)
    (found,) = equipment.gauges.verify([folder], rounds=2, deadline=60.0)
    assert found.folder == folder
    assert found.test.is_finite()
    assert json.loads(json.dumps(found.test.to_dict())) == Baseline(folder).card.metrics["test"]
