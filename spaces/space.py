"""The search space: every choice of a plan as an ordinary Optuna parameter, and plans back as parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Literal

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from paretune.errors import JobError
from paretune.spaces.grid import kept_of, ratio_of, snap
from paretune.spaces.plan import (
    CompressionPlan,
    Factorization,
    Finetuning,
    Importance,
    Method,
    Observer,
    Pruning,
    Schedule,
    Sharing,
    Sparsification,
)
from paretune.spaces.settings import INTEGER, SETTINGS, quantization, settings_of

Range = tuple[float, float]

_SWITCHES = {"factorize": "ranks", "sparsify": "sparse", "share": "shared"}
"""Parameter that switches a technique to the layers of the space that it is for."""

MODEL = "model"
"""The choice of `variant` that stands for the model itself."""

RANK_STEP = 0.125
"""The smallest share of the full rank that is offered, and the distance of any two."""


@dataclass(frozen=True)
class Options:
    """What the job allows. A tuple of choices with one entry fixes it; so does a range with equal ends.

    Attributes:
        prune: Whether channels are removed.
        scope: Whether each group has a ratio of its own, or all are ranked together by one ratio or one threshold.
        max_ratio: Largest share of channels removed, of a group or of all, in (0, 1).
        importance: Rules for which channels go first.
        schedules: In how many cuts, as `Schedule.parse` reads them.
        methods: How convolutions are factorized.
        patterns: What sparse weights look like.
        max_sparsity: Largest share of a layer's weights set to zero, in (0, 1).
        clusters: Sizes of codebooks, beside none.
        observers: How ranges of quantized numbers are found.
        aware: Whether quantization is trained through.
        activations: Whether they are quantized as well.
        granularity: Of the weights' scales.
        affine: Whether quantized weights have a zero point, where activations stay in floats.
        temperature: Range of the distillation temperature.
        distillation_weight: Range of the teacher's share of the loss.
        hint_weight: Range of the weight of the hint layers' loss.
        learning_rate: Range of the peak learning rate, searched on a log scale.
        multiples: Width to what the inputs of a layer must be a multiple of to run in it.
    """

    prune: bool = True
    scope: Literal["layer", "global", "threshold"] = "layer"
    max_ratio: float = 0.75
    importance: tuple[Importance, ...] = ("l1",)
    schedules: tuple[str, ...] = ("one-shot",)
    methods: tuple[Method, ...] = ("tucker",)
    patterns: tuple[str, ...] = ("unstructured",)
    max_sparsity: float = 0.9
    clusters: tuple[int, ...] = (64, 16)
    observers: tuple[Observer, ...] = ("minmax",)
    aware: tuple[bool, ...] = (True,)
    activations: tuple[Literal["quantized", "float"], ...] = ("quantized",)
    granularity: tuple[Literal["per-channel", "per-tensor"], ...] = ("per-channel",)
    affine: tuple[bool, ...] = (False,)
    temperature: Range = (1.0, 8.0)
    distillation_weight: Range = (0.0, 1.0)
    hint_weight: Range = (0.0, 0.0)
    learning_rate: Range = (1e-4, 1e-2)
    multiples: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SearchSpace:
    """All plans that a search may propose.

    Parameters of one layer or group are called ``prune/<group>`` (share of channels removed, snapped to the grid),
    ``bits/<layer>``, ``rank/<layer>`` (share of the full rank that stays), ``sparsity/<layer>`` and
    ``clusters/<layer>`` (0 is none); those of a variant have its name and a slash before them. The last three count
    where ``factorize``, ``sparsify`` or ``share`` is true: one choice for the whole plan, as drawing each layer by
    itself would hardly ever leave all of them alone. The other parameters of the whole plan are ``variant``,
    ``pruning/ratio`` or ``pruning/threshold``, ``importance``, ``schedule``, ``method``, ``pattern``, ``observer``,
    ``aware``, ``activations``, ``granularity``, ``affine``, ``distill/temperature``, ``distill/weight``,
    ``distill/hint_weight`` and ``finetune/learning_rate``. Choices with one option are no parameters, nor is how a
    technique is used that the space doesn't have. Of two techniques that exclude each other on a layer the plan takes
    one: factors before zeros, and few bits before a codebook.

    Attributes:
        grids: Group to the channel counts it may be cut to, ascending; the last is the dense one.
        widths: Layer to its bit-widths, widest first; empty where nothing is quantized.
        options: What else the job allows.
        ranks: Layer that may be factorized to the largest share of its full rank that saves something.
        sparse: Layers that may be sparse.
        shared: Layers that may have a codebook.
        variants: The layers' choices of each lighter architecture, by name.
        narrow: Sparse layer to the patterns that it has too few inputs for.
    """

    grids: Mapping[str, Sequence[int]]
    widths: Mapping[str, Sequence[int]]
    options: Options = Options()
    ranks: Mapping[str, float] = field(default_factory=dict)
    sparse: Sequence[str] = ()
    shared: Sequence[str] = ()
    variants: Mapping[str, SearchSpace] = field(default_factory=dict)
    narrow: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def compresses(self) -> bool:
        """Whether any of its plans makes the model smaller."""
        return bool(self.techniques or self.variants)

    @property
    def techniques(self) -> frozenset[str]:
        """The sections of a plan in which any plan of the space does something, of the model or of a variant."""
        every = [self, *self.variants.values()]
        together = self.options.prune and self.options.scope != "layer"
        found = {
            "prune": together or any(len(grid) > 1 for space in every for grid in space.grids.values()),
            "quantize": any(min(widths) <= INTEGER for space in every for widths in space.widths.values()),
            "factorize": any(space.ranks for space in every),
            "sparsify": any(space.sparse for space in every),
            "share": any(space.shared for space in every),
        }
        return frozenset(name for name, used in found.items() if used)

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna's view of the space."""
        used = self.techniques
        return {
            name: distribution
            for name, distribution in self._all().items()
            if not distribution.single() and (name not in SETTINGS or used & SETTINGS[name])
        }

    def to_plan(self, params: Mapping[str, Any]) -> CompressionPlan:
        """The plan that parameters stand for; those that are missing take the first choice or the middle."""
        value = {name: params.get(name, default_of(name, found)) for name, found in self._all().items()}
        variant = value["variant"]
        own, prefix = (self, "") if variant == MODEL else (self.variants[variant], f"{variant}/")
        ratios = {
            group: ratio_of(kept, grid[-1])
            for group, grid in own.grids.items()
            if (kept := snap(value.get(f"{prefix}prune/{group}", 0.0), list(grid))) < grid[-1]
        }
        bits = {layer: int(value[f"{prefix}bits/{layer}"]) for layer in own.widths}
        used = {name: bool(value.get(name)) for name in _SWITCHES}
        ranks = {layer: value[f"{prefix}rank/{layer}"] for layer in own.ranks if used["factorize"]}
        ranks = {layer: share for layer, share in ranks.items() if share <= own.ranks[layer]}
        most, pattern = self.options.max_sparsity, value["pattern"]
        found = {layer: value[f"{prefix}sparsity/{layer}"] for layer in own.sparse if used["sparsify"]}
        found = {layer: share for layer, share in found.items() if layer not in ranks}
        found = {layer: min(round(share, 2), most) for layer, share in found.items()}
        if pattern != "unstructured":
            share = _pattern_share(pattern)
            fits = {
                layer: given > most / 2 and pattern not in own.narrow.get(layer, ()) for layer, given in found.items()
            }
            found = {layer: share if fitting else 0.0 for layer, fitting in fits.items()}
        sparsity = {layer: share for layer, share in found.items() if share > 0}
        finest = 4 if value["granularity"] == "per-tensor" else 8
        clusters = {layer: int(value[f"{prefix}clusters/{layer}"]) for layer in own.shared if used["share"]}
        clusters = {layer: size for layer, size in clusters.items() if size and bits.get(layer, 32) > finest}
        ratio, threshold = value.get("pruning/ratio") or None, value.get("pruning/threshold") or None
        pruned = bool(ratios or ratio or threshold)
        # Where a technique isn't used, how it would be says nothing: equal models have equal plans.
        return CompressionPlan(
            variant=None if variant == MODEL else variant,
            prune=Pruning(ratios=ratios, importance=value["importance"], ratio=ratio, threshold=threshold)
            if pruned
            else Pruning(),
            factorize=Factorization(ranks=ranks, method=value["method"]) if ranks else Factorization(),
            sparsify=Sparsification(sparsity=sparsity, pattern=pattern) if sparsity else Sparsification(),
            share=Sharing(clusters=clusters),
            quantize=quantization(bits, value),
            schedule=Schedule.parse(value["schedule"]) if pruned or sparsity else Schedule(),
            finetune=Finetuning(
                learning_rate=value["finetune/learning_rate"],
                temperature=value["distill/temperature"],
                distillation_weight=value["distill/weight"],
                hint_weight=value["distill/hint_weight"],
            ),
        )

    def to_params(self, plan: CompressionPlan) -> dict[str, Any]:
        """The parameters of a plan of this space, so that it can be enqueued; undoes `to_plan`.

        Raises:
            JobError: The plan isn't in the space.
        """
        values, known, chosen = self._values(plan), self._all(), self.distributions()
        for name in values.keys() - known.keys():
            if values[name]:
                raise _outside(f"plan: {name}", "must be chosen by the space", values[name], {})
        found = {}
        for name, distribution in known.items():
            value = values.get(name, default_of(name, distribution))
            if not _in(distribution, value):
                rule = f"must be {default_of(name, distribution)}, the only choice"
                rule = rule if distribution.single() else f"must be in {distribution}"
                raise _outside(f"plan: {name}", rule, value, {})
            if name in chosen:
                found[name] = value
        return found

    def uniform(
        self,
        ratio: float = 0.0,
        bits: int | None = None,
        *,
        rank: float = 1.0,
        sparsity: float = 0.0,
        clusters: int = 0,
        variant: str = MODEL,
    ) -> CompressionPlan:
        """The same everywhere, as near as each group's grid and each layer's choices allow.

        Args:
            ratio: Share of channels removed, in [0, 1).
            bits: Width; None is the widest.
            rank: Share of the full rank that stays, in (0, 1].
            sparsity: Share of weights set to zero, in [0, 1).
            clusters: Size of the codebooks; 0 is none.
            variant: Of which architecture.
        """
        own, prefix = (self, "") if variant == MODEL else (self.variants[variant], f"{variant}/")
        params: dict[str, Any] = {f"prune/{group}": ratio for group in own.grids}
        params |= {f"bits/{layer}": bits if bits in widths else widths[0] for layer, widths in own.widths.items()}
        rank = max(RANK_STEP, RANK_STEP * round(rank / RANK_STEP))
        params |= {f"rank/{layer}": rank for layer in own.ranks}
        params |= {f"sparsity/{layer}": min(sparsity, self.options.max_sparsity) for layer in own.sparse}
        clusters = clusters if clusters in self.options.clusters else 0
        params |= {f"clusters/{layer}": clusters for layer in own.shared}
        whole = {"variant": variant, "pruning/ratio": min(ratio, self.options.max_ratio)}
        whole |= {"factorize": rank < 1, "sparsify": sparsity > 0, "share": clusters > 0}
        # About half of a group's channels lie below its mean, and hardly any below half of it.
        whole["pruning/threshold"] = min(2 * ratio, _LARGEST_THRESHOLD)
        return self.to_plan({prefix + name: value for name, value in params.items()} | whole)

    def sweep(self, index: int) -> CompressionPlan:
        """The plan at a position of the endless sweep over uniform plans: the baseline that a search must beat.

        Position 0 is the dense model. Ratios come in the order 0, 1, 1/2, 1/4, 3/4, … of the largest
        one (van der Corput), each with every width, the widest first, then from the narrowest up. Where no channels
        can be pruned, the widths are followed by ranks, zeros and codebooks in turns, the strongest first.
        """
        widths = sorted({width for options in self.widths.values() for width in options})
        if index == 0:
            return self.uniform()
        largest = max((_largest(grid) for grid in self.grids.values()), default=0.0)
        if self.options.prune and self.options.scope != "layer":
            largest = self.options.max_ratio
        if not largest:
            chosen = widths if any(len(options) > 1 for options in self.widths.values()) else []
            settings = [*({"bits": width} for width in chosen), *self._strengths()]
            return self.uniform(**settings[(index - 1) % len(settings)]) if settings else self.uniform()
        level, position = divmod(index, max(1, len(widths)))
        bits = widths[position - 1] if widths else None
        return self.uniform(largest * _van_der_corput(level), bits)

    def _strengths(self) -> list[dict[str, Any]]:
        """Arguments of `uniform` for ranks, zeros and codebooks of all strengths, the techniques in turns."""
        steps = int(max(self.ranks.values(), default=0.0) / RANK_STEP)
        ranks = [{"rank": RANK_STEP * step} for step in range(1, 1 + steps)]
        levels = (1.0, 0.5, 0.25, 0.75) if self.options.patterns[0] == "unstructured" else (1.0,)
        zeros = [{"sparsity": self.options.max_sparsity * level} for level in levels if self.sparse]
        books = [{"clusters": size} for size in sorted(self.options.clusters) if self.shared]
        return [one for together in zip_longest(ranks, zeros, books) for one in together if one]

    def _all(self) -> dict[str, BaseDistribution]:
        """Every choice, also those with one option."""
        options = self.options
        found: dict[str, BaseDistribution] = dict(self._layerwise())
        for variant, space in self.variants.items():
            found |= {f"{variant}/{name}": distribution for name, distribution in space._layerwise()}
        if options.prune and options.scope == "global":
            found["pruning/ratio"] = FloatDistribution(0.0, options.max_ratio)
        if options.prune and options.scope == "threshold":
            found["pruning/threshold"] = FloatDistribution(0.0, _LARGEST_THRESHOLD)
        every = [self, *self.variants.values()]
        for switch, kind in _SWITCHES.items():
            if any(getattr(space, kind) for space in every):
                found[switch] = CategoricalDistribution([False, True])
        choices: dict[str, Sequence[Any]] = {
            "variant": (MODEL, *self.variants),
            "importance": options.importance,
            "schedule": options.schedules,
            "method": options.methods,
            "pattern": options.patterns,
            "observer": options.observers,
            "aware": options.aware,
            "activations": options.activations,
            "granularity": options.granularity,
            "affine": options.affine,
        }
        found |= {name: CategoricalDistribution(list(values)) for name, values in choices.items()}
        found |= {
            "distill/temperature": FloatDistribution(*options.temperature),
            "distill/weight": FloatDistribution(*options.distillation_weight),
            "distill/hint_weight": FloatDistribution(*options.hint_weight),
            "finetune/learning_rate": FloatDistribution(*options.learning_rate, log=True),
        }
        return found

    def _layerwise(self) -> Iterator[tuple[str, BaseDistribution]]:
        for group, grid in self.grids.items():
            yield f"prune/{group}", FloatDistribution(0.0, _largest(grid))
        for layer in self.ranks:
            yield f"rank/{layer}", FloatDistribution(RANK_STEP, 1.0, step=RANK_STEP)
        for layer in self.sparse:
            yield f"sparsity/{layer}", FloatDistribution(0.0, self.options.max_sparsity)
        for layer in self.shared:
            yield f"clusters/{layer}", CategoricalDistribution([0, *self.options.clusters])
        for layer, widths in self.widths.items():
            yield f"bits/{layer}", CategoricalDistribution(list(widths))

    def _values(self, plan: CompressionPlan) -> dict[str, Any]:
        """What a plan says of each parameter; those that it is silent about are missing."""
        variant = plan.variant or MODEL
        if variant != MODEL and variant not in self.variants:
            raise _outside("variant", "must name a variant of the job", variant, self.variants)
        own, prefix = (self, "") if variant == MODEL else (self.variants[variant], f"{variant}/")
        of_layers: dict[str, tuple[str, Mapping[str, Any], Mapping[str, Any] | Sequence[str]]] = {
            "prune": ("prune.ratios", plan.prune.ratios, own.grids),
            "rank": ("factorize.ranks", plan.factorize.ranks, own.ranks),
            "sparsity": ("sparsify.sparsity", plan.sparsify.sparsity, own.sparse),
            "clusters": ("share.clusters", plan.share.clusters, own.shared),
            "bits": ("quantize.bits", plan.quantize.bits, own.widths),
        }
        values: dict[str, Any] = {"variant": variant}
        for kind, (where, given, known) in of_layers.items():
            for name in given.keys() - set(known):
                raise _outside(where, "must name groups or layers of the space", name, dict.fromkeys(known))
            values |= {f"{prefix}{kind}/{name}": value for name, value in given.items()}
        for group, grid in own.grids.items():
            _check_ratio(group, grid, plan.prune.ratios.get(group, 0.0))
        for layer, share in plan.factorize.ranks.items():
            if share > own.ranks[layer]:
                rule = f"must be at most {own.ranks[layer]}, or the factors save nothing"
                raise _outside(f"factorize.ranks.{layer}", rule, share, {})
        for layer in plan.sparsify.sparsity:
            if plan.sparsify.pattern in own.narrow.get(layer, ()):
                rule = f"must not be sparse in the pattern {plan.sparsify.pattern}, for which it has too few inputs"
                raise _outside(f"sparsify.sparsity.{layer}", rule, plan.sparsify.pattern, {})
        if plan.sparsify.blocks is not None:  # a parameter only says whether a layer has the pattern
            zeros = (f"{prefix}sparsity/{layer}" for layer in plan.sparsify.sparsity)
            values |= {name: self.options.max_sparsity if values[name] else 0.0 for name in zeros}
        values |= {
            "pruning/ratio": plan.prune.ratio or 0.0,
            "pruning/threshold": plan.prune.threshold or 0.0,
            "factorize.energy": plan.factorize.energy,
            "sparsify.ratio": plan.sparsify.ratio,
            "sparsify.threshold": plan.sparsify.threshold,
            "distill/temperature": plan.finetune.temperature,
            "distill/weight": plan.finetune.distillation_weight,
            "distill/hint_weight": plan.finetune.hint_weight,
            "finetune/learning_rate": plan.finetune.learning_rate,
        }
        values |= {
            "factorize": bool(plan.factorize.ranks),
            "sparsify": any(plan.sparsify.sparsity.values()),
            "share": bool(plan.share.clusters),
        }
        return values | settings_of(plan)


