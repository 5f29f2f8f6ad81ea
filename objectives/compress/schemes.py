"""How a runtime wants layers quantized: what is trained through must be what its kernels compute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Scheme:
    """From what numbers a runtime computes the layers of one width.

    Weights have one scale for each output channel, or for each block of inputs.

    Attributes:
        activations: The layer's input. ``static``: one grid for the tensor, fixed by calibration; ``dynamic``: one grid
            for each row (last dimension), from the values at hand; ``float``: not quantized, so weights alone are.
        symmetric: Whether a static grid is int8 with zero in its middle; otherwise it is uint8 with a zero point.
            Dynamic grids are always symmetric.
        outputs: Kinds of layers (class names) whose output must be put on a static grid too.
        block: Inputs that share a weight scale; None gives each output channel one. Where blocks of this size don't
            part a layer's inputs evenly, it is halved, down to `least_block`.
        least_block: What the inputs of a layer with weights in blocks must be a multiple of.
        number: ``int``, or ``fp8`` (e4m3) for 8-bit floating-point numbers.
        affine: Whether weights have zero points; runtimes don't ask for it, plans do where weights alone are quantized.
        per_tensor: Whether all scales of a weight are equal; only plans ask for it: any kernel does it.
    """

    activations: Literal["static", "dynamic", "float"] = "static"
    symmetric: bool = False
    outputs: tuple[str, ...] = ()
    block: int | None = None
    least_block: int = 16
    number: Literal["int", "fp8"] = "int"
    affine: bool = False
    per_tensor: bool = False

    @property
    def weights_alone(self) -> bool:
        """Whether weights are stored in few bits, and the layer is computed in floats, or in a kernel of its own."""
        return self.activations == "float"

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self) | {"outputs": list(self.outputs)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Scheme:
        """Undo `to_dict`."""
        return cls(**{**data, "outputs": tuple(data["outputs"])})


Schemes = Mapping[int, Scheme]
"""Width to the scheme of its layers."""

STATIC: Schemes = {8: Scheme()}
"""What OpenVINO wants: uint8 inputs on fixed grids, int8 weights with a scale for each output channel."""


def merge(first: Schemes, second: Schemes) -> dict[int, Scheme]:
    """The schemes that serve two runtimes at once; widths that they want from different numbers are left out.

    A quantized output does no harm where it isn't needed, so runtimes may differ in that.
    """
    merged = {}
    for width in first.keys() & second.keys():
        one, other = first[width], second[width]
        common: dict[str, Any] = {
            "outputs": tuple(sorted({*one.outputs, *other.outputs})),
            "least_block": max(one.least_block, other.least_block),
        }
        if replace(one, **common) == replace(other, **common):
            merged[width] = replace(one, **common)
    return merged
