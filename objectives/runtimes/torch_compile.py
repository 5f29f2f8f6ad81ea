"""PyTorch's compiler, Inductor: executes f32, bf16, on GPUs tf32 and fp16, and linear layers in int8, fp8 and int4."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, fx
from torch._inductor.codecache import PyCodeCache

from paretune.errors import TrialError
from paretune.objectives.runtimes.base import LoadOptions, choose
from paretune.objectives.runtimes.torch_runtime import Function, Settings, TorchRuntime


class TorchCompile(TorchRuntime):
    """Compiles with Inductor what is measured, for static shapes; what is scored runs the same operations uncompiled.

    Args:
        half: What a width of 16 means: ``bf16`` or, on a GPU, ``fp16``.
        eight: What a width of 8 means: ``int8``, or ``fp8`` (e4m3) on a GPU from Hopper on.
        tf32: Whether products of a width of 32 run in TF32 on a GPU.
        cuda_graph: Whether a GPU replays a call as one CUDA graph.
        max_autotune: Whether Inductor times several kernels for each product; compiling takes minutes.
    """

    name = "torch-compile"
    devices = "cpu, cuda or cuda:N"
    compiles = True

    def __init__(
        self,
        half: str = "bf16",
        eight: str = "int8",
        tf32: bool = False,
        cuda_graph: bool = True,
        max_autotune: bool = False,
    ) -> None:
        super().__init__(half, eight, tf32, cuda_graph)
        choose("max_autotune", max_autotune, (False, True))
        self._max_autotune = max_autotune

    def _prepare(
        self, graph: fx.GraphModule, examples: Sequence[Tensor], options: LoadOptions
    ) -> tuple[Function, Settings]:
        on_cpu = examples[0].device.type == "cpu"
        # Freezing makes weights constants, which are packed once, as the CPU's libraries want them; tracing reads it
        # from the global settings alone. The threads are there because Inductor's cache on disk goes by settings.
        changes = {"freezing": on_cpu, "cpp.threads": options.threads, "max_autotune": self._max_autotune}
        compiled: Function = torch.compile(graph, fullgraph=True, dynamic=False)
        with torch._inductor.config.patch(changes), _forgetting():
            try:
                compiled(*examples)
            except RuntimeError as error:
                reason = next((line for line in str(error).splitlines() if line.strip()), "")
                raise TrialError(
                    f"Inductor must be able to compile the model, but got {type(error).__name__} ({reason}); see that "
                    "it finds a C++ compiler, or choose another runtime"
                ) from error
        return compiled, {"mode": "inductor", "max_autotune": self._max_autotune, "freezing": on_cpu}

    def _channels_last(self, device: torch.device) -> bool:
        return False  # Inductor chooses memory formats itself


@contextmanager
def _forgetting() -> Iterator[None]:
    """Within the block, don't let Inductor keep the modules that it generates: frozen weights are attributes of them.

    A compiled function has its own reference. Without this each load of a model would cost its size in memory for good.
    """
    modules = PyCodeCache.modules
    count = len(modules)
    try:
        yield
    finally:
        for module in modules[count:]:
            sys.modules.pop(module.__name__, None)
        del modules[count:]
