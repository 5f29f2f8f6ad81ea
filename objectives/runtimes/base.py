"""The seam of the runtimes: what turns a module into something that runs, and tells what it really executes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import nn

from paretune.objectives.data.inputs import Inputs

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]
"""Inputs of an artifact: name to array, batch first."""

FORMAT_OF_BITS = {32: "f32", 16: "bf16"}
"""The float format that a width above 8 stands for."""


@dataclass(frozen=True)
class Target:
    """Where an artifact runs: its latency is measured for exactly this.

    Attributes:
        runtime: Name of the runtime.
        device: What the runtime runs on, e.g. ``"cpu"``.
        batch_size: Samples per call.
        threads: Threads that one call may use.
    """

    runtime: str
    device: str = "cpu"
    batch_size: int = 1
    threads: int = 1


@dataclass(frozen=True)
class Capabilities:
    """What a runtime really executes on a device.

    Attributes:
        float_bits: Float widths; all unquantized layers of an artifact share one.
        integer_bits: Layer kind (class name) to the integer widths that run on integer kernels.
    """

    float_bits: tuple[int, ...]
    integer_bits: Mapping[str, tuple[int, ...]]

    def widths(self, kind: str) -> tuple[int, ...]:
        """Widths of a layer of this kind, widest first."""
        return (*self.float_bits, *self.integer_bits.get(kind, ()))


class LayerReport(NamedTuple):
    """What became of one layer: its executed width, and its share of a call (0 unless profiled)."""

    bits: int
    share: float


@dataclass(frozen=True)
class LoadOptions:
    """How an artifact is loaded.

    Attributes:
        batch_size: Fixed: static shapes are at least 1.4 times faster under OpenVINO.
        threads: Threads of one call.
        float_bits: Width of all that isn't quantized.
        purpose: ``"measure"`` pins threads to cores; ``"score"`` leaves them to the scheduler, because several
            workers may score at once; ``"profile"`` times each layer, which slows the whole down.
    """

    batch_size: int
    threads: int = 1
    float_bits: int = 32
    purpose: Literal["measure", "score", "profile"] = "measure"


class Session(ABC):
    """A loaded artifact. Made by `Runtime.load`, used by one thread at a time.

    Attributes:
        settings: The runtime's own settings under which it was compiled; an exported artifact runs under the same.
    """

    settings: Mapping[str, str | int | bool]

    @abstractmethod
    def run(self, inputs: Arrays) -> Array:
        """The output of one batch of exactly the session's batch size."""

    @abstractmethod
    def bind(self, inputs: Arrays) -> Callable[[], object]:
        """A function that runs the session on these inputs and does nothing else: what the clock calls."""

    @abstractmethod
    def layers(self) -> dict[str, LayerReport]:
        """Each layer with weights as the runtime really executes it, by module name."""


class Runtime(ABC):
    """Turns compressed modules into artifacts and runs them. Stateless: one object serves all trials."""

    @abstractmethod
    def capabilities(self, device: str) -> Capabilities:
        """What it executes on `device`; raises JobError for a device that it doesn't have."""

    @abstractmethod
    def deploy(self, module: nn.Module, inputs: Inputs, path: Path) -> None:
        """Write `module` (in eval mode, quantizers frozen) as the model file of an artifact."""

    @abstractmethod
    def load(self, path: Path, options: LoadOptions) -> Session:
        """Compile the model file for running."""
