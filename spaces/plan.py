"""The compression plan: one point of the search space, frozen, as JSON, with a canonical hash."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from paretune.errors import JobError

Importance = Literal["l1", "l2", "bn-scale", "taylor", "random"]

# Six digits tell any two channel counts below half a million apart, and make equal plans equal as JSON.
Ratio = Annotated[float, AfterValidator(lambda value: round(value, 6)), Field(ge=0, lt=1)]


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Pruning(_Config):
    """Structured pruning: whole channels are removed, so that the model really gets smaller.

    Attributes:
        ratios: Group name to the share of its channels removed, in [0, 1). Groups left out keep all.
        importance: Which channels go first. `l1` and `l2` (Li et al., 2017, arXiv:1608.08710), `bn-scale`
            (Liu et al., 2017, arXiv:1708.06519), `taylor` (Molchanov et al., 2019, arXiv:1906.10771), `random`.
    """

    ratios: dict[str, Ratio] = {}
    importance: Importance = "l1"


class Quantization(_Config):
    """Fake quantization that is trained and then deployed as integers (Jacob et al., 2018, arXiv:1712.05877).

    Attributes:
        bits: Layer name to bit-width. 16 and 32 are float formats and stay unquantized; layers left out run
            in the target's float format.
    """

    bits: dict[str, Annotated[int, Field(ge=2, le=32)]] = {}


class Finetuning(_Config):
    """How the compressed model is trained to recover.

    Attributes:
        learning_rate: Peak of the schedule, > 0.
        temperature: Distillation temperature, >= 1 (Hinton et al., 2015, arXiv:1503.02531).
        distillation_weight: Share of the loss that comes from the teacher's outputs, in [0, 1].
    """

    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    temperature: Annotated[float, Field(ge=1)] = 4.0
    distillation_weight: Annotated[float, Field(ge=0, le=1)] = 0.5


class CompressionPlan(_Config):
    """Everything that a trial does to the model; evaluating the same plan with the same seed repeats the trial."""

    schema_version: Annotated[Literal[1], Field(alias="schema")] = 1
    prune: Pruning = Pruning()
    quantize: Quantization = Quantization()
    finetune: Finetuning = Finetuning()

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON (sorted keys, zero ratios left out), as 64 hexadecimal digits."""
        return hashlib.sha256(self.to_json(indent=None).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-able values, canonical: a ratio of 0 says nothing and is left out."""
        data = self.model_dump(mode="json", by_alias=True)
        data["prune"]["ratios"] = {name: ratio for name, ratio in data["prune"]["ratios"].items() if ratio > 0}
        return data

    def to_json(self, *, indent: int | None = 2) -> str:
        """The canonical JSON text; `indent` is for reading alone."""
        return json.dumps(self.to_dict(), sort_keys=True, indent=indent)

    @classmethod
    def from_json(cls, text: str) -> CompressionPlan:
        """Read a plan back.

        Raises:
            JobError: The text isn't a plan of a known schema.
        """
        try:
            return cls.model_validate_json(text)
        except ValueError as error:
            raise JobError(
                "plan", "must be a compression plan of schema 1", error, "use a plan.json of a run"
            ) from error
