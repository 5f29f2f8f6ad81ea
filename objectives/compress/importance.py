"""Importance scores for structured pruning, by name: one value for each channel of a dependency group.

The groups are Torch-Pruning's; the scores are computed here. Its own (1.6) skip depthwise convolutions, take every
input channel of a grouped convolution for one that all filters read, measure FPGM's distances between squared weights,
keep only the last sample's gradient for the Hessian, and crash on parameters without a gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice, pairwise
from math import ceil
from operator import itemgetter
from typing import TYPE_CHECKING, Any
from zlib import crc32

import torch
from torch import Tensor, nn

from paretune.objectives.compress.readers import Node, Readers, trace_readers
from paretune.objectives.data.inputs import Inputs, call, map_tensors
from paretune.objectives.data.splits import Batch
from paretune.spaces.graph import PRUNABLE

if TYPE_CHECKING:
    from paretune.objectives.compress import Context

Score = Callable[[Any], Tensor | None]
"""Scores the channels of a Torch-Pruning group: a 1-D tensor, or None where the group has nothing to score.

Of a group's items it reads the module (``dep.target.module``), whether its inputs or outputs are meant (the name of
``dep.handler``), the channels there (``idxs``) and those of the group that they belong to (``root_idxs``).
"""

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)

_PART = 16
"""Samples that go through a model at a time: a batch's activations, kept for its gradients, may be tens of GB."""

_HESSIAN_SAMPLES = 64
"""Each costs a backward pass of its own; the mean of so many squared gradients ranks channels well enough."""


def importance(name: str, model: nn.Module, context: Context) -> Score:
    """The importance `name`, ready to score groups of `model`; the higher a channel's score, the more it matters.

    Weights are summed over a channel's share in each layer of the group, outputs and inputs alike, and averaged over
    these layers and norms, as in Torch-Pruning (Fang et al., 2023, arXiv:2301.12900). Scores of different groups have
    different scales: divide each group's by its mean to compare them. `lamp` alone is made to be compared as it is.

    - ``l1``, ``l2``: sum of absolute, of squared weights.
    - ``lamp``: a channel's `l2` over the sum of those that are as large or larger; 1 for the largest.
    - ``bn-scale``: absolute scale of the batch norms.
    - ``fpgm``: sum of the distances of a filter from all others of its layer.
    - ``taylor``: sum of \\|weight x gradient\\|.
    - ``hessian``: sum of weight² x Hessian, whose diagonal is taken as the mean squared gradient of single samples
      (the empirical Fisher information), over at most 64 of them.
    - ``activation``: mean absolute value of what the layers behind the group read.
    - ``apoz``: share of values above zero in the outputs of the rectifiers (ReLU, ReLU6, ``clamp(min=0)``) that read
      the group's layers; where none reads them as they are (but joined to others, say), in what the layers behind read.
    - ``random``: uniform, the same for a layer's name and the seed of PyTorch's global generator, whatever was drawn
      from it since: the ratios that a plan is resolved to remove what was removed when they were found.

    A group that the importance can't score has its `l2`: one without batch norm for `bn-scale`, one whose weights get
    no gradient for `taylor` and `hessian`, one that no convolution or linear layer reads for `activation`, one without
    a zero for `apoz`; every group where data is wanted and the context has none.

    Args:
        name: One of the plan's importances (`paretune.spaces.plan.Pruning` names the papers).
        model: Runs in eval mode where data is needed; its modes, gradients and hooks are left as they were.
        context: Gives batches, and the task's loss on them.
    """
    magnitude = _of_weights(torch.square)
    score = _SCORES[name](model, context)
    return lambda group: magnitude(group) if (found := score(group)) is None else found


def _combine(
    group: Any, values_of: Callable[[nn.Module, bool], Tensor | None], *, average: bool = False
) -> Tensor | None:
    """Each channel's value over the layers of a group.

    Args:
        group: Of Torch-Pruning, with all channels.
        values_of: A module's values, one for each output (where the flag is set) or input channel; None for none.
        average: Whether a channel with several places in a layer (behind a flattening) has their mean, or their sum.

    Returns:
        Shape (channels,): the mean over layers; None where no layer has values, or, of averages, not for all channels.
    """
    total = torch.zeros(len(group[0].idxs))
    counts, layers = torch.zeros_like(total), 0
    for item in group:
        module = item.dep.target.module
        if not isinstance(module, nn.Module) or any(root is None for root in item.root_idxs):
            continue
        # A norm's, an embedding's and a depthwise convolution's two pruning functions are one and the same.
        values = values_of(module, item.dep.handler.__name__ != "prune_in_channels")
        if values is not None:
            roots = torch.tensor(item.root_idxs)
            total.index_add_(0, roots, values.detach().float().cpu()[item.idxs])
            counts.index_add_(0, roots, torch.ones(len(roots)))
            layers += 1
    if not layers or (average and bool((counts == 0).any())):
        return None
    return total / (counts if average else layers)


