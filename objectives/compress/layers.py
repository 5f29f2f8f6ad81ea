"""Layers that techniques work on: which compute as PyTorch's own do, and how one takes another's place."""

from __future__ import annotations

from typing import Any

from torch import nn

from paretune.spaces.graph import PRUNABLE

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

Kinds = tuple[type[nn.Module], ...]


def why_special(model: nn.Module, name: str, kinds: Kinds = (nn.Linear, *CONVS)) -> str | None:
    """Why a layer isn't what its kind says, so that another can't stand for it; None where it is.

    Args:
        model: Holds the layer.
        name: Of the layer.
        kinds: What it may be.
    """
    layer: Any = dict(model.named_modules(remove_duplicate=False)).get(name)
    if layer is None:
        return "it isn't a module of the model"
    kind = next((kind for kind in kinds if isinstance(layer, kind)), None)
    if kind is None:
        return f"it is a {type(layer).__name__}, neither a linear layer nor a convolution"
    if any(getattr(type(layer), step, None) is not getattr(kind, step, None) for step in ("forward", "_conv_forward")):
        return f"it is a {type(layer).__name__}, which computes in a way of its own"
    if not has_own_weight(layer):
        return "it has a weight that is computed from other parameters"
    for other_name, other in model.named_modules():
        if other is not layer and any(parameter is layer.weight for parameter in other.parameters(recurse=False)):
            return f"it shares its weight with {other_name}"
        if isinstance(other, nn.MultiheadAttention) and layer in other.modules():
            return "it is inside nn.MultiheadAttention, which reads its weight itself"
    return None


def has_own_weight(layer: nn.Module) -> bool:
    """Whether a layer's weight is a parameter, not computed anew from others (weight norm and the like)."""
    return isinstance(layer, PRUNABLE) and layer._parameters.get("weight") is not None


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule called `name`, under every name that it has."""
    replaced = model.get_submodule(name)
    for alias, found in list(model.named_modules(remove_duplicate=False)):
        if found is replaced:
            parent, _, child = alias.rpartition(".")
            setattr(model.get_submodule(parent), child, module)
