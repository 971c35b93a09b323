import pytest
import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from src.config import Refused
from src.data.augment import random_crop, random_flip


def drawer(n: int, seed: int = 0):
    """The random numbers of a batch of n, as a split draws them."""
    generator = Generator().manual_seed(seed)
    return lambda *shape: torch.rand(n, *shape, generator=generator)


def numbered_images(n: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """[n, 3, 8, 8] with no two equal pixels in a channel, and none that is 0."""
    return (torch.arange(3 * 64) + 1).view(1, 3, 8, 8).repeat(n, 1, 1, 1).to(dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("padding", [1, 4])
def test_crop_equals_slow_reference(padding: int, dtype: torch.dtype) -> None:
    x = numbered_images(50, dtype)
    tops, lefts = (drawer(50, 3)(2) * (2 * padding + 1)).floor().long().T
    expected = []
    for image, top, left in zip(x, tops.tolist(), lefts.tolist(), strict=True):
        expected.append(F.pad(image, (padding,) * 4)[:, top : top + 8, left : left + 8])
    cropped = random_crop(padding)(x, drawer(50, 3))
    assert torch.equal(cropped, torch.stack(expected))
    assert cropped.dtype == dtype


def test_crop_uses_every_offset_about_equally() -> None:
    x = numbered_images(8100)
    cropped = random_crop(4)(x, drawer(8100))
    counts = {tuple(image.flatten().tolist()): 0 for image in cropped}
    for image in cropped:
        counts[tuple(image.flatten().tolist())] += 1
    assert len(counts) == 81
    assert 60 <= min(counts.values()) <= max(counts.values()) <= 140


def test_flip_equals_slow_reference() -> None:
    x = numbered_images(1000)
    mirrored = drawer(1000, 3)(1)[:, 0] < 0.5
    expected = [image.flip(2) if yes else image for image, yes in zip(x, mirrored.tolist(), strict=True)]
    assert torch.equal(random_flip(x, drawer(1000, 3)), torch.stack(expected))
    assert 400 < mirrored.sum() < 600


def test_input_is_not_changed() -> None:
    x = numbered_images(20)
    random_flip(x, drawer(20))
    random_crop()(x, drawer(20))
    assert torch.equal(x, numbered_images(20))


def test_negative_padding_is_refused() -> None:
    with pytest.raises(Refused, match="padding = -1"):
        random_crop(-1)
