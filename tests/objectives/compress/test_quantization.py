"""Fake quantization: the grid of the inputs and the weights, gradients, widths."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from paretune.errors import TrialError
from paretune.objectives.compress import Context
from paretune.objectives.compress.batchnorm import fold_batchnorm
from paretune.objectives.compress.layers import why_special
from paretune.objectives.compress.lowrank import Factorized
from paretune.objectives.compress.quantization import (
    QuantizedLayer,
    StaticQuantizer,
    freeze_quantizers,
    insert_quantizers,
    quantize,
    quantize_rows,
)
from paretune.objectives.compress.schemes import STATIC, Scheme, merge
from paretune.objectives.data import Splits
from paretune.objectives.tasks import Classification
from paretune.spaces.graph import Forward
from paretune.spaces.plan import Observer, Quantization
from tests import nets

LAYERS = [
    pytest.param(lambda: nn.Conv2d(3, 8, 3, padding=1), nets.image(), id="Conv2d"),
    pytest.param(lambda: nn.Conv2d(3, 6, 3, stride=2, groups=3, bias=False), nets.image(), id="grouped Conv2d"),
    pytest.param(lambda: nn.Conv1d(5, 4, 3), nets.sequence(), id="Conv1d"),
    pytest.param(lambda: nn.Conv3d(1, 4, 2), nets.image().unsqueeze(1), id="Conv3d"),
    pytest.param(lambda: nn.Linear(12, 5), nets.vector(), id="Linear"),
    pytest.param(lambda: nn.Linear(8, 5, bias=False), nets.sequence(), id="Linear on sequences"),
]


def frozen(
    layer: nn.Module,
    inputs: Tensor,
    bits: int = 8,
    scheme: Scheme = Scheme(),  # noqa: B008
    observer: Observer = "minmax",
) -> QuantizedLayer:
    quantized = QuantizedLayer(layer, bits, scheme, observer=observer).eval()
    with torch.no_grad():
        quantized(inputs)
    quantized.freeze()
    return quantized


@pytest.mark.parametrize("observer", get_args(Observer))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_activations_that_are_not_finite_have_no_grid(value: float, observer: Observer) -> None:
    inputs = torch.tensor([[1.0, value] * 6])
    with pytest.raises(TrialError, match=f"must be finite to be calibrated, but one is {abs(value)}|{value}"):
        frozen(nn.Linear(12, 5), inputs, observer=observer)


def static(quantized: QuantizedLayer) -> StaticQuantizer:
    assert quantized.input is not None
    return quantized.input


def on(inputs: Tensor) -> Forward:
    return lambda model: model(inputs)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("build", "inputs"), LAYERS)
def test_floats_pass_while_calibrating(build: type[nn.Module], inputs: Tensor) -> None:
    layer = build()
    quantized = QuantizedLayer(layer, 8, Scheme())
    assert torch.equal(quantized(inputs), layer(inputs))
    assert float(static(quantized).low) == pytest.approx(min(0.0, float(inputs.min())))
    quantized(inputs + 10)
    assert float(static(quantized).high) == pytest.approx(float(inputs.max()) + 10)
    assert float(static(quantized).low) == pytest.approx(min(0.0, float(inputs.min()))), "ranges only grow"


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(("build", "inputs"), LAYERS)
def test_every_weight_lies_on_the_grid(build: type[nn.Module], inputs: Tensor, bits: int) -> None:
    """With an input that is 1 in one place and 0 elsewhere, the outputs are the weights as they are used."""
    torch.manual_seed(0)
    layer: nn.Module = build()
    quantized = frozen(layer, inputs, bits)
    weight: Tensor = layer.weight.detach()  # type: ignore[assignment]
    scale = quantized.weight_scale.reshape(-1, *[1] * (weight.dim() - 1))
    used: list[Tensor] = []

    def remember(_x: Tensor, used_weight: Tensor, _bias: object) -> Tensor:
        used.append(used_weight)
        return used_weight

    if isinstance(layer, nn.Linear):
        size = weight.shape[1]
        outputs = quantized(torch.eye(size)) - (0 if layer.bias is None else layer.bias)
        one = static(quantized).scale * torch.round(1 / static(quantized).scale).clamp(
            max=255 - int(static(quantized).zero_point)
        )
        found = (outputs / one).T.detach()
    else:
        layer._conv_forward = remember  # type: ignore[assignment]
        quantized(inputs)
        found = used[0].detach()
    levels = found / scale
    assert torch.allclose(levels, levels.round(), atol=1e-3)
    limit = 2 ** (bits - 1) - 1
    assert levels.abs().max() <= limit + 1e-3
    assert torch.equal(levels.round().abs().flatten(1).amax(1), torch.full((len(weight),), float(limit)))
    assert (found - weight).abs().max() <= quantized.weight_scale.max() / 2 + 1e-6
    assert len(levels.round().unique()) <= 2 * limit + 1


@pytest.mark.parametrize(
    ("low", "high", "zero_point"),
    [
        pytest.param(0.0, 2.55, 0, id="after a ReLU"),
        pytest.param(-1.275, 1.275, 128, id="symmetric"),
        pytest.param(-2.55, 0.0, 255, id="negative"),
        pytest.param(1.0, 2.55, 0, id="zero is always in the range"),
    ],
)
def test_grid_of_the_inputs(low: float, high: float, zero_point: int) -> None:
    quantized = frozen(nn.Linear(2, 1), torch.tensor([[low, high]]))
    assert float(static(quantized).scale) == pytest.approx(0.01)
    assert int(static(quantized).zero_point) == zero_point


def test_inputs_are_rounded_and_clipped() -> None:
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1.0)
    quantized = frozen(layer, torch.tensor([[0.0], [2.55]]))
    outputs = quantized(torch.tensor([[0.014], [0.016], [9.0], [-9.0]])).flatten().tolist()
    assert outputs == pytest.approx([0.01, 0.02, 2.55, 0.0], abs=1e-5)


@pytest.mark.parametrize("inputs", [torch.zeros(2, 3), torch.full((2, 3), 1e-20)], ids=["zeros", "tiny"])
def test_degenerate_ranges_stay_finite(inputs: Tensor) -> None:
    layer = nn.Linear(3, 2)
    layer.weight.data[0] = 0
    quantized = frozen(layer, inputs)
    assert bool(torch.isfinite(quantized(torch.randn(4, 3))).all())
    assert torch.equal(quantized(torch.randn(4, 3))[:, 0], layer.bias[0].expand(4))


def test_gradients_pass_straight_through() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4, 3)
    inputs = torch.rand(5, 4, requires_grad=True)
    quantized = frozen(layer, inputs).train()
    quantized(inputs).sum().backward()
    assert layer.weight.grad is not None
    assert inputs.grad is not None
    torch.testing.assert_close(layer.weight.grad, inputs.detach().sum(0).expand(3, 4), atol=0.05, rtol=0.05)
    torch.testing.assert_close(inputs.grad, layer.weight.detach().sum(0).expand(5, 4), atol=0.05, rtol=0.05)


def test_the_grid_follows_the_weights_in_training_alone() -> None:
    layer = nn.Linear(4, 3)
    quantized = frozen(layer, torch.rand(5, 4))
    before = quantized.weight_scale.clone()
    layer.weight.data *= 2
    quantized(torch.rand(5, 4))
    assert torch.equal(quantized.weight_scale, before)
    quantized.train()(torch.rand(5, 4))
    torch.testing.assert_close(quantized.weight_scale, before * 2)


def test_error_shrinks_with_more_bits() -> None:
    torch.manual_seed(0)
    layer, inputs = nn.Linear(64, 32), torch.rand(16, 64)
    with torch.no_grad():
        errors = [float((frozen(layer, inputs, bits)(inputs) - layer(inputs)).abs().mean()) for bits in range(2, 9)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 20


def test_autocast_doesnt_touch_the_grid() -> None:
    torch.manual_seed(0)
    inputs = torch.rand(4, 8)
    quantized = frozen(nn.Linear(8, 4), inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = quantized(inputs.bfloat16())
    torch.testing.assert_close(outputs.float(), quantized(inputs), atol=0.05, rtol=0.05)


def test_insert_and_freeze() -> None:
    model = nets.PlainCNN().eval()
    kept = model.conv2
    bits = {"conv1": 8, "conv2": 16, "fc1": 4, "fc2": 32}
    insert_quantizers(model, Quantization(bits=bits), STATIC, on(nets.image(2, 1)))
    wrapped = {name: module.bits for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
    assert wrapped == {"conv1": 8, "fc1": 4}
    assert model.conv2 is kept
    model(nets.image(2, 1))
    freeze_quantizers(model)
    assert not any(module.calibrating for module in model.modules() if isinstance(module, QuantizedLayer))


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        pytest.param(nn.Conv1d(8, 4, 1, stride=2), nets.sequence().transpose(1, 2), id="Conv1d"),
        pytest.param(nn.Conv2d(3, 4, 1, stride=2), nets.image(), id="Conv2d"),
        pytest.param(nn.Conv2d(3, 4, 1, stride=(1, 3), bias=False), nets.image(), id="uneven stride"),
        pytest.param(nn.Conv3d(1, 4, 1, stride=2), nets.image().unsqueeze(1), id="Conv3d"),
        pytest.param(nn.Conv2d(3, 4, 1, stride=2, padding=1), nets.image(), id="padded"),
        pytest.param(nn.Conv2d(3, 3, 1, stride=2, groups=3), nets.image(), id="depthwise"),
        pytest.param(nn.Conv2d(3, 4, 3, stride=2), nets.image(), id="not pointwise"),
    ],
)
def test_strided_convolutions_compute_the_same(layer: nn.Module, inputs: Tensor) -> None:
    """Where only some positions are read, they are taken first; the result must not show it."""
    quantized = frozen(layer, inputs)
    q = torch.fake_quantize_per_tensor_affine(inputs, static(quantized).scale, static(quantized).zero_point, 0, 255)
    reference = copy.deepcopy(layer)
    reference.weight.data = torch.fake_quantize_per_channel_affine(
        layer.weight.data,  # type: ignore[arg-type]
        quantized.weight_scale,
        quantized.weight_zero_point,
        0,
        -128,
        127,
    )
    torch.testing.assert_close(quantized(inputs), reference(q), atol=1e-5, rtol=1e-5)


OUTPUTS = {8: Scheme(outputs=("Conv2d",))}


class Rectified(nn.Module):
    """A convolution for each thing that may read one; inputs (N, 3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.Conv2d(3, 4, 1)
        self.relu6 = nn.Conv2d(4, 4, 1)
        self.tanh = nn.Conv2d(4, 4, 1)
        self.read_twice = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu6(self.relu6(self.relu(x).relu_()))
        x = self.read_twice(nn.functional.hardtanh(self.tanh(x)))
        return self.head((x.relu() + x).mean((2, 3)))


def test_outputs_are_quantized_where_the_scheme_says() -> None:
    torch.manual_seed(0)
    model = Rectified().eval()
    bits = dict.fromkeys(dict(model.named_children()), 8)
    insert_quantizers(model, Quantization(bits=bits), OUTPUTS, on(nets.image()))
    layers = {name: part for name, part in model.named_children() if isinstance(part, QuantizedLayer)}
    ceilings = {name: part.output.ceiling for name, part in layers.items() if part.output is not None}
    assert ceilings == {"relu": float("inf"), "relu6": 6.0, "tanh": None, "read_twice": None}
    model(nets.image())
    freeze_quantizers(model)
    watched: list[Tensor] = []
    for name in ceilings:
        layers[name].layer.bias.data -= 0.5  # type: ignore[operator, union-attr]
        layers[name].register_forward_hook(lambda _module, _inputs, output: watched.append(output))
    with torch.no_grad():
        model(nets.image())
    assert all(len(output.unique()) <= 256 for output in watched)
    assert [bool(output.min() >= 0) for output in watched[:3]] == [True, True, False], "a rectifier cuts nothing"


def test_symmetric_grids_have_no_zero_point() -> None:
    quantized = frozen(nn.Linear(1, 1), torch.tensor([[-0.5], [1.27]]), scheme=Scheme(symmetric=True))
    assert float(static(quantized).scale) == pytest.approx(0.01)
    assert int(static(quantized).zero_point) == 0
    outputs = static(quantized)(torch.tensor([-9.0, -0.004, 0.006, 9.0])).tolist()
    assert outputs == pytest.approx([-1.28, 0.0, 0.01, 1.27])


@pytest.mark.parametrize("number", ["int", "fp8"])
def test_dynamic_inputs_have_a_grid_for_each_row(number: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, 64) * torch.tensor([1e-3, 1.0, 1e3]).reshape(3, 1, 1)
    rounded = quantize_rows(x, number)
    assert rounded.shape == x.shape
    largest = x.abs().amax(-1, keepdim=True)
    step = largest / 254 if number == "int" else (x.abs() / 16).maximum(largest / 448 / 512)
    assert bool(((rounded - x).abs() <= step * 1.001).all())
    assert not torch.equal(rounded, x)
    assert bool(torch.isfinite(quantize_rows(torch.zeros(2, 4), number)).all())


@pytest.mark.parametrize("number", ["int", "fp8"])
def test_dynamic_layers_train(number: str) -> None:
    torch.manual_seed(0)
    layer, inputs = nn.Linear(16, 4), torch.randn(8, 16, requires_grad=True)
    quantized = frozen(layer, inputs, scheme=Scheme(activations="dynamic", number=number)).train()  # type: ignore[arg-type]
    outputs = quantized(inputs)
    torch.testing.assert_close(outputs, layer(inputs), atol=0.1, rtol=0.05)
    outputs.sum().backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, inputs.detach().sum(0).expand(4, 16), atol=0.2, rtol=0.05)


