"""What is learnt about a space before its first trial: damage by probes, costs by plans that are only deployed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from paretune.objectives.baseline import Baseline
from paretune.objectives.evaluate import Evaluator
from paretune.objectives.problem import Problem
from paretune.objectives.sensitivity import Probe, affordable_samples, profile_sensitivity
from paretune.search.job import Job
from paretune.search.outline import outline
from paretune.search.profile import Profile
from paretune.search.slack import probe_of
from paretune.search.surrogate.costs import CostErrors, CostModel
from paretune.search.surrogate.encoding import Encoding, Floats, Levels, Rows
from paretune.search.surrogate.knowledge import Architecture, Knowledge, Outlined, layer_costs
from paretune.spaces.plan import CompressionPlan, Pruning
from paretune.spaces.space import MODEL, SearchSpace
from paretune.spaces.units import Unit

Report = Callable[[str], None]

_SAMPLES = 192
"""Validation samples for each probe, at most: its damage is compared with that of others on the same ones."""

_PLACES = {"prune": (0.25, 0.5, 1.0), "factorize": (0.5, 1.0), "sparsify": (0.5, 1.0)}
"""How far along the levels of a unit it is probed, the strongest is 1; of other techniques, all are."""

_QUIET_SECONDS = 5.0
"""Between two lines of progress."""

_DRAWS = 20
"""Random plans drawn for each that is wanted, before a space counts as seen through."""

_LEAST = 4
"""Plans from which on the errors of predictions say something."""


def learn(
    job: Job,
    problem: Problem,
    baseline: Baseline,
    profile: Profile,
    space: SearchSpace,
    report: Report,
    *,
    outlines: int = 24,
) -> Knowledge:
    """Probe the damage of every unit alone, and measure what some plans cost, all without training.

    Args:
        job: Its seed draws the plans.
        problem: What it is about.
        baseline: The dense artifact, measured.
        profile: Of the model and its variants on the targets.
        space: What the search may choose.
        report: Takes a line for the user.
        outlines: How many plans of the model are measured at most; of each variant a third as many.
    """
    encoding, begin = Encoding(space), time.perf_counter()
    analyses, spaces = {MODEL: profile.analysis, **profile.variants}, {MODEL: space, **space.variants}
    architectures = {}
    for name, own in spaces.items():
        of = problem.of(None if name == MODEL else name)
        damage = probe_damage(of, analyses[name].macs, own, encoding.units[name], report)
        architectures[name] = Architecture(layer_costs(analyses[name]), damage)
    probed = time.perf_counter()
    plans = design(encoding, outlines, seed=job.search.seed)
    evaluator = Evaluator(problem, baseline)
    measured = tuple(_measured(job, evaluator, encoding, plans, report))
    knowledge = Knowledge(baseline.measurement.to_dict(), architectures, measured)
    if again := _disturbed(encoding, knowledge):
        report(f"measuring {len(again)} of them again: the machine seems to have been disturbed")
        second = {place: outline(evaluator, space.to_plan(measured[place].params), job.search.seed) for place in again}
        values = {place: found for place, found in second.items() if not isinstance(found, str)}
        measured = tuple(replace(one, values=values.get(place, one.values)) for place, one in enumerate(measured))
    seconds = {"sensitivity": probed - begin, "outlines": time.perf_counter() - probed}
    knowledge = replace(knowledge, outlines=measured, seconds=seconds)
    errors = latency_errors(encoding, knowledge)
    if errors is not None:
        report(f"latency model: {errors} measured untrained")
    return knowledge


def probe_damage(
    problem: Problem, macs: int, space: SearchSpace, units: Sequence[Unit], report: Report
) -> dict[str, dict[float, float]]:
    """The share lost by each unit alone, at some of its levels; those that can't be probed are missing.

    Args:
        problem: With the architecture as its model.
        macs: Of it.
        space: Of the architecture.
        units: Of the space.
        report: Takes a line for the user.
    """
    levels = [(unit, level) for unit in units for level in _probed_levels(unit) if _applies(space, unit, level)]
    probes = [_probe(space, unit, level) for unit, level in levels]
    if not probes:
        return {}
    report(f"probing what is lost without training: {len(probes)} times one layer or group alone")
    samples = min(_SAMPLES, affordable_samples(macs, len(probes)))
    sensitivity = profile_sensitivity(problem, probes, samples=samples, report=report)
    damage: dict[str, dict[float, float]] = {}
    failed = []
    for (unit, level), entry in zip(levels, sensitivity.entries, strict=True):
        if entry.loss_increase is None:
            failed.append(f"{unit.param} at {level:g}: {entry.reason}")
        else:
            damage.setdefault(unit.param, {})[level] = sensitivity.share_lost(entry.loss_increase)
    if failed:
        report(f"{len(failed)} probes failed; the first: {failed[0]}")
    return damage


def design(encoding: Encoding, plans: int, *, seed: int) -> list[Rows]:
    """Plans that span a space: the dense one, the strongest, each technique alone everywhere, and random mixes.

    Args:
        encoding: Of the space.
        plans: Of the model at most; of each variant a third as many.
        seed: Of the mixes.

    Returns:
        Single rows, each with other levels; fewer where the space has no more.
    """
    rng = np.random.default_rng(seed)
    found: list[Rows] = []
    for variant, units in encoding.units.items():
        most = plans if variant == MODEL else plans // 3
        found += _designed(encoding, variant, units, most, rng)
    return found


def latency_errors(encoding: Encoding, knowledge: Knowledge) -> CostErrors | None:
    """How far off the latencies of the model's outlines are, each predicted from others; None for too few of them.

    Args:
        encoding: Of the space.
        knowledge: What was measured.
    """
    _, levels, latencies = _of_model(encoding, knowledge)
    if len(levels) < _LEAST:
        return None
    return _latency_model(encoding, knowledge).cross_validate(levels, np.zeros((len(levels), 0)), latencies)


def _disturbed(encoding: Encoding, knowledge: Knowledge) -> list[int]:
    """Places of outlines of the model whose latency the others don't believe."""
    places, levels, latencies = _of_model(encoding, knowledge)
    model = _latency_model(encoding, knowledge)
    model.fit(levels, np.zeros((len(levels), 0)), latencies)
    return [places[position] for position in model.disturbed()]


