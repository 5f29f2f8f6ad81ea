"""Fine-tuning with distillation, in the seconds that a trial can spare."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from paretune.errors import JobError, TrialError
from paretune.objectives.accelerator import float_format, training_device, use_tf32
from paretune.objectives.compress.quantization import freeze_quantizers
from paretune.objectives.data.inputs import call, map_tensors
from paretune.objectives.data.residency import is_resident, to_device
from paretune.objectives.data.splits import Batch
from paretune.objectives.distillation import AttachedHints
from paretune.objectives.gradient import Gradient, parts
from paretune.objectives.optimization import Average, Positions, make_optimizer, pace, set_pace
from paretune.objectives.training import Moment, Training, TrainingReport, TrainOptions
from paretune.spaces.copies import copy_of
from paretune.spaces.plan import Finetuning

__all__ = ["Moment", "TrainOptions", "Training", "TrainingReport", "check_training", "fit"]

_STEPS_AHEAD = {"cpu": 1, "cuda": 20}
"""Steps that are queued before the CPU waits for them, to look at their losses and to let a measurement go first: at
every step, a GPU would stand idle while the CPU prepares the next one."""


def check_training(model: nn.Module, training: Training) -> None:
    """See before anything is spent that the training device is there, and that what a training asks for works on it.

    Args:
        model: The dense model, which is known to run on the CPU; it is moved.
        training: Two samples of its data are tried.

    Raises:
        JobError: Something of it doesn't.
    """
    options = training.options
    device = training_device(options.device)
    float_format(options.precision, device)
    task = training.task.smoothed(options.label_smoothing)
    batch = next(to_device(training.splits.train.head(2).batches(2), device))
    generator = torch.Generator(device).manual_seed(0)
    remedy = "give the tensors and random numbers that it makes the inputs' device (device=generator.device)"
    with _works_on(device, "data.source", "give an augment function that runs", remedy):
        batch = training.augment(batch, generator)
    if device.type != "cpu":
        remedy = "register the tensors that it makes as buffers, use a smaller model, or set finetune.device: cpu"
        with _works_on(device, "model", "run", remedy), torch.no_grad():
            call(model.to(device).eval(), batch.inputs)
    if options.compile:
        remedy = "set finetune.compile: false"
        with _works_on(device, "finetune.compile", "be possible", remedy), _compiled(model.train()) as forward:
            torch.autograd.backward(task.loss(call(forward, batch.inputs), batch.targets))


@contextmanager
def _works_on(device: torch.device, where: str, what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except JobError:
        raise
    except Exception as error:
        raise JobError(where, f"must {what} on {device}", _reason(error), remedy) from error


def fit(
    model: nn.Module,
    training: Training,
    config: Finetuning,
    batches: Iterator[Batch],
    schedule: range,
    total: int,
    *,
    before: TrainingReport | None = None,
    floats: int | None = None,
    ties: Sequence[Callable[[], None]] = (),
) -> TrainingReport:
    """Train `model` in place for the steps of `schedule` out of `total`, and leave it in eval mode.

    A training may come in parts (float first, then through the quantizers): each part continues the learning-rate
    schedule, and the batches, where the one before stopped, with an optimizer and an average of its own. The model is
    moved to the training device, and afterwards back to where it was.

    Args:
        model: In any mode, on any device.
        training: Data, task, teacher, hints, options.
        config: Learning rate, temperature, weights of distillation and hints.
        batches: `Training.batches`.
        schedule: Positions of the steps; at a plateau of the loss not all of them are run.
        total: Length of the whole schedule.
        before: Of the part before, whose micro-batch and loss scale are carried on; None begins with whole batches.
        floats: Steps of the whole schedule that are trained in floats, with batch norm; None is `total`.
        ties: Called in each step when the gradients are there, before they are clipped and the weights move. They may
            change gradients: weights that are zero or equal, and whose gradients are so in every step, stay so.

    Returns:
        What the training ran on, in how many parts a batch, and for how many steps.

    Raises:
        TrialError: The loss isn't finite, the GPU's memory doesn't hold one sample, or the model can't be compiled.
    """
    options, device = training.options, training_device(training.options.device)
    channels_last = _channels_last(model) if options.channels_last == "auto" else options.channels_last
    positions = Positions(schedule, total, options)
    losses: dict[int, Tensor] = {}
    ahead = _STEPS_AHEAD[device.type]
    with use_tf32(device, options.tf32), _prepared(model, device, channels_last), _forward(model, options) as forward:
        size = before.micro_batch if before else options.batch_size
        hinted, batches = _attach(model, training, config, batches, size if schedule else 0)
        with hinted as hints:
            gradient = Gradient(forward, training, config, hints, size, before.loss_scale if before else None)
            step = _Step(model, training, config, gradient, total, total if floats is None else floats, ties)
            run = before.steps if before else 0
            outputs = partial(step.outputs, channels_last=channels_last)
            for position in positions:
                losses[position] = step(position, _laid_out(next(batches), channels_last))
                looks = len(losses) == ahead or positions.ended
                if looks:
                    positions.note(_read(losses, total, config))
                    losses.clear()
                # At a rung between two looks the losses stay unread: a plateau must be seen where it is without rungs.
                if looks or any(position / total < share <= (position + 1) / total for share in training.rungs):
                    training.after_step(Moment(run + positions.steps, position + 1, total, step.left, outputs))
            step.finish()
    return TrainingReport(
        device=str(device),
        precision=str(gradient.dtype).removeprefix("torch."),
        tf32=options.tf32 and device.type == "cuda",
        channels_last=channels_last,
        micro_batch=gradient.size,
        resident=is_resident(training.splits.train, device),
        steps=positions.steps,
        ended="plateau" if positions.cut else "schedule",
        loss_scale=gradient.scaler.get_scale() if gradient.scaler.is_enabled() else None,
    )


@contextmanager
def _prepared(model: nn.Module, device: torch.device, channels_last: bool) -> Iterator[None]:
    """Within the block, the model is on the device, laid out, in training mode; then where it was, in eval mode."""
    home = next(model.parameters()).device
    model.to(device)
    if channels_last:
        # Not `Module.to`, which fails at the weights of 3-D convolutions.
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dim() == 4:
                tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    model.train()
    yield
    model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # as it came
    model.to(home).eval()


def _channels_last(model: nn.Module) -> bool:
    """Whether images laid out so make its training faster.

    On a CPU, nets of 2-D convolutions were trained 1.0 to 1.6 times as fast, with batch norm, layer norm or no norm.
    With group or instance norm, whose kernels want whole channels, they took up to 1.6 times as long.
    """
    kinds = [type(module) for module in model.modules()]
    return any(issubclass(kind, nn.Conv2d) for kind in kinds) and not any(
        issubclass(kind, (nn.GroupNorm, _InstanceNorm)) for kind in kinds
    )


def _laid_out(batch: Batch, channels_last: bool) -> Batch:
    def lay_out(tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor

    return batch._replace(inputs=map_tensors(lay_out, batch.inputs)) if channels_last else batch


@contextmanager
def _forward(model: nn.Module, options: TrainOptions) -> Iterator[Callable[..., Any]]:
    """What is called in the model's place within the block: the model, or its forward compiled.

    Raises:
        TrialError: It can't be compiled, which shows when it is called.
    """
    if not options.compile:
        yield model
        return
    from torch._dynamo.exc import TorchDynamoException

    try:
        with _compiled(model) as forward:
            yield forward
    except TorchDynamoException as error:
        raise TrialError(
            f"torch.compile must be able to compile the model's training, but got {_reason(error)}; "
            "set finetune.compile: false"
        ) from error


@contextmanager
def _compiled(model: nn.Module) -> Iterator[Callable[..., Any]]:
    from torch._dynamo import config
    from torch._dynamo.eval_frame import remove_from_cache

    def forward(*inputs: Tensor, **named: Tensor) -> Any:
        return model(*inputs, **named)

    try:
        # Quantizers count their steps, and each would be compiled for itself.
        with config.patch(allow_unspec_int_on_nn_module=True):
            yield torch.compile(forward)
    finally:
        # PyTorch keeps compiled code with the function that it was made from, here the same one for all trials, and
        # after eight of them it would compile no more.
        remove_from_cache(forward)


def _reason(error: Exception) -> str:
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first}"


def _attach(
    model: nn.Module, training: Training, config: Finetuning, batches: Iterator[Batch], size: int
) -> tuple[AbstractContextManager[AttachedHints | None], Iterator[Batch]]:
    """The hints on the model, to be closed, fitted to so many samples of the first batch; and all batches."""
    if training.hints is None or config.hint_weight == 0 or size == 0:
        return nullcontext(), batches
    first = next(batches)
    return closing(training.hints.attach(model, next(parts(first, size)))), chain([first], batches)


class _Step:
    """One step of a training: gradient, ties, clipping, optimizer, average.

    Args:
        model: On the device that trains, laid out.
        training: Options.
        config: Learning rate.
        gradient: Of a batch.
        total: Length of the whole schedule.
        floats: Of them in floats, with batch norm.
        ties: Change the gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        training: Training,
        config: Finetuning,
        gradient: Gradient,
        total: int,
        floats: int,
        ties: Sequence[Callable[[], None]],
    ) -> None:
        options = training.options
        extra = gradient.hints.parameters() if gradient.hints is not None else ()
        self._model = model
        self._parameters = [*model.parameters(), *extra]
        self._optimizer = make_optimizer(self._parameters, options, tied=bool(ties))
        self._average = Average(model, options.ema) if options.ema is not None else None
        self._norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        frozen = round(options.freeze_batchnorm * floats)
        self._freezes_at = floats - frozen if frozen else total
        self._options = options
        self._peak = config.learning_rate
        self._gradient = gradient
        self._total = total
        self._ties = ties

    def __call__(self, position: int, batch: Batch) -> Tensor:
        """Train on a batch at a position of the schedule; returns the loss, which may still be computed."""
        if position >= self._freezes_at:
            for norm in self._norms:
                norm.eval()
        scaler = self._gradient.scaler
        set_pace(self._optimizer, self._peak, pace(position, self._total, self._options))
        loss = self._gradient(batch, self._optimizer)
        scaler.unscale_(self._optimizer)
        for tie in self._ties:
            tie()
        if self._options.gradient_clip is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._options.gradient_clip)
        scaler.step(self._optimizer)
        scaler.update()
        if self._average is not None:
            self._average.update()
        return loss

    def finish(self) -> None:
        """Leave the averages in the model, where there are some."""
        if self._average is not None:
            self._average.put()

    def left(self) -> nn.Module:
        """See `Moment.model`."""
        # A copy, as eval mode alone wouldn't do: an average or a quantizer's grid would have to be put back, and what
        # modules remember for evaluation would stay.
        model = copy_of(self._model).eval()
        if self._average is not None:
            self._average.put(model)
        freeze_quantizers(model)
        return model

    @torch.no_grad()
    def outputs(
        self, batches: Iterable[Batch], between: Callable[[], None], *, channels_last: bool
    ) -> tuple[Tensor, Tensor]:
        """See `Moment.outputs`; batches go through in parts as those of the training do."""
        dtype, outputs, targets = self._gradient.dtype, [], []
        device, model = self._parameters[0].device, self.left()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for batch in to_device(iter(batches), device):
                for part in parts(_laid_out(batch, channels_last), self._gradient.size):
                    with torch.autocast(device.type, dtype=dtype, enabled=dtype is not torch.float32):
                        found = call(model, part.inputs)
                    outputs.append(found.float().cpu())
                    targets.append(part.targets.cpu())
                between()
        return torch.cat(outputs), torch.cat(targets)


def _read(losses: dict[int, Tensor], total: int, config: Finetuning) -> dict[int, float]:
    """The losses of some steps; on a GPU this waits until they are computed.

    Raises:
        TrialError: One isn't finite.
    """
    values = dict(zip(losses, torch.stack(list(losses.values())).tolist(), strict=True))
    for step, value in values.items():
        if not math.isfinite(value):
            raise TrialError(
                f"the training loss must stay finite, but it is {value} at step {step} of {total}; "
                f"lower the learning rate (it was {config.learning_rate:.2g}) or the pruning ratios"
            )
    return values
