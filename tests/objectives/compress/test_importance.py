"""What each importance finds unimportant, on nets where it is known; that none breaks on any net or changes it."""

from __future__ import annotations

import copy
from functools import cache
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
import torch_pruning
from torch import Tensor, nn

from paretune.objectives.compress import Context
from paretune.objectives.compress import importance as module
from paretune.objectives.compress.importance import importance
from paretune.objectives.data import Inputs, Split, call
from paretune.objectives.tasks import Classification
from paretune.spaces.analysis import analyse
from paretune.spaces.graph import DependencyGraph
from paretune.spaces.plan import Importance
from tests import nets

NAMES: tuple[Importance, ...] = get_args(Importance)
DATA: tuple[Importance, ...] = ("taylor", "hessian", "activation", "apoz")

NETS: dict[str, tuple[type[nn.Module], Inputs]] = {
    **{kind.__name__: (kind, nets.image()) for kind in (nets.Residual, nets.Depthwise, nets.Dense, nets.Fold)},
    **{kind.__name__: (kind, nets.image()) for kind in (nets.Chunk, nets.SplitConcat, nets.Shuffle, nets.Attentive)},
    **{kind.__name__: (kind, nets.image()) for kind in (nets.GroupNormed, nets.FixedView, nets.Grouped, nets.UNet)},
    **{kind.__name__: (kind, nets.image()) for kind in (nets.MobileNetV3, nets.DenseNet, nets.ViT)},
    **{kind.__name__: (kind, nets.vector()) for kind in (nets.MLP, nets.Unused, nets.Twice, nets.FixedBatch)},
    **{kind.__name__: (kind, nets.sequence()) for kind in (nets.Heads, nets.Transformer, nets.Attention)},
    "Recurrent": (nets.Recurrent, nets.sequence()),
    "PlainCNN": (nets.PlainCNN, nets.image(2, 1)),
    "Signal": (nets.Signal, nets.signal()),
    "TwoInputs": (nets.TwoInputs, nets.image_and_numbers()),
    "TokenEncoder": (nets.TokenEncoder, nets.tokens()),
    "BERT": (nets.BERT, nets.tokens()),
    "TiedLayers": (nets.TiedLayers, nets.vector()),
}


