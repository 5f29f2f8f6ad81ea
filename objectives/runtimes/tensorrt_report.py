"""Which layer a TensorRT engine executes in which width, by its own description (docs/decisions/015-tensorrt.md).

`EngineInspector` describes an engine built with detailed verbosity as JSON: each entry of ``Layers`` is a kernel with
its operands, the name of its tactic and, as ``Metadata``, the names of the ONNX nodes that went into it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from paretune.objectives.runtimes.base import LayerReport

_ORIGIN = re.compile(r"\[ONNX Layer: ([^\]|]*)")
"""``[ONNX Layer: name]`` or ``[ONNX Layer: name | property]``; TensorRT puts control characters between two of them."""

_TYPES = r"(?:i8|u8|i32|e4m3|e5m2|f16|bf16|tf32|f32)"
_TACTIC = re.compile(rf"(?<![a-z0-9]){_TYPES}{{2}}_(?P<multiplied>{_TYPES}){_TYPES}_")
"""``..._i8f32_i8i32_f32_...``: types of input and output, then those of products and sums, then that of the rest."""

_SPARSE = re.compile(r"sparse|sptensor", re.IGNORECASE)
"""In the tactics' names of kernels that leave out the zeros of weights in the pattern 2:4."""

_PRODUCT = re.compile(r"conv|gemm|matrixmultiply|matmul", re.IGNORECASE)
_MOVES = re.compile(r"reformat|noop|constant|shuffle|copy", re.IGNORECASE)

_BITS = {
    **dict.fromkeys(("i8", "u8", "e4m3", "e5m2", "int8", "fp8"), 8),
    **dict.fromkeys(("f16", "bf16", "half", "fp16", "bfloat16"), 16),
    **dict.fromkeys(("f32", "tf32", "float", "fp32"), 32),
}


_INTEGER = 8


class Kernel(NamedTuple):
    """An entry of the description that computes calls of layers.

    Attributes:
        name: As TensorRT's profiler calls it.
        calls: Names of the ONNX nodes whose products it computes; a layer that is called twice is ``layer`` and
            ``layer#2``.
        bits: Width of what it multiplies.
        sparse: Whether it leaves out the zeros of weights in the pattern 2:4.
    """

    name: str
    calls: tuple[str, ...]
    bits: int
    sparse: bool = False


def find_kernels(description: Mapping[str, Any], calls: Iterable[str]) -> list[Kernel]:
    """The kernels that compute the products of layers, as far as their width can be told.

    What counts is, in this order: the tactic's name, which says what is multiplied; for a kernel that is called a
    convolution or matrix product, the type that all its tensors share; for any other one as well, if that is a float
    type. TensorRT compiles small products into such ones, and what is typed as floats is computed in floats; whereas a
    kernel of another kind that reads integers may well dequantize them first.

    Args:
        description: The engine's, as its inspector gives it (10.x or 11.x).
        calls: Names of the ONNX nodes with weights.
    """
    wanted = set(calls)
    own: list[Kernel] = []
    others: list[Kernel] = []
    for entry in description["Layers"]:
        if not isinstance(entry, Mapping):
            continue  # an engine built without detailed verbosity has names alone
        origins = tuple(name for name in dict.fromkeys(_origins(entry)) if name in wanted)
        found = _width(entry)
        if origins and found is not None:
            bits, is_product = found
            sparse = _SPARSE.search(str(entry.get("TacticName", ""))) is not None
            (own if is_product else others).append(Kernel(str(entry["Name"]), origins, bits, sparse))
    products = {call for kernel in own for call in kernel.calls}
    rest = (kernel._replace(calls=tuple(call for call in kernel.calls if call not in products)) for kernel in others)
    return own + [kernel for kernel in rest if kernel.calls]


def layer_reports(
    kernels: Iterable[Kernel], calls: Iterable[str], times: Mapping[str, float]
) -> dict[str, LayerReport]:
    """Each layer's width, the widest of its kernels', and its share of a call.

    A layer of which a call isn't found, because TensorRT made it part of something larger, is left out.

    Args:
        kernels: As `find_kernels` gives them.
        calls: Names of the ONNX nodes with weights.
        times: Kernel's name to its time, for all kernels of the engine; empty unless profiled. The time of a kernel
            that computes several layers is shared out evenly.
    """
    kernels, total = list(kernels), sum(times.values()) or 1.0
    missing = {_layer(call) for call in set(calls).difference(call for kernel in kernels for call in kernel.calls)}
    reports: dict[str, LayerReport] = {}
    for kernel in kernels:
        share = times.get(kernel.name, 0.0) / total / len(kernel.calls)
        for layer in map(_layer, kernel.calls):
            before = reports.get(layer, LayerReport(kernel.bits, 0.0))
            reports[layer] = LayerReport(max(kernel.bits, before.bits), before.share + share)
    return {layer: report for layer, report in reports.items() if layer not in missing}


def sparse_layers(kernels: Iterable[Kernel]) -> set[str]:
    """Layers with a call that a kernel for the pattern 2:4 computes."""
    return {_layer(call) for kernel in kernels if kernel.sparse for call in kernel.calls}


def _origins(entry: Mapping[str, Any]) -> list[str]:
    return [name.strip() for name in _ORIGIN.findall(str(entry.get("Metadata", "")))]


def _layer(call: str) -> str:
    return call.partition("#")[0]


def _width(entry: Mapping[str, Any]) -> tuple[int, bool] | None:
    """What a kernel multiplies, and whether it is known to be a product; None if that can't be told."""
    tactic = _TACTIC.search(str(entry.get("TacticName", "")))
    if tactic is not None:
        bits = _BITS.get(tactic["multiplied"])
        return None if bits is None else (bits, True)
    kind = f"{entry.get('LayerType', '')} {entry.get('ParameterType', '')}"
    if _MOVES.search(kind):
        return None
    is_product = _PRODUCT.search(kind) is not None
    widths = set(_operand_widths(entry))
    if len(widths) != 1:
        return None
    bits = widths.pop()
    return (bits, is_product) if is_product or bits > _INTEGER else None


def _operand_widths(entry: Mapping[str, Any]) -> Iterator[int]:
    """Widths of the tensors that a kernel reads, without scalars and vectors: scales, biases and the like."""
    weights = entry.get("Weights")
    types = [str(weights.get("Type", ""))] if isinstance(weights, Mapping) else []
    types += [_type(tensor) for tensor in entry.get("Inputs", ()) if len(tensor.get("Dimensions", ())) > 1]
    for name in types:
        if name.lower() in _BITS:
            yield _BITS[name.lower()]


def _type(tensor: Mapping[str, Any]) -> str:
    """A tensor's type: the word for it in TensorRT 11 (``"Int8"``), or the one in the description of its format."""
    plain = tensor.get("DataType", tensor.get("Datatype"))
    words = str(plain or tensor.get("Format/Datatype", "")).rstrip(".").split()
    return next((word for word in words if word.lower() in _BITS), "")
