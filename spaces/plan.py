"""The compression plan: one point of the search space, frozen, as JSON, with a canonical hash."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from paretune.errors import JobError

Importance = Literal["l1", "l2", "bn-scale", "fpgm", "lamp", "taylor", "hessian", "activation", "apoz", "random"]
Shape = Literal["one-shot", "linear", "cubic", "coarse-fine"]
Method = Literal["tucker", "spatial"]
Observer = Literal["minmax", "percentile", "mse"]

# Six digits tell any two channel counts below half a million apart, and make equal plans equal as JSON.
Ratio = Annotated[float, AfterValidator(lambda value: round(value, 6)), Field(ge=0, lt=1)]
Share = Annotated[float, AfterValidator(lambda value: round(value, 6)), Field(gt=0, lt=1)]


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _at_most_one(config: _Config, *names: str) -> None:
    given = [name for name in names if getattr(config, name) not in (None, {})]
    if len(given) > 1:
        raise ValueError(f"at most one of {', '.join(names)} must be given, but got {' and '.join(given)}")


class Schedule(_Config):
    """In how many cuts a model is pruned or made sparse, with fine-tuning after each.

    Attributes:
        shape: ``one-shot``: everything at once. ``linear``: equal cuts (iterative pruning, Han et al., 2015,
            arXiv:1506.02626). ``cubic``: large cuts first, ever smaller ones later (automated gradual pruning, Zhu and
            Gupta, 2017, arXiv:1710.01878). ``coarse-fine``: 70 % of the cut at once, the rest in small equal ones.
        steps: Cuts, >= 1; 1 where the shape is one-shot, at least 2 where it isn't.
    """

    shape: Shape = "one-shot"
    steps: Annotated[int, Field(ge=1, le=100)] = 1

    @model_validator(mode="after")
    def _fits(self) -> Schedule:
        if (self.shape == "one-shot") != (self.steps == 1):
            raise ValueError(f"steps must be 1 for one-shot and at least 2 otherwise, but got {self.steps}")
        return self

    @classmethod
    def parse(cls, text: str) -> Schedule:
        """The schedule that ``one-shot``, ``linear:4`` or ``cubic:5`` (shape and cuts) stands for; undoes `str`.

        Raises:
            ValueError: It stands for none.
        """
        shape, _, steps = text.partition(":")
        return cls.model_validate({"shape": shape, "steps": int(steps or 1)})

    def __str__(self) -> str:
        return self.shape if self.steps == 1 else f"{self.shape}:{self.steps}"

    @property
    def fractions(self) -> tuple[float, ...]:
        """Share of the whole cut that is reached after each step, ascending to 1."""
        done = [step / self.steps for step in range(1, self.steps + 1)]
        if self.shape == "cubic":
            return tuple(1 - (1 - share) ** 3 for share in done)
        if self.shape == "coarse-fine":
            return tuple(COARSE + (1 - COARSE) * step / (self.steps - 1) for step in range(self.steps))
        return tuple(done)


COARSE = 0.7
"""Share of a `coarse-fine` cut that comes first; of a global ratio, importance alone decides it."""


class Pruning(_Config):
    """Structured pruning: whole channels are removed, so that the model really gets smaller.

    At most one of `ratios`, `ratio` and `threshold` is given. The last two are resolved into `ratios` on the dense
    model, so that shape and latency are known before any training.

    Attributes:
        ratios: Group name to the share of its channels removed, in [0, 1). Groups left out keep all.
        importance: Which channels go first. `l1` and `l2` (Li et al., 2017, arXiv:1608.08710), `bn-scale`
            (Liu et al., 2017, arXiv:1708.06519), `fpgm` (geometric median, He et al., 2019, arXiv:1811.00250), `lamp`
            (Lee et al., 2021, arXiv:2010.07611), `taylor` (Molchanov et al., 2019, arXiv:1906.10771), `hessian`
            (optimal brain damage: LeCun et al., 1989), `activation` (mean absolute activation), `apoz` (share of zero
            activations, Hu et al., 2016, arXiv:1607.03250), `random`.
        ratio: Share of all channels of all groups removed, those least important in the whole model first.
        threshold: Channels go whose importance is below this share of their group's mean importance, > 0.
    """

    ratios: dict[str, Ratio] = {}
    importance: Importance = "l1"
    ratio: Ratio | None = None
    threshold: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _one_rule(self) -> Pruning:
        _at_most_one(self, "ratios", "ratio", "threshold")
        return self


class Factorization(_Config):
    """Low-rank factorization: a layer becomes two or three thinner ones.

    Linear layers and 1x1 convolutions are split by truncated SVD; other convolutions as `method` says. At most one of
    `ranks` and `energy` is given; `energy` is resolved into `ranks` on the pruned model.

    Attributes:
        ranks: Layer name to the share of its full rank that stays, in (0, 1). Layers left out stay whole.
        method: ``tucker``: a 1x1, a small full and a 1x1 convolution (Kim et al., 2016, arXiv:1511.06530);
            ``spatial``: one along each axis of the kernel (Jaderberg et al., 2014, arXiv:1405.3866).
        energy: Share of the sum of squared singular values that each layer keeps, in (0, 1).
    """

    ranks: dict[str, Share] = {}
    method: Method = "tucker"
    energy: Share | None = None

    @model_validator(mode="after")
    def _one_rule(self) -> Factorization:
        _at_most_one(self, "ranks", "energy")
        return self


class Sparsification(_Config):
    """Unstructured or N:M pruning: single weights are set to zero and stay so (Han et al., 2015, arXiv:1506.02626).

    At most one of `sparsity`, `ratio` and `threshold` is given; the last two are resolved into `sparsity`.

    Attributes:
        sparsity: Layer name to the share of its weights set to zero, smallest magnitudes first, in [0, 1).
        pattern: ``unstructured``, or ``N:M``: of M neighbouring inputs' weights N stay (Mishra et al., 2021,
            arXiv:2104.08378); every sparsity is 1 - N/M then.
        ratio: Share of all weights of all layers set to zero, the smallest magnitudes of the whole model first.
        threshold: Weights go whose magnitude is below this many standard deviations of their layer's, > 0.
    """

    sparsity: dict[str, Ratio] = {}
    pattern: Annotated[str, Field(pattern=r"^(unstructured|\d+:\d+)$")] = "unstructured"
    ratio: Ratio | None = None
    threshold: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Sparsification:
        _at_most_one(self, "sparsity", "ratio", "threshold")
        if self.blocks is None:
            return self
        kept, size = self.blocks
        if not 0 < kept < size:
            raise ValueError(f"of a pattern N:M, N must lie between 0 and M, but got {self.pattern}")
        if self.ratio is not None or self.threshold is not None:
            raise ValueError(f"ratio and threshold must not stand beside the pattern {self.pattern}, which sets both")
        share = round(1 - kept / size, 6)
        for name, value in self.sparsity.items():
            if value not in (0, share):
                raise ValueError(f"sparsity of {name} must be {share} with the pattern {self.pattern}, but got {value}")
        return self

    @property
    def blocks(self) -> tuple[int, int] | None:
        """(N, M) of the pattern; None where it is unstructured."""
        found = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        return (int(found[1]), int(found[2])) if found else None


class Sharing(_Config):
    """Weight sharing: the weights of a layer take few values, a codebook found by k-means (Han et al., 2016,
    arXiv:1510.00149); the weights of a cluster are trained as one.

    Attributes:
        clusters: Layer name to the number of values, in [2, 256]. Layers left out are free.
    """

    clusters: dict[str, Annotated[int, Field(ge=2, le=256)]] = {}


class Quantization(_Config):
    """Fake quantization that is trained and then deployed as integers (Jacob et al., 2018, arXiv:1712.05877).

    Attributes:
        bits: Layer name to bit-width. 16 and 32 are float formats and stay unquantized; layers left out run
            in the target's float format.
        observer: How the range of activations, and of weights, is found: ``minmax``; ``percentile``: all but the
            outermost 0.01 %; ``mse``: the range with the least squared rounding error (Banner et al., 2019,
            arXiv:1810.05723).
        aware: Whether the model is trained through its quantizers; otherwise they are calibrated after the training.
        activations: ``quantized`` as the target's kernels want them; ``float``: weights alone are quantized.
        granularity: Of the weights' scales: one for each output channel, or one for the tensor.
        affine: Whether weights have a zero point; only where activations are float, as integer kernels have none.
    """

    bits: dict[str, Annotated[int, Field(ge=2, le=32)]] = {}
    observer: Observer = "minmax"
    aware: bool = True
    activations: Literal["quantized", "float"] = "quantized"
    granularity: Literal["per-channel", "per-tensor"] = "per-channel"
    affine: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Quantization:
        if self.affine and self.activations == "quantized":
            raise ValueError(
                "affine must be false where activations are quantized: integer kernels want symmetric weights"
            )
        return self


class Finetuning(_Config):
    """How the compressed model is trained to recover.

    Attributes:
        learning_rate: Peak of the schedule, > 0.
        temperature: Distillation temperature, >= 1 (Hinton et al., 2015, arXiv:1503.02531).
        distillation_weight: Share of the loss that comes from the teacher's outputs, in [0, 1].
        hint_weight: Weight of the loss on the job's hint layers' features, >= 0 (Romero et al., 2015, arXiv:1412.6550).
    """

    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    temperature: Annotated[float, Field(ge=1)] = 4.0
    distillation_weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    hint_weight: Annotated[float, Field(ge=0)] = 0.0


class CompressionPlan(_Config):
    """Everything that a trial does to the model; evaluating the same plan with the same seed repeats the trial.

    Attributes:
        variant: Name of the job's lighter architecture that is compressed; None is the model itself.
    """

    schema_version: Annotated[Literal[1], Field(alias="schema")] = 1
    variant: str | None = None
    prune: Pruning = Pruning()
    factorize: Factorization = Factorization()
    sparsify: Sparsification = Sparsification()
    share: Sharing = Sharing()
    quantize: Quantization = Quantization()
    schedule: Schedule = Schedule()
    finetune: Finetuning = Finetuning()

    @model_validator(mode="after")
    def _legal(self) -> CompressionPlan:
        for reason in self.conflicts():
            raise ValueError(reason)
        return self

    def conflicts(self) -> Iterator[str]:
        """Why techniques of the plan can't be combined, one reason for each layer."""
        for name in self.share.clusters:
            bits = self.quantize.bits.get(name, 32)
            if bits <= _COARSEST_SHARED:
                yield f"{name} must not be both shared and quantized to {bits} bits: rounding parts its clusters anew"
            elif bits <= 8 and self.quantize.granularity == "per-channel":
                yield f"{name} must not be both shared and quantized per channel: each scale parts its clusters anew"
        factorized = self.factorize.ranks.keys()
        for name in sorted(factorized & {name for name, share in self.sparsify.sparsity.items() if share > 0}):
            yield f"{name} must not be both factorized and sparse: the factors of a sparse matrix aren't sparse"
        for rule in ("ratio", "threshold"):
            if (factorized or self.factorize.energy) and getattr(self.sparsify, rule) is not None:
                yield f"sparsify.{rule}, which takes all layers, must not stand beside factorized ones"

    @property
    def is_resolved(self) -> bool:
        """Whether nothing is left to the weights: shape and latency follow from the plan alone."""
        left = (
            (self.prune, ("ratio", "threshold")),
            (self.sparsify, ("ratio", "threshold")),
            (self.factorize, ("energy",)),
        )
        return all(getattr(config, name) is None for config, names in left for name in names)

    @property
    def is_packable(self) -> bool:
        """Whether its weights take fewer bits than a model file gives them, so that packing it pays."""
        few = any(bits < 8 for bits in self.quantize.bits.values())
        return few or bool(self.share.clusters) or any(self.sparsify.sparsity.values())

    @property
    def hash(self) -> str:
        """SHA-256 of the canonical JSON (sorted keys, what does nothing left out), as 64 hexadecimal digits."""
        return hashlib.sha256(self.to_json(indent=None).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-able values, canonical: what does nothing is left out.

        That is a ratio of 0, and every setting at a default that plans had before the setting was known.
        """
        whole = self.model_dump(mode="json", by_alias=True)
        data: dict[str, Any] = self.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        for section, names in _ALWAYS.items():
            data[section] = {**{name: whole[section][name] for name in names}, **data.get(section, {})}
        for section, name in (("prune", "ratios"), ("sparsify", "sparsity")):
            if name in data.get(section, {}):
                data[section][name] = {key: ratio for key, ratio in data[section][name].items() if ratio > 0}
        if data.get("sparsify") == {"sparsity": {}}:
            del data["sparsify"]
        return {"schema": whole["schema"], **data}

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


_ALWAYS: Mapping[str, tuple[str, ...]] = {
    "prune": ("ratios", "importance"),
    "quantize": ("bits",),
    "finetune": ("learning_rate", "temperature", "distillation_weight"),
}
"""Settings that are written out whatever their value."""

_COARSEST_SHARED = 4
"""With so few levels or less, rounding would join and part the clusters of a codebook."""
