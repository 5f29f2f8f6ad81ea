"""Artifacts: deployable model folders without pickles, which give the same outputs wherever they are loaded.

An artifact folder holds `plan.json`, `weights.safetensors` (the compressed module, float master weights and
quantizers), `model.onnx` (what is deployed and measured; a target with a runtime of its own has a file of its own,
`model@NAME.onnx`), the same packed where zeros, codebooks or few bits make that smaller (`model.onnx.packed`; see
`paretune.objectives.packing`), `probe.safetensors` (one batch of real inputs and the artifact's outputs for them) and
`card.json` (targets, metrics, environment, hashes of the other files). A trial's folder has `checkpoint.safetensors`
besides, from which its training can go on (`paretune.objectives.checkpoint`): no part of the artifact, without a hash
in the card, and not shipped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_model, save_model
from torch import nn

from paretune.errors import JobError, ParetuneError
from paretune.objectives.compress import compress_numerics, compress_structure
from paretune.objectives.compress.schemes import Scheme, Schemes
from paretune.objectives.environment import environment
from paretune.objectives.measurement import Measurement
from paretune.objectives.packing import PACKED, unpack
from paretune.objectives.problem import Problem
from paretune.objectives.runtimes import LoadOptions, Runtime, Session, Target, get_runtime
from paretune.objectives.runtimes.base import Array, Arrays
from paretune.spaces.plan import CompressionPlan

SCHEMA = 2
PLAN, WEIGHTS, PROBE, CARD = "plan.json", "weights.safetensors", "probe.safetensors", "card.json"
_OUTPUT = "output"


@dataclass(frozen=True)
class Deployed:
    """An artifact on one target.

    Attributes:
        target: Where it was measured.
        model: Name of the model file.
        float_bits: Width of all that isn't quantized.
        float_format: Its name, e.g. ``"bf16"``.
        settings: The runtime's settings under which it was measured.
    """

    target: Target
    model: str
    float_bits: int
    float_format: str
    settings: dict[str, str | int | bool]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return {**self.__dict__, "target": {**self.target.__dict__}}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Deployed:
        """Undo `to_dict`."""
        return cls(**data | {"target": Target(**data["target"])})

    def options(self) -> LoadOptions:
        """How it was loaded to be measured."""
        target = self.target
        return LoadOptions(target.batch_size, target.threads, self.float_bits, device=target.device)

    def runtime(self) -> Runtime:
        """What runs it."""
        return get_runtime(self.target.runtime, self.target.options)


@dataclass(frozen=True)
class Card:
    """What is known of an artifact.

    Attributes:
        main: The artifact on the job's first target.
        others: The same for each further target, by name.
        schemes: How quantized layers are quantized: with the plan, what the module's shape depends on.
        metrics: Its measurement, by split: ``{"validation": {"accuracy": …}}``.
        environment: Versions and hardware of the measurement.
        plan_hash: Canonical hash of the plan.
        files: File name to SHA-256.
    """

    main: Deployed
    others: dict[str, Deployed]
    schemes: Schemes
    metrics: dict[str, dict[str, Any]]
    environment: dict[str, Any]
    plan_hash: str
    files: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values, with the schema's version."""
        return {
            "schema": SCHEMA,
            **self.main.to_dict(),
            "others": {name: deployed.to_dict() for name, deployed in self.others.items()},
            "schemes": {str(width): scheme.to_dict() for width, scheme in self.schemes.items()},
            "metrics": self.metrics,
            "environment": self.environment,
            "plan_hash": self.plan_hash,
            "files": self.files,
        }

    @classmethod
    def read(cls, folder: Path) -> Card:
        """The card of an artifact folder.

        Raises:
            JobError: There is none, or it has another schema.
        """
        path = folder / CARD
        if not path.is_file():
            raise JobError("artifact", f"must be a folder with a {CARD}", folder, "use an artifact of a run")
        data = json.loads(path.read_text())
        if data.pop("schema", None) != SCHEMA:
            raise JobError("artifact", f"must have schema {SCHEMA}", folder, "read it with the version that wrote it")
        main = {entry.name: data.pop(entry.name) for entry in fields(Deployed)}
        data["schemes"] = {int(width): Scheme.from_dict(scheme) for width, scheme in data["schemes"].items()}
        data["others"] = {name: Deployed.from_dict(other) for name, other in data["others"].items()}
        return cls(main=Deployed.from_dict(main), **data)

    @property
    def deployed(self) -> dict[str, Deployed]:
        """On every target, by name; the first has none (``""``)."""
        return {"": self.main, **self.others}


