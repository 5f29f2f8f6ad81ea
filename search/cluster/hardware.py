"""Whether two machines measure alike: latencies of unlike ones are never pooled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paretune.errors import SearchError

_ALIKE = ("processor", "cores", "governor", "boost", "cuda", "torch", "openvino", "onnxruntime", "tensorrt")
"""What decides how fast an artifact runs, beside the GPUs and the memory, of `paretune.objectives.environment`."""

_OF_GPU = ("name", "driver")

_MEMORY = 0.05
"""Equal boxes may differ by this share of their memory: firmware and kernel keep some for themselves."""


def hardware(environment: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an environment that says how fast artifacts run there; of what changes by the minute, nothing.

    Args:
        environment: As of `paretune.objectives.environment.environment`, also as it was read from a run's JSON.
    """
    found = {key: environment[key] for key in (*_ALIKE, "memory_gib") if key in environment}
    for key, state in environment.items():
        if key.startswith("gpu ") and isinstance(state, Mapping):
            found[key] = ", driver ".join(str(state[part]) for part in _OF_GPU if state.get(part))
    return found


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """In which ways two machines are unlike, in words; empty where they measure alike, as far as is known of both.

    Args:
        expected: `hardware` of the one.
        found: Of the other.
    """
    return [
        f"{key} is {found[key]}, not {expected[key]}"
        for key in expected
        if key in found and not _same(key, expected[key], found[key])
    ]


def _same(key: str, one: Any, other: Any) -> bool:
    numbers = isinstance(one, int | float) and isinstance(other, int | float)
    if key == "memory_gib" and numbers:
        return bool(abs(one - other) <= _MEMORY * max(one, other))
    return bool(one == other)


def check_alike(expected: Mapping[str, Any], environment: Mapping[str, Any]) -> None:
    """See that a measuring machine is like those that measured before it.

    Args:
        expected: What they are, as of `paretune.search.cluster.hardware.hardware`.
        environment: Of this one, with the name of its ``node``.

    Raises:
        SearchError: It isn't.
    """
    if unlike := differences(expected, hardware(environment)):
        raise SearchError(
            "all that is measured in a run must be measured on like hardware, because latencies are compared, but on "
            f"{environment['node']} {'; '.join(unlike)}; give ray.measure to equal nodes alone, those of the run's "
            "environment.json, or begin a run of its own there"
        )
