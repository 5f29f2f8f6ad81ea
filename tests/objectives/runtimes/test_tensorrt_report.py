"""What TensorRT says of an engine. The descriptions follow its documentation and samples; none was recorded here."""

from __future__ import annotations

import json
from typing import Any

import pytest

from paretune.objectives.runtimes.base import LayerReport
from paretune.objectives.runtimes.tensorrt_report import Kernel, find_kernels, layer_reports, sparse_layers

INT8 = "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32_nchw_vect_c_32"
CONV = {"LayerType": "CaskConvolution", "ParameterType": "Convolution"}


def kernel(origins: str, **others: Any) -> dict[str, Any]:
    metadata = "\x1f".join(f"[ONNX Layer: {origin}]" for origin in origins.split())
    return {
        "Name": f"kernel of {origins}",
        "LayerType": "kgen",
        "Metadata": metadata,
        "Inputs": [older("Float")],
    } | others


def tensor(kind: str, *sizes: int) -> dict[str, Any]:
    """As TensorRT 11 describes it."""
    return {"Name": "t", "Dimensions": list(sizes or (16, 64)), "DataType": kind, "Format": "Row major linear"}


def older(description: str) -> dict[str, Any]:
    """As TensorRT 10 and before do."""
    return {"Name": "t", "Dimensions": [16, 64, 8, 8], "Format/Datatype": description}


def width(entry: dict[str, Any]) -> int | None:
    found = find_kernels({"Layers": [entry]}, {"conv1"})
    return found[0].bits if found else None


@pytest.mark.parametrize(
    ("tactic", "bits"),
    [
        (INT8, 8),
        ("sm80_xmma_fprop_implicit_gemm_interleaved_i8f32_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32_nchw", 8),
        ("sm80_xmma_gemm_i8i8_i8i32_f32_tn_n_tilesize64x64x64_stage4_by_fusion_tactic", 8),
        ("sm80_xmma_gemm_f16f16_f16f16_f16_nn", 16),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64", 16),
        ("sm80_xmma_gemm_f32f32_tf32f32_f32_nn_n_tilesize32x32x64_stage3_warpsize2x1x2_tensor16x8x8", 32),
        ("sm80_xmma_fprop_implicit_gemm_f32f32_f32f32_f32_nhwckcrs_nhwc", 32),
    ],
)
def test_a_tactics_name_says_what_is_multiplied(tactic: str, bits: int) -> None:
    misleading = tensor("Half" if bits != 16 else "Int8")
    assert width(kernel("conv1", TacticName=tactic, Inputs=[misleading])) == bits


@pytest.mark.parametrize(
    ("entry", "bits"),
    [
        pytest.param(CONV | {"Weights": {"Type": "Int8"}, "Inputs": [tensor("Int8")]}, 8, id="all int8"),
        pytest.param(CONV | {"Weights": {"Type": "Half"}, "Inputs": [tensor("Int8")]}, None, id="mixed"),
        pytest.param({"LayerType": "gemm", "Inputs": [tensor("Half"), tensor("Float", 1)]}, 16, id="a scalar"),
        pytest.param(CONV | {"Inputs": [older("Row major linear FP16 format")]}, 16, id="TensorRT 10"),
        pytest.param(CONV | {"Inputs": [older("Thirty-two wide row major Int8 format.")]}, 8, id="TensorRT 8"),
        pytest.param(CONV | {"Inputs": [older("N/A due to dynamic shapes")]}, None, id="no type"),
        pytest.param(CONV | {"Inputs": []}, None, id="nothing known"),
        pytest.param({"Inputs": [tensor("Float"), tensor("Float")]}, 32, id="floats in another kind of kernel"),
        pytest.param({"Inputs": [tensor("Int8"), tensor("Int8")]}, None, id="integers in another kind of kernel"),
        pytest.param({"LayerType": "Reformat"}, None, id="moves data"),
        pytest.param({"TacticName": "sm90_xmma_gemm_i32i32_i32i32_i32_nn"}, None, id="a type that no layer has"),
    ],
)
def test_what_else_tells_the_width(entry: dict[str, Any], bits: int | None) -> None:
    assert width(kernel("conv1", **entry)) == bits


