"""Sensitivity: what it costs to compress one layer or group alone, in one way, without any training.

Nothing is trained, so that a number takes one pass over a few samples. It is an upper bound on what the layer costs
once it is trained again, and it ranks layers: where nothing is lost, there is slack.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from paretune.errors import ParetuneError, TrialError
from paretune.objectives.accelerator import training_device
from paretune.objectives.compress import STRUCTURE, Context, compress_numerics, compress_structure, resolve_plan
from paretune.objectives.data.inputs import call
from paretune.objectives.data.residency import to_device
from paretune.objectives.data.splits import Batch
from paretune.objectives.problem import Problem
from paretune.spaces.copies import copy_of
from paretune.spaces.plan import CompressionPlan

_MOST_SAMPLES, _LEAST_SAMPLES = 512, 64

_MACS = 1e12
"""What all passes together may compute: one to two minutes on two cores, with what else a probe takes."""

_QUIET_SECONDS = 5.0
"""Between two lines of progress."""

_TINY = 1e-12
"""Stands for a loss of zero."""


@dataclass(frozen=True)
class Probe:
    """One thing to try.

    Attributes:
        technique: Field of the plan, e.g. ``"prune"``.
        name: Of the layer or group.
        setting: How strongly, in words; equal for all layers that are compared.
        value: The same as the plan has it: a ratio, a width, a share of the rank, a sparsity, a number of clusters.
        plan: Does this and nothing else.
    """

    technique: str
    name: str
    setting: str
    value: float
    plan: CompressionPlan


@dataclass(frozen=True)
class Entry:
    """What came of a probe.

    Attributes:
        technique: Of the probe, as are the next three.
        name: Of the layer or group.
        setting: How strongly, in words.
        value: How strongly, as the plan has it.
        loss_increase: The task's loss minus the dense model's; None where it couldn't be found. Below 0 where the
            model got better on these samples.
        metric_drop: The dense model's metric minus the one left; None where the loss is.
        reason: Why there are no numbers; empty where there are.
    """

    technique: str
    name: str
    setting: str
    value: float
    loss_increase: float | None = None
    metric_drop: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Sensitivity:
    """The record of a profile; JSON-able through `to_dict`.

    Attributes:
        samples: Validation samples that each number comes from.
        loss: Of the dense model on them.
        metric: Of the dense model on them.
        uninformed_loss: Of an answer that is the same for every sample: the mean of the dense model's outputs. The
            dense model's own where that has no finite loss.
        entries: In the order of the probes.
    """

    samples: int
    loss: float
    metric: float
    uninformed_loss: float
    entries: tuple[Entry, ...]

    def share_lost(self, loss_increase: float) -> float:
        """An increase of the loss as a share of what the dense model knows: 0 is nothing lost, 1 is everything.

        What it knows is how far its loss is below `uninformed_loss`, so that losses of any scale compare. Where it
        knows nothing, an increase counts as a share of its loss.
        """
        known = self.uninformed_loss - self.loss
        return loss_increase / (known if known > 0 else max(abs(self.loss), _TINY))

    def find(self, technique: str, name: str, value: float) -> Entry | None:
        """The entry of a technique on a layer or group at exactly this strength; None where it wasn't tried."""
        key = (technique, name, value)
        return next((entry for entry in self.entries if (entry.technique, entry.name, entry.value) == key), None)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self) | {"entries": [asdict(entry) for entry in self.entries]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Sensitivity:
        """Undo `to_dict`."""
        return cls(**{**data, "entries": tuple(Entry(**entry) for entry in data["entries"])})


def affordable_samples(macs: int, probes: int) -> int:
    """Samples for each of so many probes of a model, 64 to 512: so few that it takes minutes, not hours.

    Args:
        macs: Multiply-accumulates of the model for one sample.
        probes: How many there are.
    """
    return min(max(round(_MACS / max(1, macs * probes)), _LEAST_SAMPLES), _MOST_SAMPLES)


def profile_sensitivity(
    problem: Problem,
    probes: Sequence[Probe],
    *,
    samples: int = _MOST_SAMPLES,
    report: Callable[[str], None] = lambda line: None,
) -> Sensitivity:
    """Compress the dense model by each probe's plan alone, without training, and score it.

    All are scored on the same validation samples, in eval mode and with batch norm folded, and calibrated on the same
    training samples as trials are (on at most `samples` of them). Equal calls give equal records on the same machine,
    and no entry depends on the others; the CPU's random state is left as it was.

    Args:
        problem: Model, data, task.
        probes: What to try. One that can't be carried out has its reason in the record.
        samples: Validation samples for each, fewer where the split has fewer.
        report: Takes a line for the user, every few seconds.

    Raises:
        TrialError: The dense model's own loss or metric isn't finite.
    """
    device = problem.device()
    entries, said = [], time.monotonic()
    with device.shared(), torch.random.fork_rng(devices=[]):
        context = problem.context(_calibration(problem, samples))
        batches = validation_batches(problem, samples)
        dense = problem.model.build()
        if not all(probe.plan.is_resolved for probe in probes):
            context = replace(context, grids=problem.grids, exclude=problem.exclude)
        folded = compress_numerics(dense, CompressionPlan(), problem.context([]))
        base = _score(problem, copy_of(folded), batches)
        for position, probe in enumerate(probes, start=1):
            device.step_aside()
            entries.append(_try(problem, _Dense(dense, folded), probe, context, batches, base))
            if time.monotonic() - said >= _QUIET_SECONDS:
                report(f"profiling {position} of {len(probes)}: {probe.technique} {probe.name}, {probe.setting}")
                said = time.monotonic()
    targets = torch.cat([batch.targets for batch in batches])
    constant = base.outputs.mean(0, keepdim=True).expand_as(base.outputs)
    uninformed = float(problem.task.loss(constant, targets))
    uninformed = uninformed if math.isfinite(uninformed) else base.loss
    return Sensitivity(len(targets), base.loss, base.metric, uninformed, tuple(entries))


def validation_batches(problem: Problem, samples: int) -> list[Batch]:
    """So many validation samples, drawn evenly (some data are sorted by class), always the same ones."""
    split = problem.splits.validation
    drawn = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:samples]
    return list(split.subset(drawn.sort().values).batches(problem.training.batch_size))


