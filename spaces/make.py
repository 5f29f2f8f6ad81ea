"""The search space over a model: which channel counts and widths its layers are offered."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from paretune.spaces.analysis import Analysis
from paretune.spaces.graph import Group
from paretune.spaces.grid import channel_grid
from paretune.spaces.space import Options, SearchSpace


def make_space(analysis: Analysis, widths: Mapping[str, Sequence[int]], options: Options) -> SearchSpace:
    """The space over a model, without ranks, zeros and codebooks.

    Args:
        analysis: Of the model.
        widths: Layer to the bit-widths that it may have, widest first; empty to quantize nothing.
        options: What the job allows.
    """
    kinds = {layer.name: layer.kind for layer in analysis.layers}
    grids: dict[str, list[int]] = {}
    offered = {name: tuple(values) for name, values in widths.items()}
    for group in analysis.groups if options.prune and options.scope == "layer" else ():
        counts = analysis.counts.get(kinds.get(group.name, ""))
        grid = channel_grid(group.channels, max_ratio=options.max_ratio, counts=counts, unit=group.unit)
        for name, width, each in _fed_in_blocks(group, analysis, offered, options):
            whole = [kept for kept in grid if (group.channels - kept) * each % options.multiples[width] == 0]
            if len(whole) > 2:
                grid = whole
            else:  # too few: better give up the width than the pruning
                rest = tuple(other for other in offered[name] if other != width)
                offered[name] = rest or analysis.widths[name][:1]
        grids[group.name] = grid
    return SearchSpace(grids, offered, options)


def _fed_in_blocks(
    group: Group, analysis: Analysis, offered: Mapping[str, Sequence[int]], options: Options
) -> Iterator[tuple[str, int, int]]:
    """(layer, width, inputs for each channel) for the group's readers that a width takes in blocks of inputs alone."""
    inputs = {layer.name: layer.inputs for layer in analysis.layers}
    for name in group.consumers:
        for width in options.multiples.keys() & set(offered.get(name, ())):
            # Behind a flatten, each channel gives several inputs.
            yield name, width, max(1, inputs.get(name, 0) // group.channels)
