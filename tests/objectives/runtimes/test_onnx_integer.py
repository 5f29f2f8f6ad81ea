"""What is changed for ONNX Runtime's integer kernels: the form of a graph, and nothing of what it computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from paretune.objectives.compress.schemes import Scheme
from paretune.objectives.data import Inputs
from paretune.objectives.runtimes import LoadOptions
from paretune.objectives.runtimes.onnx_export import export_onnx, named_arrays
from paretune.objectives.runtimes.onnx_integer import (
    drop_idle_rectifiers,
    join_equal_grids,
    spell_out_rectifiers,
    store_integer_biases,
    use_integer_kernels,
)
from paretune.objectives.runtimes.onnxruntime import OnnxRuntime
from tests import nets
from tests.objectives.runtimes.contract import Blocks, blocks, prepared

SCHEMES = {8: Scheme(outputs=("Conv1d", "Conv2d", "Conv3d")), 4: Scheme(activations="float", block=32)}
GRID = {"scale": np.float32(0.01), "same": np.float32(0.01), "other": np.float32(0.02)}


def run(model: onnx.ModelProto, inputs: Inputs) -> Any:
    """The model as it stands, without the runtime's own changes."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, named_arrays(inputs))[0]


def kinds(graph: onnx.GraphProto) -> Counter[str]:
    return Counter(node.op_type for node in graph.node)


def graph_of(nodes: list[tuple[str, list[str], str]], zero_point: int = 0) -> onnx.GraphProto:
    """A graph of (kind, inputs, output); `x` is its input and `y` its output."""
    values = {**GRID, "zero": np.uint8(zero_point), "low": np.float32(0), "six": np.float32(6), "one": np.float32(1)}
    value = helper.make_tensor_value_info
    return helper.make_graph(
        [helper.make_node(kind, inputs, [output], name=output) for kind, inputs, output in nodes],
        "graph",
        [value("x", TensorProto.FLOAT, [2, 3])],
        [value("y", TensorProto.FLOAT, [2, 3])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in values.items()],
    )


def pair(source: str, scale: str, name: str) -> list[tuple[str, list[str], str]]:
    return [
        ("QuantizeLinear", [source, scale, "zero"], f"{name}_q"),
        ("DequantizeLinear", [f"{name}_q", scale, "zero"], name),
    ]


