"""Plans worth a look: at equal marginal cost, mutations and crossings of good ones, uniform ones."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from paretune.search.surrogate.encoding import Floats, Levels
from paretune.spaces.units import Unit

_REPAIR = (0.5, 1.0, 2.0)
"""Powers of the damage: whether fine-tuning repairs many small damages or few large ones better isn't known."""

_UNSURE = 0.7
"""Of the logarithm of a probe's damage."""


def equal_marginal_cost(damage: Floats, saved: Floats, trades: Floats) -> Levels:
    """Plans in which no level of a unit would buy more saving for the same damage than any other's.

    The minimum of damage minus `trade` times what is saved, unit by unit: where both are sums over units, these are the
    plans of the front (Everett, 1963, "Generalized Lagrange multiplier method").

    Args:
        damage: Shape (plans, units, levels): what each level costs; infinite where a unit has no such level.
        saved: Shape (plans, units, levels), or one that broadcasts to it.
        trades: Shape (plans,): what a unit of saving is worth.

    Returns:
        Shape (plans, units).
    """
    chosen: Levels = (damage - trades[:, None, None] * saved).argmin(2)
    return chosen


class Candidates:
    """Proposes levels of one architecture.

    Args:
        units: Of the architecture.
        damage: Unit by unit, what each level loses.
        saved: The same shape: what each level saves alone, as a share of each cost; shape (levels, costs) a unit.
    """

    def __init__(self, units: Sequence[Unit], damage: list[Floats], saved: list[Floats]) -> None:
        self.counts = np.array([len(curve) for curve in damage])
        most = int(self.counts.max(initial=1))
        self._damage = np.stack([np.pad(c, (0, most - len(c)), constant_values=np.inf) for c in damage])
        self._saved = np.stack([np.pad(s, ((0, most - len(s)), (0, 0))) for s in saved])
        techniques = np.array([unit.technique for unit in units])
        self._techniques = {str(name): np.flatnonzero(techniques == name) for name in dict.fromkeys(techniques)}
        self._members = list(self._techniques.values())

    @property
    def structural(self) -> list[str]:
        """Techniques other than quantization that the architecture has units of."""
        return [name for name in self._techniques if name != "quantize"]

    def traded(
        self, count: int, rng: np.random.Generator, *, sure: bool = False, without: Collection[str] = ()
    ) -> Levels:
        """Plans at equal marginal cost, from the mildest to the strongest.

        Args:
            count: How many.
            rng: Random numbers.
            sure: Believe the probes; else each plan doubts them in its own way.
            without: Techniques that aren't used.
        """
        costs = self._saved.shape[2]
        weights = np.full((count, costs), 1 / costs) if sure else rng.dirichlet(np.ones(costs), count)
        saved = np.einsum("ulc,pc->pul", self._saved, weights)
        damage = np.repeat(self._damage[None], count, 0)
        for name in without:
            damage[:, self._techniques[name], 1:] = np.inf
        if not sure:
            doubt = np.exp(rng.normal(0, _UNSURE, (count, len(self.counts), 1)) * rng.integers(0, 2, (count, 1, 1)))
            damage = damage * doubt
            damage = damage ** np.asarray(_REPAIR)[rng.integers(len(_REPAIR), size=count)][:, None, None]
        trades = self._trades(count, damage, saved)
        return equal_marginal_cost(damage, saved, trades)

    def _trades(self, count: int, damage: Floats, saved: Floats) -> Floats:
        """Trades that reach from where the first step pays to where the last one does."""
        finite = np.where(np.isfinite(damage), damage, 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            prices = np.where((saved > 1e-6) & (finite > 0), finite / saved, np.nan)
        flat = prices[np.isfinite(prices)]
        if not flat.size:
            return np.ones(count)
        low, high = np.log(np.quantile(flat, 0.01)) - 1, np.log(flat.max()) + 1
        return np.exp(np.linspace(low, high, count))

    def mutated(self, parents: Levels, count: int, rng: np.random.Generator) -> Levels:
        """Children of good plans: single levels moved, whole stretches of layers set alike, two crossed."""
        children = parents[rng.integers(len(parents), size=count)].copy()
        for child in children:
            kind = rng.random()
            if kind < 0.25 and len(parents) > 1:
                self._cross(child, parents[rng.integers(len(parents))], rng)
            elif kind < 0.45:
                self._stretch(child, rng)
            else:
                moved = rng.integers(len(child), size=1 + rng.geometric(0.4))
                far = rng.random() < 0.3
                step = rng.integers(-2, 3, size=len(moved)) if far else rng.choice([-1, 1], size=len(moved))
                child[moved] = np.clip(child[moved] + step, 0, self.counts[moved] - 1)
        return children

    def _cross(self, child: Levels, other: Levels, rng: np.random.Generator) -> None:
        """In place: some techniques, or some stretch of each, from the other parent."""
        if rng.random() < 0.3 and len(self._members) > 1:
            taken = self._members[rng.integers(len(self._members))]
            child[taken] = other[taken]
            return
        low, high = np.sort(rng.random(2))
        for members in self._members:
            taken = members[int(low * len(members)) : int(np.ceil(high * len(members)))]
            child[taken] = other[taken]

    def _stretch(self, child: Levels, rng: np.random.Generator) -> None:
        """In place: neighbouring layers at one level, as borders between widths cost."""
        members = self._members[rng.integers(len(self._members))]
        start, length = rng.integers(len(members)), 1 + rng.integers(max(1, len(members) // 2))
        taken = members[start : start + length]
        level = rng.integers(self.counts[taken].max())
        child[taken] = np.minimum(level, self.counts[taken] - 1)

    def uniform(self, steps: int = 9) -> Levels:
        """The same strength everywhere: each technique alone, and together with each width."""
        dense = np.zeros(len(self.counts), dtype=np.int64)
        found = [dense]
        for members in self._members:
            for strength in np.linspace(0, 1, steps)[1:]:
                levels = dense.copy()
                levels[members] = np.round(strength * (self.counts[members] - 1)).astype(np.int64)
                found.append(levels)
        widths = [levels for levels in found if levels[self._techniques.get("quantize", [])].any()]
        together: Levels = np.unique([*found, *(np.maximum(one, other) for one in found for other in widths)], axis=0)
        return together

    def random(self, count: int, rng: np.random.Generator) -> Levels:
        """Anything, about as strong throughout as a first draw says."""
        strength = rng.random((count, 1)) ** 1.5
        spread = rng.random((count, 1)) * 0.5
        share = np.clip(strength + spread * rng.normal(size=(count, len(self.counts))), 0, 1)
        levels: Levels = np.round(share * (self.counts - 1)).astype(np.int64)
        return levels
