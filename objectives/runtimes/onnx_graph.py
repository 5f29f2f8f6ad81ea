"""What an exported ONNX graph still needs: integer weights, and nodes that carry their module's name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]

_MATRIX_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulNBits")
_PASS_THROUGH = ("Transpose", "DequantizeLinear", "QuantizeLinear", "Identity", "Cast")


class Blocks(NamedTuple):
    """A 4-bit weight: levels from -8 to 7, shape (outputs, inputs), and scales, shape (outputs, inputs / block)."""

    levels: Array
    scales: Array


def fold_weights(graph: GraphProto, blocks: Mapping[str, Blocks]) -> None:
    """Store quantized weights as integers and name each operation with weights after its module, in place.

    The exporter leaves weight -> QuantizeLinear -> DequantizeLinear. A runtime may fold that itself or not: OpenVINO
    was two times slower on unfolded weights, and the file would keep four bytes a weight. Rounding is to nearest
    even, as QuantizeLinear defines it.

    Args:
        graph: As exported.
        blocks: Name of an initializer, a linear layer's weight, to the 4-bit weight that replaces it.
    """
    _name_after_modules(graph)
    _store_blocks(graph, blocks)
    values = constants(graph)
    for node in graph.node:
        if node.op_type != "QuantizeLinear" or node.input[0] not in values:
            continue
        weight, scale, zero_point = (values[name] for name in node.input)
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
        shape = [1] * weight.ndim
        if scale.ndim:
            shape[axis] = -1
        limits = np.iinfo(zero_point.dtype)
        levels = np.rint(weight / scale.reshape(shape)) + zero_point.reshape(shape)
        quantized = np.clip(levels, limits.min, limits.max).astype(zero_point.dtype)
        graph.initializer.append(numpy_helper.from_array(quantized, node.output[0]))
    _bake(graph, values)
    drop_unread(graph)


def layer_names(graph: GraphProto) -> set[str]:
    """Names of the operations that `fold_weights` named after modules; the exporter's own begin with a slash."""
    return {node.name for node in graph.node if node.op_type in _MATRIX_OPS and not node.name.startswith("/")}


def _name_after_modules(graph: GraphProto) -> None:
    taken: dict[str, int] = {}
    for node, name in _weights(graph):
        path = name.removeprefix("model.").removesuffix(".weight").removesuffix(".layer")
        taken[path] = taken.get(path, 0) + 1
        # A module that is called twice gives two nodes; names must stay unique.
        node.name = path if taken[path] == 1 else f"{path}#{taken[path]}"


def _weights(graph: GraphProto) -> list[tuple[NodeProto, str]]:
    """Each matrix product with a module's weight, and the name of that weight as the module knows it."""
    producers = producers_of(graph)
    found = []
    for node in graph.node:
        if node.op_type not in _MATRIX_OPS or len(node.input) < 2:
            continue
        name = node.input[1]
        # An Identity may stand between a weight's name and that of an equal one, which the exporter stores once.
        while not name.endswith(".weight") and name in producers and producers[name].op_type in _PASS_THROUGH:
            name = producers[name].input[0]
        if name.endswith(".weight"):
            found.append((node, name))
    return found


def _store_blocks(graph: GraphProto, blocks: Mapping[str, Blocks]) -> None:
    """Let the layers of `blocks` compute input x dequantized 4-bit weight + bias, the form that ONNX has for that."""
    stored: dict[str, NodeProto] = {}
    for node, name in _weights(graph):
        if name in blocks:
            if name not in stored:
                stored[name] = _store(graph, name, blocks[name])
            node.input[1] = stored[name].output[0]
            if node.op_type == "Gemm":
                _split_gemm(graph, node)
    for dequantize in stored.values():
        graph.node.insert(0, dequantize)


def _store(graph: GraphProto, name: str, weight: Blocks) -> NodeProto:
    """Add a 4-bit weight to the initializers, shape (inputs, outputs); returns the node that dequantizes it."""
    levels, scales = np.ascontiguousarray(weight.levels.T), np.ascontiguousarray(weight.scales.T)
    pairs = levels.reshape(-1, 2).astype(np.uint8)
    packed = (pairs[:, 0] & 0xF) | (pairs[:, 1] << 4)
    stored = TensorProto(name=f"{name}.int4", data_type=TensorProto.INT4, dims=levels.shape, raw_data=packed.tobytes())
    graph.initializer.extend([stored, numpy_helper.from_array(scales, f"{name}.scale")])
    return helper.make_node(
        "DequantizeLinear",
        [f"{name}.int4", f"{name}.scale"],
        [f"{name}.float"],
        name=f"/{name}/DequantizeLinear",
        axis=0,
        block_size=len(levels) // len(scales),
    )


def _split_gemm(graph: GraphProto, node: NodeProto) -> None:
    """Make a Gemm, whose second input isn't transposed any more, a MatMul and an Add."""
    output = node.output[0]
    product = helper.make_node("MatMul", list(node.input[:2]), [output], name=node.name)
    if len(node.input) > 2:
        product.output[0] = f"{output}.product"
        add = helper.make_node("Add", [product.output[0], node.input[2]], [output], name=f"/{node.name}/Add")
        graph.node.insert(list(graph.node).index(node) + 1, add)
    node.CopyFrom(product)


def producers_of(graph: GraphProto) -> dict[str, NodeProto]:
    """Name of a tensor to the node that computes it."""
    return {output: node for node in graph.node for output in node.output}


def constants(graph: GraphProto) -> dict[str, Array]:
    """Values known before running: initializers, constants, and casts of them."""
    values = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:  # in topological order, as ONNX demands
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            values[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
        elif node.op_type == "Identity" and node.input[0] in values:
            values[node.output[0]] = values[node.input[0]]
        elif node.op_type == "Cast" and node.input[0] in values:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(node.attribute[0].i)
            values[node.output[0]] = values[node.input[0]].astype(dtype)
    return values


def _bake(graph: GraphProto, values: dict[str, Array]) -> None:
    """Turn constants that some runtimes look for only there into initializers: scales, zero points, shared values.

    The exporter stores equal tensors once, e.g. all zero biases of a fresh model; undone, the size of the file depends
    on the model's shape alone.
    """
    present = {initializer.name for initializer in graph.initializer}
    for node in graph.node:
        if node.op_type == "Identity" and node.output[0] in values:
            present.add(node.output[0])
            graph.initializer.append(numpy_helper.from_array(values[node.output[0]], node.output[0]))
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            for name in node.input[1:]:
                if name in values and name not in present:
                    present.add(name)
                    graph.initializer.append(numpy_helper.from_array(values[name], name))


def drop_unread(graph: GraphProto) -> None:
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
