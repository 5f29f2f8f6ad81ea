"""One measurement at a time per device, and none of our training beside it."""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from paretune.errors import JobError
from paretune.objectives.nvml import GpuProcess, GpuState


class Device:
    """A readers-writer lock for one or several devices, shared by all processes of this user on this machine.

    Workers are readers: they hold the device while they compute and step aside between two training steps.
    A measurement is the writer: it waits until all readers have stepped aside. The kernel frees the lock of a
    process that dies. Not for use by several threads of one process at once.

    Several devices are locked as one: a trial may train on a GPU and be measured on it and on the CPU, and while
    anything of it is measured, nothing of ours computes on any of them. Locks are taken in the order of their names, so
    that no two processes wait for each other.

    Args:
        names: The devices, e.g. ``"cpu"`` or ``"cuda:1"``; equal devices exclude each other, across runs too.

    Raises:
        JobError: PyTorch doesn't see that GPU.
    """

    def __init__(self, *names: str) -> None:
        folder = Path(tempfile.gettempdir()) / f"paretune-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        # The gate keeps new readers out while a writer waits; without it, two workers that hold the device in
        # turn would starve a measurement for ever.
        self._locks: list[tuple[IO[bytes], IO[bytes]]] = [
            ((folder / f"{safe}.gate").open("ab"), (folder / f"{safe}.lock").open("ab"))
            for safe in sorted({lock_name(name) for name in names})
        ]
        self._reading = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Compute on the device, beside other readers."""
        if self._reading:
            yield
            return
        self._enter()
        try:
            yield
        finally:
            self._leave()

    def step_aside(self) -> None:
        """Let a waiting measurement go first; a few microseconds where none waits."""
        if self._reading:
            self._leave()
            self._enter()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Wait for somebody else's work without holding the device."""
        reading = self._reading
        if reading:
            self._leave()
        try:
            yield
        finally:
            if reading:
                self._enter()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Measure on the device, alone."""
        with self.aside():
            try:
                for gate, lock in self._locks:
                    fcntl.flock(gate, fcntl.LOCK_EX)
                    fcntl.flock(lock, fcntl.LOCK_EX)
                yield
            finally:
                for gate, lock in self._locks:
                    fcntl.flock(lock, fcntl.LOCK_UN)
                    fcntl.flock(gate, fcntl.LOCK_UN)

    def _enter(self) -> None:
        for gate, lock in self._locks:
            fcntl.flock(gate, fcntl.LOCK_SH)
            fcntl.flock(gate, fcntl.LOCK_UN)
            fcntl.flock(lock, fcntl.LOCK_SH)
        self._reading = True

    def _leave(self) -> None:
        for _, lock in self._locks:
            fcntl.flock(lock, fcntl.LOCK_UN)
        self._reading = False


def is_cuda(name: str) -> bool:
    """Whether a device's name means a GPU of CUDA: ``"cuda"`` or ``"cuda:1"``, in small letters as in PyTorch."""
    return re.fullmatch(r"cuda(:\d+)?", name) is not None


def is_here(name: str) -> bool:
    """Whether this machine has the device, as far as PyTorch sees."""
    import torch

    return not is_cuda(name) or (torch.device(name).index or 0) < torch.cuda.device_count()


def gpu_uuid(name: str) -> str:
    """UUID of the GPU that `name` means in this process, without a prefix; initializes CUDA.

    Raises:
        JobError: PyTorch doesn't see that GPU.
    """
    import torch

    count = torch.cuda.device_count()
    if not torch.cuda.is_available() or (torch.device(name).index or 0) >= count:
        raise JobError(
            "target.device",
            "must be a GPU that PyTorch sees",
            f"{name!r} with {count} of them visible",
            "set another one, or look at the driver, CUDA_VISIBLE_DEVICES and PyTorch's build",
        )
    return str(torch.cuda.get_device_properties(name).uuid)


def lock_name(name: str, uuid_of: Callable[[str], str] = gpu_uuid) -> str:
    """What the lock files of a device are called: equal for whatever is the same hardware.

    A GPU goes by its UUID, because CUDA_VISIBLE_DEVICES renumbers the GPUs for each process: ``"cuda:0"`` of two
    workers may be two GPUs, and ``"cuda:0"`` of one may be ``"cuda:1"`` of the other.

    Args:
        name: The device.
        uuid_of: Tells the UUID of a GPU's name.
    """
    if is_cuda(name):
        return f"gpu-{uuid_of(name)}".lower()
    return name.lower().replace("/", "-").replace(":", "-")


def foreign_processes(state: GpuState, own: Iterable[int]) -> tuple[GpuProcess, ...] | None:
    """Others' processes on a GPU: the lock keeps ours apart, not theirs. Worth a word in the report, not an error.

    Args:
        state: Of the GPU.
        own: Process ids of ours. In a container some drivers know them by the host's ids; ours look foreign then.

    Returns:
        None where the driver doesn't say who computes there.
    """
    if state.processes is None:
        return None
    ours = frozenset(own)
    return tuple(process for process in state.processes if process.pid not in ours)
