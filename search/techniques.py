"""Which techniques a search offers: each is tried on the targets, untrained, before anything is searched.

Latency and size depend on a plan, not on trained weights, so that one artifact for each technique shows in a second
what it brings on this model and these targets. What brings nothing is left out of the space, and the report says so.

Each is compared with the space's own plan without techniques: where every plan has 8 bits, say, that is quantized, and
what 8 bits save is nobody's merit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from paretune.errors import JobError
from paretune.objectives.compress.layers import has_own_weight
from paretune.objectives.compress.lowrank import factorizable, largest_share
from paretune.objectives.compress.sparsity import can_sparsify
from paretune.objectives.evaluate import Evaluator
from paretune.objectives.latency import Protocol
from paretune.objectives.problem import Problem
from paretune.search.job import Job
from paretune.search.outline import outline
from paretune.spaces.analysis import EXCLUDED, Analysis
from paretune.spaces.graph import execution_order
from paretune.spaces.plan import CompressionPlan
from paretune.spaces.settings import INTEGER
from paretune.spaces.space import RANK_STEP, SearchSpace

GAIN = 0.03
"""Share of a latency or size that a technique must save; less isn't told apart from noise in so few calls."""

_HIGH = "latency_high_ms"

_KNOWN = {
    **{name: name for name in ("latency_ms", "size_bytes", "params", "macs")},
    "throughput_per_s": "latency_ms",
    "energy_mj": "latency_ms",
    "peak_memory_bytes": "params",
}
"""What is wanted to what of it is known without a whole trial: itself, or what goes with it.

Zeros, codebooks and few bits make a file smaller, but memory holds the weights unpacked, so that parameters stand for
it. This overlooks what kernels of few bits save there.
"""

_EVERYWHERE = ("params", "macs")
"""What is the same on all targets."""

_RANK, _SPARSITY, _RATIO = 0.25, 0.75, 0.5

_NOTHING = {
    "prune": "no group has a count to be cut to",
    "quantize": "every plan of the space is so",
    "factorize": "at no layer do so small factors save anything",
    "sparsify": "no layer has inputs enough for it",
    "share": "excludes itself with 8 bits per channel, or 4 and less, which every plan of the space has",
}
"""Why the plan of a technique may be the one without it."""

Executes = Callable[[str, int, str], bool]
"""Whether the targets have a kernel for a layer (by name) in a width, with activations ``quantized`` or ``float``."""


class _Try(NamedTuple):
    """A plan with one technique; where it is only simulated, its latency is another width's and isn't its own merit."""

    technique: str
    setting: str
    value: str
    plan: CompressionPlan
    simulated: bool = False


