"""What the model is for: its loss, the metric that it is judged by, and how a teacher teaches it."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paretune.errors import JobError
from paretune.objectives.imports import closest, import_string


class Task(ABC):
    """Subclass it for a task of your own.

    Fine-tuning calls `loss` and `distillation_loss` once a step, with gradients, on batches; measuring calls
    `metric` once, on the outputs of the artifact for a whole split. `check` runs on a few samples before
    anything is spent. Outputs come as the model gives them: under mixed precision they may be bfloat16.

    Attributes:
        metric_name: What `metric` is called in reports.
    """

    metric_name: str = "metric"

    @abstractmethod
    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss to minimise, a scalar: the mean over the batch."""

    @abstractmethod
    def metric(self, outputs: Tensor, targets: Tensor) -> float:
        """The quality over a whole split; higher is better."""

    @abstractmethod
    def distillation_loss(self, outputs: Tensor, teacher_outputs: Tensor, temperature: float) -> Tensor:
        """How far the outputs are from the teacher's, a scalar: the mean over the batch.

        Args:
            outputs: The student's, with gradient.
            teacher_outputs: The teacher's for the same inputs, without.
            temperature: At least 1.
        """

    def ensemble(self, outputs: Sequence[Tensor]) -> Tensor:
        """What several teachers teach together, given each one's outputs for the same inputs: their mean."""
        return torch.stack([output.float() for output in outputs]).mean(0)

    def smoothed(self, share: float) -> Task:
        """This task with so much label smoothing in its loss; without any, the task itself.

        Raises:
            JobError: The loss has no labels that could be smoothed.
        """
        if share > 0:
            remedy = "set it to 0, or smooth in the loss of the task itself"
            raise JobError("finetune.label_smoothing", "must be 0 unless the loss is classification's", share, remedy)
        return self

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Check that outputs of the model fit targets of the data; subclasses add their rules.

        Raises:
            JobError: They don't, or the outputs aren't finite.
        """
        if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
            got = str(outputs.dtype) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise JobError("model", "must return a tensor of floats", got, "return logits or predicted values")
        if outputs.ndim == 0 or targets.ndim == 0 or len(outputs) != len(targets):
            raise JobError("model", "must return one output a sample", _shapes(outputs, targets), "keep the first axis")
        if not bool(torch.isfinite(outputs).all()):
            got = "NaN or infinity"
            raise JobError(
                "model", "must return finite outputs", got, "check model.weights and the scale of the inputs"
            )


class Classification(Task):
    """One class of C, for each sample or, in dense prediction, for each position of a sample.

    Outputs are logits (N, C) or (N, C, ...), targets int64 labels (N,) or (N, ...) in [0, C).
    """

    metric_name = "accuracy"
    _smoothing = 0.0

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy in float32, the mean over samples and positions."""
        return F.cross_entropy(outputs.float(), targets, label_smoothing=self._smoothing)

    def smoothed(self, share: float) -> Task:
        """The task whose loss gives so much of each label to all classes (Szegedy et al., 2016, arXiv:1512.00567).

        Raises:
            JobError: A subclass has a loss of its own.
        """
        if type(self).loss is not Classification.loss:
            return super().smoothed(share)
        task = copy.copy(self)
        task._smoothing = share
        return task

    def metric(self, outputs: Tensor, targets: Tensor) -> float:
        """Accuracy: the share of right labels in [0, 1], over samples and positions.

        Among equal logits the lowest class is taken; logits with a NaN among them count as wrong.

        Raises:
            JobError: The shapes don't fit.
        """
        self._check_shapes(outputs, targets)
        right = (outputs.argmax(1) == targets) & ~outputs.isnan().any(1)
        return right.double().mean().item()

    def distillation_loss(self, outputs: Tensor, teacher_outputs: Tensor, temperature: float) -> Tensor:
        """Kullback-Leibler divergence from the teacher's softened classes to the student's, times T².

        The factor keeps the gradient's size independent of the temperature (Hinton et al., 2015,
        arXiv:1503.02531). Computed in float32; the mean over samples and positions.
        """
        student = F.log_softmax(outputs.float() / temperature, dim=1)
        teacher = F.log_softmax(teacher_outputs.float() / temperature, dim=1)
        return F.kl_div(student, teacher, reduction="none", log_target=True).sum(1).mean() * temperature**2

    def ensemble(self, outputs: Sequence[Tensor]) -> Tensor:
        """Logarithm of the mean of the teachers' probabilities (Hinton et al., 2015, arXiv:1503.02531), as logits.

        The mean is taken at temperature 1, so that one output serves all temperatures; they soften the mean.
        """
        logs = torch.stack([F.log_softmax(output.float(), dim=1) for output in outputs])
        return logs.logsumexp(0) - math.log(len(outputs))

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Check shapes, the type of the labels and their range.

        Raises:
            JobError: Something doesn't fit.
        """
        super().check(outputs, targets)
        self._check_shapes(outputs, targets)
        if targets.dtype != torch.int64:
            remedy = "give integer labels; for values to predict use task: regression"
            raise JobError("data", "must have int64 labels as targets for classification", targets.dtype, remedy)
        classes = outputs.shape[1]
        low, high = int(targets.min()), int(targets.max())
        if low < 0 or high >= classes:
            raise JobError(
                "data",
                f"must have labels in [0, {classes}), as the model has {classes} classes",
                f"labels from {low} to {high}",
                "count labels from 0, or build the model with as many classes as the data have (model.args)",
            )

    @staticmethod
    def _check_shapes(outputs: Tensor, targets: Tensor) -> None:
        if outputs.ndim < 2 or outputs.shape[:1] + outputs.shape[2:] != targets.shape:
            remedy = "return logits with the classes on axis 1, and labels without that axis"
            rule = "must return (N, classes, ...) for targets (N, ...)"
            raise JobError("model", rule, _shapes(outputs, targets), remedy)
        if outputs.shape[1] < 2:
            remedy = "return one logit a class; for a single logit write a task of your own"
            raise JobError("model", "must return at least 2 classes", _shapes(outputs, targets), remedy)


class Regression(Task):
    """Values to predict: outputs and targets are floats of the same shape (N,) or (N, ...).

    An axis of length 1 that only one of the two has is ignored, so (N, 1) fits (N,).
    """

    metric_name = "r2"

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error in float32.

        Raises:
            JobError: The shapes don't fit; they are never broadcast.
        """
        return F.mse_loss(_aligned(outputs, targets).float(), targets.float())

    def metric(self, outputs: Tensor, targets: Tensor) -> float:
        """Coefficient of determination R², at most 1, in float64: the mean over the columns of the values.

        A column of constant targets counts 1 where it is predicted exactly and 0 elsewhere, as scikit-learn
        does. NaN outputs give NaN.

        Raises:
            JobError: The shapes don't fit.
        """
        predicted = _aligned(outputs, targets).double().reshape(len(targets), -1)
        true = targets.double().reshape(len(targets), -1)
        residual = (true - predicted).square().sum(0)
        total = (true - true.mean(0)).square().sum(0)
        constant = torch.where(residual == 0, 1.0, torch.where(residual.isnan(), torch.nan, 0.0)).double()
        return torch.where(total == 0, constant, 1 - residual / total).mean().item()

    def distillation_loss(self, outputs: Tensor, teacher_outputs: Tensor, temperature: float) -> Tensor:
        """Mean squared error to the teacher's outputs in float32; the temperature has no meaning here.

        Raises:
            JobError: The shapes don't fit; they are never broadcast.
        """
        return F.mse_loss(_aligned(outputs, teacher_outputs).float(), teacher_outputs.float())

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Check shapes and the type of the targets.

        Raises:
            JobError: Something doesn't fit.
        """
        super().check(outputs, targets)
        _aligned(outputs, targets)
        if not targets.is_floating_point():
            remedy = "give them as floats; for labels use task: classification"
            raise JobError("data", "must have floats as targets for regression", targets.dtype, remedy)


TASKS: Mapping[str, type[Task]] = MappingProxyType({"classification": Classification, "regression": Regression})


def load_task(task: str | Task) -> Task:
    """The task that a job names.

    Args:
        task: ``classification``, ``regression``, a `Task`, or an import string that names a `Task`, a
            subclass of it or a function without arguments that returns one.

    Raises:
        JobError: There is no such task, or it isn't a `Task`.
    """
    found: Any = task
    if isinstance(task, str):
        if task in TASKS:
            return TASKS[task]()
        if ":" not in task and not task.startswith("<live "):
            remedy = f"{closest(task, TASKS)} (tasks of your own are written 'package.module:attribute')"
            raise JobError("task", "must be a known task or an import string", repr(task), remedy)
        found = import_string(task, where="task")
    if not isinstance(found, Task) and callable(found):
        try:
            found = found()
        except TypeError as error:
            raise JobError(
                "task", "must be made without arguments", f"TypeError: {error}", "give them defaults"
            ) from error
    if not isinstance(found, Task):
        remedy = "subclass paretune.objectives.tasks.Task"
        raise JobError("task", "must be a Task", f"{task!r}, a {type(found).__name__}", remedy)
    return found


def _aligned(outputs: Tensor, targets: Tensor) -> Tensor:
    def essential(tensor: Tensor) -> list[int]:
        return [length for length in tensor.shape[1:] if length != 1]

    if len(outputs) != len(targets) or essential(outputs) != essential(targets):
        remedy = "return one value a target; for labels use task: classification"
        raise JobError("model", "must return values of the targets' shape", _shapes(outputs, targets), remedy)
    return outputs.reshape(targets.shape)


def _shapes(outputs: Tensor, targets: Tensor) -> str:
    return f"outputs {tuple(outputs.shape)} for targets {tuple(targets.shape)}"
