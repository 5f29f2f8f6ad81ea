"""Runtimes by name. A new one is a `Runtime` and an entry here; `tests/objectives/runtimes` has its contract suite."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from paretune.errors import JobError
from paretune.objectives.runtimes.base import Capabilities, LayerReport, LoadOptions, Runtime, Session, Target

__all__ = [
    "RUNTIMES",
    "Capabilities",
    "LayerReport",
    "LoadOptions",
    "Runtime",
    "Session",
    "Target",
    "get_runtime",
    "option_names",
]

RUNTIMES = {
    "onnxruntime": ("paretune.objectives.runtimes.onnxruntime", "OnnxRuntime"),
    "openvino": ("paretune.objectives.runtimes.openvino", "OpenVINO"),
    "tensorrt": ("paretune.objectives.runtimes.tensorrt", "TensorRT"),
    "torch-compile": ("paretune.objectives.runtimes.torch_compile", "TorchCompile"),
    "torch-cuda": ("paretune.objectives.runtimes.torch_cuda", "TorchCuda"),
}
"""Name to module and class; imported when first asked for."""


def get_runtime(name: str, options: Mapping[str, str | int | bool] | None = None) -> Runtime:
    """The runtime of that name, ready to use.

    Args:
        name: One of `RUNTIMES`.
        options: The runtime's own choices (`Target.options`).

    Raises:
        JobError: There is none of that name, what it needs isn't installed, or it doesn't know an option.
    """
    known = option_names(name)
    for option in options or {}:
        if option not in known:
            hint = f"use some of {', '.join(known)}" if known else "leave them out"
            raise JobError("target.options", f"must be options of {name!r}", repr(option), hint)
    runtime: Runtime = _kind(name)(**(options or {}))
    return runtime


def option_names(name: str) -> tuple[str, ...]:
    """The options that a runtime of that name knows.

    Raises:
        JobError: There is none of that name, or what it needs isn't installed.
    """
    return tuple(inspect.signature(_kind(name)).parameters)


def _kind(name: str) -> Any:
    if name not in RUNTIMES:
        close = get_close_matches(name, RUNTIMES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(sorted(RUNTIMES))}"
        raise JobError("target.runtime", "must be a known runtime", repr(name), hint)
    module, attribute = RUNTIMES[name]
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        rule = f"{name!r} needs the package {error.name!r}"
        raise JobError("target.runtime", rule, "no such package", "install it, or choose another runtime") from error
