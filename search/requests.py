"""What the search asks of a worker: picklable records that are called with the worker's evaluator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from paretune.objectives.evaluate import Evaluator
from paretune.objectives.measurement import Record
from paretune.objectives.verify import Verified
from paretune.spaces.plan import CompressionPlan


class Request(Protocol):
    """Work for a worker: called there with the evaluator; what it returns, or raises, goes back."""

    def __call__(self, evaluator: Evaluator) -> Any: ...


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a plan; the artifact goes to `folder`."""

    plan: CompressionPlan
    folder: Path
    seed: int
    epochs: float | None = None

    def __call__(self, evaluator: Evaluator) -> Record:
        return evaluator.evaluate(self.plan, self.folder, seed=self.seed, epochs=self.epochs)


@dataclass(frozen=True)
class Verify:
    """Measure artifacts together, in separate rounds, and score them on validation and test."""

    folders: Sequence[Path]
    rounds: int

    def __call__(self, evaluator: Evaluator) -> list[Verified]:
        return evaluator.verify(self.folders, rounds=self.rounds)
