"""The bench: modules are deployed to every target of a problem, and measured there against the baseline."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from paretune.objectives.baseline import Baseline
from paretune.objectives.device import Device, is_cuda
from paretune.objectives.latency import Latency, Protocol, measure_paired
from paretune.objectives.measurement import Deployment, OnTarget
from paretune.objectives.problem import Problem
from paretune.objectives.runtimes import Session
from paretune.objectives.scoring import artifact_outputs
from paretune.objectives.site import Site, check_executed
from paretune.objectives.stopwatch import Stopwatch
from paretune.spaces.graph import execution_order
from paretune.spaces.plan import CompressionPlan

DRIFT = 0.1
"""A baseline slower or faster than at first by more than this share says that the machine isn't itself."""


class Built(NamedTuple):
    """An artifact on one target: loaded to be measured, with the widths that were read back."""

    session: Session
    executed: dict[str, int]


class Early(NamedTuple):
    """What is known of an artifact on one target before its training: latency and bytes."""

    latency: Latency
    size: int


class Bench:
    """Deploys and measures artifacts, one after the other.

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
        return {name: self._baseline.session(name) for name in self._problem.sites}

    @cached_property
    def _layers(self) -> dict[str, list[str]]:
        """Target's name to the layers whose width its runtime reports, as seen on the dense model."""
        order = execution_order(self._problem.model.build(), self._problem.forward)
        reported = {name: session.layers() for name, session in self._baseline_sessions.items()}
        return {name: [layer for layer in order if layer in known] for name, known in reported.items()}

    def load_baselines(self) -> None:
        """Load the baseline for every target, once."""
        if "_layers" not in vars(self):
            with self._tuning(*self._problem.sites.values()):
                _ = self._layers

    def deploy(
        self, module: nn.Module, plan: CompressionPlan, float_bits: Mapping[str, int], folder: Path, watch: Stopwatch
    ) -> dict[str, Built]:
        """Write and load the model files, and see that each layer runs as the plan asks; by the targets' names.

        Args:
            module: What is deployed.
            plan: How it was made.
            float_bits: Target's name to the width of all that isn't quantized.
            folder: Gets the model files.
            watch: Gets the time.
        """
        found: dict[str, Built] = {}
        with watch.phase("deploy"):
            for site in {site.model: site for site in self._problem.sites.values()}.values():
                site.runtime.deploy(module, self._problem.example, folder / site.model)
                if plan.is_packable or (self._baseline.folder / site.packed).is_file():
                    site.pack(folder)
            for name, site in self._problem.sites.items():
                with self._tuning(site):
                    session = site.load(folder, float_bits[name])
                reports = session.layers()
                # Which layers of a variant a runtime reports isn't known beforehand.
                known = reports if plan.variant else self._layers[name]
                found[name] = Built(session, check_executed(reports, module, float_bits[name], known))
        return found

    def measure_early(
        self, built: Mapping[str, Built], folder: Path, protocol: Protocol, watch: Stopwatch
    ) -> dict[str, Early]:
        """Latency and size of what was deployed, on each target."""
        found = {}
        for name, site in self._problem.sites.items():
            with self._device.exclusive(), watch.phase("measure"):
                latency = self._clock(site, built[name].session, protocol)
            found[name] = Early(latency, site.size(folder))
        return found

    def outline(self, early: Mapping[str, Early]) -> dict[str, float]:
        """Latencies with their upper ends, and sizes, named as in a measurement."""
        found: dict[str, float] = {}
        for name, (latency, size) in early.items():
            suffix, (middle, _, high, _) = f"@{name}" if name else "", self._by_speedup(name, latency)
            found |= {f"latency_ms{suffix}": middle, f"latency_high_ms{suffix}": high, f"size_bytes{suffix}": size}
        return found

    def measure(
        self,
        built: Mapping[str, Built],
        early: Mapping[str, Early],
        float_bits: Mapping[str, int],
        folder: Path,
        watch: Stopwatch,
    ) -> dict[str, tuple[OnTarget, Deployment]]:
        """What the artifact is worth on each target, and how that was found out."""
        found = {}
        for name, site in self._problem.sites.items():
            accuracy = self._score(site, float_bits[name], folder, watch)
            latency, noisy, usage = self._measure(site, built[name].session, watch)
            size = site.size(folder)
            early_ms = self._expected(name) / early[name].latency.speedup
            found[name] = (
                OnTarget(accuracy, *self._by_speedup(name, latency), size, **usage),
                Deployment(early_ms, early[name].size, built[name].executed, latency, noisy),
            )
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
            latency = self._clock(site, session, Protocol())
            if is_off(latency):
                latency = self._clock(site, session, Protocol())
            usage = site.usage(session.bind(self._problem.batch(site.target.batch_size)))
        return latency, is_off(latency), usage

    def _clock(self, site: Site, session: Session, protocol: Protocol) -> Latency:
        batch = self._problem.batch(site.target.batch_size)
        reference = self._baseline_sessions[site.name].bind(batch)
        return measure_paired(session.bind(batch), reference, protocol, site.clock)

    def _expected(self, name: str) -> float:
        return self._baseline.measurement.on[name].latency_ms

    def _by_speedup(self, name: str, latency: Latency) -> tuple[float, float, float, float]:
        """Latency, its interval and the speed-up: the machine drifts between trials, and the baseline with it."""
        expected = self._expected(name)
        return (
            expected / latency.speedup,
            expected / latency.speedup_high,
            expected / latency.speedup_low,
            latency.speedup,
        )
