"""What is known of a space before its first trial: records without behaviour, so that a run can keep them as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from paretune.spaces.analysis import Analysis


@dataclass(frozen=True)
class LayerCost:
    """A layer of the dense model, and which groups cut it.

    Attributes:
        name: Path of the module.
        macs: Multiply-accumulates for one sample.
        params: Weights and biases.
        share: Of the dense latency, in [0, 1]; 0 where the runtime doesn't report the layer.
        output: Group that cuts its output channels; None where they stay.
        inputs: Groups that cut its input channels: several after a concatenation.
    """

    name: str
    macs: int
    params: int
    share: float
    output: str | None
    inputs: tuple[str, ...] = ()


def layer_costs(analysis: Analysis) -> tuple[LayerCost, ...]:
    """The layers of an analysis, with the groups that cut them."""
    outputs = {name: group.name for group in analysis.groups for name in group.layers}
    return tuple(
        LayerCost(
            layer.name,
            layer.macs,
            layer.params,
            analysis.latency_share.get(layer.name, 0.0),
            outputs.get(layer.name),
            tuple(group.name for group in analysis.groups if layer.name in group.consumers),
        )
        for layer in analysis.layers
    )


@dataclass(frozen=True)
class Architecture:
    """The model, or a variant of it.

    Attributes:
        layers: In the order of execution.
        damage: Parameter (`paretune.spaces.units.Unit.param`) to its levels, as they were probed, to the share of what
            the dense model knows that is lost when this alone is done, without training
            (`paretune.objectives.sensitivity.Sensitivity.share_lost`): 0 is nothing, 1 is everything. A level that
            couldn't be probed is missing.
    """

    layers: tuple[LayerCost, ...]
    damage: Mapping[str, Mapping[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Outlined:
    """A plan that was deployed and measured without training.

    Attributes:
        params: The Optuna parameters of the plan.
        values: What is known of it: ``latency_ms``, ``size_bytes``, ``params``, ``macs``, those of further targets as
            ``latency_ms@NAME`` (`paretune.objectives.evaluate.Evaluator.outline`).
    """

    params: Mapping[str, Any]
    values: Mapping[str, float]


@dataclass(frozen=True)
class Knowledge:
    """Everything that is known before the first trial.

    Attributes:
        dense: The baseline's measured values, named as objectives are.
        architectures: ``"model"`` (`paretune.spaces.space.MODEL`) and the variants, by name.
        outlines: Plans measured without training.
        seconds: What finding it out took, by part: ``sensitivity``, ``outlines``.
    """

    dense: Mapping[str, float]
    architectures: Mapping[str, Architecture] = field(default_factory=dict)
    outlines: tuple[Outlined, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        data = asdict(self)
        for architecture in data["architectures"].values():
            # Keys of JSON objects are strings: levels are kept as pairs.
            architecture["damage"] = {name: list(levels.items()) for name, levels in architecture["damage"].items()}
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Knowledge:
        """Undo `to_dict`."""
        architectures = {
            name: Architecture(
                tuple(LayerCost(**{**layer, "inputs": tuple(layer["inputs"])}) for layer in found["layers"]),
                {param: dict(pairs) for param, pairs in found["damage"].items()},
            )
            for name, found in data["architectures"].items()
        }
        outlines = tuple(Outlined(**outlined) for outlined in data["outlines"])
        return cls(data["dense"], architectures, outlines, data["seconds"])
