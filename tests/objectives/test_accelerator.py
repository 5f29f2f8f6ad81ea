"""Which device trains, in which format, and that what is set for a training is gone after it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from paretune.errors import JobError
from paretune.objectives.accelerator import float_format, keepable, memory_budget, share_gpu, training_device, use_tf32

CPU = torch.device("cpu")
GPU = torch.device("cuda", 0)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA device")


@pytest.fixture
def gpus(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine where PyTorch finds so many GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)


@pytest.mark.parametrize(
    ("gpus", "name", "device"),
    [
        pytest.param(0, "auto", "cpu", id="none: auto"),
        pytest.param(0, "cpu", "cpu", id="none: cpu"),
        pytest.param(2, "auto", "cuda:0", id="two: auto"),
        pytest.param(2, "cpu", "cpu", id="two: cpu"),
        pytest.param(2, "cuda", "cuda:0", id="two: cuda"),
        pytest.param(2, "cuda:1", "cuda:1", id="two: the second"),
    ],
    indirect=["gpus"],
)
def test_the_name_of_a_device(gpus: None, name: str, device: str) -> None:
    assert training_device(name) == torch.device(device)


@pytest.mark.parametrize(
    ("gpus", "name", "message"),
    [
        pytest.param(0, "cuda", r"finetune\.device must be a device that PyTorch finds.*0 GPUs; use auto", id="none"),
        pytest.param(2, "cuda:2", r"'cuda:2' where it finds 2 GPUs", id="too few"),
        pytest.param(2, "gpu", r"finetune\.device must be auto, cpu, cuda or cuda:N, but got 'gpu'", id="unknown"),
        pytest.param(2, "cuda:-1", r"must be auto, cpu, cuda or cuda:N", id="negative"),
        pytest.param(2, "auto:1", r"must be auto, cpu, cuda or cuda:N", id="numbered auto"),
    ],
    indirect=["gpus"],
)
def test_a_device_that_isnt_there(gpus: None, name: str, message: str) -> None:
    with pytest.raises(JobError, match=message):
        training_device(name)


def test_float_formats_of_a_cpu() -> None:
    native = bool(torch.cpu._is_avx512_bf16_supported())
    assert float_format("auto", CPU) is (torch.bfloat16 if native else torch.float32)
    assert float_format("float32", CPU) is torch.float32
    assert float_format("bfloat16", CPU) is torch.bfloat16
    with pytest.raises(JobError, match=r"finetune\.precision must be .* where a CPU trains, but got float16"):
        float_format("float16", CPU)


def test_float16_is_for_gpus() -> None:
    assert float_format("float16", GPU) is torch.float16


@pytest.fixture
def switches() -> Iterator[None]:
    """PyTorch's TF32 switches, which exist without a GPU too, are put back as they were."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("matmul", ["highest", "high", "medium"])
@pytest.mark.parametrize("conv", [True, False])
def test_tf32_is_set_and_restored(switches: None, allowed: bool, matmul: str, conv: bool) -> None:
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = conv
    with pytest.raises(ZeroDivisionError), use_tf32(GPU, allowed):
        assert torch.backends.cuda.matmul.allow_tf32 is allowed
        assert torch.backends.cudnn.allow_tf32 is allowed
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == matmul
    assert torch.backends.cudnn.allow_tf32 is conv


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "fp32_precision"), reason="PyTorch before 2.9")
@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_where_the_newer_switches_were_used(switches: None, allowed: bool) -> None:
    torch.set_float32_matmul_precision("highest")
    owners = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    for owner, value in zip(owners, ("tf32", "ieee", "ieee"), strict=True):
        owner.fp32_precision = value
    with use_tf32(GPU, allowed):
        assert [owner.fp32_precision for owner in owners] == ["tf32" if allowed else "ieee"] * 3
    assert [owner.fp32_precision for owner in owners] == ["tf32", "ieee", "ieee"]


def test_a_cpu_leaves_tf32_alone(switches: None) -> None:
    torch.set_float32_matmul_precision("highest")
    with use_tf32(CPU, True):
        assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("free", "share", "reserved", "bytes_"),
    [
        pytest.param(100, 1000, 0, 50, id="others leave little"),
        pytest.param(1000, 100, 40, 30, id="the share is small"),
        pytest.param(1000, 100, 140, 0, id="more than the share is taken"),
    ],
)
def test_keepable(free: float, share: float, reserved: float, bytes_: float) -> None:
    assert keepable(free, share, reserved) == bytes_


def test_a_cpu_has_no_share() -> None:
    share_gpu(CPU, 4)
    assert memory_budget(CPU) == math.inf


@pytest.mark.gpu
@needs_gpu
def test_a_worker_gets_its_share() -> None:
    before = torch.cuda.get_per_process_memory_fraction(GPU)
    _, total = torch.cuda.mem_get_info(GPU)
    try:
        share_gpu(GPU, 64)
        assert 0 <= memory_budget(GPU) <= total / 64 / 2
        with pytest.raises(torch.cuda.OutOfMemoryError):
            torch.empty(total // 32, dtype=torch.uint8, device=GPU)
    finally:
        torch.cuda.set_per_process_memory_fraction(before, GPU)


@pytest.mark.gpu
@needs_gpu
def test_float_formats_of_a_gpu() -> None:
    native = torch.cuda.get_device_capability(GPU) >= (8, 0)
    assert float_format("auto", GPU) is (torch.bfloat16 if native else torch.float32)
