"""paretune: search pruning, quantization and distillation together on measured latency.

The public API; everything heavy is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paretune.objectives.data import Splits
    from paretune.objectives.tasks import Task
    from paretune.search.check import check
    from paretune.search.job import Job, load_job, make_job
    from paretune.search.run import resume, run
    from paretune.spaces.plan import CompressionPlan

__version__ = "0.1.0"

__all__ = [
    "CompressionPlan",
    "Job",
    "Splits",
    "Task",
    "__version__",
    "check",
    "load_job",
    "make_job",
    "resume",
    "run",
]

_HOMES = {
    "CompressionPlan": "paretune.spaces.plan",
    "Job": "paretune.search.job",
    "Splits": "paretune.objectives.data",
    "Task": "paretune.objectives.tasks",
    "check": "paretune.search.check",
    "load_job": "paretune.search.job",
    "make_job": "paretune.search.job",
    "resume": "paretune.search.run",
    "run": "paretune.search.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
