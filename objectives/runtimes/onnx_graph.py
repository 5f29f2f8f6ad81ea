"""What an exported ONNX graph still needs: integer weights, and nodes that carry their module's name."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, numpy_helper

Array = np.ndarray[Any, Any]

_MATRIX_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_PASS_THROUGH = ("Transpose", "DequantizeLinear", "QuantizeLinear", "Identity", "Cast")


def fold_weights(graph: GraphProto) -> None:
    """Store quantized weights as int8 and name each operation with weights after its module, in place.

    The exporter leaves weight -> QuantizeLinear -> DequantizeLinear. A runtime may fold that itself or not: OpenVINO
    was two times slower on unfolded weights, and the file would keep four bytes a weight. Rounding is to nearest
    even, as QuantizeLinear defines it.
    """
    _name_after_modules(graph)
    constants = _constants(graph)
    for node in graph.node:
        if node.op_type != "QuantizeLinear" or node.input[0] not in constants:
            continue
        weight, scale, zero_point = (constants[name] for name in node.input)
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
        shape = [1] * weight.ndim
        if scale.ndim:
            shape[axis] = -1
        limits = np.iinfo(zero_point.dtype)
        levels = np.rint(weight / scale.reshape(shape)) + zero_point.reshape(shape)
        quantized = np.clip(levels, limits.min, limits.max).astype(zero_point.dtype)
        graph.initializer.append(numpy_helper.from_array(quantized, node.output[0]))
    _bake(graph, constants)
    _drop(graph)


def _name_after_modules(graph: GraphProto) -> None:
    producers = {output: node for node in graph.node for output in node.output}
    initializers = {initializer.name for initializer in graph.initializer}
    taken: dict[str, int] = {}
    for node in graph.node:
        if node.op_type not in _MATRIX_OPS or len(node.input) < 2:
            continue
        name = node.input[1]
        while name not in initializers and name in producers and producers[name].op_type in _PASS_THROUGH:
            name = producers[name].input[0]
        if name in initializers and name.endswith(".weight"):
            path = name.removeprefix("model.").removesuffix(".weight").removesuffix(".layer")
            taken[path] = taken.get(path, 0) + 1
            # A module that is called twice gives two nodes; names must stay unique.
            node.name = path if taken[path] == 1 else f"{path}#{taken[path]}"


def _constants(graph: GraphProto) -> dict[str, Array]:
    """Values known before running: initializers, constants, and casts of them."""
    values = {initializer.name: numpy_helper.to_array(initializer) for initializer in graph.initializer}
    for node in graph.node:  # in topological order, as ONNX demands
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            values[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        elif node.op_type == "Identity" and node.input[0] in values:
            values[node.output[0]] = values[node.input[0]]
        elif node.op_type == "Cast" and node.input[0] in values:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(node.attribute[0].i)
            values[node.output[0]] = values[node.input[0]].astype(dtype)
    return values


def _bake(graph: GraphProto, constants: dict[str, Array]) -> None:
    """Turn constants that some runtimes look for only there into initializers: scales, zero points, shared values.

    The exporter stores equal tensors once, e.g. all zero biases of a fresh model; undone, the size of the file depends
    on the model's shape alone.
    """
    present = {initializer.name for initializer in graph.initializer}
    for node in graph.node:
        if node.op_type == "Identity" and node.output[0] in constants:
            present.add(node.output[0])
            graph.initializer.append(numpy_helper.from_array(constants[node.output[0]], node.output[0]))
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            for name in node.input[1:]:
                if name in constants and name not in present:
                    present.add(name)
                    graph.initializer.append(numpy_helper.from_array(constants[name], name))


def _drop(graph: GraphProto) -> None:
    """Remove the nodes whose result became an initializer, then all that nobody reads any more."""
    made = {initializer.name for initializer in graph.initializer}
    kept: list[NodeProto] = [node for node in graph.node if not made.intersection(node.output)]
    outputs = {output.name for output in graph.output}
    while True:
        read = {name for node in kept for name in node.input} | outputs
        alive = [node for node in kept if read.intersection(node.output)]
        if len(alive) == len(kept):
            break
        kept = alive
    initializers = [initializer for initializer in graph.initializer if initializer.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(kept)
    graph.initializer.extend(initializers)
