"""The job: what the user wrote, as frozen records. Reading one imports neither torch nor Optuna."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from paretune.errors import JobError
from paretune.search.job_errors import RuleError, as_job_error, short
from paretune.search.job_sections import (
    DataSection,
    FinetuneSection,
    MainModelSection,
    ModelSection,
    NamedTarget,
    RaySection,
    SearchSection,
    SpaceSection,
    TargetSection,
    Teacher,
    VerifySection,
)
from paretune.search.job_types import (
    ON_GPUS,
    TASK_NAMES,
    Constraint,
    Name,
    ObjectiveName,
    Section,
    TaskName,
    folder_of,
    home_folder,
    resolve_path,
)
from paretune.search.job_yaml import parse_yaml, read_yaml, write_yaml

__all__ = ["Constraint", "Job", "ObjectiveName", "job_schema", "load_job", "make_job", "override"]


class Job(Section):
    """What to compress, for which target, and how to search. Paths are absolute once it is read."""

    name: Name = Field(
        description="Name of the job: letters, digits, '.', '_' and '-'; the run folder is named after it."
    )
    model: MainModelSection = Field(description="The trained model to compress: factory, args, weights, variants.")
    teacher: Teacher | None = Field(
        default="same",
        description="What teaches the compressed models: same, the dense model; another model (factory, args, "
        "weights); a list of these, which teach as an ensemble; null: nothing.",
    )
    data: DataSection = Field(description="The data: source and args, or the source alone.")
    task: TaskName = Field(
        default="classification",
        description="classification, regression, or the import string of a Task; from Python a Task.",
    )
    space: SpaceSection = Field(default=SpaceSection(), description="What may be chosen.")
    finetune: FinetuneSection = Field(default=FinetuneSection(), description="How a compressed model is trained.")
    target: TargetSection = Field(default=TargetSection(), description="Where the artifact runs and is measured.")
    targets: list[NamedTarget] = Field(
        default=[],
        description="In place of target: several, the main one first. One training serves all; the main one's numbers "
        "are latency_ms and so on, those of another latency_ms@NAME. Where latency_ms is an objective, so are these.",
    )
    objectives: Annotated[list[ObjectiveName], AfterValidator(lambda value: _objectives(value))] = Field(
        default=["accuracy", "latency_ms"],
        description="Two to four of accuracy, latency_ms, size_bytes, params, macs and, on a GPU, throughput_per_s, "
        "peak_memory_bytes, energy_mj; accuracy is always one.",
    )
    constraints: list[Constraint] = Field(
        default=[],
        description="Bounds such as 'accuracy >= 0.9' or 'latency_ms <= 5' that the front must keep.",
    )
    search: SearchSection = Field(default=SearchSection(), description="How long to search, and how.")
    ray: RaySection = Field(default=RaySection(), description="The cluster, for search.executor: ray.")
    verify: VerifySection = Field(default=VerifySection(), description="How the front is verified.")
    storage: str | None = Field(
        default=None, description="Database URL of the Optuna study; null: SQLite in the run folder."
    )
    study: Name | None = Field(
        default=None,
        description="Study in `storage` that several runs share, each with a name, a driver and a folder of its own: "
        "their samplers learn from all its trials; null: this run has one of its own.",
    )
    results: str = Field(
        default="results",
        validate_default=True,
        min_length=1,
        description="Folder in which the run folder is made, relative to the working directory.",
    )
    python_path: list[str] = Field(
        default=[],
        description="Folders put on sys.path before import strings are resolved, relative to the job file; "
        "by default the job file's.",
    )
    _folder: Path = PrivateAttr(default_factory=Path.cwd)

    @property
    def folder(self) -> Path:
        """The folder of the job file; the working directory for a job made in Python."""
        return self._folder

    @field_validator("teacher", mode="before")
    @classmethod
    def _at_least_one(cls, value: Any) -> Any:
        if value == []:
            raise RuleError("must name at least one model", "[]", "write same for the dense model, or null for none")
        return value

    @field_validator("results")
    @classmethod
    def _absolute(cls, value: str) -> str:
        return str(Path(value).expanduser().resolve())

    @field_validator("python_path")
    @classmethod
    def _absolute_folders(cls, value: list[str], info: ValidationInfo) -> list[str]:
        return [str(resolve_path(folder, info)) for folder in value]

    @property
    def study_name(self) -> str:
        """Of the Optuna study in its storage."""
        return self.study or self.name

    @property
    def other_targets(self) -> dict[str, NamedTarget]:
        """The targets beside the main one, by name."""
        return {target.label: target for target in self.targets[1:]}

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices that anything is measured on."""
        return tuple(target.device for target in (self.target, *self.targets[1:]))

    @property
    def all_objectives(self) -> list[str]:
        """The objectives, those of further targets among them."""
        own = [f"latency_ms@{name}" for name, target in self.other_targets.items() if target.objective]
        return list(dict.fromkeys([*self.objectives, *(own if "latency_ms" in self.objectives else ())]))

    @model_validator(mode="after")
    def _targets_fit(self) -> Job:
        if self.targets:
            main = TargetSection(**{key: getattr(self.targets[0], key) for key in TargetSection.model_fields})
            if "target" in self.model_fields_set and self.target != main:
                remedy = "leave it out; the first of targets takes its place"
                raise RuleError("must not stand beside targets", short(self.target.model_dump()), remedy, key="target")
            self.__dict__["target"] = main  # what is frozen for users isn't made yet
        names = [target.label for target in self.targets]
        if len(set(names)) < len(names):
            raise RuleError("must have different names", short(names), "give each a name", key="targets")
        if self.targets and not self.targets[0].objective:
            remedy = "leave latency_ms out of objectives, or put another target first"
            raise RuleError("must be true for the first target", "false", remedy, key="targets[0].objective")
        bounds = [constraint.name for constraint in self.constraints]
        for key, name in [
            *((f"objectives[{i}]", name) for i, name in enumerate(self.objectives)),
            *((f"constraints[{i}]", name) for i, name in enumerate(bounds)),
        ]:
            metric, at, target = name.partition("@")
            if at and target not in self.other_targets:
                known = ", ".join(self.other_targets) or "none"
                remedy = f"the job has {known}; the first target's numbers have no @"
                raise RuleError("must name a further target after @", short(name), remedy, key=key)
            if at and metric in ("params", "macs"):
                raise RuleError("must not name a target", short(name), f"write {metric}", key=key)
            if metric in ON_GPUS and (self.other_targets[target] if at else self.target).device == "cpu":
                raise RuleError("must be something that its target tells", short(name), "a GPU does", key=key)
        if len(self.all_objectives) > 4:
            remedy = "set objective: false for some targets"
            raise RuleError("must be at most four in all", short(self.all_objectives), remedy, key="objectives")
        return self

    @model_validator(mode="after")
    def _trainers_have_gpus(self) -> Job:
        if self.search.executor == "ray" and self.finetune.device.startswith("cuda") and not self.ray.resources.gpu:
            remedy = "say what each trial takes, e.g. 1 or 0.25, or set finetune.device to auto"
            raise RuleError("must be above 0 where trials train on a GPU", "0", remedy, key="ray.resources.gpu")
        return self

    @model_validator(mode="after")
    def _study_fits(self) -> Job:
        if self.study is not None and (self.storage is None or self.storage.startswith("sqlite")):
            got = short(self.study) + (", with an SQLite file" if self.storage else ", without a storage")
            remedy = "name a database of a server in storage, e.g. postgresql+psycopg://…, or leave study out"
            raise RuleError("must be shared through a database server", got, remedy, key="study")
        return self

    @model_validator(mode="after")
    def _hints_fit(self) -> Job:
        hints, weight = self.finetune.hints, self.space.hint_weight
        if hints and self.teacher is None:
            remedy = "name a teacher, e.g. teacher: same, or leave the hints out"
            raise RuleError("must be empty without a teacher", short(hints), remedy, key="finetune.hints")
        if bool(hints) != (weight[1] > 0):
            rule = "must reach above 0 with finetune.hints" if hints else "must be 0 without finetune.hints"
            remedy = "write e.g. [0, 1] to search it" if hints else "name layers in finetune.hints"
            raise RuleError(rule, short(list(weight)), f"{remedy}, or leave both out", key="space.hint_weight")
        return self

    @model_validator(mode="after")
    def _remember(self, info: ValidationInfo) -> Job:
        self._folder = folder_of(info)
        for position, constraint in enumerate(self.constraints):
            bounded = constraint.name.partition("@")[0] == "accuracy" and constraint.op == ">=" and constraint.value > 1
            if bounded and self.task in TASK_NAMES:
                remedy = f"write a share, e.g. {constraint.value / 100:g} for {constraint.value:g} %"
                raise RuleError(
                    "must be at most 1 for accuracy", str(constraint), remedy, key=f"constraints[{position}]"
                )
        return self

    def add_python_path(self) -> None:
        """Put the folders of `python_path` on `sys.path`; call it before import strings are resolved."""
        from paretune.objectives.imports import add_to_path

        add_to_path(self.python_path)

    def to_yaml(self) -> str:
        """The resolved job, every default written out, which `load_job` reads from any folder.

        A live object is written as its import string where it can be imported, and as ``<live NAME>``
        elsewhere; such a job can be read, but not run again without the object.
        """
        content = self.model_dump(mode="json")
        teachers = self.teacher if isinstance(self.teacher, list) else [self.teacher]
        models = [self.model, *self.model.variants.values()]
        models += [teacher for teacher in teachers if isinstance(teacher, ModelSection)]
        homes = [home_folder(value) for value in (*(m.factory for m in models), self.data.source, self.task)]
        content["python_path"] = list(dict.fromkeys([*self.python_path, *filter(None, homes)]))
        return write_yaml(content)


