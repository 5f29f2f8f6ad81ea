"""Targets ready to use: names of files, and widths asked for against those executed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from paretune.errors import TrialError
from paretune.objectives.problem import Problem
from paretune.objectives.runtimes import LayerReport, Target
from paretune.objectives.site import check_executed

REPORTS = {"a": LayerReport(8, 0.0), "b": LayerReport(16, 0.0), "c": LayerReport(32, 0.0)}


def test_floats_of_a_plan_stand_for_the_targets_own() -> None:
    assert check_executed(REPORTS, {"a": 8, "b": 32}, 16, ["a", "b"]) == {"a": 8, "b": 16}


@pytest.mark.parametrize(
    ("bits", "layers", "message"),
    [
        pytest.param({"a": 4}, ["a"], "a was to run in 4 bits and runs in 8", id="another width"),
        pytest.param({}, ["a"], "a was to run in 16 bits and runs in 8", id="floats as integers"),
        pytest.param({"ghost": 32}, ["ghost"], "ghost was to run in 16 bits and isn't found", id="not reported"),
        pytest.param({"ghost": 8}, [], "ghost was to run in 8 bits and isn't found", id="not reported at all"),
    ],
)
def test_mismatches_are_named(bits: dict[str, int], layers: list[str], message: str) -> None:
    with pytest.raises(TrialError, match=message):
        check_executed(REPORTS, bits, 16, layers)


def test_targets_of_one_runtime_share_a_file(problem: Problem) -> None:
    others = {
        "big": Target("openvino", batch_size=64),
        "ort": Target("onnxruntime"),
        "fp16": Target("torch-cuda", "cuda", options={"half": "fp16"}),
        "bf16": Target("torch-cuda", "cuda", options={"half": "bf16"}),
        "again": Target("torch-cuda", "cuda:1", options={"half": "fp16"}),
    }
    sites = replace(problem, others=others).sites
    assert {name: site.model for name, site in sites.items()} == {
        "": "model.onnx",
        "big": "model.onnx",
        "ort": "model@ort.onnx",
        "fp16": "model@fp16.safetensors",
        "bf16": "model@bf16.safetensors",
        "again": "model@fp16.safetensors",
    }
