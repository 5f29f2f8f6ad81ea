"""Models that are built in ways which break a careless deployment."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from paretune.errors import JobError
from paretune.objectives.artifact import load_module
from paretune.objectives.baseline import make_baseline
from paretune.objectives.compress.batchnorm import fold_batchnorm
from paretune.objectives.data import Splits
from paretune.objectives.finetune import TrainOptions
from paretune.objectives.models import ModelSource
from paretune.objectives.problem import Problem
from paretune.objectives.runtimes import Target
from paretune.objectives.tasks import Classification


class Tied(nn.Module):
    """Two layers that share one weight; inputs (N, 1, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(64, 16)
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)
        self.two.weight = self.one.weight
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x.flatten(1)))
        return self.head(torch.relu(self.two(torch.relu(self.one(x)))))


class Aliased(nn.Module):
    """Its convolution has two names, of which forward uses the second."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 16, 3)
        self.net = nn.Sequential(self.conv, nn.BatchNorm2d(16))
        self.head = nn.Linear(16, 10)
        self.net[1].running_mean.fill_(0.5)
        self.net[1].running_var.fill_(4.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.net(x)).mean((2, 3)))


class Frozen(nn.Module):
    """A backbone that was frozen when the head was trained."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(1, 16, 3).requires_grad_(False)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.backbone(x)).mean((2, 3)))


class Moody(nn.Module):
    """Computes something else at every call, which an exported graph can't."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(64, 10)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.head(x.flatten(1)) * self.calls


def problem_of(model: nn.Module, splits: Splits) -> Problem:
    return Problem(ModelSource(model), splits, Classification(), Target("openvino", batch_size=8), TrainOptions())


@pytest.mark.parametrize("model", [Tied, Aliased, Frozen], ids=lambda model: model.__name__)
def test_artifact_computes_what_the_model_does(model: type[nn.Module], digit_splits: Splits, tmp_path: Path) -> None:
    torch.manual_seed(0)
    problem = problem_of(model(), digit_splits)
    baseline = make_baseline(problem, problem.analyse(), tmp_path / "baseline", float_bits=(32,))
    inputs = digit_splits.validation.inputs
    with torch.no_grad():
        expected = problem.model.build()(inputs)
        torch.testing.assert_close(load_module(baseline.folder, problem)(inputs), expected, atol=1e-4, rtol=1e-4)


def test_layer_with_two_names_is_folded_under_both() -> None:
    torch.manual_seed(0)
    model, example = Aliased().eval(), torch.rand(2, 1, 8, 8)
    folded = fold_batchnorm(model, lambda module: module(example))
    assert isinstance(folded.net[1], nn.Identity)
    assert folded.conv is folded.net[0]
    torch.testing.assert_close(folded(example), model(example))


def test_frozen_layers_can_be_pruned_and_trained(digit_splits: Splits) -> None:
    problem = problem_of(Frozen(), digit_splits)
    assert all(parameter.requires_grad for parameter in problem.model.build().parameters())
    assert [group.name for group in problem.analyse().groups] == ["backbone"]


def test_model_that_changes_from_call_to_call_is_refused(digit_splits: Splits, tmp_path: Path) -> None:
    problem = problem_of(Moody(), digit_splits)
    with pytest.raises(JobError, match=r"^model must compute the same on openvino as in PyTorch"):
        make_baseline(problem, problem.analyse(), tmp_path / "baseline", float_bits=(32,))
    assert not (tmp_path / "baseline").exists()
