"""What is sent to a cluster, and a cluster that takes it."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from paretune.errors import JobError
from paretune.search.job import load_job
from paretune.search.submit import STOP_SECONDS, Cluster, as_row, make_submission

TEXT = """
name: small
model: {factory: 'project:build', weights: weights.pt}
data: project:data
results: /shared/results
"""
PROJECT = """
import signal, sys, time
from pathlib import Path

def build():
    raise AssertionError("the data come first")

def data(folder="", wait=False):
    if wait:
        Path(folder, "began").touch()
        time.sleep(120)
    print("sent:", *sorted(path.name for path in Path().iterdir()), flush=True)
    raise ValueError("there are no data")
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "weights.pt").touch()
    (folder / "project.py").write_text(PROJECT)
    (folder / "job.yaml").write_text(TEXT)
    return folder / "job.yaml"


def test_the_entrypoint_is_a_run_that_goes_on(job: Path) -> None:
    overrides = ["name=other", "constraints=['latency_ms <= 5']"]
    sent = make_submission(job, overrides)
    program, *arguments = shlex.split(sent.entrypoint.removeprefix("exec "))
    assert (program, arguments[:3]) == ("paretune", ["run", "job.yaml", "--resume"])
    assert [text for flag, text in zip(arguments[3::2], arguments[4::2], strict=True) if flag == "-o"] == overrides
    assert (sent.name, sent.run) == ("other", Path("/shared/results/other"))


def test_on_ray_the_cluster_is_the_one_that_it_is_sent_to(job: Path) -> None:
    environment = "ray.runtime_env={pip: [timm], env_vars: {KEY: value}, excludes: [data/]}"
    overrides = ["search.executor=ray", "ray.address=elsewhere:6379", environment]
    sent = make_submission(job, overrides, exclude=["*.npz"])
    arguments = shlex.split(sent.entrypoint)[5:]
    loaded = load_job(job, [argument for argument in arguments if argument != "-o"])
    assert (loaded.ray.address, loaded.ray.runtime_env) == ("auto", {})
    assert sent.runtime_env == {
        "working_dir": str(job.parent),
        "pip": ["timm"],
        "excludes": ["data/", "/results", "*.npz"],
        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS), "KEY": "value"},
    }


def test_runs_within_the_folder_are_not_sent(job: Path) -> None:
    sent = make_submission(job, [f"results={job.parent / 'runs' / 'all'}"])
    assert sent.runtime_env["excludes"] == ["/results", "/runs/all"]


@pytest.mark.parametrize("override", ["results=runs", "results=null", "results=~/runs"])
def test_results_must_outlive_the_job(job: Path, override: str) -> None:
    with pytest.raises(JobError, match="results must be"):
        make_submission(job, [override])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("weights.pt", "../weights.pt", "model.weights must be in the job file's folder"),
        ("weights.pt", "~/weights.pt", "model.weights must be in the job file's folder"),
        ("weights.pt", "others.pt", "model.weights must exist"),
        ("project:data", "{source: npz, args: {path: ../data.npz}}", "data.args.path must be in the job file's folder"),
        ("project:data", "{source: npz, args: {path: data.npz}}", "data.args.path must exist"),
        ("project:data", "{source: imagefolder, args: {root: ..}}", "data.args.root must be in the job file's folder"),
        ("data: ", "python_path: ['.', ../shared]\ndata: ", r"python_path\[1\] must be in the job file's folder"),
    ],
)
def test_files_must_be_sent_or_be_there(job: Path, old: str, new: str, message: str) -> None:
    job.write_text(TEXT.replace(old, new))
    with pytest.raises(JobError, match=message):
        make_submission(job)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.weights=../weights.pt", "model.weights must be in the job file's folder"),
        ("model={factory: 'project:build', weights: others.pt}", "model.weights must exist"),
        ("data.args.path=../data.npz", "data.args.path must be in the job file's folder"),
        ("python_path=[../shared]", r"python_path\[0\] must be in the job file's folder"),
    ],
)
def test_files_that_are_overridden_must_be_sent_or_be_there(job: Path, override: str, message: str) -> None:
    with pytest.raises(JobError, match=message):
        make_submission(job, [override])


def test_files_that_the_cluster_has_are_named_by_absolute_paths(job: Path) -> None:
    job.write_text(TEXT.replace("weights.pt", "/shared/weights.pt"))
    assert "weights" not in make_submission(job).entrypoint, "the file says it"
    job.write_text(TEXT.replace("weights.pt", "../weights.pt"))
    assert "model.weights=/shared/weights.pt" in make_submission(job, ["model.weights=/shared/weights.pt"]).entrypoint


def test_names_of_weights_are_no_files(job: Path) -> None:
    assert "model.args.weights=DEFAULT" in make_submission(job, ["model.args.weights=DEFAULT"]).entrypoint


def test_without_ray_s_client_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    with pytest.raises(JobError, match=r"no package aiohttp; pip install 'paretune\[cluster\]'"):
        Cluster("http://127.0.0.1:1")


