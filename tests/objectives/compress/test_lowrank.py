"""Factorized layers: exact at full rank, as good as the theory says below it, and only where nothing breaks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paretune.errors import TrialError
from paretune.objectives.compress import Context
from paretune.objectives.compress.batchnorm import fold_batchnorm
from paretune.objectives.compress.factors import rank_of
from paretune.objectives.compress.lowrank import (
    Factorized,
    factorizable,
    factorize,
    is_smaller,
    largest_share,
    layers_of,
    resolve_ranks,
    share_keeping,
    split,
)
from paretune.objectives.compress.quantization import QuantizedLayer, insert_quantizers
from paretune.objectives.compress.schemes import STATIC
from paretune.objectives.data.inputs import Inputs, call
from paretune.objectives.data.splits import Batch
from paretune.objectives.runtimes import LoadOptions, get_runtime
from paretune.objectives.runtimes.onnx_export import export_onnx, named_arrays
from paretune.objectives.tasks import Classification
from paretune.spaces.analysis import count_macs
from paretune.spaces.graph import Forward
from paretune.spaces.plan import Factorization, Method, Quantization
from tests import nets

Build = Callable[[], nn.Module]
METHODS: tuple[Method, ...] = ("tucker", "spatial")
WIDE = nets.image(2, 6, 12)

LAYERS = [
    pytest.param(lambda: nn.Linear(12, 7), nets.vector(), 2, id="Linear"),
    pytest.param(lambda: nn.Linear(8, 20, bias=False), nets.sequence(), 2, id="Linear on sequences"),
    pytest.param(lambda: nn.Conv2d(6, 9, 1, stride=2, padding=1), WIDE, 2, id="1x1"),
    pytest.param(lambda: nn.Conv2d(6, 9, 3, stride=(2, 1), padding=(1, 2), dilation=(1, 2)), WIDE, None, id="uneven"),
    pytest.param(lambda: nn.Conv2d(6, 4, (3, 5), padding="same", bias=False), WIDE, None, id="same"),
    pytest.param(lambda: nn.Conv2d(6, 4, 3, padding="valid"), WIDE, None, id="valid"),
    pytest.param(lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), WIDE, None, id="reflect"),
    pytest.param(lambda: nn.Conv2d(6, 4, 3, padding=(2, 1), padding_mode="circular"), WIDE, None, id="circular"),
    pytest.param(lambda: nn.Conv2d(1, 16, 3), nets.image(2, 1), None, id="one input"),
    pytest.param(lambda: nn.Conv1d(5, 7, 3, stride=2, padding=1), nets.sequence(), 3, id="Conv1d"),
    pytest.param(lambda: nn.Conv3d(1, 4, 2), nets.image().unsqueeze(1), 3, id="Conv3d"),
]


def context(inputs: Inputs, *, data: bool = True) -> Context:
    batches = [Batch(torch.arange(2), inputs, torch.zeros(2, dtype=torch.long))] if data else []
    return Context(inputs, {}, Classification(), batches)


def on(inputs: Inputs) -> Forward:
    return lambda model: call(model, inputs)


def product(factors: Any) -> Tensor:
    """The weight that the factors are a product of."""
    weights: list[Tensor] = [factor.weight.detach().double() for factor in factors]
    first, *middle, last = weights
    if middle:
        return torch.einsum("oa,ab...,bi->oi...", last.flatten(1), middle[0], first.flatten(1))
    if first.dim() == 2:
        return last @ first
    return torch.einsum("orkl,rimn->oikmln", last, first).flatten(2, 3).flatten(3, 4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("build", "inputs", "count"), LAYERS)
def test_full_rank_changes_nothing(build: Build, inputs: Tensor, count: int | None, method: Method) -> None:
    layer = build()
    factors = split(layer, method, 1)
    assert len(factors) == (count or {"tucker": 3, "spatial": 2}[method])
    torch.testing.assert_close(factors(inputs), layer(inputs), atol=1e-5, rtol=1e-4)
    assert [factor.bias is not None for factor in factors] == [False] * (len(factors) - 1) + [layer.bias is not None]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("build", "inputs", "count"), LAYERS)
def test_a_low_rank_keeps_the_outputs_shape(build: Build, inputs: Tensor, count: int | None, method: Method) -> None:
    layer = build()
    factors = split(layer, method, 0.3)
    assert factors(inputs).shape == layer(inputs).shape
    assert sum(p.numel() for p in factors.parameters()) < sum(p.numel() for p in split(layer, method, 1).parameters())


@pytest.mark.parametrize(
    ("build", "method", "matrix"),
    [
        pytest.param(lambda: nn.Linear(40, 24), "tucker", lambda weight: weight, id="Linear"),
        pytest.param(lambda: nn.Conv2d(40, 24, 1), "spatial", lambda weight: weight.flatten(1), id="1x1"),
        pytest.param(
            lambda: nn.Conv2d(8, 12, (3, 5)),
            "spatial",
            lambda weight: weight.permute(0, 3, 1, 2).reshape(12 * 5, 8 * 3),
            id="spatial",
        ),
    ],
)
def test_the_error_of_an_svd_is_its_tail(build: Build, method: Method, matrix: Callable[[Tensor], Tensor]) -> None:
    layer: Any = build()
    weight = layer.weight.detach().double()
    values = torch.linalg.svdvals(matrix(weight))
    factors = split(layer, method, 0.5)
    rank = int(factors[0].weight.shape[0])  # type: ignore[index]
    assert rank == rank_of(0.5, len(values))
    assert float((product(factors) - weight).norm()) == pytest.approx(float(values[rank:].norm()), rel=1e-5)


def test_the_error_of_tucker_is_below_both_tails() -> None:
    layer = nn.Conv2d(24, 32, 3)
    weight = layer.weight.detach().double()
    factors = split(layer, "tucker", 0.5)
    shapes = [tuple(factor.weight.shape) for factor in factors]  # type: ignore[arg-type]
    assert shapes == [(12, 24, 1, 1), (16, 12, 3, 3), (32, 16, 1, 1)]
    outputs = torch.linalg.svdvals(weight.flatten(1))[16:].square().sum()
    inputs = torch.linalg.svdvals(weight.transpose(0, 1).flatten(1))[12:].square().sum()
    error = (product(factors) - weight).square().sum()
    assert max(outputs, inputs) <= error <= outputs + inputs


@pytest.mark.parametrize(
    ("share", "full", "rank"),
    [(0.001, 64, 1), (0.2, 64, 13), (0.25, 64, 16), (0.3, 64, 16), (0.33, 64, 24), (0.999, 20, 16), (0.999, 12, 12)],
)
def test_ranks_come_in_steps(share: float, full: int, rank: int) -> None:
    assert rank_of(share, full) == rank


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("energy", [0.3, 0.9])
@pytest.mark.parametrize(
    "build", [lambda: nn.Linear(64, 40), lambda: nn.Conv2d(24, 40, 3), lambda: nn.Conv1d(24, 16, 5)]
)
def test_the_share_found_keeps_the_energy(build: Build, energy: float, method: Method) -> None:
    layer: Any = build()
    share = share_keeping(layer, method, energy)
    assert share is not None
    weight = layer.weight.detach().double()

    def kept(share: float) -> float:
        return 1 - float((product(split(layer, method, share)) - weight).square().sum() / weight.square().sum())

    assert kept(share) >= energy
    if isinstance(layer, nn.Linear):
        assert kept(share - 8 / 40) < energy, "the next smaller rank wouldn't"


def test_the_energy_is_resolved_where_factors_are_smaller() -> None:
    model = nets.Residual()
    with torch.no_grad():  # of rank 4, and of full rank
        model.outer2.weight.copy_((torch.randn(32, 4) @ torch.randn(4, 288)).view(32, 32, 3, 3))
        nn.init.orthogonal_(model.shortcut.weight)
    before = copy.deepcopy(model.state_dict())
    config = resolve_ranks(model, Factorization(energy=0.99), context(nets.image()))
    assert config.energy is None and "shortcut" not in config.ranks
    for name, share in config.ranks.items():
        assert is_smaller(model.get_submodule(name), "tucker", share)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    spatial = resolve_ranks(model, Factorization(energy=0.5, method="spatial"), context(nets.image()))
    assert spatial.method == "spatial" and "outer2" in spatial.ranks
    assert resolve_ranks(model, config, context(nets.image())) is config


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        pytest.param(lambda: nn.Linear(12, 32), nets.vector(), id="Linear"),
        pytest.param(lambda: nn.Conv2d(16, 32, 3, stride=2, padding=1), nets.image(2, 16), id="strided"),
        pytest.param(lambda: nn.Conv2d(16, 24, 1, stride=2), nets.image(2, 16), id="1x1"),
    ],
)
def test_the_largest_share_is_the_last_that_is_smaller(build: Build, inputs: Tensor, method: Method) -> None:
    layer = build()

    def cost(module: nn.Module) -> tuple[int, int]:
        wrapped = nn.Sequential(module)
        return sum(p.numel() for p in module.parameters()), count_macs(wrapped, on(inputs))[0]

    largest = largest_share(layer, method)
    assert largest is not None
    below, whole, above = cost(split(layer, method, largest)), cost(layer), cost(split(layer, method, largest + 0.13))
    assert below[0] < whole[0] and below[1] < whole[1]
    assert above[0] >= whole[0] or above[1] >= whole[1]


def test_a_model_is_factorized_at_the_last_cut_alone() -> None:
    model = nets.wake_norms(nets.PlainCNN()).eval()
    inputs = nets.image(2, 1)
    config = Factorization(ranks={"conv2": 0.5, "fc1": 0.25})
    assert factorize(model, config, context(inputs), 0.7) is model
    assert not any(isinstance(module, Factorized) for module in model.modules())
    state = torch.get_rng_state()
    factorize(model, config, context(inputs))
    assert torch.equal(torch.get_rng_state(), state), "no random numbers are drawn"
    assert not model.get_submodule("conv2.0").training
    assert layers_of(model, "conv2") == ["conv2.0", "conv2.1", "conv2.2"]
    assert layers_of(model, "fc1") == ["fc1.0", "fc1.1"]
    assert layers_of(model, "conv1") == ["conv1"]
    # Other weights, the same shapes: an artifact is replayed on a model that wasn't trained.
    other = factorize(nets.PlainCNN(), config, context(inputs, data=False))
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert shapes == {name: value.shape for name, value in other.state_dict().items()}
    assert all(parameter.is_contiguous() for parameter in model.parameters())


def test_without_data_nothing_is_decomposed() -> None:
    """Weights that have no singular values don't matter where others will be loaded."""
    model = nets.MLP()
    nn.init.constant_(model.first.weight, float("nan"))
    factorize(model, Factorization(ranks={"first": 0.25}), context(nets.vector(), data=False))
    assert not model.get_parameter("first.0.weight").any() and not model.get_parameter("first.1.weight").any()


