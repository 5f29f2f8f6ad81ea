"""Fake quantization, so that what is trained is what is deployed.

Rounding goes through `torch.fake_quantize_per_{channel,tensor}_affine` (Jacob et al., 2018, arXiv:1712.05877;
straight-through gradients after Bengio et al., 2013, arXiv:1308.3432). Where quantizers stand, and from what numbers
kernels compute, belongs to the runtime: see `schemes`. How ranges are found is in `observers`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paretune.errors import TrialError
from paretune.objectives.compress.layers import replace_module, why_special
from paretune.objectives.compress.lowrank import layers_of
from paretune.objectives.compress.observers import Histogram, Levels, check_calibrated, find_range
from paretune.objectives.compress.readers import trace_readers
from paretune.objectives.compress.schemes import Scheme, Schemes
from paretune.objectives.data.inputs import call
from paretune.spaces.graph import Forward
from paretune.spaces.plan import Observer, Quantization

if TYPE_CHECKING:
    from paretune.objectives.compress import Context

QUANTIZABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Kinds of layers that there are quantizers for."""

_INTEGER = 8
"""Layers of this width or less are quantized; wider ones stay in floats."""

_FP8_MAX = torch.finfo(torch.float8_e4m3fn).max

_REFIT = 64
"""Steps of training between two looks for the range of a weight."""


class StaticQuantizer(nn.Module):
    """Puts a tensor on one grid of 256 levels, fixed by calibration.

    It begins calibrating: floats pass through while their range is watched; `freeze` ends that.

    Args:
        symmetric: int8 with zero in the middle; otherwise uint8 with a zero point.
        ceiling: None leaves values as they are. A number says that a rectifier follows, which sets what is below 0 to
            0 and what is above the number to it: the grid covers that range alone, so that the rectifier changes
            nothing any more.
        observer: How the range is found; see `observers`.
    """

    low: Tensor
    high: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, *, symmetric: bool, ceiling: float | None = None, observer: Observer = "minmax") -> None:
        super().__init__()
        self.calibrating = True
        self.ceiling = ceiling
        self.levels = Levels.of(_INTEGER, affine=not symmetric)
        self._observer: Observer = observer
        self._seen: Histogram | None = None
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        if self.calibrating:
            self._watch(x.detach())
            return x
        if x.dtype != torch.float32:  # under autocast; the rounding needs more digits than bfloat16 has
            x = x.float()
        return torch.fake_quantize_per_tensor_affine(
            x, self.scale, self.zero_point, self.levels.least, self.levels.most
        )

    def _watch(self, x: Tensor) -> None:
        if self.ceiling is not None:
            x = x.clamp(0, self.ceiling)
        self.low.copy_(torch.minimum(self.low, x.min()))
        self.high.copy_(torch.maximum(self.high, x.max()))
        if self._observer != "minmax":
            self._seen = self._seen or Histogram()
            self._seen.add(x)

    @torch.no_grad()
    def freeze(self) -> None:
        """End the calibration: fix the grid from the values seen. Later calls change nothing.

        Raises:
            TrialError: A value wasn't finite.
        """
        self.calibrating = False
        check_calibrated(float(self.low), float(self.high))
        if self._seen is not None:
            low, high = self._seen.range(self.levels, self._observer, self.low, self.high)
            self.low.copy_(low)
            self.high.copy_(high)
            self._seen = None
        scale, zero = self.levels.fit(self.low, self.high)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero)