needs_cluster = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("aiohttp", "aiohttp_cors", "opencensus", "grpc")),
    reason="needs ray[default]: pip install 'paretune[cluster]'",
)


@needs_cluster
def test_passwords_in_urls_are_not_shown(job: Path) -> None:
    from ray.job_submission import JobDetails, JobStatus, JobType

    sent = make_submission(job, ["storage=postgresql://user:secret@db/studies"])
    details = JobDetails(
        type=JobType.SUBMISSION,
        submission_id="raysubmit_1",
        status=JobStatus.FAILED,
        entrypoint=sent.entrypoint,
        message="could not open postgresql://user:secret@db/studies",
    )
    row = as_row(details)
    assert "secret" not in json.dumps(row)
    assert "-o storage=postgresql://user:***@db/studies" in row["entrypoint"]
    assert row["message"] == "could not open postgresql://user:***@db/studies"


@needs_cluster
def test_a_cluster_that_is_not_there() -> None:
    with pytest.raises(JobError, match=r"--address must be the dashboard .* got http://127\.0\.0\.1:1 .*cluster"):
        Cluster("http://127.0.0.1:1")


class _Version(BaseHTTPRequestHandler):
    """What a dashboard answers to whoever connects."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"ray_version": "2.60.0"}).encode())

    def log_message(self, *_: object) -> None:
        """Nothing."""


@needs_cluster
def test_a_cluster_that_has_gone(job: Path) -> None:
    with HTTPServer(("127.0.0.1", 0), _Version) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        cluster = Cluster(address)
        server.shutdown()
    for question in (cluster.jobs, lambda: cluster.details("any"), lambda: cluster.submit(make_submission(job))):
        with pytest.raises(JobError, match=rf"--address must be the dashboard .* got {address} "):
            question()


@needs_cluster
def test_what_is_typed_counts_more_than_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:2")
    with pytest.raises(JobError, match=r"127\.0\.0\.1:1"):
        Cluster("http://127.0.0.1:1")
    with pytest.raises(JobError, match=r"127\.0\.0\.1:2"):
        Cluster()
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:2"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head node as `ray start --head` makes it, with its dashboard, on ports of its own."""
    programs = Path(sys.executable).parent
    # Without a token: the client that other tests have imported already can't be told of one any more.
    environment = os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "RAY_AUTH_MODE": "disabled"}
    log = tmp_path_factory.mktemp("ray") / "log"
    # The names of Ray's sockets are long, and must not be longer than 107 characters.
    with TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [programs / "ray", "start", "--head", "--block", "--port=26379", "--dashboard-port=28265"]
        command += ["--dashboard-agent-listen-port=28365"]  # another Ray of this machine has the default
        command += ["--num-cpus=1", f"--temp-dir={folder}", "--disable-usage-stats", "--object-store-memory=100000000"]
        with log.open("w") as output:
            head = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
        try:
            yield reach("http://127.0.0.1:28265", head, log)
        finally:
            head.send_signal(signal.SIGTERM)  # with --block it ends what it started
            head.wait(timeout=60)


def reach(address: str, head: subprocess.Popen[bytes], log: Path) -> Cluster:
    for _ in range(60):
        assert head.poll() is None, log.read_text()
        try:
            return Cluster(address)
        except JobError:
            time.sleep(1)
    raise AssertionError(log.read_text())


@needs_cluster
def test_a_job_that_fails_says_why(cluster: Cluster, job: Path, tmp_path: Path) -> None:
    (job.parent / ".gitignore").write_text("*.pt\n")  # weights that git doesn't keep are sent all the same
    (job.parent / "large.bin").touch()
    sent = make_submission(job, [f"results={tmp_path / 'results'}"], exclude=["*.bin"])
    job_id = cluster.submit(sent)
    text = "".join(cluster.follow(job_id))
    assert "sent: .gitignore job.yaml project.py weights.pt" in " ".join(text.replace("__pycache__ ", "").split())
    assert "there are no data" in text
    found = cluster.details(job_id)
    assert (found.status.value, found.driver_exit_code) == ("FAILED", 2)
    assert job_id in [entry.submission_id for entry in cluster.jobs()]
    assert cluster.logs(job_id) == text


@needs_cluster
def test_a_job_that_is_stopped_is_told_by_sigterm(cluster: Cluster, job: Path, tmp_path: Path) -> None:
    data = f"data.args={{folder: {str(tmp_path)!r}, wait: true}}"
    job_id = cluster.submit(make_submission(job, [f"results={tmp_path / 'results'}", data]))
    for _ in range(60):
        if (tmp_path / "began").exists():
            break
        time.sleep(0.5)
    began = time.monotonic()
    assert cluster.stop(job_id).status.value == "STOPPED"
    assert time.monotonic() - began < STOP_SECONDS / 2, "it wasn't killed for want of an end"


@needs_cluster
def test_a_job_that_was_never_sent(cluster: Cluster) -> None:
    for question in (cluster.details, cluster.logs, cluster.stop):
        with pytest.raises(JobError, match="ID must be a job of this cluster, but got 'nothing'"):
            question("nothing")
