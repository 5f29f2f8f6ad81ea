"""The pictures of a run as small SVG files, drawn without a plotting library.

The colours are Okabe and Ito's, safe for the colour-blind. Every shape carries them as attributes, so that a
picture stands alone on its light background, and a class, by which a page recolours it when dark.
"""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

Shape = Literal["trial", "pruned", "infeasible", "uniform", "dense", "baseline"]

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
_WIDTH = 1000
_STYLES: dict[str, dict[str, str]] = {
    "paper": {"fill": "#ffffff", "stroke": "#d5dbe1"},
    "ink": {"fill": "#1f2933"},
    "soft": {"fill": "#5a6772"},
    "halo": {"fill": "#1f2933", "stroke": "#ffffff", "stroke-width": "4", "paint-order": "stroke"},
    "grid": {"stroke": "#e4e8ec"},
    "axis": {"stroke": "#8a96a1"},
    "front": {"fill": "#0072b2", "stroke": "#ffffff"},
    "step": {"fill": "none", "stroke": "#0072b2", "stroke-width": "1.6"},
    "area": {"fill": "#0072b2", "fill-opacity": "0.1"},
    "test": {"fill": "#d55e00", "stroke": "#ffffff"},
    "bar-front": {"fill": "none", "stroke": "#0072b2", "stroke-width": "1.4"},
    "bar-test": {"fill": "none", "stroke": "#d55e00", "stroke-width": "1.4"},
    "baseline": {"fill": "#1f2933", "stroke": "#ffffff"},
    "dense": {"fill": "none", "stroke": "#1f2933", "stroke-width": "1.6"},
    "uniform": {"fill": "#e69f00", "stroke": "#ffffff"},
    "trial": {"fill": "#9aaebf", "stroke": "#ffffff"},
    "pruned": {"fill": "none", "stroke": "#9aaebf", "stroke-width": "1.2"},
    "infeasible": {"fill": "none", "stroke": "#cc79a7", "stroke-width": "1.6"},
    "COMPLETE": {"fill": "#0072b2"},
    "PRUNED": {"fill": "#8cc6ec"},
    "FAIL": {"fill": "#d55e00"},
    "RUNNING": {"fill": "none", "stroke": "#0072b2", "stroke-dasharray": "3 2"},
}
_LEGEND = {
    "front": "on the front (validation)",
    "test": "verified (test)",
    "baseline": "baseline",
    "dense": "dense trial",
    "uniform": "uniform plan",
    "trial": "other trial",
    "pruned": "stopped early",
    "infeasible": "infeasible",
}
_ORDER = ("pruned", "infeasible", "trial", "uniform", "dense", "front", "baseline")  # the last is on top
STATES = {"COMPLETE": "complete", "PRUNED": "stopped early", "FAIL": "failed", "RUNNING": "running"}


@dataclass(frozen=True)
class Mark:
    """One model in a picture of accuracy over latency.

    Attributes:
        latency_ms: Median latency in milliseconds.
        accuracy: Accuracy in the unit of the axis (percent where the metric is the accuracy).
        shape: What kind of trial it is.
        title: The text shown on hover.
        front: Whether front.json lists it.
        low_ms: Lower end of the latency's interval; None draws no error bar.
        high_ms: Upper end of the latency's interval.
        label: Text written beside the mark.
    """

    latency_ms: float
    accuracy: float
    shape: Shape
    title: str
    front: bool = False
    low_ms: float | None = None
    high_ms: float | None = None
    label: str = ""


@dataclass(frozen=True)
class Span:
    """One trial in the timeline: its start, its length (None while it runs), its Optuna state."""

    start: datetime
    seconds: float | None
    state: str
    title: str


@dataclass(frozen=True)
class Axis:
    """Maps values in [low, high] to pixels in [start, end]; values outside stick to the nearer end."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def around(cls, values: Sequence[float], start: float, end: float, *, may_log: bool = False) -> Axis:
        """An axis with some air around `values`; logarithmic if allowed and they span more than 10 times."""
        low, *_, high = sorted([*values, *values] or [0.0, 1.0])
        if may_log and low > 0 and high > 10 * low:
            return cls(low / 1.2, high * 1.2, start, end, log=True)
        air = (high - low) * 0.07 or abs(high) * 0.1 or 1.0
        return cls(max(0.0, low - air) if low >= 0 else low - air, high + air, start, end)

    def at(self, value: float) -> float:
        """The pixel of `value`."""
        low, high, value = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """Round values within the axis, about five, with their texts."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            marks = [digit * 10.0**power for power in powers for digit in (1, 2, 5)]
            return [(value, f"{value:g}") for value in marks if self.low <= value <= self.high]
        raw = (self.high - self.low) / 5
        unit = 10.0 ** math.floor(math.log10(raw))
        step = unit * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * unit >= raw * 0.999)
        digits = next(n for n in range(15) if math.isclose(round(step, n), step, rel_tol=1e-6))
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(index * step, f"{index * step:.{digits}f}") for index in range(first, last + 1)]


