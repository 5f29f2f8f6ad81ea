"""TensorRT on an NVIDIA GPU: executes f32 or TF32, fp16 or bf16, and int8 (docs/decisions/015-tensorrt.md)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from paretune.errors import JobError, TrialError
from paretune.objectives.accelerator import has_bf16
from paretune.objectives.compress.schemes import Scheme, Schemes
from paretune.objectives.data.inputs import Inputs
from paretune.objectives.device import gpu_uuid, is_cuda
from paretune.objectives.runtimes.base import (
    Array,
    Arrays,
    Capabilities,
    LayerReport,
    LoadOptions,
    Runtime,
    Session,
    choose,
)
from paretune.objectives.runtimes.cuda_graph import CapturedCall
from paretune.objectives.runtimes.onnx_export import export_onnx
from paretune.objectives.runtimes.onnx_graph import fold_alone, layer_names
from paretune.objectives.runtimes.onnx_half import to_half
from paretune.objectives.runtimes.tensorrt_engine import EngineCache, fix_batch, load_engine, tensorrt
from paretune.objectives.runtimes.tensorrt_report import Kernel, find_kernels, layer_reports, sparse_layers

_CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d")
SCHEMES: Schemes = {8: Scheme(symmetric=True)}
"""TensorRT knows no zero points."""

_CAPABILITY_SPARSE = (8, 0)
"""Ampere: tensor cores that leave out two zeros of four."""

_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "INT32": torch.int32,
    "INT64": torch.int64,
    "BOOL": torch.bool,
}
"""Names of TensorRT's types."""


class TensorRT(Runtime):
    """NVIDIA's compiler. An engine is built when an artifact is first loaded for a batch size, which takes a while.

    Args:
        half: What a width of 16 means: ``fp16`` or ``bf16``.
        tf32: Whether products of a width of 32 run in TF32.
        cuda_graph: Whether a call is replayed as one CUDA graph.

    Raises:
        JobError: An option has another value.
    """

    packages = ("tensorrt",)
    compiles = True

    def __init__(self, half: str = "fp16", tf32: bool = False, cuda_graph: bool = True) -> None:
        choose("half", half, ("fp16", "bf16"))
        choose("tf32", tf32, (False, True))
        choose("cuda_graph", cuda_graph, (True, False))
        self._half = half
        self._tf32 = tf32
        self._cuda_graph = cuda_graph

    def capabilities(self, device: str) -> Capabilities:
        place = _device(device)
        floats = {32: "tf32" if self._tf32 else "f32"}
        if self._half == "fp16" or has_bf16(place):
            floats[16] = self._half
        patterns = ("2:4",) if torch.cuda.get_device_capability(place) >= _CAPABILITY_SPARSE else ()
        return Capabilities(floats, dict.fromkeys((*_CONVOLUTIONS, "Linear"), (8,)), SCHEMES, patterns)

    def deploy(self, module: nn.Module, inputs: Inputs, path: Path) -> None:
        export_onnx(module, inputs, path)

    def load(self, path: Path, options: LoadOptions) -> Session:
        device = _device(options.device)
        model = onnx.load(path)
        calls = layer_names(model.graph)
        model = self.typed(model, options)
        settings: dict[str, str | int | bool] = {
            "version": str(tensorrt().__version__),
            "format": self.capabilities(options.device).float_formats.get(options.float_bits, "f32"),
            "cuda_graph": self._cuda_graph and options.purpose != "profile",
        }
        with torch.cuda.device(device):
            engine = load_engine(model.SerializeToString(deterministic=True), device, EngineCache(), tf32=self._tf32)
            return _Session(engine, device, calls, options, settings)

    def typed(self, model: onnx.ModelProto, options: LoadOptions) -> onnx.ModelProto:
        """The model as it is compiled: for one batch size, its floats in the type that they are computed in.

        TensorRT computes each tensor in the type that it has in the file. Of weights that alone are quantized it would
        have no integer kernel for either, so they are floats. The given model is changed too.
        """
        fix_batch(model, options.batch_size)
        fold_alone(model.graph)
        return to_half(model, self._half) if options.float_bits == 16 else model


def _device(name: str) -> torch.device:
    """The device of that name; the package must be installed, and the GPU be there."""
    wanted = name.lower()
    if not is_cuda(wanted):
        rule = "must be cuda or cuda:N for the runtime 'tensorrt'"
        raise JobError("target.device", rule, repr(name), "use cuda or cuda:N")
    tensorrt()
    gpu_uuid(wanted)
    return torch.device("cuda", torch.device(wanted).index or 0)


