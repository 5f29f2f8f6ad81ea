"""Forwards rewritten so that an attribute says how many heads there are.

Much code writes a number of heads down, or takes a width from its input: `view(n, length, 4, -1)`,
`reshape(n, length, c)` with `n, length, c = x.shape`. With fewer heads both are wrong.
"""

from __future__ import annotations

import functools
import inspect
import operator
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from paretune.spaces.copies import copy_of

PINNED = "pinned_heads"
"""The attribute that counts the heads."""


@dataclass(frozen=True)
class Pin:
    """What is to be rewritten.

    Attributes:
        sources: Children that make queries, keys and values, by their path.
        heads: How many heads they make now.
        by_head: Whether the heads' axis comes first where a source's channels are split, or next to last.
    """

    sources: tuple[str, ...]
    heads: int
    by_head: bool


def pin(owner: nn.Module, how: Pin, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Rewrite a module's `forward` so that the attribute `pinned_heads` counts its heads, in place.

    It stays an instance of its class, with its children and attributes, and computes the same. Arguments that aren't
    tensors are fixed to what they are here; another value raises an error.

    Args:
        owner: The module whose forward calls the sources.
        how: What is to be rewritten.
        args: What the module is called with.
        kwargs: The same by name.

    Returns:
        False where `torch.fx` can't follow the forward; nothing is changed then.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an attribute that is a number, where parameters are expected
            evaluates, trains = (
                _pinned_forward(copy_of(owner).train(mode), how, args, kwargs) for mode in (False, True)
            )
    except Exception:  # torch.fx can't follow all of Python, and says so in a dozen ways
        return False

    kind = type(owner)

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        # The mode may be written into functions' arguments, as dropout's.
        return (trains if self.training else evaluates)(self, *args, **kwargs)

    # Another class, not another module: references, hooks and `isinstance` hold, also for the model itself.
    owner.__class__ = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    setattr(owner, PINNED, how.heads)
    return True


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


class _Shapes(fx.Interpreter):
    """Remembers the shape of each node's tensor."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[Any, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.shapes[n] = tuple(result.shape)
        return result


def _pinned_forward(owner: nn.Module, how: Pin, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
    """The owner's forward with sizes that follow the attribute; `owner` is a copy to be used up."""
    bound = inspect.signature(owner.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    fixed = {name: value for name, value in bound.arguments.items() if not isinstance(value, Tensor)}
    before = set(vars(owner))
    graph = _Tracer().trace(owner, concrete_args=fixed)
    if set(vars(owner)) != before:
        raise ValueError("the forward makes constants")
    for node, name in zip(graph.find_nodes(op="placeholder"), bound.arguments, strict=True):
        node.target = name  # torch.fx renames the fixed ones, but callers may name them
    setattr(owner, PINNED, how.heads)
    shapes = _Shapes(fx.GraphModule(owner, graph))
    with torch.no_grad():
        shapes.run(*bound.arguments.values())
    for node in _reshapings(graph, how.sources):
        _pin_sizes(graph, node, shapes.shapes, how)
    forward: Callable[..., Any] = type(fx.GraphModule(owner, graph)).forward
    return forward


def _reshapings(graph: fx.Graph, sources: Collection[str]) -> list[fx.Node]:
    """Changes of shape between the sources and the layers behind them."""
    behind: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "call_module":
            if node.target in sources:
                behind.add(node)
        elif behind.intersection(node.all_input_nodes):
            behind.add(node)
    nodes = [node for node in graph.nodes if node in behind]
    return [node for node in nodes if node.target in ("view", "reshape", torch.reshape)]


def _pin_sizes(graph: fx.Graph, node: fx.Node, shapes: dict[Any, tuple[int, ...]], how: Pin) -> None:
    """Make the sizes of a split into heads, or of their union, follow the attribute."""
    before, after = shapes[node.args[0]], shapes[node]
    given = node.args[1:]
    sizes = list(given[0] if len(given) == 1 and isinstance(given[0], list | tuple) else given)
    if len(sizes) != len(after):
        return
    if len(after) > len(before) and after[: len(before) - 1] == before[:-1]:
        first = len(before) - 1
        place = first if how.by_head else len(after) - 2
    elif len(after) < len(before) and after[:-1] == before[: len(after) - 1]:
        first = place = len(after) - 1
    else:
        return
    per_head, rest = divmod(after[place], how.heads)
    if rest:
        return
    with graph.inserting_before(node):
        heads = graph.get_attr(PINNED)
        sizes[first:] = after[first:]
        sizes[place] = graph.call_function(operator.mul, (heads, per_head))
    node.args = (node.args[0], tuple(sizes))
