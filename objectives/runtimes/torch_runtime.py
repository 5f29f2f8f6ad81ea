"""What the runtimes that execute with PyTorch itself share: devices, options, sessions (docs/decisions/014)."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from paretune.errors import JobError
from paretune.objectives.accelerator import has_bf16, use_tf32
from paretune.objectives.compress.schemes import Scheme, Schemes
from paretune.objectives.data.inputs import Inputs
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
from paretune.objectives.runtimes.torch_graph import Watched, confirmed, executed_products, lower
from paretune.objectives.runtimes.torch_layers import SparseLinear
from paretune.objectives.runtimes.torch_program import Input, read_program, write_program

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Values of the option ``half``."""

Settings = dict[str, str | int | bool]
Function = Callable[..., Tensor]
"""Takes a program's inputs in their order, gives its output."""

_BLOCK = 32
"""Inputs that share a scale of int4 weights: the fewest that the kernels know, which costs the least accuracy."""

_CAPABILITY_FP8 = (9, 0)
"""Hopper: fp8 products with a scale for each row."""


class TorchRuntime(Runtime):
    """Executes with PyTorch.

    Args:
        half: What a width of 16 means: ``bf16`` or ``fp16``.
        eight: What a width of 8 means: ``int8``, or ``fp8`` (e4m3) on a GPU from Hopper on.
        tf32: Whether products of a width of 32 run in TF32 on a GPU.
        cuda_graph: Whether a GPU replays a call as one CUDA graph, which costs no launches.

    Raises:
        JobError: An option has another value.
    """

    name: str
    devices: str
    suffix = ".safetensors"
    packages = ("torch",)

    def __init__(self, half: str, eight: str, tf32: bool, cuda_graph: bool) -> None:
        choose("half", half, tuple(HALVES))
        choose("eight", eight, ("int8", "fp8"))
        choose("tf32", tf32, (False, True))
        choose("cuda_graph", cuda_graph, (True, False))
        self._half = half
        self._eight = eight
        self._tf32 = tf32
        self._cuda_graph = cuda_graph

    def capabilities(self, device: str) -> Capabilities:
        found = self._device(device)
        floats = {32: "tf32" if self._tf32 else "f32"}
        if self._half == "fp16" or has_bf16(found):
            floats[16] = self._half
        widths, schemes = {"Linear": _integer_bits(found)}, linear_schemes(self._eight)
        return Capabilities(floats, widths, schemes, self._sparse_patterns(found))

    def deploy(self, module: nn.Module, inputs: Inputs, path: Path) -> None:
        write_program(module, inputs, path)

    def load(self, path: Path, options: LoadOptions) -> Session:
        device = self._device(options.device)
        program = read_program(path)
        dtype = HALVES[self._half] if options.float_bits == 16 else torch.float32
        patterns = self.capabilities(options.device).sparse_patterns
        graph = lower(program, dtype, device, channels_last=self._channels_last(device), sparse=bool(patterns))
        place = _Place(device, options.threads, self._tf32, program.inputs)
        examples = place.zeros(options.batch_size)
        formats = self.capabilities(options.device).float_formats
        settings: Settings = {"format": formats.get(options.float_bits, "f32"), "mode": "eager"}
        if patterns:
            settings["sparse_layers"] = sum(isinstance(module, SparseLinear) for module in graph.modules())
        watched = Watched(graph, place.synchronize)
        with place.ready():
            watched.watch(*examples)
            function: Function = graph
            layers = watched.layers
            if options.purpose == "profile":
                return _Profile(watched, place, settings)
            if options.purpose == "measure":
                function, changes = self._prepare(graph, examples, options)
                settings |= changes
                if function is not graph:
                    executed = executed_products(lambda: function(*examples))
                    layers = confirmed(watched.layers, watched.products, executed)
        if device.type == "cpu":
            return _CpuSession(function, place, layers, settings | {"threads": options.threads})
        graphed = self._cuda_graph and options.purpose == "measure"
        return _CudaSession(function, place, layers, settings, examples if graphed else None)

    @abstractmethod
    def _prepare(
        self, graph: fx.GraphModule, examples: Sequence[Tensor], options: LoadOptions
    ) -> tuple[Function, Settings]:
        """What is measured in the graph's place, ready to be called, and its settings."""

    @abstractmethod
    def _channels_last(self, device: torch.device) -> bool:
        """Whether the graph is to be put into that memory format."""

    def _sparse_patterns(self, device: torch.device) -> tuple[str, ...]:
        """Patterns of zeros that `torch_layers.SparseLinear` has kernels for on the device."""
        return ()

    def _device(self, name: str) -> torch.device:
        """The device of that name, if this runtime has it and the options fit it."""
        wanted = name.lower()
        if wanted == "cpu" and "cpu" in self.devices:
            for option, value in (("half", "fp16"), ("eight", "fp8"), ("tf32", True)):
                if getattr(self, f"_{option}") == value:
                    raise JobError(
                        "target.options", f"{option} must fit the device", f"{value!r} on a CPU", f"leave {option} out"
                    )
            return torch.device("cpu")
        if not re.fullmatch(r"cuda(:\d+)?", wanted):
            raise JobError(
                "target.device",
                f"must be {self.devices} for the runtime {self.name!r}",
                repr(name),
                f"use {self.devices}",
            )
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        device = torch.device("cuda", torch.device(wanted).index or 0)
        if device.index >= count:
            raise JobError(
                "target.device",
                "must be a GPU that PyTorch sees",
                f"{name!r} with {count} of them visible",
                f"use {self.devices}, and look at the driver, CUDA_VISIBLE_DEVICES and PyTorch's build",
            )
        if self._eight == "fp8" and torch.cuda.get_device_capability(device) < _CAPABILITY_FP8:
            got = f"'fp8' on {torch.cuda.get_device_name(device)}"
            raise JobError("target.options", "eight must be what the GPU computes in", got, "use int8")
        return device


