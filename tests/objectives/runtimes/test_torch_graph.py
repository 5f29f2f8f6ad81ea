"""What products run in is read from what is executed, not from what was asked for."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor, fx, nn

from paretune.objectives.runtimes.torch_graph import (
    LAYER,
    Watched,
    confirmed,
    count_products,
    executed_products,
    width_of,
)


@pytest.mark.parametrize(
    ("operation", "dtypes", "width"),
    [
        pytest.param("aten::mm", [torch.float32, torch.float32], 32, id="f32"),
        pytest.param("aten::mm", [torch.bfloat16, torch.bfloat16], 16, id="bf16"),
        pytest.param("aten::addmm", [torch.float16, torch.float16, torch.float16], 16, id="fp16 with a bias"),
        pytest.param("aten::mm", [torch.bfloat16, torch.float32], 32, id="mixed"),
        pytest.param("aten::_int_mm", [torch.int8, torch.int8, torch.int32], 8, id="int8"),
        pytest.param("onednn::qlinear_pointwise", [torch.uint8, torch.float32, torch.int32], 8, id="scale second"),
        pytest.param("aten::_scaled_mm", [torch.float8_e4m3fn] * 2 + [torch.float32] * 2, 8, id="fp8"),
        pytest.param("aten::_weight_int4pack_mm", [torch.bfloat16, torch.int32, torch.bfloat16], 4, id="int4"),
        pytest.param("aten::mm", [], 0, id="unknown"),
    ],
)
def test_width_of_a_product(operation: str, dtypes: list[torch.dtype], width: int) -> None:
    assert width_of(operation, dtypes) == width


def mixed(x: Tensor, half: Tensor, levels: Tensor) -> Tensor:
    convolved = torch.conv2d(x[:, None, :, None], torch.ones(1, 1, 1, 1)).flatten(1)
    return (convolved @ half.float()).bfloat16() @ half + torch._int_mm(levels, levels).bfloat16() @ half


def operands() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(8, 8), torch.randn(8, 8).bfloat16(), torch.ones(8, 8, dtype=torch.int8)


def test_products_of_a_call_are_counted_once_each() -> None:
    with torch.no_grad():
        assert executed_products(lambda: mixed(*operands())) == {32: 2, 16: 2, 8: 1}


def test_an_execution_is_watched_without_a_word_on_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    executed_products(lambda: mixed(*operands()))
    assert capfd.readouterr().err == ""


def test_a_watched_graph_gives_each_layer_its_widest_product_and_its_time() -> None:
    graph = fx.symbolic_trace(mixed)
    products = [node for node in graph.graph.nodes if "matmul" in node.name or "mm" in node.name]
    for node, layer in zip(products, ("first", "twice", "int", "twice"), strict=True):
        node.meta[LAYER] = layer
    watched = Watched(graph)
    watched.watch(*operands())
    assert watched.layers == {"first": 32, "twice": 16, "int": 8}
    assert watched.products == {32: 2, 16: 2, 8: 1}
    watched.run(*operands())
    assert set(watched.seconds) == {"first", "twice", "int"}
    assert 0 < sum(watched.seconds.values()) < watched.total
    assert watched.products == {32: 2, 16: 2, 8: 1}


def test_nested_products_count_as_one() -> None:
    def node(number: int, parent: int, name: str, kind: str = "float") -> dict[str, object]:
        types = [f"Tensor({kind})", f"Tensor({kind})"]
        return {"id": number, "ctrl_deps": parent, "name": name, "inputs": {"types": types}}

    nodes = [
        {"id": 1, "ctrl_deps": 1, "name": "[pytorch|profiler|execution_trace|process]", "inputs": {"types": []}},
        node(2, 1, "aten::convolution"),
        node(3, 2, "aten::_convolution"),
        node(4, 3, "aten::mkldnn_convolution"),
        node(5, 1, "aten::linear", "c10::BFloat16"),
        node(6, 5, "aten::addmm", "c10::BFloat16"),
        node(7, 1, "aten::_convert_weight_to_int4pack"),
        node(8, 1, "aten::_int_mm", "signed char"),
    ]
    assert count_products({int(str(node["id"])): node for node in nodes}) == {32: 1, 16: 1, 8: 1}


@pytest.mark.parametrize(
    ("executed", "widths"),
    [
        pytest.param({16: 1, 8: 2}, {"a": 8, "b": 8, "c": 16}, id="as planned"),
        pytest.param({8: 2}, {"a": 8, "b": 8, "c": 16}, id="one in the compiler's own kernel"),
        pytest.param({16: 1, 8: 1, 32: 1}, {"a": 32, "b": 32, "c": 16}, id="int8 computed in floats"),
        pytest.param({16: 2, 8: 1}, {"a": 16, "b": 16, "c": 16}, id="int8 computed in bf16"),
        pytest.param({32: 1, 8: 2}, {"a": 8, "b": 8, "c": 32}, id="bf16 computed in f32"),
    ],
)
def test_layers_are_reported_as_far_as_they_are_confirmed(executed: dict[int, int], widths: dict[str, int]) -> None:
    assert confirmed({"a": 8, "b": 8, "c": 16}, Counter({16: 1, 8: 2}), Counter(executed)) == widths


def test_a_compiler_that_computes_int8_in_floats_is_found_out() -> None:
    class Pretender(nn.Module):
        def forward(self, x: Tensor, levels: Tensor) -> Tensor:
            return x @ levels.float()

    module, inputs = Pretender(), (torch.randn(8, 8), torch.ones(8, 8, dtype=torch.int8))
    executed = executed_products(lambda: module(*inputs))
    assert confirmed({"layer": 8}, Counter({8: 1}), executed) == {"layer": 32}
