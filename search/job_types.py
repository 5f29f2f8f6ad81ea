"""What the values of a job may be: the types of its fields and how they are read and written."""

from __future__ import annotations

import difflib
import re
import sys
import sysconfig
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    Tag,
    ValidationInfo,
    WithJsonSchema,
    model_serializer,
    model_validator,
)

from paretune.search.job_errors import RuleError, short
from paretune.spaces.plan import Importance, Method, Observer, Schedule, Sparsification

DIRECTIONS: dict[str, Literal["maximize", "minimize"]] = {
    "accuracy": "maximize",
    "latency_ms": "minimize",
    "size_bytes": "minimize",
    "params": "minimize",
    "macs": "minimize",
    "throughput_per_s": "maximize",
    "peak_memory_bytes": "minimize",
    "energy_mj": "minimize",
}
"""What is measured, and which way is better; on another target than the first, ``latency_ms@NAME``."""

ON_GPUS = ("throughput_per_s", "peak_memory_bytes", "energy_mj")
"""What is measured on GPUs alone."""

_CONSTRAINT = re.compile(
    r"\s*([A-Za-z_]+(?:@[A-Za-z0-9._-]+)?)\s*(>=|<=)\s*([-+]?[0-9][0-9_]*(?:\.[0-9_]*)?(?:[eE][-+]?[0-9]+)?)\s*"
)
_IMPORT_STRING = re.compile(r"[^\W\d][\w.]*:[^\W\d][\w.]*")
_ZOO = re.compile(r"(timm|torchvision):\S+")
_LIVE = "<live "
_T = TypeVar("_T")


class Section(BaseModel):
    """Base of the job's records: frozen, typed strictly (no text for a number), without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _objective(value: Any) -> Any:
    if not isinstance(value, str) or value.partition("@")[0] not in DIRECTIONS:
        close = _closest(str(value), tuple(DIRECTIONS))
        remedy = f"did you mean {close!r}?" if close else f"choose among {', '.join(DIRECTIONS)}"
        raise RuleError("must be something measured", short(value), remedy)
    return value


_NAMES = WithJsonSchema({"type": "string", "pattern": rf"^({'|'.join(DIRECTIONS)})(@[A-Za-z0-9._-]+)?$"})
ObjectiveName = Annotated[str, BeforeValidator(_objective), _NAMES]


def _device(value: Any) -> Any:
    if not isinstance(value, str) or not re.fullmatch(r"cpu|cuda(:\d+)?", value.lower()):
        raise RuleError("must be cpu, cuda or cuda:N", short(value), "use cpu, or cuda for the first GPU")
    return value.lower()


def _runtime_options(value: Any) -> Any:
    good = isinstance(value, dict) and all(
        isinstance(key, str) and isinstance(entry, str | int | bool) for key, entry in value.items()
    )
    if not good:
        rule = "must be a mapping of names to texts, whole numbers or truth values"
        raise RuleError(rule, short(value), "write e.g. {half: fp16}")
    return value


Device = Annotated[str, BeforeValidator(_device)]
RuntimeOptions = Annotated[dict[str, str | int | bool], BeforeValidator(_runtime_options)]


def direction(name: str) -> Literal["maximize", "minimize"]:
    """Which way an objective is better, on whichever target."""
    return DIRECTIONS[name.partition("@")[0]]


class Constraint(Section):
    """A bound that a trial must keep, written ``accuracy >= 0.9``.

    Attributes:
        name: What is bounded, one of the objectives' names.
        op: ``>=`` or ``<=``.
        value: The bound, in the objective's unit.
    """

    model_config = ConfigDict(json_schema_extra=lambda schema: _become(schema, {"type": "string"}))

    name: ObjectiveName
    op: Literal[">=", "<="]
    value: float

    @model_validator(mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if isinstance(value, Constraint | dict):
            return value
        match = _CONSTRAINT.fullmatch(value) if isinstance(value, str) else None
        remedy = "write e.g. 'accuracy >= 0.9', 'latency_ms <= 5' or 'size_bytes <= 1e6'"
        if match is None or match[1].partition("@")[0] not in DIRECTIONS:
            raise RuleError("must be a name, >= or <=, and a number", short(value), remedy)
        return {"name": match[1], "op": match[2], "value": float(match[3])}

    @model_serializer
    def _text(self) -> str:
        return str(self)

    def __str__(self) -> str:
        return f"{self.name} {self.op} {self.value:.15g}"

    def holds(self, value: float) -> bool:
        """Whether a measured value keeps the bound; NaN keeps none."""
        return value >= self.value if self.op == ">=" else value <= self.value


def folder_of(info: ValidationInfo) -> Path:
    """The folder that a job's paths are relative to: the job file's, or the working directory."""
    return Path((info.context or {}).get("folder") or Path.cwd())


def resolve_path(value: Any, info: ValidationInfo) -> Any:
    """An absolute path of text or a path; other values are left to pydantic to refuse."""
    return (folder_of(info) / Path(value).expanduser()).resolve() if isinstance(value, str | Path) else value


def live_or_import(value: Any, *, names: tuple[str, ...] = (), zoos: bool = False) -> Any:
    """Let import strings, `names`, models of zoos and live objects pass.

    Raises:
        RuleError: It is a text of another form, or a plain value such as a number.
    """
    example = "write 'package.module:attribute', e.g. 'project:build' for build in project.py"
    forms = ["an import string", *map(repr, names), *(["timm:NAME", "torchvision:NAME"] if zoos else [])]
    rule = f"must be {', '.join(forms[:-1])} or {forms[-1]}" if len(forms) > 1 else f"must be {forms[0]}"
    if isinstance(value, str):
        form = value in names or value.startswith(_LIVE) or _IMPORT_STRING.fullmatch(value)
        if not form and not (zoos and _ZOO.fullmatch(value)):
            near = _closest(value, names)
            raise RuleError(rule, short(value), f"did you mean {near!r}?" if near else example)
    elif value is None or isinstance(value, bool | int | float | list | dict | bytes):
        raise RuleError(rule, short(value), example)
    return value


def as_text(value: Any) -> str:
    """How a live object is written: its import string where it has one, else ``<live NAME>``."""
    if isinstance(value, str):
        return value
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    found = sys.modules.get(module) if module and module != "__main__" else None
    for part in name.split(".") if found is not None and name else ():
        found = getattr(found, part, None)
    if name and found is value:
        return f"{module}:{name}"
    return f"{_LIVE}{name or type(value).__name__}>"


def home_folder(value: Any) -> str | None:
    """The folder that must be on `sys.path` to import a live object again; None where it always is."""
    if isinstance(value, str) or as_text(value).startswith(_LIVE):
        return None
    top = value.__module__.partition(".")[0]
    file = getattr(sys.modules.get(top), "__file__", None)
    if file is None or top == "paretune":
        return None
    folder = Path(file).parent.parent if Path(file).name == "__init__.py" else Path(file).parent
    installed = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]
    return None if any(folder.is_relative_to(place) for place in installed) else str(folder)


def plain(value: Any) -> Any:
    """Arguments as YAML can hold them: containers of plain values; a live object becomes ``<live NAME>``."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return f"{_LIVE}{getattr(value, '__qualname__', None) or type(value).__name__}>"


