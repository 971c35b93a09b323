"""A table of a network's layers."""

from typing import Any

import torch
from torch import Tensor, nn

MAX_ROWS = 40


def summarise(network: nn.Module, x: Tensor) -> tuple[Tensor, str]:
    """Runs the network once on the batch x, in eval mode and without gradients.

    Returns its output and the summary: name, type, output shape (without the batch) and parameters
    of each layer, as deep into the network as three levels and MAX_ROWS rows reach. The network is
    left as it was.
    """
    shapes: dict[nn.Module, str] = {}

    def record(module: nn.Module, _: Any, output: Any) -> None:
        shapes[module] = _shape(output)

    training = [m for m in network.modules() if m.training]
    hooks = [m.register_forward_hook(record) for m in network.modules()]
    try:
        network.eval()
        with torch.no_grad():
            output: Tensor = network(x)
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True

    rows = [("layer", "type", "output", "parameters")]
    for name, module, n_parameters in _layers(network):
        kind = type(module).__name__
        rows.append((name, kind, shapes.get(module, "-"), f"{n_parameters:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {shape:<{widths[2]}}  {number:>{widths[3]}}"
        for name, kind, shape, number in rows
    ]
    n_total = sum(p.numel() for p in network.parameters())
    n_trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    lines.append(f"{n_total:,} parameters, {n_trainable:,} of them trainable")
    return output, "\n".join(lines)


def _shape(output: Any) -> str:
    """Of the first tensor, without the batch: some layers return several."""
    while isinstance(output, tuple | list) and output:
        output = output[0]
    return "x".join(map(str, output.shape[1:])) if isinstance(output, Tensor) else "-"


def _layers(network: nn.Module) -> list[tuple[str, nn.Module, int]]:
    """Name, module and number of parameters, of modules without parts, of all at the greatest depth
    that gives no more than MAX_ROWS rows, and of those with parameters of their own beside parts.
    """
    modules = [(name, m, name.count(".") + 1 if name else 0) for name, m in network.named_modules()]
    layers: list[tuple[str, nn.Module, int]] = []
    for depth in range(min(3, max(level for _, _, level in modules)) + 1):
        deeper = []
        for name, module, level in modules:
            whole = level == depth or not any(True for _ in module.children())
            n_parameters = sum(p.numel() for p in module.parameters(recurse=whole))
            if level <= depth and (whole or n_parameters):
                deeper.append((name or "(itself)", module, n_parameters))
        if depth > 1 and len(deeper) > MAX_ROWS:
            break
        layers = deeper
    return layers
