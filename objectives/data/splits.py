"""Splits of the data: in memory where they fit, streamed where they don't, with the same interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from paretune.errors import JobError
from paretune.objectives.data.inputs import Inputs, concatenate, map_tensors, tensors

MEMORY_LIMIT_BYTES = 2 * 1024**3
_READ_BATCH = 256


class MapDataset(Protocol):
    """A map-style dataset: item `i` is ``(inputs, target)``, the same at every read."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


class Mix(NamedTuple):
    """The other samples of which a batch's inputs were mixed (mixup).

    Attributes:
        targets: (N, ...), theirs.
        share: Of the batch's own samples in the inputs, in [0, 1]; it is their share of the loss, too.
    """

    targets: Tensor
    share: float


class Batch(NamedTuple):
    """Some samples.

    Attributes:
        indices: (N,) int64, the samples' positions in the split that was loaded. Subsets keep them, so
            teacher outputs that were cached for the whole split can be looked up from any part of it.
        inputs: What the model takes, N samples.
        targets: (N, ...) int64 or float32.
        mix: What else the inputs are made of; None where it is these samples alone.
    """

    indices: Tensor
    inputs: Inputs
    targets: Tensor
    mix: Mix | None = None


class Split:
    """Samples and their targets, held in memory.

    Args:
        inputs: A tensor, or a tuple or dictionary of tensors; the first axis is the sample.
        targets: (N, ...) tensor.
        indices: (N,) int64, positions in the split that was loaded; by default 0 … N-1.

    Raises:
        JobError: The lengths differ.
    """

    def __init__(self, inputs: Inputs, targets: Tensor, indices: Tensor | None = None) -> None:
        for name, tensor in tensors(inputs).items():
            if tensor.ndim == 0 or targets.ndim == 0 or len(tensor) != len(targets):
                label = f" {name!r}" if name else ""
                raise JobError(
                    "data.source",
                    "must give as many targets as inputs",
                    f"inputs{label} {tuple(tensor.shape)} and targets {tuple(targets.shape)}",
                    "make the first axis of both the sample",
                )
        self._inputs = inputs
        self._targets = targets
        self.indices = torch.arange(len(targets)) if indices is None else indices

    @property
    def inputs(self) -> Inputs:
        """All inputs; a streamed split reads them now, so take `head` or `subset` first."""
        return self._inputs

    @property
    def targets(self) -> Tensor:
        """All targets; a streamed split reads them now."""
        return self._targets

    def __len__(self) -> int:
        return len(self.indices)

    def subset(self, indices: Tensor | Sequence[int]) -> Split:
        """The samples at these positions of this split, in this order."""
        positions = torch.as_tensor(indices, dtype=torch.int64)
        inputs = map_tensors(lambda tensor: tensor[positions], self._inputs)
        return Split(inputs, self._targets[positions], self.indices[positions])

    def head(self, n: int) -> Split:
        """The first `n` samples, or all where there are fewer."""
        return self.subset(torch.arange(min(n, len(self))))

    def batches(self, size: int, *, shuffle_seed: int | None = None, drop_last: bool = False) -> Iterator[Batch]:
        """Go through the split once.

        Args:
            size: Samples a batch, at least 1.
            shuffle_seed: Seed of the order; None keeps the order of the split. Equal seeds give equal
                batches, and torch's global random state is neither read nor changed.
            drop_last: Leave out a last batch that is smaller, unless it is the only one.

        Raises:
            JobError: `size` is less than 1.
        """
        return self._read(_order(len(self), size, shuffle_seed=shuffle_seed, drop_last=drop_last))

    def _read(self, batches: list[Tensor]) -> Iterator[Batch]:
        for positions in batches:
            part = self.subset(positions)
            yield Batch(part.indices, part.inputs, part.targets)


class StreamSplit(Split):
    """Samples of a map-style dataset, read when they are needed.

    Args:
        dataset: Item `i` is ``(inputs, target)``.
        indices: (N,) int64, the dataset's positions that belong to the split; by default all.
        workers: Processes that read ahead; 0 reads in this one.
    """

    def __init__(self, dataset: MapDataset, indices: Tensor | None = None, *, workers: int = 0) -> None:
        self.dataset = dataset
        self.workers = workers
        self.indices = torch.arange(len(dataset)) if indices is None else indices

    @property
    def inputs(self) -> Inputs:
        """All inputs, read now."""
        return self.load().inputs

    @property
    def targets(self) -> Tensor:
        """All targets, read now (with their inputs: a dataset gives both)."""
        return self.load().targets

    def subset(self, indices: Tensor | Sequence[int]) -> Split:
        """The samples at these positions of this split, in this order; still streamed."""
        positions = torch.as_tensor(indices, dtype=torch.int64)
        return StreamSplit(self.dataset, self.indices[positions], workers=self.workers)

    def load(self) -> Split:
        """The same split in memory."""
        parts = list(self.batches(_READ_BATCH))
        if not parts:
            raise JobError(
                "data.source",
                "must give splits with samples",
                "an empty split",
                "check how the data are split",
            )
        inputs = concatenate([part.inputs for part in parts])
        return Split(inputs, torch.cat([part.targets for part in parts]), self.indices)

    def _read(self, batches: list[Tensor]) -> Iterator[Batch]:
        loader: DataLoader[Any] = DataLoader(
            self.dataset,  # type: ignore[arg-type]  # Any map-style object works; torch's annotation wants its own class.
            batch_sampler=[self.indices[positions].tolist() for positions in batches],
            num_workers=self.workers,
            collate_fn=collate,
            # Without one of its own, the loader draws a seed from torch's global generator.
            generator=torch.Generator().manual_seed(0),
        )
        for positions, (inputs, targets) in zip(batches, loader, strict=True):
            yield Batch(self.indices[positions], inputs, targets)


