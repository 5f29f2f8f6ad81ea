"""The accuracy surrogate: a Gaussian process over a plan's features, with honest uncertainty.

What is modelled is the logarithm of the gap to an accuracy just above the best one seen: damage acts by factors, and
near the top a tenth of a point matters more than ten points do further down (Rasmussen and Williams, 2006, chapters 2
and 5, for the process).
"""

from __future__ import annotations

import warnings
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import log_ndtr, ndtr
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, DotProduct, Kernel, Matern, WhiteKernel

from paretune.search.surrogate.encoding import Floats
from paretune.search.surrogate.kernels import Columns
from paretune.search.surrogate.repair import TECHNIQUE_SD, Repair

_NOISE = 0.02
"""Standard deviation of a measured accuracy, in tolerated losses: another seed would have found another one."""

_MARGIN = 0.05
"""Of the tolerated loss: how far above the best accuracy the gap begins."""

_REPAIR = 0.3
"""Standard deviation, over units, of the logarithm of the share of their damage that fine-tuning leaves. Not chosen by
the likelihood: plans near the front hardly differ in it, and it would come out as nothing."""

_JITTER = 1e-6

_LINEAR = DotProduct(0.0, "fixed")
"""The covariance of a sum over columns with weights of their own."""


@dataclass(frozen=True)
class Belief:
    """What is believed of the accuracy of some plans: `top` minus a log-normal gap.

    Attributes:
        top: Accuracy that the gaps are below.
        mean: Shape (N,), of the logarithm of the gap.
        sd: Shape (N,), the same; of the accuracy itself, without the noise of measuring it.
        noise: Shape (N,), the same, of that noise.
    """

    top: float
    mean: Floats
    sd: Floats
    noise: Floats

    def take(self, place: int) -> Belief:
        """Of a single plan."""
        own = slice(place, place + 1)
        return replace(self, mean=self.mean[own], sd=self.sd[own], noise=self.noise[own])

    @property
    def median(self) -> Floats:
        """Shape (N,): the accuracy as likely missed as exceeded."""
        accuracy: Floats = self.top - np.exp(self.mean)
        return accuracy

    def improvement(self, levels: Floats) -> Floats:
        """Expected improvement over each of some accuracies.

        Args:
            levels: Shape (K,).

        Returns:
            Shape (N, K): the mean of max(0, accuracy - level).
        """
        room = np.maximum(self.top - levels, 1e-12)[None, :]
        mean, sd = self.mean[:, None], np.maximum(self.sd, 1e-9)[:, None]
        above = (np.log(room) - mean) / sd
        found: Floats = room * ndtr(above) - np.exp(mean + sd**2 / 2 + log_ndtr(above - sd))
        return np.maximum(found, 0.0)

    def log_chance(self, level: float) -> Floats:
        """Shape (N,): logarithm of the probability that the accuracy is at least `level`."""
        found: Floats = log_ndtr((np.log(max(self.top - level, 1e-12)) - self.mean) / np.maximum(self.sd, 1e-9))
        return found

    @property
    def told(self) -> Floats:
        """Shape (N,), in [0, 1]: how much a measurement would tell.

        Augmented expected improvement (Huang et al., 2006): where noise is larger than what isn't known, a plan that
        looks like an improvement would only look so.
        """
        found: Floats = 1 - self.noise / np.hypot(self.noise, self.sd)
        return found


