"""Channels that go in units: groups of norms and of convolutions, in line with each other and not."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paretune.spaces.analysis import analyse
from paretune.spaces.graph import DependencyGraph, prune
from tests import nets


class ResNeXt(nn.Module):
    """A stem and a block with a shortcut (Xie et al., 2017, arXiv:1611.05431)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32)
        self.conv2, self.bn2 = nn.Conv2d(32, 32, 3, padding=1, groups=8, bias=False), nn.BatchNorm2d(32)
        self.conv3, self.bn3 = nn.Conv2d(32, 16, 1, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.head(F.relu(self.bn3(self.conv3(y)) + x).mean((2, 3)))


class Widening(nn.Module):
    """A grouped convolution with more outputs than inputs, then a norm whose groups are two of its."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.wide = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 32, 3, groups=8)
        self.norm = nn.GroupNorm(4, 32)
        self.last, self.head = nn.Conv2d(32, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.wide(F.relu(self.first(x)))))
        return self.head(F.relu(self.last(x)).mean((2, 3)))


class Normed(nn.Module):
    """A shortcut between two norms, and their features concatenated with others before a third."""

    def __init__(self, groups: int = 6) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.second, self.norm2 = nn.Conv2d(16, 16, 3, padding=1), nn.GroupNorm(2, 16)
        self.other, self.norm3 = nn.Conv2d(3, 32, 1), nn.GroupNorm(groups, 48)
        self.last, self.head = nn.Conv2d(48, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.first(x)))
        y = F.relu(self.norm2(self.second(y)) + y)
        y = F.relu(self.norm3(torch.cat([self.other(x), y], 1)))
        return self.head(F.relu(self.last(y)).mean((2, 3)))


class Each(nn.Module):
    """A norm of each channel by itself, written as a group norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 32, 3), nn.GroupNorm(32, 32)
        self.last, self.head = nn.Conv2d(32, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.last(self.norm(self.first(x)).relu())).mean((2, 3)))


class Multiplied(nn.Module):
    """A depthwise convolution that makes two channels of each, flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 32, 4, stride=4, groups=16)
        self.hidden, self.head = nn.Linear(128, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(F.relu(self.twice(F.relu(self.first(x)))).flatten(1))))


class Transposed(nn.Module):
    """A transposed convolution in groups."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up = nn.Conv2d(3, 16, 1), nn.ConvTranspose2d(16, 16, 2, 2, groups=4)
        self.last, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.last(F.relu(self.up(F.relu(self.first(x)))))).mean((2, 3)))


class Reduced(nn.Module):
    """As many outputs as groups, from twice as many inputs: Torch-Pruning takes it for a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.reduce = nn.Conv2d(3, 32, 1), nn.Conv2d(32, 16, 3, groups=16)
        self.last, self.head = nn.Conv2d(16, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.last(F.relu(self.reduce(F.relu(self.first(x)))))).mean((2, 3)))


class Ghost(nn.Module):
    """Half of the features are cheap ones of the others (Han et al., 2020, arXiv:1911.11907)."""

    def __init__(self) -> None:
        super().__init__()
        self.primary, self.cheap = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.last, self.head = nn.Conv2d(32, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.primary(x))
        x = F.relu(self.depthwise(torch.cat([x, F.relu(self.cheap(x))], 1)))
        return self.head(F.relu(self.last(x)).mean((2, 3)))


class Joined(nn.Module):
    """Two branches, concatenated, to which a third is added."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.whole = nn.Conv2d(3, 32, 1), nn.Conv2d(3, 16, 1), nn.Conv2d(3, 48, 1)
        self.last, self.head = nn.Conv2d(48, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.left(x), self.right(x)], 1) + self.whole(x)
        return self.head(F.relu(self.last(F.relu(y))).mean((2, 3)))


