"""The model file of PyTorch's own runtimes: a graph of ATen operations and its tensors (docs/decisions/014).

One safetensors file. The tensors are weights and constants; the graph, as `torch.export` traced it with a free batch
dimension, is JSON in the file's metadata. Reading one builds a graph of `torch.ops.aten` operations and nothing else:
no pickle, no code, which `torch.export.load` can't promise.
"""

from __future__ import annotations

import json
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from paretune.errors import JobError, TrialError
from paretune.objectives.compress.layers import replace_module
from paretune.objectives.compress.quantization import QuantizedLayer, block_size
from paretune.objectives.data.inputs import Inputs, attention_in_parts, map_tensors, tensors
from paretune.objectives.runtimes.onnx_export import input_names
from paretune.spaces.copies import copy_of

_VERSION = 2
_READABLE = (1, 2)
"""The first had no `Numerics.alone`."""

_KEY = "paretune.torch"
_PREFIX = "model."

_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **{
        f"operator.{name}": getattr(operator, name)
        for name in ("getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow")
    },
    **{f"operator.{name}": getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_")},
    **{f"torch.{name}": getattr(torch, name) for name in ("sym_int", "sym_float", "sym_max", "sym_min", "sym_not")},
}
"""Functions of sizes that a traced graph may call beside `torch.ops.aten`."""

_NAMED = {"dtype": torch.dtype, "memory_format": torch.memory_format, "layout": torch.layout}


