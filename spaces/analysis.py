"""What a model offers to a search: its groups, its layers, and what can't be pruned and why."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from paretune.spaces.copies import copy_of, forget
from paretune.spaces.graph import PRUNABLE, CutError, DependencyGraph, Forward, Group, execution_order, is_grouped
from paretune.spaces.grid import channel_grid
from paretune.spaces.multihead import is_close

EXCLUDED = "the job excludes it (space.exclude)"

_TORCH = Path(torch.__file__).parent


@dataclass(frozen=True)
class Layer:
    """A layer with weights.

    Attributes:
        name: Path of the module in the model.
        kind: Class name of the module, e.g. ``"Conv2d"``.
        params: Weights and biases.
        macs: Multiply-accumulates for one sample.
        group: Name of the group whose ratio cuts this layer's output channels, None where it is frozen.
        inputs: Input channels or features.
    """

    name: str
    kind: str
    params: int
    macs: int
    group: str | None
    inputs: int = 0


@dataclass(frozen=True)
class Frozen:
    """A layer that keeps all its output channels, and why."""

    layer: str
    reason: str


@dataclass(frozen=True)
class Analysis:
    """The record of a model's analysis; JSON-able through `to_dict`.

    Attributes:
        groups: What can be pruned, in the order of execution.
        frozen: What can't, with the reason.
        layers: Every convolution and linear layer that a forward pass calls, in the order of execution.
        params: Parameters of the whole model.
        macs: Multiply-accumulates of a forward pass, for one sample.
        latency_share: Layer name to its share of the dense model's latency, once it was profiled; layers that the
            runtime doesn't report are missing.
        widths: Layer name to the bit-widths in which the target was seen to run it, widest first, once probed.
        counts: Layer kind to the channel counts at which the target was measured to get faster, once probed.
    """

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    layers: tuple[Layer, ...]
    params: int
    macs: int
    latency_share: dict[str, float] = field(default_factory=dict)
    widths: dict[str, tuple[int, ...]] = field(default_factory=dict)
    counts: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values, with parameters, MACs and latency share summed per group."""
        by_name = {layer.name: layer for layer in self.layers}
        groups = []
        for group in self.groups:
            members = [by_name[name] for name in group.layers if name in by_name]  # PyTorch's attention isn't a layer
            groups.append(
                asdict(group)
                | {
                    "coupled": list(group.layers[1:]),
                    "params": sum(layer.params for layer in members),
                    "macs": sum(layer.macs for layer in members),
                    "latency_share": sum(self.latency_share.get(layer.name, 0.0) for layer in members),
                }
            )
        layers = [
            asdict(layer)
            | {"latency_share": self.latency_share.get(layer.name, 0.0), "widths": self.widths.get(layer.name, ())}
            for layer in self.layers
        ]
        return {
            "groups": groups,
            "frozen": [asdict(frozen) for frozen in self.frozen],
            "layers": layers,
            "params": self.params,
            "macs": self.macs,
            "latency_share": self.latency_share,
            "widths": self.widths,
            "counts": self.counts,
        }


def analyse(model: nn.Module, forward: Forward, *, exclude: Sequence[str] = ()) -> Analysis:
    """Find what can be pruned, try it, and name the reason for all that can't.

    Args:
        model: The dense model; it is copied, not changed.
        forward: Runs a model on a batch of at least two example inputs and returns its output tensor.
        exclude: Glob patterns of layer names that must stay dense.
    """
    model = copy_of(model).eval()
    order = execution_order(model, forward)
    groups, frozen = [], []
    survivors: list[Group] = []
    try:
        graph = DependencyGraph(copy_of(model), forward)  # finding its groups may rewrite its attentions
    except Exception as error:
        frozen += [Frozen(name, f"the dependency graph can't be built: {_culprit(error)}") for name in order]
    else:
        for group in graph.groups():
            if reason := _static_reason(graph.model, group, exclude):
                frozen += [Frozen(layer, reason) for layer in group.layers]
            else:
                groups.append(group)
        survivors, broken = _trial_prune(graph, forward, groups)
        frozen += [Frozen(layer, reason) for group, reason in broken for layer in group.layers]
    seen = {layer for group in survivors for layer in group.layers} | {entry.layer for entry in frozen}
    frozen += [Frozen(name, "it isn't reached by the dependency graph") for name in order if name not in seen]
    frozen.sort(key=lambda entry: order.get(entry.layer, len(order)))
    owner = {layer: group.name for group in survivors for layer in group.layers}
    layers, params, macs = _count(model, forward, owner, order)
    return Analysis(tuple(survivors), tuple(frozen), layers, params, macs)


