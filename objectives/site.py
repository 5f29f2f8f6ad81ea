"""A target, ready to use: its runtime, its model file, its clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from paretune.errors import TrialError
from paretune.objectives.clocks import Call, Clock, clock_for
from paretune.objectives.device import is_cuda
from paretune.objectives.runtimes import Capabilities, LayerReport, LoadOptions, Runtime, Session, Target, get_runtime
from paretune.objectives.usage import measure_usage


@dataclass(frozen=True)
class Site:
    """One target of a job. A live handle: its runtime and clock are made when first used.

    Attributes:
        name: The target's name in the job; empty for the first one.
        target: What it is.
        stem: Of its model file's name. Targets of the same runtime with the same options share one.
    """

    name: str
    target: Target
    stem: str = "model"

    @cached_property
    def runtime(self) -> Runtime:
        """What runs artifacts here."""
        return get_runtime(self.target.runtime, self.target.options)

    @cached_property
    def capabilities(self) -> Capabilities:
        """What is executed here."""
        return self.runtime.capabilities(self.target.device)

    @cached_property
    def clock(self) -> Clock:
        """Times calls here."""
        return clock_for(self.target.device)

    @property
    def model(self) -> str:
        """Name of this target's model file in an artifact."""
        return f"{self.stem}{self.runtime.suffix}"

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


def check_executed(
    reports: Mapping[str, LayerReport], bits: Mapping[str, int], float_bits: int, layers: Iterable[str]
) -> dict[str, int]:
    """The widths in which layers are executed, by name.

    Args:
        reports: What the runtime says.
        bits: What the plan asks for. A float width of a plan stands for the target's own float format.
        float_bits: The target's own.
        layers: Names of the layers that must be found, beside those that are to run in 8 bits or less.

    Raises:
        TrialError: A layer runs in another width than it was asked to.
    """
    wanted = dict.fromkeys([*layers, *(name for name, width in bits.items() if width <= 8)])
    executed = {name: reports[name].bits for name in wanted if name in reports}
    for name in wanted:
        asked = bits.get(name, float_bits)
        asked = asked if asked <= 8 else float_bits
        if executed.get(name) != asked:
            found = f"runs in {executed[name]}" if name in executed else "isn't found in the compiled model"
            raise TrialError(
                f"every layer must run in the width that the plan asks for, but {name} was to run in {asked} bits "
                f"and {found}; exclude it (space.exclude) or fix space.bits"
            )
    return executed
