"""Packed model files: restored bit for bit, near the length that theory gives, refused when torn or altered."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from safetensors.numpy import save_file
from safetensors.torch import save_model
from torch import Tensor, nn

from paretune.errors import ParetuneError
from paretune.objectives.packing import MAX_EXPANSION, pack, unpack
from paretune.objectives.runtimes.onnx_export import export_onnx
from tests import nets
from tests.objectives.runtimes.contract import prepared

Change = Callable[[Tensor], Tensor]
Array = NDArray[Any]
SUFFIXES = (".onnx", ".safetensors")
WEIGHTS = 256 * 256


def net(change: Change = lambda weight: weight) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 3)).eval()
    with torch.no_grad():
        for layer in (model[0], model[2], model[4]):
            layer.weight.normal_()  # type: ignore[operator]
            layer.weight.copy_(change(layer.weight))  # type: ignore[operator, arg-type]
    return model


def sparse(weight: Tensor) -> Tensor:
    return torch.where(weight.abs() < 1.645, 0.0, weight)


def clustered(weight: Tensor) -> Tensor:
    return (weight * 5).floor().clamp(-8, 7) + 0.5


def save(model: nn.Module, folder: Path, suffix: str) -> Path:
    path = folder / f"model{suffix}"
    if suffix == ".onnx":
        export_onnx(model, nets.vector(), path)
    else:
        save_model(model, str(path))
    return path


def packed_length(path: Path) -> int:
    """Length of the packed file, which gives the model file back."""
    packed, restored = path.with_name("packed"), path.with_name(f"restored{path.suffix}")
    pack(path, packed)
    unpack(packed, restored)
    assert restored.read_bytes() == path.read_bytes()
    return packed.stat().st_size


def entropy(values: Array | Tensor) -> float:
    """Bits that each value takes at least, where values come as often as here."""
    shares = np.unique(np.asarray(values), return_counts=True)[1] / len(values)
    return float(-(shares * np.log2(shares)).sum())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_dense_floats_gain_nothing(suffix: str, tmp_path: Path) -> None:
    path = save(net(), tmp_path, suffix)
    assert 0.98 * path.stat().st_size < packed_length(path) < path.stat().st_size + 100


def test_plain_int8_gains_nothing(tmp_path: Path) -> None:
    path = save(prepared(net, nets.vector(), 8), tmp_path, ".onnx")
    assert 0.98 * path.stat().st_size < packed_length(path) < path.stat().st_size + 100


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("change", "bits"),
    [
        pytest.param(sparse, lambda values: entropy(values != 0) + 0.1 * 32, id="90 % zeros"),
        pytest.param(lambda w: -sparse(w), lambda values: entropy(values != 0) + 0.1 * 32, id="90 % negative zeros"),
        pytest.param(clustered, entropy, id="16 clusters"),
        pytest.param(lambda w: sparse(w).sign(), entropy, id="3 values, most of them zero"),
        pytest.param(lambda w: torch.where(sparse(w) == 0, 0.0, clustered(w)), entropy, id="sparse clusters"),
    ],
)
def test_the_length_is_near_the_theory(
    change: Change, bits: Callable[[Tensor], float], suffix: str, tmp_path: Path
) -> None:
    dense, model = save(net(), tmp_path, suffix).stat().st_size, net(change)
    values = torch.cat([p.detach().flatten() for name, p in model.named_parameters() if name.endswith("weight")])
    theory = dense - 4 * len(values) + len(values) * bits(values) / 8
    assert 0.97 * theory < packed_length(save(model, tmp_path, suffix)) < 1.03 * theory + 400


@pytest.mark.parametrize(("width", "bits"), [(2, 1.6), (3, 2.8), (4, 4), (6, 6)])
def test_few_bits_are_stored_as_few_bits(width: int, bits: float, tmp_path: Path) -> None:
    whole = save(prepared(net, nets.vector(), 8), tmp_path, ".onnx").stat().st_size
    path = save(prepared(net, nets.vector(), width), tmp_path, ".onnx")
    assert abs(path.stat().st_size - whole) < 100, "the container is int8"
    saved = whole - packed_length(path)
    assert saved > WEIGHTS * (8 - bits) / 8


def test_a_pattern_of_zeros_costs_less_than_its_mask(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32)
    weight[:, ::2] = 0
    save_file({"weight": weight}, tmp_path / "model.safetensors")
    assert packed_length(tmp_path / "model.safetensors") < weight.nbytes / 2 + 400


def test_constants_in_nodes_count_too(tmp_path: Path) -> None:
    weight = np.where(np.random.default_rng(0).random(40_000) < 0.05, np.float32(1.5), np.float32(0))
    node = helper.make_node("Constant", [], ["weight"], value=numpy_helper.from_array(weight))
    half = numpy_helper.from_array(weight.astype(np.float16), "half")
    graph = helper.make_graph([node], "graph", [], [], [half])
    onnx.save(helper.make_model(graph), tmp_path / "model.onnx")
    assert packed_length(tmp_path / "model.onnx") < 2 * 40_000 * entropy(weight) / 8 * 1.2


def random_arrays(seed: int) -> dict[str, Array]:
    """Arrays of odd lengths, kinds and numbers of values; also of none, of zeros alone, of any bits."""
    generator = np.random.default_rng(seed)
    arrays: dict[str, Array] = {"none": np.zeros(0, np.float32), "zeros": np.zeros(777, np.float32)}
    words: list[Any] = [np.uint32, np.uint16, np.uint8]
    for index, word in enumerate(words * 4):
        length, levels = int(generator.integers(1, 5000)), int(generator.integers(1, 300))
        limit = np.iinfo(word).max
        values = generator.integers(0, limit, levels, dtype=word, endpoint=True)  # NaN and -0.0 among them
        array = generator.choice(np.append(values, [0, limit // 2 + 1]).astype(word), length)
        array[generator.random(length) < generator.choice([0.0, 0.05, 0.5, 0.95])] = 0
        arrays[str(index)] = array.view({4: np.float32, 2: np.float16, 1: np.int8}[array.itemsize])
    return arrays


@pytest.mark.parametrize("seed", range(8))
def test_any_array_comes_back(seed: int, tmp_path: Path) -> None:
    arrays = random_arrays(seed)
    save_file(arrays, tmp_path / "model.safetensors")
    tensors = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    onnx.save(helper.make_model(helper.make_graph([], "graph", [], [], tensors)), tmp_path / "model.onnx")
    for suffix in SUFFIXES:
        path = tmp_path / f"model{suffix}"
        assert packed_length(path) < path.stat().st_size


def test_more_indices_than_fit_a_chunk_come_back(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    save_file({"weight": generator.integers(0, 5, (1 << 20) + 13).astype(np.int8)}, tmp_path / "model.safetensors")
    # Evenly spread, 5 values take log2(5) = 2.32 bits; a Huffman code takes 2.4.
    assert packed_length(tmp_path / "model.safetensors") < 2.45 * (1 << 20) / 8


def test_an_empty_model_goes_beyond_no_bound(tmp_path: Path) -> None:
    save_file({"weight": np.zeros(5_000_000, np.float32)}, tmp_path / "model.safetensors")
    length = packed_length(tmp_path / "model.safetensors")
    assert length == -(-(tmp_path / "model.safetensors").stat().st_size // MAX_EXPANSION)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A packed file with arrays in several codes."""
    arrays = {name: array[:50] for name, array in random_arrays(3).items()}
    save_file(arrays, tmp_path / "model.safetensors")
    pack(tmp_path / "model.safetensors", tmp_path / "packed")
    return tmp_path / "packed"