def _blocks(module: nn.Module, weight: Tensor) -> Tensor:
    """A layer's weight as (groups, outputs of a group, inputs of a group, positions of the kernel)."""
    groups = int(getattr(module, "groups", 1))
    blocks = weight.reshape(groups, len(weight) // groups, weight.shape[1], -1)
    return blocks.transpose(1, 2) if isinstance(module, nn.modules.conv._ConvTransposeNd) else blocks


def _of_weights(value: Callable[[Tensor], Tensor | None], kinds: tuple[type[nn.Module], ...] | None = None) -> Score:
    """Sums what `value` makes of each weight of modules of these kinds; of layers and norms by default.

    Biases aren't looked at, nor embeddings, whose many rows would drown the other layers.
    """

    def values_of(module: nn.Module, is_output: bool) -> Tensor | None:
        weight = getattr(module, "weight", None)
        if not isinstance(module, kinds or (*PRUNABLE, *_NORMS)) or weight is None:
            return None
        values = value(weight)
        if values is None or isinstance(module, PRUNABLE):
            return None if values is None else _blocks(module, values).sum((2, 3) if is_output else (1, 3)).flatten()
        return values if values.ndim == 1 else None  # a layer norm over several axes

    return lambda group: _combine(group, values_of)


def _l1(_model: nn.Module, _context: Context) -> Score:
    return _of_weights(torch.abs)


def _l2(_model: nn.Module, _context: Context) -> Score:
    return _of_weights(torch.square)


def _lamp(_model: nn.Module, _context: Context) -> Score:
    magnitude = _of_weights(torch.square)

    def score(group: Any) -> Tensor | None:
        values = magnitude(group)
        if values is None:
            return None
        ascending, order = values.sort(stable=True)
        as_large = ascending.flip(0).cumsum(0).flip(0)
        scores = torch.zeros_like(values)
        scores[order] = ascending / as_large.clamp_min(torch.finfo(values.dtype).tiny)
        return scores

    return score


def _bn_scale(_model: nn.Module, _context: Context) -> Score:
    return _of_weights(torch.abs, (nn.modules.batchnorm._BatchNorm,))


def _fpgm(_model: nn.Module, _context: Context) -> Score:
    def values_of(module: nn.Module, is_output: bool) -> Tensor | None:
        if not isinstance(module, PRUNABLE) or not is_output:
            return None
        weight: Tensor = module.weight
        filters = _blocks(module, weight.detach()).flatten(0, 1).flatten(1)
        return torch.cdist(filters, filters).sum(1)

    return lambda group: _combine(group, values_of)


def _random(model: nn.Module, _context: Context) -> Score:
    def score(group: Any) -> Tensor:
        root = group[0].dep.target.module
        name = next(name for name, module in model.named_modules() if module is root)
        generator = torch.Generator().manual_seed(crc32(f"{torch.initial_seed()} {name}".encode()))
        return torch.rand(len(group[0].idxs), generator=generator)

    return score


def in_parts(batch: Batch) -> Iterator[tuple[Inputs, Tensor, float]]:
    """A batch's inputs and targets in parts of at most 16 samples, each with its share of the batch.

    Parts of a batch are as large as each other, or by one smaller: some models can't take a single sample.
    """
    size = len(batch.targets)
    count = ceil(size / _PART)
    for start, end in pairwise(size * part // count for part in range(count + 1)):
        rows = slice(start, end)
        yield map_tensors(itemgetter(rows), batch.inputs), batch.targets[rows], (end - start) / size


@contextmanager
def _observed(model: nn.Module) -> Iterator[None]:
    """Eval mode, and gradients for every parameter; both are put back."""
    modes = {module: module.training for module in model.modules()}
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.eval().requires_grad_(True)
        yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, requires in wanted.items():
            parameter.requires_grad_(requires)


def _add_gradients(
    sums: dict[Tensor, Tensor], loss: Tensor, model: nn.Module, value: Callable[[Tensor], Tensor]
) -> None:
    """Add what `value` makes of each gradient; `torch.autograd.grad` leaves the parameters' own gradients alone."""
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            sums[parameter] = sums.get(parameter, 0) + value(gradient)


def _taylor(model: nn.Module, context: Context) -> Score:
    sums: dict[Tensor, Tensor] = {}
    with _observed(model):
        for batch in context.batches:
            for inputs, targets, share in in_parts(batch):
                loss = share * context.task.loss(call(model, inputs), targets)
                _add_gradients(sums, loss, model, lambda gradient: gradient)
    return _of_weights(lambda weight: (weight * sums[weight]).abs() if weight in sums else None)


def _hessian(model: nn.Module, context: Context) -> Score:
    sums: dict[Tensor, Tensor] = {}
    samples = ((batch, row) for batch in context.batches for row in range(len(batch.targets)))
    with _observed(model):
        for batch, row in islice(samples, _HESSIAN_SAMPLES):
            # Twice, because some models can't take a batch of one; the mean loss of both is that of one.
            twice = torch.tensor([row, row], device=batch.targets.device)
            inputs = map_tensors(partial(torch.index_select, dim=0, index=twice), batch.inputs)
            loss = context.task.loss(call(model, inputs), batch.targets[twice])
            _add_gradients(sums, loss, model, torch.square)
    return _of_weights(lambda weight: weight.square() * sums[weight] if weight in sums else None)


def _means_read(model: nn.Module, context: Context, value: Callable[[Tensor], Tensor]) -> dict[nn.Module, Tensor]:
    """Mean over the batches of `value` of what each layer reads, for each of its input channels."""
    sums: dict[nn.Module, Tensor] = {}
    rows: dict[nn.Module, int] = {}

    def add(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if inputs:
            values = _rows(module, value(inputs[0]))
            sums[module] = sums.get(module, 0) + values.sum(0)
            rows[module] = rows.get(module, 0) + len(values)

    handles = [module.register_forward_pre_hook(add) for module in model.modules() if isinstance(module, PRUNABLE)]
    try:
        with _observed(model), torch.no_grad():
            for inputs, _, _ in chain.from_iterable(map(in_parts, context.batches)):
                call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return {module: total / rows[module] for module, total in sums.items()}


def _rows(module: nn.Module, tensor: Tensor) -> Tensor:
    """What a layer reads or makes, as (samples and positions, channels)."""
    return tensor.float().movedim(_channel_axis(module), -1).flatten(0, -2)


def _channel_axis(module: nn.Module) -> int:
    """Counted from the end: -1 for a linear layer, -3 for a 2-D convolution."""
    weight: Any = module.weight
    return 1 - int(weight.ndim)


def _of_means(means: Mapping[nn.Module, Tensor], *, outputs: bool = False) -> Score:
    """Averages what is known of each layer's outputs, or of the inputs of layers that read the group's channels."""

    def values_of(module: nn.Module, is_output: bool) -> Tensor | None:
        # A depthwise convolution counts as an output and reads the group's channels as well.
        depthwise = int(getattr(module, "groups", 1)) > 1
        return means.get(module) if is_output == outputs or depthwise else None

    return lambda group: _combine(group, values_of, average=True)


def _activation(model: nn.Module, context: Context) -> Score:
    return _of_means(_means_read(model, context, torch.abs))


def _apoz(model: nn.Module, context: Context) -> Score:
    rectified = _of_means(means_rectified(model, context), outputs=True)
    read = _of_means(_means_read(model, context, lambda tensor: tensor != 0))

    def score(group: Any) -> Tensor | None:
        found = rectified(group)
        found = read(group) if found is None else found
        return None if found is None or bool((found == 1).all()) else found

    return score


def means_rectified(model: nn.Module, context: Context) -> dict[nn.Module, Tensor]:
    """Share of values above zero, for each output channel of layers, where rectifiers read them as they are.

    Pooling hides zeros, so that what the next layer reads won't do where the rectifier's own output can be had.
    """
    sums: dict[nn.Module, Tensor] = {}
    rows: dict[nn.Module, int] = {}

    def add(inputs: Inputs) -> None:  # a function of its own: what autograd saved goes before the next part comes
        readers = trace_readers(model, partial(call, inputs=inputs), PRUNABLE)
        for name in readers.outputs:
            module: Any = model.get_submodule(name)
            channels = module.out_features if isinstance(module, nn.Linear) else module.out_channels
            axis = _channel_axis(module)
            for alive in _rectified(readers, name):
                if alive.ndim >= -axis and alive.shape[axis] == channels:
                    values = _rows(module, alive)
                    sums[module] = sums.get(module, 0) + values.sum(0)
                    rows[module] = rows.get(module, 0) + len(values)

    with _observed(model):
        for inputs, _, _ in chain.from_iterable(map(in_parts, context.batches)):
            add(inputs)
    return {module: total / rows[module] for module, total in sums.items()}


def _rectified(readers: Readers, layer: str) -> Iterator[Tensor]:
    """Where the first rectifiers behind a layer let values pass, before the next layer."""
    layers = set(readers.outputs.values())
    stack, seen = [readers.outputs[layer]], {readers.outputs[layer]}
    while stack:
        for reader in readers.readers.get(stack.pop(), ()):
            if reader in seen:
                continue
            seen.add(reader)
            alive = _alive(reader)
            if alive is not None:
                yield alive
            elif reader not in layers:
                stack.append(reader)


def _alive(node: Node) -> Tensor | None:
    """Where a rectifier's output is above zero, from what autograd saved for it; None for other operations."""
    kind = type(node).__name__
    if kind == "ReluBackward0":
        return node._saved_result.detach() > 0  # type: ignore[no-any-return]
    low = {"HardtanhBackward0": "_saved_min_val", "ClampBackward1": "_saved_min", "ClampMinBackward0": "_saved_min"}
    if kind in low and getattr(node, low[kind]) == 0:
        return node._saved_self.detach() > 0  # type: ignore[no-any-return]
    return None


_SCORES: Mapping[str, Callable[[nn.Module, Any], Score]] = {
    "l1": _l1,
    "l2": _l2,
    "lamp": _lamp,
    "bn-scale": _bn_scale,
    "fpgm": _fpgm,
    "taylor": _taylor,
    "hessian": _hessian,
    "activation": _activation,
    "apoz": _apoz,
    "random": _random,
}
