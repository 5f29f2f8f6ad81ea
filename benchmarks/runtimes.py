"""What each runtime makes of a net: latency in every width that it offers, and what building costs.

    python benchmarks/runtimes.py [--quick] [--nets NET,…] [--runtimes RUNTIME,…] [--output FILE]

For each net, batch and device: every runtime that the machine can run, each float format, then each integer width on
all layers that are offered it, the rest in the runtime's fastest float format. All are loaded in one process and
measured call by call against one dense reference, in rounds. A runtime may carry options:
`torch-cuda:half=fp16:eight=fp8`. docs/runtimes.md explains the tables.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import yaml
from nets import NETS, build, images
from reporting import machine, progress, save, table
from torch import nn

from paretune.errors import JobError
from paretune.objectives.clocks import Call
from paretune.objectives.compress import Context, compress_numerics
from paretune.objectives.compress.quantization import fits
from paretune.objectives.data.splits import Batch
from paretune.objectives.device import Device
from paretune.objectives.evaluate import EARLY
from paretune.objectives.latency import measure_paired
from paretune.objectives.runtimes import RUNTIMES, LayerReport, Session, Target
from paretune.objectives.runtimes.onnx_export import named_arrays
from paretune.objectives.runtimes.probe import first_line, hardware
from paretune.objectives.site import Site
from paretune.objectives.tasks import Classification
from paretune.objectives.verify import ROUND
from paretune.spaces.graph import execution_order
from paretune.spaces.plan import CompressionPlan, Quantization

HOPED = 1.8
"""An 8-bit net that isn't so many times faster than the best dense one deserves a look at where its time goes."""

_LOOK = replace(EARLY, min_calls=10, max_calls=10)
_INTEGER = 8
_SHOWN = 3


@dataclass
class Row:
    """One net in one width on one runtime.

    Attributes:
        runtime: Its name, with its options.
        width: That was asked for.
        label: The width in words: a float format, or an integer width and what the rest runs in.
        float_bits: Of all that isn't quantized.
        first_s: Seconds to write the model file, load it and read the widths back.
        second_s: The same once more.
        same: Share of the samples for which the module and the artifact predict the same class.
        error: Mean difference of the outputs, as a share of their range.
        note: What is wrong: layers that didn't run in the width asked for, or why nothing ran.
        latency_ms: The reference's median over all rounds, divided by the speed-up against it.
        speedups: Against the reference, one for each round; empty where nothing ran.
    """

    runtime: str
    width: int
    label: str
    float_bits: int
    first_s: float = 0.0
    second_s: float = 0.0
    same: float = 0.0
    error: float = 0.0
    note: str = ""
    latency_ms: float = 0.0
    speedups: list[float] = field(default_factory=list)

    @property
    def dense(self) -> bool:
        """Whether it is one of the float formats."""
        return self.width > _INTEGER


@dataclass(frozen=True)
class Live:
    """A row that runs.

    Attributes:
        row: What is recorded.
        site: Where it runs.
        call: The bound session.
        folder: Where its model file lies.
    """

    row: Row
    site: Site
    call: Call
    folder: Path


