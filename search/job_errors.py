"""From pydantic's errors to one message that says the rule, the value and the remedy of every mistake."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from paretune.errors import JobError

_SHOWN = 80


class RuleError(ValueError):
    """A broken rule, raised by a validator of a job; pydantic collects it with the others.

    Args:
        rule: What must hold, as a phrase that follows the key.
        got: The value that broke it, as text.
        remedy: What to do about it.
        key: The key within the section at fault, where the validator sees the whole section.
    """

    def __init__(self, rule: str, got: str, remedy: str, *, key: str = "") -> None:
        super().__init__(f"{rule}, but got {got}; {remedy}")
        self.rule = rule
        self.got = got
        self.remedy = remedy
        self.key = key


def as_job_error(error: ValidationError, model: type[BaseModel], *, source: str) -> JobError:
    """One `JobError` with every mistake that pydantic found.

    Args:
        error: What pydantic raised.
        model: The class of the job.
        source: The file, for the headline.
    """
    found: dict[str, JobError] = {}
    for item in error.errors(include_url=False):
        # The members of a union report one by one; the first says enough.
        mistake = _mistake(dict(item), model)
        found.setdefault(mistake.where, mistake)
    mistakes = list(found.values())
    if len(mistakes) == 1:
        return mistakes[0]
    listed = "\n".join(f"  - {mistake}" for mistake in mistakes)
    combined = JobError(source, "must be free of mistakes", f"{len(mistakes)} of them", "correct each")
    combined.args = (f"{source} has {len(mistakes)} mistakes:\n{listed}",)
    return combined


def short(value: object) -> str:
    """A value as text for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _mistake(item: dict[str, Any], model: type[BaseModel]) -> JobError:
    # Tagged unions put their tag into the location, which is no key of the job.
    location: Sequence[str | int] = [part for part in item["loc"] if not str(part).startswith("<")]
    where = _dotted(location)
    cause = item.get("ctx", {}).get("error")
    if isinstance(cause, RuleError):
        return JobError(".".join(filter(None, (where, cause.key))) or "job", cause.rule, cause.got, cause.remedy)
    if item["type"] == "extra_forbidden":
        return JobError(where, "must be a known key", "an unknown one", _nearest_key(location, model))
    if item["type"] == "missing":
        return JobError(where, "must be given", "nothing", f"add it: {_meaning(location, model)}")
    rule = re.sub(r"^\w+ should", "must", item["msg"])
    if item["type"] == "literal_error":
        expected = re.findall(r"'([^']*)'", str(item["ctx"]["expected"]))
        near = difflib.get_close_matches(str(item["input"]), expected, n=1)
        fallback = "use one of them" if len(expected) > 1 else f"expected: {_meaning(location, model)}"
        remedy = f"did you mean {near[0]!r}?" if near else fallback
    elif item["type"] == "model_type":
        rule, remedy = "must be a mapping of keys", "write its keys below it, indented"
    else:
        remedy = f"expected: {_meaning(location, model)}"
    return JobError(where or "job", rule, short(item["input"]), remedy)


def _dotted(location: Sequence[str | int]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _section(location: Sequence[str | int], model: type[BaseModel]) -> type[BaseModel]:
    for part in location:
        field = model.model_fields.get(str(part))
        section = _model_of(field.annotation) if field else None
        if section is None:
            break
        model = section
    return model


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The section that an annotation is or, in a union, may be."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_of, get_args(annotation))), None)


def _meaning(location: Sequence[str | int], model: type[BaseModel]) -> str:
    names = [part for part in location if isinstance(part, str)]
    for end in range(len(names), 0, -1):
        field = _section(names[: end - 1], model).model_fields.get(names[end - 1])
        if field is not None and field.description:
            return field.description[:1].lower() + field.description[1:].rstrip(".")
    return "a value of that kind"


def _nearest_key(location: Sequence[str | int], model: type[BaseModel]) -> str:
    *parents, name = location
    siblings = list(_section(parents, model).model_fields)
    # The right key in the wrong section is likelier than another key that looks alike.
    elsewhere = [key for key in _keys(model) if key.rpartition(".")[2] == name]
    if elsewhere:
        return f"did you mean {elsewhere[0]!r}?"
    near = difflib.get_close_matches(str(name), siblings, n=1)
    if near:
        return f"did you mean {_dotted([*parents, near[0]])!r}?"
    return f"known here are {', '.join(siblings)}"


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")
