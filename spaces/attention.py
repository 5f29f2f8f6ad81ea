"""Attention whose heads can be removed: where it is, how its heads lie in its layers, and the cut itself.

A head is the same rows of the layers that make queries, keys and values, and columns of the layer that reads what the
heads have mixed. Which ones, and how the code around them learns that there are fewer, can't be read off a graph: it is
guessed, and a guess counts only when a copy with random weights computes without some heads what it computed with those
heads silenced. That proves it of the code, whatever the weights: a layer that training starts at zero hides nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor, nn

from paretune.spaces.copies import copy_of, forget
from paretune.spaces.dataflow import Trace, tensors_in
from paretune.spaces.multihead import is_close
from paretune.spaces.pinned import Pin, pin

Forward = Callable[[nn.Module], Any]

_CUTTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d)

Fix = Literal["none", "counts", "sizes"]
"""What must be set for the code to know of fewer heads: nothing, attributes that count heads, those of widths too."""


@dataclass(frozen=True)
class Attention:
    """Layers that share heads.

    Attributes:
        owner: Path of the smallest module that is called and holds all of them; empty for the model itself.
        sources: Paths of the layers that make queries, keys and values: three, or fewer where they are fused.
        output: Path of the layer that reads the mixed heads.
        heads: Heads that can be removed each on its own. Queries that share keys and values count as one.
        queries: Heads of the queries; a multiple of `heads`.
        by_head: How fused sources lie: one head's query, key and value together, or all queries first.
        fix: How the code learns that there are fewer.
        tables: Whether parameters with an axis as long as there are heads belong to them, as biases of positions do.
    """

    owner: str
    sources: tuple[str, ...]
    output: str
    heads: int
    queries: int
    by_head: bool = False
    fix: Fix = "none"
    tables: bool = False

    def rows(self, model: nn.Module, source: str) -> Tensor:
        """The output channels of each head in a source, shape (heads, channels of a head)."""
        channels = _outputs(model.get_submodule(source))
        parts = 1 if self.by_head else self._parts(source, model)
        return torch.arange(channels).view(parts, self.heads, -1).transpose(0, 1).reshape(self.heads, -1)

    def columns(self, model: nn.Module) -> Tensor:
        """The input channels of each head in the output layer, shape (heads, channels of a head)."""
        return torch.arange(_inputs(model.get_submodule(self.output))).view(self.heads, -1)

    def silence(self, model: nn.Module, gone: Iterable[int]) -> None:
        """Make the model compute as if these heads gave zeros, in place."""
        weight: Any = model.get_submodule(self.output).weight
        weight.data[:, self.columns(model)[sorted(gone)].flatten()] = 0

    def cut(self, model: nn.Module, gone: Iterable[int]) -> None:
        """Remove these heads from all layers, in place."""
        stay = sorted(set(range(self.heads)) - set(gone))
        sources = {name: self.rows(model, name)[stay].flatten().sort().values for name in self.sources}
        columns, width = self.columns(model)[stay].flatten(), self.columns(model).numel()
        # Attributes that count heads or name widths, as they are and as they will be.
        counts = {self.heads: len(stay), self.queries: self.queries // self.heads * len(stay)}
        sizes = {width: len(columns)}
        for name, rows in sources.items():
            module = model.get_submodule(name)
            sizes[_outputs(module)] = len(rows)
            keep_channels(module, rows, dim=0)
        keep_channels(model.get_submodule(self.output), columns, dim=1)
        owner = model.get_submodule(self.owner)
        _set_attributes(owner, counts, sizes, self.fix)
        for module, name, axis in _tables(owner, self.heads) if self.tables else ():
            setattr(module, name, _selected(module.get_parameter(name), torch.tensor(stay), axis))

    def _parts(self, source: str, model: nn.Module) -> int:
        """How many of queries, keys and values a source makes."""
        if len(self.sources) == 2:  # the wider one makes two
            return 1 + (_outputs(model.get_submodule(source)) == max(map(_outputs, self._modules(model))))
        return 3 // len(self.sources)

    def _modules(self, model: nn.Module) -> Iterator[nn.Module]:
        return (model.get_submodule(name) for name in self.sources)


def _outputs(module: nn.Module) -> int:
    weight: Any = module.weight
    return len(weight)


def _inputs(module: nn.Module) -> int:
    weight: Any = module.weight
    return int(weight.shape[1])


def keep_channels(module: nn.Module, stay: Tensor, *, dim: int) -> None:
    """Keep these output (`dim` 0) or input (1) channels of a linear layer or an ungrouped convolution, in place."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if dim == 0 or name == "weight":
            setattr(module, name, _selected(parameter, stay, dim))
    kind = "features" if isinstance(module, nn.Linear) else "channels"
    setattr(module, f"{'in' if dim else 'out'}_{kind}", len(stay))


