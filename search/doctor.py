"""What works on this machine: each runtime on each device, tried, and what about the machine may spoil measurements."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from paretune.errors import JobError
from paretune.objectives.device import gpu_uuid
from paretune.objectives.environment import environment, version
from paretune.objectives.nvml import find_gpu
from paretune.objectives.runtimes import RUNTIMES, get_runtime, option_names
from paretune.objectives.runtimes.probe import Probe, cpu_features, first_line, probe

_INT8_FEATURES = {"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"}
_BF16_FEATURES = {"avx512_bf16", "amx_bf16", "bf16"}
_BUSY = 0.3
"""Processes that want a core, for each core, from which on others are in the way of a measurement."""


@dataclass(frozen=True)
class Finding:
    """One runtime on one device.

    Attributes:
        runtime: Its name.
        device: What it was tried on.
        versions: Package to version.
        probe: What it executes; None where it doesn't work.
        reason: Why it doesn't, else empty.
        options: That a target may set.
    """

    runtime: str
    device: str
    versions: Mapping[str, str]
    probe: Probe | None
    reason: str = ""
    options: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values, with the executed widths by kind summed up."""
        executed = {kind: self.probe.widths(kind) for kind in self.probe.kinds} if self.probe else {}
        return {
            "runtime": self.runtime,
            "device": self.device,
            "works": self.probe is not None,
            "reason": self.reason,
            "options": self.options,
            "versions": dict(self.versions),
            "float_bits": self.probe.float_bits if self.probe else (),
            "executed": executed,
            "layers": self.probe.to_dict()["layers"] if self.probe else (),
        }


