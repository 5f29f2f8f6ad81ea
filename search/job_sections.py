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
    Augmentations,
    AutoBool,
    Bits,
    Choices,
    Clusters,
    Device,
    Factory,
    Flags,
    Hints,
    Importances,
    Methods,
    Name,
    Observers,
    Patterns,
    RateRange,
    ResolvedPath,
    Rungs,
    RuntimeOptions,
    Schedules,
    Section,
    Source,
    TemperatureRange,
    WeightFrom0,
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


class MainModelSection(ModelSection):
    """The model of the job, and lighter ones that may take its place."""

    variants: dict[Name, ModelSection] = Field(
        default={},
        description="Lighter architectures for the same inputs and outputs, by name (factory, args, weights): one more "
        "choice of the search. Each is compressed like the model, and taught by it.",
    )

    @field_validator("variants")
    @classmethod
    def _not_the_model(cls, value: dict[str, ModelSection]) -> dict[str, ModelSection]:
        if "model" in value:
            raise RuleError("must not be called model, the name of the model itself", "'model'", "choose another name")
        return value


# Tags in angle brackets: messages leave them out of the key.
_OneTeacher = Annotated[
    Annotated[Literal["same"], Tag("<same>")] | Annotated[ModelSection, Tag("<model>")],
    Discriminator(lambda value: "<same>" if isinstance(value, str) else "<model>"),
]
Teacher = Annotated[
    Annotated[_OneTeacher, Tag("<one>")] | Annotated[Choices[_OneTeacher], Tag("<several>")],
    Discriminator(lambda value: "<several>" if isinstance(value, list) else "<one>"),
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

    prune: AutoBool = Field(
        default="auto",
        description="Whether channels may be removed; auto: where a trial on the targets, before the search, shows "
        "that it saves something of what the objectives count.",
    )
    quantize: AutoBool = Field(
        default="auto", description="Whether layers get a bit-width of 8 or less; auto as for prune, for each width."
    )
    scope: Literal["layer", "global", "threshold"] = Field(
        default="layer",
        description="What is chosen for pruning: layer, a ratio for each group; global, one ratio of all channels, the "
        "least important of the whole model first; threshold, one bound below which channels go.",
    )
    max_ratio: float = Field(
        default=0.75, gt=0, lt=1, description="Largest share of channels removed, of a group or of all, in (0, 1)."
    )
    schedule: Schedules = Field(
        default=["one-shot"],
        description="In how many cuts, with fine-tuning after each: one-shot, linear:N, cubic:N, coarse-fine:N.",
    )
    factorize: AutoBool = Field(
        default="auto", description="Whether layers may be split into low-rank factors; auto as for prune."
    )
    method: Methods = Field(
        default=["tucker"], description="How convolutions are factorized: tucker, spatial; all else by SVD."
    )
    sparsify: AutoBool = Field(
        default="auto", description="Whether single weights may be set to zero; auto as for prune."
    )
    pattern: Patterns = Field(
        default="auto",
        description="What sparse weights look like: unstructured, or N:M such as 2:4; auto: unstructured, and the "
        "patterns that the targets have kernels for.",
    )
    max_sparsity: float = Field(
        default=0.9, gt=0, lt=1, description="Largest share of a layer's weights set to zero, in (0, 1)."
    )
    share: AutoBool = Field(
        default="auto", description="Whether layers may share few weights in a codebook; auto as for prune."
    )
    clusters: Clusters = Field(default=[64, 16], description="Sizes of codebooks, in [2, 256], beside none at all.")
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
        default=["l1"],
        description="Rules for which channels go first: l1, l2, bn-scale, fpgm, lamp, taylor, hessian, activation, "
        "apoz, random.",
    )
    observer: Observers = Field(
        default=["minmax"], description="How ranges of quantized numbers are found: minmax, percentile, mse."
    )
    aware: Flags = Field(
        default=[True], description="Whether the model is trained through its quantizers, or quantized afterwards."
    )
    activations: Choices[Literal["quantized", "float"]] = Field(
        default=["quantized"], description="quantized, or float: weights alone are quantized, which saves size."
    )
    granularity: Choices[Literal["per-channel", "per-tensor"]] = Field(
        default=["per-channel"], description="How many scales quantized weights have: per-channel, per-tensor."
    )
    affine: Flags = Field(
        default=[False], description="Whether quantized weights have a zero point, where activations are float."
    )
    temperature: TemperatureRange = Field(
        default=(1.0, 8.0), description="Range of the distillation temperature, >= 1."
    )
    distillation_weight: WeightRange = Field(
        default=(0.0, 1.0), description="Range of the teacher's share of the loss, in [0, 1]."
    )
    hint_weight: WeightFrom0 = Field(
        default=(0.0, 0.0), description="Range of the weight of the loss on finetune.hints, >= 0."
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
        switches = {name: getattr(self, name) for name in ("prune", "quantize", "factorize", "sparsify", "share")}
        if not any(switches.values()):
            raise RuleError("must leave something to choose", f"{', '.join(switches)}: false", "set one to true")
        if True in self.affine and "float" not in self.activations:
            remedy = "add float to activations: integer kernels want weights without one"
            raise RuleError("must be false where activations are quantized", "true", remedy, key="affine")
        return self


class FinetuneSection(Section):
    """How a compressed model is trained to recover."""

    epochs: float = Field(
        default=1.0, gt=0, description="Passes over the training data in a trial, > 0; fractions are fine."
    )
    batch_size: int = Field(default=128, ge=1, description="Samples a training step.")
    optimizer: Literal["adamw", "sgd"] = Field(default="adamw", description="adamw, or sgd with momentum.")
    weight_decay: float = Field(default=1e-4, ge=0, description="Weight decay, >= 0.")
    schedule: Literal["cosine", "one-cycle"] = Field(
        default="cosine",
        description="Of the learning rate: cosine, with a warm-up; one-cycle, with less momentum at the peak.",
    )
    warmup: float = Field(
        default=0.1, ge=0, lt=1, description="Share of the steps in which the learning rate of cosine rises, in [0, 1)."
    )
    plateau: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="Share of the steps, in (0, 1): when the loss hasn't fallen over so many, the rest of the schedule "
        "is run through in as many; null: never.",
    )
    gradient_clip: Annotated[float, Field(gt=0)] | None = Field(
        default=1.0, description="Largest norm of the gradient, > 0; null for no limit."
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of each label that goes to all classes alike, in [0, 1); for classification alone.",
    )
    ema: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="Decay of the average of the weights that takes their place in the end, in (0, 1); null: none.",
    )
    freeze_batchnorm: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the steps in floats, the last ones, that leave batch norm's statistics alone, in [0, 1].",
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
        default="auto",
        description="Memory layout of images in training: true, false or auto, where it makes the net's kind faster.",
    )
    compile: bool = Field(
        default=False, description="Whether torch.compile compiles the training; pays off in long ones on a GPU."
    )
    quantized_share: float = Field(
        default=0.3,
        ge=0,
        le=1,
        description="Share of the steps, the last ones, with fake quantization on, in [0, 1].",
    )
    augment: Augmentations = Field(
        default=[],
        description="What is done to each training batch of images: crop, flip, cutout; mixup, also of other inputs.",
    )
    hints: Hints = Field(
        default=[],
        description="Layers whose features follow the teacher's, the first one's of several: names of layers that both "
        "have, or a mapping of the model's names to the teacher's.",
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
    sampler: Literal["front", "tpe", "nsga2", "gp", "random", "uniform"] = Field(
        default="front",
        description="What proposes plans: front, which profiles the model and measures plans untrained; tpe, nsga2, "
        "gp, random or uniform.",
    )
    stopping: Literal["front", "none"] = Field(
        default="front",
        description="Which trials are ended early: front, those that can't reach the front any more; none.",
    )
    rungs: Rungs = Field(
        default=[0.25, 0.5],
        description="Shares of a trial's training at which it is judged, ascending, in (0, 1); []: it isn't.",
    )
    seed: int = Field(default=0, ge=0, lt=2**32, description="Seed of the sampler and of the trials, in [0, 2^32).")
    workers: int = Field(default=1, ge=1, description="Trials at a time, each in a process of its own.")
    executor: Literal["local", "ray"] = Field(
        default="local", description="Where the workers run: local, or ray, on the cluster that the section ray names."
    )
    trial_timeout: float = Field(
        default=900.0, gt=0, description="Seconds after which a trial is stopped as failed, > 0."
    )
    uniform_trials: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="How many plans with one ratio and one width throughout come first; null: automatic (none with the "
        "sampler front, which has them among its candidates).",
    )

    @model_validator(mode="after")
    def _ends(self) -> SearchSection:
        if self.trials is None and self.timeout is None:
            raise RuleError("must end", "trials: null and timeout: null", "give search.trials or search.timeout")
        return self


