"""Heads are found, cut and proven in attention as it is written by hand; where they can't be, that is said."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paretune.spaces.analysis import analyse
from paretune.spaces.attention import find_attentions
from paretune.spaces.graph import DependencyGraph, prune
from tests import nets

WIDTH, HEADS, SIZE = 32, 4, 8


class Timm(nn.Module):
    """Fused; takes the width of its output from its input; drops out in training."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.scale = HEADS, SIZE**-0.5
        self.qkv, self.q_norm, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.LayerNorm(SIZE), nn.Linear(WIDTH, WIDTH)
        self.attn_drop = nn.Dropout(0.1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        shares = (self.q_norm(q) * self.scale) @ k.transpose(-2, -1)
        if mask is not None:
            shares = shares + mask
        x = self.attn_drop(shares.softmax(dim=-1)) @ v
        return F.dropout(self.proj(x.transpose(1, 2).reshape(b, n, c)), 0.1, self.training)


class _BertSelf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size, self.all_head_size = HEADS, SIZE, WIDTH
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def split(self, x: Tensor) -> Tensor:
        split = x.size()[:-1] + (self.num_attention_heads, self.attention_head_size)  # noqa: RUF005, as it is written
        return x.view(split).permute(0, 2, 1, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shares = (self.split(self.query(x)) @ self.split(self.key(x)).transpose(-1, -2) / SIZE**0.5).softmax(-1)
        mixed = (shares @ self.split(self.value(x))).permute(0, 2, 1, 3).contiguous()
        return mixed.view(mixed.size()[:-2] + (self.all_head_size,)), shares  # noqa: RUF005


class Bert(nn.Module):
    """The output layer is in another module than the heads."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.output = _BertSelf(), nn.ModuleDict({"dense": nn.Linear(WIDTH, WIDTH)})

    def forward(self, x: Tensor) -> Tensor:
        return self.output["dense"](self.attention(x)[0])


class ByHead(nn.Module):
    """Fused, one head's query, key and value next to each other, as in GPT-NeoX."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], self.heads, -1).transpose(1, 2).chunk(3, -1)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Shared(nn.Module):
    """Two queries share a key and a value (Ainslie et al., 2023, arXiv:2305.13245)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.num_key_value_heads = 2 * HEADS, HEADS
        self.q, self.k, self.v = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.proj = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.num_heads, -1).transpose(1, 2)
        k, v = (y.view(b, n, self.num_key_value_heads, -1).transpose(1, 2) for y in (self.k(x), self.v(x)))
        k, v = (y.repeat_interleave(self.num_heads // self.num_key_value_heads, 1) for y in (k, v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class KeysValues(nn.Module):
    """Queries apart, keys and values fused; the code tells the heads' size, not their number."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.to_kv(x).chunk(2, -1)
        q, k, v = (y.unflatten(-1, (-1, SIZE)).transpose(1, 2) for y in (self.to_q(x), k, v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Folded(nn.Module):
    """Samples and heads in one axis, as in older code."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.embed_dim = HEADS, SIZE, WIDTH
        self.q, self.k, self.v, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        split = (b, n, self.num_heads, self.head_dim)
        folded = (b * self.num_heads, n, self.head_dim)
        q, k, v = (layer(x).view(split).transpose(1, 2).reshape(folded) for layer in (self.q, self.k, self.v))
        mixed = torch.bmm(F.softmax(torch.bmm(q, k.transpose(1, 2)), dim=-1), v)
        mixed = mixed.view(b, self.num_heads, n, self.head_dim).transpose(1, 2)
        return self.proj(mixed.reshape(b, n, self.embed_dim))


class Narrow(nn.Module):
    """Queries and keys are narrower than values, as in LeViT (Graham et al., 2021, arXiv:2104.01136)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = HEADS
        self.q, self.k, self.v = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 64)
        self.proj = nn.Linear(64, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Literal(nn.Module):
    """Numbers in the place of names."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.proj = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).view(-1, 5, 4, 8).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 5, 32))


class Pixels(nn.Module):
    """Attention between the pixels of an image, by convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = HEADS
        self.qkv, self.proj = nn.Conv2d(WIDTH, 3 * WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)[..., None]
        b, _, h, w = x.shape
        q, k, v = (y.reshape(b, self.heads, -1, h * w) for y in self.qkv(x).chunk(3, 1))
        shares = torch.einsum("bhdi,bhdj->bhij", q, k).softmax(-1)
        return self.proj(torch.einsum("bhij,bhdj->bhdi", shares, v).reshape(b, -1, h, w))[..., 0].transpose(1, 2)


class Biased(Literal):
    """Has a weight for each head and pair of positions, as Swin has (Liu et al., 2021, arXiv:2103.14030)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(4, 5, 5))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (-1, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.proj(F.scaled_dot_product_attention(q, k, v, self.table).transpose(1, 2).flatten(2))


class Gated(Literal):
    """What the heads have mixed meets what another layer makes."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (-1, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj(mixed * self.gate(x).sigmoid())


class Branching(Literal):
    """Literal, with a choice that depends on values: no one can rewrite that."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() < 1e9 else x


class Net(nn.Module):
    """Attention with a shortcut between two linear layers; inputs (N, 5, 8)."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.stem, self.attention = nn.Linear(8, WIDTH), attention
        self.last, self.head = nn.Linear(WIDTH, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(F.relu(self.last(x + self.attention(x))).mean(1))


class Case(NamedTuple):
    """An attention, and what lies where in it.

    Attributes:
        attention: Its class.
        name: Of its group.
        channels: Of the group.
        output: Path of the layer that reads the heads.
    """

    attention: type[nn.Module]
    name: str
    channels: int
    output: str = "proj"


CASES = [
    Case(Timm, "qkv", 96),
    Case(Bert, "attention.query", 32, "output.dense"),
    Case(ByHead, "qkv", 96),
    Case(Shared, "q", 64),
    Case(KeysValues, "to_kv", 64),
    Case(Folded, "q", 32),
    Case(Narrow, "q", 16),
    Case(Literal, "q", 32),
    Case(Biased, "q", 32),
    Case(Pixels, "qkv", 96),
]
EACH = pytest.mark.parametrize("case", CASES, ids=lambda case: case.attention.__name__)


def net(attention: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = Net(attention()).eval()
    # Shares that are all alike would hide what is wrong with heads.
    for name, parameter in model.attention.named_parameters():
        if name.endswith("weight"):
            parameter.data *= 4
    return model


def forward(model: nn.Module) -> Any:
    return model(nets.sequence())


def masked(model: nn.Module, case: Case, heads: list[int]) -> Tensor:
    """What a model computes when its output layer doesn't read some heads."""
    model = copy.deepcopy(model)
    weight: Any = model.get_submodule(f"attention.{case.output}").weight
    weight.data.unflatten(1, (HEADS, -1))[:, heads] = 0
    with torch.no_grad():
        output: Tensor = forward(model)
    return output


@EACH
def test_heads_are_offered_beside_the_width(case: Case) -> None:
    analysis = analyse(net(case.attention), forward)
    found = {group.name: (group.channels, group.unit) for group in analysis.groups}
    heads = (case.channels, case.channels // HEADS)
    assert found == {"stem": (32, 1), f"attention.{case.name}": heads, "last": (16, 1)}
    assert [entry.layer for entry in analysis.frozen] == ["head"]
    group = next(group for group in analysis.to_dict()["groups"] if group["name"] == f"attention.{case.name}")
    assert group["unit"] == heads[1]


@EACH
def test_pruned_heads_equal_masked_ones(case: Case) -> None:
    model, name = net(case.attention), f"attention.{case.name}"
    with torch.no_grad():
        dense = forward(model)
    expected = masked(model, case, [0, 2])
    assert not torch.allclose(dense, expected, atol=1e-2), "the heads mattered"
    graph = DependencyGraph(copy.deepcopy(model), forward)
    units = graph.units(next(group for group in graph.groups() if group.name == name))
    weakest = torch.full((case.channels,), 2.0).index_fill(0, units[[0, 2]].flatten(), 1.0)
    # Queries, keys and values are scored each; Torch-Pruning begins a group at each of them.
    prune(
        model,
        forward,
        {name: case.channels // 2},
        importance=lambda group: weakest if len(group[0].idxs) == case.channels else None,
    )
    assert len(model.get_submodule(name).weight) == case.channels // 2  # type: ignore[arg-type]
    output = forward(model)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@EACH
def test_heads_and_width_are_cut_together_step_by_step(case: Case) -> None:
    stepwise, replayed, name = net(case.attention), net(case.attention), f"attention.{case.name}"
    unit = case.channels // HEADS
    for heads, width in ((3, 24), (2, 16), (1, 8)):
        prune(
            stepwise,
            forward,
            {name: heads * unit, "stem": width},
            importance=lambda group: torch.rand(len(group[0].idxs)),
        )
    prune(replayed, forward, {name: unit, "stem": 8})
    shapes = [{name: tensor.shape for name, tensor in model.state_dict().items()} for model in (stepwise, replayed)]
    assert shapes[0] == shapes[1]
    assert tuple(stepwise.get_parameter(f"{name}.weight").shape[:2]) == (unit, 8)
    replayed.load_state_dict(stepwise.state_dict())
    torch.testing.assert_close(forward(replayed), forward(copy.deepcopy(stepwise)))
    assert forward(replayed.train()).shape == (2, 3)


def test_finding_changes_no_output_and_no_name() -> None:
    for case in CASES:
        model = net(case.attention)
        before, names, kind = forward(model), list(model.state_dict()), type(model.attention)
        found, refused = find_attentions(model, forward)
        assert (len(found), refused) == (1, [])
        assert torch.equal(forward(model), before)
        assert list(model.state_dict()) == names
        assert isinstance(model.attention, kind)


def test_an_output_that_begins_at_zero_hides_nothing() -> None:
    """The proof takes weights of its own."""
    model = net(Literal)
    nn.init.zeros_(model.get_parameter("attention.proj.weight"))
    assert len(find_attentions(model, forward)[0]) == 1
    model = net(Branching)
    nn.init.zeros_(model.get_parameter("attention.proj.weight"))
    assert find_attentions(model, forward)[0] == []


@pytest.mark.parametrize("attention", [Gated, Branching])
def test_what_cant_be_cut_is_named(attention: type[nn.Module]) -> None:
    analysis = analyse(net(attention), forward)
    frozen = {entry.layer: entry.reason for entry in analysis.frozen}
    for name in ("attention.q", "attention.k", "attention.v"):
        assert "its heads, which attention.proj reads, can't be removed" in frozen[name]
    assert {group.name for group in analysis.groups} == {"stem", "last"}


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_rewritten_forward_still_drops_out_and_exports() -> None:
    model = net(Timm)
    prune(model, forward, {"attention.qkv": 48})
    assert not torch.equal(forward(model.train()), forward(model))
    model.eval()
    assert torch.equal(forward(model), forward(model))
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (nets.sequence(),), dynamic_shapes={"x": {0: batch}})
    traced = torch.jit.trace(model, nets.sequence())
    for run in (program.module(), traced):
        torch.testing.assert_close(run(nets.sequence(7)), model(nets.sequence(7)))


def test_arguments_that_steered_the_rewriting_are_held() -> None:
    model = net(Timm)
    prune(model, forward, {"attention.qkv": 48})
    attention, x = model.get_submodule("attention"), torch.randn(2, 5, WIDTH)
    torch.testing.assert_close(attention(x, mask=None), attention(x))
    with pytest.raises(AssertionError, match="specialized"):
        attention(x, mask=torch.zeros(5, 5))


def test_one_token_shows_nothing_of_heads() -> None:
    assert find_attentions(net(Bert), lambda model: model(nets.sequence()[:, :1])) == ([], [])
