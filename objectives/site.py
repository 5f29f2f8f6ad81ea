"""A target, ready to use: its runtime, its model file, its clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import nn

from paretune.errors import TrialError
from paretune.objectives.clocks import Call, Clock, clock_for
from paretune.objectives.compress.lowrank import layers_of
from paretune.objectives.compress.quantization import QuantizedLayer
from paretune.objectives.device import is_cuda
from paretune.objectives.packing import PACKED, pack
from paretune.objectives.runtimes import Capabilities, LayerReport, LoadOptions, Runtime, Session, Target, get_runtime
from paretune.objectives.usage import measure_usage

_WORTH = 0.98
"""Share of the model file's bytes that a packed one may have; some arrays of any model, as fresh biases, are zeros."""


@dataclass(frozen=True)
class Site:
    """One target of a job. A live handle: its runtime and clock are made when first used.

    Attributes:
        name: The target's name in the job; empty for the first one.
        target: What it is.
        stem: Of its model file's name. Targets of the same runtime with the same options share one.
        known: What is executed there, where the target is on another machine; None finds out.
    """

    name: str
    target: Target
    stem: str = "model"
    known: Capabilities | None = None

    @cached_property
    def runtime(self) -> Runtime:
        """What runs artifacts here."""
        return get_runtime(self.target.runtime, self.target.options)

    @cached_property
    def capabilities(self) -> Capabilities:
        """What is executed here."""
        return self.known or self.runtime.capabilities(self.target.device)

    @cached_property
    def clock(self) -> Clock:
        """Times calls here."""
        return clock_for(self.target.device)

    @property
    def model(self) -> str:
        """Name of this target's model file in an artifact."""
        return f"{self.stem}{self.runtime.suffix}"

    @property
    def packed(self) -> str:
        """Name of the model file in packed form, where an artifact has one."""
        return self.model + PACKED

    def pack(self, folder: Path) -> None:
        """Put the model file of an artifact beside it in packed form, if that is worth a second file."""
        pack(folder / self.model, folder / self.packed)
        if (folder / self.packed).stat().st_size > _WORTH * (folder / self.model).stat().st_size:
            (folder / self.packed).unlink()

    def size(self, folder: Path) -> int:
        """Bytes of this target's model file of an artifact, as it is stored: packed, where that is smaller."""
        packed = folder / self.packed
        return (packed if packed.is_file() else folder / self.model).stat().st_size

    def options(self, float_bits: int, *, purpose: Literal["measure", "score", "profile"] = "measure") -> LoadOptions:
        """How to load a model file here."""
        target = self.target
        return LoadOptions(target.batch_size, target.threads, float_bits, purpose, target.device)

    def usage(self, call: Call) -> dict[str, Any]:
        """What a bound call takes besides its time, under the names of `OnTarget`; on GPUs alone, it takes a second."""
        if not is_cuda(self.target.device):
            return {}
        return asdict(measure_usage(call, batch_size=self.target.batch_size, device=self.target.device))

    def load(self, folder: Path, float_bits: int, *, purpose: Literal["measure", "profile"] = "measure") -> Session:
        """Load this target's model file of an artifact."""
        return self.runtime.load(folder / self.model, self.options(float_bits, purpose=purpose))


@dataclass(frozen=True)
class Wanted:
    """How a layer must be executed.

    Attributes:
        allowed: Widths, in bits.
        asked: What was asked for, in words.
        is_seen: Whether the runtime must report it.
    """

    allowed: tuple[int, ...]
    asked: str
    is_seen: bool = True


def wanted_widths(model: nn.Module, float_bits: int, layers: Iterable[str] | None) -> dict[str, Wanted]:
    """How each layer of a module must be executed, by name; the parts of a factorized layer count as layers.

    A layer of few bits runs in the width of its container (`QuantizedLayer.container`), for which there are kernels.
    One whose weight alone is quantized, in no blocks, may be computed in floats as well.

    Args:
        model: What is deployed.
        float_bits: Width of the target's own float format, which all other layers run in.
        layers: Names of the layers, as the dense model has them, that a runtime must report beside the quantized ones;
            None where that isn't known: then what it reports of the others must be as wanted.
    """
    quantized = {name: part for name, part in model.named_modules() if isinstance(part, QuantizedLayer)}
    named = [name for name, _ in model.named_modules()] if layers is None else list(layers)
    parts = dict.fromkeys([*(part for name in named for part in layers_of(model, name)), *quantized])
    seen = layers is not None
    return {name: Wanted(*_allowed(quantized.get(name), float_bits), seen or name in quantized) for name in parts}


def check_executed(reports: Mapping[str, LayerReport], wanted: Mapping[str, Wanted]) -> dict[str, int]:
    """The widths in which layers are executed, by name.

    Args:
        reports: What the runtime says.
        wanted: How they must be.

    Raises:
        TrialError: A layer runs in another width than it was asked to.
    """
    executed = {name: reports[name].bits for name in wanted if name in reports}
    for name, how in wanted.items():
        if executed.get(name) in how.allowed or (name not in executed and not how.is_seen):
            continue
        found = f"runs in {executed[name]}" if name in executed else "isn't found in the compiled model"
        raise TrialError(
            f"every layer must run in the width that the plan asks for, but {name} was to run in {how.asked} and "
            f"{found}; exclude it (space.exclude) or fix space.bits"
        )
    return executed


def _allowed(layer: QuantizedLayer | None, float_bits: int) -> tuple[tuple[int, ...], str]:
    """In which widths a layer may run, and what was asked for, in words."""
    if layer is None:
        return (float_bits,), f"{float_bits} bits"
    kernel = layer.container
    asked = f"{layer.bits} bits" if layer.bits == kernel else f"{layer.bits} bits, stored in {kernel},"
    in_floats = layer.scheme.weights_alone and not layer.scheme.block
    return (kernel, float_bits) if in_floats else (kernel,), asked
