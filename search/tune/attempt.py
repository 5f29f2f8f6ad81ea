"""A request that runs in a thread of its own, and what it has told so far."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TypeVar

from paretune.errors import ParetuneError, SearchError
from paretune.objectives.measurement import Record
from paretune.objectives.progress import Stopped, Watcher
from paretune.search.executor import Progress
from paretune.search.tune.events import Cargo, End

T = TypeVar("T")

Told = tuple[End, Cargo | None]
"""How a request ended, and its artifact on its way."""


class Attempt:
    """Runs a request at once; never waits for who listens: a `paretune.objectives.progress.Watcher`.

    Args:
        number: The request's.
        carry_out: Runs it under a watcher; gives what it returned, and its artifact.
        deadline: Seconds after which nobody waits for it any more.
    """

    def __init__(
        self, number: int, carry_out: Callable[[Watcher], tuple[Record | Stopped, Cargo | None]], deadline: float
    ) -> None:
        self.number = number
        self._carry_out = carry_out
        self._limit = time.monotonic() + deadline
        self._is_paused = False
        self._news = threading.Condition()
        self._progress: Progress | None = None
        self._told: Told | None = None
        self._ends = False
        # A daemon: a worker that ends doesn't wait for it.
        self._thread = threading.Thread(target=self._run, name=f"trial {number}", daemon=True)
        self._thread.start()

    def got_on(self, so_far: Stopped) -> None:
        """Keep it for who asks; only the newest counts, as it holds what was before."""
        with self._news:
            self._progress = Progress.of(self.number, so_far)
            self._news.notify_all()

    def wants_end(self) -> bool:
        """Whether it was asked to end."""
        return self._ends

    def wait(self) -> Progress | Told | None:
        """The newest that isn't known yet, the end before all; None where the deadline passes without any."""
        with self._news:
            while not (self._told or self._progress):
                left = None if self._is_paused else self._limit - time.monotonic()
                if left is not None and left <= 0:
                    return None
                self._news.wait(left)
            progress, self._progress = self._progress, None
            return self._told or progress

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Don't count a block towards the deadline: a trial that waits for its turn to be measured isn't slow."""
        start = time.monotonic()
        self._pause(True, 0.0)
        try:
            yield
        finally:
            self._pause(False, time.monotonic() - start)

    def _pause(self, is_paused: bool, waited: float) -> None:
        with self._news:
            self._is_paused = is_paused
            self._limit += waited
            self._news.notify_all()

    def end(self, timeout: float) -> bool:
        """Ask it to end; returns whether it did within so many seconds."""
        self._ends = True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            result, artifact = self._carry_out(self)
            end = End(result) if isinstance(result, Record) else End(error=f"it must give a record, but gave {result}")
            told = end, artifact
        except ParetuneError as error:
            told = End(None, str(error), traceback.format_exc(), ends_search=isinstance(error, SearchError)), None
        except Exception as error:
            told = End(error=f"{type(error).__name__}: {error}", details=traceback.format_exc()), None
        with self._news:
            self._told = told
            self._news.notify_all()


def within(seconds: float, function: Callable[[], T]) -> T:
    """What a function returns, or raises, if it does so in time.

    Raises:
        TimeoutError: It didn't; it still runs, in a thread of its own.
    """
    found: Future[T] = Future()

    def run() -> None:
        try:
            found.set_result(function())
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return found.result(seconds)
    except TimeoutError:
        if found.done():
            raise
        raise TimeoutError(f"it took longer than {seconds:g} s") from None
