"""Augmentation of a whole batch at once, on the batch's device.

An augmentation is a function (x, draw) -> x. draw(2) gives uniform random numbers in [0, 1) of shape [B, 2], a row
for each image, on the CPU: every device sees the same batch, and so does each process of several, whose rows of the
global batch x are. It never makes the host wait for a GPU.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from src.config import Refused

Draw = Callable[..., Tensor]
Augmentation = Callable[[Tensor, Draw], Tensor]


def send(draws: Tensor, device: torch.device) -> Tensor:
    """`draws` [...], made on the CPU, on `device`, without a wait: for a GPU that takes pinned memory."""
    if device.type == "cuda":
        return draws.pin_memory().to(device, non_blocking=True)
    return draws.to(device)


def random_crop(padding: int = 4) -> Augmentation:
    """Pad each image with `padding` zeros (black) on all sides and cut out a random window."""
    if padding < 0:
        raise Refused(f"padding = {padding}: give 0 (no crop) or more.")

    def crop(x: Tensor, draw: Draw) -> Tensor:
        n, _, height, width = x.shape
        top, left = send((draw(2) * (2 * padding + 1)).long().T.contiguous(), x.device)
        windows = F.pad(x, (padding,) * 4).unfold(2, height, 1).unfold(3, width, 1)  # a view
        return windows[torch.arange(n, device=x.device), :, top, left]

    return crop


def cutout(size: int) -> Augmentation:
    """Set a square of size x size pixels at a random place to zero (DeVries and Taylor 2017, section 3)."""
    if size < 1:
        raise Refused(f"cutout = {size}: give 1 or more pixels.")

    def cut(x: Tensor, draw: Draw) -> Tensor:
        height, width = x.shape[2:]
        centres = draw(2) * torch.tensor([height, width])
        top, left = send((centres - size / 2).round().long().T[:, :, None].contiguous(), x.device)
        rows, columns = torch.arange(height, device=x.device), torch.arange(width, device=x.device)
        inside_rows, inside_columns = (rows >= top) & (rows < top + size), (columns >= left) & (columns < left + size)
        return x.masked_fill((inside_rows[:, :, None] & inside_columns[:, None, :])[:, None], 0)

    return cut


def random_flip(x: Tensor, draw: Draw) -> Tensor:
    """Mirror each image of x [B, C, H, W] left to right with probability 1/2."""
    width = x.shape[3]
    mirrored = draw(1) < 0.5
    columns = torch.where(mirrored, torch.arange(width).flip(0), torch.arange(width))  # [N, W]
    # On a CPU a gather takes half the time of torch.where on the images.
    return x.gather(3, send(columns, x.device)[:, None, None, :].expand_as(x))
