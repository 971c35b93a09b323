"""Data that do not fit into memory: read batch by batch, by worker processes, ahead of need."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from src.data.augment import Augmentation
from src.data.dataset import TensorSplit


class StreamSplit(TensorSplit):
    """A split whose inputs are read when they are needed; the order and the batches are as TensorSplit's.

    read: gives the input [C, H, W], uint8, of one of the items. y, mean, std, augment: as TensorSplit's; augmentation
    is done a batch at a time, on the device.
    """

    def __init__(
        self,
        items: Sequence[str],
        y: Tensor,
        read: Callable[[str], Tensor],
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        augment: Sequence[Augmentation] = (),
    ) -> None:
        super().__init__(y.new_empty((len(y), 0, 0, 0), dtype=torch.uint8), y, mean=mean, std=std, augment=augment)
        self.items, self.read = items, read

    def _gather(self, order: Tensor, batches: Sequence[slice]) -> Iterator[tuple[Tensor, Tensor]]:
        chosen = [order[rows] for rows in batches]
        loader = DataLoader(
            _Images(self.items, self.read),
            batch_sampler=(rows.tolist() or [0] for rows in chosen),  # without a row, one is read for its shape
            num_workers=available_cores() if self.n_workers is None else self.n_workers,
            pin_memory=self.y.device.type == "cuda",
            worker_init_fn=_leave_signals_to_parent,
            generator=torch.Generator(),  # or it would draw from the one that dropout draws from
        )
        for rows, x in zip(chosen, loader, strict=True):
            yield x[: len(rows)].to(self.y.device, non_blocking=True), self.y[rows.to(self.y.device)]


@dataclass
class _Images(Dataset[Tensor]):
    items: Sequence[str]
    read: Callable[[str], Tensor]

    def __getitem__(self, row: int) -> Tensor:
        return self.read(self.items[row])


def _leave_signals_to_parent(worker: int) -> None:
    for number in (signal.SIGINT, signal.SIGUSR1):  # sent to all processes of a terminal or a job
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def available_cores() -> int:
    """Cores that this process may use: those of the machine, the job or the container's mask, shared with its team."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
