"""Every technique, on every net of the zoo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from paretune.objectives.compress import compress_numerics
from paretune.objectives.compress.factors import rank_of
from paretune.objectives.compress.lowrank import is_smaller, layers_of
from paretune.objectives.compress.quantization import QuantizedLayer
from paretune.objectives.compress.sparsity import by_inputs
from paretune.objectives.compress.ties import weights_of
from paretune.objectives.data import call
from paretune.spaces.graph import PRUNABLE
from paretune.spaces.grid import kept_of, ratio_of
from paretune.spaces.plan import (
    CompressionPlan,
    Factorization,
    Pruning,
    Quantization,
    Schedule,
    Shape,
    Sharing,
    Sparsification,
)
from tests.nets import ZOO
from tests.objectives.compress.contract import Case, Subject, TechniqueContract, Zoo, accepted

FEW = ("ResNet", "ViT", "MLP")
"""Nets of three kinds, for variants that differ in a detail."""

Ask = Callable[[Subject, Sequence[str]], CompressionPlan]


@pytest.fixture(scope="module")
def zoo() -> Zoo:
    return Zoo()


def parts(model: nn.Module, name: str) -> list[Any]:
    """The layers that `name` is made of now, without quantizers."""
    found: list[Any] = [model.get_submodule(part) for part in layers_of(model, name)]
    return [module.layer if isinstance(module, QuantizedLayer) else module for module in found]


def outputs(layer: nn.Module) -> int:
    """Output channels or features."""
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)  # type: ignore[arg-type]


def inputs(layer: nn.Module) -> int:
    """Input channels or features."""
    return int(layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels)  # type: ignore[arg-type]


def half_of(subject: Subject, names: Sequence[str]) -> Pruning:
    """Every group cut to the step of its grid that is nearest to half of it."""
    grids = {name: grid for name, grid in subject.context.grids.items() if name in names}
    kept = {name: min(grid, key=lambda count: abs(count - grid[-1] / 2)) for name, grid in grids.items()}
    return Pruning(ratios={name: ratio_of(count, grids[name][-1]) for name, count in kept.items()})


def halved(shape: Shape = "one-shot", steps: int = 1) -> Ask:
    return lambda subject, names: CompressionPlan(
        prune=half_of(subject, names), schedule=Schedule(shape=shape, steps=steps)
    )


def check_pruned(subject: Subject, plan: CompressionPlan, model: nn.Module) -> None:
    assert any(plan.prune.ratios.values())
    for group in subject.analysis.groups:
        kept = kept_of(plan.prune.ratios.get(group.name, 0.0), group.channels)
        assert kept in subject.context.grids[group.name]
        for name in group.layers:
            dense = subject.model.get_submodule(name)
            if isinstance(dense, PRUNABLE):  # PyTorch's attention becomes a module of another kind
                # A fused attention's layer has three times as many outputs as its heads have channels.
                assert outputs(parts(model, name)[-1]) == outputs(dense) * kept // group.channels


def check_factors(subject: Subject, plan: CompressionPlan, model: nn.Module) -> None:
    assert any(len(parts(model, name)) > 1 for name in plan.factorize.ranks)
    for name, share in plan.factorize.ranks.items():
        [dense], factors = parts(subject.model, name), parts(model, name)
        if len(factors) == 1:
            assert not is_smaller(factors[0], plan.factorize.method, share), f"{name} could be factorized"
            continue
        kernel = dense.weight.shape[2:]
        whole = inputs(factors[0]) * outputs(factors[-1]) * kernel.numel()
        assert sum(factor.weight.numel() for factor in factors) < whole, f"{name} became larger"
        narrow = [outputs(factor) for factor in factors[:-1]]
        before, after = inputs(factors[0]), outputs(factors[-1])
        if kernel.numel() == 1:
            assert narrow == [rank_of(share, min(before, after))]
        elif plan.factorize.method == "spatial" and isinstance(dense, nn.Conv2d):
            assert narrow == [rank_of(share, min(before * kernel[0], after * kernel[1]))]
        else:
            assert narrow == [rank_of(share, before), rank_of(share, after)]


def check_zeros(_subject: Subject, plan: CompressionPlan, model: nn.Module) -> None:
    weights = {name: weight for name in plan.sparsify.sparsity for weight in weights_of(model, name)}
    assert any(bool((weight == 0).any()) for weight in weights.values())
    for name, share in plan.sparsify.sparsity.items():
        weight = weights[name]
        if plan.sparsify.blocks is None:
            assert int((weight == 0).sum()) >= round(share * weight.numel())
            continue
        kept, size = plan.sparsify.blocks
        rows = by_inputs(parts(model, name)[0], weight)
        blocks = rows[..., : rows.shape[-1] // size * size].reshape(-1, size)
        assert not bool((blocks.count_nonzero(dim=1) > kept).any()), name


def check_clusters(_subject: Subject, plan: CompressionPlan, module: nn.Module) -> None:
    assert plan.share.clusters
    for name, clusters in plan.share.clusters.items():
        for weight in weights_of(module, name):
            assert 1 < len(torch.unique(weight)) <= clusters


def check_levels(_subject: Subject, plan: CompressionPlan, module: nn.Module) -> None:
    assert plan.quantize.bits
    for name, bits in plan.quantize.bits.items():
        for part in layers_of(module, name):
            layer = module.get_submodule(part)
            assert isinstance(layer, QuantizedLayer)
            assert layer.bits == bits
            assert (layer.input is None) or plan.quantize.activations == "quantized"
            rows = layer.quantized_weight().detach().reshape(len(layer.weight_scale), -1)
            assert max(len(torch.unique(row)) for row in rows) <= 2**bits
            assert bool(layer.weight_zero_point.any()) <= plan.quantize.affine
            if plan.quantize.granularity == "per-tensor":
                assert len(torch.unique(layer.weight_scale)) == 1


class TestPruning(TechniqueContract):
    cases: ClassVar[dict[str, Case]] = {
        "half": Case(halved()),
        "linear": Case(halved("linear", 2), FEW),
        "cubic": Case(halved("cubic", 3), FEW),
        "coarse-fine": Case(halved("coarse-fine", 3), FEW),
        "global": Case(lambda _subject, _names: CompressionPlan(prune=Pruning(ratio=0.4, importance="l2")), FEW),
        "threshold": Case(lambda _subject, _names: CompressionPlan(prune=Pruning(threshold=1.1)), FEW),
    }
    structure = (check_pruned,)

    def names(self, subject: Subject) -> list[str]:
        return [group.name for group in subject.analysis.groups]


class TestFactorization(TechniqueContract):
    cases: ClassVar[dict[str, Case]] = {
        "tucker": Case(lambda _, names: CompressionPlan(factorize=Factorization(ranks=dict.fromkeys(names, 0.25)))),
        "spatial": Case(
            lambda _, names: CompressionPlan(
                factorize=Factorization(ranks=dict.fromkeys(names, 0.4), method="spatial"),
                schedule=Schedule(shape="linear", steps=2),
            ),
            ("VGG", "UNet", "MobileNetV3", "Signal"),
        ),
        "energy": Case(lambda _, _names: CompressionPlan(factorize=Factorization(energy=0.6)), FEW),
    }
    structure = (check_factors,)


class TestSparsification(TechniqueContract):
    cases: ClassVar[dict[str, Case]] = {
        "half": Case(lambda _, names: CompressionPlan(sparsify=Sparsification(sparsity=dict.fromkeys(names, 0.5)))),
        "2:4": Case(
            lambda _, names: CompressionPlan(
                sparsify=Sparsification(sparsity=dict.fromkeys(names, 0.5), pattern="2:4"),
            ),
            ("ResNet", "MobileNetV2", "UNet", "ViT", "MLP", "Grouped"),
        ),
        "cubic": Case(
            lambda _, names: CompressionPlan(
                sparsify=Sparsification(sparsity=dict.fromkeys(names, 0.9)), schedule=Schedule(shape="cubic", steps=3)
            ),
            FEW,
        ),
        "global": Case(lambda _, _names: CompressionPlan(sparsify=Sparsification(ratio=0.7)), FEW),
        "threshold": Case(lambda _, _names: CompressionPlan(sparsify=Sparsification(threshold=0.5)), FEW),
    }
    structure = (check_zeros,)


class TestSharing(TechniqueContract):
    cases: ClassVar[dict[str, Case]] = {
        "16": Case(lambda _, names: CompressionPlan(share=Sharing(clusters=dict.fromkeys(names, 16)))),
        "3": Case(lambda _, names: CompressionPlan(share=Sharing(clusters=dict.fromkeys(names, 3))), FEW),
        "8 bits": Case(
            lambda _, names: CompressionPlan(
                share=Sharing(clusters=dict.fromkeys(names, 16)),
                quantize=Quantization(bits=dict.fromkeys(names, 8), granularity="per-tensor"),
            ),
            FEW,
        ),
    }
    numerics = (check_clusters,)


def quantized(bits: int, **options: Any) -> Ask:
    return lambda _, names: CompressionPlan(quantize=Quantization(bits=dict.fromkeys(names, bits), **options))


class TestQuantization(TechniqueContract):
    cases: ClassVar[dict[str, Case]] = {
        "8": Case(quantized(8)),
        "4": Case(quantized(4), ("ResNet", "ViT", "BERT", "MLP")),
        "3 percentile": Case(quantized(3, observer="percentile"), FEW),
        "after training": Case(quantized(8, observer="mse", aware=False), FEW),
        "per tensor": Case(quantized(8, granularity="per-tensor"), FEW),
        "weights alone": Case(quantized(4, activations="float"), FEW),
        "affine": Case(quantized(8, activations="float", affine=True), FEW),
    }
    numerics = (check_levels,)

    @pytest.mark.parametrize("name", ZOO)
    def test_eight_bits_change_little(self, zoo: Zoo, name: str) -> None:
        subject = zoo[name]
        _, refused = accepted(subject, self.cases["8"].plan, self.names(subject))
        plan = quantized(8)(subject, [layer for layer in self.names(subject) if layer not in refused])
        module = compress_numerics(subject.model, plan, subject.context)
        with torch.no_grad():
            expected, found = call(subject.model.eval(), subject.split.inputs), call(module, subject.split.inputs)
        assert float((found - expected).abs().mean()) <= 0.02 * float(expected.max() - expected.min())


def everything(subject: Subject, names: Sequence[str]) -> CompressionPlan:
    """All techniques at once: every other layer factorized, the others sparse, some of those shared; all in 8 bits."""
    layers = [layer.name for layer in subject.analysis.layers if layer.name in names]
    thin, sparse = layers[1::2], layers[::2]
    return CompressionPlan(
        prune=half_of(subject, [group.name for group in subject.analysis.groups]),
        factorize=Factorization(ranks=dict.fromkeys(thin, 0.4)),
        sparsify=Sparsification(sparsity=dict.fromkeys(sparse, 0.5)),
        share=Sharing(clusters=dict.fromkeys(sparse[::2], 32)),
        quantize=Quantization(bits=dict.fromkeys(layers, 8), granularity="per-tensor"),
        schedule=Schedule(shape="linear", steps=2),
    )


class TestCombination(TechniqueContract):
    cases: ClassVar[dict[str, Case]] = {"all": Case(everything, FEW)}
    structure = (check_pruned, check_factors, check_zeros)
    numerics = (check_clusters, check_levels)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"share": {"clusters": {"fc": 16}}, "quantize": {"bits": {"fc": 4}}}, "both shared and quantized to 4 bits"),
        ({"share": {"clusters": {"fc": 16}}, "quantize": {"bits": {"fc": 8}}}, "quantized per channel"),
        ({"factorize": {"ranks": {"fc": 0.5}}, "sparsify": {"sparsity": {"fc": 0.5}}}, "factorized and sparse"),
        ({"factorize": {"ranks": {"fc": 0.5}}, "sparsify": {"ratio": 0.5}}, "must not stand beside factorized"),
    ],
)
def test_what_cant_be_combined_is_refused(plan: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompressionPlan.model_validate(plan)
