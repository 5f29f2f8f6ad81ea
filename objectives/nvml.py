"""What the driver says of a GPU: clocks, throttling, power, who computes there. It is only read, never set."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

_REASONS = {
    0x001: "idle",
    0x002: "application clocks",
    0x004: "software power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "hardware power brake",
    0x100: "display clocks",
    0x200: "board limit",
    0x400: "reliability",
}
"""Bits of nvmlClocksEventReasons, formerly nvmlClocksThrottleReasons, of nvml.h."""

_SPOILING = frozenset(
    {
        "software power cap",
        "hardware slowdown",
        "software thermal slowdown",
        "hardware thermal slowdown",
        "hardware power brake",
    }
)
"""What slows a busy GPU down for a while; the other reasons hold as long as nobody changes a setting or its load."""

_CLOCK_SM, _CLOCK_MEMORY, _TEMPERATURE_GPU = 1, 2, 0
"""NVML_CLOCK_SM, NVML_CLOCK_MEM and NVML_TEMPERATURE_GPU: the ABI of nvml.h, the same in every version."""


@dataclass(frozen=True)
class ClockState:
    """How fast a GPU runs right now; None where the driver doesn't say.

    Attributes:
        sm_clock_mhz: Clock of the multiprocessors.
        throttle_reasons: Why the clocks aren't higher, by name.
    """

    sm_clock_mhz: int | None = None
    throttle_reasons: tuple[str, ...] | None = None

    @property
    def readable(self) -> bool:
        """Whether anything is known at all."""
        return self.sm_clock_mhz is not None or self.throttle_reasons is not None

    @property
    def spoiling(self) -> tuple[str, ...]:
        """Those of the reasons that spoil a measurement: too hot, or too much power drawn."""
        return tuple(reason for reason in self.throttle_reasons or () if reason in _SPOILING)


@dataclass(frozen=True)
class GpuProcess:
    """A process with a context on a GPU.

    Attributes:
        pid: As the driver knows it; inside a container some drivers give the host's number.
        memory_bytes: What it holds there; None where the driver doesn't say.
    """

    pid: int
    memory_bytes: int | None


@dataclass(frozen=True)
class GpuState(ClockState):
    """A GPU at one moment; None where the driver doesn't say.

    Attributes:
        uuid: As the driver writes it, e.g. ``"GPU-4a0c…"``.
        name: Of the product.
        driver: Its version.
        memory_clock_mhz: Clock of the memory.
        power_w: Power drawn.
        temperature_c: Of the chip.
        utilization: Per cent of the driver's last sampling period in which a kernel ran.
        processes: All that compute there, our own too.
    """

    uuid: str | None = None
    name: str | None = None
    driver: str | None = None
    memory_clock_mhz: int | None = None
    power_w: float | None = None
    temperature_c: int | None = None
    utilization: int | None = None
    processes: tuple[GpuProcess, ...] | None = None


class Gpu:
    """One GPU as NVML sees it; made by `find_gpu`.

    Args:
        nvml: The module ``pynvml``, initialized.
        handle: Of the device.
    """

    def __init__(self, nvml: Any, handle: object) -> None:
        self._nvml = nvml
        self._handle = handle

    def clocks(self) -> ClockState:
        """The part of `state` that is asked around every block of a measurement: two questions instead of ten."""
        return ClockState(self._ask("ClockInfo", _CLOCK_SM), self._throttle_reasons())

    def state(self) -> GpuState:
        """All that the driver says now."""
        power = self._ask("PowerUsage")
        utilization = self._ask("UtilizationRates")
        processes = self._ask("ComputeRunningProcesses")
        return GpuState(
            sm_clock_mhz=self._ask("ClockInfo", _CLOCK_SM),
            throttle_reasons=self._throttle_reasons(),
            uuid=self._ask("UUID"),
            name=self._ask("Name"),
            driver=self._call("nvmlSystemGetDriverVersion"),
            memory_clock_mhz=self._ask("ClockInfo", _CLOCK_MEMORY),
            power_w=None if power is None else power / 1000,
            temperature_c=self._ask("Temperature", _TEMPERATURE_GPU),
            utilization=None if utilization is None else utilization.gpu,
            processes=None
            if processes is None
            else tuple(GpuProcess(process.pid, process.usedGpuMemory) for process in processes),
        )

    def energy_mj(self) -> int | None:
        """Energy in millijoules that the whole GPU took since the driver was loaded; None where it isn't counted."""
        energy: int | None = self._ask("TotalEnergyConsumption")
        return energy

    def _throttle_reasons(self) -> tuple[str, ...] | None:
        mask = self._ask("CurrentClocksEventReasons")
        if mask is None:  # drivers before 535 know it under its old name alone
            mask = self._ask("CurrentClocksThrottleReasons")
        return None if mask is None else decode_reasons(mask)

    def _ask(self, what: str, *arguments: object) -> Any:
        return self._call(f"nvmlDeviceGet{what}", self._handle, *arguments)

    def _call(self, function: str, *arguments: object) -> Any:
        try:
            return getattr(self._nvml, function)(*arguments)
        except self._nvml.NVMLError:
            # Each product and driver answers some questions only, and a reading must not break a measurement: a GPU
            # that is really lost shows in the next call of CUDA.
            return None


def decode_reasons(mask: int) -> tuple[str, ...]:
    """Names of the bits of a throttle-reason mask, lowest first; a bit without a name keeps its number."""
    bits = (1 << place for place in range(mask.bit_length()))
    return tuple(_REASONS.get(bit, f"unknown 0x{bit:x}") for bit in bits if mask & bit)


def find_gpu(uuid: str) -> Gpu | None:
    """The GPU with this UUID (with or without its prefix ``GPU-``); None, and a warning that says why, if unreadable.

    Python shows an equal warning once, so that asking for each measurement doesn't fill the log.
    """
    try:
        import pynvml
    except ImportError:
        _warn("nvidia-ml-py isn't installed; install paretune[cuda]")
        return None
    bare = uuid.removeprefix("GPU-").removeprefix("MIG-")
    try:
        # Never shut down: NVML counts its users, and this process wants it until it ends.
        pynvml.nvmlInit()
        try:
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{bare}")
        except pynvml.NVMLError_NotFound:  # the slice of a GPU that is split into several
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{bare}")
    except pynvml.NVMLError as error:
        _warn(f"NVML says {error}")
        return None
    return Gpu(pynvml, handle)


def _warn(why: str) -> None:
    warnings.warn(f"Clocks, throttling and energy of the GPU aren't readable: {why}", RuntimeWarning, stacklevel=3)
