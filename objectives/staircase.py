"""At which channel counts a target really gets faster (docs/decisions/012-channel-steps.md).

Latency falls in steps when channels go: vector units, tensor cores and memory layouts take them in blocks. A count in
the middle of a step costs accuracy and gains nothing, so a search is better off without it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from paretune.errors import TrialError
from paretune.objectives.cache import recall, store
from paretune.objectives.clocks import Call, Clock, clock_for
from paretune.objectives.device import Device
from paretune.objectives.runtimes import LoadOptions, Runtime, Target, get_runtime
from paretune.objectives.runtimes.onnx_export import named_arrays
from paretune.objectives.runtimes.probe import deploy_net, machine_key
from paretune.spaces.analysis import Analysis
from paretune.spaces.grid import channel_grid

LARGEST = 256
"""Larger counts aren't measured: their steps are small beside them, and each call takes long."""

MARGIN = 0.02
"""A count must be faster than all larger ones by more than this share of their time."""

_LAYERS = 2
_INPUTS = 16
_SAMPLES = {"Linear": (_INPUTS,), "Conv1d": (_INPUTS, 64), "Conv2d": (_INPUTS, 16, 16), "Conv3d": (_INPUTS, 4, 8, 8)}
"""Layer kind to the shape of a sample; other kinds have no staircase."""

_TURN_SECONDS = 0.01
_LEAST_TURNS = 6
_MOST_TURNS = 20
"""Every count has some turns of so many seconds, two calls at least; one that looks useless has more of them."""

_BUILDING_SECONDS = 60.0
"""Per width; where a runtime compiles for seconds, only multiples of 8, of 16, … are measured."""


@dataclass(frozen=True)
class Step:
    """One channel count in one width.

    Attributes:
        width: Bit-width of the layers.
        count: Channels.
        latency_ms: Of the chain of layers: its fastest call.
        useful: Whether it is faster than every larger count that was measured.
    """

    width: int
    count: int
    latency_ms: float
    useful: bool


@dataclass(frozen=True)
class Staircase:
    """The latency of a kind of layer over its channels on a target.

    Attributes:
        kind: Class name of the layers.
        target: Where it was measured.
        steps: Ascending counts of each width, the widest width first. What the target doesn't run in the width asked
            for is missing.
    """

    kind: str
    target: Target
    steps: tuple[Step, ...]

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths that were measured, widest first."""
        return tuple(dict.fromkeys(step.width for step in self.steps))

    def useful(self, width: int) -> tuple[int, ...]:
        """The counts worth having in that width, ascending; the largest measured is always one."""
        return tuple(step.count for step in self.steps if step.width == width and step.useful)

    @property
    def counts(self) -> tuple[int, ...]:
        """The counts worth having in any of the widths, ascending: a group's layers may differ in theirs."""
        return tuple(sorted({step.count for step in self.steps if step.useful}))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Staircase:
        """Undo `to_dict`."""
        return cls(data["kind"], Target(**data["target"]), tuple(Step(**step) for step in data["steps"]))


def staircases(target: Target, analysis: Analysis, float_bits: int, *, fresh: bool = False) -> dict[str, Staircase]:
    """Those of the layer kinds that a model's groups begin with, by kind; measured once, then read from the cache.

    Args:
        target: Where they are measured.
        analysis: Of the model, its widths probed.
        float_bits: The baseline's float width.
        fresh: Measure even where the cache has them.
    """
    runtime = get_runtime(target.runtime, target.options)
    found = {}
    for kind, largest in _largest_groups(analysis).items():
        integers = {
            width
            for layer in analysis.layers
            if layer.kind == kind
            for width in analysis.widths.get(layer.name, ())
            if width <= 8
        }
        widths = (float_bits, *sorted(integers, reverse=True))
        counts = fine_counts(largest)
        key = machine_key(runtime, target.runtime, target.device)
        key |= {"target": asdict(target), "kind": kind, "widths": widths, "counts": counts}
        staircase = None if fresh else recall("staircase", key, Staircase.from_dict)
        if staircase is None:
            staircase = measure_staircase(runtime, target, kind, widths, counts)
            store("staircase", key, staircase.to_dict())
        found[kind] = staircase
    return found


