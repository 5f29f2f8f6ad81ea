"""Artifacts: deployable model folders without pickles, which give the same outputs wherever they are loaded.

An artifact folder holds `plan.json`, `weights.safetensors` (the compressed module, float master weights and
quantizers), `model.onnx` (what is deployed and measured), `probe.safetensors` (one batch of real inputs and the
artifact's outputs for them) and `card.json` (metrics, environment, hashes of the other files).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
from paretune.objectives.problem import Problem
from paretune.objectives.runtimes import LoadOptions, Session, Target, get_runtime
from paretune.objectives.runtimes.base import Array
from paretune.spaces.plan import CompressionPlan

SCHEMA = 1
MODEL, PLAN, WEIGHTS, PROBE, CARD = (
    "model.onnx",
    "plan.json",
    "weights.safetensors",
    "probe.safetensors",
    "card.json",
)
FILES = (PLAN, WEIGHTS, MODEL, PROBE)
"""All that an artifact holds beside its card."""

_OUTPUT = "output"


@dataclass(frozen=True)
class Card:
    """What is known of an artifact.

    Attributes:
        target: Where it was measured.
        float_bits: Width of all that isn't quantized.
        float_format: Its name, e.g. ``"bf16"``.
        schemes: How quantized layers are quantized: with the plan, what the module's shape depends on.
        settings: The runtime's settings under which it was measured.
        metrics: Its measurement, by split: ``{"validation": {"accuracy": …}}``.
        environment: Versions and hardware of the measurement.
        plan_hash: Canonical hash of the plan.
        files: File name to SHA-256.
    """

    target: Target
    float_bits: int
    float_format: str
    schemes: Schemes
    settings: dict[str, str | int | bool]
    metrics: dict[str, dict[str, Any]]
    environment: dict[str, Any]
    plan_hash: str
    files: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values, with the schema's version."""
        schemes = {str(width): scheme.to_dict() for width, scheme in self.schemes.items()}
        return {"schema": SCHEMA, **self.__dict__, "target": self.target.__dict__, "schemes": schemes}

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
        schemes = {int(width): Scheme.from_dict(scheme) for width, scheme in data["schemes"].items()}
        return cls(**data | {"target": Target(**data["target"]), "schemes": schemes})


def save_artifact(
    folder: Path,
    module: nn.Module,
    plan: CompressionPlan,
    session: Session,
    problem: Problem,
    *,
    float_bits: int,
    validation: Measurement,
) -> None:
    """Complete an artifact folder that holds the model file already; the card comes last.

    Args:
        folder: Holds `model.onnx`.
        module: What was deployed.
        plan: How it was made.
        session: The deployed model, loaded for the problem's target.
        problem: Gives the probe's inputs and the target.
        float_bits: Width of all that isn't quantized.
        validation: Its measurement.
    """
    (folder / PLAN).write_text(plan.to_json() + "\n")
    save_model(module, str(folder / WEIGHTS))  # shared tensors are stored once
    inputs = problem.batch()
    save_arrays({**inputs, _OUTPUT: session.run(inputs)}, folder / PROBE)
    card = Card(
        target=problem.target,
        float_bits=float_bits,
        float_format=problem.capabilities.float_formats[float_bits],
        schemes=problem.schemes,
        settings=dict(session.settings),
        metrics={"validation": validation.to_dict()},
        environment=environment(),
        plan_hash=plan.hash,
        files={name: sha256(folder / name) for name in FILES},
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
    context = replace(problem.context([]), schemes=Card.read(folder).schemes)
    module = compress_numerics(compress_structure(problem.model.build(), plan, context), plan, context)
    load_model(module, folder / WEIGHTS)
    return module.eval()


def load_probe(folder: Path) -> tuple[dict[str, Array], Array]:
    """The probe's inputs by name, and the outputs recorded for them."""
    arrays = load_arrays(folder / PROBE)
    return arrays, arrays.pop(_OUTPUT)


def load_session(folder: Path, *, threads: int | None = None) -> Session:
    """Load the deployed model for the target that the card names."""
    card = Card.read(folder)
    target = card.target
    options = LoadOptions(target.batch_size, threads or target.threads, card.float_bits, device=target.device)
    return get_runtime(target.runtime, target.options).load(folder / MODEL, options)


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
