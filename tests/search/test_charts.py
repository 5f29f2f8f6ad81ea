import itertools
import xml.etree.ElementTree as ET
from datetime import datetime, timedelta

import pytest

from paretune.search.charts import (
    Axis,
    Mark,
    Span,
    front_chart,
    hypervolume_chart,
    timeline_chart,
)


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        pytest.param(0, 10, ["0", "2", "4", "6", "8", "10"], id="integers"),
        pytest.param(91.21, 92.3, ["91.25", "91.50", "91.75", "92.00", "92.25"], id="quarters"),
        pytest.param(0.0011, 0.0049, ["0.002", "0.003", "0.004"], id="small"),
        pytest.param(0, 12000, ["0", "2500", "5000", "7500", "10000"], id="large"),
    ],
)
def test_ticks_are_round_numbers_within_the_axis(low: float, high: float, texts: list[str]) -> None:
    ticks = Axis(low, high, 0, 100).ticks()
    assert [text for _, text in ticks] == texts
    assert [float(text) for text in texts] == pytest.approx([value for value, _ in ticks])


def test_the_axis_is_logarithmic_only_beyond_a_factor_of_ten() -> None:
    assert not Axis.around([1, 9.9], 0, 100, may_log=True).log
    assert not Axis.around([0, 99], 0, 100, may_log=True).log
    axis = Axis.around([1, 100], 0, 100, may_log=True)
    assert axis.log
    assert axis.at(10) == pytest.approx(50)
    assert [text for _, text in axis.ticks()] == ["1", "2", "5", "10", "20", "50", "100"]


@pytest.mark.parametrize("values", [[], [3.0], [0.0], [-2.0, -2.0]], ids=["none", "one", "zero", "equal"])
def test_an_axis_without_a_range_still_has_one(values: list[float]) -> None:
    axis = Axis.around(values, 0, 100)
    assert axis.low < axis.high
    assert len(axis.ticks()) >= 2
    assert all(0 <= axis.at(value) <= 100 for value in values)


def test_values_outside_stick_to_the_end_of_the_axis() -> None:
    axis = Axis(1, 2, 400, 100)
    assert (axis.at(0), axis.at(1.5), axis.at(7)) == (400, 250, 100)


def _elements(svg: str, css: str) -> list[ET.Element]:
    return [element for element in ET.fromstring(svg).iter() if element.get("class") == css]


def _draw(validation: list[Mark], test: list[Mark]) -> str:
    return front_chart(validation, test, title="run", subtitle="target", accuracy_name="accuracy (%)")


FRONT = [
    Mark(latency, accuracy, "trial", f"{latency}", front=True) for latency, accuracy in ((4, 92), (2, 90), (1, 86))
]


def test_the_front_line_is_a_step_that_only_rises() -> None:
    # A third objective (say, the size) keeps a point on the front that this picture shows below the line.
    (line,) = _elements(_draw([*FRONT, Mark(3, 88, "trial", "small", front=True)], []), "step")
    path = line.get("d", "")
    heights = [float(part.split("H")[0]) for part in path.split("V")[1:]]
    assert len(heights) == 3
    assert heights == sorted(heights, reverse=True)


def test_trials_far_below_the_front_are_kept_at_the_edge_and_counted() -> None:
    svg = _draw([*FRONT, Mark(2, 10, "trial", "collapsed"), Mark(3, 85, "trial", "near")], [])
    text = "".join(ET.fromstring(svg).itertext())
    assert "1 trial below this axis" in text
    assert "collapsed" in text


def test_error_bars_belong_to_points_of_the_front_alone() -> None:
    bars = [
        Mark(2, 90, "trial", "front", front=True, low_ms=1.9, high_ms=2.1),
        Mark(3, 85, "trial", "x", low_ms=2, high_ms=4),
    ]
    assert len(_elements(_draw(bars, []), "bar-front")) == 1
    svg = _draw(bars, bars[:1])
    assert (len(_elements(svg, "bar-front")), len(_elements(svg, "bar-test"))) == (1, 1)


def test_neighbouring_labels_do_not_cover_each_other() -> None:
    marks = [Mark(2 + 0.01 * index, 90, "trial", "", front=True, label=f"label {index}") for index in range(4)]
    labels = _elements(_draw([*FRONT, *marks], []), "halo")
    places = [(float(label.get("x", "")), float(label.get("y", ""))) for label in labels]
    assert len(places) == 4
    assert all(abs(a[0] - b[0]) > 50 or abs(a[1] - b[1]) > 10 for a, b in itertools.combinations(places, 2))


@pytest.mark.parametrize("marks", [[], [Mark(1.0, 50.0, "pruned", "")]], ids=["nothing", "one stopped trial"])
def test_a_picture_without_a_front_is_still_a_picture(marks: list[Mark]) -> None:
    svg = _draw(marks, [])
    assert "Not verified yet" in svg
    assert not _elements(svg, "step")
    assert "nan" not in svg


def test_texts_that_xml_cannot_hold_are_made_harmless() -> None:
    svg = front_chart(
        [Mark(1, 2, "trial", "\x00<b>&\ud800")], [], title="a\x1b<c>", subtitle='"', accuracy_name="</text>"
    )
    texts = list(ET.fromstring(svg.encode()).itertext())
    assert "\ufffd<b>&\ufffd" in texts
    assert "a\ufffd<c>" in texts
    assert "</text>" in texts


def test_the_hypervolume_is_drawn_with_the_baseline() -> None:
    svg = hypervolume_chart([(0, 0.0), (3, 5.0), (4, 9.0)], baseline=5.0, unit="ms")
    assert "baseline alone" in svg
    (line,) = _elements(svg, "step")
    assert line.get("d", "").count("H") == 2
    assert hypervolume_chart([(7, 0.0)], baseline=0.0, unit="ms")


def test_trials_at_the_same_time_lie_in_different_lanes() -> None:
    start = datetime(2025, 3, 1)
    seconds = [(0, 60), (1, 60), (60, 30), (61.5, None)]
    spans = [Span(start + timedelta(seconds=at), length, "COMPLETE", f"{at}") for at, length in seconds]
    bars = [bar for bar in _elements(timeline_chart(spans), "COMPLETE") if bar.find("{*}title") is not None]
    lanes = [bar.get("y") for bar in bars]
    assert lanes[0] == lanes[2]
    assert lanes[1] == lanes[3]
    assert lanes[0] != lanes[1]


def test_a_timeline_of_one_running_trial_of_an_unknown_state_is_drawn() -> None:
    svg = timeline_chart([Span(datetime(2025, 3, 1), None, "PAUSED", "only")])
    assert "only" in "".join(ET.fromstring(svg).itertext())
