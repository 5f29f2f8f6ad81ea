"""What is found out about a job before its search, stored and read back, and the space that comes of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from paretune.errors import JobError
from paretune.objectives.baseline import Baseline
from paretune.objectives.problem import Problem
from paretune.search.job import Job
from paretune.search.problem import BASELINE, load_problem
from paretune.search.profile import Profile, make_job_space, profile_job
from paretune.search.techniques import Tried
from tests.search.conftest import MODULE, TinyJob

AUTO = {"prune": "auto", "quantize": "auto", "factorize": "auto", "sparsify": True, "share": False, "exclude": ["7"]}


@pytest.fixture(scope="module")
def job(tiny: TinyJob, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Counts multiply-accumulates, so that no noise of the clock decides."""
    twin = {"variants": {"twin": {"factory": f"{MODULE}:build"}}}
    return tiny(tmp_path_factory.mktemp("jobs"), model=twin, objectives=["accuracy", "macs"], space=AUTO)


@pytest.fixture(scope="module")
def problem(job: Job) -> Problem:
    return load_problem(job)


@pytest.fixture(scope="module")
def baseline(measured: Path) -> Baseline:
    """Of the same model on the same target, in whatever float format was the fastest."""
    return Baseline(measured / BASELINE)


@pytest.fixture(scope="module")
def floats(baseline: Baseline) -> int:
    return baseline.float_bits[""]


@pytest.fixture(scope="module")
def profiled(job: Job, problem: Problem, baseline: Baseline) -> Profile:
    return profile_job(job, problem, baseline, problem.analyse())


def test_each_technique_is_tried_on_the_target(profiled: Profile) -> None:
    found = {one.technique: one for one in profiled.tried}
    assert found.keys() == {"prune", "quantize", "factorize", "sparsify"}, "what is off isn't tried"
    assert {name: one.offered for name, one in found.items()} == {
        "prune": True,
        "quantize": False,
        "factorize": True,
        "sparsify": True,
    }
    assert found["prune"].left["macs"] < 0.5, "half of the channels, of which one layer reads the other's"
    assert found["quantize"].left["macs"] == found["sparsify"].left["macs"] == 1
    assert found["quantize"].left["size_bytes"] < 0.9
    assert found["sparsify"].reason.endswith("but the job asks for it (space.sparsify: true)")
    for one in profiled.tried:
        assert {"latency_ms", "size_bytes", "params", "macs"} <= one.left.keys()


def test_the_space_has_what_is_offered(job: Job, problem: Problem, profiled: Profile, floats: int) -> None:
    space = make_job_space(job, problem, profiled, floats)
    assert set(space.grids) == {"0", "3"}
    assert space.widths == dict.fromkeys(("0", "3", "7"), (floats,))
    assert "3" in space.ranks
    assert "7" not in space.ranks, "excluded"
    assert set(space.sparse) == {"0", "3"}
    assert space.shared == ()
    assert space.options.patterns == ("unstructured",)
    assert space.variants.keys() == {"twin"}
    assert replace(space, variants={}) == replace(space.variants["twin"], variants={})


def test_a_layer_too_narrow_for_one_pattern_has_the_others(
    tiny: TinyJob, problem: Problem, profiled: Profile, floats: int, tmp_path: Path
) -> None:
    job = tiny(tmp_path, space=AUTO | {"pattern": ["unstructured", "2:4"]})
    both = [Tried("sparsify", "", pattern, {}, True, "") for pattern in job.space.pattern]
    space = make_job_space(job, problem, replace(profiled, tried=tuple(both)), floats)
    assert (space.sparse, space.narrow) == (("0", "3"), {"0": ("2:4",)})
    assert space.uniform(sparsity=0.5).sparsify.sparsity.keys() == {"0", "3"}
    only = make_job_space(
        tiny(tmp_path, space=AUTO | {"pattern": ["2:4"]}), problem, replace(profiled, tried=tuple(both)), floats
    )
    assert (only.sparse, only.narrow) == (("3",), {})


def test_layers_whose_factors_hardly_save_stay_whole(
    job: Job, problem: Problem, profiled: Profile, floats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"0": 0.12, "3": 0.125}
    layers = [problem.model.build().get_submodule(name) for name in limits]
    kinds = dict(zip([layer.weight.shape for layer in layers], limits.values(), strict=True))
    monkeypatch.setattr("paretune.search.techniques.largest_share", lambda layer, method: kinds[layer.weight.shape])
    assert make_job_space(job, problem, profiled, floats).ranks == {"3": 0.125}


