"""A model of what a plan will cost before it is deployed: latency, size, parameters or MACs, and how far off it may be.

The prior is the formula of `cost_formula`. Measured plans correct its constants (for all layers, and for each), and a
process over a few numbers of the whole plan learns what is left. All of it is one Gaussian process on the logarithm of
the cost, linear in the logarithms of the constants around their best values (Gauss-Newton, as for an extended Kalman
filter), so that what isn't known of any of them shows in the standard deviation.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, cholesky, solve_triangular
from scipy.stats import spearmanr

from paretune.search.surrogate.cost_formula import Floats, Formula, LayerCosts, Levels
from paretune.search.surrogate.knowledge import Architecture
from paretune.spaces.units import Unit


@dataclass(frozen=True)
class CostErrors:
    """How far predictions of a cost were off, on plans that they hadn't been learnt from.

    Attributes:
        mape: Mean absolute error as a share of the measured value.
        spearman: Rank correlation of predicted and measured values; NaN below three plans, or where either is constant.
        plans: How many.
    """

    mape: float
    spearman: float
    plans: int

    def __str__(self) -> str:
        return f"error {self.mape:.1%} (MAPE), rank correlation {self.spearman:.2f}, over {self.plans} plans"


def cost_errors(predicted: Sequence[float] | Floats, measured: Sequence[float] | Floats) -> CostErrors:
    """Compare predictions with measurements, e.g. each made just before its plan was measured.

    Args:
        predicted: Shape (N,), above 0, in the unit of the measurements (not their logarithms).
        measured: Shape (N,), above 0.

    Returns:
        With NaN for what so few plans don't tell.
    """
    one, other = np.asarray(predicted, float), np.asarray(measured, float)
    if one.shape != other.shape or one.ndim != 1:
        raise ValueError(f"predicted and measured must have one shape (N,), but got {one.shape} and {other.shape}")
    ranked = len(one) >= 3 and np.ptp(one) > 0 and np.ptp(other) > 0
    rank = float(spearmanr(one, other).statistic) if ranked else float("nan")
    return CostErrors(float(np.abs(one / other - 1).mean()) if len(one) else float("nan"), rank, len(one))


_CONSTANTS_SD, _EXTRA_SD, _ANCHOR_SD, _UNKNOWN_SD = 0.5, 0.05, 0.1, 1.0
"""Of the logarithm: of a constant of the formula; of what a further number of a plan does; of the whole, where the
dense value is known and where it isn't."""


class _Scales(NamedTuple):
    """Standard deviations of the logarithm that the measured plans choose.

    Attributes:
        layer: Of a layer's own factor.
        rest: Of what the process over the whole plan adds.
        noise: Of a measurement.
    """

    layer: float
    rest: float
    noise: float


_GUESS = _Scales(0.4, 0.15, 0.03)
_CHOICES = [_Scales(*sds) for sds in product((0.05, 0.15, 0.4), (0.01, 0.05, 0.15), (0.003, 0.01, 0.03, 0.08, 0.2))]

_ENOUGH, _MOST = 8, 120
"""Plans from which on they choose, and how many do at most."""

_STEPS = 4
"""Gauss-Newton steps to the best constants."""

_UNBELIEVABLE = 4.0
"""Deviations from what all other plans say from which on a measurement is taken for a disturbance."""

_FARTHEST = 3.0
"""Largest logarithm of a constant over what was believed."""


class _Rows(NamedTuple):
    """Plans as the process sees them.

    Attributes:
        formula: At some constants.
        extra: Further numbers, (N, E).
    """

    formula: Formula
    extra: Floats


class _Learnt(NamedTuple):
    """What a fit leaves.

    Attributes:
        rows: The measured plans.
        constants: Around which the process is linear.
        scales: That were chosen.
        factor: Lower Cholesky factor of their covariance, noise included.
        weights: The covariance's inverse times what is to be explained.
        doubt: Factor of the standard deviations, at least 1: how far off predictions of one measured plan from all
            others are, in standard deviations.
        disturbed: Of the measured plans, (N,) bool: those whose values the others don't believe.
    """

    rows: _Rows
    constants: Floats
    scales: _Scales
    factor: Floats
    weights: Floats
    doubt: float
    disturbed: NDArray[np.bool_]


