"""Data of any size and shape for the benchmarks: noise with the class in it. Named in gin as @synthetic."""

import gin
import torch
from torch import Tensor

from src.data.augment import augmentations
from src.data.dataset import Data, Split

MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]


def images(n: int, shape: tuple[int, ...] = (3, 32, 32), seed: int = 0) -> tuple[Tensor, Tensor]:
    """x [n, *shape] uint8, brighter with the class, and y [n], 10 classes."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 10
    x = torch.randint(0, 160, (n, *shape), generator=generator, dtype=torch.uint8)
    return x + (9 * y).to(torch.uint8).view(-1, *[1] * len(shape)), y


@gin.register
def synthetic(n_train: int = 12800, n_valid: int = 1280, shape: tuple[int, ...] = (3, 32, 32)) -> Data:
    """n_train images to train on, with crop and flip, n_valid each to validate and to test."""
    parts = [images(n, shape, seed) for seed, n in enumerate((n_train, n_valid, n_valid))]
    is_image = len(shape) == 3
    if not is_image:
        parts = [(x.float() / 255, y) for x, y in parts]
    norm = {"mean": MEAN, "std": STD} if is_image else {}
    train, valid, test = (Split(x, y, **norm) for x, y in parts)
    train.augment = augmentations(padding=4, flip=True) if is_image else ()
    return Data("synthetic", train, valid, test, shape, 10, f"synthetic {n_train} {n_valid} {shape}")
