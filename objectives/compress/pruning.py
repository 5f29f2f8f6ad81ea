"""Structured pruning: which channels go, and how many of each group where the plan gives one rule for all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import ceil, inf, isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from paretune.errors import JobError
from paretune.objectives.compress.importance import importance, in_parts
from paretune.objectives.data.inputs import call
from paretune.objectives.imports import closest
from paretune.spaces.copies import copy_of
from paretune.spaces.graph import DependencyGraph, Forward, prune
from paretune.spaces.grid import kept_of, ratio_of
from paretune.spaces.multihead import open_multihead
from paretune.spaces.plan import COARSE, Pruning

if TYPE_CHECKING:
    from paretune.objectives.compress import Context

_FINE_STEPS = 2
"""Steps of the fine part, times the number of groups."""


def prune_channels(model: nn.Module, config: Pruning, context: Context, fraction: float = 1.0) -> nn.Module:
    """Remove each group's least important channels; in place.

    Args:
        model: The dense model, or one that was cut by the same config to a smaller fraction.
        config: Resolved: only its `ratios` count.
        context: Gives the data that the importance may need. Without batches the last channels go: enough where only
            the shape matters, because weights are loaded afterwards.
        fraction: Share of each group's cut that is reached, in (0, 1]. A larger one never keeps more channels; those
            that must go together go when all of them are reached.

    Raises:
        JobError: A ratio's group isn't one of the model's.
    """
    wanted = {name: ratio for name, ratio in config.ratios.items() if ratio > 0}
    for name in wanted.keys() - context.channels.keys():
        raise JobError("prune.ratios", "must name groups of the model", name, closest(name, context.channels))
    kept = {name: _kept(name, ratio * fraction, context) for name, ratio in wanted.items()}
    if kept:
        open_multihead(model.eval(), context.forward)  # before an importance looks at what would be replaced
        score = importance(config.importance, model, context) if context.batches else None
        prune(model, context.forward, kept, importance=score)
    return model


def _kept(name: str, ratio: float, context: Context) -> int:
    """Channels that stay of a group, in whole units of the dense one: those of one that was cut may be smaller."""
    unit = context.units.get(name, 1)
    return unit * ceil(kept_of(ratio, context.channels[name]) / unit)


def resolve_pruning(model: nn.Module, config: Pruning, context: Context, *, by_sensitivity: bool = False) -> Pruning:
    """Turn a global ratio or a threshold into the ratios of the groups.

    ``ratio`` ranks the steps of all groups' grids by the mean importance of the channels that a step removes, each
    group's importance divided by its mean (`lamp` is compared as it is), and takes the least important ones until the
    share of removed channels is as near as it gets to the one asked for. ``threshold`` takes the channels below it, as
    many as the grid allows without touching one above it. No group falls below its grid's smallest count, so that less
    may go than was asked for.

    Args:
        model: The dense model; it isn't changed.
        config: What to resolve; comes back as it is where it has ratios already.
        context: Gives the grids of the groups, and data for the importance.
        by_sensitivity: Of a global ratio's channels, let importance choose at most the first 70 %. The rest is taken
            step by step from the group whose step raises the loss least per channel: on the context's batches, without
            training; without batches importance chooses all. That takes at most 3 prunings of a copy, and passes over
            the batches, for each group, and one more.

    Returns:
        With ratios alone: the same shape, whatever the weights.
    """
    if config.ratio is None and config.threshold is None:
        return config
    ranking = _ranking(model, config, context)
    grids = context.grids
    if config.threshold is not None:
        kept = {name: _above(scores, config.threshold, grids[name]) for name, scores in ranking.scores.items()}
    else:
        kept = _by_importance(ranking, config.ratio or 0.0, grids)
        if by_sensitivity and context.batches:
            kept = _by_sensitivity(ranking, kept, context)
    ratios = {name: ratio_of(count, grids[name][-1]) for name, count in kept.items() if count < grids[name][-1]}
    return config.model_copy(update={"ratios": ratios, "ratio": None, "threshold": None})


@dataclass(frozen=True)
class _Ranking:
    """Scores of the dense model's channels.

    Attributes:
        model: A copy of the dense model, as the dependency graph left it.
        scores: Prunable group to one score for each channel, shape (channels,).
        raw: The importance's own scores, by the layer where the Torch-Pruning group begins.
        comparable: Whether scores of different groups have the same scale.
    """

    model: nn.Module
    scores: Mapping[str, Tensor]
    raw: Mapping[str, Tensor | None]
    comparable: bool

    def least_first(self, name: str) -> Tensor:
        """A group's scores, ascending, on the scale on which groups are compared."""
        scores = self.scores[name].sort().values
        return scores if self.comparable else scores / scores.mean().clamp_min(torch.finfo(scores.dtype).tiny)

    def pruned(self, forward: Forward, kept: dict[str, int]) -> nn.Module:
        """A copy of the model in eval mode, with so many channels left in each group."""
        model = copy_of(self.model)
        root_name = _root_namer(model)
        prune(model, forward, kept, importance=lambda group: self.raw[root_name(group)])
        return model.eval()


