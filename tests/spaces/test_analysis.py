"""Groups, frozen layers and their reasons, counts, and pruning itself, on nets that are hard in different ways."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from paretune.objectives.data.inputs import Inputs, call
from paretune.spaces.analysis import Analysis, analyse, why_broken
from paretune.spaces.graph import execution_order, prune
from paretune.spaces.multihead import HeadAttention
from tests import nets


class Case(NamedTuple):
    """What is expected of a net.

    Attributes:
        model: Its class.
        inputs: A batch of two.
        groups: The first layer of each prunable group: channels, coupled layers, consumers.
        frozen: Layer to a part of the reason.
        mixing: Groups whose channels meet in a norm, so that a removed channel isn't the same as a silent one.
        units: Groups whose channels go several at a time, and how many.
    """

    model: type[nn.Module]
    inputs: Inputs
    groups: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]]
    frozen: dict[str, str]
    mixing: tuple[str, ...] = ()
    units: Mapping[str, int] = MappingProxyType({})


OUTPUT = "it is the output layer"
POSITION = "the model doesn't treat its channels alike"
SHARED = "layers that share a weight would lose different channels of it"
CASES = [
    Case(
        nets.PlainCNN,
        nets.image(2, 1),
        {"conv1": (16, (), ("conv2",)), "conv2": (32, (), ("fc1",)), "fc1": (32, (), ("fc2",))},
        {"fc2": OUTPUT},
    ),
    Case(
        nets.Residual,
        nets.image(),
        {
            "stem": (16, ("outer1",), ("inner1", "inner2", "shortcut")),
            "inner1": (16, (), ("outer1",)),
            "inner2": (32, (), ("outer2",)),
            "outer2": (32, ("shortcut",), ("head",)),
        },
        {"head": OUTPUT},
    ),
    Case(
        nets.Depthwise,
        nets.image(),
        {"expand": (32, ("depthwise",), ("project",)), "project": (16, (), ("head",))},
        {"head": OUTPUT},
    ),
    Case(
        nets.Dense,
        nets.image(),
        {
            "stem": (16, (), ("grow1", "grow2", "head")),
            "grow1": (24, (), ("grow2", "head")),
            "grow2": (16, (), ("head",)),
        },
        {"head": OUTPUT},
    ),
    Case(
        nets.Chunk,
        nets.image(),
        {"stem": (16, (), ("wide",))},
        {"wide": "its channels go together with others of the same layer", "head": OUTPUT},
    ),
    Case(
        nets.SplitConcat,
        nets.image(),
        {"last": (16, (), ("head",))},
        {"wide": "can't be matched", "middle": "can't be matched", "head": OUTPUT},
    ),
    Case(
        nets.FixedView,
        nets.image(),
        {"first": (16, (), ("second",))},
        {"second": "pruning it breaks `return self.head(x.view(len(x), 32, -1).mean(2))` (nets.py:", "head": OUTPUT},
    ),
    Case(
        nets.Grouped,
        nets.image(),
        {"first": (16, ("grouped",), ("last",)), "last": (16, (), ("head",))},
        {"head": OUTPUT},
        units={"first": 4},
    ),
    Case(
        nets.MLP,
        nets.vector(),
        {"first": (32, (), ("narrow",))},
        {"narrow": "it is too narrow (6 channels", "head": OUTPUT},
    ),
    Case(
        nets.Signal,
        torch.randn(2, 2, 20, generator=torch.Generator().manual_seed(0)),
        {"conv1": (16, (), ("conv2",)), "conv2": (24, (), ("head",))},
        {"head": OUTPUT},
    ),
    Case(
        nets.TwoInputs,
        nets.image_and_numbers(),
        {"conv": (16, (), ("head",)), "table": (16, (), ("head",))},
        {"head": OUTPUT},
    ),
    Case(
        nets.TokenEncoder,
        nets.tokens(),
        {"up": (32, (), ("down",)), "down": (16, (), ("up", "head"))},
        {"head": OUTPUT},
        mixing=("down",),
    ),
    Case(nets.Unused, nets.vector(), {"body": (16, (), ("head",))}, {"head": OUTPUT}),
    Case(nets.Twice, nets.vector(), {"first": (16, ("again",), ("head",))}, {"head": OUTPUT}),
    Case(
        nets.Transformer,
        nets.sequence(),
        {
            "project": (16, ("encoder.linear2",), ("encoder.self_attn", "encoder.linear1", "head")),
            "encoder.self_attn": (16, (), ("encoder.self_attn",)),
            "encoder.linear1": (32, (), ("encoder.linear2",)),
        },
        {"head": OUTPUT},
        mixing=("project",),
        units={"encoder.self_attn": 4},
    ),
    Case(
        nets.Attention,
        nets.sequence(),
        {"project": (16, (), ("attention",)), "attention": (16, (), ("attention",))},
        {"head": OUTPUT},
        units={"attention": 4},
    ),
    Case(
        nets.Recurrent,
        nets.sequence(),
        {"hidden": (32, (), ("head",))},
        {"project": "pass lstm, whose kind (LSTM)", "head": OUTPUT},
    ),
    Case(
        nets.FixedBatch,
        nets.vector(),
        {},
        {"first": "pruning it breaks `return self.head(F.relu(self.first(x)).view(2, 4, 4)", "head": OUTPUT},
    ),
    Case(nets.Shuffle, nets.image(), {"last": (16, (), ("head",))}, {"first": POSITION, "head": OUTPUT}),
    Case(
        nets.Heads,
        nets.sequence(),
        {
            "stem": (32, (), ("query", "key", "value")),
            "query": (32, ("key", "value"), ("project",)),
            "project": (16, (), ("head",)),
        },
        {"head": OUTPUT},
        units={"query": 8},
    ),
    Case(
        nets.Attentive,
        nets.image(),
        {
            "first": (32, ("excite",), ("squeeze", "last")),
            "squeeze": (16, (), ("excite",)),
            "last": (16, (), ("head",)),
        },
        {"head": OUTPUT},
        mixing=("first",),
    ),
    Case(
        nets.GroupNormed,
        nets.image(),
        {"first": (32, (), ("last",)), "last": (16, (), ("head",))},
        {"head": OUTPUT},
        units={"first": 8},
    ),
    Case(
        nets.TiedLayers,
        nets.vector(),
        {"last": (16, (), ("head",))},
        {"first": SHARED, "one": SHARED, "two": SHARED, "head": OUTPUT},
    ),
]
EACH = pytest.mark.parametrize("case", [pytest.param(case, id=case.model.__name__) for case in CASES])


def build(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return nets.wake_norms(case.model()).eval()


def forward_of(case: Case) -> Any:
    return lambda model: call(model, case.inputs)


def analysed(case: Case, **options: Any) -> Analysis:
    return analyse(build(case), forward_of(case), **options)


def silence(model: nn.Module, layers: tuple[str, ...], channels: Tensor) -> None:
    """Make output channels of layers, and of the batch norm that follows each, zero for every input."""
    for name in (*layers, *(name.replace("conv", "bn") for name in layers if "bn" in name.replace("conv", "bn"))):
        module: Any = dict(model.named_modules()).get(name)
        if isinstance(module, nn.MultiheadAttention):
            module.in_proj_weight.data[2 * module.embed_dim + channels] = 0  # values
            module.in_proj_bias.data[2 * module.embed_dim + channels] = 0
        elif module is not None:
            module.weight.data[channels] = 0
            if module.bias is not None:
                module.bias.data[channels] = 0


def width(model: nn.Module, layer: str) -> int:
    """Channels that a layer makes."""
    module: Any = model.get_submodule(layer)
    return len(module.query.weight if isinstance(module, HeadAttention) else module.weight)


@EACH
def test_groups_and_reasons(case: Case) -> None:
    analysis = analysed(case)
    found = {group.name: (group.channels, group.layers[1:], group.consumers) for group in analysis.groups}
    assert found == case.groups
    assert {group.name: group.unit for group in analysis.groups if group.unit > 1} == case.units
    assert [group.layers[0] for group in analysis.groups] == list(case.groups), "in the order of execution"
    assert {entry.layer for entry in analysis.frozen} == case.frozen.keys()
    for entry in analysis.frozen:
        assert case.frozen[entry.layer] in entry.reason


@EACH
def test_every_called_layer_is_prunable_or_frozen(case: Case) -> None:
    analysis = analysed(case)
    called = list(execution_order(build(case), forward_of(case)))
    assert [layer.name for layer in analysis.layers] == called
    owner = {name: group.name for group in analysis.groups for name in group.layers if name in called}
    assert {layer.name: layer.group for layer in analysis.layers} == {name: owner.get(name) for name in called}
    assert sorted([*owner, *(entry.layer for entry in analysis.frozen)]) == sorted(called)


@EACH
def test_analysing_leaves_the_model_alone(case: Case) -> None:
    model = build(case).train()
    before = copy.deepcopy(model.state_dict())
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    analyse(model, forward_of(case))
    assert model.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert hooks == [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    assert model.state_dict().keys() == before.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@EACH
def test_half_of_everything(case: Case) -> None:
    model, forward = build(case), forward_of(case)
    kept = {name: channels // 2 for name, (channels, _, _) in case.groups.items()}
    shape = forward(model).shape
    prune(model, forward, kept)
    for name, (_, coupled, _) in case.groups.items():
        for layer in (name, *coupled):
            assert width(model, layer) == kept[name], layer
    for name in case.frozen:
        assert width(model, name) == width(build(case), name)
    output = forward(model.train())
    assert output.shape == shape
    output.sum().backward()
    for name in execution_order(model, forward):
        assert model.get_submodule(name).weight.grad is not None  # type: ignore[union-attr]


SOUND = [
    pytest.param(case, name, id=f"{case.model.__name__}-{name}")
    for case in CASES
    for name in case.groups
    if name not in case.mixing
]


@pytest.mark.parametrize(("case", "name"), SOUND)
def test_removing_silent_channels_changes_nothing(case: Case, name: str) -> None:
    """Pruning equals masking: also behind concatenations, flattening, additions and depthwise convolutions."""
    channels, coupled, _ = case.groups[name]
    forward = forward_of(case)
    units = torch.arange(channels).view(-1, case.units.get(name, 1))
    order = torch.randperm(len(units), generator=torch.Generator().manual_seed(1))
    gone = units[order[: len(units) - 8 // units.shape[1]]].flatten()
    scores = torch.ones(channels)
    scores[gone] = 0
    masked = build(case)
    untouched = forward(masked).detach()
    silence(masked, (name, *coupled), gone)
    pruned = copy.deepcopy(masked)
    prune(pruned, forward, {name: 8}, importance=lambda _: scores)
    with torch.no_grad():
        expected = forward(masked)
        torch.testing.assert_close(forward(pruned), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(untouched, expected, atol=1e-4), "the channels mattered"


def test_all_groups_at_once_equal_masking() -> None:
    case = CASES[1]
    forward = forward_of(case)
    masked = build(case)
    scores = {}
    for name, (channels, coupled, _) in case.groups.items():
        gone = torch.randperm(channels, generator=torch.Generator().manual_seed(channels))[: channels - 8]
        silence(masked, (name, *coupled), gone)
        scores[masked.get_submodule(name)] = torch.ones(channels).index_fill(0, gone, 0)
    pruned = copy.deepcopy(masked)
    scores = {pruned.get_submodule(name): scores[masked.get_submodule(name)] for name in case.groups}
    prune(pruned, forward, dict.fromkeys(case.groups, 8), importance=lambda raw: scores[raw[0].dep.target.module])
    with torch.no_grad():
        torch.testing.assert_close(forward(pruned), forward(masked), atol=1e-5, rtol=1e-5)


def test_without_importance_the_last_channels_go() -> None:
    case = CASES[8]
    model, dense = build(case), build(case)
    prune(model, forward_of(case), {"first": 8})
    assert torch.equal(model.get_parameter("first.weight"), dense.get_parameter("first.weight")[:8])
    assert torch.equal(model.get_parameter("narrow.weight"), dense.get_parameter("narrow.weight")[:, :8])


@pytest.mark.parametrize("case", [case for case in CASES if case.units], ids=lambda case: case.model.__name__)
def test_cutting_twice_and_at_once_give_one_shape(case: Case) -> None:
    """Artifacts are replayed in one cut, without data, whatever the steps were."""
    stepwise, replayed, forward = build(case), build(case), forward_of(case)
    quarter = {name: max(channels // 4, case.units.get(name, 1)) for name, (channels, _, _) in case.groups.items()}

    def importance(group: Any) -> Tensor:
        return torch.rand(len(group[0].idxs), generator=torch.Generator().manual_seed(0))

    prune(stepwise, forward, {name: channels // 2 for name, (channels, _, _) in case.groups.items()})
    prune(stepwise, forward, quarter, importance=importance)
    prune(replayed, forward, quarter)
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (stepwise, replayed)]
    assert shapes[0] == shapes[1]
    assert {name: width(replayed, name) for name in case.groups} == quarter
    replayed.load_state_dict(stepwise.state_dict())
    assert torch.equal(forward(replayed), forward(stepwise))


def test_a_part_of_a_unit_stays_whole() -> None:
    case = CASES[7]
    model = build(case)
    prune(model, forward_of(case), {"first": 5})
    grouped: Any = model.get_submodule("grouped")
    assert (grouped.groups, grouped.in_channels, grouped.out_channels) == (2, 8, 8)


def test_a_shared_weight_stays_shared() -> None:
    model, forward = nets.TiedEmbedding().eval(), lambda model: call(model, nets.tokens())
    prune(model, forward, {"down": 16})
    assert model.get_parameter("embed.weight") is model.get_parameter("head.weight")
    assert model.get_parameter("head.weight").shape == (20, 16)


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        pytest.param(["inner1"], ["inner1"], id="a name"),
        pytest.param(["inner*"], ["inner1", "inner2"], id="a glob"),
        pytest.param(["outer1"], ["stem", "outer1"], id="a coupled layer freezes its group"),
        pytest.param(["*"], ["stem", "inner1", "outer1", "inner2", "outer2", "shortcut", "head"], id="everything"),
        pytest.param(["INNER1", "nothing"], [], id="no match"),
    ],
)
def test_exclude(patterns: list[str], frozen: list[str]) -> None:
    analysis = analysed(CASES[1], exclude=patterns)
    excluded = [entry.layer for entry in analysis.frozen if entry.reason == "the job excludes it (space.exclude)"]
    assert excluded == frozen
    assert not {name for group in analysis.groups for name in group.layers} & set(frozen)


def test_counts_by_hand() -> None:
    analysis = analysed(CASES[0])
    counts = {layer.name: (layer.kind, layer.params, layer.macs) for layer in analysis.layers}
    assert counts == {
        "conv1": ("Conv2d", 1 * 16 * 9, 1 * 16 * 9 * 8 * 8),
        "conv2": ("Conv2d", 16 * 32 * 9, 16 * 32 * 9 * 4 * 4),
        "fc1": ("Linear", 128 * 32 + 32, 128 * 32),
        "fc2": ("Linear", 32 * 10 + 10, 32 * 10),
    }
    assert analysis.params == 144 + 4608 + 4128 + 330 + 2 * 16 + 2 * 32
    assert analysis.macs == 9216 + 73728 + 4096 + 320


def test_counts_of_depthwise_and_repeated_layers_by_hand() -> None:
    depthwise = {layer.name: layer.macs for layer in analysed(CASES[2]).layers}
    assert depthwise["depthwise"] == 32 * 9 * 64
    twice = {layer.name: layer.macs for layer in analysed(CASES[13]).layers}
    assert twice == {"first": 12 * 16, "again": 2 * 16 * 16, "head": 16 * 3}


def test_counts_of_an_encoder_layer_by_hand() -> None:
    """In eval mode PyTorch fuses it, which hides its layers from counters and hooks."""
    layers = {layer.name: layer.macs for layer in analysed(CASES[14]).layers}
    assert layers == {
        "project": 5 * 8 * 16,
        "encoder.linear1": 5 * 16 * 32,
        "encoder.linear2": 5 * 32 * 16,
        "head": 16 * 3,
    }
    attention = 5 * (3 + 1) * 16 * 16 + 2 * 5 * 5 * 16
    total = analysed(CASES[14]).macs
    assert sum(layers.values()) + attention >= total >= sum(layers.values()) + 5 * (3 + 1) * 16 * 16


def test_to_dict_sums_over_coupled_layers() -> None:
    analysis = analysed(CASES[1])
    shares = {layer.name: 0.125 for layer in analysis.layers}
    data = Analysis(analysis.groups, analysis.frozen, analysis.layers, 1, 2, shares).to_dict()
    stem = data["groups"][0]
    assert (stem["name"], stem["coupled"], stem["latency_share"]) == ("stem", ["outer1"], 0.25)
    assert stem["params"] == (3 * 9 + 1) * 16 + (16 * 9 + 1) * 16
    assert stem["macs"] == 64 * 9 * 16 * (3 + 16)
    assert data["layers"][0]["latency_share"] == 0.125
    assert data["frozen"] == [{"layer": "head", "reason": OUTPUT}]


def test_why_broken_names_the_users_line() -> None:
    case = CASES[6]
    reason = why_broken(build(case), forward_of(case), {"second": 16})
    assert reason is not None
    assert "self.head(x.view(len(x), 32, -1).mean(2))" in reason
    assert "nets.py" in reason
    assert why_broken(build(case), forward_of(case), {"first": 8}) is None


class Gated(nn.Module):
    """A gate over linear layers with a shortcut, as SwiGLU: without any channel left it would still run."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up = nn.Linear(12, 32), nn.Linear(32, 128)
        self.down, self.head = nn.Linear(64, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        value, gate = self.up(x).chunk(2, -1)
        return self.head(x + self.down(torch.relu(gate) * value))


class Sliced(nn.Module):
    """Reads the first half of a layer's channels alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(12, 32), nn.Linear(16, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x))[:, :16])))


class Queried(nn.Module):
    """Gives a view of a parameter straight to a module, as learned queries are."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.zeros(1, 12))
        self.norm, self.first, self.head = nn.LayerNorm(12), nn.Linear(12, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.first(x + self.norm(self.queries.expand(len(x), -1)))))


@pytest.mark.parametrize(
    ("kind", "offered", "frozen"), [(Gated, "first", "up"), (Sliced, "second", "first"), (Queried, "first", "")]
)
def test_what_can_only_go_together_stays(kind: type[nn.Module], offered: str, frozen: str) -> None:
    torch.manual_seed(0)
    found = analyse(kind(), lambda model: model(nets.vector()))
    assert [group.name for group in found.groups] == [offered]
    assert [entry.layer for entry in found.frozen if entry.reason != OUTPUT] == ([frozen] if frozen else [])
