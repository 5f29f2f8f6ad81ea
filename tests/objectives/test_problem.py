"""What is refused before anything is spent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from paretune.errors import JobError
from paretune.objectives.data import Split, Splits
from paretune.objectives.models import ModelSource
from paretune.objectives.problem import Problem
from paretune.objectives.runtimes import Target
from paretune.objectives.tasks import Regression
from tests.nets import ViT, image


class Constant(nn.Module):
    """Gives one value for everything."""

    def __init__(self, value: float, shape: tuple[int, ...] = (10,)) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.full(shape, value))

    def forward(self, x: Tensor) -> Tensor:
        return self.value.expand(len(x), *self.value.shape)


def relabel(split: Split, position: int, label: int) -> Split:
    targets = split.targets.clone()
    targets[position] = label
    return Split(split.inputs, targets)


def last_label(problem: Problem, name: str, label: int) -> Problem:
    splits: Any = problem.splits
    return replace(problem, splits=replace(splits, **{name: relabel(getattr(splits, name), -1, label)}))


def test_a_good_problem_passes(problem: Problem) -> None:
    problem.check()
    assert isinstance(problem.example, Tensor)
    assert problem.example.shape == (2, 1, 8, 8)
    assert problem.channels == {"conv1": 16, "conv2": 32, "fc1": 32, "fc2": 10}
    (name, array), *rest = problem.batch(problem.target.batch_size).items()
    assert (name, array.shape, rest) == ("input", (8, 1, 8, 8), [])
    assert isinstance(problem.splits.validation.inputs, Tensor)
    np.testing.assert_array_equal(array, problem.splits.validation.inputs[:8].numpy())
    assert [group.name for group in problem.analyse().groups] == ["conv1", "conv2", "fc1"]
    excluded = replace(problem, exclude=("conv*",)).analyse()
    assert [group.name for group in excluded.groups] == ["fc1"]


BAD: list[Any] = [
    pytest.param(
        lambda p: replace(p, model=ModelSource(Constant(0.0, (3,)))),
        "data",
        r"labels in \[0, 3\)",
        id="too few classes",
    ),
    pytest.param(
        lambda p: replace(p, model=ModelSource(Constant(0.0, (10, 4)))), "model", r"\(N, classes", id="shape of outputs"
    ),
    pytest.param(lambda p: replace(p, model=ModelSource(Constant(float("nan")))), "model", "finite", id="NaN"),
    pytest.param(
        lambda p: replace(p, model=ModelSource(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))),
        "model",
        "the same each time it is built",
        id="unseeded factory",
    ),
    pytest.param(lambda p: replace(p, model=ModelSource(Constant(float("inf")))), "model", "finite", id="infinity"),
    pytest.param(
        lambda p: replace(p, teachers=(ModelSource(Constant(float("nan"))),)), "teacher", "finite", id="teacher"
    ),
    pytest.param(
        lambda p: replace(p, teachers=(p.model, ModelSource(Constant(float("nan"))))),
        "teacher[1]",
        "finite",
        id="one of two teachers",
    ),
    pytest.param(
        lambda p: replace(p, training=replace(p.training, hints=["conv3"])),
        "finetune.hints",
        "did you mean 'conv",
        id="hints",
    ),
    pytest.param(
        lambda p: replace(p, variants={"slim": ModelSource(Constant(float("nan")), key="model.variants.slim")}),
        "model.variants.slim",
        "finite",
        id="variant",
    ),
    pytest.param(
        lambda p: replace(p, variants={"good": p.model, "images": ModelSource(nn.Conv2d(3, 8, 3))}),
        "model.variants.images",
        "RuntimeError",
        id="inputs of a variant",
    ),
    pytest.param(lambda p: replace(p, model=ModelSource(nn.Conv2d(3, 8, 3))), "model", "RuntimeError", id="inputs"),
    pytest.param(lambda p: replace(p, task=Regression()), "model", "values of the targets' shape", id="task"),
    pytest.param(
        lambda p: replace(p, target=Target("openvino", batch_size=361)), "target.batch_size", "but got 361", id="batch"
    ),
    pytest.param(
        lambda p: last_label(p, "train", 10), "data", "labels from 0 to 10", id="one label of the train split"
    ),
    pytest.param(lambda p: last_label(p, "validation", -1), "data", "from -1", id="one label of the validation split"),
    pytest.param(lambda p: last_label(p, "test", 99), "data", "to 99", id="one label of the test split"),
]


@pytest.mark.parametrize(("spoil", "where", "message"), BAD)
def test_bad_problems_are_refused(
    problem: Problem, spoil: Callable[[Problem], Problem], where: str, message: str
) -> None:
    with pytest.raises(JobError, match=message) as caught:
        spoil(problem).check()
    assert caught.value.where == where
    assert caught.value.remedy


@pytest.mark.parametrize(("length", "batch", "fits"), [(8, 8, True), (7, 8, False), (1, 1, False), (2, 1, True)])
def test_the_validation_split_must_hold_a_batch(problem: Problem, length: int, batch: int, fits: bool) -> None:
    splits: Splits = replace(problem.splits, validation=problem.splits.validation.head(length))
    small = replace(problem, splits=splits, target=Target("openvino", batch_size=batch))
    if fits:
        small.check()
        assert len(small.batch(batch)["input"]) == batch
    else:
        with pytest.raises(JobError, match="larger validation split"):
            small.check()


def test_grids_are_those_of_the_groups_that_can_be_pruned(problem: Problem) -> None:
    assert problem.grids == {"conv1": [8, 16], "conv2": [8, 16, 24, 32], "fc1": [8, 16, 24, 32]}
    assert replace(problem, exclude=("conv*",)).grids.keys() == {"fc1"}


def test_channels_that_go_together_make_the_grid(problem: Problem) -> None:
    attention = replace(problem, model=ModelSource(ViT), splits=images(problem))
    units = {group.name: group.unit for group in attention.analyse().groups}
    assert max(units.values()) > 1
    for name, grid in attention.grids.items():
        assert all(count % units[name] == 0 for count in grid)


def images(problem: Problem) -> Splits:
    split = Split(image(8), torch.arange(8) % 5)
    return replace(problem.splits, train=split, validation=split, test=split)


def test_variants_stand_in_the_models_place(problem: Problem) -> None:
    job = replace(problem, variants={"twin": problem.model}, exclude=("fc1",))
    job.check()
    twin = job.of("twin")
    assert job.of(None) is job
    assert twin is job.of("twin")
    assert (twin.model, twin.teachers, twin.variants) == (problem.model, (problem.model,), {})
    assert (twin.target, twin.exclude, twin.splits) == (job.target, job.exclude, job.splits)
    taught = replace(job, teachers=(ModelSource("tests.nets:PlainCNN"),))
    assert taught.of("twin").teachers == taught.teachers
