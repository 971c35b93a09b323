"""Augmentation of a whole batch at once, on the batch's device.

An augmentation is a function (x, draw) -> x. draw(2) gives uniform random numbers in [0, 1) of shape [B, 2], a row
for each image, on the CPU: every device sees the same batch, and each process of several its rows of it.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from src.config import Refused

Draw = Callable[..., Tensor]
Augmentation = Callable[[Tensor, Draw], Tensor]


def augmentations(padding: int = 0, flip: bool = False, cut: int = 0) -> list[Augmentation]:
    """A crop with `padding`, a flip, a square of `cut` pixels cut out: those that are wanted, not 0 or False."""
    return [
        *([random_crop(padding)] if padding else []),
        *([random_flip] if flip else []),
        *([cutout(cut)] if cut else []),
    ]


def send(draws: Tensor, device: torch.device) -> Tensor:
    """`draws` [...], made on the CPU, on `device`, without a wait: for a GPU that takes pinned memory."""
    return draws.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else draws.to(device)


def random_crop(padding: int = 4) -> Augmentation:
    """Pads each image with `padding` black pixels on all sides and cuts out a random window."""
    if padding < 0:
        raise Refused(f"padding = {padding}: give 0 (no crop) or more")

    def crop(x: Tensor, draw: Draw) -> Tensor:
        n, _, height, width = x.shape
        top, left = send((draw(2) * (2 * padding + 1)).long().T.contiguous(), x.device)
        windows = F.pad(x, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # a view
        return windows[torch.arange(n, device=x.device), :, top, left]

    return crop


def cutout(size: int) -> Augmentation:
    """Sets a square of size x size pixels at a random place to zero (DeVries and Taylor 2017, section 3)."""
    if size < 1:
        raise Refused(f"cutout = {size}: give 1 or more pixels")

    def cut(x: Tensor, draw: Draw) -> Tensor:
        sides = torch.tensor(x.shape[2:])
        top, left = send((draw(2) * sides - size / 2).round().long().T[..., None].contiguous(), x.device)
        rows, columns = (torch.arange(side, device=x.device) for side in x.shape[2:])
        inside_rows, inside_columns = (rows >= top) & (rows < top + size), (columns >= left) & (columns < left + size)
        return x.masked_fill((inside_rows[:, :, None] & inside_columns[:, None, :])[:, None], 0)

    return cut


def random_flip(x: Tensor, draw: Draw) -> Tensor:
    """Mirrors each image of x [B, C, H, W] left to right with probability 1/2."""
    columns = torch.arange(x.shape[3])
    columns = torch.where(draw(1) < 0.5, columns.flip(0), columns)  # [B, W]
    # On a CPU a gather takes half the time of torch.where on the images.
    return x.gather(3, send(columns, x.device)[:, None, None, :].expand_as(x))
