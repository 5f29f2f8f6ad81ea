"""How the weights move: optimizer, learning-rate schedule, its early end, and the average of the weights."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor, nn

from paretune.objectives.training import TrainOptions

_MOMENTUM = 0.9
_CYCLE_RISE = 0.3
"""Share of the steps in which one-cycle's rate rises; this and the next two as PyTorch's OneCycleLR has them."""
_CYCLE_START = 1 / 25
"""Of the peak, where the rate starts from."""
_CYCLE_MOMENTUM = (0.85, 0.95)
"""At the peak of the learning rate, and at its ends."""

_PROGRESS = 1e-3
"""A running loss that falls by less, relative to the best one, stands still."""


def make_optimizer(
    parameters: Iterable[nn.Parameter], options: TrainOptions, *, tied: bool = False
) -> torch.optim.Optimizer:
    """The job's optimizer for those of the parameters that are trained; `set_pace` gives it its learning rate.

    Args:
        parameters: Of the model, and what is learnt along.
        options: The job's choices.
        tied: Whether weights with equal values and gradients must stay equal bit for bit.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    # One kernel for all weights; it takes real floats alone. On a CPU it is five times as fast as a loop over them, but
    # rounds the last elements of a tensor, those that don't fill a vector register, in another way than all others.
    fused = True if not tied and all(parameter.is_floating_point() for parameter in trained) else None
    decay = options.weight_decay
    if options.optimizer == "sgd":
        return torch.optim.SGD(trained, momentum=_MOMENTUM, nesterov=True, weight_decay=decay, fused=fused)
    return torch.optim.AdamW(trained, weight_decay=decay, fused=fused)


class Pace(NamedTuple):
    """What the schedule says for a step.

    Attributes:
        rate: Learning rate as a share of its peak, in (0, 1].
        momentum: Of SGD; the first beta of AdamW.
    """

    rate: float
    momentum: float


def pace(step: int, total: int, options: TrainOptions) -> Pace:
    """The schedule at a position out of `total`, counted from 0."""
    rising = _rising(total, options)
    falls = 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))
    if options.schedule == "cosine":
        return Pace((step + 1) / (rising + 1) if step < rising else falls, _MOMENTUM)
    least, most = _CYCLE_MOMENTUM
    if step >= rising:
        return Pace(falls, most - (most - least) * falls)
    rises = 0.5 * (1 - math.cos(math.pi * step / rising))
    return Pace(_CYCLE_START + (1 - _CYCLE_START) * rises, most - (most - least) * rises)


def set_pace(optimizer: torch.optim.Optimizer, peak: float, pace: Pace) -> None:
    """Set the learning rate, `peak` times the pace's, and the momentum for the next step."""
    for group in optimizer.param_groups:
        group["lr"] = peak * pace.rate
        if "betas" in group:
            group["betas"] = (pace.momentum, group["betas"][1])
        else:
            group["momentum"] = pace.momentum


def _rising(total: int, options: TrainOptions) -> int:
    """Steps before the peak of the learning rate."""
    return round((_CYCLE_RISE if options.schedule == "one-cycle" else options.warmup) * total)


class Positions:
    """The positions of a part of the schedule, one a step; cut short when the training loss has stopped falling.

    The running loss is the mean over `plateau` times `total` steps. Once it hasn't fallen below its best, by a
    thousandth of that, for as many steps again, as many of the positions left are chosen at equal distances, with the
    last one among them: the learning rate falls as far as it would have, only faster. Steps in which it rises don't
    count, and a part with no more than that left isn't cut: one of up to three times `plateau` times `total` steps
    never is. (A share of the part's own steps would judge a short one by a handful of losses, which is by their noise.)

    Args:
        schedule: The part's positions.
        total: Length of the whole schedule.
        options: The job's choices.

    Attributes:
        steps: Given out so far.
        cut: Whether the part was cut short.
    """

    def __init__(self, schedule: range, total: int, options: TrainOptions) -> None:
        self.steps = 0
        self.cut = False
        self._left = deque(schedule)
        self._rising = _rising(total, options)
        self._patience = None if options.plateau is None else max(1, round(options.plateau * total))
        self._losses: deque[float] = deque(maxlen=self._patience)
        self._best = math.inf
        self._since = 0

    def __iter__(self) -> Iterator[int]:
        while self._left:
            self.steps += 1
            yield self._left.popleft()

    @property
    def ended(self) -> bool:
        """Whether the last position was given out."""
        return not self._left

    def note(self, losses: Mapping[int, float]) -> None:
        """Take in the losses of steps, by position in the order in which they were run."""
        if self._patience is None or self.cut:
            return
        for position, loss in losses.items():
            if position >= self._rising:
                self._note(loss)
        if self._since >= self._patience < len(self._left):
            left = tuple(self._left)
            ends = (len(left) * (step + 1) // self._patience for step in range(self._patience))
            self._left = deque(left[end - 1] for end in ends)
            self.cut = True

    def _note(self, loss: float) -> None:
        self._losses.append(loss)
        if len(self._losses) < (self._patience or 0):
            return
        running = fmean(self._losses)
        if self._best == math.inf or running < self._best - _PROGRESS * abs(self._best):
            self._best, self._since = running, 0
        else:
            self._since += 1


class Average:
    """The running average of a model's parameters and floating-point buffers.

    The decay of the first updates is smaller, (1 + updates) / (10 + updates), so that a short training forgets where it
    began. What is equal, or zero, throughout stays so.

    Args:
        model: On the device that trains; is read at each update.
        decay: In (0, 1).
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._updates = 0
        self._current = _floats(model)
        self._averages = [tensor.clone() for tensor in self._current]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the present values."""
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        self._updates += 1
        torch._foreach_lerp_(self._averages, self._current, 1 - decay)

    @torch.no_grad()
    def put(self, copy: nn.Module | None = None) -> None:
        """Put the averages into the model, or into a copy of it."""
        into = self._current if copy is None else _floats(copy)
        for current, average in zip(into, self._averages, strict=True):
            current.copy_(average)


def _floats(model: nn.Module) -> list[Tensor]:
    tensors = (tensor.detach() for tensor in (*model.parameters(), *model.buffers()))
    return [tensor for tensor in tensors if tensor.is_floating_point()]
