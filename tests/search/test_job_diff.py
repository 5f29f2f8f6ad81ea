"""Whether a run was made of a job."""

from __future__ import annotations

from pathlib import Path

import pytest

from paretune.errors import JobError
from paretune.search.job import Job, load_job
from paretune.search.job_diff import check_same_job, is_file, leaves

TEXT = """
name: small
model: {factory: 'project:build', weights: weights.pt, variants: {slim: {factory: 'project:slim', weights: slim.pt}}}
teacher: [same, {factory: 'project:large', weights: large.pt}]
data: {source: npz, args: {path: data/small.npz, root: images, weights: '../a/b'}}
targets: [{runtime: openvino}, {runtime: onnxruntime, name: other}]
"""


def job_in(folder: Path, *overrides: str) -> Job:
    folder.mkdir(exist_ok=True)
    (folder / "small.yaml").write_text(TEXT)
    return load_job(folder / "small.yaml", overrides)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    (run / "job.yaml").write_text(job_in(tmp_path / "first").to_yaml())
    return run


def test_another_folder_budget_and_place_are_the_same_job(run: Path, tmp_path: Path) -> None:
    changes = ["search.trials=99", "search.timeout=5", "search.workers=7", "results=elsewhere", "search.executor=ray"]
    check_same_job(job_in(tmp_path / "second", *changes), run)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("space.bits=[32, 8]", r"space\.bits\[0\]"),
        ("search.seed=1", r"search\.seed"),
        ("targets.1.batch_size=4", r"targets\[1\]\.batch_size"),
        ("model.weights=others.pt", r"model\.weights"),
        ("data.args.path=data/others.npz", r"data\.args\.path"),
        ("data.args.root=others", r"data\.args\.root"),
        ("data.args.weights=../b/b", r"data\.args\.weights"),
        ("model.variants.slim.weights=others.pt", r"model\.variants\.slim\.weights"),
        ("constraints=['latency_ms <= 1']", r"constraints\[0\]"),
        ("storage=sqlite:///other.db", "storage"),
    ],
)
def test_what_changes_the_trials_is_another_job(run: Path, tmp_path: Path, override: str, key: str) -> None:
    with pytest.raises(JobError, match=rf"run/job\.yaml differs in .*{key}"):
        check_same_job(job_in(tmp_path / "second", override), run)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("model.weights", True),
        ("model.variants.v1.5.weights", True),
        ("model.variants.args.weights", True),
        ("teacher.weights", True),
        ("teacher[2].weights", True),
        ("data.args.path", True),
        ("data.args.root", True),
        ("model.args.weights", False),  # torchvision's are names
        ("model.variants.slim.args.weights", False),
        ("teacher[2].args.weights", False),
        ("data.args.weights", False),
        ("data.args.more.path", False),
    ],
)
def test_files_of_a_job(key: str, expected: bool) -> None:
    assert is_file(key) is expected


def test_leaves() -> None:
    nested = {"a": {"b": 1, "c": [2, {"d": None}]}, "e": []}
    assert list(leaves(nested)) == [("a.b", 1), ("a.c[0]", 2), ("a.c[1].d", None)]
