"""How techniques are used: settings that say nothing where their technique does nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paretune.spaces.plan import CompressionPlan, Quantization

INTEGER = 8
"""Layers of more bits are in floats."""

_OF_WIDTHS = ("observer", "aware", "activations", "granularity", "affine")

SETTINGS: Mapping[str, frozenset[str]] = {
    "importance": frozenset({"prune"}),
    "schedule": frozenset({"prune", "sparsify"}),
    "method": frozenset({"factorize"}),
    "pattern": frozenset({"sparsify"}),
    **{name: frozenset({"quantize"}) for name in _OF_WIDTHS},
}
"""Parameter to the sections of a plan without which it does nothing."""


def quantization(bits: dict[str, int], value: Mapping[str, Any]) -> Quantization:
    """The section of a plan with these widths; its settings only where any layer is quantized.

    Args:
        bits: Layer to width.
        value: Parameter to its value, of all that say how layers are quantized.
    """
    if all(width > INTEGER for width in bits.values()):
        return Quantization(bits=bits)
    settings = {name: value[name] for name in _OF_WIDTHS}
    # Where both are choices, nothing else keeps a sampler from drawing the two together.
    settings["affine"] = value["affine"] and value["activations"] == "float"
    return Quantization(bits=bits, **settings)


def settings_of(plan: CompressionPlan) -> dict[str, Any]:
    """Parameter to what a plan says of it; missing where the technique isn't used and nothing but the default is said.

    Args:
        plan: Any, also one that sets what does nothing: a space without that choice must refuse it.
    """
    used = {
        "prune": any(plan.prune.ratios.values()) or bool(plan.prune.ratio or plan.prune.threshold),
        "quantize": any(width <= INTEGER for width in plan.quantize.bits.values()),
        "factorize": bool(plan.factorize.ranks),
        "sparsify": any(plan.sparsify.sparsity.values()),
    }
    said, default = _said(plan), _said(CompressionPlan())
    found = {
        name: value
        for name, value in said.items()
        if value != default[name] or any(used[section] for section in SETTINGS[name])
    }
    if plan.quantize.activations == "quantized":
        found.pop("affine", None)  # can only be false then
    return found


def _said(plan: CompressionPlan) -> dict[str, Any]:
    settings = {name: getattr(plan.quantize, name) for name in _OF_WIDTHS}
    return {
        "importance": plan.prune.importance,
        "schedule": str(plan.schedule),
        "method": plan.factorize.method,
        "pattern": plan.sparsify.pattern,
        **settings,
    }
