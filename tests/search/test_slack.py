"""What is tried follows from the space; the tables, the picture and the sentence say what was found."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from paretune.objectives.redundancy import Redundancy
from paretune.objectives.sensitivity import Entry, Sensitivity
from paretune.search.heatmap import draw_heatmap
from paretune.search.slack import LEVELS, Slack, most_slack, print_slack, probe_of, probes_of
from paretune.spaces.analysis import Analysis, Layer
from paretune.spaces.graph import Group
from paretune.spaces.space import Options, SearchSpace

SPACE = SearchSpace(
    grids={"conv": [8, 16, 24, 32]},
    widths={"conv": (32, 8), "fc": (32, 8, 4)},
    ranks={"conv": 0.2, "fc": 0.9},
    sparse=("conv", "fc"),
    shared=("fc",),
    options=Options(methods=("tucker", "spatial"), patterns=("unstructured", "2:4"), max_sparsity=0.6),
)


def test_each_technique_is_tried_on_each_layer_alone() -> None:
    probes = probes_of(SPACE)
    tried = [(probe.technique, probe.name, probe.setting, probe.value) for probe in probes]
    assert tried == [
        ("prune", "conv", "about 50%", 0.5),
        ("quantize", "conv", "8 bits", 8),
        ("quantize", "fc", "8 bits", 8),
        ("quantize", "fc", "4 bits", 4),
        ("factorize", "fc", "tucker, 25%", 0.25),
        ("factorize", "fc", "spatial, 25%", 0.25),
        ("sparsify", "conv", "60%", 0.6),
        ("sparsify", "fc", "60%", 0.6),
        ("sparsify", "conv", "2:4", 0.5),
        ("sparsify", "fc", "2:4", 0.5),
        ("share", "fc", "16 values", 16),
    ]
    for probe in probes:
        plan = probe.plan.to_dict()
        assert probe.plan.is_resolved
        assert plan[probe.technique], "the plan does what the probe says"
        named = [name for section in plan.values() if isinstance(section, dict) for name in section.values()]
        assert [list(one) for one in named if isinstance(one, dict) and one] == [[probe.name]], "and nothing else"


def test_a_group_goes_to_the_count_nearest_to_half() -> None:
    (probe,) = probes_of(SearchSpace(grids={"conv": [8, 16, 24]}, widths={}))
    assert probe.value == pytest.approx(1 / 3, abs=1e-6)


def test_groups_that_are_ranked_together_are_tried_alone_all_the_same() -> None:
    space = SearchSpace(grids={}, widths={}, options=Options(scope="global"))
    assert [probe.name for probe in probes_of(space, {"conv": [8, 16]})] == ["conv"]
    assert probes_of(SearchSpace(grids={}, widths={}, options=Options(prune=False)), {"conv": [8, 16]}) == []


def test_any_strength_can_be_tried() -> None:
    probe = probe_of(SPACE.options, "prune", "conv", 0.25)
    assert (probe.setting, probe.value, dict(probe.plan.prune.ratios)) == ("0.25", 0.25, {"conv": 0.25})
    blocks = replace(SPACE.options, patterns=("2:4",))
    probe = probe_of(blocks, "sparsify", "fc", 0.9, "sparse")
    assert (probe.setting, probe.value, probe.plan.sparsify.sparsity) == ("sparse", 0.5, {"fc": 0.5})


ANALYSIS = Analysis(
    groups=(Group("conv", 32, ("conv", "twin"), ("fc",)),),
    frozen=(),
    layers=tuple(Layer(name, "Conv2d", 100, 1000, None) for name in ("conv", "twin", "fc")),
    params=300,
    macs=3000,
    latency_share={"conv": 0.2, "twin": 0.3, "fc": 0.4},
)
ENTRIES = (
    Entry("prune", "conv", "about 50%", 0.5, 0.9, 0.2),
    Entry("quantize", "conv", "8 bits", 8, 0.001, 0.0),
    Entry("quantize", "twin", "8 bits", 8, -0.2, -0.01),
    Entry("quantize", "fc", "8 bits", 8, 0.004, 0.0),
    Entry("factorize", "fc", "tucker, 25%", 0.25, reason="can't [be] done\n<here>"),
    Entry("share", "fc", "16 values", 16, 1.7, 0.5),
)
SLACK = Slack(
    Sensitivity(100, 0.3, 0.91, 2.3, ENTRIES),
    (
        Redundancy("conv", 0.75, 0.5, 0.25),
        Redundancy("twin", None, None, None),
        Redundancy("fc", 0.1, None, 1.0),
    ),
)


@pytest.mark.parametrize(
    ("increase", "level"),
    [(None, None), (-0.4, 0), (0.0, 0), (0.01, 0), (0.03, 1), (0.2, 2), (0.9, 3), (1.1, 4), (50.0, 4)],
)
def test_levels_are_shares_of_what_the_model_knows(increase: float | None, level: int | None) -> None:
    assert SLACK.level(Entry("quantize", "conv", "8 bits", 8, increase)) == level


def test_a_model_that_knows_nothing_has_levels_too() -> None:
    sensitivity = Sensitivity(100, 0.5, 0.0, 0.5, ())
    assert sensitivity.share_lost(0.25) == 0.5
    assert math.isfinite(Sensitivity(1, 0.0, 0.0, 0.0, ()).share_lost(1.0))


def test_most_slack_names_the_best_of_each_technique() -> None:
    assert most_slack(ANALYSIS, SLACK) == (
        "most slack: quantize fc, 8 bits (loss +0.004, 40% of the latency); "
        "prune conv, about 50% (loss +0.900, 50% of the latency)"
    )


def test_most_slack_says_when_there_is_none() -> None:
    slack = Slack(Sensitivity(100, 0.3, 0.91, 2.3, ENTRIES[-2:]), ())
    assert most_slack(ANALYSIS, slack).startswith("most slack: none")


def test_what_is_printed_has_every_number_without_colours(capsys: pytest.CaptureFixture[str]) -> None:
    print_slack(ANALYSIS, SLACK)
    text = capsys.readouterr().out
    assert "\x1b" not in text
    for value in ("0.75", "50.0%", "25.0%", "+0.900", "+0.001", "-0.200", "+1.700", "most slack: quantize fc"):
        assert value in text
    assert "x factorize fc, tucker, 25%: can't [be] done" in text


def test_colours_on_a_terminal_and_none_where_they_are_not_wanted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLORTERM", "truecolor")
    monkeypatch.delenv("NO_COLOR", raising=False)
    print_slack(ANALYSIS, SLACK)
    coloured = capsys.readouterr().out
    green, red = (tuple(int(LEVELS[level][2][i : i + 2], 16) for i in (1, 3, 5)) for level in (0, 4))
    for colour in (green, red):
        assert f"48;2;{';'.join(map(str, colour))}" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    print_slack(ANALYSIS, SLACK)
    assert "48;2;" not in capsys.readouterr().out


def test_heatmap_is_xml_with_a_cell_a_number_and_the_reasons() -> None:
    text = draw_heatmap(SLACK, 'a <"net"> & more')
    svg = ET.fromstring(text)
    assert "<script" not in text
    assert svg.get("role") == "img"
    assert (svg.get("aria-label") or "").startswith('a <"net"> & more')
    cells = {cell[0].text: cell for cell in svg.iter("{http://www.w3.org/2000/svg}g")}
    assert len(cells) == len(ENTRIES)
    assert "factorize fc, tucker, 25%: can't [be] done <here>" in cells
    quantized = cells["quantize conv, 8 bits: loss +0.001, metric +0.0000"]
    assert quantized[1].attrib["fill"] == LEVELS[0][2]
    assert cells["share fc, 16 values: loss +1.700, metric -0.5000"][1].attrib["fill"] == LEVELS[4][2]
    width, height = float(svg.attrib["width"]), float(svg.attrib["height"])
    for rect in svg.iter("{http://www.w3.org/2000/svg}rect"):
        assert float(rect.get("x", 0)) + float(rect.attrib["width"]) <= width
        assert float(rect.get("y", 0)) + float(rect.attrib["height"]) <= height