def _selected(parameter: nn.Parameter, stay: Tensor, dim: int) -> nn.Parameter:
    stay = stay.to(parameter.device)
    selected = nn.Parameter(parameter.detach().index_select(dim, stay), requires_grad=parameter.requires_grad)
    if parameter.grad is not None:
        selected.grad = parameter.grad.index_select(dim, stay)
    return selected


def _set_attributes(owner: nn.Module, counts: dict[int, int], sizes: dict[int, int], fix: Fix) -> None:
    for module in _users_modules(owner) if fix != "none" else ():
        for name, value in list(vars(module).items()):
            if type(value) is not int:
                continue
            is_size = any(word in name.lower() for word in ("dim", "size", "width", "channel"))
            if value in counts and "head" in name.lower() and not is_size:
                setattr(module, name, counts[value])
            elif value in sizes and fix == "sizes":
                setattr(module, name, sizes[value])


def _tables(owner: nn.Module, heads: int) -> list[tuple[nn.Module, str, int]]:
    """Parameters with one axis of that length: the module, its name for it, the axis."""
    return [
        (module, name, parameter.shape.index(heads))
        for module in _users_modules(owner)
        for name, parameter in module.named_parameters(recurse=False)
        if list(parameter.shape).count(heads) == 1
    ]


def _users_modules(owner: nn.Module) -> Iterator[nn.Module]:
    return (module for module in owner.modules() if not type(module).__module__.startswith("torch."))


def find_attentions(model: nn.Module, forward: Forward) -> tuple[list[Attention], list[Attention]]:
    """Attentions of which heads can be removed, each proven on a copy, and those that look like it but don't hold.

    Where nothing else tells the code of an attention how many heads it has, its module's `forward` is rewritten in
    place. It then computes the same.

    Args:
        model: In eval mode.
        forward: Runs it on its example inputs, of more than one token.

    Returns:
        Those that hold, and those that don't; each in the order of execution.
    """
    found: list[Attention] = []
    refused: list[Attention] = []
    guesses = list(dict.fromkeys(_guesses(model, forward)))
    inputs = _inputs_of(model, forward, {guess.owner for guess in guesses})
    for guess in guesses:
        taken = {name for attention in found for name in (*attention.sources, attention.output)}
        shares = taken.intersection((*guess.sources, guess.output))
        # The blocks of a model are alike: what held for the last one comes first.
        proven = None if shares else _proven(model, guess, inputs[guess.owner], found[-1] if found else None)
        if proven is None:
            refused.append(guess)
        else:
            found.append(proven)
    return found, refused


def _guesses(model: nn.Module, forward: Forward) -> Iterator[Attention]:
    """Attentions that a forward pass goes through, of two heads or more, with their owners."""
    trace = Trace()
    names = {module: name for name, module in model.named_modules() if hasattr(module, "weight")}
    handles = [
        module.register_forward_hook(lambda module, inputs, output: trace.add("", inputs, output, name=names[module]))
        for module in names
        if isinstance(module, _CUTTABLE)
    ]
    called: set[str] = set()
    handles += [
        module.register_forward_pre_hook(lambda _module, _inputs, name=name: called.add(name))
        for name, module in model.named_modules()
    ]
    try:
        with torch.no_grad(), trace:
            forward(model)
    finally:
        for handle in handles:
            handle.remove()
    order = {step.name: place for place, step in enumerate(trace.steps) if step.name}
    for place, step in enumerate(trace.steps):
        if step.heads < 2:
            continue
        core = place if step.function == "scaled_dot_product_attention" else trace.mixer(place)
        if core is None:
            continue
        sources, outputs = trace.before(core), trace.behind(core)
        if 1 <= len(sources) <= 3 and len(outputs) == 1:
            in_order = tuple(sorted(sources, key=lambda name: order[name]))
            heads = step.heads // trace.steps[order[in_order[0]]].batch if step.folded else step.heads
            guess = Attention("", in_order, outputs.pop(), heads, heads)
            if heads > 1 and _counts(model, guess):
                yield replace(guess, owner=_owner(guess, called))


