"""A scheduler for Ray Tune that ends trials early, by the work's own rule on all of its objectives."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from paretune.search.executor import Report
from paretune.search.tune.events import progress_of
from paretune.search.tune.failures import failure_of
from paretune.search.tune.searcher import WorkSearcher


class WorkScheduler(FIFOScheduler):
    """Stops the trials of a `WorkSearcher` that its work doesn't want any more; trials start in their order.

    Args:
        searcher: Whose trials they are. Each searcher wants a scheduler: it learns from it why trials broke off.
        report: Takes a line where none of them can start.

    Attributes:
        patience: Seconds after which that is said; workers, too, take some to start.
    """

    patience = 60.0

    def __init__(self, searcher: WorkSearcher, report: Report = lambda line: None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._source = searcher
        self._report = report
        self._idle_since: float | None = None
        self._trials: Iterable[Trial] = ()

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: Mapping[str, Any]) -> str:
        """Whether a trial goes on."""
        progress = progress_of(result)
        if progress is not None and self._source.got_on(trial.trial_id, progress):
            return str(TrialScheduler.STOP)
        return str(TrialScheduler.CONTINUE)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Find out why it broke off; the searcher is told next that it did."""
        self._source.broke_off(trial.trial_id, failure_of(trial))

    def choose_trial_to_run(self, tune_controller: Any) -> None:
        """None: Tune then starts those that wait, in their order, without a look at all the others each time.

        Raises:
            Exception: What the work or the searcher raised; this is where Tune lets one pass that isn't a trial's.
        """
        self._trials = tune_controller.get_live_trials()
        self._look_for_room()
        if self._source.error is not None:
            self.kill()
            raise self._source.error

    def _look_for_room(self) -> None:
        """Say, once for each time that it happens, where trials wait and none runs."""
        if not self._trials or any(trial.status == Trial.RUNNING for trial in self._trials):
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = time.monotonic()
        elif time.monotonic() - self._idle_since > self.patience:
            self._idle_since = math.inf
            self._report(
                f"no trial has started for {self.patience:.0f} s: no node has room, or workers take long to load; the "
                "search waits (`ray status` shows what the cluster is asked for)"
            )

    def kill(self) -> None:
        """End at once what runs: asked politely, a worker would finish what it does."""
        for trial in self._trials:
            if actor := trial.temporary_state.ray_actor:
                ray.kill(actor)
        self._trials = ()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # as of the searcher
