"""What training must not tear apart: zeros stay zero, and the weights of a cluster stay equal.

Which weights are tied is a fact of the weights alone: the mask of a sparse layer is ``weight != 0``, a cluster is a set
of equal values. They are kept by changing gradients before the optimizer's step: with fresh optimizer state, whatever
an optimizer does to each element by itself then keeps zeros zero, and equals equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn

from paretune.errors import TrialError
from paretune.objectives.compress.lowrank import layers_of
from paretune.objectives.compress.quantization import QuantizedLayer
from paretune.spaces.plan import CompressionPlan


def weights_of(model: nn.Module, name: str) -> list[nn.Parameter]:
    """The weight of a layer, or those of its factors; quantizers around it don't matter.

    Raises:
        TrialError: There is no such layer, or it has no weight.
    """
    try:
        modules = [model.get_submodule(part) for part in layers_of(model, name)]
    except AttributeError:  # there is no such layer
        modules = []
    layers = [module.layer if isinstance(module, QuantizedLayer) else module for module in modules]
    weights = [getattr(layer, "weight", None) for layer in layers]
    found = [weight for weight in weights if isinstance(weight, nn.Parameter)]
    if not found or len(found) < len(weights):
        raise TrialError(f"a plan must name layers with weights, but {name} has none in this model; leave it out")
    return found


def ties(model: nn.Module, plan: CompressionPlan) -> list[Callable[[], None]]:
    """What must be called after each backward pass, and before gradients are clipped and the optimizer's step.

    The gradient of a shared value is the mean over its cluster. Han et al. (2016, arXiv:1510.00149) take the sum, the
    true gradient of the value; the mean has its direction, and lets one learning rate fit a codebook's values and the
    weights of other layers alike, however many weights share a value.

    Args:
        model: As it will be trained, on any device, also if it moves to another one later. Layers that the plan shares
            are tied once they are shared: as long as one has more values than its codebook, its weights are free.
        plan: What was done to it.
    """
    # Clusters first: where a layer is both, what its zeros get by sharing is taken from them again.
    found: list[Callable[[], None]] = []
    seen: set[int] = set()
    for name, clusters in plan.share.clusters.items():
        for weight in _unseen(weights_of(model, name), seen):
            values, index = torch.unique(weight.detach(), return_inverse=True)
            if len(values) <= clusters:
                found.append(_Clusters(weight, index, len(values)))
    seen = set()
    for name in (name for name, share in plan.sparsify.sparsity.items() if share > 0):
        found += [partial(_keep_zeros, weight) for weight in _unseen(weights_of(model, name), seen)]
    return found


def _unseen(weights: Iterable[nn.Parameter], seen: set[int]) -> list[nn.Parameter]:
    """Those not met before: two layers may have one weight."""
    fresh = [weight for weight in weights if id(weight) not in seen]
    seen.update(map(id, fresh))
    return fresh


def _keep_zeros(weight: nn.Parameter) -> None:
    if weight.grad is not None:
        # Not a product, in which an infinite gradient would become NaN.
        weight.grad.masked_fill_(weight == 0, 0)


class _Clusters:
    """Gives all weights of a cluster the mean of their gradients, the same number to the last bit.

    Args:
        weight: What is trained.
        index: Cluster of each weight, in the weight's shape.
        count: Clusters, at most 256: an index takes a byte.
    """

    def __init__(self, weight: nn.Parameter, index: Tensor, count: int) -> None:
        self._weight = weight
        self._index = index.flatten().to(torch.uint8)
        self._sizes = index.flatten().bincount(minlength=count).float()

    def __call__(self) -> None:
        gradient = self._weight.grad
        if gradient is None:
            return
        if self._index.device != gradient.device:
            self._index, self._sizes = self._index.to(gradient.device), self._sizes.to(gradient.device)
        index = self._index.int()  # which `index_add_` takes, and bytes it doesn't
        # The sum of a million numbers in single precision is right to four digits: enough for a step of training.
        sums = torch.zeros_like(self._sizes).index_add_(0, index, gradient.flatten().float())
        gradient.copy_((sums / self._sizes).index_select(0, index).view_as(gradient))