class TrialResources(Section):
    """What a trial's worker takes of a Ray node."""

    cpu: float = Field(default=1.0, gt=0, description="Cores, > 0; a worker trains with as many threads, at least 1.")
    gpu: float = Field(default=0.0, ge=0, description="GPUs, >= 0; a fraction shares one.")
    memory_gb: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Memory that Ray reserves, in GB; null: none."
    )
    custom: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={}, description="Custom resources of Ray, name to amount."
    )


class RaySection(Section):
    """The Ray cluster on which a job with search.executor: ray runs."""

    address: str | None = Field(
        default=None,
        description="Of the cluster, auto or HOST:6379; null: RAY_ADDRESS, or else one is started on this machine.",
    )
    resources: TrialResources = Field(default=TrialResources(), description="What each trial's worker takes.")
    measure: str | None = Field(
        default=None,
        description="Custom resource of the nodes on which everything is measured, one at a time on each, with nothing "
        "of ours beside it; null: the node on which the search itself runs.",
    )
    storage: str | None = Field(
        default=None,
        description="Folder or URL (fsspec, e.g. s3://bucket/folder) that all nodes reach, for artifacts on their way; "
        "null: Ray's object store.",
    )
    retries: int = Field(
        default=1, ge=0, description="How often a trial is begun again whose worker died; then it fails."
    )
    runtime_env: dict[str, Any] = Field(
        default={}, description="Ray's runtime environment of all workers, e.g. working_dir, pip, env_vars."
    )


class VerifySection(Section):
    """How the front is verified on the test split when the search is over."""

    epochs: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="Passes over the training data for each point, those of its trial among them, > 0; null: twice "
        "finetune.epochs.",
    )
    rounds: int = Field(default=7, ge=1, description="Separate rounds in which the points are measured together.")
    points: Annotated[int, Field(ge=1)] | None = Field(
        default=12, description="How many plans are verified: the front, then the next best; null: all of the front."
    )