class AccuracyModel:
    """A Gaussian process from features to accuracy.

    Args:
        tolerated: Loss of accuracy, in the metric's unit, within which differences matter, > 0.
        damages: How many features, the first ones, are damages, by technique.
        whole: How many of those that follow are of the whole plan. The others are shares of single units.
        dense: Accuracy of the dense model, where it is known: plans may reach it.
    """

    def __init__(self, tolerated: float, damages: int, whole: int, dense: float = -np.inf) -> None:
        self._dense = dense
        self._repair = Repair(tolerated, damages)
        self._damages = damages
        self._whole = damages + whole
        self._tolerated = tolerated
        self._margin = _MARGIN * tolerated
        self._kernel: Kernel | None = None
        self._top = 0.0
        self._process: GaussianProcessRegressor | None = None
        self._scale = 1.0

    def fit(self, features: Floats, accuracy: ArrayLike, sd: ArrayLike, *, tune: bool) -> None:
        """Learn from finished trials.

        Args:
            features: Shape (N, features), N at least 1.
            accuracy: Shape (N,).
            sd: Shape (N,): of the accuracy where it was extrapolated, 0 where it was measured.
            tune: Choose the kernel's length scales and the noise anew; else keep those that were chosen last.
        """
        values, spread = np.asarray(accuracy, dtype=np.float64), np.asarray(sd, dtype=np.float64)
        self._top = max(self._dense, float(values.max())) + self._margin
        gap = self._top - values
        # An error of the accuracy is one of the logarithm of the gap, divided by the gap.
        relative = np.minimum(np.hypot(spread, _NOISE * self._tolerated) / gap, 2.0)
        target = np.log(gap)
        damages = features[:, : self._damages]
        self._repair.fit(damages, target, relative)
        missed = target - self._repair(damages)
        if tune or self._kernel is None:  # the kernel's numbers are relative to it
            self._scale = max(float(missed.std()), 0.1)
        noise = _JITTER + (relative / self._scale) ** 2
        fresh = _fresh(self._damages, self._whole, features.shape[1], self._scale)
        kernel = self._kernel if self._kernel is not None and not tune else fresh
        process = GaussianProcessRegressor(
            kernel, alpha=noise, optimizer="fmin_l_bfgs_b" if tune else None, copy_X_train=False
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a length scale at its bound is a feature unused
            process.fit(self._seen_by_process(features), missed / self._scale)
        self._kernel, self._process = process.kernel_, process

    def copy(self) -> AccuracyModel:
        """The same model, to be fitted to something else."""
        other = copy(self)
        other._repair = copy(self._repair)
        return other

    def median(self, features: Floats) -> Floats:
        """Shape (N,): the accuracies as likely missed as exceeded, without their uncertainty, which takes longer."""
        assert self._process is not None, "fit comes first"
        mean = self._process.predict(self._seen_by_process(features))
        accuracy: Floats = self._top - np.exp(self._repair(features[:, : self._damages]) + mean * self._scale)
        return accuracy

    def believe(self, features: Floats) -> Belief:
        """What is believed of plans with these features, shape (N, features)."""
        assert self._process is not None, "fit comes first"
        mean, sd = self._process.predict(self._seen_by_process(features), return_std=True)
        # What is wanted is the accuracy, not another noisy measurement of it.
        quiet = np.sqrt(np.maximum(sd**2 - self._noise, 1e-6))
        foreseen = self._repair(features[:, : self._damages])
        log_gap = foreseen + mean * self._scale
        noise = np.hypot(np.sqrt(self._noise) * self._scale, _NOISE * self._tolerated / np.exp(log_gap))
        return Belief(self._top, log_gap, quiet * self._scale, noise)

    def _seen_by_process(self, features: Floats) -> Floats:
        """The features with the techniques' parts of the gap in the place of their damages."""
        damages = features[:, : self._damages]
        return np.concatenate([self._repair.parts(damages), features[:, self._damages :]], 1)

    @property
    def _noise(self) -> float:
        assert self._kernel is not None
        return float(np.exp(self._kernel.theta[-1]))


def _fresh(start: int, whole: int, features: int, scale: float) -> Kernel:
    """Anything smooth in the features of the whole plan, a trend, and errors in what the formula says is left."""
    lengths = np.full(whole - start, 2.0)
    smooth = ConstantKernel(0.5, (1e-2, 1e1)) * Columns(Matern(lengths, (0.3, 30.0), nu=2.5), start, whole)
    trend = ConstantKernel(0.1, (1e-3, 1e1)) * Columns(_LINEAR, start, whole)
    techniques = ConstantKernel((TECHNIQUE_SD / scale) ** 2, "fixed") * Columns(_LINEAR, 0, start)
    units = ConstantKernel((_REPAIR / scale) ** 2, "fixed") * Columns(_LINEAR, whole, features)
    return smooth + trend + techniques + units + WhiteKernel(0.05, (1e-4, 1.0))
