"""A request in a thread of its own: its deadline."""

from __future__ import annotations

import time

from paretune.objectives.progress import Watcher
from paretune.search.tune.attempt import Attempt
from paretune.search.tune.events import End
from tests.search.tune.trials import record


def test_who_waits_for_a_turn_isnt_late() -> None:
    def wait_and_work(watcher: Watcher) -> tuple[object, None]:
        assert isinstance(watcher, Attempt)
        with watcher.paused():
            time.sleep(0.6)
        return record(), None

    attempt = Attempt(0, wait_and_work, 0.3)  # type: ignore[arg-type]
    assert attempt.wait() == (End(record()), None)


def test_who_works_too_long_is_late() -> None:
    def work(watcher: Watcher) -> tuple[object, None]:
        while not watcher.wants_end():
            time.sleep(0.01)
        return record(), None

    attempt = Attempt(0, work, 0.2)  # type: ignore[arg-type]
    assert attempt.wait() is None
    assert attempt.end(5.0)
