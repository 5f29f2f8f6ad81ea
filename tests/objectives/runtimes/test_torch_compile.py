"""torch-compile keeps the contract of runtimes, and what it measures computes what it scores."""

from __future__ import annotations

import copy
import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from paretune.errors import JobError
from paretune.objectives.data import Splits
from paretune.objectives.runtimes import LoadOptions, Runtime, Session
from paretune.objectives.runtimes.onnx_export import named_arrays
from paretune.objectives.runtimes.torch_compile import TorchCompile
from tests import nets
from tests.objectives.runtimes.contract import RuntimeContract, prepared

CPU = TorchCompile().capabilities("cpu")
needs_vnni = pytest.mark.skipif(8 not in CPU.widths("Linear"), reason="the CPU has no VNNI")
needs_bf16 = pytest.mark.skipif(16 not in CPU.float_bits, reason="the CPU has no bf16")


class TestTorchCompile(RuntimeContract):
    """As it is scored: the same operations, which needn't be compiled for seconds for each of the nets."""

    purpose = "score"

    @pytest.fixture
    def runtime(self) -> Runtime:
        return TorchCompile()


@pytest.fixture(scope="module")
def pictures(digit_splits: Splits) -> Tensor:
    inputs = digit_splits.validation.inputs
    assert isinstance(inputs, Tensor)
    return inputs


def load(module: nn.Module, example: Tensor, path: Path, options: LoadOptions) -> Session:
    runtime = TorchCompile()
    runtime.deploy(module, example[:2], path)
    return runtime.load(path, options)


@pytest.mark.parametrize(
    ("float_bits", "fc1", "fc2"),
    [
        pytest.param(32, 32, 32, id="f32"),
        pytest.param(16, 16, 16, id="bf16", marks=needs_bf16),
        pytest.param(32, 8, 8, id="int8", marks=needs_vnni),
        pytest.param(16, 4, 8, id="int4, int8 and bf16", marks=[needs_bf16, needs_vnni]),
    ],
)
def test_what_is_measured_computes_what_is_scored(
    trained: nn.Module, pictures: Tensor, tmp_path: Path, float_bits: int, fc1: int, fc2: int
) -> None:
    asked = {"conv1": float_bits, "conv2": float_bits, "fc1": fc1, "fc2": fc2}
    module = prepared(lambda: copy.deepcopy(trained), pictures, asked, CPU.schemes)
    path = tmp_path / "model.safetensors"
    measured = load(module, pictures, path, LoadOptions(len(pictures), float_bits=float_bits))
    scored = TorchCompile().load(path, LoadOptions(len(pictures), float_bits=float_bits, purpose="score"))
    assert (measured.settings["mode"], scored.settings["mode"]) == ("inductor", "eager")
    assert {name: report.bits for name, report in measured.layers().items()} == asked
    assert scored.layers() == measured.layers()
    found, expected = (session.run({"input": pictures.numpy()}) for session in (measured, scored))
    assert np.abs(found - expected).max() <= (2e-2 if float_bits == 16 else 1e-5) * np.ptp(expected)
    assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.995
    with torch.no_grad():
        assert (found.argmax(1) == module(pictures).argmax(1).numpy()).mean() >= 0.99


def test_weights_alone_are_compiled_as_floats(trained: nn.Module, pictures: Tensor, tmp_path: Path) -> None:
    asked = {"conv1": 8, "conv2": 3, "fc1": 8, "fc2": 6}
    module = prepared(lambda: copy.deepcopy(trained), pictures, asked, CPU.schemes, activations="float")
    session = load(module, pictures, tmp_path / "model.safetensors", LoadOptions(len(pictures)))
    assert {name: report.bits for name, report in session.layers().items()} == dict.fromkeys(asked, 32)
    with torch.no_grad():
        expected = module(pictures).numpy()
    np.testing.assert_allclose(session.run({"input": pictures.numpy()}), expected, atol=1e-4 * np.ptp(expected))


def test_compiled_sessions_load_alike_and_keep_their_outputs_apart(tmp_path: Path) -> None:
    module, arrays = prepared(nets.MLP, nets.vector(), 32), named_arrays(nets.vector(4))
    before = torch.get_num_threads()
    session = load(module, nets.vector(), tmp_path / "model.safetensors", LoadOptions(4, threads=2))
    again = TorchCompile().load(tmp_path / "model.safetensors", LoadOptions(4, threads=2))
    first = session.run(arrays)
    kept = first.copy()
    np.testing.assert_array_equal(again.run(arrays), kept)
    call = session.bind(arrays)
    session.run({"input": np.zeros((4, 12), np.float32)})
    call()
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(session.run(arrays), kept)
    assert session.settings["threads"] == 2
    assert torch.get_num_threads() == before


def test_compiled_weights_go_when_their_session_goes(tmp_path: Path) -> None:
    """But for those of the latest one, which PyTorch holds until it compiles the next."""
    path = tmp_path / "model.safetensors"
    TorchCompile().deploy(nn.Sequential(nn.Linear(12, 999), nn.ReLU(), nn.Linear(999, 4)).eval(), nets.vector(), path)
    held = []
    for batch in (1, 2, 3, 4):
        TorchCompile().load(path, LoadOptions(batch)).run(named_arrays(nets.vector(batch)))
        gc.collect()
        held.append(sum(type(found) is Tensor and 999 in found.shape for found in gc.get_objects()))
    assert held[1:] == held[1:2] * 3


def test_a_session_sets_its_threads_for_its_own_calls_alone(tmp_path: Path) -> None:
    seen: list[int] = []

    def note(_module: nn.Module, _inputs: tuple[Tensor, ...]) -> None:
        seen.append(torch.get_num_threads())

    options = LoadOptions(4, threads=2, purpose="score")
    session = load(prepared(nets.MLP, nets.vector(), 32), nets.vector(), tmp_path / "model.safetensors", options)
    session._function.register_forward_pre_hook(note)  # type: ignore[attr-defined]
    before = torch.get_num_threads()
    session.run(named_arrays(nets.vector(4)))
    session.bind(named_arrays(nets.vector(4)))()
    assert seen == [2, 2]
    assert torch.get_num_threads() == before == 1


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"half": "float16"}, id="unknown half"),
        pytest.param({"eight": 8}, id="unknown eight"),
        pytest.param({"tf32": "yes"}, id="no bool"),
        pytest.param({"max_autotune": 1}, id="a number for a bool"),
    ],
)
def test_unknown_values_of_options(options: dict[str, str]) -> None:
    with pytest.raises(JobError, match="must be one of") as caught:
        TorchCompile(**options)  # type: ignore[arg-type]
    assert caught.value.where == "target.options"


@pytest.mark.parametrize("options", [{"half": "fp16"}, {"eight": "fp8"}, {"tf32": True}])
def test_options_that_a_cpu_doesnt_have(options: dict[str, str]) -> None:
    with pytest.raises(JobError, match="on a CPU") as caught:
        TorchCompile(**options).capabilities("cpu")  # type: ignore[arg-type]
    assert caught.value.where == "target.options"
