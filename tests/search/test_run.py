"""Runs from end to end, with real workers: a whole one, wrong jobs, failing trials, kills, and going on."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import optuna
import pytest
import torch
import yaml
from torch import nn

from paretune.errors import JobError, SearchError
from paretune.objectives.artifact import verify_files
from paretune.objectives.baseline import Baseline
from paretune.objectives.data import Splits, load_splits
from paretune.search.export import export, pick
from paretune.search.front_json import read_front
from paretune.search.job import Job, load_job
from paretune.search.problem import BASELINE, load_problem
from paretune.search.profile import Profile, make_job_space
from paretune.search.results import write_front
from paretune.search.run import _enqueue, open_study, resume, run
from paretune.search.study import SearchStudy
from paretune.search.verify_front import verify_front
from paretune.spaces.plan import CompressionPlan
from paretune.spaces.space import SearchSpace
from tests.search.conftest import MODULE, NewRun, TinyJob

TRIALS = 6
PATIENCE_SECONDS = 120.0
"""Far more than some trials take, also on a busy machine."""


def trials_of(folder: Path) -> list[optuna.trial.FrozenTrial]:
    """The trials, as any user of Optuna opens them."""
    storage = f"sqlite:///{folder / 'study.db'}"
    return optuna.load_study(study_name=load_job(folder).name, storage=storage).trials


def states_of(folder: Path) -> list[str]:
    return [trial.state.name for trial in trials_of(folder)]


def table_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "trials.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file with its content's hash and the time of its last change."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in files
    }


def check_front(folder: Path) -> dict[str, Any]:
    """That a front is verified and its artifacts are whole."""
    front = read_front(folder)
    assert front["verified"] is True
    assert front["points"]
    assert front["baseline"].keys() == {"format", "validation", "test"}
    for point in front["points"]:
        assert point["validation"].keys() == point["test"].keys() == front["baseline"]["test"].keys()
        assert 0 <= point["test"]["accuracy"] <= 1
        artifact = folder / point["artifact"]
        verify_files(artifact)
        plan = CompressionPlan.from_json((artifact / "plan.json").read_text())
        assert plan.hash == point["plan_hash"]
        card = json.loads((artifact / "card.json").read_text())
        assert card["metrics"] == {"validation": point["validation"], "test": point["test"]}
    return front


@pytest.fixture(scope="module")
def finished(tiny: TinyJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run; copy it, don't change it."""
    results = tmp_path_factory.mktemp("results")
    lines: list[str] = []
    folder = run(tiny(results, "whole", verify={"points": 2, "rounds": 2}), report=lines.append)
    assert folder == results / "whole"
    assert len([line for line in lines if line.startswith("trial ") and "accuracy" in line]) == TRIALS
    assert not any("failed" in line for line in lines)
    assert "verifying 2 plans, the front and the next best: 2 trained on from their trials to 0.4 epochs" in lines
    assert lines[-1] == f"report: {folder / 'report.html'}"
    return folder


def test_a_run_folder_is_whole(finished: Path) -> None:
    names = {path.name for path in finished.iterdir() if not path.name.startswith(("study.db-", ".lock"))}
    assert names == {
        *(
            "job.yaml",
            "environment.json",
            "analysis.json",
            "techniques.json",
            "study.db",
            "baseline",
            "trials",
            "workers.log",
        ),
        *("front.json", "front.svg", "trials.csv", "report.html"),
    }
    assert [path.name for path in finished.parent.iterdir()] == ["whole"]
    assert load_job(finished).to_yaml() == (finished / "job.yaml").read_text()
    assert "torch" in (finished / "environment.json").read_text()
    assert {path.name for path in (finished / "trials").iterdir()} == set(map(str, range(TRIALS)))
    for trial in (finished / "trials").iterdir():
        assert {"plan.json", "record.json", "artifact"} <= {path.name for path in trial.iterdir()}
        verify_files(trial / "artifact")
    assert not list(finished.rglob("*.partial"))
    assert not list(finished.rglob(".unfinished*"))


