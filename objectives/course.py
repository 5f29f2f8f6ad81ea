"""The course of a trial's training: cut by cut in floats, then through codebooks and quantizers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from torch import nn

from paretune.objectives.compress import Context, compress_numerics, compress_structure, freeze_quantizers
from paretune.objectives.compress.ties import ties
from paretune.objectives.finetune import Training, TrainingReport, fit
from paretune.spaces.plan import CompressionPlan, Quantization, Schedule

CUTTING = 0.5
"""Share of the training in floats in which a schedule makes its cuts; the rest is for recovering from the last one."""


def train(
    model: nn.Module, plan: CompressionPlan, training: Training, context: Context, *, seed: int, epochs: float
) -> tuple[nn.Module, TrainingReport]:
    """Train a model as its plan says; returns the module to deploy and what the training ran on.

    Args:
        model: Compressed as far as the first cut of the plan's schedule; it is changed in place.
        plan: Resolved.
        training: Data, task, teacher, options.
        context: With the batches for importances and calibration.
        seed: Of the batches.
        epochs: Of the whole training; 0 compresses without training.

    Raises:
        TrialError: The loss isn't finite, or the memory doesn't suffice.
    """
    total = training.steps(epochs) if epochs else 0
    quantizes = any(bits <= 8 for bits in plan.quantize.bits.values())
    through = (quantizes and plan.quantize.aware) or bool(plan.share.clusters)
    border = total - (round(training.options.quantized_share * total) if through else 0)
    batches = training.batches(seed)
    report: TrainingReport | None = None

    def fit_part(module: nn.Module, part: range) -> TrainingReport:
        tied = ties(module, plan)
        # Batch norm is folded at the border.
        found = fit(module, training, plan.finetune, batches, part, total, before=report, floats=border, ties=tied)
        return report.then(found) if report else found

    for position, (fraction, part) in enumerate(cuts(plan.schedule, border)):
        if position:
            model = compress_structure(model, plan, context, fraction)
        report = fit_part(model, part)
    trained = plan if plan.quantize.aware else plan.model_copy(update={"quantize": Quantization()})
    module = compress_numerics(model, trained, context)
    report = fit_part(module, range(border, total))
    if trained is not plan:
        module = compress_numerics(module, plan, context)
    freeze_quantizers(module)
    return module, report


def cuts(schedule: Schedule, steps: int) -> Iterator[tuple[float, range]]:
    """Share of the whole cut, and the steps that are trained with it, in order; `steps` in all.

    Cuts stand at equal distances in the first half, so that the last one is recovered from as long as all others.
    """
    count = schedule.steps
    starts = [round(CUTTING * steps * cut / (count - 1)) for cut in range(count)] if count > 1 else [0]
    for fraction, (start, end) in zip(schedule.fractions, pairwise([*starts, steps]), strict=True):
        yield fraction, range(start, end)
