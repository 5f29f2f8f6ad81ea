"""What a model takes: one tensor, several in order, or several by name; the first axis is the batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor

from paretune.errors import JobError

Inputs: TypeAlias = Tensor | tuple[Tensor, ...] | dict[str, Tensor]


def map_tensors(function: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """Apply a function to every tensor and keep the structure."""
    if isinstance(inputs, Tensor):
        return function(inputs)
    if isinstance(inputs, dict):
        return {name: function(tensor) for name, tensor in inputs.items()}
    return tuple(function(tensor) for tensor in inputs)


def tensors(inputs: Inputs) -> dict[str, Tensor]:
    """The tensors by name: ``""`` for a single one, ``"0"``, ``"1"``, … for a tuple, a dictionary's keys."""
    if isinstance(inputs, Tensor):
        return {"": inputs}
    if isinstance(inputs, dict):
        return dict(inputs)
    return {str(position): tensor for position, tensor in enumerate(inputs)}


def concatenate(parts: list[Inputs]) -> Inputs:
    """Join batches of equal structure along the first axis."""
    first = parts[0]
    joined = {name: torch.cat([tensors(part)[name] for part in parts]) for name in tensors(first)}
    if isinstance(first, Tensor):
        return joined[""]
    return joined if isinstance(first, dict) else tuple(joined.values())


def call(model: Callable[..., Any], inputs: Inputs) -> Tensor:
    """Run a model: ``model(x)`` for a tensor, ``model(*x)`` for a tuple, ``model(**x)`` for a dictionary.

    Raises:
        JobError: The model returns something else than one tensor.
    """
    with attention_in_parts():
        if isinstance(inputs, Tensor):
            outputs = model(inputs)
        elif isinstance(inputs, dict):
            outputs = model(**inputs)
        else:
            outputs = model(*inputs)
    if not isinstance(outputs, Tensor):
        raise JobError(
            "model",
            "must return one tensor",
            type(outputs).__name__,
            "wrap it in a module that returns the outputs to train",
        )
    return outputs


@contextmanager
def attention_in_parts() -> Iterator[None]:
    """PyTorch's fused encoder layer can't be exported, traced or counted, and reads weights past the quantizers."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
