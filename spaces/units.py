"""The strengths that a space lets a search choose, one after the other: a parameter and its levels, mildest first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from paretune.spaces.grid import ratio_of
from paretune.spaces.plan import Sparsification
from paretune.spaces.space import RANK_STEP, SearchSpace

_STEPS = 8
"""Levels into which a continuous strength is cut."""


@dataclass(frozen=True)
class Unit:
    """One thing that can be compressed more or less: a group, a layer, or all channels together.

    Attributes:
        param: Name of the Optuna parameter, without a variant's prefix.
        technique: Section of the plan: prune, quantize, factorize, sparsify or share.
        name: Of the group or layer; empty for a parameter of the whole plan.
        levels: Values of the parameter, mildest first, at least two. The first does nothing, but for a layer that the
            space always quantizes.
    """

    param: str
    technique: str
    name: str
    levels: tuple[float, ...]


def units_of(space: SearchSpace) -> tuple[Unit, ...]:
    """What a space lets a search choose in one architecture, group by group and layer by layer.

    Args:
        space: Of the model, or of one of its variants (`space.variants[name]`).
    """
    return tuple(unit for unit in _all(space) if len(unit.levels) > 1)


def _all(space: SearchSpace) -> Iterator[Unit]:
    options = space.options
    for group, grid in space.grids.items():
        yield Unit(f"prune/{group}", "prune", group, tuple(ratio_of(kept, grid[-1]) for kept in reversed(grid)))
    together = {"global": ("pruning/ratio", options.max_ratio), "threshold": ("pruning/threshold", 1.5)}
    if options.prune and options.scope in together:
        param, most = together[options.scope]
        yield Unit(param, "prune", "", _steps(most))
    for layer, largest in space.ranks.items():
        shares = np.arange(RANK_STEP, largest + RANK_STEP / 2, RANK_STEP)[::-1]
        yield Unit(f"rank/{layer}", "factorize", layer, (1.0, *(float(share) for share in shares if share < 1)))
    for layer in space.sparse:
        blocks = Sparsification(pattern=options.patterns[0]).blocks
        yield Unit(
            f"sparsity/{layer}",
            "sparsify",
            layer,
            _steps(options.max_sparsity) if blocks is None else (0.0, options.max_sparsity),
        )
    for layer in space.shared:
        yield Unit(f"clusters/{layer}", "share", layer, (0.0, *sorted(map(float, options.clusters), reverse=True)))
    for layer, widths in space.widths.items():
        yield Unit(f"bits/{layer}", "quantize", layer, tuple(map(float, widths)))


def _steps(most: float) -> tuple[float, ...]:
    # Six digits, as a plan has them, and rounded down: a rounded third may lie beyond the end of its range.
    return tuple(math.floor(most * step / _STEPS * 1e6 + 1e-3) / 1e6 for step in range(_STEPS + 1))
