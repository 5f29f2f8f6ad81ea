"""Changes to a graph with Q/DQ after which ONNX Runtime finds its integer kernels.

What isn't in the form that its optimizer looks for is computed in floats, more slowly than if nothing were quantized:
a convolution must read dequantized tensors alone, its bias among them, and a QuantizeLinear must read what it gives.
The changes compute the same, but for the roundings of biases and of the inputs of 4-bit products, as integer kernels
do them.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import inf

import numpy as np
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper

from paretune.objectives.runtimes.onnx_graph import (
    Array,
    block_size,
    constants,
    drop_unread,
    is_alone,
    producers_of,
)

_RECTIFIERS = ("Relu", "Clip")
_OWN_DOMAIN = "com.microsoft"

_ROUNDED_INPUTS = 4
"""Inputs are rounded to 8 bits in blocks, as OpenVINO does it too: 4 times faster at batch 1 than exact ones."""


def use_integer_kernels(model: ModelProto) -> None:
    """All of this module's changes, in place, in the order in which they depend on each other."""
    graph = model.graph
    if use_block_kernels(graph):
        model.opset_import.append(helper.make_opsetid(_OWN_DOMAIN, 1))
    drop_idle_rectifiers(graph)
    join_equal_grids(graph)
    store_integer_biases(graph)
    spell_out_rectifiers(graph)
    drop_unread(graph)


