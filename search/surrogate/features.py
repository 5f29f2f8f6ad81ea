"""The few numbers of a plan that predict its accuracy after fine-tuning.

A Gaussian process over the forty or more parameters of a space learns little from a hundred trials. Over these it
learns from ten: how much damage probes without training foresee, by technique, and how much of the model is left.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from paretune.search.surrogate.encoding import Encoding, Floats, Levels, Rows
from paretune.search.surrogate.knowledge import Architecture, Knowledge, LayerCost
from paretune.spaces.units import Unit

_SLIGHT = 0.01
"""Share lost that counts as nothing: logarithms of less would tell noise apart."""

_ALL = 0.98
"""Share lost that counts as everything."""

_OF_LEVELS = 7
"""Features of a plan's levels."""

DAMAGES = 3
"""How many features, the first ones, are damages, by technique."""

_GROUPS = (("prune",), ("quantize",), ("factorize", "sparsify", "share"))
"""Techniques whose damage is one feature: how well fine-tuning repairs it differs between these."""


class Features:
    """Features of plans of a space.

    Args:
        encoding: Of the space.
        knowledge: What was probed; an architecture that isn't in it gets damages that are the same for every layer.
    """

    def __init__(self, encoding: Encoding, knowledge: Knowledge) -> None:
        self._encoding = encoding
        self.of: dict[str, ArchitectureFeatures] = {
            name: ArchitectureFeatures(units, knowledge.architectures.get(name, Architecture(())))
            for name, units in encoding.units.items()
        }

        counts = [len(units) for units in encoding.units.values()]
        self._starts = dict(zip(encoding.units, np.cumsum([0, *counts]), strict=False))
        self._units = sum(counts)
        settings = encoding.one_hot(encoding.default_settings()[None]).shape[1]
        self._whole = _OF_LEVELS + settings + len(encoding.units) - 1

    def __call__(self, rows: Rows) -> Floats:
        """Shape (N, features), about of unit size."""
        own = self.of[rows.variant](rows.levels)
        names = list(self.of)[1:]
        variant = np.zeros((len(rows), len(names)))
        if rows.variant in names:
            variant[:, names.index(rows.variant)] = 1
        damages = self.of[rows.variant].damages(rows.levels)
        return np.concatenate([damages, own, self._encoding.one_hot(rows.settings), variant, self._shares(rows)], 1)

    @property
    def whole(self) -> int:
        """How many features, after the damages, are of the whole plan; the shares of the single units follow."""
        return int(self._whole)

    def _shares(self, rows: Rows) -> Floats:
        """Shape (N, units of all architectures): which part of the damage is foreseen to come from each unit.

        To first order, the logarithm of the damage after fine-tuning changes by these shares times how much better or
        worse than others a unit is repaired: what no probe without training shows.
        """
        found = np.zeros((len(rows), self._units))
        lost = self.of[rows.variant].lost(rows.levels)
        start = self._starts[rows.variant]
        found[:, start : start + lost.shape[1]] = lost / (_SLIGHT + lost.sum(1, keepdims=True))
        return found


class ArchitectureFeatures:
    """Features of one architecture.

    Args:
        units: Of it.
        architecture: What is known of it.
    """

    def __init__(self, units: tuple[Unit, ...], architecture: Architecture) -> None:
        self.damage = [_curve(unit, architecture.damage.get(unit.param, {})) for unit in units]
        """Share lost at each level of each unit, never falling."""
        most = max((len(curve) for curve in self.damage), default=1)
        self._table = np.stack([np.pad(curve, (0, most - len(curve)), "edge") for curve in self.damage])
        self._groups = [np.array([unit.technique in group for unit in units]) for group in _GROUPS]
        self._kept = _Kept(units, architecture.layers)

    def lost(self, levels: Levels) -> Floats:
        """Shape (N, units): the share lost by each unit alone."""
        found: Floats = self._table[np.arange(levels.shape[1]), levels]
        return found

    def damages(self, levels: Levels) -> Floats:
        """Shape (N, DAMAGES): sums over the units of each group of techniques."""
        lost = self.lost(levels)
        return np.stack([lost[:, group].sum(1) for group in self._groups], 1)

    def __call__(self, levels: Levels) -> Floats:
        """Shape (N, features)."""
        lost = self.lost(levels)
        sums = [*self.damages(levels).T, lost.sum(1), lost.max(1)]
        columns = [np.log(_SLIGHT + total) - np.log(_SLIGHT) for total in sums]
        work, weights = self._kept(levels)
        return np.stack([*(column / 2 for column in columns), np.log(work), np.log(weights)], 1)


