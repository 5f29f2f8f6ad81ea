"""PyTorch's own kernels on a GPU, uncompiled: executes f32, bf16 and fp16, and linear layers in int8, fp8 and int4."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from paretune.objectives.runtimes.base import LoadOptions
from paretune.objectives.runtimes.torch_runtime import Function, Settings, TorchRuntime

_CAPABILITY_SPARSE = (8, 0)
"""Ampere: tensor cores that leave out two zeros of four."""


class TorchCuda(TorchRuntime):
    """Operation by operation, replayed as one CUDA graph: loads in a moment, and is the fastest where Inductor isn't.

    Args:
        half: What a width of 16 means: ``bf16`` or ``fp16``.
        eight: What a width of 8 means: ``int8``, or ``fp8`` (e4m3) from Hopper on.
        tf32: Whether products of a width of 32 run in TF32.
        cuda_graph: Whether a call is replayed as one CUDA graph.
    """

    name = "torch-cuda"
    devices = "cuda or cuda:N"

    def __init__(self, half: str = "bf16", eight: str = "int8", tf32: bool = False, cuda_graph: bool = True) -> None:
        super().__init__(half, eight, tf32, cuda_graph)

    def _prepare(
        self, graph: fx.GraphModule, examples: Sequence[Tensor], options: LoadOptions
    ) -> tuple[Function, Settings]:
        return graph, {}

    def _sparse_patterns(self, device: torch.device) -> tuple[str, ...]:
        has_kernels = torch.backends.cusparselt.is_available()
        return ("2:4",) if has_kernels and torch.cuda.get_device_capability(device) >= _CAPABILITY_SPARSE else ()

    def _channels_last(self, device: torch.device) -> bool:
        return True  # tensor cores convolve in no other format; cuDNN would convert before and after each layer
