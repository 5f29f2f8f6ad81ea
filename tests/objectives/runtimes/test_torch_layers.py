"""Linear layers on integer kernels compute what was trained through."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from paretune.objectives.compress.quantization import QuantizedLayer, fits
from paretune.objectives.runtimes.torch_graph import Watched
from paretune.objectives.runtimes.torch_layers import SparseLinear, has_two_zeros_of_four, quantized_linear
from paretune.objectives.runtimes.torch_program import Numerics, _take_quantized
from paretune.objectives.runtimes.torch_runtime import linear_schemes

NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_GPU])]


def quantized(inputs: int, outputs: int, bits: int, eight: str = "int8", *, bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    layer = QuantizedLayer(nn.Linear(inputs, outputs, bias=bias), bits, linear_schemes(eight)[bits])
    layer.freeze()
    return nn.Sequential(layer.eval())


def on_kernel(module: nn.Module, device: str) -> tuple[nn.Module, Numerics]:
    layers, stored = _take_quantized(module)
    return quantized_linear("0", layers["0"], stored, torch.device(device)), layers["0"]


def compare(module: nn.Module, x: Tensor, device: str) -> tuple[float, int]:
    """Largest difference as a share of the largest output, and the width of the product that ran."""
    with torch.no_grad():
        expected = module(x)
        kernel, _ = on_kernel(module, device)
        graph = torch.fx.Graph()
        graph.output(graph.call_module("kernel", (graph.placeholder("x"),)))
        watched = Watched(torch.fx.GraphModule({"kernel": kernel}, graph))
        watched.watch(x.to(device))
        found = kernel(x.to(device)).cpu()
    assert found.shape == expected.shape
    [bits] = watched.products
    return float((found - expected).abs().max() / expected.abs().max()), bits


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(1, 12), (3, 12), (40, 12), (2, 5, 12)])
@pytest.mark.parametrize(("outputs", "bias"), [(6, True), (16, False)])
def test_int8_is_what_was_trained(device: str, shape: tuple[int, ...], outputs: int, bias: bool) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert compare(quantized(12, outputs, 8, bias=bias), x, device) == (pytest.approx(0, abs=1e-5), 8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 5), (64, 16), (96, 24), (256, 40)])
def test_int4_is_what_was_trained_but_for_bfloat16(device: str, inputs: int, outputs: int) -> None:
    x = torch.randn(2, 3, inputs, generator=torch.Generator().manual_seed(0))
    difference, bits = compare(quantized(inputs, outputs, 4), x, device)
    assert bits == 4
    assert 0 < difference <= 0.01


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize(("inputs", "outputs"), [(12, 6), (64, 16)])
def test_fp8_is_what_was_trained_but_for_bfloat16(inputs: int, outputs: int) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("needs Hopper")
    x = torch.randn(4, inputs, generator=torch.Generator().manual_seed(0))
    difference, bits = compare(quantized(inputs, outputs, 8, "fp8"), x, "cuda")
    assert (bits, difference) == (8, pytest.approx(0, abs=0.01))


def test_fp8_on_a_cpu_computes_the_same_slowly() -> None:
    """Nobody is offered it there, but the padding and the scales can be seen."""
    module = quantized(12, 6, 8, "fp8")
    x = torch.randn(4, 12, generator=torch.Generator().manual_seed(0))
    difference, bits = compare(module, x, "cpu")
    assert (bits, difference) == (8, pytest.approx(0, abs=0.01))


def test_shapes_that_cuda_kernels_dont_take_are_padded() -> None:
    """The layer for a GPU, on a CPU: its product takes padded shapes too, and nothing of the padding comes out."""
    module = quantized(12, 6, 8)
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module(x)
        kernel, _ = on_kernel(module, "cpu")
        _, stored = _take_quantized(quantized(12, 6, 8))
        padded = type(kernel)(stored["0.weight"], stored["0.scale"], stored["0.bias"], torch.device("cuda"))
        assert padded.weight.shape == (8, 16)
        torch.testing.assert_close(padded(x), expected)


def test_schemes_know_the_smallest_block_of_the_kernels() -> None:
    scheme = linear_schemes("int8")[4]
    assert scheme.block == scheme.least_block == 32
    assert not fits(nn.Linear(48, 8), scheme), "the kernels know no blocks of 16"
    assert fits(nn.Linear(96, 8), scheme)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([[1, 0, 0, 2]], True),
        ([[1, 0, 0, 2, 0, 0, 0, 0]], True),
        ([[1, 0, 3, 2]], False),
        ([[1, 0, 0, 2], [1, 2, 3, 0]], False),
        ([[0, 0, 1, 1, 1, 1, 0, 0]], True),
        ([[0, 1, 1, 1, 1, 0, 0, 0]], False),
        ([[1, 0, 0, 2, 5, 6]], True),
        ([[1, 0, 0, 2, 5, 6, 7]], False),
    ],
)
def test_the_pattern_is_found_in_the_weights(rows: list[list[int]], expected: bool) -> None:
    for dtype in (torch.bfloat16, torch.int8):
        assert has_two_zeros_of_four(torch.tensor(rows, dtype=dtype)) is expected


def sparse_weight(outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
    """Small whole numbers, which all formats multiply exactly, two of every four inputs zero."""
    weight = torch.randint(1, 8, (outputs, inputs), generator=torch.Generator().manual_seed(0))
    weight[:, ::4] = 0
    weight[:, 3::4] = 0
    return weight.to(dtype)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of cuSPARSELt's: they compute the same, and take the shapes and strides alone that those do."""

    def compress(weight: Tensor) -> Tensor:
        tile = 32 if weight.dtype == torch.int8 else 16
        assert weight.is_contiguous()
        assert all(size % tile == 0 for size in weight.shape)
        assert has_two_zeros_of_four(weight)
        return weight

    def multiply(
        weight: Tensor,
        dense: Tensor,
        bias: Tensor | None = None,
        out_dtype: torch.dtype | None = None,
        transpose_result: bool = False,
    ) -> Tensor:
        integer = weight.dtype == torch.int8
        assert dense.t().is_contiguous()
        assert dense.shape[1] % (16 if integer else 8) == 0
        assert dense.dtype == weight.dtype
        assert out_dtype == (torch.int32 if integer else None)
        if integer:
            return torch._int_mm(dense.t().contiguous(), weight.t()).t()
        assert transpose_result
        return nn.functional.linear(dense.t(), weight, bias)

    monkeypatch.setattr(torch, "_cslt_compress", compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("shape", [(1, 12), (8, 12), (40, 32), (2, 5, 12)])
@pytest.mark.parametrize("bias", [True, False])
def test_sparse_layers_pad_what_their_kernels_dont_take(shape: tuple[int, ...], bias: bool) -> None:
    weight = sparse_weight(6, shape[-1], torch.bfloat16)
    added = torch.arange(6).bfloat16() if bias else None
    x = torch.randint(-4, 4, shape).bfloat16()
    found = SparseLinear(weight, added, torch.device("cpu"))(x)
    assert torch.equal(found, nn.functional.linear(x, weight, added))
    strided = torch.randint(-4, 4, (shape[-1], 16)).bfloat16().t()
    found = SparseLinear(weight, added, torch.device("cpu"))(strided)
    assert torch.equal(found, nn.functional.linear(strided, weight, added))


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("shape", [(1, 12), (40, 12), (2, 5, 12)])
def test_sparse_int8_is_what_was_trained(shape: tuple[int, ...]) -> None:
    module = quantized(12, 6, 8)
    layer = module[0].layer  # type: ignore[index]
    layer.weight.data *= sparse_weight(6, 12, torch.float32).clamp(max=1)
    module[0].freeze()  # type: ignore[index]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    layers, stored = _take_quantized(copy.deepcopy(module))
    for sparse in (True, False):
        kernel = quantized_linear("0", layers["0"], stored, torch.device("cpu"), sparse=sparse)
        assert any(isinstance(part, SparseLinear) for part in kernel.modules()) is sparse
        with torch.no_grad():
            torch.testing.assert_close(kernel(x), module(x), atol=1e-5, rtol=1e-5)


@pytest.mark.gpu
@NEEDS_GPU
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("shape", "outputs"), [((1, 12), 6), ((40, 64), 32), ((2, 5, 48), 20)])
def test_sparse_kernels_multiply(dtype: torch.dtype, shape: tuple[int, ...], outputs: int) -> None:
    if not torch.backends.cusparselt.is_available() or torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs cuSPARSELt and Ampere")
    weight, x = sparse_weight(outputs, shape[-1], dtype), torch.randint(-4, 4, shape).to(dtype)
    bias = None if dtype == torch.int8 else torch.arange(outputs).to(dtype)
    layer = SparseLinear(weight, bias, torch.device("cuda")).cuda()
    expected = nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
    found = layer(x.cuda())
    assert found.dtype == (torch.int32 if dtype == torch.int8 else dtype)
    torch.testing.assert_close(found.cpu().float(), expected, atol=0, rtol=1e-2)
