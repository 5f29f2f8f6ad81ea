"""PyTorch's multi-head attention, its heads cut, compared with itself and with its heads silenced."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paretune.spaces.analysis import analyse
from paretune.spaces.graph import prune
from paretune.spaces.multihead import HeadAttention, open_multihead
from tests import nets

HIDDEN = torch.tensor([[False, False, False, True], [False, True, True, True]])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(5)
ABOVE = torch.ones(5, 5, dtype=torch.bool).triu(1)


def attention(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(16, 4, **{"batch_first": True, **options}).eval()
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape) / 2
    return module


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize(
    "masks",
    [
        pytest.param({}, id="none"),
        pytest.param({"key_padding_mask": HIDDEN}, id="padding"),
        pytest.param({"key_padding_mask": HIDDEN.float() * -5}, id="padding in numbers"),
        pytest.param({"attn_mask": ABOVE[:, :4]}, id="pairs"),
        pytest.param({"attn_mask": CAUSAL[:, :4], "is_causal": True}, id="causal"),
        pytest.param({"attn_mask": tensor(8, 5, 4)}, id="each head its own"),
        pytest.param({"attn_mask": ABOVE[:, :4], "key_padding_mask": HIDDEN}, id="both"),
        pytest.param({"average_attn_weights": False}, id="weights of each head"),
    ],
)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="packed"),
        pytest.param({"kdim": 12, "vdim": 10}, id="other widths"),
        pytest.param({"batch_first": False, "bias": False}, id="tokens first, no bias"),
    ],
)
def test_computes_what_pytorchs_does(options: dict[str, Any], masks: dict[str, Any], need_weights: bool) -> None:
    dense = attention(**options)
    opened = HeadAttention(dense).eval()
    inputs = [tensor(2, 5, 16), tensor(2, 4, dense.kdim, seed=1), tensor(2, 4, dense.vdim, seed=2)]
    if not dense.batch_first:
        inputs = [x.transpose(0, 1) for x in inputs]
    expected = dense(*inputs, need_weights=need_weights, **masks)
    output = opened(*inputs, need_weights=need_weights, **masks)
    torch.testing.assert_close(output[0], expected[0], atol=1e-5, rtol=1e-4)
    assert (output[1] is None) == (not need_weights)
    if need_weights:
        torch.testing.assert_close(output[1], expected[1], atol=1e-5, rtol=1e-4)


def test_a_single_sample_needs_no_batch() -> None:
    dense, x = attention(), tensor(5, 16)
    for got, want in zip(HeadAttention(dense).eval()(x, x, x), dense(x, x, x), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_gradients_and_modes_are_taken_over() -> None:
    dense, x = attention(), tensor(2, 5, 16)
    dense(x, x, x)[0].sum().backward()
    dense.in_proj_bias.requires_grad_(False)
    opened = HeadAttention(dense)
    assert not opened.training
    assert torch.equal(opened.key.weight.grad, dense.in_proj_weight.grad[16:32])  # type: ignore[index, arg-type]
    assert not opened.key.bias.requires_grad


class Coder(nn.Module):
    """A decoder over an encoder of two layers; inputs (N, 5, 8)."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.project = nn.Linear(8, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoderLayer(16, 4, 32, batch_first=True, **options)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(x)
        memory = self.encoder(x, mask=CAUSAL, is_causal=True)
        return self.head(self.decoder(x[:, :3], memory).mean(1))


def forward(model: nn.Module) -> Any:
    return model(nets.sequence())


def coder(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = Coder(**options).eval()
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.in_proj_weight.data *= 3
    return model


NAMES = ["encoder.layers.0.self_attn", "encoder.layers.1.self_attn", "decoder.self_attn", "decoder.multihead_attn"]


@pytest.mark.parametrize("norm_first", [False, True])
def test_pruned_heads_of_a_transformer_equal_masked_ones(norm_first: bool) -> None:
    model = coder(norm_first=norm_first)
    groups = {group.name: group for group in analyse(model, forward).groups}
    assert {name: (group.channels, group.unit) for name, group in groups.items() if group.unit > 1} == dict.fromkeys(
        NAMES, (16, 4)
    )
    assert "project" in groups
    masked = copy.deepcopy(model)
    for name in NAMES:
        masked.get_parameter(f"{name}.out_proj.weight").data[:, 8:] = 0
    assert not torch.allclose(forward(masked), forward(model), atol=1e-2)
    prune(model, forward, dict.fromkeys(NAMES, 8))
    for mode in (False, True):
        # Without gradients PyTorch's layer would take a path of its own, which can't know the heads that are left.
        with torch.set_grad_enabled(mode):
            torch.testing.assert_close(forward(model), forward(masked), atol=1e-5, rtol=1e-4)
    forward(model.train()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_the_width_and_the_heads_are_cut_together() -> None:
    model = coder()
    prune(model, forward, {"project": 8, **dict.fromkeys(NAMES, 4)})
    assert model.get_parameter("encoder.layers.1.self_attn.query.weight").shape == (4, 8)
    assert model.get_parameter("decoder.multihead_attn.out_proj.weight").shape == (8, 4)
    assert forward(model).shape == (2, 3)
    forward(model.train()).sum().backward()


class Padded(nn.Module):
    """In eval mode PyTorch packs padded sequences, so that padded positions become zero."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.arange(5) >= torch.tensor([[5], [3]])
        return self.head(self.encoder(x, src_key_padding_mask=hidden).mean(1))


def test_what_would_compute_something_else_stays() -> None:
    torch.manual_seed(0)
    model = Padded().eval()
    before = forward(model)
    open_multihead(model, forward)
    assert not any(isinstance(module, HeadAttention) for module in model.modules())
    assert torch.equal(forward(model), before)
    analysis = analyse(model, forward)
    assert {group.name for group in analysis.groups} == {"encoder.layers.0.linear1", "encoder.layers.1.linear1"}


class Reused(nn.Module):
    """One attention under two names, and one that can't be opened."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(16, 4, batch_first=True)
        self.second = self.first
        self.other = nn.MultiheadAttention(16, 4, batch_first=True, add_bias_kv=True)
        self.stem, self.head = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in (self.first, self.second, self.other):
            x = x + layer(x, x, x)[0]
        return self.head(x.mean(1))


def test_one_attention_in_two_places_stays_one() -> None:
    torch.manual_seed(0)
    model = Reused().eval()
    masked = copy.deepcopy(model)
    masked.first.out_proj.weight.data[:, 8:] = 0
    prune(model, forward, {"first": 8})
    assert isinstance(model.first, HeadAttention)
    assert model.first is model.second
    assert type(model.other) is nn.MultiheadAttention
    torch.testing.assert_close(forward(model), forward(masked), atol=1e-5, rtol=1e-4)
