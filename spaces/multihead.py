"""PyTorch's multi-head attention with a layer each for queries, keys and values, so that heads can be removed.

`nn.MultiheadAttention` needs a width of heads times channels a head, and keeps three layers in one parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class HeadAttention(nn.Module):
    """Multi-head attention (Vaswani et al., 2017, arXiv:1706.03762), called like `nn.MultiheadAttention`.

    Args:
        source: What it is to compute; without `bias_k` and `add_zero_attn`. Weights are copied.
    """

    # What `nn.TransformerEncoderLayer` asks before it takes its fast path, which knows only PyTorch's own attention.
    _qkv_same_embed_dim = False
    in_proj_bias = None

    def __init__(self, source: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads = source.num_heads
        self.dropout = source.dropout
        self.batch_first = source.batch_first
        self.query, self.key, self.value = (_layer(source, part) for part in range(3))
        self.out_proj = source.out_proj
        self.train(source.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix values by how well keys answer queries; arguments and results as of `nn.MultiheadAttention`.

        `is_causal` is a hint that `attn_mask` needn't be read; it is read.
        """
        unbatched, first = query.dim() == 2, self.batch_first
        if unbatched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        q, k, v = self._split(self.query(query)), self._split(self.key(key)), self._split(self.value(value))
        bias = self._bias(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
            weights = F.dropout((scores if bias is None else scores + bias).softmax(3), dropout)
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        output: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if unbatched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if first else output.transpose(0, 1), weights

    def _split(self, x: Tensor) -> Tensor:
        """(batch, tokens, channels) as (batch, heads, tokens, channels of a head)."""
        return x.reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2)

    def _bias(self, mask: Tensor | None, padding: Tensor | None, like: Tensor) -> Tensor | None:
        """The masks as what is added to the scores, broadcastable to (batch, heads, queries, keys)."""
        bias = None if mask is None else _added(mask, like)
        if bias is not None and bias.dim() == 3:  # one for each sample and head
            bias = bias.reshape(-1, self.num_heads, *bias.shape[1:])
        if padding is None:
            return bias
        hidden = _added(padding, like)[:, None, None, :]
        return hidden if bias is None else bias + hidden


def _added(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


def _layer(source: nn.MultiheadAttention, part: int) -> nn.Linear:
    """The layer of the queries (0), keys (1) or values (2), with its gradients."""
    width, rows = source.embed_dim, slice(part * source.embed_dim, (part + 1) * source.embed_dim)
    packed = source.in_proj_weight
    weight = (source.q_proj_weight, source.k_proj_weight, source.v_proj_weight)[part] if packed is None else packed
    cut = slice(None) if packed is None else rows
    layer = nn.Linear(weight.shape[1], width, bias=source.in_proj_bias is not None, device=weight.device)
    layer.weight = _part(weight, cut)
    if source.in_proj_bias is not None:
        layer.bias = _part(source.in_proj_bias, rows)
    return layer


def _part(parameter: nn.Parameter, rows: slice) -> nn.Parameter:
    part = nn.Parameter(parameter.detach()[rows].clone(), requires_grad=parameter.requires_grad)
    if parameter.grad is not None:
        part.grad = parameter.grad[rows].clone()
    return part


def open_multihead(model: nn.Module, forward: Callable[[nn.Module], Any]) -> None:
    """Replace each `nn.MultiheadAttention` of `model` by a `HeadAttention` under its name, in place.

    Those with biases or zeros among their keys stay, and so does every one of a model that would then give other
    outputs: PyTorch's nested tensors, for one, make padded positions zero in eval mode alone.

    Args:
        model: In eval mode.
        forward: Runs it on its example inputs and returns its output tensor.
    """
    opened = {
        module: HeadAttention(module)
        for module in model.modules()
        if type(module) is nn.MultiheadAttention and module.bias_k is None and not module.add_zero_attn
    }
    if not opened or model in opened:
        return
    encoders = [module for module in model.modules() if isinstance(module, nn.TransformerEncoder)]
    nested = [encoder.use_nested_tensor for encoder in encoders]
    with torch.no_grad():
        before = forward(model)
        _replace(model, opened)
        for encoder in encoders:
            encoder.use_nested_tensor = False  # it asks for the weights of the first layer's attention
        after = forward(model)
    if after.shape != before.shape or not is_close(after, before):
        _replace(model, {module: source for source, module in opened.items()})
        for encoder, was in zip(encoders, nested, strict=True):
            encoder.use_nested_tensor = was


def _replace(model: nn.Module, new: Mapping[Any, nn.Module]) -> None:
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module in new:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, new[module])


def is_close(got: Tensor, want: Tensor) -> bool:
    """Whether two outputs are the same but for the order in which sums were taken."""
    return torch.allclose(got, want, rtol=1e-3, atol=1e-4 * float(want.detach().abs().max()))
