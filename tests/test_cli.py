"""The command line as a user meets it: real commands, from `init` to an exported model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import paretune
from paretune.cli import main
from paretune.objectives.runtimes import RUNTIMES

SMALL = ["-o", "space.channels=fixed", "-o", "search.trials=5", "-o", "search.workers=2"]
SMALL += ["-o", "finetune.epochs=0.5", "-o", "verify.rounds=1"]


def command(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", "from paretune.cli import main; main()"]
    return subprocess.run(
        [*program, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )


class Done(NamedTuple):
    """What a command left: its exit code and what it printed."""

    returncode: int
    stdout: str
    stderr: str


Cli = Callable[..., Done]


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Cli:
    """The same command line within this process, which has torch loaded already."""

    def run_here(*arguments: str | Path, cwd: Path) -> Done:
        monkeypatch.chdir(cwd)
        # Each command would have a process of its own, and every example project has a module of this name.
        monkeypatch.delitem(sys.modules, "project", raising=False)
        monkeypatch.setattr(sys, "path", list(sys.path))
        monkeypatch.setattr(sys, "argv", ["paretune", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        return Done(code if isinstance(code, int) else 0, *capfd.readouterr())

    return run_here


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `paretune init` wrote, with the example model trained."""
    folder = tmp_path_factory.mktemp("cli")
    made = command("init", cwd=folder)
    assert made.returncode == 0, made.stderr
    assert made.stdout.split() == ["job.yaml", "project.py", "job.schema.json"]
    subprocess.run([sys.executable, "project.py"], cwd=folder, check=True, timeout=300)
    return folder


@pytest.fixture(scope="module")
def run(project: Path) -> Path:
    """The run of the example job, few and short trials."""
    done = command("run", "job.yaml", *SMALL, cwd=project)
    assert done.returncode == 0, done.stderr
    assert "verified front" in done.stdout
    assert done.stderr.count("\ntrial ") == 5
    return project / "results" / "digits"


def test_version(cli: Cli, tmp_path: Path) -> None:
    assert cli("--version", cwd=tmp_path).stdout.strip() == paretune.__version__


