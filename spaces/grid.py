"""The channel counts that a target likes."""

from __future__ import annotations

from collections.abc import Collection

WIDE = 64
"""From this many channels on, steps are of 16 instead of 8."""


def channel_grid(
    channels: int, *, max_ratio: float = 1.0, counts: Collection[int] | None = None, unit: int = 1
) -> list[int]:
    """Channel counts that a group of `channels` may be cut to, ascending; the last one is `channels` itself.

    Without measured counts: multiples of 8, and of 16 from 64 channels on. On CPUs with wide vector units 32 to 31
    channels was 2.5 times slower, and 32 to 24 gained nothing that a step of 4 would have gained either.

    With them: those, and beyond the largest of them, where nothing was measured, multiples of 16. A group for which no
    measured count is left keeps the steps of 8 and 16: it may still be cut to save size, if not time.

    Channels that must go together, as a head's, leave no such choice: every multiple of their number is in the grid.

    Args:
        channels: Channels of the dense group, at least 1.
        max_ratio: Largest share that may be removed, in (0, 1]; at least one step always stays.
        counts: Those at which the target was measured to get faster, each at least 1; None where it wasn't measured.
        unit: Channels that must go together; divides `channels`.
    """
    least = channels * (1 - max_ratio) - 1e-9
    if unit > 1:
        return [*(count for count in range(unit, channels, unit) if count >= least), channels]
    fixed = [count for count in range(8, channels, 8) if count < WIDE or count % 16 == 0]
    fixed = [count for count in fixed if count >= least]
    measured = sorted({count for count in counts or () if least <= count < channels})
    if measured:
        largest = max(counts or ())
        return [*measured, *(count for count in fixed if count > largest and count % 16 == 0), channels]
    return [*fixed, channels]


def ratio_of(kept: int, channels: int) -> float:
    """Share of a group's channels that is removed, rounded as a plan writes it."""
    return round(1 - kept / channels, 6)


def kept_of(ratio: float, channels: int) -> int:
    """Channels that stay of a group when `ratio` of them is removed; at least 1. Undoes `ratio_of` exactly."""
    return max(1, round(channels * (1 - ratio)))


def snap(ratio: float, grid: list[int]) -> int:
    """The channel count of the grid whose ratio is nearest to `ratio`; the larger count on a tie."""
    channels = grid[-1]
    return min(reversed(grid), key=lambda kept: abs(ratio_of(kept, channels) - ratio))
