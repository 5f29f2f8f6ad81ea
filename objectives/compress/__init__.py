"""Compression techniques: each a frozen config in the plan (`paretune.spaces.plan`) and one function here.

A technique's function takes the model, its own config and the context, and returns the compressed model. Those of
`STRUCTURE` change the shape of the model and run before the fine-tuning; those of `NUMERICS` change what its numbers
are stored and computed in, run on the model with batch norm folded, and are trained through afterwards. The order
within a tuple is the order of application.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from paretune.objectives.compress.batchnorm import fold_batchnorm
from paretune.objectives.compress.importance import importance
from paretune.objectives.compress.quantization import freeze_quantizers, insert_quantizers
from paretune.objectives.compress.schemes import STATIC, Schemes
from paretune.objectives.data.inputs import Inputs, call
from paretune.objectives.data.splits import Batch
from paretune.objectives.tasks import Task
from paretune.spaces.graph import prune
from paretune.spaces.grid import kept_of
from paretune.spaces.plan import CompressionPlan, Pruning, Quantization

__all__ = [
    "NUMERICS",
    "STRUCTURE",
    "Context",
    "Technique",
    "compress_numerics",
    "compress_structure",
    "freeze_quantizers",
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
    """

    example: Inputs
    channels: dict[str, int]
    task: Task
    batches: Sequence[Batch]
    schemes: Schemes = field(default_factory=lambda: STATIC)

    def forward(self, model: nn.Module) -> torch.Tensor:
        """Run a model on the example."""
        return call(model, self.example)

    def backward(self, model: nn.Module) -> None:
        """Accumulate the gradients of the task's loss over the batches."""
        for batch in self.batches:
            torch.autograd.backward(self.task.loss(call(model, batch.inputs), batch.targets))


class Technique(NamedTuple):
    """A field of the plan, and the function that applies its config."""

    field: str
    apply: Callable[[nn.Module, Any, Context], nn.Module]


def prune_channels(model: nn.Module, config: Pruning, context: Context) -> nn.Module:
    """Remove each group's least important channels; in place."""
    kept = {name: kept_of(ratio, context.channels[name]) for name, ratio in config.ratios.items() if ratio > 0}
    if kept:
        score = importance(config.importance, model, context.backward) if context.batches else None
        prune(model, context.forward, kept, importance=score)
    return model


def quantize(model: nn.Module, config: Quantization, context: Context) -> nn.Module:
    """Insert quantizers and calibrate them on the context's batches; in place."""
    insert_quantizers(model, config.bits, context.schemes, context.forward)
    with torch.no_grad():
        for batch in context.batches:
            call(model, batch.inputs)
    freeze_quantizers(model)
    return model


STRUCTURE = (Technique("prune", prune_channels),)
NUMERICS = (Technique("quantize", quantize),)


def compress_structure(model: nn.Module, plan: CompressionPlan, context: Context) -> nn.Module:
    """Apply the techniques that change the shape of `model`, which may be changed in place."""
    for technique in STRUCTURE:
        model = technique.apply(model, getattr(plan, technique.field), context)
    return model


def compress_numerics(model: nn.Module, plan: CompressionPlan, context: Context) -> nn.Module:
    """A copy of `model`, in eval mode and with batch norm folded, with the techniques of `NUMERICS` applied."""
    model = fold_batchnorm(model, context.forward)
    for technique in NUMERICS:
        model = technique.apply(model, getattr(plan, technique.field), context)
    return model