def test_weights_in_blocks() -> None:
    torch.manual_seed(0)
    layer, inputs = nn.Linear(64, 6), torch.randn(8, 64)
    layer.weight.data[:, :32] *= 100
    scheme = Scheme(activations="float", block=32)
    quantized = frozen(layer, inputs, 4, scheme)
    assert quantized.weight_scale.shape == (12,)
    levels = quantized.quantized_weight().reshape(12, 32) / quantized.weight_scale[:, None]
    torch.testing.assert_close(levels, levels.round())
    assert int(levels.round().abs().max()) == 7
    error = (quantized.quantized_weight() - layer.weight).abs().reshape(12, 32).amax(1)
    assert bool((error <= quantized.weight_scale / 2 + 1e-6).all())
    expected = nn.functional.linear(inputs, quantized.quantized_weight(), layer.bias)
    assert torch.equal(quantized(inputs), expected), "activations stay floats"


@pytest.mark.parametrize(
    ("layer", "inputs"),
    [
        pytest.param(nn.Linear(24, 4), torch.randn(2, 24), id="no whole number of blocks"),
        pytest.param(nn.Conv2d(3, 32, 1), nets.image(), id="a convolution"),
    ],
)
def test_what_cant_be_parted_into_blocks_takes_the_container_of_8_bits(layer: nn.Module, inputs: Tensor) -> None:
    model = nn.Sequential(layer).eval()
    insert_quantizers(model, Quantization(bits={"0": 4}), {**STATIC, 4: Scheme("float", block=16)}, on(inputs))
    made = model[0]
    assert isinstance(made, QuantizedLayer)
    assert (made.scheme, made.bits, made.container) == (Scheme(), 4, 8)


