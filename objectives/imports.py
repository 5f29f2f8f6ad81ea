"""From what a job names (an import string and its arguments) to objects, with errors that say what to fix."""

from __future__ import annotations

import difflib
import importlib
import importlib.machinery
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from paretune.errors import JobError

_IMPORT_STRING = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
_LIVE = "<live "


def closest(name: str, known: Iterable[str]) -> str:
    """A phrase that names the nearest of the `known` names, or all of them where none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known are {', '.join(names[:12])}{', …' if len(names) > 12 else ''}" if names else "there is none"


def add_to_path(folders: Iterable[str | Path]) -> None:
    """Put folders at the front of `sys.path`, in their order, unless they are there already."""
    for folder in reversed([str(folder) for folder in folders]):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    importlib.invalidate_caches()


def import_string(text: str, *, where: str) -> Any:
    """Import what an import string names.

    Args:
        text: ``"package.module:attribute"``; the attribute may be dotted.
        where: The job key that holds the text, for messages.

    Raises:
        JobError: The text is no import string, the module or the attribute doesn't exist, the import raised
            an exception, or a module of that name from another folder is loaded already.
    """
    if text.startswith(_LIVE):
        raise JobError(
            where,
            "must be importable for this",
            f"{text}, an object that lived in the process which started the run",
            "pass the object again from Python, or name one that a module defines ('pkg.module:name')",
        )
    if not _IMPORT_STRING.fullmatch(text):
        raise JobError(
            where,
            "must be an import string",
            repr(text),
            "write 'package.module:attribute', e.g. 'project:build' for the function build in project.py",
        )
    module_name, _, attribute = text.partition(":")
    value: Any = _import_module(module_name, where=where)
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise JobError(
                where,
                f"must name something that {module_name!r} defines",
                repr(attribute),
                closest(part, (name for name in dir(value) if not name.startswith("_"))),
            )
        value = getattr(value, part)
    return value


def call_factory(factory: Callable[..., Any], args: Mapping[str, Any], *, where: str) -> Any:
    """Call a user's function with the arguments of the job.

    Args:
        factory: Any callable.
        args: Its keyword arguments.
        where: The job section (``"model"``, ``"data"``); its arguments are the key ``<where>.args``.

    Raises:
        JobError: The arguments don't fit the signature, or the function raised an exception.
    """
    _check_arguments(factory, args, where=f"{where}.args")
    try:
        return factory(**args)
    except JobError:
        raise
    except Exception as error:
        name = getattr(factory, "__qualname__", repr(factory))
        raise JobError(
            where,
            f"must load without an error from {name}()",
            _describe(error),
            "see the cause above; fix it or the args",
        ) from error


def _check_arguments(factory: Callable[..., Any], args: Mapping[str, Any], *, where: str) -> None:
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # Some C callables have no signature; calling them tells.
        return
    by_name = {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    }
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    for name, value in args.items():
        if isinstance(value, str) and value.startswith(_LIVE):
            got = f"{value}, an object that lived in the process which started the run"
            raise JobError(f"{where}.{name}", "must be a plain value here", got, "pass it again from Python")
        if name not in by_name and not takes_all:
            raise JobError(where, "must hold parameters of the function alone", repr(name), closest(name, by_name))
    for name, parameter in by_name.items():
        if parameter.default is inspect.Parameter.empty and name not in args:
            given = ", ".join(map(repr, args)) or "none"
            raise JobError(where, f"must hold the required parameter {name!r}", given, f"add {where}.{name}")


def _import_module(name: str, *, where: str) -> Any:
    _refuse_namesake(name.partition(".")[0], where=where)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if name != missing and not name.startswith(f"{missing}."):
            raise _broken_import(name, error, where=where) from error
        parent, _, last = missing.rpartition(".")
        raise JobError(
            where,
            "must name a module that can be imported",
            f"{missing!r}, which doesn't exist",
            f"{_hint(parent, last)}modules are looked for beside the job file, in the folders of "
            "python_path and in the installed packages",
        ) from error
    except (Exception, SystemExit) as error:  # A script without a `__main__` guard may well exit.
        raise _broken_import(name, error, where=where) from error


def _broken_import(name: str, error: BaseException, *, where: str) -> JobError:
    remedy = f"see the cause above; `python -c 'import {name}'` shows it alone"
    return JobError(
        where,
        f"must name a module that imports without an error, as {name!r} should",
        _describe(error),
        remedy,
    )


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _hint(parent: str, name: str) -> str:
    path = getattr(sys.modules.get(parent), "__path__", None) if parent else None
    names = [module.name for module in pkgutil.iter_modules(path)]
    # Hundreds of modules are at the top level: some are always a little alike, so only very near ones help.
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6 if parent else 0.8)
    return f"did you mean {near[0]!r}? Note that " if near else ""


def _refuse_namesake(name: str, *, where: str) -> None:
    """Two jobs in one process may both have a `project.py`: never run the first one's code for the second."""
    loaded = getattr(sys.modules.get(name), "__file__", None)
    if loaded is None:
        return
    spec = importlib.machinery.PathFinder.find_spec(name)
    if spec is None or spec.origin is None or not Path(spec.origin).exists() or not Path(loaded).exists():
        return
    if not Path(spec.origin).samefile(loaded):
        raise JobError(
            where,
            f"must name the module {name!r} that is found first",
            f"{loaded}, loaded before, though {spec.origin} comes first on the path",
            "use another process for this job, or give the modules different names",
        )