class _Svg:
    """A drawing under construction: escapes text and gives every class its own colours."""

    def __init__(self, height: float, label: str) -> None:
        self.root = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "font-family": _FONT})
        self.root.attrib |= {"width": str(_WIDTH), "height": f"{height:g}", "font-size": "13"}
        self.root.attrib |= {
            "viewBox": f"0 0 {_WIDTH} {height:g}",
            "role": "img",
            "aria-label": _clean(label),
        }
        self.add("rect", "paper", x=0.5, y=0.5, width=_WIDTH - 1, height=height - 1, rx=8)

    def add(self, tag: str, css: str, title: str = "", **attributes: float | str) -> ET.Element:
        element = ET.SubElement(self.root, tag, {"class": css} | _STYLES[css])
        for name, value in attributes.items():
            text = value if isinstance(value, str) else f"{round(value, 1):g}"
            element.set(name.replace("_", "-"), _clean(text))
        if title:
            ET.SubElement(element, "title").text = _clean(title)
        return element

    def text(self, x: float, y: float, text: str, css: str = "soft", **attributes: float | str) -> None:
        self.add("text", css, "", x=x, y=y, **attributes).text = _clean(text)

    def line(self, css: str, x1: float, y1: float, x2: float, y2: float) -> None:
        self.add("line", css, x1=x1, y1=y1, x2=x2, y2=y2)

    def marker(self, css: str, x: float, y: float, *, shape: str, title: str = "") -> None:
        size = 5.5 if css in ("front", "test", "baseline") else 4.2
        if shape == "infeasible":
            self.add("path", css, title, d=f"M{x - 4:.1f} {y - 4:.1f}l8 8m0 -8l-8 8")
        elif shape == "uniform":
            self.add("rect", css, title, x=x - size, y=y - size, width=2 * size, height=2 * size)
        elif shape in ("dense", "baseline"):
            r = size * 1.4
            self.add("path", css, title, d=f"M{x - r:.1f} {y:.1f}l{r:g} {-r:g}l{r:g} {r:g}l{-r:g} {r:g}z")
        elif shape == "below":
            self.add("path", css, title, d=f"M{x - 5:.1f} {y - 9:.1f}h10l-5 8z")
        else:
            self.add("circle", css, title, cx=x, cy=y, r=size)

    def across(self, axis: Axis, y: float, name: str) -> None:
        for value, text in axis.ticks():
            self.line("axis", axis.at(value), y, axis.at(value), y + 5)
            self.text(axis.at(value), y + 20, text, text_anchor="middle")
        self.line("axis", axis.start, y, axis.end, y)
        self.text((axis.start + axis.end) / 2, y + 42, name, text_anchor="middle")

    def up(self, axis: Axis, left: float, right: float, name: str = "") -> None:
        for value, text in axis.ticks():
            self.line("grid", left, axis.at(value), right, axis.at(value))
            self.text(left - 8, axis.at(value) + 4, text, text_anchor="end")
        x, y = left - 52, (axis.start + axis.end) / 2
        self.text(x, y, name, text_anchor="middle", transform=f"rotate(-90 {x:g} {y:g})")

    def legend(self, y: float, items: Iterable[tuple[str, str, str]], x: float = 30) -> None:
        for css, shape, name in items:
            self.marker(css, x, y - 4, shape=shape)
            self.text(x + 11, y, name, font_size=12)
            x += 34 + 6.2 * len(name)

    def done(self) -> str:
        return ET.tostring(self.root, encoding="unicode") + "\n"


