"""Sparse weights: the smallest magnitudes of a layer become zero, anywhere or N of M (Han et al., 2015,
arXiv:1506.02626; Mishra et al., 2021, arXiv:2104.08378).

There is no mask: what is zero is zero, and `paretune.objectives.compress.ties` keeps it so in training.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from paretune.errors import TrialError
from paretune.objectives.compress.layers import has_own_weight
from paretune.objectives.compress.ties import weights_of
from paretune.spaces.graph import execution_order
from paretune.spaces.plan import CompressionPlan, Sparsification

if TYPE_CHECKING:
    from paretune.objectives.compress import Context

_LEAST_KEPT = 0.01
"""Share of its weights that a ranking over all layers leaves each one: a layer without weights computes nothing."""


def can_sparsify(layer: nn.Module, pattern: str = "unstructured") -> bool:
    """Whether a layer that forward calls can be sparse: all convolutions and linear layers with a weight of their own.

    Args:
        layer: Of the model. Layers inside attention or recurrent modules of PyTorch aren't called by themselves, so
            they are no question here.
        pattern: ``N:M`` also takes M inputs for each output, which depthwise convolutions don't have.
    """
    blocks = Sparsification(pattern=pattern).blocks
    return has_own_weight(layer) and (blocks is None or _inputs(layer) >= blocks[1])


def sparsify(model: nn.Module, config: Sparsification, _context: Context, fraction: float = 1.0) -> nn.Module:
    """Set weights to zero, in place; those that are zero already go first, and so stay zero.

    A pattern N:M parts the inputs of each output, at each position of a kernel, into blocks of M neighbours, of which
    the N largest magnitudes stay. Inputs beyond the last whole block stay dense, as kernels have no pattern for them:
    all, where pruning left fewer than M.

    Args:
        model: Not factorized in the layers of the config.
        config: Resolved.
        fraction: Share of the whole cut that is reached, in (0, 1]. A pattern comes with the last cut alone, as no
            share of it is worth anything, and removed channels would shift its blocks.

    Raises:
        TrialError: A layer has no weight, or is a convolution in groups with fewer inputs than the pattern needs.
    """
    blocks = config.blocks
    for name, share in config.sparsity.items():
        if share == 0 or (blocks and fraction < 1):
            continue
        [weight] = weights_of(model, name)
        if blocks is None:
            _zero_smallest(weight, round(share * fraction * weight.numel()))
            continue
        layer = model.get_submodule(name)
        if getattr(layer, "groups", 1) > 1 and not can_sparsify(layer, config.pattern):  # as in the dense model
            raise TrialError(
                f"a layer must have at least {blocks[1]} inputs for each output to be sparse in the pattern "
                f"{config.pattern}, but {name} ({type(layer).__name__}) has {_inputs(layer)}; leave it out"
            )
        _zero_in_blocks(by_inputs(layer, weight), *blocks)
    return model


@torch.no_grad()
def resolve_sparsity(model: nn.Module, plan: CompressionPlan, context: Context) -> Sparsification:
    """The config with a sparsity for each layer in the place of `ratio` or `threshold`.

    Args:
        model: Before anything is set to zero; is put into eval mode. All convolutions and linear layers that forward
            calls are taken; a weight that several share counts once, under the name that is called first.
        plan: `sparsify` is read.
        context: Runs the model, and names what is excluded.
    """
    config = plan.sparsify
    if config.ratio is None and config.threshold is None:
        return config
    weights: dict[str, Tensor] = {}
    for name in execution_order(model.eval(), context.forward):
        if context.excludes(name) or not has_own_weight(model.get_submodule(name)):
            continue
        [weight] = weights_of(model, name)
        if not any(weight is known for known in weights.values()):
            weights[name] = weight
    ranked = {name: _ranked(weight) for name, weight in weights.items()}
    if config.ratio is not None:
        counts = _smallest_of_all(ranked, round(config.ratio * sum(map(Tensor.numel, weights.values()))))
    else:
        limits = {name: (config.threshold or 0) * weight.std(correction=0) for name, weight in weights.items()}
        counts = {name: int((values < limits[name]).sum()) for name, values in ranked.items()}
    return Sparsification(sparsity={name: count / weights[name].numel() for name, count in counts.items() if count > 0})


def _ranked(weight: Tensor) -> Tensor:
    """The magnitudes that may go, ascending: all but the largest `_LEAST_KEPT` of them, and at least one."""
    kept = max(1, math.ceil(_LEAST_KEPT * weight.numel()))
    return weight.abs().flatten().sort().values[: weight.numel() - kept]


def _smallest_of_all(ranked: dict[str, Tensor], count: int) -> dict[str, int]:
    """How many of each layer's magnitudes are among so many smallest of all layers; equal ones go together."""
    everything = torch.cat(list(ranked.values()))
    count = min(count, len(everything))
    if count == 0:
        return dict.fromkeys(ranked, 0)
    limit = everything.kthvalue(count).values
    return {name: int((values <= limit).sum()) for name, values in ranked.items()}


@torch.no_grad()
def _zero_smallest(weight: Tensor, count: int) -> None:
    order = weight.abs().flatten().argsort(stable=True)
    smallest = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    smallest[order[:count]] = True
    weight.masked_fill_(smallest.view_as(weight), 0)


@torch.no_grad()
def _zero_in_blocks(rows: Tensor, kept: int, size: int) -> None:
    whole = rows[..., : rows.shape[-1] // size * size]
    blocks = whole.view(*rows.shape[:-1], -1, size)  # parts the last axis alone, which any strides allow
    order = blocks.abs().argsort(dim=-1, stable=True)
    blocks.scatter_(-1, order[..., : size - kept], 0)


def by_inputs(layer: nn.Module, weight: Tensor) -> Tensor:
    """A view of a layer's weight whose last axis is the inputs of one output, at one position of the kernel."""
    if isinstance(layer, _ConvTransposeNd):  # (inputs of all groups, outputs of one, kernel...)
        return weight.view(layer.groups, -1, *weight.shape[1:]).movedim(1, -1)
    return weight.movedim(1, -1)


def _inputs(layer: nn.Module) -> int:
    """Inputs that each output reads."""
    return by_inputs(layer, cast(Tensor, layer.weight)).shape[-1]
