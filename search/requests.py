"""What the search asks of a worker: picklable records that are called with the worker's evaluator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from paretune.objectives.evaluate import Evaluator
from paretune.objectives.measurement import Record
from paretune.objectives.progress import Stopped, Watcher
from paretune.objectives.verify import Verified
from paretune.spaces.plan import CompressionPlan


class Request(Protocol):
    """Work for a worker: called there with the evaluator; what it returns, or raises, goes back.

    A long one tells the watcher how far it is, and ends early where that asks for it.
    """

    def __call__(self, evaluator: Evaluator, watcher: Watcher) -> Any: ...


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a plan; the artifact goes to `folder`.

    Attributes:
        plan: What to do.
        folder: Of the artifact.
        seed: Of the trial's randomness.
        epochs: Of the fine-tuning in all; None for the job's own.
        rungs: Shares of the training at which the trial tells how good it is; it may be ended at any time.
        resume: An artifact of the same plan whose training is gone on with; None to begin anew.
    """

    plan: CompressionPlan
    folder: Path
    seed: int
    epochs: float | None = None
    rungs: Sequence[float] = ()
    resume: Path | None = None

    def __call__(self, evaluator: Evaluator, watcher: Watcher) -> Record | Stopped:
        return evaluator.evaluate(
            self.plan,
            self.folder,
            seed=self.seed,
            epochs=self.epochs,
            rungs=self.rungs,
            watcher=watcher,
            resume=self.resume,
        )


@dataclass(frozen=True)
class Verify:
    """Measure artifacts together, in separate rounds, and score them on validation and test."""

    folders: Sequence[Path]
    rounds: int

    def __call__(self, evaluator: Evaluator, watcher: Watcher) -> list[Verified]:
        return evaluator.verify(self.folders, rounds=self.rounds)
