"""The bench: artifacts are loaded on every target of a problem, and measured there against the baseline."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from paretune.objectives.artifact import Loaded
from paretune.objectives.baseline import Baseline
from paretune.objectives.device import Device, is_cuda
from paretune.objectives.latency import Latency, measure_paired
from paretune.objectives.latency import Protocol as Timing
from paretune.objectives.measurement import Deployment, OnTarget, by_speedup
from paretune.objectives.problem import Problem
from paretune.objectives.runtimes import Session
from paretune.objectives.scoring import artifact_outputs
from paretune.objectives.site import Site, Wanted, check_executed
from paretune.objectives.stopwatch import Stopwatch
from paretune.spaces.graph import execution_order

DRIFT = 0.1
"""A baseline slower or faster than at first by more than this share says that the machine isn't itself."""


class Early(NamedTuple):
    """What is known of an artifact on one target before its training: latency and bytes."""

    latency: Latency
    size: int


class Final(NamedTuple):
    """What an artifact is worth on one target, how that was found out, and what the card says of its loading."""

    on: OnTarget
    deployment: Deployment
    loaded: Loaded


AllWanted = Mapping[str, Mapping[str, Wanted]]
"""Target's name to how each layer must be executed there."""


class Bench(Protocol):
    """Where artifacts are measured, one after the other.

    It keeps nothing of an artifact from one call to the next, so that another bench, on another machine, can go on.
    """

    @property
    def layers(self) -> Mapping[str, list[str]]:
        """Target's name to the layers whose width its runtime reports, as seen on the dense model."""

    def early(
        self, folder: Path, wanted: AllWanted, float_bits: Mapping[str, int], protocol: Timing, watch: Stopwatch
    ) -> dict[str, Early]:
        """Latency and size of an untrained artifact on each target.

        Args:
            folder: Holds the model files.
            wanted: How its layers must be executed.
            float_bits: Target's name to the width of all that isn't quantized.
            protocol: How long latencies are measured.
            watch: Gets the time.

        Raises:
            TrialError: A layer runs in another width than it was asked to.
        """

    def final(
        self,
        folder: Path,
        wanted: AllWanted,
        early: Mapping[str, Early],
        float_bits: Mapping[str, int],
        watch: Stopwatch,
    ) -> dict[str, Final]:
        """What a trained artifact is worth on each target; arguments and errors as of `early`, which comes before."""


class LocalBench:
    """Measures in this process.

    Args:
        problem: Data, task, targets.
        baseline: The dense model's artifact, already measured.
        device: Lock of all devices; its holder computes, and steps aside for the measurements here.
    """

    def __init__(self, problem: Problem, baseline: Baseline, device: Device) -> None:
        self._problem = problem
        self._baseline = baseline
        self._device = device

    @cached_property
    def _baseline_sessions(self) -> dict[str, Session]:
        with self._tuning(*self._problem.sites.values()):
            return {name: self._baseline.session(name) for name in self._problem.sites}

    @cached_property
    def layers(self) -> Mapping[str, list[str]]:
        """See `Bench.layers`."""
        order = execution_order(self._problem.model.build(), self._problem.forward)
        reported = {name: session.layers() for name, session in self._baseline_sessions.items()}
        return {name: [layer for layer in order if layer in known] for name, known in reported.items()}

    def early(
        self, folder: Path, wanted: AllWanted, float_bits: Mapping[str, int], protocol: Timing, watch: Stopwatch
    ) -> dict[str, Early]:
        """See `Bench.early`."""
        loaded = self._load(folder, wanted, float_bits, watch)
        found = {}
        for name, site in self._problem.sites.items():
            with self._device.exclusive(), watch.phase("measure"):
                latency = self._clock(site, loaded[name][0], protocol)
            found[name] = Early(latency, site.size(folder))
        return found

    def final(
        self,
        folder: Path,
        wanted: AllWanted,
        early: Mapping[str, Early],
        float_bits: Mapping[str, int],
        watch: Stopwatch,
    ) -> dict[str, Final]:
        """See `Bench.final`."""
        loaded = self._load(folder, wanted, float_bits, watch)
        found = {}
        for name, site in self._problem.sites.items():
            session, executed = loaded[name]
            accuracy = self._score(site, float_bits[name], folder, watch)
            latency, noisy, usage = self._measure(site, session, watch)
            expected, size = self._expected(name), site.size(folder)
            early_ms = expected / early[name].latency.speedup
            found[name] = Final(
                OnTarget(accuracy, *by_speedup(expected, latency), size, **usage),
                Deployment(early_ms, early[name].size, executed, latency, noisy),
                Loaded.of(session, self._problem.batch(site.target.batch_size)),
            )
        return found

    def _load(
        self, folder: Path, wanted: AllWanted, float_bits: Mapping[str, int], watch: Stopwatch
    ) -> dict[str, tuple[Session, dict[str, int]]]:
        """The artifact on each target, loaded to be measured, with the widths that were read back."""
        found = {}
        with watch.phase("deploy"):
            _ = self._baseline_sessions
            for name, site in self._problem.sites.items():
                with self._tuning(site):
                    session = site.load(folder, float_bits[name])
                found[name] = session, check_executed(session.layers(), wanted[name])
        return found

    def _tuning(self, *sites: Site) -> AbstractContextManager[None]:
        """Alone on the devices while kernels are timed: beside another's training they would be badly chosen."""
        tunes = any(site.runtime.compiles and is_cuda(site.target.device) for site in sites)
        return self._device.exclusive() if tunes else nullcontext()

    def _score(self, site: Site, float_bits: int, folder: Path, watch: Stopwatch) -> float:
        with watch.phase("score"):
            path, options = folder / site.model, site.options(float_bits)
            split = self._problem.splits.validation
            scored = artifact_outputs(site.runtime, path, options, split, between=self._device.step_aside)
            return self._problem.task.metric(*scored)

    def _measure(self, site: Site, session: Session, watch: Stopwatch) -> tuple[Latency, bool, dict[str, Any]]:
        """Latency paired with the baseline, whether the machine was off even the second time, and the usage."""
        expected = self._expected(site.name)

        def is_off(latency: Latency) -> bool:
            return abs(latency.baseline_ms / expected - 1) > DRIFT or bool(latency.throttled)

        with self._device.exclusive(), watch.phase("measure"):
            latency = self._clock(site, session, Timing())
            if is_off(latency):
                latency = self._clock(site, session, Timing())
            usage = site.usage(session.bind(self._problem.batch(site.target.batch_size)))
        return latency, is_off(latency), usage

    def _clock(self, site: Site, session: Session, protocol: Timing) -> Latency:
        batch = self._problem.batch(site.target.batch_size)
        reference = self._baseline_sessions[site.name].bind(batch)
        return measure_paired(session.bind(batch), reference, protocol, site.clock)

    def _expected(self, name: str) -> float:
        return self._baseline.measurement.on[name].latency_ms