def _root_namer(model: nn.Module) -> Callable[[Any], str]:
    names = {module: name for name, module in model.named_modules()}
    return lambda group: names[group[0].dep.target.module]


def _ranking(model: nn.Module, config: Pruning, context: Context) -> _Ranking:
    dense = copy_of(model)
    graph = DependencyGraph(dense, context.forward)  # may rewrite attentions, and so comes first
    score, root_name = importance(config.importance, dense, context), _root_namer(dense)
    raw: dict[str, Tensor | None] = {}

    def remembered(group: Any) -> Tensor | None:
        return raw.setdefault(root_name(group), score(group))

    found = {group.name: graph.scores(group, remembered) for group in graph.groups() if group.name in context.grids}
    scores = {name: torch.ones(context.channels[name]) if given is None else given for name, given in found.items()}
    return _Ranking(dense, scores, raw, comparable=config.importance == "lamp")


def _above(scores: Tensor, threshold: float, grid: Sequence[int]) -> int:
    """The smallest count of a grid that keeps all channels whose score is at least `threshold` times the mean."""
    wanted = int((scores >= threshold * scores.mean()).sum())
    return next(count for count in grid if count >= wanted)


class _Step(NamedTuple):
    """From one count of a group's grid to a smaller one."""

    group: str
    kept: int
    removed: int
    price: float


def _by_importance(
    ranking: _Ranking, ratio: float, grids: Mapping[str, Sequence[int]], *, at_most: bool = False
) -> dict[str, int]:
    """Channels that stay of each group when about (or at most) `ratio` of all go, the least important steps first."""
    kept = {name: grids[name][-1] for name in ranking.scores}
    # Prices rise along a group's steps, and sorting keeps the order of equal ones: no step comes before its larger one.
    steps = sorted((step for name in kept for step in _steps(name, ranking, grids[name])), key=lambda step: step.price)
    missing = ratio * sum(kept.values())
    for step in steps:
        beyond = step.removed - missing
        if beyond > 0 if at_most else beyond >= missing:
            break
        missing -= step.removed
        kept[step.group] = step.kept
    return kept


def _steps(name: str, ranking: _Ranking, grid: Sequence[int]) -> Iterator[_Step]:
    scores, channels = ranking.least_first(name), grid[-1]
    for larger, kept in zip(reversed(grid), reversed(grid[:-1]), strict=False):
        yield _Step(name, kept, larger - kept, float(scores[channels - larger : channels - kept].mean()))


def _by_sensitivity(ranking: _Ranking, kept: Mapping[str, int], context: Context) -> dict[str, int]:
    """As many channels less as in `kept`, the last of them where the loss rises least.

    A step's price is measured with its group alone cut beyond the coarse part: what several groups cost nearly adds
    up, so that none must be measured again after another one's step.
    """
    stay, total = sum(kept.values()), sum(context.grids[name][-1] for name in kept)
    if stay == total:
        return dict(kept)
    coarse = _by_importance(ranking, COARSE * (1 - stay / total), context.grids, at_most=True)
    chosen = dict(coarse)
    missing = sum(coarse.values()) - stay
    stride = ceil(missing / (_FINE_STEPS * len(kept)))
    losses = dict.fromkeys(kept, _loss(ranking, coarse, context))

    def next_step(name: str) -> _Step | None:
        smaller = [count for count in context.grids[name] if count < chosen[name]]
        if not smaller:
            return None
        count = max((count for count in smaller if chosen[name] - count >= stride), default=smaller[0])
        loss = _loss(ranking, coarse | {name: count}, context)
        rise, losses[name] = loss - losses[name], loss
        return _Step(name, count, chosen[name] - count, rise / (chosen[name] - count) if isfinite(rise) else inf)

    steps = {name: step for name in kept if (step := next_step(name))}
    while missing > 0 and steps:
        step = steps.pop(min(steps, key=lambda name: steps[name].price))
        before = chosen[step.group]
        within = [count for count in context.grids[step.group] if step.kept <= count <= before]
        # The last step is cut short where it would go too far.
        chosen[step.group] = min(within, key=lambda count: abs(before - count - missing))
        missing -= before - chosen[step.group]
        if missing > 0 and chosen[step.group] == step.kept and (following := next_step(step.group)):
            steps[step.group] = following
    return chosen


def _loss(ranking: _Ranking, kept: dict[str, int], context: Context) -> float:
    """The mean loss over the context's batches of a copy that is pruned and not trained."""
    pruned = ranking.pruned(context.forward, kept)
    total = 0.0
    with torch.no_grad():
        for inputs, targets, share in chain.from_iterable(map(in_parts, context.batches)):
            total += share * float(context.task.loss(call(pruned, inputs), targets))
    return total / len(context.batches)
