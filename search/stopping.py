"""Early stopping across objectives: a trial that can't reach the front any more isn't trained to its end.

Successive halving (Li et al., 2018, "Hyperband"; Schmucker et al., 2021, "Multi-objective asynchronous successive
halving") compares trials with each other at a rung and lets a fixed share go on. Here more is known: what a plan costs
is measured before its training, so only its accuracy is open, and it need only be judged against the front at its cost.
It is stopped when even an optimistic extrapolation of its learning curve stays below (Domhan et al., 2015, "Speeding up
automatic hyperparameter optimization of deep neural networks by extrapolation of learning curves"). Curves have few
points here and not dozens, so the curves of other trials take the place of a family of functions, as they do in Google
Vizier (Golovin et al., 2017).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from paretune.objectives.progress import Rung
from paretune.search.front import feasible
from paretune.search.job_types import Constraint, direction

CONFIDENCE = 0.975
"""Of the upper end of an extrapolation: at a rung, one in forty trials that would join the front may be lost."""

MIN_CURVES = 5
"""Nothing is stopped on its curve before so many finished trials have shown the rung."""

MIN_POORER = 2
"""So many finished trials must have been no better at the rung: how the worst of all will end isn't known."""

MOST_CURVES = 500
"""Of a kind, the latest, that are learnt from: more would only take longer at each rung."""

SPARED = 10
"""One trial in so many is never stopped on its curve, so that the model keeps seeing how poor ones end."""

_MARGIN: Mapping[str, float] = {"latency_ms": 0.05, "size_bytes": 0.01}
"""By how much a final value may differ, as a share, from the one before the training, beyond its interval: 30 calls are
few, and packed weights are other weights. Of 130 trials on a busy machine 3 came out faster by more than 5 %, of 14
with artifacts of 0.07 ms also 3; no size differed by more than 0.65 %."""

_MARGIN_MS = 0.01
"""The same of a latency, in milliseconds, at least."""

Array = npt.NDArray[np.float64]


class Prediction(NamedTuple):
    """What an accuracy will be in the end: a Student t distribution.

    Attributes:
        mean: Its middle.
        scale: Its spread.
        degrees: Its degrees of freedom.
    """

    mean: float
    scale: float
    degrees: float

    @property
    def sd(self) -> float:
        """The standard deviation."""
        return self.scale * math.sqrt(self.degrees / (self.degrees - 2))

    def upper(self, confidence: float) -> float:
        """The value that isn't exceeded with that probability."""
        return self.mean + self.scale * float(stdtrit(self.degrees, confidence))


