"""The baseline: the dense model on the same target in its best float format."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from paretune.errors import JobError
from paretune.objectives.artifact import MODEL, Card, load_session, replace_folder, save_artifact
from paretune.objectives.compress import compress_numerics
from paretune.objectives.data.inputs import call
from paretune.objectives.device import Device
from paretune.objectives.latency import Latency, measure_paired
from paretune.objectives.measurement import Measurement
from paretune.objectives.problem import Problem
from paretune.objectives.runtimes import LoadOptions, Runtime, Session
from paretune.objectives.scoring import artifact_outputs
from paretune.spaces.analysis import Analysis
from paretune.spaces.plan import CompressionPlan, Quantization

_SAME = 0.01
"""Largest difference between the outputs of two float32 implementations, as a share of the largest output."""

_TOLERANCE = 0.001
"""A float format may cost this much accuracy and still be the best one: bf16's rounding shows in the fourth digit."""


@dataclass(frozen=True)
class Baseline:
    """The measured dense model; an artifact folder."""

    folder: Path

    @cached_property
    def card(self) -> Card:
        """Its card, with the measurement on the validation split."""
        return Card.read(self.folder)

    @property
    def float_bits(self) -> int:
        """Width of its best float format."""
        return self.card.float_bits

    @property
    def measurement(self) -> Measurement:
        """On the validation split."""
        return Measurement(**self.card.metrics["validation"])

    def session(self) -> Session:
        """Load it for measuring."""
        return load_session(self.folder)

    def to_dict(self) -> dict[str, Any]:
        """As front.json has it."""
        return {"format": self.card.float_format, **self.card.metrics}


def make_baseline(problem: Problem, analysis: Analysis, folder: Path, *, float_bits: tuple[int, ...] = ()) -> Baseline:
    """Deploy the dense model in each float format of the target, keep the fastest that costs no accuracy.

    Args:
        problem: Model, data, task, target.
        analysis: Of the model.
        folder: Where the artifact goes.
        float_bits: Float widths to try; those that the runtime executes where empty.

    Raises:
        JobError: The model can't be exported, or the runtime can't run it.
    """
    runtime = problem.runtime
    device = Device(problem.target.device)
    plan = CompressionPlan()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=".unfinished-") as made, device.shared():
        work = Path(made) / "baseline"
        work.mkdir()
        dense = problem.model.build()
        module = compress_numerics(dense, plan, problem.context([]))
        floats = float_bits or problem.capabilities.float_bits
        try:
            runtime.deploy(module, problem.example, work / MODEL)
            _compare(problem, dense, runtime, work / MODEL)
            scores = {bits: _score(problem, runtime, work / MODEL, bits) for bits in floats}
        except JobError:
            raise
        except Exception as error:
            remedy = "make the dense model export to ONNX and run there first"
            got = f"{type(error).__name__}: {error}"
            raise JobError("model", f"must be deployable to {problem.target.runtime}", got, remedy) from error
        with device.exclusive():
            latencies = _latencies(problem, runtime, work / MODEL, floats)
        good = [bits for bits in floats if scores[bits] >= max(scores.values()) - _TOLERANCE]
        best = min(good, key=lambda bits: latencies[bits].median_ms)
        latency = latencies[best]
        measurement = Measurement(
            accuracy=scores[best],
            latency_ms=latency.median_ms,
            latency_low_ms=latency.low_ms,
            latency_high_ms=latency.high_ms,
            speedup=latency.speedup,
            size_bytes=(work / MODEL).stat().st_size,
            params=analysis.params,
            macs=analysis.macs,
        )
        session = runtime.load(work / MODEL, _options(problem, best))
        save_artifact(work, module, plan, session, problem, float_bits=best, validation=measurement)
        replace_folder(work, folder)
    return Baseline(folder)


def profile(problem: Problem, baseline: Baseline, analysis: Analysis) -> Analysis:
    """The analysis with what the target makes of the model: each layer's share of the latency, and its widths."""
    shares, widths = profile_layers(problem, baseline), probe_widths(problem, analysis, baseline.float_bits)
    return replace(analysis, latency_share=shares, widths=widths)


def profile_layers(problem: Problem, baseline: Baseline) -> dict[str, float]:
    """Each layer's share of the baseline's latency, by the runtime's own profiler; median of some calls."""
    runtime = problem.runtime
    options = replace(_options(problem, baseline.float_bits), purpose="profile")
    session = runtime.load(baseline.folder / MODEL, options)
    batch = problem.batch()
    with Device(problem.target.device).exclusive():
        reports = []
        for _ in range(11):
            session.run(batch)
            reports.append(session.layers())
    return {name: sorted(report[name].share for report in reports)[5] for name in reports[0]}


def probe_widths(problem: Problem, analysis: Analysis, float_bits: int) -> dict[str, tuple[int, ...]]:
    """The widths in which the target really runs each layer of the dense model, widest first.

    What the runtime executes for a layer's kind is tried on this model, all layers at once, and read back. A layer that
    the runtime doesn't report can't be seen to run in the width asked for, so it stays in floats.
    """
    runtime, capabilities = problem.runtime, problem.capabilities
    found: dict[str, tuple[int, ...]] = {layer.name: (float_bits,) for layer in analysis.layers}
    example = problem.splits.validation.head(2)
    for width in sorted({width for widths in capabilities.integer_bits.values() for width in widths}, reverse=True):
        bits = {layer.name: width for layer in analysis.layers if width in capabilities.widths(layer.kind)}
        plan = CompressionPlan(quantize=Quantization(bits=bits))
        module = compress_numerics(problem.model.build(), plan, problem.context(list(example.batches(2))))
        with TemporaryDirectory(prefix="paretune-probe-") as folder, Device(problem.target.device).shared():
            runtime.deploy(module, problem.example, Path(folder) / MODEL)
            reports = runtime.load(Path(folder) / MODEL, _options(problem, float_bits)).layers()
        for name in bits:
            if name in reports and reports[name].bits == width:
                found[name] += (width,)
    return found


def _compare(problem: Problem, dense: nn.Module, runtime: Runtime, path: Path) -> None:
    """Raise JobError where the deployed dense model, in float32, doesn't compute what the PyTorch one does."""
    samples = problem.splits.validation.head(problem.target.batch_size)
    with torch.no_grad():
        expected = call(dense, samples.inputs).numpy()
    found = runtime.load(path, _options(problem, 32)).run(problem.batch())
    difference = float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-12))
    if not difference <= _SAME:
        raise JobError(
            "model",
            f"must compute the same on {problem.target.runtime} as in PyTorch",
            f"outputs that differ by {difference:.1%} of the largest one",
            "avoid operations that depend on the batch, on randomness or on Python values in forward",
        )


def _options(problem: Problem, bits: int) -> LoadOptions:
    target = problem.target
    return LoadOptions(target.batch_size, target.threads, bits, device=target.device)


def _score(problem: Problem, runtime: Runtime, path: Path, bits: int) -> float:
    validation = problem.splits.validation
    return problem.task.metric(*artifact_outputs(runtime, path, _options(problem, bits), validation))


def _latencies(problem: Problem, runtime: Runtime, path: Path, floats: tuple[int, ...]) -> dict[int, Latency]:
    """Each format paired with itself, so that its speed-up is 1 but for the noise of the clock."""
    batch = problem.batch()
    latencies = {}
    for bits in floats:
        one, other = (runtime.load(path, _options(problem, bits)).bind(batch) for _ in range(2))
        latencies[bits] = measure_paired(one, other)
    return latencies
