"""ONNX Runtime: executes f32, int8, and 4-bit weights of linear layers on a CPU (docs/decisions/013-onnxruntime.md)."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import GraphProto, NodeProto
from onnxruntime.capi import onnxruntime_pybind11_state as errors
from torch import nn

from paretune.errors import JobError, TrialError
from paretune.objectives.compress.schemes import Scheme
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
from paretune.objectives.runtimes.onnx_graph import fold_alone, layer_names
from paretune.objectives.runtimes.onnx_integer import use_integer_kernels

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d")
_SCHEMES = {8: Scheme(outputs=_CONVOLUTIONS), 4: Scheme(activations="float", block=32)}

# The first turns float layers between quantized ones into int8; the second replaces two grids by one of its own, after
# which a bias isn't in the units of the product any more and the layer runs in floats.
_UNFAITHFUL = ("WeightBiasQuantization", "DoubleQDQPairsRemover")

_FLOATS = {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "ConvTranspose"}
_INTEGERS = {
    "QLinearConv",
    "ConvInteger",
    "QGemm",
    "QLinearMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
}
_PROFILED_CALLS = 10
_FAILURES = (errors.Fail, errors.RuntimeException)


class OnnxRuntime(Runtime):
    """Microsoft's runtime; on a GPU it executes f32 alone, and only where a build for one is installed."""

    packages = ("onnxruntime",)

    def capabilities(self, device: str) -> Capabilities:
        if _provider(device)[0] != _PROVIDERS["cpu"]:
            return Capabilities({32: "f32"}, {}, _SCHEMES)
        return Capabilities({32: "f32"}, {**dict.fromkeys(_CONVOLUTIONS, (8,)), "Linear": (8, 4)}, _SCHEMES)

    def deploy(self, module: nn.Module, inputs: Inputs, path: Path) -> None:
        export_onnx(module, inputs, path, adapt=use_integer_kernels)

    def load(self, path: Path, options: LoadOptions) -> Session:
        provider = _provider(options.device)
        with TemporaryDirectory(prefix="paretune-onnxruntime-") as folder:
            compiled = Path(folder) / "compiled.onnx"
            config = _session_options(options)
            config.optimized_model_filepath = str(compiled)
            profile = TemporaryDirectory(prefix="paretune-profile-") if options.purpose == "profile" else None
            if profile is not None:
                config.enable_profiling = True
                config.profile_file_prefix = f"{profile.name}/calls"
            model = onnx.load(path)
            # Left to itself it would dequantize such weights in each call, and not lay them out for its kernels.
            source = model.SerializeToString() if fold_alone(model.graph) else str(path)
            try:
                session = onnxruntime.InferenceSession(
                    source, config, providers=[_on_stream(provider)], disabled_optimizers=list(_UNFAITHFUL)
                )
            except _FAILURES as error:
                raise _fixed_batch(error) from error
            calls = _calls(model.graph)
            executed = _executed(onnx.load(compiled, load_external_data=False).graph.node, calls)
        settings: dict[str, str | int | bool] = {
            "provider": provider[0],
            **provider[1],
            "intra_op_num_threads": options.threads,
            "disabled_optimizers": ",".join(_UNFAITHFUL),
        }
        return _Session(session, executed, settings, device=_device(options.device), profile=profile)


def _device(device: str) -> tuple[str, int]:
    """Kind and number of a device: ``cuda`` and 1 for ``cuda:1``."""
    kind, _, index = device.lower().partition(":")
    return kind, int(index) if index.isdigit() else 0


def _provider(device: str) -> tuple[str, dict[str, str]]:
    """The execution provider of a device, which this build of ONNX Runtime must have, and its options."""
    kind, index = _device(device)
    available = onnxruntime.get_available_providers()
    found = [name for name, provider in _PROVIDERS.items() if provider in available]
    if kind not in found:
        hint = f"use {' or '.join(found)}"
        if kind in _PROVIDERS:
            hint += ", or install onnxruntime-gpu in place of onnxruntime"
        raise JobError("target.device", "must be a device that this build of 'onnxruntime' has", repr(device), hint)
    # What is called f32 must not be computed in TF32, which this provider does unless told otherwise.
    return _PROVIDERS[kind], {"device_id": str(index), "use_tf32": "0"} if kind == "cuda" else {}


def _on_stream(provider: tuple[str, dict[str, str]]) -> tuple[str, dict[str, str]]:
    """The provider on PyTorch's current stream, where the clock puts its events; by itself it has one of its own."""
    name, own = provider
    if name != _PROVIDERS["cuda"]:
        return provider
    stream = torch.cuda.current_stream(int(own["device_id"])).cuda_stream
    return name, {**own, "user_compute_stream": str(stream)}


def _session_options(options: LoadOptions) -> Any:
    config = onnxruntime.SessionOptions()
    config.log_severity_level = 3  # it warns that a saved graph suits this machine alone; it is only read back
    config.intra_op_num_threads = options.threads
    config.inter_op_num_threads = 1
    config.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    config.add_free_dimension_override_by_name("batch", options.batch_size)
    if options.purpose == "score":
        # Several workers may score at once: a thread that spins takes the core from another's.
        config.add_session_config_entry("session.intra_op.allow_spinning", "0")
    elif options.threads > 1 and hasattr(os, "sched_getaffinity"):
        affinities = _affinities(options.threads, os.sched_getaffinity(0))
        config.add_session_config_entry("session.intra_op_thread_affinities", affinities)
    return config


def _affinities(threads: int, cores: Iterable[int]) -> str:
    """A core, counted from 1, for each thread but the caller's; threads share where there are too few."""
    known = sorted(cores)
    return ";".join(str(known[thread % len(known)] + 1) for thread in range(1, threads))