class FrontStopping:
    """Decides whether a running trial may be ended, from those that finished.

    Knows neither processes nor a study: whoever runs trials tells it the finished ones and asks it at each rung.

    What isn't known before the training and isn't the accuracy (the energy, say) leaves room for every trial to be the
    best in that: with such an objective nothing is judged against the front. While no finished trial keeps all bounds,
    nothing is stopped at all: the search must learn which way they lie.

    Args:
        objectives: Names of measured values, the accuracy among them.
        constraints: Bounds that the front keeps.
    """

    def __init__(self, objectives: Sequence[str], constraints: Sequence[Constraint] = ()) -> None:
        self._costs = [name for name in objectives if name != "accuracy"]
        self._constraints = tuple(constraints)
        self._is_feasible = False
        self._front: list[tuple[tuple[float, ...], float]] = []
        """Upper ends of the costs, and the accuracy, of feasible trials that no other one beats in all of these."""
        self._curves: dict[str, deque[tuple[dict[float, float], float]]] = {}

    def add(self, metrics: Mapping[str, float], rungs: Sequence[Rung], kind: str = "") -> None:
        """Learn from a trial that was trained to its end.

        Args:
            metrics: What was measured, named as in `paretune.objectives.measurement.Measurement.to_dict`.
            rungs: Those of its training; without any it still counts for the front.
            kind: What comes after a rung differs from kind to kind, e.g. for plans with quantizers and without: each is
                foreseen from its own alone.
        """
        if feasible(metrics, self._constraints):
            self._is_feasible = True
            self._join(tuple(_ends(name, metrics)[1] for name in self._costs), metrics["accuracy"])
        if rungs:
            curve = {rung.share: rung.accuracy for rung in rungs}
            self._curves.setdefault(kind, deque(maxlen=MOST_CURVES)).append((curve, metrics["accuracy"]))

    def _join(self, costs: tuple[float, ...], accuracy: float) -> None:
        """Keep what a feasible trial reached, unless another one reached as much for no more."""
        if not any(known >= accuracy and _within(other, costs) for other, known in self._front):
            left = [(other, known) for other, known in self._front if known > accuracy or not _within(costs, other)]
            self._front = [*left, (costs, accuracy)]

    def verdict(self, number: int, outline: Mapping[str, float], rungs: Sequence[Rung], kind: str = "") -> str:
        """Why a trial can't join the front any more, in a few words; empty where it may.

        Args:
            number: The trial's; every tenth one is spared on its curve. Whether a trial is stopped depends on its rungs
                alone and not on how it would have ended, so the model of the curves isn't biased where it has data;
                but poor trials would be ever fewer in it, and those it spares keep it honest there.
            outline: What is known of the plan without training, as of `paretune.objectives.evaluate.Evaluator.outline`.
            rungs: Those that it reached; none before the training, where only a broken bound can stop it.
            kind: As in `add`.
        """
        if not self._is_feasible:
            return ""
        for constraint in self._constraints:
            if constraint.name in outline and not any(map(constraint.holds, _early_ends(constraint.name, outline))):
                return f"{constraint} is broken ({outline[constraint.name]:.6g})"
        if number % SPARED == SPARED - 1 or not self._has_seen_poorer(rungs, kind):
            return ""
        found = self.predict(rungs, kind)
        if found is None:
            return ""
        upper = max(found.upper(CONFIDENCE), rungs[-1].accuracy)
        needed = self.needed(outline)
        if upper < needed:
            costs = [f"{outline[name]:.6g} {name}".replace(" latency_ms", " ms") for name in self._costs]
            return f"at {', '.join(costs)} the front has {needed:.4f}"
        for constraint in self._constraints:
            if constraint.name == "accuracy" and not constraint.holds(upper) and constraint.op == ">=":
                return f"{constraint} is out of reach"
        return ""

    def _has_seen_poorer(self, rungs: Sequence[Rung], kind: str) -> bool:
        """Whether enough trials finished that were no better at the last of some rungs."""
        curves = [curve for curve, _ in self._curves.get(kind, ())]
        poorer = (curve.get(rung.share, math.inf) <= rung.accuracy for rung in rungs[-1:] for curve in curves)
        return sum(poorer) >= MIN_POORER

    def needed(self, outline: Mapping[str, float]) -> float:
        """The accuracy that a trial must exceed to join the front: the best of those that cost no more in anything.

        The lower ends of its own costs count, and the upper ends of the others': noise must not stop a trial.

        Args:
            outline: As for `verdict`.

        Returns:
            An accuracy; minus infinity where nothing is as cheap.
        """
        if any(name not in outline or direction(name) == "maximize" for name in self._costs):
            return -math.inf
        costs = tuple(_early_ends(name, outline)[0] for name in self._costs)
        return max((accuracy for known, accuracy in self._front if _within(known, costs)), default=-math.inf)

    def expected(self, rungs: Sequence[Rung], kind: str = "") -> tuple[float, float] | None:
        """Mean and standard deviation of the final accuracy of a trial that was stopped; None with too few curves."""
        found = self.predict(rungs, kind)
        return None if found is None else (found.mean, found.sd)

    def predict(self, rungs: Sequence[Rung], kind: str = "") -> Prediction | None:
        """The final accuracy of a trial, from its last two rungs; None with too few curves that show the same rungs."""
        if not rungs or not all(math.isfinite(rung.accuracy) for rung in rungs):
            return None
        last = rungs[-2:]
        shares = [rung.share for rung in last]
        known = [
            (*(curve[share] for share in shares), final)
            for curve, final in self._curves.get(kind, ())
            if all(share in curve for share in shares)
        ]
        if len(known) < MIN_CURVES:
            return None
        return _regress(np.array(known), np.array([rung.accuracy for rung in last]))