def _counts(model: nn.Module, guess: Attention) -> list[int]:
    """How many heads might go each on its own, by the widths of the layers; the likeliest first."""
    modules = [model.get_submodule(name) for name in (*guess.sources, guess.output)]
    width, widths = _inputs(modules[-1]), [_outputs(module) for module in modules[:-1]]
    if width % guess.queries or any(getattr(module, "groups", 1) > 1 for module in modules):
        return []
    counts = [guess.queries] if all(size % guess.queries == 0 for size in widths) else []
    if len(widths) == 3 and min(widths) < width:  # several queries may share a key and a value
        counts.append(min(widths) * guess.queries // width)
    return [count for count in counts if count > 1 and guess.queries % count == 0]


def _owner(guess: Attention, called: set[str]) -> str:
    paths = [name.split(".")[:-1] for name in (*guess.sources, guess.output)]
    shared: list[str] = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    while shared and ".".join(shared) not in called:  # a list of modules has no forward
        shared.pop()
    return ".".join(shared)


@dataclass(frozen=True)
class _Call:
    """What a module was called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def noisy(self) -> _Call:
        """The same with noise on all floats, so that no two tokens are alike."""
        generator = torch.Generator().manual_seed(0)
        return _Call(_noisy(self.args, generator), _noisy(self.kwargs, generator))


def _noisy(value: Any, generator: torch.Generator) -> Any:
    if isinstance(value, Tensor):
        noise = torch.randn(value.shape, generator=generator)
        return value + noise.to(value) if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: _noisy(entry, generator) for name, entry in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_noisy(entry, generator) for entry in value)
    return value


def _inputs_of(model: nn.Module, forward: Forward, paths: set[str]) -> dict[str, _Call]:
    calls: dict[str, _Call] = {}

    def hook(path: str) -> Callable[..., None]:
        return lambda _module, args, kwargs: calls.update({path: _Call(args, kwargs)})

    handles = [
        model.get_submodule(path).register_forward_pre_hook(hook(path), with_kwargs=True) for path in sorted(paths)
    ]
    try:
        with torch.no_grad():
            if paths:
                forward(model)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _proven(model: nn.Module, guess: Attention, call: _Call, last: Attention | None) -> Attention | None:
    """The guess with the layout and the fix that hold; pins the heads of its owner where nothing else does."""
    owner = model.get_submodule(guess.owner)
    start = len(guess.owner) + 1 if guess.owner else 0
    local = replace(guess, owner="", sources=tuple(name[start:] for name in guess.sources), output=guess.output[start:])
    counts, layouts = _counts(model, guess), (False, True) if len(guess.sources) < 3 else (False,)
    tables = (False, True) if _tables(owner, guess.queries) else (False,)
    fixes: tuple[Fix, ...] = ("none", "counts", "sizes")
    shapes = [
        replace(local, heads=heads, by_head=by_head, tables=own)
        for heads, by_head, own in product(counts, layouts, tables)
        if not own or heads == guess.queries
    ]
    options = [replace(shape, fix=fix) for shape, fix in product(shapes, fixes)]
    if last is not None:
        alike = (last.by_head, last.fix, last.tables)
        options.sort(key=lambda option: (option.by_head, option.fix, option.tables) != alike)
    for option in options:
        if _holds(owner, option, call):
            return replace(option, owner=guess.owner, sources=guess.sources, output=guess.output)
    for option in [replace(shape, fix="counts") for shape in shapes if shape.heads == shape.queries]:
        how, pinned = Pin(option.sources, option.heads, option.by_head), copy_of(owner)
        if pin(pinned, how, call.args, call.kwargs) and _holds(pinned, option, call):
            pin(owner, how, call.args, call.kwargs)
            return replace(option, owner=guess.owner, sources=guess.sources, output=guess.output)
    return None


def _holds(owner: nn.Module, attention: Attention, call: _Call) -> bool:
    """Whether a copy with random weights computes the same without some heads as with them silenced."""
    dense, call = copy_of(owner), call.noisy()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in dense.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            # Wide enough for shares that differ, and for outputs that neither vanish nor blow up.
            parameter.copy_(values * (2 / parameter[0].numel() ** 0.5 if parameter.dim() > 1 else 1.0))
        gone = range(0, attention.heads - attention.heads % 2, 2)
        cut, silent = copy_of(dense), copy_of(dense)
        attention.silence(silent, gone)
        try:
            attention.cut(cut, gone)
            for module in (cut, silent, dense):
                forget(module)
            got, want, before = (next(tensors_in(m(*call.args, **call.kwargs))) for m in (cut, silent, dense))
        except Exception:  # whatever the user's code raises when it is given fewer heads
            return False
    mattered = before.shape == want.shape and not torch.allclose(before, want, rtol=1e-2)
    return mattered and got.shape == want.shape and is_close(got, want)
