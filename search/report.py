"""The report of a run: one HTML file that needs nothing else, and the picture of its front.

Reads the files of the run folder alone, so a report can be written while the run goes on, and on a machine
without the model, its data or its target.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from paretune.errors import JobError
from paretune.search import charts
from paretune.search._runfiles import (
    UNKNOWN,
    RunFiles,
    Scale,
    amount,
    describe_target,
    flat,
    last_rung,
    load_run,
    milliseconds,
    number,
    redacted,
)
from paretune.search.hypervolume import hypervolume, hypervolume_curve, losses, reference_point

Metrics = Mapping[str, Any]
Table = list[dict[str, Any]]

_AXES = ("latency_ms", "accuracy")
_ERROR_LENGTH = 600


def write_report(run: Path, *, command: str | None = None) -> Path:
    """Write ``report.html`` and ``front.svg`` into the folder of a finished or still running run.

    Args:
        run: The run folder. Missing files leave their part of the report empty, and the report says so.
        command: The command that reproduces the run; ``paretune run job.yaml`` by default.

    Returns:
        The path of the HTML file.

    Raises:
        JobError: `run` isn't a folder, or one of its files can't be read as what it should be.
    """
    if not run.is_dir():
        raise JobError("run", "must be the folder of a run", run, "use a folder below results/")
    data = load_run(run)
    picture = _front_picture(data)
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    html = pages.get_template("report.html.j2").render(
        run=data,
        target=_targets(data),
        samples=number(data.baseline.get("test"), "samples"),
        headline=_headline(data),
        counts=data.counts,
        front_picture=Markup(picture),
        running=bool(data.states["RUNNING"] or data.states["WAITING"]),
        table=_front_table(data),
        layers=_layer_map(data),
        techniques=_techniques(data),
        hypervolume=_hypervolume(data),
        timeline=_timeline(data),
        failures=_failures(data),
        environment=[(key, redacted(value)) for key, value in flat(data.environment)],
        job=redacted(data.job),
        command=redacted(command or "paretune run job.yaml"),
    )
    _replace(run / "front.svg", picture)
    _replace(run / "report.html", html)
    return run / "report.html"


def _replace(path: Path, text: str) -> None:
    # Whoever looks at the report of a run that goes on must never see half of it.
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def _targets(run: RunFiles) -> str:
    main = describe_target(run.front.get("target"))
    others = [f"{name}: {describe_target(target)}" for name, target in run.targets.items()]
    return "; ".join([main, *others]) if main else ""


def _headline(run: RunFiles) -> str:
    """One sentence: what the knee gains and what it costs, on the test split where there is one."""
    knee = next((point for point in run.points if "knee" in run.picks().get(point["trial"], [])), None)
    if knee is None:
        return ""
    split = "test" if knee.get("test") and run.baseline.get("test") else "validation"
    speedup, accuracy = number(knee[split], "speedup"), number(knee[split], "accuracy")
    reference = number(run.baseline.get(split), "accuracy")
    if not speedup or accuracy is None or reference is None:
        return ""
    speed = f"{speedup:.2f} times faster" if speedup >= 1 else f"{1 / speedup:.2f} times slower"
    change = run.scale.difference(abs(accuracy - reference))
    unit = f"{change} points" if run.scale.name == "accuracy" else change
    cost = f"{unit} {'more' if accuracy > reference else 'less'} {run.scale.name}"
    cost = cost if float(change) else f"the same {run.scale.name}"
    note = "test" if split == "test" else "validation, not verified yet"
    dense = run.baseline.get("format", "dense")
    return f"The knee (trial {knee['trial']}) is {speed} than the {dense} baseline at {cost} ({note})."


def _title(trial: object, source: str, metrics: Metrics, scale: Scale) -> str:
    speedup = number(metrics, "speedup")
    times = f", {speedup:.2f} times as fast" if speedup else ""
    source = f" ({source})" if source else ""
    return f"trial {trial}{source}: {scale.show(number(metrics, 'accuracy'))}, {milliseconds(metrics)} ms{times}"


def _mark(metrics: Metrics | None, scale: Scale, *, shape: charts.Shape, title: str, **more: Any) -> list[charts.Mark]:
    """The mark of one measurement, or none where it lacks its accuracy or latency."""
    latency, accuracy = number(metrics, "latency_ms"), number(metrics, "accuracy")
    if latency is None or accuracy is None:
        return []
    low, high = number(metrics, "latency_low_ms"), number(metrics, "latency_high_ms")
    return [charts.Mark(latency, accuracy * scale.factor, shape, title, low_ms=low, high_ms=high, **more)]


def _stopped(trial: Mapping[str, str]) -> tuple[Metrics, str]:
    """A trial's row, with the accuracy of its last rung if it was stopped there, and words that say so."""
    last = last_rung(trial) if trial.get("state") == "PRUNED" else None
    return (trial, "") if last is None else ({**trial, "accuracy": last[1]}, f", stopped early at {last[0]:.0%}")


