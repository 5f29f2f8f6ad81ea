"""Copies of models, and changes to them that are taken back."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from paretune.spaces.dataflow import tensors_in

M = TypeVar("M", bound=nn.Module)


def copy_of(model: M) -> M:
    """A deep copy, also of a model that keeps tensors with a history of gradients.

    Such are biases computed from a parameter in `forward` and remembered in an attribute. PyTorch refuses to copy
    them; the copy has their values without the history.
    """
    kept = (tensor for module in model.modules() for tensor in tensors_in(vars(module)))
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in kept if not tensor.is_leaf})


def forget(model: nn.Module) -> None:
    """Let modules drop what they computed from their weights and remember for evaluation; leaves them in eval mode.

    Those that do so drop it when training begins, because the weights will change.
    """
    model.train().eval()


@contextmanager
def put_back(objects: Iterable[Any]) -> Iterator[None]:
    """On leaving, make these objects what they were on entering; much cheaper than to work on a copy.

    Their attributes get back what they held: the same objects, lists and dicts with the same entries, and modules'
    tensors with the same values and gradients.
    """
    objects = list(dict.fromkeys(objects))
    attributes = [(vars(thing), dict(vars(thing))) for thing in objects]
    values = [value for _, names in attributes for value in names.values()]
    lists = [(value, list(value)) for value in values if isinstance(value, list)]
    dicts = [(value, dict(value)) for value in values if isinstance(value, dict)]
    tensors = {
        id(tensor): tensor for thing in objects if isinstance(thing, nn.Module) for tensor in tensors_in(vars(thing))
    }.values()
    numbers = [(tensor, tensor.detach().clone(), tensor.grad if tensor.is_leaf else None) for tensor in tensors]
    try:
        yield
    finally:
        for table, before in [*attributes, *dicts]:
            table.clear()
            table.update(before)
        for entries, were in lists:
            entries[:] = were
        _write(numbers)


@torch.no_grad()
def _write(numbers: Iterable[tuple[Tensor, Tensor, Tensor | None]]) -> None:
    for tensor, value, gradient in numbers:
        if 0 not in tensor.stride():  # else it is a view that repeats another one's entries; nobody can write to it
            tensor.data.copy_(value)
        if tensor.is_leaf:
            tensor.grad = gradient
