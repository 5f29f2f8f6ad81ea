"""ONNX graphs in 16-bit floats, run by ONNX Runtime, which inserts casts where it has no kernel of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import nn

from paretune.errors import TrialError
from paretune.objectives.compress.schemes import Scheme
from paretune.objectives.data import Inputs, call
from paretune.objectives.runtimes.onnx_export import export_onnx, named_arrays
from paretune.objectives.runtimes.onnx_graph import layer_names
from paretune.objectives.runtimes.onnx_half import to_half
from tests import nets
from tests.objectives.runtimes.contract import NETS, prepared

HALVES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def exported(build: Callable[[], nn.Module], inputs: Callable[[int], Inputs], bits: int, path: Path) -> Any:
    module = prepared(build, inputs(16), bits, {8: Scheme(symmetric=True)})
    export_onnx(module, inputs(2), path)
    return module, onnx.load(path)


def run(model: ModelProto, arrays: dict[str, Any]) -> Any:
    options = onnxruntime.SessionOptions()
    # With it, ONNX Runtime 1.31 crashes on a Transformer in fp16.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, arrays)[0]


def types(model: ModelProto) -> dict[str, int]:
    graph = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    known = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)}
    return known | {tensor.name: tensor.data_type for tensor in graph.initializer}


def small(nodes: list[Any], values: dict[str, Any], shape: tuple[int, ...], domain: str = "") -> ModelProto:
    """A float model from ``x`` of that shape to ``y``."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], initializers)
    opsets = [helper.make_opsetid("", 17)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize(("build", "inputs"), NETS)
def test_fp16_is_close_to_the_module(
    tmp_path: Path, build: Callable[[], nn.Module], inputs: Callable[[int], Inputs], bits: int
) -> None:
    module, model = exported(build, inputs, bits, tmp_path / "m.onnx")
    with torch.no_grad():
        expected = call(module, inputs(16)).numpy()
    found = run(to_half(model, "fp16"), named_arrays(inputs(16)))
    assert found.dtype == np.float32
    # What falls on the border of two of the 256 levels may round either way.
    assert np.abs(found - expected).mean() <= (2e-4 if bits == 32 else 5e-3) * np.ptp(expected)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(("build", "inputs"), NETS)
def test_every_product_reads_the_format_alone(
    tmp_path: Path, build: Callable[[], nn.Module], inputs: Callable[[int], Inputs], half: str
) -> None:
    _, model = exported(build, inputs, 8, tmp_path / "m.onnx")
    integers = {tensor.name for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT8}
    interface = [value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)]
    converted = to_half(model, half)
    onnx.checker.check_model(converted, full_check=True)
    known = types(converted)
    assert layer_names(converted.graph) == layer_names(model.graph)
    for node in converted.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            assert {known[name] for name in (*node.input, *node.output)} == {HALVES[half]}, node.name
    assert {known[name] for name in integers} == {TensorProto.INT8}
    graph = converted.graph
    assert [value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)] == interface


def test_what_the_format_has_no_operation_for_stays_float32() -> None:
    scales = np.array([1, 1, 6 / 7, 6 / 7], np.float32)
    resize = helper.make_node("Resize", ["x", "", "scales"], ["small"], mode="nearest")
    scale = helper.make_node("Mul", ["small", "two"], ["y"])
    model = small([resize, scale], {"scales": scales, "two": np.float32(2)}, (1, 1, 7, 7))
    image = np.arange(49, dtype=np.float32).reshape(1, 1, 7, 7)
    converted = to_half(model, "fp16")
    onnx.checker.check_model(converted, full_check=True)
    np.testing.assert_array_equal(run(converted, {"x": image}), run(model, {"x": image}))
    nodes = [helper.make_node("Celu", ["x"], ["z"]), helper.make_node("Neg", ["z"], ["y"])]
    celu = to_half(small(nodes, {}, (4,)), "bf16")
    onnx.checker.check_model(celu, full_check=True)
    known = types(celu)
    assert {node.op_type: known[node.input[0]] for node in celu.graph.node if node.op_type != "Cast"} == {
        "Celu": TensorProto.FLOAT,
        "Neg": TensorProto.BFLOAT16,
    }


def test_numbers_beyond_fp16() -> None:
    limits = np.array([-np.inf, -3e38, 1e6, 1e-9, np.nan], np.float32)
    converted = to_half(small([helper.make_node("Add", ["x", "limits"], ["y"])], {"limits": limits}, (5,)), "fp16")
    found = run(converted, {"x": np.zeros(5, np.float32)})
    np.testing.assert_array_equal(found, [-np.inf, -65504, 65504, 0, np.nan])


@pytest.mark.parametrize("half", HALVES)
def test_scales_stay_positive(half: str) -> None:
    values = {"scale": np.float32(1e-12), "zero": np.int8(0)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
    ]
    converted = to_half(small(nodes, values, (4,)), half)
    scale = next(tensor for tensor in converted.graph.initializer if tensor.name == "scale")
    assert 0 < float(numpy_helper.to_array(scale)) < 1e-7


def test_a_ConstantOfShape_without_a_value_is_converted_too() -> None:  # noqa: N802
    nodes = [helper.make_node("ConstantOfShape", ["sizes"], ["zeros"]), helper.make_node("Add", ["x", "zeros"], ["y"])]
    converted = to_half(small(nodes, {"sizes": np.array([4])}, (4,)), "bf16")
    assert types(converted)["zeros"] == TensorProto.BFLOAT16


def test_an_output_that_is_read_inside_as_well() -> None:
    model = small([helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Neg", ["y"], ["unread"])], {}, (4,))
    found = run(to_half(model, "fp16"), {"x": np.array([-1, 0, 1, 2], np.float32)})
    np.testing.assert_array_equal(found, [0, 0, 1, 2])


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        pytest.param(helper.make_node("Odd", ["x"], ["y"], domain="com.example"), "com.example", id="foreign"),
        pytest.param(
            helper.make_node(
                "If",
                ["yes"],
                ["y"],
                **{
                    branch: helper.make_graph(
                        [helper.make_node("Neg", ["x"], ["z"])],
                        branch,
                        [],
                        [helper.make_tensor_value_info("z", TensorProto.FLOAT, (4,))],
                    )
                    for branch in ("then_branch", "else_branch")
                },
            ),
            "graph inside",
            id="control flow",
        ),
    ],
)
def test_what_cant_be_converted_fails_the_trial(node: Any, reason: str) -> None:
    model = small([node], {"yes": np.array(True)}, (4,), node.domain)
    with pytest.raises(TrialError, match=reason):
        to_half(model, "fp16")


def test_the_given_model_stays_as_it_was(tmp_path: Path) -> None:
    _, model = exported(nets.MLP, nets.vector, 8, tmp_path / "m.onnx")
    before = model.SerializeToString(deterministic=True)
    first = to_half(model, "bf16").SerializeToString(deterministic=True)
    assert model.SerializeToString(deterministic=True) == before
    assert to_half(model, "bf16").SerializeToString(deterministic=True) == first
