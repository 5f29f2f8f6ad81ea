"""Job files: defaults, overrides, paths, what is written back, and every mistake that a file can have."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch import nn

from paretune.errors import JobError
from paretune.objectives.data import Splits, load_splits
from paretune.objectives.data.builtin import BUILTIN
from paretune.objectives.models import ModelSource
from paretune.objectives.tasks import TASKS, Classification
from paretune.search.job import Job, load_job, make_job
from paretune.search.job_sections import ModelSection
from paretune.search.job_types import DATA_NAMES, TASK_NAMES

MINIMAL = "name: small\nmodel: {factory: 'project:build'}\ndata: digits\n"


def write(folder: Path, text: str = MINIMAL) -> Path:
    path = folder / "job.yaml"
    path.write_text(text)
    return path


def build_linear(width: int = 3) -> nn.Module:
    return nn.Linear(width, 2)


def test_minimal_job_has_the_documented_defaults(tmp_path: Path) -> None:
    job = load_job(write(tmp_path))
    assert (job.name, job.teacher, job.task, job.storage) == ("small", "same", "classification", None)
    assert (job.data.source, job.data.args) == ("digits", {})
    assert job.objectives == ["accuracy", "latency_ms"]
    assert (job.space.max_ratio, job.space.bits, job.space.importance) == (0.75, "auto", ["l1"])
    assert (job.space.temperature, job.space.distillation_weight) == ((1, 8), (0, 1))
    assert job.space.learning_rate == (1e-4, 1e-2)
    assert (job.finetune.epochs, job.finetune.batch_size, job.finetune.optimizer) == (1.0, 128, "adamw")
    assert (job.target.runtime, job.target.device, job.target.batch_size, job.target.threads) == (
        "openvino",
        "cpu",
        1,
        1,
    )
    assert (job.search.trials, job.search.timeout, job.search.sampler, job.search.executor) == (
        60,
        None,
        "front",
        "local",
    )
    assert (job.search.stopping, job.search.rungs) == ("front", [0.25, 0.5])
    assert (job.verify.epochs, job.verify.rounds, job.verify.points) == (None, 7, 12)
    assert job.results == str(Path("results").resolve())
    assert (job.folder, job.python_path) == (tmp_path, [str(tmp_path)])


def test_paths_are_relative_to_the_job_file(tmp_path: Path) -> None:
    text = """
