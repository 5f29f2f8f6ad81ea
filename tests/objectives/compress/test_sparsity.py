"""As many weights become zero as were asked for, where the pattern wants them."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from paretune.errors import TrialError
from paretune.objectives.compress import Context
from paretune.objectives.compress.batchnorm import fold_batchnorm
from paretune.objectives.compress.sparsity import by_inputs, can_sparsify, resolve_sparsity, sparsify
from paretune.objectives.data import Splits
from paretune.objectives.runtimes import LoadOptions, get_runtime
from paretune.objectives.tasks import Classification
from paretune.spaces.plan import CompressionPlan, Sparsification
from tests.nets import MLP, Attention, Depthwise, Grouped, PlainCNN, Unused, image, sequence, vector, wake_norms
from tests.objectives.compress.test_compress import context


def known(inputs: Tensor) -> Context:
    return Context(inputs, {}, Classification(), [])


def share_of_zeros(weight: Tensor) -> float:
    return float((weight == 0).float().mean())


def make(name: str, share: float, pattern: str = "unstructured") -> Sparsification:
    return Sparsification(sparsity={name: share}, pattern=pattern)


@pytest.mark.parametrize("share", [0.1, 1 / 3, 0.5, 0.99])
def test_the_smallest_magnitudes_go(share: float) -> None:
    model = MLP()
    before = model.first.weight.detach().clone()
    sparsify(model, make("first", share), known(vector()))
    gone = model.first.weight == 0
    assert int(gone.sum()) == round(share * before.numel())
    assert before[gone].abs().max() <= before[~gone].abs().min()
    assert torch.equal(model.first.weight[~gone], before[~gone])
    assert share_of_zeros(model.narrow.weight) == 0


def test_cuts_go_on_where_the_last_one_stopped() -> None:
    model, zeros = MLP(), torch.zeros(32, 12, dtype=torch.bool)
    for fraction in (0.25, 0.5, 1.0):
        sparsify(model, make("first", 0.8), known(vector()), fraction)
        now = model.first.weight == 0
        assert int(now.sum()) == round(0.8 * fraction * now.numel())
        assert bool(now[zeros].all())
        zeros = now
        with torch.no_grad():
            model.first.weight[~zeros] = torch.randn(int((~zeros).sum()))


LAYERS = [
    pytest.param(nn.Linear(16, 8), id="linear"),
    pytest.param(nn.Conv2d(8, 6, 3), id="conv"),
    pytest.param(nn.Conv1d(16, 8, 3, groups=2), id="grouped"),
    pytest.param(nn.ConvTranspose2d(8, 6, 3), id="transposed"),
    pytest.param(nn.ConvTranspose2d(16, 6, 3, groups=2), id="transposed and grouped"),
]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(("pattern", "kept", "size"), [("2:4", 2, 4), ("1:8", 1, 8)])
def test_n_of_m_inputs_stay(layer: nn.Module, pattern: str, kept: int, size: int) -> None:
    model = nn.Sequential(copy.deepcopy(layer))
    before = model[0].weight.detach().clone()
    sparsify(model, make("0", round(1 - kept / size, 6), pattern), known(vector()))
    weight = model[0].weight
    blocks = by_inputs(layer, weight).reshape(-1, size)
    assert bool((blocks.count_nonzero(dim=1) == kept).all())
    largest = by_inputs(layer, before).reshape(-1, size).abs().sort(dim=1).values[:, size - kept :].sum()
    torch.testing.assert_close(weight.abs().sum(), largest)


def test_blocks_lie_along_the_inputs_that_an_output_reads() -> None:
    """Each output of a convolution is a sum over kernel positions and inputs: a block is four inputs at one position.

    With the inputs that are zero in a block set to something else, the output stays the same.
    """
    for layer in (nn.Conv2d(4, 1, 1, bias=False), nn.ConvTranspose2d(4, 1, 1, bias=False)):
        model = nn.Sequential(layer)
        sparsify(model, make("0", 0.5, "2:4"), known(vector()))
        x = torch.randn(1, 4, 1, 1)
        changed = torch.where(layer.weight.reshape(1, 4, 1, 1) == 0, torch.randn(1, 4, 1, 1), x)
        assert int((changed != x).sum()) == 2
        assert torch.equal(model(changed), model(x))


def test_inputs_beyond_the_last_block_stay_dense() -> None:
    model = nn.Sequential(nn.Linear(7, 5))
    sparsify(model, make("0", 0.5, "2:4"), known(vector()))
    assert (model[0].weight == 0).sum(0).tolist()[4:] == [0, 0, 0]
    assert bool(((model[0].weight[:, :4] == 0).sum(1) == 2).all())


def test_a_pattern_comes_with_the_last_cut() -> None:
    model = MLP()
    sparsify(model, make("first", 0.5, "2:4"), known(vector()), 0.7)
    assert share_of_zeros(model.first.weight) == 0
    sparsify(model, make("first", 0.5, "2:4"), known(vector()), 1.0)
    assert share_of_zeros(model.first.weight) == 0.5
    twice = copy.deepcopy(model)
    sparsify(twice, make("first", 0.5, "2:4"), known(vector()), 1.0)
    assert torch.equal(twice.first.weight, model.first.weight)


def test_a_layer_with_fewer_inputs_than_a_block_stays_dense() -> None:
    """Pruning may leave so few of them."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    plan = Sparsification(sparsity={"0": 0.5, "1": 0.5}, pattern="2:4")
    sparsify(model, plan, known(torch.randn(2, 3)))
    assert (share_of_zeros(model[0].weight), share_of_zeros(model[1].weight)) == (0, pytest.approx(0.4))


