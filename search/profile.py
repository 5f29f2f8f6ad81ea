"""What is found out about a job's model before the search, and the space that comes of it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from paretune.errors import JobError
from paretune.objectives.baseline import Baseline, make_baseline, profile
from paretune.objectives.compress.layers import why_special
from paretune.objectives.compress.quantization import QUANTIZABLE
from paretune.objectives.evaluate import Evaluator
from paretune.objectives.problem import Problem
from paretune.objectives.staircase import Staircase, staircases, useful_counts
from paretune.search.job import Job
from paretune.search.techniques import Tried, restrict, try_techniques, whole_space
from paretune.spaces.analysis import EXCLUDED, Analysis
from paretune.spaces.make import make_space
from paretune.spaces.space import Options, SearchSpace


@dataclass(frozen=True)
class Profile:
    """What was found out about a job's model on its targets, before the search.

    Attributes:
        analysis: Of the model, with latency shares, widths and channel counts.
        variants: The same of each variant, by name.
        tried: What each technique brings.
        staircases: Layer kind to latency over channels; only where they were measured in this process.
    """

    analysis: Analysis
    variants: Mapping[str, Analysis] = field(default_factory=dict)
    tried: tuple[Tried, ...] = ()
    staircases: Mapping[str, Staircase] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Put it into a run folder: ``analysis.json`` and ``techniques.json``."""
        variants = {name: found.to_dict() for name, found in self.variants.items()}
        contents = {
            "analysis.json": self.analysis.to_dict() | {"variants": variants},
            "techniques.json": {"tried": [one.to_dict() for one in self.tried]},
        }
        for name, content in contents.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path, problem: Problem) -> Profile:
        """What a run began with: as it was measured then, on the analysis as it is found now."""
        if not (folder / "techniques.json").is_file():
            remedy = "finish that run with the version that began it"
            raise JobError("run", "must have a techniques.json", "none: an older version began it", remedy)
        stored = json.loads((folder / "analysis.json").read_text())

        def complete(analysis: Analysis, stored: Mapping[str, Any]) -> Analysis:
            kinds = ("widths", "counts")
            widths, counts = ({name: tuple(values) for name, values in stored[kind].items()} for kind in kinds)
            return replace(analysis, latency_share=stored["latency_share"], widths=widths, counts=counts)

        variants = {name: complete(problem.of(name).analyse(), stored["variants"][name]) for name in problem.variants}
        tried = tuple(Tried(**one) for one in json.loads((folder / "techniques.json").read_text())["tried"])
        return cls(complete(problem.analyse(), stored), variants, tried)


