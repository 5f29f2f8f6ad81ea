"""What an exported ONNX graph still needs: integer weights, and nodes that carry their module's name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from paretune.errors import TrialError

Array = np.ndarray[Any, Any]

_MATRIX_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul", "MatMulNBits")
_PASS_THROUGH = ("Transpose", "Identity", "Cast")

_ALONE = "weights alone are quantized"
"""Note in the `doc_string` of a DequantizeLinear whose product isn't meant for an integer kernel."""


class Weight(NamedTuple):
    """A quantized weight.

    Attributes:
        levels: As the module's weight, outputs first; int8 or, with zero points, uint8.
        scales: (outputs,), or (outputs, inputs / block) for 4-bit weights in blocks, which are linear layers'.
        zeros: The zero points, uint8, shaped like the scales; None where all are 0.
        alone: Whether the activations stay floats.
    """

    levels: Array
    scales: Array
    zeros: Array | None
    alone: bool


def fold_weights(graph: GraphProto, weights: Mapping[str, Weight]) -> None:
    """Store quantized weights as integers and name each operation with weights after its module, in place.

    The exporter writes them as floats. A runtime reads integers with a DequantizeLinear.

    Args:
        graph: As exported.
        weights: Name of an initializer to the quantized weight that replaces it.

    Raises:
        TrialError: There is no such initializer.
    """
    _name_after_modules(graph)
    _bake(graph)
    for name in weights.keys() - {tensor.name for tensor in graph.initializer}:
        raise TrialError(
            f"every quantized weight must be found in the exported model, but {_module_of(name)}'s isn't; see that "
            "forward calls the layer, or give it a float width"
        )
    _store_blocks(graph, {name: weight for name, weight in weights.items() if weight.scales.ndim > 1})
    _store_rows(graph, {name: weight for name, weight in weights.items() if weight.scales.ndim == 1})
    drop_unread(graph)


def fold_alone(graph: GraphProto) -> bool:
    """Turn weights back into floats whose products aren't meant for an integer kernel, in place; whether there are any.

    For runtimes that have no kernels for such weights, and would dequantize them in each call.
    """
    found = [node for node in graph.node if is_alone(node) and not block_size(node)]
    values = constants(graph) if found else {}
    for node in found:
        levels, scale, zero = (values[name].astype(np.float32) for name in node.input)
        shape = [-1, *[1] * (levels.ndim - 1)]
        weight = (levels - zero.reshape(shape)) * scale.reshape(shape)
        graph.initializer.append(numpy_helper.from_array(weight, node.output[0]))
    if found:
        drop_unread(graph)
    return bool(found)


def is_alone(node: NodeProto) -> bool:
    """Whether a node dequantizes a weight whose product reads float activations."""
    return node.op_type == "DequantizeLinear" and node.doc_string == _ALONE


def block_size(node: NodeProto) -> int:
    """Of a DequantizeLinear: how many inputs of a layer share a scale; 0 where all do."""
    return next((attribute.i for attribute in node.attribute if attribute.name == "block_size"), 0)


def layer_names(graph: GraphProto) -> set[str]:
    """Names of the operations that `fold_weights` named after modules; the exporter's own begin with a slash."""
    return {node.name for node in graph.node if node.op_type in _MATRIX_OPS and not node.name.startswith("/")}


def _name_after_modules(graph: GraphProto) -> None:
    taken: dict[str, int] = {}
    for node, name in _weights(graph):
        path = _module_of(name)
        taken[path] = taken.get(path, 0) + 1
        # A module that is called twice gives two nodes; names must stay unique.
        node.name = path if taken[path] == 1 else f"{path}#{taken[path]}"


def _module_of(name: str) -> str:
    """The module that a weight of that name belongs to."""
    return name.removeprefix("model.").removesuffix(".weight").removesuffix(".layer")


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


def _store_rows(graph: GraphProto, weights: Mapping[str, Weight]) -> None:
    """Put a DequantizeLinear of the same name in the place of each float weight."""
    names = [tensor.name for tensor in graph.initializer if tensor.name in weights]
    kept = [tensor for tensor in graph.initializer if tensor.name not in weights]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    for name in names:
        weight = weights[name]
        zeros = np.zeros(weight.scales.shape, weight.levels.dtype) if weight.zeros is None else weight.zeros
        tensors = {"levels": weight.levels, "scale": weight.scales, "zero": zeros}
        graph.initializer.extend(numpy_helper.from_array(array, f"{name}.{key}") for key, array in tensors.items())
        graph.node.insert(0, _dequantize(name, [f"{name}.{key}" for key in tensors], name, weight))


def _store_blocks(graph: GraphProto, weights: Mapping[str, Weight]) -> None:
    """Let the layers of `weights` compute input x dequantized 4-bit weight + bias, the form that ONNX has for that."""
    stored: dict[str, NodeProto] = {}
    for node, name in _weights(graph):
        if name in weights:
            if name not in stored:
                stored[name] = _store(graph, name, weights[name])
            node.input[1] = stored[name].output[0]
            if node.op_type == "Gemm":
                _split_gemm(graph, node)
    for dequantize in stored.values():
        graph.node.insert(0, dequantize)


def _store(graph: GraphProto, name: str, weight: Weight) -> NodeProto:
    """Add a 4-bit weight to the initializers, shape (inputs, outputs); returns the node that dequantizes it."""
    kind = TensorProto.INT4 if weight.zeros is None else TensorProto.UINT4
    scales = np.ascontiguousarray(weight.scales.T)
    inputs = [f"{name}.int4", f"{name}.scale"]
    graph.initializer.append(_four_bits(inputs[0], kind, weight.levels.T))
    graph.initializer.append(numpy_helper.from_array(scales, inputs[1]))
    if weight.zeros is not None:
        inputs.append(f"{name}.zero")
        graph.initializer.append(_four_bits(inputs[2], kind, weight.zeros.T))
    return _dequantize(name, inputs, f"{name}.float", weight)


def _dequantize(name: str, inputs: list[str], output: str, weight: Weight) -> NodeProto:
    # "/" keeps it apart from modules.
    node = helper.make_node("DequantizeLinear", inputs, [output], name=f"/{name}/DequantizeLinear", axis=0)
    if weight.scales.ndim > 1:
        node.attribute.append(helper.make_attribute("block_size", weight.levels.shape[1] // weight.scales.shape[1]))
    if weight.alone:
        node.doc_string = _ALONE
    return node


def _four_bits(name: str, kind: int, levels: Array) -> TensorProto:
    """Two levels a byte, the first in the lower half."""
    flat = np.ascontiguousarray(levels).astype(np.uint8).flatten()
    pairs = np.pad(flat, (0, len(flat) % 2)).reshape(-1, 2)
    packed = (pairs[:, 0] & 0xF) | (pairs[:, 1] << 4)
    return TensorProto(name=name, data_type=kind, dims=levels.shape, raw_data=packed.tobytes())


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


def _bake(graph: GraphProto) -> None:
    """Turn constants that some runtimes look for only there into initializers: scales, zero points, shared values.

    The exporter stores equal tensors once, e.g. all zero biases of a fresh model; undone, the size of the file depends
    on the model's shape alone.
    """
    values = constants(graph)
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
    drop_unread(graph)


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