def test_every_trial_is_told(finished: Path) -> None:
    trials = trials_of(finished)
    assert [trial.number for trial in trials] == list(range(TRIALS))
    assert {trial.state.name for trial in trials} == {"COMPLETE"}
    for trial in trials:
        folder = finished / "trials" / str(trial.number)
        record = json.loads((folder / "record.json").read_text())
        assert record["measurement"] == trial.user_attrs["record"]["measurement"]
        measured = record["measurement"]
        assert trial.values == [measured["accuracy"], measured["latency_ms"]]
        plan = CompressionPlan.from_json((folder / "plan.json").read_text())
        assert plan.to_dict() == trial.user_attrs["plan"]
        assert record["plan_hash"] == plan.hash
        assert {name.partition("/")[0] for name in trial.params} == {"prune", "bits", "distill", "finetune"}


def test_the_dense_model_comes_first_and_then_uniform_plans(finished: Path) -> None:
    trials = trials_of(finished)
    sources = [trial.user_attrs.get("source", "sampler") for trial in trials]
    assert sources == ["dense", "uniform", *["sampler"] * (TRIALS - 2)]
    dense, uniform = (CompressionPlan.model_validate(trial.user_attrs["plan"]) for trial in trials[:2])
    assert dense.prune.ratios == {}
    assert 8 not in dense.quantize.bits.values()
    assert len(set(uniform.quantize.bits.values())) == 1
    assert len({round(ratio, 6) for ratio in uniform.prune.ratios.values()}) <= 1
    assert uniform != dense


def test_variants_come_between_the_dense_model_and_uniform_plans(tiny: TinyJob, tmp_path: Path) -> None:
    layers: dict[str, Any] = {"grids": {"a": [8, 16]}, "widths": {"a": (32, 8)}}
    slim = SearchSpace(**layers, ranks={"a": 0.5}, sparse=("a",), shared=("a",))
    space = SearchSpace(**layers, variants={"slim": slim, "wide": slim})
    job = tiny(tmp_path, search={"trials": 20, "uniform_trials": 2})
    study = open_study(job, tmp_path, space)
    _enqueue(job, study, space)
    found = [study.propose() for _ in range(6)]
    assert [proposal.source for proposal in found] == ["dense", *["variant"] * 2, *["uniform"] * 2, "sampler"]
    plans = [proposal.plan for proposal in found]
    assert [plan.variant for plan in plans[:5]] == [None, "slim", "wide", None, None]
    assert plans[1] == space.uniform(variant="slim")
    assert len({plan.hash for plan in plans[:5]}) == 5
    _enqueue(job, study, space)
    assert study.propose().source == "sampler", "a resumed study has them already"


def test_the_sampler_that_knows_uniform_plans_is_given_none(tiny: TinyJob, tmp_path: Path) -> None:
    space = SearchSpace(grids={"a": [8, 16]}, widths={"a": (32, 8)})
    for search, sources in (
        ({"sampler": "front"}, ["dense", "sampler"]),
        ({"sampler": "front", "uniform_trials": 1}, ["dense", "uniform", "sampler"]),
    ):
        folder = tmp_path / str(len(sources))
        folder.mkdir()
        study = open_study(tiny(tmp_path), folder, space)  # of another sampler, which needs no profile
        _enqueue(tiny(tmp_path, search=search), study, space)
        assert [study.propose().source for _ in sources] == sources


def test_the_front_is_verified(finished: Path) -> None:
    front = check_front(finished)
    complete = {trial.number: trial.user_attrs["plan"] for trial in trials_of(finished)}
    for point in front["points"]:
        assert point["plan"] == complete[point["trial"]]


def test_the_report_lists_the_trials(finished: Path) -> None:
    assert [row["trial"] for row in table_of(finished)] == list(map(str, range(TRIALS)))
    html = (finished / "report.html").read_text()
    assert f"{TRIALS} trials: {TRIALS} complete" in html
    assert all(f"trial {number}" in html for number in range(TRIALS))
    for point in read_front(finished)["points"]:
        assert f"--trial {point['trial']}" in html


def test_the_same_name_again_changes_nothing(tiny: TinyJob, finished: Path) -> None:
    before = snapshot(finished)
    with pytest.raises(JobError, match=r"^name must name a run that doesn't exist yet.*paretune resume"):
        run(tiny(finished.parent, "whole"))
    assert snapshot(finished) == before


