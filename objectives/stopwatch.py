"""Where the time of a trial goes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


class Stopwatch:
    """Adds up the seconds of named phases."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block; the phases within it count for themselves alone, so that all together are the whole time."""
        start, known = time.perf_counter(), sum(self.seconds.values())
        try:
            yield
        finally:
            within = sum(self.seconds.values()) - known
            own = time.perf_counter() - start - within
            self.seconds[name] = self.seconds.get(name, 0.0) + own

    def add(self, seconds: Mapping[str, float]) -> None:
        """Count what another watch measured; within a phase, that phase doesn't count it again."""
        for name, spent in seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
