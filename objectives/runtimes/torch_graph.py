"""From a model file to a graph that runs in one float format on one device, and what its products run in."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import TorchDispatchMode

from paretune.objectives.runtimes.torch_layers import SparseLinear, has_two_zeros_of_four, quantized_linear
from paretune.objectives.runtimes.torch_program import Program, decode, resolve

LAYER = "layer"
"""Key in a node's `meta`: name of the layer whose product it is."""

_PRODUCT = re.compile(
    r"(::|\.)_?(mkldnn_|mkl_|cudnn_)?"
    r"(q?conv(?!ert)|q?linear|addmm|baddbmm|int_mm|scaled_mm|cslt_sparse_mm|weight_int4pack_mm|(b?mm|matmul|addmv|mv)\b|"
    r"scaled_dot_product|lstm|gru|rnn)"
)
"""Operations that multiply matrices, as PyTorch's dispatcher calls them: what a layer's width is read from."""

_CAST = re.compile(r"^aten\.(conv|linear|addmm|mm|bmm|baddbmm|matmul|scaled_dot_product|lstm|gru|rnn)")
"""Those of them that a traced graph may hold, whose operands must all have the float format of the session."""

_WIDTHS = {
    torch.float64: 64,
    torch.float32: 32,
    torch.float16: 16,
    torch.bfloat16: 16,
    torch.int8: 8,
    torch.uint8: 8,
    torch.float8_e4m3fn: 8,
}
_TYPES = {
    "double": torch.float64,
    "float": torch.float32,
    "c10::Half": torch.float16,
    "c10::BFloat16": torch.bfloat16,
    "signed char": torch.int8,
    "unsigned char": torch.uint8,
    "c10::Float8_e4m3fn": torch.float8_e4m3fn,
}
"""Element types as PyTorch's execution traces write them."""


def lower(
    program: Program, dtype: torch.dtype, device: torch.device, *, channels_last: bool = False, sparse: bool = False
) -> fx.GraphModule:
    """The program on a device, all that isn't quantized in one float format; takes float32 inputs and gives float32.

    Weights, constants and inputs are converted, and so is whatever reaches a product in another float format. What
    the model itself asks to be in a certain format (``x.float()``) stays there.

    Args:
        program: What to run.
        dtype: float32, bfloat16 or float16.
        device: Where.
        channels_last: Convert images, volumes and the kernels of their convolutions to that memory format.
        sparse: Run linear layers of 16 bits, and of int8, whose weights have two zeros of four on kernels for that.
    """
    return _Lowering(program, dtype, device, channels_last, sparse).run()


