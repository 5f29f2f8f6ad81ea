"""Folding batch norm into the layer before it, as the runtimes do; quantizers then see what is deployed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from paretune.objectives.compress.layers import CONVS, replace_module, why_special
from paretune.objectives.compress.readers import trace_readers
from paretune.spaces.copies import copy_of
from paretune.spaces.graph import Forward

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold_batchnorm(model: nn.Module, forward: Forward) -> nn.Module:
    """A copy of `model` in eval mode in which each batch norm that can be is folded into its layer.

    A batch norm is folded when it is the only consumer of a convolution's or linear layer's output, and both compute
    as PyTorch's own do: not with a weight that is standardised, normalised or shared with another layer. What a
    subclass does after normalising, such as the activation of timm's batch norms, stays in its place. The shape of the
    result depends on the model's structure alone, never on its weights.
    """
    model = copy_of(model).eval()
    for layer_name, norm_name in _pairs(model, forward):
        layer: Any = model.get_submodule(layer_name)
        norm: Any = model.get_submodule(norm_name)
        rest = _rest(norm) or nn.Identity()
        if norm.weight is None:  # affine=False, which torch folds into convolutions alone
            norm.weight = nn.Parameter(torch.ones_like(norm.running_var))
            norm.bias = nn.Parameter(torch.zeros_like(norm.running_mean))
        fuse = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        replace_module(model, layer_name, fuse(layer, norm))
        replace_module(model, norm_name, rest)
    return model


def _pairs(model: nn.Module, forward: Forward) -> list[tuple[str, str]]:
    """(layer, batch norm) where the norm alone reads the layer's output."""
    found = trace_readers(model, forward, (*CONVS, nn.Linear, *_NORMS))
    modules = dict(model.named_modules())
    producer = {node: name for name, node in found.outputs.items() if not isinstance(modules[name], _NORMS)}
    pairs = []
    for norm, node in found.inputs.items():
        layer = producer.get(node)
        if layer is None or not (isinstance(modules[norm], _NORMS) and modules[norm].track_running_stats):
            continue
        if why_special(model, layer) or modules[layer]._forward_hooks or _rest(modules[norm]) is None:
            continue
        if len(found.readers.get(node, ())) == 1 and found.calls[layer] == found.calls[norm] == 1:
            pairs.append((layer, norm))
    return pairs


def _rest(norm: Any) -> nn.Module | None:
    """What a batch norm does after it has normalised, in evaluation; None where that can't be told."""
    kind, axes = next((kind, axes) for axes, kind in enumerate(_NORMS, start=1) if isinstance(norm, kind))
    if norm._forward_hooks or norm._forward_pre_hooks:
        return None
    if type(norm).forward is kind.forward:
        return nn.Identity()
    rest = nn.Sequential(*norm.children())
    example = torch.randn(2, norm.num_features, *[3] * axes, generator=torch.Generator().manual_seed(0)).to(
        norm.running_mean
    )
    with torch.no_grad():
        try:
            return rest if torch.equal(norm(example), rest(kind.forward(norm, example))) else None
        except Exception:  # whatever another's forward raises for an input that it doesn't know
            return None