class Loaded(NamedTuple):
    """What a runtime made of a model file: its settings, outputs for the target's batch of inputs, and where it was."""

    settings: Mapping[str, str | int | bool]
    outputs: Array
    environment: Mapping[str, Any]

    @classmethod
    def of(cls, session: Session, inputs: Arrays) -> Loaded:
        """Run a session once."""
        return cls(dict(session.settings), session.run(inputs), environment())


def save_artifact(
    folder: Path,
    module: nn.Module,
    plan: CompressionPlan,
    loaded: Mapping[str, Loaded],
    problem: Problem,
    *,
    float_bits: Mapping[str, int],
    validation: Measurement,
) -> None:
    """Complete an artifact folder that holds the model files already; the card comes last.

    Args:
        folder: Holds the model file of each target.
        module: What was deployed.
        plan: How it was made.
        loaded: Target's name to what its runtime made of the model file.
        problem: Gives the targets and the probe's inputs.
        float_bits: Target's name to the width of all that isn't quantized.
        validation: Its measurement.
    """
    (folder / PLAN).write_text(plan.to_json() + "\n")
    save_model(module, str(folder / WEIGHTS))  # shared tensors are stored once
    inputs = problem.batch(problem.target.batch_size)
    save_arrays({**inputs, _OUTPUT: loaded[""].outputs}, folder / PROBE)
    deployed = {
        name: Deployed(
            target=site.target,
            model=site.model,
            float_bits=float_bits[name],
            float_format=site.capabilities.float_formats[float_bits[name]],
            settings=dict(loaded[name].settings),
        )
        for name, site in problem.sites.items()
    }
    packed = {site.packed for site in problem.sites.values() if (folder / site.packed).is_file()}
    files = [PLAN, WEIGHTS, PROBE, *sorted({entry.model for entry in deployed.values()} | packed)]
    card = Card(
        main=deployed.pop(""),
        others=deployed,
        schemes=problem.schemes,
        metrics={"validation": validation.to_dict()},
        environment=dict(loaded[""].environment),
        plan_hash=plan.hash,
        files={name: sha256(folder / name) for name in files},
    )
    write_card(folder, card)


def load_module(folder: Path, problem: Problem) -> nn.Module:
    """The compressed module of an artifact, for PyTorch.

    The plan is replayed on a fresh dense model, which gives the module its shape; then the weights are loaded.

    Args:
        folder: The artifact.
        problem: Gives the dense model's factory and an example to trace with.
    """
    plan = CompressionPlan.from_json((folder / PLAN).read_text())
    problem = problem.of(plan.variant)
    context = replace(problem.context([]), schemes=Card.read(folder).schemes)
    module = compress_numerics(compress_structure(problem.model.build(), plan, context), plan, context)
    load_model(module, folder / WEIGHTS)
    return module.eval()


def load_probe(folder: Path) -> tuple[dict[str, Array], Array]:
    """The probe's inputs by name, and the outputs recorded for them."""
    arrays = load_arrays(folder / PROBE)
    return arrays, arrays.pop(_OUTPUT)


def load_session(folder: Path, name: str = "") -> Session:
    """Load the deployed model for the target of that name in the card, as it was loaded to be measured.

    Where only its packed form was shipped, it is restored beside that first.
    """
    deployed = Card.read(folder).deployed[name]
    path = folder / deployed.model
    packed = path.with_name(path.name + PACKED)
    if packed.is_file() and not path.is_file():
        unpack(packed, path)
    return deployed.runtime().load(path, deployed.options())


def verify_files(folder: Path) -> None:
    """Compare every file with its hash in the card.

    Raises:
        ParetuneError: One is missing or was changed.
    """
    for name, expected in Card.read(folder).files.items():
        path = folder / name
        found = sha256(path) if path.is_file() else "nothing"
        if found != expected:
            raise ParetuneError(
                f"{path} must have the SHA-256 {expected[:12]}… that its card names, but got {found[:12]}…; "
                "export it again from its run"
            )


def probe_difference(folder: Path) -> float:
    """Largest difference between the recorded outputs and those of the artifact as loaded now; 0 is bit for bit."""
    inputs, expected = load_probe(folder)
    return float(np.abs(load_session(folder).run(inputs) - expected).max())


def write_card(folder: Path, card: Card) -> None:
    """Write the card, last of all: a folder without one isn't an artifact."""
    (folder / CARD).write_text(json.dumps(card.to_dict(), indent=2, sort_keys=True) + "\n")


def sha256(path: Path) -> str:
    """Of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def replace_folder(source: Path, destination: Path) -> None:
    """Move a finished folder to its place; what stood there goes away only when it is there."""
    old = destination.with_name(f".old-{destination.name}")
    if destination.exists():
        shutil.rmtree(old, ignore_errors=True)
        destination.rename(old)
    source.rename(destination)
    shutil.rmtree(old, ignore_errors=True)
