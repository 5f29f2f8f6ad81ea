"""How many channels of each group stay under one rule for all, and that cuts grow with the fraction."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paretune.errors import JobError
from paretune.objectives.compress import Context
from paretune.objectives.compress.importance import importance
from paretune.objectives.compress.pruning import prune_channels, resolve_pruning
from paretune.objectives.data import Split, Splits
from paretune.objectives.tasks import Classification
from paretune.spaces.graph import DependencyGraph, Group
from paretune.spaces.grid import kept_of
from paretune.spaces.plan import Importance, Pruning
from tests import nets

GRIDS = {"conv1": [8, 16], "conv2": [8, 16, 24, 32], "fc1": [8, 16, 24, 32]}
FINE = {"conv1": list(range(1, 17)), "conv2": list(range(1, 33)), "fc1": list(range(1, 33))}
CHANNELS = {"conv1": 16, "conv2": 32, "fc1": 32, "fc2": 10}


def context_of(splits: Splits, grids: Mapping[str, Sequence[int]], batches: int = 2) -> Context:
    found = list(splits.train.head(64 * batches).batches(64)) if batches else []
    return Context(splits.validation.head(2).inputs, CHANNELS, Classification(), found, grids=grids)


def kept_in(config: Pruning, grids: Mapping[str, Sequence[int]]) -> dict[str, int]:
    return {name: kept_of(config.ratios.get(name, 0.0), grid[-1]) for name, grid in grids.items()}


def relative_scores(model: nn.Module, name: Importance, context: Context) -> dict[str, Tensor]:
    """Ascending, over each prunable group's mean, but for `lamp`."""
    model = copy.deepcopy(model)
    graph, score = DependencyGraph(model, context.forward), importance(name, model, context)
    found = {}
    for group in graph.groups():
        values = graph.scores(group, score)
        assert values is not None
        if group.name in context.grids:
            found[group.name] = (values if name == "lamp" else values / values.mean()).sort().values
    return found


@pytest.mark.parametrize("grids", [GRIDS, FINE], ids=["steps of 8", "steps of 1"])
@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.5, 0.7])
@pytest.mark.parametrize("name", ["l2", "lamp", "taylor"])
def test_global_ratio_is_met_as_near_as_steps_allow(
    trained: nn.Module, digit_splits: Splits, grids: dict[str, list[int]], ratio: float, name: Importance
) -> None:
    context = context_of(digit_splits, grids)
    found = resolve_pruning(trained, Pruning(ratio=ratio, importance=name), context)
    assert (found.ratio, found.threshold, found.importance) == (None, None, name)
    kept = kept_in(found, grids)
    assert all(kept[group] in grids[group] for group in grids)
    largest_step = 8 if grids is GRIDS else 1
    assert abs(80 - sum(kept.values()) - ratio * 80) <= largest_step / 2
    pruned = prune_channels(copy.deepcopy(trained), found, context)
    assert {group: len(pruned.get_parameter(f"{group}.weight")) for group in grids} == kept


@pytest.mark.parametrize("name", ["l2", "lamp"])
def test_global_ratio_takes_the_least_important_of_the_whole_model(
    trained: nn.Module, digit_splits: Splits, name: Importance
) -> None:
    context = context_of(digit_splits, FINE)
    kept = kept_in(resolve_pruning(trained, Pruning(ratio=0.4, importance=name), context), FINE)
    scores = relative_scores(trained, name, context)
    gone = torch.cat([scores[group][: FINE[group][-1] - count] for group, count in kept.items()])
    stay = torch.cat([scores[group][FINE[group][-1] - count :] for group, count in kept.items()])
    assert len(gone) == 32
    assert float(gone.max()) <= float(stay.min())


