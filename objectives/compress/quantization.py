"""Fake quantization, so that what is trained is what is deployed.

Rounding goes through `torch.fake_quantize_per_{channel,tensor}_affine`, which export to ONNX as QuantizeLinear and
DequantizeLinear (Jacob et al., 2018, arXiv:1712.05877; straight-through gradients after Bengio et al., 2013,
arXiv:1308.3432). Where quantizers stand, and on what grids, belongs to the runtime: see `schemes`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paretune.errors import TrialError
from paretune.objectives.compress.batchnorm import replace_module
from paretune.objectives.compress.readers import trace_readers
from paretune.objectives.compress.schemes import Scheme, Schemes
from paretune.spaces.graph import Forward

_INTEGER = 8
"""Layers of this width or less are quantized; wider ones stay in floats."""

_FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


class StaticQuantizer(nn.Module):
    """Puts a tensor on one grid of 256 levels, fixed by calibration.

    It begins calibrating: floats pass through while their range is watched; `freeze` ends that.

    Args:
        symmetric: int8 with zero in the middle; otherwise uint8 with a zero point.
        ceiling: None leaves values as they are. A number says that a rectifier follows, which sets what is below 0 to
            0 and what is above the number to it: the grid covers that range alone, so that the rectifier changes
            nothing any more.
    """

    low: Tensor
    high: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, *, symmetric: bool, ceiling: float | None = None) -> None:
        super().__init__()
        self.calibrating = True
        self.symmetric = symmetric
        self.ceiling = ceiling
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        if self.calibrating:
            self.low.copy_(torch.minimum(self.low, x.detach().min()))
            self.high.copy_(torch.maximum(self.high, x.detach().max()))
            return x
        lowest, highest = (-128, 127) if self.symmetric else (0, 255)
        if x.dtype != torch.float32:  # under autocast; the rounding needs more digits than bfloat16 has
            x = x.float()
        return torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, lowest, highest)

    @torch.no_grad()
    def freeze(self) -> None:
        """End the calibration: fix the grid from the range seen."""
        self.calibrating = False
        low, high = self.low, self.high
        if self.ceiling is not None:
            low, high = torch.zeros_like(low), high.clamp(max=self.ceiling)
        if self.symmetric:
            self.scale.copy_((torch.maximum(-low, high) / 127).clamp_min(1e-8))
        else:
            self.scale.copy_(((high - low) / 255).clamp_min(1e-8))
            self.zero_point.copy_(torch.round(-low / self.scale))


class QuantizedLayer(nn.Module):
    """A convolution or linear layer with fake-quantized weight and, as the scheme wants it, input and output.

    Args:
        layer: The float layer; its parameters go on being trained.
        bits: Bit-width of the weight, 2 to 8; 5 to 7 by a coarser scale in an int8 container, and likewise below 4, or
            4 where weights aren't in blocks.
        scheme: What the runtime computes with.
        ceiling: Set where a rectifier alone reads the output; see `StaticQuantizer`.
    """

    weight_scale: Tensor
    weight_zero_point: Tensor

    def __init__(self, layer: nn.Module, bits: int, scheme: Scheme, *, ceiling: float | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.bits = bits
        self.scheme = scheme
        self.calibrating = True
        # A 1x1 convolution with a stride reads only some positions. Taking those first gives the same result, and
        # OpenVINO runs it in int8 even where a float layer reads the same input, which it doesn't otherwise.
        self._subsamples = _is_strided_pointwise(layer)
        self.input = StaticQuantizer(symmetric=scheme.symmetric) if scheme.activations == "static" else None
        is_output = type(layer).__name__ in scheme.outputs
        self.output = StaticQuantizer(symmetric=scheme.symmetric, ceiling=ceiling) if is_output else None
        weight = cast(Tensor, layer.weight)
        scales = weight.numel() // block_size(weight.shape[1], scheme.block) if scheme.block else len(weight)
        self.register_buffer("weight_scale", torch.ones(scales))
        self.register_buffer("weight_zero_point", torch.zeros(scales, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        layer = cast(Any, self.layer)
        if self.calibrating:
            out = layer(x if self.input is None else self.input(x))
            return cast(Tensor, out if self.output is None else self.output(out))
        if self.training:
            self._scale_weight()
        if self._subsamples:
            steps: list[Any] = [slice(None, None, step) for step in layer.stride]
            x = x[(..., *steps)]
        if self.input is not None:
            x = self.input(x)
        elif self.scheme.activations == "dynamic":
            x = quantize_rows(x, self.scheme.number)
        out = self._product(x, self.quantized_weight())
        return out if self.output is None else cast(Tensor, self.output(out))

    def quantized_weight(self) -> Tensor:
        """The weight on its grid, in its own shape."""
        weight = cast(Tensor, self.layer.weight)
        if self.scheme.number == "fp8":
            rows = weight.flatten(1)
            return _through_fp8(rows, self.weight_scale[:, None]).view_as(weight)
        grid = (self.weight_scale, self.weight_zero_point, 0)
        if self.scheme.block:
            if torch.onnx.is_in_onnx_export():
                return weight  # the exporter knows no such grid: `export_onnx` puts the levels in its place
            rows, limit = weight.reshape(len(self.weight_scale), -1), 2 ** (self.bits - 1)
            return torch.fake_quantize_per_channel_affine(rows, *grid, -limit, limit - 1).view_as(weight)
        # The container is int8 whatever the width, as the exporter and the runtimes want it.
        return torch.fake_quantize_per_channel_affine(weight, *grid, -128, 127)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        layer = cast(Any, self.layer)
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, layer.bias)
        if self._subsamples:
            return _CONVS[x.dim()](x, weight, layer.bias)
        return cast(Tensor, layer._conv_forward(x, weight, layer.bias))

    @torch.no_grad()
    def freeze(self) -> None:
        """End the calibration: fix the grids of activations from the ranges seen, and the weight's from its values."""
        self.calibrating = False
        for quantizer in (self.input, self.output):
            if quantizer is not None:
                quantizer.freeze()
        self._scale_weight()

    @torch.no_grad()
    def _scale_weight(self) -> None:
        weight = cast(Tensor, self.layer.weight)
        largest = weight.reshape(len(self.weight_scale), -1).abs().amax(dim=1)
        top = _FP8_MAX if self.scheme.number == "fp8" else 2 ** (self.bits - 1) - 1
        scale = (largest / top).clamp_min(1e-8)
        if self.input is not None and self.layer.bias is not None:
            # Integer kernels add the bias as int32, in units of both scales: it must fit, with room to be trained.
            scale = torch.maximum(scale, cast(Tensor, self.layer.bias).abs() / (self.input.scale * 2**30))
        self.weight_scale.copy_(scale)


