"""What a search works on, loaded and checked: model, data, task, target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce

import torch
from torch import Tensor, nn

from paretune.errors import JobError
from paretune.objectives.accelerator import training_device
from paretune.objectives.compress import Context
from paretune.objectives.compress.schemes import Schemes, merge
from paretune.objectives.data.inputs import Inputs, call
from paretune.objectives.data.splits import Batch, Split, Splits, StreamSplit
from paretune.objectives.device import Device, is_here
from paretune.objectives.distillation import check_teaching
from paretune.objectives.finetune import Training, TrainOptions, check_training
from paretune.objectives.models import ModelSource
from paretune.objectives.runtimes import Capabilities, Target
from paretune.objectives.runtimes.base import Array
from paretune.objectives.runtimes.onnx_export import named_arrays
from paretune.objectives.site import Site
from paretune.objectives.tasks import Task
from paretune.spaces.analysis import Analysis, analyse
from paretune.spaces.graph import DependencyGraph, Group
from paretune.spaces.grid import channel_grid

_CHECKED = 64
"""Samples that the model and task are tried on before anything is spent."""


@dataclass(frozen=True)
class Problem:
    """A live handle: holds the data in memory.

    Attributes:
        model: The trained dense model.
        splits: Its data.
        task: What it is for.
        target: Where it must run.
        training: How trials fine-tune.
        teachers: Teach in place of the dense model, several as an ensemble; none is the dense model itself.
        exclude: Glob patterns of layers that stay dense.
        others: Further targets that every artifact is measured on, by name.
        variants: Lighter architectures that may take the model's place, by name.
        capabilities: What the targets execute, by name, where they are on another machine; else this one finds out.
    """

    model: ModelSource
    splits: Splits
    task: Task
    target: Target
    training: TrainOptions = field(default_factory=TrainOptions)
    teachers: tuple[ModelSource, ...] = ()
    exclude: tuple[str, ...] = ()
    others: Mapping[str, Target] = field(default_factory=dict)
    variants: Mapping[str, ModelSource] = field(default_factory=dict)
    capabilities: Mapping[str, Capabilities] = field(default_factory=dict)

    @cached_property
    def example(self) -> Inputs:
        """Two validation samples, to trace with: some layers need more than one in training mode."""
        return self.splits.validation.head(2).inputs

    @cached_property
    def _groups(self) -> list[Group]:
        return list(DependencyGraph(self.model.build(), self.forward).groups())

    @cached_property
    def channels(self) -> dict[str, int]:
        """Channels of each group of the dense model."""
        return {group.name: group.channels for group in self._groups}

    @cached_property
    def units(self) -> dict[str, int]:
        """How many channels of each group of the dense model must go together."""
        return {group.name: group.unit for group in self._groups}

    @cached_property
    def grids(self) -> dict[str, list[int]]:
        """Channel counts of each group that can be pruned, ascending; the last is the dense one."""
        return {group.name: channel_grid(group.channels, unit=group.unit) for group in self.analyse().groups}

    def of(self, variant: str | None) -> Problem:
        """The problem with that variant as its model, taught by the model itself; this one where None."""
        return self if variant is None else self._variants[variant]

    @cached_property
    def _variants(self) -> dict[str, Problem]:
        teachers = self.teachers or (self.model,)
        return {
            name: replace(self, model=source, teachers=teachers, variants={}) for name, source in self.variants.items()
        }

    def forward(self, model: nn.Module) -> Tensor:
        """Run a model on the example."""
        return call(model, self.example)

    def analyse(self) -> Analysis:
        """Find the groups of the model, try them, name what is frozen."""
        return analyse(self.model.build(), self.forward, exclude=self.exclude)

    def context(self, batches: list[Batch]) -> Context:
        """What techniques may look at, with these batches."""
        return Context(self.example, self.channels, self.task, batches, self.schemes, units=self.units)

    @cached_property
    def sites(self) -> dict[str, Site]:
        """Every target with its runtime, by name; *the* target comes first and has none (``""``)."""
        found: dict[str, Site] = {}
        for name, target in {"": self.target, **self.others}.items():
            alike = (
                site.stem
                for site in found.values()
                if (site.target.runtime, site.target.options) == (target.runtime, target.options)
            )
            stem = next(alike, f"model@{name}" if name else "model")
            found[name] = Site(name, target, stem, self.capabilities.get(name))
        return found

    @cached_property
    def site(self) -> Site:
        """*The* target."""
        return self.sites[""]

    @cached_property
    def schemes(self) -> Schemes:
        """How quantized layers must be quantized, so that every target runs what was trained."""
        return reduce(merge, (site.capabilities.schemes for site in self.sites.values()))

    def device(self) -> Device:
        """A lock of all devices that trials compute on, always the same one: two of one process exclude each other."""
        return self._device

    @cached_property
    def _device(self) -> Device:
        measured = {site.target.device for site in self.sites.values()}
        if self.capabilities:  # the targets are elsewhere, or on this machine all the same
            measured = set(filter(is_here, measured))
        return Device(str(training_device(self.training.device)), *measured)

    def batch(self, size: int) -> dict[str, Array]:
        """One batch of so many validation inputs."""
        return named_arrays(self.splits.validation.head(size).inputs)

    def check(self) -> None:
        """Try the model, its variants, the teachers and the task on real samples.

        Raises:
            JobError: The outputs don't fit the task, aren't finite, or the validation split is smaller than a batch.
        """
        size = len(self.splits.validation)
        largest = max(site.target.batch_size for site in self.sites.values())
        if size < max(2, largest):
            raise JobError(
                "target.batch_size",
                f"must be at most the validation split's length, {size}, which must be 2 or more",
                largest,
                "use a smaller batch or a larger validation split",
            )
        label = "teacher[{}]" if len(self.teachers) > 1 else "teacher"
        for position, source in enumerate(self.teachers):
            self._check_source(label.format(position), source)
        teachers = [source.build() for source in self.teachers or (self.model,)]
        students = {"model": self.model} | {f"model.variants.{name}": found for name, found in self.variants.items()}
        for name, source in students.items():
            self._check_source(name, source)
            role = "the model" if name == "model" else name
            check_teaching(source.build(), teachers, self.splits, self.task, self.training.hints, role=role)
            check_training(source.build(), Training(self.splits, self.task, self.training))

    def _check_source(self, name: str, source: ModelSource) -> None:
        model = source.build()
        for split in (self.splits.train, self.splits.validation, self.splits.test):
            samples = split.head(_CHECKED)
            outputs = _try(name, model, samples)
            self.task.check(outputs, samples.targets)
            if not isinstance(split, StreamSplit):
                # A label out of range may hide anywhere: one sample's outputs stand for those of all.
                for targets in torch.split(split.targets, _CHECKED):
                    self.task.check(outputs[:1].expand(len(targets), *outputs.shape[1:]), targets)
        _check_same(name, model, source.build())


def _check_same(name: str, model: nn.Module, again: nn.Module) -> None:
    """Every trial and every worker builds the model anew: it must be the same one."""
    other = again.state_dict()
    for key, tensor in model.state_dict().items():
        if key not in other or not torch.equal(tensor, other[key]):
            raise JobError(
                name,
                "must be the same each time it is built",
                f"{key} with other values the second time",
                f"load trained weights ({name}.weights), or seed the factory",
            )


def _try(name: str, model: nn.Module, samples: Split) -> Tensor:
    try:
        with torch.no_grad():
            outputs = call(model, samples.inputs)
    except JobError:
        raise
    except Exception as error:
        raise JobError(
            name,
            "must run on the data's inputs",
            f"{type(error).__name__}: {error}",
            "make the inputs of the data fit the model's forward",
        ) from error
    if not bool(torch.isfinite(outputs).all()):
        raise JobError(name, "must give finite outputs", "NaN or infinity", "load trained, finite weights")
    return outputs