def build(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nets.wake_norms(kind())


def context_of(model: nn.Module, example: Inputs, inputs: Inputs | None = None) -> Context:
    """With the samples' own most likely classes as targets, in one batch."""
    given = example if inputs is None else inputs
    with torch.no_grad():
        targets = call(copy.deepcopy(model).eval(), given).argmax(1)
    return Context(example, {}, Classification(), list(Split(given, targets).batches(len(targets))))


def scores(name: Importance, model: nn.Module, context: Context) -> dict[str, Tensor]:
    """Every group's scores."""
    score = importance(name, model, context)
    graph = DependencyGraph(model, context.forward)
    found = {}
    for group in graph.groups():
        values = graph.scores(group, score)
        assert values is not None
        found[group.name] = values
    return found


@cache
def prunable_groups(net: str) -> list[str]:
    kind, example = NETS[net]
    return [group.name for group in analyse(build(kind), lambda module: call(module, example)).groups]


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", NAMES)
def test_scores_every_group_of_every_net_and_leaves_the_net_alone(name: Importance, net: str) -> None:
    kind, example = NETS[net]
    model = build(kind).train()
    model.get_parameter(next(iter(dict(model.named_parameters())))).requires_grad_(False)
    context = context_of(model, example)
    state = copy.deepcopy(model.state_dict())
    score = importance(name, model, context)
    assert all(module.training for module in model.modules())
    assert [parameter.requires_grad for parameter in model.parameters()].count(False) == 1
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    graph = DependencyGraph(model, context.forward)
    prunable = prunable_groups(net)
    for group in (group for group in graph.groups() if group.name in prunable):
        values = graph.scores(group, score)
        assert values is not None
        assert values.shape == (group.channels,)
        assert bool((values.isfinite() & (values >= 0)).all())


class Planted(nn.Module):
    """Batch norm and pooling between layers, the last of which looks at all positions; inputs (N, 3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.last = nn.Conv2d(16, 8, 3, padding=1)
        self.head = nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.first(x))), 4)
        return self.head(F.relu(self.last(x)).flatten(1))


def weak_weights(model: nn.Module) -> None:
    model.get_parameter("first.weight").data[5] *= 1e-3
    model.get_parameter("norm.weight").data[5] *= 1e-3
    model.get_parameter("last.weight").data[:, 5] *= 1e-3


def small_scale(model: nn.Module) -> None:
    model.get_parameter("first.weight").data[5] *= 1e3
    model.get_parameter("norm.weight").data[5] = -1e-3


def central(model: nn.Module) -> None:
    """A large filter that the others can stand for: none is nearer to all of them."""
    weight = model.get_parameter("first.weight").data
    weight += 1
    weight[5] = weight[torch.arange(16) != 5].mean(0)


def dead(model: nn.Module) -> None:
    """Heavy, and silent after the rectifier."""
    model.get_parameter("first.weight").data[5] *= 10
    model.get_parameter("norm.bias").data[5] = -1e3


def rarely_awake(model: nn.Module) -> None:
    """Zero at most positions, but large where it isn't, so that the pooling behind it hides the zeros."""
    model.get_parameter("norm.weight").data[:] = 1.0
    model.get_parameter("norm.bias").data[:] = 2.0
    model.get_parameter("norm.bias").data[5] = -0.5


PLANTED = [
    ("l1", weak_weights),
    ("l2", weak_weights),
    ("lamp", weak_weights),
    ("bn-scale", small_scale),
    ("fpgm", central),
    ("taylor", dead),
    ("hessian", dead),
    ("activation", dead),
    ("apoz", dead),
    ("apoz", rarely_awake),
]


@pytest.mark.parametrize(("name", "plant"), PLANTED, ids=lambda value: getattr(value, "__name__", value))
def test_planted_channel_goes_first(name: Importance, plant) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = Planted()
    plant(model)
    found = scores(name, model, context_of(model, nets.image(), nets.image(32)))["first"]
    assert int(found.argmin()) == 5
    assert float(found[5]) < 0.9 * float(found[torch.arange(16) != 5].min()) or name == "fpgm"


def test_importances_of_data_see_through_a_flattening() -> None:
    """A channel is dead in the last convolution; the linear layer behind has four inputs for it."""
    torch.manual_seed(0)
    model = Planted()
    model.get_parameter("last.bias").data[3] = -1e3
    context = context_of(model, nets.image(), nets.image(32))
    for name in DATA:
        found = scores(name, model, context)["last"]
        assert int(found.argmin()) == 3, name
        assert float(found[3]) == 0, name


def test_hessian_is_the_mean_squared_gradient_of_single_samples() -> None:
    """By hand; not the square of the mean gradient."""
    torch.manual_seed(0)
    layers = nn.Linear(4, 8), nn.Linear(8, 2)
    model, weights = nn.Sequential(*layers), [layer.weight for layer in layers]
    inputs = nets.vector(6, 4)
    context = context_of(model, inputs[:2], inputs)
    expected = torch.zeros(8)
    for row in range(6):
        loss = Classification().loss(model(inputs[row : row + 1]), context.batches[0].targets[row : row + 1])
        first, second = torch.autograd.grad(loss, weights)
        expected += (first * weights[0]).square().sum(1) + (second * weights[1]).square().sum(0)
    torch.testing.assert_close(scores("hessian", model, context)["0"], expected.detach() / 2, rtol=1e-4, atol=1e-7)


def test_lamp_by_hand() -> None:
    """Squares over the sum of all that are as large or larger."""
    layer = nn.Linear(1, 3, bias=False)
    layer.weight.data = torch.tensor([[2.0], [1.0], [3.0]])
    model = nn.Sequential(layer, nn.Linear(3, 2, bias=False))
    model.get_parameter("1.weight").data.zero_()
    found = scores("lamp", model, context_of(model, nets.vector(2, 1)))["0"]
    torch.testing.assert_close(found, torch.tensor([4 / 13, 1 / 14, 1.0]))


def test_fpgm_looks_at_distances_of_filters_by_hand() -> None:
    layer = nn.Linear(1, 3, bias=False)
    layer.weight.data = torch.tensor([[-2.0], [2.0], [1.0]])
    model = nn.Sequential(layer, nn.Linear(3, 2, bias=False))
    found = scores("fpgm", model, context_of(model, nets.vector(2, 1)))["0"]
    torch.testing.assert_close(found, torch.tensor([7.0, 5.0, 4.0]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["grouped", "transposed"])
def test_magnitude_of_grouped_and_transposed_convolutions_by_hand(kind: str) -> None:
    """A group's filters read that group's channels alone."""
    torch.manual_seed(0)
    make = nn.Conv2d if kind == "grouped" else nn.ConvTranspose2d
    first, second = nn.Conv2d(3, 8, 1), make(8, 12, 3, groups=4)
    model = nn.Sequential(first, second, nn.Conv2d(12, 5, 1))
    weight = second.weight.detach().abs()
    reads = torch.zeros(8)
    for channel in range(8):
        start = channel // 2 * 3
        mine = weight[start : start + 3, channel % 2] if kind == "grouped" else weight[channel]
        reads[channel] = mine.sum()
    graph = torch_pruning.DependencyGraph().build_dependency(model, nets.image())
    group = graph.get_pruning_group(first, torch_pruning.prune_conv_out_channels, list(range(8)))
    found = importance("l1", model, Context(nets.image(), {}, Classification(), []))(group)
    own = first.weight.detach().abs().sum((1, 2, 3))
    assert found is not None
    torch.testing.assert_close(found, (own + reads) / 2)


@pytest.mark.parametrize("name", ["bn-scale", *DATA])
def test_what_cant_be_scored_has_its_magnitude(name: Importance) -> None:
    model = build(nets.MLP)  # no batch norm, and no data is given
    context = Context(nets.vector(), {}, Classification(), [])
    found, magnitude = scores(name, model, context), scores("l2", model, context)
    assert all(torch.equal(found[group], magnitude[group]) for group in magnitude)


def test_apoz_of_a_net_without_rectifiers_is_its_magnitude() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.Linear(16, 3))
    context = context_of(model, nets.vector(), nets.vector(16))
    assert torch.equal(scores("apoz", model, context)["0"], scores("l2", model, context)["0"])


@pytest.mark.parametrize(
    "rectify", [F.relu, F.relu6, nn.ReLU(inplace=True), nn.ReLU6(inplace=True), lambda x: x.clamp(min=0)]
)
def test_apoz_is_measured_at_the_rectifier(rectify) -> None:  # type: ignore[no-untyped-def]
    """Not behind the mean over positions, which hides nearly every zero."""

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(rectify(self.norm(self.conv(x))).mean((2, 3)))

    model, inputs = build(Pooled).eval(), nets.image(16)
    with torch.no_grad():
        alive = (model.get_submodule("norm")(model.get_submodule("conv")(inputs)) > 0).float().mean((0, 2, 3))
    torch.testing.assert_close(scores("apoz", model, context_of(model, nets.image(), inputs))["conv"], alive)


@pytest.mark.parametrize("name", DATA)
def test_batches_in_parts_give_the_scores_of_the_whole(name: Importance, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where samples don't divide evenly; and no more than 16 go through the model at a time."""
    torch.manual_seed(0)
    model, sizes = Planted(), []
    context = context_of(model, nets.image(), nets.image(37))
    model.register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0])))
    found = scores(name, model, context)
    assert max(sizes) <= 16
    if name != "hessian":  # which takes single samples
        assert {12, 13} <= set(sizes)
        monkeypatch.setattr(module, "_PART", 64)
        sizes.clear()
        whole = scores(name, model, context)
        assert 37 in sizes
        for group, values in whole.items():
            torch.testing.assert_close(found[group], values, rtol=1e-4, atol=1e-6)


def test_random_is_seeded() -> None:
    model = build(nets.MLP)

    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return scores("random", model, Context(nets.vector(), {}, Classification(), []))["first"]

    assert torch.equal(drawn(0), drawn(0))
    assert not torch.equal(drawn(0), drawn(1))
