"""OpenVINO on a CPU: executes f32, bf16, int8, and 4-bit weights of linear layers (docs/decisions/003-runtimes.md)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
from torch import nn

from paretune.errors import JobError, TrialError
from paretune.objectives.compress.schemes import STATIC, Scheme
from paretune.objectives.data.inputs import Inputs
from paretune.objectives.runtimes.base import (
    Array,
    Arrays,
    Capabilities,
    LayerReport,
    LoadOptions,
    Runtime,
    Session,
)
from paretune.objectives.runtimes.onnx_export import export_onnx
from paretune.objectives.runtimes.onnx_graph import layer_names

_BITS = {"f32": 32, "bf16": 16, "f16": 16, "u8": 8, "i8": 8, "u4": 4, "i4": 4}
_PRODUCTS = ("Conv", "Gemm", "MatMul")
_PRODUCT_TYPES = ("Convolution", "FullyConnected", "MatMul")
_NAMES = "originalLayersNames"
_CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d")
_SCHEMES = {**STATIC, 4: Scheme(activations="float", block=32)}


class OpenVINO(Runtime):
    """The default runtime on a CPU."""

    packages = ("openvino",)

    def __init__(self) -> None:
        self._core = openvino.Core()

    def capabilities(self, device: str) -> Capabilities:
        _device(device)
        found = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        floats = {32: "f32", 16: "bf16"} if "BF16" in found else {32: "f32"}
        if "INT8" not in found:
            return Capabilities(floats, {}, _SCHEMES)
        return Capabilities(floats, {**dict.fromkeys(_CONVOLUTIONS, (8,)), "Linear": (8, 4)}, _SCHEMES)

    def deploy(self, module: nn.Module, inputs: Inputs, path: Path) -> None:
        export_onnx(module, inputs, path)

    def load(self, path: Path, options: LoadOptions) -> Session:
        model = self._core.read_model(str(path))
        try:
            model.reshape({port.any_name: [options.batch_size, *list(port.partial_shape)[1:]] for port in model.inputs})
        except RuntimeError as error:
            raise TrialError(
                f"an artifact must accept any batch size, but {path.name} can't be reshaped to a batch of "
                f"{options.batch_size} ({str(error).strip().splitlines()[-1]}); don't fix the batch size in forward"
            ) from error
        config: dict[str, str | int | bool] = {
            "INFERENCE_PRECISION_HINT": "bf16" if options.float_bits == 16 else "f32",
            "INFERENCE_NUM_THREADS": options.threads,
            "NUM_STREAMS": 1,
            "ENABLE_CPU_PINNING": options.purpose == "measure",
            "PERF_COUNT": options.purpose == "profile",
        }
        graph = onnx.load(str(path), load_external_data=False).graph
        aliases = _aliases(graph)
        compiled = self._core.compile_model(model, "CPU", config)
        if _hides(compiled, aliases, _apart(graph, options.float_bits)):
            config |= {"SNIPPETS_MODE": "DISABLE"}
            compiled = self._core.compile_model(model, "CPU", config)
        return _Session(compiled, layer_names(graph), aliases, config)


def _device(device: str) -> None:
    if device.lower() != "cpu":
        raise JobError("target.device", "must be 'cpu' for the runtime 'openvino'", repr(device), "use cpu")


def _apart(graph: onnx.GraphProto, float_bits: int) -> set[str]:
    """Names of the layers whose width must be told apart from float32: quantized ones, and all of a bf16 model."""
    dequantized = {output for node in graph.node if node.op_type == "DequantizeLinear" for output in node.output}
    products = [node for node in graph.node if node.op_type in _PRODUCTS and not node.name.startswith("/")]
    return {node.name for node in products if float_bits == 16 or node.input[1] in dequantized}


def _hides(compiled: Any, aliases: dict[str, str], layers: set[str]) -> bool:
    """Whether linear layers were compiled into one kernel, which reports no width but that of its output.

    At small batches OpenVINO does so with neighbouring ones. Its switch for that goes for other fusions too (they
    matter for attention, not for convolutions), so it is left alone wherever every layer can be told apart.
    """
    for operation in compiled.get_runtime_model().get_ordered_ops():
        info = _info(operation)
        if info.get("layerType") == "Subgraph" and layers & {layer for layer, _ in _layers_of(info, aliases)}:
            return True
    return False


def _add(reports: dict[str, LayerReport], layer: str, bits: int, share: float) -> None:
    """Add what an operation executes to its layer, which may be called twice (``layer#2``): the widest width counts."""
    layer = layer.partition("#")[0]
    before = reports.get(layer, LayerReport(bits, 0.0))
    reports[layer] = LayerReport(max(bits, before.bits), before.share + share)


def _info(operation: Any) -> dict[str, str]:
    """What OpenVINO tells of a compiled operation: layerType, runtimePrecision, originalLayersNames, ...

    A product that took over a division of its input may name that alone; it is still called after itself.
    """
    info = {key: value.astype(str) for key, value in operation.get_rt_info().items()}
    if info.get("layerType") in _PRODUCT_TYPES:
        info[_NAMES] = f"{info.get(_NAMES, '')},{operation.get_friendly_name()}"
    return info


def _layers_of(info: dict[str, str], aliases: dict[str, str]) -> list[tuple[str, bool]]:
    """(layer, whether its product itself is meant, not a step after it) for each layer that an operation executes."""
    found = []
    for name in filter(None, info.get(_NAMES, "").split(",")):
        # An operation whose bias is all zero may keep no other name than these.
        name = name.removesuffix("/WithoutBiases").removesuffix("_original")
        layer, _, step = name.partition("/")
        if name in aliases:
            found.append((aliases[name], False))
        elif layer:  # the exporter's own names begin with a slash
            found.append((layer, not step))
    return found


def _aliases(graph: onnx.GraphProto) -> dict[str, str]:
    """Names that OpenVINO may give to a layer beside the layer's own.

    It calls the last operation after the output, and a product with a bias after the addition that follows it.
    """
    producers = {output: node for node in graph.node for output in node.output}
    aliases = {}
    for node in graph.node:
        if node.op_type == "Add":
            for product in (producers[name] for name in node.input if name in producers):
                if product.op_type == "MatMul":
                    aliases[node.name] = product.name
    for output in graph.output:
        if output.name in producers:
            name = producers[output.name].name
            aliases[output.name] = aliases.get(name, name)
    return aliases


class _Session(Session):
    def __init__(
        self, compiled: Any, names: set[str], aliases: dict[str, str], settings: dict[str, str | int | bool]
    ) -> None:
        self.settings = settings
        self._compiled = compiled
        self._names = names
        self._aliases = aliases
        self._request = compiled.create_infer_request()

    def run(self, inputs: Arrays) -> Array:
        return np.array(self._request.infer(dict(inputs), share_inputs=True)[0])

    def bind(self, inputs: Arrays) -> Callable[[], object]:
        request = self._compiled.create_infer_request()
        for name, array in inputs.items():
            request.set_tensor(name, openvino.Tensor(np.ascontiguousarray(array)))
        infer: Callable[[], object] = request.infer
        return infer

    def layers(self) -> dict[str, LayerReport]:
        times = self._times()
        total = sum(times.values()) or 1.0
        own: dict[str, LayerReport] = {}
        others: dict[str, LayerReport] = {}
        for operation in self._compiled.get_runtime_model().get_ordered_ops():
            info = _info(operation)
            precision = info.get("runtimePrecision", "").lower()
            if precision in _BITS and info.get("layerType") not in ("Input", "Output", "Const", "Reorder"):
                share = times.get(operation.get_friendly_name(), 0.0) / total
                found = dict.fromkeys(_layers_of(info, self._aliases))
                for layer, is_product in [pair for pair in found if pair[0] in self._names]:
                    _add(own if is_product else others, layer, _BITS[precision], share)
        # The product counts first: what follows it (bias, scale) may run apart, in another width.
        return others | own

    def _times(self) -> dict[str, float]:
        """Seconds per operation of the latest call; empty unless the session was loaded to be profiled."""
        if not self._compiled.get_property("PERF_COUNT"):
            return {}
        return {entry.node_name: entry.real_time.total_seconds() for entry in self._request.get_profiling_info()}