def _within(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether one costs no more than the other in anything."""
    return all(a <= b for a, b in zip(one, other, strict=True))


def _ends(name: str, values: Mapping[str, float]) -> tuple[float, float]:
    """The interval of a cost; what has none, all but the latency, is its own."""
    value = values[name]
    high = values.get(name.replace("latency_ms", "latency_high_ms"), value)
    # Of a ratio, so it is about symmetric on a log scale.
    return values.get(name.replace("latency_ms", "latency_low_ms"), value * value / high if high else value), high


def _early_ends(name: str, outline: Mapping[str, float]) -> tuple[float, float]:
    """The same for a cost that was measured before the training, and will be again."""
    margin = _MARGIN.get(name.partition("@")[0], 0.0)
    low, high = _ends(name, outline)
    least = _MARGIN_MS if name.startswith("latency_ms") else 0.0
    return low - max(low * margin, least), high + max(high * margin, least)


_PRIOR_MEAN, _PRIOR_SD = (0.0, 0.5, 0.0), (1.0, 0.5, 0.5)
"""Of the coefficients of 1, the gap and the last gain, in median gaps: half of a gap is closed, give or take, and what
comes after the rung, e.g. quantizers, may cost all trials something."""

_PRIOR_SCALE, _PRIOR_DEGREES = 0.15, 2.0
"""Of the noise, as a share of the gap, and how many trials that is worth."""

_FLOOR = 1.0
"""What is added to the gap for the noise, in median gaps: a trial that has none left is noisy, too."""


def _regress(known: Array, asked: Array) -> Prediction:
    """Bayesian regression of the gap that is left in the end on the gap at the rung.

    Gaps are distances from the best value that was ever seen. What a trial gains grows with its gap, and so does what
    can't be known of that: the noise is taken to be proportional to the gap. Nothing but ratios of differences of
    accuracies enters, so any metric will do, on whatever scale. Linear in the gap and in the last gain from rung to
    rung, with the conjugate prior (normal, inverse gamma), so that few trials give wide tails and not wrong ones.

    Args:
        known: Accuracies at the rungs asked for and in the end, (N, 2 or 3).
        asked: Accuracies of the trial, (1 or 2,).
    """
    rungs, final = np.vstack([known[:, :-1], asked]), known[:, -1]
    top = float(max(rungs.max(), final.max()))
    # A trial that diverged mustn't set the scale, and all may be equal.
    unit = max(float(np.median(top - rungs[:, -1])), 1e-9 * max(1.0, abs(top)))
    gap, gain = (top - rungs[:, -1]) / unit, (rungs[:, -1] - rungs[:, 0]) / unit
    features = np.stack([np.ones_like(gap), gap, gain], axis=1)  # (N + 1, 3); the last row is the trial's
    noise = gap + _FLOOR
    weighted, left = (features / noise[:, None])[:-1], (top - final) / unit / noise[:-1]
    prior, mean = np.diag((_PRIOR_SCALE / np.array(_PRIOR_SD)) ** 2), np.array(_PRIOR_MEAN)
    precision = prior + weighted.T @ weighted
    found = np.linalg.solve(precision, prior @ mean + weighted.T @ left)
    degrees = _PRIOR_DEGREES + len(known)
    misfit = float(np.sum((left - weighted @ found) ** 2) + (found - mean) @ prior @ (found - mean))
    variance = (_PRIOR_DEGREES * _PRIOR_SCALE**2 + misfit) / degrees
    own = features[-1]
    scale = math.sqrt(variance * (noise[-1] ** 2 + float(own @ np.linalg.solve(precision, own))))
    return Prediction(top - unit * float(own @ found), unit * scale, degrees)