def _integer_bits(device: torch.device) -> tuple[int, ...]:
    """Widths below 16 for which there are kernels that are faster for their width, on some shapes at least."""
    if device.type == "cuda":
        return (8, 4)
    # The packed int4 weights of a CPU are multiplied in bfloat16.
    return (8,) * torch.cpu._is_vnni_supported() + (4,) * has_bf16(device)


def linear_schemes(eight: str) -> Schemes:
    """How linear layers must be quantized for PyTorch's kernels: 8 bits on both sides, or int4 weights alone."""
    number = Scheme(activations="dynamic", symmetric=True, number="fp8" if eight == "fp8" else "int")
    return {8: number, 4: Scheme(activations="float", symmetric=True, block=_BLOCK, least_block=_BLOCK)}


class _Place:
    """A device with what a session sets on it while it runs: gradients off, its threads, TF32 or not."""

    def __init__(self, device: torch.device, threads: int, allow_tf32: bool, inputs: Sequence[Input]) -> None:
        self.device = device
        self._threads = threads
        self._tf32 = allow_tf32
        self._inputs = inputs

    def ready(self) -> AbstractContextManager[None]:
        """Set it within a block, and restore what was; below a microsecond where it is so already."""
        return self._on_cpu() if self.device.type == "cpu" else self._on_cuda()

    def zeros(self, batch_size: int) -> list[Tensor]:
        """Inputs of the right shapes and types."""
        return [torch.zeros(batch_size, *given.shape, dtype=given.dtype, device=self.device) for given in self._inputs]

    def tensors(self, arrays: Arrays) -> list[Tensor]:
        """Inputs in the program's order, on the device."""
        given = (torch.from_numpy(np.ascontiguousarray(arrays[name.name])) for name in self._inputs)
        return [tensor.to(self.device) for tensor in given]

    def synchronize(self) -> None:
        """Wait until the device has done all."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    @contextmanager
    def _on_cpu(self) -> Iterator[None]:
        # The number of threads is the process's: a training beside this session may have another one.
        before = torch.get_num_threads()
        if before != self._threads:
            torch.set_num_threads(self._threads)
        try:
            with torch.no_grad():
                yield
        finally:
            if before != self._threads:
                torch.set_num_threads(before)

    @contextmanager
    def _on_cuda(self) -> Iterator[None]:
        with torch.cuda.device(self.device), use_tf32(self.device, self._tf32), torch.no_grad():
            yield


class _TorchSession(Session):
    def __init__(self, place: _Place, layers: Mapping[str, int], settings: Settings) -> None:
        self.settings = settings
        self._place = place
        self._layers = layers

    def layers(self) -> dict[str, LayerReport]:
        return {name: LayerReport(bits, 0.0) for name, bits in self._layers.items()}


class _CpuSession(_TorchSession):
    def __init__(self, function: Function, place: _Place, layers: Mapping[str, int], settings: Settings) -> None:
        super().__init__(place, layers, settings)
        self._function = function

    def run(self, inputs: Arrays) -> Array:
        with self._place.ready():
            return np.array(self._function(*self._place.tensors(inputs)).numpy())

    def bind(self, inputs: Arrays) -> Callable[[], object]:
        function, ready = self._function, self._place.ready
        tensors = self._place.tensors(inputs)

        def call() -> None:
            with ready():
                function(*tensors)

        return call


class _CudaSession(_TorchSession):
    """On a GPU. Bound calls enqueue work on the current stream and don't wait for it.

    Args:
        examples: Inputs of the right shapes where calls are to be replayed as CUDA graphs; None where not.
    """

    def __init__(
        self,
        function: Function,
        place: _Place,
        layers: Mapping[str, int],
        settings: Settings,
        examples: list[Tensor] | None,
    ) -> None:
        super().__init__(place, layers, settings)
        self._function = function
        self._own: tuple[list[Tensor], CapturedCall] | None = None
        if examples is not None:
            self._own = examples, self._captured(examples)
            settings["mode"] = f"{settings['mode']}, cuda graph"

    def run(self, inputs: Arrays) -> Array:
        tensors = self._place.tensors(inputs)
        with self._place.ready():
            if self._own is None:
                return np.array(self._function(*tensors).numpy(force=True))
            buffers, captured = self._own
            for buffer, tensor in zip(buffers, tensors, strict=True):
                buffer.copy_(tensor)
            captured.replay()
            return np.array(captured.output.numpy(force=True))

    def bind(self, inputs: Arrays) -> Callable[[], object]:
        function, ready = self._function, self._place.ready
        tensors = self._place.tensors(inputs)
        if self._own is not None:
            # A capture reads from fixed addresses: each bound call has its own inputs, and so a capture of its own.
            return self._captured(tensors).replay

        def call() -> None:
            with ready():
                function(*tensors)

        return call

    def _captured(self, tensors: list[Tensor]) -> CapturedCall:
        with self._place.ready():
            return CapturedCall(lambda: self._function(*tensors), self._place.device)


class _Profile(Session):
    """Times each operation by itself, neither compiled nor as a CUDA graph: their kernels span several layers."""

    def __init__(self, watched: Watched, place: _Place, settings: Settings) -> None:
        self.settings = settings
        self._watched = watched
        self._place = place

    def run(self, inputs: Arrays) -> Array:
        watched = self._watched
        watched.seconds.clear()
        watched.total = 0.0
        with self._place.ready():
            output: Any = watched.run(*self._place.tensors(inputs))
        return np.array(output.numpy(force=True))

    def bind(self, inputs: Arrays) -> Callable[[], object]:
        return lambda: self.run(inputs)

    def layers(self) -> dict[str, LayerReport]:
        watched = self._watched
        total = watched.total or 1.0
        return {
            name: LayerReport(bits, watched.seconds.get(name, 0.0) / total) for name, bits in watched.layers.items()
        }
