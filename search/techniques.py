"""Which techniques a search offers: each is tried on the targets, untrained, before anything is searched.

Latency and size depend on a plan, not on trained weights, so that one artifact for each technique shows in a second
what it brings on this model and these targets. What brings nothing is left out of the space, and the report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from paretune.errors import JobError, TrialError
from paretune.objectives.compress.layers import has_own_weight
from paretune.objectives.compress.lowrank import factorizable, largest_share
from paretune.objectives.compress.sparsity import can_sparsify
from paretune.objectives.evaluate import Evaluator
from paretune.objectives.measurement import Measurement
from paretune.objectives.problem import Problem
from paretune.search.job import Job
from paretune.spaces.analysis import EXCLUDED, Analysis
from paretune.spaces.graph import execution_order
from paretune.spaces.plan import CompressionPlan
from paretune.spaces.space import SearchSpace

GAIN = 0.03
"""Share of a latency or size that a technique must save; less isn't told apart from noise in so few calls."""

_HIGH = "latency_high_ms"

_KNOWN = {
    **{name: name for name in ("latency_ms", "size_bytes", "params", "macs")},
    "throughput_per_s": "latency_ms",
    "energy_mj": "latency_ms",
    "peak_memory_bytes": "size_bytes",
}
"""What is wanted to what of it is known without a whole trial: itself, or what goes with it."""

_INTEGER = 8

_RANK, _SPARSITY, _RATIO = 0.25, 0.75, 0.5


@dataclass(frozen=True)
class Tried:
    """A technique on all layers at once, without training.

    Attributes:
        technique: The key of the job's space that switches it.
        setting: How strongly, in words.
        value: The choice that it stands for: a width, a method, a pattern; empty where there is none.
        left: Objective (``latency_ms@NAME`` for a further target) to the share of the baseline's that is left.
        offered: Whether the search may choose it.
        reason: Why, or why not.
    """

    technique: str
    setting: str
    value: str
    left: Mapping[str, float]
    offered: bool
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)


def whole_space(job: Job, problem: Problem, analysis: Analysis, space: SearchSpace) -> SearchSpace:
    """A space with every technique that the job doesn't switch off, on all layers that it can be applied to.

    Args:
        job: The job.
        problem: The model.
        analysis: Of it.
        space: With its channel counts and widths.
    """
    model = problem.model.build()
    excluded = {entry.layer for entry in analysis.frozen if entry.reason == EXCLUDED}
    layers = [name for name in execution_order(model, problem.forward) if name not in excluded]
    ranks = {}
    if job.space.factorize:
        possible = [factorizable(model, problem.forward, method) for method in job.space.method]
        for name in layers:
            if not any(found[name] for found in possible):
                shares = [largest_share(model.get_submodule(name), method) for method in job.space.method]
                ranks[name] = min(share for share in shares if share is not None)
    sparse = [
        name
        for name in layers
        if job.space.sparsify
        and all(can_sparsify(model.get_submodule(name), pattern) for pattern in space.options.patterns)
    ]
    return replace(
        space,
        ranks=ranks,
        sparse=tuple(sparse),
        shared=tuple(name for name in layers if job.space.share and has_own_weight(model.get_submodule(name))),
    )