@dataclass(frozen=True)
class Tried:
    """A technique on all layers at once, without training.

    Attributes:
        technique: The key of the job's space that switches it.
        setting: How strongly, in words.
        value: The choice that it stands for: a width with what becomes of the activations (``8 quantized``), a method,
            a pattern; empty where there is none.
        left: Objective (``latency_ms@NAME`` for a further target) to the share that is left of what it is without the
            technique.
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
                least = min(share for share in shares if share is not None)
                if least >= RANK_STEP:  # otherwise no rank that is offered saves anything
                    ranks[name] = least
    patterns = space.options.patterns if job.space.sparsify else ()
    fitting = {
        name: [pattern for pattern in patterns if can_sparsify(model.get_submodule(name), pattern)] for name in layers
    }
    sparse = tuple(name for name in layers if fitting[name])
    narrow = {name: tuple(pattern for pattern in patterns if pattern not in fitting[name]) for name in sparse}
    return replace(
        space,
        ranks=ranks,
        sparse=sparse,
        narrow={name: unfit for name, unfit in narrow.items() if unfit},
        shared=tuple(name for name in layers if job.space.share and has_own_weight(model.get_submodule(name))),
    )


def try_techniques(
    job: Job, evaluator: Evaluator, space: SearchSpace, executes: Executes, report: Callable[[str], None]
) -> list[Tried]:
    """Try each technique of the space, and decide which are offered.

    Args:
        job: Its objectives and bounds decide what counts.
        evaluator: Of the problem.
        space: With every technique.
        executes: What the targets have kernels for.
        report: Takes a line for the user.

    Raises:
        JobError: The plan without any technique doesn't run.
    """
    report("trying what each technique brings on the target (untrained, all layers at once)")
    without = space.uniform()
    before = outline(evaluator, without, job.search.seed, Protocol())
    if isinstance(before, str):
        raise JobError("space.bits", "must allow a plan that runs on the targets", before, "allow a float width")
    counted, found = _counted(job), []
    for one in _tries(space, executes):
        asked = getattr(job.space, one.technique) is True
        found_out = outline(evaluator, one.plan, job.search.seed, Protocol()) if one.plan.hash != without.hash else {}
        after = found_out if isinstance(found_out, dict) else {}
        if isinstance(found_out, str):  # other plans with the technique may run, and what is asked for gets its chance
            offered, reason = asked, found_out
        elif not found_out:
            offered, reason = False, _NOTHING[one.technique]
        else:
            offered, reason = _judged(one, before, found_out, counted)
            if asked and not offered:
                offered, reason = True, f"{reason}, but the job asks for it (space.{one.technique}: true)"
        left = {name: value / before[name] for name, value in after.items() if not name.startswith(_HIGH)}
        found.append(Tried(one.technique, one.setting, one.value, left, offered, reason))
    return found


def _counted(job: Job) -> list[str]:
    """Of what is wanted, what is known without a whole trial."""
    found: list[str] = []
    for name in wanted(job):
        metric, at, target = name.partition("@")
        if known := _KNOWN.get(metric):
            found.append(known if known in _EVERYWHERE else known + at + target)
    return list(dict.fromkeys(found))


def _judged(one: _Try, before: Mapping[str, float], after: Mapping[str, float], counted: list[str]) -> tuple[bool, str]:
    """Whether a technique brings something of what counts, and why or why not."""
    if not counted:
        return True, "nothing of what is wanted is known before a training"
    own = [name for name in counted if not (one.simulated and name.startswith("latency_ms"))]
    # Of a latency the upper end of its interval: a busy machine must not make a technique look fast.
    highest = {name: after[name.replace("latency_ms", _HIGH)] / before[name] for name in own}
    gains = [f"saves {1 - after[name] / before[name]:.0%} of {name}" for name in own if highest[name] <= 1 - GAIN]
    if gains:
        return True, ", ".join(gains)
    why = f"saves less than {GAIN:.0%} of {' and of '.join(own)}" if own else "saves nothing that counts"
    return False, f"{why}; it has no kernel, so no latency is its own" if one.simulated else why


def wanted(job: Job) -> list[str]:
    """The objectives of a job, and what it bounds."""
    return list(dict.fromkeys([*job.all_objectives, *(constraint.name for constraint in job.constraints)]))


def restrict(space: SearchSpace, tried: Iterable[Tried]) -> SearchSpace:
    """The space without the techniques, widths, methods and patterns that aren't offered.

    Args:
        space: With everything that was tried.
        tried: What came of it. A width that is offered stays on all layers, also where it is only stored.
    """
    offered: dict[str, list[str]] = {}
    for one in tried:
        offered.setdefault(one.technique, []).extend([one.value] * one.offered)

    def of(space: SearchSpace) -> SearchSpace:
        return replace(
            space,
            grids=space.grids if offered.get("prune") else {},
            widths={
                layer: tuple(width for width in widths if width > INTEGER or str(width) in bits) or widths[:1]
                for layer, widths in space.widths.items()
            },
            ranks=space.ranks if offered.get("factorize") else {},
            sparse=space.sparse if offered.get("sparsify") else (),
            narrow=space.narrow if offered.get("sparsify") else {},
            shared=space.shared if offered.get("share") else (),
            variants={name: of(variant) for name, variant in space.variants.items()},
            options=options,
        )

    quantized = [value.partition(" ") for value in offered.get("quantize", ())]
    bits, activations = {width for width, _, _ in quantized}, {after for _, _, after in quantized}
    options = replace(
        space.options,
        prune=bool(offered.get("prune")),
        methods=tuple(m for m in space.options.methods if m in offered.get("factorize", ())) or space.options.methods,
        patterns=tuple(p for p in space.options.patterns if p in offered.get("sparsify", ())) or space.options.patterns,
        activations=tuple(a for a in space.options.activations if a in activations) or space.options.activations,
    )
    return of(space)


def _tries(space: SearchSpace, executes: Executes) -> Iterator[_Try]:
    """Each technique on all layers that it can be applied to."""
    options = space.options
    if space.grids or options.prune:
        plan = space.uniform(min(_RATIO, options.max_ratio))
        setting = f"{min(_RATIO, options.max_ratio):.0%} of all channels"
        if plan.prune.threshold:
            setting = f"channels below {plan.prune.threshold:.0%} of their group's mean"
        yield _Try("prune", setting, "", plan)
    for activations in options.activations:
        yield from _quantized(replace(space, options=replace(options, activations=(activations,))), executes)
    for method in options.methods if space.ranks else ():
        only = replace(space, options=replace(options, methods=(method,)))
        rank = min(_RANK, max(space.ranks.values()) // RANK_STEP * RANK_STEP)
        yield _Try("factorize", f"{method}, {100 * rank:.3g}% of the rank", method, only.uniform(rank=rank))
    for pattern in options.patterns if space.sparse else ():
        only = replace(space, options=replace(options, patterns=(pattern,)))
        sparsity = min(_SPARSITY, options.max_sparsity)
        setting = f"{sparsity:.0%} zeros" if pattern == "unstructured" else f"{pattern} zeros"
        yield _Try("sparsify", setting, pattern, only.uniform(sparsity=sparsity))
    if space.shared:
        fewest = min(options.clusters)
        yield _Try("share", f"{fewest} values a layer", "", space.uniform(clusters=fewest))


def _quantized(space: SearchSpace, executes: Executes) -> Iterator[_Try]:
    """Each width on the layers that have a kernel for it, and again on all, where it is only stored in some."""
    [activations] = space.options.activations
    alone = activations == "float"
    for width in sorted({width for widths in space.widths.values() for width in widths if width <= INTEGER})[::-1]:
        layers = [layer for layer, widths in space.widths.items() if width in widths]
        own = {layer for layer in layers if executes(layer, width, activations)}
        name, value = f"{width} bits, weights alone" if alone else f"{width} bits", f"{width} {activations}"
        if own:
            widths = {
                layer: widths if layer in own else tuple(other for other in widths if other != width) or widths
                for layer, widths in space.widths.items()
            }
            yield _Try("quantize", name, value, replace(space, widths=widths).uniform(bits=width))
        if len(own) < len(layers):
            runs = "run in floats" if alone else f"run in {INTEGER}"
            yield _Try("quantize", f"{name}, {runs}", value, space.uniform(bits=width), simulated=True)
