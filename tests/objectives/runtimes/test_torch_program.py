"""The model file of PyTorch's runtimes: what it holds, what it refuses, what it gives back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from paretune.errors import JobError, TrialError
from paretune.objectives.compress.schemes import STATIC, Scheme
from paretune.objectives.data import call
from paretune.objectives.runtimes.torch_graph import lower
from paretune.objectives.runtimes.torch_program import pack_pairs, read_program, resolve, unpack_pairs, write_program
from paretune.objectives.runtimes.torch_runtime import linear_schemes
from tests import nets
from tests.objectives.runtimes.contract import Blocks, blocks, prepared

CPU = torch.device("cpu")


def test_a_program_computes_what_its_module_does_in_any_batch(tmp_path: Path) -> None:
    module = nets.TokenEncoder().eval()
    write_program(module, nets.tokens(2), tmp_path / "model.safetensors")
    program = read_program(tmp_path / "model.safetensors")
    assert [(given.name, given.shape) for given in program.inputs] == [("tokens", (6,)), ("mask", (6,))]
    assert [given.dtype for given in program.inputs] == [torch.int64, torch.float32]
    graph = lower(program, torch.float32, CPU)
    for batch in (1, 5):
        given = nets.tokens(batch)
        with torch.no_grad():
            torch.testing.assert_close(graph(*given.values()), call(module, given))


def test_quantized_weights_are_stored_on_their_grids(tmp_path: Path) -> None:
    bits = {"up": 4, "again": 8, "bare": 4, "conv": 32, "hidden": 32, "head": 8}
    module = prepared(Blocks, blocks(64), bits, linear_schemes("int8"))
    write_program(module, blocks(2), tmp_path / "model.safetensors")
    program = read_program(tmp_path / "model.safetensors")
    stored = {name: program.tensors[f"{name}.weight"] for name in bits}
    assert [stored[name].dtype for name in ("up", "again", "conv")] == [torch.uint8, torch.int8, torch.float32]
    quantized = module.get_submodule("again").quantized_weight()  # type: ignore[operator]
    torch.testing.assert_close(stored["again"] * program.tensors["again.scale"], quantized)
    levels = unpack_pairs(stored["up"]) - 8
    scale = program.tensors["up.scale"].repeat_interleave(32, dim=1)
    torch.testing.assert_close(levels * scale, module.get_submodule("up").quantized_weight())  # type: ignore[operator]


@pytest.mark.parametrize("affine", [False, True])
def test_weights_alone_are_stored_in_integers_and_read_as_floats(tmp_path: Path, affine: bool) -> None:
    module = prepared(nets.Residual, nets.image(), 5, activations="float", affine=affine)
    path = tmp_path / "model.safetensors"
    write_program(module, nets.image(), path)
    assert load_file(path)["shortcut.weight"].dtype == (torch.uint8 if affine else torch.int8)
    program = read_program(path)
    assert not program.layers, "no product is quantized"
    for name in ("stem", "shortcut", "head"):
        expected = module.get_submodule(name).quantized_weight()  # type: ignore[operator]
        assert torch.equal(program.tensors[f"{name}.weight"], expected)


def test_files_of_the_first_version_are_read(tmp_path: Path) -> None:
    write_program(nets.MLP().eval(), nets.vector(), tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        header = json.loads(file.metadata()["paretune.torch"]) | {"version": 1}
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors, tmp_path / "first.safetensors", metadata={"paretune.torch": json.dumps(header)})
    assert read_program(tmp_path / "first.safetensors").tensors.keys() == tensors.keys()


def test_pairs_share_a_byte() -> None:
    levels = torch.randint(16, (6, 10), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    packed = pack_pairs(levels)
    assert (packed.dtype, packed.shape) == (torch.uint8, (6, 5))
    assert torch.equal(unpack_pairs(packed), levels.int())
    assert pack_pairs(torch.tensor([[0, 15]], dtype=torch.int8)).item() == 0x0F


def test_a_batch_size_that_python_asks_for_stays_free(tmp_path: Path) -> None:
    module = nets.FixedView().eval()  # says `len(x)`
    write_program(module, nets.image(2), tmp_path / "model.safetensors")
    graph = lower(read_program(tmp_path / "model.safetensors"), torch.float32, CPU)
    with torch.no_grad():
        torch.testing.assert_close(graph(nets.image(5)), module(nets.image(5)))


def test_models_that_channels_last_would_break(tmp_path: Path) -> None:
    """`view` of what was traced as contiguous isn't possible any more when channels come last."""
    module = nets.Shuffle().eval()
    write_program(module, nets.image(2), tmp_path / "model.safetensors")
    program = read_program(tmp_path / "model.safetensors")
    graph = lower(program, torch.float32, CPU, channels_last=True)
    kernels = [buffer for buffer in graph.buffers() if buffer.dim() == 4]
    assert kernels
    assert all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels)
    with torch.no_grad():
        torch.testing.assert_close(graph(nets.image(3)), module(nets.image(3)))