def useful_counts(found: Mapping[str, Staircase]) -> dict[str, tuple[int, ...]]:
    """Layer kind to the counts worth having, as `paretune.spaces.grid.channel_grid` takes them.

    Steps of the fixed rule that weren't measured, where building took too long, are among them: nothing speaks against
    them.
    """
    counts = {}
    for kind, staircase in found.items():
        measured = {step.count for step in staircase.steps}
        if measured:
            counts[kind] = tuple(sorted({*staircase.counts, *(set(channel_grid(max(measured))) - measured)}))
    return counts


def fine_counts(largest: int) -> tuple[int, ...]:
    """The counts to measure for groups of up to `largest` channels, ascending.

    Multiples of 4 up to 64, of 8 up to 128, of 16 up to 256, and `largest` itself where it is below 256.
    """
    grid = {*range(4, 65, 4), *range(72, 129, 8), *range(144, LARGEST + 1, 16)}
    return tuple(sorted({count for count in grid if count < largest} | {min(largest, LARGEST)}))


def measure_staircase(
    runtime: Runtime, target: Target, kind: str, widths: Sequence[int], counts: Iterable[int]
) -> Staircase:
    """Time a small chain of layers for each count and width.

    The counts take turns in several rounds, and each one's fastest call stands for it: whatever else runs on the
    machine makes calls slower, never faster, and over several seconds each count meets a quiet moment.

    Args:
        runtime: The target's.
        target: Its batch size, threads and device are those of the measurement.
        kind: Class name of the layers: Linear, Conv1d, Conv2d or Conv3d.
        widths: The float width of all that isn't quantized, then the integer widths to measure too.
        counts: Channel counts, at least one.
    """
    steps: list[Step] = []
    for width in widths:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            calls = _load_chains(_Chains(runtime, target, kind, width, widths[0]), sorted(counts, reverse=True))
        latencies = take_turns(calls, Device(target.device), clock_for(target.device))
        useful = lower_envelope(latencies)
        steps += [Step(width, count, latencies[count], count in useful) for count in sorted(latencies)]
    return Staircase(kind, target, tuple(steps))


def lower_envelope(latencies: Mapping[int, float], margin: float = MARGIN) -> tuple[int, ...]:
    """The counts that are faster than every larger one kept, by more than the margin; ascending.

    Args:
        latencies: Count to its latency.
        margin: Share of the larger count's latency.
    """
    kept: list[int] = []
    for count in sorted(latencies, reverse=True):
        if not kept or latencies[count] < latencies[kept[-1]] * (1 - margin):
            kept.append(count)
    return tuple(reversed(kept))


def _load_chains(chains: _Chains, counts: Sequence[int]) -> dict[int, Call]:
    """Calls by count, of those counts that the runtime runs in the width asked for and that there is time to build."""
    calls: dict[int, Call] = {}
    remaining, seconds = list(counts), list[float]()
    while remaining:
        count = remaining.pop(0)
        with Device(chains.target.device).shared():
            start = time.perf_counter()  # without the wait for the device
            call = chains.load(count)
            seconds.append(time.perf_counter() - start)
        if len(seconds) == 2:  # the very first one also loads libraries
            remaining = affordable(remaining, min(seconds))
        if call is not None:
            calls[count] = call
    return calls


def take_turns(calls: Mapping[int, Call], device: Device, clock: Clock) -> dict[int, float]:
    """Count to the milliseconds of its fastest call.

    After some rounds, counts that gain nothing go on alone: one that was disturbed in all of its turns looks just like
    them, so it gets the chance of a quiet moment.
    """
    latencies = dict.fromkeys(calls, math.inf)
    for turn in range(_MOST_TURNS):
        useful = lower_envelope(latencies) if turn >= _LEAST_TURNS else ()
        with device.exclusive():
            for count, call in calls.items():
                if count not in useful:
                    latencies[count] = min(latencies[count], _fastest(clock, call))
    return latencies