class _Labels:
    """Writes texts beside marks where they cover neither each other nor a mark."""

    def __init__(self, svg: _Svg, across: Axis, up: Axis, marks: Sequence[Mark]) -> None:
        self.svg, self.across, self.up = svg, across, up
        centres = [(across.at(mark.latency_ms), up.at(mark.accuracy)) for mark in marks]
        self.taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in centres]

    def write(self, mark: Mark) -> None:
        x, y, width = self.across.at(mark.latency_ms), self.up.at(mark.accuracy), 7.9 * len(mark.label)
        lefts = (x - width / 2, x + 9, x - width - 9)
        boxes = [(left, y + down - 12, left + width, y + down + 3) for down in (-11, 21, 4) for left in lefts]
        box = min([box for box in boxes if self._inside(box)] or boxes, key=self._covered)
        self.taken.append(box)
        self.svg.text(box[0], box[3] - 3, mark.label, "halo", font_weight="600")

    def _inside(self, box: tuple[float, float, float, float]) -> bool:
        fits_across = self.across.start <= box[0] and box[2] <= self.across.end + 8
        return fits_across and self.up.end - 4 <= box[1] and box[3] <= self.up.start - 2

    def _covered(self, box: tuple[float, float, float, float]) -> float:
        left, top, right, bottom = box
        sides = [(min(right, c) - max(left, a), min(bottom, d) - max(top, b)) for a, b, c, d in self.taken]
        return sum(max(0.0, width) * max(0.0, height) for width, height in sides)


def front_chart(
    validation: Sequence[Mark], test: Sequence[Mark], *, title: str, subtitle: str, accuracy_name: str
) -> str:
    """The picture of the front: every trial on the validation split, and apart from it the test split.

    Both halves share the accuracy axis, which is chosen for the front and the baseline; trials below it are
    drawn as triangles at its lower end.

    Args:
        validation: Baseline, front and all other trials, as measured on the validation split.
        test: Baseline and front as measured on the test split; empty while the run isn't verified.
        title: Heading of the picture.
        subtitle: One line below it.
        accuracy_name: Name of the accuracy axis with its unit.

    Returns:
        A complete SVG document.
    """
    svg = _Svg(500, f"{title}. {subtitle}")
    svg.text(24, 34, title, "ink", font_size=19, font_weight="600")
    svg.text(24, 56, subtitle)
    drawn = {_css(mark) for mark in validation} | ({"test"} if test else set())
    svg.legend(84, [(css, css, name) for css, name in _LEGEND.items() if css in drawn])
    anchors = [mark for mark in [*validation, *test] if mark.front or mark.shape == "baseline"]
    heights = [mark.accuracy for mark in anchors or validation]
    floor = min(heights, default=0) - 0.6 * (max(heights, default=0) - min(heights, default=0))
    heights += [mark.accuracy for mark in validation if mark.accuracy >= floor]
    up = Axis.around(heights, 430, 142)
    _panel(svg, 84, 600, up, validation, accuracy_name)
    svg.text(84, 118, "Validation: what the search saw", "ink", font_weight="600")
    svg.text(676, 118, "Test: measured after the search", "ink", font_weight="600")
    if test:
        _panel(svg, 676, 974, up, test)
    else:
        svg.text(825, 270, "Not verified yet:", "ink", text_anchor="middle", font_weight="600")
        svg.text(825, 292, "the test split is still untouched", text_anchor="middle")
    return svg.done()


def _css(mark: Mark) -> str:
    return "front" if mark.front else mark.shape


def _panel(svg: _Svg, left: float, right: float, up: Axis, marks: Sequence[Mark], name: str = "") -> None:
    """One half of the picture; the validation half is the one that names the axis `up`."""
    ends = [end for mark in marks for end in (mark.low_ms, mark.latency_ms, mark.high_ms) if end is not None]
    across = Axis.around(ends, left, right, may_log=True)
    svg.up(up, left, right, name)
    svg.across(across, up.start, f"latency of one batch, median (ms{', logarithmic' if across.log else ''})")
    front = [mark for mark in marks if mark.front]
    if front and name:
        _step(svg, across, up, front)
    below = 0
    for mark in sorted(marks, key=lambda mark: _ORDER.index(_css(mark))):
        css = "test" if mark.front and not name else _css(mark)
        x, y = across.at(mark.latency_ms), up.at(mark.accuracy)
        if mark.front and mark.low_ms is not None and mark.high_ms is not None:
            low, high = across.at(mark.low_ms), across.at(mark.high_ms)
            svg.add("path", f"bar-{css}", d=f"M{low:.1f} {y - 4:.1f}v8m0 -4H{high:.1f}m0 -4v8")
        outside = mark.accuracy < up.low
        below += outside
        svg.marker(css, x, y, shape="below" if outside else mark.shape, title=mark.title)
    if below:
        text = f"{below} {'trial' if below == 1 else 'trials'} below this axis"
        svg.text(right, up.start - 14, text, text_anchor="end", font_size=12)
    labels = _Labels(svg, across, up, [mark for mark in marks if mark.front or mark.shape == "baseline"])
    for mark in marks:
        if mark.label:
            labels.write(mark)


