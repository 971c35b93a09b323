"""What a data set is to the training loop, and the batches it gives."""

import hashlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, default_collate

from src.config import Refused
from src.data.augment import Augmentation, send


class Unavailable(Refused):
    """Data that cannot be had now. first_available goes on to the next."""


@dataclass(eq=False)
class Split:
    """Inputs x and targets y, and what is done to them.

    x: [N, C, H, W], uint8 or float; or, with `read`, an array of N names: read(name) is an input [C, H, W], uint8,
    which worker processes read when it is needed. y: [N], int64; or [N, n], float.
    mean, std: of each channel of x (scaled to 0..1 if uint8); the batches are normalised by them.
    augment: functions (x, draw) -> x for training, before normalisation; see augment.py.
    """

    x: Any
    y: Tensor
    mean: Sequence[float] = (0.0,)
    std: Sequence[float] = (1.0,)
    augment: Sequence[Augmentation] = ()
    read: Callable[[str], Tensor] | None = None

    def __post_init__(self) -> None:
        assert len(self.x) == len(self.y), f"{len(self.x)} inputs but {len(self.y)} targets"
        if self.read is None and not (self.x.is_floating_point() or self.x.dtype == torch.uint8):
            raise TypeError(f"x must be uint8 or float, not {self.x.dtype}: of other whole numbers give x.float()")

    def __len__(self) -> int:
        return len(self.y)

    def divided(self, rows: Sequence[Tensor]) -> tuple["Split", "Split", "Split"]:
        """Its rows [n] to train on, which alone are augmented; to validate; to test."""
        # By numpy's rows: an array of names would take a tensor of one row for a number.
        train, valid, test = (replace(self, x=self.x[part.numpy()], y=self.y[part], augment=()) for part in rows)
        return replace(train, augment=self.augment), valid, test

    def normalisation(self) -> tuple[Tensor, Tensor]:
        """scale and shift, [C, 1, 1]: x * scale + shift is normalised."""
        unit = 1.0 if self.read is None and self.x.is_floating_point() else 255.0
        shape = (-1, *[1] * (2 if self.read else self.x.ndim - 2))
        mean, std = (torch.tensor(value, dtype=torch.float64).view(shape) for value in (self.mean, self.std))
        return (1 / (unit * std)).float(), (-mean / std).float()


@dataclass(frozen=True)
class Data:
    """A data set as the training loop gets it.

    input_shape: of one input, (C, H, W). n_classes: for targets that are numbers, how many an input has.
    fingerprint: of what is really used. choice: the place in first_available's list, if it was chosen from one.
    """

    name: str
    train: Split
    valid: Split
    test: Split
    input_shape: tuple[int, ...]
    n_classes: int
    fingerprint: str
    choice: int | None = None


def divide(name: str, whole: Split, rows: Sequence[Tensor], n_classes: int) -> Data:
    """The data set of these rows [n] of a split in memory: those to train on, alone augmented; to validate; to test."""
    splits = whole.divided(rows)
    return Data(name, *splits, tuple(whole.x.shape[1:]), n_classes, fingerprint(*splits))


def fingerprint(*splits: Split) -> str:
    """SHA-256 (hex) of inputs in memory, targets and normalisation. Augmentation does not count."""
    sha256 = hashlib.sha256()
    for split in splits:
        for tensor in (split.x, split.y, *split.normalisation()):
            sha256.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            sha256.update(tensor.contiguous().numpy().data)
    return sha256.hexdigest()


def stratified_split(y: Tensor, sizes: Sequence[int] | None = None, n_train: int | None = None) -> list[Tensor]:
    """Disjoint random index tensors [size] of the `sizes`, each with the classes in y's [N] proportions.

    sizes: None: three fifths, a fifth and a fifth. n_train: gives only so many of the first, in these proportions, too.
    The same on every machine.
    """
    fifth = len(y) // 5
    sizes = sizes or [len(y) - 2 * fifth, fifth, fifth]
    random = np.random.RandomState(0)  # its numbers never change: NEP 19
    place = np.empty(len(y))
    for label in np.unique(y):  # each class is spread evenly over 0..1
        members = random.permutation(np.flatnonzero(y == label))
        place[members] = (np.arange(len(members)) + random.random_sample()) / len(members)
    order = np.argsort(place, kind="stable")
    assert len(np.unique(order)) == len(y) == sum(sizes), "splits overlap, or leave some out"
    first, *others = map(torch.from_numpy, np.split(order, np.cumsum(sizes)[:-1]))
    if n_train is not None and not 1 <= n_train <= len(first):
        raise Refused(f"n_train = {n_train}, but there are {len(first)} images: give 1 to {len(first)}, or None")
    return [first[:n_train], *others]


def data_dir() -> Path:
    """Where data sets are kept: $DATA_DIR, or data/ in the repository."""
    return Path(os.environ.get("DATA_DIR") or Path(__file__).parents[2] / "data")