class _Lowering:
    def __init__(
        self, program: Program, dtype: torch.dtype, device: torch.device, channels_last: bool, sparse: bool
    ) -> None:
        self._program = program
        self._dtype = dtype
        self._device = device
        self._channels_last = channels_last
        self._sparse = sparse
        self._root = nn.Module()
        self._graph = fx.Graph()
        self._nodes: dict[tuple[str, str], fx.Node] = {}

    def run(self) -> fx.GraphModule:
        for given in self._program.inputs:
            node = self._graph.placeholder(f"input_{len(self._nodes)}")
            if given.dtype.is_floating_point:
                node = self._cast(node)
            if self._channels_last and len(given.shape) in (3, 4):
                formats = {3: torch.channels_last, 4: torch.channels_last_3d}
                node = self._graph.call_function(
                    torch.ops.aten.contiguous.default, (node,), {"memory_format": formats[len(given.shape)]}
                )
            self._nodes["input", given.name] = node
        for step in self._program.steps:
            self._nodes["step", step.name] = self._step(step.target, step.args, step.kwargs)
        output = decode(self._program.output, self._refer, self._device)
        self._graph.output(self._graph.call_function(torch.ops.aten.to.dtype, (output, torch.float32)))
        self._graph.lint()
        return fx.GraphModule(self._root, self._graph).eval()

    def _step(self, target: str, args: list[Any], kwargs: dict[str, Any]) -> fx.Node:
        layer = self._layer_of(target, args)
        if layer in self._program.layers:
            node = self._graph.call_module(self._quantized(layer), (decode(args[0], self._refer, self._device),))
        elif self._sparse and target == "aten.linear.default" and self._has_pattern(args[1:]):
            x = decode(args[0], self._refer, self._device)
            node = self._graph.call_module(self._sparse_linear(args[1:]), (self._cast(x),))
        else:
            # Traced from one memory format, `view` may not be possible in another.
            function = resolve("aten.reshape.default" if target == "aten.view.default" else target)
            decoded = decode(args, self._refer, self._device)
            named = {key: decode(value, self._refer, self._device) for key, value in kwargs.items()}
            if _CAST.match(target):
                decoded, named = fx.node.map_arg((decoded, named), self._cast)
            node = self._graph.call_function(function, tuple(decoded), named)
        if layer:
            node.meta[LAYER] = layer
        return node

    def _layer_of(self, target: str, args: list[Any]) -> str:
        """The layer whose parameters a product takes: they are called after it."""
        if not _CAST.match(target):
            return ""
        for value in _flat(args):
            if isinstance(value, dict) and "tensor" in value:
                layer, _, parameter = str(value["tensor"]).rpartition(".")
                if "weight" in parameter:  # also weight_ih_l0 and in_proj_weight
                    return layer
        return ""

    def _refer(self, kind: str, name: str) -> fx.Node:
        if (kind, name) not in self._nodes:
            attribute = f"tensor_{len(self._nodes)}"
            self._root.register_buffer(attribute, self._tensor(self._program.tensors[name]))
            with self._graph.inserting_before(next(iter(self._graph.nodes))):
                self._nodes[kind, name] = self._graph.get_attr(attribute)
        return self._nodes[kind, name]

    def _tensor(self, tensor: Tensor) -> Tensor:
        tensor = tensor.to(self._device)
        if tensor.is_floating_point():
            tensor = tensor.to(self._dtype)
        if self._channels_last and tensor.dim() in (4, 5):
            return tensor.contiguous(memory_format=torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d)
        return tensor

    def _quantized(self, layer: str) -> str:
        attribute = f"layer_{sorted(self._program.layers).index(layer)}"
        if not hasattr(self._root, attribute):
            numerics = self._program.layers[layer]
            made = quantized_linear(layer, numerics, self._program.tensors, self._device, sparse=self._sparse)
            self._root.add_module(attribute, made)
        return attribute

    def _has_pattern(self, parameters: list[Any]) -> bool:
        """Whether a linear operation's weight and bias, as in `Step.args`, are what `SparseLinear` takes."""
        stored = all(isinstance(given, dict) and "tensor" in given for given in parameters)
        if self._dtype == torch.float32 or not stored:
            return False
        return has_two_zeros_of_four(self._program.tensors[parameters[0]["tensor"]])

    def _sparse_linear(self, parameters: list[Any]) -> str:
        names, known = [given["tensor"] for given in parameters], sorted(self._program.tensors)
        attribute = "_".join(["sparse", *(str(known.index(name)) for name in names)])
        if not hasattr(self._root, attribute):
            weight, *bias = (self._tensor(self._program.tensors[name]) for name in names)
            self._root.add_module(attribute, SparseLinear(weight, bias[0] if bias else None, self._device))
        return attribute

    def _cast(self, node: fx.Node) -> fx.Node:
        if self._dtype == torch.float32:
            return node
        return self._graph.call_function(_to_format, (node, self._dtype))