_CONVS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


def quantize_rows(x: Tensor, number: str = "int") -> Tensor:
    """Put each row (last dimension) of `x` on a symmetric 8-bit grid of its own, as dynamic kernels do."""
    rows = x.float().reshape(-1, x.shape[-1])
    largest = rows.detach().abs().amax(dim=1)
    if number == "fp8":
        return _through_fp8(rows, (largest / _FP8_MAX).clamp_min(1e-8)[:, None]).view_as(x)
    scale = (largest / 127).clamp_min(1e-8)
    zeros = torch.zeros_like(scale, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(rows, scale, zeros, 0, -128, 127).view_as(x)


def _through_fp8(x: Tensor, scale: Tensor) -> Tensor:
    """Round to e4m3 numbers times `scale`; the gradient passes straight through."""
    rounded = (x.detach() / scale).clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn).to(x.dtype) * scale
    return x + (rounded - x.detach())


def _is_strided_pointwise(layer: Any) -> bool:
    if isinstance(layer, nn.Linear):
        return False
    plain = layer.groups == 1 and layer.padding == (0,) * len(layer.stride)
    return bool(plain and max(layer.stride) > 1 and max(layer.kernel_size) == 1)


def insert_quantizers(model: nn.Module, bits: dict[str, int], schemes: Schemes, forward: Forward) -> None:
    """Wrap each layer named in `bits` with a width of 8 or less, in place; 16 and 32 stay float.

    Args:
        model: In eval mode, batch norm folded.
        bits: Layer to its width.
        schemes: What the runtime wants for a width; one without a scheme of its own is quantized as 8 bits are.
        forward: Runs the model on an example, to see which outputs go to a rectifier.

    Raises:
        TrialError: A layer's inputs can't be parted into the blocks of its scheme.
    """
    chosen = {name: schemes.get(width, schemes[8]) for name, width in bits.items() if width <= _INTEGER}
    ceilings: dict[str, float] = {}
    if any(scheme.outputs for scheme in chosen.values()):
        readers = trace_readers(model, forward, tuple({type(model.get_submodule(name)) for name in chosen}))
        found = {name: _ceiling(readers.only_reader(name)) for name in chosen}
        ceilings = {name: ceiling for name, ceiling in found.items() if ceiling is not None}
    for name, scheme in chosen.items():
        layer = model.get_submodule(name)
        if not fits(layer, scheme):
            got = f"{layer.in_features}" if isinstance(layer, nn.Linear) else f"it is a {type(layer).__name__}"
            raise TrialError(
                f"a layer with weights in blocks must be linear with a multiple of {scheme.least_block} inputs, but "
                f"got {name}: {got}; give it another width"
            )
        replace_module(model, name, QuantizedLayer(layer, bits[name], scheme, ceiling=ceilings.get(name)))


def _ceiling(operation: Any) -> float | None:
    """What a rectifier (a ReLU, or a ReLU6, which the autograd graph calls hardtanh) lets through at most."""
    kind = type(operation).__name__
    if kind == "ReluBackward0":
        return float("inf")
    if kind == "HardtanhBackward0" and operation._saved_min_val == 0:
        return float(operation._saved_max_val)
    return None


def fits(layer: nn.Module, scheme: Scheme) -> bool:
    """Whether a layer can be quantized so: blocks are for linear layers whose inputs they part evenly."""
    return scheme.block is None or (isinstance(layer, nn.Linear) and layer.in_features % scheme.least_block == 0)


def block_size(inputs: int, largest: int) -> int:
    """The largest size of blocks, halved from `largest` on, that parts so many inputs evenly."""
    while inputs % largest:
        largest //= 2
    return largest


def freeze_quantizers(model: nn.Module) -> None:
    """End the calibration of every quantizer, and fit the weights' grids to their present values."""
    for module in model.modules():
        if isinstance(module, QuantizedLayer):
            module.freeze()