def refused(path: Path, data: bytes) -> str:
    target = path.with_name("out.safetensors")
    path.write_bytes(data)
    with pytest.raises(ParetuneError, match="must be a whole and unaltered packed model file of version 1") as caught:
        unpack(path, target)
    assert not target.exists(), "nothing is written"
    return str(caught.value)


def test_torn_files_are_refused(small: Path) -> None:
    data = small.read_bytes()
    for length in [*range(0, 100, 7), *range(100, len(data), 41)]:
        assert "that" in refused(small, data[:length])
    assert "ends too early" in refused(small, data[:-1])
    assert "bytes beyond its end" in refused(small, data + b"x")


def test_altered_files_are_refused(small: Path) -> None:
    data, refusals = small.read_bytes(), 0
    target, model = small.with_name("out.safetensors"), small.with_name("model.safetensors").read_bytes()
    positions = [*range(100), *range(100, len(data), 11)]  # the header and more, then some
    for position in positions:
        altered = bytearray(data)
        altered[position] ^= 1 << position % 8
        small.write_bytes(altered)
        try:
            unpack(small, target)
        except ParetuneError:
            refusals += 1
        else:  # the bits after the end of a stream mean nothing
            assert target.read_bytes() == model
    assert refusals > 0.95 * len(positions)
    target.unlink(missing_ok=True)
    assert "of version 2" in refused(small, data[:8] + b"\2" + data[9:])
    assert "doesn't begin as packed files do" in refused(small, b"PK" + data[2:])