class _Kept:
    """Shares of the model's MACs and parameters that are left, as far as channels and ranks say.

    Args:
        units: Of the architecture.
        layers: Of it.
    """

    def __init__(self, units: tuple[Unit, ...], layers: tuple[LayerCost, ...]) -> None:
        place = {unit.param: position for position, unit in enumerate(units)}
        most = max((len(unit.levels) for unit in units), default=1)
        kept = np.ones((len(units), most))
        for position, unit in enumerate(units):
            if unit.technique in ("prune", "factorize"):
                shares = np.array(unit.levels) if unit.technique == "factorize" else 1 - np.array(unit.levels)
                kept[position, : len(shares)] = shares
        self._table = np.maximum(kept, 0.01)
        together = "pruning/ratio" if "pruning/ratio" in place else "pruning/threshold"
        self._layers = [
            [
                place[param]
                for group in ([layer.output] if layer.output else []) + list(layer.inputs[:1])
                if (param := f"prune/{group}" if f"prune/{group}" in place else together) in place
            ]
            + ([place[f"rank/{layer.name}"]] if f"rank/{layer.name}" in place else [])
            for layer in layers
        ]
        self._all = [position for position, unit in enumerate(units) if unit.technique in ("prune", "factorize")]
        self._macs = np.array([layer.macs for layer in layers], dtype=np.float64)
        self._params = np.array([layer.params for layer in layers], dtype=np.float64)

    def __call__(self, levels: Levels) -> tuple[Floats, Floats]:
        logs = np.log(self._table[np.arange(levels.shape[1]), levels])
        if not self._layers:  # nothing is known of the layers: the mean over all that is cut
            mean = np.exp(2 * logs[:, self._all].mean(1)) if self._all else np.ones(len(levels))
            return mean, mean
        shares = np.stack([np.exp(logs[:, places].sum(1)) for places in self._layers], 1)
        work, weights = (shares @ total / max(1.0, total.sum()) for total in (self._macs, self._params))
        return np.maximum(work, 1e-3), np.maximum(weights, 1e-3)


def _curve(unit: Unit, probed: Mapping[float, float]) -> Floats:
    """Share lost at each level of a unit: interpolated between those that were probed, else what is usual.

    The first level is the reference of the probes: it loses nothing.
    """
    strength = _strength(unit)
    known = {float(strength[unit.levels.index(level)]): lost for level, lost in probed.items() if level in unit.levels}
    # Damages add up where what is left multiplies; a probe that shows nothing left says no more than that.
    known = {0.0: 0.0} | {x: -float(np.log(1 - np.clip(lost, 0.0, _ALL))) for x, lost in known.items() if x > 0}
    if len(known) == 1:
        return _usual(unit)
    xs = np.array(sorted(known))
    ys = np.maximum.accumulate([known[x] for x in xs])
    curve = np.interp(strength, xs, ys)
    if xs[-1] < 1:  # beyond what was probed, at the last slope at least
        slope = (ys[-1] - ys[-2]) / (xs[-1] - xs[-2])
        curve = np.where(strength > xs[-1], ys[-1] + slope * (strength - xs[-1]), curve)
    return curve


def _strength(unit: Unit) -> Floats:
    """How strong each level is, from 0 for the first to 1 for the last."""
    levels = np.array(unit.levels)
    if unit.technique in ("quantize", "share"):
        return np.linspace(0, 1, len(levels))
    strength: Floats = np.abs(levels - levels[0]) / max(abs(levels[-1] - levels[0]), 1e-12)
    return strength


def _usual(unit: Unit) -> Floats:
    """Without a probe: what a layer among twenty loses, roughly."""
    levels = np.array(unit.levels, dtype=np.float64)
    usual: Floats
    if unit.technique == "quantize":
        usual = np.where(levels >= 8, 0.005, 0.02 * 2.0 ** (4 - levels)) * (levels < levels[0])
    elif unit.technique == "share":
        usual = np.where(levels > 0, 0.3 / np.maximum(levels, 1), 0.0)
    else:
        removed = 1 - levels if unit.technique == "factorize" else np.minimum(levels, 1)
        usual = 0.5 * removed**3
    return usual