@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        pytest.param(lambda: nets.wake_norms(nets.PlainCNN()), lambda batch: nets.image(batch, 1), id="PlainCNN"),
        pytest.param(nets.Residual, nets.image, id="Residual"),
        pytest.param(nets.Depthwise, nets.image, id="Depthwise"),
        pytest.param(nets.TwoInputs, nets.image_and_numbers, id="TwoInputs"),
        pytest.param(nets.TokenEncoder, nets.tokens, id="TokenEncoder"),
        pytest.param(nets.Twice, nets.vector, id="Twice"),
    ],
)
def test_outputs_stay_the_same(tmp_path: Path, build: Callable[[], nn.Module], inputs: Callable[[int], Inputs]) -> None:
    export_onnx(prepared(build, inputs(16), 8, SCHEMES), inputs(2), tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    before = run(model, inputs(16))
    for change in (drop_idle_rectifiers, join_equal_grids, spell_out_rectifiers):
        change(model.graph)
        np.testing.assert_array_equal(run(model, inputs(16)), before)
    use_integer_kernels(model)
    onnx.checker.check_model(model)
    # Biases are rounded to half a unit of the sum; a value on the border of two levels may fall to the other side.
    assert np.abs(run(model, inputs(16)) - before).mean() <= 2e-3 * np.ptp(before)
    assert "Relu" not in kinds(model.graph) or build is nets.Residual, "only sums keep theirs"


def test_weights_in_blocks_stay_the_same(tmp_path: Path) -> None:
    module = prepared(Blocks, blocks(16), dict.fromkeys(("up", "again", "bare", "hidden"), 4), SCHEMES)
    export_onnx(module, blocks(2), tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    with torch.no_grad():
        np.testing.assert_allclose(run(model, blocks(4)), module(blocks(4)), rtol=1e-4, atol=1e-5)
    use_integer_kernels(model)
    assert kinds(model.graph)["MatMulNBits"] == 5, "one for each call"
    assert sum(tensor.name.endswith(".blocks") for tensor in model.graph.initializer) == 4, "one for each layer"
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1  # exact inputs
    with torch.no_grad():
        np.testing.assert_allclose(run(model, blocks(4)), module(blocks(4)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("rectifier", "zero_point", "dropped"),
    [
        pytest.param(("Relu", []), 0, True, id="no negative values"),
        pytest.param(("Relu", []), 10, False, id="negative values"),
        pytest.param(("Clip", ["low", "six"]), 0, True, id="all below 6"),
        pytest.param(("Clip", ["low", "one"]), 0, False, id="some above 1"),
        pytest.param(("Clip", ["", "six"]), 10, True, id="no lower limit"),
    ],
)
@pytest.mark.parametrize("side", ["before", "after"])
def test_idle_rectifiers(rectifier: tuple[str, list[str]], zero_point: int, dropped: bool, side: str) -> None:
    kind, limits = rectifier
    if side == "before":
        nodes = [*pair("x", "scale", "d"), (kind, ["d", *limits], "r"), ("Identity", ["r"], "y")]
    else:
        nodes = [(kind, ["x", *limits], "r"), *pair("r", "scale", "d"), ("Identity", ["d"], "y")]
    graph = graph_of(nodes, zero_point)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    x = {"x": torch.linspace(-3, 9, 6).reshape(2, 3)}
    expected = run(model, x) if not limits else None
    drop_idle_rectifiers(model.graph)
    assert (kinds(model.graph)[kind] == 0) is dropped
    if expected is not None:
        np.testing.assert_array_equal(run(model, x), expected)


def test_a_rectifier_that_something_else_reads_is_kept() -> None:
    graph = graph_of([("Relu", ["x"], "r"), *pair("r", "scale", "d"), ("Add", ["r", "d"], "y")])
    drop_idle_rectifiers(graph)
    assert kinds(graph)["Relu"] == 1


@pytest.mark.parametrize(("scale", "joined"), [("same", True), ("other", False)])
def test_equal_grids_are_joined(scale: str, joined: bool) -> None:
    graph = graph_of([*pair("x", "scale", "d"), *pair("d", scale, "e"), ("Add", ["d", "e"], "y")])
    join_equal_grids(graph)
    assert kinds(graph)["QuantizeLinear"] == (1 if joined else 2)


def test_biases_are_integers_in_units_of_both_scales(tmp_path: Path) -> None:
    export_onnx(prepared(nets.TokenEncoder, nets.tokens(), 8, SCHEMES), nets.tokens(), tmp_path / "m.onnx")
    graph = onnx.load(tmp_path / "m.onnx").graph
    store_integer_biases(graph)
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for layer in ("up", "down", "head"):
        levels, scale = values[f"{layer}.bias.int32"], values[f"{layer}.bias.scale"]
        assert levels.dtype == np.int32
        expected = values[f"model.{layer}.layer.bias"]
        np.testing.assert_allclose(levels * scale, expected, atol=float(scale.max()) / 2, rtol=0)
        units = values[f"model.{layer}.input.scale"] * values[f"model.{layer}.layer.weight.scale"]
        np.testing.assert_array_equal(scale, units)


def test_rectifiers_after_products_are_spelled_out(tmp_path: Path) -> None:
    class Rectified(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(12, 8), nn.Linear(12, 8)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.relu6(self.first(x)).sigmoid() + self.second(x).relu().sigmoid()

    export_onnx(prepared(Rectified, nets.vector(), {"first": 8}, SCHEMES), nets.vector(), tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    before = run(model, nets.vector() * 20)
    spell_out_rectifiers(model.graph)
    assert {kind: kinds(model.graph)[kind] for kind in ("Max", "Min", "Clip", "Relu")} == {
        "Max": 1,
        "Min": 1,
        "Clip": 0,
        "Relu": 1,
    }
    np.testing.assert_array_equal(run(model, nets.vector() * 20), before)


@pytest.mark.parametrize("shape", [(1, 5, 16), (5, 16), (16,)], ids=["batch", "tokens", "a bias after all"])
def test_what_is_added_to_a_product_need_not_be_a_bias(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """A vision transformer adds an embedding of positions to its first product."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(8, 16, bias=False)
            self.position = nn.Parameter(torch.randn(shape))
            self.head = nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head((self.first(x) + self.position).relu().mean(1))

    inputs = torch.randn(4, 5, 8)
    runtime = OnnxRuntime()
    module = prepared(Positions, inputs, 8, runtime.capabilities("cpu").schemes)
    runtime.deploy(module, inputs, tmp_path / "model.onnx")
    session = runtime.load(tmp_path / "model.onnx", LoadOptions(4))
    with torch.no_grad():
        expected = module(inputs).numpy()
    assert np.abs(session.run({"input": inputs.numpy()}) - expected).max() <= 0.02 * np.ptp(expected)
    assert session.layers()["first"].bits == 8