def hostile(size: int, entries: list[tuple[int, int, int, bytes]], rest: bytes = b"") -> bytes:
    digest = hashlib.sha256(bytes(size if size < 1 << 20 else 0)).digest()
    head = struct.pack("<8sH32sQI", b"paretune", 1, digest, size, len(entries))
    table = b"".join(struct.pack("<QQBQ", start, length, kind, len(code)) for start, length, kind, code in entries)
    return head + table + rest + b"".join(code for *_, code in entries)


def stream(form: int, data: bytes) -> bytes:
    return struct.pack("<BQ", form, len(data)) + data


def bomb(length: int) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return compressor.compress(bytes(length)) + compressor.flush()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        pytest.param(hostile(1 << 50, [(0, 1 << 50, 0, b"\1" + stream(1, bomb(1 << 20)))]), "is to become", id="size"),
        pytest.param(hostile(80, [(0, 80, 2, b"\1" + stream(1, bomb(1 << 26)))]), "stream that is torn", id="bomb"),
        pytest.param(hostile(80, [(0, 80, 2, b"\1" + stream(2, bomb(1 << 26)))]), "stream that is torn", id="bytes"),
        pytest.param(hostile(80, [(0, 80, 2, b"\1" + stream(0, bytes(9)))]), "stream that is torn", id="mask"),
        pytest.param(hostile(80, [(0, 80, 2, b"\1" + stream(9, bytes(10)))]), "stream that is torn", id="form"),
        pytest.param(hostile(80, [(0, 80, 2, b"\10")]), "unknown code", id="flags"),
        pytest.param(hostile(80, [(0, 80, 3, b"\0")]), "unknown kind", id="kind"),
        pytest.param(hostile(80, [(0, 79, 0, b"\0")]), "unknown kind", id="odd length"),
        pytest.param(hostile(80, [(0, 80, 2, b"\0" + bytes(81))]), "too long", id="long"),
        pytest.param(hostile(80, [(0, 40, 2, b"\0"), (39, 41, 2, b"\0")]), "overlap", id="overlap"),
        pytest.param(hostile(80, [(1, 80, 2, b"\0")]), "beyond the model file", id="beyond"),
        pytest.param(
            hostile(80, [(0, 80, 2, b"\4\2\0\0\0" + stream(0, b"\xff" * 20))]), "beyond its codebook", id="index"
        ),
        pytest.param(hostile(80, [], bytes(79)), "ends too early", id="rest"),
        pytest.param(hostile(80, [], bytes(79) + b"x"), "something else", id="digest"),
    ],
)
def test_forged_files_are_refused(data: bytes, message: str, tmp_path: Path) -> None:
    assert message in refused(tmp_path / "packed", data)


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.txt").write_text("weights")
    with pytest.raises(ParetuneError, match=r"must be \.onnx or \.safetensors, but got .*model\.txt; keep it"):
        pack(tmp_path / "model.txt", tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
