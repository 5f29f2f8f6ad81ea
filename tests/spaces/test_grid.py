"""Channel counts that a target likes, and ratios that name them exactly."""

from __future__ import annotations

import pytest

from paretune.spaces.grid import channel_grid, kept_of, ratio_of, snap

WIDTHS = (1, 7, 8, 12, 16, 63, 64, 65, 100, 128, 256)


@pytest.mark.parametrize(
    ("channels", "expected"),
    [
        pytest.param(1, [1], id="1"),
        pytest.param(8, [8], id="8"),
        pytest.param(12, [8, 12], id="12"),
        pytest.param(16, [8, 16], id="16"),
        pytest.param(63, [8, 16, 24, 32, 40, 48, 56, 63], id="63"),
        pytest.param(64, [8, 16, 24, 32, 40, 48, 56, 64], id="64"),
        pytest.param(65, [8, 16, 24, 32, 40, 48, 56, 64, 65], id="65"),
        pytest.param(100, [8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 100], id="100"),
        pytest.param(128, [8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128], id="128"),
        pytest.param(256, [8, 16, 24, 32, 40, 48, 56, *range(64, 257, 16)], id="256"),
    ],
)
def test_steps_are_of_8_and_of_16_from_64_on(channels: int, expected: list[int]) -> None:
    assert channel_grid(channels) == expected


@pytest.mark.parametrize(
    ("channels", "max_ratio", "expected"),
    [
        pytest.param(64, 0.5, [32, 40, 48, 56, 64], id="half, end included"),
        pytest.param(64, 0.49, [40, 48, 56, 64], id="less than half"),
        pytest.param(64, 0.75, [16, 24, 32, 40, 48, 56, 64], id="three quarters"),
        pytest.param(100, 0.1, [96, 100], id="a tenth"),
        pytest.param(16, 0.3, [16], id="less than a step"),
        pytest.param(24, 1 / 3, [16, 24], id="a third, inexact in binary"),
        pytest.param(64, 1.0, [8, 16, 24, 32, 40, 48, 56, 64], id="everything, but a step stays"),
    ],
)
def test_no_more_than_the_largest_ratio_goes(channels: int, max_ratio: float, expected: list[int]) -> None:
    assert channel_grid(channels, max_ratio=max_ratio) == expected


@pytest.mark.parametrize(
    ("channels", "max_ratio", "counts", "expected"),
    [
        pytest.param(64, 1.0, (4, 12, 32, 64), [4, 12, 32, 64], id="the measured ones alone"),
        pytest.param(60, 1.0, (4, 12, 32, 64), [4, 12, 32, 60], id="and the dense one"),
        pytest.param(64, 0.75, (4, 12, 16, 32, 64), [16, 32, 64], id="within the largest ratio"),
        pytest.param(64, 1.0, (32, 4, 32, 64), [4, 32, 64], id="in no order, twice"),
        pytest.param(320, 0.5, (160, 192, 256), [160, 192, 256, 272, 288, 304, 320], id="multiples of 16 beyond"),
        pytest.param(64, 0.5, (16, 64), [32, 40, 48, 56, 64], id="none is left, so steps of 8"),
        pytest.param(512, 0.25, (16, 128), [*range(384, 513, 16)], id="all beyond what was measured"),
        pytest.param(32, 1.0, (), [8, 16, 24, 32], id="none at all"),
        pytest.param(32, 1.0, None, [8, 16, 24, 32], id="not measured"),
    ],
)
def test_measured_counts_take_the_place_of_steps(
    channels: int, max_ratio: float, counts: tuple[int, ...] | None, expected: list[int]
) -> None:
    grid = channel_grid(channels, max_ratio=max_ratio, counts=counts)
    assert grid == expected
    for kept in grid:
        assert kept_of(ratio_of(kept, channels), channels) == kept


@pytest.mark.parametrize(
    ("unit", "max_ratio", "expected"),
    [
        pytest.param(12, 1.0, [12, 24, 36, 48], id="each multiple"),
        pytest.param(12, 0.5, [24, 36, 48], id="within the largest ratio"),
        pytest.param(24, 0.4, [48], id="less than a unit"),
        pytest.param(48, 1.0, [48], id="a single unit"),
    ],
)
def test_channels_that_go_together_make_the_steps(unit: int, max_ratio: float, expected: list[int]) -> None:
    assert channel_grid(48, max_ratio=max_ratio, counts=(8, 16), unit=unit) == expected


@pytest.mark.parametrize("channels", [*WIDTHS, 1000, 4096])
def test_ratios_name_channel_counts_exactly(channels: int) -> None:
    for kept in channel_grid(channels):
        assert kept_of(ratio_of(kept, channels), channels) == kept
        assert snap(ratio_of(kept, channels), channel_grid(channels)) == kept
    for kept in range(1, channels + 1):
        assert kept_of(ratio_of(kept, channels), channels) == kept


def test_one_channel_always_stays() -> None:
    assert kept_of(0.999999, 8) == 1
    assert kept_of(0.9, 1) == 1


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        pytest.param(0.0, 32, id="nothing"),
        pytest.param(0.1, 32, id="nearer to nothing"),
        pytest.param(0.125, 32, id="a tie goes to the larger count"),
        pytest.param(0.126, 24, id="just past the tie"),
        pytest.param(0.375, 24, id="a tie between two cuts"),
        pytest.param(0.6, 16, id="between two cuts"),
        pytest.param(0.99, 8, id="past the end"),
        pytest.param(-1.0, 32, id="before the start"),
    ],
)
def test_snap_finds_the_nearest_count(ratio: float, expected: int) -> None:
    assert snap(ratio, [8, 16, 24, 32]) == expected
