"""What a search works on, loaded and checked: model, data, task, target."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from paretune.errors import JobError
from paretune.objectives.compress import Context
from paretune.objectives.compress.schemes import Schemes
from paretune.objectives.data.inputs import Inputs, call
from paretune.objectives.data.splits import Batch, Split, Splits, StreamSplit
from paretune.objectives.finetune import TrainOptions
from paretune.objectives.models import ModelSource
from paretune.objectives.runtimes import Capabilities, Runtime, Target, get_runtime
from paretune.objectives.runtimes.base import Array
from paretune.objectives.runtimes.onnx_export import named_arrays
from paretune.objectives.tasks import Task
from paretune.spaces.analysis import Analysis, analyse
from paretune.spaces.graph import DependencyGraph

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
        teacher: Teaches in place of the dense model.
        exclude: Glob patterns of layers that stay dense.
    """

    model: ModelSource
    splits: Splits
    task: Task
    target: Target
    training: TrainOptions = field(default_factory=TrainOptions)
    teacher: ModelSource | None = None
    exclude: tuple[str, ...] = ()

    @cached_property
    def example(self) -> Inputs:
        """Two validation samples, to trace with: some layers need more than one in training mode."""
        return self.splits.validation.head(2).inputs

    @cached_property
    def channels(self) -> dict[str, int]:
        """Channels of each group of the dense model."""
        return {group.name: group.channels for group in DependencyGraph(self.model.build(), self.forward).groups()}

    def forward(self, model: nn.Module) -> Tensor:
        """Run a model on the example."""
        return call(model, self.example)

    def analyse(self) -> Analysis:
        """Find the groups of the model, try them, name what is frozen."""
        return analyse(self.model.build(), self.forward, exclude=self.exclude)

    def context(self, batches: list[Batch]) -> Context:
        """What techniques may look at, with these batches."""
        return Context(self.example, self.channels, self.task, batches, self.schemes)

    @cached_property
    def runtime(self) -> Runtime:
        """What runs the artifacts."""
        return get_runtime(self.target.runtime, self.target.options)

    @cached_property
    def capabilities(self) -> Capabilities:
        """What the target executes."""
        return self.runtime.capabilities(self.target.device)

    @property
    def schemes(self) -> Schemes:
        """How the target wants layers quantized."""
        return self.capabilities.schemes

    def batch(self) -> dict[str, Array]:
        """One batch of validation inputs of the target's size."""
        return named_arrays(self.splits.validation.head(self.target.batch_size).inputs)

    def check(self) -> None:
        """Try the model, the teacher and the task on real samples.

        Raises:
            JobError: The outputs don't fit the task, aren't finite, or the validation split is smaller than a batch.
        """
        size = len(self.splits.validation)
        if size < max(2, self.target.batch_size):
            raise JobError(
                "target.batch_size",
                f"must be at most the validation split's length, {size}, which must be 2 or more",
                self.target.batch_size,
                "use a smaller batch or a larger validation split",
            )
        sources = {"model": self.model} | ({"teacher": self.teacher} if self.teacher else {})
        for name, source in sources.items():
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
