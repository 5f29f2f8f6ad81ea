"""Linear layers on integer kernels compute what was trained through."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from paretune.objectives.compress.quantization import QuantizedLayer, fits
from paretune.objectives.runtimes.torch_graph import Watched
from paretune.objectives.runtimes.torch_layers import quantized_linear
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