def _to_format(value: Any, dtype: torch.dtype) -> Any:
    """Floats in that format; masks, indices and sizes stay what they are."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for item in value:
            yield from _flat(item)
    else:
        yield value


def width_of(operation: str, dtypes: list[torch.dtype]) -> int:
    """Width of a product: that of its wider operand, but 4 where the weight is packed int4.

    Args:
        operation: As the dispatcher calls it.
        dtypes: Of its tensors, in their order.
    """
    if "int4pack" in operation:
        return 4
    # The second tensor of oneDNN's quantized products is a scale.
    operands = dtypes[:1] if "::q" in operation else dtypes[:2]
    return max((_WIDTHS[dtype] for dtype in operands if dtype in _WIDTHS), default=0)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the products that are executed."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.widths: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if _PRODUCT.search(name):
            self.widths.append(width_of(name, [tensor.dtype for tensor in _tensors(args)]))
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


class Watched(fx.Interpreter):
    """Runs a lowered graph operation by operation: what its products run in, and how long its layers take.

    Attributes:
        layers: Each layer's executed width, that of its widest product; filled by `watch`.
        products: How many products ran in each width, layers' and others (attention); filled by `watch`.
        seconds: Of each layer's products; `run` adds to it.
        total: Seconds of all operations; `run` adds to it.
    """

    def __init__(self, graph: fx.GraphModule, synchronize: Callable[[], None] = lambda: None) -> None:
        super().__init__(graph)
        self.layers: dict[str, int] = {}
        self.products: Counter[int] = Counter()
        self.seconds: dict[str, float] = defaultdict(float)
        self.total = 0.0
        self._synchronize = synchronize
        self._watching = False

    def watch(self, *inputs: Tensor) -> None:
        """Run once to see the widths."""
        self._watching = True
        try:
            self.run(*inputs)
        finally:
            self._watching = False

    def run_node(self, n: fx.Node) -> Any:
        return self._watched(n) if self._watching else self._timed(n)

    def _watched(self, node: fx.Node) -> Any:
        with _Watch() as watch:
            result = super().run_node(node)
        self.products.update(watch.widths)
        if LAYER in node.meta and watch.widths:
            layer = node.meta[LAYER]
            self.layers[layer] = max(self.layers.get(layer, 0), *watch.widths)
        return result

    def _timed(self, node: fx.Node) -> Any:
        self._synchronize()
        begin = time.perf_counter()
        result = super().run_node(node)
        self._synchronize()
        spent = time.perf_counter() - begin
        self.total += spent
        if LAYER in node.meta:
            self.seconds[node.meta[LAYER]] += spent
        return result


def executed_products(call: Callable[[], object]) -> Counter[int]:
    """How many products a call really executes in each width, as PyTorch's dispatcher saw them.

    Kernels that a compiler made itself aren't among them: they pass the dispatcher by.
    """
    with TemporaryDirectory(prefix="paretune-trace-") as folder:
        path = Path(folder) / "trace.json"
        with _traced(path):
            call()
        nodes = json.loads(path.read_text())["nodes"]
    return count_products({node["id"]: node for node in nodes})


@contextmanager
def _traced(path: Path) -> Iterator[None]:
    observer = torch.profiler.ExecutionTraceObserver()
    observer.register_callback(str(path))
    with _quiet():
        observer.start()
    try:
        yield
    finally:
        with _quiet():
            observer.stop()
        observer.unregister_callback()


@contextmanager
def _quiet() -> Iterator[None]:
    """Starting and stopping an observer each write a line to stderr from C++, whose log level is fixed at import."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def count_products(nodes: Mapping[int, Any]) -> Counter[int]:
    """Count the products of an execution trace by width; those that another one is made of count once.

    Args:
        nodes: The trace's nodes by their id.
    """
    found = {number for number, node in nodes.items() if _PRODUCT.search(node["name"])}
    counts: Counter[int] = Counter()
    for number in found:
        parent = nodes[number].get("ctrl_deps")
        while parent in nodes and parent not in found and nodes[parent].get("ctrl_deps") != parent:
            parent = nodes[parent].get("ctrl_deps")
        if parent not in found:
            types = re.findall(r"Tensor\(([^)]*)\)", " ".join(nodes[number]["inputs"]["types"]))
            counts[width_of(nodes[number]["name"], [_TYPES.get(name, torch.bool) for name in types])] += 1
    return counts


def confirmed(layers: Mapping[str, int], planned: Counter[int], executed: Counter[int]) -> dict[str, int]:
    """The layers' widths as far as a compiled program's products bear them out.

    Where it executes more products of some width than the graph has, those of the widths that it executes fewer of
    were computed in that width instead; which layers they are can't be told, so all of them are reported so.

    Args:
        layers: Width of each layer in the graph that was compiled.
        planned: Products of that graph by width.
        executed: Products of the compiled program.
    """
    surplus, missing = executed - planned, planned - executed
    if not surplus:
        return dict(layers)
    return {name: max(surplus) if bits in missing else bits for name, bits in layers.items()}
