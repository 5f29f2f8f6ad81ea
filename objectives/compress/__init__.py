"""Compression techniques: each a frozen config in the plan (`paretune.spaces.plan`) and one function here.

A technique's function takes the model, its own config, the context and how far to go, and returns the compressed model.
Those of `STRUCTURE` remove weights, run before the fine-tuning, and may come in several cuts with fine-tuning between;
those of `NUMERICS` change what numbers are stored and computed in, run on the model with batch norm folded, and are
trained through afterwards. The order within a tuple is the order of application.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import nn

from paretune.errors import TrialError
from paretune.objectives.compress.batchnorm import fold_batchnorm
from paretune.objectives.compress.lowrank import factorize, resolve_ranks
from paretune.objectives.compress.pruning import prune_channels, resolve_pruning
from paretune.objectives.compress.quantization import freeze_quantizers, quantize
from paretune.objectives.compress.schemes import STATIC, Schemes
from paretune.objectives.compress.sharing import share_weights
from paretune.objectives.compress.sparsity import resolve_sparsity, sparsify
from paretune.objectives.data.inputs import Inputs, call
from paretune.objectives.data.splits import Batch
from paretune.objectives.tasks import Task
from paretune.spaces.copies import copy_of
from paretune.spaces.plan import CompressionPlan, Pruning

__all__ = [
    "NUMERICS",
    "STRUCTURE",
    "Context",
    "Technique",
    "compress_numerics",
    "compress_structure",
    "freeze_quantizers",
    "resolve_plan",
]


@dataclass(frozen=True)
class Context:
    """What techniques may look at.

    Attributes:
        example: A batch of two samples, to trace with.
        channels: Channels of each group in the dense model.
        task: Gives the loss for importances that need gradients.
        batches: Real training batches, for importances and calibration; empty where only the structure matters.
        schemes: How the target wants layers quantized.
        grids: Prunable group to the channel counts that it may be cut to, ascending; the last is the dense one.
        units: Group to how many of its channels must go together in the dense model; 1 where it isn't named.
        exclude: Glob patterns of layers that are to stay as they are where a plan is for all.
    """

    example: Inputs
    channels: dict[str, int]
    task: Task
    batches: Sequence[Batch]
    schemes: Schemes = field(default_factory=lambda: STATIC)
    grids: Mapping[str, Sequence[int]] = field(default_factory=dict)
    units: Mapping[str, int] = field(default_factory=dict)
    exclude: Sequence[str] = ()

    def forward(self, model: nn.Module) -> torch.Tensor:
        """Run a model on the example."""
        return call(model, self.example)

    def excludes(self, layer: str) -> bool:
        """Whether a layer is to stay as it is."""
        return any(fnmatchcase(layer, pattern) for pattern in self.exclude)


class Technique(NamedTuple):
    """How a field of the plan is carried out.

    Attributes:
        field: Of the plan.
        apply: Applies its config to a model, which may be changed in place, up to a share of the whole cut in (0, 1].
        resolve: The config of a plan with concrete values in the place of what it leaves to the weights; None where it
            never does.
    """

    field: str
    apply: Callable[[nn.Module, Any, Context, float], nn.Module]
    resolve: Callable[[nn.Module, CompressionPlan, Context], Any] | None = None


def _resolve_pruning(model: nn.Module, plan: CompressionPlan, context: Context) -> Pruning:
    return resolve_pruning(model, plan.prune, context, by_sensitivity=plan.schedule.shape == "coarse-fine")


STRUCTURE = (
    Technique("prune", prune_channels, _resolve_pruning),
    Technique("factorize", factorize, lambda model, plan, context: resolve_ranks(model, plan.factorize, context)),
    Technique("sparsify", sparsify, resolve_sparsity),
)
NUMERICS = (Technique("share", share_weights), Technique("quantize", quantize))


def resolve_plan(model: nn.Module, plan: CompressionPlan, context: Context) -> CompressionPlan:
    """The plan with concrete values wherever it leaves them to the weights of the dense model, which isn't changed.

    What comes out fixes the shape of the compressed model, whatever its weights: it can be replayed without data.

    Raises:
        TrialError: What came of it can't be combined on a layer.
    """
    if plan.is_resolved:
        return plan
    model = copy_of(model)
    for technique in STRUCTURE:
        if technique.resolve is not None:
            plan = plan.model_copy(update={technique.field: technique.resolve(model, plan, context)})
            if reason := next(plan.conflicts(), None):
                raise TrialError(f"a plan must fit the layers that its rules choose: {reason}; exclude the layer")
        model = technique.apply(model, getattr(plan, technique.field), context, 1.0)
    return CompressionPlan.model_validate(plan.to_dict())


def compress_structure(model: nn.Module, plan: CompressionPlan, context: Context, fraction: float = 1.0) -> nn.Module:
    """Apply the techniques that remove weights to `model`, which may be changed in place.

    Args:
        model: The dense model, or one that was compressed to a smaller share of the cut.
        plan: Resolved.
        context: What techniques may look at.
        fraction: Share of the whole cut that is reached, in (0, 1].
    """
    for technique in STRUCTURE:
        model = technique.apply(model, getattr(plan, technique.field), context, fraction)
    return model


def compress_numerics(model: nn.Module, plan: CompressionPlan, context: Context) -> nn.Module:
    """A copy of `model`, in eval mode and with batch norm folded, with the techniques of `NUMERICS` applied."""
    model = fold_batchnorm(model, context.forward)
    for technique in NUMERICS:
        model = technique.apply(model, getattr(plan, technique.field), context, 1.0)
    return model
