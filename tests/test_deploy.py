"""The templates in deploy/, as far as they can be checked without the clusters that they are for."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

import paretune
from paretune.search.job import make_job

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"
SLURM = DEPLOY / "slurm.sh"

# What Slurm and Ray do on a cluster, for one machine: each call is written down, with the node that it is for.
COMMANDS = {
    "srun": """
        while [[ $1 == -* ]]; do [[ $1 == --nodelist=* ]] && export NODE=${1#*=}; shift; done
        exec "$@"
    """,
    "scontrol": 'if [ "$1" = show ]; then printf "n%s\\n" 1 2 3 4; else echo "scontrol $*" >> "$LOG"; fi',
    "hostname": "echo 10.0.0.1 10.1.0.1",
    "ray": 'echo "$NODE ray $*" >> "$LOG"',
    "paretune": """
        trap 'sleep 0.5; echo "files written" >> "$LOG"; exit 143' TERM
        echo "driver $*" >> "$LOG"
        if [ -n "$WAIT" ]; then for i in $(seq 100); do sleep 0.1; done; fi
        exit 1
    """,
}


def read(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


def overrides(command: str) -> dict[str, str]:
    """The `-o KEY=VALUE` of a command line."""
    words = command.split()
    return dict(words[i + 1].split("=", 1) for i, word in enumerate(words) if word == "-o")


def check_is_a_job(command: str) -> None:
    """Check that the overrides of a command are keys of jobs, and say what a template must."""
    found = overrides(command)
    ray = {key.removeprefix("ray."): value for key, value in found.items() if key.startswith("ray.")}
    data = {"name": "small", "model": {"factory": "project:build"}, "data": "digits", "ray": ray}
    job = make_job(data | {"search": {"executor": found["search.executor"]}})
    assert (job.search.executor, job.ray.measure) == ("ray", "measure")
    assert "--resume" in command.split()


def test_the_launcher_takes_the_cluster() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(read("ray-cluster.yaml"))
    validate_config(config)
    kinds = {name: kind["resources"] for name, kind in config["available_node_types"].items()}
    assert kinds["gauge"] == {"CPU": 0, "measure": 1}
    assert kinds["head"] == {"CPU": 0}
    assert "measure" not in kinds["trainer"]


def test_the_nodes_install_the_wheel_of_this_version(tmp_path: Path) -> None:
    (command,) = [line for line in read("ray-cluster.yaml")["setup_commands"] if "pip install" in line]
    requirement = Requirement(shlex.split(command)[-1])
    assert (requirement.name, requirement.extras) == ("paretune", {"cluster"})
    assert requirement.url == f"file:///shared/paretune-{paretune.__version__}-py3-none-any.whl"


def test_the_rayjob_is_whole() -> None:
    job = read("kuberay-rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    check_is_a_job(job["spec"]["entrypoint"])
    assert job["spec"]["backoffLimit"] > 0
    cluster = job["spec"]["rayClusterSpec"]
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert groups["gauges"]["rayStartParams"] == {"num-cpus": "0", "resources": '"{\\"measure\\": 1}"'}
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    for group in (cluster["headGroupSpec"], *groups.values()):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"] for volume in pod["volumes"]]


def test_the_slurm_script_is_sound_shell() -> None:
    subprocess.run(["bash", "-n", SLURM], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck isn't installed; bash alone has read the script")
    checked = subprocess.run(["shellcheck", SLURM], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout


class Slurm:
    """Runs the script as `sbatch` would, with four nodes."""

    def __init__(self, folder: Path, *, wait: bool = False) -> None:
        for name, text in COMMANDS.items():
            (folder / name).write_text(f"#!/bin/bash\n{text}")
            (folder / name).chmod(0o755)
        self._log = folder / "log"
        variables = {"SLURM_JOB_ID": "123", "SLURM_JOB_NUM_NODES": "4", "SLURM_JOB_NODELIST": "n[1-4]"}
        variables |= {"SLURM_CPUS_ON_NODE": "8", "LOG": str(self._log), "WAIT": "1" if wait else ""}
        environment = os.environ | variables | {"PATH": f"{folder}:{os.environ['PATH']}"}
        command = ["bash", str(SLURM), "a.yaml", "b.yaml"]
        self.process = subprocess.Popen(command, env=environment, start_new_session=True)

    def lines(self) -> list[str]:
        """What was called, in the order of the calls."""
        return self._log.read_text().splitlines() if self._log.exists() else []

    def wait_for(self, text: str, count: int = 1) -> None:
        """Until so many calls have that in them; what the script starts in the background may come late."""
        for _ in range(100):
            if sum(text in line for line in self.lines()) >= count:
                return
            time.sleep(0.1)
        raise AssertionError(f"{text!r} isn't there {count} times: {self.lines()}")


def test_slurm_gives_each_node_its_part(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path)
    assert slurm.process.wait(timeout=60) == 1, "the job's exit code"
    slurm.wait_for("ray start", 4)
    called = slurm.lines()
    started = {line.split()[0]: line.partition("--block ")[2] for line in called if "ray start" in line}
    address = "10.0.0.1:20123"
    assert started == {
        "n1": "--head --port=20123 --num-cpus=7",
        "n2": f"--address={address}",
        "n3": f"--address={address}",
        "n4": f'--address={address} --num-cpus=0 --resources={{"measure": 1}}',
    }
    (driver,) = [line for line in called if line.startswith("driver")]
    assert driver.startswith("driver run a.yaml b.yaml --resume ")
    assert overrides(driver)["ray.address"] == address
    check_is_a_job(driver)
    assert not any("requeue" in line for line in called)


def test_slurm_stops_the_driver_before_the_time_is_up_and_requeues(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path, wait=True)
    slurm.wait_for("driver ")
    slurm.process.send_signal(signal.SIGTERM)
    assert slurm.process.wait(timeout=60) == 143
    assert slurm.lines()[-2:] == ["files written", "scontrol requeue 123"]