class Overlapping(nn.Module):
    """A branch is added to a part of another one's channels, whose rest goes elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.whole = nn.Conv2d(3, 16, 1), nn.Conv2d(3, 32, 1)
        self.last, self.head = nn.Conv2d(32, 16, 1), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.part(x))
        first, second = self.whole(x).split(16, 1)
        return self.head(F.relu(self.last(torch.cat([first + y, second], 1))).mean((2, 3)))


class Case(NamedTuple):
    """A net with channels that go in units.

    Attributes:
        model: Its class.
        group: Its group, with channels and unit.
        inputs: What no layer may read when the group's first unit is gone: the columns of each layer.
        widths: Output channels of layers then.
    """

    model: type[nn.Module]
    group: tuple[str, int, int]
    inputs: Mapping[str, slice | list[int]]
    widths: Mapping[str, int]


CASES = [
    Case(ResNeXt, ("conv1", 32, 4), {"conv3": slice(4)}, {"conv1": 28, "conv2": 28}),
    Case(Widening, ("first", 16, 4), {"last": slice(8)}, {"first": 12, "wide": 24}),
    Case(
        Normed,
        ("first", 16, 8),
        {"second": slice(8), "last": slice(32, 40)},
        {"first": 8, "second": 8, "norm1": 8, "norm3": 40},
    ),
    Case(Normed, ("other", 32, 8), {"last": slice(8)}, {"other": 24, "norm3": 40}),
    Case(Each, ("first", 32, 1), {"last": slice(1)}, {"first": 31, "norm": 31}),
    Case(
        Ghost,
        ("primary", 16, 1),
        {"last": [0, 16]},
        {"primary": 15, "cheap": 15, "depthwise": 30},
    ),
    Case(
        Joined,
        ("left", 32, 2),
        {"last": [0, 1, 32]},
        {"left": 30, "right": 15, "whole": 45},
    ),
    Case(Multiplied, ("first", 16, 1), {"hidden": slice(8)}, {"first": 15, "twice": 30}),
]
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.model.__name__}-{case.group[0]}")


def build(kind: type[nn.Module], **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nets.wake_norms(kind(**options)).eval()
    for module in model.modules():
        if isinstance(module, nn.GroupNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model


def forward(model: nn.Module) -> Any:
    return model(nets.image())


@EACH
def test_units_are_found(case: Case) -> None:
    groups = {group.name: group for group in analyse(build(case.model), forward).groups}
    name, channels, unit = case.group
    assert (groups[name].channels, groups[name].unit) == (channels, unit)


@EACH
def test_a_removed_unit_equals_a_silent_one(case: Case) -> None:
    model, (name, channels, unit) = build(case.model), case.group
    masked = copy.deepcopy(model)
    for layer, columns in case.inputs.items():
        masked.get_parameter(f"{layer}.weight").data[:, columns] = 0
    assert not torch.allclose(forward(masked), forward(model), atol=1e-4), "the unit mattered"
    prune(model, forward, {name: channels - unit}, importance=lambda group: torch.arange(float(len(group[0].idxs))))
    torch.testing.assert_close(forward(model), forward(masked), atol=1e-5, rtol=1e-4)
    assert {layer: len(model.get_parameter(f"{layer}.weight")) for layer in case.widths} == case.widths
    forward(model.train()).sum().backward()


@pytest.mark.parametrize(
    ("model", "layer", "reason"),
    [
        pytest.param(
            build(Normed, groups=4),
            "first",
            "norm3 normalises in groups (num_groups=4)",
            id="a norm's group across two branches",
        ),
        pytest.param(build(Transposed), "first", "up is a grouped convolution (groups=4)", id="transposed"),
        pytest.param(build(Overlapping), "part", "can't be matched", id="a part of another's channels"),
        pytest.param(build(Reduced), "first", "reduce is a grouped convolution (groups=16)", id="reducing"),
    ],
)
def test_groups_that_dont_line_up_freeze(model: nn.Module, layer: str, reason: str) -> None:
    frozen = {entry.layer: entry.reason for entry in analyse(model, forward).frozen}
    assert reason in frozen[layer]


def test_units_go_whole() -> None:
    graph = DependencyGraph(build(ResNeXt), forward)
    group = next(group for group in graph.groups() if group.name == "conv1")
    with pytest.raises(ValueError, match="4 at a time"):
        graph.remove(group, [0, 1, 2, 3, 4])


def test_channels_of_a_unit_share_their_mean_score() -> None:
    graph = DependencyGraph(build(ResNeXt), forward)
    group = next(group for group in graph.groups() if group.name == "conv1")
    asked = []

    def importance(raw: Any) -> Tensor:
        asked.append(raw[0].dep.target.module.groups)
        return torch.arange(32.0) * (10 if asked[-1] > 1 else 0)

    scores = graph.scores(group, importance)
    assert sorted(asked) == [1, 8], "the layers before and behind the convolution's groups are asked for"
    expected = (torch.arange(32) // 4 * 4 + 1.5) * 10 / 2
    torch.testing.assert_close(scores, expected)