def _fastest(clock: Clock, call: Call) -> float:
    """Milliseconds of the fastest call of a turn."""
    first = clock.time_pairs(call, call, 1)  # also warms up
    more = round(_TURN_SECONDS * 1e3 / max(float(first.sum()), 1e-3)) - 1
    return float(min(first.min(), clock.time_pairs(call, call, more).min() if more > 0 else math.inf))


def affordable(counts: Sequence[int], seconds_each: float, budget: float = _BUILDING_SECONDS) -> list[int]:
    """Thin out counts until building all of them fits the budget: multiples of 8, else of 16, 32, …; kept in order."""
    kept, multiple = list(counts), 4
    while len(kept) * seconds_each > budget:
        multiple *= 2
        kept = [count for count in kept if count % multiple == 0]
    return kept


class _Chains:
    """Builds, deploys and loads chains of equal layers in one width."""

    def __init__(self, runtime: Runtime, target: Target, kind: str, width: int, float_bits: int) -> None:
        self.target = target
        self.width = width
        self._runtime = runtime
        self._kind = kind
        self._float_bits = float_bits

    def load(self, count: int) -> Call | None:
        """A call of the chain with that many channels; None where the runtime doesn't run it in the width."""
        target, net = self.target, _chain(self._kind, count)
        samples = torch.randn(max(2, target.batch_size), *_SAMPLES[self._kind])
        layers = [name for name, module in net.named_modules() if hasattr(module, "weight")]
        options = LoadOptions(target.batch_size, target.threads, self._float_bits, device=target.device)
        with TemporaryDirectory(prefix="paretune-staircase-") as folder:
            path = Path(folder) / f"model{self._runtime.suffix}"
            try:
                deploy_net(self._runtime, target.device, net, samples, dict.fromkeys(layers, self.width), path)
            except TrialError:  # e.g. blocks of 4-bit weights don't part so many inputs
                return None
            session = self._runtime.load(path, options)
            arrays = named_arrays(samples[: target.batch_size])
            session.run(arrays)
            reports = session.layers()
            executed = {reports[name].bits for name in layers if name in reports}
            # What is quantized must be seen to run so; floats that go unreported can only be floats.
            seen = len(reports.keys() & set(layers)) == len(layers) or self.width == self._float_bits
            return session.bind(arrays) if seen and executed <= {self.width} else None


def _chain(kind: str, count: int) -> nn.Module:
    """A cheap first layer from a fixed number of channels, then layers from `count` to `count` of them.

    Kernels are of three positions an axis: the layers that most of a convolutional net's time goes to.
    """
    layers: list[nn.Module]
    if kind == "Linear":
        layers = [nn.Linear(_INPUTS, count), *(nn.Linear(count, count) for _ in range(_LAYERS))]
        return nn.Sequential(*_rectified(layers))
    convolution: Any = {"Conv1d": nn.Conv1d, "Conv2d": nn.Conv2d, "Conv3d": nn.Conv3d}[kind]
    layers = [convolution(_INPUTS, count, 1), *(convolution(count, count, 3, padding=1) for _ in range(_LAYERS))]
    return nn.Sequential(*_rectified(layers), _Mean())


def _rectified(layers: Iterable[nn.Module]) -> list[nn.Module]:
    return [module for layer in layers for module in (layer, nn.ReLU())]


class _Mean(nn.Module):
    """The mean over all positions, so that the output is small."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)


def _largest_groups(analysis: Analysis) -> dict[str, int]:
    """Kind of a group's first layer to the channels of the largest such group, for kinds that have a staircase."""
    kinds = {layer.name: layer.kind for layer in analysis.layers}
    found: dict[str, int] = {}
    for group in analysis.groups:
        kind = kinds.get(group.layers[0], "")
        if group.unit == 1 and kind in _SAMPLES:  # what goes in units has no choice of counts
            found[kind] = max(found.get(kind, 0), group.channels)
    return found
