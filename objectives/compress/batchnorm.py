"""Folding batch norm into the layer before it, as the runtimes do; quantizers then see what is deployed."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

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
    """(layer, batch norm) where the norm alone reads the layer's output, found in the autograd graph."""
    names = {module: name for name, module in model.named_modules()}
    calls: Counter[str] = Counter()
    producer: dict[Any, str] = {}
    norm_inputs: dict[str, Any] = {}

    def after_layer(module: nn.Module, _inputs: Any, output: Tensor) -> None:
        calls[names[module]] += 1
        producer[output.grad_fn] = names[module]

    def before_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        calls[names[module]] += 1
        norm_inputs[names[module]] = inputs[0].grad_fn

    handles = []
    for module in names:
        if isinstance(module, (*_CONVS, nn.Linear)):
            handles.append(module.register_forward_hook(after_layer))
        elif isinstance(module, _NORMS) and module.track_running_stats:
            handles.append(module.register_forward_pre_hook(before_norm))
    try:
        with torch.enable_grad():
            for parameter in model.parameters():
                parameter.requires_grad_(True)
            output = forward(model)
    finally:
        for handle in handles:
            handle.remove()
    readers = _readers(output.grad_fn)
    pairs = []
    for norm, grad_fn in norm_inputs.items():
        layer = producer.get(grad_fn)
        if layer is not None and readers[grad_fn] == 1 and calls[layer] == calls[norm] == 1:
            pairs.append((layer, norm))
    return pairs


def _readers(root: Any) -> Counter[Any]:
    """How often each node's result is read on the way to the output."""
    readers: Counter[Any] = Counter()
    stack, seen = [root], {root}
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None:
                continue
            readers[node] += 1
            if node not in seen:
                seen.add(node)
                stack.append(node)
    return readers
