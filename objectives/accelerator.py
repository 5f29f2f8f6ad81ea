"""The device that trains: which one, in which float formats, and how much of its memory is ours."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from paretune.errors import JobError

_WORKERS_SHARE = 0.9
"""Of a GPU's memory, for the tensors of all workers together. The rest is for what PyTorch's allocator doesn't see: the
CUDA context of each process, and the runtimes that measure there."""

_KEPT_SHARE = 0.5
"""Of the memory that a process may still take, for data kept on the GPU: model, activations and optimizer need room."""

_FORMATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def training_device(name: str) -> torch.device:
    """The device that `finetune.device` names.

    Args:
        name: ``auto`` (the first GPU, or the CPU where there is none), ``cpu``, ``cuda`` (the first GPU) or ``cuda:N``.

    Raises:
        JobError: It is another name, or PyTorch doesn't find such a GPU.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    named = re.fullmatch(r"auto|cuda(?::(\d+))?", name)
    if named is None:
        raise JobError("finetune.device", "must be auto, cpu, cuda or cuda:N", repr(name), "use auto")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = int(named[1] or 0)
    if index >= found:
        raise JobError(
            "finetune.device",
            "must be a device that PyTorch finds",
            f"{name!r} where it finds {found} GPUs",
            "use auto or cpu, or install a PyTorch with CUDA and a driver that fits it",
        )
    return torch.device("cuda", index)


def float_format(precision: str, device: torch.device) -> torch.dtype:
    """The format in which autocast computes; float32 is no autocast.

    Args:
        precision: ``auto`` (bfloat16 where the device computes in it natively, else float32), ``float32``, ``bfloat16``
            or ``float16``.
        device: Trains.

    Raises:
        JobError: float16 on a CPU.
    """
    if precision == "auto":
        return torch.bfloat16 if has_bf16(device) else torch.float32
    if precision == "float16" and device.type == "cpu":
        raise JobError(
            "finetune.precision",
            "must be auto, float32 or bfloat16 where a CPU trains",
            "float16",
            "use auto, or train on a GPU (finetune.device)",
        )
    return _FORMATS[precision]


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 natively; elsewhere it is emulated and slower than float32."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported())


@contextmanager
def use_tf32(device: torch.device, allowed: bool) -> Iterator[None]:
    """Within the block, let a GPU compute float32 products and convolutions in TF32, or not; nothing on a CPU."""
    if device.type != "cuda":
        yield
        return
    switches = _tf32_switches(allowed)
    try:
        for switch, during, _ in switches:
            switch(during)
        yield
    finally:
        for switch, _, before in switches:
            switch(before)


def _tf32_switches(allowed: bool) -> list[tuple[Callable[[Any], None], Any, Any]]:
    """PyTorch's switches, each with its value for the choice and its present one."""
    cudnn: Any = torch.backends.cudnn
    try:
        # The older switches, though PyTorch 2.9 brought newer ones: setting them sets both, while after the newer alone
        # whoever reads the older gets an error, which parts of PyTorch itself did up to 2.13 (e.g. TunableOp).
        products = (torch.set_float32_matmul_precision, "high" if allowed else "highest")
        convolutions = (partial(setattr, cudnn, "allow_tf32"), allowed)
        return [(*products, torch.get_float32_matmul_precision()), (*convolutions, cudnn.allow_tf32)]
    except RuntimeError:
        # The user's code has set the newer ones, and the older can't be read any more.
        owners = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
        value = "tf32" if allowed else "ieee"
        return [(partial(setattr, owner, "fp32_precision"), value, owner.fp32_precision) for owner in owners]


def share_gpu(device: torch.device, workers: int) -> None:
    """Limit this process to its share of a GPU's memory, so that no worker starves the others; nothing on a CPU.

    A worker that wants more gets `torch.cuda.OutOfMemoryError`, and `fit` goes on with smaller parts of a batch. Call
    it before anything is put on the GPU.

    Args:
        device: Trains.
        workers: Processes that train there at a time, at least 1.
    """
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(_WORKERS_SHARE / workers, device)


def memory_budget(device: torch.device) -> float:
    """Bytes that data kept on the device for later may take; no limit (infinity) on a CPU."""
    if device.type != "cuda":
        return math.inf
    free, total = torch.cuda.mem_get_info(device)
    share = total * torch.cuda.get_per_process_memory_fraction(device)
    return keepable(free, share, torch.cuda.memory_reserved(device))


def keepable(free: float, share: float, reserved: float) -> float:
    """Half of the bytes that a process may still take.

    Args:
        free: Bytes that nobody uses.
        share: Bytes that the process may use in all.
        reserved: Bytes of them that it has taken already.
    """
    return _KEPT_SHARE * max(0.0, min(free, share - reserved))


def release_memory() -> None:
    """Give back what PyTorch's allocator keeps of GPUs but doesn't use: other processes wait for it."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # PyTorch doesn't annotate it
        torch.cuda.empty_cache()


def gpu_is_broken() -> bool:
    """Whether a failure left CUDA unusable in this process, as an illegal access or a broken capture does."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # PyTorch doesn't annotate it
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return bool(torch.cuda.current_stream() != torch.cuda.default_stream())