def _shape(trial: Mapping[str, str]) -> charts.Shape:
    if trial.get("state") == "PRUNED":
        return "pruned"
    if trial.get("feasible", "").lower() == "false":
        return "infeasible"
    source = trial.get("source")
    return "uniform" if source == "uniform" else "dense" if source == "dense" else "trial"


def _front_picture(run: RunFiles) -> str:
    picks, scale = run.picks(), run.scale
    rows = {trial.get("trial", ""): trial for trial in run.trials}
    marks: dict[str, list[charts.Mark]] = {"validation": [], "test": []}
    listed = {str(point["trial"]) for point in run.points}
    for trial, row in rows.items():
        if trial not in listed and row.get("state") in ("COMPLETE", "PRUNED"):
            shown, when = _stopped(row)
            title = _title(trial, row.get("source", ""), shown, scale) + when
            marks["validation"] += _mark(shown, scale, shape=_shape(row), title=title)
    for split, found in marks.items():
        name = f"baseline {run.baseline.get('format', '')}".strip()
        baseline = run.baseline.get(split)
        title = f"{name}: {scale.show(number(baseline, 'accuracy'))}, {milliseconds(baseline)} ms"
        found += _mark(baseline, scale, shape="baseline", title=title, label=name)
        for point in run.points:
            row = rows.get(str(point["trial"]), {})
            title = _title(point["trial"], row.get("source", ""), point.get(split) or {}, scale)
            label = ", ".join(picks.get(point["trial"], []))
            found += _mark(point.get(split), scale, shape=_shape(row), title=title, label=label, front=True)
    test = marks["test"] if any(mark.front for mark in marks["test"]) else []
    subtitle = ". ".join(part for part in (_targets(run), run.counts) if part)
    return charts.front_chart(marks["validation"], test, title=run.name, subtitle=subtitle, accuracy_name=scale.axis)


def _front_table(run: RunFiles) -> Table:
    """The baseline and every point of the front; costs are those of the test split where it was measured."""
    if not run.baseline and not run.points:
        return []
    picks = run.picks()
    name = f"baseline ({run.baseline.get('format', 'dense')})"
    table = [_front_row(run, run.baseline, name=name)]
    for point in run.points:
        number = point["trial"]
        table.append(_front_row(run, point, name=f"trial {number}"))
        table[-1]["picks"] = picks.get(number, [])
        table[-1]["command"] = f"paretune export {run.shown_path} --trial {number}"
    return table


def _front_row(run: RunFiles, entry: Mapping[str, Any], *, name: str) -> dict[str, Any]:
    scale, test = run.scale, entry.get("test")
    costs = test or entry.get("validation") or {}
    validation, accuracy = (number(entry.get(split), "accuracy") for split in ("validation", "test"))
    reference, speedup = number(run.baseline.get("test"), "accuracy"), number(costs, "speedup")
    change = None if accuracy is None or reference is None else accuracy - reference
    difference = UNKNOWN if change is None else ("+" if change > 0 else "\u2212" if change < 0 else "")
    if change is not None:
        difference += scale.difference(abs(change))
    cells = [
        (scale.show(validation), validation, "validation"),
        (scale.show(accuracy), accuracy, "test"),
        (difference, change, "test"),
        (milliseconds(costs), number(costs, "latency_ms"), ""),
        (UNKNOWN if speedup is None else f"{speedup:.2f}\u00d7", speedup, ""),
        *(cell for name in run.targets for cell in _target_cells(costs, name, scale)),
        *((amount(value), value, "") for value in (number(costs, name) for name in run.further_objectives)),
        (amount(number(costs, "size_bytes"), "B"), number(costs, "size_bytes"), ""),
        (amount(number(costs, "params")), number(costs, "params"), ""),
        (amount(number(costs, "macs")), number(costs, "macs"), ""),
    ]
    shown = [{"text": text, "sort": value, "css": css} for text, value, css in cells]
    common = {
        "name": name,
        "trial": entry.get("trial"),
        "artifact": entry.get("artifact", ""),
        "cells": shown,
    }
    return {**common, "picks": [], "command": "", "verified": bool(test)}


