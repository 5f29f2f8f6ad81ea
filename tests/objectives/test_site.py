"""Targets ready to use: names of files, and widths asked for against those executed."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from paretune.errors import TrialError
from paretune.objectives.compress.lowrank import Factorized
from paretune.objectives.compress.quantization import insert_quantizers
from paretune.objectives.compress.schemes import STATIC, Scheme
from paretune.objectives.problem import Problem
from paretune.objectives.runtimes import LayerReport, Target
from paretune.objectives.site import check_executed, wanted_widths
from paretune.spaces.plan import Quantization

REPORTS = {"a": LayerReport(8, 0.0), "b": LayerReport(16, 0.0), "c": LayerReport(32, 0.0)}


BLOCKS = {**STATIC, 4: Scheme("float", block=16)}


def model(bits: dict[str, int], **how: Any) -> nn.Module:
    made = nn.Sequential(OrderedDict((name, nn.Linear(16, 16)) for name in ("a", "b", "c", "ghost"))).eval()
    config = Quantization(bits=bits, **how)
    insert_quantizers(made, config, BLOCKS, lambda module: module(torch.zeros(2, 16)))  # type: ignore[no-any-return]
    return made


def test_floats_of_a_plan_stand_for_the_targets_own() -> None:
    assert check_executed(REPORTS, wanted_widths(model({"a": 8, "b": 32}), 16, ["a", "b"])) == {"a": 8, "b": 16}


def test_few_bits_run_in_their_container() -> None:
    assert check_executed(REPORTS, wanted_widths(model({"a": 3}), 16, ["a", "b"])) == {"a": 8, "b": 16}


@pytest.mark.parametrize("layer", ["a", "b"])
def test_weights_alone_run_in_floats_or_on_their_own_kernel(layer: str) -> None:
    made = model({layer: 3}, activations="float")
    assert check_executed(REPORTS, wanted_widths(made, 16, [])) == {layer: REPORTS[layer].bits}


def test_the_parts_of_a_factorized_layer_count() -> None:
    made = nn.Sequential(OrderedDict(a=Factorized(nn.Linear(16, 2), nn.Linear(2, 16))))
    reports = {"a.0": LayerReport(32, 0.0)}
    with pytest.raises(TrialError, match=r"a\.1 was to run in 32 bits and isn't found"):
        check_executed(reports, wanted_widths(made, 32, ["a"]))
    assert check_executed(reports | {"a.1": LayerReport(32, 0.0)}, wanted_widths(made, 32, ["a"])) == {
        "a.0": 32,
        "a.1": 32,
    }


@pytest.mark.parametrize(
    ("bits", "how", "layers", "message"),
    [
        pytest.param({"a": 4}, {}, ["a"], "a was to run in 4 bits and runs in 8", id="another width"),
        pytest.param(
            {"c": 3}, {}, ["c"], "c was to run in 3 bits, stored in 8, and runs in 32", id="few bits as floats"
        ),
        pytest.param({}, {}, ["a"], "a was to run in 16 bits and runs in 8", id="floats as integers"),
        pytest.param({"ghost": 32}, {}, ["ghost"], "ghost was to run in 16 bits and isn't found", id="not reported"),
        pytest.param({"ghost": 8}, {}, [], "ghost was to run in 8 bits and isn't found", id="not reported at all"),
        pytest.param({"c": 8}, {"activations": "float"}, [], "c .* runs in 32", id="another float format"),
        pytest.param({"b": 4}, {"activations": "float"}, [], "b .* runs in 16", id="blocks have a kernel"),
    ],
)
def test_mismatches_are_named(bits: dict[str, int], how: dict[str, Any], layers: list[str], message: str) -> None:
    with pytest.raises(TrialError, match=message):
        check_executed(REPORTS, wanted_widths(model(bits, **how), 16, layers))


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