def _fixed_batch(error: Exception) -> TrialError:
    return TrialError(
        f"an artifact must accept any batch size, but ONNX Runtime says: {str(error).strip().splitlines()[-1]}; "
        "don't fix the batch size in forward"
    )


class _Node(NamedTuple):
    """What a node of the optimized graph computes: a call of a layer, in which width."""

    call: str
    bits: int

    @property
    def layer(self) -> str:
        """The module's name; a layer that is called twice has calls ``layer`` and ``layer#2``."""
        return self.call.partition("#")[0]


def _calls(graph: GraphProto) -> dict[str, str]:
    """What an optimized node may be named after, to the call of a layer.

    Most keep the name of the product. A float convolution that is laid out in blocks of channels is named after the
    tensor that it writes, which is that of an activation where one was fused with it.
    """
    names = layer_names(graph)
    found = {name: name for name in names}
    writers: dict[str, str] = {}
    for node in graph.node:  # in topological order, as ONNX demands
        call = node.name if node.name in names else None
        if call is None:
            sources = [name for name in node.input if name in writers]
            call = writers[sources[0]] if len(sources) == 1 else None
        if call is not None:
            writers |= dict.fromkeys(node.output, call)
    return found | {f"{tensor}_nchwc": call for tensor, call in writers.items()}


def _executed(nodes: Iterable[NodeProto], calls: dict[str, str]) -> dict[str, _Node]:
    """The nodes of the optimized graph that compute layers, by their names in that graph.

    A layer of which a call isn't found (it may be part of something larger) is left out as a whole.
    """
    found = {}
    for node in nodes:
        call, bits = _call_of(node.name, calls), _bits(node)
        if call is not None and bits is not None:
            found[node.name] = _Node(call, bits)
    missing = {call.partition("#")[0] for call in set(calls.values()).difference(node.call for node in found.values())}
    return {name: node for name, node in found.items() if node.layer not in missing}


def _bits(node: NodeProto) -> int | None:
    if node.op_type == "MatMulNBits":
        return int(next(attribute.i for attribute in node.attribute if attribute.name == "bits"))
    return 8 if node.op_type in _INTEGERS else 32 if node.op_type in _FLOATS else None


def _call_of(name: str, calls: dict[str, str]) -> str | None:
    """The call that an optimized node was made from; ONNX Runtime puts words before and after its name."""
    name = name.removeprefix("fused ")
    plain = re.sub(r"_token_\d+$", "", name)
    return next((calls[key] for key in (name, plain, plain.partition("/")[0]) if key in calls), None)


@dataclass(frozen=True)
class _Bound:
    """Runs with memory set aside before: 5 to 10 % faster than `run` on a net of half a millisecond."""

    session: Any
    binding: Any
    inputs: list[Any]
    """On a CPU these own the memory that the binding points to."""
    options: Any

    def __call__(self) -> None:
        self.session.run_with_iobinding(self.binding, self.options)


class _Session(Session):
    def __init__(
        self,
        session: Any,
        executed: dict[str, _Node],
        settings: dict[str, str | int | bool],
        *,
        device: tuple[str, int],
        profile: TemporaryDirectory[str] | None,
    ) -> None:
        self.settings = settings
        self._session = session
        self._executed = executed
        self._device = device
        self._profile = profile
        self._shares: dict[str, float] = {}

    def run(self, inputs: Arrays) -> Array:
        if self._profile is not None:
            # Its profiler tells what it saw once, at the end: see enough calls for a median before that.
            for _ in range(_PROFILED_CALLS):
                self._outputs(inputs)
            self._shares = _shares(Path(self._session.end_profiling()))
            self._profile.cleanup()
            self._profile = None
        return self._outputs(inputs)

    def _outputs(self, inputs: Arrays) -> Array:
        try:
            return np.asarray(self._session.run(None, dict(inputs))[0])
        except _FAILURES as error:
            raise _fixed_batch(error) from error

    def bind(self, inputs: Arrays) -> Callable[[], object]:
        self._outputs(inputs)  # fails with a reason if it does
        device, index = self._device
        binding = self._session.io_binding()
        place = onnxruntime.OrtValue.ortvalue_from_numpy
        values = [place(np.ascontiguousarray(array), device, index) for array in inputs.values()]
        for name, value in zip(inputs, values, strict=True):
            binding.bind_ortvalue_input(name, value)
        output = self._session.get_outputs()[0].name
        binding.bind_output(output, device, index)
        self._session.run_with_iobinding(binding)
        binding.bind_ortvalue_output(output, binding.get_outputs()[0])
        run = onnxruntime.RunOptions()
        if device != "cpu":  # the clock enqueues calls and waits for all of them at once
            run.add_run_config_entry("disable_synchronize_execution_providers", "1")
        return _Bound(self._session, binding, values, run)

    def layers(self) -> dict[str, LayerReport]:
        reports: dict[str, LayerReport] = {}
        for name, node in self._executed.items():
            before = reports.get(node.layer, LayerReport(node.bits, 0.0))
            share = before.share + self._shares.get(name, 0.0)
            reports[node.layer] = LayerReport(max(node.bits, before.bits), share)
        return reports


def _shares(profile: Path) -> dict[str, float]:
    """Each node's share of a call, from the medians of its times."""
    times: dict[str, list[float]] = {}
    for event in json.loads(profile.read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times.setdefault(event["name"].removesuffix("_kernel_time"), []).append(event["dur"])
    medians = {name: median(values) for name, values in times.items()}
    total = sum(medians.values()) or 1.0
    return {name: value / total for name, value in medians.items()}
