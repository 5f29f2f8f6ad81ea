"""Where a model has slack: what each technique that the search may choose costs on each layer alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from paretune.objectives.problem import Problem
from paretune.objectives.redundancy import Redundancy, measure_redundancy
from paretune.objectives.sensitivity import (
    Entry,
    Probe,
    Sensitivity,
    affordable_samples,
    profile_sensitivity,
    validation_batches,
)
from paretune.spaces.analysis import Analysis
from paretune.spaces.grid import ratio_of, snap
from paretune.spaces.plan import CompressionPlan, Factorization, Pruning, Quantization, Sharing, Sparsification
from paretune.spaces.space import Options, SearchSpace

LEVELS = (
    (0.01, "less than 1%", "#58b999"),
    (0.05, "less than 5%", "#b9d98c"),
    (0.2, "less than 20%", "#f0e442"),
    (0.5, "less than 50%", "#f2a65a"),
    (inf, "50% or more", "#e8794a"),
)
"""Share of what the dense model knows that is lost (`Sensitivity.share_lost`): upper bound, in words, colour from green
to red. These are Okabe and Ito's hues, which the colour-blind can tell apart, light enough for dark text."""

LEGEND = "share of what the dense model knows that is lost:"

INK = "#1f2933"

_RATIO, _RANK, _SPARSITY = 0.5, 0.25, 0.75

_REDUNDANCY_SAMPLES = 128

_WIDE = 1000
"""Characters of a terminal in which no number would be cut short; a table takes what it needs."""

Column = tuple[str, str]
"""Technique and setting."""