def _latency_model(encoding: Encoding, knowledge: Knowledge) -> CostModel:
    return CostModel(encoding.units[MODEL], knowledge.architectures[MODEL], dense=knowledge.dense["latency_ms"])


def _of_model(encoding: Encoding, knowledge: Knowledge) -> tuple[list[int], Levels, Floats]:
    """The outlines of the model: their places, their levels (N, units), and their latencies (N,)."""
    encoded = [(place, encoding.encode(one.params)) for place, one in enumerate(knowledge.outlines)]
    own = [(place, row.levels) for place, row in encoded if row.variant == MODEL]
    levels = [np.zeros((0, len(encoding.units[MODEL])), dtype=np.int64), *(found for _, found in own)]
    places = [place for place, _ in own]
    return places, np.concatenate(levels), np.array([knowledge.outlines[p].values["latency_ms"] for p in places])


def _probed_levels(unit: Unit) -> tuple[float, ...]:
    last = len(unit.levels) - 1
    places = _PLACES.get(unit.technique)
    chosen = range(1, last + 1) if places is None else sorted({max(1, round(place * last)) for place in places})
    return tuple(unit.levels[place] for place in chosen)


def _applies(space: SearchSpace, unit: Unit, level: float) -> bool:
    """Whether a plan would do it: not in a pattern that a layer is too narrow for, nor at a rank that saves nothing."""
    if unit.technique == "sparsify":
        return space.options.patterns[0] not in space.narrow.get(unit.name, ())
    return unit.technique != "factorize" or level <= space.ranks[unit.name]


