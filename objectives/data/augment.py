"""Augmentation of training batches on the device that trains, drawn anew for each sample."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from paretune.errors import JobError
from paretune.objectives.data.inputs import Inputs, map_tensors, tensors
from paretune.objectives.data.splits import Batch, Mix

_ALPHA = 0.2
"""Of mixup's Beta distribution; Zhang et al. use 0.1 to 0.4 for ImageNet."""


def crop(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by up to an eighth of its sides (at least a pixel); what comes in is mirrored at the border.

    Args:
        images: (N, C, H, W), on the generator's device.
        generator: Of the shifts, uniform in whole pixels.
    """
    rows, columns = (_shifted(len(images), side, generator) for side in images.shape[2:])
    # One flat lookup for both axes: half the time of one after the other.
    places = (rows.unsqueeze(2) * images.shape[3] + columns.unsqueeze(1)).flatten(1)
    places = places.unsqueeze(1).expand(-1, images.shape[1], -1)
    return images.flatten(2).gather(2, places).view(images.shape)


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image of (N, C, H, W) left to right, with probability 1/2."""
    flipped = torch.rand(len(images), 1, 1, 1, generator=generator, device=generator.device) < 0.5
    return torch.where(flipped, images.flip(3), images)


def cutout(images: Tensor, generator: torch.Generator) -> Tensor:
    """Set a square of each image to zero (DeVries and Taylor, 2017, arXiv:1708.04552).

    Its side is a quarter of the image's shorter one, as the paper has it for many classes; its centre is uniform, so it
    may reach over the border.

    Args:
        images: (N, C, H, W), on the generator's device.
        generator: Of the centres.
    """
    size = max(1, min(images.shape[2:]) // 4)
    inside = []
    for side in images.shape[2:]:
        centre = torch.randint(side, (len(images), 1), generator=generator, device=generator.device)
        offset = torch.arange(side, device=generator.device) - (centre - size // 2)
        inside.append((offset >= 0) & (offset < size))
    rows, columns = inside
    return images.masked_fill((rows.unsqueeze(2) & columns.unsqueeze(1)).unsqueeze(1), 0)


IMAGES: Mapping[str, Callable[[Tensor, torch.Generator], Tensor]] = MappingProxyType(
    {"crop": crop, "flip": flip, "cutout": cutout}
)
"""What changes images alone, in the order in which it is applied."""

NAMES = (*IMAGES, "mixup")
"""All augmentations, in the order in which they are applied."""


def mixup(batch: Batch, generator: torch.Generator) -> Batch:
    """Mix each sample with another one of the batch (Zhang et al., 2018, arXiv:1710.09412).

    The share of the own samples is one for the batch, drawn from Beta(0.2, 0.2).

    Args:
        batch: Its inputs are floats, on the generator's device.
        generator: Of the partners and the share.

    Returns:
        The batch with mixed inputs, and with `mix`; its targets stay.
    """
    partners = torch.randperm(len(batch.targets), generator=generator, device=generator.device)
    # A number drawn on a GPU would make the CPU wait for it; the generator's state, which has just moved on, doesn't.
    share = random.Random(generator.get_state().numpy().tobytes()).betavariate(_ALPHA, _ALPHA)
    inputs = map_tensors(lambda tensor: torch.lerp(tensor[partners], tensor, share), batch.inputs)
    return batch._replace(inputs=inputs, mix=Mix(batch.targets[partners], share))


class Augmentation:
    """Augments batches; the training calls it once a step.

    Args:
        names: Some of `NAMES`, in any order.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._images = [function for name, function in IMAGES.items() if name in names]
        self._mixes = "mixup" in names

    def __call__(self, batch: Batch, generator: torch.Generator) -> Batch:
        """The augmented batch, in tensors of its own; equal states of the generator give equal ones.

        Args:
            batch: Inputs and targets are on the generator's device.
            generator: Of everything random here.

        Raises:
            JobError: Not exactly one input is an image (N, C, H, W) or, for mixup, not all are floats.
        """
        inputs = batch.inputs
        if self._images:
            image = _only_image(inputs)
            changed = image
            for function in self._images:
                changed = function(changed, generator)
            inputs = map_tensors(lambda tensor: changed if tensor is image else tensor, inputs)
        batch = batch._replace(inputs=inputs)
        if not self._mixes:
            return batch
        if not all(tensor.is_floating_point() for tensor in tensors(inputs).values()):
            got, remedy = _described(inputs), "give floats, or leave mixup out"
            raise JobError("finetune.augment", "can mix only inputs of floats", got, remedy)
        return mixup(batch, generator)


def make_augmentation(names: Sequence[str]) -> Augmentation | None:
    """What does these augmentations; None where there are none.

    Args:
        names: Some of `NAMES`; they are applied in the order given there.

    Raises:
        JobError: A name isn't known.
    """
    for name in names:
        if name not in NAMES:
            raise JobError("finetune.augment", "must be known", repr(name), f"use some of {', '.join(NAMES)}")
    return Augmentation(names) if names else None


def _shifted(count: int, side: int, generator: torch.Generator) -> Tensor:
    """(count, side) positions along an axis, shifted and mirrored at the border."""
    most = min(side - 1, max(1, side // 8))
    shifts = torch.randint(-most, most + 1, (count, 1), generator=generator, device=generator.device)
    positions = (torch.arange(side, device=generator.device) + shifts).abs()
    return (side - 1) - (side - 1 - positions).abs()


def _only_image(inputs: Inputs) -> Tensor:
    images = [tensor for tensor in tensors(inputs).values() if tensor.ndim == 4]
    if len(images) != 1:
        remedy = "leave crop, flip and cutout out, and augment in the data's own function (splits.augment)"
        rule = "needs exactly one tensor (N, C, H, W) among the inputs"
        raise JobError("finetune.augment", rule, _described(inputs), remedy)
    return images[0]


def _described(inputs: Inputs) -> str:
    found = (f"{name} {tuple(tensor.shape)} {tensor.dtype}".strip() for name, tensor in tensors(inputs).items())
    return ", ".join(found)
