"""Copies of models that remember tensors with a history, and changes that are taken back."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paretune.spaces.analysis import analyse
from paretune.spaces.copies import copy_of, put_back
from paretune.spaces.graph import DependencyGraph, prune


class Remembering(nn.Module):
    """Computes a bias from a parameter, once for each evaluation, as LeViT does with its attention's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 32), nn.Linear(32, 3)
        self.scale = nn.Parameter(torch.randn(32))
        self.known: dict[str, Tensor] = {}

    def train(self, mode: bool = True) -> Remembering:
        if mode:
            self.known = {}
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.last(self.first(x).relu() * self.scale.exp())
        if "scale" not in self.known:
            self.known["scale"] = self.scale.exp()
        return self.last(self.first(x).relu() * self.known["scale"])


def forward(model: nn.Module) -> Any:
    return model(torch.randn(2, 6, generator=torch.Generator().manual_seed(0)))


@pytest.fixture
def model() -> Remembering:
    torch.manual_seed(0)
    model = Remembering().eval()
    forward(model)
    return model


def test_a_tensor_with_a_history_is_copied(model: Remembering) -> None:
    with pytest.raises(RuntimeError, match="deepcopy"):
        copy.deepcopy(model)
    made = copy_of(model)
    assert torch.equal(forward(made), forward(model))
    assert made.known["scale"] is not model.known["scale"]
    assert model.known["scale"].grad_fn is not None, "the original keeps its history"


def test_a_model_that_remembers_is_analysed_and_cut(model: Remembering) -> None:
    assert [group.name for group in analyse(model, forward).groups] == ["first"]
    prune(model, forward, {"first": 8})
    evaluated = forward(model)
    torch.testing.assert_close(forward(model.train()), evaluated)
    assert model.scale.shape == (8,)


def test_what_was_done_is_taken_back(model: Remembering) -> None:
    before, parameters = forward(model), dict(model.named_parameters())
    with put_back(model.modules()):
        with torch.no_grad():
            model.first.weight.zero_()
        model.last = nn.Linear(32, 1)
        forward(model.train()).sum().backward()
        assert forward(model).shape == (2, 1)
    assert torch.equal(forward(model), before)
    assert not model.training
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_graph_fits_its_model_again(model: Remembering) -> None:
    graph = DependencyGraph(model, forward)
    before = forward(model)
    for kept in (8, 16):
        with graph.undone():
            graph.cut({"first": kept})
            assert model.scale.shape == (kept,)
        assert torch.equal(forward(model), before)


def test_a_view_that_repeats_entries_stays() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("repeated", torch.arange(3.0).expand(2, 3))
    with put_back(model.modules()):
        model.repeated = torch.zeros(1)
    assert torch.equal(model.get_buffer("repeated"), torch.arange(3.0).expand(2, 3))
