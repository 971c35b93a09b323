"""What a data set is to the training loop, and the batches it gives."""

import copy
import hashlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Generator, Tensor

from src.config import Refused
from src.data.augment import Augmentation, Draw, send


class Unavailable(Refused):
    """Data that cannot be had now. first_available goes on to the next."""


class Part(NamedTuple):
    """The rows of each batch that a process has, of several that share it: run `rank` of `of` nearly equal runs."""

    rank: int = 0
    of: int = 1

    def rows(self, n: int, first: int = 0) -> slice:
        """Its rows of a batch of n that begins at row `first`."""
        return slice(first + n * self.rank // self.of, first + n * (self.rank + 1) // self.of)

    def n_rows(self, n: int) -> int:
        """How many they are."""
        return n * (self.rank + 1) // self.of - n * self.rank // self.of


class TensorSplit:
    """A split that is kept whole, as tensors on one device.

    x: [N, C, H, W], uint8 or float. y: [N], int64.
    mean, std: of each channel of x (scaled to 0..1 if uint8); the batches are normalised by them.
    augment: functions (x, draw) -> x for training, before normalisation; see augment.py.
    """

    n_workers: int | None = None
    memory_format = torch.contiguous_format
    part = Part()

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        augment: Sequence[Augmentation] = (),
    ) -> None:
        if len(x) != len(y):
            raise ValueError(f"{len(x)} inputs but {len(y)} targets")
        unit = 1.0 if x.is_floating_point() else 255.0
        by_channel = (-1,) + (1,) * (x.ndim - 2)
        centre = torch.tensor(mean or [0.0], dtype=torch.float64).view(by_channel)
        spread = torch.tensor(std or [1.0], dtype=torch.float64).view(by_channel)
        self.x, self.y, self.augment = x, y, tuple(augment)
        self.scale, self.shift = (1 / (unit * spread)).float(), (-centre / spread).float()
        self.is_scaled = unit != 1 or mean is not None or std is not None

    def __len__(self) -> int:
        return len(self.y)

    def to(
        self,
        device: torch.device | str,
        n_workers: int | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
        part: Part = Part(),  # noqa: B008  (it is immutable)
    ) -> Self:
        """The same split on `device`: of its batches it gives the rows of `part`, in that format.

        n_workers: processes that read data which are streamed; None: one for each core, 0: none.
        """
        moved = copy.copy(self)
        moved.x, moved.y = self.x.to(device), self.y.to(device)
        moved.scale, moved.shift = self.scale.to(device), self.shift.to(device)
        moved.n_workers, moved.memory_format, moved.part = n_workers, memory_format, part
        return moved

    def batches(
        self, batch_size: int, *, seed: int | None = None, epoch: int = 0, start: int = 0
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches (x [B, C, H, W] float32, y [B]) of an epoch, from batch `start` on.

        The last one may be smaller. seed None: in order and not augmented, for valid and test.
        Else batch k is a pure function of (seed, epoch, k), so that there is no state to save.
        """
        n = len(self)
        order = torch.arange(n) if seed is None else torch.randperm(n, generator=_generator(seed, epoch))
        firsts = range(start * batch_size, n, batch_size)
        rows = [self.part.rows(min(batch_size, n - first), first) for first in firsts]
        for k, (x, y) in enumerate(self._gather(order, rows), start):
            if seed is not None and self.augment:
                draw = self._draw(min(batch_size, n - k * batch_size), _generator(seed, epoch, k))
                for function in self.augment:
                    x = function(x, draw)
            # In place, on a copy (an augmentation may give a view): x * scale + shift is far slower for uint8.
            x = x.to(torch.float32, copy=bool(self.augment), memory_format=self.memory_format)
            yield (x.mul_(self.scale).add_(self.shift) if self.is_scaled else x), y

    def _draw(self, n: int, generator: Generator) -> Draw:
        """Gives our rows of random numbers that are drawn for the global batch of n."""
        return lambda *shape: torch.rand(n, *shape, generator=generator)[self.part.rows(n)]

    def _gather(self, order: Tensor, batches: Sequence[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        """x and y of the rows `order` [N], on the CPU, batch by batch, on the split's device."""
        order = send(order, self.x.device)
        for rows in batches:
            chosen = order[rows]
            yield self.x.index_select(0, chosen), self.y.index_select(0, chosen)


class Batches:
    """An iterable over one epoch's batches of a split, at most `limit` of them.

    Without __len__: Poutyne would cycle a sized iterable to fill an epoch. seed None: the split in
    order and not augmented, for validation; else `begin` says which epoch the next iteration is.
    n_batches: of a whole epoch. n: images in the batch that was given last, the rows of other processes included.
    waited: seconds that the current iteration took to give its batches.
    """

    def __init__(self, split: TensorSplit, batch_size: int, seed: int | None = None, limit: int | None = None) -> None:
        self.split, self.batch_size, self.seed = split, batch_size, seed
        self.n_split = len(split)
        self.n_batches = min(math.ceil(self.n_split / batch_size), limit or self.n_split)
        self.n, self.waited = 0, 0.0
        self.epoch = self.start = 0

    def begin(self, epoch: int, start: int) -> None:
        """The next iteration is of epoch `epoch`, from batch `start` on."""
        self.epoch, self.start = epoch, start

    def n_images(self, first: int, after: int) -> int:
        """In the batches from `first` on, before `after`."""
        return min(after * self.batch_size, self.n_split) - first * self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.waited = 0.0
        batches = self.split.batches(self.batch_size, seed=self.seed, epoch=self.epoch, start=self.start)
        for k in range(self.start, self.n_batches):
            began = time.perf_counter()
            self.n, batch = self.n_images(k, k + 1), next(batches)
            self.waited += time.perf_counter() - began
            yield batch


def _generator(*key: int) -> Generator:
    """A CPU generator for `key`, hashed since torch's takes only 32 bits of a seed."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return Generator().manual_seed(int.from_bytes(digest[:4]))


@dataclass(frozen=True)
class Data:
    """A data set as the training loop gets it.

    input_shape: of one input, (C, H, W). n_classes: for targets that are numbers, how many an input has.
    fingerprint: of what is really used; see fingerprint().
    choice: the place in first_available's list, if it was chosen from one.
    """

    name: str
    train: TensorSplit
    valid: TensorSplit
    test: TensorSplit
    input_shape: tuple[int, ...]
    n_classes: int
    fingerprint: str
    choice: int | None = None


def fingerprint(*splits: TensorSplit) -> str:
    """SHA-256 (hex) of inputs, normalisation and targets. Augmentation does not count."""
    sha256 = hashlib.sha256()
    for split in splits:
        for tensor in (split.x, split.y, split.scale, split.shift):
            sha256.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            sha256.update(tensor.contiguous().numpy().data)
    return sha256.hexdigest()


def stratified_split(y: Tensor, sizes: Sequence[int], *, n_train: int | None = None, seed: int = 0) -> list[Tensor]:
    """Disjoint random index tensors [size] of the `sizes`, each with the classes in y's [N] proportions.

    So is each prefix of the first, of which only `n_train` are given, if not None. The same on every machine.
    """
    labels = y.numpy()
    random = np.random.RandomState(seed)  # its numbers never change: NEP 19
    place = np.empty(len(labels))
    for label in np.unique(labels):  # each class is spread evenly over 0..1
        members = random.permutation(np.flatnonzero(labels == label))
        place[members] = (np.arange(len(members)) + random.random_sample()) / len(members)
    order = np.argsort(place, kind="stable")
    assert len(np.unique(order)) == len(y) == sum(sizes), "splits overlap, or leave some out"
    first, *others = map(torch.from_numpy, np.split(order, np.cumsum(sizes)[:-1]))
    if n_train is not None and not 1 <= n_train <= len(first):
        raise Refused(
            f"n_train = {n_train}, but there are {len(first)} images: give 1 to {len(first)}, or None for all."
        )
    return [first[:n_train], *others]


def data_dir() -> Path:
    """Where data sets are kept: $DATA_DIR, or data/ in the repository."""
    return Path(os.environ.get("DATA_DIR") or Path(__file__).parents[2] / "data")