def test_a_layer_whose_factors_are_not_smaller_stays_whole() -> None:
    """A share for the dense layer may be too large for what pruning left of it."""
    config = Factorization(ranks={"0": 0.75, "2": 0.75})
    dense, pruned = (nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 64)) for width in (256, 64))
    for model, whole in ((dense, False), (pruned, True)):
        before = sum(parameter.numel() for parameter in model.parameters())
        factorize(model, config, context(nets.vector(2, 64)))
        assert isinstance(model[0], nn.Linear) == isinstance(model[2], nn.Linear) == whole
        assert (sum(parameter.numel() for parameter in model.parameters()) < before) != whole


def test_factors_can_be_folded_and_quantized() -> None:
    inputs = nets.image(2, 1)
    model = factorize(nets.wake_norms(nets.PlainCNN()).eval(), Factorization(ranks={"conv2": 0.5}), context(inputs))
    folded = fold_batchnorm(model, on(inputs))
    assert isinstance(folded.bn2, nn.Identity)
    torch.testing.assert_close(folded(inputs), model(inputs), atol=1e-5, rtol=1e-4)
    insert_quantizers(folded, Quantization(bits={"conv2": 8, "fc1": 8}), STATIC, on(inputs))
    assert layers_of(folded, "conv2") == ["conv2.0", "conv2.1", "conv2.2"]
    assert all(isinstance(folded.get_submodule(name), QuantizedLayer) for name in layers_of(folded, "conv2"))
    assert layers_of(folded, "fc1") == ["fc1"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        pytest.param(nets.PlainCNN, nets.image(8, 1), id="PlainCNN"),
        pytest.param(nets.Residual, nets.image(8), id="Residual"),
        pytest.param(nets.Signal, torch.randn(8, 2, 20), id="Signal"),
        pytest.param(nets.Heads, nets.sequence(8), id="Heads"),
        pytest.param(nets.Twice, nets.vector(8), id="Twice"),
    ],
)
def test_factorized_models_train_and_deploy(build: Build, inputs: Tensor, method: Method, tmp_path: Path) -> None:
    model = nets.wake_norms(build())
    names = [name for name, reason in factorizable(model, on(inputs), method).items() if not reason]
    assert len(names) >= 2
    factorize(model, Factorization(ranks=dict.fromkeys(names, 0.4), method=method), context(inputs))
    model(inputs).square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    export_onnx(model.eval(), inputs, tmp_path / "m.onnx")
    session = get_runtime("openvino").load(tmp_path / "m.onnx", LoadOptions(8, 1, 32))
    expected = model(inputs).detach()
    found = torch.from_numpy(session.run(named_arrays(inputs)))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    executed = session.layers()
    thin = [name for name in names if isinstance(model.get_submodule(name), Factorized)]
    assert len(thin) >= 2
    for name in thin:
        assert not executed.keys().isdisjoint(layers_of(model, name)), f"{name} runs under its factors' names"


