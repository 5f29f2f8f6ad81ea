"""Runs on a Ray cluster of several nodes, all on this machine: a whole one, and every fault that a cluster has."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import tune
from ray.cluster_utils import Cluster

from paretune.errors import SearchError
from paretune.search.cluster import gauges
from paretune.search.job import Job, load_job, make_job
from paretune.search.run import open_search as open_any_search
from paretune.search.run import resume, run
from paretune.search.study import TrialRow, stored_rows
from paretune.search.tune import open_search
from tests.search.conftest import TinyJob
from tests.search.test_run import check_front

pytestmark = pytest.mark.ray

PATIENCE = 120.0
"""Seconds; far more than anything here takes, also on a busy machine."""

FAULTS = """
'''The tiny task with faults: in a training, never where something is measured, and as often as a file says.'''

import os
import signal
import time
from pathlib import Path

import ray

from paretune.objectives.tasks import Classification

FOLDER = Path(__file__).parent
SIGNAL, WAIT, SEEN, MEASURED = (FOLDER / name for name in ("kill", "wait", "seen", "measured"))


class Faulty(Classification):
    def loss(self, outputs, targets):
        if outputs.requires_grad and ray.is_initialized():
            resources = ray.get_runtime_context().get_assigned_resources()
            if resources.get("CPU"):
                _go_wrong()
        return super().loss(outputs, targets)

    def metric(self, outputs, targets):
        if ray.is_initialized() and ray.get_runtime_context().get_assigned_resources().get("measure"):
            MEASURED.write_text(ray.get_runtime_context().get_node_id())
        return super().metric(outputs, targets)


def _go_wrong():
    left = int(SIGNAL.read_text()) if SIGNAL.exists() else 0
    if left:
        SIGNAL.write_text(str(left - 1))
        os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does where memory is short
    if WAIT.exists():
        SEEN.write_text(ray.get_runtime_context().get_node_id())
        while WAIT.exists():
            time.sleep(0.05)


TASK = Faulty()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A head on which the search runs, a trainer, and a node that measures."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    made.add_node(num_cpus=2)
    made.add_node(num_cpus=0, resources={"measure": 1})
    yield made
    made.shutdown()


class Faults:
    """Makes jobs whose trainings go wrong when the test says so."""

    def __init__(self, tiny: TinyJob, folder: Path) -> None:
        self.folder = folder
        self._tiny = tiny
        (folder / "faulty_task.py").write_text(FAULTS)

    def keys(self, address: str | None, name: str, **sections: Any) -> dict[str, Any]:
        search = {"executor": "ray", "trials": 3, "workers": 1, "uniform_trials": 1} | sections.pop("search", {})
        ray_section = {"address": address} | sections.pop("ray", {})
        keys = self._tiny.keys(self.folder, name, search=search, ray=ray_section, task="faulty_task:TASK", **sections)
        return keys | {"python_path": [*keys["python_path"], str(self.folder)]}

    def kill(self, times: int) -> None:
        """Have the next trainings killed."""
        (self.folder / "kill").write_text(str(times))

    def hold(self) -> None:
        """Have trainings wait."""
        (self.folder / "seen").unlink(missing_ok=True)
        (self.folder / "wait").touch()

    def held(self) -> str:
        """Wait until one does; returns the id of its node."""
        seen = self.folder / "seen"
        end = time.monotonic() + PATIENCE
        while not seen.exists() or not seen.read_text():
            assert time.monotonic() < end, "no training began"
            time.sleep(0.05)
        return seen.read_text()

    def let_go(self) -> None:
        (self.folder / "wait").unlink()


@pytest.fixture(scope="module")
def faults(tiny: TinyJob, tmp_path_factory: pytest.TempPathFactory) -> Faults:
    return Faults(tiny, tmp_path_factory.mktemp("faults"))


def rows_of(folder: Path) -> list[TrialRow]:
    return stored_rows(load_job(folder), folder)


def states_of(folder: Path) -> list[str]:
    return [row.trial.state.name for row in rows_of(folder)]


def node_of(cluster: Cluster, node_id: str) -> Any:
    return next(node for node in cluster.worker_nodes if node.node_id == node_id)


def measuring(cluster: Cluster) -> Any:
    return next(node for node in cluster.worker_nodes if "measure" in str(node._ray_params.resources))


def test_a_run_is_whole_and_measured_on_the_measuring_node(cluster: Cluster, faults: Faults) -> None:
    keys = faults.keys(
        cluster.address,
        "whole",
        search={"sampler": "front", "trials": 5, "workers": 2},
        ray={"measure": "measure", "storage": str(faults.folder / "shared")},
    )
    folder = run(make_job(keys))
    front = check_front(folder)
    assert front["points"]
    assert set(states_of(folder)) <= {"COMPLETE", "PRUNED"}
    assert not any((faults.folder / "shared").rglob("*.tar")), "what was shipped is removed"
    assert not ray.is_initialized()
    assert (faults.folder / "measured").read_text() == measuring(cluster).node_id