def test_what_the_model_keeps_in_float32_stays_there(tmp_path: Path) -> None:
    class Careful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Linear(12, 16), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            scores = self.body(x).to(torch.float32).exp()
            return self.head(scores / scores.sum(1, keepdim=True))

    write_program(Careful().eval(), nets.vector(2), tmp_path / "model.safetensors")
    graph = lower(read_program(tmp_path / "model.safetensors"), torch.bfloat16, CPU)
    seen: dict[str, torch.dtype] = {}

    class Types(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> object:
            result = super().run_node(n)
            seen[str(n.target)] = result.dtype
            return result

    with torch.no_grad():
        Types(graph).run(nets.vector(4))
    assert (seen["aten.exp.default"], seen["aten.linear.default"]) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("by_name", [True, False])
def test_masks_stay_masks_in_half_precision(tmp_path: Path, by_name: bool) -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.project(x)
            mask = torch.ones(5, 5, dtype=torch.bool).tril()
            attend = torch.nn.functional.scaled_dot_product_attention
            return attend(x, x, 50 * x, attn_mask=mask) if by_name else attend(x, x, 50 * x, mask)

    module = Masked().eval()
    write_program(module, nets.sequence(2), tmp_path / "model.safetensors")
    graph = lower(read_program(tmp_path / "model.safetensors"), torch.bfloat16, CPU)
    with torch.no_grad():
        expected = module(nets.sequence(3))
        assert (graph(nets.sequence(3)) - expected).abs().max() <= 0.02 * expected.abs().max()


def test_inputs_are_left_alone(tmp_path: Path) -> None:
    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.rectifier, self.head = nn.Linear(12, 8), nn.ReLU(inplace=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x += 1
            return self.head(self.rectifier(self.body(x)))

    module, given = Careless().eval(), nets.vector(2)
    write_program(module, given, tmp_path / "model.safetensors")
    graph = lower(read_program(tmp_path / "model.safetensors"), torch.float32, CPU)
    assert torch.equal(given, nets.vector(2))
    with torch.no_grad():
        outputs = [graph(given) for _ in range(2)]
        assert torch.equal(given, nets.vector(2))
        torch.testing.assert_close(outputs[0], module(nets.vector(2)))
        torch.testing.assert_close(outputs[1], outputs[0])


class Custom(nn.Module):
    def __init__(self, function: object) -> None:
        super().__init__()
        self.first = nn.Linear(12, 4)
        self.register_buffer("calls", torch.zeros(()))
        self._function = function

    def forward(self, x: Tensor) -> Tensor:
        return self._function(self, self.first(x))  # type: ignore[operator,no-any-return]


def count(module: nn.Module, x: Tensor) -> Tensor:
    module.calls += 1  # type: ignore[operator]
    return x


def branch(_module: nn.Module, x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


@torch.library.custom_op("paretune_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return 2 * x


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@pytest.mark.parametrize(
    ("function", "rule"),
    [
        pytest.param(count, "must not change buffers", id="changes a buffer"),
        pytest.param(branch, "nor branch on the values", id="branches"),
        pytest.param(lambda _, x: twice(x), "made of PyTorch's own operations", id="foreign operation"),
    ],
)
def test_models_that_cant_be_written(tmp_path: Path, function: object, rule: str) -> None:
    with pytest.raises(TrialError, match=rule):
        write_program(Custom(function).eval(), nets.vector(), tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        pytest.param("conv", Scheme(activations="dynamic"), id="convolution"),
        pytest.param("head", STATIC[8], id="static activations"),
    ],
)
def test_layers_that_arent_executed_so(tmp_path: Path, name: str, scheme: Scheme) -> None:
    module = prepared(Blocks, blocks(4), {name: 8}, {8: scheme})
    with pytest.raises(TrialError, match=f"{name} .* was to run in 8 bits"):
        write_program(module, blocks(2), tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "target", ["os.system", "aten.no_such_thing.default", "operator.attrgetter", "prim.device.default", ""]
)
def test_targets_that_no_program_has(target: str) -> None:
    with pytest.raises(JobError, match="ATen operations"):
        resolve(target)


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "plain.safetensors")
    with pytest.raises(JobError, match="program of version"):
        read_program(tmp_path / "plain.safetensors")
    write_program(nets.MLP().eval(), nets.vector(), tmp_path / "model.safetensors")
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors, tmp_path / "later.safetensors", metadata={"paretune.torch": json.dumps({"version": 3})})
    with pytest.raises(JobError, match="program of version"):
        read_program(tmp_path / "later.safetensors")