def try_techniques(
    job: Job, evaluator: Evaluator, baseline: Measurement, space: SearchSpace, report: Callable[[str], None]
) -> list[Tried]:
    """Try each technique of the space, and decide which are offered.

    Args:
        job: Its objectives and bounds decide what counts.
        evaluator: Of the problem.
        baseline: Of the dense model.
        space: With every technique.
        report: Takes a line for the user.
    """
    report("trying what each technique brings on the target (untrained, all layers at once)")
    dense = baseline.to_dict()
    parts = [name.partition("@") for name in wanted(job)]
    counted = list(dict.fromkeys(_KNOWN[metric] + at + target for metric, at, target in parts if metric in _KNOWN))
    found = []
    for technique, setting, value, plan in _plans(space):
        try:
            outline = evaluator.outline(plan, seed=job.search.seed)
        except JobError:
            raise
        except Exception as error:  # whatever a runtime raises for what it can't do: the technique isn't offered
            reason = str(error) if isinstance(error, TrialError) else f"{type(error).__name__}: {error}"
            found.append(Tried(technique, setting, value, {}, False, reason))
            continue
        left = {name: measured / dense[name] for name, measured in outline.items() if not name.startswith(_HIGH)}
        # Of a latency the upper end of its interval: a busy machine must not make a technique look fast.
        highest = {name: outline[name.replace("latency_ms", _HIGH)] / dense[name] for name in counted}
        gains = [f"saves {1 - left[name]:.0%} of {name}" for name in counted if highest[name] <= 1 - GAIN]
        switch = getattr(job.space, technique)
        reason = ", ".join(gains) or f"saves less than {GAIN:.0%} of {' and of '.join(counted)}"
        if switch is True and not gains:
            reason += f", but the job asks for it (space.{technique}: true)"
        found.append(Tried(technique, setting, value, left, switch is True or bool(gains), reason))
    return found


def wanted(job: Job) -> list[str]:
    """The objectives of a job, and what it bounds."""
    return list(dict.fromkeys([*job.all_objectives, *(constraint.name for constraint in job.constraints)]))


def restrict(space: SearchSpace, tried: Iterable[Tried]) -> SearchSpace:
    """The space without the techniques, methods and patterns that aren't offered."""
    offered: dict[str, list[str]] = {}
    for one in tried:
        offered.setdefault(one.technique, []).extend([one.value] * one.offered)

    def of(space: SearchSpace) -> SearchSpace:
        bits = set(offered.get("quantize", ()))
        return replace(
            space,
            grids=space.grids if offered.get("prune") else {},
            widths={
                layer: tuple(width for width in widths if width > _INTEGER or str(width) in bits) or widths[:1]
                for layer, widths in space.widths.items()
            },
            ranks=space.ranks if offered.get("factorize") else {},
            sparse=space.sparse if offered.get("sparsify") else (),
            shared=space.shared if offered.get("share") else (),
            variants={name: of(variant) for name, variant in space.variants.items()},
            options=options,
        )

    options = replace(
        space.options,
        prune=bool(offered.get("prune")),
        methods=tuple(m for m in space.options.methods if m in offered.get("factorize", ())) or space.options.methods,
        patterns=tuple(p for p in space.options.patterns if p in offered.get("sparsify", ())) or space.options.patterns,
    )
    return of(space)


def _plans(space: SearchSpace) -> Iterator[tuple[str, str, str, CompressionPlan]]:
    """Technique, setting, value and plan of each trial."""
    if space.grids or space.options.prune:
        ratio = min(_RATIO, space.options.max_ratio)
        yield "prune", f"{ratio:.0%} of all channels", "", space.uniform(ratio)
    for width in sorted(
        {width for widths in space.widths.values() for width in widths if width <= _INTEGER}, reverse=True
    ):
        yield "quantize", f"{width} bits", str(width), space.uniform(bits=width)
    for method in space.options.methods if space.ranks else ():
        only = replace(space, options=replace(space.options, methods=(method,)))
        yield "factorize", f"{method}, {_RANK:.0%} of the rank", method, only.uniform(rank=_RANK)
    for pattern in space.options.patterns if space.sparse else ():
        only = replace(space, options=replace(space.options, patterns=(pattern,)))
        sparsity = min(_SPARSITY, space.options.max_sparsity)
        setting = f"{sparsity:.0%} zeros" if pattern == "unstructured" else f"{pattern} zeros"
        yield "sparsify", setting, pattern, only.uniform(sparsity=sparsity)
    if space.shared:
        fewest = min(space.options.clusters)
        yield "share", f"{fewest} values a layer", "", space.uniform(clusters=fewest)
