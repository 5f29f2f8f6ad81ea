"""What the gap of accuracy is foreseen to be: the damage of each technique, as far as fine-tuning leaves it.

A formula of five constants, which a handful of trials settles; a Gaussian process learns what it misses.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import least_squares

from paretune.search.surrogate.encoding import Floats

_TARGET_SD = 0.3
"""Of the logarithm of a gap around the formula."""

_LEAST, _LEFT, _POWER = 0.33, 0.54, 1.0
"""What is expected of the constants: the gap of a plan without damage and the share of a damage that is left, in
tolerated losses; the power of the damage."""

TECHNIQUE_SD = 1.0
"""Standard deviation of the logarithm of the share of a technique's damage that is left."""

_LEAST_SD, _POWER_SD = 0.7, 0.3
"""The same of the gap without damage, and of the power itself."""

_DEEPEST = 5.0
"""Tolerated losses from the top to the bottom, at least."""


class Repair:
    """Predicts the logarithm of the gap; ``gap = depth * (1 - exp(-x / depth))``, ``x = least + sum(left * damage^p)``.

    Args:
        tolerated: Loss of accuracy within which differences matter, > 0.
        techniques: How many kinds of damage there are.
    """

    def __init__(self, tolerated: float, techniques: int) -> None:
        self._tolerated = tolerated
        means = [np.log(_LEAST * tolerated), *[np.log(_LEFT * tolerated)] * techniques, _POWER]
        self._expected = np.array(means)
        self._sds = np.array([_LEAST_SD, *[TECHNIQUE_SD] * techniques, _POWER_SD])
        self._constants = self._expected
        self._depth = _DEEPEST * tolerated

    def fit(self, damages: Floats, target: Floats, sd: Floats) -> None:
        """Find the likeliest constants.

        Args:
            damages: Shape (N, techniques).
            target: Shape (N,): logarithms of the gaps.
            sd: Shape (N,): how uncertain each is.
        """
        self._depth = max(float(np.exp(target.max())), _DEEPEST * self._tolerated)
        spread = np.sqrt(_TARGET_SD**2 + sd**2)

        def misses(constants: Floats) -> Floats:
            wrong = (self._value(constants, damages) - target) / spread
            return np.concatenate([wrong, (constants - self._expected) / self._sds])

        self._constants = least_squares(misses, self._constants).x

    def __call__(self, damages: Floats) -> Floats:
        """Shape (N,): the logarithm of the gap at damages of shape (N, techniques)."""
        return self._value(self._constants, damages)

    def parts(self, damages: Floats) -> Floats:
        """Shape (N, techniques): which share of the gap, before it levels off, comes from each technique.

        To first order, the logarithm of the gap moves by these shares times an error in the logarithm of what is left.
        """
        least, *left, power = self._constants
        own = np.maximum(damages, 1e-6) ** np.clip(power, 0.1, 5.0) * np.exp(left)
        found: Floats = own / (np.exp(least) + own.sum(1, keepdims=True))
        return found

    def _value(self, constants: Floats, damages: Floats) -> Floats:
        least, *left, power = constants
        gap = np.exp(least) + np.maximum(damages, 1e-6) ** np.clip(power, 0.1, 5.0) @ np.exp(left)
        found: Floats = np.log(self._depth * -np.expm1(-gap / self._depth))
        return found