def test_no_group_falls_below_its_smallest_count(trained: nn.Module, digit_splits: Splits) -> None:
    context = context_of(digit_splits, GRIDS)
    for config in (Pruning(ratio=0.99), Pruning(threshold=1e6)):
        assert kept_in(resolve_pruning(trained, config, context), GRIDS) == dict.fromkeys(GRIDS, 8)


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0, 1.2])
def test_threshold_takes_what_is_below_it_and_nothing_above(
    trained: nn.Module, digit_splits: Splits, threshold: float
) -> None:
    context = context_of(digit_splits, FINE)
    scores = relative_scores(trained, "l1", context)
    below = {name: int((scores[name] < threshold).sum()) for name in GRIDS}
    fine = kept_in(resolve_pruning(trained, Pruning(threshold=threshold), context), FINE)
    assert fine == {name: max(1, CHANNELS[name] - count) for name, count in below.items()}
    context = context_of(digit_splits, GRIDS)
    coarse = kept_in(resolve_pruning(trained, Pruning(threshold=threshold), context), GRIDS)
    assert all(8 > coarse[name] - fine[name] >= 0 or coarse[name] == 8 for name in GRIDS)


def test_what_is_resolved_stays_and_the_model_isnt_touched(trained: nn.Module, digit_splits: Splits) -> None:
    context = context_of(digit_splits, GRIDS)
    model = copy.deepcopy(trained).train()
    config = Pruning(ratios={"conv1": 0.5}, importance="taylor")
    assert resolve_pruning(model, config, context) is config
    resolve_pruning(model, Pruning(ratio=0.5, importance="taylor"), context, by_sensitivity=True)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in trained.state_dict().items())
    assert resolve_pruning(model, Pruning(ratio=0.5), context_of(digit_splits, {})).ratios == {}


@pytest.mark.parametrize("name", ["l1", "hessian", "apoz"])
def test_fractions_grow_to_the_cut(trained: nn.Module, digit_splits: Splits, name: Importance) -> None:
    """As a trial does it: one model, cut further each time."""
    context = context_of(digit_splits, GRIDS)
    config = Pruning(ratios={"conv1": 0.5, "conv2": 0.25, "fc1": 0.75}, importance=name)
    model, seen = copy.deepcopy(trained), []
    for fraction in (0.1, 0.5, 0.51, 0.9, 1.0):
        model = prune_channels(model, config, context, fraction)
        seen.append([len(model.get_parameter(f"{group}.weight")) for group in GRIDS])
        assert model(context.example).shape == (2, 10)
    for earlier, later in pairwise(seen):
        assert all(less <= more for more, less in zip(earlier, later, strict=True))
    assert seen[0] == [15, 31, 30]
    assert seen[-1] == [8, 24, 8]


def heads_of(model: nn.Module) -> Group:
    return next(
        group for group in DependencyGraph(model, lambda module: module(nets.sequence())).groups() if group.unit > 1
    )


def test_channels_that_go_together_go_when_the_fraction_reaches_all_of_them() -> None:
    """Attention by hand, of 4 heads with 8 channels each."""
    group, model, widths = heads_of(nets.Heads()), nets.Heads(), []
    assert (group.name, group.channels, group.unit) == ("query", 32, 8)
    context = Context(nets.sequence(), {"query": 32}, Classification(), [])
    for fraction in (0.4, 0.5, 0.9, 1.0):
        prune_channels(model, Pruning(ratios={"query": 0.5}), context, fraction)
        widths.append(len(model.get_parameter("query.weight")))
    assert widths == [32, 24, 24, 16]


def test_several_cuts_end_where_one_does() -> None:
    """With the last group of a norm left, any channel of it could go; but the dense net's go eight at a time."""
    x = nets.image()
    cut = Pruning(ratios={"0": 0.9})
    context = Context(x, {"0": 32}, Classification(), [], units={"0": 8})
    widths = []
    for fractions in ((1.0,), (0.7, 0.85, 1.0)):
        model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.GroupNorm(4, 32), nn.Conv2d(32, 4, 3), nn.Flatten())
        for fraction in fractions:
            prune_channels(model, cut, context, fraction)
        widths.append(len(model[0].weight))
    assert widths == [8, 8]


