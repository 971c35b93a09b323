"""What an epoch sums up: its loss, and metrics: accuracy here, any other from torchmetrics by name."""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gin
import torch
from torch import Tensor, nn

from src.config import Refused, nearest
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


class LossList(nn.Module):
    """The loss, with its values of the epoch: a list of detached tensors, summed once.

    Of several processes each notes its rows' share of a batch's loss; `read` puts the shares together.
    """

    def __init__(self, function: nn.Module, team: Team = ALONE) -> None:
        super().__init__()
        self.function, self.team = function, team
        self.values: list[Tensor] = []
        self.sizes: list[int] = []
        self.n_whole = 0  # values that are those of all rows already

    def of(self, output: Tensor, y: Tensor, n: int) -> Tensor:
        """The loss [] of our rows of a batch of n, which is noted; without a row 0. output, y: [rows, ...]."""
        has_rows = n >= self.team.size or len(y)  # a tensor's len costs as much as ten comparisons
        loss: Tensor = self.function(output, y) if has_rows else output.sum()
        own = loss.detach()
        self.values.append(own * (len(y) / n) if self.team.size > 1 else own)
        self.sizes.append(n)
        return loss

    def read(self, begin: int = 0) -> Tensor:
        """The values from step `begin` of the epoch on, on the CPU: waits for the device, and for the others."""
        if self.team.size > 1 and self.n_whole < len(self.values):
            self.values[self.n_whole :] = self.team.total(torch.stack(self.values[self.n_whole :]))
        self.n_whole = len(self.values)
        values = self.values[begin:]
        return torch.stack(values).cpu() if values else torch.zeros(0)

    def compute(self) -> Tensor:
        """The mean over the epoch's images."""
        sizes = torch.tensor(self.sizes, dtype=torch.float64)
        return (self.read().double() * sizes).sum() / sizes.sum()

    def reset(self) -> None:
        """Forgets the epoch."""
        self.values, self.sizes, self.n_whole = [], [], 0

    def pending(self) -> dict[str, Any]:
        """What a commit inside an epoch keeps."""
        return {"values": self.read(), "sizes": list(self.sizes)}

    def load_pending(self, pending: Mapping[str, Any], device: torch.device) -> None:
        """Takes back what `pending` gave."""
        self.values = list(pending["values"].to(device))
        self.sizes = list(pending["sizes"])
        self.n_whole = len(self.values)


class MetricList(nn.Module):
    """The metrics of an epoch, fed every 32 batches on a fixed grid, with the rows of all processes."""

    def __init__(self, metrics: Sequence[nn.Module], team: Team = ALONE) -> None:
        super().__init__()
        self.metrics, self.team = nn.ModuleList(metrics), team
        self.names = [str(getattr(m, "name", type(m).__name__.lower())) for m in metrics]
        if len(set(self.names)) < len(self.names):
            raise Refused(f"two metrics have one name: {', '.join(self.names)}: give one a scope")
        self.waiting: list[tuple[Tensor, Tensor]] = []
        self.sizes: list[int] = []

    def update(self, output: Tensor, y: Tensor, n: int) -> None:
        """Our rows of a batch of n. output: [rows, C, ...], y: [rows, ...]."""
        self.waiting.append((output, y))
        self.sizes.append(n)
        if len(self.waiting) == FEED_EVERY:
            self._feed()

    def _whole(self, waiting: Sequence[tuple[Tensor, Tensor]], sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """The batches that wait, with the rows of all."""
        return list(zip(*(self.team.gather(column, sizes) for column in zip(*waiting, strict=True)), strict=True))

    def _feed(self) -> None:
        if self.waiting:
            outputs, labels = (torch.cat(column) for column in zip(*self._whole(self.waiting, self.sizes), strict=True))
            for metric in self.metrics:
                metric.update(outputs, labels)  # type: ignore[operator]
            self.waiting, self.sizes = [], []

    def compute(self) -> dict[str, Tensor]:
        """Each metric's value by its name."""
        self._feed()
        values = {
            name: metric.compute()  # type: ignore[operator]
            for name, metric in zip(self.names, self.metrics, strict=True)
        }
        return values if self.team.size == 1 else self.team.share(values)  # GPUs may differ in the last bit

    def reset(self) -> None:
        """Forgets the epoch."""
        self.waiting, self.sizes = [], []
        for metric in self.metrics:
            metric.reset()  # type: ignore[operator]

    def pending(self) -> dict[str, Any]:
        """What a commit inside an epoch keeps, but for the rows of the other processes: `complete` adds them."""
        state = copy.deepcopy(self.metrics.state_dict())
        waiting = [(output.cpu(), y.cpu()) for output, y in self.waiting]
        return {"metrics": state, "waiting": waiting, "sizes": list(self.sizes)}

    def complete(self, pending: Mapping[str, Any]) -> dict[str, Any]:
        """What `pending` gave, with the rows of all."""
        return {"metrics": pending["metrics"], "waiting": self._whole(pending["waiting"], pending["sizes"])}

    def load_pending(self, pending: Mapping[str, Any], device: torch.device) -> None:
        """Takes back our rows of what `complete` gave."""
        self.metrics.load_state_dict(pending["metrics"])
        self.metrics.to(device)  # torchmetrics keeps the tensors it is given, on the CPU
        self.sizes = [len(y) for _, y in pending["waiting"]]
        own = [self.team.part.rows(n) for n in self.sizes]
        batches = zip(pending["waiting"], own, strict=True)
        self.waiting = [(output[rows].to(device), y[rows].to(device)) for (output, y), rows in batches]


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
        built.sync_on_compute = False  # it is given the rows of all processes
        return built

    own = inspect.Parameter("n_classes", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = [p.replace(kind=p.KEYWORD_ONLY) for p in given if p.kind is not p.VAR_KEYWORD and p.name != "num_classes"]
    build.__signature__ = inspect.Signature([own, *named])  # type: ignore[attr-defined]
    module, _, last = full_name.rpartition(".")
    gin.external_configurable(build, name=last, module=module, denylist=["n_classes"])


def _snake(name: str) -> str:
    words = "".join(f"_{c.lower()}" if c.isupper() else c for c in name)
    return words.lstrip("_")
