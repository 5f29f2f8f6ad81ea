"""What a measurement was made on and with."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from paretune.objectives.device import gpu_uuid
from paretune.objectives.nvml import find_gpu

PACKAGES = (
    "paretune",
    "torch",
    "torch-pruning",
    "onnx",
    "openvino",
    "onnxruntime",
    "tensorrt",
    "optuna",
    "ray",
    "numpy",
    "scikit-learn",
)


def environment() -> dict[str, Any]:
    """Versions, processor, cores that this process may use, load, governor and turbo where readable; GPUs in use."""
    governor = _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    boost = _read("/sys/devices/system/cpu/cpufreq/boost")
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "governor": governor or "not readable",
        "boost": {"1": "on", "0": "off"}.get(boost, "not readable"),
        "load": round(os.getloadavg()[0], 2),
        **_gpus(),
        **{package: version(package) for package in PACKAGES},
    }


def _gpus() -> dict[str, Any]:
    """Every GPU that PyTorch sees, with what NVML says of it now; nothing where this process uses none."""
    import torch

    if not (torch.cuda.is_available() and torch.cuda.is_initialized()):  # type: ignore[no-untyped-call]
        return {}  # a job for the CPU needs no context on a GPU
    found: dict[str, Any] = {"cuda": torch.version.cuda}
    for index in range(torch.cuda.device_count()):
        gpu = find_gpu(gpu_uuid(f"cuda:{index}"))
        state = asdict(gpu.state()) if gpu else {"name": torch.cuda.get_device_name(index), "state": "not readable"}
        found[f"gpu {index}"] = state
    return found


def version(package: str) -> str:
    """Of an installed distribution, else ``"not installed"``."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_gib() -> float | str:
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemTotal"):
            return round(int(line.split()[1]) / 2**20, 1)
    return "not readable"


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""
