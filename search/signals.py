"""Ending on SIGTERM as on Ctrl-C: by an exception, so that workers are stopped and files are written."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGINT_EXIT = 128 + signal.SIGINT
SIGTERM_EXIT = 128 + signal.SIGTERM


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Let the first SIGTERM raise `SystemExit`; further ones must not interrupt what is put in order after it.

    Schedulers send several: Slurm and Ray Jobs signal every process of a job, and a batch passes its own on. Python
    lets the main thread alone set a handler; in another nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ignore(_number: int, _frame: Any) -> None:
        pass

    def stop(_number: int, _frame: Any) -> None:
        signal.signal(signal.SIGTERM, ignore)  # not SIG_IGN: processes started from now on would inherit that
        raise SystemExit(SIGTERM_EXIT)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
