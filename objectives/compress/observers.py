"""How the range of a grid is found: the extremes, all but the outermost values, or what rounds with least error."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import torch
import torch.nn.functional as F
from torch import Tensor

from paretune.errors import TrialError
from paretune.spaces.plan import Observer

OUTERMOST = 1e-4
"""Share of the values that ``percentile`` leaves out on either side."""

_SHARES = [0.01 ** (step / 64) for step in range(1, 65)]
"""Of the full range, what ``mse`` tries: steps of 7 % down to a hundredth, for a weight far from all others."""

_SMALLEST = 1e-8
"""Of a scale: a tensor of zeros has a grid too."""

_BINS = 4096
"""On either side of zero, at least half of them used: 8 for each step of a grid of 256 levels."""


@dataclass(frozen=True)
class Levels:
    """The integers of a grid: a number is (level - zero point) * scale.

    Attributes:
        least: Below 0 on symmetric grids, whose zero point is 0; on affine ones 0.
        most: The largest level.
    """

    least: int
    most: int

    @classmethod
    def of(cls, bits: int, *, affine: bool) -> Levels:
        """All levels of that width: from 0 on affine grids, in two's complement on symmetric ones."""
        return cls(0, 2**bits - 1) if affine else cls(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    @property
    def affine(self) -> bool:
        """Whether the grid has a zero point."""
        return self.least == 0

    def fit(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point (as a float) of the grids from `low` <= 0 to `high` >= 0, of any shape."""
        if self.affine:
            scale = ((high - low) / self.most).clamp_min(_SMALLEST)
            return scale, torch.round(-low / scale)
        return (torch.maximum(-low, high) / self.most).clamp_min(_SMALLEST), torch.zeros_like(low)

    def error(self, values: Tensor, low: Tensor, high: Tensor, counts: Tensor | None = None) -> Tensor:
        """Sum of the squared rounding errors of each row.

        Args:
            values: (rows, values).
            low: Of the grid of each row, (rows,).
            high: Likewise.
            counts: How often each value occurs, (rows, values); once where None.
        """
        scale, zero = (tensor[:, None] for tensor in self.fit(low, high))
        levels = (torch.round(values / scale) + zero).clamp_(self.least, self.most)
        squares = levels.sub_(zero).mul_(scale).sub_(values).square_()
        return (squares if counts is None else squares.mul_(counts)).sum(dim=1)


def find_range(rows: Tensor, levels: Levels, observer: Observer) -> tuple[Tensor, Tensor]:
    """The range of a grid for each row, (rows,) and (rows,); zero is always in it.

    ``percentile`` leaves out whole values: none of a row of less than 10,000.

    Args:
        rows: (rows, values), at least one value.
        levels: Of the grids.
        observer: As in `paretune.spaces.plan.Quantization`.
    """
    left_out = int(rows.shape[1] * OUTERMOST) if observer == "percentile" else 0
    if left_out:
        low, high = (-(-rows).topk(left_out + 1).values[:, -1], rows.topk(left_out + 1).values[:, -1])
    else:
        low, high = rows.aminmax(dim=1)
    low, high = low.clamp(max=0), high.clamp(min=0)
    return least_error(rows, levels, low, high) if observer == "mse" else (low, high)


def least_error(
    values: Tensor, levels: Levels, low: Tensor, high: Tensor, counts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The range within [low, high] whose grid has the least squared rounding error, what lies outside being clipped.

    After Banner et al., 2019 (arXiv:1810.05723), but tried on the values themselves, without an assumption about their
    distribution. Of a symmetric grid both ends move together; of an affine one first the upper, then the lower.

    Args:
        values: (rows, values).
        levels: Of the grids.
        low: Least value of each row, at most 0; (rows,).
        high: Largest value of each row, at least 0.
        counts: How often each value occurs; once where None.
    """
    best = levels.error(values, low, high, counts)
    for lower, upper in ((False, True), (True, False)) if levels.affine else ((True, True),):
        from_low, from_high = low, high
        for share in _SHARES:
            tried_low = from_low * share if lower else from_low
            tried_high = from_high * share if upper else from_high
            error = levels.error(values, tried_low, tried_high, counts)
            better = error < best
            best = torch.where(better, error, best)
            low, high = torch.where(better, tried_low, low), torch.where(better, tried_high, high)
    return low, high


def check_calibrated(*values: float) -> None:
    """Refuse activations, or the ends of their range, that have no grid.

    Raises:
        TrialError: One isn't finite.
    """
    for value in values:
        if not isfinite(value):
            raise TrialError(
                f"activations must be finite to be calibrated, but one is {value}; check model and data, or train "
                "with a lower learning rate"
            )


class Histogram:
    """Counts all values of a tensor that comes in batches; its memory (64 KiB) doesn't grow with them.

    The bins reach equally far to both sides of zero, and are joined in pairs when a larger value comes: counts are
    exact, and what comes first doesn't matter but for the bins' width.
    """

    def __init__(self) -> None:
        self._limit = 0.0
        self._counts: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Count the values of a batch, of any shape.

        Raises:
            TrialError: One isn't finite.
        """
        x = x.detach().float().flatten()
        largest = float(x.abs().amax())
        check_calibrated(largest)
        if self._counts is None:
            self._limit = max(largest, _SMALLEST)
            self._counts = torch.zeros(2 * _BINS, dtype=torch.int64, device=x.device)
        while largest > self._limit:
            self._limit *= 2
            self._counts = F.pad(self._counts.reshape(-1, 2).sum(1), (_BINS // 2, _BINS // 2))
        bins = ((x / self._limit + 1) * _BINS).long().clamp_(0, 2 * _BINS - 1)
        self._counts += torch.bincount(bins, minlength=2 * _BINS)

    def range(self, levels: Levels, observer: Observer, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """The range of a grid for all values seen.

        Args:
            levels: Of the grid.
            observer: As in `paretune.spaces.plan.Quantization`.
            low: The least value seen, at most 0; a scalar.
            high: The largest value seen, at least 0.
        """
        if self._counts is None or observer == "minmax":
            return low, high
        edges = torch.linspace(-self._limit, self._limit, 2 * _BINS + 1, device=low.device)
        if observer == "percentile":
            left_out = int(int(self._counts.sum()) * OUTERMOST)
            first = int((self._counts.cumsum(0) > left_out).nonzero()[0])
            last = int((self._counts.flip(0).cumsum(0) > left_out).nonzero()[0])
            return torch.maximum(low, edges[first].clamp(max=0)), torch.minimum(high, edges[-1 - last].clamp(min=0))
        seen = self._counts.nonzero().flatten()
        centres, counts = (edges[seen] + edges[seen + 1]) / 2, self._counts[seen].float()
        found = least_error(centres[None], levels, low[None], high[None], counts[None])
        return found[0][0], found[1][0]
