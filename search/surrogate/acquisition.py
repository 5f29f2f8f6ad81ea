"""Expected hypervolume improvement where all objectives but the accuracy are known.

With known costs, a plan improves on the front in a cell of the costs' space by what its accuracy exceeds the best one
that the front reaches there. The expectation over the accuracy is then exact, for any number of objectives, and only
the cells are an approximation (Emmerich et al., 2006, and Daulton et al., 2020, arXiv:2006.05078, for the general
case).
"""

from __future__ import annotations

from copy import copy

import numpy as np
from scipy.stats import qmc

from paretune.search.surrogate.accuracy import Belief
from paretune.search.surrogate.encoding import Floats

_CELLS = {1: 1024, 2: 2048, 3: 4096}
"""Number of costs to that of cells."""


class Improvement:
    """What plans are expected to add to the hypervolume of a front.

    Args:
        costs: Shape (front, costs) of the members; smaller is better.
        accuracy: Shape (front,).
        worst: Shape (costs,): from here on, costs count for nothing.
        best: Shape (costs,): no plan costs less than this.
        least: Accuracy that counts for nothing, as does all below.
    """

    def __init__(self, costs: Floats, accuracy: Floats, *, worst: Floats, best: Floats, least: float) -> None:
        self._cells = _cells(best, worst)
        covered = (costs[None, :, :] <= self._cells[:, None, :]).all(2)
        self._raise_to(np.where(covered, accuracy[None, :], least).max(1, initial=least))
        self.whole = float(np.prod(np.maximum(worst - best, 0.0)))
        """Volume of all costs that count."""
        self._volume = float(np.prod(np.maximum(worst - best, 0.0))) / len(self._cells)

    def _raise_to(self, reached: Floats) -> None:
        """Take accuracies for what the front reaches in the cells, shape (cells,)."""
        self._reached = reached
        self._levels, place = np.unique(reached, return_inverse=True)
        self._in_level = np.zeros((len(self._cells), len(self._levels)), dtype=np.float32)
        self._in_level[np.arange(len(self._cells)), place] = 1

    def after(self, costs: Floats, accuracy: float) -> Improvement:
        """The same, once a plan with these costs, shape (costs,), has joined the front with this accuracy."""
        found = copy(self)
        covered = (costs <= self._cells).all(1)
        found._raise_to(np.where(covered, np.maximum(self._reached, accuracy), self._reached))
        return found

    def __call__(self, costs: Floats, belief: Belief) -> Floats:
        """Shape (N,): the expected improvement of plans with these costs, shape (N, costs), and accuracies."""
        covers = (costs[:, None, :] <= self._cells[None, :, :]).all(2).astype(np.float32)
        cells = covers @ self._in_level
        gains: Floats = (cells * belief.improvement(self._levels)).sum(1) * self._volume
        return gains


def _cells(best: Floats, worst: Floats) -> Floats:
    """Centres of cells of equal volume, shape (cells, costs)."""
    dimensions = len(worst)
    count = _CELLS[dimensions]
    if dimensions == 1:
        unit = (np.arange(count)[:, None] + 0.5) / count
    else:
        unit = qmc.Sobol(dimensions, scramble=False).random(count)
    cells: Floats = best + unit * (worst - best)
    return cells