@dataclass(frozen=True)
class Bench:
    """One net at one batch size, and how long to measure."""

    net: str
    batch: int
    samples: int
    calls: int
    rounds: int
    folder: Path

    @property
    def inputs(self) -> dict[str, Any]:
        """What the clock's calls run on."""
        return named_arrays(images(self.batch, seed=4))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smallest settings: only to see that it works")
    parser.add_argument("--nets", default=",".join(NETS), help="separated by commas")
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--runtimes", default=",".join(sorted(RUNTIMES)), help="NAME[:OPTION=VALUE…], by commas")
    parser.add_argument("--devices", default="cpu,cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=30, help="pairs of calls a round, for each row")
    parser.add_argument("--samples", type=int, default=256, help="to compare predictions on")
    parser.add_argument("--output", type=Path, help="JSON file for all numbers")
    if "--quick" in sys.argv:
        parser.set_defaults(nets="resnet20", batches="2", rounds=2, calls=4, samples=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data: dict[str, Any] = {"machine": machine(), "results": []}
    with TemporaryDirectory(prefix="paretune-benchmark-") as made:
        # What Inductor kept from other runs would make the first build look like the second.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{made}/inductor"
        targets = list(usable(options.runtimes.split(","), options.devices.split(","), Path(made)))
        for number, (net, batch) in enumerate(product(options.nets.split(","), map(int, options.batches.split(",")))):
            bench = Bench(net, batch, options.samples, options.calls, options.rounds, Path(made) / str(number))
            for device in dict.fromkeys(target.device for target in targets):
                rows = compare(bench, [target for target in targets if target.device == device])
                entry = {"net": net, "batch": batch, "device": device, "rows": [asdict(row) for row in rows]}
                data["results"].append(entry)
                save(options.output, data)


def usable(names: Sequence[str], devices: Sequence[str], folder: Path) -> Iterator[Target]:
    """The targets that this machine has; prints what each executes, or why it has none."""
    lines = []
    for device, text in product(devices, names):
        name, *given = text.split(":")
        target = Target(
            name, device, 2, 1, {key: yaml.safe_load(value) for key, value in (x.split("=") for x in given)}
        )
        progress(f"trying {text} on {device}")
        start = time.perf_counter()
        try:
            site = Site("", target)
            capabilities = site.capabilities
            _first_use(site, folder)
        except JobError as error:
            lines.append((text, device, "", "", f"not here: {error}"))
        else:
            kinds = ", ".join(f"{kind} {'/'.join(map(str, bits))}" for kind, bits in capabilities.integer_bits.items())
            floats = ", ".join(capabilities.float_formats.values())
            lines.append((text, device, floats, kinds, f"{time.perf_counter() - start:.1f} s"))
            yield target
    for device in devices:
        print(f"\n{device}: {hardware(device)}")
    table(("runtime", "device", "floats", "integers", "first use"), lines)


def _first_use(site: Site, folder: Path) -> None:
    """Build something tiny, so that what happens once in a process doesn't count as the first row's."""
    path = folder / f"tiny{site.runtime.suffix}"
    site.runtime.deploy(nn.Sequential(nn.Linear(8, 8)).eval(), torch.randn(2, 8), path)
    site.runtime.load(path, site.options(32)).run({"input": np.zeros((2, 8), np.float32)})


def compare(bench: Bench, targets: Sequence[Target]) -> list[Row]:
    """Build all rows of a net on one device, measure them in turn, print the table and what int8 brings."""
    device = Device(targets[0].device)
    rows: list[Row] = []
    live: list[Live] = []
    for target in targets:
        site = Site("", replace(target, batch_size=bench.batch))
        with device.shared():
            found = [build_row(bench, site, bits, bits) for bits in site.capabilities.float_bits]
        dense = [built for _, built in found if built is not None]
        if dense:
            with device.exclusive():
                best = fastest(dense)
            with device.shared():
                widths = [bits for bits in site.capabilities.schemes if layers_for(site, bench.net, bits)]
                found += [build_row(bench, site, width, best.row.float_bits) for width in sorted(widths, reverse=True)]
        rows += [row for row, _ in found]
        live += [built for _, built in found if built is not None]
    with device.exclusive():
        measure(bench, live)
    report(bench, targets[0].device, rows)
    explain(bench, live, device)
    return rows


def layers_for(site: Site, net: str, width: int) -> list[str]:
    """The net's layers that the runtime offers to run in that integer width."""
    model, capabilities = build(net), site.capabilities
    found = []
    for name in execution_order(model, lambda module: module(images(2, seed=3))):
        layer = model.get_submodule(name)
        if width in capabilities.widths(type(layer).__name__) and fits(layer, capabilities.schemes[width]):
            found.append(name)
    return found


def build_row(bench: Bench, site: Site, width: int, float_bits: int) -> tuple[Row, Live | None]:
    """Quantize, deploy, load and read back, twice; a row without a session where that fails."""
    options = "".join(f":{key}={value}" for key, value in site.target.options.items())
    model = build(bench.net)
    order = execution_order(model, lambda module: module(images(2, seed=3)))
    label = site.capabilities.float_formats[float_bits]
    bits: dict[str, int] = {}
    if width <= _INTEGER:
        bits = dict.fromkeys(layers_for(site, bench.net, width), width)
        part = "" if len(bits) == len(order) else f" ({len(bits)} of {len(order)} layers)"
        label = f"{width}{part}, rest {label}"
    row = Row(site.target.runtime + options, width, label, float_bits)
    progress(f"{bench.net}, batch {bench.batch}: building {row.runtime} {label}")
    folder = bench.folder / f"{row.runtime}-{site.target.device}-{width}".replace(":", "-")
    folder.mkdir(parents=True)
    try:
        module = _quantized(model, bits, site)
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            site.runtime.deploy(module, images(2, seed=3), folder / site.model)
            session = site.load(folder, float_bits)
            reports = session.layers()
            seconds.append(time.perf_counter() - start)
        row.first_s, row.second_s = seconds
        row.note = mismatch(reports, {name: bits.get(name, float_bits) for name in order})
        row.same, row.error = agreement(bench, module, session)
        return row, Live(row, site, session.bind(bench.inputs), folder)
    except Exception as error:  # whatever a runtime raises for what it can't do is the finding
        row.note = f"failed: {first_line(error)}"
        return row, None


def _quantized(model: nn.Module, bits: dict[str, int], site: Site) -> nn.Module:
    """The module to deploy, its quantizers calibrated on noise."""
    samples = images(64, seed=3)
    batch = Batch(torch.arange(len(samples)), samples, torch.zeros(len(samples), dtype=torch.int64))
    context = Context(samples[:2], {}, Classification(), [batch], site.capabilities.schemes)
    return compress_numerics(model, CompressionPlan(quantize=Quantization(bits=bits)), context)


def mismatch(reports: dict[str, LayerReport], asked: dict[str, int]) -> str:
    """In words, the layers that weren't executed as asked; empty where all were."""
    wrong = [
        f"{name} in {reports[name].bits}" if name in reports else f"{name} not reported"
        for name, bits in asked.items()
        if name not in reports or reports[name].bits != bits
    ]
    if not wrong:
        return ""
    more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    return f"not executed: {', '.join(wrong[:_SHOWN])}{more} of {len(asked)}"


def agreement(bench: Bench, module: nn.Module, session: Session) -> tuple[float, float]:
    """Share of equal predictions, and the mean difference of the outputs as a share of their range."""
    samples = images(max(bench.samples // bench.batch, 1) * bench.batch, seed=5)
    with torch.no_grad():
        expected = torch.cat([module(part) for part in torch.split(samples, 64)])
    parts = [session.run(named_arrays(part)) for part in torch.split(samples, bench.batch)]
    found = torch.from_numpy(np.concatenate(parts))
    same = (found.argmax(1) == expected.argmax(1)).float().mean().item()
    return same, ((found - expected).abs().mean() / (expected.max() - expected.min())).item()


def fastest(live: Sequence[Live]) -> Live:
    """The fastest of some rows by a quick look."""
    clock, first = live[0].site.clock, live[0].call
    return max(live, key=lambda built: measure_paired(built.call, first, _LOOK, clock).speedup)


def measure(bench: Bench, live: Sequence[Live]) -> None:
    """Fill in the latencies: every row against one dense reference, round by round."""
    if not live:
        return
    progress(f"{bench.net}, batch {bench.batch}: measuring {len(live)} rows in {bench.rounds} rounds")
    reference, clock = fastest([built for built in live if built.row.dense]), live[0].site.clock
    protocol = replace(ROUND, min_calls=bench.calls, max_calls=bench.calls)
    reference_ms = []
    for number in range(bench.rounds):
        progress(f"{bench.net}, batch {bench.batch}: round {number + 1}")
        for built in live:
            latency = measure_paired(built.call, reference.call, protocol, clock)
            built.row.speedups.append(latency.speedup)
            reference_ms.append(latency.baseline_ms)
    for built in live:
        built.row.latency_ms = statistics.median(reference_ms) / statistics.median(built.row.speedups)


def best_dense(rows: Sequence[Row]) -> Row:
    """The fastest float format among rows that ran."""
    return max((row for row in rows if row.dense and row.speedups), key=lambda row: statistics.median(row.speedups))


def ratios(row: Row, other: Row) -> tuple[float, float, float]:
    """How many times faster one row is than another: median, least and most of the rounds."""
    found = [mine / theirs for mine, theirs in zip(row.speedups, other.speedups, strict=True)]
    return statistics.median(found), min(found), max(found)


def report(bench: Bench, device: str, rows: Sequence[Row]) -> None:
    """Print the table of one net, batch and device."""
    print(f"\n### {bench.net}, batch {bench.batch}, {device}, 1 thread")
    head = ("runtime", "width", "latency, ms", "against its best dense", "against the best dense")
    lines = []
    for row in rows:
        cells = [row.runtime, row.label]
        if row.speedups:
            own = best_dense([other for other in rows if other.runtime == row.runtime])
            cells.append(f"{row.latency_ms:.3f}")
            for other in (own, best_dense(rows)):
                median, low, high = ratios(row, other)
                cells.append(f"{median:.2f} ({low:.2f} to {high:.2f})")
            cells += [f"{row.first_s:.2f} / {row.second_s:.2f}", f"{row.same:.1%}", f"{row.error:.2%}"]
        else:
            cells += ["", "", "", "", "", ""]
        lines.append([*cells, row.note])
    table((*head, "build, s: first / second", "same predictions", "mean difference", "note"), lines)


def explain(bench: Bench, live: Sequence[Live], device: Device) -> None:
    """For each runtime with 8 bits: both numbers and their ratio; where it is low, where the time goes."""
    for runtime in dict.fromkeys(built.row.runtime for built in live):
        own = [built for built in live if built.row.runtime == runtime]
        dense = best_dense([built.row for built in own])
        for built in own:
            if built.row.width != _INTEGER:
                continue
            ratio, _, _ = ratios(built.row, dense)
            print(
                f"- {bench.net}, batch {bench.batch}, {runtime}: best dense {dense.label} {dense.latency_ms:.3f} ms, "
                f"{built.row.label} {built.row.latency_ms:.3f} ms, ratio {ratio:.2f}",
                flush=True,
            )
            if ratio < HOPED:
                with device.exclusive():
                    before = shares(bench, next(other for other in own if other.row is dense))
                    after = shares(bench, built)
                _print_shares(before, after)


def shares(bench: Bench, built: Live) -> dict[str, float]:
    """Milliseconds of each layer, and of all else (``""``): the profiler's shares of the measured latency."""
    layers = execution_order(build(bench.net), lambda module: module(images(2, seed=3)))
    session = built.site.load(built.folder, built.row.float_bits, purpose="profile")
    taken = []
    for _ in range(11):
        session.run(bench.inputs)
        taken.append(session.layers())
    milliseconds = {
        name: statistics.median(reports[name].share for reports in taken) * built.row.latency_ms
        for name in layers
        if name in taken[0]
    }
    return milliseconds | {"": built.row.latency_ms - sum(milliseconds.values())}


def _print_shares(before: dict[str, float], after: dict[str, float]) -> None:
    def line(label: str, pick: Callable[[dict[str, float]], float]) -> None:
        print(f"  - {label}: {pick(before):.3f} to {pick(after):.3f} ms", flush=True)

    line("by the runtime's profiler, layers with weights", lambda times: sum(times.values()) - times[""])
    line("all else", lambda times: times[""])
    for name in sorted((name for name in after if name), key=lambda name: -after[name])[:_SHOWN]:
        line(name, lambda times, name=name: times.get(name, 0.0))  # type: ignore[misc]


if __name__ == "__main__":
    main()
