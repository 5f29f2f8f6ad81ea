"""Fine-tuning with distillation, in the seconds that a trial can spare."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter
from typing import Literal

import torch
from torch import Tensor, nn

from paretune.errors import JobError, TrialError
from paretune.objectives.accelerator import float_format, memory_budget, training_device, use_tf32
from paretune.objectives.data.inputs import Inputs, call, map_tensors, tensors
from paretune.objectives.data.residency import is_resident, to_device
from paretune.objectives.data.splits import MEMORY_LIMIT_BYTES, Batch, Splits
from paretune.objectives.tasks import Task
from paretune.spaces.plan import Finetuning

_STEPS_AHEAD = 20
"""Steps that are queued on a GPU before the CPU waits for them, to look at their losses and to let a measurement go
first: at every step, the GPU would stand idle while the CPU prepares the next one."""


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
        device: What trains: ``auto`` (the first GPU, or the CPU), ``cpu``, ``cuda`` or ``cuda:N``.
        precision: Of autocast. ``auto`` is bfloat16 where the device has instructions for it; float16 needs a GPU.
        tf32: Whether a GPU may compute what stays float32 in TF32 (10 bits of mantissa).
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
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    tf32: bool = True
    channels_last: bool | Literal["auto"] = "auto"
    quantized_share: float = 0.3
    calibration_batches: int = 4


@dataclass(frozen=True)
class TrainingReport:
    """What a training really ran on.

    Attributes:
        device: ``cpu`` or ``cuda:N``.
        precision: Of autocast; float32 is none.
        tf32: Whether TF32 was allowed; never on a CPU.
        micro_batch: Samples that went through the model at a time; less than the batch size after the GPU's memory
            didn't suffice.
        resident: Whether the training split lay in the memory of the device.
    """

    device: str
    precision: str
    tf32: bool
    micro_batch: int
    resident: bool


class Teacher:
    """Gives the teacher's outputs for training batches, computing those of unaugmented samples only once.

    It computes, and keeps its outputs, on the device of the inputs; the model is moved there at the first call.

    Args:
        model: In eval mode.
        samples: Length of the training split.
        cached: Whether a sample's inputs are the same every time. Outputs that would take more than 2 GiB, or half of
            what is left of a GPU's memory, are computed anew each time all the same.
    """

    def __init__(self, model: nn.Module, samples: int, *, cached: bool) -> None:
        self._model = model.eval()
        self._samples = samples
        self._cached = cached
        self._device: torch.device | None = None
        self._outputs: Tensor | None = None
        self._known: Tensor | None = None

    @torch.no_grad()
    def __call__(self, indices: Tensor, inputs: Inputs) -> Tensor:
        """Outputs for a batch; `indices`, on the CPU, are its samples' positions in the training split."""
        if not self._cached:
            return self._compute(inputs)
        if self._outputs is None or self._known is None or not bool(self._known[indices].all()):
            outputs = self._compute(inputs)
            if self._outputs is None or self._known is None:
                limit = min(MEMORY_LIMIT_BYTES, memory_budget(outputs.device))
                if self._samples * outputs[0].numel() * 4 > limit:
                    self._cached = False
                    return outputs
                self._outputs = outputs.new_zeros((self._samples, *outputs.shape[1:]))
                # On the CPU, as the indices are: a look at it mustn't wait for a GPU.
                self._known = torch.zeros(self._samples, dtype=torch.bool)
            self._outputs[indices.to(outputs.device, non_blocking=True)] = outputs
            self._known[indices] = True
        return self._outputs[indices.to(self._outputs.device, non_blocking=True)]

    def _compute(self, inputs: Inputs) -> Tensor:
        device = next(iter(tensors(inputs).values())).device
        if device != self._device:
            self._model.to(device)
            self._device = device
        return call(self._model, inputs).float()


