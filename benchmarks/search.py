"""Which sampler finds the better front for the same cost?

    python benchmarks/search.py synthetic --plot docs/search-synthetic.svg    (minutes)
    python benchmarks/search.py asking                                        (minutes)
    python benchmarks/search.py real --data digits --seconds 240              (hours, as the next ones)
    python benchmarks/search.py real --data fashion --seconds 480 --plot docs/search-real.svg
    python benchmarks/search.py stopping --data fashion
    python benchmarks/search.py joint --data fashion --seconds 480
    python benchmarks/search.py tables

What is measured and how stands in docs/benchmarks.md. Every search appends a line to a file of JSON lines as soon as it
ends, and isn't run again; a real one that was killed goes on where it was. `tables` prints what the file holds. The
machine must be quiet for `asking` and the real ones.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby, product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import optuna
import torch
from curves import (
    Curve,
    Line,
    at,
    cost_of,
    curve,
    front,
    plot,
    reference,
    seen,
    spread,
    true_curve,
    true_hypervolume,
)
from reporting import progress, table
from searching import DATA, SEEDED, Case, make_base, search_real, search_synthetic, time_asking
from synthetic import KINDS

from paretune.objectives.environment import environment
from paretune.search.hypervolume import hypervolume
from paretune.search.job_sections import SearchSection
from paretune.search.samplers import SAMPLERS
from paretune.search.study import study_url

SLOW = 300.0
"""Seconds after which a sampler's further seeds are left out of the synthetic benchmark."""

_STORAGES, _SHARES = ("memory", "sqlite"), (0.25, 0.5, 1.0)
_TRUE = "hypervolume, share of what is attainable"
_MEASURED = "hypervolume on the validation split"


def main() -> None:
    """Run a benchmark, or print what was found."""
    options = _parser().parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if options.command == "case":
        _work(options)
        return
    output: Path = options.output
    output.parent.mkdir(parents=True, exist_ok=True)
    failed = 0
    if options.command == "synthetic":
        _synthetic(options)
    elif options.command == "asking":
        _asking(options)
    elif options.command != "tables":
        failed = _real(options, list(_cases(options)))
    lines = [line for line in _read(output) if options.command in ("tables", line["case"]["benchmark"])]
    _print(lines)
    if options.plot:
        _plot(options.plot, lines)
    sys.exit(1 if failed else 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    made = {name: commands.add_parser(name) for name in ("synthetic", "asking", "real", "stopping", "joint", "tables")}
    for command in made.values():
        command.add_argument("--output", type=Path, default=Path("results/benchmarks/search.jsonl"), help="JSON lines")
        command.add_argument("--plot", type=Path, help="SVG file; of synthetic or of real searches")
    for name in ("synthetic", "asking", "real"):
        names = [*sorted(SAMPLERS.keys() | {"front"}), *([SEEDED] if name == "synthetic" else [])]
        made[name].add_argument("--samplers", type=_choices(names), default=names, help="separated by commas")
    for name in ("stopping", "joint"):
        made[name].add_argument("--sampler", default="front")
    for name in ("synthetic", "real", "stopping", "joint"):
        made[name].add_argument("--seeds", type=int, default=3)
    for name in ("real", "stopping", "joint"):
        made[name].add_argument("--data", type=_choices(DATA), default=list(DATA), help="some of " + ",".join(DATA))
        made[name].add_argument("--workers", type=int, default=2)
        made[name].add_argument("--set", action="append", default=[], help="key=value of the job, for all searches")
    for name in ("real", "joint"):
        made[name].add_argument("--seconds", type=float, default=480.0, help="of trial work, for each search")
    made["synthetic"].add_argument("--kinds", type=_choices(KINDS), default=list(KINDS))
    for name, trials in (("synthetic", 100), ("asking", 200), ("stopping", 60)):
        made[name].add_argument("--trials", type=int, default=trials)
    one = commands.add_parser("case")  # a real search in a process of its own
    one.add_argument("case")
    one.add_argument("base", type=Path)
    one.add_argument("--output", type=Path)
    return parser


def _choices(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        if wrong := set(text.split(",")) - set(known):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(wrong))} isn't among {', '.join(known)}")
        return text.split(",")

    return parse


