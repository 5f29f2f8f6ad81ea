"""What a run writes for others: `front.json`, field by field, and `trials.csv`."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paretune.errors import JobError
from paretune.objectives.artifact import Card, Deployed, write_card
from paretune.objectives.compress.schemes import STATIC
from paretune.objectives.measurement import Measurement
from paretune.objectives.progress import Stopped
from paretune.objectives.runtimes import Target
from paretune.objectives.verify import Verified
from paretune.search.front_json import SCHEMA, read_front
from paretune.search.job_types import Constraint
from paretune.search.problem import BASELINE
from paretune.search.results import write_front, write_trials
from paretune.search.samplers import SAMPLERS
from paretune.search.study import SearchStudy, study_url
from paretune.spaces.plan import CompressionPlan
from paretune.spaces.space import SearchSpace
from tests.records import measurement, record, stopped

SPACE = SearchSpace(grids={"stem": [8, 16, 32]}, widths={"stem": (32, 8), "head": (32, 8)})
TARGET = Target(runtime="openvino", device="cpu", batch_size=8, threads=1)
METRICS = {"accuracy", "latency_ms", "latency_low_ms", "latency_high_ms", "speedup", "size_bytes", "params", "macs"}


def new_study(run: Path, *, objectives: tuple[str, ...] = ("accuracy", "latency_ms"), bound: str = "") -> SearchStudy:
    """A study beside a baseline of 4 ms."""
    metrics = {"validation": measurement(0.95, 4.0).to_dict()}
    deployed = Deployed(TARGET, "model.onnx", 32, "f32", {})
    card = Card(deployed, {}, STATIC, metrics, {}, CompressionPlan().hash, {})
    (run / BASELINE).mkdir(parents=True)
    write_card(run / BASELINE, card)
    constraints = [Constraint.model_validate(bound)] if bound else []
    sampler = SAMPLERS["uniform"](SPACE, 0)
    return SearchStudy("small", study_url(run), SPACE, sampler, objectives=objectives, constraints=constraints)


def tell(study: SearchStudy, *measurements: Measurement | Stopped | str) -> None:
    """Run trials: each gives a measurement, or is stopped, or fails with the text."""
    for found in measurements:
        number = study.propose().number
        if isinstance(found, str):
            study.fail(number, found)
        elif isinstance(found, Stopped):
            study.stop(number, found)
        else:
            study.complete(number, record(found))


def verified(run: Path, number: int, validation: Measurement, *, folder: str = "artifact") -> Verified:
    test = replace(validation, on={"": replace(validation.main, accuracy=validation.main.accuracy - 0.01)})
    return Verified(run / "trials" / str(number) / folder, validation, test)


def load(run: Path) -> dict[str, Any]:
    return json.loads((run / "front.json").read_text())


def test_the_front_of_a_running_search(tmp_path: Path) -> None:
    run = tmp_path / "small"
    study = new_study(run)
    tell(study, measurement(0.95, 4.0), measurement(0.9, 1.0), "a reason", measurement(0.8, 2.0))
    write_front(run, study, "accuracy")
    front = load(run)
    keys = {"schema", "run", "verified", "target", "targets", "metric", "objectives", "baseline", "points"}
    assert front.keys() == keys
    assert (front["schema"], front["run"], front["verified"], front["metric"]) == (1, "small", False, "accuracy")
    assert front["target"] == {"runtime": "openvino", "device": "cpu", "batch_size": 8, "threads": 1, "options": {}}
    assert front["targets"] == {}
    assert front["objectives"] == [
        {"name": "accuracy", "direction": "maximize"},
        {"name": "latency_ms", "direction": "minimize"},
    ]
    assert front["baseline"] == {"format": "f32", "validation": measurement(0.95, 4.0).to_dict()}
    assert front["baseline"]["validation"].keys() == METRICS
    assert [point["trial"] for point in front["points"]] == [1, 0]
    point = front["points"][0]
    assert point.keys() == {"trial", "plan", "plan_hash", "artifact", "validation"}
    assert point["validation"] == measurement(0.9, 1.0).to_dict()
    assert point["artifact"] == "trials/1/artifact"
    plan = CompressionPlan.model_validate(point["plan"])
    assert (plan, plan.hash) == (SPACE.sweep(1), point["plan_hash"])


def test_the_verified_front(tmp_path: Path) -> None:
    run = tmp_path / "small"
    study = new_study(run)
    tell(study, measurement(0.95, 4.0), measurement(0.9, 1.0), measurement(0.92, 2.0))
    # Measured again, trial 2 is no better than trial 1, which was trained longer in the meantime.
    found = {
        0: verified(run, 0, measurement(0.95, 4.1)),
        1: verified(run, 1, measurement(0.93, 1.1), folder="verified"),
        2: verified(run, 2, measurement(0.92, 2.0)),
    }
    write_front(run, study, "accuracy", found)
    front = load(run)
    assert front["verified"] is True
    assert [point["trial"] for point in front["points"]] == [1, 0]
    for point in front["points"]:
        expected = found[point["trial"]]
        assert point.keys() == {"trial", "plan", "plan_hash", "artifact", "validation", "test"}
        assert point["validation"] == expected.validation.to_dict()
        assert point["test"] == expected.test.to_dict()
        assert point["artifact"] == str(expected.folder.relative_to(run))
        assert point["validation"].keys() == point["test"].keys() == METRICS


def test_the_test_split_decides_nothing(tmp_path: Path) -> None:
    run = tmp_path / "small"
    study = new_study(run, bound="accuracy >= 0.8")
    tell(study, measurement(0.9, 2.0), measurement(0.85, 1.0))
    found = {n: verified(run, n, row.measurement) for n, row in enumerate(study.rows())}
    found[1] = replace(found[1], test=measurement(0.1, 9.0))
    write_front(run, study, "accuracy", found)
    assert [point["trial"] for point in load(run)["points"]] == [1, 0]


def test_infeasible_points_stay_out(tmp_path: Path) -> None:
    run = tmp_path / "small"
    study = new_study(run, bound="accuracy >= 0.85")
    tell(study, measurement(0.95, 4.0), measurement(0.9, 2.0), measurement(0.8, 1.0))
    assert [row.number for row in study.front()] == [1, 0]
    write_front(run, study, "accuracy")
    assert [point["trial"] for point in load(run)["points"]] == [1, 0]
    found = {0: verified(run, 0, measurement(0.95, 4.0)), 1: verified(run, 1, measurement(0.84, 2.0))}
    write_front(run, study, "accuracy", found)
    assert [point["trial"] for point in load(run)["points"]] == [0]


def test_stopped_trials_are_never_on_the_front(tmp_path: Path) -> None:
    run = tmp_path / "small"
    study = new_study(run)
    tell(study, measurement(0.9, 2.0), stopped(0.99, 0.99, latency=0.5, size=1), measurement(0.95, 4.0))
    assert [row.number for row in study.front()] == [0, 2]
    write_front(run, study, "accuracy")
    assert [point["trial"] for point in load(run)["points"]] == [0, 2]


def test_stopped_trials_in_the_table(tmp_path: Path) -> None:
    run = tmp_path / "small"
    study = new_study(run)
    tell(study, measurement(0.9, 2.0), stopped(0.5, 0.6125, latency=3.0), stopped())
    study.complete(study.propose().number, record(measurement(0.8, 1.0), rungs=stopped(0.5).rungs))
    write_trials(run, study.rows())
    with (run / "trials.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == ["COMPLETE", "PRUNED", "PRUNED", "COMPLETE"]
    assert [row["rungs"] for row in rows] == ["", "0.25:0.5 0.5:0.6125", "", "0.25:0.5"]
    assert [row["steps"] for row in rows] == ["40", "12", "12", "40"]
    expected = {"accuracy": "", "latency_ms": "3.0", "latency_low_ms": "", "latency_high_ms": "3.05", "speedup": ""}
    expected |= {"size_bytes": "900", "params": "200.0", "macs": "3000.0", "feasible": "", "error": ""}
    assert {name: rows[1][name] for name in expected} == expected


def test_other_objectives_and_metrics(tmp_path: Path) -> None:
    run = tmp_path / "small"
    study = new_study(run, objectives=("accuracy", "latency_ms", "size_bytes"))
    tell(study, measurement(0.9, 1.0, size=900), measurement(0.9, 2.0, size=500), measurement(0.8, 3.0, size=700))
    write_front(run, study, "r2")
    front = load(run)
    assert front["metric"] == "r2"
    assert front["objectives"][2] == {"name": "size_bytes", "direction": "minimize"}
    assert [point["trial"] for point in front["points"]] == [0, 1]


def test_trials_as_a_table(tmp_path: Path) -> None:
    run = tmp_path / "small"
    study = new_study(run, bound="accuracy >= 0.85")
    study.enqueue(SPACE.sweep(0), "dense")
    reason = 'layer "stem",\nsecond line'
    tell(study, measurement(0.95, 4.0), measurement(0.8, 1.0), reason)
    study.propose()
    study.enqueue(SPACE.sweep(1), "uniform")
    write_trials(run, study.rows())
    with (run / "trials.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    fixed = ["trial", "state", "source", "accuracy", "latency_ms", "latency_low_ms", "latency_high_ms", "speedup"]
    fixed += ["size_bytes", "params", "macs", "feasible", "noisy", "rungs", "steps", "seconds", "started"]
    fixed += ["plan_hash", "error"]
    assert reader.fieldnames == [*fixed, *sorted(SPACE.distributions())]
    assert [row["trial"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert [row["state"] for row in rows] == ["COMPLETE", "COMPLETE", "FAIL", "RUNNING", "WAITING"]
    assert [row["source"] for row in rows] == ["dense", "sampler", "sampler", "sampler", "uniform"]
    assert [row["feasible"] for row in rows] == ["true", "false", "", "", ""]
    assert [row["error"] for row in rows] == ["", "", reason, "", ""]
    assert [float(rows[0][name]) for name in fixed[3:11]] == list(measurement(0.95, 4.0).to_dict().values())
    assert [rows[2][name] for name in fixed[3:11]] == [""] * 8
    assert rows[0]["plan_hash"] == SPACE.sweep(0).hash
    assert float(rows[0]["prune/stem"]) == 0
    assert rows[0]["bits/stem"] == "32"
    assert [bool(row["started"]) for row in rows] == [True, True, True, True, False]
    assert [bool(row["seconds"]) for row in rows] == [True, True, True, False, False]


def test_files_are_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tmp_path / "small"
    study = new_study(run)
    tell(study, measurement(0.95, 4.0))
    write_front(run, study, "accuracy")
    write_trials(run, study.rows())
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.suffix in (".json", ".csv")}
    tell(study, measurement(0.9, 1.0))

    def killed(self: Path, target: Path) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            write_front(run, study, "accuracy")
        with pytest.raises(KeyboardInterrupt):
            write_trials(run, study.rows())
    assert {name: (run / name).read_bytes() for name in before} == before

    write_front(run, study, "accuracy")
    write_trials(run, study.rows())
    assert len(load(run)["points"]) == 2
    assert not list(run.glob("*partial*"))


def test_read_front_gives_what_was_written(tmp_path: Path) -> None:
    run = tmp_path / "small"
    study = new_study(run)
    tell(study, measurement(0.95, 4.0))
    write_front(run, study, "accuracy")
    assert read_front(run) == load(run)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param(None, r"^run must be a folder with a front\.json", id="none"),
        pytest.param(json.dumps({"schema": SCHEMA + 1}), r"front\.json must have schema 1, but got 2", id="newer"),
        pytest.param("{}", r"front\.json must have schema 1, but got None", id="no schema"),
        pytest.param('{"schema": 1, "poi', r"front\.json must be JSON", id="torn"),
        pytest.param("[1]", r"front\.json must be a JSON object", id="no object"),
    ],
)
def test_fronts_that_cannot_be_read(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "front.json").write_text(text)
    with pytest.raises(JobError, match=message):
        read_front(tmp_path)


def test_the_run_is_named_after_its_folder_however_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "small"
    study = new_study(run)
    tell(study, measurement(0.95, 4.0))
    monkeypatch.chdir(run)
    write_front(Path(), study, "accuracy")
    assert load(run)["run"] == "small"