class Tied(nn.Module):
    """Two layers with one weight, and one layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.own, self.head = (nn.Linear(12, 12) for _ in range(4))
        self.second.weight = self.first.weight
        self.alias = self.own

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.alias(self.own(self.second(self.first(x)))))  # type: ignore[no-any-return]


class Readers(nn.Module):
    """Reads attributes of its layers beside calling them; inputs (N, 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.read, self.sized, self.guarded, self.trained, self.last = (nn.Linear(12, 12) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.plain(x)) + F.linear(self.read(x), self.read.weight)
        x = self.sized(x).view(-1, self.sized.out_features)
        x = self.guarded(x) if hasattr(self.guarded, "weight") else x
        if self.training:
            x = x + self.trained.weight.sum()
        return self.last(self.trained(x))  # type: ignore[no-any-return]


class Centred(nn.Linear):
    """Computes in a way of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight - self.weight.mean(), self.bias)


def odd_layers() -> nn.Module:
    layers = [Centred(12, 12), nn.utils.parametrizations.weight_norm(nn.Linear(12, 12)), nn.Linear(12, 12)]
    layers[2].register_forward_hook(lambda _module, _inputs, output: 2 * output)
    return nn.Sequential(*layers, nn.Linear(12, 1))


READ = "it is read by something else than a call"


@pytest.mark.parametrize(
    ("build", "inputs", "reasons"),
    [
        pytest.param(nets.Residual, nets.image(), {"shortcut": "", "stem": "", "head": ""}, id="all can"),
        pytest.param(nets.Depthwise, nets.image(), {"expand": "", "depthwise": "it is a grouped"}, id="depthwise"),
        pytest.param(
            Tied, nets.vector(), {"first": "it shares", "second": "it shares", "own": "", "head": ""}, id="tied"
        ),
        pytest.param(
            Readers,
            nets.vector(),
            {"plain": "", "read": READ, "sized": READ, "guarded": READ, "trained": READ, "last": ""},
            id="readers",
        ),
        pytest.param(nets.Transformer, nets.sequence(), {"project": "", "encoder.linear1": ""}, id="transformer"),
        pytest.param(
            odd_layers,
            nets.vector(),
            {"0": "it is a Centred", "1": "it has a weight that", "2": "it has hooks", "3": "it has no rank"},
            id="odd",
        ),
    ],
)
def test_what_cannot_be_factorized_is_named(build: Build, inputs: Tensor, reasons: dict[str, str]) -> None:
    model = build()
    found = factorizable(model, on(inputs))
    for name, reason in reasons.items():
        assert found[name].startswith(reason) and bool(found[name]) == bool(reason), found
    assert not any(isinstance(module, Factorized) for module in model.modules())
    able = [name for name, reason in found.items() if not reason]
    before = call(model.eval(), inputs)
    assert factorize(model, Factorization(ranks=dict.fromkeys(able, 0.5)), context(inputs)) is model
    assert call(model, inputs).shape == before.shape


@pytest.mark.parametrize(
    ("build", "name", "message"),
    [
        pytest.param(nets.Attention, "attention.out_proj", "inside nn.MultiheadAttention", id="attention"),
        pytest.param(nets.Attention, "nowhere", "isn't a module", id="unknown"),
        pytest.param(nets.Recurrent, "lstm", "it is a LSTM", id="LSTM"),
        pytest.param(nets.Grouped, "grouped", r"groups=4", id="grouped"),
    ],
)
def test_a_plan_that_asks_for_the_impossible_fails(build: Build, name: str, message: str) -> None:
    with pytest.raises(TrialError, match=rf"got {name}: .*{message}.*; leave it out"):
        factorize(build(), Factorization(ranks={name: 0.5}), context(nets.sequence()))


@pytest.mark.parametrize("layer", ["conv2", "fc1"])
def test_weights_that_are_not_finite_fail_the_trial(layer: str) -> None:
    model = nets.PlainCNN()
    nn.init.constant_(model.get_submodule(layer).weight, float("nan"))  # type: ignore[arg-type]
    with pytest.raises(TrialError, match=f"finite weights, but those of {layer}"):
        factorize(model, Factorization(ranks={layer: 0.5}), context(nets.image()))
