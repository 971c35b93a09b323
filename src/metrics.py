"""What an epoch sums up: its loss, and metrics: accuracy here, any other from torchmetrics by name."""

import copy
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import gin
import torch
from torch import Tensor, nn

from src.callbacks.progress import NOT_METRICS
from src.config import Refused, library, nearest, register_builder
from src.distributed import ALONE, Team

FEED_EVERY = 32  # batches; a metric costs tens of microseconds a call, whatever the batch's size


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
        """logits: [N, C, ...], labels: [N, ...]. Raises ValueError for labels that are no classes."""
        if labels.is_floating_point():
            raise ValueError("Accuracy needs classes, but the targets are numbers: set training_loop.metrics to others")
        self.correct += (logits.argmax(dim=1) == labels).sum()
        self.count += labels.numel()

    def compute(self) -> Tensor:
        """The accuracy [] since the last reset, in %."""
        return 100 * self.correct / self.count

    def reset(self) -> None:
        """Forgets what was counted."""
        self.correct.zero_()
        self.count.zero_()


class Sums(nn.Module):
    """What an epoch has gathered: the loss of each batch, and what the metrics have counted.

    The losses are a list of detached tensors, read seldom; of several processes each notes its rows' share of them.
    The metrics are fed every 32 batches on a fixed grid, with the rows of all processes.
    """

    values: list[Tensor]  # losses that were not read yet: of our rows, on the device
    whole: Tensor  # losses that were read: of all rows, on the CPU
    sizes: list[int]  # images of each batch
    waiting: list[tuple[Tensor, Tensor]]  # our rows of the batches that the metrics were not fed yet

    def __init__(self, loss: nn.Module, metrics: Sequence[nn.Module], team: Team = ALONE) -> None:
        super().__init__()
        self.loss, self.metrics, self.team = loss, nn.ModuleList(metrics), team
        self.names = [str(getattr(m, "name", type(m).__name__.lower())) for m in metrics]
        taken = [*self.names, "loss", *NOT_METRICS]
        if twice := [name for name in self.names if taken.count(name) > 1]:
            raise Refused(f"a metric is named {twice[0]}, as another column of history.csv is: give it a scope")
        self.reset()

    def update(self, output: Tensor, y: Tensor, n: int) -> Tensor:
        """The loss [] of our rows of a batch of n, 0 without a row; all is noted. output, y: [rows, ...]."""
        has_rows = n >= self.team.size or len(y)  # a tensor's len costs as much as ten comparisons
        loss: Tensor = self.loss(output, y) if has_rows else output.sum()
        own = loss.detach()
        self.values.append(own * (len(y) / n) if self.team.size > 1 else own)
        self.sizes.append(n)
        self.waiting.append((output.detach(), y))
        if len(self.waiting) == FEED_EVERY:
            self.feed()
        return loss

    def feed(self) -> None:
        """Gives the metrics what waits: at each 32nd batch and at the epoch's end."""
        if self.waiting:
            outputs, targets = map(torch.cat, self._gathered())
            for metric in self.metrics:
                metric.update(outputs, targets)  # type: ignore[operator]
            self.waiting = []

    def _gathered(self) -> list[list[Tensor]]:
        """The outputs and the targets of the batches that wait, with the rows of all."""
        sizes = self.sizes[-len(self.waiting) :]
        return [self.team.gather(column, sizes) for column in zip(*self.waiting, strict=True)]

    def losses(self) -> Tensor:
        """The loss of each batch so far [batches], on the CPU: waits for the device, and for the others."""
        if self.values:
            self.whole = torch.cat([self.whole, self.team.total(torch.stack(self.values)).cpu()])
            self.values = []
        return self.whole

    def mean_loss(self) -> Tensor:
        """The mean [] over the epoch's images."""
        sizes = torch.tensor(self.sizes, dtype=torch.float64)
        return (self.losses().double() * sizes).sum() / sizes.sum()

    def compute(self) -> dict[str, float]:
        """Each metric's value by its name. Raises ValueError for one that gives several numbers."""
        self.feed()
        values = {name: metric.compute() for name, metric in zip(self.names, self.metrics, strict=True)}  # type: ignore[operator]
        for name, value in values.items():
            if value.numel() != 1:
                raise ValueError(f"{name} gives {value.numel()} numbers, not one")
        found: dict[str, float] = self.team.share({name: float(value) for name, value in values.items()})
        return found  # the first process's: GPUs may differ in the last bit

    def reset(self) -> None:
        """Forgets the epoch."""
        self.values, self.whole, self.sizes, self.waiting = [], torch.zeros(0), [], []
        for metric in self.metrics:
            metric.reset()  # type: ignore[operator]

    def pending(self) -> dict[str, Any]:
        """What a commit inside an epoch keeps, with the rows of all processes; on the CPU."""
        waiting = [(output.cpu(), y.cpu()) for output, y in zip(*self._gathered(), strict=True)]
        metrics = copy.deepcopy(self.metrics.state_dict())
        return {"losses": self.losses(), "sizes": list(self.sizes), "metrics": metrics, "waiting": waiting}

    def load_pending(self, pending: Mapping[str, Any], device: torch.device) -> None:
        """Takes back our rows of what `pending` gave."""
        self.metrics.load_state_dict(pending["metrics"])
        self.metrics.to(device)  # torchmetrics keeps the tensors it is given, on the CPU
        self.values, self.whole, self.sizes = [], pending["losses"], list(pending["sizes"])
        rows = [self.team.part.rows(len(y)) for _, y in pending["waiting"]]
        batches = zip(rows, pending["waiting"], strict=True)
        self.waiting = [(output[own].to(device), y[own].to(device)) for own, (output, y) in batches]


@library("torchmetrics.")
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
    parameters = inspect.signature(metric).parameters

    def build(n_classes: int, **settings: Any) -> Any:
        if "num_classes" in parameters:
            settings["num_classes"] = n_classes
        built = metric(**settings)
        words = re.sub(r"(?<=[a-z\d])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", metric.__name__)  # F1_Score, AUROC
        built.name = gin.current_scope_str() or words.lower()
        built.persistent(True)  # its sums belong in the checkpoint
        built.sync_on_compute = False  # it is given the rows of all processes
        return built

    register_builder(full_name, build, [p for p in parameters.values() if p.name != "num_classes"])