def test_a_profile_is_read_back(job: Job, problem: Problem, profiled: Profile, floats: int, tmp_path: Path) -> None:
    profiled.write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"analysis.json", "techniques.json"}
    read = Profile.read(tmp_path, problem)
    assert replace(read, staircases=profiled.staircases) == profiled
    assert make_job_space(job, problem, read, floats) == make_job_space(job, problem, profiled, floats)


def test_a_run_of_an_older_version_isnt_gone_on_with(problem: Problem, profiled: Profile, tmp_path: Path) -> None:
    profiled.write(tmp_path)
    (tmp_path / "techniques.json").unlink()
    with pytest.raises(JobError, match=r"run must have a techniques\.json.*an older version"):
        Profile.read(tmp_path, problem)


def nothing(profiled: Profile) -> Profile:
    reason = "saves less than 3% of macs"
    return replace(profiled, tried=(Tried("prune", "50% of all channels", "", {"macs": 1.0}, False, reason),))


def test_a_space_without_anything_is_refused(job: Job, problem: Problem, profiled: Profile, floats: int) -> None:
    alone = replace(problem, variants={})
    with pytest.raises(JobError, match=r"prune \(50% of all channels\) saves less than 3% of macs") as caught:
        make_job_space(job, alone, replace(nothing(profiled), variants={}), floats)
    assert caught.value.where == "space"


def test_a_job_that_switches_on_what_its_model_cant_do_is_refused(
    tiny: TinyJob, problem: Problem, baseline: Baseline, floats: int, tmp_path: Path
) -> None:
    off = {"quantize": False, "factorize": False, "sparsify": False, "share": False}
    for scope in ("layer", "global"):
        job = tiny(tmp_path, space={"prune": True, "exclude": ["*"], "scope": scope, **off})
        bare = replace(problem, exclude=("*",), variants={})
        profile = profile_job(job, bare, baseline, bare.analyse())
        with pytest.raises(JobError, match=r"space must leave something to compress, but got no layer.*exclude fewer"):
            make_job_space(job, bare, profile, floats)


@pytest.mark.parametrize(("pattern", "near"), [("30", "'3'"), ("[0-4]x", "'"), pytest.param("", "'", id="nothing")])
def test_patterns_that_exclude_nothing_are_refused(
    tiny: TinyJob, problem: Problem, baseline: Baseline, tmp_path: Path, pattern: str, near: str
) -> None:
    job = tiny(tmp_path, space={"exclude": ["3", pattern]})
    message = rf"space\.exclude\[1\] must match a layer of the model, but got '.*'; did you mean {near}"
    with pytest.raises(JobError, match=message):
        profile_job(job, problem, baseline, problem.analyse())


def test_variants_alone_are_a_choice(job: Job, problem: Problem, profiled: Profile, floats: int) -> None:
    space = make_job_space(job, problem, nothing(profiled), floats)
    assert {"variant", "distill/weight"} <= space.distributions().keys()
    assert not any("/" in name.removeprefix("distill/").removeprefix("finetune/") for name in space.distributions())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        pytest.param({"scope": "global"}, {"pruning/ratio"}, id="global"),
        pytest.param({"scope": "threshold"}, {"pruning/threshold"}, id="threshold"),
        pytest.param({"schedule": ["one-shot", "cubic:3"]}, {"schedule", "prune/0", "prune/3"}, id="cuts"),
        pytest.param({"method": ["tucker", "spatial"]}, {"prune/0", "prune/3"}, id="one method is offered"),
        pytest.param({"hint_weight": [0, 1]}, {"distill/hint_weight", "prune/0", "prune/3"}, id="hints"),
        pytest.param({"importance": ["l1", "fpgm"]}, {"importance", "prune/0", "prune/3"}, id="importance"),
    ],
)
def test_what_the_job_leaves_open_is_a_choice(
    tiny: TinyJob,
    problem: Problem,
    profiled: Profile,
    floats: int,
    tmp_path: Path,
    settings: dict[str, Any],
    expected: set[str],
) -> None:
    hints: dict[str, Any] = {"finetune": {"hints": ["3"]}} if "hint_weight" in settings else {}
    job = tiny(tmp_path, space=AUTO | settings, **hints)
    names = make_job_space(job, problem, profiled, floats).distributions().keys()
    own = {name for name in names if not name.startswith("twin/")}
    always = {"rank/3", "sparsity/0", "sparsity/3", "factorize", "sparsify", "variant"}
    always |= {"distill/temperature", "distill/weight", "finetune/learning_rate"}
    assert own - {"rank/0"} == expected | always
