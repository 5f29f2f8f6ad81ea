"""Data on the training device: the same batches, wherever they are put together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from paretune.objectives.data import Split
from paretune.objectives.data.inputs import Inputs, tensors
from paretune.objectives.data.residency import DeviceSplit, is_resident, make_resident, to_device
from paretune.objectives.data.splits import Batch, StreamSplit

CPU = torch.device("cpu")
META = torch.device("meta")
"""A device without memory: tensors move there on any machine."""


def numbers(length: int = 10) -> Tensor:
    return torch.arange(length * 3, dtype=torch.float32).reshape(length, 3)


SPLIT = Split({"x": numbers(), "y": numbers().long()}, torch.arange(10), torch.arange(100, 110))
BYTES = 10 * 3 * (4 + 8) + 10 * 8


def equal(one: list[Batch], other: list[Batch]) -> bool:
    def flat(batch: Batch) -> list[Tensor]:
        return [batch.indices, *tensors(batch.inputs).values(), batch.targets]

    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) for left, right in pairs for a, b in zip(flat(left), flat(right), strict=True))


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("drop_last", [True, False])
def test_a_device_split_gives_the_batches_of_the_split(seed: int | None, drop_last: bool) -> None:
    there = DeviceSplit(SPLIT.inputs, SPLIT.targets, SPLIT.indices)
    batches = list(there.batches(4, shuffle_seed=seed, drop_last=drop_last))
    assert len(batches) == (2 if drop_last else 3)
    assert equal(batches, list(SPLIT.batches(4, shuffle_seed=seed, drop_last=drop_last)))
    assert isinstance(batches[0].inputs, dict)


@pytest.mark.parametrize(
    "inputs", [pytest.param(numbers(), id="tensor"), pytest.param((numbers(), numbers()), id="tuple")]
)
def test_a_device_split_keeps_the_structure(inputs: Inputs) -> None:
    batch = next(DeviceSplit(inputs, torch.arange(10)).batches(4))
    assert type(batch.inputs) is type(inputs)


def test_an_empty_device_split_has_no_batches() -> None:
    assert list(DeviceSplit(numbers(0), torch.arange(0)).batches(4)) == []


@pytest.mark.parametrize(("budget", "moved"), [(BYTES, True), (BYTES - 1, False)])
def test_what_fits_is_moved(budget: int, moved: bool) -> None:
    split = make_resident(SPLIT, META, budget=budget)
    assert is_resident(split, META) is moved
    if moved:
        assert isinstance(split, DeviceSplit)
        assert {tensor.device for tensor in tensors(split.inputs).values()} == {META}
        assert torch.equal(split.indices, SPLIT.indices)
        assert split.indices.device == CPU
    else:
        assert split is SPLIT


class Reading:
    """Three samples, read one by one."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return numbers()[index], index


def test_a_streamed_split_stays_where_it_is() -> None:
    stream = StreamSplit(Reading())
    assert make_resident(stream, META, budget=1e9) is stream
    assert not is_resident(stream, CPU)


def test_on_a_cpu_nothing_is_copied() -> None:
    assert make_resident(SPLIT, CPU) is SPLIT
    assert is_resident(SPLIT, CPU)
    (batch,) = SPLIT.batches(10)
    (same,) = to_device(iter([batch]), CPU)
    assert same.targets is batch.targets
    assert all(tensors(same.inputs)[name] is tensor for name, tensor in tensors(batch.inputs).items())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device")
def test_both_ways_to_a_gpu_give_the_same_batches() -> None:
    device = torch.device("cuda", 0)
    split = make_resident(SPLIT, device)
    assert is_resident(split, device)
    there = list(split.batches(4, shuffle_seed=1))
    sent = list(to_device(SPLIT.batches(4, shuffle_seed=1), device))
    for batch in (*there, *sent):
        assert batch.indices.device == CPU
        assert {tensor.device for tensor in (*tensors(batch.inputs).values(), batch.targets)} == {device}
    assert equal(there, sent)