@dataclass(frozen=True)
class Training:
    """Everything of a training run but the model: data, task, teacher and options.

    Attributes:
        splits: Only `train` is read, and `augment`, which gets inputs on the training device.
        task: Gives the losses.
        options: The job's choices.
        teacher: None trains on the targets alone.
        after_step: Called between steps when the device has nothing left to do, e.g. to let a measurement go first:
            after every step on a CPU, every 20 on a GPU.
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
        """Training batches without end, shuffled anew each epoch, augmented; equal seeds give equal batches.

        Inputs and targets are on the training device, the indices on the CPU. The indices don't depend on the device;
        the augmentation's random numbers do.
        """
        device = training_device(self.options.device)
        generator = torch.Generator(device).manual_seed(seed)
        epoch = 0
        while True:
            order = self.splits.train.batches(self.options.batch_size, shuffle_seed=seed + epoch, drop_last=True)
            for batch in to_device(order, device):
                inputs = self.splits.augment(batch.inputs, generator) if self.splits.augment else batch.inputs
                yield batch._replace(inputs=inputs)
            epoch += 1


def check_training(model: nn.Module, splits: Splits, options: TrainOptions) -> None:
    """See before anything is spent that the training device is there, and that model and augmentation run on it.

    Args:
        model: The dense model, which is known to run on the CPU; it is moved.
        splits: Two samples of `train` are tried.
        options: The job's choices.

    Raises:
        JobError: Something of it isn't so.
    """
    device = training_device(options.device)
    float_format(options.precision, device)
    inputs = next(to_device(splits.train.head(2).batches(2), device)).inputs
    if splits.augment is not None:
        generator = torch.Generator(device).manual_seed(0)
        remedy = "give the tensors and random numbers that it makes the inputs' device (device=generator.device)"
        with _runs_on(device, "data.source", "give an augment function that runs", remedy):
            inputs = splits.augment(inputs, generator)
    if device.type != "cpu":
        remedy = "register the tensors that it makes as buffers, use a smaller model, or set finetune.device: cpu"
        with _runs_on(device, "model", "run", remedy), torch.no_grad():
            call(model.to(device).eval(), inputs)


@contextmanager
def _runs_on(device: torch.device, where: str, what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise JobError(where, f"must {what} on {device}", f"{type(error).__name__}: {error}", remedy) from error


def fit(
    model: nn.Module,
    training: Training,
    config: Finetuning,
    batches: Iterator[Batch],
    schedule: range,
    total: int,
    *,
    micro_batch: int | None = None,
) -> TrainingReport:
    """Train `model` in place for the steps of `schedule` out of `total`, and leave it in eval mode.

    A training may come in parts (float first, then through the quantizers): each part continues the learning-rate
    schedule, and the batches, where the one before stopped. The model is moved to the training device, and afterwards
    back to where it was.

    Args:
        model: In any mode, on any device.
        training: Data, task, teacher, options.
        config: Learning rate, temperature and distillation weight.
        batches: `Training.batches`.
        schedule: Positions of the steps.
        total: Length of the whole schedule.
        micro_batch: Samples that go through the model at a time, as the part before reported; None tries whole batches.

    Returns:
        What the training ran on, and in how many parts a batch.

    Raises:
        TrialError: The loss isn't finite, or the GPU's memory doesn't hold one sample.
    """
    options = training.options
    device, home = training_device(options.device), next(model.parameters()).device
    dtype = float_format(options.precision, device)
    model.to(device)
    optimizer = _optimizer(model, options, config.learning_rate)
    channels_last = options.channels_last is not False
    if channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.train()
    scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
    backward = _Backward(model, training, config, dtype, scaler, micro_batch or options.batch_size)
    losses: dict[int, Tensor] = {}
    ahead = 1 if device.type == "cpu" else _STEPS_AHEAD
    with use_tf32(device, options.tf32):
        for step in schedule:
            batch = next(batches)
            if channels_last:
                batch = batch._replace(inputs=map_tensors(_channels_last, batch.inputs))
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * _schedule(step, total, options.warmup)
            losses[step] = backward(batch, optimizer)
            scaler.unscale_(optimizer)
            if options.gradient_clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), options.gradient_clip)
            scaler.step(optimizer)
            scaler.update()
            if len(losses) == ahead or step == schedule[-1]:
                _check_finite(losses, total, config)
                losses.clear()
                training.after_step()
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # as it came
    model.to(home).eval()
    return TrainingReport(
        device=str(device),
        precision=str(dtype).removeprefix("torch."),
        tf32=options.tf32 and device.type == "cuda",
        micro_batch=backward.size,
        resident=is_resident(training.splits.train, device),
    )


class _Backward:
    """Puts the gradient of a batch's loss into the model, in as many parts as the device's memory asks for.

    Once the memory didn't suffice, all batches that follow are cut likewise. The gradient stays the same, where the
    loss is a mean over samples, but for dropout, which draws anew, and batch norm: it normalises each part by itself,
    and its running statistics see smaller batches, and once more what went through before the memory ran out.

    Args:
        model: On the device that trains.
        training: Task and teacher.
        config: Temperature and distillation weight.
        dtype: Of autocast; float32 for none.
        scaler: Scales the loss for float16.
        size: Samples that go through the model at a time.
    """

    def __init__(
        self,
        model: nn.Module,
        training: Training,
        config: Finetuning,
        dtype: torch.dtype,
        scaler: torch.amp.GradScaler,
        size: int,
    ) -> None:
        self.size = size
        self._model = model
        self._training = training
        self._config = config
        self._dtype = dtype
        self._scaler = scaler

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
            for part in _parts(batch, self.size):
                with torch.autocast(
                    part.targets.device.type, dtype=self._dtype, enabled=self._dtype is not torch.float32
                ):
                    outputs = call(self._model, part.inputs)
                loss = _loss(outputs.float(), part, self._training, self._config)
                loss = loss * (len(part.targets) / len(batch.targets))
                torch.autograd.backward(self._scaler.scale(loss))
                total = loss.detach() if total is None else total + loss.detach()
        except torch.cuda.OutOfMemoryError:
            # The error holds on to the activations until this block is left, so nothing can be freed here.
            return None
        return total


def _parts(batch: Batch, size: int) -> Iterator[Batch]:
    """The batch in the fewest parts of at most `size` samples, as even as can be."""
    length = len(batch.targets)
    count = math.ceil(length / size)
    for start, end in pairwise(length * part // count for part in range(count + 1)):
        cut = itemgetter(slice(start, end))
        yield Batch(cut(batch.indices), map_tensors(cut, batch.inputs), cut(batch.targets))


def _check_finite(losses: dict[int, Tensor], total: int, config: Finetuning) -> None:
    """Look at the losses of some steps; on a GPU this waits until they are computed."""
    values = torch.stack(list(losses.values())).tolist()
    for step, value in zip(losses, values, strict=True):
        if not math.isfinite(value):
            raise TrialError(
                f"the training loss must stay finite, but it is {value} at step {step} of {total}; "
                f"lower the learning rate (it was {config.learning_rate:.2g}) or the pruning ratios"
            )


def _loss(outputs: Tensor, batch: Batch, training: Training, config: Finetuning) -> Tensor:
    weight = config.distillation_weight if training.teacher is not None else 0.0
    loss = torch.zeros((), device=outputs.device)
    if weight < 1:
        loss = loss + (1 - weight) * training.task.loss(outputs, batch.targets)
    if weight > 0 and training.teacher is not None:
        taught = training.teacher(batch.indices, batch.inputs)
        loss = loss + weight * training.task.distillation_loss(outputs, taught, config.temperature)
    return loss


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
