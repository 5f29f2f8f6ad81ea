"""The heat map of a model's slack as a small SVG file that stands alone, without a script.

Colours are attributes, for programs that know no style sheets, and classes, by which a dark page recolours them.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET

from paretune.objectives.sensitivity import Entry
from paretune.search.slack import INK, LEGEND, LEVELS, Slack, signed

_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, Helvetica, Arial, sans-serif"
_LEGEND_WIDTH = 920
_CELL, _ROW, _TOP, _MARGIN, _LETTER = 104, 24, 122, 24, 7.4
_FILLS = {"paper": "#ffffff", "ink": INK, "soft": "#5a6772", "on": INK, "none": "#e4e8ec"}
_DARK = (
    "@media (prefers-color-scheme: dark) { .paper { fill: #1a2026 } .ink { fill: #e6eaee } .soft { fill: #9fabb6 } "
    ".none { fill: #2a323a } }"
)


def draw_heatmap(slack: Slack, title: str) -> str:
    """What compressing each layer alone adds to the loss: a row a layer, a column a technique and setting.

    Hovering over a cell shows its numbers; a cell without a number shows the reason, and one that can't be chosen is
    empty.

    Args:
        slack: Of a model.
        title: Heading of the picture.

    Returns:
        A complete SVG document.
    """
    dense = slack.sensitivity
    left = _MARGIN + max(110.0, _LETTER * max((len(row) for row in slack.rows), default=0)) + 12
    subtitle = (
        "What one layer or group compressed alone adds to the loss, before any training. "
        f"Dense: loss {dense.loss:.3f}, metric {dense.metric:.4f} on {dense.samples} validation samples."
    )
    width = max(left + _CELL * len(slack.columns), _LETTER * len(subtitle), _LEGEND_WIDTH) + 2 * _MARGIN
    height = _TOP + _ROW * len(slack.rows) + 60
    svg = _canvas(width, height, f"{title}. {subtitle}")
    _text(svg, _MARGIN, 34, title, "ink", **{"font-size": "19", "font-weight": "600"})
    _text(svg, _MARGIN, 58, subtitle, "soft")
    for place, column in enumerate(slack.columns):
        middle = left + _CELL * (place + 0.5)
        _text(svg, middle, _TOP - 28, column[0], "ink", **{"text-anchor": "middle", "font-weight": "600"})
        _text(svg, middle, _TOP - 11, column[1], "soft", **{"text-anchor": "middle"})
    for line, row in enumerate(slack.rows):
        y = _TOP + _ROW * line
        _text(svg, left - 12, y + 16, row, "ink", **{"text-anchor": "end"})
        for place, column in enumerate(slack.columns):
            if entry := slack.cells.get((row, column)):
                _cell(svg, left + _CELL * place, y, entry, slack.level(entry))
    _legend(svg, height - 24)
    return ET.tostring(svg, encoding="unicode") + "\n"


def _canvas(width: float, height: float, label: str) -> ET.Element:
    box = {"width": f"{width:.0f}", "height": f"{height:.0f}"}
    svg = ET.Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "font-family": _FONT, "font-size": "13", **box})
    svg.attrib |= {"viewBox": f"0 0 {width:.0f} {height:.0f}", "role": "img", "aria-label": _clean(label)}
    ET.SubElement(svg, "style").text = _DARK
    ET.SubElement(svg, "rect", {"class": "paper", "fill": _FILLS["paper"], **box})
    return svg


def _cell(svg: ET.Element, x: float, y: float, entry: Entry, level: int | None) -> None:
    what = f"{entry.technique} {entry.name}, {entry.setting}"
    if entry.loss_increase is None or level is None:
        css, fill, text, title = "none", _FILLS["none"], "x", f"{what}: {entry.reason}"
    else:
        css, fill, text = f"level-{level}", LEVELS[level][2], signed(entry.loss_increase)
        title = f"{what}: loss {text}, metric {0 - (entry.metric_drop or 0.0):+.4f}"
    cell = ET.SubElement(svg, "g")
    ET.SubElement(cell, "title").text = _clean(title)
    place = {"x": f"{x + 1:.1f}", "y": f"{y + 1:.1f}", "width": f"{_CELL - 2}", "height": f"{_ROW - 2}"}
    ET.SubElement(cell, "rect", {"class": css, "fill": fill, "rx": "3", **place})
    _text(cell, x + _CELL / 2, y + 17, text, "soft" if level is None else "on", **{"text-anchor": "middle"})


def _legend(svg: ET.Element, y: float) -> None:
    _text(svg, _MARGIN, y, LEGEND, "soft")
    x = _MARGIN + 6.8 * len(LEGEND)
    for place, (_, words, colour) in enumerate(LEVELS):
        box = {"x": f"{x:.1f}", "y": f"{y - 11:.1f}", "width": "14", "height": "14", "rx": "3"}
        ET.SubElement(svg, "rect", {"class": f"level-{place}", "fill": colour, **box})
        _text(svg, x + 20, y, words, "soft")
        x += 34 + _LETTER * len(words)


def _text(parent: ET.Element, x: float, y: float, text: str, css: str, **attributes: str) -> None:
    place = {"class": css, "fill": _FILLS[css], "x": f"{x:.1f}", "y": f"{y:.1f}"}
    ET.SubElement(parent, "text", place | attributes).text = _clean(text)


def _clean(text: str) -> str:
    """Without line breaks, and the characters that XML can't hold."""
    return "".join(letter if letter.isprintable() else " " for letter in text)