def load_job(path: Path | str, overrides: Sequence[str] = ()) -> Job:
    """Read a job file.

    Args:
        path: The file, or a folder (a run) with a ``job.yaml`` in it.
        overrides: ``"search.trials=10"`` and the like; values are YAML, paths relative to the job file.

    Raises:
        JobError: The file or an override is wrong; one error lists all mistakes.
    """
    path = Path(path)
    if path.is_dir() and (path / "job.yaml").is_file():
        path = path / "job.yaml"
    content = read_yaml(path)
    for assignment in overrides:
        override(content, assignment)
    folder = path.resolve().parent
    return make_job({"python_path": [str(folder)], **content}, folder=folder, source=path.name)


def make_job(content: Mapping[str, Any], *, folder: Path | None = None, source: str = "job") -> Job:
    """Make a job of nested keys, which may hold live objects (callables, modules, `Splits`, tasks).

    Args:
        content: The keys of a job.
        folder: What paths are relative to; None is the working directory.
        source: What messages call it.

    Raises:
        JobError: Something is wrong; one error lists all mistakes.
    """
    try:
        return Job.model_validate(dict(content), context={"folder": folder})
    except ValidationError as error:
        raise as_job_error(error, Job, source=source) from error


def job_schema() -> dict[str, Any]:
    """The JSON Schema of job files, for editors."""
    schema = Job.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _objectives(value: list[ObjectiveName]) -> list[ObjectiveName]:
    if "accuracy" not in value or not 2 <= len(set(value)) == len(value) <= 4:
        rule = "must be two to four different ones, accuracy among them"
        raise RuleError(rule, short(value), "write e.g. [accuracy, latency_ms]")
    return value


