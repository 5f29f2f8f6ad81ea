"""ONNX Runtime keeps the contract of runtimes, and its optimizer's silent changes don't go unseen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from paretune.errors import JobError, TrialError
from paretune.objectives.runtimes import LoadOptions, Runtime
from paretune.objectives.runtimes import onnxruntime as module_under_test
from paretune.objectives.runtimes.onnx_export import named_arrays
from paretune.objectives.runtimes.onnxruntime import OnnxRuntime
from tests import nets
from tests.objectives.runtimes.contract import RuntimeContract, prepared

SCHEMES = OnnxRuntime().capabilities("cpu").schemes


class Named(nn.Module):
    """Modules with names as the optimizer makes them up; a convolution gives the output; inputs (N, 3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.a_token_1 = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.a_nchwc = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.fused = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.hardswish(self.a(nn.functional.silu(self.a_token_1(x))))
        return self.fused(nn.functional.leaky_relu(self.a_nchwc(x)))


class Reflected(nn.Module):
    """A padding between the input's quantizer and the convolution; inputs (N, 3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.padded = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")

    def forward(self, x: Tensor) -> Tensor:
        return self.padded(self.first(x).relu())


class TestOnnxRuntime(RuntimeContract):
    @pytest.fixture
    def runtime(self) -> Runtime:
        return OnnxRuntime()

    def test_a_device_that_the_build_lacks(self, runtime: Runtime) -> None:
        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            pytest.skip("this build has CUDA")
        with pytest.raises(JobError, match="'cuda'") as caught:
            runtime.capabilities("cuda")
        assert "onnxruntime-gpu" in caught.value.remedy

    @pytest.mark.parametrize("low", [("a_token_1", "a_nchwc"), ("a", "fused"), ("a_token_1", "a", "a_nchwc", "fused")])
    def test_layers_are_told_apart_whatever_their_names(
        self, runtime: Runtime, tmp_path: Path, low: tuple[str, ...]
    ) -> None:
        asked = {name: 8 if name in low else 32 for name in ("a_token_1", "a", "a_nchwc", "fused")}
        session = self._load(
            runtime, prepared(Named, nets.image(), asked, SCHEMES), nets.image(), tmp_path / "model.onnx", 2
        )
        assert {name: report.bits for name, report in session.layers().items()} == asked

    def test_what_runs_in_floats_all_the_same_is_reported_so(self, runtime: Runtime, tmp_path: Path) -> None:
        module = prepared(Reflected, nets.image(), 8, SCHEMES)
        session = self._load(runtime, module, nets.image(), tmp_path / "model.onnx", 2)
        assert {name: report.bits for name, report in session.layers().items()} == {"first": 8, "padded": 32}

    def test_the_optimizer_would_change_widths(
        self, runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A float layer between quantized ones becomes int8 unless that is switched off, and the report shows it."""
        asked = {"stem": 8, "inner1": 32, "outer1": 8, "inner2": 32, "outer2": 8, "shortcut": 8, "head": 8}
        module = prepared(nets.Residual, nets.image(), asked, SCHEMES)
        assert self._load(runtime, module, nets.image(), tmp_path / "m.onnx", 2).layers()["inner1"].bits == 32
        monkeypatch.setattr(module_under_test, "_UNFAITHFUL", ())
        assert self._load(runtime, module, nets.image(), tmp_path / "m.onnx", 2).layers()["inner1"].bits == 8

    def test_a_fixed_batch_is_found_when_bound_as_well(self, runtime: Runtime, tmp_path: Path) -> None:
        module = prepared(nets.FixedBatch, nets.vector(), 32)
        session = self._load(runtime, module, nets.vector(), tmp_path / "m.onnx", 5)
        with pytest.raises(TrialError, match="don't fix the batch size in forward"):
            session.bind(named_arrays(nets.vector(5)))

    @pytest.mark.parametrize("purpose", ["measure", "score", "profile"])
    def test_threads(self, runtime: Runtime, tmp_path: Path, purpose: str) -> None:
        module = prepared(nets.Residual, nets.image(), 8, SCHEMES)
        runtime.deploy(module, nets.image(), tmp_path / "m.onnx")
        options = LoadOptions(4, threads=2, purpose=purpose)  # type: ignore[arg-type]
        one, two = runtime.load(tmp_path / "m.onnx", LoadOptions(4)), runtime.load(tmp_path / "m.onnx", options)
        arrays = named_arrays(nets.image(4))
        np.testing.assert_allclose(two.run(arrays), one.run(arrays), rtol=1e-4, atol=1e-5)
        assert two.settings["intra_op_num_threads"] == 2

    def test_a_tiny_weight_doesnt_overflow_the_bias(self, runtime: Runtime, tmp_path: Path) -> None:
        """Biases are int32 in units of both scales: with no weight to speak of, that unit must not follow it down."""

        def build() -> nn.Module:
            layer = nn.Linear(12, 3)
            layer.weight.data[0] = 0
            layer.weight.data[1] *= 1e-9
            layer.bias.data = torch.tensor([5.0, -7.0, 1.0])
            return nn.Sequential(layer)

        module = prepared(build, nets.vector(), 8, SCHEMES)
        session = self._load(runtime, module, nets.vector(), tmp_path / "m.onnx", 2)
        assert session.layers()["0"].bits == 8
        with torch.no_grad():
            np.testing.assert_allclose(session.run(named_arrays(nets.vector())), module(nets.vector()), rtol=1e-4)


@pytest.mark.parametrize(
    ("threads", "cores", "expected"),
    [
        pytest.param(2, {0, 1}, "2", id="one beside the caller"),
        pytest.param(4, {8, 4, 6, 2}, "5;7;9", id="some of the cores"),
        pytest.param(4, {0, 1}, "2;1;2", id="fewer cores than threads"),
    ],
)
def test_affinities(threads: int, cores: set[int], expected: str) -> None:
    assert module_under_test._affinities(threads, cores) == expected
