"""Hypervolume against cost: what the searches that benchmarks/search.py ran come to, and the picture of it."""

from __future__ import annotations

import math
import statistics
import xml.etree.ElementTree as ET
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from paretune.search.charts import Axis
from paretune.search.hypervolume import hypervolume, hypervolume_curve, reference_point

OBJECTIVES = ("latency_ms", "accuracy")
DENSE_MS = 1.0
"""Latencies are shares of the dense model's, so that runs whose clocks read it differently compare."""

Line = Mapping[str, Any]
"""One search, as a line of the JSON lines file."""

Curve = list[tuple[float, float]]
"""Cost in seconds of trial work and the hypervolume from there on, ascending."""

_LOOKS = {
    "front": ("#0072b2", ""),
    "uniform": ("#e69f00", "9 4"),
    "tpe": ("#009e73", ""),
    "tpe after 12 uniform": ("#009e73", "3 3"),
    "nsga2": ("#cc79a7", "9 4"),
    "gp": ("#d55e00", "3 3"),
    "random": ("#5a6772", "9 3 2 3"),
}
_OTHERS = (("#0072b2", ""), ("#d55e00", "9 4"), ("#009e73", "3 3"), ("#cc79a7", "9 3 2 3"))
"""Okabe and Ito's colours, safe for the colour-blind; dashes tell lines apart without any."""


def reference(line: Line, accuracy: str = "accuracy") -> tuple[float, ...]:
    """The losses that a trial of a search must be better than; see `paretune.search.hypervolume.reference_point`."""
    return reference_point({"latency_ms": DENSE_MS, "accuracy": line["dense"][accuracy]}, OBJECTIVES)


def trials(line: Line) -> list[tuple[float, Line]]:
    """Trials in the order in which they ended, each with what the search had cost by then.

    Cost is what was known before the first trial and, for each trial, its own work and the sampler's time.
    """
    cost, found = float(line["profile_seconds"]), []
    for trial in line["trials"]:
        cost += trial["work"] + trial["sampler"]
        found.append((cost, trial))
    return found


def seen(line: Line, cost: float = math.inf) -> list[Line]:
    """The trials of a search that were measured when it had cost so much."""
    return [trial for spent, trial in trials(line) if spent <= cost and trial.get("accuracy") is not None]


def curve(line: Line) -> Curve:
    """What a search had reached at which cost, by its own measurements on the validation split."""
    ended = [(cost, trial) for cost, trial in trials(line) if trial.get("accuracy") is not None]
    points = [(trial["latency"], -trial["accuracy"]) for _, trial in ended]
    values = hypervolume_curve(points, reference(line))
    return [(cost, value) for (cost, _), value in zip(ended, values, strict=True)]


def true_curve(line: Line) -> Curve:
    """The same of the synthetic problem: the true values of the front that the search reports by its noisy ones."""
    return [(cost, true_hypervolume(line, seen(line, cost))) for cost, _ in trials(line)]


def true_hypervolume(line: Line, measured: Sequence[Line]) -> float:
    """As a share of what is attainable, of the front of some trials."""
    points = [(trial["true_latency"], -trial["true"]) for trial in front(measured)]
    return hypervolume(points, reference(line)) / float(line["attainable"])


def front(measured: Sequence[Line]) -> list[Line]:
    """The trials that no other one beats, by their own measurements."""
    found: list[Line] = []
    for trial in sorted(measured, key=lambda trial: (trial["latency"], -trial["accuracy"])):
        if not found or trial["accuracy"] > found[-1]["accuracy"]:
            found.append(trial)
    return found


def at(found: Curve, cost: float) -> float:
    """The hypervolume that was reached at a cost."""
    index = bisect_right([spent for spent, _ in found], cost)
    return found[index - 1][1] if index else 0.0


def cost_of(found: Curve, wanted: float) -> float | None:
    """The cost at which a hypervolume was reached first; None where it never was."""
    return next((cost for cost, value in found if value >= wanted), None)


def spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    """Median and range over the seeds, of which there is at least one."""
    if len(values) == 1:
        return show(values[0])
    return f"{show(statistics.median(values))} [{show(min(values))}, {show(max(values))}]"


