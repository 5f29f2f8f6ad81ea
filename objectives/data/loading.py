"""From what the job names to splits that are known to be sound, before anything is spent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from paretune.errors import JobError
from paretune.objectives.data.builtin import BUILTIN
from paretune.objectives.data.inputs import tensors
from paretune.objectives.data.splits import (
    MEMORY_LIMIT_BYTES,
    Split,
    Splits,
    StreamSplit,
    as_inputs,
    as_targets,
    from_dataset,
)
from paretune.objectives.imports import call_factory, closest, import_string

_NAMES = ("train", "validation", "test")
# A streamed split is too big to read twice: so many samples, spread over it, stand for it.
_STREAM_PROBES = 64


def load_splits(
    source: str | Callable[..., Any] | Splits,
    args: Mapping[str, Any] | None = None,
    *,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
) -> Splits:
    """Load the data of a job and check them.

    Args:
        source: A built-in name (``digits``, ``fashion-mnist``, ``npz``, ``imagefolder``), an import string, a
            callable, or splits that are built already. A callable returns `Splits`, or train, validation and
            test as a tuple or dictionary of ``(inputs, targets)`` pairs (torch or numpy), map-style datasets
            or `Split`s.
        args: Keyword arguments of the callable or built-in.
        memory_limit_bytes: Datasets above this size are streamed, one limit for each split.

    Raises:
        JobError: The source can't be imported, fails or returns something else; or a split is empty, has
            inputs and targets of different lengths, NaN or infinite values, or another structure than the
            train split.
    """
    if isinstance(source, Splits):
        if args:
            raise JobError("data.args", "must be empty for splits that are built already", dict(args), "remove them")
        splits = source
    else:
        splits = _as_splits(call_factory(_find(source), args or {}, where="data"), memory_limit_bytes)
    for name in _NAMES:
        _check_values(name, getattr(splits, name))
    for name in _NAMES[1:]:
        _check_structure(name, splits.train, getattr(splits, name))
    return splits


def _find(source: str | Callable[..., Any]) -> Callable[..., Any]:
    found: Any = source
    if isinstance(source, str):
        if ":" not in source and not source.startswith("<live "):
            if source not in BUILTIN:
                remedy = f"{closest(source, BUILTIN)} (your own functions are written 'package.module:function')"
                raise JobError("data.source", "must be a built-in name or an import string", repr(source), remedy)
            return BUILTIN[source]
        found = import_string(source, where="data.source")
    if isinstance(found, Splits):
        splits = found
        return lambda: splits
    if not callable(found):
        raise JobError(
            "data.source", "must name a function", f"{source!r}, a {type(found).__name__}", "name a function"
        )
    return found  # type: ignore[no-any-return]


def _as_splits(result: Any, memory_limit_bytes: int) -> Splits:
    if isinstance(result, Splits):
        return result
    if isinstance(result, dict):
        members = dict(result)
        if "val" in members:
            members["validation"] = members.pop("val")
        if set(members) == set(_NAMES):
            result = tuple(members[name] for name in _NAMES)
    if isinstance(result, tuple | list) and len(result) == len(_NAMES):
        parts = [_as_split(*pair, memory_limit_bytes) for pair in zip(_NAMES, result, strict=True)]
        return Splits(train=parts[0], validation=parts[1], test=parts[2])
    got = type(result).__name__
    if isinstance(result, dict):
        got = f"a dict with {', '.join(map(repr, result)) or 'no keys'}"
    elif isinstance(result, tuple | list):
        got = f"a {got} of {len(result)}"
    raise JobError(
        "data.source",
        "must return Splits, or train, validation and test as a tuple or dict",
        got,
        "return e.g. ((x_train, y_train), (x_validation, y_validation), (x_test, y_test))",
    )


def _as_split(name: str, value: Any, memory_limit_bytes: int) -> Split:
    if isinstance(value, Split):
        return value
    if isinstance(value, tuple | list) and len(value) == 2:
        return Split(as_inputs(value[0]), as_targets(value[1]))
    if (
        hasattr(value, "__getitem__")
        and hasattr(value, "__len__")
        and not isinstance(value, tuple | list | dict | str | Tensor)
    ):
        return from_dataset(value, memory_limit_bytes=memory_limit_bytes)
    raise JobError(
        "data.source",
        f"must return a {name} split as (inputs, targets), a map-style dataset or a Split",
        type(value).__name__,
        "a map-style dataset has __len__ and __getitem__; iterable ones can't be split by index",
    )


def _check_values(name: str, split: Split) -> None:
    if not isinstance(split, Split):
        raise JobError(
            "data.source",
            f"must give the {name} split as a Split",
            type(split).__name__,
            "use Split(inputs, targets)",
        )
    if len(split) == 0:
        raise JobError(
            "data.source",
            f"must give a {name} split with samples",
            "0 samples",
            "check how the data are split",
        )
    if isinstance(split, StreamSplit):
        split = split.subset(torch.linspace(0, len(split) - 1, min(_STREAM_PROBES, len(split))).long())
    parts = {f"inputs {key!r}" if key else "inputs": tensor for key, tensor in tensors(split.inputs).items()}
    for label, tensor in {**parts, "targets": split.targets}.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = (~torch.isfinite(tensor)).reshape(len(tensor), -1).any(1).nonzero()[:, 0]
            first = int(split.indices[bad[0]])
            raise JobError(
                "data.source",
                f"must give finite {label} in its {name} split",
                f"NaN or infinity in {len(bad)} of {len(tensor)} samples, first in sample {first}",
                "clean or drop them in the function that loads the data",
            )


def _check_structure(name: str, train: Split, other: Split) -> None:
    expected, got = _structure(train), _structure(other)
    if expected != got:
        raise JobError(
            "data.source",
            f"must give a {name} split of the same structure as the train split, {expected}",
            got,
            "load all splits in the same way; only the number of samples may differ",
        )


def _structure(split: Split) -> str:
    sample = split.head(1)

    def describe(tensor: Tensor) -> str:
        return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape[1:])}"

    inputs = ", ".join(
        f"{key}: {describe(tensor)}" if key else describe(tensor) for key, tensor in tensors(sample.inputs).items()
    )
    kind = type(sample.inputs).__name__
    return f"{kind}({inputs}) -> {describe(sample.targets)}"
