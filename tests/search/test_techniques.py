"""Which techniques are offered, and a space without those that aren't."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, cast

import pytest

from paretune.errors import JobError, SearchError, TrialError
from paretune.objectives.evaluate import Evaluator
from paretune.objectives.latency import Protocol
from paretune.objectives.measurement import Measurement
from paretune.search.job import Job, make_job
from paretune.search.techniques import GAIN, Executes, Tried, restrict, try_techniques, wanted
from paretune.spaces.plan import CompressionPlan
from paretune.spaces.space import Options, SearchSpace
from tests.records import on_target

OPTIONS = Options(methods=("tucker", "spatial"), patterns=("unstructured", "2:4"))
SPACE = SearchSpace(
    {"a": [8, 16], "b": [8, 16, 24, 32]},
    {"a": (32, 8, 4), "b": (32, 8)},
    OPTIONS,
    ranks={"a": 0.5, "b": 0.5},
    sparse=("a", "b"),
    shared=("a", "b"),
    variants={"slim": SearchSpace({"a": [8, 16]}, {"a": (32, 8, 4)}, OPTIONS, {"a": 0.5}, ("a",), ("a",))},
)
BASELINE = Measurement({"": on_target(0.9, 4.0, size=1000), "big": on_target(0.9, 40.0, size=1000)}, 200, 3000)
DENSE = {key: float(value) for key, value in BASELINE.to_dict().items()}
WITHOUT = SPACE.uniform()
TECHNIQUES = ("prune", "quantize", "factorize", "sparsify", "share")


class Outlines:
    """Stands in for an evaluator: says what is left of each plan with a technique in it."""

    def __init__(
        self, left: Callable[[CompressionPlan], Mapping[str, float]], without: CompressionPlan = WITHOUT
    ) -> None:
        self._left = left
        self._without = without
        self.plans: list[CompressionPlan] = []

    def outline(self, plan: CompressionPlan, *, seed: int, protocol: Protocol) -> dict[str, float]:
        left = self._left(plan) if plan != self._without else {}
        if plan != self._without:
            self.plans.append(plan)
        names = ("latency_ms", "latency_high_ms", "size_bytes", "latency_ms@big", "latency_high_ms@big")
        found = {name: DENSE[name] for name in (*names, "size_bytes@big", "params", "macs")}
        found |= {"latency_high_ms": DENSE["latency_ms"], "latency_high_ms@big": DENSE["latency_ms@big"]}
        for name, share in left.items():
            found[name] = share * found[name]
            if name.startswith("latency_ms"):
                high = name.replace("latency_ms", "latency_high_ms")
                found[high] = share * found[high]
        return found


def job(objectives: tuple[str, ...] = ("accuracy", "latency_ms"), **space: Any) -> Job:
    return make_job(
        {"name": "a", "model": {"factory": "p:b"}, "data": "digits", "objectives": list(objectives), "space": space}
    )


def every(layer: str, width: int, activations: str) -> bool:
    """Whether there is a kernel: as for 8 bits and for 4."""
    return width in (8, 4) and activations == "quantized"


def tried(found: Job, outlines: Outlines, space: SearchSpace = SPACE, executes: Executes = every) -> list[Tried]:
    lines: list[str] = []
    result = try_techniques(found, cast(Evaluator, outlines), space, executes, lines.append)
    assert len(lines) == 1
    return result


def zeros_save_size(plan: CompressionPlan) -> Mapping[str, float]:
    """As on a CPU: zeros and codebooks make the file smaller, pruned channels and 8 bits the calls faster as well."""
    if plan.sparsify.sparsity or plan.share.clusters:
        return {"size_bytes": 0.5}
    if plan.factorize.ranks:
        return {"latency_ms": 1.2, "size_bytes": 0.6, "params": 0.6}
    return {"latency_ms": 0.7, "size_bytes": 0.5}


def test_each_technique_is_tried_alone() -> None:
    outlines = Outlines(zeros_save_size)
    found = tried(job(), outlines)
    assert [(one.technique, one.value) for one in found] == [
        ("prune", ""),
        ("quantize", "8 quantized"),
        ("quantize", "4 quantized"),
        ("factorize", "tucker"),
        ("factorize", "spatial"),
        ("sparsify", "unstructured"),
        ("sparsify", "2:4"),
        ("share", ""),
    ]
    for one, plan in zip(found, outlines.plans, strict=True):
        used = {
            "prune": bool(plan.prune.ratios),
            "quantize": any(bits <= 8 for bits in plan.quantize.bits.values()),
            "factorize": bool(plan.factorize.ranks),
            "sparsify": bool(plan.sparsify.sparsity),
            "share": bool(plan.share.clusters),
        }
        assert [name for name, is_used in used.items() if is_used] == [one.technique]
    assert (outlines.plans[4].factorize.method, outlines.plans[6].sparsify.pattern) == ("spatial", "2:4")
    assert found[0].setting == "50% of all channels"


def test_what_saves_nothing_that_counts_isnt_offered() -> None:
    found = tried(job(), Outlines(zeros_save_size))
    assert [one.technique for one in found if one.offered] == ["prune", "quantize", "quantize"]
    zeros = next(one for one in found if one.technique == "sparsify")
    assert zeros.reason == "saves less than 3% of latency_ms"
    assert (zeros.left["size_bytes"], zeros.left["latency_ms"]) == (0.5, 1.0)
    assert next(one for one in found if one.technique == "prune").reason == "saves 30% of latency_ms"
    by_size = tried(job(("accuracy", "latency_ms", "size_bytes")), Outlines(zeros_save_size))
    assert all(one.offered for one in by_size)


def test_what_the_job_asks_for_is_offered_all_the_same() -> None:
    found = tried(job(sparsify=True), Outlines(zeros_save_size))
    zeros = [one for one in found if one.technique == "sparsify"]
    assert [one.offered for one in zeros] == [True, True]
    assert zeros[0].reason.endswith("but the job asks for it (space.sparsify: true)")
    assert not any(one.offered for one in found if one.technique in ("factorize", "share"))


@pytest.mark.parametrize(("left", "offered"), [(1 - GAIN - 0.001, True), (1 - GAIN + 0.001, False), (1.5, False)])
def test_so_much_must_be_saved(left: float, offered: bool) -> None:
    found = tried(job(), Outlines(lambda plan: {"latency_ms": left}))
    assert {one.offered for one in found} == {offered}


def test_a_latency_counts_by_the_upper_end_of_its_interval() -> None:
    found = tried(job(), Outlines(lambda plan: {"latency_high_ms": 1.01, "latency_ms": 0.9}))
    assert all(one.offered for one in found)
    found = tried(job(), Outlines(lambda plan: {"latency_ms": 0.9, "latency_high_ms": 1.1}))
    assert not any(one.offered for one in found)


def test_bounds_and_further_targets_count() -> None:
    content = job().model_dump(exclude={"target", "targets"}) | {"constraints": ["size_bytes <= 500"]}
    content["targets"] = [{}, {"name": "big", "batch_size": 64}]
    bounded = make_job(content)
    assert wanted(bounded) == ["accuracy", "latency_ms", "latency_ms@big", "size_bytes"]
    found = tried(bounded, Outlines(lambda plan: {"latency_ms@big": 0.5} if plan.share.clusters else {}))
    assert [one.technique for one in found if one.offered] == ["share"]
    assert next(one for one in found if one.offered).reason == "saves 50% of latency_ms@big"


def test_what_only_gpus_measure_is_judged_by_what_goes_with_it() -> None:
    content = job().model_dump(exclude={"targets"}) | {"objectives": ["accuracy", "energy_mj"]}
    content["target"] = content["target"] | {"runtime": "tensorrt", "device": "cuda"}
    found = tried(make_job(content), Outlines(zeros_save_size))
    assert {one.technique for one in found if one.offered} == {"prune", "quantize"}


@pytest.mark.parametrize("error", [TrialError("conv2 was to run in 4 bits"), RuntimeError("no such kernel")])
@pytest.mark.parametrize("switch", ["auto", True])
def test_what_fails_is_offered_only_where_the_job_asks_for_it(switch: Any, error: Exception) -> None:
    def fail(plan: CompressionPlan) -> Mapping[str, float]:
        if plan.share.clusters:
            raise error
        return {"latency_ms": 0.5}

    found = tried(job(share=switch), Outlines(fail))
    assert [one.offered for one in found] == [True] * 7 + [switch is True]
    assert str(error) in found[-1].reason
    assert found[-1].left == {}


@pytest.mark.parametrize("error", [MemoryError("no more"), SearchError("stop")])
def test_what_says_nothing_of_a_technique_stops_the_search(error: Exception) -> None:
    def fail(plan: CompressionPlan) -> Mapping[str, float]:
        raise error

    with pytest.raises(type(error)):
        tried(job(), Outlines(fail))


def test_a_space_in_which_nothing_runs_is_refused() -> None:
    def fail(plan: CompressionPlan) -> Mapping[str, float]:
        raise TrialError("no kernel")

    with pytest.raises(JobError, match=r"space\.bits must allow a plan that runs.*no kernel"):
        tried(job(), Outlines(fail, without=SPACE.uniform(0.5)))


def test_what_every_plan_has_is_nobodys_merit() -> None:
    """Where every plan has 8 bits, zeros and codebooks must not be credited with what these save."""
    space = replace(SPACE, widths={"a": (8,), "b": (8,)}, variants={})
    smaller = Outlines(lambda plan: {"size_bytes": 0.125 if plan.prune.ratios else 0.25})
    found = {one.technique: one for one in tried(job(("accuracy", "size_bytes"), share=True), smaller, space)}
    assert [name for name, one in found.items() if one.offered] == ["prune"]
    assert (found["prune"].left["size_bytes"], found["sparsify"].left["size_bytes"]) == (0.5, 1)
    assert found["share"].reason.startswith("excludes itself with 8 bits per channel")
    assert found["quantize"].reason == "every plan of the space is so"
    assert found["quantize"].left == found["share"].left == {}


def weights_alone(**options: Any) -> SearchSpace:
    return replace(SPACE, options=replace(OPTIONS, **options))


def test_every_way_with_the_activations_is_tried() -> None:
    space = weights_alone(activations=("quantized", "float"))
    found = tried(job(("accuracy", "size_bytes")), Outlines(zeros_save_size), space)
    widths = [(one.value, one.setting) for one in found if one.technique == "quantize"]
    assert widths == [
        ("8 quantized", "8 bits"),
        ("4 quantized", "4 bits"),
        ("8 float", "8 bits, weights alone, run in floats"),
        ("4 float", "4 bits, weights alone, run in floats"),
    ]

    def floats_save(plan: CompressionPlan) -> Mapping[str, float]:
        return {"size_bytes": 0.5} if plan.quantize.activations == "float" else {}

    kept = restrict(space, tried(job(("accuracy", "size_bytes")), Outlines(floats_save), space))
    assert kept.options.activations == kept.variants["slim"].options.activations == ("float",)
    assert kept.widths == SPACE.widths


def test_what_is_only_simulated_claims_no_latency() -> None:
    space = replace(SPACE, widths={"a": (32, 8, 2), "b": (32, 8, 2)}, variants={})
    faster = Outlines(lambda plan: {"latency_ms": 0.5, "size_bytes": 0.2})
    by_width = {one.value: one for one in tried(job(), faster, space) if one.technique == "quantize"}
    assert (by_width["8 quantized"].offered, by_width["2 quantized"].offered) == (True, False)
    assert by_width["2 quantized"].setting == "2 bits, run in 8"
    assert by_width["2 quantized"].reason == "saves nothing that counts; it has no kernel, so no latency is its own"
    wide = tried(job(("accuracy", "latency_ms", "size_bytes")), faster, space)
    simulated = next(one for one in wide if one.value == "2 quantized")
    assert (simulated.offered, simulated.reason) == (True, "saves 80% of size_bytes")


def test_a_width_with_kernels_for_some_layers_is_tried_on_these_alone_first() -> None:
    space = replace(SPACE, widths={"a": (32, 8, 4), "b": (32, 8, 4)}, variants={})
    outlines = Outlines(lambda plan: {"latency_ms": 0.5})

    def large(layer: str, width: int, activations: str) -> bool:
        return width == 8 or layer == "a"

    found = [one for one in tried(job(), outlines, space, large) if one.technique == "quantize"]
    assert [(one.setting, one.offered) for one in found] == [
        ("8 bits", True),
        ("4 bits", True),
        ("4 bits, run in 8", False),
    ]
    widths = [plan.quantize.bits for plan in outlines.plans[1:4]]
    assert widths == [{"a": 8, "b": 8}, {"a": 4, "b": 32}, {"a": 4, "b": 4}]


def test_memory_isnt_judged_by_bytes_on_disk() -> None:
    content = job().model_dump(exclude={"targets"}) | {"objectives": ["accuracy", "peak_memory_bytes"]}
    content["target"] = content["target"] | {"runtime": "tensorrt", "device": "cuda"}
    found = tried(make_job(content), Outlines(zeros_save_size))
    assert {one.technique for one in found if one.offered} == {"factorize"}
    assert next(one for one in found if one.offered).reason == "saves 40% of params"


def test_where_nothing_counts_everything_is_offered() -> None:
    content = job().model_dump(exclude={"target", "targets"}) | {"objectives": ["accuracy", "accuracy@server"]}
    content["targets"] = [{}, {"name": "server", "batch_size": 4, "objective": False}]
    found = tried(make_job(content), Outlines(zeros_save_size))
    assert {(one.offered, one.reason) for one in found} == {
        (True, "nothing of what is wanted is known before a training")
    }


def test_settings_say_what_was_tried() -> None:
    bounded = replace(SPACE, grids={}, options=replace(OPTIONS, scope="threshold"))
    assert tried(job(), Outlines(zeros_save_size), bounded)[0].setting == "channels below 100% of their group's mean"
    small = replace(SPACE, ranks={"a": 0.2}, variants={})
    outlines = Outlines(zeros_save_size)
    found = [one for one in tried(job(), outlines, small) if one.technique == "factorize"]
    assert [one.setting for one in found] == ["tucker, 12.5% of the rank", "spatial, 12.5% of the rank"]
    assert [plan.factorize.ranks for plan in outlines.plans if plan.factorize.ranks] == [{"a": 0.125}] * 2


def test_a_wrong_job_isnt_taken_for_a_technique_that_fails() -> None:
    def fail(plan: CompressionPlan) -> Mapping[str, float]:
        raise JobError("data", "must be there", "nothing", "give some")

    with pytest.raises(JobError, match="data must be there"):
        tried(job(), Outlines(fail))


def test_strengths_stay_within_what_the_job_allows() -> None:
    mild = replace(SPACE, options=replace(OPTIONS, max_ratio=0.25, max_sparsity=0.3))
    outlines = Outlines(zeros_save_size)
    found = {one.technique: one.setting for one in reversed(tried(job(), outlines, mild))}
    assert (found["prune"], found["sparsify"]) == ("25% of all channels", "30% zeros")
    for plan in outlines.plans:
        assert max(plan.sparsify.sparsity.values(), default=0) in (0, 0.3, 0.5), "a pattern sets its own share"


def offer(**values: list[str]) -> list[Tried]:
    """Everything was tried, and these values are offered."""
    known = {
        "prune": [""],
        "quantize": ["8 quantized", "4 quantized"],
        "factorize": ["tucker", "spatial"],
        "sparsify": ["unstructured", "2:4"],
        "share": [""],
    }
    return [
        Tried(technique, "", value, {}, value in values.get(technique, []), "")
        for technique, found in known.items()
        for value in found
    ]


def test_restrict_leaves_everything_that_is_offered() -> None:
    everything = offer(
        prune=[""],
        quantize=["8 quantized", "4 quantized"],
        factorize=["tucker", "spatial"],
        sparsify=["unstructured", "2:4"],
        share=[""],
    )
    assert restrict(SPACE, everything) == SPACE


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_restrict_removes_a_technique_and_nothing_else(technique: str) -> None:
    values = {
        "prune": [""],
        "quantize": ["8 quantized", "4 quantized"],
        "factorize": ["tucker", "spatial"],
        "sparsify": ["unstructured", "2:4"],
        "share": [""],
    }
    space = restrict(SPACE, offer(**{name: found for name, found in values.items() if name != technique}))
    kind = dict(zip(TECHNIQUES, ("prune", "bits", "rank", "sparsity", "clusters"), strict=True))[technique]
    before, after = SPACE.distributions(), space.distributions()
    # Neither is there a switch any more, nor a way in which it is applied.
    about = {technique} | {"factorize": {"method"}, "sparsify": {"pattern"}}.get(technique, set())
    gone = before.keys() - after.keys()
    assert {name for name in gone if f"{kind}/" not in name} <= about
    assert {name for name in before if name.removeprefix("slim/").startswith(f"{kind}/")} <= gone
    assert after.keys() <= before.keys()


def test_restrict_removes_widths_methods_and_patterns() -> None:
    space = restrict(SPACE, offer(quantize=["8 quantized"], factorize=["spatial"], sparsify=["2:4"]))
    assert space.widths == {"a": (32, 8), "b": (32, 8)}
    assert space.variants["slim"].widths == {"a": (32, 8)}
    for own in (space, space.variants["slim"]):
        assert (own.options.methods, own.options.patterns, own.options.prune) == (("spatial",), ("2:4",), False)
        assert (own.grids, own.shared) == ({}, ())
        assert own.ranks
        assert own.sparse
    assert space.options == space.variants["slim"].options


def test_tried_techniques_are_stored_as_json() -> None:
    one = Tried("share", "16 values a layer", "", {"size_bytes": 0.5}, True, "saves 50% of size_bytes")
    assert Tried(**one.to_dict()) == one
