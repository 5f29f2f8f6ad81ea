"""The exported graph: input names, node names, integer weights, and the two exporters."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from paretune.errors import TrialError
from paretune.objectives.compress.quantization import QuantizedLayer
from paretune.objectives.compress.schemes import STATIC, Scheme
from paretune.objectives.data import Inputs
from paretune.objectives.runtimes.onnx_export import export_onnx, input_names, named_arrays
from paretune.objectives.runtimes.onnx_graph import fold_alone
from tests import nets
from tests.objectives.runtimes.contract import Blocks, blocks, prepared


def graph_of(path: Path) -> Any:
    model = onnx.load(str(path))
    onnx.checker.check_model(model)
    return model.graph


@pytest.mark.parametrize(
    ("inputs", "names"),
    [
        pytest.param(nets.vector(), ["input"], id="tensor"),
        pytest.param(nets.image_and_numbers(), ["input_0", "input_1"], id="tuple"),
        pytest.param((nets.vector(),), ["input_0"], id="tuple of one"),
        pytest.param(nets.tokens(), ["tokens", "mask"], id="dict"),
    ],
)
def test_input_names(inputs: Inputs, names: list[str]) -> None:
    assert input_names(inputs) == names
    arrays = named_arrays(inputs)
    assert list(arrays) == names
    given = [inputs] if isinstance(inputs, Tensor) else inputs.values() if isinstance(inputs, dict) else inputs
    for array, tensor in zip(arrays.values(), given, strict=True):
        np.testing.assert_array_equal(array, tensor.numpy())


def test_inputs_and_outputs_have_a_free_batch(tmp_path: Path) -> None:
    export_onnx(prepared(nets.TwoInputs, nets.image_and_numbers(), 8), nets.image_and_numbers(), tmp_path / "m.onnx")
    graph = graph_of(tmp_path / "m.onnx")
    assert [value.name for value in graph.input] == ["input_0", "input_1"]
    assert [value.name for value in graph.output] == ["output"]
    for value in (*graph.input, *graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_quantized_weights_are_int8_rounded_as_numpy_rounds(tmp_path: Path) -> None:
    module = prepared(nets.Residual, nets.image(), {"stem": 8, "outer1": 4, "head": 8})
    export_onnx(module, nets.image(), tmp_path / "m.onnx")
    graph = graph_of(tmp_path / "m.onnx")
    values = {initializer.name: numpy_helper.to_array(initializer) for initializer in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    products = {node.name: node for node in graph.node}
    layers = {name: part for name, part in module.named_modules() if isinstance(part, QuantizedLayer)}
    assert len(layers) == 3
    for name, part in layers.items():
        weight: Tensor = part.layer.weight.detach()  # type: ignore[assignment]
        scale = part.weight_scale.reshape(-1, *[1] * (weight.dim() - 1)).numpy()
        source = producers[products[name].input[1]]
        assert source.op_type == "DequantizeLinear"
        stored = values[source.input[0]]
        assert stored.dtype == np.int8
        np.testing.assert_array_equal(stored, np.clip(np.rint(weight.numpy() / scale), -128, 127))
        np.testing.assert_array_equal(values[source.input[1]], part.weight_scale.numpy())
    assert values["model.inner1.weight"].dtype == np.float32
    assert not any(name.endswith("layer.weight") for name in values), "no float copy is left"


@pytest.mark.parametrize("bits", [32, 8])
def test_nodes_are_named_after_their_modules(tmp_path: Path, bits: int) -> None:
    module = prepared(nets.Residual, nets.image(), bits)
    export_onnx(nn.Sequential(module), nets.image(), tmp_path / "m.onnx")
    named = [node.name for node in graph_of(tmp_path / "m.onnx").node if node.op_type in ("Conv", "Gemm", "MatMul")]
    layers = ("stem", "inner1", "outer1", "inner2", "outer2", "shortcut", "head")
    assert sorted(named) == sorted(f"0.{name}" for name in layers)


def test_linear_layers_on_sequences_are_named_too(tmp_path: Path) -> None:
    export_onnx(prepared(nets.TokenEncoder, nets.tokens(), 8), nets.tokens(), tmp_path / "m.onnx")
    named = {node.name for node in graph_of(tmp_path / "m.onnx").node if node.op_type in ("Gemm", "MatMul")}
    assert named == {"up", "down", "head"}


@pytest.mark.parametrize("bits", [32, 8])
def test_a_module_called_twice_gets_a_number(tmp_path: Path, bits: int) -> None:
    export_onnx(prepared(nets.Twice, nets.vector(), bits), nets.vector(), tmp_path / "m.onnx")
    graph = graph_of(tmp_path / "m.onnx")
    assert [node.name for node in graph.node if node.op_type == "Gemm"] == ["first", "again", "again#2", "head"]


@pytest.mark.parametrize("bits", [32, 8])
def test_equal_weights_keep_their_own_names(tmp_path: Path, bits: int) -> None:
    def build() -> nn.Module:
        model = nets.Residual()
        for layer in (model.inner1, model.outer1):
            layer.weight.data.zero_()
        return model

    export_onnx(prepared(build, nets.image(), bits), nets.image(), tmp_path / "m.onnx")
    named = {node.name for node in graph_of(tmp_path / "m.onnx").node if node.op_type in ("Conv", "Gemm")}
    assert named == {"stem", "inner1", "outer1", "inner2", "outer2", "shortcut", "head"}


def test_weights_in_blocks_are_int4(tmp_path: Path) -> None:
    asked = {"up": 4, "again": 4, "bare": 4, "conv": 8, "hidden": 4, "head": 8}
    schemes = {**STATIC, 4: Scheme(activations="float", block=16)}
    module = prepared(Blocks, blocks(8), asked, schemes)
    export_onnx(module, blocks(2), tmp_path / "m.onnx")
    assert onnx.load(tmp_path / "m.onnx").opset_import[0].version == 21
    graph = graph_of(tmp_path / "m.onnx")
    stored = {tensor.name: tensor for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    products = {node.name: node for node in graph.node if node.op_type == "MatMul"}
    assert products.keys() >= {"up", "again", "again#2", "bare", "hidden"}
    for name in ("up", "again", "bare", "hidden"):
        source = producers[products[name].input[1]]
        levels, scales = (numpy_helper.to_array(stored[name]) for name in source.input)
        assert stored[source.input[0]].data_type == onnx.TensorProto.INT4
        weight = levels.astype(np.float32) * np.repeat(scales, 16, axis=0)
        expected = module.get_submodule(name).quantized_weight().detach().numpy()  # type: ignore[operator]
        np.testing.assert_allclose(weight.T, expected, rtol=1e-5)
    assert not any(name.startswith("model.up") and name.endswith("weight") for name in stored), "no float copy is left"
    assert producers[products["again"].input[1]] is producers[products["again#2"].input[1]], "stored once"


def test_quantized_weights_that_arent_exported(tmp_path: Path) -> None:
    module = nets.MLP().eval()
    module.add_module("idle", QuantizedLayer(nn.Linear(4, 4), 8, Scheme("float")).eval())
    with pytest.raises(TrialError, match="idle's isn't"):
        export_onnx(module, nets.vector(), tmp_path / "m.onnx")


@pytest.mark.parametrize("affine", [False, True])
def test_weights_alone_are_marked_and_can_be_folded(tmp_path: Path, affine: bool) -> None:
    module = prepared(nets.Residual, nets.image(), 6, activations="float", affine=affine)
    export_onnx(module, nets.image(), tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    kinds = Counter(node.op_type for node in model.graph.node)
    assert (kinds["QuantizeLinear"], kinds["DequantizeLinear"]) == (0, 7)
    stored = {numpy_helper.to_array(tensor).dtype for tensor in model.graph.initializer if "levels" in tensor.name}
    assert stored == {np.dtype(np.uint8 if affine else np.int8)}
    assert fold_alone(model.graph)
    assert not any(node.op_type == "DequantizeLinear" for node in model.graph.node)
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for name, part in module.named_modules():
        if isinstance(part, QuantizedLayer):
            expected = part.quantized_weight().detach().numpy()
            np.testing.assert_array_equal(weights[f"model.{name}.layer.weight"], expected)
    assert not fold_alone(model.graph), "nothing is left to fold"


def silent() -> nn.Module:
    model = nets.PlainCNN()
    for parameter in model.parameters():
        parameter.data.zero_()
    return model


@pytest.mark.parametrize("build", [nets.PlainCNN, silent], ids=["random weights", "equal weights"])
@pytest.mark.parametrize("bits", [32, 8])
def test_initializers_are_stored_once_each(tmp_path: Path, bits: int, build: Any) -> None:
    export_onnx(prepared(build, nets.image(2, 1), bits), nets.image(2, 1), tmp_path / "m.onnx")
    graph = graph_of(tmp_path / "m.onnx")
    counts = Counter(initializer.name for initializer in graph.initializer)
    assert set(counts.values()) == {1}
    read = {name for node in graph.node for name in node.input}
    assert counts.keys() <= read, "nothing that nobody reads"


def test_onnx_runtime_agrees_with_the_module(tmp_path: Path) -> None:
    module = prepared(nets.Residual, nets.image(), 8)
    export_onnx(module, nets.image(), tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        expected = module(nets.image(5)).numpy()
    found = session.run(None, {"input": nets.image(5).numpy()})[0]
    assert np.abs(found - expected).max() <= 2e-2 * np.ptp(expected)


def test_both_exporters_agree(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the newer exporter needs onnxscript")
    module = prepared(nets.MLP, nets.vector(), 32)
    outputs, names = [], []
    for dynamo in (False, True):
        path = tmp_path / f"{dynamo}.onnx"
        export_onnx(module, nets.vector(), path, dynamo=dynamo)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        outputs.append(session.run(None, {"input": nets.vector(7).numpy()})[0])
        graph = graph_of(path)
        names.append({node.name for node in graph.node if node.op_type in ("Gemm", "MatMul")})
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)
    assert names == [{"first", "narrow", "head"}] * 2
