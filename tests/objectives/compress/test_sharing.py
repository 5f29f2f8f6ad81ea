"""A layer has no more values than its codebook, and they are well chosen."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_model, save_model
from sklearn.cluster import KMeans
from torch import Tensor, nn

from paretune.objectives.compress.batchnorm import fold_batchnorm
from paretune.objectives.compress.quantization import QuantizedLayer, quantize
from paretune.objectives.compress.sharing import _clustered, share_weights
from paretune.objectives.compress.sparsity import sparsify
from paretune.objectives.data import Splits
from paretune.objectives.runtimes import LoadOptions, get_runtime
from paretune.spaces.plan import Quantization, Sharing, Sparsification
from tests.nets import PlainCNN, wake_norms
from tests.objectives.compress.test_compress import context

CLUSTERS = {"conv1": 2, "conv2": 5, "fc1": 16, "fc2": 256}


def error(values: Any, clustered: Any) -> float:
    return float(((values - clustered) ** 2).mean())


def test_a_layer_takes_few_values(digit_splits: Splits) -> None:
    known = context(digit_splits, 1)
    model = share_weights(PlainCNN(), Sharing(clusters=CLUSTERS), known)
    again = share_weights(copy.deepcopy(model), Sharing(clusters=CLUSTERS), known)
    for name, clusters in CLUSTERS.items():
        weight = model.get_parameter(f"{name}.weight")
        assert len(weight.unique()) == clusters
        assert torch.equal(again.get_parameter(f"{name}.weight"), weight), "what is shared stays as it is"


def test_it_is_deterministic(digit_splits: Splits) -> None:
    known, model = context(digit_splits, 1), PlainCNN()
    made = [share_weights(copy.deepcopy(model), Sharing(clusters=CLUSTERS), known).state_dict() for _ in range(2)]
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


def test_without_batches_weights_are_left_to_be_loaded(digit_splits: Splits) -> None:
    model = PlainCNN()
    before = copy.deepcopy(model.state_dict())
    share_weights(model, Sharing(clusters=CLUSTERS), context(digit_splits, 0))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("clusters", [2, 3, 16])
def test_zeros_stay_zero_and_cost_one_value(digit_splits: Splits, clusters: int) -> None:
    known, model = context(digit_splits, 1), PlainCNN()
    sparsify(model, Sparsification(sparsity={"fc1": 0.7}), known)
    before = model.fc1.weight.detach().clone()
    share_weights(model, Sharing(clusters={"fc1": clusters}), known)
    assert torch.equal(model.fc1.weight == 0, before == 0)
    assert len(model.fc1.weight.unique()) == clusters


@pytest.mark.parametrize("clusters", [4, 16, 64])
@pytest.mark.parametrize("draw", ["normal", "standard_t"])
def test_the_values_are_those_of_k_means(clusters: int, draw: str) -> None:
    generator = np.random.default_rng(0)
    values = (generator.normal(size=20_000) if draw == "normal" else generator.standard_t(4, size=20_000)).astype("f4")
    found = _clustered(values, clusters)
    start = np.linspace(values.min(), values.max(), clusters)[:, None]
    whole = KMeans(clusters, init=start, n_init=1, tol=0).fit(values[:, None])
    assert len(np.unique(found)) == clusters
    # Both end in a local minimum, seldom in the same one.
    assert error(values, found) <= 1.25 * error(values, whole.cluster_centers_[whole.labels_, 0])
    for value in np.unique(found):
        np.testing.assert_allclose(value, values[found == value].mean(dtype=np.float64), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param([1.0, 2.0, 3.0], id="as many as the codebook"),
        pytest.param([1.0, 1.0, 1.0, 1.0], id="one"),
        pytest.param([1e6, 0.1, 0.2, 0.3, 0.4], id="an outlier that hides the rest"),
        pytest.param([-1e-30, 1e-30, 2e-30, 3e-30, 4e-30], id="tiny"),
    ],
)
def test_odd_weights(digit_splits: Splits, values: list[float]) -> None:
    model = nn.Sequential(nn.Linear(len(values), 1))
    model[0].weight.data = torch.tensor([values])
    share_weights(model, Sharing(clusters={"0": 3}), context(digit_splits, 1))
    weight = model[0].weight.detach()
    assert len(weight.unique()) <= 3
    assert bool(weight.isfinite().all())
    assert float((weight - torch.tensor([values])).abs().max()) <= 0.5 * np.ptp(values)
    if len(set(values)) <= 3:
        assert weight.tolist() == [values]


def test_one_scale_for_a_layer_keeps_its_clusters_together(digit_splits: Splits) -> None:
    known, model = context(digit_splits, 1), wake_norms(PlainCNN())
    sparsify(model, Sparsification(sparsity={"fc1": 0.5}), known)
    share_weights(model, Sharing(clusters={"fc1": 12}), known)
    zeros = model.fc1.weight == 0
    quantize(model.eval(), Quantization(bits={"fc1": 8}, granularity="per-tensor"), known)
    assert isinstance(model.fc1, QuantizedLayer)
    rounded = model.fc1.quantized_weight()
    assert len(rounded.unique()) <= 12
    assert not rounded[zeros].any()


def test_saved_loaded_and_exported_it_stays_the_same(digit_splits: Splits, tmp_path: Path) -> None:
    known, blind = context(digit_splits, 1), context(digit_splits, 0)
    config = Sharing(clusters=CLUSTERS)
    made = share_weights(fold_batchnorm(wake_norms(PlainCNN()), known.forward), config, known)
    save_model(made, str(tmp_path / "weights.safetensors"))
    again = share_weights(fold_batchnorm(PlainCNN(), known.forward), config, blind)
    load_model(again, tmp_path / "weights.safetensors")
    inputs = digit_splits.validation.head(8).inputs
    assert isinstance(inputs, Tensor)
    with torch.no_grad():
        expected = made(inputs)
        assert torch.equal(again(inputs), expected)
    runtime = get_runtime("openvino")
    runtime.deploy(made, known.example, tmp_path / "model.onnx")
    found = runtime.load(tmp_path / "model.onnx", LoadOptions(8)).run({"input": inputs.numpy()})
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)
