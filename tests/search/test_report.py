import csv
import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from paretune.errors import JobError
from paretune.search.report import write_report

HOSTILE = """block<script>alert("1")</script>&'\u2028x"""
LAYERS = ["stem", "block1.conv1", "block1.conv2", "block2.conv1", "block2.conv2", HOSTILE, "head"]
COLUMNS = [
    *("trial", "state", "source", "accuracy", "latency_ms", "latency_low_ms", "latency_high_ms", "speedup"),
    *("size_bytes", "params", "macs", "feasible", "rungs", "steps", "seconds", "started", "plan_hash", "error"),
]


def _metrics(accuracy: float, latency: float) -> dict[str, float]:
    interval = {"latency_low_ms": latency * 0.98, "latency_high_ms": latency * 1.03}
    costs = {"size_bytes": int(latency * 90_000), "params": int(latency * 85_000), "macs": int(latency * 4e6)}
    return {"accuracy": accuracy, "latency_ms": latency, "speedup": 6.1 / latency, **interval, **costs}


def _point(trial: int, accuracy: float, latency: float) -> dict[str, Any]:
    bits = {name: 8 for index, name in enumerate(LAYERS) if (index + trial) % 3}
    ratios = {name: ((index + trial) % 8) / 10 for index, name in enumerate(LAYERS[1:-1])}
    plan = {
        "schema": 1,
        "prune": {"ratios": ratios, "importance": "l1"},
        "quantize": {"bits": bits},
        "finetune": {"learning_rate": 0.001, "temperature": 4.0, "distillation_weight": 0.5},
    }
    measured = {"validation": _metrics(accuracy, latency), "test": _metrics(accuracy - 0.006, latency * 1.01)}
    return {
        "trial": trial,
        "plan": plan,
        "plan_hash": "0" * 64,
        "artifact": f"trials/{trial}/verified",
        **measured,
    }


def _front() -> dict[str, Any]:
    curve = [(12, 0.874, 1.31), (71, 0.9012, 1.72), (33, 0.9131, 2.05), (90, 0.9187, 2.9), (48, 0.9213, 4.1)]
    return {
        "schema": 1,
        "run": "fashion <resnet20>",
        "verified": True,
        "metric": "accuracy",
        "target": {"runtime": "openvino", "device": "CPU", "batch_size": 32, "threads": 1},
        "objectives": [
            {"name": "accuracy", "direction": "maximize"},
            {"name": "latency_ms", "direction": "minimize"},
        ],
        "baseline": {"format": "bf16", "validation": _metrics(0.92, 6.1), "test": _metrics(0.917, 6.1)},
        "points": [_point(*values) for values in curve],
    }


def _trial(number: int) -> dict[str, Any]:
    sources = {0: "dense", 1: "uniform", 2: "uniform", 3: "uniform"}
    row: dict[str, Any] = {"trial": number, "state": "COMPLETE", "source": sources.get(number, "sampler")}
    row |= {
        "started": f"2025-03-01T{8 + number // 60:02}:{number % 60:02}:00+00:00",
        "seconds": 110 + number % 7,
    }
    latency = 6.0 if number == 0 else 1.5 + (number * 37 % 100) / 22
    row |= _metrics(0.925 - 0.09 / latency - (number * 53 % 97) / 1500, latency)
    row |= {"feasible": "true", "plan_hash": f"{number:064x}", "steps": 200}
    if number % 11 == 5:
        row |= {
            "state": "FAIL",
            "accuracy": "",
            "error": f"layer {HOSTILE}\nran as float, not int8 (trial {number})",
        }
    elif number % 5 == 4:
        shown = {"rungs": "0.25:0.612 0.5:0.9025", "steps": 110}
        row |= {"state": "PRUNED", "accuracy": "", "speedup": "", "feasible": "", **shown}
    elif number % 17 == 8:
        row |= {"feasible": "false", "accuracy": 0.42}
    return row