def _target_cells(costs: Metrics, target: str, scale: Scale) -> list[tuple[str, float | None, str]]:
    """Accuracy, latency and speed-up on a further target."""
    latency, speedup = number(costs, f"latency_ms@{target}"), number(costs, f"speedup@{target}")
    accuracy = number(costs, f"accuracy@{target}")
    return [
        (scale.show(accuracy), accuracy, ""),
        (milliseconds(costs, target), latency, ""),
        (UNKNOWN if speedup is None else f"{speedup:.2f}\u00d7", speedup, ""),
    ]


def _layer_map(run: RunFiles) -> dict[str, Any]:
    """Bits and pruned ratio of every layer (rows) in every point of the front (columns)."""
    plans = [point.get("plan") or {} for point in run.points]
    layers = [_layers(run, plan) for plan in plans]
    executed = [run.executed(point["trial"]) for point in run.points]
    dense = str(run.baseline.get("format") or "float")
    rows = []
    every: dict[str, Mapping[str, Any]] = {}  # the model's own come first, and say what a layer of that name is
    for known in (_layers(run, {}), *layers):
        every |= {name: layer for name, layer in known.items() if name not in every}
    for name, layer in every.items():
        cells = [_cell(*of, name, dense) for of in zip(plans, layers, executed, strict=True)]
        share = number(layer, "latency_share")
        about = {
            "kind": layer.get("kind", ""),
            "params": amount(number(layer, "params")),
            "group": layer.get("group") or "",
        }
        rows.append({**about, "name": name, "share": UNKNOWN if share is None else f"{share:.1%}", "cells": cells})
    return {"rows": rows, "choices": _choices(plans), "dense": dense, "picks": run.picks()}