def plot(path: Path, panels: Mapping[str, tuple[str, Mapping[str, Sequence[Curve]]]]) -> None:
    """Draw one panel beside the other: the median over the seeds as a line, their range as a band.

    Args:
        path: An SVG file.
        panels: Title to the name of the upward axis and, by label, the curves of all seeds.
    """
    labels = list(dict.fromkeys(label for _, curves in panels.values() for label in curves))
    others = iter(_OTHERS)
    looks = {label: _LOOKS.get(label) or next(others, ("#5a6772", "")) for label in labels}
    legend = [84 + sum(60 + round(7.2 * len(label)) for label in labels[:end]) for end in range(len(labels) + 1)]
    width = max(40 + 470 * len(panels), legend[-1])
    attributes = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {width} 430", "font-size": "13"}
    attributes |= {"font-family": "system-ui, sans-serif", "role": "img", "width": str(width), "height": "430"}
    svg = ET.Element("svg", attributes | {"aria-label": f"Hypervolume against cost: {', '.join(labels)}"})
    # On a background of its own, so that it can be read on a dark page too.
    _add(svg, "rect", x=0.5, y=0.5, width=width - 1, height=429, rx=8, fill="#ffffff", stroke="#d5dbe1")
    for x, (label, (colour, dashes)) in zip(legend, looks.items(), strict=False):
        _add(svg, "path", d=f"M{x} 26h28", stroke=colour, stroke_width=2.4, stroke_dasharray=dashes)
        _text(svg, x + 34, 30, label)
    for position, (title, (name, curves)) in enumerate(panels.items()):
        _panel(svg, 84 + 470 * position, title, name, curves, looks)
    path.write_text(ET.tostring(svg, encoding="unicode") + "\n")


def _panel(
    svg: ET.Element,
    left: float,
    title: str,
    name: str,
    curves: Mapping[str, Sequence[Curve]],
    looks: Mapping[str, tuple[str, str]],
) -> None:
    every = [one for several in curves.values() for one in several if one]
    # No further than the cheapest search went, so that no line is drawn where its search had ended.
    end = min(one[-1][0] for one in every)
    across = Axis(0.0, end, left, left + 390)
    up = Axis.around([0.0, *(at(one, end) for one in every)], 370, 76)
    for value, text in up.ticks():
        _add(svg, "path", d=f"M{left} {up.at(value):.1f}h390", stroke="#e4e8ec")
        _text(svg, left - 8, up.at(value) + 4, text, text_anchor="end")
    for value, text in across.ticks():
        _add(svg, "path", d=f"M{across.at(value):.1f} 370v5", stroke="#8a96a1")
        _text(svg, across.at(value), 390, text, text_anchor="middle")
    _add(svg, "path", d=f"M{left} 370h390", stroke="#8a96a1")
    _text(svg, left + 195, 414, "cost: seconds of trial work", text_anchor="middle")
    _text(svg, left, 62, f"{title}: {name}", fill="#1f2933", font_weight="600")
    costs = [end * step / 200 for step in range(201)]
    rows = {label: [sorted(at(one, cost) for one in several) for cost in costs] for label, several in curves.items()}
    xs = [across.at(cost) for cost in costs]
    for label, values in rows.items():  # bands below all lines
        if len(values[0]) > 1:
            high = [f"{x:.1f} {up.at(row[-1]):.1f}" for x, row in zip(xs, values, strict=True)]
            low = [f"{x:.1f} {up.at(row[0]):.1f}" for x, row in zip(xs, values, strict=True)]
            band = "L".join([*high, *reversed(low)])
            _add(svg, "path", d=f"M{band}z", fill=looks[label][0], fill_opacity=0.13)
    for label, values in rows.items():
        line = "L".join(f"{x:.1f} {up.at(statistics.median(row)):.1f}" for x, row in zip(xs, values, strict=True))
        colour, dashes = looks[label]
        _add(svg, "path", label, d=f"M{line}", stroke=colour, stroke_width=2.2, stroke_dasharray=dashes)


def _add(svg: ET.Element, tag: str, title: str = "", **attributes: float | str) -> ET.Element:
    texts = {
        key.replace("_", "-"): f"{value:g}" if isinstance(value, float) else str(value)
        for key, value in attributes.items()
    }
    element = ET.SubElement(svg, tag, {"fill": "none"} | {key: text for key, text in texts.items() if text})
    if title:
        ET.SubElement(element, "title").text = title
    return element


def _text(svg: ET.Element, x: float, y: float, text: str, **attributes: str) -> None:
    element = _add(svg, "text", "", x=x, y=y, **{"fill": "#5a6772"} | attributes)
    element.text = text
