"""Redundancy: what a trained layer seems not to need, read off its weights and what it computes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paretune.objectives.compress import Context
from paretune.objectives.compress.importance import means_rectified
from paretune.objectives.compress.layers import CONVS
from paretune.objectives.compress.lowrank import share_keeping
from paretune.spaces.plan import Method

_ENERGY = 0.9

_ROWS = 1024
"""Filters that are compared with all others at once: a layer of 50,000 outputs has too many pairs to hold."""


@dataclass(frozen=True)
class Redundancy:
    """How redundant a layer is; None where that can't be said of it.

    Attributes:
        layer: Its name.
        similarity: Mean over its filters (rows of a linear layer) of the largest cosine similarity to another one that
            reads the same inputs, in [-1, 1]; 1 where every filter has a double, or is all zero.
        zeros: Share of zeros that its rectifier puts out (APoZ, Hu et al., 2016, arXiv:1607.03250), in [0, 1].
        rank: Share of its full rank that keeps 90 % of the energy of its weight, in (0, 1].
    """

    layer: str
    similarity: float | None
    zeros: float | None
    rank: float | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)


def measure_redundancy(
    model: nn.Module, layers: Iterable[str], context: Context, *, method: Method = "tucker"
) -> tuple[Redundancy, ...]:
    """The redundancy of a model's convolutions and linear layers.

    Args:
        model: The dense model; it isn't changed.
        layers: Their names.
        context: Its batches are what activations are looked at on.
        method: How convolutions are factorized, which decides what their rank is.
    """
    alive = means_rectified(model, context)
    found = []
    for name in layers:
        layer = model.get_submodule(name)
        zeros = 1 - float(alive[layer].mean()) if layer in alive else None
        found.append(Redundancy(name, similarity(layer), zeros, _rank(layer, method)))
    return tuple(found)


@torch.no_grad()
def similarity(layer: Any) -> float | None:
    """Mean over a layer's filters of the largest cosine similarity to another one.

    Filters of a grouped convolution are compared within their group, as others read other channels. One that is all
    zero counts 1: nothing is lost with it.

    Args:
        layer: A convolution, transposed or not, or a linear layer.

    Returns:
        In [-1, 1]; None where no filter has another to be compared with, as in a depthwise convolution.
    """
    filters = _filters(layer)
    count = filters.shape[1]
    if count < 2:
        return None
    sizes = filters.abs().amax(2)
    # Scaled first, as squares of tiny weights would vanish.
    unit = F.normalize(filters / sizes.clamp_min(torch.finfo(filters.dtype).tiny)[..., None], dim=2)
    largest = []
    for start in range(0, count, _ROWS):
        cosines = unit[:, start : start + _ROWS] @ unit.transpose(1, 2)
        own = torch.arange(cosines.shape[1])
        cosines[:, own, start + own] = -1
        largest.append(cosines.amax(2).clamp(-1, 1))
    return float(torch.cat(largest, 1).where(sizes > 0, 1.0).mean())


def _filters(layer: Any) -> Tensor:
    """Shape (groups, filters of a group, weights of a filter)."""
    weight: Tensor = layer.weight.detach().float()
    blocks = weight.reshape(int(getattr(layer, "groups", 1)), -1, *weight.shape[1:])
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):  # has (inputs, outputs, ...)
        blocks = blocks.transpose(1, 2)
    return blocks.flatten(2)


def _rank(layer: Any, method: Method) -> float | None:
    if not isinstance(layer, (nn.Linear, *CONVS)) or getattr(layer, "groups", 1) > 1:
        return None
    return share_keeping(layer, method, _ENERGY) or 1.0
