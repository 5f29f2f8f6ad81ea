"""Training data on the device that trains: kept there where they fit, copied batch by batch where they don't."""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter

import torch
from torch import Tensor

from paretune.objectives.accelerator import memory_budget
from paretune.objectives.data.inputs import map_tensors, tensors
from paretune.objectives.data.splits import Batch, Split, StreamSplit


class DeviceSplit(Split):
    """A split whose samples lie on a GPU, where its batches are put together; the indices stay on the CPU."""

    def _read(self, batches: list[Tensor]) -> Iterator[Batch]:
        if not batches:
            return
        # One copy for the whole pass: an index that comes from the CPU would make every batch wait for the GPU.
        order = torch.cat(batches).to(self.targets.device)
        chosen = torch.split(order, [len(positions) for positions in batches])
        for positions, there in zip(batches, chosen, strict=True):
            yield Batch(self.indices[positions], map_tensors(itemgetter(there), self.inputs), self.targets[there])


def make_resident(split: Split, device: torch.device, *, budget: float | None = None) -> Split:
    """The same split with its samples on a GPU.

    A streamed split, one that is larger than the budget, and any split where the device is a CPU come back as they are.

    Args:
        split: What is trained on; its order, seeds and indices stay the same.
        device: Trains.
        budget: Bytes that it may take; None is half of what this process may still take there.
    """
    if device.type == "cpu" or isinstance(split, StreamSplit):
        return split
    size = sum(tensor.nbytes for tensor in (*tensors(split.inputs).values(), split.targets))
    if size > (memory_budget(device) if budget is None else budget):
        return split
    inputs = map_tensors(lambda tensor: tensor.to(device), split.inputs)
    return DeviceSplit(inputs, split.targets.to(device), split.indices)


def is_resident(split: Split, device: torch.device) -> bool:
    """Whether all samples lie in the memory of the device."""
    return not isinstance(split, StreamSplit) and split.targets.device == device


def to_device(batches: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Bring inputs and targets to the device; the indices stay on the CPU.

    Copies come from pinned memory, and nobody waits for them: while the GPU computes one step, the CPU reads and sends
    the next batch.
    """
    for batch in batches:
        yield batch._replace(
            inputs=map_tensors(lambda tensor: _send(tensor, device), batch.inputs),
            targets=_send(batch.targets, device),
        )


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.device == device:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
