"""A bench that is elsewhere: artifacts are sent to a gauge, which measures them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from paretune.objectives.bench import AllWanted, Early, Final
from paretune.objectives.latency import Protocol
from paretune.objectives.problem import Problem
from paretune.objectives.stopwatch import Stopwatch
from paretune.search.cluster.gauge import Station
from paretune.search.cluster.gauges import Gauges
from paretune.search.executor import Report


class RemoteBench:
    """In place of a `paretune.objectives.bench.Bench` where a trial is measured on another machine, or by another
    process of this one: it lets go of this machine's devices meanwhile, on which the gauge may have to be alone.

    What is raised is what `Bench` raises, and what `paretune.search.cluster.gauges.Gauges.measure` does.

    Args:
        problem: What the trial is about; knows the targets' capabilities.
        gauges: Of the run.
        waiting: Gives a block in which a gauge is waited for.
    """

    def __init__(
        self, problem: Problem, gauges: Gauges, waiting: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        self._problem = problem
        self._gauges = gauges
        self._waiting = waiting

    @cached_property
    def layers(self) -> Mapping[str, list[str]]:
        """Target's name to the layers whose width its runtime reports."""
        with self._waiting(), self._problem.device().aside():
            found: Mapping[str, list[str]] = self._gauges.measure(_layers, {})
        return found

    def early(
        self, folder: Path, wanted: AllWanted, float_bits: Mapping[str, int], protocol: Protocol, watch: Stopwatch
    ) -> dict[str, Early]:
        """Latency and size of an untrained artifact on each target."""
        arguments = {"wanted": wanted, "float_bits": float_bits, "protocol": protocol}
        found: dict[str, Early] = self._measure("early", arguments, folder, watch)
        return found

    def final(
        self,
        folder: Path,
        wanted: AllWanted,
        early: Mapping[str, Early],
        float_bits: Mapping[str, int],
        watch: Stopwatch,
    ) -> dict[str, Final]:
        """What a trained artifact is worth on each target."""
        arguments = {"wanted": wanted, "early": early, "float_bits": float_bits}
        found: dict[str, Final] = self._measure("final", arguments, folder, watch)
        return found

    def _measure(self, method: str, arguments: Mapping[str, Any], folder: Path, watch: Stopwatch) -> Any:
        """Send the model files, nothing else; what isn't spent on the gauge is the phase ``wait``."""
        names = {name for site in self._problem.sites.values() for name in (site.model, site.packed)}
        files = {name: folder / name for name in names if (folder / name).is_file()}
        work = partial(_measure, method=method, arguments=arguments)
        with self._waiting(), watch.phase("wait"), self._problem.device().aside():
            found, seconds = self._gauges.measure(work, files)
            watch.add(seconds)
        return found


def _layers(station: Station, folder: Path, report: Report) -> Mapping[str, list[str]]:
    with station.problem.device().shared():
        return station.bench.layers


def _measure(
    station: Station, folder: Path, report: Report, *, method: str, arguments: Mapping[str, Any]
) -> tuple[Any, dict[str, float]]:
    watch = Stopwatch()
    with station.problem.device().shared():
        found = getattr(station.bench, method)(folder=folder, watch=watch, **arguments)
    return found, watch.seconds
