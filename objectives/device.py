"""One measurement at a time per device, and none of our training beside it."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


class Device:
    """A readers-writer lock for a device, shared by all processes of this user on this machine.

    Workers are readers: they hold the device while they compute and step aside between two training steps.
    A measurement is the writer: it waits until all readers have stepped aside. The kernel frees the lock of a
    process that dies. Not for use by several threads of one process at once.

    Args:
        name: The device, e.g. ``"cpu"``; equal names exclude each other, across runs too.
    """

    def __init__(self, name: str) -> None:
        folder = Path(tempfile.gettempdir()) / f"paretune-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        safe = name.lower().replace("/", "-").replace(":", "-")
        # The gate keeps new readers out while a writer waits; without it, two workers that hold the device in
        # turn would starve a measurement for ever.
        self._gate: IO[bytes] = (folder / f"{safe}.gate").open("ab")
        self._device: IO[bytes] = (folder / f"{safe}.lock").open("ab")
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
    def exclusive(self) -> Iterator[None]:
        """Measure on the device, alone."""
        reading = self._reading
        if reading:
            self._leave()
        fcntl.flock(self._gate, fcntl.LOCK_EX)
        fcntl.flock(self._device, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._device, fcntl.LOCK_UN)
            fcntl.flock(self._gate, fcntl.LOCK_UN)
            if reading:
                self._enter()

    def _enter(self) -> None:
        fcntl.flock(self._gate, fcntl.LOCK_SH)
        fcntl.flock(self._gate, fcntl.LOCK_UN)
        fcntl.flock(self._device, fcntl.LOCK_SH)
        self._reading = True

    def _leave(self) -> None:
        fcntl.flock(self._device, fcntl.LOCK_UN)
        self._reading = False
