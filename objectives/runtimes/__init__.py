"""Runtimes by name. A new one is a `Runtime` and an entry here; `tests/objectives/runtimes` has its contract suite."""

from __future__ import annotations

import importlib
from difflib import get_close_matches

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
]

RUNTIMES = {
    "openvino": ("paretune.objectives.runtimes.openvino", "OpenVINO"),
}
"""Name to module and class; imported when first asked for."""


def get_runtime(name: str) -> Runtime:
    """The runtime of that name, ready to use.

    Raises:
        JobError: There is none of that name.
    """
    if name not in RUNTIMES:
        close = get_close_matches(name, RUNTIMES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(sorted(RUNTIMES))}"
        raise JobError("target.runtime", "must be a known runtime", repr(name), hint)
    module, attribute = RUNTIMES[name]
    runtime: Runtime = getattr(importlib.import_module(module), attribute)()
    return runtime
