"""Results for Tune: what is told comes out as it went in, and Tune sees plain values alone."""

from __future__ import annotations

import copy
import json
import pickle

import pytest

from paretune.search.executor import Outcome, Progress
from paretune.search.tune.events import (
    Cargo,
    End,
    artifact_of,
    end_to_result,
    outcome_of,
    progress_of,
    progress_to_result,
)
from tests.search.tune.trials import OUTLINE, RUNG, record


@pytest.mark.parametrize("rungs", [(), (RUNG, RUNG)], ids=["outline", "rungs"])
def test_progress_comes_back(rungs: tuple[()]) -> None:
    progress = Progress(3, OUTLINE, rungs, {"train": 0.1}, 5)
    result = progress_to_result(progress)
    assert progress_of(result) == progress
    assert outcome_of(3, result, 0) is None
    assert result["latency_ms"] == 2.0
    assert result.get("accuracy") == (0.75 if rungs else None)
    assert json.loads(json.dumps(result)) == result


def test_a_record_comes_back_with_its_artifact() -> None:
    result = end_to_result(3, End(record()), Cargo(b"...", "artifact"))
    assert outcome_of(3, result, 1) == Outcome(3, record(), retries=1)
    assert progress_of(result) is None
    assert (result["done"], result["accuracy"]) == (True, 0.9)
    artifact = artifact_of(result)
    assert artifact is not None
    assert artifact.unload() == b"..."


def test_an_error_comes_back() -> None:
    result = end_to_result(3, End(error="no such layer", details="Traceback"))
    assert outcome_of(3, result, 2) == Outcome(3, error="no such layer", details="Traceback", retries=2)
    assert artifact_of(result) is None


def test_cargo_is_shared_by_copies_and_shows_nothing() -> None:
    cargo = Cargo(b"secret", "artifact of 3")
    copied = copy.deepcopy({"nested": cargo})["nested"]
    assert str(cargo) == "<artifact of 3>"
    assert pickle.loads(pickle.dumps(cargo)).content == b"secret"
    assert cargo.unload() == b"secret"
    assert copied.unload() is None
