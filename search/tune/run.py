"""A run of Ray Tune over some work, with the settings that make it cheap, quiet and safe."""

from __future__ import annotations

import gc
import logging
import os
import signal
import threading
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from tempfile import TemporaryDirectory
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from paretune.errors import SearchError
from paretune.search.executor import Report, Work
from paretune.search.tune.equipment import Equipment
from paretune.search.tune.failures import survive_deaths
from paretune.search.tune.scheduler import WorkScheduler
from paretune.search.tune.searcher import WorkSearcher
from paretune.search.tune.trainable import PlanTrainable

_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # three files for each trial, of what the study holds
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # it isn't taken away afterwards, and swallows Ctrl-C
    "TUNE_GLOBAL_CHECKPOINT_S": "1e9",  # a snapshot writes down all trials so far, each time
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",  # they come as failed trials
    "TUNE_FORCE_TRIAL_CLEANUP_S": "60",  # a worker that doesn't end keeps its CPUs and GPUs from others
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints even where it shall not
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # a job's relative paths are the driver's
}

_NOISY = (
    "ray.tune.analysis.experiment_analysis",  # misses the files of the loggers
    "ray.tune.execution.tune_controller",
    "ray.tune.tune",  # names each failed trial
    "ray.tune.utils.util",  # finds proposals slow
)


def fit(
    work: Work,
    equipment: Equipment,
    *,
    workers: int,
    resources: Mapping[str, float],
    retries: int = 1,
    storage_path: str | None = None,
    report: Report = lambda line: None,
) -> None:
    """Run all of some work on the cluster that Ray is connected to.

    Args:
        work: What there is to run.
        equipment: What workers need for it.
        workers: How many run at a time, at least 1.
        resources: What each takes, in Ray's names: ``{"CPU": 1, "GPU": 0.5, "memory": 2e9, "edge": 1}``.
        retries: How often a request is begun again that lost its worker.
        storage_path: Folder on this machine for what Tune itself writes; None lets nothing of it stay.
        report: Takes a line where nothing can be run.

    Raises:
        SearchError: Workers can't start.
        Exception: What the work raised; and KeyboardInterrupt or SystemExit, as signals raise them.
    """
    searcher = WorkSearcher(work, equipment, retries=retries)
    scheduler = WorkScheduler(searcher, report)
    bundle = {name: amount for name, amount in resources.items() if amount}
    trainable = tune.with_resources(
        tune.with_parameters(PlanTrainable, equipment=equipment), tune.PlacementGroupFactory([bundle])
    )
    tune_config = tune.TuneConfig(
        search_alg=searcher,
        scheduler=scheduler,
        num_samples=-1,
        max_concurrent_trials=workers,
        reuse_actors=True,
        trial_name_creator=_name,
        trial_dirname_creator=_folder_name,
    )
    try:
        with _settings(), survive_deaths(), TemporaryDirectory(prefix="paretune-tune-") as made:
            run_config = _run_config(storage_path or made)
            tune.Tuner(trainable, tune_config=tune_config, run_config=run_config).fit()
    except BaseException as error:
        scheduler.kill()  # Tune leaves its workers alone where something else than an Exception comes
        if searcher.error is not None:
            raise searcher.error from None
        if not isinstance(error, Exception):
            traceback.clear_frames(
                error.__traceback__
            )  # so go workers that just start, and what was set aside for them
            gc.collect()
        raise
    if searcher.error is not None:  # in the very last of its steps
        raise searcher.error
    if searcher.unfinished:
        raise SearchError(f"Ray Tune must finish its trials, but ended with {searcher.unfinished} under way")


def _run_config(storage_path: str) -> tune.RunConfig:
    return tune.RunConfig(
        name="paretune",
        storage_path=storage_path,
        callbacks=[_Forgetting()],
        failure_config=tune.FailureConfig(max_failures=0),  # the searcher begins trials again
        checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
        verbose=0,
    )


class _Forgetting(tune.Callback):
    """Drops what Tune remembers of trials that ended: 30 kB for each, and nobody asks."""

    def __init__(self) -> None:
        self._handler = _usr1_handler()

    def setup(self, *_: Any, **_info: Any) -> None:
        if self._handler is not None:  # Tune has just put its own in its place, and never takes it away
            signal.signal(signal.SIGUSR1, self._handler)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks, and the handler may be whatever another Tuner has left there

    def on_trial_complete(self, iteration: int, trials: Sequence[Trial], trial: Trial, **_info: Any) -> None:
        self._forget(trial)

    def on_trial_error(self, iteration: int, trials: Sequence[Trial], trial: Trial, **_info: Any) -> None:
        self._forget(trial)

    @staticmethod
    def _forget(trial: Trial) -> None:
        kept = trial.run_metadata
        kept.last_result = {"trial_id": trial.trial_id, "done": True}  # an empty one is asked of the worker
        kept.metric_analysis, kept.metric_n_steps = {}, {}


def _usr1_handler() -> Any:
    in_main = threading.current_thread() is threading.main_thread()
    return signal.getsignal(signal.SIGUSR1) if in_main else None


def _name(trial: Trial) -> str:
    return f"trial {trial.config['number']}"


def _folder_name(trial: Trial) -> str:
    return f"{trial.config['number']}-{trial.trial_id}"


@contextmanager
def _settings() -> Iterator[None]:
    """Tune takes these from the environment, and logs at its own discretion; both are put back."""
    before = {name: os.environ.get(name) for name in _SETTINGS}
    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    with ExitStack() as stack:
        os.environ.update(_SETTINGS)
        for name, value in before.items():
            stack.callback(_set, name, value)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(logging.CRITICAL)
            stack.callback(logger.setLevel, level)
        yield


def _set(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
