"""Temporary folders of processes that may be killed at any time."""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def scratch(kind: str) -> Path:
    """A new temporary folder, removed when this process ends; those that killed processes left here go first.

    Its process holds the kernel's lock on it, which goes with the process however that ends.

    Args:
        kind: What it is for; the folder's name begins so.
    """
    with _alone() as parent:
        _sweep(parent)
        folder = Path(tempfile.mkdtemp(dir=parent, prefix=f"{kind}-"))
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX)  # stays open as long as the process lives
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def sweep() -> None:
    """Remove what killed processes left on this machine."""
    with _alone() as parent:
        _sweep(parent)


@contextmanager
def _alone() -> Iterator[Path]:
    """The folder of them all, for one process at a time: a new one isn't locked yet, and must not look left behind."""
    parent = Path(tempfile.gettempdir()) / f"paretune-{os.getuid()}" / "scratch"
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    gate = os.open(parent, os.O_RDONLY)
    try:
        fcntl.flock(gate, fcntl.LOCK_EX)
        yield parent
    finally:
        os.close(gate)


def _sweep(parent: Path) -> None:
    for folder in parent.iterdir():
        try:
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue  # its process ended just now
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue  # its process lives
        else:
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)
