"""TensorRT: what needs no GPU, and the contract of runtimes where there is one."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from paretune.errors import JobError
from paretune.objectives.data import Inputs, call
from paretune.objectives.runtimes import LoadOptions, Runtime, get_runtime
from paretune.objectives.runtimes.onnx_export import named_arrays
from paretune.objectives.runtimes.tensorrt import SCHEMES, TensorRT
from tests import nets
from tests.objectives.runtimes.contract import NETS, RuntimeContract, prepared

HAS_PACKAGE = find_spec("tensorrt") is not None


def run(model: onnx.ModelProto, arrays: dict[str, Any]) -> Any:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, arrays)[0]


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        pytest.param({"half": "float16"}, "fp16, bf16", id="half"),
        pytest.param({"tf32": 1}, "False, True", id="a number for a bool"),
        pytest.param({"cuda_graph": "yes"}, "True, False", id="a word for a bool"),
    ],
)
def test_values_of_options(options: dict[str, Any], allowed: str) -> None:
    with pytest.raises(JobError, match=allowed) as caught:
        get_runtime("tensorrt", options)
    assert caught.value.where == "target.options"


@pytest.mark.parametrize("device", ["abacus", "cpu", "cuda:", "gpu"])
def test_other_devices(device: str) -> None:
    with pytest.raises(JobError, match=repr(device)) as caught:
        TensorRT().capabilities(device)
    assert caught.value.where == "target.device"
    assert "use cuda" in caught.value.remedy


@pytest.mark.skipif(HAS_PACKAGE, reason="the package is installed")
@pytest.mark.parametrize("ask", ["capabilities", "load"])
def test_without_the_package_the_extra_is_named(tmp_path: Path, ask: str) -> None:
    with pytest.raises(JobError) as caught:
        if ask == "load":
            TensorRT().load(tmp_path / "model.onnx", LoadOptions(1, device="cuda"))
        TensorRT().capabilities("cuda:1")
    assert caught.value.where == "target.runtime"
    assert "paretune[tensorrt]" in caught.value.remedy


@pytest.mark.parametrize(("build", "inputs"), NETS)
def test_the_file_computes_what_the_fake_quantized_module_does(
    tmp_path: Path, build: Callable[[], nn.Module], inputs: Callable[[int], Inputs]
) -> None:
    module = prepared(build, inputs(16), 8, SCHEMES)
    TensorRT().deploy(module, inputs(2), tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    zeros = {node.input[2] for node in model.graph.node if node.op_type.endswith("quantizeLinear")}
    for tensor in model.graph.initializer:
        if tensor.name in zeros:
            assert tensor.data_type == onnx.TensorProto.INT8  # TensorRT knows no other zero point than 0
            assert not onnx.numpy_helper.to_array(tensor).any()
    with torch.no_grad():
        expected = call(module, inputs(16)).numpy()
    found = run(TensorRT().typed(model, LoadOptions(16)), named_arrays(inputs(16)))
    # A value that falls on the border of two levels may round either way; most don't.
    assert np.abs(found - expected).mean() <= 5e-3 * np.ptp(expected)


@pytest.mark.parametrize("float_bits", [32, 16])
def test_what_is_compiled_has_one_batch_size(tmp_path: Path, float_bits: int) -> None:
    module = prepared(nets.TwoInputs, nets.image_and_numbers(), 8, SCHEMES)
    TensorRT().deploy(module, nets.image_and_numbers(), tmp_path / "m.onnx")
    model = TensorRT().typed(onnx.load(tmp_path / "m.onnx"), LoadOptions(5, float_bits=float_bits))
    interface = (*model.graph.input, *model.graph.output)
    shapes = [[size.dim_value for size in value.type.tensor_type.shape.dim] for value in interface]
    assert shapes == [[5, *array.shape[1:]] for array in named_arrays(nets.image_and_numbers(2)).values()] + [[5, 3]]
    assert {size.dim_param for value in interface for size in value.type.tensor_type.shape.dim} == {""}
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    assert inferred.graph.output[0].type.tensor_type.shape.dim[0].dim_value == 5
    assert run(model, named_arrays(nets.image_and_numbers(5))).shape == (5, 3)


@pytest.mark.parametrize("float_bits", [32, 16])
def test_weights_that_alone_are_quantized_are_compiled_as_floats(tmp_path: Path, float_bits: int) -> None:
    module = prepared(nets.Residual, nets.image(8), 6, SCHEMES, activations="float", affine=True)
    TensorRT().deploy(module, nets.image(), tmp_path / "m.onnx")
    model = TensorRT().typed(onnx.load(tmp_path / "m.onnx"), LoadOptions(8, float_bits=float_bits))
    assert not any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node)
    with torch.no_grad():
        expected = call(module, nets.image(8)).numpy()
    found = run(model, named_arrays(nets.image(8)))
    assert np.abs(found - expected).max() <= (1e-4 if float_bits == 32 else 2e-2) * np.ptp(expected)


def without_a_gpu() -> str:
    if not torch.cuda.is_available():
        return "PyTorch finds no CUDA device"
    return "" if HAS_PACKAGE else "the package tensorrt isn't installed"


@pytest.mark.gpu
@pytest.mark.skipif(bool(without_a_gpu()), reason=without_a_gpu() or "there is a GPU")
class TestTensorRT(RuntimeContract):
    device = "cuda"

    @pytest.fixture(autouse=True)
    def _own_cache(self, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
        # One for all tests: what kernels take is kept there too.
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))

    @pytest.fixture
    def runtime(self) -> Runtime:
        return TensorRT()

    def test_a_damaged_engine_is_built_anew(self, runtime: Runtime, tmp_path: Path) -> None:
        module = self.prepared(runtime, nets.Residual, nets.image(), 8)
        before = self._load(runtime, module, nets.image(), tmp_path / "m.onnx", 4).run(named_arrays(nets.image(4)))
        for path in (Path(os.environ["XDG_CACHE_HOME"]) / "paretune" / "tensorrt").iterdir():
            path.write_bytes(path.read_bytes()[:-1])
        again = runtime.load(tmp_path / "m.onnx", LoadOptions(4, device=self.device))
        found = again.run(named_arrays(nets.image(4)))
        assert np.abs(found - before).mean() <= 5e-3 * np.ptp(before)

    @pytest.mark.parametrize("cuda_graph", [True, False])
    def test_bound_calls_read_their_own_inputs(self, tmp_path: Path, cuda_graph: bool) -> None:
        runtime = TensorRT(cuda_graph=cuda_graph)
        module = self.prepared(runtime, nets.MLP, nets.vector(), 32)
        session = self._load(runtime, module, nets.vector(), tmp_path / "m.onnx", 4)
        arrays = named_arrays(nets.vector(4))
        expected = session.run(arrays)
        first, other = session.bind(arrays), session.bind({"input": np.zeros((4, 12), np.float32)})
        for _ in range(3):
            first()
            other()
        torch.cuda.synchronize()
        assert session.settings["cuda_graph"] is cuda_graph
        np.testing.assert_array_equal(session.run(arrays), expected)