def _probe(space: SearchSpace, unit: Unit, level: float) -> Probe:
    if unit.name:
        return probe_of(space.options, unit.technique, unit.name, level, f"{level:g}")
    rule = unit.param.removeprefix("pruning/")  # "ratio" or "threshold", of all channels together
    pruning = Pruning.model_validate({"importance": space.options.importance[0], rule: level})
    return Probe("prune", "", f"{unit.param} {level:g}", level, CompressionPlan(prune=pruning))


def _designed(
    encoding: Encoding, variant: str, units: tuple[Unit, ...], most: int, rng: np.random.Generator
) -> list[Rows]:
    found: dict[tuple[str, bytes], Rows] = {}
    settings = encoding.default_settings()[None]
    for levels in _corners(units):
        row = Rows(variant, levels[None], settings)
        found.setdefault(encoding.keys(row, [])[0], row)
    for _ in range(_DRAWS * most):
        if len(found) >= most:
            break
        row = Rows(variant, _mix(units, rng)[None], encoding.random_settings(1, rng))
        found.setdefault(encoding.keys(row, [])[0], row)
    return list(found.values())[:most]


def _corners(units: Sequence[Unit]) -> Iterator[Levels]:
    """The dense plan, the strongest one, and each technique alone on all that it can be applied to."""
    last = np.array([len(unit.levels) - 1 for unit in units], dtype=np.int64)
    yield 0 * last
    yield last
    for technique in dict.fromkeys(unit.technique for unit in units):
        alone = np.array([unit.technique == technique for unit in units])
        if technique == "quantize":
            widths = sorted({level for unit in units for level in unit.levels if unit.technique == technique})
            for width in widths[:-1]:
                yield np.array([u.levels.index(width) if width in u.levels else 0 for u in units]) * alone
        else:
            yield last * alone
            yield last * alone // 2


def _mix(units: Sequence[Unit], rng: np.random.Generator) -> Levels:
    """A random plan: about as strong everywhere or not, in each technique; widths in one block or layer by layer."""
    techniques = dict.fromkeys(unit.technique for unit in units)
    middle, spread = {name: rng.random() for name in techniques}, rng.choice([0.05, 0.2, 0.5])
    # Ranks, zeros and codebooks are switched on for the whole plan.
    used = {name: name in ("prune", "quantize") or rng.random() < 0.35 for name in techniques}
    quantized = [unit for unit in units if unit.technique == "quantize"]
    first, end = np.sort(rng.integers(0, len(quantized) + 1, 2))
    block = set(quantized[first:end]) if rng.random() < 0.5 else None
    levels = np.zeros(len(units), dtype=np.int64)
    for place, unit in enumerate(units):
        last = len(unit.levels) - 1
        if not used[unit.technique]:
            continue
        if unit.technique == "quantize":
            chosen = unit in block if block is not None else rng.random() < middle["quantize"]
            levels[place] = rng.integers(1, last + 1) if chosen else 0
        else:
            strength = middle[unit.technique] + spread * rng.standard_normal()
            levels[place] = int(np.clip(round(strength * last), 0, last))
    return levels


def _measured(
    job: Job, evaluator: Evaluator, encoding: Encoding, plans: Sequence[Rows], report: Report
) -> Iterator[Outlined]:
    """Those of the plans that can be deployed, with what they cost."""
    report(f"measuring {len(plans)} plans without training")
    said = time.monotonic()
    for position, row in enumerate(plans, start=1):
        params = encoding.decode(row)
        found = outline(evaluator, encoding.space.to_plan(params), job.search.seed)
        if isinstance(found, str):
            report(f"plan {position} of {len(plans)} can't be deployed: {found}")
        else:
            yield Outlined(params, found)
        if time.monotonic() - said >= _QUIET_SECONDS:
            report(f"measured {position} of {len(plans)} plans without training")
            said = time.monotonic()