@pytest.mark.parametrize("kind", [nets.Heads, nets.Attention])
def test_the_head_that_matters_least_goes_first(kind: type[nn.Module]) -> None:
    """By its gradients, also in PyTorch's own attention, which has to be taken apart."""
    torch.manual_seed(0)
    model, inputs = kind(), nets.sequence(32)
    group = heads_of(copy.deepcopy(model))
    reader = "project.weight" if kind is nets.Heads else "attention.out_proj.weight"
    columns = slice(group.unit, 2 * group.unit)
    model.get_parameter(reader).data[:, columns] = 0  # what the second head says isn't heard
    with torch.no_grad():
        targets, expected = model(inputs).argmax(1), model(inputs)
    grids = {group.name: list(range(group.unit, group.channels + 1, group.unit))}
    batches = list(Split(inputs, targets).batches(32))
    context = Context(nets.sequence(), {group.name: group.channels}, Classification(), batches, grids=grids)
    config = resolve_pruning(model, Pruning(ratio=0.25, importance="taylor"), context, by_sensitivity=True)
    assert kept_in(config, grids) == {group.name: group.channels - group.unit}
    pruned = prune_channels(model, config, context)
    torch.testing.assert_close(pruned(inputs), expected, atol=1e-5, rtol=1e-5)


def test_unknown_group_is_named(trained: nn.Module, digit_splits: Splits) -> None:
    with pytest.raises(JobError, match=r"must name groups of the model, but got conv3; did you mean 'conv[12]'\?"):
        prune_channels(copy.deepcopy(trained), Pruning(ratios={"conv3": 0.5}), context_of(digit_splits, GRIDS))


class Branches(nn.Module):
    """Two branches of which the second counts for almost nothing, although its weights are as large; (N, 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.vital, self.idle = nn.Linear(12, 64), nn.Linear(12, 64)
        self.vital_head, self.idle_head = nn.Linear(64, 4), nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        idle = self.idle_head(F.relu(self.idle(x)))
        return 10 * self.vital_head(F.relu(self.vital(x))) + 1e-4 * idle


class Counting(Classification):
    """Counts how often the loss is measured."""

    def __init__(self) -> None:
        self.calls = 0

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        return super().loss(outputs, targets)


def test_random_ratios_remove_again_what_was_removed_when_they_were_found(
    trained: nn.Module, digit_splits: Splits
) -> None:
    """A plan is resolved first; what was resolved may be tried again with the same seed."""
    context = context_of(digit_splits, FINE)
    torch.manual_seed(3)
    config = resolve_pruning(trained, Pruning(ratio=0.5, importance="random"), context)
    first = prune_channels(copy.deepcopy(trained), config, context)
    torch.manual_seed(3)
    again = prune_channels(copy.deepcopy(trained), config, context)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())


def test_by_sensitivity_spares_the_group_that_matters() -> None:
    torch.manual_seed(0)
    model, inputs = Branches(), nets.vector(64)
    grids = {"vital": list(range(8, 65, 8)), "idle": list(range(8, 65, 8))}
    with torch.no_grad():
        targets = model(inputs).argmax(1)
    batches = list(Split(inputs, targets).batches(64))
    context = Context(nets.vector(), {"vital": 64, "idle": 64}, Classification(), batches, grids=grids)
    config = Pruning(ratio=0.5, importance="l2")
    plain = kept_in(resolve_pruning(model, config, context), grids)
    fine = kept_in(resolve_pruning(model, config, context, by_sensitivity=True), grids)
    assert sum(fine.values()) == sum(plain.values()) == 64
    assert fine["idle"] < plain["idle"]
    assert fine["vital"] > plain["vital"]


def test_by_sensitivity_takes_bounded_work_and_keeps_the_ratio(trained: nn.Module, digit_splits: Splits) -> None:
    """Also where the grids have many steps."""
    for grids in (GRIDS, FINE):
        task = Counting()
        context = replace(context_of(digit_splits, grids, batches=1), task=task)
        kept = kept_in(resolve_pruning(trained, Pruning(ratio=0.6), context, by_sensitivity=True), grids)
        assert abs(80 - sum(kept.values()) - 48) <= (4 if grids is GRIDS else 0)
        parts = 4  # of the batch of 64
        assert 0 < task.calls <= parts * (3 * len(grids) + 1)