name: a
model: {factory: "p:b", weights: w/x.pt}
data: {source: npz, args: {path: d.npz, root: /abs, other: d.npz}}
python_path: [., ../lib]
"""
    job = load_job(write(tmp_path, text))
    assert job.model.weights == tmp_path / "w" / "x.pt"
    assert job.data.args == {"path": str(tmp_path / "d.npz"), "root": "/abs", "other": "d.npz"}
    assert job.python_path == [str(tmp_path), str(tmp_path.parent / "lib")]


def test_another_model_may_teach(tmp_path: Path) -> None:
    text = MINIMAL + "teacher: {factory: 'big:build', args: {depth: 2}, weights: big.pt}\n"
    job = load_job(write(tmp_path, text))
    assert isinstance(job.teacher, ModelSection)
    assert (job.teacher.factory, job.teacher.args) == ("big:build", {"depth": 2})
    assert job.teacher.weights == tmp_path / "big.pt"
    (tmp_path / "run").mkdir()
    assert load_job(write(tmp_path / "run", job.to_yaml())).teacher == job.teacher


def test_a_teacher_may_be_a_live_object() -> None:
    job = make_job({"name": "a", "model": {"factory": "p:b"}, "teacher": {"factory": build_linear}, "data": "digits"})
    written = yaml.safe_load(job.to_yaml())
    assert written["teacher"]["factory"] == f"{__name__}:build_linear"
    assert str(Path(__file__).parents[2]) in written["python_path"]


@pytest.mark.parametrize("value", ["null", "same"])
def test_the_teacher_may_be_the_dense_model_or_none(tmp_path: Path, value: str) -> None:
    assert load_job(write(tmp_path, MINIMAL + f"teacher: {value}")).teacher == yaml.safe_load(value)


def test_a_number_fixes_a_range_and_numbers_are_yaml_1_2(tmp_path: Path) -> None:
    job = load_job(write(tmp_path, MINIMAL + "space: {learning_rate: 1e-3, temperature: [2, 4.5], bits: [8, 32]}"))
    assert job.space.learning_rate == (1e-3, 1e-3)
    assert job.space.temperature == (2.0, 4.5)
    assert job.space.bits == [8, 32]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("accuracy >= 0.9", ("accuracy", ">=", 0.9), id="plain"),
        pytest.param("latency_ms<=5", ("latency_ms", "<=", 5.0), id="no spaces"),
        pytest.param("size_bytes <= 1e6", ("size_bytes", "<=", 1e6), id="exponent"),
        pytest.param("params <= 1_000_000", ("params", "<=", 1e6), id="underscores"),
    ],
)
def test_constraints_are_parsed(tmp_path: Path, text: str, expected: tuple[str, str, float]) -> None:
    (constraint,) = load_job(write(tmp_path, MINIMAL + f"constraints: ['{text}']")).constraints
    assert (constraint.name, constraint.op, constraint.value) == expected
    assert constraint.holds(expected[2])
    assert not constraint.holds(expected[2] * (0.5 if expected[1] == ">=" else 2))
    assert not constraint.holds(float("nan"))


def test_overrides_are_yaml_values(tmp_path: Path) -> None:
    overrides = [
        "search.trials=10",
        "data.args.seed=3",
        "space.bits=[8]",
        "search.timeout=1e2",
        "teacher=",
        "name=b",
    ]
    job = load_job(write(tmp_path), overrides)
    assert (job.search.trials, job.search.timeout, job.space.bits) == (10, 100.0, [8])
    assert (job.data.source, job.data.args) == ("digits", {"seed": 3})
    assert (job.teacher, job.name) == (None, "b")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        pytest.param(
            "search.trails=3",
            r"search\.trails must be a known key.*did you mean 'search\.trials'",
            id="unknown",
        ),
        pytest.param("serch.trials=3", r"serch must be a known key.*did you mean 'search'", id="unknown section"),
        pytest.param("search.trials", r"override must be KEY=VALUE", id="no value"),
        pytest.param("=3", r"override must be KEY=VALUE", id="no key"),
        pytest.param("name.x=3", r"name is 'small'; override the whole key", id="not a section"),
        pytest.param("space.bits=[8", r"override space\.bits must be YAML", id="broken YAML"),
        pytest.param("search.trials=many", r"search\.trials must be a valid integer, but got 'many'", id="wrong type"),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(JobError, match=message):
        load_job(write(tmp_path), [override])


TWO = "targets: [{batch_size: 1}, {name: big, runtime: onnxruntime, batch_size: 64}]\n"


@pytest.mark.parametrize(
    ("addition", "message"),
    [
        pytest.param("trials: 3", r"did you mean 'search\.trials'\?", id="key of another section"),
        pytest.param("sapce: {}", r"sapce must be a known key.*did you mean 'space'\?", id="unknown key"),
        pytest.param(
            "search: {zzz: 1}",
            r"search\.zzz must be a known key.*known here are trials, timeout",
            id="nothing near",
        ),
        pytest.param(
            "search: {seed: 1, trials: 5, seed: 2}",
            r"must have each key once.*'seed' in line \d+",
            id="duplicate",
        ),
        pytest.param("teacher: other", r"^teacher must be 'same', but got 'other'", id="teacher"),
        pytest.param("teacher: 3", r"^teacher must be a mapping of keys, but got 3", id="teacher number"),
        pytest.param("teacher: {args: {}}", r"^teacher\.factory must be given", id="teacher without factory"),
        pytest.param("teacher: {factory: ab}", r"^teacher\.factory must be an import string", id="teacher factory"),
        pytest.param(
            "teacher: {factory: 'a:b', weight: w.pt}",
            r"^teacher\.weight must be a known key.*did you mean 'teacher\.weights'\?",
            id="teacher key",
        ),
        pytest.param("task: clasification", r"task must be.*did you mean 'classification'\?", id="task name"),
        pytest.param("task: 3", r"task must be an import string", id="task number"),
        pytest.param(
            "space: {max_ratio: 1.2}",
            r"space\.max_ratio must be less than 1, but got 1\.2; ",
            id="ratio high",
        ),
        pytest.param("space: {max_ratio: 0}", r"space\.max_ratio must be greater than 0", id="ratio low"),
        pytest.param("space: {max_ratio: .nan}", r"space\.max_ratio must be a finite number", id="ratio NaN"),
        pytest.param(
            "space: {bits: [1]}",
            r"space\.bits must be 'auto' or a list of bit-widths from 2 to 32",
            id="bits",
        ),
        pytest.param("space: {bits: []}", r"space\.bits must be 'auto' or a list", id="no bits"),
        pytest.param("space: {bits: [8, 8]}", r"space\.bits must not repeat an entry, but got 8", id="bits twice"),
        pytest.param("space: {importance: [l3]}", r"space\.importance\[0\] must be 'l1'", id="importance"),
        pytest.param("space: {importance: []}", r"space\.importance must have at least 1 item", id="no importance"),
        pytest.param("space: {temperature: [4, 1]}", r"must have its lower end first.*write \[1, 4\]", id="reversed"),
        pytest.param("space: {temperature: 0.5}", r"space\.temperature must lie in \[1, inf\)", id="temperature"),
        pytest.param(
            "space: {temperature: [1, 2, 3]}",
            r"space\.temperature must be \[low, high\] or one number",
            id="three",
        ),
        pytest.param("space: {temperature: [1, .inf]}", r"space\.temperature must be \[low, high\]", id="infinite"),
        pytest.param("space: {distillation_weight: [0, 2]}", r"distillation_weight must lie in \[0, 1\]", id="weight"),
        pytest.param("space: {learning_rate: [0, 1]}", r"learning_rate must lie in \(0, inf\)", id="rate"),
        pytest.param(
            "space: {prune: false, quantize: false, factorize: false, sparsify: false, share: false}",
            r"space must leave something to choose",
            id="no space",
        ),
        pytest.param("space: {schedule: ['cubic']}", r"space\.schedule\[0\] must be one-shot, or.*cubic:4", id="cuts"),
        pytest.param("space: {pattern: ['4:2']}", r"space\.pattern.* must be unstructured, or N:M", id="pattern"),
        pytest.param(
            "space: {clusters: [1]}", r"space\.clusters\[0\] must be greater than or equal to 2", id="clusters"
        ),
        pytest.param("space: {affine: [true]}", r"space\.affine must be false.*add float to activations", id="affine"),
        pytest.param("finetune: {epochs: 0}", r"finetune\.epochs must be greater than 0", id="epochs"),
        pytest.param("finetune: {epochs: true}", r"finetune\.epochs must be a valid number, but got True", id="bool"),
        pytest.param("finetune: {optimizer: adam}", r"finetune\.optimizer.*did you mean 'adamw'\?", id="optimizer"),
        pytest.param(
            "finetune: {channels_last: 2}", r"channels_last must be true, false or 'auto'", id="channels_last"
        ),
        pytest.param("finetune: {quantized_share: 2}", r"quantized_share must be less than or equal to 1", id="share"),
        pytest.param("finetune: {gradient_clip: 0}", r"gradient_clip must be greater than 0", id="clip"),
        pytest.param("finetune: {device: gpu}", r"finetune\.device must be auto, cpu, cuda or cuda:N", id="train on"),
        pytest.param("finetune: {precision: fp16}", r"finetune\.precision.*'float16'", id="precision"),
        pytest.param("finetune: {tf32: 3}", r"finetune\.tf32 must be", id="tf32"),
        pytest.param("target: {threads: 0}", r"target\.threads must be greater than or equal to 1", id="threads"),
        pytest.param("target: {runtime: ''}", r"target\.runtime must have at least 1 character", id="runtime"),
        pytest.param("target: {options: {half: 0.5}}", r"^target\.options must be a mapping", id="options"),
        pytest.param("target: {device: a/../b}", r"^target\.device must be cpu, cuda or cuda:N", id="device"),
        pytest.param(TWO + "target: {threads: 2}", r"target must not stand beside targets", id="target and targets"),
        pytest.param(
            "targets: [{batch_size: 0}]",
            r"targets\[0\]\.batch_size must be greater than or equal to 1",
            id="in targets",
        ),
        pytest.param(
            "targets: [{}, {batch_size: 8}, {batch_size: 8}]", r"targets must have different", id="same names"
        ),
        pytest.param("targets: [{objective: false}]", r"must be true for the first target", id="first target"),
        pytest.param(
            TWO + "objectives: [accuracy, latency_ms@small]",
            r"objectives\[1\] must name a further target after @.*the job has big",
            id="unknown target",
        ),
        pytest.param("constraints: ['latency_ms@big <= 3']", r"the job has none", id="bound on no target"),
        pytest.param("objectives: [accuracy, latency_ms@]", r"must name a further target", id="nothing after @"),
        pytest.param(TWO + "objectives: [accuracy, params@big]", r"must not name a target.*write params", id="params@"),
        pytest.param(TWO + "constraints: ['accuracy@big >= 90']", r"at most 1 for accuracy", id="percent on a target"),
        pytest.param(
            "objectives: [accuracy, latency_ms, params, macs]\n" + TWO,
            r"objectives must be at most four",
            id="too many",
        ),
        pytest.param("objectives: [latency_ms, params]", r"objectives must be two to four.*accuracy", id="no accuracy"),
        pytest.param("objectives: [accuracy]", r"objectives must be two to four", id="one objective"),
        pytest.param(
            "objectives: [accuracy, params, params]",
            r"objectives must be two to four different",
            id="repeated",
        ),
        pytest.param(
            "objectives: [accuracy, latency]", r"objectives\[1\].*did you mean 'latency_ms'\?", id="objective"
        ),
        pytest.param(
            "constraints: ['accuracy = 1']",
            r"constraints\[0\] must be a name, >= or <=.*write e\.g\.",
            id="op",
        ),
        pytest.param("constraints: ['speed <= 1']", r"constraints\[0\] must be a name", id="constraint name"),
        pytest.param("constraints: ['accuracy >= 90']", r"at most 1 for accuracy.*0\.9 for 90 %", id="percent"),
        pytest.param(
            "search: {trials: null}", r"search must end.*give search\.trials or search\.timeout", id="endless"
        ),
        pytest.param("search: {trials: 0}", r"search\.trials must be greater than or equal to 1", id="trials"),
        pytest.param("search: {sampler: tp}", r"search\.sampler.*did you mean 'tpe'\?", id="sampler"),
        pytest.param("search: {stopping: all}", r"search\.stopping must be 'front' or 'none'", id="stopping"),
        pytest.param("search: {rungs: [0.5, 0.25]}", r"search\.rungs must ascend, .*write e\.g\.", id="rungs fall"),
        pytest.param("search: {rungs: [0.5, 0.5]}", r"search\.rungs must ascend", id="equal rungs"),
        pytest.param("search: {rungs: [0.5, 1.0]}", r"search\.rungs\[1\] must be less than 1", id="rung at the end"),
        pytest.param("search: {rungs: [0]}", r"search\.rungs\[0\] must be greater than 0", id="rung at the start"),
        pytest.param("search: {executor: rai}", r"search\.executor must be 'local' or 'ray'", id="executor"),
        pytest.param("ray: {resources: {cpu: 0}}", r"ray\.resources\.cpu must be greater than 0", id="no cores"),
        pytest.param(
            "search: {executor: ray}\nfinetune: {device: cuda}", r"ray\.resources\.gpu must be above 0", id="no GPU"
        ),
        pytest.param("search: {seed: -1}", r"search\.seed must be greater than or equal to 0", id="seed"),
        pytest.param("verify: 3", r"verify must be a mapping of keys, but got 3", id="section"),
        pytest.param("results: ''", r"results must have at least 1 character", id="results"),
    ],
)
def test_wrong_values(tmp_path: Path, addition: str, message: str) -> None:
    with pytest.raises(JobError, match=message):
        load_job(write(tmp_path, MINIMAL + addition))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        pytest.param("", r"job\.yaml must be a mapping of keys, but got nothing", id="empty"),
        pytest.param("- a", r"job\.yaml must be a mapping of keys, but got list", id="list"),
        pytest.param("a: [1", r"job\.yaml must be YAML.*in line 1", id="syntax"),
        pytest.param("a: !!python/object:os.system {}", r"job\.yaml must be YAML.*could not determine", id="tag"),
        pytest.param("a: 1\n\na: 2", r"'a' in line 1 and again in line 3; remove", id="duplicate"),
        pytest.param("name: 'a b'\nmodel: {factory: 'a:b'}\ndata: digits", r"name must start with a letter", id="name"),
        pytest.param("name: ..\nmodel: {factory: 'a:b'}\ndata: digits", r"name must start with a letter", id="dots"),
        pytest.param(
            "name: a\ndata: digits",
            r"model must be given, but got nothing; add it: the trained",
            id="missing",
        ),
        pytest.param(
            "name: a\nmodel: {factory: ab}\ndata: digits",
            r"model\.factory must be.*project:build",
            id="factory",
        ),
        pytest.param("name: a\nmodel: {factory: 'a:b'}\ndata: digit", r"did you mean 'digits'\?", id="data"),
        pytest.param("name: a\nmodel: {factory: 'a:b'}\ndata: 3", r"data must be a mapping of keys", id="data number"),
    ],
)
def test_wrong_files(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(JobError, match=message):
        load_job(write(tmp_path, text))


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"job must be a readable file.*nothing\.yaml.*paretune init"):
        load_job(tmp_path / "nothing.yaml")
    (tmp_path / "job.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(JobError, match="must be a readable file"):
        load_job(tmp_path / "job.yaml")


def test_all_mistakes_are_reported_at_once(tmp_path: Path) -> None:
    text = MINIMAL + "space: {max_ratio: 2, bits: 7}\nsearch: {seed: x}\nfoo: 1"
    with pytest.raises(JobError, match=r"^job\.yaml has 4 mistakes:") as caught:
        load_job(write(tmp_path, text))
    lines = str(caught.value).splitlines()[1:]
    wheres = [line.strip(" -").partition(" ")[0] for line in lines]
    assert wheres == ["space.max_ratio", "space.bits", "search.seed", "foo"]


def test_the_written_job_loads_from_another_folder(tmp_path: Path) -> None:
    addition = "constraints: ['accuracy >= 0.123456789']\nspace: {temperature: 3, learning_rate: [1e-5, 1e-3]}\n"
    job = load_job(write(tmp_path, MINIMAL + addition), ["model.weights=w.pt", "model.args.text='1e3'"])
    run = tmp_path / "elsewhere" / "run"
    run.mkdir(parents=True)
    again = load_job(write(run, job.to_yaml()))
    assert again.model_dump() == job.model_dump()
    assert again.to_yaml() == job.to_yaml()
    assert again.model.args == {"text": "1e3"}
    assert again.folder == run
    assert load_job(run).model_dump() == job.model_dump()


def test_every_default_is_written(tmp_path: Path) -> None:
    written = yaml.safe_load(load_job(write(tmp_path)).to_yaml())
    assert set(written) == set(Job.model_fields)
    for name in ("model", "data", "space", "finetune", "target", "search", "verify"):
        annotation: Any = Job.model_fields[name].annotation
        assert set(written[name]) == set(annotation.model_fields)


def test_live_objects(tmp_path: Path) -> None:
    splits = load_splits("digits")
    job = make_job(
        {
            "name": "live",
            "model": {"factory": nn.Linear(2, 2), "args": {}},
            "data": splits,
            "task": Classification(),
        },
        folder=tmp_path,
    )
    assert job.data.source is splits
    assert isinstance(splits, Splits)
    written = yaml.safe_load(job.to_yaml())
    assert (written["model"]["factory"], written["data"]["source"]) == ("<live Linear>", "<live Splits>")
    assert written["task"] == "<live Classification>"
    again = load_job(write(tmp_path, job.to_yaml()))
    with pytest.raises(JobError, match=r"model\.factory must be importable.*<live Linear>.*pass the object again"):
        ModelSource(again.model.factory).build()
    with pytest.raises(JobError, match=r"data\.source must be importable"):
        load_splits(again.data.source)


def test_importable_objects_are_written_as_import_strings() -> None:
    job = make_job({"name": "live", "model": {"factory": build_linear}, "data": lambda: None, "task": Classification})
    written = yaml.safe_load(job.to_yaml())
    assert written["model"]["factory"] == f"{__name__}:build_linear"
    assert written["task"] == "paretune.objectives.tasks:Classification"
    assert written["data"]["source"].startswith("<live test_importable_objects")
    assert str(Path(__file__).parents[2]) in written["python_path"]


def test_live_arguments_cannot_be_used_again(tmp_path: Path) -> None:
    job = make_job({"name": "a", "model": {"factory": build_linear, "args": {"width": object()}}, "data": "digits"})
    again = load_job(write(tmp_path, job.to_yaml()))
    assert again.model.args == {"width": "<live object>"}
    with pytest.raises(JobError, match=r"model\.args\.width must be a plain value here"):
        ModelSource(build_linear, again.model.args).build()


def test_jobs_are_frozen(tmp_path: Path) -> None:
    job = load_job(write(tmp_path))
    with pytest.raises(ValueError, match="frozen"):
        job.name = "other"


def test_reading_a_job_imports_neither_torch_nor_optuna(tmp_path: Path) -> None:
    code = (
        "import sys; from paretune.search.job import load_job; load_job(sys.argv[1]).to_yaml(); "
        "print([name for name in ('torch', 'optuna', 'ray', 'sklearn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, write(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_names_known_without_torch_are_those_that_exist() -> None:
    assert set(DATA_NAMES) == set(BUILTIN)
    assert set(TASK_NAMES) == set(TASKS)


def test_several_targets(tmp_path: Path) -> None:
    job = load_job(write(tmp_path, MINIMAL + TWO + "constraints: ['latency_ms@big <= 3']"))
    assert (job.target.runtime, job.target.batch_size) == ("openvino", 1)
    assert job.other_targets["big"].batch_size == 64
    assert job.all_objectives == ["accuracy", "latency_ms", "latency_ms@big"]
    assert job.devices == ("cpu", "cpu")
    (tmp_path / "again.yaml").write_text(job.to_yaml())
    again = load_job(tmp_path / "again.yaml")
    assert again.targets == job.targets
    assert again.target == job.target


def test_targets_that_are_only_reported(tmp_path: Path) -> None:
    job = load_job(write(tmp_path, MINIMAL + "targets: [{}, {device: 'cuda:1', objective: false}]"))
    assert job.all_objectives == ["accuracy", "latency_ms"]
    assert list(job.other_targets) == ["openvino-cuda1-b1"]


def test_targets_come_live_and_out_of_a_dump(tmp_path: Path) -> None:
    job = load_job(write(tmp_path, MINIMAL + TWO))
    dumped = make_job(job.model_dump())
    assert (dumped.target, dumped.targets) == (job.target, job.targets)
    live = make_job({**job.model_dump(exclude={"target"}), "targets": list(reversed(job.targets))})
    assert (live.target.runtime, live.target.batch_size) == ("onnxruntime", 64)


@pytest.mark.parametrize(
    ("override", "sizes"),
    [("targets.1.batch_size=4", [1, 4]), ("targets=[{batch_size: 2}, {batch_size: 3}]", [2, 3])],
)
def test_overriding_targets(tmp_path: Path, override: str, sizes: list[int]) -> None:
    job = load_job(write(tmp_path, MINIMAL + TWO), [override])
    assert [target.batch_size for target in job.targets] == sizes
    assert job.target.batch_size == sizes[0]


def test_overriding_a_target_by_several(tmp_path: Path) -> None:
    job = load_job(write(tmp_path, MINIMAL + "target: {batch_size: 9}"), ["targets=[{batch_size: 2}, {batch_size: 3}]"])
    assert job.target.batch_size == 2


def test_a_target_that_isnt_there_cant_be_overridden(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"must count a list's entries from 0.*2 entries"):
        load_job(write(tmp_path, MINIMAL + TWO), ["targets.2.batch_size=4"])


def test_further_targets_are_objectives_where_latency_is(tmp_path: Path) -> None:
    job = load_job(write(tmp_path, MINIMAL + TWO + "objectives: [accuracy, size_bytes]"))
    assert job.all_objectives == ["accuracy", "size_bytes"]


VARIANTS = (
    "name: small\ndata: digits\n"
    "model: {factory: 'project:build', variants: {slim: {factory: 'other:make', args: {width: 8}, weights: s.pt}}}\n"
)


def test_variants_are_models_of_their_own(tmp_path: Path) -> None:
    job = load_job(write(tmp_path, VARIANTS))
    slim = job.model.variants["slim"]
    assert (slim.factory, slim.args, slim.weights) == ("other:make", {"width": 8}, tmp_path / "s.pt")
    (tmp_path / "run").mkdir()
    assert load_job(write(tmp_path / "run", job.to_yaml())).model == job.model
    assert load_job(write(tmp_path, VARIANTS), ["model.variants.slim.args.width=4"]).model.variants["slim"].args == {
        "width": 4
    }
    assert load_job(write(tmp_path)).model.variants == {}


def test_a_variant_may_be_a_live_object() -> None:
    variants = {"slim": {"factory": build_linear}}
    job = make_job({"name": "a", "model": {"factory": "p:b", "variants": variants}, "data": "digits"})
    written = yaml.safe_load(job.to_yaml())
    assert written["model"]["variants"]["slim"]["factory"] == f"{__name__}:build_linear"
    assert str(Path(__file__).parents[2]) in written["python_path"]


@pytest.mark.parametrize(
    ("variants", "message"),
    [
        pytest.param("{model: {factory: 'a:b'}}", r"variants must not be called model", id="the model's name"),
        pytest.param("{slim: {args: {}}}", r"model\.variants\.slim\.factory must be given", id="no factory"),
        pytest.param("{slim: {factory: 'a:b', weight: x}}", r"did you mean 'model\.variants\.slim\.weights'", id="key"),
        pytest.param("{'a/b': {factory: 'a:b'}}", r"model\.variants", id="slash"),
        pytest.param("{slim: 3}", r"model\.variants\.slim must be a mapping of keys", id="number"),
        pytest.param(
            "{slim: {factory: 'a:b', variants: {}}}",
            r"model\.variants\.slim\.variants must be a known key",
            id="nested",
        ),
    ],
)
def test_wrong_variants(tmp_path: Path, variants: str, message: str) -> None:
    text = f"name: small\ndata: digits\nmodel: {{factory: 'a:b', variants: {variants}}}\n"
    with pytest.raises(JobError, match=message):
        load_job(write(tmp_path, text))


def test_a_space_of_every_technique(tmp_path: Path) -> None:
    space = load_job(write(tmp_path)).space
    switches = (space.prune, space.quantize, space.factorize, space.sparsify, space.share)
    assert switches == ("auto",) * 5
    assert (space.scope, space.schedule, space.method, space.pattern) == ("layer", ["one-shot"], ["tucker"], "auto")
    assert (space.clusters, space.max_sparsity, space.observer) == ([64, 16], 0.9, ["minmax"])
    assert (space.aware, space.activations, space.granularity) == ([True], ["quantized"], ["per-channel"])
    text = (
        "space: {scope: global, schedule: [one-shot, 'cubic:4'], method: [tucker, spatial], pattern: ['2:4'], "
        "clusters: [4], observer: [mse], aware: [false], activations: [float], granularity: [per-tensor], "
        "affine: [true]}"
    )
    job = load_job(write(tmp_path, MINIMAL + text))
    assert (job.space.schedule, job.space.pattern, job.space.affine) == (["one-shot", "cubic:4"], ["2:4"], [True])
    (tmp_path / "run").mkdir()
    assert load_job(write(tmp_path / "run", job.to_yaml())).space == job.space


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("scope: all", r"space\.scope must be 'layer', 'global' or 'threshold'"),
        ("schedule: [linear]", r"space\.schedule\[0\] must be one-shot, or"),
        ("schedule: [cubic:1000]", r"space\.schedule\[0\] must be one-shot, or .* with 2 to 100 cuts"),
        ("schedule: cubic:3", r"space\.schedule must be a list of choices, but got 'cubic:3'; write \['cubic:3'\]"),
        ("affine: true", r"space\.affine must be a list of choices, but got True; write \[true\]"),
        ("clusters: 16", r"space\.clusters must be a list of choices, but got 16; write \[16\]"),
        ("pattern: '2:4'", r"space\.pattern must be 'auto' or a list of patterns, but got '2:4'; write \['2:4'\]"),
        ("schedule: []", r"space\.schedule must have at least 1 item"),
        ("method: [svd]", r"space\.method\[0\] must be 'tucker' or 'spatial'"),
        ("pattern: []", r"space\.pattern"),
        ("pattern: [unstructured, unstructured]", "must not repeat an entry"),
        ("max_sparsity: 1", r"space\.max_sparsity must be less than 1"),
        ("clusters: [257]", r"space\.clusters\[0\] must be less than or equal to 256"),
        ("observer: [max]", r"space\.observer\[0\] must be 'minmax'"),
        ("activations: [int]", r"space\.activations\[0\] must be 'quantized' or 'float'"),
        ("granularity: [channel]", r"space\.granularity\[0\] must be 'per-channel' or 'per-tensor'"),
        ("aware: [maybe]", r"space\.aware\[0\] must be a valid boolean"),
        ("hint_weight: -1", r"space\.hint_weight must lie in \[0, inf\)"),
        ("sparsify: some", r"space\.sparsify must be true, false or 'auto'"),
    ],
)
def test_wrong_techniques(tmp_path: Path, space: str, message: str) -> None:
    with pytest.raises(JobError, match=message):
        load_job(write(tmp_path, MINIMAL + f"space: {{{space}}}"))
