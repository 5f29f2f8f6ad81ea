"""Stand-ins for plans, the evaluator and the search: what a plan does on its worker is a function of the test's own."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from paretune.objectives.latency import Latency
from paretune.objectives.measurement import Deployment, Measurement, OnTarget, Record
from paretune.objectives.progress import Rung, Stopped, Watcher
from paretune.search.cluster.parcels import Parcel, pack
from paretune.search.executor import Assignment, Outcome, Progress, Work
from paretune.search.requests import Evaluate
from paretune.search.tune.equipment import Waiting

OUTLINE = {"latency_ms": 2.0, "params": 10.0}
RUNG = Rung(0.5, 0.75, 100)
Plan = Callable[[Path, Watcher, "Path | None"], Any]


def record(accuracy: float = 0.9) -> Record:
    """Of a finished trial."""
    clock = Latency(2.0, 1.9, 2.1, 1.8, 4.0, 2.0, 1.9, 2.1, 100, 2.2)
    on = OnTarget(accuracy, 2.0, 1.9, 2.1, 2.0, 1000)
    deployment = Deployment(2.0, 1000, {"0": 8}, clock)
    return Record(Measurement({"": on}, 10, 100), {"": deployment}, {"train": 1.0}, {"steps": 3}, (RUNG,))


def tell(watcher: Watcher, *rungs: Rung) -> Stopped:
    """Let a trial be so far."""
    so_far = Stopped(OUTLINE, rungs, {"train": 0.5}, 7)
    watcher.got_on(so_far)
    return so_far


def complete(folder: Path, watcher: Watcher, resume: Path | None) -> Record:
    """A trial that is over at once; its artifact names the process that made it."""
    folder.mkdir()
    (folder / "pid").write_text(str(os.getpid()))
    return record()


def train(folder: Path, watcher: Watcher, resume: Path | None) -> Record | Stopped:
    """A trial that shows a rung, and goes on until it isn't wanted any more."""
    tell(watcher)
    so_far = tell(watcher, RUNG)
    while not watcher.wants_end():
        time.sleep(0.01)
    return so_far


class Evaluator:
    """Lets plans do what they do."""

    def evaluate(
        self,
        plan: Plan,
        folder: Path,
        *,
        seed: int,
        epochs: float | None = None,
        rungs: Sequence[float] = (),
        watcher: Watcher,
        resume: Path | None = None,
    ) -> Any:
        return plan(folder, watcher, resume)


@dataclass(frozen=True)
class Kit:
    """The equipment.

    Attributes:
        storage: Through which parcels go.
        load: Called by each worker.
    """

    storage: str | None = None
    load: Callable[[], Any] = Evaluator

    def open(self, waiting: Waiting) -> Any:
        return self.load()

    def carry_out(self, folder: Path) -> Parcel:
        return pack(folder, self.storage)

    def carry_in(self, parcel: Parcel, folder: Path) -> None:
        parcel.unpack(folder)
        parcel.discard()


@dataclass
class Script(Work):
    """Plans to carry out in their order, and what became of them.

    Attributes:
        folder: Of the artifacts.
        plans: Their numbers are their positions.
        unwanted: Numbers of those that are ended at their first rung.
        deadline: In seconds, of each.
        resume: An artifact that all go on with.
    """

    folder: Path
    plans: Sequence[Plan]
    unwanted: Sequence[int] = ()
    deadline: float = 60.0
    resume: Path | None = None
    heard: list[Progress] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.left = deque(enumerate(self.plans))

    def next(self) -> Assignment | None:
        if not self.left:
            return None
        number, plan = self.left.popleft()
        request: Any = Evaluate(plan, self.artifact(number), 0, resume=self.resume)  # type: ignore[arg-type]
        return Assignment(number, request, self.deadline)

    @property
    def is_over(self) -> bool:
        return not self.left

    def progress(self, progress: Progress) -> bool:
        self.heard.append(progress)
        return bool(progress.rungs) and progress.number in self.unwanted

    def ended(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)

    def artifact(self, number: int) -> Path:
        return self.folder / str(number) / "artifact"

    def of(self, number: int) -> Outcome:
        """What came of one: it must have been told once."""
        (found,) = (outcome for outcome in self.outcomes if outcome.number == number)
        return found
