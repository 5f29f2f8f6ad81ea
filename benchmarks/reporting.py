"""How the benchmarks report: Markdown tables on stdout, progress on stderr, everything as JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from paretune.objectives.environment import environment
from paretune.objectives.runtimes.probe import cpu_features

_START = time.perf_counter()


def progress(text: str) -> None:
    """A line on stderr, with the seconds since the start."""
    print(f"[{time.perf_counter() - _START:7.1f} s] {text}", file=sys.stderr, flush=True)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a Markdown table."""
    print()
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |")
    print(flush=True)


def machine() -> dict[str, Any]:
    """Versions, processor and how busy it is, printed and returned."""
    found = environment() | {"features": cpu_features(), "load": os.getloadavg()[0], "command": " ".join(sys.argv)}
    print("`" + f"python {found['command']}" + "`\n")
    print(f"{found['processor']}, {found['cores']} cores, {', '.join(found['features'])}; load {found['load']:.1f}")
    packages = ("torch", "openvino", "onnxruntime", "onnx", "numpy")
    print(", ".join(f"{name} {found[name]}" for name in ("paretune", "python", *packages)), flush=True)
    return found


def save(path: Path | None, data: Any) -> None:
    """Write what there is so far as JSON, if a file was asked for: a run of an hour may be stopped."""
    if path is not None:
        path.write_text(json.dumps(data, indent=1) + "\n")