def use_block_kernels(graph: GraphProto) -> bool:
    """Make each product of a 4-bit weight in blocks ONNX Runtime's own operation for it; returns whether there is one.

    Its optimizer does so too, but not where a rectifier or a QuantizeLinear follows, or where a layer is called twice.
    """
    values, producers = constants(graph), producers_of(graph)
    stored: set[str] = set()
    for node, weight in list(_dequantized_products(graph, producers)):
        block = block_size(weight)
        if not block:
            continue
        name, (inputs, outputs) = weight.input[0].removesuffix(".int4"), values[weight.input[0]].shape
        names = [f"{name}.blocks", f"{name}.blocks.scale", f"{name}.blocks.zero"][: len(weight.input)]
        if name not in stored:
            # Here a weight is kept as outputs x blocks; without zero points the levels 0 to 15 stand for -8 to 7.
            shift = 8 if len(names) == 2 else 0
            levels, *zeros = (
                (values[read].T.astype(np.int8) + shift).astype(np.uint8)
                for read in (weight.input[0], *weight.input[2:])
            )
            packed = _pairs(levels).reshape(outputs, inputs // block, block // 2)
            arrays = [packed, np.ascontiguousarray(values[weight.input[1]].T), *map(_pairs, zeros)]
            graph.initializer.extend(map(numpy_helper.from_array, arrays, names))
            stored.add(name)
        product = helper.make_node(
            "MatMulNBits",
            [node.input[0], *names],
            list(node.output),
            name=node.name,
            domain=_OWN_DOMAIN,
            K=inputs,
            N=outputs,
            bits=4,
            block_size=block,
            accuracy_level=_ROUNDED_INPUTS,
        )
        node.CopyFrom(product)
    return bool(stored)


def drop_idle_rectifiers(graph: GraphProto) -> None:
    """Remove each ReLU and ReLU6 next to a grid without values that it would cut off.

    It may read a DequantizeLinear, or be read by nothing but QuantizeLinears, which cut off as much or more.
    """
    values, producers, readers = constants(graph), producers_of(graph), _readers(graph)
    outputs = {output.name for output in graph.output}
    for node in [node for node in graph.node if node.op_type in _RECTIFIERS]:
        if node.output[0] in outputs:
            continue
        low, high = _limits(node, values)
        source, following = producers.get(node.input[0]), readers.get(node.output[0], [])
        reads_grid = source is not None and source.op_type == "DequantizeLinear"
        neighbours = [source] if reads_grid else following
        kind = "DequantizeLinear" if reads_grid else "QuantizeLinear"
        if neighbours and all(
            other is not None and other.op_type == kind and _is_within(other, low, high, values) for other in neighbours
        ):
            _bypass(graph, node, node.input[0])


def join_equal_grids(graph: GraphProto) -> None:
    """Remove each QuantizeLinear that reads a DequantizeLinear of the very same grid: it gives the same integers."""
    values, producers = constants(graph), producers_of(graph)
    for node in [node for node in graph.node if node.op_type == "QuantizeLinear"]:
        source = producers.get(node.input[0])
        if source is None or source.op_type != "DequantizeLinear":
            continue
        pairs = zip(source.input[1:], node.input[1:], strict=True)
        if all(one in values and other in values and _equal(values[one], values[other]) for one, other in pairs):
            _bypass(graph, node, source.input[0])


def store_integer_biases(graph: GraphProto) -> None:
    """Store the biases of quantized products as int32, in units of the input's scale times the weight's.

    That is how integer kernels add them. Rounding to a whole unit changes the sum, of products of up to 255 times 127
    units each, by half a unit at most.
    """
    values, producers, readers = constants(graph), producers_of(graph), _readers(graph)
    for node, weight in _quantized_products(graph, producers):
        source = producers.get(node.input[0])
        if source is None or source.op_type != "DequantizeLinear" or source.input[1] not in values:
            continue
        owner, slot = _bias_of(node, readers)
        if owner is None or owner.input[slot] not in values:
            continue
        scale = (values[source.input[1]] * values[weight.input[1]]).astype(np.float32)
        if values[owner.input[slot]].shape != scale.shape:  # no bias, e.g. an embedding of positions
            continue
        levels = np.rint(values[owner.input[slot]].astype(np.float64) / scale)
        if np.abs(levels).max(initial=0) > np.iinfo(np.int32).max:
            continue
        # A layer that is called twice has two biases; its nodes' names differ.
        stored = numpy_helper.from_array(levels.astype(np.int32), f"{node.name}.bias.int32")
        scales = numpy_helper.from_array(np.broadcast_to(scale, levels.shape).copy(), f"{node.name}.bias.scale")
        graph.initializer.extend([stored, scales])
        name = f"/{node.name}/bias/DequantizeLinear"
        bias = helper.make_node("DequantizeLinear", [stored.name, scales.name], [f"{name}_output"], name=name, axis=0)
        owner.input[slot] = bias.output[0]
        graph.node.insert(0, bias)


def spell_out_rectifiers(graph: GraphProto) -> None:
    """Write a ReLU or ReLU6 that directly follows a quantized matrix product as Max and Min.

    ONNX Runtime would fuse a Relu or Clip with the product, in floats, before it looks for integer kernels.
    """
    values, producers, readers = constants(graph), producers_of(graph), _readers(graph)
    for product, _ in _quantized_products(graph, producers):
        result = product
        for reader in readers.get(product.output[0], []):
            if product.op_type == "MatMul" and reader.op_type == "Add":
                result = reader
        for node in readers.get(result.output[0], []):
            if node.op_type in _RECTIFIERS:
                _spell_out(graph, node, *_limits(node, values))


def _spell_out(graph: GraphProto, node: NodeProto, low: float, high: float) -> None:
    # "/" keeps them apart from modules.
    steps = [(kind, limit) for kind, limit in (("Max", low), ("Min", high)) if abs(limit) < inf]
    names = [node.input[0], *(f"{node.output[0]}/{kind}" for kind, _ in steps[:-1]), node.output[0]]
    position = list(graph.node).index(node)
    graph.node.remove(node)
    for index, (kind, limit) in enumerate(steps):
        constant = numpy_helper.from_array(np.array(limit, np.float32), f"{names[-1]}/{kind}/limit")
        graph.initializer.append(constant)
        step = helper.make_node(kind, [names[index], constant.name], [names[index + 1]], name=f"{node.name}/{kind}")
        graph.node.insert(position + index, step)


def _pairs(levels: Array) -> Array:
    """Two levels a byte along the last dimension, the first in the lower half."""
    even = np.pad(levels, ((0, 0), (0, levels.shape[1] % 2)))
    packed: Array = even[:, ::2] | even[:, 1::2] << 4
    return packed


def _quantized_products(graph: GraphProto, producers: dict[str, NodeProto]) -> Iterator[tuple[NodeProto, NodeProto]]:
    """Each product that is to run on an integer kernel, and the node that dequantizes its weight."""
    return ((node, weight) for node, weight in _dequantized_products(graph, producers) if not is_alone(weight))


def _dequantized_products(graph: GraphProto, producers: dict[str, NodeProto]) -> Iterator[tuple[NodeProto, NodeProto]]:
    """Each product of a dequantized weight, and the node that dequantizes it."""
    for node in list(graph.node):
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            source = producers.get(node.input[1])
            while source is not None and source.op_type == "Transpose":
                source = producers.get(source.input[0])
            if source is not None and source.op_type == "DequantizeLinear":
                yield node, source


def _bias_of(node: NodeProto, readers: dict[str, list[NodeProto]]) -> tuple[NodeProto | None, int]:
    """The node that adds a product's bias, and which of its inputs that is."""
    if node.op_type != "MatMul":
        return (node, 2) if len(node.input) > 2 else (None, 0)
    following = readers.get(node.output[0], [])
    if len(following) == 1 and following[0].op_type == "Add":
        return following[0], 1 - list(following[0].input).index(node.output[0])
    return None, 0


def _limits(node: NodeProto, values: dict[str, Array]) -> tuple[float, float]:
    """What a rectifier lets through at least and at most."""
    if node.op_type == "Relu":
        return 0.0, inf
    names = [*node.input[1:], "", ""][:2]
    low, high = (float(values[name]) if name in values else None for name in names)
    return -inf if low is None else low, inf if high is None else high


def _is_within(node: NodeProto, low: float, high: float, values: dict[str, Array]) -> bool:
    """Whether a grid for a whole tensor has no value below `low` or above `high`."""
    scale, zero = values.get(node.input[1]), values.get(node.input[2])
    if scale is None or zero is None or scale.size > 1:
        return False
    limits = np.iinfo(zero.dtype)
    # In float32, as the runtime multiplies.
    least, most = (np.float32(scale) * np.float32(limit - int(zero)) for limit in (limits.min, limits.max))
    return bool(least >= low and most <= high * (1 + 1e-6))


def _equal(one: Array, other: Array) -> bool:
    return one.dtype == other.dtype and np.array_equal(one, other)


def _readers(graph: GraphProto) -> dict[str, list[NodeProto]]:
    found: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            found.setdefault(name, []).append(node)
    return found


def _bypass(graph: GraphProto, node: NodeProto, name: str) -> None:
    """Remove a node; what read it reads `name` instead."""
    for reader in graph.node:
        for slot, read in enumerate(reader.input):
            if read == node.output[0]:
                reader.input[slot] = name
    graph.node.remove(node)
