"""OpenVINO keeps the contract of runtimes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from torch import nn

from paretune.objectives.runtimes import LoadOptions, Runtime
from paretune.objectives.runtimes.openvino import OpenVINO
from tests import nets
from tests.objectives.runtimes.contract import RuntimeContract, prepared


class TestOpenVINO(RuntimeContract):
    @pytest.fixture
    def runtime(self) -> Runtime:
        return OpenVINO()

    @pytest.mark.parametrize("batch", [1, 2, 8, 64])
    def test_neighbouring_linear_layers_are_told_apart(self, runtime: Runtime, tmp_path: Path, batch: int) -> None:
        """OpenVINO puts them into one kernel at some batches, which would report the width of its output alone."""

        def build() -> nn.Module:
            sizes = (12, 32, 32, 16, 4)
            layers: list[nn.Module] = []
            for size, following in pairwise(sizes):
                layers += [nn.Linear(size, following), nn.ReLU()]
            return nn.Sequential(*layers[:-1])

        asked = {"0": 8, "2": 32, "4": 8, "6": 8}
        runtime.deploy(prepared(build, nets.vector(), asked), nets.vector(), tmp_path / "model.onnx")
        reports = runtime.load(tmp_path / "model.onnx", LoadOptions(batch)).layers()
        assert {name: reports[name].bits for name in asked} == asked