@dataclass(frozen=True)
class Slack:
    """What `paretune check --profile` finds out about the layers.

    Attributes:
        sensitivity: What compressing each layer or group alone costs.
        redundancy: Of each layer, in the order of execution.
    """

    sensitivity: Sensitivity
    redundancy: tuple[Redundancy, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return {
            "sensitivity": self.sensitivity.to_dict(),
            "redundancy": [layer.to_dict() for layer in self.redundancy],
        }

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        """Of the heat map, in the order of the probes."""
        return tuple(dict.fromkeys((entry.technique, entry.setting) for entry in self.sensitivity.entries))

    @cached_property
    def rows(self) -> tuple[str, ...]:
        """Of the heat map: layers in the order of execution; a group stands in the row of its first layer."""
        tried = {entry.name for entry in self.sensitivity.entries}
        layers = [layer.layer for layer in self.redundancy]
        return tuple(name for name in dict.fromkeys([*layers, *tried]) if name in tried)

    @cached_property
    def cells(self) -> Mapping[tuple[str, Column], Entry]:
        """Row and column to what was found there; missing where the technique can't be chosen for the layer."""
        return {(entry.name, (entry.technique, entry.setting)): entry for entry in self.sensitivity.entries}

    def level(self, entry: Entry) -> int | None:
        """Place in `LEVELS` of an entry; None where it has no number."""
        if entry.loss_increase is None:
            return None
        lost = self.sensitivity.share_lost(entry.loss_increase)
        return next(place for place, (bound, _, _) in enumerate(LEVELS) if lost < bound)


def find_slack(
    problem: Problem, analysis: Analysis, space: SearchSpace, report: Callable[[str], None] = lambda line: None
) -> Slack:
    """Look at the redundancy of each layer, and try every technique of the space on each alone, without training.

    Args:
        problem: What it is about.
        analysis: Of the model.
        space: What the search may choose; variants aren't looked at.
        report: Takes a line for the user.
    """
    probes = probes_of(space, problem.grids if space.options.prune and not space.grids else {})
    samples = affordable_samples(analysis.macs, len(probes))
    report(f"looking for slack: {len(probes)} times one layer or group compressed alone, untrained")
    with problem.device().shared():
        context = problem.context(validation_batches(problem, min(samples, _REDUNDANCY_SAMPLES)))
        names = [layer.name for layer in analysis.layers]
        redundancy = measure_redundancy(problem.model.build(), names, context, method=space.options.methods[0])
    return Slack(profile_sensitivity(problem, probes, samples=samples, report=report), redundancy)


def probes_of(space: SearchSpace, grids: Mapping[str, Sequence[int]] | None = None) -> list[Probe]:
    """Each technique on each layer or group alone, as the first choices of the space have it.

    Half of a group's channels go; layers are quantized to each width of 8 bits or less, factorized to a quarter of
    their rank by each method, made sparse to 75 % in each pattern, and get the smallest codebook. What the space
    wouldn't choose (a rank at which nothing is saved) isn't tried.

    Args:
        space: The search's.
        grids: Group to its channel counts, where the space ranks all channels together and so has no grids.
    """
    return [*_pruned({**space.grids, **(grids or {})}, space), *_quantized(space), *_factorized(space), *_zeroed(space)]


def probe_of(options: Options, technique: str, name: str, value: float, setting: str = "") -> Probe:
    """A technique on one layer or group alone, as the first choices of a space have it.

    Args:
        options: Of the space.
        technique: Section of the plan.
        name: Of the layer or group.
        value: How strongly, as the plan has it. Sparse weights in a pattern of blocks have the pattern's share instead.
        setting: The same in words; by default the value.
    """
    blocks = Sparsification(pattern=options.patterns[0]).blocks
    if technique == "sparsify" and blocks is not None:
        value = round(1 - blocks[0] / blocks[1], 6)
    plan = CompressionPlan(**{technique: _SECTIONS[technique](options, name, value)})
    return Probe(technique, name, setting or f"{value:g}", value, plan)


_SECTIONS: Mapping[str, Callable[[Options, str, float], Any]] = {
    "prune": lambda options, name, value: Pruning(ratios={name: value}, importance=options.importance[0]),
    "quantize": lambda options, name, value: Quantization(
        bits={name: int(value)},
        observer=options.observers[0],
        activations=options.activations[0],
        granularity=options.granularity[0],
        affine=options.affine[0] and options.activations[0] == "float",
    ),
    "factorize": lambda options, name, value: Factorization(ranks={name: value}, method=options.methods[0]),
    "sparsify": lambda options, name, value: Sparsification(sparsity={name: value}, pattern=options.patterns[0]),
    "share": lambda options, name, value: Sharing(clusters={name: int(value)}),
}
"""Field of a plan to what does it to one layer or group."""


def _pruned(grids: Mapping[str, Sequence[int]], space: SearchSpace) -> Iterator[Probe]:
    ratio = min(_RATIO, space.options.max_ratio)
    for group, grid in grids.items() if space.options.prune else ():
        value = ratio_of(snap(ratio, list(grid)), grid[-1])
        yield probe_of(space.options, "prune", group, value, f"about {ratio:.0%}")


def _quantized(space: SearchSpace) -> Iterator[Probe]:
    for width in sorted({width for widths in space.widths.values() for width in widths if width <= 8}, reverse=True):
        for layer in [layer for layer, widths in space.widths.items() if width in widths]:
            yield probe_of(space.options, "quantize", layer, width, f"{width} bits")


def _factorized(space: SearchSpace) -> Iterator[Probe]:
    for method in space.options.methods:
        options = replace(space.options, methods=(method,))
        for layer in [layer for layer, largest in space.ranks.items() if largest > _RANK]:
            yield probe_of(options, "factorize", layer, _RANK, f"{method}, {_RANK:.0%}")


def _zeroed(space: SearchSpace) -> Iterator[Probe]:
    """Sparse weights, and shared ones."""
    share = min(_SPARSITY, space.options.max_sparsity)
    for pattern in space.options.patterns:
        options = replace(space.options, patterns=(pattern,))
        setting = f"{share:.0%}" if pattern == "unstructured" else pattern
        for layer in [name for name in space.sparse if pattern not in space.narrow.get(name, ())]:
            yield probe_of(options, "sparsify", layer, share, setting)
    for layer in space.shared:
        clusters = min(space.options.clusters)
        yield probe_of(space.options, "share", layer, clusters, f"{clusters} values")


def most_slack(analysis: Analysis, slack: Slack) -> str:
    """One sentence: of each technique, where it costs the least loss for the share of the latency that it touches.

    Increases below the first of `LEVELS` count alike. Where the runtime reports no layer's time, parameters stand in.
    """
    measured = any(analysis.latency_share.values())
    unit = "latency" if measured else "parameters"
    best: dict[str, tuple[float, str]] = {}
    for entry in slack.sensitivity.entries:
        share = _share(analysis, entry, of_latency=measured)
        if entry.loss_increase is None or slack.level(entry) == len(LEVELS) - 1 or share <= 0:
            continue
        price = max(slack.sensitivity.share_lost(entry.loss_increase), LEVELS[0][0]) / share
        if entry.technique not in best or price < best[entry.technique][0]:
            change = f"loss {signed(entry.loss_increase)}, {share:.0%} of the {unit}"
            best[entry.technique] = price, f"{entry.technique} {entry.name}, {entry.setting} ({change})"
    if not best:
        return "most slack: none; whatever is compressed alone, untrained half of what the model knows is lost"
    return f"most slack: {'; '.join(text for _, text in sorted(best.values()))}"


def _share(analysis: Analysis, entry: Entry, *, of_latency: bool) -> float:
    """What an entry touches: its layer's share, or that of all layers of its group."""
    params = {layer.name: layer.params / analysis.params for layer in analysis.layers}
    shares = analysis.latency_share if of_latency else params
    members = {group.name: group.layers for group in analysis.groups} if entry.technique == "prune" else {}
    return sum(shares.get(layer, 0.0) for layer in members.get(entry.name, (entry.name,)))


def print_slack(analysis: Analysis, slack: Slack) -> None:
    """Print what the layers seem not to need, the heat map, and where most slack is."""
    console = Console(soft_wrap=True, highlight=False)
    console.print(_redundancy_table(analysis, slack))
    sensitivity = slack.sensitivity
    if not sensitivity.entries:
        console.print("nothing can be tried on a layer alone")
        return
    Console(soft_wrap=True, highlight=False, width=max(console.width, _WIDE)).print(_heat_table(slack))
    if console.color_system and not console.no_color:
        colours = [(f" {words} ", f"{INK} on {colour}") for _, words, colour in LEVELS]
        console.print(Text.assemble(f"{LEGEND} ", *colours))
    for entry in sensitivity.entries:
        if entry.reason:
            console.print(f"x {entry.technique} {entry.name}, {entry.setting}: {entry.reason}", markup=False)
    console.print(most_slack(analysis, slack), markup=False)


def _redundancy_table(analysis: Analysis, slack: Slack) -> Table:
    table = Table(title="how redundant each layer is")
    table.add_column("layer", overflow="fold")
    for column in ("latency share", "parameters", "similarity of filters", "zero activations", "rank for 90% energy"):
        table.add_column(column, justify="right")
    params = {layer.name: layer.params for layer in analysis.layers}
    for layer in slack.redundancy:
        share = analysis.latency_share.get(layer.layer)
        table.add_row(
            layer.layer,
            _percent(share),
            f"{params[layer.layer]:,}",
            "-" if layer.similarity is None else f"{layer.similarity:.2f}",
            _percent(layer.zeros),
            _percent(layer.rank),
        )
    return table


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _heat_table(slack: Slack) -> Table:
    dense = slack.sensitivity
    table = Table(
        title="where is the slack? what one layer or group compressed alone adds to the loss, untrained "
        f"(dense: loss {dense.loss:.3f}, metric {dense.metric:.4f} on {dense.samples} validation samples)"
    )
    table.add_column("layer or group", overflow="fold", max_width=32)
    for technique, setting in slack.columns:
        table.add_column(f"{technique}\n{setting}", justify="right")
    for row in slack.rows:
        table.add_row(row, *(_cell(slack, slack.cells.get((row, column))) for column in slack.columns))
    return table


def signed(value: float) -> str:
    """A change with three digits and its sign, where any of them is left."""
    return f"{value:+.3f}" if abs(value) >= 0.0005 else "0.000"


def _cell(slack: Slack, entry: Entry | None) -> Text:
    if entry is None:
        return Text("")
    level = slack.level(entry)
    if entry.loss_increase is None or level is None:
        return Text("x")
    return Text(signed(entry.loss_increase), style=f"{INK} on {LEVELS[level][2]}")