def _static_reason(model: nn.Module, group: Group, exclude: Sequence[str]) -> str | None:
    for name in group.layers:
        if any(fnmatchcase(name, pattern) for pattern in exclude):
            return EXCLUDED
    if group.uncut:
        return _why_uncut(model, group)
    if not group.consumers:
        return "it is the output layer"
    if len(channel_grid(group.channels, unit=group.unit)) < 2:
        return f"it is too narrow ({group.channels} channels, less than two steps of the grid)"
    return None


def _why_uncut(model: nn.Module, group: Group) -> str:
    name = group.uncut[0]
    module: Any = model.get_submodule(name)
    if isinstance(module, nn.GroupNorm):
        return f"{name} normalises in groups (num_groups={module.num_groups}) that don't line up with its channels"
    if is_grouped(module):
        return f"{name} is a grouped convolution (groups={module.groups}) that can't lose whole groups"
    if name in group.layers:
        other = next((layer for layer in group.layers if layer != name), name)
        return f"channels of {name} and {other} can't be matched (split, joined or transposed in between)"
    if isinstance(module, PRUNABLE):
        return f"its heads, which {name} reads, can't be removed: without some, the others compute something else"
    return f"its channels pass {name}, whose kind ({type(module).__name__}) can't be cut"


def _trial_prune(
    graph: DependencyGraph, forward: Forward, groups: Sequence[Group]
) -> tuple[list[Group], list[tuple[Group, str]]]:
    """Split the groups into those that survive pruning and those that break the model, with the reason.

    All are tried at once; only where that fails is the set halved, so that a model without trouble costs one try.
    """
    if not groups:
        return [], []
    reason = _why_broken(graph, forward, _smallest(groups))
    if reason is None:
        return list(groups), []
    if len(groups) == 1:
        return [], [(groups[0], reason)]
    middle = len(groups) // 2
    left, left_broken = _trial_prune(graph, forward, groups[:middle])
    right, right_broken = _trial_prune(graph, forward, groups[middle:])
    if left_broken or right_broken:
        survivors, clashing = _trial_prune(graph, forward, left + right)
        return survivors, left_broken + right_broken + clashing
    # Both halves work and the whole doesn't: keep the half that comes first, name the clash for the other.
    return left, [(group, f"it can't be pruned together with {groups[0].name}: {reason}") for group in right]


def _smallest(groups: Sequence[Group]) -> dict[str, int]:
    return {group.name: channel_grid(group.channels, unit=group.unit)[0] for group in groups}


def why_broken(model: nn.Module, forward: Forward, kept: dict[str, int]) -> str | None:
    """The reason why `model` doesn't run forward and backward with only `kept` channels; None where it does.

    The model is copied. The reason names the line of the user's code that stopped it.
    """
    return _why_broken(DependencyGraph(copy_of(model), forward), forward, kept)


def _why_broken(graph: DependencyGraph, forward: Forward, kept: dict[str, int]) -> str | None:
    model = graph.model
    with torch.no_grad():
        before = forward(model)
    try:
        with graph.undone():
            graph.cut(kept, _scattered)
            output = forward(model.train())
            if output.shape != before.shape:
                return f"the output's shape would change from {tuple(before.shape)} to {tuple(output.shape)}"
            output.float().sum().backward()
    except CutError as error:
        return str(error)
    except Exception as error:
        return f"pruning it breaks {_culprit(error)}"
    tried = [group for group in graph.groups() if kept.get(group.name, group.channels) < group.channels]
    with graph.undone():
        if not treats_alike(graph, forward, [group for group in tried if graph.can_permute(group)], before):
            return "the model doesn't treat its channels alike (shuffled, split into heads, normalised in groups)"
    others = {group.name: kept[group.name] for group in tried if not graph.can_permute(group)}
    if others and not cuts_exactly(graph, forward, others):
        return "without some of its channels the model computes something else than with those silenced"
    return None