def test_a_finished_run_goes_on_to_its_front_alone(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "whole"
    shutil.copytree(finished, folder)
    job = yaml.safe_load((folder / "job.yaml").read_text())
    (folder / "job.yaml").write_text(yaml.safe_dump(job | {"verify": {"points": 1, "rounds": 1}}))
    (folder / "report.html").unlink()
    (folder / "front.json").write_text("{}")
    lines: list[str] = []
    assert resume(folder, report=lines.append) == folder
    assert not any(line.startswith("trial ") for line in lines)
    assert states_of(folder) == ["COMPLETE"] * TRIALS
    assert [trial.values for trial in trials_of(folder)] == [trial.values for trial in trials_of(finished)]
    check_front(folder)
    assert (folder / "report.html").is_file()


def test_a_finished_run_is_left_as_it_is(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "whole"
    shutil.copytree(finished, folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.onnx")} | {
        folder / "front.json": (folder / "front.json").stat().st_mtime_ns
    }
    lines: list[str] = []
    resume(folder, report=lines.append)
    assert lines == ["nothing is left to do: the budget is spent and the front is verified"]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_two_searches_of_one_run_are_refused(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "whole"
    shutil.copytree(finished, folder)
    with (folder / ".lock").open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(JobError, match=r"^run must not be searched by two at once"):
            resume(folder, report=lambda line: None)
    assert snapshot(folder).keys() >= snapshot(finished).keys()


def test_constraints_that_no_trial_keeps(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "whole"
    shutil.copytree(finished, folder)
    job = yaml.safe_load((folder / "job.yaml").read_text())
    (folder / "job.yaml").write_text(yaml.safe_dump(job | {"constraints": ["accuracy >= 1", "latency_ms <= 1e-6"]}))
    (folder / "front.json").unlink()  # or nothing would be left to do
    with pytest.raises(SearchError, match=rf"accuracy >= 1, latency_ms <= 1e-06, but none of {TRIALS} did"):
        resume(folder, report=lambda line: None)
    assert {row["feasible"] for row in table_of(folder)} == {"false"}


def test_constraints_that_no_verified_point_keeps(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "whole"
    shutil.copytree(finished, folder)
    job = yaml.safe_load((folder / "job.yaml").read_text())
    (folder / "job.yaml").write_text(yaml.safe_dump(job | {"constraints": ["latency_ms <= 1e3"]}))
    (folder / "front.json").unlink()  # or nothing would be left to do

    def verify_nothing(
        job: Job, folder: Path, study: SearchStudy, executor: object, metric: str, report: object
    ) -> None:
        write_front(folder, study, metric, {})

    # With the signature of what it stands for, so that the two can't drift apart.
    stub = create_autospec(verify_front, side_effect=verify_nothing)
    monkeypatch.setattr("paretune.search.run.verify_front", stub)
    with pytest.raises(SearchError, match=r"a verified point must keep all of latency_ms <= 1000, but none did"):
        resume(folder, report=lambda line: None)
    assert (folder / "report.html").stat().st_mtime_ns > (finished / "report.html").stat().st_mtime_ns


def test_resume_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"^run must be a run folder with a job\.yaml"):
        resume(tmp_path)


def test_failing_trials_are_recorded(new_run: NewRun) -> None:
    folder = new_run(space={"learning_rate": 1e30}, search={"trials": 3, "workers": 1, "uniform_trials": 0})
    lines: list[str] = []
    with pytest.raises(SearchError, match=r"3 of 3 failed; the last one: .*finite"):
        resume(folder, report=lines.append)
    assert states_of(folder) == ["FAIL"] * 3
    rows = table_of(folder)
    assert [row["state"] for row in rows] == ["FAIL"] * 3
    assert all("finite" in row["error"] for row in rows)
    for number, row in enumerate(rows):
        trial = folder / "trials" / str(number)
        lines_of_error = (trial / "error.txt").read_text().splitlines()
        assert lines_of_error[0] == row["error"]
        assert "Traceback (most recent call last):" in lines_of_error
        assert {path.name for path in trial.iterdir()} == {"plan.json", "error.txt"}
        assert any(line.startswith(f"trial {number} (") and row["error"] in line for line in lines)
    assert not (folder / "front.json").exists() or read_front(folder)["points"] == []


def test_a_trial_out_of_reach_is_stopped(new_run: NewRun) -> None:
    # Parameters and not the latency: what is as cheap must not depend on the clock.
    folder = new_run(
        objectives=["accuracy", "params"],
        finetune={"epochs": 5.0},
        space={"learning_rate": [1e-6, 0.02]},
        search={"trials": 6, "workers": 1, "rungs": [0.1, 0.4]},
        verify={"points": 1, "rounds": 1, "epochs": 5.5},
    )
    job = load_job(folder)
    problem = load_problem(job)
    space = make_job_space(job, problem, Profile.read(folder, problem), Baseline(folder / BASELINE).float_bits[""])
    study = open_study(job, folder, space)
    for ratio, rate in [(0, 0.02), (0.5, 1e-6), (0.25, 0.02), (0, 1e-5), (0.5, 1e-5), (0, 1e-6)]:
        plan = space.uniform(ratio)
        finetune = plan.finetune.model_copy(update={"learning_rate": rate})
        study.enqueue(plan.model_copy(update={"finetune": finetune}), "uniform")
    lines: list[str] = []
    resume(folder, report=lines.append)
    assert states_of(folder) == ["COMPLETE"] * 5 + ["PRUNED"]
    (line,) = (line for line in lines if "stopped" in line)
    assert re.fullmatch(r"trial 5 \(uniform\): stopped at \d+ %: accuracy .*, at 2650 params the front has .* s", line)
    row = table_of(folder)[5]
    assert (row["state"], row["accuracy"], row["params"]) == ("PRUNED", "", "2650")
    assert row["rungs"].startswith("0.1:")
    assert 4 <= int(row["steps"]) < 40
    assert float(row["latency_ms"]) > 0
    assert {path.name for path in (folder / "trials" / "5").iterdir()} == {"plan.json", "record.json"}
    assert not list(folder.rglob(".unfinished*"))
    assert "verifying 1 plan, the front and the next best: 1 trained on from their trials to 5.5 epochs" in lines
    assert 5 not in [point["trial"] for point in check_front(folder)["points"]]
    assert "1 stopped early" in (folder / "report.html").read_text()


def test_what_has_no_checkpoint_is_verified_anew(finished: Path, tmp_path: Path) -> None:
    folder = tmp_path / "whole"
    shutil.copytree(finished, folder)
    (folder / "front.json").unlink()
    for checkpoint in folder.glob("trials/*/artifact/checkpoint.safetensors"):
        checkpoint.unlink()
    lines: list[str] = []
    resume(folder, report=lines.append)
    assert "verifying 2 plans, the front and the next best: 2 trained anew for 0.4 epochs" in lines
    check_front(folder)


def test_live_objects_and_a_timeout(
    tiny: TinyJob, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(project), *sys.path])
    splits = load_splits(f"{MODULE}:data")
    assert isinstance(splits, Splits)
    width = 16

    def build() -> nn.Module:
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))

    keys = tiny.keys(
        tmp_path,
        model={"factory": build},
        data=splits,
        python_path=[],
        search={"trials": None, "timeout": 0.05, "workers": 1},
        constraints=["accuracy >= 1"],  # so that there is nothing to verify, which takes longer than the search
    )
    folder = tmp_path / "tiny"
    with pytest.raises(SearchError, match="accuracy >= 1, but none of 1 did"):
        run(keys, report=lambda line: None)
    assert states_of(folder)[0] == "COMPLETE"
    assert set(states_of(folder)[1:]) <= {"WAITING"}, "no trial is begun after the timeout"
    written = yaml.safe_load((folder / "job.yaml").read_text())
    assert written["model"]["factory"].startswith("<live ")
    assert written["data"]["source"] == "<live Splits>"
    with pytest.raises(JobError, match=r"<live .*pass the object again"):
        resume(folder)
    keys["search"] = {"trials": 1, "sampler": "tpe"}
    with pytest.raises(SearchError, match="none of 1 did"):
        resume(folder, job=keys, report=lambda line: None)


GO_ON = "import sys; from paretune.search.run import resume; resume(sys.argv[1])"


def interrupt(folder: Path, number: signal.Signals, *, when: Callable[[list[str]], bool]) -> tuple[int, str]:
    """Go on with a run in a process of its own and send it a signal; returns its exit code and what it said."""
    log = folder.with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen([sys.executable, "-c", GO_ON, str(folder)], stdout=output, stderr=output)
    try:
        end = time.monotonic() + PATIENCE_SECONDS
        while process.poll() is None and time.monotonic() < end:
            if "\ntrial " in f"\n{log.read_text()}" and when(states_of(folder)):
                process.send_signal(number)
                break
            time.sleep(0.2)
        return process.wait(PATIENCE_SECONDS), log.read_text()
    finally:
        process.kill()


def test_a_search_that_is_killed_loses_nothing(new_run: NewRun) -> None:
    folder = new_run("killed")
    code, said = interrupt(
        folder, signal.SIGKILL, when=lambda states: states.count("COMPLETE") >= 2 and "RUNNING" in states
    )
    assert code == -signal.SIGKILL, said
    killed = {trial.number: trial for trial in trials_of(folder)}
    done = [number for number, trial in killed.items() if trial.state.name == "COMPLETE"]
    begun = [number for number, trial in killed.items() if trial.state.name == "RUNNING"]
    assert 2 <= len(done) < TRIALS
    assert begun

    lines: list[str] = []
    resume(folder, report=lines.append)
    assert lines[0] == f"{len(begun)} unfinished trials are begun anew"
    trials = trials_of(folder)
    for number in done:
        assert trials[number].values == killed[number].values
        assert trials[number].user_attrs == killed[number].user_attrs
        assert (folder / "trials" / str(number) / "artifact" / "card.json").is_file()
    assert [trials[number].state.name for number in begun] == ["FAIL"] * len(begun)
    # One that was killed while it was being proposed can't be repeated; another takes its place.
    names = trials[done[0]].params.keys()
    retried = [trial.params for trial in trials if trial.user_attrs.get("source") == "retry"]
    assert retried == [killed[number].params for number in begun if killed[number].params.keys() == names]
    assert states_of(folder).count("COMPLETE") == TRIALS
    assert set(states_of(folder)) == {"COMPLETE", "FAIL"}
    reasons = {row["error"] for row in table_of(folder) if row["state"] == "FAIL"}
    assert reasons == {"lost when the run was killed"}
    assert not list(folder.rglob(".unfinished*"))
    check_front(folder)


def test_sigterm_ends_a_search_in_order(new_run: NewRun) -> None:
    folder = new_run("stopped", search={"workers": 1, "trials": 50})
    code, said = interrupt(folder, signal.SIGTERM, when=lambda states: "COMPLETE" in states and "RUNNING" in states)
    assert code == 143, said
    states = states_of(folder)
    assert states.count("COMPLETE") >= 1
    assert len(states) < 50
    assert [row["state"] for row in table_of(folder)] == states
    assert read_front(folder)["verified"] is False
    assert read_front(folder)["points"]
    assert not list(folder.rglob(".unfinished*"))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        pytest.param(
            {"space": {"bits": [24]}}, r"^space\.bits must be widths that the runtime .* but got 24;", id="24 bits"
        ),
        pytest.param({"space": {"bits": [32, 16]}}, r"^space\.bits must name at most one float", id="two floats"),
        pytest.param({"target": {"runtime": "tensorflow"}}, r"^target\.runtime .*tensorflow", id="unknown runtime"),
        pytest.param({"target": {"batch_size": 5000}}, r"^target\.batch_size must be at most", id="batch too large"),
        pytest.param({"data": {"args": {"fault": "NaN"}}}, r"finite inputs in its validation split", id="NaN"),
        pytest.param({"data": {"args": {"fault": "empty"}}}, r"a validation split with samples", id="empty split"),
        pytest.param({"data": {"args": {"fault": "labels"}}}, r"labels in \[0, 10\).*labels from 0 to 10", id="label"),
        pytest.param({"data": {"source": f"{MODULE}:dat"}}, r"^data\.source .*did you mean 'data'", id="no such data"),
        pytest.param({"model": {"args": {"classes": 5}}}, r"labels in \[0, 5\)", id="too few classes"),
        pytest.param({"model": {"factory": f"{MODULE}:build_images"}}, r"\(64, 4, 6, 6\)", id="other outputs"),
        pytest.param({"model": {"factory": f"{MODULE}:bild"}}, r"^model\.factory .*did you mean 'build'", id="no name"),
        pytest.param({"model": {"factory": "no_such:build"}}, r"^model\.factory must name a module", id="no module"),
        pytest.param({"model": {"weights": "/no/such.pt"}}, r"^model\.weights must be a file", id="no weights"),
        pytest.param({"teacher": {"factory": f"{MODULE}:build_images"}}, r"\(64, 4, 6, 6\)", id="other teacher"),
        pytest.param(
            {"constraints": ["energy_mj <= 5"]}, r"^constraints\[0\] must be something that its target", id="no energy"
        ),
        pytest.param(
            {"objectives": ["accuracy", "throughput_per_s"]}, r"^objectives\[1\] must be something", id="no throughput"
        ),
        pytest.param({"storage": "oracle9://host"}, r"^storage must be a database URL that opens", id="storage"),
    ],
)
def test_a_wrong_job_leaves_no_run(tiny: TinyJob, tmp_path: Path, sections: dict[str, Any], message: str) -> None:
    results = tmp_path / "results"
    with pytest.raises(JobError, match=message):
        run(tiny.keys(results, **sections), report=lambda line: None)
    assert not results.exists()