def profile_job(
    job: Job,
    problem: Problem,
    baseline: Baseline,
    analysis: Analysis,
    *,
    staircase: bool = False,
    fresh: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Profile:
    """Find out what the targets make of the model and its variants, and what each technique brings there.

    Args:
        job: The job.
        problem: What it is about.
        baseline: The dense artifact.
        analysis: Of the model.
        staircase: Probe channel counts even where the job has fixed ones.
        fresh: Measure them even where this machine remembers them.
        report: Takes a line for the user.
    """
    _check_excluded(job, problem, analysis)
    analysis, found = _profile_target(job, problem, baseline, analysis, staircase=staircase, fresh=fresh, report=report)
    float_bits = baseline.float_bits[""]
    variants = {}
    for name in problem.variants:
        report(f"measuring the variant {name}")
        own = problem.of(name)
        analysed = own.analyse()
        with TemporaryDirectory(prefix="paretune-variant-") as folder:
            dense = make_baseline(own, analysed, Path(folder) / "baseline", float_bits=(float_bits,))
            variants[name] = replace(profile(own, dense, analysed), counts=analysis.counts)
    space = _whole_space(job, problem, analysis, variants, float_bits)
    schemes = problem.schemes

    def executes(layer: str, width: int, activations: str) -> bool:
        alone = width in schemes and schemes[width].weights_alone
        return width in analysis.widths.get(layer, ()) and (alone or activations == "quantized")

    tried = try_techniques(job, Evaluator(problem, baseline), space, executes, report)
    return Profile(analysis, variants, tuple(tried), found)


def _check_excluded(job: Job, problem: Problem, analysis: Analysis) -> None:
    """See that every pattern matches a layer, of the model or of a variant: a misspelt one would exclude nothing."""
    names = _names(analysis)
    for position, pattern in enumerate(job.space.exclude):
        if any(fnmatchcase(name, pattern) for name in names):
            continue
        names |= {name for variant in problem.variants for name in _names(problem.of(variant).analyse())}
        if any(fnmatchcase(name, pattern) for name in names):
            continue
        below = any(name.startswith(f"{pattern}.") for name in names)
        near = [f"{pattern}.*"] if below else difflib.get_close_matches(pattern, names, n=1, cutoff=0)
        remedy = f"did you mean {near[0]!r}?" if near else "leave it out"
        raise JobError(f"space.exclude[{position}]", "must match a layer of the model", repr(pattern), remedy)


def _names(analysis: Analysis) -> set[str]:
    """Of everything that can be excluded."""
    grouped = {name for group in analysis.groups for name in group.layers}
    return grouped | {layer.name for layer in analysis.layers} | {entry.layer for entry in analysis.frozen}


def make_job_space(job: Job, problem: Problem, profile: Profile, float_bits: int) -> SearchSpace:
    """The search space of a job: what it allows, of what brings something on the targets.

    Raises:
        JobError: Nothing is left to choose.
    """
    space = restrict(_whole_space(job, problem, profile.analysis, profile.variants, float_bits), profile.tried)
    if not space.compresses:
        got = "; ".join(f"{one.technique} ({one.setting}) {one.reason}" for one in profile.tried)
        remedy = "set one of them to true" if got else "exclude fewer layers (space.exclude), or switch more on"
        raise JobError("space", "must leave something to compress", got or "no layer that can be", remedy)
    return space


def _whole_space(
    job: Job, problem: Problem, analysis: Analysis, variants: Mapping[str, Analysis], float_bits: int
) -> SearchSpace:
    """With every technique that the job doesn't switch off."""
    space = job.space
    teaches = job.teacher is not None
    options = Options(
        prune=bool(space.prune) and any(found.groups for found in (analysis, *variants.values())),
        scope=space.scope,
        max_ratio=space.max_ratio,
        importance=tuple(space.importance),
        schedules=tuple(space.schedule),
        methods=tuple(space.method),
        patterns=_patterns(job, problem),
        max_sparsity=space.max_sparsity,
        clusters=tuple(space.clusters),
        observers=tuple(space.observer),
        aware=tuple(space.aware),
        activations=tuple(space.activations),
        granularity=tuple(space.granularity),
        affine=tuple(space.affine),
        temperature=space.temperature if teaches else (space.temperature[0],) * 2,
        distillation_weight=space.distillation_weight if teaches else (0.0, 0.0),
        hint_weight=space.hint_weight,
        learning_rate=space.learning_rate,
        multiples={width: scheme.least_block for width, scheme in problem.schemes.items() if scheme.block},
    )

    def of(problem: Problem, analysis: Analysis) -> SearchSpace:
        found = make_space(analysis, layer_widths(job, problem, analysis, float_bits), options)
        return whole_space(job, problem, analysis, found)

    own = {name: of(problem.of(name), analysed) for name, analysed in variants.items()}
    return replace(of(problem, analysis), variants=own)


def _patterns(job: Job, problem: Problem) -> tuple[str, ...]:
    """What sparse weights may look like; by default also what every target has kernels for."""
    if job.space.pattern != "auto":
        return tuple(job.space.pattern)
    known = [site.capabilities.sparse_patterns for site in problem.sites.values()]
    return ("unstructured", *(pattern for pattern in known[0] if all(pattern in other for other in known)))


def layer_widths(job: Job, problem: Problem, analysis: Analysis, float_bits: int) -> Mapping[str, tuple[int, ...]]:
    """Widths that the search may give to each layer, widest first; empty where the job quantizes nothing.

    Fewer bits than a target has kernels for, where the job names them, run in 8 and save size alone; so do all where
    weights alone are quantized, on layers that no kernel takes.
    """
    if not job.space.quantize:
        return {}
    allowed = None if job.space.bits == "auto" else set(job.space.bits)
    alone = set(job.space.activations) == {"float"}
    fixed = {entry.layer for entry in analysis.frozen if entry.reason == EXCLUDED}
    model = problem.model.build()
    widths = {}
    for name, probed in analysis.widths.items():
        offered = {width for width in probed if allowed is None or width in allowed}
        if 8 in probed or (alone and why_special(model, name, QUANTIZABLE) is None):
            offered |= {width for width in allowed or ({8} if alone else ()) if width <= 8}
        chosen = tuple(sorted(offered, reverse=True))
        widths[name] = (float_bits,) if name in fixed or not chosen else chosen
    return widths


def _profile_target(
    job: Job,
    problem: Problem,
    baseline: Baseline,
    analysis: Analysis,
    *,
    staircase: bool = False,
    fresh: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> tuple[Analysis, dict[str, Staircase]]:
    """The analysis with what the target makes of the model: latency shares, widths, and useful channel counts.

    Args:
        job: Decides whether channel counts are probed.
        problem: What it is about.
        baseline: The dense artifact.
        analysis: Of the model.
        staircase: Probe channel counts even where the job has fixed ones.
        fresh: Measure them even where this machine remembers them.
        report: Takes a line for the user.

    Returns:
        The analysis, and the staircases by layer kind; none where nothing was probed.
    """
    analysis = profile(problem, baseline, analysis)
    probes = job.space.prune and job.space.channels == "probe"
    if not probes and not staircase:
        return analysis, {}
    report("measuring at which channel counts the target gets faster (remembered for the next run)")
    found = staircases(problem.target, analysis, baseline.float_bits[""], fresh=fresh)
    return replace(analysis, counts=useful_counts(found)) if probes else analysis, found