def _layers(run: RunFiles, plan: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Layers of the architecture that a plan is for, by name; those it has bits for, if no more is known."""
    analysis, variant = run.analysis, plan.get("variant")
    if variant is not None:
        analysis = (analysis.get("variants") or {}).get(variant) or {}
    named = [{"name": name} for name in (plan.get("quantize") or {}).get("bits") or {}]
    return {layer["name"]: layer for layer in analysis.get("layers") or named}


def _cell(
    plan: Mapping[str, Any], layers: Mapping[str, Any], executed: Mapping[str, int], name: str, dense: str
) -> dict[str, Any]:
    """What a plan does to a layer; nothing where the architecture that it is for doesn't have the layer."""
    if name not in layers:
        return {"text": UNKNOWN, "css": "fixed", "ratio": None}
    group = layers[name].get("group")
    ratios, bits = (plan.get("prune") or {}).get("ratios") or {}, (plan.get("quantize") or {}).get("bits") or {}
    ratio = float(ratios.get(group, 0.0)) if group else None
    text = str(bits.get(name, dense))
    runs = executed.get(name, executed.get(f"{name}.0"))  # a factorized layer runs as its factors
    if name in bits and runs not in (None, bits[name]):
        text += f" (runs in {runs})"
    css = "fixed" if ratio is None else f"r{min(9, math.ceil(ratio * 10))}"
    return {"text": " ".join([text, *_further(plan, name)]), "css": css, "ratio": ratio}


_SETTINGS = {
    "learning rate": ("finetune", "learning_rate"),
    "distillation temperature": ("finetune", "temperature"),
    "distillation weight": ("finetune", "distillation_weight"),
    "hint weight": ("finetune", "hint_weight"),
    "channel importance": ("prune", "importance"),
    "factors of convolutions": ("factorize", "method"),
    "zeros": ("sparsify", "pattern"),
    "observer": ("quantize", "observer"),
    "trained through quantizers": ("quantize", "aware"),
    "activations": ("quantize", "activations"),
    "scales of weights": ("quantize", "granularity"),
    "weights with a zero point": ("quantize", "affine"),
}
"""What holds for the whole model: its name to its place in a plan."""


def _choices(plans: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """What plans choose for the whole model; left out where all say nothing of it."""
    choices = [
        (name, [_written((plan.get(part) or {}).get(key, UNKNOWN)) for plan in plans])
        for name, (part, key) in _SETTINGS.items()
    ]
    schedules = [plan.get("schedule") or {} for plan in plans]
    choices.append(("cuts", [f"{s['steps']}, {s['shape']}" if "steps" in s else UNKNOWN for s in schedules]))
    choices.append(("architecture", [str(plan.get("variant") or UNKNOWN) for plan in plans]))
    return [(name, values) for name, values in choices if set(values) != {UNKNOWN}]


def _written(value: object) -> str:
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def _further(plan: Mapping[str, Any], layer: str) -> list[str]:
    """Beside width and channels: rank, zeros and codebook of a layer, short enough for a cell."""
    found = []
    for mark, technique, key in (("r", "factorize", "ranks"), ("z", "sparsify", "sparsity")):
        share = number((plan.get(technique) or {}).get(key), layer)
        if share:
            found.append(f"{mark}{share:.0%}".rstrip("%"))
    clusters = number((plan.get("share") or {}).get("clusters"), layer)
    return [*found, f"k{clusters:.0f}"] if clusters else found


def _techniques(run: RunFiles) -> dict[str, Any]:
    """What each technique brought when it was tried before the search: a row each, a column for each objective."""
    names = list(dict.fromkeys(name for one in run.techniques for name in one["left"]))
    rows = [
        {**one, "left": [UNKNOWN if name not in one["left"] else f"{one['left'][name]:.0%}" for name in names]}
        for one in run.techniques
    ]
    return {"names": names, "rows": rows}


def _hypervolume(run: RunFiles) -> dict[str, Any]:
    """The curve over trials and the words that say what it is relative to."""
    base, factor = run.baseline.get("validation"), run.scale.factor
    latency, accuracy = number(base, "latency_ms"), number(base, "accuracy")
    if latency is None or accuracy is None:
        return {"chart": "", "reference": "", "outside": 0}
    worst = reference_point({"latency_ms": latency, "accuracy": accuracy * factor}, _AXES)
    numbers, points = [], []
    for trial in run.trials:
        measured = number(trial, "latency_ms"), number(trial, "accuracy")
        counts = trial.get("state") == "COMPLETE" and trial.get("feasible", "").lower() != "false"
        if counts and measured[0] is not None and measured[1] is not None:
            numbers.append(int(trial["trial"]))
            points.append(losses({"latency_ms": measured[0], "accuracy": measured[1] * factor}, _AXES))
    if not points:
        return {"chart": "", "reference": "", "outside": 0}
    curve = list(zip(numbers, hypervolume_curve(points, worst), strict=True))
    unit = f"ms \u00d7 {run.scale.unit}"
    alone = hypervolume([(latency, -accuracy * factor)], worst)
    where = f"{worst[0]:.3g} ms and {run.scale.show(-worst[1] / factor)}"
    outside = sum(not all(x < bound for x, bound in zip(point, worst, strict=True)) for point in points)
    drawn = charts.hypervolume_chart(curve, baseline=alone, unit=unit)
    return {"chart": Markup(drawn), "reference": where, "outside": outside}


def _timeline(run: RunFiles) -> Markup | str:
    spans = []
    for trial in run.trials:
        try:
            start = datetime.fromisoformat(trial.get("started", "").replace("Z", "+00:00"))
        except ValueError:
            continue
        start = start if start.tzinfo else start.replace(tzinfo=timezone.utc)
        state, seconds = trial.get("state", ""), number(trial, "seconds")
        length = "" if seconds is None else f", {seconds:.1f} s"
        reason = f": {_reason(trial)}" if trial.get("error") else ""
        last = last_rung(trial) if state == "PRUNED" else None
        ended = charts.STATES.get(state, state) + (f" at {last[0]:.0%}" if last else "")
        title = f"trial {trial.get('trial')} {ended}{length}{reason}"
        spans.append(charts.Span(start, seconds, state, title))
    return Markup(charts.timeline_chart(spans)) if spans else ""


def _failures(run: RunFiles) -> Table:
    failed = [trial for trial in run.trials if trial.get("state") == "FAIL"]
    return [{"trial": trial.get("trial"), "source": trial.get("source"), "reason": _reason(trial)} for trial in failed]


def _reason(trial: Mapping[str, str]) -> str:
    reason = redacted(trial.get("error", "").strip()) or "no reason was recorded"
    if len(reason) <= _ERROR_LENGTH:
        return reason
    return f"{reason[:_ERROR_LENGTH]}\u2026 (all of it: trials/{trial.get('trial')}/error.txt)"