def treats_alike(graph: DependencyGraph, forward: Forward, groups: Iterable[Group], before: Tensor) -> bool:
    """Whether the model computes `before` also when the channels of these groups of its graph change places.

    Where it doesn't, an operation between the layers depends on a channel's position, which the dependency graph can't
    see: it would remove one channel here and another one there. The model keeps the permuted weights.
    """
    generator = torch.Generator().manual_seed(0)
    for group in groups:
        graph.permute(group, torch.randperm(group.channels, generator=generator))
    forget(graph.model)
    with torch.no_grad():
        after = forward(graph.model)
    # Sums are taken in another order; real differences are many times larger.
    return torch.allclose(after, before, rtol=1e-2, atol=1e-3 * float(before.abs().max()))


def cuts_exactly(graph: DependencyGraph, forward: Forward, kept: dict[str, int]) -> bool:
    """Whether the model computes without some channels what it computes when no layer reads them.

    What other channels compute doesn't depend on a head, or on a group of a norm or of a convolution: the two are the
    same where the right channels went, and the code around them knows.

    Args:
        graph: Of the model; neither is changed.
        forward: Runs it on its example inputs.
        kept: Channels that stay of some groups, by the group's name.
    """
    with torch.no_grad():
        with graph.undone():
            for group in [group for group in graph.groups() if group.name in kept]:
                graph.silence(group, graph.least(group, kept[group.name], _scattered))
            forget(graph.model)
            want = forward(graph.model)
        with graph.undone():
            graph.cut(kept, _scattered)
            got = forward(graph.model)
    return got.shape == want.shape and is_close(got, want)


def _scattered(group: Any) -> Tensor:
    """Scores that spread the channels that go over the whole group: a slice in `forward` may take its first half."""
    return torch.arange(len(group[0].idxs)) * 0.618034 % 1


def _culprit(error: Exception) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
    message = str(error).strip().splitlines()
    detail = f"{type(error).__name__}: {message[0][:120]}" if message else type(error).__name__
    if not frames:
        return detail
    return f"`{frames[-1].line}` ({Path(frames[-1].filename).name}:{frames[-1].lineno}; {detail})"


def _is_users(filename: str) -> bool:
    path = Path(filename)
    ours = Path(__file__).resolve().parent
    return _TORCH not in path.parents and "torch_pruning" not in path.parts and path.resolve().parent != ours


def _count(
    model: nn.Module, forward: Forward, owner: dict[str, str], order: dict[str, int]
) -> tuple[tuple[Layer, ...], int, int]:
    params = sum(parameter.numel() for parameter in model.parameters())
    macs, by_layer = count_macs(model, forward)
    layers = []
    for name in sorted(order, key=order.__getitem__):
        module = model.get_submodule(name)
        own = sum(parameter.numel() for parameter in module.parameters())
        inputs = int(getattr(module, "in_features", 0) or getattr(module, "in_channels", 0))
        layers.append(Layer(name, type(module).__name__, own, by_layer.get(name, 0), owner.get(name), inputs))
    return tuple(layers), params, macs


def count_macs(model: nn.Module, forward: Callable[[nn.Module], Any]) -> tuple[int, dict[str, int]]:
    """Multiply-accumulates for one sample: of the whole forward pass, and per layer with weights."""
    batch = {"size": 1}

    def remember(_module: nn.Module, _inputs: Any, output: Any) -> None:
        batch["size"] = len(output)

    handle = model.register_forward_hook(remember)
    counter = FlopCounterMode(display=False)
    # The counter stumbles over views of trainable parameters that go straight into a module, as learned queries do.
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        with torch.no_grad(), counter:
            forward(model)
    finally:
        handle.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)
    counts = counter.get_flop_counts()
    prefix = type(model).__name__ + "."
    # The counter counts a multiply-add as two operations.
    by_layer = {
        name: sum(counts[prefix + name].values()) // (2 * batch["size"])
        for name, module in model.named_modules()
        if isinstance(module, PRUNABLE) and prefix + name in counts
    }
    return counter.get_total_flops() // (2 * batch["size"]), by_layer
