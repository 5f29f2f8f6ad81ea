"""Checkpoints: where the training of a finished trial can go on, instead of starting anew.

A checkpoint is the compressed model late in its training in floats, before batch norm is folded and codebooks and
quantizers come: they are made for good, and a longer training must be free to move what they would fix. When it is
made, `paretune.objectives.course.train` says. It lies beside a trial's artifact; the optimizer's state isn't kept, as
each part of a training has a fresh one anyway.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn

from paretune.errors import TrialError
from paretune.objectives.artifact import PLAN
from paretune.spaces.plan import CompressionPlan

CHECKPOINT = "checkpoint.safetensors"
_KEY = "paretune"
"""Of the metadata; safetensors keeps its own beside it, where weights are shared."""


@dataclass(frozen=True)
class Checkpoint:
    """What is known of a checkpoint; the weights stay in its file.

    Attributes:
        folder: Where it lies: that of the artifact.
        asked: Hash of the plan as it was asked for, which may leave something to the weights.
        plan_hash: Hash of the same plan, resolved.
        seed: Of the training.
        epochs: Of the whole training that it comes from, through codebooks and quantizers as well.
        step: Position of its schedule at which the weights were kept.
        total: Length of its schedule.
    """

    folder: Path
    asked: str
    plan_hash: str
    seed: int
    epochs: float
    step: int
    total: int

    def save(self, model: nn.Module) -> None:
        """Write it with the weights of a model that is compressed wholly, but for codebooks and quantizers."""
        known = {name: value for name, value in asdict(self).items() if name != "folder"}
        save_model(model, str(self.folder / CHECKPOINT), {_KEY: json.dumps(known)})

    @classmethod
    def read(cls, folder: Path) -> Checkpoint:
        """The checkpoint of an artifact folder.

        Raises:
            TrialError: There is none, or it can't be read.
        """
        path = folder / CHECKPOINT
        if not path.is_file():
            raise TrialError(f"a trial must have a {CHECKPOINT} to go on from, but {folder} has none; start it anew")
        try:
            with safe_open(path, "pt") as file:
                return cls(folder, **json.loads((file.metadata() or {})[_KEY]))
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise _unreadable(path, error) from error

    def plan_for(self, asked: CompressionPlan, epochs: float) -> CompressionPlan:
        """The resolved plan of the artifact, if its training can go on as it is asked for.

        Args:
            asked: The plan that is to go on, resolved or not.
            epochs: Of the longer training, counted from its very beginning.

        Raises:
            TrialError: It is another plan's, or its training wouldn't become longer.
        """
        resolved = CompressionPlan.from_json((self.folder / PLAN).read_text())
        if asked.hash not in (self.asked, self.plan_hash) or resolved.hash != self.plan_hash:
            raise TrialError(
                f"a trial must go on with its own plan, {self.plan_hash[:12]}…, but got {asked.hash[:12]}… for "
                f"{self.folder}; start it anew"
            )
        if epochs <= self.epochs:
            raise TrialError(
                f"a trial that goes on must be trained for more than the {self.epochs:g} epochs that it was, but got "
                f"{epochs:g}; name more of them, counted from the beginning"
            )
        return resolved

    def load(self, model: nn.Module) -> None:
        """Put the weights and statistics into a model that was compressed by the same plan.

        Raises:
            TrialError: They don't fit it.
        """
        try:
            load_model(model, self.folder / CHECKPOINT)
        except (SafetensorError, RuntimeError) as error:
            raise _unreadable(self.folder / CHECKPOINT, error) from error


def _unreadable(path: Path, error: Exception) -> TrialError:
    reason = " ".join(str(error).split())[:200]
    return TrialError(
        f"a checkpoint must be whole and of the model that its plan makes, but {path} isn't "
        f"({type(error).__name__}: {reason}); start the trial anew"
    )