class _Session(Session):
    """A loaded engine. Bound calls enqueue work on the current stream and don't wait for it.

    Args:
        engine: TensorRT's.
        device: Where it runs; the current one while this is made.
        calls: Names of the ONNX nodes with weights.
        options: How it is loaded.
        settings: What is known of it so far.
    """

    def __init__(
        self,
        engine: Any,
        device: torch.device,
        calls: set[str],
        options: LoadOptions,
        settings: dict[str, str | int | bool],
    ) -> None:
        trt = tensorrt()
        self.settings: dict[str, str | int | bool] = settings
        self._device = device
        self._calls = calls
        self._context = engine.create_execution_context()
        if self._context is None:
            raise TrialError("an engine must fit into the GPU's memory, but this one doesn't; use a smaller batch size")
        # Marks for NVIDIA's profilers cost time in each call.
        self._context.nvtx_verbosity = trt.ProfilingVerbosity.NONE
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        types = {name: _DTYPES[engine.get_tensor_dtype(name).name] for name in names}
        inputs = [name for name in names if engine.get_tensor_mode(name).name == "INPUT"]
        self._output = next(name for name in names if name not in inputs)
        shapes = {name: tuple(engine.get_tensor_shape(name)) for name in names}
        _check_batch(shapes[self._output], options.batch_size)
        inspector = engine.create_engine_inspector()
        inspector.execution_context = self._context
        described = json.loads(inspector.get_engine_information(trt.LayerInformationFormat.JSON), strict=False)
        self._kernels: list[Kernel] = find_kernels(described, calls)
        self.settings["sparse_layers"] = len(sparse_layers(self._kernels))
        self._times: dict[str, float] = {}
        if options.purpose == "profile":
            self._context.profiler = self._profiler = _profiler(self._times)
        self._buffers = {name: torch.zeros(shapes[name], dtype=types[name], device=device) for name in names}
        self._inputs = inputs
        self._own = self._call(self._buffers)

    def run(self, inputs: Arrays) -> Array:
        self._times.clear()
        with torch.cuda.device(self._device):
            for name in self._inputs:
                self._buffers[name].copy_(_tensor(inputs[name]))
            self._own()
            return np.asarray(self._buffers[self._output].numpy(force=True))

    def bind(self, inputs: Arrays) -> Callable[[], object]:
        buffers = {name: torch.empty_like(tensor) for name, tensor in self._buffers.items()}
        with torch.cuda.device(self._device):
            for name in self._inputs:
                buffers[name].copy_(_tensor(inputs[name]))
            return self._call(buffers)

    def layers(self) -> dict[str, LayerReport]:
        return layer_reports(self._kernels, self._calls, self._times)

    def _call(self, buffers: Mapping[str, Tensor]) -> Callable[[], None]:
        """A function that runs the engine on these buffers."""
        enqueue = _Enqueue(self._context, self._device, buffers, self._output)
        return CapturedCall(enqueue, self._device).replay if self.settings["cuda_graph"] else enqueue.aside


def _check_batch(shape: tuple[int, ...], batch_size: int) -> None:
    if not shape or shape[0] != batch_size:
        raise TrialError(
            f"an artifact must accept any batch size, but for a batch of {batch_size} its output is {shape}; "
            "don't fix the batch size in forward"
        )


def _tensor(array: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _profiler(times: dict[str, float]) -> Any:
    """Adds up milliseconds by kernel; with one, TensorRT waits for the end of each call."""
    base: Any = tensorrt().IProfiler

    class Profiler(base):  # type: ignore[misc]  # the package has no annotations
        def __init__(self) -> None:
            base.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            times[layer_name] = times.get(layer_name, 0.0) + ms

    return Profiler()


class _Enqueue:
    """Runs an engine on one set of buffers."""

    def __init__(self, context: Any, device: torch.device, buffers: Mapping[str, Tensor], output: str) -> None:
        self._context = context
        self._device = device
        self._buffers = buffers  # the engine has their addresses, and doesn't keep them
        self._output = buffers[output]
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # PyTorch doesn't annotate it

    def __call__(self) -> Tensor:
        """Enqueue a call on the current stream; returns where its output will be."""
        for name, tensor in self._buffers.items():
            self._context.set_tensor_address(name, tensor.data_ptr())
        if not self._context.execute_async_v3(torch.cuda.current_stream(self._device).cuda_stream):
            raise RuntimeError("TensorRT refused to run the engine")
        return self._output

    def aside(self) -> None:
        """Enqueue a call on a stream of its own, between what is and what will be on the current one.

        On the default stream, which is mostly the current one, TensorRT would wait for the GPU in each call.
        """
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self()
        current.wait_stream(self._stream)