def _read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text().splitlines()] if path.is_file() else []


def _append(path: Path, case: Case, found: dict[str, Any]) -> None:
    known = environment()
    machine = f"{known['processor']}, {known['cores']} cores; python {known['python']}, torch {known['torch']}"
    with path.open("a") as file:
        file.write(json.dumps({"case": case.key, "machine": machine} | found) + "\n")


def _is_done(path: Path, case: Case) -> bool:
    return any(line["case"] == case.key for line in _read(path))


def _synthetic(options: argparse.Namespace) -> None:
    for kind, name in product(options.kinds, options.samplers):
        for seed in range(options.seeds):
            case = Case("synthetic", kind, name, seed, trials=options.trials, workers=1)
            if _is_done(options.output, case):
                continue
            start = time.perf_counter()
            _append(options.output, case, search_synthetic(name, kind, seed, options.trials))
            took = time.perf_counter() - start
            progress(f"{kind}, {name}, seed {seed}: {took:.0f} s")
            if took > SLOW and seed + 1 < options.seeds:
                progress(f"{kind}, {name}: its other seeds are left out, one took more than {SLOW:.0f} s")
                break


def _asking(options: argparse.Namespace) -> None:
    for name, storage in product(options.samplers, _STORAGES):
        case = Case("asking", storage, name, 0, trials=options.trials, workers=1)
        if _is_done(options.output, case):
            continue
        with TemporaryDirectory() as made:
            url = study_url(Path(made)) if storage == "sqlite" else ""
            _append(options.output, case, time_asking(name, url, options.trials))
        progress(f"asking {name}, {storage}")


def _cases(options: argparse.Namespace) -> Iterable[Case]:
    """The searches of a benchmark on real data; those that are compared take turns, so that a drift hits all."""
    shared = tuple(options.set)
    for data, seed in product(options.data, range(options.seeds)):
        given = {"benchmark": options.command, "data": data, "seed": seed, "workers": options.workers}
        if options.command == "real":
            for name in options.samplers:
                yield Case(label=name, overrides=(*shared, f"search.sampler={name}"), seconds=options.seconds, **given)
            continue
        shared_too = (*shared, f"search.sampler={options.sampler}")
        if options.command == "stopping":
            for rule in ("front", "none"):
                changed = (*shared_too, f"search.stopping={rule}")
                yield Case(label=f"stopping {rule}", overrides=changed, trials=options.trials, **given)
            continue
        parts = {"joint": (), "prune alone": ("space.quantize=false",), "quantize alone": ("space.prune=false",)}
        for label, changes in parts.items():
            seconds = options.seconds if label == "joint" else options.seconds / 2
            yield Case(label=label, overrides=(*shared_too, *changes), seconds=seconds, **given)


def _real(options: argparse.Namespace, cases: Sequence[Case]) -> int:
    """Run those that weren't yet, one after the other; returns how many failed."""
    failed = 0
    for position, case in enumerate(cases, start=1):
        if _is_done(options.output, case):
            continue
        progress(f"search {position} of {len(cases)}: {case.name}")
        base = make_base(case.data, options.output.parent.resolve())
        command = [sys.executable, __file__, "case", json.dumps(case.key), str(base)]
        command += ["--output", str(options.output.resolve())]
        code = subprocess.run(command, check=False).returncode
        if code:
            progress(f"{case.name} failed with exit code {code}")
            failed += 1
    return failed


def _work(options: argparse.Namespace) -> None:
    """One real search, in a process that does nothing else."""
    data = json.loads(options.case)
    case = Case(**data | {"overrides": tuple(data["overrides"])})
    _append(options.output, case, search_real(case, options.base, options.output.parent / "runs"))


def _print(lines: Sequence[Line]) -> None:
    printers = {
        "synthetic": _synthetic_table,
        "asking": _asking_table,
        "real": _real_table,
        "stopping": _stopping_table,
        "joint": _joint_table,
    }
    for machine in dict.fromkeys(line["machine"] for line in lines):
        print(machine)
    for benchmark, printer in printers.items():
        of_it = [line for line in lines if line["case"]["benchmark"] == benchmark]
        for (data, *_), group in _grouped(of_it, _problem):
            printer(data, group)


