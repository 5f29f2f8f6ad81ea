"""The dependency graph: which layers must be pruned together, and the pruning itself.

The only module (with the importance scores) that knows Torch-Pruning. It stands on the low-level `DependencyGraph`
(Fang et al., 2023, "DepGraph", arXiv:2301.12900) with exact channel counts, not on its pruners, whose `round_to`
rounds down and silently skips groups.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn

Forward = Callable[[nn.Module], Any]
"""Calls a model on fixed example inputs (a batch of at least 2) and returns its output."""

PRUNABLE = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)


_WHOLE = (nn.MultiheadAttention, nn.RNNBase)
"""Modules that share their channels out among heads or gates: cut like others, they would compute something else."""


_PER_CHANNEL = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.PReLU)
"""Modules whose parameters and statistics are one value a channel, along the first axis."""


@dataclass(frozen=True)
class Group:
    """Layers whose channels must be removed together.

    Attributes:
        name: The group's first layer in the order of execution; the key of its pruning ratio.
        channels: Channels of the dense model.
        layers: Layers that lose output channels, `name` first; more than one where they are coupled.
        consumers: Layers that lose input channels because of it.
        uncut: Attentions and recurrent modules in its way, which can't lose channels.
    """

    name: str
    channels: int
    layers: tuple[str, ...]
    consumers: tuple[str, ...]
    uncut: tuple[str, ...] = ()


def execution_order(model: nn.Module, forward: Forward) -> dict[str, int]:
    """Position of each called layer's first call in a forward pass, by name. Layers never called are missing."""
    order: dict[str, int] = {}
    names = {module: name for name, module in model.named_modules()}

    def remember(module: nn.Module, _inputs: Any) -> None:
        order.setdefault(names[module], len(order))

    handles = [module.register_forward_pre_hook(remember) for module in names if isinstance(module, PRUNABLE)]
    try:
        with torch.no_grad():
            forward(model)
    finally:
        for handle in handles:
            handle.remove()
    return order


class DependencyGraph:
    """A model's dependency graph; alive only as long as the model keeps the shape that it was built from.

    Args:
        model: Is traced in eval mode and left in it; pruning changes it in place.
        forward: Runs the model on its example inputs.
    """

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        self._names = {module: name for name, module in model.named_modules()}
        self._modules = dict(model.named_modules())
        self._order = execution_order(model, forward)
        self._graph: Any = torch_pruning.DependencyGraph()
        with warnings.catch_warnings(), torch.enable_grad():
            # Torch-Pruning warns of free parameters and unknown ops; what they break is found by `why_broken`.
            warnings.simplefilter("ignore")
            # Its own way of calling the model tries model(*batch) first, which a batch of one image may survive.
            self._graph.build_dependency(model, None, forward_fn=lambda module, _: forward(module), verbose=False)

    def groups(self) -> Iterator[Group]:
        """Every group of the model, in the order of execution."""
        return iter(sorted(self._groups(), key=lambda group: self._order[group.name]))

    def _groups(self) -> Iterator[Group]:
        for raw in self._graph.get_all_groups(ignored_layers=[], root_module_types=list(PRUNABLE)):
            outputs = self._layers(raw, self._graph.is_out_channel_pruning_fn)
            # A depthwise convolution's pruning function counts as both: it passes channels on, and consumes none.
            inputs = self._layers(raw, self._graph.is_in_channel_pruning_fn)
            consumers = tuple(name for name in inputs if name not in outputs)
            modules = dict.fromkeys(item.dep.target.module for item in raw)
            uncut = tuple(self._names[module] for module in modules if isinstance(module, _WHOLE))
            yield Group(outputs[0], len(raw[0].idxs), outputs, consumers, uncut)

    def scores(self, group: Group, importance: Callable[[Any], Tensor | None]) -> Tensor | None:
        """Importance of each channel, shape (channels,), by a Torch-Pruning importance; None where it has none."""
        return importance(self._select(group, range(group.channels)))

    def remove(self, group: Group, channels: list[int]) -> None:
        """Remove these channels (indices into the dense group) from every layer of the group, in place."""
        self._select(group, channels).prune()

    def permute(self, group: Group, order: Tensor) -> bool:
        """Reorder the group's channels in every layer of it, in place.

        A model that treats the channels alike computes the same afterwards.

        Args:
            group: Of this graph.
            order: A permutation of the channels.

        Returns:
            False where a module of the group has parameters that aren't known here, or reads only some of the
            channels; nothing is changed then, and whether the model treats them alike stays open.
        """
        items = list(self._select(group, range(group.channels)))
        known = (*PRUNABLE, *_PER_CHANNEL)
        modules = [item.dep.target.module for item in items]
        if any(list(m.parameters()) and not isinstance(m, known) for m in modules if isinstance(m, nn.Module)):
            return False
        if any(len(set(item.root_idxs)) < group.channels for item in items):  # a part of them, e.g. behind a split
            return False
        for item in items:
            is_output = self._graph.is_out_channel_pruning_fn(item.dep.handler)
            module, source = item.dep.target.module, partial(_source, item.idxs, item.root_idxs, order)
            if isinstance(module, nn.Parameter):
                _permute_tensor(module, item.dep.target.pruning_dim % module.dim(), source)
            else:
                _permute_module(module, source, is_output=is_output)
        return True

    def _select(self, group: Group, channels: range | list[int]) -> Any:
        root = self._modules[group.name]
        pruner = self._graph.get_pruner_of_module(root)
        return self._graph.get_pruning_group(root, pruner.prune_out_channels, list(channels))

    def _layers(self, raw: Any, selects: Callable[[Any], bool]) -> tuple[str, ...]:
        modules = [item.dep.target.module for item in raw if selects(item.dep.handler)]
        names = {self._names[module] for module in modules if isinstance(module, PRUNABLE)}
        return tuple(sorted(names, key=self._order.__getitem__))


