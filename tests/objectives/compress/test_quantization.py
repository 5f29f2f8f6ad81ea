"""Fake quantization: the grid of the inputs and the weights, gradients, widths."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from paretune.objectives.compress.quantization import QuantizedLayer, freeze_quantizers, insert_quantizers
from tests import nets

LAYERS = [
    pytest.param(lambda: nn.Conv2d(3, 8, 3, padding=1), nets.image(), id="Conv2d"),
    pytest.param(lambda: nn.Conv2d(3, 6, 3, stride=2, groups=3, bias=False), nets.image(), id="grouped Conv2d"),
    pytest.param(lambda: nn.Conv1d(5, 4, 3), nets.sequence(), id="Conv1d"),
    pytest.param(lambda: nn.Conv3d(1, 4, 2), nets.image().unsqueeze(1), id="Conv3d"),
    pytest.param(lambda: nn.Linear(12, 5), nets.vector(), id="Linear"),
    pytest.param(lambda: nn.Linear(8, 5, bias=False), nets.sequence(), id="Linear on sequences"),
]


def frozen(layer: nn.Module, inputs: Tensor, bits: int = 8) -> QuantizedLayer:
    quantized = QuantizedLayer(layer, bits).eval()
    with torch.no_grad():
        quantized(inputs)
    quantized.freeze()
    return quantized


@pytest.mark.parametrize(("build", "inputs"), LAYERS)
def test_floats_pass_while_calibrating(build: type[nn.Module], inputs: Tensor) -> None:
    layer = build()
    quantized = QuantizedLayer(layer, 8)
    assert torch.equal(quantized(inputs), layer(inputs))
    assert float(quantized.low) == pytest.approx(min(0.0, float(inputs.min())))
    quantized(inputs + 10)
    assert float(quantized.high) == pytest.approx(float(inputs.max()) + 10)
    assert float(quantized.low) == pytest.approx(min(0.0, float(inputs.min()))), "ranges only grow"


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("build", "inputs"), LAYERS)
def test_every_weight_lies_on_the_grid(build: type[nn.Module], inputs: Tensor, bits: int) -> None:
    """With an input that is 1 in one place and 0 elsewhere, the outputs are the weights as they are used."""
    torch.manual_seed(0)
    layer: nn.Module = build()
    quantized = frozen(layer, inputs, bits)
    weight: Tensor = layer.weight.detach()  # type: ignore[assignment]
    scale = quantized.weight_scale.reshape(-1, *[1] * (weight.dim() - 1))
    used: list[Tensor] = []

    def remember(_x: Tensor, used_weight: Tensor, _bias: object) -> Tensor:
        used.append(used_weight)
        return used_weight

    if isinstance(layer, nn.Linear):
        size = weight.shape[1]
        outputs = quantized(torch.eye(size)) - (0 if layer.bias is None else layer.bias)
        one = quantized.scale * torch.round(1 / quantized.scale).clamp(max=255 - int(quantized.zero_point))
        found = (outputs / one).T.detach()
    else:
        layer._conv_forward = remember  # type: ignore[assignment]
        quantized(inputs)
        found = used[0].detach()
    levels = found / scale
    assert torch.allclose(levels, levels.round(), atol=1e-3)
    limit = 2 ** (bits - 1) - 1
    assert levels.abs().max() <= limit + 1e-3
    assert torch.equal(levels.round().abs().flatten(1).amax(1), torch.full((len(weight),), float(limit)))
    assert (found - weight).abs().max() <= quantized.weight_scale.max() / 2 + 1e-6
    assert len(levels.round().unique()) <= 2 * limit + 1


@pytest.mark.parametrize(
    ("low", "high", "zero_point"),
    [
        pytest.param(0.0, 2.55, 0, id="after a ReLU"),
        pytest.param(-1.275, 1.275, 128, id="symmetric"),
        pytest.param(-2.55, 0.0, 255, id="negative"),
        pytest.param(1.0, 2.55, 0, id="zero is always in the range"),
    ],
)
def test_grid_of_the_inputs(low: float, high: float, zero_point: int) -> None:
    quantized = frozen(nn.Linear(2, 1), torch.tensor([[low, high]]))
    assert float(quantized.scale) == pytest.approx(0.01)
    assert int(quantized.zero_point) == zero_point


def test_inputs_are_rounded_and_clipped() -> None:
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1.0)
    quantized = frozen(layer, torch.tensor([[0.0], [2.55]]))
    outputs = quantized(torch.tensor([[0.014], [0.016], [9.0], [-9.0]])).flatten().tolist()
    assert outputs == pytest.approx([0.01, 0.02, 2.55, 0.0], abs=1e-5)


@pytest.mark.parametrize("inputs", [torch.zeros(2, 3), torch.full((2, 3), 1e-20)], ids=["zeros", "tiny"])
def test_degenerate_ranges_stay_finite(inputs: Tensor) -> None:
    layer = nn.Linear(3, 2)
    layer.weight.data[0] = 0
    quantized = frozen(layer, inputs)
    assert bool(torch.isfinite(quantized(torch.randn(4, 3))).all())
    assert torch.equal(quantized(torch.randn(4, 3))[:, 0], layer.bias[0].expand(4))


def test_gradients_pass_straight_through() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    inputs = torch.rand(5, 4, requires_grad=True)
    quantized = frozen(layer, inputs).train()
    quantized(inputs).sum().backward()
    assert layer.weight.grad is not None
    assert inputs.grad is not None
    torch.testing.assert_close(layer.weight.grad, inputs.detach().sum(0).expand(3, 4), atol=0.05, rtol=0.05)
    torch.testing.assert_close(inputs.grad, layer.weight.detach().sum(0).expand(5, 4), atol=0.05, rtol=0.05)


def test_the_grid_follows_the_weights_in_training_alone() -> None:
    layer = nn.Linear(4, 3)
    quantized = frozen(layer, torch.rand(5, 4))
    before = quantized.weight_scale.clone()
    layer.weight.data *= 2
    quantized(torch.rand(5, 4))
    assert torch.equal(quantized.weight_scale, before)
    quantized.train()(torch.rand(5, 4))
    torch.testing.assert_close(quantized.weight_scale, before * 2)


def test_error_shrinks_with_more_bits() -> None:
    torch.manual_seed(0)
    layer, inputs = nn.Linear(64, 32), torch.rand(16, 64)
    with torch.no_grad():
        errors = [float((frozen(layer, inputs, bits)(inputs) - layer(inputs)).abs().mean()) for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 20


def test_autocast_doesnt_touch_the_grid() -> None:
    torch.manual_seed(0)
    inputs = torch.rand(4, 8)
    quantized = frozen(nn.Linear(8, 4), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = quantized(inputs.bfloat16())
    torch.testing.assert_close(outputs.float(), quantized(inputs), atol=0.05, rtol=0.05)


def test_insert_and_freeze() -> None:
    model = nets.PlainCNN().eval()
    kept = model.conv2
    insert_quantizers(model, {"conv1": 8, "conv2": 16, "fc1": 4, "fc2": 32})
    wrapped = {name: module.bits for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
    assert wrapped == {"conv1": 8, "fc1": 4}
    assert model.conv2 is kept
    model(nets.image(2, 1))
    freeze_quantizers(model)
    assert not any(module.calibrating for module in model.modules() if isinstance(module, QuantizedLayer))


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        pytest.param(nn.Conv1d(8, 4, 1, stride=2), nets.sequence().transpose(1, 2), id="Conv1d"),
        pytest.param(nn.Conv2d(3, 4, 1, stride=2), nets.image(), id="Conv2d"),
        pytest.param(nn.Conv2d(3, 4, 1, stride=(1, 3), bias=False), nets.image(), id="uneven stride"),
        pytest.param(nn.Conv3d(1, 4, 1, stride=2), nets.image().unsqueeze(1), id="Conv3d"),
        pytest.param(nn.Conv2d(3, 4, 1, stride=2, padding=1), nets.image(), id="padded"),
        pytest.param(nn.Conv2d(3, 3, 1, stride=2, groups=3), nets.image(), id="depthwise"),
        pytest.param(nn.Conv2d(3, 4, 3, stride=2), nets.image(), id="not pointwise"),
    ],
)
def test_strided_convolutions_compute_the_same(layer: nn.Module, inputs: Tensor) -> None:
    """Where only some positions are read, they are taken first; the result must not show it."""
    quantized = frozen(layer, inputs)
    q = torch.fake_quantize_per_tensor_affine(inputs, quantized.scale, quantized.zero_point, 0, 255)
    reference = copy.deepcopy(layer)
    reference.weight.data = torch.fake_quantize_per_channel_affine(
        layer.weight.data,  # type: ignore[arg-type]
        quantized.weight_scale,
        quantized.weight_zero_point,
        0,
        -128,
        127,
    )
    torch.testing.assert_close(quantized(inputs), reference(q), atol=1e-5, rtol=1e-5)
