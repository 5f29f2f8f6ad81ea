"""Augmentation of batches: what it does to each sample, that it can be repeated, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from paretune.errors import JobError
from paretune.objectives.data.augment import IMAGES, NAMES, Augmentation, crop, cutout, flip, make_augmentation, mixup
from paretune.objectives.data.inputs import Inputs
from paretune.objectives.data.splits import Batch
from paretune.search.job_types import Augmentations


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 400, height: int = 16, width: int = 24) -> Tensor:
    """Every pixel has a value of its own, and none is 0."""
    return 1 + torch.arange(count * 3 * height * width).float().view(count, 3, height, width)


def batch_of(inputs: Inputs, count: int) -> Batch:
    return Batch(torch.arange(count), inputs, torch.arange(count))


@pytest.mark.parametrize("function", IMAGES.values(), ids=list(IMAGES))
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
def test_an_augmentation_follows_its_generator_alone(
    function: Callable[[Tensor, torch.Generator], Tensor], form: torch.memory_format
) -> None:
    x = images(32)
    before, state = x.clone(), torch.get_rng_state()
    one = function(x.contiguous(memory_format=form), seeded(1))
    assert torch.equal(one, function(x, seeded(1)))
    assert not torch.equal(one, function(x, seeded(2)))
    assert (one.shape, one.dtype) == (x.shape, x.dtype)
    assert torch.equal(x, before), "the data stay as they are"
    assert torch.equal(state, torch.get_rng_state())


def test_about_half_are_flipped() -> None:
    x = images()
    out = flip(x, seeded())
    flipped = (out == x.flip(3)).flatten(1).all(1)
    assert torch.equal(flipped, ~(out == x).flatten(1).all(1)), "each is flipped or as it was"
    assert 0.4 < flipped.float().mean() < 0.6


def test_crops_shift_each_sample_by_up_to_an_eighth() -> None:
    x = images()
    out = crop(x, seeded())
    # The middle survives every shift, and tells where it came from.
    places = out[:, 0, 8, 12] - x[:, 0, 8, 12]
    rows = (places / 24).round()
    columns = places - 24 * rows
    assert sorted(set(rows.tolist())) == [-2, -1, 0, 1, 2]
    assert sorted(set(columns.tolist())) == [-3, -2, -1, 0, 1, 2, 3]
    for position in range(20):
        padded = torch.nn.functional.pad(x[position], (3, 3, 2, 2), mode="reflect")
        top, left = 2 + int(rows[position]), 3 + int(columns[position])
        assert torch.equal(out[position], padded[:, top : top + 16, left : left + 24])


@pytest.mark.parametrize("side", [1, 2, 8])
def test_small_images_are_cropped_too(side: int) -> None:
    x = images(64, side, side)
    out = crop(x, seeded())
    assert out.shape == x.shape
    assert torch.equal(out, x) is (side == 1)


def test_cutout_zeroes_one_square_of_each_sample() -> None:
    x = images()
    out = cutout(x, seeded())
    zero = out == 0
    assert torch.equal(out[~zero], x[~zero])
    assert torch.equal(zero[:, :1].expand_as(zero), zero), "in all channels alike"
    rows, columns = zero[:, 0].any(2), zero[:, 0].any(1)
    assert torch.equal(zero[:, 0], rows.unsqueeze(2) & columns.unsqueeze(1)), "a rectangle"
    for lines in (rows, columns):
        runs = (lines.int().diff(dim=1) == 1).sum(1) + lines[:, 0]
        assert bool((runs == 1).all()), "in one piece"
        heights = lines.sum(1)
        assert heights.max() == 4
        assert heights.min() >= 2, "less than a square only at the border"
        assert bool((heights[~(lines[:, 0] | lines[:, -1])] == 4).all())
    assert len({tuple(mask.tolist()) for mask in rows}) > 10


def test_mixups_inputs_and_shares_agree() -> None:
    x = torch.rand(64, 3, 8, 8)
    batch, generator = batch_of(x, 64), seeded()
    shares = []
    for _ in range(50):
        out = mixup(batch, generator)
        assert out.mix is not None
        shares.append(out.mix.share)
        # The targets are positions: they say which sample was mixed in.
        torch.testing.assert_close(out.inputs, out.mix.share * x + (1 - out.mix.share) * x[out.mix.targets])
        assert torch.equal(out.mix.targets.sort().values, torch.arange(64)), "each sample is a partner once"
        assert torch.equal(out.targets, batch.targets)
    assert len(set(shares)) == 50
    assert all(0 <= share <= 1 for share in shares)
    assert sum(share < 0.1 or share > 0.9 for share in shares) > 20, "a Beta(0.2, 0.2) lies at its ends"


def test_mixup_repeats_and_mixes_targets_of_any_shape() -> None:
    targets = torch.rand(8, 4, 4)
    batch = Batch(torch.arange(8), {"a": torch.rand(8, 5), "b": torch.rand(8, 3, 2)}, targets)
    one, other = mixup(batch, seeded(3)), mixup(batch, seeded(3))
    assert one.mix is not None and other.mix is not None
    assert one.mix.share == other.mix.share
    assert torch.equal(one.mix.targets, other.mix.targets)
    assert one.mix.targets.shape == targets.shape
    assert isinstance(one.inputs, dict)
    partners = [int((targets == theirs).flatten(1).all(1).nonzero()) for theirs in one.mix.targets]
    for name, tensor in one.inputs.items():
        own = batch.inputs[name]  # type: ignore[call-overload,index]
        torch.testing.assert_close(tensor, one.mix.share * own + (1 - one.mix.share) * own[partners])


def test_all_together_in_a_fixed_order() -> None:
    batch = batch_of(images(32), 32)
    one = Augmentation(NAMES)(batch, seeded())
    assert isinstance(batch.inputs, Tensor)
    generator = seeded()
    x = batch.inputs
    for name in ("crop", "flip", "cutout"):
        x = IMAGES[name](x, generator)
    expected = mixup(batch._replace(inputs=x), generator)
    other = Augmentation(NAMES[::-1])(batch, seeded())
    for found in (one, other):
        assert torch.equal(found.inputs, expected.inputs)  # type: ignore[arg-type]
        assert found.mix is not None
        assert expected.mix is not None
        assert found.mix.share == expected.mix.share


@pytest.mark.parametrize("keys", [("x", "size"), (0, 1)], ids=["dictionary", "tuple"])
def test_the_one_image_among_several_inputs_is_augmented(keys: tuple[str | int, str | int]) -> None:
    x, size = images(16), torch.arange(16)
    inputs: Inputs = {"x": x, "size": size} if keys[0] == "x" else (x, size)
    out = Augmentation(["flip"])(batch_of(inputs, 16), seeded()).inputs
    assert type(out) is type(inputs)
    assert torch.equal(out[keys[0]], flip(x, seeded()))  # type: ignore[call-overload,index]
    assert out[keys[1]] is size  # type: ignore[call-overload,index]


@pytest.mark.parametrize(
    ("names", "inputs", "message"),
    [
        pytest.param(["crop"], torch.rand(4, 8), r"exactly one tensor \(N, C, H, W\).*got \(4, 8\)", id="features"),
        pytest.param(["flip"], (torch.rand(4, 1, 2, 2),) * 2, "exactly one tensor", id="two images"),
        pytest.param(["cutout"], {"a": torch.rand(4, 3)}, r"got a \(4, 3\) torch.float32", id="no image"),
        pytest.param(["mixup"], torch.arange(4).view(4, 1), "only inputs of floats", id="token ids"),
    ],
)
def test_what_cant_be_augmented_is_refused(names: list[str], inputs: Inputs, message: str) -> None:
    with pytest.raises(JobError, match=message) as caught:
        Augmentation(names)(batch_of(inputs, 4), seeded())
    assert caught.value.where == "finetune.augment"


def test_names() -> None:
    assert make_augmentation([]) is None
    assert isinstance(make_augmentation(["mixup", "crop"]), Augmentation)
    with pytest.raises(JobError, match=r"must be known, but got 'cutmix'; use some of crop, flip, cutout, mixup"):
        make_augmentation(["cutmix"])
    (listed, _) = get_args(Augmentations)
    (literal,) = get_args(listed)
    assert get_args(literal) == NAMES, "a job may name what is there, and nothing else"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_augments_without_making_the_cpu_wait() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    batch = Batch(torch.arange(32), images(32).cuda(), torch.arange(32).cuda())
    augment = Augmentation(NAMES)
    augment(batch, generator)
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = augment(batch, generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert isinstance(out.inputs, Tensor)
    assert out.inputs.is_cuda
    assert out.mix is not None
    assert torch.equal(out.mix.targets.sort().values.cpu(), torch.arange(32))