def _source(positions: list[int], roots: list[int], order: Tensor, size: int) -> Tensor:
    """Where each of `size` entries comes from, when the root channels that own `positions` are reordered."""
    places: dict[int, list[int]] = {}
    for position, root in zip(positions, roots, strict=True):
        places.setdefault(root, []).append(position)
    source = torch.arange(size)
    for root, own in places.items():
        source[own] = torch.tensor(places[int(order[root])])
    return source


@torch.no_grad()
def _permute_tensor(tensor: Tensor, dim: int, source: Callable[[int], Tensor]) -> None:
    tensor.copy_(tensor.index_select(dim, source(tensor.shape[dim])))


def _permute_module(module: nn.Module, source: Callable[[int], Tensor], *, is_output: bool) -> None:
    """Reorder a module's parameters and statistics along the axis of its outputs, or of its inputs."""
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if isinstance(module, PRUNABLE) and name == "bias" and not is_output:
            continue
        depthwise = getattr(module, "groups", 1) > 1
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        is_first = not isinstance(module, PRUNABLE) or depthwise or is_output != transposed or name == "bias"
        dim = 0 if is_first else 1
        if tensor.dim() <= dim or tensor.shape[dim] == 1:  # a counter, or one value for all channels
            continue
        _permute_tensor(tensor, dim, source)


def prune(
    model: nn.Module,
    forward: Forward,
    kept: dict[str, int],
    *,
    importance: Callable[[Any], Tensor | None] | None = None,
) -> None:
    """Cut groups of `model` down to `kept` channels each, in place.

    Args:
        model: The dense model.
        forward: Runs it on its example inputs.
        kept: Group name to the number of channels that stay, at least 1.
        importance: Scores a Torch-Pruning group; the channels with the lowest scores go. Without one the last
            channels go: enough where only the shape matters, because weights are loaded afterwards.
    """
    graph = DependencyGraph(model, forward)
    cuts = []
    for group in graph.groups():
        count = group.channels - kept.get(group.name, group.channels)
        if count <= 0:
            continue
        # All scores are taken on the dense model, so that the order of the groups can't matter.
        scores = graph.scores(group, importance) if importance else None
        order = torch.arange(group.channels - 1, -1, -1) if scores is None else scores.argsort(stable=True)
        cuts.append((group, sorted(order[:count].tolist())))
    for group, channels in cuts:
        graph.remove(group, channels)