def test_what_the_pattern_doesnt_fit_is_named() -> None:
    with pytest.raises(TrialError, match=r"depthwise \(Conv2d\) has 1"):
        sparsify(Depthwise(), make("depthwise", 0.5, "2:4"), known(image(2, 3)))


@pytest.mark.parametrize(
    ("layer", "anywhere", "pattern"),
    [
        (nn.Conv2d(8, 8, 3), True, True),
        (nn.Conv2d(8, 8, 3, groups=8), True, False),
        (nn.Conv2d(8, 8, 3, groups=2), True, True),
        (nn.Conv2d(3, 8, 3), True, False),
        (nn.ConvTranspose2d(8, 4, 2), True, True),
        (nn.Linear(4, 2), True, True),
        (nn.LSTM(8, 8), False, False),
        (nn.MultiheadAttention(8, 2), False, False),
        (nn.BatchNorm2d(8), False, False),
    ],
)
def test_kinds_of_layers(layer: nn.Module, anywhere: bool, pattern: bool) -> None:
    assert (can_sparsify(layer), can_sparsify(layer, "2:4")) == (anywhere, pattern)


def test_a_ratio_ranks_all_layers_together() -> None:
    model = MLP()
    with torch.no_grad():
        model.first.weight *= 0.1
    plan = CompressionPlan(sparsify=Sparsification(ratio=0.5))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    config = resolve_sparsity(model, plan, known(vector()))
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert (config.ratio, config.threshold, config.pattern) == (None, None, "unstructured")
    assert config.sparsity["first"] > config.sparsity["narrow"] > 0
    sparsify(model, config, known(vector()))
    weights = torch.cat([model.get_parameter(f"{name}.weight").flatten() for name in ("first", "narrow", "head")])
    assert abs(int((weights == 0).sum()) - round(0.5 * weights.numel())) <= 1
    everything = torch.cat([before[f"{name}.weight"].flatten() for name in ("first", "narrow", "head")]).abs()
    assert everything[weights == 0].max() <= everything[weights != 0].min()


def test_every_layer_keeps_a_hundredth() -> None:
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100), nn.Linear(100, 1))
    with torch.no_grad():
        model[0].weight *= 1e-6
    x = torch.randn(2, 100)
    config = resolve_sparsity(model, CompressionPlan(sparsify=Sparsification(ratio=0.6)), known(x))
    assert config.sparsity["0"] == 0.99
    assert resolve_sparsity(model, CompressionPlan(sparsify=Sparsification(ratio=0.999)), known(x)).sparsity == {
        "0": 0.99,
        "1": 0.99,
        "2": 0.99,
    }


def test_a_threshold_is_in_standard_deviations_of_the_layer() -> None:
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100))
    for layer, scale in zip(model, (1.0, 50.0), strict=True):
        layer.weight.data = torch.randn(100, 100) * scale
    for threshold, share in ((1.0, 0.683), (9.0, 0.99)):
        plan = CompressionPlan(sparsify=Sparsification(threshold=threshold))
        found = resolve_sparsity(model, plan, known(torch.randn(2, 100))).sparsity
        assert found == {"0": pytest.approx(share, abs=0.02), "1": pytest.approx(share, abs=0.02)}
        assert max(found.values()) <= 0.99


def test_only_layers_that_are_called_are_ranked() -> None:
    plan = CompressionPlan(sparsify=Sparsification(ratio=0.5))
    assert set(resolve_sparsity(Unused(), plan, known(vector())).sparsity) == {"body", "head"}
    assert set(resolve_sparsity(Attention(), plan, known(sequence())).sparsity) == {"project", "head"}
    assert "grouped" in resolve_sparsity(Grouped(), plan, known(image())).sparsity


def test_tied_weights_are_ranked_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    config = resolve_sparsity(model, CompressionPlan(sparsify=Sparsification(ratio=0.5)), known(torch.randn(2, 8)))
    assert set(config.sparsity) == {"0", "1"}


def test_saved_loaded_and_exported_it_stays_the_same(digit_splits: Splits, tmp_path: Path) -> None:
    given = context(digit_splits, 1)
    config = Sparsification(sparsity={"conv1": 0.5, "conv2": 0.7, "fc1": 0.9})
    made = fold_batchnorm(sparsify(wake_norms(PlainCNN()), config, given), given.forward)
    for name, share in config.sparsity.items():
        weight = made.get_parameter(f"{name}.weight")
        assert int((weight == 0).sum()) == round(share * weight.numel()), "folding keeps zeros"
    save_model(made, str(tmp_path / "weights.safetensors"))
    again = fold_batchnorm(sparsify(PlainCNN(), config, given), given.forward)
    load_model(again, tmp_path / "weights.safetensors")
    inputs = digit_splits.validation.head(8).inputs
    assert isinstance(inputs, Tensor)
    with torch.no_grad():
        expected = made(inputs)
        assert torch.equal(again(inputs), expected)
    runtime = get_runtime("openvino")
    runtime.deploy(made, given.example, tmp_path / "model.onnx")
    found = runtime.load(tmp_path / "model.onnx", LoadOptions(8)).run({"input": inputs.numpy()})
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)
