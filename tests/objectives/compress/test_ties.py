"""Zeros stay zero and equals stay equal through real training."""

from __future__ import annotations

import copy
from typing import Literal

import pytest
import torch
from torch import nn

from paretune.errors import TrialError
from paretune.objectives.compress.lowrank import factorize
from paretune.objectives.compress.quantization import QuantizedLayer
from paretune.objectives.compress.schemes import STATIC
from paretune.objectives.compress.sharing import share_weights
from paretune.objectives.compress.sparsity import sparsify
from paretune.objectives.compress.ties import ties, weights_of
from paretune.objectives.data import Splits
from paretune.spaces.plan import CompressionPlan, Factorization, Quantization, Sharing, Sparsification
from tests.nets import MLP, PlainCNN, vector, wake_norms
from tests.objectives.compress.test_compress import context

PLAN = CompressionPlan(
    sparsify=Sparsification(sparsity={"conv2": 0.6, "fc1": 0.5}),
    share=Sharing(clusters={"fc1": 5, "fc2": 7, "conv1": 4}),
    quantize=Quantization(bits={"fc2": 8}, granularity="per-tensor"),
)
"""A layer that is sparse, one that is shared, one that is both, and one that is quantized as well."""


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_fifty_steps_of_training_keep_what_is_tied(
    digit_splits: Splits,
    optimizer: Literal["adamw", "sgd"],
    precision: Literal["float32", "bfloat16"],
    channels_last: bool,
) -> None:
    known = context(digit_splits, 1)
    module = wake_norms(PlainCNN())
    share_weights(sparsify(module, PLAN.sparsify, known), PLAN.share, known)
    module.fc2 = QuantizedLayer(module.fc2, 8, STATIC[8])
    known.forward(module)
    module.fc2.freeze()
    layers = {name: weights_of(module, name)[0] for name in ("conv1", "conv2", "fc1", "fc2")}
    before = {name: weight.detach().clone() for name, weight in layers.items()}
    tied = ties(module, PLAN)
    if channels_last:
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[optimizer]
    options = {} if optimizer == "adamw" else {"momentum": 0.9, "nesterov": True}
    steps = kind(module.parameters(), 1e-2, weight_decay=1e-2, **options)
    [batch] = known.batches
    module.train()
    for _ in range(50):
        steps.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            outputs = module(batch.inputs)
        known.task.loss(outputs.float(), batch.targets).backward()
        for tie in tied:
            tie()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        steps.step()
    for name, weight in layers.items():
        assert not torch.equal(weight, before[name]), "it was trained"
        if name in PLAN.share.clusters:
            assert len(weight.unique()) == len(before[name].unique()), name
            members = [weight[before[name] == value] for value in before[name].unique()]
            assert all(len(member.unique()) == 1 for member in members), f"equal values of {name} were torn apart"
        if name in PLAN.sparsify.sparsity:
            assert torch.equal(weight == 0, before[name] == 0), name


def test_a_cluster_gets_the_mean_of_its_gradients() -> None:
    model = MLP()
    with torch.no_grad():
        model.first.weight.copy_(torch.tensor([0.0, 1.0, 1.0, 2.0]).repeat(32, 3))
    gradient = torch.randn(32, 12)
    plan = CompressionPlan(sparsify=Sparsification(sparsity={"first": 0.25}), share=Sharing(clusters={"first": 3}))
    tied = ties(model, plan)
    model.first.weight.grad = gradient.clone()
    for tie in tied:
        tie()
    found, weight = model.first.weight.grad, model.first.weight
    assert not found[weight == 0].any()
    for value in (1.0, 2.0):
        [got] = found[weight == value].unique()
        torch.testing.assert_close(got, gradient[weight == value].mean())


def test_the_largest_codebook_is_tied() -> None:
    model = nn.Sequential(nn.Linear(100, 100))
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(10_000).remainder(256).view(100, 100))
    gradient, weight = torch.randn(100, 100), model[0].weight
    weight.grad = gradient.clone()
    [tie] = ties(model, CompressionPlan(share=Sharing(clusters={"0": 256})))
    tie()
    for value in (0, 255):
        [got] = weight.grad[weight == value].unique()
        torch.testing.assert_close(got, gradient[weight == value].mean())


def test_without_a_gradient_nothing_happens() -> None:
    model = MLP()
    plan = CompressionPlan(sparsify=Sparsification(sparsity={"first": 0.5}), share=Sharing(clusters={"narrow": 256}))
    for tie in ties(model, plan):
        tie()
    assert model.first.weight.grad is None


def test_an_infinite_gradient_of_a_zero_is_no_nan() -> None:
    model = MLP()
    model.first.weight.data[0] = 0
    [tie] = ties(model, CompressionPlan(sparsify=Sparsification(sparsity={"first": 0.5})))
    model.first.weight.grad = torch.full((32, 12), float("inf"))
    tie()
    assert not model.first.weight.grad[0].any()
    assert model.first.weight.grad[1].isinf().all()


def test_a_layer_is_free_until_it_is_shared() -> None:
    assert not ties(MLP(), CompressionPlan(share=Sharing(clusters={"first": 16})))


def test_tied_weights_are_tied_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    plan = CompressionPlan(
        sparsify=Sparsification(sparsity={"0": 0.5, "1": 0.5}), share=Sharing(clusters={"0": 64, "1": 64})
    )
    assert len(ties(model, plan)) == 2


def test_each_factor_is_tied_by_itself(digit_splits: Splits) -> None:
    known = context(digit_splits, 1)
    plan = CompressionPlan(factorize=Factorization(ranks={"conv2": 0.5}), share=Sharing(clusters={"conv2": 4}))
    model = factorize(wake_norms(PlainCNN()), plan.factorize, known, 1.0)
    share_weights(model, plan.share, known)
    factors = weights_of(model, "conv2")
    assert len(factors) >= 2
    assert all(len(weight.unique()) <= 4 for weight in factors)
    assert len(ties(model, plan)) == len(factors)


@pytest.mark.parametrize("name", ["nothing", "bn1.nothing", "relu"])
def test_layers_without_weights_are_named(name: str) -> None:
    model = MLP()
    model.relu = nn.ReLU()
    with pytest.raises(TrialError, match=name):
        ties(model, CompressionPlan(sparsify=Sparsification(sparsity={name: 0.5})))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_ties_follow_the_model_to_a_gpu() -> None:
    plan = CompressionPlan(sparsify=Sparsification(sparsity={"first": 0.5}), share=Sharing(clusters={"narrow": 256}))
    model = MLP()
    model.first.weight.data[:16] = 0
    model.narrow.weight.data.clamp_(-0.01, 0.01)
    before = copy.deepcopy(model.narrow.weight.data)
    tied = ties(model, plan)
    model.cuda()
    model(vector(4).cuda()).sum().backward()
    for tie in tied:
        tie()
    assert not model.first.weight.grad[:16].any()
    assert len(model.narrow.weight.grad.cpu()[before == before.max()].unique()) == 1