@dataclass(frozen=True)
class Input:
    """What the program takes in one place.

    Attributes:
        name: Under which a session's arrays carry it.
        dtype: As the example had it.
        shape: Of one sample, without the batch.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Step:
    """One operation.

    Attributes:
        name: Of its result.
        target: ``aten.<operation>.<overload>``, or one of the functions of sizes.
        args: JSON values; a result is ``{"step": name}``, a tensor ``{"tensor": name}``, an input ``{"input": name}``,
            the session's device ``{"device": ""}``, and ``{"dtype": "float32"}`` and the like what they say.
        kwargs: Likewise.
    """

    name: str
    target: str
    args: list[Any]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Numerics:
    """How the weight of a quantized linear layer is stored: `<layer>.weight` on its grid, and `<layer>.scale`.

    4-bit levels -8 to 7 are stored as 0 to 15, those of affine grids as they are, and `<layer>.zero` beside them.

    Attributes:
        bits: 8, or 4 where two weights share a byte.
        number: ``int`` or ``fp8``.
        block: Inputs that share a scale; None where each output has one.
        alone: Whether the product is one of floats all the same: the weight, of any layer, is made one when it is read.
    """

    bits: int
    number: str
    block: int | None
    alone: bool = False


@dataclass(frozen=True)
class Program:
    """What a model file holds.

    Attributes:
        inputs: In the order of the graph.
        steps: In the order of execution.
        output: What gives the output, as in `Step.args`.
        layers: Layers whose product is quantized, by module name.
        tensors: Weights and constants by the module's own names, floats where the product is one of floats.
    """

    inputs: tuple[Input, ...]
    steps: tuple[Step, ...]
    output: Any
    layers: Mapping[str, Numerics]
    tensors: Mapping[str, Tensor]


class _Positional(nn.Module):
    """Gives a model whose inputs are a tuple or dict a flat list of arguments."""

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        self._names = list(inputs) if isinstance(inputs, dict) else None

    def forward(self, *args: Tensor) -> Tensor:
        named = {} if self._names is None else dict(zip(self._names, args, strict=True))
        output: Tensor = self.model(**named) if named else self.model(*args)
        return output


def write_program(module: nn.Module, inputs: Inputs, path: Path) -> None:
    """Write `module` to `path`; quantized weights are stored on their grids, so that the file is as small as it says.

    Args:
        module: In eval mode, quantizers frozen; isn't changed.
        inputs: An example batch.
        path: Where the file goes.

    Raises:
        TrialError: `torch.export` can't trace the module with a free batch dimension, it uses operations that aren't
            PyTorch's own, or a layer is quantized in a way that these runtimes don't execute.
    """
    module = copy_of(module).cpu().eval()
    layers, stored = _take_quantized(module)
    exported = _export(module, map_tensors(Tensor.cpu, inputs))
    signature = exported.graph_signature
    if signature.buffers_to_mutate:
        changed = ", ".join(name.removeprefix(_PREFIX) for name in signature.buffers_to_mutate.values())
        raise TrialError(f"forward must not change buffers in eval mode, but changes {changed}; remove that from it")
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    values = {**exported.constants, **exported.state_dict}
    places = dict(zip(signature.user_inputs, input_names(inputs), strict=True))
    references = {node: {"tensor": name.removeprefix(_PREFIX)} for node, name in names.items()}
    references |= {node: {"input": name} for node, name in places.items()}
    steps = _steps(exported.graph, references)
    [output] = signature.user_outputs
    header = {
        "version": _VERSION,
        "inputs": [
            {"name": name, "dtype": _plain(tensor.dtype), "shape": list(tensor.shape[1:])}
            for name, tensor in zip(places.values(), tensors(inputs).values(), strict=True)
        ],
        "steps": [step.__dict__ for step in steps],
        "output": references[str(output)],
        "layers": {name: numerics.__dict__ for name, numerics in layers.items()},
    }
    held = {name.removeprefix(_PREFIX): values[name].detach().clone().contiguous() for name in names.values()}
    save_file({**held, **stored}, path, metadata={_KEY: json.dumps(header)})


def read_program(path: Path) -> Program:
    """Undo `write_program`.

    Raises:
        JobError: The file isn't one of its kind and version.
    """
    with safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {}).get(_KEY, "{}"))
        if header.get("version") not in _READABLE:
            rule = f"must hold a program of version {' or '.join(map(str, _READABLE))}"
            raise JobError("artifact", rule, str(path), "load it with the version and runtime that wrote it")
        held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    layers = {name: Numerics(**numerics) for name, numerics in header["layers"].items()}
    for name in [name for name, numerics in layers.items() if numerics.alone]:
        del layers[name]
        levels, scale, zero = (held[f"{name}.{part}"].float() for part in ("weight", "scale", "zero"))
        shape = (-1, *[1] * (levels.dim() - 1))
        held[f"{name}.weight"] = (levels - zero.reshape(shape)) * scale.reshape(shape)
    return Program(
        inputs=tuple(
            Input(given["name"], getattr(torch, given["dtype"]), tuple(given["shape"])) for given in header["inputs"]
        ),
        steps=tuple(Step(**step) for step in header["steps"]),
        output=header["output"],
        layers=layers,
        tensors=held,
    )


def resolve(target: str) -> Callable[..., Any]:
    """The function that a step's target names.

    Raises:
        JobError: It isn't an ATen operation nor a function of sizes: no file of ours has others.
    """
    if target in _FUNCTIONS:
        return _FUNCTIONS[target]
    space, _, rest = target.partition(".")
    name, _, overload = rest.partition(".")
    found = getattr(getattr(torch.ops.aten, name, None), overload, None) if space == "aten" else None
    if not isinstance(found, torch._ops.OpOverload):
        rule = "must consist of ATen operations that this PyTorch has"
        raise JobError("artifact", rule, repr(target), "load it with the version of PyTorch that its card names")
    return cast(Callable[..., Any], found)


def decode(value: Any, refer: Callable[[str, str], Any], device: torch.device) -> Any:
    """The argument that a JSON value of a step stands for.

    Args:
        value: As in `Step.args`.
        refer: Gives what a ``step``, ``tensor`` or ``input`` of that name is.
        device: What the session runs on.
    """
    if isinstance(value, list):
        return [decode(item, refer, device) for item in value]
    if not isinstance(value, dict):
        return value
    [(kind, name)] = value.items()
    if kind == "device":
        return device
    return getattr(torch, name) if kind in _NAMED else refer(kind, name)


def _export(module: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    # Running forward on stand-ins is quicker than reading its bytecode, but takes a batch size that Python asked for
    # (`len(x)`) for a constant.
    try:
        return _trace(module, inputs, strict=False)
    except Exception:  # torch.export raises a dozen kinds, most of them private
        try:
            return _trace(module, inputs, strict=True)
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise TrialError(
                f"torch.export must be able to trace the model for any batch size, but got {type(error).__name__} "
                f"({reason}); don't fix the batch size in forward, nor branch on the values of tensors"
            ) from error


def _trace(module: nn.Module, inputs: Inputs, *, strict: bool) -> torch.export.ExportedProgram:
    args = tuple(tensors(inputs).values())
    batch = torch.export.Dim("batch")
    shapes = (tuple({0: batch} for _ in args),)
    with _silence(), torch.no_grad(), attention_in_parts():
        traced = torch.export.export(_Positional(module, inputs), args, dynamic_shapes=shapes, strict=strict)
        # Without operations in place: they would change the session's inputs and constants from call to call.
        return traced.run_decompositions({}) if any(map(_is_in_place, traced.graph.nodes)) else traced


@contextmanager
def _silence() -> Iterator[None]:
    """The exporter warns of its own doings, and logs at length what it raises anyway."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _is_in_place(node: torch.fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _steps(graph: torch.fx.Graph, references: dict[str, dict[str, str]]) -> list[Step]:
    """The operations of a traced graph but for those that only check sizes; their results join the references."""
    graph.eliminate_dead_code()
    steps: list[Step] = []

    def encode(value: Any) -> Any:
        if isinstance(value, torch.fx.Node):
            return references[value.name]
        if isinstance(value, list | tuple):
            return [encode(item) for item in value]
        if isinstance(value, torch.device):
            return {"device": ""}
        for kind, of in _NAMED.items():
            if isinstance(value, of):
                return {kind: _plain(value)}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TrialError(
            f"a model must be made of tensors and plain numbers, but {type(value).__name__} is an argument in its "
            "graph; write that part of forward otherwise"
        )

    for node in graph.nodes:
        if node.op == "call_function" and not _only_checks(node):
            kwargs = {key: encode(value) for key, value in node.kwargs.items()}
            steps.append(Step(node.name, _target(node.target), encode(node.args), kwargs))
            references[node.name] = {"step": node.name}
    return steps