@pytest.mark.parametrize("owner", ["embed", "head"])
def test_weights_that_another_module_reads_too_are_refused(owner: str) -> None:
    modules: dict[str, nn.Module] = {"embed": nn.Embedding(20, 16), "head": nn.Linear(16, 20)}
    modules["head"].weight = modules["embed"].weight
    model = nn.Sequential()
    for name in sorted(modules, key=lambda name: name != owner):
        model.add_module(name, modules[name])
    with pytest.raises(TrialError, match=r"head .* shares its weight with embed"):
        insert_quantizers(model, Quantization(bits={"head": 8}), STATIC, on(nets.vector()))


class Standardized(nn.Conv2d):
    """Reads its weight otherwise than a convolution does."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize(
    ("model", "name", "reason"),
    [
        pytest.param(nn.Sequential(nn.ConvTranspose2d(3, 4, 2)), "0", "is a ConvTranspose2d", id="another kind"),
        pytest.param(nn.Sequential(Standardized(3, 4, 2)), "0", "computes in a way of its own", id="own forward"),
        pytest.param(weight_norm(nn.Linear(3, 4)), "", "computed from other parameters", id="weight norm"),
        pytest.param(nn.MultiheadAttention(4, 2), "out_proj", "inside nn.MultiheadAttention", id="attention"),
    ],
)
def test_layers_that_cant_be_quantized(model: nn.Module, name: str, reason: str) -> None:
    with pytest.raises(TrialError, match=f"{name} must not be quantized: .*{reason}"):
        insert_quantizers(model, Quantization(bits={name: 8}), STATIC, on(nets.image()))
    assert why_special(nn.Sequential(nn.Linear(3, 4)), "0") is None


def test_schemes_of_two_runtimes() -> None:
    dynamic, blocks = Scheme(activations="dynamic"), Scheme(activations="float", block=32)
    assert merge(STATIC, OUTPUTS) == OUTPUTS
    assert merge(STATIC, {8: dynamic, 4: blocks}) == {}
    assert merge({**STATIC, 4: blocks}, {**OUTPUTS, 4: blocks}) == {**OUTPUTS, 4: blocks}
    assert {width: Scheme.from_dict(scheme.to_dict()) for width, scheme in OUTPUTS.items()} == OUTPUTS


def test_blocks_shrink_to_part_the_inputs_evenly() -> None:
    quantized = frozen(nn.Linear(48, 2), torch.randn(4, 48), 4, Scheme(activations="float", block=32))
    assert quantized.weight_scale.shape == (2 * 3,), "three blocks of 16"


def weight_of(layer: nn.Module) -> Tensor:
    assert isinstance(layer.weight, Tensor)
    return layer.weight.detach()


def error(quantized: QuantizedLayer) -> float:
    return float((quantized.quantized_weight().detach() - weight_of(quantized.layer)).square().sum())


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("affine", [False, True], ids=["symmetric", "affine"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_few_bits_have_no_more_levels(bits: int, affine: bool, observer: Observer) -> None:
    torch.manual_seed(0)
    scheme = Scheme("float", affine=affine, per_tensor=True)
    quantized = frozen(nn.Linear(200, 100), torch.rand(2, 200), bits, scheme, observer)
    levels = quantized.weight_levels()
    assert (int(levels.min()) >= quantized.levels.least, int(levels.max()) <= quantized.levels.most) == (True, True)
    assert len(levels.unique()) <= 2**bits
    zeros = quantized.weight_zero_point.reshape(-1, 1)
    scales = quantized.weight_scale.reshape(-1, 1)
    assert torch.equal((levels - zeros) * scales, quantized.quantized_weight()), "what is stored is what is computed"


@pytest.mark.parametrize("scheme", [Scheme(), Scheme("float", affine=True), Scheme("float", block=16)])
def test_one_scale_for_the_tensor(scheme: Scheme) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 8)
    layer.weight.data[3] *= 10
    layer.bias.data[5] = 1e6  # whose scale must hold for all
    inputs = torch.rand(4, 32)
    many = frozen(copy.deepcopy(layer), inputs, 8, scheme)
    one = frozen(layer, inputs, 8, replace(scheme, per_tensor=True))
    assert len(many.weight_scale.unique()) > 1
    assert [len(values.unique()) for values in (one.weight_scale, one.weight_zero_point)] == [1, 1]
    assert one.weight_scale.shape == many.weight_scale.shape
    if not scheme.affine:
        assert float(one.weight_scale[0]) == float(many.weight_scale.max())


def test_affine_weights_use_all_levels_on_one_side_of_zero() -> None:
    layer = nn.Linear(50, 4)
    layer.weight.data.abs_()
    halves = [error(frozen(layer, torch.rand(2, 50), 4, Scheme("float", affine=affine))) for affine in (False, True)]
    assert halves[1] < 0.4 * halves[0]


@pytest.mark.parametrize("observer", ["percentile", "mse"])
def test_the_grid_of_clipped_weights_follows_in_training(observer: Observer) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(20_000, 2)
    quantized = frozen(layer, torch.rand(1, 20_000), 4, Scheme("float", per_tensor=True), observer)
    before = quantized.weight_scale.clone()
    assert float(before[0]) < float(weight_of(layer).abs().max()) / 7
    layer.weight.data *= 2
    quantized.train()(torch.rand(1, 20_000))
    torch.testing.assert_close(quantized.weight_scale, before * 2)
    layer.weight.data[0, 0] = 1.0  # an outlier takes the range along until that is looked for again
    quantized(torch.rand(1, 20_000))
    assert float(quantized.weight_scale[0]) > 2 * float(before[0])
    for _ in range(63):
        quantized(torch.rand(1, 20_000))
    torch.testing.assert_close(quantized.weight_scale, before * 2, rtol=0.25, atol=0.0)
    after = quantized.weight_scale.clone()
    quantized.eval().freeze()
    assert torch.equal(quantized.weight_scale, after), "what the last steps were trained through stays"


@pytest.mark.parametrize("observer", ["percentile", "mse"])
def test_outliers_of_activations_are_clipped(observer: Observer) -> None:
    inputs = torch.rand(4, 50_000)
    inputs[0, 0] = 3.0
    layer = nn.Linear(50_000, 1)
    widest, found = (static(frozen(layer, inputs, 8, observer=kind)) for kind in ("minmax", observer))
    assert float(widest.high) == 3
    assert float(found.high) < (1.01 if observer == "percentile" else 2.5)
    assert float(found.scale) == pytest.approx(float(found.high) / 255)
    scale = found.scale.clone()
    found.freeze()
    assert torch.equal(found.scale, scale), "calibrated once"


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_grids_before_a_rectifier_cover_what_it_lets_through(observer: Observer) -> None:
    quantizer = StaticQuantizer(symmetric=False, ceiling=6.0, observer=observer)
    quantizer(torch.linspace(-50, 10, 10_000))
    quantizer.freeze()
    assert (float(quantizer.low), int(quantizer.zero_point)) == (0.0, 0)
    assert 5.5 < float(quantizer.high) <= 6.0


@pytest.mark.parametrize(
    ("width", "how", "scheme"),
    [
        pytest.param(8, {}, OUTPUTS[8], id="as the target wants"),
        pytest.param(3, {}, OUTPUTS[8], id="few bits as 8"),
        pytest.param(8, {"granularity": "per-tensor"}, replace(OUTPUTS[8], per_tensor=True), id="per tensor"),
        pytest.param(4, {}, Scheme("float", block=32), id="blocks of the target"),
        pytest.param(5, {"activations": "float"}, Scheme("float"), id="weights alone"),
        pytest.param(8, {"activations": "float", "affine": True}, Scheme("float", affine=True), id="affine"),
        pytest.param(
            4, {"activations": "float", "affine": True}, Scheme("float", block=32, affine=True), id="affine in blocks"
        ),
    ],
)
def test_schemes_of_a_plan(width: int, how: dict[str, Any], scheme: Scheme) -> None:
    model = nn.Sequential(nn.Linear(32, 4)).eval()
    schemes = {**OUTPUTS, 4: Scheme("float", block=32)}
    insert_quantizers(model, Quantization(bits={"0": width}, **how), schemes, on(torch.rand(2, 32)))
    made = model[0]
    assert isinstance(made, QuantizedLayer)
    assert made.scheme == scheme


def test_targets_without_a_common_scheme_can_have_weights_alone() -> None:
    model = nn.Sequential(nn.Linear(32, 4)).eval()
    with pytest.raises(TrialError, match="weights alone"):
        insert_quantizers(model, Quantization(bits={"0": 8}), {}, on(torch.rand(2, 32)))
    insert_quantizers(model, Quantization(bits={"0": 8}, activations="float"), {}, on(torch.rand(2, 32)))
    assert isinstance(model[0], QuantizedLayer)


def test_fp8_has_no_fewer_bits() -> None:
    model = nn.Sequential(nn.Linear(32, 4)).eval()
    schemes = {8: Scheme("dynamic", number="fp8")}
    with pytest.raises(TrialError, match="8 bits where these are fp8 numbers, but got 5"):
        insert_quantizers(model, Quantization(bits={"0": 5}), schemes, on(torch.rand(2, 32)))


def test_factors_have_the_width_of_their_layer() -> None:
    model = nn.Sequential(Factorized(nn.Linear(12, 2), nn.Linear(2, 12)), nn.ReLU(), nn.Linear(12, 3)).eval()
    insert_quantizers(model, Quantization(bits={"0": 4, "2": 8}), STATIC, on(nets.vector()))
    wrapped = {name: part.bits for name, part in model.named_modules() if isinstance(part, QuantizedLayer)}
    assert wrapped == {"0.0": 4, "0.1": 4, "2": 8}


def quantized_digits(trained: nn.Module, splits: Splits, config: Quantization) -> nn.Module:
    """The trained model, quantized without training; with its batch norm folded."""
    batches = list(splits.train.head(256).batches(64))
    context = Context(splits.train.head(2).inputs, {}, Classification(), batches, STATIC)
    return quantize(fold_batchnorm(trained, context.forward), config, context)


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
@pytest.mark.parametrize("activations", ["quantized", "float"])
def test_8_bits_after_training_cost_less_than_a_point(
    trained: nn.Module, digit_splits: Splits, observer: Observer, activations: Any
) -> None:
    bits = dict.fromkeys(("conv1", "conv2", "fc1", "fc2"), 8)
    module = quantized_digits(
        trained, digit_splits, Quantization(bits=bits, observer=observer, activations=activations)
    )
    inputs = torch.cat([digit_splits.validation.inputs, digit_splits.test.inputs])  # type: ignore[list-item]
    targets = torch.cat([digit_splits.validation.targets, digit_splits.test.targets])
    with torch.no_grad():
        found, dense = ((net(inputs).argmax(1) == targets).float().mean() for net in (module, trained.eval()))
    assert float(found) >= float(dense) - 0.01


@pytest.mark.parametrize("granularity", ["per-channel", "per-tensor"])
def test_mse_rounds_trained_weights_better(trained: nn.Module, digit_splits: Splits, granularity: Any) -> None:
    bits = dict.fromkeys(("conv1", "conv2", "fc1", "fc2"), 4)
    errors: list[list[float]] = []
    for observer in ("minmax", "mse"):
        config = Quantization(bits=bits, observer=observer, granularity=granularity)  # type: ignore[arg-type]
        module = quantized_digits(trained, digit_splits, config)
        errors.append([error(part) for part in module.modules() if isinstance(part, QuantizedLayer)])
    assert all(mse <= minmax for minmax, mse in zip(*errors, strict=True))
    assert sum(errors[1]) < 0.95 * sum(errors[0])
