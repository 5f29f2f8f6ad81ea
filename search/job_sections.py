"""The sections of a job, as frozen records; none of them imports torch or Optuna."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from paretune.search.job_errors import RuleError
from paretune.search.job_types import (
    Arguments,
    AutoBool,
    Bits,
    Device,
    Factory,
    Importances,
    Name,
    RateRange,
    ResolvedPath,
    RuntimeOptions,
    Section,
    Source,
    TemperatureRange,
    WeightRange,
    resolve_path,
    string_or_object,
)


class ModelSection(Section):
    """The trained model to compress."""

    factory: Factory = Field(
        description="What builds the model: an import string 'package.module:function', 'timm:NAME' or "
        "'torchvision:NAME'; from Python also a callable or a module."
    )
    args: Arguments = Field(default={}, description="Keyword arguments of the factory.")
    weights: ResolvedPath = Field(
        default=None,
        description="State dictionary (.safetensors, .pt, .pth), relative to the job file; null: none.",
    )


# Tags in angle brackets: messages leave them out of the key.
Teacher = Annotated[
    Annotated[Literal["same"], Tag("<same>")] | Annotated[ModelSection, Tag("<model>")],
    Discriminator(lambda value: "<same>" if isinstance(value, str) else "<model>"),
]


class DataSection(Section):
    """The data; a bare string stands for its source."""

    model_config = ConfigDict(json_schema_extra=string_or_object)

    source: Source = Field(
        description="Built-in data (digits, fashion-mnist, npz, imagefolder) or import string of a function "
        "that returns train, validation and test; from Python also a callable or Splits."
    )
    args: Arguments = Field(
        default={}, description="Keyword arguments of the source; root and path are relative to the job file."
    )

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        plain = value is None or isinstance(value, bool | int | float | list | dict | DataSection)
        return value if plain else {"source": value}

    @field_validator("args")
    @classmethod
    def _resolve(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        found = {
            key: str(resolve_path(value[key], info)) for key in ("root", "path") if isinstance(value.get(key), str)
        }
        return {**value, **found}


class SpaceSection(Section):
    """What may be chosen. A range is [low, high], or one number that fixes it."""

    prune: bool = Field(default=True, description="Whether channels are removed.")
    quantize: bool = Field(default=True, description="Whether layers get a bit-width.")
    max_ratio: float = Field(
        default=0.75, gt=0, lt=1, description="Largest share of a group's channels removed, in (0, 1)."
    )
    bits: Bits = Field(
        default="auto",
        description="Bit-widths to choose from, from 2 to 32; auto: those the target's runtime executes.",
    )
    channels: Literal["probe", "fixed"] = Field(
        default="probe",
        description="Which channel counts are offered: probe, those at which the main target is measured to get faster "
        "(half a minute or so for each batch size and largest group, then remembered; more where a runtime compiles); "
        "fixed, multiples of 8, and of 16 from 64 on.",
    )
    importance: Importances = Field(
        default=["l1"], description="Rules for which channels go first: l1, l2, bn-scale, taylor, random."
    )
    temperature: TemperatureRange = Field(
        default=(1.0, 8.0), description="Range of the distillation temperature, >= 1."
    )
    distillation_weight: WeightRange = Field(
        default=(0.0, 1.0), description="Range of the teacher's share of the loss, in [0, 1]."
    )
    learning_rate: RateRange = Field(
        default=(1e-4, 1e-2), description="Range of the peak learning rate, > 0, searched on a log scale."
    )
    exclude: list[str] = Field(
        default=[],
        description="Names of layers left as they are; glob patterns such as 'layer4.*' are allowed.",
    )

    @model_validator(mode="after")
    def _something_to_search(self) -> SpaceSection:
        if not self.prune and not self.quantize:
            raise RuleError(
                "must leave something to choose",
                "prune: false and quantize: false",
                "set one of them to true",
            )
        return self


class FinetuneSection(Section):
    """How a compressed model is trained to recover."""

    epochs: float = Field(
        default=1.0, gt=0, description="Passes over the training data in a trial, > 0; fractions are fine."
    )
    batch_size: int = Field(default=128, ge=1, description="Samples a training step.")
    optimizer: Literal["adamw", "sgd"] = Field(default="adamw", description="adamw, or sgd with momentum.")
    weight_decay: float = Field(default=1e-4, ge=0, description="Weight decay, >= 0.")
    warmup: float = Field(
        default=0.1, ge=0, lt=1, description="Share of the steps in which the learning rate rises, in [0, 1)."
    )
    gradient_clip: Annotated[float, Field(gt=0)] | None = Field(
        default=1.0, description="Largest norm of the gradient, > 0; null for no limit."
    )
    device: str = Field(
        default="auto",
        description="What trains: cpu, cuda (the first GPU), cuda:N, or auto: a GPU where PyTorch finds one.",
    )
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Float format of training; auto: bfloat16 where the hardware has it; float16 needs a GPU.",
    )
    tf32: bool = Field(
        default=True, description="Whether a GPU may compute in TF32 what stays float32; without effect on a CPU."
    )
    channels_last: AutoBool = Field(
        default="auto", description="Memory layout of images in training: true, false or auto."
    )
    quantized_share: float = Field(
        default=0.3,
        ge=0,
        le=1,
        description="Share of the steps, the last ones, with fake quantization on, in [0, 1].",
    )
    calibration_batches: int = Field(
        default=4, ge=1, description="Batches from which the ranges of activations are read."
    )

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        # Whether the machine has it is for those to say who import torch.
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
            raise RuleError("must be auto, cpu, cuda or cuda:N", repr(value), "use auto")
        return value


class TargetSection(Section):
    """Where the artifact will run, and is measured."""

    runtime: str = Field(
        default="openvino",
        min_length=1,
        description="What executes the artifact: openvino, onnxruntime, torch-compile, torch-cuda or tensorrt.",
    )
    device: Device = Field(default="cpu", description="The runtime's device: cpu, cuda or cuda:N.")
    batch_size: int = Field(default=1, ge=1, description="Samples in one timed call.")
    threads: int = Field(default=1, ge=1, description="Threads of the runtime.")
    options: RuntimeOptions = Field(
        default={}, description="The runtime's own choices, e.g. {half: fp16}; `paretune doctor` names them."
    )


class NamedTarget(TargetSection):
    """One of several targets."""

    name: Name | None = Field(
        default=None, description="What its numbers are called: latency_ms@NAME; null: automatic."
    )
    objective: bool = Field(
        default=True, description="Whether its latency is an objective of its own; false: measured and reported."
    )

    @property
    def label(self) -> str:
        """Its name, or one made of what it is."""
        return self.name or f"{self.runtime}-{self.device.replace(':', '')}-b{self.batch_size}"


class SearchSection(Section):
    """How long and how to search."""

    trials: Annotated[int, Field(ge=1)] | None = Field(
        default=60, description="Number of trials, >= 1; null: until the timeout."
    )
    timeout: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Seconds after which no trial is started, > 0; null: no limit."
    )
    sampler: Literal["tpe", "nsga2", "gp", "random", "uniform"] = Field(
        default="tpe", description="What proposes plans: tpe, nsga2, gp, random or uniform."
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of the sampler and of the trials, in [0, 2^32).")
    workers: int = Field(default=1, ge=1, description="Trials at a time, each in a process of its own.")
    executor: Literal["local"] = Field(default="local", description="Where the workers run: local.")
    trial_timeout: float = Field(
        default=900.0, gt=0, description="Seconds after which a trial is stopped as failed, > 0."
    )
    uniform_trials: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="How many plans with one ratio and one width throughout come first; null: automatic.",
    )

    @model_validator(mode="after")
    def _ends(self) -> SearchSection:
        if self.trials is None and self.timeout is None:
            raise RuleError("must end", "trials: null and timeout: null", "give search.trials or search.timeout")
        return self


class VerifySection(Section):
    """How the front is verified on the test split when the search is over."""

    epochs: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="Passes over the training data for each point, > 0; null: twice finetune.epochs.",
    )
    rounds: int = Field(default=7, ge=1, description="Separate rounds in which the points are measured together.")
    points: Annotated[int, Field(ge=1)] | None = Field(
        default=12, description="How many plans are verified: the front, then the next best; null: all of the front."
    )
