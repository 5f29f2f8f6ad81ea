"""What every runtime must do. A new one subclasses `RuntimeContract` and gives its fixture `runtime`."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from paretune.errors import JobError, TrialError
from paretune.objectives.compress.batchnorm import fold_batchnorm
from paretune.objectives.compress.quantization import freeze_quantizers, insert_quantizers
from paretune.objectives.compress.schemes import STATIC, Schemes
from paretune.objectives.data import Inputs, Splits, call
from paretune.objectives.runtimes import LoadOptions, Runtime, Session
from paretune.objectives.runtimes.onnx_export import named_arrays
from paretune.objectives.site import check_executed, wanted_widths
from paretune.spaces.graph import execution_order
from paretune.spaces.plan import Quantization
from tests import nets

SeededInputs = Callable[[int], Inputs]


class Conv3dNet(nn.Module):
    """The kinds of layers that no other net has; inputs (N, 1, 4, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 8, 3, padding=1)
        self.second = nn.Conv3d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.first(x).relu()).relu().mean((2, 3, 4)))


class ZeroBias(nn.Module):
    """Biases that are exactly zero, which runtimes optimize away; inputs (N, 3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.fc1 = nn.Linear(8, 16)
        self.fc2 = nn.Linear(16, 4)
        for layer in (self.conv, self.fc1, self.fc2):
            layer.bias.data.zero_()  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(self.conv(x).relu().mean((2, 3))).relu())


class Blocks(nn.Module):
    """Linear layers whose inputs can be parted into blocks; inputs (N, 5, block)."""

    def __init__(self, block: int = 32) -> None:
        super().__init__()
        self.up = nn.Linear(block, 2 * block)
        self.again = nn.Linear(2 * block, 2 * block)
        self.bare = nn.Linear(2 * block, block, bias=False)
        self.conv = nn.Conv1d(5, 8, 3, padding=1)
        self.hidden = nn.Linear(8 * block, 2 * block)
        self.head = nn.Linear(2 * block, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.gelu(self.again(self.again(self.up(x).relu())))
        x = self.conv(self.bare(x)).relu().flatten(1)
        return self.head(nn.functional.relu6(self.hidden(x)))


def blocks(batch: int, block: int = 32) -> Tensor:
    return torch.randn(batch, 5, block, generator=torch.Generator().manual_seed(batch))


def volume(batch: int) -> Tensor:
    return torch.randn(batch, 1, 4, 8, 8, generator=torch.Generator().manual_seed(batch))


def signal(batch: int) -> Tensor:
    return torch.randn(batch, 2, 20, generator=torch.Generator().manual_seed(batch))


NETS = [
    pytest.param(lambda: nets.wake_norms(nets.PlainCNN()), lambda batch: nets.image(batch, 1), id="PlainCNN"),
    pytest.param(nets.Residual, nets.image, id="Residual"),
    pytest.param(nets.Depthwise, nets.image, id="Depthwise"),
    pytest.param(nets.Dense, nets.image, id="Dense"),
    pytest.param(nets.Grouped, nets.image, id="Grouped"),
    pytest.param(nets.MLP, nets.vector, id="MLP"),
    pytest.param(nets.Signal, signal, id="Signal"),
    pytest.param(Conv3dNet, volume, id="Conv3d"),
    pytest.param(nets.TwoInputs, nets.image_and_numbers, id="tuple"),
    pytest.param(nets.TokenEncoder, nets.tokens, id="dict"),
    pytest.param(nets.Transformer, nets.sequence, id="Transformer"),
    pytest.param(nets.Recurrent, nets.sequence, id="LSTM"),
    pytest.param(nets.Twice, nets.vector, id="called twice"),
    pytest.param(lambda: nets.wake_norms(nets.Fold()), nets.image, id="batch norms left"),
    pytest.param(ZeroBias, nets.image, id="zero biases"),
]


HOWS = [
    pytest.param({"granularity": "per-tensor"}, id="per tensor"),
    pytest.param({"observer": "mse"}, id="few bits"),
    pytest.param({"observer": "percentile", "granularity": "per-tensor"}, id="percentile"),
    pytest.param({"activations": "float"}, id="weights alone"),
    pytest.param({"activations": "float", "observer": "mse", "affine": True}, id="affine"),
    pytest.param({"activations": "float", "affine": True, "granularity": "per-tensor"}, id="affine per tensor"),
]
"""Settings of `Quantization`."""


def prepared(
    build: Callable[[], nn.Module],
    inputs: Inputs,
    bits: dict[str, int] | int,
    schemes: Schemes = STATIC,
    **how: Any,
) -> nn.Module:
    """A module as it is deployed: batch norm folded, quantizers calibrated and frozen; `how` as in `Quantization`."""

    def forward(model: nn.Module) -> Tensor:
        return call(model, inputs)

    torch.manual_seed(0)
    module = fold_batchnorm(build(), forward)
    names = execution_order(module, forward)
    asked = dict.fromkeys(names, bits) if isinstance(bits, int) else bits
    insert_quantizers(module, Quantization(bits=asked, **how), schemes, forward)
    with torch.no_grad():
        call(module, inputs)
    freeze_quantizers(module)
    return module


def names_of(build: Callable[[], nn.Module], inputs: Inputs) -> list[str]:
    return list(execution_order(build().eval(), lambda model: call(model, inputs)))


class RuntimeContract:
    """Subclass it as `Test<Runtime>` with a fixture `runtime`.

    Attributes:
        device: A device that the runtime has.
        purpose: What sessions are loaded for, where it isn't the profile.
    """

    device = "cpu"
    purpose: Literal["measure", "score"] = "measure"

    @pytest.fixture
    def runtime(self) -> Runtime:
        raise NotImplementedError

    def prepared(
        self, runtime: Runtime, build: Callable[[], nn.Module], inputs: Inputs, bits: dict[str, int] | int
    ) -> nn.Module:
        """A module quantized as the runtime wants it, as far as it has the widths."""
        asked = dict.fromkeys(names_of(build, inputs), bits) if isinstance(bits, int) else bits
        return prepared(build, inputs, self.offered(runtime, build, asked), runtime.capabilities(self.device).schemes)

    def offered(
        self, runtime: Runtime, build: Callable[[], nn.Module], asked: dict[str, int], float_bits: int = 32
    ) -> dict[str, int]:
        """What is asked for, in floats where the runtime doesn't offer that width for the kind of layer."""
        capabilities = runtime.capabilities(self.device)
        kinds = {name: type(module).__name__ for name, module in build().named_modules()}
        return {name: bits if bits in capabilities.widths(kinds[name]) else float_bits for name, bits in asked.items()}

    def _options(self, batch: int, float_bits: int = 32) -> LoadOptions:
        return LoadOptions(batch, float_bits=float_bits, purpose=self.purpose, device=self.device)

    def _load(
        self, runtime: Runtime, module: nn.Module, example: Inputs, path: Path, batch: int, float_bits: int = 32
    ) -> Session:
        runtime.deploy(module, example, path)
        return runtime.load(path, self._options(batch, float_bits))

    def test_capabilities(self, runtime: Runtime) -> None:
        capabilities = runtime.capabilities(self.device)
        assert 32 in capabilities.float_bits
        assert list(capabilities.float_bits) == sorted(capabilities.float_bits, reverse=True)
        assert all(2 <= bits <= 8 for widths in capabilities.integer_bits.values() for bits in widths)
        for kind, widths in capabilities.integer_bits.items():
            assert capabilities.widths(kind) == (*capabilities.float_bits, *widths)
        assert capabilities.widths("Embedding") == capabilities.float_bits

    def test_unknown_device(self, runtime: Runtime) -> None:
        with pytest.raises(JobError, match="'abacus'") as caught:
            runtime.capabilities("abacus")
        assert caught.value.where == "target.device"
        assert self.device in caught.value.remedy

    @pytest.mark.parametrize(("build", "inputs"), NETS)
    def test_float32_agrees_with_the_module(
        self, runtime: Runtime, tmp_path: Path, build: Callable[[], nn.Module], inputs: SeededInputs
    ) -> None:
        module = self.prepared(runtime, build, inputs(2), 32)
        runtime.deploy(module, inputs(2), tmp_path / "model.onnx")
        for batch in (1, 3):
            session = runtime.load(tmp_path / "model.onnx", self._options(batch))
            assert all(session.layers()[name].bits == 32 for name in names_of(build, inputs(2)))
            given = inputs(batch)
            with torch.no_grad():
                expected = call(module, given).numpy()
            found = session.run(named_arrays(given))
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())

    @pytest.mark.parametrize(("build", "inputs"), NETS)
    def test_bfloat16_is_close_to_the_module(
        self, runtime: Runtime, tmp_path: Path, build: Callable[[], nn.Module], inputs: SeededInputs
    ) -> None:
        if 16 not in runtime.capabilities(self.device).float_bits:
            pytest.skip("the device doesn't execute bf16")
        module = self.prepared(runtime, build, inputs(2), 32)
        session = self._load(runtime, module, inputs(2), tmp_path / "model.onnx", 3, 16)
        with torch.no_grad():
            expected = call(module, inputs(3)).numpy()
        found = session.run(named_arrays(inputs(3)))
        # Relative to the range, with room for sums that nearly cancel in these untrained nets.
        assert np.abs(found - expected).max() <= 2e-2 * max(1.0, np.ptp(expected))

    @pytest.mark.parametrize(("build", "inputs"), NETS)
    def test_int8_agrees_with_the_fake_quantized_module(
        self, runtime: Runtime, tmp_path: Path, build: Callable[[], nn.Module], inputs: SeededInputs
    ) -> None:
        module = self.prepared(runtime, build, inputs(64), 8)
        session = self._load(runtime, module, inputs(2), tmp_path / "model.onnx", 64)
        with torch.no_grad():
            expected = call(module, inputs(64)).numpy()
        found = session.run(named_arrays(inputs(64)))
        # A value that falls on the border of two levels may round either way; most don't.
        assert np.abs(found - expected).mean() <= 5e-3 * np.ptp(expected)

    def test_int8_predicts_as_the_trained_module(
        self, runtime: Runtime, tmp_path: Path, trained: nn.Module, digit_splits: Splits
    ) -> None:
        train, validation = digit_splits.train.head(256).inputs, digit_splits.validation.inputs
        assert isinstance(validation, Tensor)
        module = self.prepared(runtime, lambda: copy.deepcopy(trained), train, 8)
        session = self._load(runtime, module, validation[:2], tmp_path / "model.onnx", len(validation))
        with torch.no_grad():
            expected = module(validation).argmax(1).numpy()
        found = session.run({"input": validation.numpy()}).argmax(1)
        assert (found == expected).mean() >= 0.99
        assert (found == digit_splits.validation.targets.numpy()).mean() >= 0.9

    @pytest.mark.parametrize("mix", ["alternating", "first half", "second half", "random 1", "random 2"])
    def test_mixed_widths_predict_as_the_trained_module(
        self, runtime: Runtime, tmp_path: Path, trained: nn.Module, digit_splits: Splits, mix: str
    ) -> None:
        capabilities, rng = runtime.capabilities(self.device), random.Random(mix)
        kinds = {name: type(module).__name__ for name, module in trained.named_modules()}
        names = names_of(lambda: copy.deepcopy(trained), digit_splits.train.head(2).inputs)
        low = {"alternating": names[::2], "first half": names[:2], "second half": names[2:]}.get(mix, names)
        asked = dict.fromkeys(names, 32)
        for name in low:
            offered = [bits for bits in capabilities.widths(kinds[name]) if bits != 16]
            asked[name] = rng.choice(offered) if mix.startswith("random") else 8
        asked = self.offered(runtime, lambda: copy.deepcopy(trained), asked)
        splits = (digit_splits.train, digit_splits.validation, digit_splits.test)
        inputs = torch.cat([cast(Tensor, split.inputs) for split in splits])
        targets = torch.cat([split.targets for split in splits]).numpy()
        module = self.prepared(runtime, lambda: copy.deepcopy(trained), inputs[:256], asked)
        session = self._load(runtime, module, inputs[:2], tmp_path / "model.onnx", len(inputs))
        reports = session.layers()
        assert {name: reports[name].bits for name in names} == asked
        with torch.no_grad():
            expected = module(inputs).argmax(1).numpy()
        found = session.run({"input": inputs.numpy()}).argmax(1)
        assert (found == expected).mean() >= 0.99
        assert abs((found == targets).mean() - (expected == targets).mean()) <= 0.0015

    @pytest.mark.parametrize("mix", ["all", "even", "random"])
    @pytest.mark.parametrize(("build", "inputs"), NETS)
    def test_every_layer_is_reported_in_the_width_asked_for(
        self, runtime: Runtime, tmp_path: Path, build: Callable[[], nn.Module], inputs: SeededInputs, mix: str
    ) -> None:
        rng = random.Random(mix)
        choose: dict[str, Callable[[int], bool]] = {
            "all": lambda _: True,
            "even": lambda index: index % 2 == 0,
        }
        capabilities = runtime.capabilities(self.device)
        names = names_of(build, inputs(2))
        low = [name for i, name in enumerate(names) if choose.get(mix, lambda _: rng.random() < 0.5)(i)]
        for float_bits, batch in zip(capabilities.float_bits, (1, 16, 3), strict=False):
            wanted = {name: 8 if name in low else float_bits for name in names}
            asked = self.offered(runtime, build, wanted, float_bits)
            module = self.prepared(runtime, build, inputs(2), asked)
            session = self._load(runtime, module, inputs(2), tmp_path / "model.onnx", batch, float_bits)
            reports = session.layers()
            found = {name: reports[name].bits for name in names if name in reports}
            assert found == asked, f"float width {float_bits}, batch {batch}"

    @pytest.mark.parametrize(
        ("kind", "build", "inputs"),
        [
            pytest.param("Conv1d", nets.Signal, signal, id="Conv1d"),
            pytest.param("Conv2d", nets.Residual, nets.image, id="Conv2d"),
            pytest.param("Conv3d", Conv3dNet, volume, id="Conv3d"),
            pytest.param("Linear", Blocks, blocks, id="Linear"),
        ],
    )
    def test_each_width_that_is_offered_is_executed(
        self, runtime: Runtime, tmp_path: Path, kind: str, build: Callable[[], nn.Module], inputs: SeededInputs
    ) -> None:
        widths = runtime.capabilities(self.device).widths(kind)
        kinds = {name: type(module).__name__ for name, module in build().named_modules()}
        names = [name for name in names_of(build, inputs(2)) if kinds[name] == kind]
        assert names
        for bits in widths:
            module = self.prepared(runtime, build, inputs(2), dict.fromkeys(names, bits))
            float_bits = bits if bits > 8 else 32
            session = self._load(runtime, module, inputs(2), tmp_path / "model.onnx", 4, float_bits)
            reports = session.layers()
            assert {reports[name].bits for name in names} == {bits}

    @pytest.mark.parametrize("mix", ["all", "with 8", "with 32", "with both"])
    @pytest.mark.parametrize("batch", [1, 16])
    def test_weights_in_blocks_agree_with_the_module(
        self, runtime: Runtime, tmp_path: Path, mix: str, batch: int
    ) -> None:
        width, block = self._blocks(runtime)
        cycle = {"all": [width], "with 8": [width, 8], "with 32": [width, 32], "with both": [width, 8, 32]}[mix]

        def build() -> nn.Module:
            return Blocks(block)

        names = names_of(build, blocks(2, block))
        asked = self.offered(runtime, build, {name: cycle[i % len(cycle)] for i, name in enumerate(names)})
        module = self.prepared(runtime, build, blocks(64, block), asked)
        session = self._load(runtime, module, blocks(2, block), tmp_path / "model.onnx", batch)
        reports = session.layers()
        assert {name: reports[name].bits for name in asked} == asked
        with torch.no_grad():
            expected = module(blocks(batch, block)).numpy()
        found = session.run(named_arrays(blocks(batch, block)))
        # Kernels may round the inputs too, to 8 bits in blocks.
        assert np.abs(found - expected).mean() <= 1e-2 * np.ptp(expected)

    def test_files_with_weights_in_blocks_are_small(self, runtime: Runtime, tmp_path: Path) -> None:
        width, block = self._blocks(runtime)

        def build() -> nn.Module:
            return nn.Sequential(nn.Linear(4 * block, 512), nn.ReLU(), nn.Linear(512, 512))

        inputs, sizes = torch.randn(2, 4 * block), []
        for bits in (32, width):
            runtime.deploy(self.prepared(runtime, build, inputs, bits), inputs, tmp_path / f"{bits}")
            sizes.append((tmp_path / f"{bits}").stat().st_size)
        assert sizes[1] < 0.2 * sizes[0]

    def _blocks(self, runtime: Runtime) -> tuple[int, int]:
        """A width of linear layers with weights in blocks, and the size of these."""
        capabilities = runtime.capabilities(self.device)
        for width in capabilities.integer_bits.get("Linear", ()):
            block = capabilities.schemes[width].block
            if block:
                return width, block
        pytest.skip("the runtime has no weights in blocks")

    @pytest.mark.parametrize("how", HOWS)
    def test_every_way_to_quantize_predicts_as_the_trained_module(
        self, runtime: Runtime, tmp_path: Path, trained: nn.Module, digit_splits: Splits, how: dict[str, Any]
    ) -> None:
        names = names_of(lambda: copy.deepcopy(trained), digit_splits.train.head(2).inputs)
        kinds = {name: type(module).__name__ for name, module in trained.named_modules()}
        integers, alone = runtime.capabilities(self.device).integer_bits, how.get("activations") == "float"
        asked = {
            name: bits if alone or 8 in integers.get(kinds[name], ()) else 32
            for name, bits in zip(names, (8, 5, 3, 6), strict=True)
        }
        inputs = torch.cat([cast(Tensor, split.inputs) for split in (digit_splits.train, digit_splits.test)])
        schemes = runtime.capabilities(self.device).schemes
        module = prepared(lambda: copy.deepcopy(trained), inputs[:256], asked, schemes, **how)
        session = self._load(runtime, module, inputs[:2], tmp_path / "model.onnx", len(inputs))
        executed = check_executed(session.layers(), wanted_widths(module, 32, names))
        assert all(executed[name] == 32 if bits == 32 else executed[name] in (8, 32) for name, bits in asked.items())
        if not alone:
            assert all(executed[name] == 8 for name, bits in asked.items() if bits < 32), "in the container of 8 bits"
        with torch.no_grad():
            expected = module(inputs).argmax(1).numpy()
        assert (session.run({"input": inputs.numpy()}).argmax(1) == expected).mean() >= 0.995

    @pytest.mark.parametrize("affine", [False, True], ids=["symmetric", "affine"])
    @pytest.mark.parametrize(("build", "inputs"), NETS)
    def test_weights_alone_agree_with_the_module(
        self, runtime: Runtime, tmp_path: Path, build: Callable[[], nn.Module], inputs: SeededInputs, affine: bool
    ) -> None:
        names = names_of(build, inputs(2))
        asked = {name: 8 if index % 3 else 5 for index, name in enumerate(names)}
        schemes = runtime.capabilities(self.device).schemes
        module = prepared(build, inputs(2), asked, schemes, activations="float", affine=affine)
        path = tmp_path / "model.onnx"
        for float_bits, batch in zip(runtime.capabilities(self.device).float_bits, (3, 16), strict=False):
            session = self._load(runtime, module, inputs(2), path, batch, float_bits)
            check_executed(session.layers(), wanted_widths(module, float_bits, names))
            with torch.no_grad():
                expected = call(module, inputs(batch)).numpy()
            found = session.run(named_arrays(inputs(batch)))
            # Kernels for such weights may round the inputs of linear layers too, to 8 bits in blocks.
            assert np.abs(found - expected).mean() <= 1e-2 * np.ptp(expected)

    def test_affine_weights_in_blocks_agree_with_the_module(self, runtime: Runtime, tmp_path: Path) -> None:
        width, block = self._blocks(runtime)

        def build() -> nn.Module:
            model = Blocks(block)
            for layer in (model.up, model.hidden):
                layer.weight.data.abs_()  # no symmetric grid suits it
            return model

        schemes = runtime.capabilities(self.device).schemes
        asked = {name: width for name in names_of(build, blocks(2, block)) if name != "conv"}
        module = prepared(build, blocks(64, block), asked, schemes, activations="float", affine=True)
        session = self._load(runtime, module, blocks(2, block), tmp_path / "model.onnx", 16)
        assert {name: session.layers()[name].bits for name in asked} == asked
        with torch.no_grad():
            expected = module(blocks(16, block)).numpy()
        found = session.run(named_arrays(blocks(16, block)))
        assert np.abs(found - expected).mean() <= 1e-2 * np.ptp(expected)

    def test_files_with_quantized_weights_are_small_whatever_runs(self, runtime: Runtime, tmp_path: Path) -> None:
        def build() -> nn.Module:
            return nn.Sequential(nn.Conv2d(3, 64, 3), nn.Conv2d(64, 64, 3), nn.Flatten(), nn.Linear(1024, 64))

        schemes, sizes = runtime.capabilities(self.device).schemes, []
        for bits in (32, 8):
            module = prepared(build, nets.image(), bits, schemes, activations="float")
            runtime.deploy(module, nets.image(), tmp_path / f"{bits}")
            sizes.append((tmp_path / f"{bits}").stat().st_size)
        assert sizes[1] < 0.3 * sizes[0]

    def test_profile_gives_every_layer_its_share(self, runtime: Runtime, tmp_path: Path) -> None:
        module = self.prepared(runtime, nets.Residual, nets.image(), 32)
        path = tmp_path / "model.onnx"
        runtime.deploy(module, nets.image(), path)
        session = runtime.load(path, LoadOptions(8, purpose="profile", device=self.device))
        for _ in range(5):
            session.run(named_arrays(nets.image(8)))
        reports = session.layers()
        names = names_of(nets.Residual, nets.image())
        assert all(0 <= reports[name].share <= 1 for name in names)
        assert 0 < sum(reports[name].share for name in names) <= 1 + 1e-6
        assert all(report.share == 0 for report in self._load(runtime, module, nets.image(), path, 8).layers().values())

    def test_bound_calls_run_again_and_again(self, runtime: Runtime, tmp_path: Path) -> None:
        module = self.prepared(runtime, nets.TwoInputs, nets.image_and_numbers(), 8)
        session = self._load(runtime, module, nets.image_and_numbers(), tmp_path / "model.onnx", 4)
        arrays = named_arrays(nets.image_and_numbers(4))
        before = session.run(arrays)
        infer = session.bind(arrays)
        for _ in range(3):
            infer()
        np.testing.assert_array_equal(session.run(arrays), before)

    def test_loading_twice_gives_equal_outputs(self, runtime: Runtime, tmp_path: Path) -> None:
        module = self.prepared(runtime, nets.Residual, nets.image(), 8)
        first = self._load(runtime, module, nets.image(), tmp_path / "one.onnx", 4)
        again = runtime.load(tmp_path / "one.onnx", self._options(4))
        other = self._load(runtime, module, nets.image(), tmp_path / "other.onnx", 4)
        arrays = named_arrays(nets.image(4))
        np.testing.assert_array_equal(first.run(arrays), again.run(arrays))
        np.testing.assert_array_equal(first.run(arrays), other.run(arrays))
        assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "other.onnx").read_bytes()

    def test_outputs_are_the_callers_own(self, runtime: Runtime, tmp_path: Path) -> None:
        module = self.prepared(runtime, nets.MLP, nets.vector(), 32)
        session = self._load(runtime, module, nets.vector(), tmp_path / "model.onnx", 2)
        first = session.run(named_arrays(nets.vector(2)))
        kept = first.copy()
        session.run({"input": np.zeros((2, 12), np.float32)})
        np.testing.assert_array_equal(first, kept)

    def test_deploying_leaves_the_module_alone(self, runtime: Runtime, tmp_path: Path) -> None:
        module = self.prepared(runtime, nets.Residual, nets.image(), 8)
        state = copy.deepcopy(module.state_dict())
        runtime.deploy(module, nets.image(), tmp_path / "model.onnx")
        assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
        assert not module.training

    def test_int8_files_are_small(self, runtime: Runtime, tmp_path: Path) -> None:
        class Wide(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = nn.Linear(12, 512)
                self.head = nn.Linear(512, 256)

            def forward(self, x: Tensor) -> Tensor:
                return self.head(self.first(x).relu())

        sizes = []
        for bits in (32, 8):
            runtime.deploy(self.prepared(runtime, Wide, nets.vector(), bits), nets.vector(), tmp_path / f"{bits}")
            sizes.append((tmp_path / f"{bits}").stat().st_size)
        assert sizes[1] < 0.3 * sizes[0]

    @pytest.mark.parametrize("bits", [32, 8])
    def test_size_doesnt_depend_on_the_weights(
        self, runtime: Runtime, tmp_path: Path, trained: nn.Module, digit_splits: Splits, bits: int
    ) -> None:
        inputs = digit_splits.train.head(32).inputs

        def zeros() -> Any:
            model = nets.PlainCNN()
            for parameter in model.parameters():
                parameter.data.zero_()
            return model

        sizes = set()
        for build in (lambda: copy.deepcopy(trained), nets.PlainCNN, zeros):
            runtime.deploy(self.prepared(runtime, build, inputs, bits), inputs, tmp_path / "model.onnx")
            sizes.add((tmp_path / "model.onnx").stat().st_size)
        assert len(sizes) == 1

    def test_a_fixed_batch_fails_the_trial_with_a_remedy(self, runtime: Runtime, tmp_path: Path) -> None:
        module = self.prepared(runtime, nets.FixedBatch, nets.vector(), 32)
        with pytest.raises(TrialError, match="don't fix the batch size in forward"):
            runtime.deploy(module, nets.vector(), tmp_path / "model.onnx")
            session = runtime.load(tmp_path / "model.onnx", self._options(5))
            session.run(named_arrays(nets.vector(5)))
