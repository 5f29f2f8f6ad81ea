"""ONNX graphs in 16-bit floats, for runtimes that compute each tensor in the type that the file gives it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, defs, helper, numpy_helper, shape_inference
from onnx.version_converter import convert_version

from paretune.errors import TrialError
from paretune.objectives.runtimes.onnx_graph import Array, constants

OPSET = 22
"""The first in which convolutions take bfloat16; QuantizeLinear takes other floats than float32 since 19."""

_HALVES = {"fp16": (TensorProto.FLOAT16, torch.float16), "bf16": (TensorProto.BFLOAT16, torch.bfloat16)}
_TYPE_NAMES = {TensorProto.FLOAT16: "tensor(float16)", TensorProto.BFLOAT16: "tensor(bfloat16)"}
_TYPE_ATTRIBUTES = ("to", "dtype")
_QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")


def to_half(model: ModelProto, half: str) -> ModelProto:
    """The same model with float32 tensors in 16 bits; its inputs and outputs keep their types.

    Operations that ONNX doesn't define for the format stay in float32, between casts. Integers stay as they are, and
    what quantizes them is scaled in 16 bits: TensorRT gives the result of a DequantizeLinear the type of its scale, and
    a cast behind it might keep a product from its integer kernel.

    Args:
        model: Without control flow.
        half: ``fp16`` or ``bf16``. Numbers too large for fp16 become its largest.

    Raises:
        TrialError: It has an operation that isn't ONNX's own, or one with a graph inside.
    """
    for node in model.graph.node:
        _check(node)
    converted = convert_version(model, OPSET)
    _Converter(converted.graph, half).convert()
    return converted


class _Converter:
    """Every float32 tensor becomes a 16-bit one of its name; those of the model's interface get another name inside."""

    def __init__(self, graph: GraphProto, half: str) -> None:
        self._graph = graph
        self._half, self._dtype = _HALVES[half]
        typed = shape_inference.infer_shapes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)]))
        values = (*typed.graph.input, *typed.graph.value_info, *typed.graph.output)
        self._floats = {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}
        self._floats |= {tensor.name for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
        self._constants = constants(graph)
        interface = {value.name for value in (*graph.input, *graph.output)}
        self._names = {name: f"{name}.half" for name in interface & self._floats}
        self._nodes: list[NodeProto] = []
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._made: set[str] = set()

    def convert(self) -> None:
        graph = self._graph
        scales = {node.input[1] for node in graph.node if node.op_type in _QUANTIZERS}
        for tensor in graph.initializer:
            if tensor.data_type == TensorProto.FLOAT:
                self._initializers[tensor.name] = self._tensor(tensor, positive=tensor.name in scales)
        for value in graph.input:
            if value.name in self._names:
                self._cast(value.name, self._names[value.name], self._half)
        for node in graph.node:
            self._add(node)
        for value in graph.output:
            if value.name in self._names:
                self._cast(self._names[value.name], value.name, TensorProto.FLOAT)
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(self._nodes)
        graph.initializer.extend(self._initializers.values())

    def _add(self, node: NodeProto) -> None:
        """Add a node that computes in 16 bits what it can."""
        new = NodeProto()
        new.CopyFrom(node)
        for attribute in new.attribute:
            if attribute.name in _TYPE_ATTRIBUTES and attribute.i == TensorProto.FLOAT:
                attribute.i = self._half
            elif attribute.HasField("t") and attribute.t.data_type == TensorProto.FLOAT:
                attribute.t.CopyFrom(self._tensor(attribute.t))
        if node.op_type == "ConstantOfShape" and not new.attribute:  # whose default is a float32 zero
            zero = numpy_helper.from_array(torch.zeros(1).numpy())
            new.attribute.append(helper.make_attribute("value", self._tensor(zero)))
        wide_inputs, wide_outputs = _float_slots(node, self._floats, _TYPE_NAMES[self._half])
        for slot, name in enumerate(node.input):
            new.input[slot] = self._float(name) if slot in wide_inputs else self._names.get(name, name)
        for slot, name in enumerate(node.output):
            new.output[slot] = f"{name}.wide" if slot in wide_outputs else self._names.get(name, name)
        self._nodes.append(new)
        for slot in wide_outputs:
            self._cast(new.output[slot], self._names.get(node.output[slot], node.output[slot]), self._half)
            self._made.add(new.output[slot])

    def _float(self, name: str) -> str:
        """A float32 tensor of the value: a constant as it was, anything else by a cast."""
        wide = f"{name}.wide"
        if wide not in self._made:
            self._made.add(wide)
            if name in self._constants:
                self._initializers[wide] = numpy_helper.from_array(self._constants[name], wide)
            else:
                self._cast(self._names.get(name, name), wide, TensorProto.FLOAT)
        return wide

    def _cast(self, source: str, target: str, kind: int) -> None:
        # "/" keeps them apart from modules.
        self._nodes.append(helper.make_node("Cast", [source], [target], name=f"/{target}/Cast", to=kind))

    def _tensor(self, tensor: TensorProto, *, positive: bool = False) -> TensorProto:
        value: Array = numpy_helper.to_array(tensor)
        floats = torch.from_numpy(value.copy())
        limits = torch.finfo(self._dtype)
        if positive:  # a scale of 0, which a tiny one would become, is an error
            floats = floats.clamp_min(float(limits.smallest_normal * limits.eps))
        rounded = torch.where(floats.isinf(), floats, floats.clamp(limits.min, limits.max)).to(self._dtype)
        raw = rounded.view(torch.int16).numpy().tobytes()
        return TensorProto(name=tensor.name, data_type=self._half, dims=tensor.dims, raw_data=raw)


def _float_slots(node: NodeProto, floats: set[str], half: str) -> tuple[set[int], set[int]]:
    """Inputs and outputs that must stay float32, because ONNX doesn't define them, or one of their kind, in 16 bits."""
    schema = defs.get_schema(node.op_type, OPSET)
    allowed = {constraint.type_param_str: constraint.allowed_type_strs for constraint in schema.type_constraints}
    inputs = _kinds(node.input, [formal.type_str for formal in schema.inputs], floats)
    outputs = _kinds(node.output, [formal.type_str for formal in schema.outputs], floats)
    wide = {kind for kind in (*inputs.values(), *outputs.values()) if half not in allowed.get(kind, [kind])}
    return {slot for slot in inputs if inputs[slot] in wide}, {slot for slot in outputs if outputs[slot] in wide}


def _kinds(names: Sequence[str], formals: list[str], floats: set[str]) -> dict[int, str]:
    """Slot of each float to the type that the operation's definition gives it; the last formal one may repeat."""
    return {slot: formals[min(slot, len(formals) - 1)] for slot, name in enumerate(names) if name in floats}


def _check(node: NodeProto) -> None:
    foreign = node.domain not in ("", "ai.onnx")
    if foreign or any(attribute.HasField("g") or attribute.graphs for attribute in node.attribute):
        why = f"is of the domain {node.domain!r}" if foreign else "has a graph inside"
        raise TrialError(
            "a model in 16-bit floats must consist of ONNX's own operations without control flow, but "
            f"{node.name or node.op_type} {why}; use the width 32"
        )
