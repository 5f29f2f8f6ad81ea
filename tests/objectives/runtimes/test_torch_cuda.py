"""torch-cuda, and torch-compile on a GPU, keep the contract of runtimes; what needs no GPU is tried without one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from paretune.errors import JobError
from paretune.objectives.runtimes import LoadOptions, Runtime
from paretune.objectives.runtimes.onnx_export import named_arrays
from paretune.objectives.runtimes.torch_compile import TorchCompile
from paretune.objectives.runtimes.torch_cuda import TorchCuda
from paretune.objectives.runtimes.torch_graph import Watched, count_products, lower
from paretune.objectives.runtimes.torch_layers import SparseLinear
from paretune.objectives.runtimes.torch_program import read_program, write_program
from paretune.objectives.runtimes.torch_runtime import _CudaSession, _Place, linear_schemes
from tests import nets
from tests.objectives.runtimes.contract import RuntimeContract, prepared

HAS_GPU = torch.cuda.is_available()
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
class TestTorchCuda(RuntimeContract):
    device = "cuda"

    @pytest.fixture
    def runtime(self) -> Runtime:
        return TorchCuda()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("kind", [TorchCuda, TorchCompile])
@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_a_captured_call_computes_what_is_scored(
    tmp_path: Path, kind: type[TorchCuda] | type[TorchCompile], bits: int
) -> None:
    runtime, path = kind(), tmp_path / "model.safetensors"
    asked = {"first": bits, "second": bits, "head": bits}

    def build() -> torch.nn.Module:
        layers = {"first": torch.nn.Linear(128, 64), "second": torch.nn.Linear(64, 64), "head": torch.nn.Linear(64, 8)}
        return torch.nn.Sequential(*layers.values())

    inputs = nets.vector(4, 128)
    module = prepared(build, inputs, dict(zip("012", asked.values(), strict=True)), linear_schemes("int8"))
    runtime.deploy(module, inputs, path)
    float_bits = max(bits, 16)
    measured = runtime.load(path, LoadOptions(4, device="cuda", float_bits=float_bits))
    scored = runtime.load(path, LoadOptions(4, device="cuda", float_bits=float_bits, purpose="score"))
    assert "cuda graph" in str(measured.settings["mode"])
    assert "cuda_graph" not in measured.settings
    assert {report.bits for report in measured.layers().values()} == {bits}
    first, second = named_arrays(inputs), named_arrays(nets.vector(4, 128) * 2)
    call = measured.bind(second)
    for arrays in (first, second, first):
        call()
        expected = scored.run(arrays)
        assert np.abs(measured.run(arrays) - expected).max() <= 2e-2 * np.ptp(expected)


@pytest.mark.parametrize("device", ["cpu", "abacus", "cuda:x", "cuda:99"])
def test_devices_that_arent_there(device: str) -> None:
    with pytest.raises(JobError) as caught:
        TorchCuda().capabilities(device)
    assert caught.value.where == "target.device"
    assert "cuda" in caught.value.remedy


@pytest.mark.skipif(HAS_GPU, reason="there is a CUDA device")
def test_without_a_gpu_the_remedy_says_where_to_look() -> None:
    with pytest.raises(JobError, match="with 0 of them visible") as caught:
        TorchCuda().capabilities("cuda")
    assert "CUDA_VISIBLE_DEVICES" in caught.value.remedy


@pytest.mark.parametrize("eight", ["int8", "fp8"])
def test_schemes_are_the_numbers_of_the_kernels(eight: str) -> None:
    schemes = linear_schemes(eight)
    assert schemes[8].activations == "dynamic"
    assert schemes[8].number == ("fp8" if eight == "fp8" else "int")
    assert (schemes[4].activations, schemes[4].block, schemes[4].number) == ("float", 32, "int")


def test_calls_that_arent_graphs_compute_the_same(tmp_path: Path) -> None:
    module = prepared(nets.TwoInputs, nets.image_and_numbers(), 32)
    write_program(module, nets.image_and_numbers(), tmp_path / "model.safetensors")
    program = read_program(tmp_path / "model.safetensors")
    place = _Place(torch.device("cpu"), 1, False, program.inputs)
    graph = lower(program, torch.float32, place.device, channels_last=True)
    session = _CudaSession(graph, place, {"head": 32}, {"mode": "eager"}, None)
    assert session.settings["mode"] == "eager"
    arrays = named_arrays(nets.image_and_numbers(4))
    with torch.no_grad():
        expected = module(*nets.image_and_numbers(4)).numpy()
    session.bind(arrays)()
    np.testing.assert_allclose(session.run(arrays), expected, atol=1e-6)


class Sparse(torch.nn.Module):
    """Linear layers with two zeros of four, one called twice, two with one weight, and one dense; inputs (N, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = torch.nn.Linear(16, 16)
        self.tied = torch.nn.Linear(16, 16)
        self.bare = torch.nn.Linear(16, 8, bias=False)
        self.head = torch.nn.Linear(8, 3)
        for layer in (self.twice, self.bare):
            layer.weight.data[:, 1::4] = 0
            layer.weight.data[:, 2::4] = 0
        self.tied.weight = self.twice.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.twice(self.twice(x).relu()).relu()
        return self.head(self.bare(self.tied(x).relu()))


def test_layers_with_the_pattern_get_sparse_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With PyTorch's dense kernels in the place of the GPU's."""
    monkeypatch.setattr(torch, "_cslt_compress", lambda weight: weight)
    monkeypatch.setattr(
        torch,
        "_cslt_sparse_mm",
        lambda weight, dense, bias=None, transpose_result=True: torch.nn.functional.linear(dense.t(), weight, bias),
    )
    torch.manual_seed(0)
    module, x = Sparse().eval(), nets.vector(4, 16)
    write_program(module, x, tmp_path / "model.safetensors")
    program, cpu = read_program(tmp_path / "model.safetensors"), torch.device("cpu")

    def made(dtype: torch.dtype, sparse: bool) -> tuple[torch.fx.GraphModule, int]:
        graph = lower(program, dtype, cpu, sparse=sparse)
        return graph, sum(isinstance(part, SparseLinear) for part in graph.modules())

    graph, count = made(torch.bfloat16, True)
    assert count == 3, "the layer that is called twice has one"
    watched = Watched(graph)
    with torch.no_grad():
        watched.watch(x)
        assert {"bare", "head"} < watched.layers.keys(), "the tied weight is called after one of its layers"
        assert set(watched.layers.values()) == {16}
        torch.testing.assert_close(graph(x), made(torch.bfloat16, False)[0](x))
    assert made(torch.bfloat16, False)[1] == 0
    assert made(torch.float32, True)[1] == 0, "there are no such kernels"


@pytest.mark.parametrize("operation", ["aten._cslt_sparse_mm.default", "aten::_cslt_sparse_mm"])
def test_sparse_products_are_seen(operation: str) -> None:
    nodes = {
        1: {"name": operation, "ctrl_deps": 0, "inputs": {"types": ["Tensor(c10::Half)", "Tensor(c10::Half)"]}},
        2: {"name": operation, "ctrl_deps": 0, "inputs": {"types": ["Tensor(signed char)", "Tensor(signed char)"]}},
    }
    assert count_products(nodes) == {16: 1, 8: 1}


@pytest.mark.gpu
@needs_gpu
def test_sparse_layers_run_on_sparse_kernels(tmp_path: Path) -> None:
    runtime = TorchCuda()
    if not runtime.capabilities("cuda").sparse_patterns:
        pytest.skip("needs cuSPARSELt and Ampere")
    torch.manual_seed(0)
    module, x = Sparse().eval(), nets.vector(4, 16)
    runtime.deploy(module, x, tmp_path / "model.safetensors")
    session = runtime.load(tmp_path / "model.safetensors", LoadOptions(4, device="cuda", float_bits=16))
    assert session.settings["sparse_layers"] == 3
    assert {report.bits for report in session.layers().values()} == {16}
    with torch.no_grad():
        expected = module(x).numpy()
    session.bind(named_arrays(x))()
    assert np.abs(session.run(named_arrays(x)) - expected).max() <= 2e-2 * np.ptp(expected)