def _step(svg: _Svg, across: Axis, up: Axis, front: Sequence[Mark]) -> None:
    """The best accuracy at or below each latency; a third objective may put front points under the line."""
    ordered = sorted(front, key=lambda mark: (mark.latency_ms, -mark.accuracy))
    best = ordered[0].accuracy
    path = f"M{across.at(ordered[0].latency_ms):.1f} {up.start:.1f}V{up.at(best):.1f}"
    for mark in ordered[1:]:
        if mark.accuracy > best:
            best = mark.accuracy
            path += f"H{across.at(mark.latency_ms):.1f}V{up.at(best):.1f}"
    svg.add("path", "step", d=f"{path}H{across.end:.1f}")


def hypervolume_chart(curve: Sequence[tuple[int, float]], *, baseline: float, unit: str) -> str:
    """The hypervolume over trial numbers, as a complete SVG document.

    Args:
        curve: Pairs of trial number and hypervolume after it, not empty.
        baseline: The hypervolume of the baseline alone, drawn as a dashed line.
        unit: Unit of the hypervolume.
    """
    svg = _Svg(290, f"Hypervolume over {len(curve)} trials, at last {curve[-1][1]:.3g} {unit}")
    up = Axis.around([0.0, baseline, *(value for _, value in curve)], 230, 24)
    across = Axis(min(0, curve[0][0]), max(curve[-1][0], curve[0][0] + 1), 84, 974)
    svg.up(up, 84, 974, f"hypervolume ({unit})")
    svg.across(across, 230, "trial")
    path = f"M{across.at(curve[0][0]):.1f} {up.at(curve[0][1]):.1f}"
    for trial, value in curve[1:]:
        path += f"H{across.at(trial):.1f}V{up.at(value):.1f}"
    svg.add("path", "area", d=f"{path}V{up.start:.1f}H{across.at(curve[0][0]):.1f}z")
    svg.add("path", "step", d=path)
    svg.add("line", "dense", x1=84, y1=up.at(baseline), x2=974, y2=up.at(baseline), stroke_dasharray="5 4")
    svg.text(970, up.at(baseline) - 6, "baseline alone", text_anchor="end", font_size=12)
    return svg.done()


def timeline_chart(spans: Sequence[Span]) -> str:
    """When each trial ran, one lane per trial at a time, as a complete SVG document; `spans` isn't empty."""
    first = min(span.start for span in spans)
    starts = [(span.start - first).total_seconds() for span in spans]
    last = max(start + (span.seconds or 0.0) for start, span in zip(starts, spans, strict=True)) or 1.0
    size, unit = (3600, "h") if last >= 3 * 3600 else (60, "min") if last >= 180 else (1, "s")
    ends, bars = list[float](), list[tuple[Span, float, float, int]]()
    for start, span in sorted(zip(starts, spans, strict=True), key=lambda pair: pair[0]):
        end = last if span.seconds is None else start + span.seconds
        # Clocks of two processes may disagree a little; that must not open another lane.
        lane = next((i for i, free in enumerate(ends) if free <= start + last / 500), len(ends))
        ends[lane : lane + 1] = [end]
        bars.append((span, start, end, lane))
    bottom = 54 + 26 * len(ends)
    svg = _Svg(bottom + 56, f"Timeline of {len(spans)} trials in {len(ends)} lanes")
    present = [state for state in STATES if any(span.state == state for span in spans)]
    svg.legend(30, [(state, "uniform", STATES[state]) for state in present])
    across = Axis(0.0, last / size, 84, 974)
    svg.across(across, bottom, f"time since the first trial ({unit})")
    for span, start, end, lane in bars:
        left, right = across.at(start / size), across.at(end / size)
        css, width = span.state if span.state in STATES else "pruned", max(right - left - 1, 1.5)
        svg.add("rect", css, span.title, x=left, y=50 + 26 * lane, width=width, height=20)
    for lane in range(len(ends)):
        svg.text(76, 64 + 26 * lane, f"lane {lane + 1}", text_anchor="end", font_size=12)
    return svg.done()


def _clean(text: str) -> str:
    """`text` without the characters that XML 1.0 can't hold, not even escaped."""
    return re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)
