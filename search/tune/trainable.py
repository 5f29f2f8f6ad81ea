"""A trainable for Ray Tune that evaluates plans, one after the other in an actor that loaded the problem once."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray import tune

from paretune.objectives.accelerator import gpu_is_broken
from paretune.objectives.measurement import Record
from paretune.objectives.progress import Stopped, Watcher
from paretune.search.executor import Progress
from paretune.search.tune.attempt import Attempt, within
from paretune.search.tune.equipment import Equipment
from paretune.search.tune.events import Cargo, end_to_result, progress_to_result
from paretune.search.tune.failures import TrialBrokeOffError, WorkerBusyError, WorkerUnreadyError


class PlanTrainable(tune.Trainable):
    """Carries out the requests of a `WorkSearcher`; each step gives how far one got, the last one what came of it.

    A request runs in a thread of its own: the training doesn't wait while Tune thinks. Give it to Tune as
    ``tune.with_parameters(PlanTrainable, equipment=...)``, with ``reuse_actors=True``.

    Attributes:
        start_seconds: A worker that takes longer to load the problem hangs.
        end_seconds: A trial that was asked to end has so long for what it is just doing; then its worker is replaced.
        exit_seconds: A worker that is no longer wanted waits so long for its trial, before it ends with it.
    """

    start_seconds = 600.0
    end_seconds = 30.0
    exit_seconds = 2.0

    def setup(self, config: dict[str, Any], equipment: Equipment) -> None:  # type: ignore[override]
        """Load the problem, and begin the first request."""
        self._equipment = equipment
        self._attempt: Attempt | None = None
        self._unready: WorkerUnreadyError | None = None
        try:
            self._evaluator = within(self.start_seconds, lambda: equipment.open(self._waiting))
        except Exception as error:  # raised here, it would be one of Ray's, of many lines
            reason = f"{type(error).__name__}: {error} (on {socket.gethostname()})"
            self._unready = WorkerUnreadyError(reason, traceback.format_exc())
        else:
            self._begin(config)

    def step(self) -> dict[str, Any]:
        """Wait for what the request tells next.

        Raises:
            TrialBrokeOffError: It overran its deadline, or broke the GPU for others.
            WorkerUnreadyError: The problem couldn't be loaded.
        """
        if self._unready:
            raise self._unready
        assert self._attempt is not None
        told = self._attempt.wait()
        if told is None:
            raise TrialBrokeOffError(f"it overran its deadline of {self._deadline:g} s (search.trial_timeout)")
        if isinstance(told, Progress):
            return progress_to_result(told)
        end, artifact = told
        if end.error and gpu_is_broken():
            raise TrialBrokeOffError(end.error, end.details)
        return end_to_result(self._attempt.number, end, artifact)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin the next request in this actor.

        Raises:
            WorkerBusyError: The one before doesn't end. Tune would lose the new one if this returned False.
        """
        if self._attempt and not self._attempt.end(self.end_seconds):
            raise WorkerBusyError(f"trial {self._attempt.number} didn't end within {self.end_seconds:g} s")
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        """End with what runs; whatever it does, its CPUs and GPUs are wanted for others."""
        if self._unready or (self._attempt and not self._attempt.end(self.exit_seconds)):
            os._exit(1)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: a trial that lost its worker begins anew. Without this method Tune fails all trials."""

    def load_checkpoint(self, checkpoint: Any) -> None:
        """Nothing, as there is none."""

    def _waiting(self) -> AbstractContextManager[None]:
        return self._attempt.paused() if self._attempt else nullcontext()

    def _begin(self, config: Mapping[str, Any]) -> None:
        number, self._deadline = config["number"], config["deadline"]
        # Every result carries the configuration back to the driver.
        self.config = {"number": number, "deadline": self._deadline}
        self._attempt = Attempt(number, lambda watcher: self._carry_out(config, watcher), self._deadline)

    def _carry_out(self, config: Mapping[str, Any], watcher: Watcher) -> tuple[Record | Stopped, Cargo | None]:
        """Evaluate in a folder of this node; returns the artifact too, where there is one."""
        # Below Tune's folder of the trial: what a worker leaves that is killed goes away with Ray's session.
        with TemporaryDirectory(dir=self.logdir, prefix="trial-") as made:
            request = replace(config["request"].content, folder=Path(made) / "artifact")
            if cargo := config.get("resume"):
                request = replace(request, resume=Path(made) / "resumed")
                self._equipment.carry_in(cargo.content, request.resume)
            result = request(self._evaluator, watcher)
            if isinstance(result, Stopped) or not request.folder.is_dir():
                return result, None
            parcel = self._equipment.carry_out(request.folder)
            # By reference: Tune would end the search if it lost a result, but the searcher begins the trial again.
            return result, Cargo(ray.put(parcel), f"artifact of {config['number']}")