class Part(NamedTuple):
    """The rows of each batch that a process has, of several that share it: run `rank` of `of` nearly equal runs."""

    rank: int = 0
    of: int = 1

    def rows(self, n: int, first: int = 0) -> slice:
        """Its rows of a batch of n that begins at row `first`."""
        return slice(first + n * self.rank // self.of, first + n * (self.rank + 1) // self.of)


@dataclass(eq=False)
class Batches:
    """An iterable over one epoch's batches (x [B, C, H, W] float32, y [B]) of a split, the last one maybe smaller.

    Without __len__: Poutyne would cycle a sized iterable to fill an epoch.
    seed None: in order and not augmented, for valid and test. Else batch k is a pure function of (seed, epoch, k),
    so that there is no state to save. limit: at most so many batches. part: the rows of them that are given.
    n_workers: processes that read inputs which are not in memory; None: one for each core, 0: none.
    n_batches: of a whole epoch. n: images in the batch that was given last, the rows of other processes included.
    waited: seconds that the current iteration took to give its batches.
    """

    split: Split
    batch_size: int
    seed: int | None = None
    limit: int | None = None
    device: torch.device | str = "cpu"
    memory_format: torch.memory_format = torch.contiguous_format
    part: Part = Part()  # noqa: RUF009  (it is immutable)
    n_workers: int | None = None

    def __post_init__(self) -> None:
        self.n_batches = min(math.ceil(len(self.split) / self.batch_size), self.limit or len(self.split))
        self.n = self.epoch = self.start = 0
        self.waited = 0.0
        self.x = self.split.x if self.split.read else self.split.x.to(self.device)
        self.y = self.split.y.to(self.device)
        self.scale, self.shift = (tensor.to(self.device) for tensor in self.split.normalisation())
        self.is_scaled = bool((self.scale != 1).any() or (self.shift != 0).any())

    def begin(self, epoch: int, start: int) -> None:
        """The next iteration is of epoch `epoch`, from batch `start` on."""
        self.epoch, self.start = epoch, start

    def n_images(self, first: int, after: int) -> int:
        """In the batches from `first` on, before `after`."""
        return min(after * self.batch_size, len(self.split)) - first * self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.waited, began = 0.0, time.perf_counter()
        order, augment, generator = torch.arange(len(self.split)), self.split.augment, Generator()
        if self.seed is None:
            augment = ()
        else:
            order = torch.randperm(len(order), generator=generator.manual_seed(_hash(self.seed, self.epoch)))

        def draw(*shape: int) -> Tensor:
            """Our rows of random numbers that are drawn for the whole batch."""
            return torch.rand(self.n, *shape, generator=generator)[self.part.rows(self.n)]

        places = range(self.start, self.n_batches)
        rows = [self.part.rows(self.n_images(k, k + 1), k * self.batch_size) for k in places]
        for k, (x, y) in zip(places, self._gather(order, rows), strict=True):
            self.n = self.n_images(k, k + 1)
            if augment:
                generator.manual_seed(_hash(self.seed, self.epoch, k))
                for function in augment:
                    x = function(x, draw)
            # In place, on a copy (an augmentation may give a view): x * scale + shift is far slower for uint8.
            x = x.to(torch.float32, copy=bool(augment), memory_format=self.memory_format)
            if self.is_scaled:
                x.mul_(self.scale).add_(self.shift)
            self.waited += time.perf_counter() - began
            yield x, y
            began = time.perf_counter()

    def _gather(self, order: Tensor, batches: Sequence[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        """x and y of the rows `order` [N], on the CPU, batch by batch, on the device."""
        order_there = send(order, self.y.device)
        if self.split.read is None:
            for rows in batches:
                chosen = order_there[rows]
                yield self.x.index_select(0, chosen), self.y.index_select(0, chosen)
            return
        loader = DataLoader(
            self.x,
            batch_sampler=(order[rows].tolist() or [0] for rows in batches),  # without a row, one is read for its shape
            collate_fn=partial(_read_all, self.split.read),
            num_workers=_available_cores() if self.n_workers is None else self.n_workers,
            pin_memory=self.y.device.type == "cuda",
            worker_init_fn=_leave_signals_to_parent,
            generator=Generator(),  # or it would draw from the one that dropout draws from
        )
        for rows, x in zip(batches, loader, strict=True):
            y = self.y.index_select(0, order_there[rows])
            yield x[: len(y)].to(self.device, non_blocking=True), y


def _hash(*key: int | None) -> int:
    """A seed for `key`, hashed since torch's generator takes only 32 bits of one."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:4])


def _read_all(read: Callable[[str], Tensor], names: Sequence[str]) -> Any:
    return default_collate([read(name) for name in names])  # in shared memory


def _available_cores() -> int:
    """Cores that this process may use: those of the machine, the job or the container's mask, shared with its team."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _leave_signals_to_parent(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGUSR1):  # sent to all processes of a terminal or a job
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