def test_a_documented_description() -> None:
    # The example of the developer guide for a convolution, with metadata as the parser writes it.
    text = r"""{"Layers": [{
      "Name": "conv1 + bn", "LayerType": "CaskConvolution",
      "Inputs": [{"Name": "a", "Dimensions": [16,512,28,28],
                  "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format."}],
      "Outputs": [{"Name": "b", "Dimensions": [16,256,28,28],
                   "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format."}],
      "ParameterType": "Convolution", "Kernel": [1,1], "Groups": 1,
      "Weights": {"Type": "Int8", "Count": 131072}, "Bias": {"Type": "Float", "Count": 256},
      "TacticName": "sm80_xmma_fprop_implicit_gemm_interleaved_i8i8_i8i32_f32_nchw_vect_c_32kcrs_vect_c_32",
      "Metadata": "[ONNX Layer: conv1 | a property]\u001e[ONNX Layer: /bn]"
    }], "Bindings": ["a", "b"]}"""
    assert find_kernels(json.loads(text), {"conv1", "fc"}) == [Kernel("conv1 + bn", ("conv1",), 8)]


@pytest.mark.parametrize(
    ("tactic", "sparse"),
    [
        ("sm80_xmma_fprop_sparse_conv_f16f16_f16f16_f16_nhwckrsc_nhwc_tilesize128x128x64_sptensor16x8x32", True),
        ("sm80_xmma_fprop_avdt_sparse_int8int8_nhwc", True),
        ("sm80_xmma_fprop_avdt_dense_int8int8_nhwc", False),
        (INT8, False),
    ],
)
def test_a_tactics_name_says_whether_zeros_are_left_out(tactic: str, sparse: bool) -> None:
    # That the weights have the pattern doesn't say that a kernel makes use of it.
    entry = kernel("conv1 conv2#2", TacticName=tactic, HasSparseWeights=1, Inputs=[tensor("Half")])
    found = find_kernels({"Layers": [entry, kernel("fc")]}, {"conv1", "conv2#2", "fc"})
    assert sparse_layers(found) == ({"conv1", "conv2"} if sparse else set())


def test_the_product_counts_before_what_follows_it() -> None:
    after = kernel("conv1 /relu", Inputs=[tensor("Float")])
    product = kernel("conv1", TacticName=INT8, LayerType="CaskConvolution")
    for layers in ([after, product], [product, after]):
        assert [found.bits for found in find_kernels({"Layers": layers}, {"conv1"})] == [8]


def test_names_alone_tell_nothing() -> None:
    assert find_kernels({"Layers": ["conv1 + relu", "fc"]}, {"conv1", "fc"}) == []


def test_several_layers_in_one_kernel_share_its_time() -> None:
    kernels = [Kernel("qkv", ("q", "k", "v"), 16), Kernel("out", ("out",), 8)]
    times = {"qkv": 3.0, "out": 4.0, "softmax": 3.0}
    reports = layer_reports(kernels, {"q", "k", "v", "out"}, times)
    assert {name: report.bits for name, report in reports.items()} == {"q": 16, "k": 16, "v": 16, "out": 8}
    assert {name: report.share for name, report in reports.items()} == pytest.approx(
        {"q": 0.1, "k": 0.1, "v": 0.1, "out": 0.4}
    )


def test_a_layer_that_is_called_twice() -> None:
    kernels = [Kernel("one", ("fc",), 8), Kernel("two", ("fc#2",), 32)]
    assert layer_reports(kernels, {"fc", "fc#2"}, {"one": 1.0, "two": 1.0}) == {"fc": LayerReport(32, 1.0)}
    assert layer_reports(kernels[:1], {"fc", "fc#2"}, {}) == {}, "a call that isn't found hides the layer"
