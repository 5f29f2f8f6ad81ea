"""What a plan will cost by rule of thumb: a sum over layers whose few constants measurements may correct."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from paretune.search.surrogate.knowledge import LayerCost
from paretune.spaces.settings import INTEGER
from paretune.spaces.units import Unit

Floats = NDArray[np.float64]
Levels = NDArray[np.int64]


@dataclass(frozen=True)
class Form:
    """What is believed of a kind of cost before anything is measured.

    Attributes:
        weight: A layer's part of the dense cost.
        whole: Shares of a layer's cost that go with outputs times inputs, with outputs, with inputs, and with nothing.
        factors: The same of a layer in factors (Tucker-2's, of a convolution of 3 x 3): with squared rank times
            outputs times inputs, with rank times squared channels, with channels, and with nothing.
        integer: Cost of 8 bits as a share of that in floats: of the first of these parts, and of the others.
        fixed: What comes with every plan, as a share of the dense cost, at least.
        border: What a border between widths costs, as a share of what the two layers do.
        stored: Whether zeros, codebooks and fewer than 8 bits save something.
    """

    weight: Callable[[LayerCost], float]
    whole: tuple[float, float, float, float]
    factors: tuple[float, float, float, float]
    integer: tuple[float, float] = (1.0, 1.0)
    fixed: float = 1e-4
    border: float = 1e-6
    stored: bool = False


_NEVER = 1e-6
"""A part that a cost doesn't have; above zero, because constants have logarithms."""

_COUNTED = (1.0, _NEVER, _NEVER, 1e-3), (1.0, 0.22, _NEVER, 1e-3)

_LATENCY = Form(
    lambda layer: layer.share, (0.6, 0.2, 0.1, 0.1), (0.6, 0.25, 0.25, 0.25), (0.55, 0.8), fixed=0.05, border=0.1
)

FORMS: Mapping[str, Form] = {
    "size_bytes": Form(lambda layer: layer.params, *_COUNTED, integer=(0.25, 0.25), fixed=0.01, stored=True),
    "params": Form(lambda layer: layer.params, *_COUNTED),
    "macs": Form(lambda layer: layer.macs, *_COUNTED),
}
"""By the objective's name without its target; what isn't here is taken for a latency."""

_CUT = 0.5
"""Standard deviation of a level's own factor, as a share of that of a layer's."""

_STORED_BITS = 32
"""Of a weight in floats, in a model file."""


@dataclass(frozen=True)
class Formula:
    """The formula at some constants, for some plans.

    Attributes:
        logs: Logarithm of the cost over the dense one, (N,).
        constants: Its derivatives by the logarithms of the constants, (N, constants): shares of the cost.
        layers: Its derivatives by the logarithms of factors of single layers (in one width, whole or in factors) and of
            single levels of channels (some are faster than the next smaller one), (N, factors).
        plan: Numbers of the whole plan, about of unit size, (N, numbers).
    """

    logs: Floats
    constants: Floats
    layers: Floats
    plan: Floats

    def take(self, index: object) -> Formula:
        """Some of the plans."""
        return replace(self, **{name: values[index] for name, values in vars(self).items()})


class LayerCosts:
    """The formula for the plans of one architecture.

    A constant is a logarithm of a factor, 0 where the form is right. There is one for each part of a layer's cost, in
    each width, whole and in factors; the last two are what comes with every plan, and what borders cost.

    Args:
        units: What is chosen; column `u` of levels indexes `units[u].levels`.
        layers: In the order of execution; where there are none, every unit's layer or group counts alike.
        quantity: Name of the objective, with or without a target.
    """

    def __init__(self, units: Sequence[Unit], layers: Sequence[LayerCost], quantity: str) -> None:
        form = FORMS.get(quantity.partition("@")[0], _LATENCY)
        layers = layers or _unknown(units)
        self._tables = _Tables(units, layers, stored=form.stored)
        weights = np.array([form.weight(layer) for layer in layers], dtype=np.float64)
        if not weights.sum():  # where the runtime reports no layer's time, or no layer is known
            weights = np.array([max(layer.macs, 1) for layer in layers], dtype=np.float64)
        # Of a latency, what the layers leave of the whole are operations that aren't layers: they always come.
        self._weights = (1 - form.fixed) * weights / max(weights.sum(), 1.0 if form is _LATENCY else 0.0)
        self._prior = self._beliefs(form)
        self.constants = len(self._prior)

    def _beliefs(self, form: Form) -> Floats:
        """Constants of the form as factors, in the order of the columns of the parts."""
        found = []
        for parts in (form.whole, form.factors):
            for width in self._tables.widths:
                stored = width / 8 if form.stored and 0 < width < 8 else 1.0
                product, other = form.integer if width else (1.0, 1.0)
                found += [stored * (product if not place else other) * part for place, part in enumerate(parts)]
        return np.array([*found, 1 - self._weights.sum(), form.border])

    def __call__(self, levels: Levels, constants: Floats) -> Formula:
        """The formula for plans.

        Args:
            levels: Shape (N, units).
            constants: Shape (constants,).
        """
        factors = self._prior * np.exp(constants)
        state, classes = self._tables(levels), 2 * len(self._tables.widths)
        # A layer's parts cost what the constants of its class, its width and shape, say.
        costs = state.parts * factors[:-2].reshape(classes, 4)[state.classes] * self._weights[:, None]
        places = (state.classes[:, :, None] == np.arange(classes)).astype(np.float64)
        layers = np.einsum("nlp->nl", costs)
        borders = factors[-1] * (state.borders * (layers[:, 1:] + layers[:, :-1])).sum(1)
        total = layers.sum(1) + factors[-2] + borders
        layers /= total[:, None]
        parts = (places.transpose(0, 2, 1) @ costs).reshape(len(levels), 4 * classes)
        rest = np.stack([np.full(len(levels), factors[-2]), borders], 1)
        own = layers[:, :, None] * places
        single = own.reshape(len(levels), classes * len(self._weights))
        whole = np.log(total), state.borders.sum(1) / len(self._weights), state.kept.mean(1), state.kept.std(1)
        return Formula(
            np.log(total),
            np.concatenate([parts, rest], 1) / total[:, None],
            np.concatenate([single, self._tables.cuts(levels, layers)], 1),
            np.concatenate([np.stack(whole, 1), own.sum(1)], 1),
        )


@dataclass(frozen=True)
class _State:
    """What plans make of the layers.

    Attributes:
        parts: What each part of a layer's cost goes with, (N, layers, 4).
        classes: Of each layer: its place in the widths, plus their number where it is in factors; (N, layers).
        borders: Whether the width changes behind a layer, (N, layers - 1).
        kept: Share of each layer's outputs, (N, layers).
    """

    parts: Floats
    classes: Levels
    borders: Floats
    kept: Floats


class _Tables:
    """Levels of units as what they make of layers."""

    def __init__(self, units: Sequence[Unit], layers: Sequence[LayerCost], *, stored: bool) -> None:
        most = max((len(unit.levels) for unit in units), default=1)
        integers = {int(level) for unit in units if unit.technique == "quantize" for level in unit.levels}
        self.widths = (0, *sorted((width for width in integers if width <= INTEGER), reverse=True))
        """0 for floats, then the others that units have."""
        # One more than there are units: it does nothing, and stands for a unit that a layer doesn't have.
        self._kept, self._ranks, self._stored = (np.ones((len(units) + 1, most)) for _ in range(3))
        self._class = np.zeros((len(units) + 1, most), dtype=np.int64)
        for place, unit in enumerate(units):
            values, own = np.array(unit.levels), slice(len(unit.levels))
            if unit.technique == "prune":
                # Hardly any channel lies below half of its group's mean, and about half of them below it.
                removed = values / 2 if unit.param == "pruning/threshold" else values
                self._kept[place, own] = np.maximum(1 - removed, 0.05)
            elif unit.technique == "factorize":
                self._ranks[place, own] = values
            elif unit.technique == "quantize":
                self._class[place, own] = [self.widths.index(int(w)) if w <= INTEGER else 0 for w in values]
            elif stored and unit.technique == "sparsify":
                self._stored[place, own] = 1 - values + values / 16
            elif stored:
                self._stored[place, own] = [np.log2(size) / _STORED_BITS if size else 1.0 for size in values]
        self._places = {unit.param: place for place, unit in enumerate(units)}
        self._none = len(units)
        whole = next((place for place, unit in enumerate(units) if unit.technique == "prune" and not unit.name), None)
        self._whole = self._none if whole is None else whole
        self._outputs = np.array([self._group(layer.output) for layer in layers], dtype=np.int64)
        self._inputs = np.zeros((len(units) + 1, len(layers)))
        for column, layer in enumerate(layers):
            for group in layer.inputs or (None,):
                self._inputs[self._group(group), column] += 1 / max(1, len(layer.inputs))
        # Of each group's cut: of the layers that it touches, how much of their cost; a level of its own for each.
        self._cut = np.array([p for p, u in enumerate(units) if u.technique == "prune"], dtype=np.int64)
        self._touched = _CUT * (np.eye(self._none + 1)[self._outputs].T + (self._inputs > 0) / 2)[self._cut].T
        self._most = most
        self._layers = {
            kind: np.array([self._places.get(f"{kind}/{layer.name}", self._none) for layer in layers], dtype=np.int64)
            for kind in ("rank", "bits", "sparsity", "clusters")
        }

    def _group(self, name: str | None) -> int:
        return self._none if name is None else self._places.get(f"prune/{name}", self._whole)

    def cuts(self, levels: Levels, shares: Floats) -> Floats:
        """What single levels of groups touch of the cost, 0 for the first level, shape (N, groups x levels).

        Args:
            levels: Shape (N, units).
            shares: Of the cost, (N, layers).
        """
        found = np.zeros((len(levels), len(self._cut), self._most))
        chosen = levels[:, self._cut]
        np.put_along_axis(found, chosen[:, :, None], (shares @ self._touched * (chosen > 0))[:, :, None], 2)
        return found.reshape(len(levels), len(self._cut) * self._most)

    def __call__(self, levels: Levels) -> _State:
        levels = np.concatenate([levels, np.zeros((len(levels), 1), dtype=np.int64)], 1)
        every = np.arange(levels.shape[1])
        kept = self._kept[every, levels]
        outputs, inputs = kept[:, self._outputs], kept @ self._inputs
        ranks, width = (
            table[self._layers[kind], levels[:, self._layers[kind]]]
            for kind, table in (("rank", self._ranks), ("bits", self._class))
        )
        stored = np.ones_like(outputs)
        for kind in ("sparsity", "clusters"):
            stored *= self._stored[self._layers[kind], levels[:, self._layers[kind]]]
        parted = levels[:, self._layers["rank"]] > 0
        ones = np.ones_like(outputs)
        both = outputs * inputs
        parts = np.where(
            parted[:, :, None],
            np.stack([ranks**2 * both, ranks * (outputs**2 + inputs**2) / 2, (outputs + inputs) / 2, ones], 2),
            np.stack([both, outputs, inputs, ones], 2),
        )
        borders = (width[:, 1:] != width[:, :-1]).astype(np.float64)
        return _State(parts * stored[:, :, None], width + len(self.widths) * parted, borders, outputs)


def _unknown(units: Sequence[Unit]) -> tuple[LayerCost, ...]:
    """Stand-ins for layers of which nothing is known: one for each name of a unit, all alike."""
    groups = {unit.name for unit in units if unit.technique == "prune"}
    names = dict.fromkeys(unit.name for unit in units)
    return tuple(LayerCost(name, 1, 1, 0.0, name if name in groups else None) for name in names)
