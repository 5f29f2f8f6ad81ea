"""The baseline: the dense model on the same target in its best float format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import nn

from paretune.errors import JobError
from paretune.objectives.artifact import Card, Loaded, load_session, replace_folder, save_artifact
from paretune.objectives.compress import compress_numerics
from paretune.objectives.compress.quantization import fits
from paretune.objectives.data.inputs import call
from paretune.objectives.latency import Latency, measure_paired
from paretune.objectives.measurement import Measurement, OnTarget
from paretune.objectives.problem import Problem
from paretune.objectives.runtimes import Session
from paretune.objectives.scoring import artifact_outputs
from paretune.objectives.site import Site
from paretune.spaces.analysis import Analysis
from paretune.spaces.plan import CompressionPlan, Quantization

_LARGE = 1 << 16
"""Weights of a layer from which on blocks of 4 bits may pay: reading them must be what takes the time."""

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
    def float_bits(self) -> dict[str, int]:
        """Target's name to the width of the best float format there."""
        return {name: deployed.float_bits for name, deployed in self.card.deployed.items()}

    @property
    def measurement(self) -> Measurement:
        """On the validation split."""
        return Measurement.from_dict(self.card.metrics["validation"])

    def session(self, name: str = "") -> Session:
        """Load it for measuring, on the target of that name."""
        return load_session(self.folder, name)

    def to_dict(self) -> dict[str, Any]:
        """As front.json has it."""
        formats = {f"format@{name}": deployed.float_format for name, deployed in self.card.others.items()}
        return {"format": self.card.main.float_format, **formats, **self.card.metrics}


def make_baseline(problem: Problem, analysis: Analysis, folder: Path, *, float_bits: tuple[int, ...] = ()) -> Baseline:
    """Deploy the dense model in each float format of each target, keep the fastest that costs no accuracy.

    Args:
        problem: Model, data, task, targets.
        analysis: Of the model.
        folder: Where the artifact goes.
        float_bits: Float widths to try on the first target; those that the runtime executes where empty.

    Raises:
        JobError: The model can't be exported, or a runtime can't run it.
    """
    device = problem.device()
    plan = CompressionPlan()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=".unfinished-") as made, device.shared():
        work = Path(made) / "baseline"
        work.mkdir()
        dense = problem.model.build()
        module = compress_numerics(dense, plan, problem.context([]))
        best: dict[str, int] = {}
        on: dict[str, OnTarget] = {}
        for name, site in problem.sites.items():
            floats = (float_bits if not name else ()) or site.capabilities.float_bits
            try:
                if not (work / site.model).is_file():
                    site.runtime.deploy(module, problem.example, work / site.model)
                    site.pack(work)  # a model that came with zeros must not have them counted as a gain
                _compare(problem, dense, site, work)
                scores = {bits: _score(problem, site, work, bits) for bits in floats}
            except JobError:
                raise
            except Exception as error:
                remedy = "make the dense model export and run there first"
                got = f"{type(error).__name__}: {error}"
                raise JobError("model", f"must be deployable to {site.target.runtime}", got, remedy) from error
            with device.exclusive():
                best[name], on[name] = _best_format(problem, site, work, scores)
        measurement = Measurement(on, analysis.params, analysis.macs)
        with device.exclusive():
            loaded = {
                name: Loaded.of(site.load(work, best[name]), problem.batch(site.target.batch_size))
                for name, site in problem.sites.items()
            }
        save_artifact(work, module, plan, loaded, problem, float_bits=best, validation=measurement)
        replace_folder(work, folder)
    return Baseline(folder)


def _best_format(problem: Problem, site: Site, folder: Path, scores: Mapping[int, float]) -> tuple[int, OnTarget]:
    """The fastest of the float widths that cost no accuracy, and what was measured in it."""
    latencies = {bits: _latency(problem, site, folder, bits) for bits in scores}
    good = [bits for bits, score in scores.items() if score >= max(scores.values()) - _TOLERANCE]
    best = min(good, key=lambda bits: latencies[bits].median_ms)
    latency = latencies[best]
    call = site.load(folder, best).bind(problem.batch(site.target.batch_size))
    return best, OnTarget(
        accuracy=scores[best],
        latency_ms=latency.median_ms,
        latency_low_ms=latency.low_ms,
        latency_high_ms=latency.high_ms,
        speedup=latency.speedup,
        size_bytes=site.size(folder),
        **site.usage(call),
    )