def test_a_file_in_the_working_directory_stands_in_for_no_package(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise AssertionError('not the package')")
    done = subprocess.run(
        [sys.executable, "-m", "paretune", "--version"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, paretune.__version__), done.stderr


def test_help_names_every_command(cli: Cli, tmp_path: Path) -> None:
    text = cli("--help", cwd=tmp_path).stdout
    single = ("demo", "init", "check", "doctor", "run", "resume", "show", "report", "export")
    for name in (*single, "submit", "status", "logs", "stop"):
        assert f" {name} " in text


def test_init_overwrites_nothing(cli: Cli, project: Path) -> None:
    before = (project / "job.yaml").read_text()
    again = cli("init", cwd=project)
    assert again.returncode == 2
    assert "job.yaml" in again.stderr
    assert (project / "job.yaml").read_text() == before


def test_check_prints_what_it_found(cli: Cli, project: Path) -> None:
    text = cli("check", "job.yaml", cwd=project).stdout
    assert "it is the output layer" in text
    assert "baseline: accuracy" in text
    assert "s a trial" in text


def test_check_as_json(cli: Cli, project: Path) -> None:
    data = json.loads(cli("check", "job.yaml", "--json", cwd=project).stdout)
    assert [group["channels"] for group in data["analysis"]["groups"]] == [32, 64, 128]
    assert data["estimate"]["trial_seconds"] > 0
    assert data["estimate"]["bytes"] == 60 * data["estimate"]["trial_bytes"]
    assert not (project / "results" / "check").exists()


def test_check_with_the_profile_of_the_target(
    cli: Cli, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # Which float format is the fastest may change from one check to the next.
    fixed = ("check", "job.yaml", "--profile", "-o", "space.bits=[32, 8]")
    data = json.loads(cli(*fixed, "--json", cwd=project).stdout)
    (staircase,) = data["staircases"].values()
    assert staircase["kind"] == "Conv2d"
    assert staircase["target"]["runtime"] == "openvino"
    assert {128, 64, 8} <= {step["count"] for step in staircase["steps"]}
    assert {step["width"] for step in staircase["steps"]} >= {8}
    counts = {step["count"] for step in staircase["steps"] if step["useful"]}
    assert set(data["analysis"]["counts"]["Conv2d"]) >= counts, "the space is made of what was measured"
    layers = [layer["name"] for layer in data["analysis"]["layers"]]
    assert [layer["layer"] for layer in data["redundancy"]] == layers
    tried = {(entry["technique"], entry["name"]) for entry in data["sensitivity"]["entries"]}
    assert tried >= {("prune", group["name"]) for group in data["analysis"]["groups"]}
    assert all(isinstance(entry["loss_increase"], float) for entry in data["sensitivity"]["entries"])
    picture = tmp_path / "pictures" / "slack.svg"
    text = cli(*fixed, "--heatmap", picture, cwd=project).stdout
    assert "channels of Conv2d on openvino" in text
    assert "most slack: " in text
    assert picture.read_text().startswith("<svg")
    (file,) = (tmp_path / "paretune").iterdir()
    assert json.loads(file.read_text())["value"] == staircase  # the second check read what the first one had measured


def test_doctor(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in RUNTIMES.keys() - {"openvino"}:
        monkeypatch.delitem(RUNTIMES, name)
    done = cli("doctor", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "trying openvino on cpu" in done.stderr
    data = json.loads(done.stdout)
    assert data["machine"]["cores"] >= 1
    works = {entry["device"]: entry["works"] for entry in data["runtimes"]}
    assert works["cpu"]
    text = cli("doctor", cwd=tmp_path).stdout
    assert "openvino" in text
    assert "processor:" in text


def test_doctor_where_nothing_works_exits_with_1(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(RUNTIMES):
        monkeypatch.setitem(RUNTIMES, name, ("no_such_module_at_all", "Missing"))
    done = cli("doctor", cwd=tmp_path)
    assert done.returncode == 1
    assert "needs the package" in " ".join(done.stdout.replace("│", " ").split())
    assert "Traceback" not in done.stderr


def test_show(cli: Cli, run: Path) -> None:
    text = cli("show", run, cwd=run).stdout
    front = json.loads((run / "front.json").read_text())
    assert all(str(point["trial"]) in text for point in front["points"])
    assert json.loads(cli("show", run, "--json", cwd=run).stdout) == front


def test_report_is_written_anew(cli: Cli, run: Path) -> None:
    (run / "report.html").unlink()
    (run / "trials.csv").unlink()
    done = cli("report", run, cwd=run)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).samefile(run / "report.html")
    assert (run / "trials.csv").read_text().count("\n") == 6


def test_exported_model_runs_without_paretune(cli: Cli, run: Path, tmp_path: Path) -> None:
    done = cli("export", run, "--knee", "--output", tmp_path / "model", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "equal bit for bit" in done.stderr
    program = (tmp_path / "model" / "run.py").read_text()
    assert "paretune" not in program.replace("nothing of paretune", "")
    # -I leaves out the working directory and the user's site, so that only installed packages count.
    checked = subprocess.run(
        [sys.executable, "-I", str(tmp_path / "model" / "run.py")], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.startswith("ok: ")


def test_export_refuses_an_artifact_that_was_changed(cli: Cli, run: Path, tmp_path: Path) -> None:
    point = json.loads((run / "front.json").read_text())["points"][0]
    weights = run / point["artifact"] / "weights.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    try:
        done = cli("export", run, "--trial", str(point["trial"]), "--output", tmp_path / "m", cwd=tmp_path)
    finally:
        weights.write_bytes(original)
    assert done.returncode == 1
    assert "SHA-256" in done.stderr
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param([], "exactly one rule", id="no rule"),
        pytest.param(["--knee", "--trial", "0"], "exactly one rule", id="two rules"),
        pytest.param(["--max-latency-ms", "0.000001"], "--max-latency-ms must be at least", id="too fast"),
        pytest.param(["--min-accuracy", "2"], "--min-accuracy must be at most", id="too accurate"),
        pytest.param(["--trial", "99"], "--trial must be a trial with an artifact", id="no such trial"),
    ],
)
def test_export_needs_a_rule_that_fits(cli: Cli, run: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    done = cli("export", run, *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "exports").exists()


def test_export_picks_by_latency_and_accuracy(cli: Cli, run: Path, tmp_path: Path) -> None:
    points = json.loads((run / "front.json").read_text())["points"]
    slowest = max(points, key=lambda point: point["validation"]["latency_ms"])
    fastest = min(points, key=lambda point: point["validation"]["latency_ms"])
    limit = str(slowest["validation"]["latency_ms"])
    done = cli("export", run, "--max-latency-ms", limit, "--output", "a", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    best = max(points, key=lambda point: point["validation"]["accuracy"])
    assert json.loads((tmp_path / "a" / "card.json").read_text())["plan_hash"] == best["plan_hash"]
    assert cli("export", run, "--min-accuracy", "0", "--output", "b", cwd=tmp_path).returncode == 0
    assert json.loads((tmp_path / "b" / "card.json").read_text())["plan_hash"] == fastest["plan_hash"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["check", "missing.yaml"], "missing.yaml", id="no such job"),
        pytest.param(["show", "."], "front.json", id="not a run"),
        pytest.param(["resume", "."], "job.yaml", id="nothing to resume"),
        pytest.param(["frobnicate"], "frobnicate", id="no such command"),
        pytest.param(["check"], "JOB", id="no argument"),
    ],
)
def test_wrong_use_exits_with_2(cli: Cli, tmp_path: Path, arguments: list[str], message: str) -> None:
    done = cli(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("override", "message"),
    [
        pytest.param("serach.trials=5", "search", id="unknown section"),
        pytest.param("search.trails=5", "trials", id="unknown key"),
        pytest.param("space.max_ratio=1.2", "space.max_ratio", id="ratio out of range"),
        pytest.param("space.bits=[24]", "space.bits must be widths that the runtime", id="width not executed"),
        pytest.param("model.factory=project:biuld", "build", id="import string that fails"),
        pytest.param("target.runtime=openvno", "openvino", id="unknown runtime"),
    ],
)
def test_a_wrong_job_exits_with_2_before_anything_is_spent(
    cli: Cli, project: Path, override: str, message: str
) -> None:
    done = cli("run", "job.yaml", "-o", override, "-o", "name=wrong", cwd=project)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (project / "results" / "wrong").exists()


def test_a_run_that_exists_is_left_alone(cli: Cli, run: Path, project: Path) -> None:
    before = (run / "front.json").stat().st_mtime_ns
    done = cli("run", "job.yaml", *SMALL, cwd=project)
    assert done.returncode == 2
    assert "paretune resume" in done.stderr
    assert (run / "front.json").stat().st_mtime_ns == before


def test_a_job_that_fails_does_not_keep_the_others_from_running(cli: Cli, run: Path, project: Path) -> None:
    text = (project / "job.yaml").read_text()
    (project / "bad.yaml").write_text(
        text.replace("project:build", "project:biuld").replace("name: digits", "name: bad")
    )
    done = cli("run", "bad.yaml", "job.yaml", *SMALL, "--resume", cwd=project)
    assert done.returncode == 2, done.stderr
    assert "biuld" in done.stderr
    assert "nothing is left to do" in done.stderr, "the run that was there is gone on with"
    bad, good = done.stdout.splitlines()[-2:]
    assert bad.split()[:4] == ["bad", "wrong", "no", "front"]
    assert good.split()[:2] == ["digits", "done"]
    assert good.endswith(str(run))


def test_a_run_of_another_job_is_not_gone_on_with(cli: Cli, run: Path, project: Path) -> None:
    done = cli("run", "job.yaml", *SMALL, "--resume", "-o", "space.max_ratio=0.5", cwd=project)
    assert done.returncode == 2
    assert "differs in space.max_ratio" in done.stderr


def test_mistakes_of_several_jobs_are_told_before_any_is_run(cli: Cli, project: Path) -> None:
    done = cli("run", "job.yaml", "missing.yaml", "-o", "name=several", cwd=project)
    assert done.returncode == 2
    assert "missing.yaml" in done.stderr
    assert "job 1" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(["submit", "job.yaml"], "results must be an absolute path", id="submit without results"),
        pytest.param(["status", "--address", "http://127.0.0.1:1"], "paretune[cluster]", id="status without cluster"),
        pytest.param(["logs"], "ID", id="logs of nothing"),
    ],
)
def test_jobs_need_a_cluster(cli: Cli, project: Path, arguments: list[str], message: str) -> None:
    done = cli(*arguments, cwd=project)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_feasible_exits_with_1(cli: Cli, project: Path) -> None:
    bound = 'constraints=["latency_ms <= 0.000001"]'
    done = cli("run", "job.yaml", *SMALL, "-o", "search.trials=2", "-o", bound, "-o", "name=tight", cwd=project)
    assert done.returncode == 1
    assert "latency_ms <= 1e-06" in done.stderr
    assert (project / "results" / "tight" / "trials.csv").is_file()