def _problem(line: Line) -> tuple[str, float, int]:
    """What searches must have in common to be compared: data and budget, of which a part of `joint` has half."""
    case = line["case"]
    halved = case["benchmark"] == "joint" and case["label"] != "joint"
    return case["data"], (case["seconds"] or 0.0) * (1 + halved), case["trials"] or 0


def _grouped(lines: Iterable[Line], key: Callable[[Line], Any]) -> list[tuple[Any, list[Line]]]:
    return [(name, list(group)) for name, group in groupby(sorted(lines, key=key), key)]


def _by_label(lines: Iterable[Line]) -> list[tuple[str, list[Line]]]:
    found: list[tuple[str, list[Line]]] = _grouped(lines, lambda line: line["case"]["label"])
    return found


def _synthetic_table(kind: str, lines: Sequence[Line]) -> None:
    count = lines[0]["case"]["trials"]
    shown = [trials for trials in (25, 50, 100) if trials < count] + [count]
    cost = min(true_curve(line)[-1][0] for line in lines)
    rows = []
    for label, group in _by_label(lines):
        values = [[true_hypervolume(line, line["trials"][:trials]) for line in group] for trials in shown]
        values.append([at(true_curve(line), cost) for line in group])
        rows.append([label, len(group), *(spread(each, "{:.0%}".format) for each in values)])
    print(f"\nSynthetic, {kind}: {_TRUE}; median [min, max] over the seeds")
    table(["sampler", "seeds", *(f"{trials} trials" for trials in shown), f"at equal cost ({cost:.0f} s)"], rows)


def _asking_table(storage: str, lines: Sequence[Line]) -> None:
    case = lines[0]["case"]
    print(f"\nms for a proposal after {case['trials']} trials, {lines[0]['dimensions']} dimensions, study in {storage}")
    rows = []
    for label, group in _by_label(lines):
        asked, told = (np.concatenate([line[name] for line in group]) for name in ("asked", "told"))
        percentiles = [*np.percentile(asked, [50, 95]), *np.percentile(told, [50, 95])]
        rows.append([label, len(asked), *(f"{value:.0f}" for value in percentiles)])
    table(("sampler", "proposals", "ask, median", "95th percentile", "tell, median", "95th percentile"), rows)


def _real_table(data: str, lines: Sequence[Line]) -> None:
    cost = lines[0]["case"]["seconds"]
    uniform = [at(curve(line), cost) for line in lines if line["case"]["label"] == "uniform"]
    wanted = statistics.median(uniform) if uniform else math.inf
    rows = []
    for label, group in _by_label(lines):
        curves = [curve(line) for line in group]
        counts = [len(seen(line, cost)) for line in group]
        each = [trial["sampler"] for line in group for trial in line["trials"]]
        reached = [found for found in (cost_of(one, wanted) for one in curves) if found is not None and found <= cost]
        when = [spread(reached, "{:.0f} s".format)] if reached else []
        when += [f"{len(group) - len(reached)} never"] if len(reached) < len(group) else []
        rows.append(
            [
                label,
                len(group),
                spread(counts, "{:.0f}".format),
                f"{statistics.median(line['profile_seconds'] for line in group):.0f}",
                f"{statistics.median(each):.2f}",
                *(spread([at(one, cost * share) for one in curves], _points) for share in _SHARES),
                spread([_on_test(_members(line)) for line in group], _points),
                ", ".join(when),
            ]
        )
    least = min(curve(line)[-1][0] for line in lines)
    print(f"\n{data}: {_MEASURED} at a cost of {cost:g} s of trial work; median [min, max] over the seeds")
    if least < cost:
        print(f"\nOne search ended at {least:.0f} s already; what it had found counts from there on.")
    head = [
        "sampler",
        "seeds",
        "trials",
        "profile, s",
        "sampler, s a trial",
        *(f"{cost * x:.0f} s" for x in (0.25, 0.5, 1)),
    ]
    table([*head, "on the test split", "uniform's reached at"], rows)


