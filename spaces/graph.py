"""The dependency graph: which layers must be pruned together, and the pruning itself.

The only module (with the importance scores) that knows Torch-Pruning. It stands on the low-level `DependencyGraph`
(Fang et al., 2023, "DepGraph", arXiv:2301.12900) with exact channel counts, not on its pruners, whose `round_to`
rounds down and silently skips groups.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from math import ceil, gcd
from typing import Any

import torch
import torch_pruning
from torch import Tensor, nn

from paretune.spaces.attention import Attention, find_attentions, keep_channels
from paretune.spaces.copies import forget, put_back
from paretune.spaces.multihead import HeadAttention, open_multihead

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
        channels: Channels of the dense model, counted where the first layer makes them.
        layers: Layers that lose output channels, `name` first; more than one where they are coupled.
        consumers: Layers that lose input channels because of it.
        uncut: Modules in its way that can't lose channels: recurrent ones, layers that read heads which can't be
            removed, norms and convolutions whose groups don't line up with the channels, and layers whose channels
            can't be matched with the others'.
        unit: How many channels must go together: a head's, those of a norm's group or of a convolution's, those that
            others are added to.
    """

    name: str
    channels: int
    layers: tuple[str, ...]
    consumers: tuple[str, ...]
    uncut: tuple[str, ...] = ()
    unit: int = 1


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


class CutError(ValueError):
    """Channels can't go alone."""