def profile(problem: Problem, baseline: Baseline, analysis: Analysis) -> Analysis:
    """The analysis with what the targets make of the model: each layer's share of the latency, and its widths."""
    shares, widths = profile_layers(problem, baseline), probe_widths(problem, analysis, baseline)
    return replace(analysis, latency_share=shares, widths=widths)


def profile_layers(problem: Problem, baseline: Baseline) -> dict[str, float]:
    """Each layer's share of the baseline's latency on the first target, by the runtime's own profiler.

    The median of some calls.
    """
    session = problem.site.load(baseline.folder, baseline.float_bits[""], purpose="profile")
    batch = problem.batch(problem.target.batch_size)
    with problem.device().exclusive():
        reports = []
        for _ in range(11):
            session.run(batch)
            reports.append(session.layers())
    return {name: sorted(report[name].share for report in reports)[5] for name in reports[0]}


def probe_widths(problem: Problem, analysis: Analysis, baseline: Baseline) -> dict[str, tuple[int, ...]]:
    """The widths in which every target really runs each layer of the dense model, widest first.

    What the runtimes execute for a layer's kind is tried on this model, all layers at once, and read back. A layer that
    a runtime doesn't report can't be seen to run in the width asked for, so it stays in floats, and so does one that
    the runtime refuses so. The float width is that of the first target, and stands for each other target's own.
    """
    found: dict[str, tuple[int, ...]] = {layer.name: (baseline.float_bits[""],) for layer in analysis.layers}
    capabilities = [site.capabilities for site in problem.sites.values()]
    dense = problem.model.build()
    for width in sorted(problem.schemes, reverse=True):
        scheme = problem.schemes[width]
        layers = [
            layer.name
            for layer in analysis.layers
            if all(width in known.widths(layer.kind) for known in capabilities)
            and fits(dense.get_submodule(layer.name), scheme)
            and (scheme.block is None or layer.params >= _LARGE)
        ]
        for name in _executed(problem, baseline, layers, width):
            found[name] += (width,)
    return found


def _executed(problem: Problem, baseline: Baseline, layers: list[str], width: int) -> set[str]:
    """Those of the layers that every target runs in that width; what makes it refuse the model is found by halving."""
    if not layers:
        return set()
    try:
        return _tried(problem, baseline, layers, width)
    except JobError:
        raise
    except Exception:  # whatever a runtime raises for what it can't do: the layer isn't offered in that width
        if len(layers) == 1:
            return set()
    middle = len(layers) // 2
    return _executed(problem, baseline, layers[:middle], width) | _executed(problem, baseline, layers[middle:], width)


def _tried(problem: Problem, baseline: Baseline, layers: list[str], width: int) -> set[str]:
    example = problem.splits.validation.head(2)
    plan = CompressionPlan(quantize=Quantization(bits=dict.fromkeys(layers, width)))
    module = compress_numerics(problem.model.build(), plan, problem.context(list(example.batches(2))))
    executed = set(layers)
    with TemporaryDirectory(prefix="paretune-probe-") as made, problem.device().shared():
        folder = Path(made)
        for name, site in problem.sites.items():
            if not (folder / site.model).is_file():
                site.runtime.deploy(module, problem.example, folder / site.model)
            reports = site.load(folder, baseline.float_bits[name]).layers()
            executed &= {layer for layer, report in reports.items() if report.bits == width}
    return executed


def _compare(problem: Problem, dense: nn.Module, site: Site, folder: Path) -> None:
    """Raise JobError where the deployed dense model, in float32, doesn't compute what the PyTorch one does."""
    size = site.target.batch_size
    with torch.no_grad():
        expected = call(dense, problem.splits.validation.head(size).inputs).numpy()
    found = site.load(folder, 32).run(problem.batch(size))
    difference = float(np.abs(found - expected).max() / max(float(np.abs(expected).max()), 1e-12))
    if not difference <= _SAME:
        raise JobError(
            "model",
            f"must compute the same on {site.target.runtime} as in PyTorch",
            f"outputs that differ by {difference:.1%} of the largest one",
            "avoid operations that depend on the batch, on randomness or on Python values in forward",
        )


def _score(problem: Problem, site: Site, folder: Path, bits: int) -> float:
    scored = artifact_outputs(site.runtime, folder / site.model, site.options(bits), problem.splits.validation)
    return problem.task.metric(*scored)


def _latency(problem: Problem, site: Site, folder: Path, bits: int) -> Latency:
    """A format paired with itself, so that its speed-up is 1 but for the noise of the clock."""
    batch = problem.batch(site.target.batch_size)
    one, other = (site.load(folder, bits).bind(batch) for _ in range(2))
    return measure_paired(one, other, clock=site.clock)