def searched(job: Job, report: Callable[[str], None] = lambda line: None) -> Path:
    """A run whose trials ended; its front isn't verified, which takes as long again."""
    with open_any_search(job, report=report) as search:
        search.executor.run(search.trials)
        return search.folder


def retries(folder: Path, number: int) -> int:
    return int(json.loads((folder / "trials" / str(number) / "record.json").read_text())["retries"])


def test_a_killed_worker_costs_a_retry_and_a_plan_that_kills_two_fails(cluster: Cluster, faults: Faults) -> None:
    faults.kill(1)

    def report(line: str) -> None:
        if line.startswith("trial 0"):
            faults.kill(2)

    folder = searched(make_job(faults.keys(cluster.address, "killed", ray={"measure": "measure"})), report)
    assert states_of(folder) == ["COMPLETE", "FAIL", "COMPLETE"]
    assert retries(folder, 0) == 1
    assert "died" in rows_of(folder)[1].error
    assert "died" in (folder / "trials" / "1" / "error.txt").read_text()


def test_a_trainer_node_that_goes_takes_no_trial_with_it(cluster: Cluster, faults: Faults) -> None:
    faults.hold()
    cluster.add_node(num_cpus=1)

    def break_it() -> None:
        cluster.remove_node(node_of(cluster, faults.held()), allow_graceful=False)
        faults.let_go()

    helper = threading.Thread(target=break_it)
    helper.start()
    job = make_job(faults.keys(cluster.address, "moved", search={"trials": 2}, ray={"measure": "measure"}))
    folder = searched(job)
    helper.join()
    assert states_of(folder) == ["COMPLETE"] * 2
    assert retries(folder, 0) == 1


def test_without_its_measuring_node_a_search_ends_and_goes_on_later(
    cluster: Cluster, faults: Faults, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gauges, "PATIENCE", 3.0)
    job = make_job(faults.keys(cluster.address, "blind", ray={"measure": "measure"}))
    lines: list[str] = []

    def report(line: str) -> None:
        lines.append(line)
        if line.startswith("trial 0"):
            cluster.remove_node(measuring(cluster), allow_graceful=False)

    with pytest.raises(SearchError, match="paretune resume"):
        run(job, report=report)
    folder = faults.folder / "blind"
    assert states_of(folder)[0] == "COMPLETE"
    cluster.add_node(num_cpus=0, resources={"measure": 1})
    monkeypatch.undo()
    resume(folder)
    check_front(folder)
    assert states_of(folder).count("COMPLETE") == 3
    assert states_of(folder)[0] == "COMPLETE"


def test_a_search_whose_driver_is_killed_goes_on(faults: Faults) -> None:
    """On a Ray of its own, which dies with it."""
    keys = faults.keys(None, "driverless")
    script = faults.folder / "go.py"
    script.write_text(f"from paretune.search.run import run\nrun({keys!r})\n")
    process = subprocess.Popen([sys.executable, str(script)], start_new_session=True)
    folder = faults.folder / "driverless"
    end = time.monotonic() + PATIENCE
    while not (folder / "trials" / "0" / "record.json").exists():
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.1)
    faults.hold()
    faults.held()
    process.send_signal(signal.SIGKILL)
    process.wait()
    faults.let_go()
    before = [row.number for row in rows_of(folder) if row.record]
    assert before
    resume(folder)
    check_front(folder)
    rows = rows_of(folder)
    assert [row.number for row in rows if row.record][: len(before)] == before
    assert sum(row.record is not None for row in rows) == 3


def test_a_tuner_of_ones_own_searches_a_job(cluster: Cluster, faults: Faults) -> None:
    job = make_job(faults.keys(cluster.address, "own", ray={"measure": "measure"}))
    with open_search(job) as search:
        config = tune.TuneConfig(
            search_alg=search.searcher,
            scheduler=search.scheduler,
            num_samples=-1,
            max_concurrent_trials=1,
            reuse_actors=True,
        )
        run_config = tune.RunConfig(storage_path=str(faults.folder / "tune"), verbose=0)
        results = tune.Tuner(search.trainable, tune_config=config, run_config=run_config).fit()
        assert len(results) == 3
        folder = search.finish()
    check_front(folder)
    assert states_of(folder) == ["COMPLETE"] * 3


def test_both_executors_make_the_same_artifacts(cluster: Cluster, faults: Faults) -> None:
    """Same plans, seeds and threads: the weights are the same bit for bit, wherever they were trained."""
    keys = faults.keys(cluster.address, "far", search={"sampler": "uniform", "trials": 2}, ray={"measure": "measure"})
    far = run(make_job(keys))
    near = run(make_job(keys | {"name": "near", "search": keys["search"] | {"executor": "local", "workers": cores()}}))
    for number in range(2):
        artifacts = [folder / "trials" / str(number) / "artifact" / "weights.safetensors" for folder in (far, near)]
        assert artifacts[0].read_bytes() == artifacts[1].read_bytes()


def cores() -> int:
    return len(os.sched_getaffinity(0))
