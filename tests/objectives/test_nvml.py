"""What the driver answers, in the form in which pynvml hands it on, and what becomes of it."""

from __future__ import annotations

import sys
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from paretune.objectives.device import gpu_uuid
from paretune.objectives.nvml import ClockState, Gpu, GpuProcess, GpuState, decode_reasons, find_gpu

HANDLE = object()
UUID = "GPU-4a0c6bc9-7d0e-2f3b-9c55-0e8f4b1d2a37"

ANSWERS: dict[str, Any] = {
    "nvmlDeviceGetUUID": UUID,
    "nvmlDeviceGetName": "NVIDIA H200",
    "nvmlSystemGetDriverVersion": "580.65.06",
    "nvmlDeviceGetClockInfo": {1: 1980, 2: 3201},
    "nvmlDeviceGetPowerUsage": 118734,
    "nvmlDeviceGetTemperature": {0: 31},
    "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=97, memory=12),
    "nvmlDeviceGetCurrentClocksEventReasons": 0,
    "nvmlDeviceGetComputeRunningProcesses": [
        SimpleNamespace(pid=4711, usedGpuMemory=1_234_173_952, gpuInstanceId=0xFFFFFFFF),
        SimpleNamespace(pid=4712, usedGpuMemory=None, gpuInstanceId=0xFFFFFFFF),
    ],
    "nvmlDeviceGetTotalEnergyConsumption": 2_718_281_828,
}


class NVMLError(Exception):
    """The root of all that pynvml raises."""


class Nvml:
    """Answers as the module does; raises "Not Supported" for a function without an answer."""

    NVMLError = NVMLError

    def __init__(self, answers: dict[str, Any]) -> None:
        self._answers = answers

    def __getattr__(self, function: str) -> Any:
        def answer(*arguments: Any) -> Any:
            if function.startswith("nvmlDevice"):
                assert arguments[0] is HANDLE
            if function not in self._answers:
                raise NVMLError("Not Supported")
            value = self._answers[function]
            return value[arguments[1]] if isinstance(value, dict) else value

        return answer


def gpu(**changed: Any) -> Gpu:
    answers = ANSWERS | changed
    return Gpu(Nvml({name: value for name, value in answers.items() if value is not None}), HANDLE)


def test_a_driver_that_answers_all() -> None:
    assert gpu().state() == GpuState(
        uuid=UUID,
        name="NVIDIA H200",
        driver="580.65.06",
        sm_clock_mhz=1980,
        memory_clock_mhz=3201,
        power_w=118.734,
        temperature_c=31,
        utilization=97,
        throttle_reasons=(),
        processes=(GpuProcess(4711, 1_234_173_952), GpuProcess(4712, None)),
    )
    assert gpu().clocks() == ClockState(1980, ())
    assert gpu().energy_mj() == 2_718_281_828


def test_a_driver_that_answers_nothing() -> None:
    mute = Gpu(Nvml({}), HANDLE)
    assert mute.state() == GpuState()
    assert mute.clocks() == ClockState()
    assert not mute.clocks().readable
    assert mute.energy_mj() is None


@pytest.mark.parametrize(
    ("function", "field"),
    [
        ("nvmlDeviceGetPowerUsage", "power_w"),
        ("nvmlDeviceGetUtilizationRates", "utilization"),
        ("nvmlDeviceGetComputeRunningProcesses", "processes"),
        ("nvmlDeviceGetCurrentClocksEventReasons", "throttle_reasons"),
    ],
)
def test_one_question_without_an_answer(function: str, field: str) -> None:
    state = gpu(**{function: None}).state()
    assert getattr(state, field) is None
    assert (state.sm_clock_mhz, state.name) == (1980, "NVIDIA H200")


def test_an_old_driver_knows_throttle_reasons_by_their_old_name() -> None:
    old = gpu(nvmlDeviceGetCurrentClocksEventReasons=None, nvmlDeviceGetCurrentClocksThrottleReasons=0x4)
    assert old.clocks().throttle_reasons == ("software power cap",)


def test_nobody_computes_there() -> None:
    assert gpu(nvmlDeviceGetComputeRunningProcesses=[]).state().processes == ()


@pytest.mark.parametrize(
    ("mask", "names", "spoiling"),
    [
        pytest.param(0, (), (), id="none"),
        pytest.param(0x1, ("idle",), (), id="idle"),
        pytest.param(0x2, ("application clocks",), (), id="set by the administrator"),
        pytest.param(0x4, ("software power cap",), ("software power cap",), id="power"),
        pytest.param(0x48, ("hardware slowdown", "hardware thermal slowdown"), None, id="too hot"),
        pytest.param(0x88, ("hardware slowdown", "hardware power brake"), None, id="power brake"),
        pytest.param(0x21, ("idle", "software thermal slowdown"), ("software thermal slowdown",), id="hot and idle"),
        pytest.param(0x110, ("sync boost", "display clocks"), (), id="other settings"),
        pytest.param(1 << 40, ("unknown 0x10000000000",), (), id="not yet defined"),
    ],
)
def test_throttle_reasons(mask: int, names: tuple[str, ...], spoiling: tuple[str, ...] | None) -> None:
    assert decode_reasons(mask) == names
    assert ClockState(1980, names).spoiling == (names if spoiling is None else spoiling)


def test_the_numbers_are_those_of_nvml() -> None:
    pynvml = pytest.importorskip("pynvml", reason="needs nvidia-ml-py")
    named = {
        "GpuIdle": "idle",
        "ApplicationsClocksSetting": "application clocks",
        "SwPowerCap": "software power cap",
        "HwSlowdown": "hardware slowdown",
        "SyncBoost": "sync boost",
        "SwThermalSlowdown": "software thermal slowdown",
        "HwThermalSlowdown": "hardware thermal slowdown",
        "HwPowerBrakeSlowdown": "hardware power brake",
        "DisplayClockSetting": "display clocks",
    }
    for suffix, name in named.items():
        assert decode_reasons(getattr(pynvml, f"nvmlClocksEventReason{suffix}")) == (name,)
    assert (pynvml.NVML_CLOCK_SM, pynvml.NVML_CLOCK_MEM, pynvml.NVML_TEMPERATURE_GPU) == (1, 2, 0)
    assert all(callable(getattr(pynvml, function)) for function in ANSWERS)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a driver")
def test_without_a_driver_it_says_why_once() -> None:
    pytest.importorskip("pynvml", reason="needs nvidia-ml-py")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        assert [find_gpu(UUID) for _ in range(3)] == [None, None, None]
    assert [str(warning.message) for warning in caught] == [
        "Clocks, throttling and energy of the GPU aren't readable: NVML says NVML Shared Library Not Found"
    ]


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.warns(RuntimeWarning, match=r"nvidia-ml-py isn't installed; install paretune\[cuda\]"):
        assert find_gpu(UUID) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_gpu_answers() -> None:
    pytest.importorskip("pynvml", reason="needs nvidia-ml-py")
    found = find_gpu(gpu_uuid("cuda"))
    assert found is not None
    state = found.state()
    assert state.uuid is not None
    assert state.uuid.endswith(gpu_uuid("cuda"))
    assert state.name == torch.cuda.get_device_name("cuda")
    assert found.clocks().readable
