"""Folding batch norm into the layer before it, as the runtimes do; quantizers then see what is deployed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from paretune.objectives.compress.readers import trace_readers
from paretune.spaces.graph import Forward

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def fold_batchnorm(model: nn.Module, forward: Forward) -> nn.Module:
    """A copy of `model` in eval mode in which each batch norm that can be is folded into its layer.

    A batch norm is folded when it is the only consumer of a convolution's or linear layer's output. The shape of
    the result depends on the model's structure alone, never on its weights.
    """
    model = copy.deepcopy(model).eval()
    for layer_name, norm_name in _pairs(model, forward):
        layer: Any = model.get_submodule(layer_name)
        norm: Any = model.get_submodule(norm_name)
        if norm.weight is None:  # affine=False, which torch folds into convolutions alone
            norm.weight = nn.Parameter(torch.ones_like(norm.running_var))
            norm.bias = nn.Parameter(torch.zeros_like(norm.running_mean))
        fuse = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
        replace_module(model, layer_name, fuse(layer, norm))
        replace_module(model, norm_name, nn.Identity())
    return model


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the submodule called `name`, under every name that it has."""
    replaced = model.get_submodule(name)
    for alias, found in list(model.named_modules(remove_duplicate=False)):
        if found is replaced:
            parent, _, child = alias.rpartition(".")
            setattr(model.get_submodule(parent), child, module)


def _pairs(model: nn.Module, forward: Forward) -> list[tuple[str, str]]:
    """(layer, batch norm) where the norm alone reads the layer's output."""
    found = trace_readers(model, forward, (*_CONVS, nn.Linear, *_NORMS))
    modules = dict(model.named_modules())
    producer = {node: name for name, node in found.outputs.items() if not isinstance(modules[name], _NORMS)}
    pairs = []
    for norm, node in found.inputs.items():
        layer = producer.get(node)
        if layer is None or not (isinstance(modules[norm], _NORMS) and modules[norm].track_running_stats):
            continue
        if len(found.readers.get(node, ())) == 1 and found.calls[layer] == found.calls[norm] == 1:
            pairs.append((layer, norm))
    return pairs
