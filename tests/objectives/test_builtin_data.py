"""The data that a job can name without code: digits, Fashion-MNIST, npz archives and image folders."""

from __future__ import annotations

import gzip
import importlib.util
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from paretune.errors import JobError
from paretune.objectives.data import Split, StreamSplit, load_splits

X = torch.arange(40, dtype=torch.float32).reshape(10, 4)
Y = torch.arange(10) % 3


def test_digits() -> None:
    splits = load_splits("digits", {"seed": 3})
    parts = (splits.train, splits.validation, splits.test)
    assert [len(part) for part in parts] == [1078, 359, 360]
    for part in parts:
        assert isinstance(part.inputs, Tensor)
        assert part.inputs.shape[1:] == (1, 8, 8)
        assert (part.inputs.dtype, part.targets.dtype) == (torch.float32, torch.int64)
        assert (float(part.inputs.min()), float(part.inputs.max())) == (0.0, 1.0)
        share = part.targets.bincount(minlength=10) / len(part)
        assert float((share - 0.1).abs().max()) < 0.01
    assert torch.equal(load_splits("digits", {"seed": 3}).test.targets, splits.test.targets)
    assert not torch.equal(load_splits("digits", {"seed": 4}).test.targets, splits.test.targets)


def write_idx(path: Path, values: np.ndarray[Any, Any], *, compress: bool) -> None:
    content = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()
    if compress:
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(content))
    else:
        path.write_bytes(content)


def write_fashion(folder: Path, *, compress: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, length in (("train", 60), ("t10k", 20)):
        images = np.random.default_rng(0).integers(0, 256, (length, 28, 28), np.uint8)
        write_idx(folder / f"{part}-images-idx3-ubyte", images, compress=compress)
        labels = (np.arange(length) % 10).astype(np.uint8)
        write_idx(folder / f"{part}-labels-idx1-ubyte", labels, compress=compress)


@pytest.mark.parametrize("compress", [True, False], ids=["gz", "plain"])
def test_fashion_mnist(tmp_path: Path, compress: bool) -> None:
    write_fashion(tmp_path, compress=compress)
    splits = load_splits("fashion-mnist", {"root": str(tmp_path), "validation": 20})
    assert [len(part) for part in (splits.train, splits.validation, splits.test)] == [40, 20, 20]
    assert splits.validation.targets.bincount().tolist() == [2] * 10
    assert isinstance(splits.test.inputs, Tensor)
    assert splits.test.inputs.shape == (20, 1, 28, 28)
    low = (0 - 0.2860) / 0.3530
    assert float(splits.test.inputs.min()) == pytest.approx(low, abs=0.02)


@pytest.mark.parametrize("subfolder", ["", "fashion-mnist"], ids=["itself", "subfolder"])
def test_fashion_mnist_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, subfolder: str) -> None:
    write_fashion(tmp_path / subfolder)
    monkeypatch.setenv("PARETUNE_DATA", str(tmp_path))
    assert len(load_splits("fashion-mnist", {"validation": 10}).train) == 50


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        pytest.param(
            "train-images-idx3-ubyte", None, "no train-images-idx3-ubyte.*dataset-fashion-mnist", id="missing"
        ),
        pytest.param(
            "t10k-labels-idx1-ubyte", None, "must hold readable IDX files.*FileNotFoundError", id="incomplete"
        ),
        pytest.param("t10k-labels-idx1-ubyte", b"\x00", "must hold readable IDX files", id="truncated"),
        pytest.param("t10k-labels-idx1-ubyte", b"\x00\x00\x0d\x01" + bytes(8), "not an IDX file of bytes", id="type"),
        pytest.param("t10k-labels-idx1-ubyte", b"\x1f\x8babc", "must hold readable IDX files", id="broken gzip"),
        pytest.param(
            "t10k-labels-idx1-ubyte",
            b"\x00\x00\x08\x01\x00\x00\x00\x01\x00",
            "as many t10k labels as images",
            id="fewer",
        ),
    ],
)
def test_wrong_fashion_mnist(tmp_path: Path, file: str, content: bytes | None, message: str) -> None:
    write_fashion(tmp_path, compress=False)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(JobError, match=rf"data\.args\.root .*{message}"):
        load_splits("fashion-mnist", {"root": str(tmp_path), "validation": 10})