def _calibration(problem: Problem, samples: int) -> list[Batch]:
    options = problem.training
    size = min(options.batch_size, samples)
    batches = problem.splits.train.batches(size, shuffle_seed=0)
    return list(islice(batches, min(options.calibration_batches, math.ceil(samples / size))))


class _Score(NamedTuple):
    """The task's loss (the mean over samples), its metric, and the outputs that they are of, on the CPU."""

    loss: float
    metric: float
    outputs: Tensor


class _Dense(NamedTuple):
    """The dense model as it is, and with batch norm folded; neither is changed."""

    model: nn.Module
    folded: nn.Module

    def compressed(self, plan: CompressionPlan, context: Context) -> nn.Module:
        """A copy that was compressed, as a trial's is before the training."""
        plan = resolve_plan(self.model, plan, context)
        if all(getattr(plan, technique.field) == getattr(_NOTHING, technique.field) for technique in STRUCTURE):
            return compress_numerics(self.folded, plan, context)  # folding takes as long as a pass over the samples
        return compress_numerics(compress_structure(copy_of(self.model), plan, context), plan, context)


_NOTHING = CompressionPlan()


def _try(
    problem: Problem,
    dense: _Dense,
    probe: Probe,
    context: Context,
    batches: Iterable[Batch],
    base: _Score,
) -> Entry:
    key = (probe.technique, probe.name, probe.setting, probe.value)
    try:
        torch.manual_seed(0)  # for the importance `random`
        score = _score(problem, dense.compressed(probe.plan, context), batches)
    except ParetuneError as error:
        return Entry(*key, reason=str(error))
    except Exception as error:  # whatever PyTorch or the model's forward raises: one layer without a number
        return Entry(*key, reason=f"{type(error).__name__}: {error}")
    return Entry(*key, score.loss - base.loss, base.metric - score.metric)


def _score(problem: Problem, module: nn.Module, batches: Iterable[Batch]) -> _Score:
    """Run the batches through a module, where trials train.

    Raises:
        TrialError: One of them isn't finite.
    """
    device = training_device(problem.training.device)
    module.eval().to(device)
    losses, outputs, targets = [], [], []
    with torch.no_grad():
        for batch in to_device(iter(batches), device):
            found = call(module, batch.inputs).float()
            losses.append(float(problem.task.loss(found, batch.targets)) * len(batch.targets))
            outputs.append(found.cpu())
            targets.append(batch.targets.cpu())
    true = torch.cat(targets)
    every = torch.cat(outputs)
    score = _Score(sum(losses) / len(true), problem.task.metric(every, true), every)
    if not (math.isfinite(score.loss) and math.isfinite(score.metric)):
        got = f"{score.loss} and {score.metric}"
        raise TrialError(f"loss and metric must be finite, but got {got}; check task and model")
    return score
