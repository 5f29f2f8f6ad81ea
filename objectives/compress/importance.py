"""Importance scores for structured pruning, by name, on top of Torch-Pruning's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch_pruning
from torch import Tensor, nn

Score = Callable[[Any], Tensor | None]
"""Scores the channels of a Torch-Pruning group: a 1-D tensor, or None where the group has nothing to score."""


def importance(name: str, model: nn.Module, backward: Callable[[nn.Module], None]) -> Score:
    """The importance `name` (see `paretune.spaces.plan.Pruning`), ready to score groups of `model`.

    Args:
        name: One of the plan's importances.
        model: The dense model; `taylor` leaves gradients in it.
        backward: Accumulates the gradients of the task's loss on real batches, for those that need data.
    """
    if name == "l1":
        return torch_pruning.importance.GroupMagnitudeImportance(p=1)  # type: ignore[no-any-return]
    if name == "l2":
        return torch_pruning.importance.GroupMagnitudeImportance(p=2)  # type: ignore[no-any-return]
    if name == "bn-scale":
        scale = torch_pruning.importance.BNScaleImportance()
        magnitude = torch_pruning.importance.GroupMagnitudeImportance(p=2)
        # A group without batch norm has no such scale; its weights' magnitude decides.
        return lambda group: magnitude(group) if (found := scale(group)) is None else found
    if name == "taylor":
        model.zero_grad()
        backward(model)
        return torch_pruning.importance.GroupTaylorImportance()  # type: ignore[no-any-return]
    return torch_pruning.importance.RandomImportance()  # type: ignore[no-any-return]
