"""The seam of the runtimes: what turns a module into something that runs, and tells what it really executes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import nn

from paretune.errors import JobError
from paretune.objectives.compress.schemes import STATIC, Schemes
from paretune.objectives.data.inputs import Inputs

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]
"""Inputs of an artifact: name to array, batch first."""


@dataclass(frozen=True)
class Target:
    """Where an artifact runs: its latency is measured for exactly this.

    Attributes:
        runtime: Name of the runtime.
        device: What the runtime runs on, e.g. ``"cpu"``.
        batch_size: Samples per call.
        threads: Threads that one call may use.
        options: The runtime's own choices, e.g. ``{"half": "fp16"}``.
    """

    runtime: str
    device: str = "cpu"
    batch_size: int = 1
    threads: int = 1
    options: Mapping[str, str | int | bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Capabilities:
    """What a runtime really executes on a device.

    Attributes:
        float_formats: Float width to its format, widest first; all unquantized layers of an artifact share one.
        integer_bits: Layer kind (class name) to the widths of 8 and less that run on kernels of their own.
        schemes: Such a width to how its layers must be quantized.
        sparse_patterns: Patterns ``N:M`` of zeros that run on kernels of their own, some kinds of layers at least;
            others are multiplied like all weights.
    """

    float_formats: Mapping[int, str]
    integer_bits: Mapping[str, tuple[int, ...]]
    schemes: Schemes = field(default_factory=lambda: STATIC)
    sparse_patterns: tuple[str, ...] = ()

    @property
    def float_bits(self) -> tuple[int, ...]:
        """Float widths, widest first."""
        return tuple(self.float_formats)

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
        device: What it runs on.
        float_bits: Width of all that isn't quantized.
        purpose: ``"measure"`` pins threads to cores; ``"score"`` leaves them to the scheduler, because several
            workers may score at once; ``"profile"`` times each layer, which slows the whole down.
    """

    batch_size: int
    threads: int = 1
    float_bits: int = 32
    purpose: Literal["measure", "score", "profile"] = "measure"
    device: str = "cpu"


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
    """Turns compressed modules into artifacts and runs them. Stateless: one object serves all trials.

    A runtime is made of its target's options, as keyword arguments; it raises JobError (``target.options``) for values
    that it doesn't know.

    Attributes:
        suffix: Of the model file that `deploy` writes.
        packages: Distributions whose versions decide what it executes.
        compiles: Whether loading compiles, and on a GPU times kernels, for seconds.
    """

    suffix: str = ".onnx"
    packages: tuple[str, ...]
    compiles: bool = False

    @abstractmethod
    def capabilities(self, device: str) -> Capabilities:
        """What it executes on `device`; raises JobError for a device that it doesn't have."""

    @abstractmethod
    def deploy(self, module: nn.Module, inputs: Inputs, path: Path) -> None:
        """Write `module` (in eval mode, quantizers frozen) as the model file of an artifact."""

    @abstractmethod
    def load(self, path: Path, options: LoadOptions) -> Session:
        """Compile the model file for running."""


def choose(option: str, value: object, allowed: Sequence[object]) -> None:
    """Raise JobError unless the value of an option is an allowed one, bools apart from numbers."""
    if not any(value == good and type(value) is type(good) for good in allowed):
        rule = f"{option} must be one of {', '.join(map(str, allowed))}"
        raise JobError("target.options", rule, repr(value), f"use {allowed[0]}, or leave it out")