class DependencyGraph:
    """A model's dependency graph; alive only as long as the model keeps the shape that it was built from.

    Args:
        model: Is traced in eval mode and left in it; pruning changes it in place. Attentions whose heads couldn't be
            removed otherwise are rewritten at once, so that they compute the same with an attribute for their number
            of heads (`paretune.spaces.pinned`), or with a layer for each of what one parameter held (`multihead`).
        forward: Runs the model on its example inputs.
    """

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        model.eval()
        open_multihead(model, forward)
        found, self._refused = find_attentions(model, forward)
        self._attentions = {attention.sources[0]: attention for attention in found}
        self.model = model
        self._names = {module: name for name, module in model.named_modules()}
        self._whole = [name for name, module in model.named_modules() if isinstance(module, HeadAttention)]
        self._order = execution_order(model, forward)
        forget(model)  # what was computed without gradients would hide the parameter that it came from
        self._graph: Any = torch_pruning.DependencyGraph()
        with warnings.catch_warnings(), torch.enable_grad():
            # Torch-Pruning warns of free parameters and unknown ops; what they break is found by `why_broken`.
            warnings.simplefilter("ignore")
            # Its own way of calling the model tries model(*batch) first, which a batch of one image may survive.
            self._graph.build_dependency(model, None, forward_fn=lambda module, _: forward(module), verbose=False)
        forget(model)  # what has a history can't be copied
        self._parts: dict[str, tuple[str, ...]] = {}
        self._permutable: dict[str, bool] = {}
        self._groups = self._find_groups()

    def groups(self) -> Iterator[Group]:
        """Every group of the model, in the order of execution."""
        return iter(self._groups)

    def undone(self) -> AbstractContextManager[None]:
        """On leaving, what was done to the model is taken back, and the graph fits it again."""
        nodes = list(self._graph.module2node.values())
        operations = [node.module for node in nodes if isinstance(node.module, nn.Module)]
        return put_back([*self.model.modules(), *operations, *nodes, self._graph])

    def cut(self, kept: dict[str, int], importance: Callable[[Any], Tensor | None] | None = None) -> None:
        """Cut groups down to `kept` channels each, in place; see `prune`."""
        shared = _shared(self.model)
        # All scores are taken on the dense model, so that the order of the groups can't matter.
        gone = {group: self.least(group, kept.get(group.name, group.channels), importance) for group in self._groups}
        wanted = {
            layer: group.channels - len(channels)
            for group, channels in gone.items()
            for layer in (self.model.get_submodule(name) for name in group.layers if not self._attention(group))
            if _out_channels(layer) == group.channels
        }
        for group, channels in gone.items():
            if channels:
                self.remove(group, channels)
        for layer, count in wanted.items():
            if _out_channels(layer) != count:
                raise CutError("its channels go together with others of the same layer (split or gated behind it)")
        for places in shared:
            _share(places)
        forget(self.model)

    def least(self, group: Group, kept: int, importance: Callable[[Any], Tensor | None] | None = None) -> list[int]:
        """The channels that go where so many of a group stay: whole units, the least important ones; see `prune`."""
        units = self.units(group)
        count = len(units) - max(1, ceil(kept / group.unit))
        if count <= 0:
            return []
        scores = self.scores(group, importance) if importance else None
        last_first = torch.arange(len(units) - 1, -1, -1)
        order = last_first if scores is None else scores.cpu()[units].mean(1).argsort(stable=True)
        return sorted(units[order[:count]].flatten().tolist())

    def units(self, group: Group) -> Tensor:
        """The channels of the group's first layer that go together, shape (units, `group.unit`)."""
        if attention := self._attention(group):
            return attention.rows(self.model, attention.sources[0])
        return torch.arange(group.channels).view(-1, group.unit)

    def scores(self, group: Group, importance: Callable[[Any], Tensor | None]) -> Tensor | None:
        """Importance of each channel, shape (channels,), by a Torch-Pruning importance; None where it has none.

        Channels that go together have the same score: the mean of theirs, over all layers whose outputs they are. The
        importance is asked for each of these layers, with the Torch-Pruning group that begins there. What a group
        reaches of an attention is up to Torch-Pruning, but at least one of queries, keys and values.
        """
        attention, units, parts = self._attention(group), self.units(group), self._parts[group.name]
        found = []
        for root in parts:
            module = self.model.get_submodule(root)
            scores = importance(self._select(root, range(_out_channels(module))))
            if scores is not None and group.unit == len(parts) == 1:
                return scores
            if scores is not None:
                in_order = torch.arange(len(scores)).view(len(units), -1)
                rows = attention.rows(self.model, root) if attention else in_order
                found.append(scores.cpu()[rows].mean(1))
        if not found:
            return None
        means = torch.stack(found).mean(0)
        return torch.empty(group.channels).to(means).index_put_((units.flatten(),), means.repeat_interleave(group.unit))

    def remove(self, group: Group, channels: list[int]) -> None:
        """Remove these channels (indices into the dense group) from every layer of the group, in place.

        Raises:
            ValueError: Some channels of a unit would go, and some stay.
        """
        gone = self._gone(group, channels)
        if attention := self._attention(group):
            attention.cut(self.model, gone)
            return
        grouped = set()
        for raw in self._raws(group, gone):
            norms = {}
            for item in raw:
                module = item.dep.target.module
                if isinstance(module, nn.GroupNorm) and module.num_groups > 1:
                    norms[module] = module.num_groups - len(item.idxs) * module.num_groups // module.num_channels
                elif is_grouped(module):
                    grouped.add(module)
            raw._group = [item for item in raw if not is_grouped(item.dep.target.module)]
            raw.prune(record_history=False)
            for module, groups in norms.items():
                module.num_groups = groups
        for module in grouped:
            _cut_groups(module, gone, group.channels // group.unit)

    def silence(self, group: Group, channels: list[int]) -> None:
        """Make no layer read these channels (whole units) of the group, in place."""
        gone = self._gone(group, channels)
        if attention := self._attention(group):
            attention.silence(self.model, gone)
            return
        for item in (item for raw in self._raws(group, gone) for item in raw):
            module = item.dep.target.module
            is_input = not self._graph.is_out_channel_pruning_fn(item.dep.handler)
            if is_input and isinstance(module, PRUNABLE) and not is_grouped(module):
                axis = 0 if isinstance(module, nn.modules.conv._ConvTransposeNd) else 1
                module.weight.data.index_fill_(axis, torch.tensor(item.idxs, device=module.weight.device), 0)

    def can_permute(self, group: Group) -> bool:
        """Whether `permute` can reorder the group's channels.

        Not those that go in units, nor those that a module reads only a part of (behind a split, say) or whose
        parameters aren't known here.
        """
        if group.name not in self._permutable:
            self._permutable[group.name] = self._is_permutable(group)
        return self._permutable[group.name]

    def _is_permutable(self, group: Group) -> bool:
        if group.unit > 1 or len(self._parts[group.name]) > 1:
            return False
        items = list(self._select(self._parts[group.name][0], range(group.channels)))
        modules = [item.dep.target.module for item in items]
        known = (*PRUNABLE, *_PER_CHANNEL, nn.Embedding)
        if any(list(m.parameters()) and not isinstance(m, known) for m in modules if isinstance(m, nn.Module)):
            return False
        return all(len(set(item.root_idxs)) == group.channels for item in items)

    def permute(self, group: Group, order: Tensor) -> None:
        """Reorder the group's channels in every layer of it, in place.

        A model that treats the channels alike computes the same afterwards.

        Args:
            group: Of this graph, one that `can_permute`.
            order: A permutation of the channels.
        """
        done: set[tuple[int, int]] = set()
        for item in self._select(self._parts[group.name][0], range(group.channels)):
            is_output = self._graph.is_out_channel_pruning_fn(item.dep.handler)
            module, source = item.dep.target.module, partial(_source, item.idxs, item.root_idxs, order)
            tensors: list[tuple[Tensor, int]]
            if isinstance(module, nn.Parameter):
                tensors = [(module, item.dep.target.pruning_dim % module.dim())]
            else:
                tensors = list(_channel_axes(module, is_output=is_output))
            for tensor, dim in tensors:
                if (id(tensor), dim) not in done:  # else layers that share a weight would have it reordered twice
                    _permute_tensor(tensor, dim, source)
                    done.add((id(tensor), dim))

    def _find_groups(self) -> list[Group]:
        raws = list(self._graph.get_all_groups(ignored_layers=[], root_module_types=list(PRUNABLE)))
        heads = {name for attention in self._attentions.values() for name in attention.sources}
        groups = [self._heads(attention) for attention in self._attentions.values()]
        raws = [raw for raw in raws if not heads.intersection(self._outputs(raw))]
        groups += [group for group in map(self._group, _tied([self._made(raw) for raw in raws])) if group]
        return sorted(groups, key=lambda group: self._order[self._parts[group.name][0]])

    def _made(self, raw: Any) -> list[Any]:
        """The group as seen from the layers that make its channels: several where theirs are concatenated.

        Torch-Pruning begins where it likes, with an addition of what was concatenated, say: there are more channels.
        """
        parts: list[Any] = []
        for name in self._outputs(raw):
            channels = range(_out_channels(self.model.get_submodule(name)))
            if not any(self._reached(part, name) for part in parts):
                is_root = self._names[raw[0].dep.target.module] == name
                parts.append(raw if is_root else self._select(name, channels))
        return parts

    def _reached(self, raw: Any, name: str) -> set[int]:
        """Output channels of a layer that a group of Torch-Pruning's reaches."""
        items = [item for item in raw if self._names.get(item.dep.target.module) == name]
        makes = self._graph.is_out_channel_pruning_fn
        return {channel for item in items if makes(item.dep.handler) for channel in item.idxs}

    def _heads(self, attention: Attention) -> Group:
        units = attention.rows(self.model, attention.sources[0])
        layers = self._dense_names(attention.sources)
        self._parts[layers[0]] = attention.sources
        return Group(layers[0], units.numel(), layers, self._dense_names([attention.output]), unit=units.shape[1])

    def _group(self, tied: list[Any]) -> Group | None:
        """The group that Torch-Pruning's groups make when channels of all of them must go together."""
        outputs = sorted({name for raw in tied for name in self._outputs(raw)}, key=self._order.__getitem__)
        inputs = sorted({name for raw in tied for name in self._inputs(raw)}, key=self._order.__getitem__)
        layers = tuple(name for name in outputs if self._dense_names([name]) == (name,))
        if not layers:
            return None  # of the inside of PyTorch's attention alone
        consumers = self._dense_names([name for name in inputs if name not in outputs])
        modules = dict.fromkeys(item.dep.target.module for raw in tied for item in raw)
        uncut = [self._names[module] for module in modules if isinstance(module, _WHOLE)]
        uncut += [guess.output for guess in self._refused if set(outputs).intersection(guess.sources)]
        units = gcd(*(len(raw[0].idxs) for raw in tied))
        for item in (item for raw in tied for item in raw):
            runs = _runs(item, is_output=self._graph.is_out_channel_pruning_fn(item.dep.handler))
            if runs == 0:
                uncut.append(self._names[item.dep.target.module])
            elif runs is not None:
                units = gcd(units, runs)
        uncut += [name for name in layers if not self._are_parts(tied, name)]
        # The part that makes the first layer's channels comes first: they are the ones that are counted.
        tied = sorted(tied, key=lambda raw: layers[0] not in self._outputs(raw))
        self._parts[layers[0]] = tuple(self._names[raw[0].dep.target.module] for raw in tied)
        channels = len(tied[0][0].idxs)
        return Group(layers[0], channels, layers, consumers, tuple(dict.fromkeys(uncut)), channels // units)

    def _are_parts(self, raws: list[Any], name: str) -> bool:
        """Whether each output channel of a layer is reached by one of Torch-Pruning's groups, and only one."""
        reached = [channel for raw in raws for channel in self._reached(raw, name)]
        return sorted(reached) == list(range(_out_channels(self.model.get_submodule(name))))

    def _attention(self, group: Group) -> Attention | None:
        return self._attentions.get(self._parts[group.name][0])

    def _gone(self, group: Group, channels: list[int]) -> list[int]:
        whole = torch.isin(self.units(group), torch.tensor(channels, dtype=torch.long))
        if (whole.any(1) != whole.all(1)).any():
            raise ValueError(f"channels of {group.name} must go {group.unit} at a time")
        return whole.all(1).nonzero().flatten().tolist()

    def _raws(self, group: Group, gone: list[int]) -> Iterator[Any]:
        """Torch-Pruning's groups with the channels of units that go; each as the model is when it is asked for.

        A concatenation has lost some channels by then when it comes to those of its second part.
        """
        for root in self._parts[group.name]:
            units = torch.arange(_out_channels(self.model.get_submodule(root))).view(group.channels // group.unit, -1)
            yield self._select(root, units[gone].flatten().tolist())

    def _select(self, root: str, channels: range | list[int]) -> Any:
        module = self.model.get_submodule(root)
        pruner = self._graph.get_pruner_of_module(module)
        return self._graph.get_pruning_group(module, pruner.prune_out_channels, list(channels))

    def _dense_names(self, names: Iterable[str]) -> tuple[str, ...]:
        """The names as the dense model has them: an attention of PyTorch's is one layer."""
        found = (next((path for path in self._whole if name.startswith(f"{path}.")), name) for name in names)
        return tuple(dict.fromkeys(found))

    def _outputs(self, raw: Any) -> tuple[str, ...]:
        return self._layers(raw, self._graph.is_out_channel_pruning_fn)

    def _inputs(self, raw: Any) -> tuple[str, ...]:
        # A depthwise convolution's pruning function counts as both: it passes channels on, and consumes none.
        return self._layers(raw, self._graph.is_in_channel_pruning_fn)

    def _layers(self, raw: Any, selects: Callable[[Any], bool]) -> tuple[str, ...]:
        modules = [item.dep.target.module for item in raw if selects(item.dep.handler)]
        names = {self._names[module] for module in modules if isinstance(module, PRUNABLE)}
        return tuple(sorted(names, key=self._order.__getitem__))


def _out_channels(module: Any) -> int:
    return int(module.out_features if isinstance(module, nn.Linear) else module.out_channels)


def is_grouped(module: Any) -> bool:
    """Whether it is a convolution in groups, but not of one input and one output each as a depthwise one."""
    groups = int(getattr(module, "groups", 1)) if isinstance(module, PRUNABLE) else 1
    return groups > 1 and not groups == module.in_channels == module.out_channels


def _tied(lists: list[list[Any]]) -> list[list[Any]]:
    """Lists of Torch-Pruning's groups, joined where one makes a grouped convolution's inputs, another its outputs."""
    modules = dict.fromkeys(item.dep.target.module for raws in lists for raw in raws for item in raw)
    for module in filter(is_grouped, modules):
        touching = [tied for tied in lists if any(item.dep.target.module is module for raw in tied for item in raw)]
        lists = [tied for tied in lists if tied not in touching] + [[raw for tied in touching for raw in tied]]
    return lists


def _runs(item: Any, *, is_output: bool) -> int | None:
    """Into how many runs of channels, each in one group of a norm or of a convolution, a module parts its channels.

    Returns:
        None where a module's channels go one by one; 0 where its groups don't line up with the channels.
    """
    module, channels = item.dep.target.module, len(item.idxs)
    if isinstance(module, nn.GroupNorm) and module.num_groups > 1:
        run = module.num_channels // module.num_groups
    elif is_grouped(module):
        whole = module.out_channels if is_output else module.in_channels
        run = whole // module.groups
        # Torch-Pruning takes as many outputs as groups for a depthwise convolution, however many inputs there are.
        if module.transposed or channels != whole or module.groups == module.out_channels:
            return 0
    else:
        return None
    first = item.idxs[0]
    in_order = list(item.idxs) == list(range(first, first + channels)) and list(item.root_idxs) == list(range(channels))
    return channels // run if in_order and first % run == channels % run == 0 else 0


@torch.no_grad()
def _cut_groups(module: Any, gone: list[int], units: int) -> None:
    """Remove whole groups of a grouped convolution, in place."""
    stay = torch.tensor([unit for unit in range(units) if unit not in gone])
    rows = torch.arange(module.out_channels).view(units, -1)[stay].flatten()
    groups, inputs = module.groups, module.in_channels // module.groups
    keep_channels(module, rows, dim=0)
    module.groups = groups // units * len(stay)
    module.in_channels = module.groups * inputs


def _source(positions: list[int], roots: list[int], order: Tensor, size: int) -> Tensor:
    """Where each of `size` entries comes from, when the root channels that own `positions` are reordered."""
    places: dict[int, list[int]] = {}
    for position, root in zip(positions, roots, strict=True):
        places.setdefault(root, []).append(position)
    source, new = list(range(size)), order.tolist()
    for root, own in places.items():
        for place, other in zip(own, places[new[root]], strict=True):
            source[place] = other
    return torch.tensor(source)


@torch.no_grad()
def _permute_tensor(tensor: Tensor, dim: int, source: Callable[[int], Tensor]) -> None:
    tensor.copy_(tensor.index_select(dim, source(tensor.shape[dim])))


def _channel_axes(module: nn.Module, *, is_output: bool) -> Iterator[tuple[Tensor, int]]:
    """A module's parameters and statistics, each with the axis of its outputs, or of its inputs."""
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        if isinstance(module, PRUNABLE) and name == "bias" and not is_output:
            continue
        depthwise = getattr(module, "groups", 1) > 1
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        is_first = not isinstance(module, PRUNABLE) or depthwise or is_output != transposed or name == "bias"
        dim = 0 if is_first and not isinstance(module, nn.Embedding) else 1
        if tensor.dim() > dim and tensor.shape[dim] > 1:  # else a counter, or one value for all channels
            yield tensor, dim


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
        kept: Group name to the number of channels that stay, at least 1. Where channels go in units, a part of one
            stays whole.
        importance: Scores a Torch-Pruning group; the channels (units, by their mean) with the lowest scores go. Without
            one the last channels go: enough where only the shape matters, because weights are loaded afterwards.

    Raises:
        CutError: A layer would lose more channels than were asked for.
        ValueError: Layers that share a weight would lose different channels of it.
    """
    DependencyGraph(model, forward).cut(kept, importance)


def _shared(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Parameters that several modules hold: the modules, each with its name for it."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(parameter, []).append((module, name))
    return [found for found in places.values() if len(found) > 1]


def _share(places: list[tuple[nn.Module, str]]) -> None:
    """Make one parameter again of what was one before it was cut in several places."""
    (module, name), *others = places
    parameter = module.get_parameter(name)
    for other, known_as in others:
        if not torch.equal(other.get_parameter(known_as), parameter):
            raise ValueError("layers that share a weight would lose different channels of it")
        setattr(other, known_as, parameter)
