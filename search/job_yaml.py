"""YAML for jobs: safe, without duplicate keys, and with the numbers of YAML 1.2."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from paretune.errors import JobError

_MERGE = "tag:yaml.org,2002:merge"


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a job file.

    Raises:
        JobError: The file can't be read, isn't YAML, has a key twice or isn't a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        remedy = "give the path of a job file; `paretune init` writes one"
        raise JobError("job", "must be a readable file", f"{path} ({error})", remedy) from error
    content = parse_yaml(text, where=path.name)
    if not isinstance(content, dict):
        got = "nothing" if content is None else type(content).__name__
        raise JobError(path.name, "must be a mapping of keys", got, "`paretune init` writes an example")
    return content


def parse_yaml(text: str, *, where: str) -> Any:
    """Parse YAML 1.2's numbers and booleans: `1e-3` is a number and `no` a word, other than in PyYAML.

    Args:
        text: One document.
        where: The file or override that it comes from, for messages.

    Raises:
        JobError: It isn't YAML, or a mapping has a key twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except _DuplicateKeyError as error:
        raise JobError(where, "must have each key once", error, "remove one of them") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        remedy = "check the indentation, and quote texts that hold ': ' or start with a special character"
        raise JobError(where, "must be YAML", f"{error.problem}{place}", remedy) from error
    except (yaml.YAMLError, ValueError) as error:
        raise JobError(where, "must be YAML", error, "check its values and special characters") from error


def write_yaml(content: dict[str, Any]) -> str:
    """The text of a job, keys in their order."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


class _DuplicateKeyError(Exception):
    pass


_RESOLVERS = (
    ("tag:yaml.org,2002:bool", re.compile(r"true|True|TRUE|false|False|FALSE"), "tTfF"),
    ("tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F_]+"), "-+0123456789"),
    (
        "tag:yaml.org,2002:float",
        re.compile(
            r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan"
        ),
        "-+0123456789.",
    ),
    ("tag:yaml.org,2002:null", re.compile(r"~|null|Null|NULL|"), "~nN\0"),
    (_MERGE, re.compile(r"<<"), "<"),
)


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for tag, pattern, starts in _RESOLVERS:
        whole = re.compile(f"(?:{pattern.pattern})$")
        for start in starts.replace("\0", ""):
            table.setdefault(start, []).append((tag, whole))
        if "\0" in starts:  # PyYAML looks empty values up under an empty start.
            table.setdefault("", []).append((tag, whole))
    return table


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = _resolvers()

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                if key.value in lines:
                    raise _DuplicateKeyError(f"{key.value!r} in line {lines[key.value]} and again in line {line}")
                lines[key.value] = line
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    # What the loader reads as a number or a boolean has to be quoted where it is a text.
    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = _resolvers()

    def ignore_aliases(self, data: Any) -> bool:
        return True