class CostModel:
    """Predicts the logarithm of a cost of plans of one architecture; `fit` corrects it by what was measured.

    Args:
        units: What is chosen; column `u` of levels indexes `units[u].levels`.
        architecture: Its layers; where it has none, every unit counts alike.
        quantity: Name of the objective, with or without a target; what it is decides about the prior.
        dense: Its value for the dense model, where all levels are 0; None where it isn't known: then predictions before
            `fit` are relative to it.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        architecture: Architecture,
        *,
        quantity: str = "latency_ms",
        dense: float | None = None,
    ) -> None:
        self._formula = LayerCosts(units, architecture.layers, quantity)
        self._anchor = 0.0 if dense is None else float(np.log(dense))
        self._anchor_sd = _UNKNOWN_SD if dense is None else _ANCHOR_SD
        self._learnt: _Learnt | None = None

    def fit(self, levels: Levels, extra: Floats, values: Floats) -> None:
        """Learn from measured plans, in place of those that were learnt before.

        Args:
            levels: Shape (N, units), N of 0 and more.
            extra: Shape (N, E): further numbers of each plan, about of unit size; E of 0 and more, always the same.
            values: Shape (N,): what was measured, above 0 and finite. Of equal plans, each counts.

        Raises:
            ValueError: A value isn't above 0 and finite.
        """
        if not (np.isfinite(values).all() and (values > 0).all()):
            raise ValueError("values must be finite and above 0; leave out the plans that failed")
        self._learnt = None
        if not len(values):
            return
        targets = np.log(values) - self._anchor
        constants, scales, doubts = np.zeros(self._formula.constants), _GUESS, np.zeros(len(values))
        for step in range(_STEPS):
            rows = _Rows(self._formula(levels, constants), extra)
            # Linear around the constants: what they have explained so far is part of what is to be explained.
            residual = targets - rows.formula.logs + rows.formula.constants @ constants
            if step == _STEPS - 2 and len(values) >= _ENOUGH:
                scales = self._chosen(rows, residual, doubts)
            factor = self._factor(rows, scales, doubts)
            weights = cho_solve((factor, True), residual)
            off, sds = _left_out(factor, weights)
            self._learnt = _Learnt(rows, constants, scales, factor, weights, _doubt(off / sds), doubts > 0)
            if len(values) >= _ENOUGH:
                # What the clock said of a disturbed machine must not spoil the rest: it counts as noise of its own.
                doubts = np.where(np.abs(off) > _UNBELIEVABLE * np.sqrt(np.maximum(sds**2 - doubts, 1e-8)), off**2, 0.0)
            found = _CONSTANTS_SD**2 * rows.formula.constants.T @ weights
            constants = np.clip(found, -_FARTHEST, _FARTHEST)

    def disturbed(self) -> list[int]:
        """Positions of the plans last fitted whose values are far from what all others say: measure these again.

        They hardly count in predictions. Of fewer than 8 plans, none.
        """
        return [] if self._learnt is None else np.flatnonzero(self._learnt.disturbed).tolist()

    def predict(self, levels: Levels, extra: Floats) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the logarithm of the cost, each of shape (N,).

        The deviation is that of the cost itself, without the noise of measuring it.

        Args:
            levels: Shape (N, units).
            extra: Shape (N, E), as in `fit`.
        """
        learnt = self._learnt
        constants = np.zeros(self._formula.constants) if learnt is None else learnt.constants
        rows = _Rows(self._formula(levels, constants), extra)
        mean = self._anchor + rows.formula.logs - rows.formula.constants @ constants
        if learnt is None:
            return mean, np.sqrt(self._variance(rows, _GUESS))
        across = self._kernel(rows, learnt.rows, learnt.scales)
        explained = solve_triangular(learnt.factor, across.T, lower=True, check_finite=False)
        left = self._variance(rows, learnt.scales) - np.einsum("mn,mn->n", explained, explained)
        return mean + across @ learnt.weights, learnt.doubt * np.sqrt(np.maximum(left, 1e-8))

    def cross_validate(self, levels: Levels, extra: Floats, values: Floats, *, folds: int = 8) -> CostErrors:
        """How far off predictions are for plans that were left out; what was learnt stays.

        Args:
            levels: Shape (N, units), N of 2 and more.
            extra: Shape (N, E).
            values: Shape (N,), as in `fit`.
            folds: Parts into which the plans are cut, each to be predicted from all others; at most one a plan.
        """
        folds, predicted = min(folds, len(values)), np.empty(len(values))
        for out in (np.arange(len(values)) % folds == part for part in range(folds)):
            other = copy(self)
            other.fit(levels[~out], extra[~out], values[~out])
            predicted[out] = np.exp(other.predict(levels[out], extra[out])[0])
        return cost_errors(predicted, values)

    def _kernel(self, one: _Rows, other: _Rows, scales: _Scales) -> Floats:
        """Covariance of the logarithms, shape (N, M)."""
        near = np.exp(-0.5 * _squares(one.formula.plan, other.formula.plan))
        return np.asarray(_linear(one, scales) @ _linear(other, scales).T + scales.rest**2 * near + self._anchor_sd**2)

    def _variance(self, rows: _Rows, scales: _Scales) -> Floats:
        """The kernel's diagonal."""
        values = _linear(rows, scales)
        return np.asarray(np.einsum("nk,nk->n", values, values) + scales.rest**2 + self._anchor_sd**2)

    def _factor(self, rows: _Rows, scales: _Scales, doubts: Floats) -> Floats:
        covariance = self._kernel(rows, rows, scales)
        covariance[np.diag_indices_from(covariance)] += scales.noise**2 + doubts
        return np.asarray(cholesky(covariance, lower=True, check_finite=False))

    def _chosen(self, rows: _Rows, residual: Floats, doubts: Floats) -> _Scales:
        """Those under which the plans are the most likely."""
        some = np.linspace(0, len(residual) - 1, min(len(residual), _MOST)).astype(np.int64)
        rows, residual, doubts = _Rows(rows.formula.take(some), rows.extra[some]), residual[some], doubts[some]

        def surprise(scales: _Scales) -> float:
            factor = self._factor(rows, scales, doubts)
            half = solve_triangular(factor, residual, lower=True, check_finite=False)
            # Few plans often look as if all were well known: what isn't like the guess must be worth it.
            unlike = sum(np.log(one / other) ** 2 for one, other in zip(scales, _GUESS, strict=True))
            return float(0.5 * half @ half + np.log(np.diag(factor)).sum() + 0.5 * unlike)

        return min(_CHOICES, key=surprise)


def _linear(rows: _Rows, scales: _Scales) -> Floats:
    """What the logarithm is linear in, times its standard deviation, shape (N, columns)."""
    scaled = _CONSTANTS_SD * rows.formula.constants, scales.layer * rows.formula.layers, _EXTRA_SD * rows.extra
    return np.concatenate(scaled, 1)


def _left_out(factor: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Errors of predicting each measurement from all others, and their standard deviations, both (N,).

    Both come from the covariance's inverse (Rasmussen and Williams, 2006, section 5.4.2).
    """
    inverse = solve_triangular(factor, np.eye(len(factor)), lower=True, check_finite=False)
    precision = np.einsum("nm,nm->m", inverse, inverse)
    return weights / precision, 1 / np.sqrt(precision)


def _doubt(errors: Floats) -> float:
    """Root mean square of errors in standard deviations; 1 where it is less, or says little."""
    return max(1.0, float(np.sqrt(np.mean(errors**2)))) if len(errors) >= _ENOUGH else 1.0


def _squares(one: Floats, other: Floats) -> Floats:
    """Squared distances, shape (N, M)."""
    total = (one**2).sum(1)[:, None] + (other**2).sum(1) - 2 * one @ other.T
    return np.asarray(np.maximum(total, 0.0))
