"""The rule that stops trials: on curves that were made up, where it is known how each would have ended."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest

from paretune.objectives.progress import Rung
from paretune.search.front import dominates
from paretune.search.job_types import Constraint
from paretune.search.stopping import CONFIDENCE, MIN_CURVES, MOST_CURVES, SPARED, FrontStopping

OBJECTIVES = ("accuracy", "latency_ms")


def outline(latency: float, *, size: float = 1000.0, half_width: float = 0.0) -> dict[str, float]:
    return {"latency_ms": latency, "latency_high_ms": latency * (1 + half_width), "size_bytes": size}


def metrics(accuracy: float, latency: float, *, size: float = 1000.0, half_width: float = 0.0) -> dict[str, float]:
    low = {"latency_low_ms": latency * (1 - half_width)}
    return outline(latency, size=size, half_width=half_width) | low | {"accuracy": accuracy}


def rungs(*accuracies: float) -> tuple[Rung, ...]:
    return tuple(Rung(share, value, 1000) for share, value in zip((0.25, 0.5), accuracies, strict=False))


def taught(*bounds: str, objectives: tuple[str, ...] = OBJECTIVES, curves: int = 12) -> FrontStopping:
    """Knows trials of 2 to 3 ms that close about half of their gap to 0.95 from rung to rung; the best has 0.93."""
    rule = FrontStopping(objectives, [Constraint.model_validate(bound) for bound in bounds])
    rng = np.random.default_rng(0)
    for final in np.linspace(0.5, 0.93, curves):
        gap = 0.95 - final
        first, second = (0.95 - gap * factor + rng.normal(0, 0.005) for factor in (2.5, 1.5))
        rule.add(metrics(final, 2 + final), rungs(first, second))
    return rule


HOPELESS, PROMISING = rungs(0.2, 0.5), rungs(0.85, 0.91)


@pytest.mark.parametrize(
    ("latency", "shown", "reason"),
    [
        pytest.param(4.0, HOPELESS, "at 4 ms the front has 0.9300", id="out of reach"),
        pytest.param(4.0, HOPELESS[:1], "at 4 ms the front has 0.9300", id="out of reach at the first rung"),
        pytest.param(4.0, PROMISING, "", id="within reach"),
        pytest.param(1.0, HOPELESS, "", id="nothing is as fast"),
        pytest.param(4.0, (), "", id="not a rung yet"),
        pytest.param(4.0, rungs(0.2, math.nan), "", id="not a number"),
        pytest.param(4.0, (Rung(0.4, 0.2, 100),), "", id="a rung that no other trial had"),
    ],
)
def test_a_trial_is_judged_at_its_cost(latency: float, shown: tuple[Rung, ...], reason: str) -> None:
    rule = taught()
    assert rule.verdict(1, outline(latency), shown) == reason


def test_few_curves_stop_nothing() -> None:
    assert taught(curves=MIN_CURVES - 1).verdict(1, outline(4.0), HOPELESS) == ""
    assert taught(curves=MIN_CURVES - 1).expected(HOPELESS) is None
    assert taught(curves=MIN_CURVES).expected(HOPELESS) is not None
    rule = taught(curves=2 * MIN_CURVES)
    assert rule.verdict(1, outline(4.0), HOPELESS) != ""
    assert rule.verdict(SPARED - 1, outline(4.0), HOPELESS) == "", "the model is kept honest"


def test_what_must_be_exceeded_is_the_best_of_all_that_cost_no_more() -> None:
    rng = np.random.default_rng(3)
    rule = FrontStopping([*OBJECTIVES, "size_bytes"])
    known = [metrics(*rng.random(2), size=float(rng.random()), half_width=0.02) for _ in range(200)]
    for one in known:
        rule.add(one, ())
    for _ in range(50):
        latency, size = rng.random(2)
        # What was measured before the training may come out 5 % or 0.01 ms, and 1 %, lower.
        low = min(latency / 1.02 * 0.95, latency / 1.02 - 0.01), size * 0.99
        cheaper = [one for one in known if one["latency_high_ms"] <= low[0] and one["size_bytes"] <= low[1]]
        expected = max((one["accuracy"] for one in cheaper), default=-math.inf)
        assert rule.needed(outline(latency, size=float(size), half_width=0.02)) == expected
    assert len(rule._front) < 60


def test_old_curves_make_room_for_new_ones() -> None:
    rule = FrontStopping(OBJECTIVES)
    for number in range(2 * MOST_CURVES):
        final = 0.3 if number < MOST_CURVES else 0.9  # the first ones lose all that they had
        rule.add(metrics(final, 2.0), rungs(0.5 + number % 7 / 100, 0.7 + number % 7 / 100))
    expected = rule.expected(rungs(0.53, 0.73))
    assert expected is not None
    assert expected[0] == pytest.approx(0.9, abs=0.02)


def test_each_kind_is_foreseen_from_its_own() -> None:
    rule = taught()
    assert rule.verdict(1, outline(4.0), HOPELESS, "4 bits") == "", "none of them finished yet"
    assert rule.expected(HOPELESS, "4 bits") is None
    for number in range(2 * MIN_CURVES):  # what they gain before quantizers come is lost behind them
        rule.add(metrics(0.3 + number / 100, 3.0), rungs(0.5 + number / 100, 0.7 + number / 100), "4 bits")
    one, other = (rule.expected(rungs(0.55, 0.75), kind) for kind in ("", "4 bits"))
    assert one is not None
    assert other is not None
    assert one[0] > 0.7 > 0.5 > other[0]


def test_the_interval_is_wide_with_few_curves() -> None:
    few, many = (taught(curves=curves).expected(HOPELESS) for curves in (MIN_CURVES, 60))
    assert few is not None
    assert many is not None
    assert few[1] > 1.5 * many[1]
    assert many[0] == pytest.approx(0.95 - 0.45 / 1.5, abs=0.05)


def test_poor_trials_are_less_certain_than_good_ones() -> None:
    rule = taught()
    poor, good = rule.expected(HOPELESS), rule.expected(PROMISING)
    assert poor is not None
    assert good is not None
    assert poor[1] > 2 * good[1]


def test_one_that_began_worse_than_all_is_trained_to_its_end() -> None:
    rule = taught()
    assert rule.verdict(1, outline(4.0), rungs(-0.3)) == ""
    rule.add(metrics(0.5, 2.0), rungs(-0.35))
    assert rule.verdict(1, outline(4.0), rungs(-0.3)) == ""
    rule.add(metrics(0.5, 2.0), rungs(-0.3))
    assert rule.verdict(1, outline(4.0), rungs(-0.3)) != ""


def test_a_trial_that_diverged_spoils_nothing() -> None:
    before = taught(curves=30).expected(HOPELESS)
    rule = taught(curves=30)
    rule.add(metrics(-1e5, 2.0), rungs(-1e6, -1e6))
    after = rule.expected(HOPELESS)
    assert before is not None
    assert after is not None
    assert after == pytest.approx(before, abs=0.05)
    assert rule.verdict(1, outline(4.0), HOPELESS) != ""


def test_the_end_is_never_below_the_rung() -> None:
    rule = FrontStopping(OBJECTIVES)
    for final in np.linspace(0.5, 0.6, 20):
        rule.add(metrics(final, 2.0), rungs(final + 0.3))  # all collapse after the rung
    rule.add(metrics(0.83, 2.0), ())
    assert rule.verdict(1, outline(4.0), rungs(0.84)) == ""
    assert rule.verdict(1, outline(4.0), rungs(0.82)) != ""


def test_noise_of_the_clock_stops_nothing() -> None:
    rule = taught()
    rule.add(metrics(0.99, 1.0, half_width=0.1), ())
    assert "0.9900" in rule.verdict(1, outline(1.2), PROMISING)
    assert rule.verdict(1, outline(1.2, half_width=0.1), PROMISING) == "", "the intervals overlap"
    assert rule.verdict(1, outline(1.14), PROMISING) == "", "by less than a second measurement may tell"


def test_every_other_objective_must_be_no_worse() -> None:
    objectives = ("accuracy", "latency_ms", "size_bytes", "latency_ms@server")
    rule = FrontStopping(objectives)
    for final in np.linspace(0.6, 0.93, 12):
        rule.add(metrics(final, 2.0) | {"latency_ms@server": 20.0, "latency_high_ms@server": 21.0}, rungs(final - 0.1))
    dear = outline(4.0, size=2000) | {"latency_ms@server": 40.0}
    assert rule.verdict(1, dear, rungs(0.55)) == "at 4 ms, 2000 size_bytes, 40 ms@server the front has 0.9300"
    assert rule.verdict(1, dear | {"size_bytes": 900}, rungs(0.55)) == ""
    assert rule.verdict(1, dear | {"latency_ms@server": 21.5}, rungs(0.55)) == ""


@pytest.mark.parametrize("unknown", ["energy_mj", "throughput_per_s", "accuracy@server"])
def test_an_objective_that_only_a_trained_model_shows_leaves_room_for_all(unknown: str) -> None:
    rule = FrontStopping((*OBJECTIVES, unknown))
    for final in np.linspace(0.6, 0.93, 12):
        rule.add(metrics(final, 2.0) | {unknown: 1.0}, rungs(final - 0.1))
    assert rule.verdict(1, outline(4.0), rungs(0.55)) == ""
    assert rule.expected(rungs(0.55)) is not None


@pytest.mark.parametrize(
    ("bound", "reason"),
    [
        pytest.param("latency_ms <= 3", "latency_ms <= 3 is broken (4)", id="latency"),
        pytest.param("size_bytes <= 990", "", id="nothing keeps it yet"),
        pytest.param("latency_ms <= 3.9", "", id="perhaps kept"),
        pytest.param("energy_mj <= 3", "", id="not known yet"),
        pytest.param("latency_ms >= 1", "", id="a lower bound that is kept"),
        pytest.param("size_bytes >= 995", "", id="a lower bound on a size"),
    ],
)
def test_a_broken_bound_stops_before_the_training(bound: str, reason: str) -> None:
    rule = FrontStopping(OBJECTIVES, [Constraint.model_validate(bound)])
    assert rule.verdict(1, outline(4.0), ()) == ""
    rule.add(metrics(0.9, 2.0) | {"energy_mj": 1.0}, ())
    assert rule.verdict(1, outline(4.0), ()) == reason
    assert rule.verdict(SPARED - 1, outline(4.0), ()) == reason, "its curve is worth nothing"


def test_an_accuracy_out_of_reach() -> None:
    rule = taught("accuracy >= 0.8")
    assert rule.verdict(1, outline(1.0), HOPELESS) == "accuracy >= 0.8 is out of reach"
    assert rule.verdict(1, outline(1.0), PROMISING) == ""
    assert taught("accuracy >= 0.94").verdict(1, outline(1.0), HOPELESS) == "", "while none keeps it, all are wanted"


def test_infeasible_trials_are_not_on_the_front() -> None:
    rule = FrontStopping(OBJECTIVES, [Constraint.model_validate("size_bytes <= 1000")])
    rule.add(metrics(0.95, 1.0, size=2000), ())
    assert rule.needed(outline(4.0)) == -math.inf
    rule.add(metrics(0.9, 2.0), ())
    assert rule.needed(outline(4.0)) == 0.9


@pytest.mark.parametrize(
    ("factor", "shift"), [(100.0, 0.0), (1.0, -50.0), (1e-3, 3.0)], ids=["percent", "negative", "tiny"]
)
def test_any_scale_of_the_metric_will_do(factor: float, shift: float) -> None:
    def scaled(values: tuple[Rung, ...]) -> tuple[Rung, ...]:
        return tuple(Rung(rung.share, factor * rung.accuracy + shift, rung.samples) for rung in values)

    plain, other = FrontStopping(OBJECTIVES), FrontStopping(OBJECTIVES)
    for final in np.linspace(0.6, 0.93, 12):
        plain.add(metrics(final, 2.0), rungs(final - 0.1, final - 0.03))
        other.add(metrics(factor * final + shift, 2.0), scaled(rungs(final - 0.1, final - 0.03)))
    expected = plain.expected(HOPELESS)
    assert expected is not None
    assert other.expected(scaled(HOPELESS)) == pytest.approx((factor * expected[0] + shift, factor * expected[1]))


def test_curves_that_are_all_the_same() -> None:
    rule = FrontStopping(OBJECTIVES)
    for _ in range(10):
        rule.add(metrics(0.9, 2.0), rungs(0.9, 0.9))
    assert rule.expected(rungs(0.9, 0.9)) == pytest.approx((0.9, 0.0), abs=1e-6)
    assert rule.verdict(1, outline(4.0), rungs(0.9, 0.9)) == ""


@dataclass
class Search:
    """A search with stopping beside the same one without, on made-up plans that take a different course each.

    Attributes:
        joined: Trials that would have joined the front of their time.
        lost: How many of these were stopped.
        hopeless: Trials that would not have joined.
        stopped: How many of these were stopped.
    """

    joined: int = 0
    lost: int = 0
    hopeless: int = 0
    stopped: int = 0

    def run(self, seed: int, kind: str, trials: int, samples: int = 1000) -> None:
        rng = np.random.default_rng(seed)
        rule = FrontStopping(OBJECTIVES)
        finished: list[dict[str, float]] = []

        def score(accuracy: float) -> float:
            return float(rng.binomial(samples, accuracy)) / samples

        for number in range(trials):
            cut, luck = rng.beta(1.5, 1.5), rng.exponential(1 - 0.6 * number / trials)
            damage = {"tolerant": 0.12 * cut**3 * (0.3 + luck), "brittle": 0.5 * cut**2 * (0.1 + luck)}.get(kind)
            if damage is None:  # some fall off a cliff
                damage = 0.08 * cut**2 * (0.2 + luck) + 0.5 * (rng.random() < 0.3 * cut * luck)
            final = max(0.1, 0.93 - damage)
            start = max(0.1, final - (0.05 + 3 * damage) * rng.uniform(0.3, 1.5))
            speed = math.exp(rng.normal(0.7, 0.8) if kind == "cliff" else rng.normal(1, 0.4))
            latency = 4 * (1 - 0.75 * cut) * math.exp(rng.normal(0, 0.08))
            quantized = final - abs(rng.normal(0, 0.004)) * (rng.random() < 0.5)
            found = metrics(score(quantized), latency * math.exp(rng.normal(0, 0.008)), half_width=0.01)
            known = outline(latency * math.exp(rng.normal(0, 0.015)), half_width=0.015)
            shown = rungs(*(score(final - (final - start) * (1 - share) ** speed) for share in (0.25, 0.5)))
            stops = any(rule.verdict(number, known, shown[:count]) for count in (1, 2))
            joins = not any(dominates(other, found, OBJECTIVES) for other in finished)
            self.joined, self.lost = self.joined + joins, self.lost + (joins and stops)
            self.hopeless, self.stopped = self.hopeless + (not joins), self.stopped + (stops and not joins)
            if not stops:
                rule.add(found, shown)
                finished.append(found)


@pytest.mark.parametrize(("kind", "least"), [("tolerant", 0.05), ("brittle", 0.2), ("cliff", 0.1)])
def test_of_the_trials_that_would_join_no_more_are_lost_than_promised(kind: str, least: float) -> None:
    search = Search()
    for seed in range(40):
        search.run(seed, kind, trials=60)
    assert search.joined > 500
    assert search.lost / search.joined < 1 - CONFIDENCE
    assert search.stopped / search.hopeless > least, "it does stop what is hopeless"