def _only_checks(node: torch.fx.Node) -> bool:
    """Assertions on sizes and formats of the example: the session's sizes are fixed, its formats may be others."""
    name = str(node.target).removeprefix("aten.")
    return name.startswith(("_assert", "sym_constrain")) and not node.users


def _target(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return str(target)
    for name, function in _FUNCTIONS.items():
        if target is function:
            return name
    raise TrialError(
        f"a model must be made of PyTorch's own operations for this runtime, but its graph has {target}; choose "
        "another runtime, or write that part of forward with them"
    )


def _plain(value: Any) -> str:
    return str(value).removeprefix("torch.")


def _take_quantized(module: nn.Module) -> tuple[dict[str, Numerics], dict[str, Tensor]]:
    """Put plain layers in place of the quantized ones; gives their numerics and what is to be stored of them."""
    layers: dict[str, Numerics] = {}
    stored: dict[str, Tensor] = {}
    for name, quantized in list(module.named_modules()):
        if not isinstance(quantized, QuantizedLayer):
            continue
        scheme, layer = quantized.scheme, cast(Any, quantized.layer)
        alone = scheme.weights_alone and not scheme.block
        executed = scheme.activations == ("float" if scheme.block else "dynamic") and not scheme.outputs
        if not alone and not (isinstance(layer, nn.Linear) and executed):
            raise TrialError(
                "PyTorch executes linear layers in 8 bits with dynamic activations, or with weights in blocks, but "
                f"{name} ({type(layer).__name__}) was to run in {quantized.bits} bits with {scheme.activations} "
                "activations; give it a float width, or quantize weights alone (activations: float)"
            )
        block = block_size(layer.in_features, scheme.block) if scheme.block else None
        layers[name] = Numerics(quantized.container, scheme.number, block, alone)
        stored |= {f"{name}.{key}": tensor for key, tensor in _stored(quantized).items()}
        if layer.bias is not None:
            stored[f"{name}.bias"] = layer.bias.detach().clone()
        replace_module(module, name, layer)
    return layers, stored


def _stored(quantized: QuantizedLayer) -> dict[str, Tensor]:
    """The weight on its grid, its scales, and zero points where it may have some."""
    scheme, scale = quantized.scheme, quantized.weight_scale.detach()
    if scheme.number == "fp8":
        weight = quantized.quantized_weight().detach()
        return {"weight": (weight / scale[:, None]).to(torch.float8_e4m3fn), "scale": scale[:, None].clone()}
    levels, zero = quantized.weight_levels(), quantized.weight_zero_point
    if scheme.block:
        found = {"weight": pack_pairs(levels if scheme.affine else levels + 8), "scale": scale}
        found |= {"zero": zero.to(torch.uint8)} if scheme.affine else {}
        return {key: tensor.reshape(len(levels), -1).clone() for key, tensor in found.items()}
    levels = levels.to(torch.uint8 if scheme.affine else torch.int8)
    if not scheme.weights_alone:
        return {"weight": levels, "scale": scale[:, None].clone()}
    return {"weight": levels, "scale": scale.clone(), "zero": zero.to(levels.dtype)}


def pack_pairs(levels: Tensor) -> Tensor:
    """Two levels of 0 to 15 a byte, the first in the upper half: (outputs, inputs) to (outputs, inputs / 2), uint8."""
    levels = levels.to(torch.uint8)
    return (levels[:, ::2] << 4) | levels[:, 1::2]


def unpack_pairs(packed: Tensor) -> Tensor:
    """Undo `pack_pairs`; int32."""
    return torch.stack([packed >> 4, packed & 15], dim=-1).flatten(1).to(torch.int32)
