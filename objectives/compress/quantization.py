"""Fake quantization, so that what is trained is what is deployed.

Weights are symmetric per output channel in an int8 container, activations uint8 affine per tensor, both through
`torch.fake_quantize_per_{channel,tensor}_affine`, which export to ONNX as QuantizeLinear and DequantizeLinear
(Jacob et al., 2018, arXiv:1712.05877; straight-through gradients after Bengio et al., 2013, arXiv:1308.3432).
Quantizers stand on the inputs of layers: where OpenVINO needs them.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paretune.objectives.compress.batchnorm import replace_module


class QuantizedLayer(nn.Module):
    """A convolution or linear layer with fake-quantized input and weight.

    It begins calibrating: floats pass through while the range of the input is watched; `freeze` ends that.

    Args:
        layer: The float layer; its parameters go on being trained.
        bits: Bit-width of the weight, 2 to 8; below 8 by a coarser scale in the same int8 container. The input
            has 8 bits.
    """

    low: Tensor
    high: Tensor
    scale: Tensor
    zero_point: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor

    def __init__(self, layer: nn.Module, bits: int) -> None:
        super().__init__()
        self.layer = layer
        self.bits = bits
        self.calibrating = True
        # A 1x1 convolution with a stride reads only some positions. Taking those first gives the same result, and
        # OpenVINO runs it in int8 even where a float layer reads the same input, which it doesn't otherwise.
        self._subsamples = _is_strided_pointwise(layer)
        channels = len(cast(Tensor, layer.weight))
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))
        self.register_buffer("weight_scale", torch.ones(channels))
        self.register_buffer("weight_zero_point", torch.zeros(channels, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        if self.calibrating:
            self.low.copy_(torch.minimum(self.low, x.detach().min()))
            self.high.copy_(torch.maximum(self.high, x.detach().max()))
            return cast(Tensor, self.layer(x))
        if self.training:
            self._scale_weight()
        layer = cast(Any, self.layer)
        if self._subsamples:
            steps: list[Any] = [slice(None, None, step) for step in layer.stride]
            x = x[(..., *steps)]
        if x.dtype != torch.float32:  # under autocast; the rounding needs more digits than bf16 has
            x = x.float()
        # The container is uint8 and int8 whatever the width, as the exporter and the runtimes want it.
        x = torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, 0, 255)
        weight = torch.fake_quantize_per_channel_affine(
            layer.weight, self.weight_scale, self.weight_zero_point, 0, -128, 127
        )
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, layer.bias)
        if self._subsamples:
            return _CONVS[x.dim()](x, weight, layer.bias)
        return cast(Tensor, layer._conv_forward(x, weight, layer.bias))

    @torch.no_grad()
    def freeze(self) -> None:
        """End the calibration: fix the input's grid from the range seen, and the weight's from its values."""
        self.calibrating = False
        self.scale.copy_(((self.high - self.low) / 255).clamp_min(1e-8))
        self.zero_point.copy_(torch.round(-self.low / self.scale))
        self._scale_weight()

    @torch.no_grad()
    def _scale_weight(self) -> None:
        weight = cast(Tensor, self.layer.weight)
        largest = weight.abs().amax(dim=tuple(range(1, weight.dim())))
        self.weight_scale.copy_((largest / (2 ** (self.bits - 1) - 1)).clamp_min(1e-8))


_CONVS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def _is_strided_pointwise(layer: Any) -> bool:
    if isinstance(layer, nn.Linear):
        return False
    plain = layer.groups == 1 and layer.padding == (0,) * len(layer.stride)
    return bool(plain and max(layer.stride) > 1 and max(layer.kernel_size) == 1)


def insert_quantizers(model: nn.Module, bits: dict[str, int]) -> None:
    """Wrap each layer named in `bits` with a width of 8 or less, in place; 16 and 32 stay float."""
    for name, width in bits.items():
        if width <= 8:
            replace_module(model, name, QuantizedLayer(model.get_submodule(name), width))


def freeze_quantizers(model: nn.Module) -> None:
    """End the calibration of every quantizer, and fit the weights' grids to their present values."""
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            module.freeze()
