"""Images in one folder a class, read when they are needed."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paretune.errors import JobError
from paretune.objectives.data.splits import MEMORY_LIMIT_BYTES, Splits, from_dataset

_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
# Mean and deviation of ImageNet's pixels (red, green, blue), which pretrained models expect.
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageFolder:
    """A map-style dataset of (image, label).

    Args:
        files: Image files with their labels.
        size: Height and width in pixels; images are stretched to it, bilinearly.
        mean: Subtracted from the channels in [0, 1].
        deviation: Divides them then.
    """

    def __init__(
        self,
        files: Sequence[tuple[Path, int]],
        size: tuple[int, int],
        *,
        mean: Sequence[float] = _MEAN,
        deviation: Sequence[float] = _DEVIATION,
    ) -> None:
        self.files = files
        self.size = size
        self.mean = torch.tensor(mean).reshape(3, 1, 1)
        self.deviation = torch.tensor(deviation).reshape(3, 1, 1)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        file, label = self.files[index]
        height, width = self.size
        pillow = _pillow()
        try:
            with pillow.open(file) as image:
                pixels = np.array(image.convert("RGB").resize((width, height), pillow.Resampling.BILINEAR))
        except OSError as error:
            raise JobError(
                "data.args.root", "must hold images that can be read", f"{file} ({error})", "replace it"
            ) from error
        channels = torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
        return (channels - self.mean) / self.deviation, label


def imagefolder(
    root: str,
    size: int | Sequence[int] = 224,
    workers: int = 0,
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
) -> Splits:
    """Images in ``root/<split>/<class>/*``, the splits being train, validation (or val) and test.

    Args:
        root: The folder.
        size: Height and width in pixels, one number for both or two.
        workers: Processes that read ahead; 0 reads in the training process.
        memory_limit_bytes: Splits above this size are streamed.

    Returns:
        Inputs (N, 3, height, width) float32, normalised as ImageNet's; labels (N,) int64, the place of the
        class among the train split's class folders in alphabetical order.

    Raises:
        JobError: Pillow isn't installed, a folder is missing or without images, or a class isn't in the train
            split.
    """
    _pillow()
    extent = (size, size) if isinstance(size, int) else tuple(size)
    if len(extent) != 2 or not all(isinstance(side, int) and side >= 1 for side in extent):
        raise JobError("data.args.size", "must be one or two positive integers", size, "use e.g. 224")
    folders = [
        _folder(Path(root), "train"),
        _folder(Path(root), "validation", "val"),
        _folder(Path(root), "test"),
    ]
    classes = sorted(folder.name for folder in folders[0].iterdir() if folder.is_dir())
    datasets = [ImageFolder(_files(folder, classes), (extent[0], extent[1])) for folder in folders]
    parts = [from_dataset(dataset, memory_limit_bytes=memory_limit_bytes, workers=workers) for dataset in datasets]
    return Splits(train=parts[0], validation=parts[1], test=parts[2])


def _pillow() -> Any:
    try:
        return importlib.import_module("PIL.Image")
    except ImportError as error:
        raise JobError(
            "data.source",
            "must be readable here, and 'imagefolder' needs Pillow",
            f"ImportError: {error}",
            "pip install pillow",
        ) from error


def _folder(root: Path, *names: str) -> Path:
    for name in names:
        if (root / name).is_dir():
            return root / name
    remedy = "make root/train, root/validation and root/test, each with one folder a class"
    raise JobError("data.args.root", f"must have the subfolder {' or '.join(map(repr, names))}", root, remedy)


def _files(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    files = []
    for subfolder in sorted(path for path in folder.iterdir() if path.is_dir()):
        if subfolder.name not in classes:
            remedy = f"give it training images, or remove it; the classes are {', '.join(classes[:12])}"
            raise JobError("data.args.root", "must have the same classes in every split", str(subfolder), remedy)
        label = classes.index(subfolder.name)
        files += [(file, label) for file in sorted(subfolder.rglob("*")) if file.suffix.lower() in _SUFFIXES]
    if not files:
        remedy = f"put images ({', '.join(sorted(_SUFFIXES))}) into {folder}/<class>/"
        raise JobError("data.args.root", "must have images in every split", f"none in {folder}", remedy)
    return files