def _write(run: Path, front: dict[str, Any] | None, trials: list[dict[str, Any]]) -> Path:
    run.mkdir(parents=True)
    if front:
        (run / "front.json").write_text(json.dumps(front), encoding="utf-8")
    with (run / "trials.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*COLUMNS, f"bits/{HOSTILE}"], restval="")
        writer.writeheader()
        writer.writerows(trials)
    layers = [
        {
            "name": name,
            "kind": "Conv2d",
            "widths": [8, 16],
            "params": 2304,
            "macs": 1_800_000,
            "latency_share": 0.12,
        }
        | {"group": name if 0 < index < len(LAYERS) - 1 else None}
        for index, name in enumerate(LAYERS)
    ]
    frozen = [
        {"layer": "head", "reason": "the output layer"},
        {"layer": "stem", "reason": "feeds a <reshape>"},
    ]
    analysis = {"groups": [], "frozen": frozen, "layers": layers, "params": 270_000, "macs": 41_000_000}
    (run / "analysis.json").write_text(json.dumps(analysis), encoding="utf-8")
    (run / "environment.json").write_text(json.dumps({"python": "3.12", "cpu": {"name": "some <cpu>", "cores": 2}}))
    (run / "job.yaml").write_text("name: fashion\nstorage: postgresql://me:secret@host/db\n", encoding="utf-8")
    return run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return _write(tmp_path / "results" / "fashion", _front(), [_trial(number) for number in range(100)])


def _text(html: str) -> str:
    """What a reader sees: no scripts, styles or tags."""
    return re.sub(r"<[^>]+>", " ", re.sub(r"<(script|style)>.*?</\1>", "", html, flags=re.S))


def _rows(html: str) -> list[str]:
    body = re.search(r'<table class="full sortable">.*?<tbody>(.*?)</tbody>', html, flags=re.S)
    assert body
    return re.findall(r"<tr.*?</tr>", body[1], flags=re.S)


def _svgs(html: str) -> list[ET.Element]:
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", html, flags=re.S)]


def test_the_table_has_the_baseline_first_and_every_point_of_the_front(run: Path) -> None:
    rows = _rows(write_report(run).read_text(encoding="utf-8"))
    assert [re.search(r"(baseline \(bf16\)|trial \d+)", row)[0] for row in rows] == [  # type: ignore[index]
        "baseline (bf16)",
        *(f"trial {number}" for number in (12, 71, 33, 90, 48)),
    ]
    knee = _text(rows[3])
    for shown in ("91.31", "90.71", "\u22120.99", "2.07 [2.03, 2.13]", "2.95\u00d7", "trials/33/verified"):
        assert shown in knee
    assert f"paretune export {run} --trial 33" in knee


def test_picks_and_headline_name_fastest_knee_and_most_accurate(run: Path) -> None:
    html = write_report(run).read_text(encoding="utf-8")
    picks = {re.search(r"trial-(\d+)", row)[1]: re.findall(r'"pick">([^<]+)', row) for row in _rows(html)[1:]}  # type: ignore[index]
    assert picks == {"12": ["fastest"], "71": [], "33": ["knee"], "90": [], "48": ["most accurate"]}
    assert (
        "The knee (trial 33) is 2.95 times faster than the bf16 baseline at 0.99 points less accuracy (test)." in html
    )


def test_validation_and_test_are_told_apart(run: Path) -> None:
    html = write_report(run).read_text(encoding="utf-8")
    picture = _svgs(html)[0]
    titles = {css: _titles(picture, css) for css in ("front", "test")}
    assert any("91.31" in title for title in titles["front"])
    assert not any("91.31" in title for title in titles["test"])
    assert any("90.71" in title for title in titles["test"])
    assert html.count('<td class="validation"') == html.count('<td class="test"') / 2 == 6


def _titles(svg: ET.Element, css: str) -> list[str]:
    found = [element for element in svg.iter() if element.get("class") == css]
    return [title.text or "" for element in found for title in element if title.tag.endswith("title")]


def test_every_drawn_trial_is_of_its_own_kind(run: Path) -> None:
    picture = ET.fromstring(Path(write_report(run).parent / "front.svg").read_text(encoding="utf-8"))
    drawn = {css: len(_titles(picture, css)) for css in ("front", "test", "uniform", "dense", "baseline")}
    assert drawn == {"front": 5, "test": 5, "uniform": 3, "dense": 1, "baseline": 2}
    label = picture.get("aria-label") or ""
    assert "openvino on CPU, batch size 32, 1 thread" in label
    assert "100 trials: 72 complete (4 of them infeasible), 19 stopped early, 9 failed" in label


def test_stopped_trials_are_drawn_at_their_last_rung_and_counted(run: Path) -> None:
    html = write_report(run).read_text(encoding="utf-8")
    picture, _, timeline = _svgs(html)
    titles = _titles(picture, "pruned")
    assert len(titles) == 19
    assert titles[0] == "trial 4 (sampler): 90.25\u202f%, 3.68 [3.61, 3.79] ms, stopped early at 50%"
    assert "trial 4 stopped early at 50%, 114.0 s" in _titles(timeline, "PRUNED")
    assert (
        "19 trials were stopped early, out of reach of the front: that saved 1,710 training steps, 9% of what" in html
    )
    assert "saved" not in write_report(_write(run / "other", _front(), [_trial(0), _trial(1)])).read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize("rungs", ["", "0.25", "0.25:", "x:y"])
def test_a_trial_that_was_stopped_before_its_first_rung_is_not_drawn(tmp_path: Path, rungs: str) -> None:
    run = _write(tmp_path / "run", _front(), [_trial(0), _trial(4) | {"rungs": rungs}])
    picture, _, timeline = _svgs(write_report(run).read_text(encoding="utf-8"))
    assert _titles(picture, "pruned") == []
    assert _titles(timeline, "PRUNED") == ["trial 4 stopped early, 114.0 s"]


def test_hostile_names_are_escaped_everywhere(run: Path) -> None:
    html = write_report(run).read_text(encoding="utf-8")
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert" in html
    assert "fashion <resnet20>" not in html
    assert "feeds a &lt;reshape&gt;" in html
    assert html.count("<script>") == 1


def test_the_report_needs_nothing_from_outside_and_is_small(run: Path) -> None:
    path = write_report(run)
    html = path.read_text(encoding="utf-8")
    links = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]*)""", html)
    assert links
    assert all(link.startswith("#") for link in links)
    assert not re.findall(r"@import|url\(", html)
    assert path.stat().st_size < 150_000
    assert {file.name for file in run.iterdir() if file.suffix == ".part"} == set()


def test_the_pictures_are_valid_xml_with_a_text_for_screen_readers(run: Path) -> None:
    svgs = _svgs(write_report(run).read_text(encoding="utf-8"))
    assert len(svgs) == 3
    assert all(svg.get("role") == "img" and svg.get("aria-label") for svg in svgs)


def test_the_layer_map_shows_bits_as_text_and_pruning_as_colour(run: Path) -> None:
    html = write_report(run).read_text(encoding="utf-8")
    row = re.search(r'<th scope="row" title="group block1.conv2">.*?</tr>', html, flags=re.S)
    assert row
    cells = re.findall(r'<td class="c ([^"]+)"[^>]*>([^<]+)<', row[0])
    # Layer 2 of the fixture in the trials 12, 71, 33, 90, 48: 8 bits unless 3 divides 2 + trial.
    assert [text for _, text in cells] == ["8", "8", "8", "8", "8"]
    assert [css for css, _ in cells] == [f"r{(1 + trial) % 8}" for trial in (12, 71, 33, 90, 48)]
    stem = re.search(r'<th scope="row">stem</th>.*?</tr>', html, flags=re.S)
    assert stem
    assert re.findall(r'"c fixed">([^<]+)<', stem[0]) == ["bf16", "8", "bf16", "bf16", "bf16"]


def test_failures_frozen_layers_environment_job_and_command_are_there(run: Path) -> None:
    text = _text(write_report(run, command="paretune run examples/fashion.yaml").read_text(encoding="utf-8"))
    for number in (5, 16, 27, 38, 49, 60, 71, 82, 93):
        assert f"ran as float, not int8 (trial {number})" in text
    for shown in ("the output layer", "some &lt;cpu&gt;", "cpu.cores", "paretune run examples/fashion.yaml"):
        assert shown in text
    assert "paretune run job.yaml" not in text
    assert "How to read this" in text


def test_passwords_of_storage_urls_stay_out(run: Path) -> None:
    html = write_report(run, command="paretune run job.yaml -o storage=mysql://root:hunter2@db/x").read_text()
    assert "secret" not in html
    assert "hunter2" not in html
    assert "postgresql://me:***@host/db" in html


def test_an_unverified_run_says_so(tmp_path: Path) -> None:
    front = _front() | {"verified": False}
    for entry in [front["baseline"], *front["points"]]:
        del entry["test"]
    path = write_report(_write(tmp_path / "run", front, [_trial(number) for number in range(20)]))
    text = _text(path.read_text(encoding="utf-8"))
    assert "Not verified yet." in text
    assert "0 of 5 points of the front have been measured on the test split" in text
    assert "(validation, not verified yet)" in text
    picture = ET.fromstring((path.parent / "front.svg").read_text(encoding="utf-8"))
    assert "the test split is still untouched" in "".join(picture.itertext())


def test_one_point_without_a_test_measurement_leaves_the_run_unverified(tmp_path: Path) -> None:
    front = _front()
    del front["points"][0]["test"]
    text = _text(write_report(_write(tmp_path / "run", front, [])).read_text(encoding="utf-8"))
    assert "4 of 5 points" in text
    assert "verified on the test split" not in text


@pytest.mark.parametrize("trials", [[], [_trial(5)]], ids=["no trials", "only a failure"])
def test_a_run_without_complete_trials_still_gets_a_valid_report(tmp_path: Path, trials: list[dict[str, Any]]) -> None:
    html = write_report(_write(tmp_path / "run", None, trials)).read_text(encoding="utf-8")
    text = _text(html)
    assert "There is no front." in text
    assert "No trial is complete yet" in text
    assert "There is no hypervolume to show" in text
    assert len(_svgs(html)) == 1 + len(trials)
    assert "sortable thead" not in text


def test_an_empty_folder_gets_a_report(tmp_path: Path) -> None:
    text = _text(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "no trials yet" in text
    assert tmp_path.name in text


def test_a_running_run_says_so(tmp_path: Path) -> None:
    trials = [_trial(0), _trial(1), {"trial": 2, "state": "RUNNING", "started": "2025-03-01T08:02:00"}]
    html = write_report(_write(tmp_path / "run", _front(), trials)).read_text(encoding="utf-8")
    assert "This run isn't finished" in html
    assert any("trial 2 running" in title for title in _titles(_svgs(html)[2], "RUNNING"))


@pytest.mark.parametrize("cell", ["", "nan", "inf", "n/a"], ids=["empty", "nan", "inf", "words"])
def test_cells_without_a_finite_number_are_left_out_of_the_pictures(tmp_path: Path, cell: str) -> None:
    trials = [_trial(1), _trial(2) | {"accuracy": cell}, _trial(3) | {"latency_ms": cell}]
    html = write_report(_write(tmp_path / "run", _front(), trials)).read_text(encoding="utf-8")
    assert [title.split(":")[0] for title in _titles(_svgs(html)[0], "uniform")] == ["trial 1 (uniform)"]
    assert "nan" not in re.findall(r'\sd="[^"]*"', html)


def test_another_metric_is_not_written_in_percent(tmp_path: Path) -> None:
    text = _text(write_report(_write(tmp_path / "run", _front() | {"metric": "f1"}, [_trial(1)])).read_text())
    assert "at 0.0099 less f1 (test)" in text
    assert "91.31" not in text


def test_reports_are_reproducible(run: Path) -> None:
    assert write_report(run).read_bytes() == write_report(run).read_bytes()


def test_the_export_command_is_relative_below_the_working_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run.parent.parent)
    assert "<code>paretune export results/fashion --trial 12</code>" in write_report(run).read_text(encoding="utf-8")


def test_a_path_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="must be the folder of a run"):
        write_report(tmp_path / "missing")


@pytest.mark.parametrize("content", ["{", "[1]"], ids=["torn", "no object"])
def test_a_broken_front_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "front.json").write_text(content)
    with pytest.raises(JobError, match=r"front\.json must be"):
        write_report(tmp_path)


def test_further_targets_get_columns(tmp_path: Path) -> None:
    front = _front()
    front["targets"] = {"big": {"runtime": "onnxruntime", "device": "cpu", "batch_size": 64, "threads": 1}}
    for entry in (front["baseline"], *front["points"]):
        for split in ("validation", "test"):
            own = entry[split]
            entry[split] = own | {f"{key}@big": 10 * own[key] for key in own if key.startswith("latency")}
            entry[split]["accuracy@big"] = 0.5
            entry[split]["speedup@big"] = 1.23
    html = write_report(_write(tmp_path / "run", front, [])).read_text(encoding="utf-8")
    assert "latency on big, ms [interval]" in html
    assert "big: onnxruntime on cpu, batch size 64, 1 thread" in html
    assert html.count("1.23\u00d7") == 6
    assert f"{10 * 1.31 * 1.01:.1f} [" in html
    assert "accuracy on big" in html


def test_objectives_without_a_column_get_one(tmp_path: Path) -> None:
    front = _front()
    front["objectives"].append({"name": "energy_mj", "direction": "minimize"})
    for entry in (front["baseline"], *front["points"]):
        entry["test"]["energy_mj"] = 123.0
    html = write_report(_write(tmp_path / "run", front, [])).read_text(encoding="utf-8")
    assert "energy_mj</button>" in html
    assert html.count('data-v="123.0"') == 6


def _cells(html: str, layer: str) -> list[str]:
    row = re.search(rf'<th scope="row" title="group {layer}">.*?</tr>', html, flags=re.S)
    assert row
    return re.findall(r'<td class="c [^"]+"[^>]*>([^<]+)<', row[0])


def test_the_layer_map_shows_ranks_zeros_and_codebooks(tmp_path: Path) -> None:
    front = _front()
    first, second, third = (point["plan"] for point in front["points"][:3])
    first |= {"factorize": {"ranks": {"block1.conv2": 0.375}, "method": "spatial"}, "variant": "slim"}
    second |= {"sparsify": {"sparsity": {"block1.conv2": 0.755}}, "share": {"clusters": {"block1.conv2": 16}}}
    third |= {"schedule": {"shape": "cubic", "steps": 4}}
    html = write_report(_write(tmp_path / "run", front, [])).read_text(encoding="utf-8")
    assert _cells(html, "block1.conv2") == ["8 r38", "8 z76 k16", "8", "8", "8"]
    assert _cells(html, "block2.conv1") == [cell.split()[0] for cell in _cells(html, "block2.conv1")]
    text = re.sub(r"\s+", " ", _text(html))
    assert "architecture slim \u2013 \u2013 \u2013 \u2013" in text
    assert "cuts \u2013 \u2013 4, cubic" in text
    assert "factors of convolutions spatial \u2013" in text
    assert "zeros \u2013" not in text, "what no point has isn't listed"


def test_the_layer_map_knows_the_layers_of_variants(tmp_path: Path) -> None:
    front = _front()
    plan = front["points"][1]["plan"]
    plan |= {"variant": "slim", "prune": {"ratios": {"b": 0.5}}, "quantize": {"bits": {"block1.conv2": 4, "own": 8}}}
    run = _write(tmp_path / "run", front, [])
    analysis = json.loads((run / "analysis.json").read_text())
    own = [{"name": "block1.conv2", "kind": "Linear", "group": "b"}, {"name": "own", "kind": "Conv3d", "group": None}]
    (run / "analysis.json").write_text(json.dumps(analysis | {"variants": {"slim": {"layers": own}}}))
    html = write_report(run).read_text(encoding="utf-8")
    assert _cells(html, "block1.conv2") == ["8", "4", "8", "8", "8"]
    assert _cells(html, "block2.conv1")[1] == "\u2013", "slim has no such layer"
    assert _cells(html, "block2.conv1")[0] != "\u2013"
    row = re.search(r'<th scope="row">own</th>.*?</tr>', html, flags=re.S)
    assert row
    assert "Conv3d" in row[0]
    assert re.findall(r'"c fixed">([^<]+)<', row[0]) == ["\u2013", "8", *["\u2013"] * 3]
    pruned = re.search(r'<th scope="row" title="group block1.conv2">.*?</tr>', html, flags=re.S)
    assert pruned
    assert re.findall(r'"c (r\d|fixed)"', pruned[0])[1] == "r5", "by the variant's own group"


def test_the_layer_map_says_which_widths_are_only_simulated(tmp_path: Path) -> None:
    front = _front()
    plan = front["points"][0]["plan"]
    plan["quantize"] = {"bits": {"block1.conv2": 2, "block2.conv1": 8, "stem": 4}, "activations": "float"}
    plan["factorize"] = {"ranks": {"block2.conv1": 0.5}}
    run = _write(tmp_path / "run", front, [])
    executed = {"block1.conv2": 8, "block2.conv1.0": 16, "block2.conv1.1": 16, "stem": 4}
    record = run / "trials" / str(front["points"][0]["trial"]) / "record.json"
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"deployments": {"": {"executed": executed}}}))
    html = write_report(run).read_text(encoding="utf-8")
    assert _cells(html, "block1.conv2")[0] == "2 (runs in 8)"
    assert _cells(html, "block2.conv1")[0] == "8 (runs in 16) r50"
    assert "(runs in" not in "".join(_cells(html, "block1.conv2")[1:]), "no record of the other trials"
    assert re.search(r"activations float( \u2013){4}", re.sub(r"\s+", " ", _text(html)))
    record.write_text("{}")
    assert _cells(write_report(run).read_text(encoding="utf-8"), "block1.conv2")[0] == "2"


def test_the_layer_map_lists_how_layers_are_quantized(tmp_path: Path) -> None:
    front = _front()
    section = {"observer": "mse", "aware": False, "granularity": "per-tensor", "affine": True, "activations": "float"}
    front["points"][0]["plan"]["quantize"] |= section
    text = re.sub(r"\s+", " ", _text(write_report(_write(tmp_path / "run", front, [])).read_text(encoding="utf-8")))
    for row in ("observer mse", "trained through quantizers no", "scales of weights per-tensor", "zero point yes"):
        assert f"{row} \u2013" in text


def test_what_each_technique_brought_is_a_table(run: Path) -> None:
    assert "What each technique brings here" not in write_report(run).read_text(encoding="utf-8")
    tried: list[dict[str, Any]] = [
        {
            "technique": "prune",
            "setting": "50% of all channels",
            "value": "",
            "left": {"latency_ms": 0.613, "macs": 0.3},
        },
        {"technique": "share", "setting": "16 <values>", "value": "", "left": {"latency_ms": 1.0, "size_bytes": 0.2}},
        {"technique": "factorize", "setting": "tucker", "value": "tucker", "left": {}},
    ]
    reasons = [(True, "saves 39% of latency_ms"), (False, "saves less than 3% of latency_ms"), (False, "no kernel")]
    tried = [
        one | {"offered": offered, "reason": reason} for one, (offered, reason) in zip(tried, reasons, strict=True)
    ]
    (run / "techniques.json").write_text(json.dumps({"tried": tried}))
    html = write_report(run).read_text(encoding="utf-8")
    section = re.search(r'<section id="techniques">(.*?)</section>', html, flags=re.S)
    assert section
    rows = [
        re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>.*?</tr>", section[1], flags=re.S)
    ]
    assert rows == [
        ["technique", "setting", "latency_ms", "macs", "size_bytes", "offered", "why"],
        ["prune", "50% of all channels", "61%", "30%", "\u2013", "yes", "saves 39% of latency_ms"],
        ["share", "16 &lt;values&gt;", "100%", "\u2013", "20%", "no", "saves less than 3% of latency_ms"],
        ["factorize", "tucker", "\u2013", "\u2013", "\u2013", "no", "no kernel"],
    ]
