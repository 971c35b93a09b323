"""Metrics: accuracy here, any other from torchmetrics by name."""

import inspect
from collections.abc import Callable
from typing import Any

import gin
import torch
from torch import Tensor, nn

from src.config import Refused, nearest


@gin.register
class Accuracy(nn.Module):
    """Share of rows whose largest logit is the label's, in %. History column: acc."""

    name = "acc"
    correct: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("correct", torch.zeros((), dtype=torch.int64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """logits: [N, C, ...], labels: [N, ...]."""
        self.correct += (logits.argmax(dim=1) == labels).sum()
        self.count += labels.numel()

    def compute(self) -> Tensor:
        """The accuracy since the last reset, in %."""
        return 100 * self.correct / self.count

    def reset(self) -> None:
        """Forgets what was counted."""
        self.correct.zero_()
        self.count.zero_()


def register_torchmetric(full_name: str) -> None:
    """Registers `torchmetrics.X` with gin; the loop supplies num_classes. Imports torchmetrics.

    The history column is X in snake case, or the scope: `@top5/torchmetrics.Accuracy` gives top5.
    Raises Refused for an unknown name.
    """
    import torchmetrics

    name = full_name.removeprefix("torchmetrics.")
    metric: Any = torchmetrics
    for part in name.split("."):
        metric = getattr(metric, part, None)
    if not (inspect.isclass(metric) and issubclass(metric, torchmetrics.Metric)):
        raise Refused(f"torchmetrics has no metric {name}{nearest(name, torchmetrics.__all__)}")
    # A torchmetrics.F1Score is made by __new__ for the task, a MulticlassF1Score by __init__.
    maker: Callable[..., Any] = metric.__new__ if "__new__" in vars(metric) else metric.__init__
    signature = inspect.signature(maker)
    given = list(signature.parameters.values())[1:]

    def build(n_classes: int, **settings: Any) -> Any:
        if "num_classes" in signature.parameters:
            settings["num_classes"] = n_classes
        built = metric(**settings)
        built.name = gin.current_scope_str() or _snake(metric.__name__)
        built.persistent(True)  # its sums belong into the checkpoint
        return built

    own = inspect.Parameter("n_classes", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = [p.replace(kind=p.KEYWORD_ONLY) for p in given if p.kind is not p.VAR_KEYWORD and p.name != "num_classes"]
    build.__signature__ = inspect.Signature([own, *named])  # type: ignore[attr-defined]
    module, _, last = full_name.rpartition(".")
    gin.external_configurable(build, name=last, module=module, denylist=["n_classes"])


def _snake(name: str) -> str:
    words = "".join(f"_{c.lower()}" if c.isupper() else c for c in name)
    return words.lstrip("_")
