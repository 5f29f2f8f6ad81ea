"""What reads what in a forward pass, and which steps are attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode

MIXERS = ("matmul", "__matmul__", "__rmatmul__", "bmm", "einsum")
"""Products by which values are mixed."""


@dataclass(frozen=True)
class Step:
    """A call in a forward pass: a function, or a whole layer.

    Attributes:
        function: Its name.
        inputs: Positions of the steps that made its inputs.
        name: Of the layer.
        heads: Where it makes an attention's shares or mixes values by them: how many heads it does that for; or that
            times the batch, where `folded`.
        folded: Whether samples and heads are one axis.
        batch: Size of its output's first axis.
    """

    function: str
    inputs: tuple[int, ...]
    name: str | None = None
    heads: int = 0
    folded: bool = False
    batch: int = 0


class Trace(TorchFunctionMode):
    """Records which call reads whose outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self._made: dict[int, int] = {}
        self._alive: list[Any] = []  # else another tensor could get the id of one that is gone

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name, heads = getattr(func, "__name__", ""), 0
        tensors = list(tensors_in((args, kwargs)))
        if name == "scaled_dot_product_attention" and tensors[0].dim() == 4 and tensors[1].shape[2] > 1:
            heads, tensors = tensors[0].shape[1], tensors[:3]
        elif name == "softmax" and isinstance(output, Tensor) and output.dim() in (3, 4) and output.shape[-1] > 1:
            heads = output.shape[-3]
        self.add(name, tensors, output, heads=heads, folded=heads > 0 and len(output.shape) == 3)
        return output

    def add(
        self,
        function: str,
        inputs: Any,
        output: Any,
        *,
        name: str | None = None,
        heads: int = 0,
        folded: bool = False,
    ) -> None:
        """Record a call, unless it makes no tensor."""
        made = list(tensors_in(output))
        if made:
            read = tuple(self._made[id(tensor)] for tensor in tensors_in(inputs) if id(tensor) in self._made)
            self._made.update(dict.fromkeys(map(id, made), len(self.steps)))
            self._alive.append(made)
            batch = made[0].shape[0] if made[0].dim() else 0
            self.steps.append(Step(function, read, name, heads, folded, batch))

    def before(self, start: int) -> set[str]:
        """The nearest layers whose outputs a step reads."""
        return self._nearest(start, lambda step: self.steps[step].inputs)

    def behind(self, start: int) -> set[str]:
        """The nearest layers that read a step's output."""
        return self._nearest(start, self.readers)

    def readers(self, start: int) -> tuple[int, ...]:
        """Steps that read a step's output."""
        return tuple(place for place, step in enumerate(self.steps) if start in step.inputs)

    def mixer(self, start: int) -> int | None:
        """The first product behind a step; for shares, that is where the values are mixed."""
        stack = list(self.readers(start))
        while stack:
            place = stack.pop(0)
            if self.steps[place].function in MIXERS:
                return place
            if self.steps[place].name is None:
                stack += self.readers(place)
        return None

    def _nearest(self, start: int, following: Callable[[int], tuple[int, ...]]) -> set[str]:
        found, seen, stack = set(), {start}, list(following(start))
        while stack:
            place = stack.pop()
            if place in seen:
                continue
            seen.add(place)
            name = self.steps[place].name
            if name is None:
                stack += following(place)
            else:
                found.add(name)
        return found


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors of nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from tensors_in(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from tensors_in(entry)
