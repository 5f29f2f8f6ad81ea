"""How far a trial is while it runs, and the word to end it early."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Protocol

from paretune.errors import JobError


@dataclass(frozen=True)
class Rung:
    """What a trial's model can do in the middle of its training.

    Attributes:
        share: Of the training's schedule that is done, in (0, 1), as it was asked for. Where a plateau of the loss lets
            the training leave positions out, it may be a few steps further.
        accuracy: The task's metric on some validation samples, in PyTorch, before anything is deployed; finite.
        samples: How many.
    """

    share: float
    accuracy: float
    samples: int


@dataclass(frozen=True)
class Stopped:
    """A trial that was ended in its training: what it cost, and what it had shown.

    Attributes:
        outline: What was known of the plan before the training.
        rungs: Those that it reached.
        seconds: Phase of the trial to its duration.
        steps: Training steps that were run.
    """

    outline: dict[str, float]
    rungs: tuple[Rung, ...]
    seconds: dict[str, float] = field(default_factory=dict)
    steps: int = 0

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)


class Watcher(Protocol):
    """Is told how a trial goes, and may end it; both without making it wait."""

    def got_on(self, so_far: Stopped) -> None:
        """Called before the training and at each rung whose accuracy is finite, with the trial if it were ended now.

        Of a resumed trial, the rungs are those that were still to come.
        """

    def wants_end(self) -> bool:
        """Whether the trial shall end now; asked between training steps, so it must answer in microseconds."""


def check_rungs(shares: Sequence[float]) -> None:
    """See that rungs are shares of a training, in order.

    Raises:
        JobError: They aren't.
    """
    ascending = all(first < second for first, second in pairwise(shares))
    if not (ascending and all(0 < share < 1 for share in shares)):
        rule = "must be shares of a training, between 0 and 1, ascending"
        raise JobError("search.rungs", rule, list(shares), "use e.g. [0.25, 0.5]")
