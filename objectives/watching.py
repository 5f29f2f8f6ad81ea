"""What happens between the steps of a trial's training: rungs are scored, measurements go first, the unwanted ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from paretune.objectives.data.splits import Batch
from paretune.objectives.progress import Rung, Stopped, Watcher
from paretune.objectives.stopwatch import Stopwatch
from paretune.objectives.training import Moment

SAMPLES = 1024
"""Validation samples that a rung is scored on, at most: its standard error is then 1.6 % at worst."""


class Ended(Exception):  # noqa: N818  # nothing went wrong
    """Takes a trial that its watcher doesn't want any more out of its training; is caught by the evaluator."""


class Watching:
    """Stands between a trial and its watcher.

    Args:
        watcher: None ends nothing; the rungs are kept all the same.
        shares: Where the rungs are: checked already.
        batches: Gives the samples that they are scored on.
        metric: The task's, of outputs and targets.
        watch: Gets the time of the rungs.
        step_aside: Lets a waiting measurement go first.
    """

    def __init__(
        self,
        watcher: Watcher | None,
        shares: Sequence[float],
        batches: Callable[[], Sequence[Batch]],
        metric: Callable[[Tensor, Tensor], float],
        watch: Stopwatch,
        step_aside: Callable[[], None],
    ) -> None:
        self._watcher = watcher
        self._left = list(shares)
        self._batches = batches
        self._metric = metric
        self._watch = watch
        self._step_aside = step_aside
        self._outline: dict[str, float] = {}
        self._rungs: list[Rung] = []
        self._steps = 0

    @property
    def left(self) -> tuple[float, ...]:
        """Shares of the rungs to come."""
        return tuple(self._left)

    @property
    def rungs(self) -> tuple[Rung, ...]:
        """Those that were reached."""
        return tuple(self._rungs)

    def skip(self, share: float) -> None:
        """Leave out the rungs up to this share of the schedule: an earlier training has them behind it."""
        self._left = [rung for rung in self._left if rung > share]

    def outlined(self, outline: Mapping[str, float]) -> None:
        """Pass on what is known before the training.

        Raises:
            Ended: The watcher doesn't want it.
        """
        self._outline = dict(outline)
        self._tell()
        self._end_if_wanted()

    def __call__(self, moment: Moment) -> None:
        """See `paretune.objectives.training.Training.after_step`.

        Raises:
            Ended: The watcher doesn't want the rest.
        """
        self._steps = moment.steps
        reached = [share for share in self._left if moment.done / moment.total >= share]
        if reached:
            self.skip(reached[-1])
            with self._watch.phase("rung"):
                self._score(moment, reached)
        self._step_aside()
        if moment.done < moment.total:  # a training that is over is worth its measurement
            self._end_if_wanted()

    def stopped(self) -> Stopped:
        """The trial, if it is ended now."""
        return Stopped(self._outline, self.rungs, dict(self._watch.seconds), self._steps)

    def _score(self, moment: Moment, shares: Sequence[float]) -> None:
        outputs, targets = moment.outputs(self._batches(), self._step_aside)
        accuracy = self._metric(outputs, targets)
        if not math.isfinite(accuracy):  # it may recover; if not, the trial fails by its loss or its last measurement
            return
        for share in shares:
            self._rungs.append(Rung(share, accuracy, len(targets)))
            self._tell()

    def _tell(self) -> None:
        if self._watcher is not None:
            self._watcher.got_on(self.stopped())

    def _end_if_wanted(self) -> None:
        if self._watcher is not None and self._watcher.wants_end():
            raise Ended
