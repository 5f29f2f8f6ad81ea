"""Losses, metrics and checks of the tasks, also for ties, NaN and wrong shapes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import r2_score
from torch import Tensor

from paretune.errors import JobError
from paretune.objectives.tasks import Classification, Regression, Task, load_task

LOGITS = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 0.0, 0.5], [0.0, 0.0, 1.0]])
LABELS = torch.tensor([0, 1, 2, 2])
CLASSIFICATION, REGRESSION = Classification(), Regression()


class Half(Task):
    metric_name = "half"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return outputs.mean()

    def metric(self, outputs: Tensor, targets: Tensor) -> float:
        return 0.5

    def distillation_loss(self, outputs: Tensor, teacher_outputs: Tensor, temperature: float) -> Tensor:
        return outputs.mean()


def test_classification_loss_and_accuracy() -> None:
    torch.testing.assert_close(CLASSIFICATION.loss(LOGITS, LABELS), F.cross_entropy(LOGITS, LABELS))
    assert CLASSIFICATION.metric(LOGITS, LABELS) == 0.75
    assert CLASSIFICATION.metric_name == "accuracy"


@pytest.mark.parametrize(
    ("logits", "expected"),
    [
        pytest.param([1.0, 1.0, 0.0], 1.0, id="ties go to the lowest class"),
        pytest.param([math.inf, math.inf, 0.0], 1.0, id="infinite ties too"),
        pytest.param([math.nan, 0.0, 0.0], 0.0, id="NaN at the label is wrong"),
        pytest.param([9.0, 0.0, math.nan], 0.0, id="NaN elsewhere is wrong"),
        pytest.param([0.0, 0.0, 1.0], 0.0, id="another class"),
    ],
)
def test_accuracy_of_ties_and_nan(logits: list[float], expected: float) -> None:
    assert CLASSIFICATION.metric(torch.tensor([logits]), torch.tensor([0])) == expected


def test_dense_prediction_is_classification_of_every_position() -> None:
    generator = torch.Generator().manual_seed(0)
    dense, teacher = (torch.randn(2, 3, 4, 5, generator=generator) for _ in range(2))
    labels = torch.randint(3, (2, 4, 5), generator=generator)
    flat, flat_teacher = (tensor.movedim(1, -1).reshape(-1, 3) for tensor in (dense, teacher))
    torch.testing.assert_close(CLASSIFICATION.loss(dense, labels), CLASSIFICATION.loss(flat, labels.flatten()))
    assert CLASSIFICATION.metric(dense, labels) == CLASSIFICATION.metric(flat, labels.flatten())
    torch.testing.assert_close(
        CLASSIFICATION.distillation_loss(dense, teacher, 3.0),
        CLASSIFICATION.distillation_loss(flat, flat_teacher, 3.0),
    )
    CLASSIFICATION.check(dense, labels)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_distillation_is_the_scaled_divergence_from_the_teacher(temperature: float) -> None:
    teacher = LOGITS.flip(1)
    p = torch.softmax(teacher / temperature, 1)
    q = torch.softmax(LOGITS / temperature, 1)
    expected = (p * (p / q).log()).sum(1).mean() * temperature**2
    torch.testing.assert_close(CLASSIFICATION.distillation_loss(LOGITS, teacher, temperature), expected)
    assert float(CLASSIFICATION.distillation_loss(LOGITS, LOGITS, temperature)) == pytest.approx(0, abs=1e-6)


def test_distillation_pulls_towards_the_teacher() -> None:
    outputs = torch.zeros(1, 3, requires_grad=True)
    loss = CLASSIFICATION.distillation_loss(outputs, torch.tensor([[0.0, 5.0, 0.0]]), 2.0)
    (gradient,) = torch.autograd.grad(loss, outputs)
    assert gradient[0, 1] < 0 < gradient[0, 0]


@pytest.mark.parametrize("task", [CLASSIFICATION, REGRESSION], ids=["classification", "regression"])
def test_losses_are_float32_under_mixed_precision(task: Task) -> None:
    targets = LABELS if task is CLASSIFICATION else LOGITS
    assert task.loss(LOGITS.bfloat16(), targets).dtype == torch.float32
    assert task.distillation_loss(LOGITS.bfloat16(), LOGITS, 2.0).dtype == torch.float32
    task.check(LOGITS.bfloat16(), targets)


def test_regression_matches_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(50, 3, generator=generator)
    outputs = targets + 0.3 * torch.randn(50, 3, generator=generator)
    assert REGRESSION.metric(outputs, targets) == pytest.approx(r2_score(targets.numpy(), outputs.numpy()), abs=1e-6)
    torch.testing.assert_close(REGRESSION.loss(outputs, targets), (outputs - targets).square().mean())
    torch.testing.assert_close(REGRESSION.distillation_loss(outputs, targets, 7.0), (outputs - targets).square().mean())


@pytest.mark.parametrize(
    ("outputs", "targets", "expected"),
    [
        pytest.param([1.0, 2.0], [1.0, 2.0], 1.0, id="exact"),
        pytest.param([1.5, 1.5], [1.0, 2.0], 0.0, id="mean"),
        pytest.param([3.0, 3.0], [3.0, 3.0], 1.0, id="constant and exact"),
        pytest.param([3.0, 4.0], [3.0, 3.0], 0.0, id="constant and wrong"),
        pytest.param([math.nan, 2.0], [1.0, 2.0], math.nan, id="NaN"),
        pytest.param([math.nan, 3.0], [3.0, 3.0], math.nan, id="NaN and constant"),
        pytest.param([[1.0], [2.0]], [1.0, 2.0], 1.0, id="an axis of length 1"),
    ],
)
def test_r2_of_special_values(outputs: Any, targets: Any, expected: float) -> None:
    got = REGRESSION.metric(torch.tensor(outputs), torch.tensor(targets))
    assert got == pytest.approx(expected, nan_ok=True)


def test_regression_never_broadcasts() -> None:
    outputs, targets = torch.ones(4, 1), torch.arange(4.0)
    torch.testing.assert_close(REGRESSION.loss(outputs, targets), (1 - targets).square().mean())
    with pytest.raises(JobError, match=r"values of the targets' shape, but got outputs \(4, 2\) for targets \(4,\)"):
        REGRESSION.loss(torch.ones(4, 2), targets)


@pytest.mark.parametrize(
    ("task", "outputs", "targets", "message"),
    [
        pytest.param(CLASSIFICATION, LABELS, LABELS, "must return a tensor of floats, but got torch.int64", id="ints"),
        pytest.param(CLASSIFICATION, (LOGITS,), LABELS, "tensor of floats, but got tuple", id="tuple"),
        pytest.param(CLASSIFICATION, LOGITS[:3], LABELS, "one output a sample.*\\(3, 3\\)", id="fewer"),
        pytest.param(CLASSIFICATION, LOGITS.sum(), LABELS, "one output a sample", id="scalar"),
        pytest.param(CLASSIFICATION, LOGITS / 0, LABELS, "finite outputs, but got NaN or infinity", id="infinite"),
        pytest.param(CLASSIFICATION, LOGITS[:, 0], LABELS, r"must return \(N, classes, \.\.\.\)", id="no class axis"),
        pytest.param(CLASSIFICATION, LOGITS, LABELS[:, None], r"must return \(N, classes", id="target axis"),
        pytest.param(CLASSIFICATION, LOGITS[:, :1], LABELS, "at least 2 classes", id="one class"),
        pytest.param(CLASSIFICATION, LOGITS, LABELS.int(), "int64 labels.*torch.int32", id="int32"),
        pytest.param(CLASSIFICATION, LOGITS, LABELS.float(), "int64 labels.*task: regression", id="floats"),
        pytest.param(CLASSIFICATION, LOGITS, LABELS + 1, r"labels in \[0, 3\).*from 1 to 3", id="above"),
        pytest.param(CLASSIFICATION, LOGITS, LABELS - 1, r"labels in \[0, 3\).*from -1 to 1", id="below"),
        pytest.param(REGRESSION, LOGITS, LOGITS[:, :2], "values of the targets' shape", id="columns"),
        pytest.param(REGRESSION, LOGITS[:, 0], LABELS, "floats as targets.*task: classification", id="labels"),
        pytest.param(Half(), LOGITS[:3], LABELS, "one output a sample", id="default check"),
    ],
)
def test_checks(task: Task, outputs: Any, targets: Tensor, message: str) -> None:
    with pytest.raises(JobError, match=message):
        task.check(outputs, targets)


def test_fitting_outputs_pass_the_checks() -> None:
    CLASSIFICATION.check(LOGITS, LABELS)
    REGRESSION.check(LOGITS, LOGITS)
    Half().check(LOGITS, LABELS)
    with pytest.raises(JobError, match=r"\(N, classes"):
        CLASSIFICATION.metric(LOGITS, LABELS[:2])


INSTANCE = Half()


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        pytest.param("classification", Classification, id="classification"),
        pytest.param("regression", Regression, id="regression"),
        pytest.param(INSTANCE, Half, id="instance"),
        pytest.param(f"{__name__}:INSTANCE", Half, id="import string of an instance"),
        pytest.param(f"{__name__}:Half", Half, id="import string of a class"),
    ],
)
def test_load_task(task: str | Task, kind: type[Task]) -> None:
    assert type(load_task(task)).__name__ == kind.__name__


@pytest.mark.parametrize(
    ("task", "message"),
    [
        pytest.param("clasification", r"task must be a known task.*did you mean 'classification'\?", id="name"),
        pytest.param("math:pi", "task must be a Task, but got 'math:pi', a float", id="no task"),
        pytest.param("builtins:dict", "task must be a Task, but got 'builtins:dict', a dict", id="other class"),
        pytest.param("math:sqrt", "task must be made without arguments", id="arguments"),
        pytest.param("paretune.objectives.tasks:Task", "task must be made without arguments.*abstract", id="abstract"),
        pytest.param("nowhere_at_all:x", "task must name a module that can be imported", id="module"),
        pytest.param("<live Half>", "task must be importable for this", id="live"),
    ],
)
def test_wrong_tasks(task: str, message: str) -> None:
    with pytest.raises(JobError, match=message):
        load_task(task)
