"""Tables for the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from paretune.search.front import knee

if TYPE_CHECKING:
    from paretune.search.check import Check


def print_json(data: Any) -> None:
    """Print JSON to stdout."""
    json.dump(data, sys.stdout, indent=2)
    sys.stdout.write("\n")


def print_front(run: Path, front: Mapping[str, Any]) -> None:
    """Print a front as a table, the baseline first."""
    metric, targets = front["metric"], list(front.get("targets", {}))
    table = Table(title=f"{front['run']}: {'verified front' if front['verified'] else 'front so far, not verified'}")
    for column in (
        "trial",
        f"validation {metric}",
        f"test {metric}",
        "latency ms",
        "interval",
        "speed-up",
        *(column for name in targets for column in (f"ms on {name}", "speed-up")),
        "size kB",
        "",
    ):
        table.add_column(column, justify="left" if column in ("trial", "") else "right")
    dense = _cells(f"dense ({front['baseline']['format']})", front["baseline"], targets)
    table.add_row(*dense, "baseline", style="dim")
    points = front["points"]
    best = knee(points) if points else None
    for i, point in enumerate(points):
        table.add_row(*_cells(str(point["trial"]), point, targets), "knee" if i == best else "")
    console = Console()
    console.print(table)
    if points:
        console.print(f"paretune export {run} --knee", highlight=False, soft_wrap=True)
    if (run / "report.html").is_file():
        console.print(f"report: {run / 'report.html'}", highlight=False, soft_wrap=True)


def _cells(name: str, point: Mapping[str, Any], targets: Sequence[str]) -> list[str]:
    validation, test = point["validation"], point.get("test")
    others = [
        text
        for target in targets
        for text in (f"{validation[f'latency_ms@{target}']:.3f}", f"{validation[f'speedup@{target}']:.2f}x")
    ]
    return [
        name,
        f"{validation['accuracy']:.4f}",
        f"{test['accuracy']:.4f}" if test else "-",
        f"{validation['latency_ms']:.3f}",
        f"{validation['latency_low_ms']:.3f} to {validation['latency_high_ms']:.3f}",
        f"{validation['speedup']:.2f}x",
        *others,
        f"{validation['size_bytes'] / 1000:,.0f}",
    ]


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
    _print_costs(console, check)


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
    names = list(check.space.distributions())
    kinds = {kind: sum(name.startswith(kind) for name in names) for kind in ("prune/", "bits/")}
    rest = [name for name in names if not name.startswith(tuple(kinds))]
    console.print(
        f"to choose: {kinds['prune/']} ratios, {kinds['bits/']} bit-widths, {', '.join(rest) or 'nothing else'}"
    )
    console.print(
        f"about {estimate.trial_seconds:.0f} s a trial and {estimate.seconds / 60:.0f} minutes for all at the dense "
        "model's pace (pruned ones train faster), and then the verification; "
        f"{estimate.trial_bytes / 1e6:.1f} MB a trial and {estimate.bytes / 1e6:.0f} MB in all"
    )