def _stopping_table(data: str, lines: Sequence[Line]) -> None:
    rows = []
    for label, group in _by_label(lines):
        training = [sum(_training(trial) for trial in line["trials"]) for line in group]
        work = [sum(trial["work"] for trial in line["trials"]) for line in group]
        stopped = [sum(trial["state"] == "PRUNED" for trial in line["trials"]) for line in group]
        spreads = [spread(values, "{:.0f}".format) for values in (stopped, training, work)]
        spreads.append("" if any(stopped) else spread([_oracle(line) for line in group], "{:.0%}".format))
        finals = [spread([curve(line)[-1][1] for line in group], _points)]
        finals.append(spread([_on_test(_members(line)) for line in group], _points))
        rows.append([label, len(group), *spreads, *finals])
    print(f"\n{data}, {lines[0]['case']['trials']} trials each, with and without early stopping; median [min, max]")
    saved = "an oracle's saving of training"
    head = ("rule", "seeds", "stopped", "training, s", "all work, s", saved, _MEASURED, "on the test split")
    table(head, rows)


def _joint_table(data: str, lines: Sequence[Line]) -> None:
    groups = dict(_by_label(lines))
    rows = [_joint_row(label, [[line] for line in group]) for label, group in groups.items()]
    alone = [group for label, group in groups.items() if label != "joint"]
    seeds = [{line["case"]["seed"]: line for line in group} for group in alone]
    both = [[found[seed] for found in seeds] for seed in sorted(set.intersection(*map(set, seeds)))] if alone else []
    if len(alone) == 2:
        rows.append(_joint_row("union of both", both))
    budget = max(line["case"]["seconds"] for line in lines)
    print(f"\n{data}: one joint search of {budget:g} s of trial work, or two of half the budget; median [min, max]")
    table(("search", "seeds", _MEASURED, "on the test split"), rows)


def _joint_row(label: str, seeds: Sequence[Sequence[Line]]) -> list[object]:
    validation, test = [], []
    for several in seeds:
        members = [member for line in several for member in _members(line)]
        # Each search measured the dense model afresh, by whose latency its own are divided.
        points = [(trial["latency"], -trial["accuracy"]) for _, trial in members]
        validation.append(hypervolume(points, reference(several[0])))
        test.append(_on_test(members))
    return [label, len(seeds), spread(validation, _points), spread(test, _points)]


def _members(line: Line) -> list[tuple[Line, Line]]:
    """The front that a search had when its budget was spent, each with the search that it is of."""
    return [(line, trial) for trial in front(seen(line, line["case"]["seconds"] or math.inf))]


def _on_test(members: Sequence[tuple[Line, Line]]) -> float:
    """Hypervolume of the members of fronts by their accuracy on the test split."""
    if not members:
        return 0.0
    points = [(trial["latency"], -trial["test"]) for _, trial in members]
    return hypervolume(points, reference(members[0][0], "test"))


def _training(trial: Line) -> float:
    return float(trial["phases"].get("train", 0.0))


def _oracle(line: Line) -> float:
    """The share of training that no rule can exceed which stops only trials that don't join the front when they end.

    An oracle knows which these are and stops each at the first rung.
    """
    lost, found = 0.0, seen(line)
    for index, trial in enumerate(found):
        if trial not in front(found[: index + 1]):
            lost += _training(trial)
    return (1 - SearchSection().rungs[0]) * lost / sum(map(_training, found))


def _points(value: float) -> str:
    """A hypervolume in hundredths: share of the dense latency x points of accuracy."""
    return f"{100 * value:.2f}"


def _curve_in_hundredths(line: Line) -> Curve:
    """Of a real search, as far as its budget goes."""
    end, found = line["case"]["seconds"], curve(line)
    within = [(cost, 100 * value) for cost, value in found if cost <= end]
    return [*within, (end, 100 * at(found, end))] if found[-1][0] >= end else within


def _plot(path: Path, lines: Sequence[Line]) -> None:
    panels: dict[str, tuple[str, dict[str, list[Curve]]]] = {}
    for benchmark, name, made in (("synthetic", _TRUE, true_curve), ("real", _MEASURED, _curve_in_hundredths)):
        of_it = [line for line in lines if line["case"]["benchmark"] == benchmark]
        for (data, *_), group in _grouped(of_it, _problem):
            curves = {label: [made(line) for line in several] for label, several in _by_label(group)}
            panels[data] = (name, curves)
    if panels:
        plot(path, panels)
        progress(f"plot: {path}")


if __name__ == "__main__":
    main()