def string_or_object(schema: dict[str, Any]) -> None:
    """Tell editors that a bare string may stand for the section."""
    _become(schema, {"anyOf": [{"type": "string"}, dict(schema)]})


def _become(schema: dict[str, Any], other: dict[str, Any]) -> None:
    schema.clear()
    schema.update(other)


def _closest(name: str, known: tuple[str, ...]) -> str | None:
    return next(iter(difflib.get_close_matches(name, known, n=1)), None)


def _as_range(value: Any) -> Any:
    if _is_number(value):
        return (float(value), float(value))
    if isinstance(value, list | tuple) and len(value) == 2 and all(map(_is_number, value)):
        if value[0] > value[1]:
            raise RuleError("must have its lower end first", short(value), f"write [{value[1]}, {value[0]}]")
        return (float(value[0]), float(value[1]))
    raise RuleError("must be [low, high] or one number", short(value), "write e.g. [1, 8] to search it, or 4 to fix it")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < float("inf")


def _in_bounds(low: float, high: float, *, open_low: bool = False) -> Callable[[tuple[float, float]], Any]:
    def check(value: tuple[float, float]) -> tuple[float, float]:
        if value[0] < low or (open_low and value[0] == low) or value[1] > high:
            opening, closing = "(" if open_low else "[", ")" if high == float("inf") else "]"
            rule = f"must lie in {opening}{low:g}, {high:g}{closing}"
            raise RuleError(rule, short(list(value)), "move its ends into these bounds")
        return value

    return check


def _as_bits(value: Any) -> Any:
    if value == "auto":
        return value
    fits = isinstance(value, list | tuple) and value and all(type(bits) is int and 2 <= bits <= 32 for bits in value)
    if not fits:
        remedy = "write e.g. [8, 32], or auto for what the target's runtime executes"
        raise RuleError("must be 'auto' or a list of bit-widths from 2 to 32", short(value), remedy)
    return list(value)


def _schedule(value: str) -> str:
    try:
        Schedule.parse(value)
    except ValueError as error:
        rule = "must be one-shot, or linear:N, cubic:N or coarse-fine:N with 2 to 100 cuts (N)"
        raise RuleError(rule, short(value), "write e.g. cubic:4") from error
    return value


def _pattern(value: str) -> str:
    try:
        Sparsification(pattern=value)
    except ValueError as error:
        rule = "must be unstructured, or N:M with 0 < N < M"
        raise RuleError(rule, short(value), "write e.g. 2:4") from error
    return value


