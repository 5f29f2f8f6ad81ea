"""Folding changes nothing that the model computes, and leaves alone what it can't fold."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from paretune.objectives.compress.batchnorm import fold_batchnorm
from tests import nets


def norms(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]


@pytest.mark.parametrize(
    ("build", "inputs", "left"),
    [
        pytest.param(nets.PlainCNN, nets.image(2, 1), [], id="all can be folded"),
        pytest.param(nets.Fold, nets.image(), ["bn_shared", "bn_twice", "bn_input"], id="some can't be folded"),
        pytest.param(nets.MLP, nets.vector(), [], id="none there"),
    ],
)
def test_folding_keeps_the_outputs(build: Callable[[], nn.Module], inputs: Tensor, left: list[str]) -> None:
    torch.manual_seed(0)
    model = nets.wake_norms(build()).train()
    state = copy.deepcopy(model.state_dict())
    folded = fold_batchnorm(model, lambda module: module(inputs))
    assert norms(folded) == left
    assert not folded.training
    assert model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(folded(inputs), model.eval()(inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("norm", "folds"),
    [
        pytest.param(nn.BatchNorm1d(8), True, id="statistics and scale"),
        pytest.param(nn.BatchNorm1d(8, affine=False), True, id="no scale"),
        pytest.param(nn.BatchNorm1d(8, track_running_stats=False), False, id="statistics of the batch"),
    ],
)
def test_linear_layers_and_kinds_of_norms(norm: nn.Module, folds: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 8, bias=False), norm, nn.ReLU(), nn.Linear(8, 2)).eval()
    if folds:
        norm.running_mean = torch.randn(8)
    inputs = nets.vector(8)
    folded = fold_batchnorm(model, lambda module: module(inputs))
    assert isinstance(folded[1], nn.Identity) == folds  # type: ignore[index]
    with torch.no_grad():
        torch.testing.assert_close(folded(inputs), model(inputs), atol=1e-5, rtol=1e-5)


def test_frozen_parameters_can_be_folded() -> None:
    model = nets.wake_norms(nets.PlainCNN()).requires_grad_(False)
    assert norms(fold_batchnorm(model, lambda module: module(nets.image(2, 1)))) == []
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_shape_of_the_result_depends_on_the_structure_alone() -> None:
    def shapes(model: nn.Module) -> dict[str, torch.Size]:
        folded = fold_batchnorm(model, lambda module: module(nets.image()))
        return {name: tensor.shape for name, tensor in folded.state_dict().items()}

    dead = nets.Fold()
    for parameter in dead.parameters():
        parameter.data.zero_()
    assert shapes(dead) == shapes(nets.wake_norms(nets.Fold()))