@dataclass(frozen=True)
class Diagnosis:
    """What `paretune doctor` prints.

    Attributes:
        machine: Facts that matter for timing.
        findings: Every runtime on every device.
        warnings: What is worth a thought before measuring.
    """

    machine: Mapping[str, Any]
    findings: tuple[Finding, ...]
    warnings: tuple[str, ...]

    @property
    def works(self) -> bool:
        """Whether any runtime runs anything here."""
        return any(finding.probe for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return {
            "machine": dict(self.machine),
            "runtimes": [finding.to_dict() for finding in self.findings],
            "warnings": self.warnings,
        }


def diagnose(*, fresh: bool = False, report: Callable[[str], None] = lambda line: None) -> Diagnosis:
    """Try every runtime on every device of this machine.

    Args:
        fresh: Probe anew what the cache has.
        report: Takes a line before each probe, which may take a while where a runtime compiles for long.
    """
    machine = facts()  # first: the probes raise the load
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    found = []
    for name in RUNTIMES:
        for device in devices:
            report(f"trying {name} on {device}")
            found.append(examine(name, device, fresh=fresh))
    return Diagnosis(machine, tuple(found), tuple(concerns(machine)))


def examine(name: str, device: str, *, fresh: bool = False) -> Finding:
    """Try one runtime on one device."""
    versions: dict[str, str] = {}
    try:
        runtime = get_runtime(name)
        runtime.capabilities(device)  # says in words what isn't there
        versions = {package: version(package) for package in runtime.packages}
        return Finding(name, device, versions, probe(name, device, fresh=fresh), options=option_names(name))
    except JobError as error:
        reason = f"{error.where} {error.rule}, but got {error.got}; {error.remedy}"
        return Finding(name, device, versions, None, reason)
    except Exception as error:  # a broken installation raises anything, and saying so is what this is for
        return Finding(name, device, versions, None, first_line(error))


def facts() -> dict[str, Any]:
    """What of this machine matters for timing."""
    known = environment()
    names = ("system", "processor", "cores", "memory_gib", "governor", "boost")
    found = {name: known[name] for name in names} | {"features": cpu_features()}
    found["load"] = round(os.getloadavg()[0], 2)
    found["gpus"] = [_gpu(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return found


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an unreadable driver shows as None
        gpu = find_gpu(gpu_uuid(f"cuda:{index}"))
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        "driver": gpu.state().driver if gpu else None,
    }


def concerns(machine: Mapping[str, Any]) -> list[str]:
    """What about a machine is worth a thought before measuring on it.

    Args:
        machine: As `facts` gives them.
    """
    features, cores = set(machine["features"]), machine["cores"]
    found = []
    if cores < 2:
        found.append("one core alone: search.workers above 1 only share it, and a measurement stops them all")
    if features and not features & _INT8_FEATURES:
        found.append("the CPU has no dot-product instructions for int8 (VNNI or the like): 8 bits gain little")
    if features and not features & _BF16_FEATURES:
        found.append("the CPU has no bfloat16 instructions: 16 bits aren't offered or gain nothing")
    if machine["governor"] not in ("performance", "not readable"):
        remedy = "sudo cpupower frequency-set -g performance"
        found.append(f"the CPU's governor is {machine['governor']!r}: its clock follows the load; {remedy}")
    if machine["load"] > _BUSY * cores:
        found.append(f"others are computing: a load of {machine['load']} on {cores} cores; measure when it is quiet")
    unread = [gpu["name"] for gpu in machine["gpus"] if not gpu["driver"]]
    found += [f"{name}: NVML can't be read, so throttling isn't seen; install nvidia-ml-py" for name in unread]
    return found


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """Print what was found as tables."""
    console = Console(soft_wrap=True, highlight=False)
    table = Table(title="runtimes")
    for column in ("runtime", "device", "version", "float widths", "integer widths executed"):
        table.add_column(column, overflow="fold")
    for finding in diagnosis.findings:
        versions = ", ".join(f"{package} {found}" for package, found in finding.versions.items())
        if finding.probe is None:
            table.add_row(finding.runtime, finding.device, versions or "-", f"no: {finding.reason}", "", style="dim")
        else:
            floats = " ".join(str(width) for width in finding.probe.float_bits if _runs(finding.probe, width))
            table.add_row(finding.runtime, finding.device, versions, floats, _integers(finding.probe))
    console.print(table)
    for finding in diagnosis.findings:
        for line in _failures(finding.probe) if finding.probe else ():
            console.print(f"{finding.runtime} on {finding.device}: {line}", markup=False)
    for runtime, options in {finding.runtime: finding.options for finding in diagnosis.findings}.items():
        if options:
            console.print(f"options of {runtime}: {', '.join(options)}", markup=False)
    for name, value in diagnosis.machine.items():
        if name != "gpus":
            console.print(f"{name}: {' '.join(value) if isinstance(value, list) else value}", markup=False)
    for gpu in diagnosis.machine["gpus"]:
        console.print("gpu: " + ", ".join(f"{name} {value}" for name, value in gpu.items()), markup=False)
    for warning in diagnosis.warnings:
        console.print(f"warning: {warning}", markup=False)


def _runs(found: Probe, width: int) -> bool:
    return any(width in found.widths(kind) for kind in found.kinds)


def _integers(found: Probe) -> str:
    """Widths of 8 and less by kind, kinds with equal ones together; one line each."""
    kinds: dict[str, list[str]] = {}
    for kind in found.kinds:
        widths = " ".join(str(width) for width in found.widths(kind) if width <= 8) or "none"
        kinds.setdefault(widths, []).append(kind)
    if len(kinds) == 1:
        return f"{next(iter(kinds))}: all kinds tried"
    return "\n".join(f"{widths}: {'; '.join(names)}" for widths, names in kinds.items())


def _failures(found: Probe) -> list[str]:
    """What didn't run as asked: a line for each kind of layer, width and reason."""
    where: dict[tuple[str, int, str], list[str]] = {}
    for layer in found.failures:
        key = layer.kind, layer.asked, layer.reason
        where.setdefault(key, []).append(f"{layer.shape}, batch {layer.batch_size}")
    lines = []
    for (kind, asked, reason), shapes in where.items():
        tried = sum(layer.kind == kind and layer.asked == asked for layer in found.layers)
        some = "" if len(shapes) == tried else f" ({'; '.join(shapes)})"
        lines.append(f"{kind} in {asked} bits: {reason}{some}")
    return lines