class QuantizedLayer(nn.Module):
    """A convolution or linear layer with fake-quantized weight and, as the scheme wants it, input and output.

    While it is trained its weight's grid follows the weight in each step. With ``percentile`` and ``mse`` it keeps the
    share of the weight's range that was found; the share itself is found again every 64 steps, as ``mse`` goes a
    hundred times through the weight for it. The share of the last steps is that which is deployed.

    Args:
        layer: The float layer; its parameters go on being trained.
        bits: Bit-width of the weight, 2 to 8, in the container that the scheme has for it: see `container`.
        scheme: What is computed with.
        ceiling: Set where a rectifier alone reads the output; see `StaticQuantizer`.
        observer: How ranges are found; fp8 weights are always scaled by the largest.

    Attributes:
        levels: Of the weight's grid.
    """

    weight_scale: Tensor
    weight_zero_point: Tensor
    low_share: Tensor
    high_share: Tensor

    def __init__(
        self,
        layer: nn.Module,
        bits: int,
        scheme: Scheme,
        *,
        ceiling: float | None = None,
        observer: Observer = "minmax",
    ) -> None:
        super().__init__()
        self.layer = layer
        self.bits = bits
        self.scheme = scheme
        self.levels = Levels.of(bits, affine=scheme.affine)
        self.calibrating = True
        self._observer: Observer = observer if scheme.number == "int" else "minmax"
        self._steps = 0
        # A 1x1 convolution with a stride reads only some positions. Taking those first gives the same result, and
        # OpenVINO runs it in int8 even where a float layer reads the same input, which it doesn't otherwise.
        self._subsamples = not scheme.weights_alone and _is_strided_pointwise(layer)
        is_static, is_output = scheme.activations == "static", type(layer).__name__ in scheme.outputs
        grid: dict[str, Any] = {"symmetric": scheme.symmetric, "observer": observer}
        self.input = StaticQuantizer(**grid) if is_static else None
        self.output = StaticQuantizer(**grid, ceiling=ceiling) if is_output else None
        weight = cast(Tensor, layer.weight)
        scales = weight.numel() // block_size(weight.shape[1], scheme.block) if scheme.block else len(weight)
        self.register_buffer("weight_scale", torch.ones(scales))
        self.register_buffer("weight_zero_point", torch.zeros(scales, dtype=torch.int32))
        # Of the weight's whole range, what its grid covers; of one row where all scales are equal.
        shares = torch.ones(1 if scheme.per_tensor else scales)
        self.register_buffer("low_share", shares, persistent=False)
        self.register_buffer("high_share", shares.clone(), persistent=False)

    @property
    def container(self) -> int:
        """Width of what the weight is stored in, and the runtime's kernels read: 4 in blocks, 8 otherwise."""
        return 4 if self.scheme.block else 8

    def forward(self, x: Tensor) -> Tensor:
        layer = cast(Any, self.layer)
        if self.calibrating:
            out = layer(x if self.input is None else self.input(x))
            return cast(Tensor, out if self.output is None else self.output(out))
        if self.training:
            self._fit_weight(anew=self._steps % _REFIT == 0)
            self._steps += 1
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
        if torch.onnx.is_in_onnx_export():
            return weight  # the exporter knows few such grids: `export_onnx` puts the levels in its place
        rows = weight.reshape(len(self.weight_scale), -1) if self.scheme.block else weight
        grid = (self.weight_scale, self.weight_zero_point, 0, self.levels.least, self.levels.most)
        return torch.fake_quantize_per_channel_affine(rows, *grid).view_as(weight)

    @torch.no_grad()
    def weight_levels(self) -> Tensor:
        """The weight's integers, with the zero point still in them, in its own shape and on the CPU; int32."""
        weight = self.quantized_weight().cpu()
        rows, scale = weight.reshape(len(self.weight_scale), -1), self.weight_scale.cpu()[:, None]
        levels = torch.round(rows / scale).to(torch.int32) + self.weight_zero_point.cpu()[:, None]
        return levels.view_as(weight)

    def _product(self, x: Tensor, weight: Tensor) -> Tensor:
        layer = cast(Any, self.layer)
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, layer.bias)
        if self._subsamples:
            return _CONVS[x.dim()](x, weight, layer.bias)
        return cast(Tensor, layer._conv_forward(x, weight, layer.bias))

    @torch.no_grad()
    def freeze(self) -> None:
        """End the calibration: fix the grids of activations from the values seen, and the weight's from its own.

        A later call fits the weight's grid to its present values, as each step of training did.
        """
        for quantizer in (self.input, self.output):
            if quantizer is not None:
                quantizer.freeze()
        self._fit_weight(anew=self.calibrating)
        self.calibrating = False

    @torch.no_grad()
    def _fit_weight(self, *, anew: bool) -> None:
        """Fit the weight's grid to its values, to the same share of their range as before unless that is found anew."""
        weight = cast(Tensor, self.layer.weight)
        rows = weight.reshape(len(self.low_share), -1)
        low, high = find_range(rows, self.levels, "minmax")
        if self._observer != "minmax":
            if anew:
                found = find_range(rows, self.levels, self._observer)
                self.low_share.copy_(torch.where(low < 0, found[0] / low, 1.0))
                self.high_share.copy_(torch.where(high > 0, found[1] / high, 1.0))
            low, high = low * self.low_share, high * self.high_share
        if self.scheme.number == "fp8":
            scale, zero = (torch.maximum(-low, high) / _FP8_MAX).clamp_min(1e-8), torch.zeros_like(low)
        else:
            scale, zero = self.levels.fit(low, high)
        if self.input is not None and self.layer.bias is not None:
            # Integer kernels add the bias as int32, in units of both scales: it must fit, with room to be trained.
            least = cast(Tensor, self.layer.bias).abs() / (self.input.scale * 2**30)
            scale = torch.maximum(scale, least.amax() if self.scheme.per_tensor else least)
        self.weight_scale.copy_(scale.expand_as(self.weight_scale))
        self.weight_zero_point.copy_(zero.expand_as(self.weight_zero_point))


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


