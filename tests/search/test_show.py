"""What the terminal shows of a check, on the 80 columns that it may have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paretune.search.check import Check, Estimate
from paretune.search.show import print_check, print_front
from paretune.search.techniques import Tried
from paretune.spaces.analysis import Analysis
from paretune.spaces.space import Options, SearchSpace

SPACE = SearchSpace(
    {"a": [8, 16], "b": [8, 16]},
    {"a": (32, 8), "b": (32,)},
    Options(importance=("l1", "lamp")),
    ranks={"b": 0.5},
    variants={"slim": SearchSpace({"a": [8, 16]}, {"a": (32, 8)})},
)
TRIED = (
    Tried("factorize", "spatial, 25% of the rank", "spatial", {"latency_ms": 1.07, "size_bytes": 0.37}, False, "slow"),
    Tried(
        "quantize",
        "8 bits, weights alone, run in floats",
        "8 float",
        {"macs": 1.0, "latency_ms": 0.98, "size_bytes": 0.275},
        True,
        "saves 73% of size_bytes",
    ),
    Tried("share", "16 values a layer", "", {}, False, "excludes itself with 8 bits per channel"),
)


Show = Callable[[tuple[Tried, ...]], str]


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Show:
    monkeypatch.setenv("COLUMNS", "80")
    return lambda tried: _shown(tried, capsys)


def _shown(tried: tuple[Tried, ...], capsys: pytest.CaptureFixture[str]) -> str:
    validation: dict[str, Any] = {"accuracy": 0.9, "latency_ms": 1.0, "size_bytes": 1000}
    analysis = Analysis((), (), (), 10, 20)
    baseline = {"validation": validation, "format": "fp32"}
    print_check(Check(analysis, SPACE, baseline, Estimate(1.0, 60.0, 1000, 60000), tried))
    return capsys.readouterr().out


def test_parameters_of_layers_are_counted_for_each_architecture(show: Show) -> None:
    line = next(line for line in show(()).splitlines() if line.startswith("to choose"))
    assert line == (
        "to choose: 2 ratios, 1 bit-widths, 1 ranks, 1 ratios of slim, 1 bit-widths of slim, "
        "factorize, variant, importance, distill/temperature, distill/weight, finetune/learning_rate"
    )


def test_techniques_fit_into_80_columns(show: Show) -> None:
    table = [line for line in show(TRIED).splitlines() if "\u2502" in line]
    assert max(map(len, table)) <= 80
    rows = [[cell.strip() for cell in line.strip("\u2502").split("\u2502")] for line in table]
    assert rows[:2] == [["factorize: spatial, 25% of the rank", "107%", "37%", "no"], ["slow", "", "", ""]]
    assert ["share: 16 values a layer", "-", "-", "no"] in rows
    assert not any("100%" in row for row in rows), "multiply-accumulates have no column"


def test_a_verified_run_says_how_its_trials_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"accuracy": 0.9, "latency_ms": 1.0, "latency_low_ms": 0.9, "latency_high_ms": 1.1, "speedup": 1.0}
    baseline = {"format": "f32", "validation": metrics | {"size_bytes": 1000}}
    front = {
        "run": "small",
        "verified": True,
        "metric": "accuracy",
        "baseline": baseline,
        "points": [],
        "objectives": [],
    }
    rows = ["trial,state,feasible,rungs,steps", "0,COMPLETE,true,,40", "1,PRUNED,,0.25:0.5,10", "2,FAIL,,,"]
    (tmp_path / "trials.csv").write_text("\n".join(rows))
    print_front(tmp_path, front)
    said = capsys.readouterr().out
    assert "3 trials: 1 complete, 1 stopped early, 1 failed. 1 trial was stopped early, out of reach" in said
    assert "that saved 30 training steps, 38% of what all trials would have taken." in said
    print_front(tmp_path, front | {"verified": False})
    assert "stopped early" not in capsys.readouterr().out, "the table may be of before the run went on"


def test_every_target_has_a_column_of_latencies(show: Show) -> None:
    further = [replace(one, left={**one.left, "latency_ms@server": 1.01}) for one in TRIED]
    table = [line for line in show(tuple(further)).splitlines() if "\u2502" in line]
    assert max(map(len, table)) <= 80
    assert sum("101%" in line for line in table) == 3