def override(content: dict[str, Any], assignment: str) -> None:
    """Set a key in the nested keys of a job file.

    Args:
        content: As read from the file; changed in place.
        assignment: ``"search.trials=10"`` and the like.

    Raises:
        JobError: It isn't KEY=VALUE, or names no key that could be.
    """
    key, equals, text = assignment.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise JobError("override", "must be KEY=VALUE", repr(assignment), "write e.g. search.trials=10")
    if parts == ["targets"]:
        content.pop("target", None)  # the first of them takes its place
    section: Any = content
    for position, part in enumerate(parts[:-1]):
        if isinstance(section, list):
            section = section[_index(key, part, section)]
            continue
        if section.get(part) is None:
            section[part] = {}
        elif parts[position] == "data" and position == 0 and isinstance(section[part], str):
            section[part] = {"source": section[part]}
        section = section[part]
        if not isinstance(section, dict | list):
            got = f"{key.strip()!r}, and {'.'.join(parts[: position + 1])} is {short(section)}"
            raise JobError("override", "must name a key of a section", got, "override the whole key instead")
    last = _index(key, parts[-1], section) if isinstance(section, list) else parts[-1]
    section[last] = parse_yaml(text, where=f"override {key.strip()}")


def _index(key: str, part: str, entries: list[Any]) -> int:
    if not part.isdigit() or int(part) >= len(entries):
        got = f"{key.strip()!r}, where the list has {len(entries)} entries"
        raise JobError("override", "must count a list's entries from 0", got, "write e.g. targets.0.batch_size")
    return int(part)