def test_a_study_of_another_run_is_not_taken_over(tiny: TinyJob, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    optuna.create_study(study_name="tiny", storage=url)
    with pytest.raises(JobError, match=r"^name must name a study that the storage doesn't hold yet, but got 'tiny'"):
        run(tiny.keys(tmp_path / "results", storage=url), report=lambda line: None)
    assert not (tmp_path / "results").exists()


def test_a_job_file_whose_module_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path.copy())
    (tmp_path / "failing_module.py").write_text("raise OSError('no licence')")
    job = {"name": "tiny", "model": {"factory": "failing_module:build"}, "data": "digits", "results": str(tmp_path)}
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    with pytest.raises(JobError, match=r"^model\.factory .*OSError: no licence"):
        run(tmp_path / "job.yaml", report=lambda line: None)
    assert not (tmp_path / "tiny").exists()


def test_several_targets_from_one_training(tiny: TinyJob, tmp_path: Path) -> None:
    keys = tiny.keys(tmp_path, search={"trials": 3})
    del keys["target"]
    keys["targets"] = [{"runtime": "onnxruntime", "batch_size": 4}, {"name": "other", "batch_size": 8}]
    lines: list[str] = []
    folder = run(keys, report=lines.append)
    front = read_front(folder)
    assert front["verified"] is True
    assert front["targets"]["other"]["runtime"] == "openvino"
    assert [objective["name"] for objective in front["objectives"]] == ["accuracy", "latency_ms", "latency_ms@other"]
    for entry in (front["baseline"], *front["points"]):
        assert entry["test"]["latency_ms"] > 0
        assert entry["test"]["latency_ms@other"] > 0
    assert any("ms on other" in line for line in lines if line.startswith("trial"))
    assert all(float(row["latency_ms@other"]) > 0 for row in table_of(folder))
    assert all(len(trial.values) == 3 for trial in trials_of(folder))
    said = export(folder, pick(folder, at_knee=True), tmp_path / "exported")
    assert "equal bit for bit" in said, "models of ONNX Runtime run without paretune too"
    before = snapshot(folder)
    assert resume(folder, report=lambda line: None) == folder
    assert snapshot(folder).keys() == before.keys()


def test_measured_channel_counts_make_the_space(tiny: TinyJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    lines: list[str] = []
    folder = run(tiny.keys(tmp_path, space={"channels": "probe"}, search={"trials": 2}), report=lines.append)
    assert any("which channel counts" in line for line in lines)
    counts = json.loads((folder / "analysis.json").read_text())["counts"]
    assert set(counts) == {"Conv2d"}
    assert all(type(count) is int and 1 <= count <= 16 for count in counts["Conv2d"])
    job = (folder / "job.yaml").read_text()
    (folder / "job.yaml").write_text(job.replace("trials: 2", "trials: 3"))
    resume(folder, report=lambda line: None)  # in the space of before, which is read back
    assert states_of(folder) == ["COMPLETE"] * 3