def quantize(model: nn.Module, config: Quantization, context: Context, _fraction: float = 1.0) -> nn.Module:
    """Insert quantizers and calibrate them on the context's batches; in place. There are no partial ones.

    Args:
        model: In eval mode, batch norm folded; trained already where it isn't to be trained through its quantizers.
        config: The plan's.
        context: Gives the batches; without any, the quantizers have the right shapes alone.

    Raises:
        TrialError: A layer can't be quantized so.
    """
    insert_quantizers(model, config, context.schemes, context.forward)
    quantizes = any(isinstance(module, QuantizedLayer) for module in model.modules())
    with torch.no_grad():
        for batch in context.batches if quantizes else ():
            call(model, batch.inputs)
    freeze_quantizers(model)
    return model


def insert_quantizers(model: nn.Module, config: Quantization, schemes: Schemes, forward: Forward) -> None:
    """Wrap each layer with a width of 8 or less in `config`, in place; 16 and 32 stay float.

    The parts of a factorized layer have its width each.

    Args:
        model: In eval mode, batch norm folded.
        config: What to quantize, and how.
        schemes: What the runtime wants for a width.
        forward: Runs the model on an example, to see which outputs go to a rectifier.

    Raises:
        TrialError: A layer can't be quantized, or no scheme serves all targets.
    """
    bits = {part: width for name, width in config.bits.items() if width <= _INTEGER for part in layers_of(model, name)}
    for name in bits:
        if reason := why_special(model, name, QUANTIZABLE):
            raise TrialError(f"{name} must not be quantized: {reason}; give it a float width, or exclude it")
    chosen = {name: _scheme(model.get_submodule(name), width, config, schemes) for name, width in bits.items()}
    ceilings: dict[str, float] = {}
    if any(scheme.outputs for scheme in chosen.values()):
        readers = trace_readers(model, forward, tuple({type(model.get_submodule(name)) for name in chosen}))
        found = {name: _ceiling(readers.only_reader(name)) for name in chosen}
        ceilings = {name: ceiling for name, ceiling in found.items() if ceiling is not None}
    for name, scheme in chosen.items():
        layer = model.get_submodule(name)
        made = QuantizedLayer(layer, bits[name], scheme, ceiling=ceilings.get(name), observer=config.observer)
        replace_module(model, name, made)


def _scheme(layer: nn.Module, width: int, config: Quantization, schemes: Schemes) -> Scheme:
    """The width's own scheme where the layer fits it; otherwise that of 8 bits, whose container holds fewer as well."""
    own = schemes.get(width)
    if own is None or not fits(layer, own):
        own = schemes.get(_INTEGER)
    if config.activations == "float" and not (own is not None and own.weights_alone):
        own = Scheme(activations="float")
    if own is None:
        raise TrialError(
            f"layers must be quantized to {width} bits alike on all targets, but got targets whose kernels want "
            "different numbers; quantize weights alone (space.activations), or use one target"
        )
    if own.number == "fp8" and width < _INTEGER:
        raise TrialError(
            f"layers must have 8 bits where these are fp8 numbers, but got {width}; quantize to integers "
            "(target.options: eight: int8)"
        )
    return replace(own, affine=config.affine, per_tensor=config.granularity == "per-tensor")


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
