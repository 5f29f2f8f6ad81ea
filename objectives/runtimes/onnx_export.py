"""ONNX with Q/DQ, the form that every ONNX runtime shares (docs/decisions/004-onnx-exporter.md)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from paretune.objectives.compress.quantization import QuantizedLayer
from paretune.objectives.data.inputs import Inputs, call, tensors
from paretune.objectives.runtimes.onnx_graph import Weight, fold_weights

OPSET = 17

_EXPORTER_OPSET = 20
"""The highest that the TorchScript-based exporter knows."""

_BLOCKS_OPSET = 21
"""The first with 4-bit weights in blocks. Of what the exporter writes it changed only which types are allowed."""


class _Positional(nn.Module):
    """Gives a model whose inputs are a tuple or dict a flat list of arguments."""

    def __init__(self, model: nn.Module, names: list[str], inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        self._names = names
        self._kind = type(inputs)

    def forward(self, *args: Tensor) -> Tensor:
        if self._kind is dict:
            return call(self.model, dict(zip(self._names, args, strict=True)))
        return call(self.model, args if issubclass(self._kind, tuple) else args[0])


def input_names(inputs: Inputs) -> list[str]:
    """Names of the ONNX inputs: a dict's keys, ``input_0``, ``input_1`` for a tuple, ``input`` for a tensor."""
    if isinstance(inputs, dict):
        return list(inputs)
    return [f"input_{i}" for i in range(len(inputs))] if isinstance(inputs, tuple) else ["input"]


def named_arrays(inputs: Inputs) -> dict[str, np.ndarray[Any, Any]]:
    """Inputs as NumPy arrays under the names that `export_onnx` gives them."""
    values = tensors(inputs).values()
    return {name: tensor.numpy(force=True) for name, tensor in zip(input_names(inputs), values, strict=True)}


def export_onnx(
    model: nn.Module,
    inputs: Inputs,
    path: Path,
    *,
    adapt: Callable[[onnx.ModelProto], None] | None = None,
    dynamo: bool = False,
) -> None:
    """Write `model` to `path` as ONNX, its batch dimension free, quantized weights as int8, those in blocks as int4.

    Every operation with weights is named after its module, so that a runtime's report can be read back.

    Args:
        model: In eval mode, quantizers frozen.
        inputs: An example batch.
        path: Where the file goes.
        adapt: What a runtime changes of the model before it is written, in place.
        dynamo: Use torch.export's exporter (10 times slower, needs onnxscript) instead of the TorchScript-based
            one, which is deprecated. For unquantized modules: torch.export can't trace fake quantization.
    """
    names = input_names(inputs)
    args = tuple(tensors(inputs).values())
    wrapped = _Positional(model, names, inputs).eval()
    weights = _weights(wrapped)
    blocks = any(weight.scales.ndim > 1 for weight in weights.values())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if dynamo:
            batch = torch.export.Dim("batch")
            program = torch.onnx.export(
                wrapped,
                args,
                input_names=names,
                output_names=["output"],
                opset_version=OPSET + 1,
                dynamic_shapes=(tuple({0: batch} for _ in args),),
                dynamo=True,
                verbose=False,
            )
            assert program is not None
            proto = program.model_proto
        else:
            torch.onnx.export(
                wrapped,
                args,
                path,
                input_names=names,
                output_names=["output"],
                opset_version=_EXPORTER_OPSET if blocks else OPSET,
                dynamic_axes={name: {0: "batch"} for name in (*names, "output")},
                do_constant_folding=False,
                dynamo=False,
            )
            proto = onnx.load(path)
    fold_weights(proto.graph, weights)
    if blocks:
        proto.opset_import[0].version = _BLOCKS_OPSET
        proto.ir_version = max(proto.ir_version, 10)
    if adapt is not None:
        adapt(proto)
    onnx.save(proto, path)


def _weights(model: nn.Module) -> dict[str, Weight]:
    """The quantized weights of a model by the names that the exporter gives to the float ones."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantizedLayer):
            levels, scheme = layer.weight_levels(), layer.scheme
            shape = (len(levels), -1) if scheme.block else (-1,)
            zeros = layer.weight_zero_point.cpu().reshape(shape).to(torch.uint8).numpy() if scheme.affine else None
            found[f"{name}.layer.weight"] = Weight(
                levels.to(torch.uint8 if scheme.affine else torch.int8).numpy(),
                layer.weight_scale.cpu().reshape(shape).numpy(),
                zeros,
                scheme.weights_alone,
            )
    return found