def _auto_or_bool(value: Any) -> Any:
    if value != "auto" and not isinstance(value, bool):
        raise RuleError("must be true, false or 'auto'", short(value), "use auto unless you have measured")
    return value


def _as_list(value: Any) -> Any:
    if isinstance(value, str | int | float):
        written = str(value).lower() if isinstance(value, bool) else repr(value)
        raise RuleError("must be a list of choices", short(value), f"write [{written}]")
    return value


def _as_patterns(value: Any) -> Any:
    if value != "auto" and isinstance(value, str | int | float):
        raise RuleError("must be 'auto' or a list of patterns", short(value), f"write [{value!r}]")
    return value


def _unique(values: list[_T]) -> list[_T]:
    for position, value in enumerate(values):
        if value in values[:position]:
            raise RuleError("must not repeat an entry", short(value), "remove one of them")
    return values


def _ascending(values: list[float]) -> list[float]:
    if any(first >= second for first, second in pairwise(values)):
        raise RuleError("must ascend", short(values), "write e.g. [0.25, 0.5]")
    return values


def _layers(value: Any) -> Any:
    names = [*value, *value.values()] if isinstance(value, dict) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        rule = "must be a list of layers' names, or a mapping of the model's to the teacher's"
        raise RuleError(rule, short(value), "write e.g. [layer2, layer3]")
    return value if isinstance(value, dict) else _unique(names)


def _name(value: Any) -> Any:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", value):
        rule = "must start with a letter or digit and have letters, digits, '.', '_' and '-' alone, at most 100"
        raise RuleError(rule, short(value), "use e.g. 'resnet18-cpu' (it names the run folder)")
    return value


_RANGE_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "number"},
        {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
    ]
}
_RangeBase = Annotated[tuple[float, float], BeforeValidator(_as_range), WithJsonSchema(_RANGE_SCHEMA)]
TemperatureRange = Annotated[_RangeBase, AfterValidator(_in_bounds(1, float("inf")))]
WeightRange = Annotated[_RangeBase, AfterValidator(_in_bounds(0, 1))]
RateRange = Annotated[_RangeBase, AfterValidator(_in_bounds(0, float("inf"), open_low=True))]

Name = Annotated[str, BeforeValidator(_name)]
Bits = Annotated[
    list[int] | Literal["auto"],
    BeforeValidator(_as_bits),
    AfterValidator(lambda v: v if v == "auto" else _unique(cast("list[int]", v))),
]
Choices = Annotated[list[_T], BeforeValidator(_as_list), Field(min_length=1), AfterValidator(_unique)]
"""A list of which the search chooses one entry; a single one fixes it."""

Augmentations = Annotated[list[Literal["crop", "flip", "cutout", "mixup"]], AfterValidator(_unique)]
Rungs = Annotated[list[Annotated[float, Field(gt=0, lt=1)]], AfterValidator(_ascending)]
Hints = Annotated[list[str] | dict[str, str], BeforeValidator(_layers)]
Importances = Choices[Importance]
Schedules = Choices[Annotated[str, AfterValidator(_schedule)]]
# Tags in angle brackets: messages leave them out of the key.
Patterns = Annotated[
    Annotated[Literal["auto"], Tag("<auto>")]
    | Annotated[Choices[Annotated[str, AfterValidator(_pattern)]], Tag("<several>")],
    Discriminator(lambda value: "<auto>" if isinstance(value, str) else "<several>"),
    BeforeValidator(_as_patterns),
]
Methods = Choices[Method]
Observers = Choices[Observer]
Flags = Choices[bool]
Clusters = Choices[Annotated[int, Field(ge=2, le=256)]]
WeightFrom0 = Annotated[_RangeBase, AfterValidator(_in_bounds(0, float("inf")))]
AutoBool = Annotated[bool | Literal["auto"], BeforeValidator(_auto_or_bool)]
ResolvedPath = Annotated[Path | None, BeforeValidator(resolve_path)]
Arguments = Annotated[dict[str, Any], PlainSerializer(plain, when_used="json")]

_AS_TEXT = PlainSerializer(as_text, when_used="json")
_TEXT_SCHEMA = WithJsonSchema({"type": "string"})
Factory = Annotated[Any, BeforeValidator(lambda value: live_or_import(value, zoos=True)), _AS_TEXT, _TEXT_SCHEMA]
DATA_NAMES = ("digits", "fashion-mnist", "npz", "imagefolder")
Source = Annotated[Any, BeforeValidator(lambda value: live_or_import(value, names=DATA_NAMES)), _AS_TEXT, _TEXT_SCHEMA]
TASK_NAMES = ("classification", "regression")
TaskName = Annotated[
    Any, BeforeValidator(lambda value: live_or_import(value, names=TASK_NAMES)), _AS_TEXT, _TEXT_SCHEMA
]
