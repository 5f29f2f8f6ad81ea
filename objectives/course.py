"""The course of a trial's training: cut by cut in floats, then through codebooks and quantizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise

from torch import nn

from paretune.objectives.compress import Context, compress_numerics, compress_structure, freeze_quantizers
from paretune.objectives.compress.ties import ties
from paretune.objectives.finetune import Moment, Training, TrainingReport, fit
from paretune.spaces.plan import CompressionPlan, Quantization, Schedule

CUTTING = 0.5
"""Share of the training in floats in which a schedule makes its cuts; the rest is for recovering from the last one."""

KEPT = 0.7
"""Share of the schedule after which the model is kept, for a longer training to go on from. Steps after that, at a low
learning rate, are lost on the longer one, whose rate is higher there: see docs/decisions/018-fidelity.md."""


def train(
    model: nn.Module,
    plan: CompressionPlan,
    training: Training,
    context: Context,
    *,
    seed: int,
    epochs: float,
    start: int | None = None,
    keep: Callable[[nn.Module, int, int], None] | None = None,
) -> tuple[nn.Module, TrainingReport]:
    """Train a model as its plan says; returns the module to deploy and what the training ran on.

    Args:
        model: Compressed as far as the first cut of the plan's schedule, or wholly where it has a start; it is changed
            in place.
        plan: Resolved.
        training: Data, task, teacher, options.
        context: With the batches for importances and calibration.
        seed: Of the batches.
        epochs: Of the whole training; 0 compresses without training.
        start: Steps that an earlier, shorter training has trained the model for in floats: it goes on at this position
            of the schedule, without further cuts, and with batches in another order. None begins anew.
        keep: Called once with a copy of the model, on the CPU and compressed wholly but for codebooks and quantizers,
            with batch norm; with its position on the schedule, which may be the start of a longer training; and with
            the schedule's length. That is after 0.7 of the schedule, or where the training in floats ends, if that is
            earlier; never where nothing is trained in floats.

    Raises:
        TrialError: The loss isn't finite, or the memory doesn't suffice.
    """
    total = training.steps(epochs) if epochs else 0
    quantizes = any(bits <= 8 for bits in plan.quantize.bits.values())
    through = (quantizes and plan.quantize.aware) or bool(plan.share.clusters)
    border = total - (round(training.options.quantized_share * total) if through else 0)
    batches = training.batches(seed, after=start or 0)
    report: TrainingReport | None = None

    def fit_part(module: nn.Module, part: range, training: Training) -> TrainingReport:
        tied = ties(module, plan)
        # Batch norm is folded at the border.
        found = fit(module, training, plan.finetune, batches, part, total, before=report, floats=border, ties=tied)
        return report.then(found) if report else found

    parts = list(cuts(plan.schedule, border)) if start is None else [(1.0, range(start, border))]
    for position, (fraction, part) in enumerate(parts, start=1):
        if position > 1:
            model = compress_structure(model, plan, context, fraction)
        is_last = position == len(parts)
        keeping = _keeping(training, keep, border, total) if keep is not None and is_last and total else training
        report = fit_part(model, part, keeping)
    trained = plan if plan.quantize.aware else plan.model_copy(update={"quantize": Quantization()})
    module = compress_numerics(model, trained, context)
    report = fit_part(module, range(border, total), training)
    if trained is not plan:
        module = compress_numerics(module, plan, context)
    freeze_quantizers(module)
    return module, replace(report, resumed_steps=start or 0)


def _keeping(training: Training, keep: Callable[[nn.Module, int, int], None], border: int, total: int) -> Training:
    """The same training, which keeps its model where it is time for that."""
    mark = min(border, round(KEPT * total))
    kept = False

    def after_step(moment: Moment) -> None:
        nonlocal kept
        if moment.done >= mark and not kept:
            keep(moment.model().cpu(), moment.done, total)  # first, as it waits for the steps that a GPU still queues
            kept = True
        training.after_step(moment)

    return replace(training, after_step=after_step, rungs=(*training.rungs, mark / total))


def cuts(schedule: Schedule, steps: int) -> Iterator[tuple[float, range]]:
    """Share of the whole cut, and the steps that are trained with it, in order; `steps` in all.

    Cuts stand at equal distances in the first half, so that the last one is recovered from as long as all others.
    """
    count = schedule.steps
    starts = [round(CUTTING * steps * cut / (count - 1)) for cut in range(count)] if count > 1 else [0]
    for fraction, (start, end) in zip(schedule.fractions, pairwise([*starts, steps]), strict=True):
        yield fraction, range(start, end)