@dataclass(frozen=True)
class Splits:
    """The data of a job.

    Attributes:
        train: What fine-tuning sees.
        validation: What the search compares trials on.
        test: What nothing sees but the final verification.
        augment: Applied to the inputs of each training batch, with a generator; both are on the training device, and
            so must be what it makes (``device=generator.device``). None means that the data aren't augmented, so
            that the teacher's outputs can be computed once.
    """

    train: Split
    validation: Split
    test: Split
    augment: Callable[[Inputs, torch.Generator], Inputs] | None = None


def from_dataset(dataset: MapDataset, *, memory_limit_bytes: int = MEMORY_LIMIT_BYTES, workers: int = 0) -> Split:
    """A split of a map-style dataset: in memory if its size (first sample times length) is within the limit.

    Raises:
        JobError: The dataset is empty, an item isn't ``(inputs, target)``, or the same item differs between
            two reads.
    """
    if len(dataset) == 0:
        raise JobError(
            "data.source", "must give splits with samples", "an empty dataset", "check how the data are split"
        )
    inputs, targets = collate([dataset[0]])
    again, targets_again = collate([dataset[0]])
    first, second = [*tensors(inputs).values(), targets], [*tensors(again).values(), targets_again]
    # NaN differs from itself; it is reported later, as NaN.
    if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(first, second, strict=True)):
        raise JobError(
            "data.source",
            "must give datasets that return the same sample at every read",
            "two different values of sample 0",
            "move random transforms into the augment function of Splits",
        )
    stream = StreamSplit(dataset, workers=workers)
    size = len(dataset) * sum(tensor.numel() * tensor.element_size() for tensor in first)
    return stream.load() if size <= memory_limit_bytes else stream


def collate(items: list[Any]) -> tuple[Inputs, Tensor]:
    """Stack ``(inputs, target)`` items: floats as float32 at most, targets that aren't floats as int64.

    Raises:
        JobError: An item isn't a pair, or its parts can't be stacked.
    """
    for item in items:
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise JobError(
                "data.source",
                "must give datasets of (inputs, target) items",
                type(item).__name__,
                "return pairs",
            )
    try:
        inputs, targets = default_collate(items)
    except (TypeError, RuntimeError, KeyError) as error:
        raise JobError(
            "data.source",
            "must give samples that stack into a batch (numbers, arrays or tensors of equal shape)",
            f"{type(error).__name__}: {error}",
            "convert and resize them in the dataset",
        ) from error
    return as_inputs(tuple(inputs) if isinstance(inputs, list) else inputs), as_targets(targets)


def as_inputs(value: Any) -> Inputs:
    """Tensors of arrays or tensors, structure kept; float64 becomes float32.

    Raises:
        JobError: It is none of the structures that a model can take.
    """
    if isinstance(value, tuple) and value:
        return tuple(_as_tensor(item) for item in value)
    if isinstance(value, dict) and value and all(isinstance(name, str) for name in value):
        return {name: _as_tensor(item) for name, item in value.items()}
    return _as_tensor(value)


def as_targets(value: Any) -> Tensor:
    """A tensor of an array, a tensor or a list: float32 where it has floats, int64 otherwise.

    Raises:
        JobError: It can't be one tensor.
    """
    tensor = _as_tensor(value)
    return tensor if tensor.is_floating_point() else tensor.long()


def _as_tensor(value: Any) -> Tensor:
    try:
        tensor = torch.as_tensor(value).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise JobError(
            "data.source",
            "must give inputs as a tensor, or a tuple or dictionary of tensors, and targets as a tensor",
            f"{type(value).__name__} ({error})",
            "convert them to torch tensors or numeric numpy arrays",
        ) from error
    return tensor.float() if tensor.dtype == torch.float64 else tensor


def _order(length: int, size: int, *, shuffle_seed: int | None, drop_last: bool) -> list[Tensor]:
    if size < 1:
        raise JobError("batch_size", "must be at least 1", size, "use e.g. 128")
    if length == 0:
        return []
    if shuffle_seed is None:
        order = torch.arange(length)
    else:
        order = torch.randperm(length, generator=torch.Generator().manual_seed(shuffle_seed))
    batches = list(torch.split(order, size))
    if drop_last and len(batches) > 1 and len(batches[-1]) < size:
        batches.pop()
    return batches
