"""The gradient of a batch: losses, mixed precision, and what to do when the memory doesn't suffice."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from paretune.errors import TrialError
from paretune.objectives.accelerator import float_format, training_device
from paretune.objectives.data.inputs import call, map_tensors
from paretune.objectives.data.splits import Batch
from paretune.objectives.distillation import AttachedHints
from paretune.objectives.training import Training
from paretune.spaces.plan import Finetuning

_LOSS_SCALE = 2.0**16
"""PyTorch's default."""


class Gradient:
    """Puts the gradient of a batch's loss into the model, in as many parts as the device's memory asks for.

    Once the memory didn't suffice, all batches that follow are cut likewise. The gradient stays the same, where the
    loss is a mean over samples, but for dropout, which draws anew, and batch norm: it normalises each part by itself,
    and its running statistics see smaller batches, and once more what went through before the memory ran out.

    Args:
        forward: Of the model, on the device that trains.
        training: Task, teacher and options.
        config: Temperature, weights of distillation and hints.
        hints: Watch the model; None has none.
        size: Samples that go through the model at a time.
        loss_scale: To begin with in float16, where too large a one skips steps; None is PyTorch's own.

    Attributes:
        dtype: Of autocast; float32 for none.
        scaler: Scales the loss for float16.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        training: Training,
        config: Finetuning,
        hints: AttachedHints | None,
        size: int,
        loss_scale: float | None = None,
    ) -> None:
        device = training_device(training.options.device)
        self.size = size
        self.hints = hints
        self.dtype = float_format(training.options.precision, device)
        enabled = self.dtype is torch.float16
        self.scaler = torch.amp.GradScaler(device.type, init_scale=loss_scale or _LOSS_SCALE, enabled=enabled)
        self._forward = forward
        self._task = training.task.smoothed(training.options.label_smoothing)
        self._teacher = training.teacher
        self._config = config

    def __call__(self, batch: Batch, optimizer: torch.optim.Optimizer) -> Tensor:
        """The loss of the batch, without gradient.

        Raises:
            TrialError: The memory doesn't hold one sample.
        """
        while True:
            optimizer.zero_grad(set_to_none=True)
            loss = self._try(batch)
            if loss is not None:
                return loss
            size = min(self.size, len(batch.targets))
            if size == 1:
                raise TrialError(
                    "one sample must fit into the memory of the device that trains, but got torch.OutOfMemoryError for "
                    "a single one; use fewer workers (search.workers), a smaller input, or finetune.device: cpu"
                )
            self.size = size // 2
            torch.cuda.empty_cache()

    def _try(self, batch: Batch) -> Tensor | None:
        """The loss; None where the memory didn't suffice."""
        total: Tensor | None = None
        try:
            for part in parts(batch, self.size):
                with self._autocast(part):
                    outputs = call(self._forward, part.inputs)
                loss = self._loss(outputs.float(), part) * (len(part.targets) / len(batch.targets))
                torch.autograd.backward(self.scaler.scale(loss))
                total = loss.detach() if total is None else total + loss.detach()
        except torch.cuda.OutOfMemoryError:
            # The error holds on to the activations until this block is left, so nothing can be freed here.
            return None
        return total

    def _autocast(self, batch: Batch) -> torch.autocast:
        mixed = self.dtype is not torch.float32
        return torch.autocast(batch.targets.device.type, dtype=self.dtype, enabled=mixed)

    def _loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        weight = self._config.distillation_weight if self._teacher is not None else 0.0
        loss = torch.zeros((), device=outputs.device)
        if weight < 1:
            loss = loss + (1 - weight) * self._loss_on_targets(outputs, batch)
        if weight > 0 and self._teacher is not None:
            with self._autocast(batch):
                taught = self._teacher(batch.indices, batch.inputs)
            loss = loss + weight * self._task.distillation_loss(outputs, taught, self._config.temperature)
        if self.hints is not None:
            with self._autocast(batch):
                distance = self.hints.loss(batch)
            loss = loss + self._config.hint_weight * distance
        return loss

    def _loss_on_targets(self, outputs: Tensor, batch: Batch) -> Tensor:
        loss = self._task.loss(outputs, batch.targets)
        if batch.mix is None:
            return loss
        return batch.mix.share * loss + (1 - batch.mix.share) * self._task.loss(outputs, batch.mix.targets)


def parts(batch: Batch, size: int) -> Iterator[Batch]:
    """The batch in the fewest parts of at most `size` samples, as even as can be."""
    length = len(batch.targets)
    count = math.ceil(length / size)
    for start, end in pairwise(length * part // count for part in range(count + 1)):
        cut = itemgetter(slice(start, end))
        mix = batch.mix and batch.mix._replace(targets=cut(batch.mix.targets))
        yield Batch(cut(batch.indices), map_tensors(cut, batch.inputs), cut(batch.targets), mix)