@pytest.mark.parametrize("validation", [3, 60, 100], ids=["too few", "all", "too many"])
def test_fashion_mnist_validation_must_leave_every_class(tmp_path: Path, validation: int) -> None:
    write_fashion(tmp_path)
    with pytest.raises(JobError, match=r"data\.args\.validation must leave every class in both parts"):
        load_splits("fashion-mnist", {"root": str(tmp_path), "validation": validation})


def archive(x: Any = None) -> dict[str, Any]:
    x = X.numpy() if x is None else x
    names = ("train", "validation", "test")
    return {f"{axis}_{name}": values for name in names for axis, values in (("x", x), ("y", Y.numpy()))}


def test_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", **archive())
    splits = load_splits("npz", {"path": str(tmp_path / "data.npz")})
    assert torch.equal(splits.test.targets, Y)
    assert isinstance(splits.train.inputs, Tensor)
    assert torch.equal(splits.train.inputs, X)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        pytest.param({k: v for k, v in archive().items() if k != "y_test"}, "must hold the array 'y_test'", id="key"),
        pytest.param(archive(np.array([{}] * 10)), "must hold numeric arrays.*allow_pickle=False", id="objects"),
    ],
)
def test_wrong_npz(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(JobError, match=rf"data\.args\.path {message}"):
        load_splits("npz", {"path": str(tmp_path / "data.npz")})


def test_files_that_are_no_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", X.numpy())
    (tmp_path / "text.npz").write_text("text")
    for name in ("one.npy", "text.npz", "nothing.npz"):
        with pytest.raises(JobError, match=r"data\.args\.path must be a numpy \.npz file"):
            load_splits("npz", {"path": str(tmp_path / name)})


@pytest.mark.skipif(importlib.util.find_spec("PIL") is not None, reason="Pillow is installed")
def test_imagefolder_needs_pillow(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"'imagefolder' needs Pillow.*pip install pillow"):
        load_splits("imagefolder", {"root": str(tmp_path)})


def write_images(root: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow isn't installed")
    for split in ("train", "val", "test"):
        for label, name in enumerate(("cat", "dog")):
            (root / split / name).mkdir(parents=True)
            for number in range(2):
                image.new("RGB", (6, 4), (255 * label, 0, 0)).save(root / split / name / f"{number}.png")


def test_imagefolder(tmp_path: Path) -> None:
    write_images(tmp_path)
    for limit, kind in ((0, StreamSplit), (2**20, Split)):
        args = {"root": str(tmp_path), "size": [3, 5], "memory_limit_bytes": limit}
        splits = load_splits("imagefolder", args)
        assert type(splits.train) is kind
        (batch,) = splits.validation.batches(9)
        assert isinstance(batch.inputs, Tensor)
        assert batch.inputs.shape == (4, 3, 3, 5)
        assert batch.targets.tolist() == [0, 0, 1, 1]
        assert batch.inputs[:, 0, 0, 0].tolist() == pytest.approx([-0.485 / 0.229] * 2 + [0.515 / 0.229] * 2)


@pytest.mark.parametrize(
    ("change", "size", "message"),
    [
        pytest.param(
            lambda root: (root / "test").rename(root / "tst"), 4, "must have the subfolder 'test'", id="split"
        ),
        pytest.param(
            lambda root: (root / "val" / "cow").mkdir(), 4, "the same classes in every split.*cow", id="class"
        ),
        pytest.param(
            lambda root: [file.unlink() for file in (root / "test").rglob("*.png")],
            4,
            "must have images",
            id="empty",
        ),
        pytest.param(
            lambda root: [file.write_text("") for file in (root / "test").rglob("*.png")],
            4,
            "can be read",
            id="broken",
        ),
        pytest.param(lambda root: None, 0, "must be one or two positive integers", id="size"),
    ],
)
def test_wrong_imagefolder(tmp_path: Path, change: Callable[[Path], Any], size: int, message: str) -> None:
    write_images(tmp_path)
    change(tmp_path)
    with pytest.raises(JobError, match=message):
        load_splits("imagefolder", {"root": str(tmp_path), "size": size})
