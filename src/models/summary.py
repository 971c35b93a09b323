"""A table of a network's layers."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook


def summarise(network: nn.Module, x: Tensor) -> tuple[Tensor, str]:
    """Runs the network once on the batch x [B, ...], in eval mode and without gradients, and leaves it as it was.

    Returns its output, and name, type, output shape (without the batch) and parameters of each layer, two levels deep.
    """
    shapes: dict[nn.Module, str] = {}

    def record(module: nn.Module, _: Any, output: Any) -> None:
        shapes[module] = "x".join(map(str, output.shape[1:])) if isinstance(output, Tensor) else "-"

    training = [m for m in network.modules() if m.training]
    try:
        with register_module_forward_hook(record), torch.no_grad():
            output: Tensor = network.eval()(x)
    finally:
        for module in training:
            module.training = True

    rows = [("layer", "type", "output", "parameters")]
    for name, module in network.named_modules():
        is_whole = name.count(".") == 1 or not list(module.children())
        n = sum(p.numel() for p in module.parameters(recurse=is_whole))
        if name.count(".") <= 1 and (is_whole or n):  # a module above may have parameters beside its layers
            rows.append((name or "(itself)", type(module).__name__, shapes.get(module, "-"), f"{n:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([*map(str.ljust, row[:3], widths), row[3].rjust(widths[3])]) for row in rows]
    n_total = sum(p.numel() for p in network.parameters())
    n_trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    return output, "\n".join([*lines, f"{n_total:,} parameters, {n_trainable:,} of them trainable"])
