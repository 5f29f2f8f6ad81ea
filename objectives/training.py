"""What a training works on: the job's options, data, task and teacher; and what it reports."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from paretune.objectives.accelerator import training_device
from paretune.objectives.data.augment import make_augmentation
from paretune.objectives.data.residency import to_device
from paretune.objectives.data.splits import Batch, Splits
from paretune.objectives.distillation import Hints, Teacher
from paretune.objectives.tasks import Task


@dataclass(frozen=True)
class TrainOptions:
    """What a job fixes for all of its trials.

    Attributes:
        epochs: Passes over the training split; may be a fraction.
        batch_size: Samples a step.
        optimizer: AdamW, or SGD with Nesterov momentum.
        weight_decay: Of the optimizer.
        schedule: Of the learning rate. ``cosine``: a linear warm-up, then a cosine to 0. ``one-cycle``: up to the peak
            and down to 0, with momentum the other way (Smith and Topin, 2018, arXiv:1708.07120).
        warmup: Share of the steps in which the learning rate rises; one-cycle has a rise of its own.
        plateau: Share of the steps of the whole training, in (0, 1): without progress over so many, the rest of a part
            is run through in as many, see `paretune.objectives.optimization.Positions`. None never ends early.
        gradient_clip: Largest norm of the gradient; None for no limit.
        label_smoothing: Share of each label that goes to all classes alike, in [0, 1) (Szegedy et al., 2016,
            arXiv:1512.00567); classification alone.
        ema: Decay of the running average of weights and statistics that is left in the place of the last ones, in
            (0, 1) (Polyak and Juditsky, 1992). None leaves the last ones.
        freeze_batchnorm: Share of the steps in floats, the last ones, that normalize with the running statistics and
            leave these as they are, in [0, 1] (Krishnamoorthi, 2018, arXiv:1806.08342).
        device: What trains: ``auto`` (the first GPU, or the CPU), ``cpu``, ``cuda`` or ``cuda:N``.
        precision: Of autocast. ``auto`` is bfloat16 where the device has instructions for it; float16 needs a GPU.
        tf32: Whether a GPU may compute what stays float32 in TF32 (10 bits of mantissa).
        channels_last: Memory format of image batches. ``auto`` is True where it was measured to be no slower: for nets
            with 2-D convolutions and without group or instance norm.
        compile: Whether the forward goes through `torch.compile`.
        quantized_share: Share of the steps that train through the quantizers, in [0, 1].
        calibration_batches: Batches for importances and the ranges of activations.
        augment: What is done to each training batch, see `paretune.objectives.data.augment`.
        hints: Layers whose features follow the teacher's, see `paretune.objectives.distillation.Hints`: names that hold
            in both, or the student's names to the teacher's.
    """

    epochs: float = 1.0
    batch_size: int = 128
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 1e-4
    schedule: Literal["cosine", "one-cycle"] = "cosine"
    warmup: float = 0.1
    plateau: float | None = None
    gradient_clip: float | None = 1.0
    label_smoothing: float = 0.0
    ema: float | None = None
    freeze_batchnorm: float = 0.0
    device: str = "auto"
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    tf32: bool = True
    channels_last: bool | Literal["auto"] = "auto"
    compile: bool = False
    quantized_share: float = 0.3
    calibration_batches: int = 4
    augment: Sequence[str] = ()
    hints: Sequence[str] | Mapping[str, str] = ()


class Moment(NamedTuple):
    """Where a training stands between two of its steps.

    Attributes:
        steps: Run so far, in the parts before as well.
        done: Positions of the whole schedule that are behind it, in [1, total].
        total: Length of the whole schedule.
        model: Makes a copy of the model as it would be left if the training ended here, in eval mode, on the device
            that trains.
        outputs: Runs batches through such a copy in the training's precision, and calls a function after each. Gives
            outputs in float32 and targets, both on the CPU. Neither changes anything of the training, random states
            included.
    """

    steps: int
    done: int
    total: int
    model: Callable[[], nn.Module]
    outputs: Callable[[Iterable[Batch], Callable[[], None]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Training:
    """Everything of a training run but the model: data, task, teacher and options.

    Attributes:
        splits: Only `train` is read, and `augment`, which gets inputs on the training device.
        task: Gives the losses.
        options: The job's choices.
        teacher: None trains on the targets alone.
        after_step: Called between steps, e.g. to let a measurement go first or to end the training by an exception: on
            a CPU after every step; on a GPU every 20, when it has nothing left to do, and at the rungs, where it may.
        hints: Features of the teacher that the model's follow, where the plan gives them weight; None has none.
        rungs: Shares of the whole schedule, in (0, 1), at which `after_step` mustn't be left out.
    """

    splits: Splits
    task: Task
    options: TrainOptions
    teacher: Teacher | None = None
    after_step: Callable[[Moment], None] = lambda moment: None
    hints: Hints | None = None
    rungs: Sequence[float] = ()

    def steps(self, epochs: float) -> int:
        """Steps in so many epochs, at least 1."""
        return max(1, round(epochs * self._epoch))

    @property
    def _epoch(self) -> int:
        """Steps in one epoch."""
        return max(1, len(self.splits.train) // self.options.batch_size)

    def batches(self, seed: int, *, after: int = 0) -> Iterator[Batch]:
        """Training batches without end, shuffled anew each epoch, augmented; equal seeds give equal batches.

        Inputs and targets are on the training device, the indices on the CPU. The indices don't depend on the device;
        the augmentation's random numbers do.

        Args:
            seed: Of the orders and of the augmentation.
            after: Steps that an earlier training has run on these batches: they begin with the first epoch that it
                hasn't.
        """
        device = training_device(self.options.device)
        epoch = math.ceil(after / self._epoch)
        generator = torch.Generator(device).manual_seed(seed + epoch)
        while True:
            order = self.splits.train.batches(self.options.batch_size, shuffle_seed=seed + epoch, drop_last=True)
            for batch in to_device(order, device):
                yield self.augment(batch, generator)
            epoch += 1

    def augment(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The batch augmented by the data's own function, then as the job asks; all of it on the generator's device."""
        if self.splits.augment is not None:
            batch = batch._replace(inputs=self.splits.augment(batch.inputs, generator))
        augmentation = make_augmentation(self.options.augment)
        return batch if augmentation is None else augmentation(batch, generator)


@dataclass(frozen=True)
class TrainingReport:
    """What a training really ran on, and for how long.

    Attributes:
        device: ``cpu`` or ``cuda:N``.
        precision: Of autocast; float32 is none.
        tf32: Whether TF32 was allowed; never on a CPU.
        channels_last: Whether images lay in that memory format.
        micro_batch: Samples that went through the model at a time; less than the batch size after the GPU's memory
            didn't suffice.
        resident: Whether the training split lay in the memory of the device.
        steps: Really run.
        ended: Whether the ``schedule`` was run in full, or a ``plateau`` of the loss cut it short.
        loss_scale: What the loss was multiplied by in the end for float16; None in other formats.
        resumed_steps: Positions of the schedule that an earlier training had behind it, and this one didn't run again.
    """

    device: str
    precision: str
    tf32: bool
    channels_last: bool
    micro_batch: int
    resident: bool
    steps: int
    ended: Literal["schedule", "plateau"]
    loss_scale: float | None = None
    resumed_steps: int = 0

    def then(self, part: TrainingReport) -> TrainingReport:
        """The report of this training and the part that followed it, as one."""
        first_cut = self if self.ended == "plateau" else part
        return replace(part, steps=self.steps + part.steps, ended=first_cut.ended)
