"""Data that a job can name without writing code."""

from __future__ import annotations

import gzip
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paretune.errors import JobError
from paretune.objectives.data.images import imagefolder
from paretune.objectives.data.splits import Split, Splits, as_inputs, as_targets
from paretune.objectives.imports import closest

_SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")
# Mean and standard deviation of the training images' pixels in [0, 1].
_FASHION_MEAN, _FASHION_DEVIATION = 0.2860, 0.3530
_IDX_BYTES = 0x08


def digits(train: float = 0.6, seed: int = 0) -> Splits:
    """Scikit-learn's 1,797 handwritten digits, split by class.

    Args:
        train: Share of the samples to train on, in [0.1, 0.9]; validation and test get half of the rest each.
        seed: Decides which sample goes where.

    Returns:
        Inputs (N, 1, 8, 8) float32 in [0, 1], labels (N,) int64 in [0, 10).

    Raises:
        JobError: The share is out of range.
    """
    if not 0.1 <= train <= 0.9:
        raise JobError("data.args.train", "must be in [0.1, 0.9]", train, "use e.g. 0.6")
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    inputs = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    targets = torch.tensor(labels, dtype=torch.int64)
    trained, rest = _stratified(targets, torch.arange(len(targets)), 1 - train, seed=seed, where="data")
    validation, test = _stratified(targets, rest, 0.5, seed=seed, where="data")
    return Splits(
        Split(inputs[trained], targets[trained]),
        Split(inputs[validation], targets[validation]),
        Split(inputs[test], targets[test]),
    )


def fashion_mnist(root: str | None = None, validation: int = 5000, seed: int = 0) -> Splits:
    """Fashion-MNIST (Xiao et al., 2017, arXiv:1708.07747) from its four IDX files, gzipped or plain.

    Args:
        root: Their folder. None looks in the folder that the environment variable PARETUNE_DATA names (and in
            its subfolder ``fashion-mnist``), then where Debian's package ``dataset-fashion-mnist`` puts them.
        validation: How many of the 60,000 training samples are held out, by class.
        seed: Decides which ones.

    Returns:
        Inputs (N, 1, 28, 28) float32 of mean 0 and deviation 1 over the training pixels, labels (N,) int64 in
        [0, 10).

    Raises:
        JobError: The files aren't there or aren't Fashion-MNIST's, or `validation` leaves a split without a
            class.
    """
    folder = _fashion_folder(root)
    inputs, targets = _fashion_part(folder, "train")
    train, held_out = _stratified(
        targets, torch.arange(len(targets)), validation, seed=seed, where="data.args.validation"
    )
    test_inputs, test_targets = _fashion_part(folder, "t10k")
    return Splits(
        Split(inputs[train], targets[train]),
        Split(inputs[held_out], targets[held_out]),
        Split(test_inputs, test_targets),
    )


def npz(path: str) -> Splits:
    """A numpy archive with the arrays x_train, y_train, x_validation, y_validation, x_test and y_test.

    Raises:
        JobError: The file isn't there, isn't an archive, holds pickled objects or lacks an array.
    """
    try:
        archive = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        got = f"{path} ({type(error).__name__}: {error})"
        raise JobError("data.args.path", "must be a numpy .npz file", got, "write one with numpy.savez") from error
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise JobError(
            "data.args.path",
            "must be a numpy .npz file",
            f"{path}, a single array",
            "write one with numpy.savez",
        )
    with archive:
        train, validation, test = (_npz_split(archive, path, name) for name in ("train", "validation", "test"))
    return Splits(train, validation, test)


def _npz_split(archive: Any, path: str, name: str) -> Split:
    arrays = []
    for key in (f"x_{name}", f"y_{name}"):
        if key not in archive.files:
            raise JobError("data.args.path", f"must hold the array {key!r}", path, closest(key, archive.files))
        try:
            arrays.append(archive[key])
        except ValueError as error:
            got = f"{key} with {error}"
            raise JobError("data.args.path", "must hold numeric arrays", got, "save arrays of numbers alone") from error
    return Split(as_inputs(arrays[0]), as_targets(arrays[1]))


def _stratified(
    labels: Tensor, positions: Tensor, size: float | int, *, seed: int, where: str
) -> tuple[Tensor, Tensor]:
    """Part the positions in two, the second of `size` (share or count), with the classes in proportion."""
    from sklearn.model_selection import train_test_split

    try:
        first, second = train_test_split(
            positions.numpy(), test_size=size, stratify=labels[positions].numpy(), random_state=seed
        )
    except ValueError as error:
        remedy = f"use a number between the number of classes and {len(positions)} less as many"
        raise JobError(where, "must leave every class in both parts", f"{size} ({error})", remedy) from error
    return torch.as_tensor(first), torch.as_tensor(second)


def _fashion_folder(root: str | None) -> Path:
    if root is not None:
        folders = [Path(root)]
    else:
        data = os.environ.get("PARETUNE_DATA")
        folders = [*([Path(data), Path(data) / "fashion-mnist"] if data else []), _SYSTEM_FOLDER]
    for folder in folders:
        if any((folder / f"train-images-idx3-ubyte{suffix}").is_file() for suffix in ("", ".gz")):
            return folder
    raise JobError(
        "data.args.root",
        "must be the folder with the IDX files of Fashion-MNIST",
        f"no train-images-idx3-ubyte or train-images-idx3-ubyte.gz in {', '.join(map(str, folders))}",
        "install Debian's package dataset-fashion-mnist, or set data.args.root or the environment variable "
        "PARETUNE_DATA",
    )


def _fashion_part(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    images = _read_idx(folder / f"{part}-images-idx3-ubyte")
    labels = _read_idx(folder / f"{part}-labels-idx1-ubyte")
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        got = f"shapes {images.shape} and {labels.shape}"
        raise JobError("data.args.root", f"must hold as many {part} labels as images", got, "download the files again")
    inputs = (torch.from_numpy(images).float() / 255 - _FASHION_MEAN) / _FASHION_DEVIATION
    return inputs.unsqueeze(1), torch.from_numpy(labels).long()


def _read_idx(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Read a file of unsigned bytes in the IDX format: 0, 0, type, rank, big-endian sizes, values."""
    file = path if path.is_file() else path.with_name(f"{path.name}.gz")
    try:
        content = file.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        zeros, kind, rank = struct.unpack(">HBB", content[:4])
        shape = struct.unpack(f">{rank}I", content[4 : 4 + 4 * rank])
        if zeros != 0 or kind != _IDX_BYTES:
            raise ValueError("not an IDX file of bytes")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape).copy()
    except (OSError, EOFError, ValueError, struct.error) as error:
        got = f"{file} ({type(error).__name__}: {error})"
        raise JobError("data.args.root", "must hold readable IDX files", got, "download the files again") from error


BUILTIN: Mapping[str, Callable[..., Any]] = MappingProxyType(
    {"digits": digits, "fashion-mnist": fashion_mnist, "npz": npz, "imagefolder": imagefolder}
)