_LARGEST_THRESHOLD = 1.5
"""Few channels are more important than one and a half times the mean of their group."""


def default_of(name: str, distribution: BaseDistribution) -> Any:
    """What a parameter is where nothing is said: the first choice, nothing removed, or the middle of a range."""
    if isinstance(distribution, CategoricalDistribution):
        return distribution.choices[0]
    assert isinstance(distribution, FloatDistribution)
    low, high = distribution.low, distribution.high
    if name == "distill/weight":
        return (low + high) / 2
    if name in ("distill/temperature", "finetune/learning_rate"):
        return low if low == high else math.sqrt(low * high)
    return high if distribution.step is not None else low


def _check_ratio(group: str, grid: Sequence[int], ratio: float) -> None:
    nearest = ratio_of(snap(ratio, list(grid)), grid[-1])
    if kept_of(ratio, grid[-1]) != kept_of(nearest, grid[-1]):
        raise _outside(f"prune.ratios.{group}", "must be on the group's grid", ratio, {str(nearest): None})


def _pattern_share(pattern: str) -> float:
    blocks = Sparsification(pattern=pattern).blocks
    assert blocks is not None
    return round(1 - blocks[0] / blocks[1], 6)


def _in(distribution: BaseDistribution, value: Any) -> bool:
    if isinstance(distribution, CategoricalDistribution):
        return value in distribution.choices  # its internal form doesn't exist for other values
    return distribution._contains(value)


def _largest(grid: Sequence[int]) -> float:
    return ratio_of(grid[0], grid[-1])


def _van_der_corput(index: int) -> float:
    """0, 1, 1/2, 1/4, 3/4, 1/8, …: both ends first, then ever finer."""
    if index <= 1:
        return float(index)
    value, scale, index = 0.0, 0.5, index - 1
    while index:
        index, bit = divmod(index, 2)
        value += bit * scale
        scale /= 2
    return value


def _outside(where: str, rule: str, got: object, known: Mapping[str, Any]) -> JobError:
    names = ", ".join(list(known)[:5])
    return JobError(where, rule, got, f"use e.g. {names}" if names else "use a value of the space")
