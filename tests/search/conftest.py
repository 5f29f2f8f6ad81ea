"""A job that takes seconds: a tiny network on handwritten digits, and a run folder whose baseline is measured."""

from __future__ import annotations

import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_digits

from paretune.objectives.baseline import make_baseline
from paretune.search.job import Job, make_job
from paretune.search.problem import BASELINE, load_problem
from paretune.search.profile import profile_job

MODULE = "tiny_digits"
SOURCE = '''
"""A tiny network on handwritten digits, and variants of both that are broken."""

from pathlib import Path

import numpy as np
import torch
from torch import nn


def build(classes=10):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, classes),
    )


def build_images():
    return nn.Conv2d(1, 4, 3)


def data(fault=""):
    arrays = np.load(Path(__file__).with_name("digits.npz"))
    inputs, targets = torch.from_numpy(arrays["inputs"]), torch.from_numpy(arrays["targets"])
    if fault == "NaN":
        inputs[700, 0, 3, 3] = torch.nan
    if fault == "labels":
        targets[300] = 10
    border = 512 if fault == "empty" else 768
    return (inputs[:512], targets[:512]), (inputs[512:border], targets[512:border]), (inputs[768:], targets[768:])
'''


@pytest.fixture(autouse=True)
def own_signals() -> None:
    """Ctrl-C is heard: an earlier test's `ray.tune.Tuner` leaves handlers that swallow it, and a shell has what it runs
    in the background ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the job's module and its data."""
    folder = tmp_path_factory.mktemp("project")
    (folder / f"{MODULE}.py").write_text(SOURCE)
    images, labels = load_digits(return_X_y=True)
    inputs = (images[:1024] / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    np.savez(folder / "digits.npz", inputs=inputs, targets=labels[:1024].astype(np.int64))
    yield folder
    sys.modules.pop(MODULE, None)
    while str(folder) in sys.path:
        sys.path.remove(str(folder))


# Fixed, so that no noise of the clock decides what there is to choose.
TECHNIQUES = {"prune": True, "quantize": True, "factorize": False, "sparsify": False, "share": False}


class TinyJob:
    """Makes jobs on the tiny network; sections given are merged into its own."""

    def __init__(self, project: Path) -> None:
        self.project = project

    def keys(self, results: Path, name: str = "tiny", **sections: Any) -> dict[str, Any]:
        keys: dict[str, Any] = {
            "name": name,
            "model": {"factory": f"{MODULE}:build"},
            "data": {"source": f"{MODULE}:data"},
            "space": {"channels": "fixed", **TECHNIQUES},
            "finetune": {"epochs": 0.2, "batch_size": 64},
            "target": {"batch_size": 8},
            "search": {"trials": 6, "workers": 2, "sampler": "tpe"},
            "verify": {"points": 1, "rounds": 1},
            "results": str(results),
            "python_path": [str(self.project)],
        }
        for section, value in sections.items():
            merged = isinstance(value, dict) and isinstance(keys.get(section), dict)
            keys[section] = keys[section] | value if merged else value
        return keys

    def __call__(self, results: Path, name: str = "tiny", **sections: Any) -> Job:
        return make_job(self.keys(results, name, **sections))


@pytest.fixture(scope="session")
def tiny(project: Path) -> TinyJob:
    return TinyJob(project)


@pytest.fixture(scope="session")
def measured(tiny: TinyJob, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder as it is before the first trial; copy it, don't change it."""
    results = tmp_path_factory.mktemp("measured")
    job = tiny(results)
    folder = results / job.name
    problem = load_problem(job)
    analysis = problem.analyse()
    folder.mkdir()
    profile_job(job, problem, make_baseline(problem, analysis, folder / BASELINE), analysis).write(folder)
    (folder / "job.yaml").write_text(job.to_yaml())
    return folder


class NewRun:
    """Makes run folders that only lack their trials."""

    def __init__(self, tiny: TinyJob, measured: Path, results: Path) -> None:
        self._tiny = tiny
        self._measured = measured
        self._results = results

    def __call__(self, name: str = "tiny", **sections: Any) -> Path:
        folder = self._results / name
        shutil.copytree(self._measured, folder)
        (folder / "job.yaml").write_text(self._tiny(self._results, name, **sections).to_yaml())
        return folder


@pytest.fixture
def new_run(tiny: TinyJob, measured: Path, tmp_path: Path) -> NewRun:
    return NewRun(tiny, measured, tmp_path)
