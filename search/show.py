"""Tables for the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from paretune.search._runfiles import load_run
from paretune.search.front import knee

if TYPE_CHECKING:
    from paretune.objectives.staircase import Staircase
    from paretune.search.check import Check
    from paretune.spaces.space import SearchSpace


def print_json(data: Any) -> None:
    """Print JSON to stdout."""
    json.dump(data, sys.stdout, indent=2)
    sys.stdout.write("\n")


def print_front(run: Path, front: Mapping[str, Any]) -> None:
    """Print a front as a table, the baseline first."""
    metric = front["metric"]
    table = Table(title=f"{front['run']}: {'verified front' if front['verified'] else 'front so far, not verified'}")
    for column in (
        "trial",
        f"validation {metric}",
        f"test {metric}",
        "latency ms",
        "interval",
        "speed-up",
        "size kB",
        "",
    ):
        table.add_column(column, justify="left" if column in ("trial", "") else "right")
    dense = f"dense ({front['baseline']['format']})"
    table.add_row(*_cells(dense, front["baseline"]), "baseline", style="dim")
    points = front["points"]
    best = knee(points) if points else None
    for i, point in enumerate(points):
        table.add_row(*_cells(str(point["trial"]), point), "knee" if i == best else "")
    console = Console()
    console.print(table)
    _print_objectives(console, front)
    for name in front.get("targets", {}):
        _print_target(console, front, name)
    if front["verified"]:  # before the end of the search the table of the trials isn't of now
        trials = load_run(run)
        if trials.trials:
            console.print(" ".join(filter(None, (f"{trials.counts}.", trials.saved))), highlight=False, soft_wrap=True)
    if points:
        console.print(f"paretune export {run} --knee", highlight=False, soft_wrap=True)
    if (run / "report.html").is_file():
        console.print(f"report: {run / 'report.html'}", highlight=False, soft_wrap=True)


def _print_target(console: Console, front: Mapping[str, Any], target: str) -> None:
    """Print what was measured on a further target."""
    table = Table(title=f"on {target}")
    for column in ("trial", front["metric"], "latency ms", "interval", "speed-up"):
        table.add_column(column, justify="left" if column == "trial" else "right")
    for name, entry in (("dense", front["baseline"]), *((str(point["trial"]), point) for point in front["points"])):
        suffix = f"@{target}"
        values = entry["validation"].items()
        found = {key.removesuffix(suffix): value for key, value in values if key.endswith(suffix)}
        table.add_row(
            name,
            f"{found['accuracy']:.4f}",
            f"{found['latency_ms']:.3f}",
            f"{found['latency_low_ms']:.3f} to {found['latency_high_ms']:.3f}",
            f"{found['speedup']:.2f}x",
        )
    console.print(table)


def _print_objectives(console: Console, front: Mapping[str, Any]) -> None:
    """Print the objectives that no other table shows."""
    names = [objective["name"] for objective in front["objectives"]]
    names = [name for name in names if "@" not in name and name not in ("accuracy", "latency_ms", "size_bytes")]
    if not names:
        return
    table = Table(title="further objectives")
    for column in ("trial", *names):
        table.add_column(column, justify="left" if column == "trial" else "right")
    for name, entry in (("dense", front["baseline"]), *((str(point["trial"]), point) for point in front["points"])):
        table.add_row(name, *(f"{entry['validation'][objective]:,.6g}" for objective in names))
    console.print(table)


def _cells(name: str, point: Mapping[str, Any]) -> list[str]:
    validation, test = point["validation"], point.get("test")
    return [
        name,
        f"{validation['accuracy']:.4f}",
        f"{test['accuracy']:.4f}" if test else "-",
        f"{validation['latency_ms']:.3f}",
        f"{validation['latency_low_ms']:.3f} to {validation['latency_high_ms']:.3f}",
        f"{validation['speedup']:.2f}x",
        f"{validation['size_bytes'] / 1000:,.0f}",
    ]


_PER_LAYER = {
    "prune": "ratios",
    "bits": "bit-widths",
    "rank": "ranks",
    "sparsity": "sparsities",
    "clusters": "codebooks",
}


def print_check(check: Check) -> None:
    """Print what a job will meet."""
    console = Console(soft_wrap=True, highlight=False)
    data = check.analysis.to_dict()
    table = Table(title="can be pruned")
    for column in ("group", "channels", "coupled with", "parameters", "MACs", "latency share"):
        table.add_column(column, justify="left" if column in ("group", "coupled with") else "right", overflow="fold")
    for group in data["groups"]:
        table.add_row(
            group["name"],
            str(group["channels"]),
            ", ".join(group["coupled"]),
            f"{group['params']:,}",
            f"{group['macs']:,}",
            f"{group['latency_share']:.1%}",
        )
    console.print(table)
    frozen = Table(title="stays as it is")
    frozen.add_column("layer", overflow="fold")
    frozen.add_column("why", overflow="fold")
    for entry in data["frozen"]:
        frozen.add_row(entry["layer"], entry["reason"])
    console.print(frozen)
    _print_techniques(console, check)
    _print_costs(console, check)


def _print_techniques(console: Console, check: Check) -> None:
    """A row for each technique, its reason below it: beside numbers there is no room for it on 80 columns."""
    table = Table(title="tried without training, all layers at once: what is left of latency and size")
    known = dict.fromkeys(name for one in check.techniques for name in one.left)
    names = [name for name in known if name.startswith("latency_ms")] + ["size_bytes"] * ("size_bytes" in known)
    table.add_column("technique", overflow="fold")
    for name in names:
        table.add_column(name, justify="right", overflow="fold", max_width=len("latency_ms"))
    table.add_column("offered")
    for one in check.techniques:
        left = [f"{one.left[name]:.0%}" if name in one.left else "-" for name in names]
        words = Text.assemble(f"{one.technique}: {one.setting}", (f"\n  {one.reason}", "dim"))
        table.add_row(words, *left, "yes" if one.offered else "no")
    console.print(table)


def _print_costs(console: Console, check: Check) -> None:
    measured, estimate = check.baseline["validation"], check.estimate
    console.print(
        f"baseline: accuracy {measured['accuracy']:.4f}, {measured['latency_ms']:.3f} ms "
        f"as {check.baseline['format']}, {measured['size_bytes']:,} bytes, "
        f"{check.analysis.params:,} parameters, {check.analysis.macs:,} MACs"
    )
    floats = [name for name, widths in check.space.widths.items() if len(widths) == 1]
    if floats:
        console.print(f"layers that stay in one width: {', '.join(floats)}")
    console.print(f"to choose: {_choices(check.space)}")
    console.print(
        f"about {estimate.trial_seconds:.0f} s a trial and {estimate.seconds / 60:.0f} minutes for all at the dense "
        "model's pace (pruned ones train faster), and then the verification; "
        f"{estimate.trial_bytes / 1e6:.1f} MB a trial and {estimate.bytes / 1e6:.0f} MB in all"
    )


def _choices(space: SearchSpace) -> str:
    """What there is to choose: parameters of single layers counted, for each architecture, all others by name."""
    names = list(space.distributions())
    counts: dict[str, int] = {}
    rest = names
    for prefix, whose in (("", ""), *((f"{variant}/", f" of {variant}") for variant in space.variants)):
        for kind, several in _PER_LAYER.items():
            own = [name for name in names if name.startswith(f"{prefix}{kind}/")]
            counts[several + whose] = len(own)
            rest = [name for name in rest if name not in own]
    return ", ".join([*(f"{count} {what}" for what, count in counts.items() if count), *rest]) or "nothing"


def print_staircases(found: Mapping[str, Staircase]) -> None:
    """Print latency over channels, a table for each kind of layer; counts that gain nothing are dim."""
    console = Console(soft_wrap=True, highlight=False)
    for kind, staircase in found.items():
        target = staircase.target
        table = Table(title=f"channels of {kind} on {target.runtime}, batch {target.batch_size}; * gets faster")
        table.add_column("channels", justify="right")
        for width in staircase.widths:
            table.add_column(f"{width} bits, ms", justify="right")
        cells = {
            (step.count, step.width): f"{step.latency_ms:.3f} {'*' if step.useful else ' '}" for step in staircase.steps
        }
        for count in sorted({count for count, _ in cells}):
            row = [cells.get((count, width), "-  ") for width in staircase.widths]
            table.add_row(str(count), *row, style="" if count in staircase.counts else "dim")
        console.print(table)
