"""Fine-tuning with distillation, in the seconds that a trial can spare."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from paretune.errors import TrialError
from paretune.objectives.data.inputs import Inputs, call, map_tensors
from paretune.objectives.data.splits import MEMORY_LIMIT_BYTES, Batch, Splits
from paretune.objectives.tasks import Task
from paretune.spaces.plan import Finetuning


@dataclass(frozen=True)
class TrainOptions:
    """What a job fixes for all of its trials.

    Attributes:
        epochs: Passes over the training split; may be a fraction.
        batch_size: Samples a step.
        optimizer: AdamW, or SGD with Nesterov momentum 0.9.
        weight_decay: Of the optimizer.
        warmup: Share of the steps in which the learning rate rises linearly; it then falls as a cosine to 0.
        gradient_clip: Largest norm of the gradient; None for no limit.
        precision: Of autocast. ``auto`` is bfloat16 where the device has instructions for it.
        channels_last: Memory format of image batches. ``auto`` is True.
        quantized_share: Share of the steps that train through the quantizers, in [0, 1].
        calibration_batches: Batches for importances and the ranges of activations.
    """

    epochs: float = 1.0
    batch_size: int = 128
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 1e-4
    warmup: float = 0.1
    gradient_clip: float | None = 1.0
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    channels_last: bool | Literal["auto"] = "auto"
    quantized_share: float = 0.3
    calibration_batches: int = 4


class Teacher:
    """Gives the teacher's outputs for training batches, computing those of unaugmented samples only once.

    Args:
        model: In eval mode.
        samples: Length of the training split.
        cached: Whether a sample's inputs are the same every time. Outputs that would take more than 2 GiB are
            computed anew each time all the same.
    """

    def __init__(self, model: nn.Module, samples: int, *, cached: bool) -> None:
        self._model = model.eval()
        self._samples = samples
        self._cached = cached
        self._outputs: Tensor | None = None
        self._known: Tensor | None = None

    @torch.no_grad()
    def __call__(self, indices: Tensor, inputs: Inputs) -> Tensor:
        """Outputs for a batch; `indices` are its samples' positions in the training split."""
        if not self._cached:
            return call(self._model, inputs).float()
        if self._outputs is None or self._known is None or not bool(self._known[indices].all()):
            outputs = call(self._model, inputs).float()
            if self._outputs is None or self._known is None:
                if self._samples * outputs[0].numel() * 4 > MEMORY_LIMIT_BYTES:
                    self._cached = False
                    return outputs
                self._outputs = outputs.new_zeros((self._samples, *outputs.shape[1:]))
                self._known = torch.zeros(self._samples, dtype=torch.bool, device=outputs.device)
            self._outputs[indices] = outputs
            self._known[indices] = True
        return self._outputs[indices]


@dataclass(frozen=True)
class Training:
    """Everything of a training run but the model: data, task, teacher and options.

    Attributes:
        splits: Only `train` is read.
        task: Gives the losses.
        options: The job's choices.
        teacher: None trains on the targets alone.
        after_step: Called after every step, e.g. to let a measurement go first.
    """

    splits: Splits
    task: Task
    options: TrainOptions
    teacher: Teacher | None = None
    after_step: Callable[[], None] = lambda: None

    def steps(self, epochs: float) -> int:
        """Steps in so many epochs, at least 1."""
        return max(1, round(epochs * max(1, len(self.splits.train) // self.options.batch_size)))

    def batches(self, seed: int) -> Iterator[Batch]:
        """Training batches without end, shuffled anew each epoch, augmented; equal seeds give equal batches."""
        generator = torch.Generator().manual_seed(seed)
        epoch = 0
        while True:
            for batch in self.splits.train.batches(self.options.batch_size, shuffle_seed=seed + epoch, drop_last=True):
                inputs = self.splits.augment(batch.inputs, generator) if self.splits.augment else batch.inputs
                yield batch._replace(inputs=inputs)
            epoch += 1


def fit(
    model: nn.Module,
    training: Training,
    config: Finetuning,
    batches: Iterator[Batch],
    schedule: range,
    total: int,
) -> None:
    """Train `model` in place for the steps of `schedule` out of `total`, and leave it in eval mode.

    A training may come in parts (float first, then through the quantizers): each part continues the learning-rate
    schedule, and the batches, where the one before stopped.

    Args:
        model: In any mode.
        training: Data, task, teacher, options.
        config: Learning rate, temperature and distillation weight.
        batches: `Training.batches`.
        schedule: Positions of the steps.
        total: Length of the whole schedule.

    Raises:
        TrialError: The loss isn't finite.
    """
    options = training.options
    optimizer = _optimizer(model, options, config.learning_rate)
    device = next(model.parameters()).device
    bf16 = options.precision == "bfloat16" or (options.precision == "auto" and has_bf16(device))
    channels_last = options.channels_last is not False
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train()
    for step in schedule:
        batch = next(batches)
        inputs = map_tensors(_channels_last, batch.inputs) if channels_last else batch.inputs
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * _schedule(step, total, options.warmup)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            outputs = call(model, inputs)
        loss = _loss(outputs.float(), batch._replace(inputs=inputs), training, config)
        if not math.isfinite(loss.item()):
            raise TrialError(
                f"the training loss must stay finite, but it is {loss.item()} at step {step} of {total}; "
                f"lower the learning rate (it was {config.learning_rate:.2g}) or the pruning ratios"
            )
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        if options.gradient_clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), options.gradient_clip)
        optimizer.step()
        training.after_step()
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # as it came
    model.eval()


def _loss(outputs: Tensor, batch: Batch, training: Training, config: Finetuning) -> Tensor:
    weight = config.distillation_weight if training.teacher is not None else 0.0
    loss = torch.zeros((), device=outputs.device)
    if weight < 1:
        loss = loss + (1 - weight) * training.task.loss(outputs, batch.targets)
    if weight > 0 and training.teacher is not None:
        taught = training.teacher(batch.indices, batch.inputs)
        loss = loss + weight * training.task.distillation_loss(outputs, taught, config.temperature)
    return loss


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 natively; elsewhere it is emulated and slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported())


def _optimizer(model: nn.Module, options: TrainOptions, learning_rate: float) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if options.optimizer == "sgd":
        return torch.optim.SGD(
            parameters, learning_rate, momentum=0.9, nesterov=True, weight_decay=options.weight_decay
        )
    return torch.optim.AdamW(parameters, learning_rate, weight_decay=options.weight_decay)


def _schedule(step: int, total: int, warmup: float) -> float:
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / (rising + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
